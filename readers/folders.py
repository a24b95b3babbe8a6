"""Folders of images: class/*, split/class/*, domain/class/*, domain/split/class/* ... become rows."""

import itertools
import os
import re
from pathlib import Path

from readers.images import IMAGE_SUFFIXES
from readers.lists import Listing, Row
from util.text import printable, say

# split -> words in the names of its folders; the first that fits counts, so that train_val is training data
SPLIT_WORDS = {
    "unlabeled": "unlabell?ed|unsup|unsupervised",
    "train": r"(?:train|training|trn|trainval)(?:set|data)?\d*",
    "val": r"(?:val|valid|validation|crossval)(?:set|data)?\d*",
    "dev": "dev|devset",
    "test": r"(?:test|testing|tst)(?:set|data)?\d*",
    "full": "full",
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


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def is_flat(folder: Path) -> bool:
    """Whether a folder holds images itself."""
    return any(is_image(entry.name) for entry in os.scandir(folder))


def has_images(folder: Path, depth: int = 5) -> bool:
    """Whether there are images in a folder or some levels below it; links are followed."""
    # the depth is limited because links may form a circle
    return is_flat(folder) or (
        depth > 0 and any(has_images(folder / f, depth - 1) for f in folders_in(folder))
    )


def read_captioned(root: Path, caption_lines: str | None = None) -> Listing | None:
    """Rows of images with a .txt beside nine tenths of the first 100, as img2dataset writes; or None."""
    folders = ["", *folders_in(root)]
    files = (os.path.join(f, n) for f in folders for n in sorted(os.listdir(root / f)) if is_image(n))
    first = list(itertools.islice(files, 100))
    if not first or sum((root / f).with_suffix(".txt").is_file() for f in first) < 0.9 * len(first):
        return None
    say(printable(f"{root}: read as images with a caption in the .txt of the same name"))
    texts = ((file, text_of(root / file)) for file in itertools.chain(first, files))
    by_line = caption_lines == "yes"
    rows = [Row(file, text.splitlines() if by_line else [text]) for file, text in texts]
    return Listing("files .jpg .txt", rows)


def text_of(image: Path) -> str:
    """The text beside an image, at most 1 MiB; empty without one."""
    path = image.with_suffix(".txt")
    return path.read_bytes()[: 1 << 20].decode("utf-8", errors="replace") if path.is_file() else ""


def is_split(folder: str) -> bool:
    """Whether a folder name means a split; "full" is one beside other splits only."""
    return split_name(folder) not in (None, "full")


def images_below(root: Path, folder: str) -> list:
    """Image files below root/folder, relative to root, in the order of torchvision's ImageFolder."""
    found = []
    for place, _, names in sorted(os.walk(root / folder)):
        relative = os.path.relpath(place, root)
        found += [os.path.join(relative, n) for n in sorted(filter(is_image, names))]
    return found


def levels(root: Path, tops: list) -> tuple[str, dict]:
    """(layout, {folder: (split, domain, its class folders)}) of folders that hold no images themselves."""
    below = {top: folders_in(root / top) for top in tops}
    # Office-31 has domain/images/class, and Kaggle has seg_train/seg_train/class
    for top, names in list(below.items()):
        place = f"{top}/{names[0]}"
        if len(names) == 1 and split_name(names[0]) in (None, split_name(top)) and not is_flat(root / place):
            below[place] = folders_in(root / place)
            del below[top]
    by_split = any(map(is_split, tops))
    used = {place: [n for n in names if has_images(root / place / n)] for place, names in below.items()}
    nested = not any(is_flat(root / place / name) for place, names in used.items() for name in names)
    places = {}
    for place, names in used.items():
        top = place.split("/")[0]
        split, domain = (split_name(top) or top, None) if by_split else (None, top)
        if nested and not by_split and any(map(is_split, names)):
            places |= {f"{place}/{name}": (split_name(name) or name, domain) for name in names}
        elif (
            nested
            and by_split
            and len({tuple(folders_in(root / place / n)) for n in names}) == 1 < len(names)
        ):
            places |= {f"{place}/{name}": (split, name) for name in names}
        else:
            places[place] = split, domain
    splits, domains = (any(value) for value in zip(*places.values()))
    layout = "/".join(["domain"] * domains + ["split"] * splits + ["class"])
    return layout, {place: (*value, folders_in(root / place)) for place, value in places.items()}


def read_folder(root: Path) -> Listing | None:
    """Rows of class/*, split/class/*, domain/class/* or both; None if the folder is none of these.

    Only folders with images count: Office-Home has lists next to its domains. The number of a class is its
    place among the class folders in natural order; the class folders must be the same in every domain.
    """
    above, tops = root, [top for top in folders_in(root) if has_images(root / top)]
    # PACS comes as kfold/domain/class
    while len(tops) == 1 and not split_name(tops[0]) and not is_flat(above / tops[0]):
        inner = [name for name in folders_in(above / tops[0]) if has_images(above / tops[0] / name)]
        if not all(map(is_split, inner)) and all(is_flat(above / tops[0] / name) for name in inner):
            break
        above, tops = above / tops[0], inner
    flat = [top for top in tops if is_flat(above / top)]
    if len(flat) == len(tops) and (len(tops) < 2 or all(map(split_name, tops))):
        return None
    notes = [f"the folder {above.relative_to(root)} is read"] * (above != root)
    deep = [top for top in tops if top not in flat]
    if flat and any(map(is_split, deep)):
        notes += [f"{top!r} has no class folders and is left out" for top in flat]
        tops, flat = deep, []
    if flat and deep:
        raise ValueError(f"{root}: {deep[0]!r} holds folders and {flat[0]!r} images; which are the classes?")
    layout, places = levels(above, tops) if deep else ("class", {top: (None, None, [top]) for top in tops})
    places = choose_places(places, notes)
    check_classes(root, places)
    rows = []
    for place, (split, domain, names) in places.items():
        for name in names:
            files = images_below(root, above.relative_to(root) / (f"{place}/{name}" if deep else place))
            rows += [Row(file, [], split, name, domain) for file in files]
    if notes or layout.count("/") > 1:
        say(printable("; ".join([f"{root}: read as {layout}", *dict.fromkeys(notes)])))
    names = natural({name for _, _, names in places.values() for name in names})
    return Listing(f"folders {layout}/*", rows, {name: name.replace("_", " ") for name in names})


def choose_places(places: dict, notes: list) -> dict:
    """The places whose images have known classes and are in no other split; notes what was taken for what."""
    splits = {split for split, _, _ in places.values()}
    known = {name for split, _, names in places.values() if split == "train" for name in names}
    chosen = {}
    for place, (split, domain, names) in places.items():
        folder = next((f for f in place.split("/") if split and (split_name(f) or f) == split), place)
        if split == "full" and len(splits) > 1:
            # TRAP: the "full" of VLCS repeats the images of the other splits
            notes.append(f"{folder!r} is left out, because it repeats the other splits")
        elif split and known and len(names) == 1 and names[0] not in known:
            notes.append(f"{place!r} has no class folders and is left out")
        else:
            chosen[place] = split, domain, names
            if split and (folder != split or not split_name(split)):
                notes.append(f"{folder!r} is taken for the split {split}")
    return chosen


def check_classes(root: Path, places: dict) -> None:
    """Raises: ValueError if the domains do not have the same class folders."""
    classes = {}
    for _, domain, names in places.values():
        classes.setdefault(domain, set()).update(names)
    first = min(classes, key=str, default=None)
    for domain in classes:
        if different := classes[first] ^ classes[domain]:
            raise ValueError(f"{root}: class {min(different)!r} is not in both {first!r} and {domain!r}")
