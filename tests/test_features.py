"""Features of every kind of model against its own encoder, and the folder that keeps them."""

import pytest
import torch
from PIL import Image
from small_models import MODELS

import data
import pretrained
from evals import features
from readers import scenes
from util.files import PART


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_towers_output_before_projection(small_runs, name):
    model, objects = pretrained.load(small_runs[name]), scenes.Objects("test", 5, image_size=16)
    tokens = features.encode(model, objects, batch_size=2)
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
    kinds = features.reduced(tokens)
    if M == 1:
        assert list(kinds) == ["class token"] and torch.equal(kinds["class token"], tokens[:, 0])
    else:
        torch.testing.assert_close(kinds["mean"], tokens.sum(1) / 3)
        assert torch.equal(kinds["concatenation"][:, 16:32], tokens[:, 1])


def test_cache_is_used_and_forgotten_when_anything_changes(small_runs, tmp_path, monkeypatch):
    model, objects = pretrained.load(small_runs["clip"]), scenes.Objects("test", 4, image_size=16)
    calls, encode = [], features.encode
    monkeypatch.setattr(features, "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))

    def ask(source="clip", dataset=objects, **options):
        features.features(
            small_runs[source], pretrained.load(small_runs[source]), dataset, tmp_path, **options
        )
        return len(calls)

    first = features.features(small_runs["clip"], model, objects, tmp_path)
    assert torch.equal(features.features(small_runs["clip"], model, objects, tmp_path), first)
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
    assert not list(tmp_path.glob(f"*{PART}"))
    next(tmp_path.glob("*.pt")).write_bytes(b"broken")
    with pytest.raises(ValueError, match="delete it"):
        for path in tmp_path.glob("*.pt"):
            path.write_bytes(b"broken")
        ask()
