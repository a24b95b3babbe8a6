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
from util.metrics import map_figures, mean_map_figures
from util.report import grouped_means

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


def test_every_map_has_one_name_and_attention_is_always_there():
    flags = maps.Flags(model="m", data="scenes")
    names = "qkv vvv qqv kkv dv plain gem maskclip sclip clearclip cls cls-early"
    assert maps.names_for(flags, "m", False) == names.split()
    assert maps.names_for(flags, "m", True) == ["caption", "cls"]
    flags = maps.Flags(model="m", data="scenes", methods=("alignclip",))
    assert maps.names_for(flags, "m", False) == ["dv", "cls", "cls-early"]


def test_every_similarity_map_is_the_right_one():
    model, text = build(), torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("qkv", "vvv", "qqv", "kkv", "dv"):
        tokens = surgery.dense_features(model.visual, IMAGES, kind=name)
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
        x, attn = block(x, need_weights=True)
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
        x, attn = block(x, need_weights=True)
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


def map_scores(maps, masks):
    return mean_map_figures(map_figures(maps, masks))


def test_map_scores_by_hand():
    masks = torch.zeros(1, 4, 4)
    masks[0, :2, :2] = 1  # a quarter of the image
    good = masks.clone()
    assert map_scores(good, masks) == {
        "lift": 4,
        "pointing": 1,
        "area": 0.25,
        "iou": 1,
        "best_iou": 1,
        "best_threshold": 0.01,
        "images": 1,
    }
    uniform = map_scores(torch.full((1, 4, 4), 7.0), masks)
    assert (uniform["lift"], uniform["pointing"], uniform["iou"]) == (1, 0.25, 0)
    assert uniform["best_iou"] == 0.25 and uniform["best_threshold"] == 0
    inverted = map_scores(1 - masks, masks)
    assert (inverted["lift"], inverted["pointing"], inverted["iou"]) == (0, 0, 0)
    low = masks * 0.2  # found, but another place is brighter
    low[0, 3, 3] = 1
    scores = map_scores(low, masks)
    assert scores["lift"] == pytest.approx(0.8 / 1.8 / 0.25)
    assert scores["pointing"] == 0 and scores["iou"] == 0 and scores["best_iou"] == pytest.approx(0.8)
    assert map_scores(torch.zeros(1, 4, 4), masks)["lift"] == 1  # says nothing: as good as chance


