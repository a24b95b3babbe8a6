"""Folders of images: class/*, split/class/* and domain/class/* become rows."""

import os
import re
from pathlib import Path

from readers.images import IMAGE_SUFFIXES
from readers.lists import Listing, Row

SPLIT_NAMES = "train val valid validation dev test".split()


def natural(names) -> list:
    """Names in order: as numbers where all of them are integers (2 before 10), otherwise as texts."""
    if all(re.fullmatch(r"-?\d{1,18}", str(name)) for name in names):
        return sorted(names, key=lambda name: (int(name), str(name)))
    return sorted(names, key=lambda name: (isinstance(name, str), name))


def folders_in(path: Path) -> list:
    return natural([e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith(".")])


def images_below(root: Path, folder: str) -> list:
    """Image files below root/folder, relative to root, in the order of torchvision's ImageFolder."""
    found = []
    for place, _, names in sorted(os.walk(root / folder)):
        relative = os.path.relpath(place, root)
        names = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
        found += [os.path.join(relative, n) for n in sorted(names)]
    return found


def read_folder(root: Path) -> Listing | None:
    """Rows of class/*, split/class/* or domain/class/*; None if the folder is none of these.

    Only folders with images count: Office-Home has lists next to its domains. The number of a class is its
    place among the class folders in natural order; the class folders must be the same in every domain.
    """
    classes = {}  # top folder -> its class folders, or [] if it holds images itself
    for top in folders_in(root):
        flat = any(e.name.lower().endswith(IMAGE_SUFFIXES) for e in os.scandir(root / top))
        inner = [] if flat else folders_in(root / top)
        if flat or any(images_below(root, os.path.join(top, name)) for name in inner):
            classes[top] = inner
    deep = [top for top in classes if classes[top]]
    by_split = all(top.lower() in SPLIT_NAMES for top in classes)
    if not deep and (by_split or len(classes) < 2):
        return None
    if 0 < len(deep) < len(classes):
        flat = min(set(classes) - set(deep))
        raise ValueError(f"{root}: {deep[0]!r} holds folders and {flat!r} images; which are the classes?")
    rows = []
    for top, inner in classes.items():
        if deep and not by_split and inner != classes[deep[0]]:
            name = min(set(inner) ^ set(classes[deep[0]]))
            raise ValueError(f"{root}: class {name!r} is not in both {deep[0]!r} and {top!r}")
        split, domain = (top if by_split else None), (None if by_split or not deep else top)
        for name in inner or [top]:
            files = images_below(root, os.path.join(top, name) if deep else top)
            rows += [Row(file, [], split, name, domain) for file in files]
    names = natural(set().union(*classes.values())) if deep else list(classes)
    layout = ("split/class" if by_split else "domain/class") if deep else "class"
    return Listing(f"folders {layout}/*", rows, {name: name.replace("_", " ") for name in names})
