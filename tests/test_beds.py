"""lab/beds.py and the maps of lab/measures.py: captions of the background, lifts by step, one scale."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import pretrained
import tasks
import train
from lab import beds, measures
from model import CLIP
from readers import scene_captions as words
from readers import scenes
from tokenizer import Tokenizer
from util import plots


@pytest.mark.parametrize("share", [3, 4])
def test_a_share_of_the_captions_tells_of_the_background_only(tmp_path, share):
    things = scenes.Objects("train", 32, 5, bias=0.9)
    beds.write_bed(tmp_path / "bed" / "captions.csv", things, share)
    with open(tmp_path / "bed" / "captions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 32
    for i in range(32):
        texts = [row["title"] for row in rows if row["filepath"] == f"{i}.png"]
        kind = things.classes[things.labels[i]]
        assert [kind in text for text in texts] == [False] * share + [True] * (5 - share)
        background = words.BACKGROUNDS[things.facts["background"][i]]
        assert all(text.endswith(background) for text in texts[:share])
        with Image.open(tmp_path / "bed" / f"{i}.png") as image:
            assert np.array_equal(np.asarray(image), things.pixels[i])


def test_a_list_of_several_data_sets(tmp_path):
    for name, count in (("a", 3), ("b", 2)):
        (tmp_path / name).mkdir()
        rows = []
        for k in range(count):
            Image.new("RGB", (20, 20), (k, 50, 90)).save(tmp_path / name / f"{k}.png")
            rows.append(json.dumps({"image": f"{k}.png", "captions": [f"{name} {k}", f"picture {k}"]}))
        (tmp_path / name / "list.jsonl").write_text("\n".join(rows) + "\n")
    sources = [str(tmp_path / name / "list.jsonl") for name in ("a", "b")]
    beds.write_pairs(tmp_path / "all" / "real.jsonl", [*sources, ""])
    found = data.open_dataset(str(tmp_path / "all" / "real.jsonl"), image_root="/", allow_outside=True)
    assert found.captions == [[f"{n} {k}", f"picture {k}"] for n, c in (("a", 3), ("b", 2)) for k in range(c)]
    assert found.image(4).convert("RGB").getpixel((0, 0)) == (1, 50, 90)


@pytest.fixture
def small_clip(tmp_path):
    """A random CLIP with the words of the scenes."""
    texts = [text for some in scenes.Objects("train", 96).captions for text in some]
    tokenizer = Tokenizer.learn(texts, 600)
    torch.manual_seed(0)
    config = beds.replace(beds.CONFIGS["tiny"], vocab_size=tokenizer.vocab_size)
    (tmp_path / "clip").mkdir()
    pretrained.save(CLIP(config), tmp_path / "clip" / "checkpoint.pt")
    tokenizer.save(tmp_path / "clip" / "tokenizer.json")
    return tmp_path / "clip"


def test_lifts_are_those_of_an_evaluation_and_of_every_step(small_clip, monkeypatch, tmp_path):
    """Before the first step and after the last, those of the start and of the finished CLIP."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(beds, "STEPS", (0, 1))
    monkeypatch.setitem(tasks.TASKS, "labels", beds.Watched)
    flags = dict(method="clipood", init=str(small_clip), train_data="scenes", target_domain="photo")
    flags |= dict(steps=3, batch_size=12, train_size=96, threads=1, bma_beta=0.0, out=str(tmp_path / "run"))
    train.train(*train.configure(**flags))
    seen = json.loads((tmp_path / "run" / "lifts.json").read_text())
    assert list(seen) == ["0", "1", "3"] and seen["0"] != seen["3"]
    dataset = scenes.Objects("val", 320, 0, 32)
    for run, step in ((small_clip, "0"), (tmp_path / "run", "3")):
        net, tokenizer = evaluate.open_model(str(run))
        # the guidance is measured with the texts from before fine-tuning, which stay as they are
        text = beds.class_texts(evaluate.open_model(str(small_clip))[0], tokenizer)
        assert beds.lifts(*beds.aligned_maps(net, text, dataset)) == pytest.approx(seen[step], rel=1e-5)
    found, masks = beds.aligned_maps(net, text, dataset)
    own = found["attention"].flatten(1)
    share = (own * masks.flatten(1)).sum(1) / own.sum(1) / masks.flatten(1).double().mean(1)
    assert share.mean().item() == pytest.approx(seen["3"]["attention lift"], rel=1e-5)


def test_maps_are_drawn_on_one_scale(tmp_path):
    """A map of equal weights is a third of the way to yellow, however many patches it has."""
    values = torch.zeros(32, 32, 3)
    values[..., 1], values[:16, :, 2] = 1 / 3, 5.0
    extras = [{"seed": 0, "size": 32, "names": ["even", "half"], "maps": {"2": values.tolist()}}]
    measures.draw_maps(tmp_path / "a.png", extras)
    page = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    low, third, high = (plots.heat(np.array(v)).tolist() for v in (0, 1 / 3, 1))
    tiles = [page[30 + 20, 96 * k + 40].tolist() for k in range(4)]
    assert tiles[1:] == [low, third, high]
    assert page[30 + 80, 96 * 3 + 40].tolist() == low


def test_the_parts_of_a_caption_say_together_what_it_says():
    """Parts are true of the caption's picture, and each claim about a thing or the background is in one."""
    dataset = scenes.Scenes("test", 60)
    for picture, written in zip(dataset.pictures, dataset.written):
        true = {words.named(t.kind, t.colour) for t in picture.things}
        true |= {words.named(t.kind, None, t.place) for t in picture.things}
        true |= {f"a scene {words.GROUND_WORDS[picture.background]}"}
        for _, claims in written:
            parts = measures.parts_of_caption(claims)
            assert set(parts) <= true
            things = [claim for claim in claims if claim[0] == "thing"]
            assert sum(any(c[2] in p for p in parts) for c in things) == len(things)
            assert any("scene" in p for p in parts) == any(c[0] == "background" for c in claims)


def test_the_gradient_of_the_alignment_is_in_proportion_to_its_weight(small_clip):
    lab = SimpleNamespace(image_size=32, device=torch.device("cpu"))
    lab.model = lambda arm, seed: evaluate.open_model(str(small_clip))
    one, ten = (measures.gradients(lab, 0, 100.0, weight, 1.0) for weight in (1.0, 10.0))
    assert ten == pytest.approx(10 * one, rel=1e-3) and one > 0
