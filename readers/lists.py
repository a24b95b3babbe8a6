"""Lists and folders of images as map-style data sets, whatever the format.

A data set offers len(d), d.image(i) -> PIL.Image (opened, not decoded), d.name(i) -> str, and
d.captions (those of image i, at least one) or d.labels and d.classes, perhaps with d.domains and
d.domain_names. Nothing here draws a random number; names and texts are all that is kept in memory.

| path                                        | becomes                                            |
|---------------------------------------------|----------------------------------------------------|
| `.csv .tsv .txt`                            | pairs (filepath,title; image,caption; Flickr lines)|
|                                             | or classes (path,label[,domain])                   |
| `.jsonl`                                    | pairs {"image": file, "captions": [..], "split"}   |
| Karpathy, COCO captions, CoOp split `.json` | pairs, pairs, classes                              |
| `root/<class>/*`, `root/<split>/<class>/*`  | classes, in the order of torchvision's ImageFolder |
| `root/<domain>/<class>/*`                   | classes and domains, in DomainBed's order          |
| `shards/{00000..00010}.tar::more.tar`       | pairs, see shards.py                               |
| `scenes`, `objects`                         | the embedded data sets, see scenes.py              |

A list may come from a stranger: its names, absolute or with `..`, and links among its images may not lead
out of the image root, unless allow_outside says so. A folder of classes is yours, and its links are followed.
"""

import csv
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from readers import scenes
from readers.images import open_image
from readers.shards import Shards, clean_captions
from util.text import printable, warn

IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .webp .ppm .bmp .pgm .tif .tiff .gif".split())
IMAGE_KEYS = "filepath image path file filename file_name image_path image_name img".split()
CAPTION_KEYS = "title caption captions text comment sentence".split()
LABEL_KEYS = "label class classname category".split()
SPLIT_NAMES = "train val valid validation dev test".split()

# The data sets -----------------------------------------------------------------------------------


class _Files:
    """Images by path: what Pairs and Labelled share."""

    inside = ""  # where links may lead; "": anywhere

    def __init__(self, root: str | Path, files: list):
        self.root, self.files = str(root), files
        self.format, self.splits = "files", {}  # what open_dataset saw, for data.py --show

    def __len__(self):
        return len(self.files)

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.files[i])

    def image(self, i: int) -> Image.Image:
        path = self.name(i)
        # here and not for all at the start: on a network disk that would take minutes
        if self.inside and not os.path.realpath(path).startswith(self.inside):
            raise ValueError(f"a link out of {self.inside}: --allow-outside reads it anyway")
        return open_image(path)


class Pairs(_Files):
    """Images with captions: captions[i] is the list of texts of image i, never empty."""

    def __init__(self, root: str | Path, files: list, captions: list):
        super().__init__(root, files)
        self.captions = captions


class Labelled(_Files):
    """Images with a class and perhaps a domain: labels and domains are places in the name lists."""

    def __init__(self, root, files, labels, classes, domains=None, domain_names=None):
        super().__init__(root, files)
        self.labels, self.classes = labels, classes
        self.domains, self.domain_names = domains, domain_names


class Subset:
    """Some images of a data set, in the order given.

    Args: indices which images, default all;  classes only these class numbers, renumbered from 0
    """

    def __init__(self, dataset, indices: list | None = None, classes: list | None = None):
        indices = list(range(len(dataset)) if indices is None else indices)
        if hasattr(dataset, "labels"):
            classes = list(range(len(dataset.classes)) if classes is None else classes)
            new = {old: k for k, old in enumerate(classes)}
            indices = [i for i in indices if dataset.labels[i] in new]
            self.labels = [new[dataset.labels[i]] for i in indices]
            self.classes = [dataset.classes[c] for c in classes]
        if hasattr(dataset, "captions"):
            self.captions = [dataset.captions[i] for i in indices]
        if getattr(dataset, "domains", None) is not None:
            domains = dataset.domains
            self.domains, self.domain_names = [domains[i] for i in indices], dataset.domain_names
        if getattr(dataset, "pixels", None) is not None:
            self.pixels = dataset.pixels[indices]  # (n, S, S, 3)
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def name(self, i: int) -> str:
        return self.dataset.name(self.indices[i])

    def image(self, i: int) -> Image.Image:
        return self.dataset.image(self.indices[i])

    def mask(self, i: int):
        return self.dataset.mask(self.indices[i])


