"""evals/mixtures.py: the figures against loops, and the program on every kind of Llip."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import CONFIG, TOKENIZER

import data
import pretrained
from evals import mixtures, surgery
from llip import Llip
from readers import scenes


def build(tokens=3, **options):
    torch.manual_seed(0)
    model = Llip(CONFIG, tokens, 2, scale=5.0, bias=-2.0, temperature=1.0, **options)
    for parameter in (model.k_proj, model.q_proj):
        parameter.data *= 1.5  # weights that are far from uniform
    return model.eval()


def inputs(model, images=12):
    dataset = scenes.Scenes("test", images, image_size=model.config.image_size)
    captions = mixtures.scene_captions(dataset)
    return dataset, captions, mixtures.measure(model, TOKENIZER, dataset, captions, mixtures.Flags(model=""))


@pytest.fixture(scope="module")
def measured():
    model = build()
    return model, *inputs(model)


def features(model, dataset, captions):
    transform = data.preprocess(model.config.image_size)
    with torch.no_grad():
        images = torch.stack([transform(dataset.image(i)) for i in range(len(dataset))])
        text = model.encode_text(TOKENIZER(captions.texts, model.config.context_length))
        return images, model.encode_image(images), text


def test_weights_and_the_three_parts_of_their_variance(measured):
    model, dataset, captions, found = measured
    _, (keys, _), (queries, _) = features(model, dataset, captions)
    phi = model.mixing_weights(keys, queries).double().detach().numpy()  # (N, T, H, M)
    assert np.allclose(found["by_caption"], phi.mean(0), atol=1e-6)
    rows = mixtures.weights(found)
    assert len(rows) == model.heads
    for head, row in enumerate(rows):
        x = phi[:, :, head]
        assert row["entropy"] == pytest.approx(-(x * np.log(x)).sum(-1).mean(), abs=1e-5)
        assert 0 < row["entropy"] < math.log(3) and row["uniform"] == 1 / 3
        assert row["largest weight"] == pytest.approx(x.max(-1).mean(), abs=1e-5)
        by_caption, by_image = x.mean(0, keepdims=True), x.mean(1, keepdims=True)
        rest = x - by_caption - by_image + x.mean((0, 1), keepdims=True)
        total = x.var((0, 1)).sum()
        for name, part in (("captions", by_caption), ("images", by_image), ("both", rest)):
            assert row[f"across {name}"] == pytest.approx(part.var((0, 1)).sum() / total, abs=1e-4)


@pytest.mark.parametrize("all_tokens", [False, True])
def test_a_token_is_removed_before_the_softmax(all_tokens):
    model = build(all_tokens=all_tokens)
    dataset, captions, found = inputs(model, 4)
    _, (keys, values), (queries, text) = features(model, dataset, captions)
    for (i, j, _), cosines in zip(captions.pairs().tolist(), found["cosines"].tolist()):
        scores = (keys[i] @ queries[j][..., None])[..., 0] / model.temperature  # (H, M)
        for k in (None, 0, 1, 2):
            removed = scores.clone()
            if k is not None:
                removed[:, k] = -math.inf
            y = (removed.softmax(-1)[..., None] * values[i]).sum(1).flatten()
            wanted = F.cosine_similarity(y @ model.pred.out_proj, text[j], dim=0).item()
            offset = (model.logit_bias / model.logit_scale.exp()).item()
            assert cosines[0 if k is None else k + 1] == pytest.approx(wanted + offset, abs=1e-4)


def test_caption_maps_are_those_of_the_library(measured):
    model, dataset, captions, found = measured
    images, _, _ = features(model, dataset, captions)
    tokens = TOKENIZER(captions.texts, model.config.context_length)
    with torch.no_grad():
        wanted = surgery.llip_caption_map(model, images, tokens)
    for p, (i, j, _) in enumerate(captions.pairs().tolist()):
        mixed = surgery.mixed_maps(found["maps"][i, None], found["used"][p][None, None])
        assert torch.allclose(mixed[0, ..., 0], wanted[i, ..., j], atol=1e-5)


def test_captions_of_scenes_are_those_of_training_and_true():
    dataset = scenes.Scenes("test", 30)
    captions = mixtures.scene_captions(dataset)
    written = {text for some in scenes.Scenes("train", 3000).captions for text in some}
    assert len(set(captions.texts)) == len(captions.texts) == 96 + 4 + 64 + 6 + 4
    assert len(set(captions.texts) - written) < 20  # few are too rare for 3,000 scenes
    assert list(captions.rows) == ["things", "colours", "groups", "positions", "places", "counts"]
    for scene, own in zip(dataset.pictures, captions.own):
        texts, count = [captions.texts[j] for j in own], len(scene.things)
        assert f"{['one thing', 'two things', 'three things', 'four things'][count - 1]}" in texts
        for thing in scene.things:
            assert any(f"{thing.colour} {thing.kind}" in text for text in texts)
    for i, j, true in captions.pairs().tolist():
        assert true == (j in captions.own[i])
        assert true or j in captions.own[(i + 1) % 30]


def test_names_and_their_comparison():
    texts = [f"{colour} {thing}" for colour in "abcd" for thing in "uvwxyz"]
    means = torch.full((24, 1, 4), 0.1)
    for j in range(24):
        means[j, 0, j // 6] = 0.7  # token k serves colour k
    rows, own = mixtures.names(means, texts)
    assert [{text[0] for text in row["captions"]} for row in rows] == [{"a"}, {"b"}, {"c"}, {"d"}]
    assert own["coherence"] == pytest.approx(1 / 3) and own["permuted"] < 0.2 and own["p"] < 0.02
    _, chance = mixtures.names(torch.rand(24, 1, 4, generator=torch.Generator().manual_seed(1)), texts)
    assert chance["p"] > 0.05
    assert mixtures.names(means[:1], texts[:1])[1] == {}


def test_ablation_in_numbers():
    captions = mixtures.Captions(["a", "b"], ["x", "x"], ["", ""], {}, [[0], [1]])
    assert captions.pairs().tolist() == [[0, 0, 1], [0, 1, 0], [1, 1, 1], [1, 0, 0]]
    cosines = torch.tensor([[0.9, 0.5, 0.9], [0.1, 0.1, 0.1], [0.9, 0.9, 0.3], [0.1, 0.3, 0.1]])
    used = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.1, 0.9], [0.8, 0.2]])
    (row,) = mixtures.ablation({"cosines": cosines.double(), "used": used}, captions)
    expected = {"pairs": 2, "drop": 0.5, "weight": 0.85, "most needed": 1, "chance": 0.5, "lead": 0.8}
    expected |= {"true, %": 62.5, "false, %": -12.5, "lead lost, %": 75, "another, %": 0}
    assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-5)
    (row,) = mixtures.ablation({"cosines": 0.01 * cosines.double(), "used": used}, captions)
    assert "lead" not in row


def test_a_map_on_the_named_thing_is_right(measured):
    model, dataset, captions, found = measured
    areas = torch.zeros(2, 4, 4).double()
    areas[0, :2, :2], areas[1, 2:, 2:] = 1, 1
    maps = torch.stack([areas[0], torch.ones(4, 4)], -1).float()
    assert mixtures.lift(maps, areas).tolist() == [[4, 1], [0, 1]]
    # token k looks at the k-th thing, and each caption uses only the token of its thing
    size, pairs = dataset.image_size, captions.pairs()
    perfect = {"maps": torch.full((len(dataset), size, size, 4), 1e-6), "used": torch.zeros(len(pairs), 4)}
    for i in range(len(dataset)):
        for k, mask in enumerate(dataset.masks(i)):
            perfect["maps"][i, ..., k] += torch.from_numpy(mask)
    for p, (i, j, _) in enumerate(pairs.tolist()):
        kinds = mixtures.kinds_in(dataset, i)
        perfect["used"][p, kinds.index(captions.things[j]) if captions.things[j] in kinds else 0] = 1
    labels, by_pair, tables = mixtures.on_masks(perfect, dataset, captions)
    assert by_pair and all(right for _, right, _ in by_pair.values())
    own, other = tables["caption maps"]
    assert own["right thing"] == 1 > other["right thing"] and own["lift"] > 2 and 0.25 <= own["chance"] <= 0.5
    assert labels[0][0].split()[0] == mixtures.kinds_in(dataset, 0)[0]
    best, _, worst, _ = mixtures.examples(dataset, {"by_pair": by_pair}, captions)
    assert best != worst
    # all maps of one scene are wrong: it comes last
    wrong = {p: (0.1, False, "") if pairs[p, 0] == best else row for p, row in by_pair.items()}
    assert mixtures.examples(dataset, {"by_pair": wrong}, captions)[2] == best


# Command line ----------------------------------------------------------------------------------------


def save(folder, model):
    pretrained.save(model, folder / "checkpoint.pt")
    TOKENIZER.save(folder / "tokenizer.json")
    return folder


def call(model, out, *words):
    assert mixtures.main(["--model", str(model), "--out", str(out), "--device", "cpu", *map(str, words)]) == 0
    widths = {path.name: Image.open(path).width for path in Path(out).glob("*.png")}
    assert max(widths.values()) <= 1600
    return json.loads((out / "results.json").read_text()), widths


def test_scenes(small_runs, tmp_path, capsys):
    result, pictures = call(small_runs["llip"], tmp_path, "--limit", 20)
    assert set(pictures) == {f"{n}.png" for n in ("weights", "tokens", "captions", "ablation")}
    assert np.array(result["mean_weights"]).shape == (174, 2, 3)
    assert np.array(result["mean_weights"]).sum(-1) == pytest.approx(1, abs=1e-3)
    assert len(result["names"]) == 6 and len(result["topics"]) == 174 and result["images"] == 20
    assert {"weights", "ablation", "caption maps", "token maps", "coherence"} <= set(result)
    out = capsys.readouterr().out
    assert "across captions" in out and "lead lost, %" in out and "right thing" in out
    for row in result["names"]:
        assert f"{row['weight']:.3f} | {'; '.join(row['captions'])} " in out


@pytest.mark.parametrize("tokens, options", [(1, {}), (2, {"all_tokens": True}), (40, {"norm": True})])
def test_every_kind_of_llip(tokens, options, tmp_path):
    (tmp_path / "run").mkdir()
    run = save(tmp_path / "run", build(tokens, **options))
    result, pictures = call(run, tmp_path / "out", "--limit", 6)
    assert np.array(result["mean_weights"]).shape == (174, 2, tokens)
    assert ("ablation.png" in pictures) == (tokens > 1) == bool(result["ablation"])


def test_photos_and_texts(small_runs, tmp_path):
    rng, photos = np.random.default_rng(0), []
    for n, size in enumerate([(50, 30, 3), (20, 70, 3)]):
        photos.append(tmp_path / f"{n}.png")
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(photos[-1])
    words = ["--image", *photos, "--text", "a red dog", "on grass"]
    result, pictures = call(small_runs["llip"], tmp_path / "out", *words)
    assert result["captions"] == ["a red dog", "on grass"] and "ablation.png" not in pictures
    assert [(row["topic"], row["pairs"]) for row in result["ablation"]] == [("captions", 4)]
    result, _ = call(small_runs["llip"], tmp_path / "one", "--image", photos[0], "--text", "a " * 40)
    assert result["coherence"] == {}


def test_data_with_captions_and_with_labels(small_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(mixtures, "MAX_TEXTS", 5)
    lines = ["image,caption"]
    for k in range(4):
        for folder in ("cat", "dog"):
            (tmp_path / "folder" / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 30), (60 * k, 0, 9)).save(tmp_path / "folder" / folder / f"{k}.png")
            lines.append(f"folder/{folder}/{k}.png,a {folder} number {k}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    result, _ = call(small_runs["llip"], tmp_path / "a", "--data", tmp_path / "list.csv")
    assert len(result["captions"]) == 5 and "caption maps" not in result
    result, _ = call(small_runs["llip"], tmp_path / "b", "--data", tmp_path / "folder", "--limit", 4)
    assert result["captions"] == ["a photo of a cat.", "a photo of a dog."] and result["images"] == 4


def test_errors_are_one_line(small_runs, tmp_path, capsys):
    large = tmp_path / "large.png"
    Image.new("RGB", (10, 10)).save(large)
    for name, words, complaint in (
        ("clip", [], "is a CLIP without mixture tokens: this program needs a Llip"),
        ("pooled", [], "pools 3 tokens without a text"),
        ("llip", ["--text", "a"], "give --data, or --image together with --text"),
        ("llip", ["--image", "a.png", "--text", "a", "--data", "scenes"], "give --data, or --image"),
        ("llip", ["--image", tmp_path / "a.png", "--text", "a"], "not a readable image"),
        ("llip", ["--image", large, "--text", "a", "--max-pixels", 99], "more than the 99 allowed"),
    ):
        assert mixtures.main(["--model", str(small_runs[name]), *map(str, words)]) == 2, words
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(err) == 1 and complaint in err[0], err
