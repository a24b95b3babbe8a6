"""Logistic regression against its own optimality conditions, the search, the splits, and the program."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import MODELS
from torch import nn

import data
import pretrained
from evals import linear_probe
from readers import scenes
from util import report


def blobs(n=90, classes=3, width=4, spread=0.2, seed=0):
    """Clusters around the unit vectors, far apart: a linear classifier gets all of them right."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return torch.eye(width)[y] + spread * torch.randn(n, width, generator=g) / 2, y


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_towers_output_before_projection(small_runs, name):
    model, objects = pretrained.load(small_runs[name]), scenes.Objects("test", 5, image_size=16)
    tokens = linear_probe.encode(model, objects, batch_size=2)
    M = 3 if name in ("llip", "pooled") else 1
    assert tokens.shape == (5, M, 16) and not tokens.requires_grad
    images = torch.stack([data.preprocess(16)(objects.image(i)) for i in range(5)])
    with torch.no_grad():
        side = model.encode_image(images)
        if name in ("clip", "siglip"):
            torch.testing.assert_close(tokens[:, 0] @ model.visual.proj, side)
        if name == "llip":
            values = torch.einsum("bmd,mde->bme", tokens, model.v_proj)
            torch.testing.assert_close(model.split(values).transpose(1, 2), side[1])
    kinds = linear_probe.reduced(tokens)
    if M == 1:
        assert list(kinds) == ["class token"] and torch.equal(kinds["class token"], tokens[:, 0])
    else:
        torch.testing.assert_close(kinds["mean"], tokens.sum(1) / 3)
        assert torch.equal(kinds["concatenation"][:, 16:32], tokens[:, 1])


@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
def test_lbfgs_is_the_optimum(strength):
    """The gradient of sum CE + strength / 2 |W|^2 is 0, and the free bias gets every class' share right."""
    x, y = blobs(spread=2.0)
    weight, bias = linear_probe.fit_lbfgs(x, y, 3, strength)
    error = (x.double() @ weight + bias).softmax(-1) - F.one_hot(y, 3)  # (N, C)
    torch.testing.assert_close(x.double().t() @ error, -strength * weight, rtol=0, atol=2e-3)
    assert error.sum(0).abs().max() < 2e-3


