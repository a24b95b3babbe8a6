"""Data sets of images on disk, in any format.

A data set offers len(d), d.image(i) -> PIL.Image (opened, not decoded), d.name(i) -> str, and d.captions (the
texts of each image, at least one), or d.labels and d.classes, or both. Domains are d.domains and
d.domain_names. Only names and texts are kept in memory.

docs/data.md has a table of the formats: lists (lists.py), folders (folders.py), tar shards (shards.py), and
the embedded scenes and objects (scenes.py).

A list may come from a stranger. Its names, and links among its images, may therefore not lead out of the
image root unless allow_outside is set. In a folder of classes, which the user made, links are followed.
"""

import contextlib
import itertools
import math
import os
import re
from bisect import bisect
from collections import Counter
from pathlib import Path

from PIL import Image

from readers import scenes
from readers.benchmarks import is_coded, refine
from readers.folders import folders_in, read_folder
from readers.images import IMAGE_SUFFIXES, open_image
from readers.lists import AIRCRAFT, Listing, read_list
from readers.shards import Shards, clean_captions
from util.text import printable, warn


class Files:
    """The files of rows of folders; a string for each of DomainNet's 586,575 would take 60 MB."""

    def __init__(self, rows: list):
        self.rows, self.ends = rows, list(itertools.accumulate(row.size for row in rows))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        k = bisect(self.ends, i)
        return os.path.join(self.rows[k].file, self.rows[k].names.split("/")[i - self.ends[k]])


class Images:
    """Images by path, with the attributes above. Links may lead to files below `inside` only, "" anywhere.

    captions[i]: the texts of image i, never empty;  labels, domains: places in classes, in domain_names
    folders: WordNet ids or numbers that the data have for the classes, or again the classes
    """

    def __init__(self, root: str, files: list, inside="", format="files", splits=None, **contents):
        self.root, self.files, self.inside = root, files, inside  # files are relative to root
        self.format, self.splits, self.max_pixels = format, splits or {}, None
        vars(self).update(contents)

    def __len__(self):
        return len(self.files)

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.files[i])

    def image(self, i: int) -> Image.Image:
        path = self.name(i)
        # checked for each image: for all of them at the start it would take minutes on a network disk
        if self.inside and not os.path.realpath(path).startswith(self.inside):
            raise ValueError(f"a link out of {self.inside}: --allow-outside reads it anyway")
        return open_image(path, self.max_pixels)


class Subset:
    """Some images of a data set, in the given order.

    Args: indices which images, default all;  classes only these class numbers, renumbered from 0
    """

    def __init__(self, dataset, indices: list | None = None, classes: list | None = None):
        indices = list(range(len(dataset)) if indices is None else indices)
        if hasattr(dataset, "labels"):
            kept = range(len(dataset.classes)) if classes is None else classes
            number = {old: new for new, old in enumerate(kept)}
            indices = [i for i in indices if dataset.labels[i] in number]
            self.labels = [number[dataset.labels[i]] for i in indices]
            self.classes = [dataset.classes[c] for c in kept]
        if hasattr(dataset, "captions"):
            self.captions = [dataset.captions[i] for i in indices]
        if getattr(dataset, "domains", None) is not None:
            self.domains, self.domain_names = [dataset.domains[i] for i in indices], dataset.domain_names
        if getattr(dataset, "pixels", None) is not None:
            self.pixels = dataset.pixels[indices]  # (n, S, S, 3)
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def name(self, i: int) -> str:
        return self.dataset.name(self.indices[i])

    def image(self, i: int) -> Image.Image:
        return self.dataset.image(self.indices[i])


