"""Maps on masks: figures, baselines and planted maps by hand, every map on tiny models, the program."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pretrained
from alignclip import AlignCLIP
from evals import maps, surgery
from llip import Llip, PooledTokens
from model import CLIP, Config
from readers import scenes
from scale import distributed
from tokenizer import Tokenizer
from util.metrics import MAP_FIGURES, map_figures

TOKENIZER = Tokenizer.learn([f"{t.format(k)}" for k in scenes.KINDS for t in scenes.TEMPLATES], 560)
SIZES = Config(16, 32, 8, 32, 4, 4, 64, 24, TOKENIZER.vocab_size, 16, 1, 2, 32)


def build(kind="clip", seed=0):
    torch.manual_seed(seed)
    model = {"clip": CLIP, "llip": lambda c: Llip(c, 3, 2), "pool": lambda c: PooledTokens(c, 3)}
    return model[kind](SIZES).eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

# Each kind of map ------------------------------------------------------------------------------------


def test_every_similarity_map_is_the_right_one():
    model, text = build(), torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("qkv", "vvv", "qqv", "kkv", "dv"):
        tokens = surgery.dense_features(model.visual, IMAGES, name)
        found[name] = maps.raw_maps(model, IMAGES, name, text)
        assert torch.equal(found[name], surgery.similarity_map(tokens, text))
    for name in ("maskclip", "sclip", "gem", "clearclip"):
        tokens = surgery.dense_features(model.visual, IMAGES, name)
        found[name] = maps.raw_maps(model, IMAGES, name, text)
        assert torch.equal(found[name], surgery.similarity_map(tokens, text))
    found["plain"] = maps.raw_maps(model, IMAGES, "plain", text)
    x = model.visual.embed(IMAGES)
    for block in model.visual.transformer.resblocks:
        x = block(x)
    x = model.visual.ln_post(x[:, 1:]) @ model.visual.proj
    cosines = F.cosine_similarity(x[:, :, None], text, dim=-1)  # (B, P, C)
    low, high = cosines.amin(1, keepdim=True), cosines.amax(1, keepdim=True)
    expected = ((cosines - low) / (high - low)).view(2, 4, 4, 3)
    torch.testing.assert_close(found["plain"], expected)
    several = list(found.values())
    for n, one in enumerate(several):
        assert all((one - other).abs().max() > 1e-3 for other in several[:n])


def test_attention_maps_are_the_class_tokens_rows():
    model = build()
    x, rows = model.visual.embed(IMAGES), []
    for block in model.visual.transformer.resblocks:
        attn, x = block.attn(block.ln_1(x), need_weights=True)[1], block(x)
        row = attn.mean(1)[:, 0, 1:]  # (B, P)
        rows.append((row / row.sum(1, keepdim=True)).view(2, 4, 4, 1))
    torch.testing.assert_close(maps.raw_maps(model, IMAGES, "cls", None), rows[-1])
    early = maps.raw_maps(model, IMAGES, "cls-early", None)
    torch.testing.assert_close(early, rows[0])  # one of four blocks


@pytest.mark.parametrize("depth", range(1, 25))
def test_maps_use_the_blocks_that_alignclip_aligns(depth):
    torch.manual_seed(0)
    model = CLIP(replace(SIZES, vision_layers=depth)).eval()
    x, rows = model.visual.embed(IMAGES), []
    for block in model.visual.transformer.resblocks:
        attn, x = block.attn(block.ln_1(x), need_weights=True)[1], block(x)
        row = attn.mean(1)[:, 0, 1:]  # (B, P)
        rows.append(row / row.sum(1, keepdim=True))
    layers = AlignCLIP(model, torch.eye(3, 16)).layers
    early = maps.raw_maps(model, IMAGES, "cls-early", None)
    torch.testing.assert_close(early.flatten(1), sum(rows[:layers]) / layers)


def test_an_llips_maps():
    model = build("llip")
    text = maps.names_as_text(model, TOKENIZER)
    assert text.shape[:2] == (16, 7)
    got = maps.raw_maps(model, IMAGES, "caption", text)
    assert got.shape == (2, 4, 4, 16)
    expected = surgery.llip_caption_map(model, IMAGES, text[5]).mean(-1)
    torch.testing.assert_close(got[..., 5], expected)
    tokens = surgery.llip_token_maps(model, IMAGES)
    got = maps.raw_maps(model, IMAGES, "cls", text)
    torch.testing.assert_close(got, tokens.mean(-1, keepdim=True))


def test_names_become_one_unit_feature_a_kind():
    model = build()
    text = maps.names_as_text(model, TOKENIZER)
    lemon = [f"{t.format('lemon')}" for t in scenes.TEMPLATES]
    one = F.normalize(model.encode_text(TOKENIZER(lemon, 24)), dim=-1).mean(0)
    torch.testing.assert_close(text[scenes.KINDS.index("lemon")], F.normalize(one, dim=0))


# Figures of maps ------------------------------------------------------------------------------------


def map_scores(heat, masks):
    return dict(zip(MAP_FIGURES, map_figures(heat, masks).mean(0).tolist()))


def test_map_scores_by_hand():
    masks = torch.zeros(1, 4, 4)
    masks[0, :2, :2] = 1  # a quarter of the image
    good = masks.clone()
    assert map_scores(good, masks) == {"lift": 4, "pointing": 1, "area": 0.25, "iou": 1}
    uniform = map_scores(torch.full((1, 4, 4), 7.0), masks)
    assert (uniform["lift"], uniform["pointing"], uniform["iou"]) == (1, 0.25, 0)
    inverted = map_scores(1 - masks, masks)
    assert (inverted["lift"], inverted["pointing"], inverted["iou"]) == (0, 0, 0)
    low = masks * 0.2  # found, but another place is brighter
    low[0, 3, 3] = 1
    scores = map_scores(low, masks)
    assert scores["lift"] == pytest.approx(0.8 / 1.8 / 0.25)
    assert scores["pointing"] == 0 and scores["iou"] == 0
    assert map_scores(torch.zeros(1, 4, 4), masks)["lift"] == 1  # says nothing: as good as chance


def test_map_scores_skip_empty_masks():
    masks = torch.tensor([[[1, 0, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    maps = torch.tensor([[[1.0, 0.3, 0, 0]], [[0.3, 1.0, 0, 0]], [[1.0, 2.0, 3.0, 4.0]]])
    scores = map_scores(maps, masks)
    assert scores["pointing"] == 0.5
    assert scores["iou"] == 0.5  # 1 and 0


def test_overlap_equals_its_definition():
    """Half of the range itself is found: >=, not >."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 11, (4, 5, 6), generator=generator).double() / 10
    maps[:, 0, :2] = torch.tensor([0.0, 1.0])
    masks = torch.rand(4, 5, 6, generator=generator) > 0.7
    found = maps >= 0.5
    both, either = (found & masks).sum((1, 2)), (found | masks).sum((1, 2))
    assert torch.equal(map_figures(maps, masks)[:, 3], both.double() / either)


