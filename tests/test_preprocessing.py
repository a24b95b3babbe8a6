"""The mean, std, interpolation and resize mode of a checkpoint: read, refused, used everywhere, and kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import checkpoint
from PIL import Image
from small_models import CONFIG, TOKENIZER

import data
import evaluate
import pretrained
import train
from evals import linear_probe, maps, mixtures, surgery
from evals import protocol as protocols
from llip import Llip
from model import CLIP
from readers import scenes
from readers.images import Preprocess

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
STATED = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "squash"}
HEADS = dict(vision_heads=2, text_heads=2, quick_gelu=True)


def model_of(kind=CLIP, *args, **preprocessing):
    torch.manual_seed(0)
    return kind(replace(CONFIG, preprocessing=preprocessing), *args).eval()


def picture(width=40, height=23):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(np.uint8(noise))


def weights_beside(folder, file, content, name="weights.pt", kind=CLIP):
    """A state dict, and a file of settings beside it."""
    torch.save(model_of(kind).state_dict(), folder / name)
    (folder / file).write_text(json.dumps(content))
    return folder / name


def open_clip_settings(**preprocess_cfg):
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def processor(**changes):
    """What transformers writes for CLIPImageProcessor."""
    side = {"height": 16, "width": 16}
    found = {"crop_size": side, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True}
    found |= {"do_rescale": True, "do_resize": True, "image_mean": MEAN, "image_std": STD, "resample": 3}
    found |= {"image_processor_type": "CLIPImageProcessor", "rescale_factor": 1 / 255}
    return found | {"size": {"shortest_edge": 16}} | changes


def preprocessing(path):
    return pretrained.load(path, **HEADS).config.preprocessing


# ---- read


def test_squash_and_other_means_by_hand():
    image = picture()
    pixels = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float64)
    expected = (pixels / 255 - MEAN) / STD
    found = Preprocess(16, **STATED)(image).permute(1, 2, 0).double().numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert Preprocess(16, resize_mode="shortest").pixels(image).shape == (16, 16, 3)


def test_open_clip_config(tmp_path):
    stated = {"size": [16, 16], "mode": "RGB", "fill_color": 0} | STATED
    path = weights_beside(tmp_path, "open_clip_config.json", open_clip_settings(**stated))
    assert pretrained.load(path).config.preprocessing == STATED
    usual = {"size": 16, "mean": data.MEAN, "std": data.STD, "interpolation": "bicubic", "mode": "RGB"}
    for settings in (open_clip_settings(**usual), open_clip_settings(), open_clip_settings(mean=None)):
        weights_beside(tmp_path, "open_clip_config.json", settings)
        assert pretrained.load(path).config.preprocessing == {}


@pytest.mark.parametrize(
    "settings, expected",
    [
        (processor(), {"mean": MEAN, "std": STD}),
        (processor(resample=2), {"mean": MEAN, "std": STD, "interpolation": "bilinear"}),
        (processor(size={"height": 16, "width": 16}), {"mean": MEAN, "std": STD, "resize_mode": "squash"}),
        (processor(size=16, crop_size=16), {"mean": MEAN, "std": STD}),  # older files
        (processor(image_mean=data.MEAN, image_std=data.STD), {}),
    ],
)
def test_preprocessor_config(tmp_path, settings, expected):
    path = weights_beside(tmp_path, "preprocessor_config.json", settings)
    assert preprocessing(path) == expected
    # transformers 5 writes all parts of a processor into one file
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert preprocessing(path) == expected
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert preprocessing(path) == {}


def test_the_file_of_the_layouts_own_project_comes_first(tmp_path):
    path = weights_beside(tmp_path, "open_clip_config.json", open_clip_settings(mean=[0.5] * 3))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor()))
    assert pretrained.load(path).config.preprocessing == {"mean": [0.5] * 3}
    exported = pretrained.save(model_of(), tmp_path / "hf", "huggingface")
    for name in ("open_clip_config.json", "preprocessor_config.json"):
        (exported / name).write_text((tmp_path / name).read_text())
    assert pretrained.load(exported).config.preprocessing == {"mean": MEAN, "std": STD}


@pytest.mark.parametrize("name", ["vit_l_14-laion2b_s32b_b82k-0f1.pt", "CLIP-ViT-L-14-laion2B-s32B-b82K.bin"])
def test_the_tag_of_laions_large_model(tmp_path, name):
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save(model_of().state_dict(), tmp_path / name)
    assert preprocessing(tmp_path / name) == half
    weights_beside(tmp_path, "preprocessor_config.json", processor(), name)
    assert preprocessing(tmp_path / name) == {"mean": MEAN, "std": STD}, "a file of settings comes first"
    torch.save(model_of().state_dict(), tmp_path / "vit_l_14-laion2b_s34b_b79k.pt")
    (tmp_path / "preprocessor_config.json").unlink()
    assert preprocessing(tmp_path / "vit_l_14-laion2b_s34b_b79k.pt") == {}


# ---- refused


OPEN_CLIP = [
    ({"resize_mode": "longest"}, "resize_mode 'longest' is not supported"),
    ({"interpolation": "random"}, "interpolation 'random' is not supported"),
    ({"interpolation": ["bicubic"]}, "interpolation a list is not supported"),
    ({"mode": "L"}, "mode 'L' is not supported"),
    ({"size": [16, 24]}, "only one square size"),
    ({"size": 24}, "image_size 24, but the weights are for 16 pixels"),
    ({"mean": 0.5}, "mean is not a list of three numbers"),
    ({"mean": [0.5, 0.5]}, "mean is not a list"),
    ({"mean": [0.5, 0.5, "x"]}, "mean is not a list"),
    ({"mean": [0.5, 0.5, float("nan")]}, "mean is not a list"),
    ({"std": [0.5, 0.0, 0.5]}, "std is not a list"),
    ({"gamma": 2.2}, "gamma"),
]
PROCESSORS = [
    ({"resample": 0}, "interpolation 0 is not supported"),
    ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
    ({"size": {"shortest_edge": 20}}, "16 and 20 pixels|20 and 16 pixels"),
    ({"size": {"longest_edge": 16}}, "longest_edge"),
    ({"do_center_crop": False}, "do_center_crop False"),
    ({"do_rescale": False}, "do_rescale False"),
    ({"do_normalize": False}, "do_normalize False"),
    ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
    ({"size": {"shortest_edge": 24}, "crop_size": 24}, "image_size 24, but"),
    ({"size": "16"}, "only one square size"),
    ({"image_std": {}}, "std is not a list"),
]


@pytest.mark.parametrize("change, words", OPEN_CLIP + PROCESSORS)
def test_what_is_not_supported_is_named(tmp_path, change, words):
    known = {}
    if (change, words) in OPEN_CLIP:
        path = weights_beside(tmp_path, "open_clip_config.json", open_clip_settings(**change))
    else:
        path, known = weights_beside(tmp_path, "preprocessor_config.json", processor(**change)), HEADS
    with pytest.raises(ValueError, match=words) as error:
        pretrained.load(path, **known)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("value", [3, {"mean": [1]}, {"gamma": 1}, {"resize_mode": "longest"}, [], None])
def test_checkpoints_of_ours_with_other_values(tmp_path, value):
    content = torch.load(pretrained.save(model_of(), tmp_path / "x"), weights_only=True)
    content["model"]["config"]["preprocessing"] = value
    torch.save(content, tmp_path / "x")
    with pytest.raises(ValueError) as error:
        pretrained.load(tmp_path / "x")
    assert "\n" not in str(error.value)
    del content["model"]["config"]["preprocessing"]  # as older programs wrote it
    torch.save(content, tmp_path / "x")
    assert pretrained.load(tmp_path / "x").config.preprocessing == {}


# ---- used


@pytest.fixture
def normalised(monkeypatch):
    """The (mean, std) of every batch of images that is made."""
    seen, original = [], data.normalise

    def normalise(pixels, mean=data.MEAN, std=data.STD):
        seen.append((list(mean), list(std)))
        return original(pixels, mean, std)

    monkeypatch.setattr(data, "normalise", normalise)
    return seen


def write_classes(root):
    for domain in ("photo", "sketch"):
        for name in ("cat", "dog"):
            (root / domain / name).mkdir(parents=True)
            for k in range(3):
                picture(30 + k).save(root / domain / name / f"{k}.png")
    return root


def test_evaluation_sees_what_the_checkpoint_states(tmp_path, normalised):
    dataset = data.open_dataset(write_classes(tmp_path))
    model = model_of(**STATED)
    evaluate.zeroshot(model, dataset, TOKENIZER)
    assert normalised and all(pair == (MEAN, STD) for pair in normalised)
    images, _ = next(data.eval_batches(dataset, data.preprocess_of(model.config), 1))
    assert torch.equal(images[0], Preprocess(16, **STATED)(dataset.image(0)))


def test_evaluation_programs_see_it_too(tmp_path, normalised):
    objects, model = scenes.Objects("test", 4, image_size=16), model_of(**STATED)
    linear_probe.encode(model, objects)
    maps.measure(model, TOKENIZER, objects, ["qkv"])
    llip = model_of(Llip, 3, 2, **STATED)
    drawn = scenes.Scenes("test", 4, image_size=16)
    mixtures.measure(llip, TOKENIZER, drawn, mixtures.scene_captions(drawn), mixtures.Flags(model=""))
    picture().save(tmp_path / "a.png")
    source = pretrained.save(model, tmp_path / "run" / "checkpoint.pt").parent
    TOKENIZER.save(source / "tokenizer.json")
    words = [str(tmp_path / "a.png"), "a dog", "--model", str(source), "--out", str(tmp_path / "map.png")]
    assert surgery.main(words) == 0
    assert len(normalised) == 4 and all(pair == (MEAN, STD) for pair in normalised)


@pytest.mark.parametrize("method", ["clip", "llip", "finetune", "coop"])
def test_a_run_is_trained_with_it_and_keeps_it(tmp_path, normalised, monkeypatch, method):
    monkeypatch.setattr(protocols, "HELD_OUT", 8)
    start = pretrained.save(model_of(**STATED), tmp_path / "start" / "checkpoint.pt").parent
    TOKENIZER.save(start / "tokenizer.json")
    flags = dict(method=method, init=str(start), out=str(tmp_path / "run"), steps=1, device="cpu", threads=1)
    if method in ("clip", "llip"):
        monkeypatch.setattr(train.tasks.PairTask, "evaluate", lambda self, model: {})
        lines = "".join(f"{k}.png,a thing {k}\n" for k in range(4))
        (tmp_path / "list.csv").write_text("image,caption\n" + lines)
        for k in range(4):
            picture(30 + k).save(tmp_path / f"{k}.png")
        flags |= dict(train_data=str(tmp_path / "list.csv"), batch_size=2)
    else:
        flags |= dict(train_data=str(write_classes(tmp_path / "bed")), target_domain="sketch", batch_size=2)
    train.train(*train.configure(**flags))
    assert normalised and all(pair == (MEAN, STD) for pair in normalised)
    kept = checkpoint(tmp_path / "run")["model"]["config"]["preprocessing"]
    assert kept == STATED
    model, tokenizer = evaluate.open_model(str(tmp_path / "run"))
    assert model.config.preprocessing == STATED
    normalised.clear()
    evaluate.zeroshot(model, data.open_dataset(write_classes(tmp_path / "test")), tokenizer)
    assert normalised and all(pair == (MEAN, STD) for pair in normalised)


def test_both_layouts_and_the_program_keep_it(tmp_path, capsys):
    path = pretrained.save(model_of(**STATED), tmp_path / "x.pt")
    assert pretrained.load(path).config.preprocessing == STATED
    assert pretrained.main([str(path)]) == 0
    assert "preprocessing   {'mean': [0.1, 0.2, 0.3]" in capsys.readouterr().out
    assert pretrained.main([str(pretrained.save(model_of(), tmp_path / "y.pt"))]) == 0
    assert "preprocessing   as OpenAI's" in capsys.readouterr().out
