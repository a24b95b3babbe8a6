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
# three of ImageNet's classes, and what classnames.txt calls them
WORDNET = {"n01443537": "goldfish", "n01498041": "stingray", "n01514859": "hen"}
IMAGENET = {
    "ImageNet": "imagenet/images/val",
    "ImageNetSketch": "imagenet-sketch/images",
    "ImageNetA": "imagenet-adversarial/imagenet-a",
    "ImageNetR": "imagenet-rendition/imagenet-r",
}
ALL = ["FGVCAircraft", "ImageNetV2", *COOP, *DOMAINS, *IMAGENET]


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
    if name == "FGVCAircraft":
        folder, classes = root / "fgvc_aircraft", ["707-320", "F/A-18", "Cessna 172"]
        (folder / "images").mkdir(parents=True)
        (folder / "variants.txt").write_text("\n".join([*classes, ""]))
        for s, split in enumerate(("train", "val", "test")):
            lines = [f"{c}{k}{s} {kind}" for c, kind in enumerate(classes) for k in range(2)]
            for k, line in enumerate(lines):
                picture(folder / "images" / f"{line.split()[0]}.jpg", 40 * s + k)
            (folder / f"images_variant_{split}.txt").write_text("\n".join([*lines, ""]))
        return folder, classes, {"train": 6, "val": 6, "test": 6}
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
    if name == "ImageNetV2":
        folder = root / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
        picture(root / "one.jpg", 7)
        one = (root / "one.jpg").read_bytes()
        for k in range(1000):
            (folder / str(k)).mkdir(parents=True, exist_ok=True)
            (folder / str(k) / "0.jpg").write_bytes(one)
        return folder, templates.SUITE["ImageNet"]["classes"], {}
    folder, splits = root / IMAGENET[name], {}
    for c, wnid in enumerate(WORDNET):
        for k in range(3):
            picture(folder / wnid / f"{k}.jpg", 40 * c + k)
            if name == "ImageNet":
                picture(folder.with_name("train") / wnid / f"{k}.jpg", 40 * c + k + 5)
                splits = {"train": 9, "val": 9}
    (folder / "README.txt").write_text("not an image")
    top = root / IMAGENET[name].split("/")[0]
    lines = ["n01440764 fish of CoOp", *(f"{wnid} {kind} of CoOp" for wnid, kind in WORDNET.items())]
    (top / "classnames.txt").write_text("\n".join([*lines, ""]))
    return top if name == "ImageNet" else folder, [f"{kind} of CoOp" for kind in WORDNET.values()], splits


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
    template = "a photo of a {}, a type of aircraft." if name == "FGVCAircraft" else template
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
TASKS |= {name: ("open-class", "all-classes") for name in ("FGVCAircraft", "ImageNet", *COOP)}
DEFAULT = ("PACS", "OxfordPets", "ImageNetR")
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


def test_domainnets_duplicates_are_left_out(tmp_path, capsys):
    folder, _, _ = make(tmp_path, "DomainNet")
    (folder / "domain_net_duplicates.txt").write_text("clipart/dog/1.jpg\nreal/elk/0.jpg\nreal/elk/99.jpg\n")
    dataset = data.open_dataset(folder)
    assert "2 images of domain_net_duplicates.txt are left out" in capsys.readouterr().out
    names = {dataset.name(i)[len(str(folder)) + 1 :] for i in range(len(dataset))}
    assert len(dataset) == 118 and not names & {"clipart/dog/1.jpg", "real/elk/0.jpg"}


def test_a_split_file_alone(tmp_path):
    folder, classes, _ = make(tmp_path, "EuroSAT")
    dataset = data.open_dataset(folder / "split_zhou_EuroSAT.json", "test")
    assert dataset.format.startswith("EuroSAT") and dataset.classes == classes and len(dataset) == 6
    # the first row of the file is of the last class: the file is read, not the folders
    assert dataset.labels == [2, 2, 1, 1, 0, 0]


