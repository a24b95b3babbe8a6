"""Notes that a fake model can read, figures by hand, and the program for every kind of model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import CONFIG, MODELS, TOKENIZER, evaluate_all
from torch import nn

import data
import evaluate
import pretrained
from evals import typographic
from readers import scenes


def pixels_of(image):
    rgb = image.tobytes()
    return list(zip(rgb[::3], rgb[1::3], rgb[2::3]))


def test_note_is_in_what_a_centre_crop_keeps():
    grey = Image.new("RGB", (90, 60), (128, 128, 128))
    blank, word = (typographic.with_note(grey, "tractor", b) for b in (True, False))
    assert grey.getextrema() == ((128, 128),) * 3  # the given image stays
    crop = (15, 0, 75, 60)
    for image in (blank, word):
        outside = image.copy()
        outside.paste((128, 128, 128), crop)
        assert outside.getextrema() == ((128, 128),) * 3
    assert blank.getextrema() == ((128, 255),) * 3 and word.getextrema()[0][0] < 30
    cover = torch.tensor([p == (255, 255, 255) for p in pixels_of(blank)]).double().mean()
    assert 0.02 < cover < 0.2
    written = {typographic.with_note(grey, w).tobytes() for w in scenes.KINDS}
    assert len(written) == 16


def test_wrong_labels_are_wrong_uniform_and_fixed():
    labels = [k % 4 for k in range(800)]
    words = typographic.wrong_labels(labels, 4)
    assert all(a != b for a, b in zip(words, labels)) and words == typographic.wrong_labels(labels, 4)
    assert words != typographic.wrong_labels(labels, 4, seed=1)
    counts = torch.bincount(torch.tensor(words)).tolist()
    assert min(counts) > 150
    with pytest.raises(ValueError, match="one class"):
        typographic.wrong_labels([0, 0], 1)


def test_note_figures_by_hand():
    labels, written = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 0, 2])
    clean = torch.tensor([[0.9, 0.1, 0], [0, 0.9, 0], [0.5, 0, 0.1], [0.8, 0, 0]])  # third is wrong
    word = torch.tensor([[0.2, 0.9, 0], [0, 0.9, 0], [0.7, 0, 0.1], [0.3, 0.4, 0.3]])
    got = typographic.note_figures({"clean": clean, "word": word}, labels, written)
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

    takes_captions = True

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
        noted = [[transform(typographic.with_note(i, w)) for w in Solid.classes] for i in images]
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
    got = typographic.typographic(Reader(1.0), Solid(), WordTokens(), ("a {}",), batch_size=3)
    assert got["clean"]["top1"] == got["blank"]["top1"] == 1.0 and got["blank"]["success"] == 0.0
    assert got["word"]["top1"] == 0.0 and got["word"]["success"] == got["word"]["word"] == 1.0
    assert got["word"]["object_wins"] == 0.0 and got["clean"]["object_wins"] == 1.0
    # cosines, not logits: scale and bias are undone
    assert got["word"]["cos_object"] == pytest.approx(0.5)
    assert got["word"]["cos_word"] == pytest.approx(0.9)
    learned = Reader(1.0)
    learned.takes_captions = False
    figures = typographic.typographic(learned, Solid(), WordTokens(), ("a {}",))["word"]
    assert "cos_word" not in figures and figures["success"] == 1.0  # scores of learned prompts are no cosines
    looks = typographic.typographic(Reader(0.0), Solid(), WordTokens(), ("a {}",))
    assert looks["word"]["top1"] == 1.0 and looks["word"]["success"] == 0.0


def test_typographic_command(small_runs, tmp_path, capsys):
    result = evaluate_all(typographic.main, small_runs, tmp_path)
    assert list(result["results"]) == result["models"] and len(result["models"]) == 4
    for name in MODELS:
        figures = result["results"][str(small_runs[name])]
        assert list(figures) == ["clean", "blank", "word"]
        assert all(-1 <= f["cos_object"] <= 1 and 0 <= f["top1"] <= 1 for f in figures.values())
        plain = evaluate.zeroshot(
            pretrained.load(small_runs[name]),
            scenes.Objects("test", 20, image_size=16),
            TOKENIZER,
            scenes.TEMPLATES,
        )
        assert figures["clean"]["top1"] == pytest.approx(plain["top1"])
    assert "| blank " in capsys.readouterr().out
