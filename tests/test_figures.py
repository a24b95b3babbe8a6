"""tests/figures.py: the list of captions for AlignCLIP's CLIP, maps on one scale, and a whole figure."""

import csv

import figures
import numpy as np
import pytest
import torch
from PIL import Image

from lab import reproduce
from lab.claims import ARMS
from readers import scenes
from readers.scene_captions import BACKGROUNDS
from util import plots


def test_four_in_five_captions_tell_of_the_background_only(tmp_path):
    things = scenes.Objects("train", 32, 5, bias=0.9)
    figures.write_bed(tmp_path / "bed" / "captions.csv", things)
    with open(tmp_path / "bed" / "captions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 32
    for i in range(32):
        texts = [row["title"] for row in rows if row["filepath"] == f"{i}.png"]
        kind = things.classes[things.labels[i]]
        assert [kind in text for text in texts] == [False] * 4 + [True]
        background = BACKGROUNDS[things.facts["background"][i]]
        assert all(text.endswith(background) for text in texts[:4])
        with Image.open(tmp_path / "bed" / f"{i}.png") as image:
            assert np.array_equal(np.asarray(image), things.pixels[i])


def test_maps_are_drawn_on_one_scale(tmp_path):
    """A map of equal weights is a third of the way to yellow, however many patches it has."""
    values = torch.zeros(32, 32, 3)
    values[..., 1], values[:16, :, 2] = 1 / 3, 5.0
    extras = [{"seed": 0, "size": 32, "names": ["even", "half"], "maps": {"2": values.tolist()}}]
    figures.draw_maps(tmp_path / "a.png", extras, "title")
    page = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    low, third, high = (plots.heat(np.array(v)).tolist() for v in (0, 1 / 3, 1))
    tiles = [page[30 + 20, 96 * k + 40].tolist() for k in range(4)]
    assert tiles[1:] == [low, third, high]
    assert page[30 + 80, 96 * 3 + 40].tolist() == low


def test_arms_differ_in_one_thing():
    def without(arm, *names):
        return {k: v for k, v in figures.OWN_ARMS[arm].items() if k not in names}

    assert without("bed detached", "detach") == without("bed alignclip")
    own = {"method", "guidance_temperature", "align_weight"}
    assert without("bed alignclip", *own) == without("bed clipood", *own)


def test_a_name_that_is_no_figure(capsys, tmp_path):
    assert figures.main(["ladders", "--out", str(tmp_path)]) == 2
    assert "'ladders': there are ladder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_attention_figure_from_training_to_picture(tmp_path, monkeypatch, capsys):
    # setitem, so that no other test sees these arms
    for arm, own in figures.OWN_ARMS.items():
        monkeypatch.setitem(ARMS, arm, own | dict(steps=2, train_size=256, batch_size=48))
    monkeypatch.setattr(reproduce, "version", lambda *without: "")
    flags = ["attention", "--seeds", "1", "--out", str(tmp_path / "runs"), "--pictures", str(tmp_path)]
    assert figures.main(flags) == 0
    printed = capsys.readouterr().out
    assert "F1 attention" in printed and "Premise: the aligned block attends" in printed
    rows = [line for line in printed.splitlines() if line.startswith(("| before", "| detached"))]
    assert len(rows) >= 2 and (tmp_path / "attention.png").stat().st_size < 100_000
    # trained on pictures that it wrote, and not trained again
    assert (tmp_path / "runs" / "bed-3000" / "captions.csv").exists()
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/quick/*/checkpoint.pt")}
    assert len(runs) == 4 and figures.main(flags) == 0
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
