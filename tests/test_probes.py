"""probes.py: logistic regression against its own optimality, the cache, spectra that are known, notes that a
fake model can read, and the three commands end to end for every kind of model."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import evaluate
import pretrained
from evals import linear_probe as probes
from llip import Llip, PooledTokens
from model import CLIP, Config
from readers import scenes
from tokenizer import Tokenizer
from util import report

TEXTS = [t.format(k) for k in scenes.KINDS for t in scenes.TEMPLATES]
TOKENIZER = Tokenizer.learn(TEXTS, 600)
CONFIG = Config(16, 16, 8, 16, 1, 2, 32, 16, TOKENIZER.vocab_size, 16, 1, 2, 32)
MODELS = {
    "clip": CLIP,
    "siglip": lambda c: CLIP(c, 10.0, -5.0),
    "llip": lambda c: Llip(c, 3, 2, scale=5.0, bias=-2.0),
    "pooled": lambda c: PooledTokens(c, 3, "learned", heads=2),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root, paths = tmp_path_factory.mktemp("runs"), {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        paths[name] = root / name
        pretrained.save(make(CONFIG), paths[name] / "checkpoint.pt")
        TOKENIZER.save(paths[name] / "tokenizer.json")
    return paths


# Logistic regression -----------------------------------------------------------------------------------


def blobs(n=90, classes=3, width=4, spread=0.2, seed=0):
    """Clusters around the unit vectors, far apart: a linear classifier gets all of them right."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return torch.eye(width)[y] + spread * torch.randn(n, width, generator=g) / 2, y


@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
def test_lbfgs_is_the_optimum(strength):
    """The gradient of sum CE + strength / 2 |W|^2 is 0, and the free bias gets every class' share right."""
    x, y = blobs(spread=2.0)
    weight, bias = probes.fit_lbfgs(x, y, 3, strength)
    error = (x.double() @ weight + bias).softmax(-1) - F.one_hot(y, 3)  # (N, C)
    torch.testing.assert_close(x.double().t() @ error, -strength * weight, rtol=0, atol=2e-3)
    assert error.sum(0).abs().max() < 2e-3


