"""The data sets of both papers: names for their classes, and the splits that the papers fix."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np

from readers.folders import folders_in, natural
from readers.lists import Listing
from readers.templates import CLIP, SUITE, WORDNET, read_classes, recognise
from util.files import open_file, read_text
from util.text import one_line, printable, say
from weights.archive import BROKEN, read_pickle

FEW_SHOTS_BYTES = 16 << 20  # 16 images of each of ImageNet's classes take 2 MB
NAMES = "classnames.txt LOC_synset_mapping.txt synset_words.txt classnames.json imagenet_class_index.json"


def is_coded(classes) -> bool:
    """Whether all classes are named by WordNet ids or by numbers."""
    return bool(classes) and all(isinstance(c, str) and re.fullmatch(rf"{WORDNET}|\d+", c) for c in classes)


def unnamed(classes: list) -> str:
    """What to do about classes that have no names; empty if they have."""
    remedy = "put classnames.txt beside the folders, lines 'n01440764 tench' or 'tench'; .cls may hold names"
    problem = f"classes named {', '.join(map(str, classes[:2]))} ... mean nothing to a text encoder"
    return f"{problem}: {remedy}" if is_coded(classes) else ""


def refine(path: Path, listing: Listing) -> Listing:
    """The listing with all class names and without DomainNet's duplicates; its format says what was found."""
    rows, form, folder = listing.rows, listing.format, path.is_dir()
    root = path.absolute() if folder else path.absolute().parent
    labels = natural({row.label for row in rows} - {None})
    classes = listing.classes or {label: str(label).replace("_", " ") for label in labels}
    coded = is_coded(classes.values())
    if found := recognise(path, {row.domain for row in rows if row.domain}, coded):
        form = f"{found.name}, template {found.template!r}: {form}"
    if found and found.name == "ImageNetV2" and folder and not is_coded(variants := folders_in(root)):
        if len(variants) > 1:
            raise ValueError(f"{path}: {', '.join(variants)} are different test sets: give one of them")
    # from the folder of the first images to two above the path
    inner = root / rows[0].file if folder and rows else root
    places = [place for place in (inner, *inner.parents) if len(place.parts) > len(root.parts) - 3]

    def nearest(*names: str) -> Path | None:
        files = (place / name for place in places for name in names)
        return next((file for file in files if file.is_file()), None)

    if found and found.name == "DomainNet" and (file := nearest("domain_net_duplicates.txt")):
        # DomainBed's list of paths, which its own download deletes
        left_out = {os.path.relpath(file.parent / line, root) for line in read_text(file).split()}
        rows = []
        for row in listing.rows:
            pairs = ((n, f"{row.file}/{n}" if n else row.file) for n in row.names.split("/"))
            names = [name for name, file_name in pairs if file_name not in left_out]
            rows += [row._replace(names="/".join(names))] if names else []
        count = sum(row.size for row in listing.rows) - sum(row.size for row in rows)
        say(printable(f"{path}: {count} images of {file.name} are left out"))
    if coded:
        # TRAP: elsewhere numbers are not places in ImageNet's list
        numbers = map(str, range(1000)) if found and found.name == "ImageNetV2" else ()
        known = found and {*classes.values()} <= {*SUITE["ImageNet"]["wnids"], *numbers}
        own = f"clip-{found.name}" if found and found.mark.startswith("folder") else None
        file = nearest(*NAMES.split())
        if source := file or ("clip-ImageNet" if known else own if own in CLIP else None):
            names = read_classes(str(source), list(classes.values()))
            names = [name if isinstance(name, str) else str(name[0]) for name in names]
            classes = {label: name.replace("_", " ") for label, name in zip(classes, names)}
            form = f"{form}, names of {os.path.relpath(file, root) if file else source}"
    return listing._replace(rows=rows, classes=classes, format=form)


def read_few_shots(path: Path) -> dict[str, list[str]]:
    """Image paths of CoOp's split_fewshot/shot_K-seed_S.pkl, {"train" | "val": paths}; nothing is executed.

    Raises: ValueError, one line, for all but lists of Datum, Dassl's class, in such a dict.
    """
    try:
        with open_file(path) as file:
            raw = file.read(FEW_SHOTS_BYTES + 1)
        if len(raw) > FEW_SHOTS_BYTES:
            raise ValueError(f"more than {FEW_SHOTS_BYTES >> 20} MB")
        lists = read_pickle(raw, "")
        found = {name: [datum.state["_impath"] for datum in some] for name, some in lists.items()}
        if not found["train"] or not all(type(file) is str for some in found.values() for file in some):
            raise ValueError("no paths of training images")
    except BROKEN as error:
        problem = printable(one_line(error))
        raise ValueError(f"{path}: not few shots of CoOp ({problem}): delete it to draw anew") from error
    return found


def domainbed_split(
    n: int, env: int, holdout: float = 0.2, trial: int = 0, part: str | None = None
) -> tuple[list[int], list[int]]:
    """DomainBed's random split of the n images of one domain, in its own order.

    No equation; DomainBed domainbed/lib/misc.py seed_hash, split_dataset @b93c22a.
    Args:    env place of the domain among the sorted ones;  holdout fraction;  trial seed;
             part "base" or "open" for the classes of AlignCLIP's in-the-wild protocol
    Returns: (train, holdout) lists of indices
    """
    seed_of = (trial, env, part) if part else (trial, env)
    seed = int(hashlib.md5(str(seed_of).encode()).hexdigest(), 16) % 2**31
    keys = list(range(n))
    np.random.RandomState(seed).shuffle(keys)
    cut = int(n * holdout)
    return keys[cut:], keys[:cut]


def base_new_classes(count: int, rounding: str = "up") -> tuple[list[int], list[int]]:
    """Numbers of the base and of the new classes: the first half of the sorted ones, and the rest.

    PAPER: CoCoOp takes ceil(C/2) base classes ("up"); CLIPood and AlignCLIP in the wild take floor(C/2)
    ("down"), so that OfficeHome has 32 base and 33 open classes.
    """
    middle = (count + {"up": 1, "down": 0}[rounding]) // 2
    return list(range(middle)), list(range(middle, count))
