"""bench.py: that arms alternate, that ratios are of the same work, and that every section runs."""

import io
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
from alignclip import AlignCLIP
from clipood import FineTune
from lab import bench, gpu, peers
from model import CLIP, Config
from readers import scenes
from readers import templates as prompts
from tokenizer import Tokenizer

CPU = torch.device("cpu")
TINY = Config(32, 32, 8, 32, 3, 2, 64, 8, 600, 32, 2, 2, 64)


def started(out="", **flags):
    return bench.Bench(bench.BenchConfig(device="cpu", toy=True, repeats=3, out=str(out), **flags))


def test_arms_take_turns_and_the_first_run_is_not_counted():
    calls, b = [], started()
    b.compare("names", {name: lambda device, name=name: partial(calls.append, name) for name in "ab"})
    assert calls == ["a", "b"] + ["a", "b"] + ["b", "a"] + ["a", "b"]
    assert [(row["arm"], len(row["ratios"])) for row in b.rows] == [("a", 3), ("b", 3)]
    assert b.rows[0]["ratios"] == [1, 1, 1]


def test_an_arm_without_memory_has_a_row_and_the_others_go_on(tmp_path):
    """Each row is written at once, so that a run that is stopped loses nothing."""

    def greedy(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    b = started(tmp_path)
    b.compare("memory", {"greedy": greedy, "small": lambda device: lambda: None})
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["arm"], row["ms"] == "no memory") for row in rows] == [("greedy", True), ("small", False)]
    assert rows[1]["ratio"] == 1


def test_the_published_form_is_the_same_number():
    """Loss and all gradients."""
    published, tiled = (
        bench.objective_case(form, 6, 3, CPU, torch.float64)() for form in ("published", "tiles")
    )
    for a, b in zip(tiled, published, strict=True):
        torch.testing.assert_close(a, b)


def test_peak_memory_is_what_is_allocated_at_a_time():
    def run():
        x = torch.ones(25, 1 << 20)  # 100 MiB
        (x + 1).sum()
        x.sum()

    assert bench.peak_bytes(run, CPU) == pytest.approx(200 << 20, rel=1e-3)


@pytest.fixture
def tiny(monkeypatch):
    """Every section at the size of a toy."""
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14"):
        monkeypatch.setitem(bench.CONFIGS, name, TINY)


@pytest.mark.parametrize(
    "section, arms",
    [
        ("towers", {"here"}),
        pytest.param("objective", {"published", "tiles"}, marks=pytest.mark.slow),
        ("alignclip", {"CLIPood as published", "CLIPood", "AlignCLIP dv", "AlignCLIP vvv"}),
        ("prompts", {"CLIPood", "CLIP", "AlignCLIP", "CoOp", "CoCoOp", "MaPLe"}),
        ("llip", {"clip", "siglip", "llip", "10 prompts", "10000 prompts"}),
    ],
)
def test_sections(tiny, tmp_path, section, arms, capsys):
    assert bench.main([section, "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert arms <= {row["arm"] for row in found["rows"]}
    for row in found["rows"]:
        assert "error" in row or (math.isfinite(row["ratio"]) and row["ratio"] > 0)
    assert "quartiles" in capsys.readouterr().out


def test_mistakes_get_one_line(capsys):
    for argv in (["objectives"], ["--repeats", "1"], ["--precision", "fp16"]):
        assert bench.main(argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit):
        bench.main(["--fast"])
    capsys.readouterr()


def test_missing_peers_are_named(capsys):
    found = peers.installed()
    warnings = capsys.readouterr().err.splitlines()
    assert len(found) + len(warnings) == 2
    assert all("is not measured" in text for text in warnings)


def test_methods_predict_alike_over_the_same_weights():
    """AlignCLIP's finished model is CLIPood's: the branch exists in training only."""
    clip, pictures = bench.build("clip", TINY, CPU), bench.random_batch(TINY, 2, CPU)[0]
    text = torch.nn.functional.normalize(torch.randn(10, TINY.embed_dim), dim=-1)
    with torch.no_grad():
        answers = [method(clip, text).predict(pictures) for method in (FineTune, AlignCLIP)]
    assert torch.equal(*answers)


def photo(width, height, seed=0):
    """A JPEG with about the spectrum of a photograph: noise, half as strong where it is finer."""
    rng, total = np.random.default_rng(seed), 0
    for cells, share in ((4, 8), (16, 4), (64, 2), (256, 1)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        finer = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float)
        total = total + share * finer / 15
    buffer = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# Promises about speed that no clock is needed for -----------------------------------------------------------


def test_evaluation_never_decodes_smaller():
    """TRAP: the decoder's own halving is for training crops; evaluation must be OpenAI's to the bit."""
    file = photo(640, 480)
    lazy, loaded = open_jpeg(file), open_jpeg(file)
    loaded.load()
    pixels = data.preprocess(64).pixels(lazy)
    assert lazy.size == (640, 480)
    assert np.array_equal(pixels, data.preprocess(64).pixels(loaded))


def open_jpeg(content):
    return Image.open(io.BytesIO(content))


def test_training_crops_of_smaller_decoding_are_close():
    """The bound: 1 of 255 on average, 8 at most. TRAP: edges of the part rounded to a pixel of the smaller
    picture move it by up to half of one, which is 5 of 255 on photographs."""
    for seed in range(3):
        file, crop = photo(1024, 768, seed), data.RandomCrop(64).pixels
        small = crop(open_jpeg(file), data.generator(seed))
        whole = crop(open_jpeg(file).convert("RGB"), data.generator(seed))
        off = np.abs(np.asarray(small, int) - np.asarray(whole, int))
        assert off.mean() < 1 and off.max() <= 8


def test_each_prompt_of_a_class_is_encoded_once(monkeypatch):
    """Classes x templates, and images that come later ask for none of them again."""
    tokenizer = Tokenizer.learn(["a photo of a thing"] * 3, 600)
    config = Config(**{**TINY.__dict__, "vocab_size": tokenizer.vocab_size, "context_length": 40})
    model, asked = CLIP(config).eval(), []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda x: asked.append(len(x)) or encode(x))
    things = scenes.Objects("test", 40, image_size=32)
    evaluate.zeroshot(model, things, tokenizer, prompts.TEMPLATES["imagenet80"], batch_size=8)
    assert sum(asked) == 80 * len(things.classes)


@pytest.mark.parametrize("name", ["clip", "siglip", "llip", "AlignCLIP"])
def test_a_step_never_waits_for_the_device(tiny, name):
    """No number is read back between log lines: each .item() would stop a GPU's queue."""
    if name == "AlignCLIP":
        run = bench.finetune_case("alignclip", "ViT-B-32", 2, CPU, update=False)
    else:
        run = bench.step_case(name, "ViT-B-32", 4, CPU, update=False)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.key for event in profile.key_averages()}
    assert "aten::mm" in names or "aten::addmm" in names
    assert "aten::_local_scalar_dense" not in names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).sum().item()
    assert "aten::_local_scalar_dense" in {event.key for event in profile.key_averages()}