# Splits that papers fix --------------------------------------------------------------------------


def domainbed_split(n: int, env: int, holdout: float = 0.2, trial: int = 0, part: str | None = None) -> tuple:
    """DomainBed's random split of the n images of one domain, in its own order.

    No equation; DomainBed domainbed/lib/misc.py seed_hash, split_dataset @b93c22a.
    Args:    env place of the domain among the sorted ones;  holdout fraction;  trial seed;
             part "base" or "open" for the classes of AlignCLIP's in-the-wild protocol
    Returns: (train, holdout) lists of indices
    """
    seed_of = (trial, env) if part is None else (trial, env, part)
    seed = int(hashlib.md5(str(seed_of).encode()).hexdigest(), 16) % 2**31
    keys = list(range(n))
    np.random.RandomState(seed).shuffle(keys)
    cut = int(n * holdout)
    return keys[cut:], keys[:cut]


def base_new_classes(count: int, rounding: str = "up") -> tuple:
    """Base and new classes: the first half of the sorted ones, and the rest.

    PAPER: CoCoOp takes ceil(C/2) base classes ("up"); CLIPood and AlignCLIP in the wild floor(C/2)
    ("down"), so that OfficeHome has 32 base and 33 open ones.
    Returns: (base, new) lists of class numbers
    """
    if rounding not in ("up", "down"):
        raise ValueError(f"rounding {rounding!r}; known: up, down")
    middle = (count + (rounding == "up")) // 2
    return list(range(middle)), list(range(middle, count))


# Lists of images: every reader returns rows ------------------------------------------------------


class Row(NamedTuple):
    file: str
    captions: list
    split: str | None = None
    label: str | int | None = None
    domain: str | None = None


class Listing(NamedTuple):
    format: str
    rows: list
    classes: dict | None = None  # label -> class name, where the rows alone do not say it


def make_row(where: str, file, captions, split=None, label=None, domain=None) -> Row:
    """A row whose types have been looked at: lists come from strangers."""
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(file, str) or not file:
        raise ValueError(f"{where}: the image is {str(file)[:60]!r}, expected a file name")
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"{where}: captions are {str(captions)[:60]!r}, expected text or texts")
    if label is not None and (not isinstance(label, (str, int)) or label == ""):
        raise ValueError(f"{where}: the label is {str(label)[:60]!r}, expected a name or a number")
    split, domain = (None if x is None or x == "" else str(x) for x in (split, domain))
    return Row(file, captions, split, label, domain)


def choose_keys(columns: list, where, image_key, caption_key, label_key) -> tuple:
    """(image, caption or None, label or None): the columns asked for, or the usual names.

    Captions come before labels when both are there and nothing was asked for.
    """

    def find(what, given, usual):
        found = next((k for k in ([given] if given else usual) if k in columns), None)
        if found is None:
            wanted = repr(given) if given else "any of " + ", ".join(usual)
            there = printable(", ".join(map(str, columns))[:200])
            raise ValueError(f"{where}: no {what} column ({wanted}); there are: {there}")
        return found

    image = find("image", image_key, IMAGE_KEYS)
    only_labels = set(columns) & set(LABEL_KEYS) and not set(columns) & set(CAPTION_KEYS)
    if label_key or (only_labels and not caption_key):
        return image, None, find("label", label_key, LABEL_KEYS)
    return image, find("caption", caption_key, CAPTION_KEYS), None


def sniff_table(path: Path, first: str, image_key: str | None) -> tuple:
    """(separator, columns, whether the first line is data) of a table.

    The separator is the one under which the first line names an image column. Flickr's lists have
    no such line: `img.jpg,a caption` or `img.jpg#0<tab>a caption`.
    """
    split = {s: [c.strip() for c in next(csv.reader([first], delimiter=s))] for s in "\t,;|"}
    for separator, columns in split.items():
        if set(columns) & set([image_key] if image_key else IMAGE_KEYS):
            return separator, columns, False
    data = re.match(r"[^\t,;|]+?\.(?:jpe?g|png|webp)(?:#\d+)?([\t,;|])", first, re.IGNORECASE)
    if data:
        return data[1], ["image", "caption"], True
    separator = max(split, key=lambda s: len(split[s]))
    return separator, split[separator], False