def test_scores_in_batches_are_the_scores_of_all():
    heat = torch.rand(7, 3, 5, generator=torch.Generator().manual_seed(0))
    masks = heat.roll(1, 0) > 0.6
    masks[2] = 0
    parts = [map_figures(heat[a:b], masks[a:b]) for a, b in ((0, 2), (2, 3), (3, 7))]
    assert [len(part) for part in parts] == [2, 0, 4]
    assert torch.equal(torch.cat(parts), map_figures(heat, masks))


def test_the_cone_in_the_middle():
    cone = maps.centre(32)
    assert cone.min() >= 0 and torch.equal(cone, cone.flip(0)) and cone[0, 0] < 0.05
    assert (cone == cone.max()).nonzero().tolist() == [[15, 15], [15, 16], [16, 15], [16, 16]]


# Measuring -------------------------------------------------------------------------------------------


def planted(right):
    """Maps that show the true thing (right), or everything else; known by the picture's index in a pixel."""

    def raw_maps(model, images, name, text):
        chosen = planted.order[: len(images)]
        planted.order = planted.order[len(images) :]
        grid = torch.full((len(images), 32, 32, 16), 0.5)
        for row, i in enumerate(chosen):
            for kind, mask in zip(planted.data.facts["kind"][i], planted.data.masks(i)):
                shown = torch.from_numpy(mask).float()
                grid[row, :, :, kind] = shown if right else 1 - shown
        return grid

    return raw_maps


def test_each_thing_is_scored_with_the_map_of_its_own_name(monkeypatch):
    """Other names' maps are flat: one wrong index and the scores are not perfect."""
    model = build()
    planted.data = scenes.Objects("test", 10)
    for right in (True, False):
        planted.order = list(range(10))
        monkeypatch.setattr(maps, "raw_maps", planted(right))
        scores, kept = maps.measure(model, TOKENIZER, planted.data, ["vvv"], batch_size=4, show=(2, 9))
        got = scores["vvv"]
        assert (got["pointing"], got["iou"]) == ((1, 1) if right else (0, 0))
        assert got["lift"] == 0 if not right else got["lift"] > 2
        assert list(kept) == [2, 9]
        for i, shown in kept.items():
            first = torch.from_numpy(planted.data.masks(i)[0]).float()
            assert torch.equal(shown[..., 0], first)
            assert torch.equal(shown[..., 1], first if right else 1 - first)


def test_batches_and_precision():
    model, drawn = build(), scenes.Objects("test", 9)
    names = ["vvv", "cls", "centre"]
    whole, _ = maps.measure(model, TOKENIZER, drawn, names)
    parts, _ = maps.measure(model, TOKENIZER, drawn, names, batch_size=2)
    for name in names:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)
    rough, _ = maps.measure(model, TOKENIZER, drawn, names, precision="bf16")
    assert rough["vvv"]["lift"] != whole["vvv"]["lift"]
    assert rough["vvv"]["lift"] == pytest.approx(whole["vvv"]["lift"], rel=0.1)