def test_a_ratio_that_became_worse_is_named():
    recorded = """
| what      | arm         | ratio | quartiles   |
| --------- | ----------- | ----: | ----------- |
| a step    | tiles       | 0.300 | 0.280-0.320 |
| a step    | open_clip   | 1.100 | 1.080-1.120 |
"""
    rows = [
        {"what": "a step", "arm": "tiles", "ratio": 0.35, "quartiles": "0.330-0.370"},
        {"what": "a step", "arm": "open_clip", "ratio": 1.3, "quartiles": "1.200-1.400"},
        {"what": "another", "arm": "tiles", "ratio": 9.0, "quartiles": "9.000-9.000"},
        {"what": "a step", "arm": "tiles", "ms": "no memory"},
    ]
    worse, counted = bench.slower(rows, recorded)
    assert worse == "slower: a step, tiles: 0.350, recorded 0.300" and counted.startswith("2 ratios")
    rows[0] |= {"quartiles": "0.310-0.370"}
    rows[1] |= {"ratio": 1.0, "quartiles": "0.990-1.010"}
    worse, counted = bench.slower(rows, recorded)
    assert worse == "slower: a step, open_clip: 1.000, recorded 1.100"


# lab/gpu.py


@pytest.mark.slow
def test_the_rehearsal_of_the_gpu_runs_every_part(tmp_path):
    out = tmp_path / "gpu"
    assert gpu.main(["--rehearse", "--minutes", "60", "--out", str(out)]) == 0
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    assert [row["status"] for row in parts] == [0] * 9 and {row["part"] for row in parts} == gpu.PARTS.keys()
    rows = [row for f in out.glob("*/bench.json") for row in json.loads(f.read_text())["rows"]]
    sections = " ".join(gpu.PARTS.values()).split()
    assert {row["section"] for row in rows} == set(sections) == bench.SECTIONS.keys()
    assert all(row["error"] < 1e-5 for row in rows if "error" in row)
    assert all("GB expected" in row for row in rows if "MFU %" in row) and any("MFU %" in row for row in rows)
    assert len([*out.glob("training-*/metrics.jsonl")]) == 3


def test_a_part_that_is_out_of_time_does_not_stop_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu, "commands", lambda c, part, device: [["-c", f"import time; time.sleep({part == 'tests'} * 60)"]]
    )
    flags = ["tests", "steps", "--rehearse", "--minutes", "0.1", "--out", str(tmp_path)]
    assert gpu.main(flags) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [row["status"] for row in parts] == ["out of time", 0]
    monkeypatch.setattr(gpu, "commands", lambda c, part, device: [["-c", "raise SystemExit(3)"]])
    assert gpu.main([*flags[:-1], str(tmp_path / "other")]) == 2


@pytest.mark.parametrize(
    "flags, message",
    [(["speed"], "part 'speed': there are"), ([], "cuda:0 does not exist"), (["--rehearse"], "is not empty")],
)
def test_what_lab_gpu_refuses(tmp_path, capsys, flags, message):
    if message == "cuda:0 does not exist" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "mine.json").write_text("{}")
    assert gpu.main([*flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
