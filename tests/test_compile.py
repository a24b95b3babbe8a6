"""What a GPU needs, checked without one: one graph without a break, and a step that never waits for it."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import data
import train
from alignclip import AlignCLIP
from clipood import FineTune
from llip import Llip
from model import CLIP, Config
from readers import scenes
from scale.gradcache import training_step
from scale.llip_tiles import TiledLlip

SIZES = Config(16, 16, 8, 16, 2, 2, 32, 8, 50, 16, 1, 2, 32)


def pairs():
    tokens = torch.randint(1, 48, (3, 8), generator=torch.Generator().manual_seed(0))
    tokens[:, 6] = 49
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)), tokens


def fine_tuned(cls):
    text = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(2)), dim=-1)
    return cls(CLIP(SIZES), text)


CASES = {
    "clip": lambda: (CLIP(SIZES), pairs()),
    "llip": lambda: (Llip(SIZES, 3, 2, norm=True), pairs()),
    "clipood": lambda: (fine_tuned(FineTune), (pairs()[0], torch.tensor([0, 3, 1]))),
    "alignclip": lambda: (fine_tuned(AlignCLIP), (pairs()[0], torch.tensor([0, 3, 1]))),
}


def tensors(found):
    """All tensors of a nested result, including those of the dict for the log."""
    if isinstance(found, torch.Tensor):
        return [found]
    return [x for y in (found.values() if isinstance(found, dict) else found) for x in tensors(y)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_no_graph_break(name, checkpointing):
    """fullgraph raises an error at the first break; the eager backend runs the captured graph."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = CASES[name]()
    getattr(model, "clip", model).set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for a, b in zip(tensors(compiled(*inputs)), tensors(model(*inputs)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_counter_sees_a_break():
    class Broken(CLIP):
        def encode_image(self, images):
            return super().encode_image(images if images.mean() > 0 else -images)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="(?i)data-dependent|control flow"):
        torch.compile(Broken(SIZES), fullgraph=True, backend="eager")(*pairs())


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_compiled_llip_computes_its_loss_tile_by_tile(monkeypatch, chunks):
    torch._dynamo.reset()
    model, calls, pair_loss = TiledLlip(SIZES, 3, 2), [], TiledLlip.pair_loss
    monkeypatch.setattr(TiledLlip, "pair_loss", lambda *a: calls.append(1) or pair_loss(*a))
    expected = training_step(model, *pairs(), "siglip", chunks)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(training_step(compiled, *pairs(), "siglip", chunks), expected)
    assert len(calls) == 2


@pytest.fixture
def no_autocast(monkeypatch):
    """The meta device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("objective", ["siglip", "infonce"])
@pytest.mark.parametrize("cls", [CLIP, Llip, TiledLlip])
def test_a_step_on_pairs_never_reads_a_value(cls, objective, chunks):
    """On the meta device .item(), .cpu() and a truth test of a tensor are errors."""
    with torch.device("meta"):
        model = cls(SIZES) if cls is CLIP else cls(SIZES, 3, 2)
    training_step(model, *(x.to("meta") for x in pairs()), objective, chunks)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("cls", [FineTune, AlignCLIP])
def test_a_step_on_labels_never_reads_a_value(cls):
    model = fine_tuned(cls).to("meta")
    loss, logs = model.loss(pairs()[0].to("meta"), torch.tensor([0, 3, 1]).to("meta"))
    loss.backward()
    assert all(isinstance(x, torch.Tensor) for x in logs.values())


def test_reading_a_value_is_noticed():
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(1, device="meta").sum().item()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["llip", "clip", "siglip"])
def test_the_shapes_of_a_compiled_run_do_not_change(monkeypatch, tmp_path, method):
    """A graph for each length of the captions would be compiled again and again."""
    torch._dynamo.reset()
    frames, compiled = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: compiled(model, backend=lambda graph, _: frames.append(1) or graph)
    )
    flags = "--compile --steps 4 --batch-size 8 --train-size 64 --threads 1 --overfit 0".split()
    assert train.main(["--method", method, *flags, "--out", str(tmp_path / method)]) == 0
    assert len(frames) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_lie_in_pinned_memory(monkeypatch, workers):
    asked, loader = [], data.DataLoader
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        data,
        "DataLoader",
        lambda source, pin_memory, **options: asked.append(pin_memory) or loader(source, **options),
    )
    images = scenes.Scenes("val", 4)
    assert len(list(data.eval_batches(images, data.preprocess(32), 2, workers=workers))) == 2
    assert asked == [True]