def test_attention_is_scored_without_stretching():
    """TRAP: stretched to [0, 1], even attention would look as pointed as any."""
    model, drawn = build(), scenes.Objects("test", 6)
    images = torch.stack([torch.zeros(3, 32, 32)] * 6)
    for block in model.visual.transformer.resblocks:
        block.attn.in_proj_weight.mul_(1e-3)  # queries and keys near zero: attention near even
    scores, _ = maps.measure(model, TOKENIZER, drawn, ["cls", "cls-early"])
    assert scores["cls"]["lift"] == pytest.approx(1, abs=1e-3)
    assert scores["cls-early"]["lift"] == pytest.approx(1, abs=1e-3)
    assert surgery.stretch(maps.raw_maps(model, images, "cls", None)).max() == 1


# Command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories with random weights, as train.py leaves them: two seeds of CLIP, Llip, pooled."""
    folder = tmp_path_factory.mktemp("runs")
    models = (("a", "clip", 0), ("b", "clip", 1), ("llip", "llip", 0), ("pool", "pool", 0))
    for name, kind, seed in models:
        (folder / name).mkdir()
        TOKENIZER.save(folder / name / "tokenizer.json")
        pretrained.save(build(kind, seed), folder / name / "checkpoint.pt")
        config = {"method": kind, "seed": seed, "init": "", "out": name}
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def call(runs, *words, model="a", source="scenes", limit=12):
    common = ["--model", str(runs / model), "--data", source, "--device", "cpu"]
    return maps.main([*common, "--limit", str(limit), *map(str, words)])


def test_command_line(runs, tmp_path, capsys):
    more = ["--more", runs / "b", runs / "llip"]
    assert call(runs, *more, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "| vvv " in printed and "no model" in printed
    assert "images 12  chance" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    names = "qkv vvv qqv kkv dv plain gem maskclip sclip clearclip cls cls-early".split()
    assert [row["map"] for row in rows] == [*names, "centre", *names, "caption", "cls"]
    assert [row["model"] for row in rows[11:14]] == [str(runs / "a"), "no model", str(runs / "b")]
    drawn = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in drawn] == ["maps-1.png", "maps-2.png", "maps-3.png"]
    assert max(Image.open(path).width for path in drawn) <= 1600


def test_a_sheet_shows_image_mask_and_maps(runs, tmp_path):
    call(runs, "--out", tmp_path, model="llip", limit=1)
    page = np.asarray(Image.open(tmp_path / "maps-1.png")).astype(int)
    tiles = [page[26 : 26 + 256, 262 * n : 262 * n + 256] for n in range(3)]
    inside = np.asarray(Image.fromarray(scenes.Objects("test", 1).masks(0).any(0)).resize((256, 256)))
    yellow = tiles[1].sum(-1) > 250
    assert (yellow == inside).mean() > 0.9  # the second column is the mask, in the legend's yellow
    assert np.abs(tiles[0] - tiles[2]).mean() > 10


def test_errors_are_one_line_and_status_2(runs, tmp_path, capsys):
    other = tmp_path / "other"
    Tokenizer.learn(["a dog"], 515).save(other)
    for words, options, complaint in (
        ((), {"source": str(tmp_path)}, "masks, which only scenes have"),
        ((), {"model": "pool"}, "pools 3 tokens without a text"),
        (("--split", "tset"), {}, "tset"),
        (("--more", tmp_path / "no.pt"), {"limit": 2}, "no.pt"),
        (("--vocab", other), {}, "tokens, the model"),
    ):
        assert call(runs, *words, **options) == 2, words
        err = capsys.readouterr().err
        line = [text for text in err.splitlines() if text.startswith("error: ")]
        assert len(line) == 1 and complaint in line[0] and "Traceback" not in err, err


def test_one_process_only(runs, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert call(runs) == 2 and "without torchrun" in capsys.readouterr().err


def test_other_sizes_of_pictures_and_patches(monkeypatch):
    """The grid of a model whose pictures are not 32 pixels, and one patch in all."""
    for size, patch in ((48, 16), (16, 16)):
        config = replace(SIZES, image_size=size, patch_size=patch)
        torch.manual_seed(0)
        model, drawn = CLIP(config).eval(), scenes.Objects("test", 5, image_size=size)
        names = [*maps.NAMES, "centre"]
        scores, _ = maps.measure(model, TOKENIZER, drawn, names)
        assert all(s["lift"] >= 0 for s in scores.values())
        if size == patch:  # one patch says nothing about where
            assert all(s["lift"] == pytest.approx(1) for n, s in scores.items() if n != "centre")