def test_lbfgs_with_fewer_images_than_dimensions():
    """All 90 columns but four are 0: their weights are 0, and the others are those of the four alone."""
    x, y = blobs(30, spread=2.0)
    few, bias = probes.fit_lbfgs(x, y, 3, 0.5)
    weight, same = probes.fit_lbfgs(F.pad(x, (0, 86)), y, 3, 0.5)
    torch.testing.assert_close(weight, F.pad(few, (0, 0, 0, 86)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(same, bias, rtol=1e-3, atol=1e-4)


def test_lbfgs_in_closed_form():
    """Two points at +1 and -1: w solves  strength w = 2 sigmoid(-2 w)  for each class."""
    x, y, strength = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), 0.5
    low, high = 0.0, 10.0
    for _ in range(60):
        w = (low + high) / 2
        low, high = (w, high) if 2 / (1 + math.exp(2 * w)) > strength * w else (low, w)
    weight, bias = probes.fit_lbfgs(x, y, 2, strength)
    torch.testing.assert_close(weight, torch.tensor([[w, -w]]).double(), rtol=1e-4, atol=0)
    assert bias.abs().max() < 1e-5


def test_adamw_equals_torch_layer_by_layer():
    """The same numbers as nn.Linear under torch's AdamW and CLIP_benchmark's cosine, started alike."""
    x, y = blobs(10)
    got = probes.fit_adamw(x, y, 3, 0.1, seed=4, epochs=2, batch_size=4)
    start = probes.fit_adamw(x, y, 3, 0.1, seed=4, lr=0.0, epochs=1)
    layer = nn.Linear(4, 3)
    layer.weight.data, layer.bias.data = start[0].t().clone(), start[1].clone()
    assert start[0].abs().max() <= 0.5 and start[0].std() > 0.1  # U(-1/sqrt(4), 1/sqrt(4))
    optimizer, g, step = (torch.optim.AdamW(layer.parameters(), weight_decay=0.1), torch.Generator(), 0)
    g.manual_seed(4)
    torch.rand(4, 3, generator=g), torch.rand(3, generator=g)
    for _ in range(2):
        for rows in torch.randperm(10, generator=g).split(4):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 6))
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(got, (layer.weight.data.t(), layer.bias.data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", probes.SOLVERS)
def test_separable_features_are_learned_whole(solver):
    parts = {name: blobs(60, seed=k) for k, name in enumerate(("train", "val", "test"))}
    found = probes.probe(solver, parts, 3)
    assert found["top1"] == found["val"] == 1.0
    x, y = parts["test"]
    parts["test"] = (x, (y + 1) % 3)  # the test only asks: wrong labels there change nothing but its figure
    assert probes.probe(solver, parts, 3) == found | {"top1": 0.0}


def test_a_probe_tells_how_many_fits_are_left(monkeypatch, capsys):
    """One line for each strength on a slow machine, at most 16; no line without a label."""
    monkeypatch.setattr(report.time, "monotonic", iter(range(0, 10**6, 11)).__next__)
    monkeypatch.setitem(probes.SOLVERS, "fake", (lambda x, y, C, s: (s, 0), 1e-6, 1e6, False))
    parts = dict.fromkeys(("train", "val", "test"), (torch.eye(3), torch.arange(3)))
    for best, fits in ((40, 16), (96, 12)):  # at an end, half of the neighbours do not exist
        place = 1e-6 * 10 ** (best / 8)
        near = lambda x, y, s, _, place=place: -abs(math.log(s / place))  # noqa: E731
        monkeypatch.setattr(probes, "top1", near)
        quiet = probes.probe("fake", parts, 3)
        assert capsys.readouterr().err == ""
        assert probes.probe("fake", parts, 3, "linear-probe mean, fake") == quiet
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

    monkeypatch.setitem(probes.SOLVERS, "fake", (fit, 1e-6, 1e6, False))
    eye = torch.eye(3), torch.arange(3)
    found = probes.probe("fake", {"train": eye, "val": eye, "test": eye}, 3)
    assert found["top1"] == 1.0 and {n for n, _ in seen[:-1]} == {3} and seen[-1][0] == 6
    assert seen[-1][1] == found["strength"]
    assert 1e1 < found["strength"] < 1e2  # of equal ones the strongest, to an eighth of a decade
    assert found["strength"] == pytest.approx(10 ** (15 / 8))


@pytest.mark.parametrize("peak", [0, 3, 48, 57, 79, 96])
def test_search_finds_the_peak_in_few_questions(peak):
    asked = []
    assert probes.search(lambda k: asked.append(k) or -abs(k - peak)) == peak
    assert len(asked) == len(set(asked)) <= 15


def test_drawn_split():
    labels = [0] * 10 + [1] * 5 + [2] * 3
    parts = probes.drawn_split(labels, (0.6, 0.2, 0.2), 0)
    assert sorted(i for part in parts for i in part) == list(range(18))
    counts = [[sum(labels[i] == c for i in part) for c in range(3)] for part in parts]
    assert counts == [[6, 3, 1], [2, 1, 1], [2, 1, 1]]
    assert parts == probes.drawn_split(labels, (0.6, 0.2, 0.2), 0)
    assert parts != probes.drawn_split(labels, (0.6, 0.2, 0.2), 1)
    parts = probes.drawn_split([0, 0, 0, 1, 1], (0.6, 0.2, 0.2), 0)
    assert [len(part) for part in parts] == [3, 1, 1] and {3, 4} <= set(parts[0])
    with pytest.raises(ValueError, match="no class has 3 images"):
        probes.drawn_split([0, 0, 1, 1], (0.6, 0.2, 0.2), 0)


# Features and their cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_towers_output_before_projection(runs, name):
    model, objects = pretrained.load(runs[name]), scenes.Objects("test", 5, image_size=16)
    tokens = probes.encode(model, objects, batch_size=2)
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
    kinds = probes.reduced(tokens)
    if M == 1:
        assert list(kinds) == ["class token"] and torch.equal(kinds["class token"], tokens[:, 0])
    else:
        torch.testing.assert_close(kinds["mean"], tokens.sum(1) / 3)
        assert torch.equal(kinds["concatenation"][:, 16:32], tokens[:, 1])


def test_cache_is_used_and_forgotten_when_anything_changes(runs, tmp_path, monkeypatch):
    model, objects = pretrained.load(runs["clip"]), scenes.Objects("test", 4, image_size=16)
    calls, encode = [], probes.encode
    monkeypatch.setattr(probes, "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))

    def ask(source="clip", dataset=objects, **options):
        probes.features(runs[source], pretrained.load(runs[source]), dataset, tmp_path, **options)
        return len(calls)

    first = probes.features(runs["clip"], model, objects, tmp_path)
    assert torch.equal(probes.features(runs["clip"], model, objects, tmp_path), first)
    assert ask() == 1
    assert ask("siglip") == 2  # other weights
    assert ask(dataset=scenes.Objects("test", 5, image_size=16)) == 3  # other images
    assert ask(dataset=scenes.Objects("test", 4, 1, image_size=16)) == 4
    assert ask(precision="bf16") == 5 and ask(precision="bf16", batch_size=1) == 5
    for k, name in enumerate(("cat", "dog", "elk")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (80 * k, 0, 0)).save(tmp_path / "data" / name / "1.png")
    folder = data.open_dataset(tmp_path / "data")
    assert ask(dataset=folder) == ask(dataset=folder) == 6
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "data" / "dog" / "1.png")  # between the ends
    assert ask(dataset=folder) == 7
    assert not list(tmp_path.glob("*.part"))
    next(tmp_path.glob("*.pt")).write_bytes(b"broken")
    with pytest.raises(ValueError, match="delete it"):
        for path in tmp_path.glob("*.pt"):
            path.write_bytes(b"broken")
        ask()


# Spectrum -------------------------------------------------------------------------------------------------


def test_spectrum_of_a_known_covariance():
    """+-a_k along axis k, each equally often: the covariance is diagonal with a_k^2 / D, wherever centred."""
    scale = torch.tensor([4.0, 2.0, 1.0, 0.5])
    z = torch.cat([torch.diag(scale), -torch.diag(scale)]) + 7.0  # (8, 4)
    tokens = z.view(4, 2, 4)  # four images of two tokens
    values = probes.covariance_spectrum(tokens)
    torch.testing.assert_close(values, scale.double().square() / 4)
    row, logs = probes.spectrum_row("x", tokens)
    assert logs == pytest.approx([math.log(a * a / 4) for a in scale.tolist()])
    assert (row["tokens"], row["vectors"], row["width"]) == (2, 8, 4)
    assert row["ln s at D/2"] == logs[2]
    assert probes.effective_rank(torch.ones(5)) == pytest.approx(5)
    assert probes.effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    z[:, 1] = z[:, 0]  # a direction that nothing points to
    assert probes.spectrum_row("x", z.view(4, 2, 4))[1][-1] is None


# Words over images ----------------------------------------------------------------------------------------


def pixels_of(image):
    rgb = image.tobytes()
    return list(zip(rgb[::3], rgb[1::3], rgb[2::3]))


def test_note_is_in_what_a_centre_crop_keeps():
    grey = Image.new("RGB", (90, 60), (128, 128, 128))
    blank, word = (probes.with_note(grey, "tractor", b) for b in (True, False))
    assert grey.getextrema() == ((128, 128),) * 3  # the given image stays
    crop = (15, 0, 75, 60)
    for image in (blank, word):
        outside = image.copy()
        outside.paste((128, 128, 128), crop)
        assert outside.getextrema() == ((128, 128),) * 3
    assert blank.getextrema() == ((128, 255),) * 3 and word.getextrema()[0][0] < 30
    cover = torch.tensor([p == (255, 255, 255) for p in pixels_of(blank)]).double().mean()
    assert 0.02 < cover < 0.2
    written = {probes.with_note(grey, w).tobytes() for w in scenes.KINDS}
    assert len(written) == 16


def test_wrong_labels_are_wrong_uniform_and_fixed():
    labels = [k % 4 for k in range(800)]
    words = probes.wrong_labels(labels, 4)
    assert all(a != b for a, b in zip(words, labels)) and words == probes.wrong_labels(labels, 4)
    assert words != probes.wrong_labels(labels, 4, seed=1)
    counts = torch.bincount(torch.tensor(words)).tolist()
    assert min(counts) > 150
    with pytest.raises(ValueError, match="one class"):
        probes.wrong_labels([0, 0], 1)


def test_note_figures_by_hand():
    labels, written = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 0, 2])
    clean = torch.tensor([[0.9, 0.1, 0], [0, 0.9, 0], [0.5, 0, 0.1], [0.8, 0, 0]])  # third is wrong
    word = torch.tensor([[0.2, 0.9, 0], [0, 0.9, 0], [0.7, 0, 0.1], [0.3, 0.4, 0.3]])
    got = probes.note_figures({"clean": clean, "word": word}, labels, written)
    assert got["clean"]["top1"] == 0.75 and got["clean"]["success"] == 0.0
    assert got["clean"]["word"] == 0.25  # the third image looked like that word all along
    assert got["word"]["top1"] == 0.25 and got["word"]["word"] == 0.5
    assert got["word"]["success"] == pytest.approx(1 / 3)  # of three right when clean one was taken
    assert got["word"]["object_wins"] == 0.25  # the fourth ties: against us
    assert got["word"]["cos_object"] == pytest.approx((0.2 + 0.9 + 0.1 + 0.3) / 4)
    assert got["word"]["cos_word"] == pytest.approx((0.9 + 0 + 0.7 + 0.3) / 4)