def test_map_scores_use_one_threshold_for_all_images_and_skip_empty_masks():
    masks = torch.tensor([[[1, 0, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    maps = torch.tensor([[[1.0, 0.3, 0, 0]], [[0.3, 1.0, 0, 0]], [[1.0, 2.0, 3.0, 4.0]]])
    scores = map_scores(maps, masks)
    assert scores["images"] == 2 and scores["pointing"] == 0.5
    assert scores["iou"] == 0.5  # 1 and 0
    assert scores["best_iou"] == 0.5  # 1/2 and 1/2 below 0.3, and 1 and 0 above: never 3/4
    with pytest.raises(ValueError, match="no mask has a foreground"):
        map_scores(maps[2:], masks[2:])
    with pytest.raises(ValueError, match=r"maps \(3, 1, 4\) and masks \(2, 1, 4\)"):
        map_scores(maps, masks[:2])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="negative or not finite"):
            map_scores(torch.full((2, 1, 4), bad), masks[:2])


def test_overlap_at_every_threshold_equals_its_definition():
    """Levels on the thresholds themselves are found: >=, not >."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 101, (4, 5, 6), generator=generator).double() / 100
    maps[:, 0, :2] = torch.tensor([0.0, 1.0])
    masks = torch.rand(4, 5, 6, generator=generator) > 0.7
    got = map_figures(maps, masks)[:, 3:]
    for n in range(101):
        found = maps >= n / 100
        both, either = (found & masks).sum((1, 2)), (found | masks).sum((1, 2))
        assert got[:, n].tolist() == pytest.approx((both / either).tolist(), abs=1e-7)


def test_scores_in_batches_are_the_scores_of_all():
    maps = torch.rand(7, 3, 5, generator=torch.Generator().manual_seed(0))
    masks = maps.roll(1, 0) > 0.6
    masks[2] = 0
    parts = [map_figures(maps[a:b], masks[a:b]) for a, b in ((0, 2), (2, 3), (3, 7))]
    assert [len(part) for part in parts] == [2, 0, 4]
    assert mean_map_figures(torch.cat(parts)) == map_scores(maps, masks)


# Masks and baselines ---------------------------------------------------------------------------------


def test_things_and_their_masks():
    drawn = scenes.Scenes("test", 12)
    rows, kinds, masks = maps.things_of(drawn, [3, 7], together=False)
    counts = [len(drawn.masks(i)) for i in (3, 7)]
    assert rows.tolist() == [0] * counts[0] + [1] * counts[1]
    assert masks.shape == (sum(counts), 32, 32) and max(counts) > 1
    for row, kind, mask in zip(rows.tolist(), kinds.tolist(), masks):
        slot = drawn.facts["kind"][[3, 7][row]].tolist().index(kind)
        assert np.array_equal(mask.numpy(), drawn.masks([3, 7][row])[slot])
    rows, _, masks = maps.things_of(drawn, [3, 7], together=True)
    assert rows.tolist() == [0, 1]
    assert np.array_equal(masks.numpy(), np.stack([drawn.masks(3).any(0), drawn.masks(7).any(0)]))


def test_baselines_by_hand():
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, 8:16, 16:32] = True  # two patches of 8, an eighth of the picture
    score = {n: map_scores(maps.baseline(n, masks, 8), masks) for n in maps.BASELINES}
    assert score["uniform"]["lift"] == 1 and score["uniform"]["pointing"] == 1 / 8
    assert score["mask"]["pointing"] == 1 and score["mask"]["lift"] > 4
    centre = maps.baseline("centre", masks, 8)[0]
    assert centre.min() >= 0 and torch.equal(centre, centre.flip(0)) and centre[0, 0] < 0.05
    assert (centre == centre.max()).nonzero().tolist() == [[15, 15], [15, 16], [16, 15], [16, 16]]
    assert score["centre"]["pointing"] == 1 / 4  # of the four places in the middle one is on the mask
    # a patch half covered counts half
    masks[0, 8:12, 16:32] = False
    mask = maps.baseline("mask", masks, 8)[0]
    assert mask[12, 20:28].tolist() == pytest.approx([0.5] * 8, abs=0.1) and mask[28, 4] == 0


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


@pytest.mark.parametrize("drawn", [scenes.Objects, scenes.Scenes])
def test_each_thing_is_scored_with_the_map_of_its_own_name(drawn, monkeypatch):
    """Other names' maps are flat: one wrong index and the scores are not perfect."""
    model = build()
    planted.data = drawn("test", 10)
    for right in (True, False):
        planted.order = list(range(10))
        monkeypatch.setattr(maps, "raw_maps", planted(right))
        scores, kept = maps.measure(model, TOKENIZER, planted.data, ["vvv"], batch_size=4, show=(2, 9))
        got = scores["vvv"]
        assert got["images"] == sum(len(planted.data.masks(i)) for i in range(10))
        assert (got["pointing"], got["iou"]) == ((1, 1) if right else (0, 0))
        assert got["lift"] == 0 if not right else got["lift"] > 2
        assert list(kept) == [2, 9]
        for i, shown in kept.items():
            first = torch.from_numpy(planted.data.masks(i)[0]).float()
            assert torch.equal(shown[..., 0], first)
            assert torch.equal(shown[..., 1], first if right else 1 - first)


def test_batches_and_precision():
    model, drawn = build(), scenes.Objects("test", 9)
    names = ["vvv", "cls", "uniform"]
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


# Several models --------------------------------------------------------------------------------------


def record(model, first_run, name, lift):
    figures = dict.fromkeys(maps.FIGURES, 0.5) | {"lift": lift}
    return {"model": model, "first_run": first_run, "map": name} | figures


def test_means_and_deviations_over_the_runs_of_a_kind():
    records = [record("clip", "runs/c0", "vvv", lift) for lift in (1.0, 3.0)]
    records += [record("align", "runs/a", "vvv", 4.0), record("clip", "runs/biased", "vvv", 9.0)]
    rows = grouped_means(records, ("model", "first_run", "map"), maps.FIGURES)
    shown = [(r["model"], r["first_run"], r["runs"]) for r in rows]
    assert shown == [("clip", "runs/c0", 2), ("align", "runs/a", 1), ("clip", "runs/biased", 1)]
    assert rows[0]["lift"] == (2, pytest.approx(2**0.5)) and rows[1]["lift"] == (4, None)
    text = maps.table(rows)
    assert "vvv (surgery)" in text and "2.000 +- 1.414" in text and " 4.000 |" in text
    assert "50.0 +- 0.0" in text


def test_runs_are_of_one_kind_if_only_the_seed_differs(tmp_path):
    def run(name, **fields):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
        return str(tmp_path / name)

    a, b = (run(f"clip{n}", method="clip", lr=1, seed=n, out=f"clip{n}", init="") for n in (0, 1))
    c = run("biased", method="clip", lr=2, seed=0, init="")
    assert maps.kind_of(a) == maps.kind_of(b) != maps.kind_of(c)
    tuned = [run(f"t{n}", method="alignclip", init=init, seed=n) for n, init in enumerate((a, b, c))]
    kinds = [maps.kind_of(source) for source in tuned]
    assert kinds[0] == kinds[1] != kinds[2] and kinds[0][0] == "alignclip"
    assert maps.kind_of("some/file.pt") == ("file.pt", "some/file.pt")


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
    assert call(runs, *more, "--out", tmp_path, "--show", 3) == 0
    out = capsys.readouterr().out
    assert "| vvv (surgery)  |    2 |" in out and " +- " in out and "no model" in out
    result = json.loads((tmp_path / "results.json").read_text())
    shown = {(row["model"], row["map"]): row for row in result["rows"]}
    assert len(shown) == 12 + 3 + 2 and shown["clip", "qkv"]["runs"] == 2
    assert shown["no model", "uniform"]["lift"][0] == pytest.approx(1)
    assert shown["no model", "mask"]["lift"][0] > shown["no model", "centre"]["lift"][0]
    assert shown["llip", "caption"]["runs"] == shown["no model", "mask"]["runs"] == 1
    assert len(result["records"]) == 2 * 12 + 3 + 2
    assert result["pictures"] == ["maps-1.png", "maps-2.png", "maps-3.png"]
    widths = [Image.open(tmp_path / name).width for name in result["pictures"]]
    assert max(widths) <= 1600


def test_command_line_asks_for_some_maps_of_several_things(runs, tmp_path, capsys):
    words = ["--structures", "qkv", "dv", "--methods", "alignclip", "--several", "--out", tmp_path]
    assert call(runs, *words, "--show", 0, limit=20) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    found = {record["map"]: record for record in result["records"]}
    assert list(found) == ["qkv", "dv", "cls", "cls-early", *maps.BASELINES]
    assert found["cls"]["images"] == 20 < found["dv"]["images"] == found["mask"]["images"]
    assert found["cls"]["area"] > found["dv"]["area"]
    assert result["pictures"] == [] and not list(tmp_path.glob("*.png"))
    assert call(runs, "--methods", "plain", limit=4) == 0
    out = capsys.readouterr().out.split("| clip")
    assert [part.split("|")[2].strip() for part in out[-3:]] == ["plain", "cls", "cls-early"]


def test_a_sheet_shows_image_mask_and_maps(runs, tmp_path):
    call(runs, "--methods", "plain", "--out", tmp_path, "--show", 1, limit=1)
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
        (("--structures", "vvv"), {"model": "llip"}, "is an Llip with the maps caption, cls"),
        (("--methods", "gem"), {"model": "llip"}, "no --structures or --methods"),
        ((), {"model": "pool"}, "pools 3 tokens without a text"),
        (("--show", "-1"), {}, "--show -1: a sheet holds 0 to 24"),
        (("--split", "tset"), {}, "tset"),
        (("--more", tmp_path / "no.pt"), {"limit": 2}, "no.pt"),
        (("--vocab", other), {}, "tokens, the model"),
    ):
        assert call(runs, *words, **options) == 2, words
        err = capsys.readouterr().err
        line = [text for text in err.splitlines() if text.startswith("error: ")]
        assert len(line) == 1 and complaint in line[0] and "Traceback" not in err, err
    for words in (["--structures", "vv"], ["--methods", "qkv"], ["--image", "3"]):
        with pytest.raises(SystemExit) as stop:
            call(runs, *words)
        assert stop.value.code == 2


def test_one_process_only(runs, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert call(runs) == 2 and "without torchrun" in capsys.readouterr().err


def test_other_sizes_of_pictures_and_patches(monkeypatch):
    """The grid of a model whose pictures are not 32 pixels, and one patch in all."""
    for size, patch in ((48, 16), (16, 16)):
        config = replace(SIZES, image_size=size, patch_size=patch)
        torch.manual_seed(0)
        model, drawn = CLIP(config).eval(), scenes.Objects("test", 5, image_size=size)
        names = [*maps.names_for(maps.Flags(model="", data="scenes"), "", False), *maps.BASELINES]
        scores, _ = maps.measure(model, TOKENIZER, drawn, names)
        assert all(s["images"] == 5 and s["lift"] >= 0 for s in scores.values())
        if size == patch:  # one patch says nothing about where
            assert all(s["lift"] == pytest.approx(1) for n, s in scores.items() if n != "centre")
