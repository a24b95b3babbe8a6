"""Numerical limits: bf16 and fp64, bounds of the scale, empty and equal captions, a batch of one."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint
from PIL import Image

import evaluate
import llip
import losses
import tasks as pairs
import train
from alignclip import AlignCLIP
from baselines.cocoop import CoCoOp
from baselines.coop import CoOp
from baselines.flyp import FLYP
from baselines.maple import MaPLe
from baselines.tes import TeS
from clipood import FineTune
from model import CLIP, Config
from tokenizer import Tokenizer

CONFIG = Config(16, 32, 8, 32, 2, 2, 64, 16, 600, 32, 2, 2, 64)


@pytest.fixture(autouse=True)
def quick_evaluation(monkeypatch):
    monkeypatch.setattr(pairs.PairTask, "evaluate", lambda self, model: {})


def run(out, *flags):
    common = "--device cpu --threads 1 --train-size 24 --batch-size 8 --steps 4 --log-every 1"
    return train.main([*common.split(), "--out", str(out), *map(str, flags)])


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["clip", "llip"])
def test_bf16_stays_near_fp32(method):
    """Only the towers run in bf16; normalisation and pairs are fp32, so the difference stays small."""
    torch.manual_seed(0)
    model = CLIP(CONFIG) if method == "clip" else llip.Llip(CONFIG, 4, 2)
    images, tokens = torch.randn(6, 3, 32, 32), torch.randint(1, 598, (6, 16))
    tokens[:, -1] = 599

    def logits(autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sides = model.encode_image(images), model.encode_text(tokens)
        wide = [tuple(x.float() for x in s) if isinstance(s, tuple) else s.float() for s in sides]
        with torch.no_grad():
            return model.pair_logits(*wide)

    exact, rough = logits(False), logits(True)
    scale = model.logit_scale.exp().item()
    drift = (exact - rough).abs().max().item() / scale  # as a cosine
    assert exact.dtype == rough.dtype == torch.float32
    assert 0 < drift < 0.02, drift


METHODS = {
    "finetune": lambda clip, text, tokens: FineTune(clip, text),
    "labelsmooth": lambda clip, text, tokens: FineTune(clip, text, smoothing="uniform"),
    "alignclip": lambda clip, text, tokens: AlignCLIP(clip, text),
    "flyp": lambda clip, text, tokens: FLYP(clip, tokens),
    "coop": lambda clip, text, tokens: CoOp(clip, tokens, 2),
    "cocoop": lambda clip, text, tokens: CoCoOp(clip, tokens, 2),
    "maple": lambda clip, text, tokens: MaPLe(clip, tokens, 2, 2),
    "tes": lambda clip, text, tokens: TeS(clip, text),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_works_in_fp64(name):
    """Loss, gradients and predictions of an fp64 model are fp64, and no step of them is rounded to fp32."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 598, (3, 16))
    tokens[:, 0], tokens[:, 5], tokens[:, 6:] = 598, 599, 0
    text = F.normalize(torch.randn(3, 16, dtype=torch.float64), dim=-1)
    method = METHODS[name](CLIP(CONFIG).double(), text, tokens).double()
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    losses = []
    # fp32 would round the change of the loss to 0 or to at least 6e-8
    for offset in (0.0, 1e-9):
        with torch.no_grad():
            method.clip.visual.positional_embedding += offset * torch.randn(17, 32, dtype=torch.float64)
        loss, _ = method.loss(images, labels)
        losses.append(loss.item())
    loss.backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None]
    assert loss.dtype == method.predict(images).dtype == torch.float64
    assert gradients and all(g.dtype == torch.float64 for g in gradients)
    assert 0 < abs(losses[1] - losses[0]) < 3e-8


def test_training_in_bf16_stays_near_fp32(tmp_path):
    for precision in ("fp32", "bf16"):
        assert run(tmp_path / precision, "--precision", precision) == 0
    a, b = (logged(tmp_path / p)[0]["loss"] for p in ("fp32", "bf16"))
    assert a != b and a == pytest.approx(b, rel=0.02)


