"""Tar shards as map-style data sets: image-caption pairs by random access inside the archives.

The layout is img2dataset's and webdataset's: members with the same stem form a sample, .jpg .png .gif ...
with .txt (the caption), .json (a field caption, or a list captions) or .cls (the label). The standard
library's tarfile finds them; nothing is ever extracted to disk.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from readers.folders import natural
from readers.images import IMAGE_SUFFIXES, limits, open_image
from tokenizer import strip_specials
from util.files import write_text
from util.report import Progress
from util.text import one_line, printable, say, warn

MAX_TEXT_BYTES = 1 << 20  # of a caption member; images with a larger one are left out
MAX_SHARDS = 1_000_000  # of a pattern such as {00000..00010}
MAX_CAPTION = 4096  # characters of a caption of any source; the rest is cut off


def clean_captions(texts: list) -> list:
    """Texts without special tokens and outer space, cut to MAX_CAPTION; empty ones are left out."""
    texts = (t[:MAX_CAPTION] for t in texts)
    # JSON may hold half characters
    texts = (t if t.isascii() else t.encode("utf-8", "replace").decode() for t in texts)
    # TRAP: the tokenizer would take a literal <|endoftext|> in a caption for the end, and pool there
    return [t for t in (strip_specials(t).strip() for t in texts) if t]


def expand_shards(spec: str) -> list:
    """'a/{00..02}.tar::{b,c}.tar::d/*.tar' -> the paths, in order."""
    if "::" in spec:
        return [path for part in spec.split("::") for path in expand_shards(part)]
    if os.path.exists(spec):
        return [spec]
    braces = re.findall(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", spec)
    sizes = [int(last) - int(first) + 1 if first else names.count(",") + 1 for first, last, names in braces]
    if min(sizes, default=1) < 1 or math.prod(sizes) > MAX_SHARDS:
        raise ValueError(f"{spec}: a range is empty, or there are more than {MAX_SHARDS} shards; correct it")
    if braces:
        first, last, names = braces[0]
        numbers = range(int(first or 0), int(last or -1) + 1)
        parts = [f"{number:0{len(first)}d}" for number in numbers] or names.split(",")
        whole = f"{first}..{last}" if first else names
        paths = [path for part in parts for path in expand_shards(spec.replace(f"{{{whole}}}", part, 1))]
        return list(dict.fromkeys(paths))
    return sorted(glob.glob(spec)) or [spec]


def member_captions(text: bytes, is_json: bool, by_line: bool = False) -> list:
    """The captions in a .txt or .json member; none if it cannot be understood."""
    if not is_json:
        text = text.decode("utf-8", errors="replace")
        return clean_captions(text.splitlines() if by_line else [text])
    try:
        record = json.loads(text)
        captions = record.get("captions") or record.get("caption") or []
    except (ValueError, RecursionError, AttributeError):
        return []
    captions = captions if isinstance(captions, list) else [captions]
    return clean_captions([t for t in captions if isinstance(t, str)])


def scan_members(path: str) -> tuple[dict, Counter]:
    """name -> (offset, size) of the files of an archive, and the number of members that are no files."""
    members, others, last, end, length = {}, Counter(), "none", 0, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                # TRAP: with a negative size tarfile would go backwards and never end
                if not 0 <= member.size <= length:
                    raise tarfile.ReadError(f"size {member.size} of {member.name!r}")
                last, end = member.name, member.offset_data + -(-member.size // 512) * 512
                # macOS adds ._a.jpg to a.jpg
                if member.isdir() or os.path.basename(member.name).startswith("."):
                    continue
                if member.isreg() and not member.issparse():
                    # a member that comes twice was updated: the last one counts
                    members[os.path.normpath(member.name)] = member.offset_data, member.size
                else:
                    others["links"] += 1
        with open(path, "rb") as file:
            file.seek(end)
            # TRAP: tarfile silently takes a missing or damaged header for the end
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("no end-of-archive mark follows")
    # thousands of long names, and sparse members with false sizes, raise the others
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        hint = "" if path.endswith(".tar") else "; compressed archives must be decompressed first"
        last = f"the last good member is {last!r}"
        raise ValueError(f"{path}: truncated or damaged tar, {last} ({one_line(error)}){hint}") from None
    return members, others


def index_shard(path: str) -> dict:
    """Where the samples of an archive are; cached in a file while the archive's size and time stay the same.

    Returns: {"samples": [[stem, image offset, size, text offset, size, is_json, label], ...],
             "others": {suffix: number}, "skipped": a number}; without captions the text has size 0
    Raises:  ValueError with the archive and the member if it is cut short or damaged.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such tar shard")
    status = os.stat(path)
    state = {"version": 2, "size": status.st_size, "mtime": status.st_mtime_ns}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alignclip_llip"
    file = cache / (hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32] + ".idx")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none yet, or it is damaged
        index = json.loads(file.read_text())
        if {k: index[k] for k in state} == state:
            return index
    members, others = scan_members(path)
    stems, samples = {}, []
    for name, place in members.items():
        stem, suffix = os.path.splitext(name)
        kind = "image" if suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
        if kind in ("image", ".txt", ".json", ".cls"):
            stems.setdefault(stem, {}).setdefault(kind, place)
        else:
            others[kind or "no suffix"] += 1
    stems = {stem: parts for stem, parts in stems.items() if "image" in parts}
    with open(path, "rb") as archive:

        def content(place) -> bytes:
            archive.seek(place[0])
            return archive.read(place[1]) if place[1] <= MAX_TEXT_BYTES else b""

        for stem, parts in stems.items():
            is_json = int(".txt" not in parts)
            text = parts.get(".json" if is_json else ".txt", (0, 0))
            text = text if member_captions(content(text), is_json) else (0, 0)
            label = content(parts.get(".cls", (0, 0))).decode("utf-8", errors="replace").strip()
            if text[1] or label:
                samples.append([stem, *parts["image"], *text, is_json, label])
    index = state | {"samples": samples, "others": others, "skipped": len(stems) - len(samples)}
    with contextlib.suppress(OSError):  # with a read-only home the next run scans again
        cache.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(index))
    return index