def read_table(path: Path, image_key=None, caption_key=None, label_key=None) -> Listing:
    """CSV or TSV. Separators in an unquoted last column are text; missing last fields are empty."""
    rows, line, spans = [], 1, 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        first = file.readline().strip("\r\n")
        if not first.strip():
            raise ValueError(f"{path}: the first line is empty, expected column names")
        separator, columns, is_data = sniff_table(path, first, image_key)
        if is_data:
            file.seek(0)
        keys = choose_keys(columns, path, image_key, caption_key, label_key)
        image, caption, label = (k and columns.index(k) for k in keys)
        split, domain = (columns.index(k) if k in columns else None for k in ("split", "domain"))
        width = len(columns)
        try:
            for fields in csv.reader(file, delimiter=separator):
                line += 1
                if not fields:
                    continue
                fields += [""] * (width - len(fields))
                fields[width - 1 :] = [separator.join(fields[width - 1 :])]
                spans += any("\n" in f for f in fields)

                def field(k, fields=fields):
                    return None if k is None else fields[k].strip()

                name = re.sub(r"(?<=\w)#\d+$", "", field(image))
                rest = (field(split), field(label), field(domain))
                rows.append(make_row(f"{path}, row {line}", name, field(caption) or [], *rest))
        except csv.Error as error:
            raise ValueError(f"{path}, row {line}: {error}; an unbalanced quote?") from None
    if spans:
        warn(f"{path}: {spans} rows go over several lines; an unbalanced quote?")
    return Listing(f"table, separated by {separator!r}", rows)


def read_records(path: Path, records, image_key=None, caption_key=None, label_key=None) -> Listing:
    """JSON objects: {"image": file, "captions": [text, ...] or "caption": text, "split": name}."""
    rows, keys = [], None
    for number, record in enumerate(records, 1):
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {str(record)[:40]!r}, expected an object {{...}}")
        if keys is None or keys[0] not in record or (keys[1] or keys[2]) not in record:
            keys = choose_keys(list(record), where, image_key, caption_key, label_key)
        image, caption, label = keys
        texts, name = record[caption] if caption else [], record[label] if label else None
        split, domain = record.get("split"), record.get("domain")
        rows.append(make_row(where, record[image], texts, split, name, domain))
    return Listing("JSON records", rows)


def json_lines(path: Path):
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


def read_karpathy(path: Path, images: list) -> Listing:
    """Karpathy's dataset_*.json; COCO's "restval" is training data, as everybody counts it."""
    rows = []
    for number, image in enumerate(images):
        file = os.path.join(image.get("filepath") or "", image["filename"])
        split = "train" if image["split"] == "restval" else image["split"]
        texts = [sentence["raw"] for sentence in image["sentences"]]
        rows.append(make_row(f"{path}, image {number}", file, texts, split))
    return Listing("Karpathy split", rows)


def read_coco(path: Path, content: dict) -> Listing:
    texts = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"])
    images = content["images"]
    rows = [make_row(f"{path}, image {m['id']}", m["file_name"], texts[m["id"]]) for m in images]
    return Listing("COCO captions", rows)


def read_coop(path: Path, content: dict) -> Listing:
    """CoOp's split_zhou_*.json: {"train": [[file, class number, class name], ...], "val" ...}."""
    rows, names = [], {}
    for split in ("train", "val", "test"):
        for number, entry in enumerate(content.get(split, [])):
            where = f"{path}, {split} {number}"
            if not isinstance(entry, list) or len(entry) != 3:
                raise ValueError(f"{where}: {str(entry)[:60]!r}, expected [file, number, name]")
            file, label, name = entry
            if names.setdefault(label, name) != name:
                raise ValueError(f"{where}: class {label} is {name!r:.60} and was {names[label]!r:.60}")
            rows.append(make_row(where, file, [], split, label))
    return Listing("CoOp split", rows, {k: names[k].replace("_", " ") for k in sorted(names)})


def read_json(path: Path, **keys) -> Listing:
    """One of the JSON formats, told apart by their top-level keys."""
    with open(path, encoding="utf-8-sig") as file:
        content = json.load(file)
    if isinstance(content, list):
        return read_records(path, content, **keys)
    found = sorted(content) if isinstance(content, dict) else [type(content).__name__]
    if {"images", "annotations"} <= set(found):
        return read_coco(path, content)
    if "images" in found:
        return read_karpathy(path, content["images"])
    if {"train", "val", "test"} & set(found):
        return read_coop(path, content)
    raise ValueError(
        f"{path}: unknown JSON; expected Karpathy's, COCO's (images), CoOp's (train, val, test) or"
        f" a list of records; found: {printable(', '.join(found[:8])[:200])}"
    )