FILES = {
    "classnames.txt": "n01440764 tench\nn01443537 gold fish, Carassius\nn01498041 sting_ray\nn01514859 hen\n",
    "LOC_synset_mapping.txt": "n01443537 gold fish, Carassius\nn01498041 sting ray\nn01514859 hen\n",
    "classnames.json": json.dumps({"n01443537": "gold_fish", "n01498041": "sting ray", "n01514859": "hen"}),
    "imagenet_class_index.json": json.dumps(
        {"0": ["n01443537", "gold_fish"], "1": ["n01498041", "sting_ray"], "2": ["n01514859", "hen"]}
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_class_names(tmp_path, file):
    for wnid in WORDNET:
        picture(tmp_path / "pictures" / "val" / wnid / "1.png")
    assert data.open_dataset(tmp_path / "pictures").classes == list(WORDNET)
    (tmp_path / file).write_text(FILES[file])
    assert data.open_dataset(tmp_path / "pictures").classes == ["gold fish", "sting ray", "hen"]
    (tmp_path / file).write_text("[]" if file.endswith("json") else "\n\n")
    with pytest.raises(ValueError, match=file):
        data.open_dataset(tmp_path / "pictures")


def test_numbered_folders(tmp_path):
    """102 folders from 1 on and 102 names are in the same order; of more names a number is the place."""
    for k in (1, 2, 10):
        picture(tmp_path / "flowers" / str(k) / "1.png")
    names = tmp_path / "flowers" / "classnames.txt"
    names.write_text("rose\ntulip\nlily of the valley\n")
    assert data.open_dataset(tmp_path / "flowers").classes == ["rose", "tulip", "lily of the valley"]
    names.write_text("".join(f"flower {k}\n" for k in range(12)))
    assert data.open_dataset(tmp_path / "flowers").classes == ["flower 1", "flower 2", "flower 10"]


def test_imagenets_own_names_need_no_file(tmp_path):
    folder, classes, _ = make(tmp_path, "ImageNetA")
    (tmp_path / "imagenet-adversarial" / "classnames.txt").unlink()
    assert data.open_dataset(folder).classes == ["goldfish", "stingray", "hen"]
    assert len(templates.SUITE["ImageNet"]["classes"]) == 1000


def test_classes_without_names(tmp_path, clip, capsys):
    for kind in ("n01443537", "n01498041"):
        for k in range(4):
            for split in ("train", "test"):
                picture(tmp_path / "own" / split / kind / f"{k}.png", k)
    assert evaluate.main(["zeroshot", "--model", clip, "--data", str(tmp_path / "own")]) == 0
    problem = "classes named n01443537, n01498041 ... mean nothing to a text encoder: put classnames.txt"
    assert f"warning: {problem}" in capsys.readouterr().err
    flags = ["--train-data", str(tmp_path / "own"), "--open-task", "all-classes", "--method", "finetune"]
    flags += ["--init", clip, "--out", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]
    assert train.main(flags) == 2
    assert problem in capsys.readouterr().err
    (tmp_path / "own" / "classnames.txt").write_text("n01443537 goldfish\nn01498041 stingray\n")
    assert train.main([*flags, "--batch-size", "2", "--threads", "1"]) == 0


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
    folder, _, _ = make(tmp_path, "FGVCAircraft")
    (folder / "variants.txt").write_text("707-320\nF/A-18\n")
    with pytest.raises(ValueError, match="images_variant_train.txt: .*Cessna 172"):
        data.open_dataset(folder)
    (folder / "variants.txt").unlink()
    with pytest.raises(OSError, match="variants.txt"):
        data.open_dataset(folder)


def test_names_and_templates_of_the_suite():
    assert templates.read_templates(["clip-MNIST"]) == ('a photo of the number: "{}".',)
    assert templates.read_classes("clip-CIFAR10", list("0123456789"))[:2] == ["airplane", "automobile"]
    with pytest.raises(ValueError, match="clip-CIFAR10: 10 names, but the data have 2 classes"):
        templates.read_classes("clip-CIFAR10", ["a", "b"])
    assert {"CIFAR10", "CIFAR100", "GTSRB", "STL10", "RESISC45", "Country211", "KITTI"} <= set(
        templates.SUITE
    )
    assert "MIT License" in templates.SUITE["source"]