class ShardCaptions(Sequence):
    """captions[i] of Shards, read from the archive at each use."""

    def __init__(self, shards):
        self.shards = shards

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, i: int) -> list:
        shard, _, _, offset, size, is_json = self.shards.table[i].tolist()
        return member_captions(self.shards.read(shard, offset, size), is_json, self.shards.by_line)


class Shards:
    """Images with captions or labels in tar archives, by random access.

    The headers of each archive are read once and kept in the user's cache. Sample i is then (archive, offset,
    size): resuming is exact, all ranks get equally many batches, and there may be more workers than shards.
    Args:   spec 'a/{00000..00010}.tar::b.tar';  caption_lines "yes" or "no": whether each line of a .txt is a
            caption, None: lines_are_captions
    Raises: ValueError for a missing, damaged or compressed archive, or if there are no samples.
    """

    domains = domain_names = None
    splits, max_pixels = {}, None  # open_dataset sets it
    window = 16  # archives of epoch_order

    def __init__(self, spec: str, caption_lines: str | None = None):
        self.paths, tables, labels = expand_shards(spec), [], []
        self.format, self.by_line = f"tar shards ({len(self.paths)})", False
        self.states, self.stems = [], {}  # size and time of each archive;  names that were used
        skipped, others = 0, Counter()
        progress = Progress("indexing" if len(self.paths) >= 100 else "", len(self.paths), "shards")
        for shard, path in enumerate(self.paths):
            index = index_shard(path)
            self.states.append((index["size"], index["mtime"]))
            rows = [[shard, *sample[1:6]] for sample in index["samples"]]
            tables.append(np.array(rows, dtype=np.int64).reshape(-1, 6))
            labels += [sample[6] for sample in index["samples"]]
            skipped += index["skipped"]
            others.update(index["others"])
            progress.add(1)
        if others:
            kinds = ", ".join(f"{count} {printable(kind)}" for kind, count in others.most_common(8))
            warn(f"{spec}: members of other kinds skipped: {kinds}")
        # shard, image offset, size, text offset, size, is_json
        self.table = np.concatenate(tables)  # (N, 6)
        # every sample has what most of the samples have: captions, labels or both
        parts = {"caption": self.table[:, 4] > 0, "label": np.array(labels, dtype=object) != ""}
        parts = {what: has for what, has in parts.items() if 2 * has.sum() >= max(len(has), 1)}
        kept = np.logical_and.reduce([np.ones(len(labels), bool), *parts.values()])  # (N,)
        self.table, labels = self.table[kept], [label for label, keep in zip(labels, kept) if keep]
        if skipped := skipped + int((~kept).sum()):
            warn(f"{spec}: {skipped} images without a {' and '.join(parts) or 'caption'} skipped")
        if not labels:
            looked_for = "looked for NAME.jpg .png .gif ... with NAME.txt .json .cls"
            raise ValueError(f"{spec}: no samples; {looked_for}")
        if "caption" in parts:
            self.captions = ShardCaptions(self)
            self.by_line = caption_lines == "yes" if caption_lines else self.lines_are_captions(spec)
        if "label" in parts:
            number = {label: k for k, label in enumerate(natural(set(labels)))}
            self.labels = [number[label] for label in labels]
            self.classes = [label.replace("_", " ") for label in number]

    def lines_are_captions(self, spec: str) -> bool:
        """Whether nine tenths of the first 100 .txt members have several lines, as in CLIP_benchmark."""
        texts = self.table[self.table[:, 5] == 0][:100, [0, 3, 4]].tolist()
        several = sum(len(member_captions(self.read(*text), False, True)) > 1 for text in texts)
        if not texts or several < 0.9 * len(texts):
            return False
        count = f"{several} of the first {len(texts)} .txt members"
        say(f"{printable(spec)}: {count} have several lines: each line is a caption")
        return True

    def __len__(self):
        return len(self.table)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        # opened for every read: processes share no handle, and decoding takes far longer
        with open(self.paths[shard], "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != self.states[shard]:
                raise ValueError(f"{self.paths[shard]}: the shard was written again since it was opened")
            file.seek(offset)
            return file.read(size)

    def name(self, i: int) -> str:
        path, offset = self.paths[self.table[i, 0]], self.table[i, 1]
        if path not in self.stems:
            self.stems[path] = {}
            with contextlib.suppress(ValueError):  # the archive was damaged since it was opened
                self.stems[path] = {s[1]: s[0] for s in index_shard(path)["samples"]}
        return f"{path}:{self.stems[path].get(int(offset), offset)}"

    def image(self, i: int) -> Image.Image:
        shard, offset, size = self.table[i, :3].tolist()
        # one byte more than allowed is enough for open_image to refuse it
        return open_image(self.read(shard, offset, min(size, limits.MAX_IMAGE_BYTES + 1)), self.max_pixels)

    def epoch_order(self, rng: np.random.Generator) -> np.ndarray:
        """Archives are shuffled, then samples inside windows of archives: reads stay within a few files."""
        starts = np.searchsorted(self.table[:, 0], np.arange(len(self.paths) + 1))
        shards = rng.permutation(len(self.paths))
        members = [np.arange(starts[s], starts[s + 1]) for s in shards]
        windows = [np.concatenate(members[k : k + self.window]) for k in range(0, len(shards), self.window)]
        return np.concatenate([rng.permutation(some) for some in windows])  # (N,)
