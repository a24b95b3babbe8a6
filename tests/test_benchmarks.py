"""Tiny copies of the data sets of both papers, in the layouts of CoOp and DomainBed, recognised by folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import pretrained
import train
from evals import protocol
from model import CLIP, Config
from readers import templates
from tokenizer import Tokenizer

PHOTO = "a photo of a {}."
# name of the split file: (folder, folder of the images, template)
COOP = {
    "Caltech101": ("caltech-101", "101_ObjectCategories", PHOTO),
    "OxfordPets": ("oxford_pets", "images", "a photo of a {}, a type of pet."),
    "StanfordCars": ("stanford_cars", "", PHOTO),
    "OxfordFlowers": ("oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    "Food101": ("food-101", "images", "a photo of {}, a type of food."),
    "SUN397": ("sun397", "SUN397", PHOTO),
    "DescribableTextures": ("dtd", "images", "{} texture."),
    "EuroSAT": ("eurosat", "2750", "a centered satellite photo of {}."),
    "UCF101": ("ucf101", "UCF-101-midframes", "a photo of a person doing {}."),
}
DOMAINS = {
    "VLCS": ("VLCS", "Caltech101 LabelMe SUN09 VOC2007"),
    "PACS": ("kfold", "art_painting cartoon photo sketch"),
    "OfficeHome": ("OfficeHomeDataset_10072016", "Art Clipart Product Real_World"),
    "TerraIncognita": ("terra_incognita", "location_100 location_38 location_43 location_46"),
    "DomainNet": ("domain_net", "clipart infograph painting quickdraw real sketch"),
}
ALL = [*COOP, *DOMAINS]


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 99, (12, 12, 3))
    Image.fromarray(np.uint8(noise + shade % 150)).save(path)


def make(root, name):
    """A copy with few classes.   Returns: (folder, class names as prompts say them, {split: images})."""
    classes = ["big cat", "dog", "elk"]
    if name in COOP:
        folder, images, _ = COOP[name]
        splits = {"train": 4, "val": 2, "test": 2}
        listed = {}
        for split, n in splits.items():
            listed[split] = []
            for c, kind in enumerate(classes):
                for k in range(n):
                    # the folders of the images would be read as other classes in another order
                    file = f"{'zyx'[c]}_folder/{split}{k}.jpg"
                    picture(root / folder / images / file, 40 * c + k)
                    listed[split].append([file, c, kind.replace(" ", "_")])
            # DomainBed's and CoOp's lists are not in the order of the classes
            listed[split].reverse()
        # excluded by the split file, as in Caltech101
        picture(root / folder / images / "BACKGROUND_Google" / "1.jpg")
        (root / folder / f"split_zhou_{name}.json").write_text(json.dumps(listed))
        return root / folder, classes, {split: 3 * n for split, n in splits.items()}
    if name in DOMAINS:
        folder, domains = DOMAINS[name]
        for d, domain in enumerate(domains.replace("Real_World", "Real World").split(" ")):
            domain = "Real World" if domain == "Real" else domain
            if domain == "World":
                continue
            for c, kind in enumerate(("big_cat", "dog", "elk", "owl")):
                for k in range(5):
                    picture(root / folder / domain / kind / f"{k}.jpg", 40 * c + 7 * d + k)
        # lists beside the domains, as OfficeHome has
        (root / folder / "imagelist.txt").write_text("Art/dog/0.jpg\n")
        return root / folder, [*classes, "owl"], {}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP as a run directory: checkpoint and vocabulary."""
    path = tmp_path_factory.mktemp("clip")
    tokenizer = Tokenizer.learn([PHOTO.format("goldfish"), PHOTO.format("big cat")], 600)
    tokenizer.save(path / "tokenizer.json")
    torch.manual_seed(0)
    sizes = Config(16, 16, 8, 16, 1, 2, 32, 64, tokenizer.vocab_size, 16, 1, 2, 32)
    pretrained.save(CLIP(sizes), path / "checkpoint.pt")
    return str(path)


@pytest.mark.parametrize("name", ALL)
def test_a_folder_is_enough(tmp_path, capsys, name):
    folder, classes, splits = make(tmp_path, name)
    dataset = data.open_dataset(folder)
    assert dataset.classes == classes
    assert dataset.splits == splits and len(dataset) >= len(classes)
    template = COOP[name][2] if name in COOP else PHOTO
    assert dataset.format.startswith(f"{name}, template {template!r}: ")
    assert templates.for_data(str(folder)) == (template,)
    for split, count in splits.items():
        part = data.open_dataset(folder, split)
        assert len(part) == count and sorted(set(part.labels)) == [0, 1, 2] and part.classes == classes
    if name in DOMAINS:
        wanted = DOMAINS[name][1].split(" ")
        assert dataset.domain_names == [domain.replace("_World", " World") for domain in wanted]
        assert dataset.domains == sorted(dataset.domains) and len(dataset) == 20 * len(wanted)
    assert data.main([str(folder), "--no-show"]) == 0
    printed = capsys.readouterr().out
    assert f"format    {name}, template {template!r}" in printed and classes[1] in printed