class Solid:
    """Images of one colour each, labelled by it."""

    classes, colours = ["red", "green", "blue"], [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    labels = [0, 1, 2, 0, 1, 2, 0]

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return f"solid-{i}"

    def image(self, i):
        return Image.new("RGB", (48, 48), self.colours[self.labels[i]])


class Reader(nn.Module):
    """Sees the colour of the upper left corner; one that reads believes a note that it can make out."""

    def __init__(self, reads):
        super().__init__()
        self.config, self.reads = replace(CONFIG, image_size=48), reads
        self.logit_scale, self.logit_bias = (
            nn.Parameter(torch.tensor(2.0)),
            nn.Parameter(torch.tensor(-1.0)),
        )
        transform = data.preprocess(48)
        images = [Image.new("RGB", (48, 48), c) for c in Solid.colours]
        self.corners = torch.stack([transform(image)[:, 0, 0] for image in images])  # (C, 3)
        noted = [[transform(probes.with_note(i, w)) for w in Solid.classes] for i in images]
        self.noted = torch.stack([torch.stack(row) for row in noted])  # (colours, words, 3, S, S)

    def encode_image(self, images):
        colour = (images[:, None, :, 0, 0] - self.corners).abs().sum(-1).argmin(1)  # (B,)
        away = (images[:, None] - self.noted[colour]).flatten(2).abs().sum(-1)  # (B, words)
        read = (away < 1e-3).float() * self.reads
        return 0.5 * F.one_hot(colour, 3) + 0.4 * F.one_hot(colour, 3) * 0 + read * 0.9  # (B, C)

    def encode_text(self, tokens):
        return torch.eye(3)[tokens[:, 1]]

    def class_templates(self, templates):
        return templates

    def ensemble_text(self, side, group):
        return side

    def pair_logits(self, image, text):
        return self.logit_scale.exp() * image @ text.t() + self.logit_bias


class WordTokens:
    """Start, number of the word, end."""

    vocab_size = CONFIG.vocab_size

    def __call__(self, texts, length):
        ids = [Solid.classes.index(t.split()[-1]) for t in texts]
        return torch.tensor([[self.vocab_size - 2, k, self.vocab_size - 1] for k in ids])


def test_a_model_that_reads_is_fooled_and_one_that_looks_is_not():
    got, written, scores = probes.typographic(Reader(1.0), Solid(), WordTokens(), ("a {}",), batch_size=3)
    assert got["clean"]["top1"] == got["blank"]["top1"] == 1.0 and got["blank"]["success"] == 0.0
    assert got["word"]["top1"] == 0.0 and got["word"]["success"] == got["word"]["word"] == 1.0
    assert got["word"]["object_wins"] == 0.0 and got["clean"]["object_wins"] == 1.0
    # cosines, not logits: scale and bias are undone
    assert got["word"]["cos_object"] == pytest.approx(0.5)
    assert got["word"]["cos_word"] == pytest.approx(0.9)
    assert all(w != y for w, y in zip(written, Solid.labels)) and scores["word"].shape == (7, 3)
    looks, _, _ = probes.typographic(Reader(0.0), Solid(), WordTokens(), ("a {}",))
    assert looks["word"]["top1"] == 1.0 and looks["word"]["success"] == 0.0
    sheet = probes.contact_sheet(Solid(), written, scores, 4)
    answers = set(pixels_of(sheet))
    assert (0, 158, 115) in answers and (213, 94, 0) in answers  # right and wrong ones are told apart


# Command line ---------------------------------------------------------------------------------------------


def command(task, model, *flags):
    return evaluate.main([task, "--model", str(model), "--device", "cpu", *map(str, flags)])


@pytest.mark.parametrize("name", ["clip", "llip"])
def test_linear_probe_command(runs, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(probes, "search", lambda score: max((40, 56), key=score))
    flags = ["--data", "scenes", "--limit", 32, "--cache", tmp_path / "cache", "--seeds", 2]
    flags += ["--epochs", 1, "--out", tmp_path / "out"]
    assert command("linear-probe", runs[name], *flags) == 0
    printed, progress = capsys.readouterr()
    assert "linear-probe val  32 of 32 images" in progress and "l-bfgs, seed 0  3 of 3 fits" in progress
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    kinds = ["class token"] if name == "clip" else ["mean", "concatenation"]
    assert [r["feature"] for r in result["rows"]] == [k for k in kinds for _ in range(2)]
    assert [r["seeds"] for r in result["rows"]] == len(kinds) * [1, 2]  # convex and nothing drawn: once
    assert "train 32, val 32, test 32" in printed and "chance 6.25 %" in printed
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 3
    assert result["records"][0]["top1"] * 100 == pytest.approx(result["rows"][0]["top-1 %"])


def test_linear_probe_draws_the_parts_that_are_missing(runs, tmp_path, capsys):
    for c, name in enumerate(("cat", "dog")):
        for split, n in (("train", 5), ("val", 3)):
            (tmp_path / "split" / split / name).mkdir(parents=True)
            (tmp_path / "flat" / name).mkdir(parents=True, exist_ok=True)
            for k in range(n):
                image = Image.new("RGB", (16, 16), (250 * c, 9 * k, 0))
                image.save(tmp_path / "split" / split / name / f"{k}.png")
                image.save(tmp_path / "flat" / name / f"{split}{k}.png")
    common = ["--cache", tmp_path / "cache", "--solvers", "l-bfgs", "--seeds", 2]
    for data_set, counts in (("split", "train 10, test 6"), ("flat", "all 16")):
        assert command("linear-probe", runs["clip"], "--data", tmp_path / data_set, *common) == 0
        printed = capsys.readouterr().out
        assert f"images: {counts}  classes 2" in printed
        assert "| 100.00 |" in printed and "| 0.00 |" in printed  # two seeds, since parts are drawn
    x, y = torch.arange(10.0).view(10, 1), torch.arange(10) % 2
    parts = probes.split_for({"all": (x, y)}, 0)
    assert [len(parts[n][1]) for n in ("train", "val", "test")] == [6, 2, 2]
    parts = probes.split_for({"train": (x, y), "test": (x, y)}, 0)
    assert [len(parts[n][1]) for n in ("train", "val", "test")] == [8, 2, 10]
    assert not set(parts["train"][0].flatten().tolist()) & set(parts["val"][0].flatten().tolist())


def test_spectrum_command(runs, tmp_path, capsys):
    flags = ["--data", "scenes", "--limit", 20, "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    others = [runs[name] for name in ("siglip", "llip", "pooled")]
    assert command("spectrum", runs["clip"], "--more", *others, *flags) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["vectors"] for row in result["rows"]] == [20, 20, 60, 60]
    said = capsys.readouterr()
    assert all(f"spectrum {p}  20 of 20 images" in said.err for p in (runs["clip"], *others))
    assert result["models"] == [str(p) for p in (runs["clip"], *others)]
    assert all(len(v) == 16 for v in result["log_singular_values"].values())
    assert Image.open(tmp_path / "out" / "spectrum.png").width > 300
    assert f"drawn in {tmp_path / 'out' / 'spectrum.png'}" in said.out
    assert command("spectrum", runs["clip"], *flags, "--limit", 9) == 2
    assert "9 images of 1 tokens span less than the width 16" in capsys.readouterr().err


def test_typographic_command(runs, tmp_path, capsys):
    flags = ["--data", "scenes", "--limit", 20, "--out", tmp_path / "out"]
    others = [runs[name] for name in ("siglip", "llip", "pooled")]
    assert command("typographic", runs["clip"], "--more", *others, *flags) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(result["results"]) == result["models"] and len(result["models"]) == 4
    for name in MODELS:
        figures = result["results"][str(runs[name])]
        assert list(figures) == ["clean", "blank", "word"]
        assert all(-1 <= f["cos_object"] <= 1 and 0 <= f["top1"] <= 1 for f in figures.values())
        plain = evaluate.zeroshot(
            pretrained.load(runs[name]),
            scenes.Objects("test", 20, image_size=16),
            TOKENIZER,
            scenes.TEMPLATES,
        )
        assert figures["clean"]["top1"] == pytest.approx(plain["top1"])
    assert len(list((tmp_path / "out").glob("typographic*.png"))) == 4
    said = capsys.readouterr()
    assert "blank note" in said.out and said.out.count("drawn in") == 4
    assert "typographic4.png" in said.out
    for kind in ("clean", "blank", "word"):
        assert f"typographic {runs['llip']}, {kind}  20 of 20 images" in said.err


@pytest.mark.parametrize(
    "task, flags, message",
    [
        ("linear-probe", ["--data", "scenes", "--split", "val"], "--split: a probe trains on one"),
        ("linear-probe", ["--data", "scenes", "--seeds", "0"], "--seeds 0 and --epochs 10: must be"),
        ("linear-probe", ["--data", "nowhere"], "nowhere: no such file"),
        ("spectrum", ["--data", "scenes", "--more", "nowhere.pt"], "nowhere.pt: no such file"),
        ("typographic", ["--data", "scenes", "--templates", "a photo"], "templates 'a photo'"),
    ],
)
def test_mistakes_get_one_line(runs, tmp_path, capsys, task, flags, message):
    cache = [] if task == "typographic" else ["--cache", tmp_path]
    assert command(task, runs["clip"], *flags, "--limit", 17, *cache) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_data_without_labels_are_refused(runs, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("image,caption\na.png,a dog\n")
    for task in ("linear-probe", "typographic"):
        assert command(task, runs["clip"], "--data", tmp_path / "list.csv") == 2
        assert "has no labels, which this evaluation needs" in capsys.readouterr().err
