"""Prompt templates by name; "{}" is replaced by the name of a class.

photo        Radford et al. 2021 (arXiv:2103.00020), section 3.1.4: the default
imagenet80   the 80 of the same paper, and clip-CIFAR10 ...: those of its other data sets (zeroshot.json)
imagenet7    7 of them; the same list says that they are enough
OxfordPets   and the other names of benchmarks.txt: one each
"""

import json
import os
import re
from collections import namedtuple
from pathlib import Path

from util.files import read_text

WORDNET = r"n\d{8}"
Benchmark = namedtuple("Benchmark", "name mark template")  # a line of benchmarks.txt
LINES = Path(__file__).with_name("benchmarks.txt").read_text(encoding="utf-8").splitlines()
BENCHMARKS = [Benchmark(*line.split(" | ")) for line in LINES if line[0] != "#"]
SUITE = json.loads(Path(__file__).with_name("zeroshot.json").read_text(encoding="utf-8"))
PHOTO = ("a photo of a {}.",)
CLIP = {f"clip-{name}": tuple(facts["templates"]) for name, facts in SUITE.items() if name != "source"}
IMAGENET80 = CLIP["clip-ImageNet"]
IMAGENET7 = tuple(IMAGENET80[k] for k in (73, 7, 44, 69, 35, 67, 64))
TEMPLATES = {"photo": PHOTO, "imagenet7": IMAGENET7, "imagenet80": IMAGENET80, **CLIP}
TEMPLATES |= {found.name: (found.template,) for found in BENCHMARKS}


def fill(template: str, name: str) -> str:
    """The prompt for one class; CLIP_benchmark writes {c} where OpenAI writes {}."""
    return template.replace("{}", name).replace("{c}", name)


def recognise(path: Path, domains: set = frozenset(), coded: bool = False) -> Benchmark | None:
    """The line of benchmarks.txt for a folder or a split file; coded: is_coded(its class folders)."""
    files = os.listdir(path) if path.is_dir() else [path.name]
    place = str(path.absolute()).lower() if coded else ""
    for benchmark in BENCHMARKS:
        kind, mark = benchmark.mark.split(" ", 1)
        known = ", ".join(sorted(domains)) == mark
        named = re.fullmatch(mark, path.stem.lower()) if kind == "folder" else None
        if {"file": mark in files, "domains": known, "path": re.search(mark, place), "folder": named}[kind]:
            return benchmark
    return None


def for_data(path: str) -> tuple[str, ...]:
    """The template that the papers use with a data set, PHOTO for all others."""
    found = recognise(Path(path))
    return (found.template,) if found else PHOTO


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
    """The class names of --classnames, a file or clip-CIFAR10 ..., in the order of the folders.

    Folders named by numbers have the names in order: all of them, or those at their places in a longer list.
    Raises: ValueError if a folder has no name, or the number of names differs.
    """
    suite = SUITE.get(path.removeprefix("clip-")) if path.startswith("clip-") else None
    names, numbers = suite["classes"] if suite else read_names(path), all(map(str.isdigit, folders))
    names = dict(zip(suite["wnids"], names)) if suite and "wnids" in suite else names
    if isinstance(names, dict) and numbers and folders[0] not in names:
        names = list(names.values())
    if isinstance(names, list):
        if numbers and len(names) > max(len(folders), *map(int, folders)):
            return [names[int(folder)] for folder in folders]
        if len(names) != len(folders):
            raise ValueError(f"{path}: {len(names)} names, but the data have {len(folders)} classes")
        return names
    if missing := [folder for folder in folders if folder not in names]:
        raise ValueError(f"{path}: no name for {len(missing)} classes, the first is {missing[0]!r}; add it")
    return [names[folder] for folder in folders]


def read_names(path: str) -> list | dict:
    """Names from a file: one per line, or JSON: a list, or {folder: name or [synonyms]}.

    Lines "n01440764 tench, Tinca tinca" and JSON {number: ["n01440764", "tench"]} become {id: name}.
    """
    try:
        text = read_text(path)
        names = json.loads(text) if path.endswith(".json") else text.splitlines()
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, or not text ({error})") from None
    names = [n for n in names if n not in ("", [])] if isinstance(names, list) else names
    if not isinstance(names, list | dict) or not names:
        raise ValueError(f"{path}: expected a list or a mapping that is not empty")
    pairs = names.values() if isinstance(names, dict) else [str(name).split(None, 1) for name in names]
    if all(len(pair) == 2 and re.fullmatch(WORDNET, str(pair[0])) for pair in pairs):
        return {key: name.split(",")[0].replace("_", " ").strip() for key, name in pairs}
    return names
