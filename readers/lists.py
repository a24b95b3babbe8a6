"""Lists of images with captions or labels: every format becomes rows.

Lists come from strangers, so every value is checked before use, and no message repeats control characters.
"""

import csv
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from util.files import open_file, read_text
from util.text import printable, warn

IMAGE_KEYS = "filepath image path file filename file_name image_path image_name img".split()
CAPTION_KEYS = "title caption captions text comment sentence".split()
AIRCRAFT = "images_variant_train.txt"
LABEL_KEYS = "label class classname class_name category".split()


class Row(NamedTuple):
    file: str  # of an image; or a folder, if the row has names
    captions: list
    split: str | None = None
    label: str | int | None = None
    domain: str | None = None
    names: str = ""  # of images in the folder, separated by "/"; SPEED: fewer objects

    @property
    def size(self) -> int:
        return 1 + self.names.count("/")


class Listing(NamedTuple):
    format: str
    rows: list
    classes: dict | None = None  # label -> class name, where the rows do not give it


def is_null(value) -> bool:
    """Whether a file name or caption is missing: null, NaN, or such a word, as pandas reads them."""
    return value is None or value != value or value in ("", "nan", "NaN", "null", "NULL")


def make_row(where: str, file, captions, split=None, label=None, domain=None) -> Row:
    """A row whose types are checked; a missing name, caption or label is "", an empty text or None."""
    file, captions = "" if is_null(file) else file, [] if is_null(captions) else captions
    if not isinstance(file, str):
        raise ValueError(f"{where}: the image is {str(file)[:60]!r}, expected a file name")
    if isinstance(captions, str):
        captions = [captions]
    elif isinstance(captions, list) and all(is_null(c) or isinstance(c, str) for c in captions):
        captions = ["" if is_null(c) else c for c in captions]
    else:
        raise ValueError(f"{where}: captions are {str(captions)[:60]!r}, expected text or texts")
    label = None if label == "" or label != label else label
    if label is not None and not isinstance(label, (str, int)):
        raise ValueError(f"{where}: the label is {str(label)[:60]!r}, expected a name or a number")
    split = None if split in (None, "") else str(split)
    domain = None if domain in (None, "") else str(domain)
    return Row(file, captions, split, label, domain)


def choose_keys(columns: list, where, image_key=None, caption_key=None, label_key=None) -> tuple:
    """(image, caption or None, label or None): the requested columns, or the usual names."""
    usual = {"image": IMAGE_KEYS, "caption": CAPTION_KEYS, "label": LABEL_KEYS}
    requested = {"image": image_key, "caption": caption_key, "label": label_key}
    found = {}
    for what, names in usual.items():
        wanted = [requested[what]] if requested[what] else [n for n in names if n not in found.values()]
        found[what] = next((name for name in wanted if name in columns), None)
        needed = what == "image" or requested[what]
        if found[what] is None and (needed or (what == "label" and found["caption"] is None)):
            what, flag = (what, f"--{what}-key") if needed else ("caption", "--caption-key or --label-key")
            wanted = repr(requested[what]) if requested[what] else "any of " + ", ".join(usual[what])
            there = printable(", ".join(map(str, columns))[:200])
            raise ValueError(f"{where}: no {what} column ({wanted}); there are: {there}; {flag} names it")
    return tuple(found.values())


def table_layout(first: str, image_key: str | None) -> tuple:
    """(separator, columns, whether the first line is data) of a table, from its first line.

    The separator is the one with which the first line names an image column. Flickr's lists have no such
    line: `img.jpg,a caption` or `img.jpg#0<tab>a caption`.
    """
    split = {s: [c.strip() for c in next(csv.reader([first], delimiter=s))] for s in "\t,;|"}
    for separator, columns in split.items():
        if set(columns) & set([image_key] if image_key else IMAGE_KEYS):
            return separator, columns, False
    data = re.match(r"[^\t,;|]+?\.(?:jpe?g|png|webp)(?:#\d+)?([\t,;|])", first, re.IGNORECASE)
    if data:
        return data[1], ["image", "caption"], True
    # DomainNet's lists: `domain/class/img.jpg 12`
    if re.fullmatch(r"\S+\.(?:jpe?g|png|webp) \d+\s*", first, re.IGNORECASE):
        return " ", ["image", "label"], True
    separator = max(split, key=lambda s: len(split[s]))
    return separator, split[separator], False


def whole_row(fields: list, columns: list, separator: str) -> list:
    """A row of full width: separators in an unquoted last column are text, missing fields are empty."""
    fields, last = fields + [""] * (len(columns) - len(fields)), len(columns) - 1
    return [*fields[:last], separator.join(fields[last:])]


