"""Folders of images: class/*, split/class/*, domain/class/*, domain/split/class/* ... become rows."""

import contextlib
import itertools
import os
import re
from pathlib import Path

from readers.images import IMAGE_SUFFIXES
from readers.lists import Listing, Row
from util.text import printable, say, warn

MAX_DEPTH = 8  # levels of folders
BLOCK = 1000  # images of a row; to open one of them, its row is split

# split -> words in the names of its folders; the first that fits counts, so that train_val is training data
SPLIT_WORDS = {
    "unlabeled": "unlabell?ed|unsup|unsupervised",
    "train": r"(?:train|training|trn|trainval)(?:set|data)?\d*",
    "val": r"(?:val|valid|validation|crossval)(?:set|data)?\d*",
    "dev": "dev|devset",
    "test": r"(?:test|testing|tst)(?:set|data)?\d*",
}


def split_name(folder: str) -> str | None:
    """The split that a folder name means: train for training_set, Train or train2017; None otherwise."""
    words = re.split(r"[ ._-]+", folder.lower())
    return next((s for s, word in SPLIT_WORDS.items() if any(re.fullmatch(word, w) for w in words)), None)


def natural(names) -> list:
    """Names in order: as numbers where all of them are integers (2 before 10), otherwise as texts."""
    if all(re.fullmatch(r"-?\d{1,18}", str(name)) for name in names):
        return sorted(names, key=lambda name: (int(name), str(name)))
    return sorted(names, key=lambda name: (isinstance(name, str), name))


def folders_in(path: Path) -> list:
    return natural([e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith(".")])


def find_images(root: Path) -> dict:
    """{place of a folder below root, as a tuple of names: blocks of its images, in order}.

    A block is up to 1,000 names, joined by "/". SPEED: a string for each image of DomainNet takes 60 MB.
    """
    found, waiting = {}, [()]
    while waiting:
        place = waiting.pop()
        folder = os.path.join(root, *place)
        entries, inner = [e for e in os.scandir(folder) if not e.name.startswith(".")], []
        for entry in entries:
            real = os.path.realpath(entry.path) if entry.is_symlink() else ""
            # a link to a folder above would count images twice
            if entry.is_dir() and not (real and os.path.commonpath([os.path.realpath(folder), real]) == real):
                inner.append(entry.name)
        if inner and len(place) == MAX_DEPTH:
            warn(f"{folder}: folders more than {MAX_DEPTH} levels deep are not read")
        elif inner:
            waiting += [(*place, name) for name in reversed(natural(inner))]
        images = [e.name for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES) and not e.is_dir()]
        if images := sorted(images):
            found[place] = ["/".join(images[k : k + BLOCK]) for k in range(0, len(images), BLOCK)]
    return found


def below(found: dict, place: tuple) -> list:
    """Names of the folders in a place, in order."""
    depth = len(place)
    return natural({inner[depth] for inner in found if len(inner) > depth and inner[:depth] == place})


def captions_beside(image: Path, by_line: bool) -> list:
    """The text beside an image, at most 1 MiB, as one caption or one in each line; none without a text."""
    with contextlib.suppress(FileNotFoundError):
        text = image.with_suffix(".txt").read_bytes()[: 1 << 20].decode("utf-8", errors="replace")
        return text.splitlines() if by_line else [text]
    return []


def levels(found: dict, tops: list) -> tuple[str, dict]:
    """(layout, {place: (folder of a split, domain, its class folders)}) of folders that hold no images."""
    used = {}
    for top in tops:
        place, names = (top,), below(found, (top,))
        # Office-31 has domain/images/class, and Kaggle has seg_train/seg_train/class
        if len(names) == 1 and split_name(names[0]) in (None, split_name(top)) and (top, *names) not in found:
            place = (top, *names)
            names = below(found, place)
        used[place] = names
    by_split = any(map(split_name, tops))
    nested = not any((*place, name) in found for place, names in used.items() for name in names)
    places = {}
    for place, names in used.items():
        folder, domain = (place[0], None) if by_split else (None, place[0])
        inner = {(*place, name): below(found, (*place, name)) for name in names} if nested else {}
        if nested and not by_split and any(map(split_name, names)):
            places |= {p: (p[-1], domain, classes) for p, classes in inner.items()}
        elif nested and by_split and len(set(map(tuple, inner.values()))) == 1 < len(names):
            places |= {p: (folder, p[-1], classes) for p, classes in inner.items()}
        else:
            places[place] = folder, domain, names
    splits, domains = (any(value[k] for value in places.values()) for k in (0, 1))
    return "/".join(["domain"] * domains + ["split"] * splits + ["class"]), places