TASKS = {name: ("domain-shift", "in-the-wild", "open-class", "all-classes") for name in DOMAINS}
TASKS |= {name: ("open-class", "all-classes") for name in COOP}
DEFAULT = ("PACS", "OxfordPets", "Food101")
EACH = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


@pytest.mark.parametrize("name", EACH)
def test_each_set_trains_and_is_evaluated_in_its_tasks(tmp_path, clip, name):
    folder, classes, splits = make(tmp_path, name)
    assert (
        evaluate.main(["zeroshot", "--model", clip, "--data", str(folder), "--out", str(tmp_path / "z")]) == 0
    )
    result = json.loads((tmp_path / "z" / "results.json").read_text())
    assert result["classes"] == len(classes) and result["templates"] == list(templates.for_data(str(folder)))
    for task in TASKS.get(name, ()):
        flags = ["--train-data", str(folder), "--open-task", task, "--out", str(tmp_path / task)]
        if task in ("domain-shift", "in-the-wild"):
            flags += ["--target-domain", data.open_dataset(folder).domain_names[1]]
        sources = (
            1 if name not in TASKS or name not in DOMAINS else len(data.open_dataset(folder).domain_names)
        )
        sources -= task in ("domain-shift", "in-the-wild")
        flags += ["--method", "finetune", "--init", clip, "--steps", "1", "--batch-size", str(2 * sources)]
        assert train.main([*flags, "--device", "cpu", "--threads", "1"]) == 0
        rows = json.loads((tmp_path / task / "results.json").read_text())
        assert "zero-shot" in json.dumps(rows)


def test_splits_of_domainbed_and_coop(tmp_path):
    """The hold-out of a domain is DomainBed's; base classes are the first half, and rows keep their order."""
    folder, _, _ = make(tmp_path, "VLCS")
    dataset = data.open_dataset(folder)
    parts = protocol.protocol(folder, "domain-shift", "SUN09")
    _, held = data.domainbed_split(20, 2)
    target = [i for i, d in enumerate(dataset.domains) if d == 2]
    held_files = [dataset.name(target[k]) for k in held]
    assert [parts.tests["target"].name(i) for i in range(len(held))] == held_files
    folder, _, _ = make(tmp_path, "Food101")
    parts = protocol.protocol(folder, "open-class")
    assert parts.train.classes == ["big cat", "dog"] and len(parts.train) == 8
    assert parts.tests["new"].classes == ["elk"] and len(parts.tests["new"]) == 2


def test_a_split_file_alone(tmp_path):
    folder, classes, _ = make(tmp_path, "EuroSAT")
    dataset = data.open_dataset(folder / "split_zhou_EuroSAT.json", "test")
    assert dataset.format.startswith("EuroSAT") and dataset.classes == classes and len(dataset) == 6
    # the first row of the file is of the last class: the file is read, not the folders
    assert dataset.labels == [2, 2, 1, 1, 0, 0]


def test_wrong_copies_are_one_line(tmp_path):
    folder, _, _ = make(tmp_path, "PACS")
    for image in (folder / "photo" / "dog").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="class 'dog' in the domain 'photo'"):
        data.open_dataset(folder)
    folder, _, _ = make(tmp_path, "UCF101")
    (folder / "UCF-101-midframes" / "x_folder" / "test0.jpg").unlink()
    with pytest.raises(ValueError, match="1 of its 6 images are missing, the first is .*x_folder/test0.jpg"):
        data.open_dataset(folder, "test")


def test_names_and_templates_of_the_suite():
    assert templates.read_templates(["clip-MNIST"]) == ('a photo of the number: "{}".',)
    assert templates.read_classes("clip-CIFAR10", list("0123456789"))[:2] == ["airplane", "automobile"]
    with pytest.raises(ValueError, match="clip-CIFAR10: 10 names, but the data have 2 classes"):
        templates.read_classes("clip-CIFAR10", ["a", "b"])
    assert {"CIFAR10", "CIFAR100", "GTSRB", "STL10", "RESISC45", "Country211", "KITTI"} <= set(
        templates.SUITE
    )
    assert "MIT License" in templates.SUITE["source"]
