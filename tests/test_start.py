"""A run that starts from a checkpoint: --image-size interpolates positions, --freeze keeps a tower."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, checkpoint, same
from small_models import CONFIG, TOKENIZER

import evaluate
import pretrained
import tasks
import train
from evals import protocol as protocols
from llip import Llip
from util.run import Run

QUICK = ["--train-size", "32", "--batch-size", "8", "--threads", "1", "--warmup", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick_evaluation(monkeypatch):
    monkeypatch.setattr(tasks.PairTask, "evaluate", lambda self, model: {})
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)


def run(out, init, *flags):
    return train.main([*QUICK, "--out", str(out), "--init", str(init), *map(str, flags)])


def names_of(state, tower):
    return {name for name in state if name.startswith(tasks.TOWERS[tower])}


# ---- images of another size


@pytest.mark.parametrize("name", ["clip", "llip", "pooled"])
def test_positions_are_interpolated(small_runs, name):
    """Four patches become sixteen; the first rows, of the class or mixture tokens, are copied."""
    model = pretrained.load(small_runs[name])
    before, tokens = model.visual.positional_embedding.detach().clone(), model.visual.tokens
    images = torch.randn(2, 3, 32, 32)
    expected = model.encode_image(images)  # the tower interpolates by itself for one pass
    model.set_image_size(32)
    after = model.visual.positional_embedding
    grid = before[tokens:].t().reshape(1, 16, 2, 2)
    grid = F.interpolate(grid, (4, 4), mode="bicubic", antialias=True).flatten(2)[0].t()
    assert torch.equal(after[:tokens], before[:tokens]) and torch.equal(after[tokens:], grid)
    assert after.requires_grad and model.config.image_size == model.visual.image_size == 32
    for a, b in zip(model.encode_image(images), expected):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="images of 30 pixels are not whole patches of 8"):
        model.set_image_size(30)


def test_training_with_larger_images(tmp_path, small_runs, monkeypatch):
    out = tmp_path / "run"
    assert run(out, small_runs["clip"], "--method", "clip", "--image-size", 24, "--steps", 1) == 0
    assert pretrained.load(out).config.image_size == 24
    assert pretrained.load(out).visual.positional_embedding.shape == (1 + 9, 16)
    monkeypatch.setattr(protocols, "HELD_OUT", 8)
    protocols.scenes_protocol.cache_clear()
    flags = ["--method", "finetune", "--target-domain", "sketch", "--batch-size", 6, "--steps", 1]
    assert run(tmp_path / "tuned", small_runs["clip"], "--image-size", 24, *flags) == 0
    protocols.scenes_protocol.cache_clear()
    model, _ = evaluate.open_model(str(tmp_path / "tuned"))
    assert model.config.image_size == 24 and model.encode_image(torch.zeros(1, 3, 24, 24)).shape == (1, 16)


def test_matrices_for_every_patch_cannot_be_interpolated(tmp_path, capsys):
    torch.manual_seed(0)
    start = pretrained.save(Llip(CONFIG, 2, 2, all_tokens=True), tmp_path / "start" / "checkpoint.pt").parent
    TOKENIZER.save(start / "tokenizer.json")
    assert run(tmp_path / "run", start, "--method", "llip", "--image-size", 24, "--steps", 1) == 2
    error = capsys.readouterr().err
    assert "a separate matrix for every patch" in error and error.count("\n") == 1


def test_a_run_starts_from_an_export_with_its_vocabulary(tmp_path, small_runs, capsys):
    folder = pretrained.save(pretrained.load(small_runs["clip"]), tmp_path / "hf", "huggingface", TOKENIZER)
    flags = ["--method", "clip", "--steps", 1]
    assert run(tmp_path / "run", folder, *flags) == 0
    assert pretrained.tokenizer_beside(tmp_path / "run").merges == TOKENIZER.merges
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    assert run(tmp_path / "other", folder, *flags) == 2
    assert "tokenizer.json is not as expected" in capsys.readouterr().err
    TOKENIZER.save(tmp_path / "vocab")
    assert run(tmp_path / "other", folder, *flags, "--vocab", tmp_path / "vocab") == 0


# ---- a frozen tower


@pytest.mark.parametrize(
    "method, tower, more",
    [
        ("clip", "image", []),
        ("clip", "text", ["--accumulate", 2]),
        ("siglip", "image", ["--grad-checkpointing"]),
        ("llip", "image", ["--accumulate", 2]),
        ("llip", "text", ["--pairs", "tiled"]),
    ],
)
def test_a_frozen_tower_keeps_every_bit(tmp_path, small_runs, method, tower, more):
    init = small_runs[method]
    assert run(tmp_path, init, "--method", method, "--freeze", tower, "--steps", 3, *more) == 0
    before, after = checkpoint(init)["state_dict"], checkpoint(tmp_path)["state_dict"]
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = names_of(before, tower)
    other = names_of(before, "text" if tower == "image" else "image")
    assert frozen and not frozen & moved
    # the gradient of a key bias is 0
    assert len(other & moved) > 0.8 * len(other) and "logit_scale" in moved
    assert frozen | other | moved == before.keys(), "the towers and the trained rest are everything"
    momenta = checkpoint(tmp_path)["optimizer"]["state"]
    assert len(momenta) == len(before) - len(frozen)


def test_a_frozen_tower_gets_no_gradient(small_runs):
    init = str(small_runs["clip"])
    flags = dict(method="clip", init=init, freeze="image", batch_size=4, train_size=8, device="cpu")
    task = tasks.PairTask(*train.configure(**flags))
    task.step(task.model, next(task.batches(0)), torch.device("cpu"))
    without = {name for name, p in task.model.named_parameters() if p.grad is None}
    assert without == names_of(task.model.state_dict(), "image")


def test_a_resumed_run_stays_frozen(tmp_path, small_runs, monkeypatch, capsys):
    flags = ["--method", "clip", "--freeze", "text", "--steps", 4, "--save-every", 2]
    assert run(tmp_path / "whole", small_runs["clip"], *flags) == 0
    save = Run.save

    def save_and_die(self, state):
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_die)
    assert run(tmp_path / "killed", small_runs["clip"], *flags) == 130
    monkeypatch.setattr(Run, "save", save)
    assert train.main(["--resume", str(tmp_path / "killed"), "--freeze", "image"]) == 2
    assert "freeze 'text' -> 'image'" in capsys.readouterr().err
    assert train.main(["--resume", str(tmp_path / "killed")]) == 0
    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    for key in ("state_dict", "optimizer"):
        assert same(whole[key], resumed[key]), key
    start = checkpoint(small_runs["clip"])["state_dict"]
    assert all(torch.equal(start[name], resumed["state_dict"][name]) for name in names_of(start, "text"))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_two_ranks_with_a_frozen_tower_are_one_run(tmp_path, small_runs, tower):
    script = "import sys, os; sys.argv[0] = 'train.py'; import train;"
    script += " train.tasks.PairTask.evaluate = lambda self, model: {};"
    script += " code = train.main(); sys.stdout.flush(); os._exit(code)"
    (tmp_path / "go.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    flags = [*QUICK, "--init", str(small_runs["clip"]), "--method", "clip", "--freeze", tower]
    flags += ["--steps", "2", "--log-every", "1"]
    assert train.main([*flags, "--out", str(tmp_path / "one")]) == 0
    port = str(31600 + os.getpid() % 2000)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command += [str(tmp_path / "go.py"), *flags, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    start, state = (checkpoint(p)["state_dict"] for p in (small_runs["clip"], tmp_path / "two"))
    assert all(torch.equal(start[name], state[name]) for name in names_of(start, tower))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "clip", "--freeze", "both"], "--freeze both: image or text"),
        (["--method", "clip", "--freeze", "image", "--init", ""], "the tower of --init"),
        (["--method", "finetune", "--freeze", "image"], "finetune has no flag --freeze; it belongs to"),
    ],
)
def test_what_cannot_be_frozen_is_one_line(tmp_path, small_runs, capsys, flags, message):
    assert run(tmp_path / "run", small_runs["clip"], *flags, "--steps", 1) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