def evenly_spread(dataset, n: int) -> Subset:
    """At most n images, evenly spread, because folders are sorted by class."""
    N, n = len(dataset), min(n, len(dataset))
    return Subset(dataset, [k * N // n for k in range(n)])


def choose_split(rows: list, split: str | None, default: str | None, where) -> list:
    """The rows of a split that must exist, or of the default if there are splits, or all."""
    names = sorted({row.split for row in rows if row.split is not None})
    # ImageNet publishes no labels of its test images, and papers report its val
    default = "val" if default == "test" and "test" not in names and "val" in names else default
    split = split or (default if names else None)
    if split is None:
        return rows
    if split not in names:
        there = printable(f"there are: {', '.join(names)[:300]}") if names else "it has no splits"
        raise ValueError(f"{where}: no split {split!r}; {there}")
    return [row for row in rows if row.split == split]


def find_root(path: Path, files: list, image_root: str | Path | None) -> str:
    """The folder that image names are relative to: image_root, or the list's own folder or one in it."""
    # COCO keeps its lists in a folder named annotations
    near = [path.parent, path.parent.parent] if path.parent.name == "annotations" else [path.parent]
    places = [place for folder in near for place in (folder, *(folder / f for f in folders_in(folder)))]
    places = [Path(image_root)] if image_root else places
    some = files[:: math.ceil(len(files) / 100)]
    found = {place: sum(os.path.isfile(os.path.join(place, f)) for f in some) for place in places}
    if best := max(found.values()):
        return os.path.abspath(next(place for place in places if found[place] == best))
    first = printable(os.path.join(places[0], files[0])[:300])
    raise ValueError(f"{path}: no image at {first}; --image-root says where the images are")


def find_missing(root: str, files: list, where) -> set:
    """The files that do not exist: counted, and refused if they are more than one per cent."""
    there, missing = {}, []
    for file in dict.fromkeys(files):
        folder, name = os.path.split(os.path.join(root, file))
        if folder not in there:
            there[folder] = set()
            with contextlib.suppress(OSError, ValueError):
                # SPEED: on a network disk a question for each file would take minutes
                there[folder] = set(os.listdir(folder))
        if name not in there[folder] and not os.path.isfile(os.path.join(folder, name)):
            missing.append(file)
    if missing:
        first = printable(os.path.join(root, missing[0])[:300])
        message = f"{where}: {len(missing)} of its {len(files)} images are missing, the first is {first}"
        if len(missing) > 0.01 * len(files):
            raise ValueError(f"{message}; --image-root says where the images are, or unpack them again")
        warn(f"{message}; they are skipped")
    return set(missing)


def group_captions(rows: list, where) -> list:
    """One row per image, with all of its captions; empty captions are counted and left out."""
    grouped, empty = {}, 0
    for row in rows:
        texts = clean_captions(row.captions)
        empty += max(len(row.captions), 1) - len(texts)
        first = grouped.get(row.file)
        if first is None and texts:
            row.captions[:] = texts
            grouped[row.file] = row
        elif first is not None:
            first.captions.extend(texts)
            if row.label != first.label:
                grouped[row.file] = first._replace(label=None)
    if empty:
        warn(f"{where}: {empty} empty captions skipped")
    return list(grouped.values())


def build(listing: Listing, path: Path, split, default, image_root, allow_outside) -> Images:
    """The data set of a split of a listing."""
    if not listing.rows:
        raise ValueError(f"{path}: no rows ({listing.format})")
    rows = [row for row in choose_split(listing.rows, split, default, path) if row.file]
    if unnamed := sum(not row.file for row in listing.rows):
        warn(f"{path}: {unnamed} rows without a file name skipped")
    if not rows:
        raise ValueError(f"{path}: no file name in {len(listing.rows)} rows")
    captioned, total = any(row.captions for row in rows), len(rows)
    rows = group_captions(rows, path) if captioned else rows
    unlabelled = sum(row.label is None for row in rows)
    if not rows or (unlabelled and not captioned):
        what = "caption" if unlabelled == len(rows) else "label"
        raise ValueError(f"{path}: no {what} in {unlabelled or total} rows; complete them, or delete them")
    if 0 < unlabelled < len(rows):
        warn(f"{path}: {unlabelled} of {len(rows)} images have no label or several; no label is used")
    files = Files(rows) if rows[0].names else [row.file for row in rows]
    root = os.path.abspath(path) if path.is_dir() else find_root(path, files, image_root)
    # TRAP: a stranger's list must not make us open, and show, files outside the image folder
    for file in [] if allow_outside or path.is_dir() else files:
        if not os.path.normpath(os.path.join(root, file)).startswith(os.path.join(root, "")):
            remedy = "--image-root names the folder of the images, --allow-outside reads it anyway"
            raise ValueError(f"{path}: {file!r} is outside {root}; {remedy}")
    if missing := set() if path.is_dir() else find_missing(root, files, path):
        rows = [row for row in rows if row.file not in missing]
        files = [row.file for row in rows]
    inside = "" if allow_outside or path.is_dir() else os.path.join(os.path.realpath(root), "")
    splits = Counter()
    for row in listing.rows:
        splits[row.split] += row.size
    splits.pop(None, None)
    contents = {"captions": [row.captions for row in rows]} if captioned else {}
    if not unlabelled:
        # numbers come from all splits, so that a class has the same number in each of them
        number = {label: k for k, label in enumerate(listing.classes)}
        domain_names = sorted({row.domain for row in listing.rows} - {None}) or None
        if domain_names and (unknown := sum(row.domain is None for row in rows)):
            raise ValueError(f"{path}: no domain in {unknown} rows; complete them, or delete them")
        labels = [number[row.label] for row in rows for _ in range(row.size)]
        domains = domain_names and [domain_names.index(row.domain) for row in rows for _ in range(row.size)]
        contents |= {"labels": labels, "classes": list(listing.classes.values())}
        contents["folders"] = [*(listing.classes if is_coded(listing.classes) else contents["classes"])]
        contents |= {"domains": domains, "domain_names": domain_names}
    return Images(root, files, inside, listing.format, dict(splits), **contents)


def list_in(folder: Path) -> Path:
    """The only list in a folder without class folders, or the first of its shards."""
    suffixes = (".csv", ".tsv", ".json", ".jsonl", ".tar")
    # img2dataset writes 00000_stats.json and 00000.parquet beside 00000.tar
    files = [p for p in folder.iterdir() if not p.name.endswith("_stats.json")]
    inside = sorted(p for p in files if p.suffix.lower() in suffixes)
    if len(inside) == 1 or (inside and all(p.suffix == ".tar" for p in inside)):
        return inside[0]
    looked_for = f"class/*, domain/class/*, split/class/* ({' '.join(IMAGE_SUFFIXES)}), *.tar"
    one = f"one list ({len(inside)} of {' '.join(suffixes[:4])} there; docs/data.md converts parquet)"
    raise ValueError(f"{folder}: no images found; looked for {looked_for}, or {one}")


def open_dataset(path, split: str | None = None, *, kind: str = "image", max_pixels=None, **options):
    """The data set at a path, in any of the formats of docs/data.md.

    Args:    split that must exist; None: default_split if there are splits, otherwise everything;
             kind "captions", "labels" or "image": what the data must have;  max_pixels: see readers/limits.py
    Options: default_split;  image_root the folder that names in a list are relative to (default: the list's
             own, or one in it);  image_key, caption_key, label_key columns of a list;  caption_lines "yes" or
             "no": whether each line of a .txt is a caption (default: see Shards.lines_are_captions);
             allow_outside reads names that leave image_root
    Returns: Images, Shards or scenes.   Raises: ValueError, one line.
    """
    dataset = read_dataset(path, split, **options)
    if not hasattr(dataset, kind):
        raise ValueError(f"{path} has no {kind}, which are needed here")
    dataset.max_pixels = max_pixels
    return dataset


def read_dataset(
    path, split, default_split=None, image_root=None, caption_lines=None, allow_outside=False, **keys
):
    """open_dataset for data of any kind; keys of read_list."""
    if str(path) in ("scenes", "objects"):
        make = scenes.Scenes if str(path) == "scenes" else scenes.Objects
        return make(split or default_split or "train")
    if re.search(r"(^|::)(pipe:|\w+://)|\.parquet$", str(path)):
        raise ValueError(f"{path}: not a list or folder on this disk; docs/data.md converts it in two lines")
    if re.search(r"\.(tar|tgz)(\.\w+)?($|::|[,}])", str(path)):
        if split:
            raise ValueError(f"{path}: shards have no splits; leave out {split!r}, name other shards")
        return Shards(str(path), caption_lines)
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    # TRAP: the folders beside the split file of CoOp or of FGVC-Aircraft are not its classes
    if splits := sorted([*path.glob("split_zhou_*.json"), *path.glob(AIRCRAFT)]):
        if len(splits) > 1:
            both = f"{splits[0].name} and {splits[1].name} are there"
            raise ValueError(f"{path}: {both}; give one of the files")
        path = splits[0]
    listing = read_folder(path, caption_lines) if path.is_dir() else None
    if listing is None:
        path = list_in(path) if path.is_dir() else path
        if path.suffix == ".tar":
            shards = "::".join(map(str, sorted(path.parent.glob("*.tar"))))
            return read_dataset(shards, split, caption_lines=caption_lines)
        listing = read_list(path, **keys)
    return build(refine(path, listing), path, split, default_split, image_root, allow_outside)