@pytest.mark.parametrize("method", ["clip", "siglip", "llip"])
def test_the_scale_keeps_its_bounds(tmp_path, method):
    """PAPER: the scale is at most 100. Here it is also at least 1, for every learning rate."""
    for sign in (100.0, 1.0):
        out = tmp_path / str(sign)
        # without bounds, one step of this size would be enough to exceed them
        code = run(out, "--method", method, "--logit-scale", sign, "--lr", 3.0, "--warmup", 0)
        if code == 0:
            state = checkpoint(out)["state_dict"]
            assert 0 <= state["logit_scale"].item() <= math.log(100) + 1e-6
            assert "logit_bias" not in state or state["logit_bias"].isfinite()
        assert all(1 - 1e-6 <= m["scale"] <= 100 + 1e-3 for m in logged(out))


def write_pairs(folder, captions):
    for k in range(len(captions)):
        Image.new("RGB", (32, 32), (k * 9 % 255, 255 - k, 40)).save(folder / f"{k}.png")
    rows = "".join(f'{k}.png,"{text}"\n' for k, text in enumerate(captions))
    (folder / "t.csv").write_text("image,title\n" + rows)
    return folder / "t.csv"


@pytest.mark.parametrize("method", ["clip", "llip"])
def test_captions_all_equal(tmp_path, method):
    """With equal texts the loss is finite, and InfoNCE cannot fall below ln of the batch size."""
    path = write_pairs(tmp_path, ["a cat"] * 16)
    assert run(tmp_path / "run", "--method", method, "--train-data", path) == 0
    values = [m["loss"] for m in logged(tmp_path / "run")]
    assert all(map(math.isfinite, values))
    assert method != "clip" or min(values) >= math.log(8) - 1e-3


def test_empty_captions_are_left_out_and_none_left_is_an_error(tmp_path, capsys):
    path = write_pairs(tmp_path, ["a cat", "", "   ", "<|endoftext|>"] * 4)
    assert run(tmp_path / "run", "--train-data", path, "--batch-size", 4) == 0
    out, err = capsys.readouterr()
    assert "4 images" in out and "12 empty captions skipped" in err
    path = write_pairs(tmp_path, ["", " "])
    assert run(tmp_path / "more", "--train-data", path) == 2
    assert "no caption in 2 rows" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["clip", "siglip", "llip"])
def test_a_batch_of_one(tmp_path, method):
    """InfoNCE of one pair is 0; the sigmoid loss still depends on the pair."""
    assert run(tmp_path / "run", "--method", method, "--batch-size", 1, "--train-size", 4) == 0
    values = [m["loss"] for m in logged(tmp_path / "run")]
    assert all(math.isfinite(v) and v >= 0 for v in values)
    assert method != "clip" or values == [0.0] * 4
    assert losses.info_nce(torch.tensor([[3.0]])) == 0


def test_one_class_of_data(tmp_path):
    """With one class, zero-shot accuracy and chance are both 1."""
    (tmp_path / "d" / "cat").mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (32, 32), (k, 0, 0)).save(tmp_path / "d" / "cat" / f"{k}.png")
    rows = [(tmp_path / "d" / "cat" / f"{k}.png").name for k in range(3)]
    (tmp_path / "d" / "t.csv").write_text("image,label\n" + "".join(f"cat/{r},cat\n" for r in rows))
    dataset = evaluate.data.open_dataset(tmp_path / "d" / "t.csv")
    tokenizer = Tokenizer.learn(["a photo of a cat"], 600)
    torch.manual_seed(0)
    model = CLIP(Config(16, 32, 8, 32, 1, 1, 64, 77, tokenizer.vocab_size, 32, 1, 1, 64)).eval()
    found = evaluate.zeroshot(model, dataset, tokenizer, ("a photo of a {}",))
    assert found["top1"] == 1.0 and found["chance"]["top1"] == 1.0