def read_folder(root: Path, caption_lines: str | None = None) -> Listing | None:
    """Rows of class/*, split/class/*, domain/class/* or both, or of images with texts beside them; or None.

    Only folders with images count: Office-Home has lists next to its domains. The number of a class is its
    place among the class folders in natural order; the class folders must be the same in every domain.
    """
    found = find_images(root)
    files = (
        os.path.join(*place, name) for place in found for block in found[place] for name in block.split("/")
    )
    first = list(itertools.islice(files, 100))
    # img2dataset writes a.jpg and a.txt
    if first and sum((root / f).with_suffix(".txt").is_file() for f in first) >= 0.9 * len(first):
        say(printable(f"{root}: read as images with a caption in the .txt of the same name"))
        files = itertools.chain(first, files)
        rows = [Row(file, captions_beside(root / file, caption_lines == "yes")) for file in files]
        return Listing("files .jpg .txt", rows)
    above, tops = (), below(found, ())
    # PACS comes as kfold/domain/class
    while len(tops) == 1 and not split_name(tops[0]) and (*above, *tops) not in found:
        above, tops = (*above, *tops), below(found, (*above, *tops))
    found = {place[len(above) :]: names for place, names in found.items()}
    flat = [top for top in tops if (top,) in found]
    if len(flat) == len(tops) and (len(tops) < 2 or all(map(split_name, tops))):
        return None
    notes = [f"the folder {os.path.join(*above)} is read"] if above else []
    deep = [top for top in tops if top not in flat]
    if flat and any(map(split_name, deep)):
        notes += [f"{top!r} has no class folders and is left out" for top in flat]
        tops, flat = deep, []
    if flat and deep:
        raise ValueError(f"{root}: {deep[0]!r} holds folders and {flat[0]!r} images; which are the classes?")
    layout, places = levels(found, tops) if deep else ("class", {(): (None, None, tops)})
    places = choose_places(places, notes)
    pairs = {(domain, name) for _, domain, names in places.values() for name in names}
    domains, names = map(set, zip(*pairs))
    if lacking := {(domain, name) for domain in domains for name in names} - pairs:
        domain, name = min(lacking)
        remedy = "unpack it again, or remove the class from all domains"
        raise ValueError(f"{root}: there is no class {name!r} in the domain {domain!r}; {remedy}")
    files = {(*place, name): [] for place, (_, _, names) in places.items() for name in names}
    for place in sorted(found):
        # images in folders of a class folder belong to the class, as in torchvision's ImageFolder
        if own := next((place[:k] for k in range(1, len(place) + 1) if place[:k] in files), None):
            files[own] += [(os.path.join(*above, *place), block) for block in found[place]]
    rows = [
        Row(folder, (), split, name, domain, block)
        for place, (split, domain, own) in places.items()
        for name in own
        for folder, block in files[(*place, name)]
    ]
    if notes or layout.count("/") > 1:
        say(printable("; ".join([f"{root}: read as {layout}", *dict.fromkeys(notes)])))
    return Listing(f"folders {layout}/*", rows, {name: name.replace("_", " ") for name in natural(names)})


def choose_places(places: dict, notes: list) -> dict:
    """The places whose images have known classes and are in no other split, with the split of each."""
    splits = {folder: split_name(folder or "") or folder for folder, _, _ in places.values()}
    known = {name for folder, _, names in places.values() if splits[folder] == "train" for name in names}
    chosen = {}
    for place, (folder, domain, names) in places.items():
        split = splits[folder]
        if split == "full" and len(set(splits.values())) > 1:
            # TRAP: the "full" of VLCS repeats the images of the other splits
            notes.append(f"{folder!r} is left out, because it repeats the other splits")
        elif split and known and len(names) == 1 and names[0] not in known:
            notes.append(f"{os.path.join(*place)!r} has no class folders and is left out")
        else:
            chosen[place] = split, domain, names
            if split and (folder != split or not split_name(split)):
                notes.append(f"{folder!r} is taken for the split {split}")
    return chosen