def read_list(path: Path, keys: dict) -> Listing:
    """A file that lists images; the suffix says how."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv", ".txt"):
            return read_table(path, **keys)
        if suffix in (".jsonl", ".ndjson"):
            return read_records(path, json_lines(path), **keys)
        if suffix == ".json":
            return read_json(path, **keys)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: an entry is not as this format has it ({error!r:.200})") from None
    raise ValueError(
        f"{path}: unknown format {suffix!r}; known: .csv .tsv .txt .jsonl, .json (Karpathy, COCO,"
        " CoOp), .tar, folders of classes"
    )


# Folders -----------------------------------------------------------------------------------------


def folders_in(path: Path) -> list:
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))


def images_below(root: Path, folder: str) -> list:
    """Image files below root/folder, relative to root, in torchvision's ImageFolder order."""
    found = []
    for place, _, names in sorted(os.walk(root / folder)):
        relative = os.path.relpath(place, root)
        names = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
        found += [os.path.join(relative, n) for n in sorted(names)]
    return found


def read_folder(root: Path) -> Listing | None:
    """`class/*`, `split/class/*` or `domain/class/*`; None if it is none of these.

    Only folders with images count: Office-Home ships lists beside its domains. The number of a
    class is its rank among the sorted class folders, which must be the same in every domain.
    """
    classes = {}  # top folder -> its class folders, [] if it holds images itself
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
        raise ValueError(f"{root}: {deep[0]!r} holds folders, {flat!r} images; which are classes?")
    rows = []
    for top, inner in classes.items():
        if deep and not by_split and inner != classes[deep[0]]:
            name = min(set(inner) ^ set(classes[deep[0]]))
            raise ValueError(f"{root}: class {name!r} is not in both {deep[0]!r} and {top!r}")
        split, domain = (top if by_split else None), (None if by_split or not deep else top)
        for name in inner or [top]:
            files = images_below(root, os.path.join(top, name) if deep else top)
            rows += [Row(file, [], split, name, domain) for file in files]
    names = sorted(set().union(*classes.values())) if deep else list(classes)
    form = ("split/class" if by_split else "domain/class") if deep else "class"
    return Listing(f"folders {form}/*", rows, {name: name.replace("_", " ") for name in names})


# From rows to a data set -------------------------------------------------------------------------


def choose_split(rows: list, split: str | None, default: str | None, where) -> list:
    names = sorted({r.split for r in rows if r.split is not None})
    split = split or (default if names else None)
    if split is None:
        return rows
    if split not in names:
        there = printable(f"there are: {', '.join(names)[:300]}") if names else "it has no splits"
        raise ValueError(f"{where}: no split {split!r}; {there}")
    return [r for r in rows if r.split == split]


def find_root(path: Path, files: list, image_root: str | Path | None) -> str:
    """What image names are relative to: the folder given, else the list's own or one in it."""
    folder = path.parent
    places = [folder, *(folder / f for f in folders_in(folder))]
    if folder.name == "annotations":  # COCO keeps its lists apart
        places += [folder.parent, *(folder.parent / f for f in folders_in(folder.parent))]
    places = [Path(image_root)] if image_root else places
    for place in places:
        if any(os.path.isfile(os.path.join(place, f)) for f in files[:10]):
            return os.path.abspath(place)
    more = f", nor in {len(places) - 1} folders near it" if len(places) > 1 else ""
    first = printable(os.path.join(places[0], files[0])[:300])
    raise ValueError(f"{path}: no image at {first}{more}; say where they are (image root)")


def refuse_outside(root: str, files: list, where):
    """TRAP: a stranger's list must not make us open, and show, files outside the image folder."""
    for file in files:
        if not os.path.normpath(os.path.join(root, file)).startswith(os.path.join(root, "")):
            raise ValueError(
                f"{where}: {file!r} is outside {root}; --image-root says what it is relative to,"
                " --allow-outside (allow_outside=True) reads it anyway"
            )


