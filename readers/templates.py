"""Prompt templates by name; "{}" is replaced by the name of a class.

photo        Radford et al. 2021 (arXiv:2103.00020), section 3.1.4: the default
imagenet80   the 80 of the same paper (imagenet80.txt), openai/CLIP data/prompts.md @d05afc4 (MIT)
imagenet7    7 of them; the same list says that they are enough
OxfordPets   and the other names of CoOp's splits: one each, KaiyangZhou/CoOp @ff61507 trainers/coop.py
"""

import json
import re
from pathlib import Path

from util.files import read_text

PHOTO = ("a photo of a {}.",)
IMAGENET7 = (
    *("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."),
    *("a {} in a video game.", "art of the {}.", "a photo of the small {}."),
)
IMAGENET80 = tuple(Path(__file__).with_name("imagenet80.txt").read_text().splitlines())
# by NAME of split_zhou_NAME.json; Caltech101, ImageNet, StanfordCars and SUN397 use PHOTO
COOP = {
    "OxfordPets": ("a photo of a {}, a type of pet.",),
    "OxfordFlowers": ("a photo of a {}, a type of flower.",),
    "FGVCAircraft": ("a photo of a {}, a type of aircraft.",),
    "DescribableTextures": ("{} texture.",),
    "EuroSAT": ("a centered satellite photo of {}.",),
    "Food101": ("a photo of {}, a type of food.",),
    "UCF101": ("a photo of a person doing {}.",),
}
TEMPLATES = {"photo": PHOTO, "imagenet7": IMAGENET7, "imagenet80": IMAGENET80, **COOP}


def fill(template: str, name: str) -> str:
    """The prompt for one class; CLIP_benchmark writes {c} where OpenAI writes {}."""
    return template.replace("{}", name).replace("{c}", name)


def for_data(path: str) -> tuple[str, ...]:
    """The templates that papers use with a data set: CoOp's for its splits, PHOTO for all others."""
    named = re.search(r"split_zhou_(\w+)\.json$", str(path))
    return COOP.get(named[1], PHOTO) if named else PHOTO


def read_templates(words: list[str]) -> tuple[str, ...]:
    """The templates of --templates: a name in TEMPLATES, texts with {}, or a file (lines, or a JSON list).

    Raises: ValueError if the words are none of these.
    """
    if len(words) == 1 and words[0] in TEMPLATES:
        return TEMPLATES[words[0]]
    if all("{" in word for word in words):
        return tuple(words)
    if len(words) == 1 and Path(words[0]).is_file():
        return tuple(read_names(words[0]))
    known = ", ".join(TEMPLATES)
    raise ValueError(f"templates {' '.join(words)!r}: none of {known}, nor texts with {{}}, nor a file")


def read_classes(path: str, folders: list[str]) -> list:
    """The class names of --classnames, in the order of the folders.

    Raises: ValueError if a folder has no name, or the number of names differs.
    """
    names = read_names(path)
    if isinstance(names, list):
        if len(names) != len(folders):
            raise ValueError(f"{path}: {len(names)} names, but the data have {len(folders)} classes")
        return names
    if missing := [folder for folder in folders if folder not in names]:
        raise ValueError(f"{path}: no name for {len(missing)} classes, the first is {missing[0]!r}")
    return [names[folder] for folder in folders]


def read_names(path: str) -> list | dict:
    """Names from a file: one per line, or JSON: a list, or {folder: name or [synonyms]}."""
    try:
        text = read_text(path)
        names = json.loads(text) if path.endswith(".json") else text.splitlines()
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, or not text ({error})") from None
    if not isinstance(names, list | dict) or not names:
        raise ValueError(f"{path}: expected a list or a mapping that is not empty")
    return names if isinstance(names, dict) else [n for n in names if n not in ("", [])]
