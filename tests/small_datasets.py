"""Tiny copies of the data sets of both papers, in the layouts of CoOp's DATASETS.md and of DomainBed."""

import json

import numpy as np
import torch
from PIL import Image

import pretrained
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
# AlignCLIP's reply counts 21 data sets and names none. The published code loads these 20: 5 of DomainBed, 11
# of CoOp, 4 variants of ImageNet. ImageNet is trained on base classes, and on all of them for its variants.
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


def save_clip(path) -> str:
    """A random CLIP with contexts of 32 tokens, as a run directory."""
    tokenizer = Tokenizer.learn([PHOTO.format("goldfish"), PHOTO.format("big cat")], 600)
    tokenizer.save(path / "tokenizer.json")
    torch.manual_seed(0)
    sizes = Config(16, 16, 8, 16, 1, 2, 32, 64, tokenizer.vocab_size, 16, 1, 2, 32)
    pretrained.save(CLIP(sizes), path / "checkpoint.pt")
    return str(path)