def group_captions(rows: list, where) -> dict:
    """file -> its captions; empty ones are counted and left out."""
    grouped, empty = {}, 0
    for r in rows:
        texts = clean_captions(r.captions)
        empty += max(len(r.captions), 1) - len(texts)
        if texts:
            grouped.setdefault(r.file, []).extend(texts)
    if empty:
        warn(f"{where}: {empty} empty captions skipped")
    if not grouped:
        raise ValueError(f"{where}: no caption in {len(rows)} rows")
    return grouped


def build(listing: Listing, path: Path, split, default, image_root, allow_outside):
    """Rows -> Pairs or Labelled."""
    if not listing.rows:
        raise ValueError(f"{path}: no rows ({listing.format})")
    rows = choose_split(listing.rows, split, default, path)
    labelled = rows[0].label is not None
    grouped = {} if labelled else group_captions(rows, path)
    files = [r.file for r in rows] if labelled else list(grouped)
    root = os.path.abspath(path) if path.is_dir() else find_root(path, files, image_root)
    if not allow_outside:
        refuse_outside(root, files, path)
    dataset = Pairs(root, files, list(grouped.values()))
    if labelled:
        # over all splits, so that each of them has the same numbers
        found = sorted({r.label for r in listing.rows}, key=lambda k: (isinstance(k, str), k))
        names = listing.classes or {k: str(k).replace("_", " ") for k in found}
        number = {label: k for k, label in enumerate(names)}
        labels = [number[r.label] for r in rows]
        dataset = Labelled(root, files, labels, list(names.values()))
        domains = sorted({r.domain for r in listing.rows if r.domain is not None})
        if domains:
            dataset.domain_names = domains
            dataset.domains = [domains.index(r.domain) for r in rows]
    if not (allow_outside or path.is_dir()):
        dataset.inside = os.path.join(os.path.realpath(root), "")
    dataset.format = listing.format
    dataset.splits = dict(Counter(r.split for r in listing.rows if r.split))
    return dataset


def list_in(folder: Path) -> Path:
    """The one list in a folder that has no class folders, or the first of its shards."""
    suffixes = (".csv", ".tsv", ".json", ".jsonl", ".tar")
    inside = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)
    if len(inside) == 1 or (inside and all(p.suffix == ".tar" for p in inside)):
        return inside[0]
    raise ValueError(
        f"{folder}: no images found; looked for class/*, domain/class/*, split/class/*"
        f" ({' '.join(IMAGE_SUFFIXES)}), *.tar, or one list ({len(inside)} of"
        f" {' '.join(suffixes[:4])} there)"
    )


def open_dataset(
    path: str | Path,
    split: str | None = None,
    *,
    default_split: str | None = None,
    image_root: str | Path | None = None,
    image_key: str | None = None,
    caption_key: str | None = None,
    label_key: str | None = None,
    allow_outside: bool = False,
    **scene_options,
):
    """The data set at a path, whatever its format: the table at the top of this file.

    Args:    split a split that must exist, None for everything;  default_split the one to take if
             there are splits and none was asked for;  image_root what names in a list are relative
             to (default: the list's folder or one in it);  *_key columns of a list;  allow_outside
             read names that leave image_root;  scene_options arguments of scenes.Scenes
    Returns: Pairs, Labelled, Shards or scenes.   Raises: ValueError, one line.
    """
    if str(path) in ("scenes", "objects"):
        make = scenes.Scenes if str(path) == "scenes" else scenes.Objects
        return make(split=split or default_split or "train", **scene_options)
    if scene_options:
        raise ValueError(f"only scenes take the options {', '.join(scene_options)}")
    if re.search(r"\.(tar|tgz)(\.\w+)?($|::)", str(path)):
        if split:
            raise ValueError(f"{path}: shards have no splits; leave out {split!r}, name other shards")
        return Shards(str(path))
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    listing = read_folder(path) if path.is_dir() else None
    if path.is_dir() and listing is None:
        path = list_in(path)
        if path.suffix == ".tar":
            return open_dataset("::".join(map(str, sorted(path.parent.glob("*.tar")))), split)
    if listing is None:
        keys = {"image_key": image_key, "caption_key": caption_key, "label_key": label_key}
        listing = read_list(path, keys)
    return build(listing, path, split, default_split, image_root, allow_outside)