def test_lbfgs_with_fewer_images_than_dimensions():
    """All 90 columns but four are 0: their weights are 0, and the others are those of the four alone."""
    x, y = blobs(30, spread=2.0)
    few, bias = linear_probe.fit_lbfgs(x, y, 3, 0.5)
    weight, same = linear_probe.fit_lbfgs(F.pad(x, (0, 86)), y, 3, 0.5)
    torch.testing.assert_close(weight, F.pad(few, (0, 0, 0, 86)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(same, bias, rtol=1e-3, atol=1e-4)


def test_lbfgs_in_closed_form():
    """Two points at +1 and -1: w solves  strength w = 2 sigmoid(-2 w)  for each class."""
    x, y, strength = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), 0.5
    low, high = 0.0, 10.0
    for _ in range(60):
        w = (low + high) / 2
        low, high = (w, high) if 2 / (1 + math.exp(2 * w)) > strength * w else (low, w)
    weight, bias = linear_probe.fit_lbfgs(x, y, 2, strength)
    torch.testing.assert_close(weight, torch.tensor([[w, -w]]).double(), rtol=1e-4, atol=0)
    assert bias.abs().max() < 1e-5


def test_adamw_equals_torch_layer_by_layer():
    """The same numbers as nn.Linear under torch's AdamW and CLIP_benchmark's cosine, started alike."""
    x, y = blobs(150)
    got = linear_probe.fit_adamw(x, y, 3, 0.1, seed=4, epochs=2)
    start = linear_probe.fit_adamw(x, y, 3, 0.1, seed=4, epochs=0)
    layer = nn.Linear(4, 3)
    layer.weight.data, layer.bias.data = start[0].t().clone(), start[1].clone()
    assert start[0].abs().max() <= 0.5 and start[0].std() > 0.1  # U(-1/sqrt(4), 1/sqrt(4))
    optimizer, g, step = (torch.optim.AdamW(layer.parameters(), weight_decay=0.1), torch.Generator(), 0)
    g.manual_seed(4)
    torch.rand(4, 3, generator=g), torch.rand(3, generator=g)
    for _ in range(2):
        for rows in torch.randperm(150, generator=g).split(64):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 6))
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(got, (layer.weight.data.t(), layer.bias.data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", linear_probe.SOLVERS)
def test_separable_features_are_learned_whole(solver):
    parts = {name: blobs(60, seed=k) for k, name in enumerate(("train", "val", "test"))}
    found = linear_probe.probe(solver, parts, 3)
    assert found["top1"] == found["val"] == 1.0
    x, y = parts["test"]
    parts["test"] = (x, (y + 1) % 3)  # the test only asks: wrong labels there change nothing but its figure
    assert linear_probe.probe(solver, parts, 3) == found | {"top1": 0.0}


def test_a_probe_tells_how_many_fits_are_left(monkeypatch, capsys):
    """One line for each strength on a slow machine, at most 16; no line without a label."""
    monkeypatch.setattr(report.time, "monotonic", iter(range(0, 10**6, 11)).__next__)
    monkeypatch.setitem(linear_probe.SOLVERS, "fake", (lambda x, y, C, s: (s, 0), 1e-6, 1e6, False))
    parts = dict.fromkeys(("train", "val", "test"), (torch.eye(3), torch.arange(3)))
    for best, fits in ((40, 16), (96, 12)):  # at an end, half of the neighbours do not exist
        place = 1e-6 * 10 ** (best / 8)
        near = lambda x, y, s, _, place=place: -abs(math.log(s / place))  # noqa: E731
        monkeypatch.setattr(linear_probe, "top1", near)
        quiet = linear_probe.probe("fake", parts, 3)
        assert capsys.readouterr().err == ""
        assert linear_probe.probe("fake", parts, 3, "linear-probe mean, fake") == quiet
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == fits
        assert lines[0].startswith("linear-probe mean, fake  1 of 16 fits at most  ")
        assert "ETA" in lines[0] and f"{fits} of {fits} fits" in lines[-1] and "done" in lines[-1]


def test_validation_chooses_and_then_trains_too(monkeypatch):
    """Fitted at the end: train and validation together, under the strength that validation chose."""
    seen = []

    def fit(x, y, classes, strength):
        seen.append((len(x), strength))
        return torch.eye(3)[:, :classes] * (1.0 if 1e-2 < strength < 90 else -1.0), torch.zeros(3)

    monkeypatch.setitem(linear_probe.SOLVERS, "fake", (fit, 1e-6, 1e6, False))
    eye = torch.eye(3), torch.arange(3)
    found = linear_probe.probe("fake", {"train": eye, "val": eye, "test": eye}, 3)
    assert found["top1"] == 1.0 and {n for n, _ in seen[:-1]} == {3} and seen[-1][0] == 6
    assert seen[-1][1] == found["strength"]
    assert 1e1 < found["strength"] < 1e2  # of equal ones the strongest, to an eighth of a decade
    assert found["strength"] == pytest.approx(10 ** (15 / 8))


@pytest.mark.parametrize("peak", [0, 3, 48, 57, 79, 96])
def test_search_finds_the_peak_in_few_questions(peak):
    asked = []
    assert linear_probe.search(lambda k: asked.append(k) or -abs(k - peak)) == peak
    assert len(asked) == len(set(asked)) <= 15


def parts_of(labels, seed=0):
    """The indices that split_for deals out to train, val and test."""
    y = torch.tensor(labels)
    parts = linear_probe.split_for({"all": (torch.arange(len(y)), y)}, seed)
    return [parts[name][0].tolist() for name in ("train", "val", "test")]


def test_parts_are_drawn_class_by_class():
    labels = [0] * 10 + [1] * 5 + [2] * 3
    parts = parts_of(labels)
    assert sorted(i for part in parts for i in part) == list(range(18))
    counts = [[sum(labels[i] == c for i in part) for c in range(3)] for part in parts]
    assert counts == [[6, 3, 1], [2, 1, 1], [2, 1, 1]]
    assert parts == parts_of(labels) and parts != parts_of(labels, 1)
    parts = parts_of([0, 0, 0, 1, 1])
    assert [len(part) for part in parts] == [3, 1, 1] and {3, 4} <= set(parts[0])
    with pytest.raises(ValueError, match="no class has 3 images"):
        parts_of([0, 0, 1, 1])


def command(model, *flags):
    return linear_probe.main(["--model", str(model), "--device", "cpu", *map(str, flags)])


@pytest.mark.parametrize("name", ["clip", "llip"])
def test_linear_probe_command(small_runs, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(linear_probe, "search", lambda score: max((40, 56), key=score))
    flags = ["--data", "scenes", "--limit", 32, "--out", tmp_path / "out"]
    assert command(small_runs[name], *flags) == 0
    printed, progress = capsys.readouterr()
    assert "linear-probe val  32 of 32 images" in progress and "l-bfgs  3 of 3 fits" in progress
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    kinds = ["class token"] if name == "clip" else ["mean", "concatenation"]
    assert [r["feature"] for r in result["rows"]] == [k for k in kinds for _ in range(2)]
    assert "train 32, val 32, test 32" in printed and "chance 6.25 %" in printed


def test_linear_probe_draws_the_parts_that_are_missing(small_runs, tmp_path, capsys):
    for c, name in enumerate(("cat", "dog")):
        for split, n in (("train", 5), ("val", 3)):
            (tmp_path / "split" / split / name).mkdir(parents=True)
            (tmp_path / "flat" / name).mkdir(parents=True, exist_ok=True)
            for k in range(n):
                image = Image.new("RGB", (16, 16), (250 * c, 9 * k, 0))
                image.save(tmp_path / "split" / split / name / f"{k}.png")
                image.save(tmp_path / "flat" / name / f"{split}{k}.png")
    for data_set, counts in (("split", "train 10, test 6"), ("flat", "all 16")):
        assert command(small_runs["clip"], "--data", tmp_path / data_set) == 0
        printed = capsys.readouterr().out
        assert f"images: {counts}  classes 2" in printed
        assert " 100.00 |" in printed
    x, y = torch.arange(10.0).view(10, 1), torch.arange(10) % 2
    parts = linear_probe.split_for({"all": (x, y)}, 0)
    assert [len(parts[n][1]) for n in ("train", "val", "test")] == [6, 2, 2]
    parts = linear_probe.split_for({"train": (x, y), "test": (x, y)}, 0)
    assert [len(parts[n][1]) for n in ("train", "val", "test")] == [8, 2, 10]
    assert not set(parts["train"][0].flatten().tolist()) & set(parts["val"][0].flatten().tolist())


def test_classes_that_are_too_small_to_be_tested_are_named(small_runs, tmp_path, capsys):
    for name, count in (("cat", 5), ("dog", 5), ("elk", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (16, 16), (9 * k, 0, 0)).save(tmp_path / "data" / name / f"{k}.png")
    assert command(small_runs["clip"], "--data", tmp_path / "data") == 0
    assert "warning: 1 classes have fewer than 3 images and are not tested" in capsys.readouterr().err