def read_table(path: Path, **keys) -> Listing:
    """CSV or TSV, with or without a line of column names."""
    rows, line, spans = [], 1, 0
    with open_file(path, "r", encoding="utf-8-sig", newline="") as file:
        first = file.readline().strip("\r\n")
        if not first.strip():
            raise ValueError(f"{path}: the first line is empty, expected column names")
        try:
            separator, columns, is_data = table_layout(first, keys.get("image_key"))
            if is_data:
                file.seek(0)
            names = (*choose_keys(columns, path, **keys), "split", "domain")
            places = [columns.index(name) if name in columns else -1 for name in names]
            for fields in csv.reader(file, delimiter=separator):
                line += 1
                if not fields:
                    continue
                # missing columns read the last, empty field
                fields = [*whole_row(fields, columns, separator), ""]
                spans += "\n" in "".join(fields)
                name, text, label, split, domain = [fields[k].strip() for k in places]
                name = re.sub(r"(?<=\w)#\d+$", "", name) if "#" in name else name
                rows.append(make_row(f"{path}, row {line}", name, text, split, label, domain))
        except csv.Error as error:
            raise ValueError(f"{path}, row {line}: {error}; an unbalanced quote?") from None
    if spans:
        warn(f"{path}: {spans} rows go over several lines; an unbalanced quote?")
    return Listing(f"table, separated by {separator!r}", rows)


def read_records(path: Path, records, **keys) -> Listing:
    """JSON objects: {"image": file, "captions": [text, ...] or "caption": text, "split": name}."""
    rows, columns, needed, place = [], (), {None}, str(path)
    for number, record in enumerate(records, 1):
        where = f"{place}, record {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {str(record)[:40]!r}, expected an object {{...}}")
        if not needed <= record.keys():
            image, caption, label = choose_keys(list(record), where, **keys)
            columns, needed = (image, caption, "split", label, "domain"), {image, caption, label} - {None}
        rows.append(make_row(where, *map(record.get, columns)))
    return Listing("JSON records", rows)


def json_lines(path: Path):
    with open_file(path, "r", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


def read_karpathy(path: Path, images: list) -> Listing:
    """Karpathy's dataset_*.json; COCO's "restval" is training data, as in the literature."""
    rows = []
    for number, image in enumerate(images):
        file = os.path.join(image.get("filepath") or "", image["filename"])
        split = "train" if image["split"] == "restval" else image["split"]
        texts = [sentence["raw"] for sentence in image["sentences"]]
        rows.append(make_row(f"{path}, image {number}", file, texts, split))
    return Listing("Karpathy split", rows)


def read_coco(path: Path, content: dict) -> Listing:
    """COCO's captions_*.json."""
    images = content["images"]
    texts = {image["id"]: [] for image in images}
    for annotation in content["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"])
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


def read_aircraft(path: Path) -> Listing:
    """FGVC-Aircraft: images_variant_SPLIT.txt has lines "image class", variants.txt the classes in order."""
    names = path.with_name("variants.txt").read_text(encoding="utf-8").splitlines()
    rows, number = [], {name: k for k, name in enumerate(names)}
    for split in ("train", "val", "test"):
        lines = path.with_name(AIRCRAFT.replace("train", split)).read_text(encoding="utf-8").splitlines()
        for image, _, name in (line.partition(" ") for line in lines):
            if name not in number:
                raise ValueError(f"{path}: variants.txt lacks {name!r:.60}; unpack both again")
            rows.append(Row(f"images/{image}.jpg", [], split, number[name]))
    return Listing("lists of FGVC-Aircraft", rows, dict(enumerate(names)))


def read_json(path: Path, **keys) -> Listing:
    """One of the JSON formats; their top-level keys tell them apart."""
    content = json.loads(read_text(path))
    if isinstance(content, list):
        return read_records(path, content, **keys)
    names = sorted(content) if isinstance(content, dict) else [type(content).__name__]
    if {"images", "annotations"} <= set(names):
        return read_coco(path, content)
    if "images" in names:
        return read_karpathy(path, content["images"])
    if {"train", "val", "test"} & set(names):
        return read_coop(path, content)
    expected = "Karpathy's, COCO's (images), CoOp's (train, val, test) or a list of records"
    found = printable(", ".join(names[:8])[:200])
    raise ValueError(f"{path}: unknown JSON; expected {expected}; found: {found}")


def read_list(path: Path, **keys) -> Listing:
    """A file that lists images; its suffix gives the format.   Args: image_key, caption_key, label_key"""
    suffix = path.suffix.lower()
    try:
        if path.name == AIRCRAFT:
            return read_aircraft(path)
        if suffix in (".csv", ".tsv", ".txt"):
            return read_table(path, **keys)
        if suffix in (".jsonl", ".ndjson"):
            return read_records(path, json_lines(path), **keys)
        if suffix == ".json":
            return read_json(path, **keys)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: an entry has the wrong form ({error!r:.200})") from None
    known = ".csv .tsv .txt .jsonl, .json (Karpathy, COCO, CoOp), .tar, folders of classes"
    raise ValueError(f"{path}: unknown format {suffix!r}; known: {known}")
