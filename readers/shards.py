"""Tar shards as map-style data sets: image-caption pairs by random access inside the archives.

The layout is img2dataset's and webdataset's: members with the same stem form a sample, .jpg .jpeg .png .webp
with .txt (the caption) or .json (a field caption, or a list captions). The standard library's tarfile finds
them; nothing is ever extracted to disk.
"""

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from readers.images import MAX_IMAGE_BYTES, open_image
from tokenizer import strip_specials
from util.files import write_text
from util.report import Progress
from util.text import warn

MAX_TEXT_BYTES = 1 << 20  # of a caption member; images with a larger one are left out


def clean_captions(texts: list) -> list:
    """Texts without special tokens and outer space; empty ones are left out."""
    texts = (t.encode("utf-8", "replace").decode() for t in texts)  # JSON may hold half characters
    # TRAP: the tokenizer would take a literal <|endoftext|> in a caption for the end, and pool there
    return [t for t in (strip_specials(t).strip() for t in texts) if t]


def expand_shards(spec: str) -> list:
    """'a/{00..02}.tar::b.tar' -> the four paths."""
    if "::" in spec:
        return [path for part in spec.split("::") for path in expand_shards(part)]
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if braces is None:
        return [spec]
    first, last = braces.groups()
    if int(last) < int(first):
        raise ValueError(f"{spec}: the range {braces[0]} is empty")
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [path for number in numbers for path in expand_shards(spec.replace(braces[0], number, 1))]


def member_captions(text: bytes, is_json: bool) -> list:
    """The captions in a .txt or .json member; none if it cannot be understood."""
    if not is_json:
        return clean_captions([text.decode("utf-8", errors="replace")])
    try:
        record = json.loads(text)
        captions = record.get("captions") or record.get("caption") or []
    except (ValueError, RecursionError, AttributeError):
        return []
    captions = captions if isinstance(captions, list) else [captions]
    return clean_captions([t for t in captions if isinstance(t, str)])


def scan_members(path: str) -> tuple[dict, dict]:
    """stem -> (offset, size) of the images of an archive, stem -> (offset, size, is_json) of the texts."""
    images, texts, last, end = {}, {}, "none", 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.size < 0:  # TRAP: tarfile would go backwards and never end
                    raise tarfile.ReadError(f"size {member.size} of {member.name!r}")
                last, end = member.name, member.offset_data + -(-member.size // 512) * 512
                stem, suffix = os.path.splitext(member.name)
                place, suffix = (member.offset_data, member.size), suffix.lower()
                # macOS adds ._a.jpg to a.jpg
                if os.path.basename(stem).startswith(".") or not member.isreg() or member.issparse():
                    continue
                if suffix in (".jpg", ".jpeg", ".png", ".webp"):
                    images.setdefault(stem, place)
                elif suffix == ".txt" or (suffix == ".json" and stem not in texts):
                    texts[stem] = (*place, int(suffix == ".json"))
        with open(path, "rb") as file:
            file.seek(end)
            # TRAP: tarfile silently takes a missing or damaged header for the end
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("no end-of-archive mark follows")
    except tarfile.TarError as error:
        hint = "" if path.endswith(".tar") else "; compressed archives must be decompressed first"
        last = f"the last good member is {last!r}"
        raise ValueError(f"{path}: truncated or damaged tar, {last} ({error}){hint}") from None
    return images, texts


def index_shard(path: str, cache: Path) -> dict:
    """Where the samples of an archive are; cached in a file while the archive's size and time stay the same.

    Returns: {"samples": [[stem, image offset, size, text offset, size, is_json], ...], "skipped": a number}
    Raises:  ValueError with the archive and the member if it is cut short or damaged.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such tar shard")
    status = os.stat(path)
    state = {"version": 1, "size": status.st_size, "mtime": status.st_mtime_ns}
    file = cache / (hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32] + ".idx")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none yet, or it is damaged
        index = json.loads(file.read_text())
        if {k: index[k] for k in state} == state:
            return index
    images, texts = scan_members(path)
    samples = []
    with open(path, "rb") as archive:
        for stem, place in images.items():
            offset, size, is_json = texts.get(stem, (0, 0, 0))
            archive.seek(offset)
            if size <= MAX_TEXT_BYTES and member_captions(archive.read(size), is_json):
                samples.append([stem, *place, offset, size, is_json])
    index = state | {"samples": samples, "skipped": len(images) - len(samples)}
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
        return member_captions(self.shards.read(shard, offset, size), is_json)


class Shards:
    """Image-caption pairs in tar archives, by random access.

    The headers of each archive are read once and kept in the user's cache. Sample i is then (archive, offset,
    size): resuming is exact, all ranks get equally many batches, and there may be more workers than shards.
    An epoch shuffles the archives, and then the samples inside windows of `window` archives, so that reads
    stay within a few files. For archives that are sorted by content, raise `window`.
    Args:   spec 'a/{00000..00010}.tar::b.tar';  window archives;  cache folder of the indices
    Raises: ValueError for a missing, damaged or compressed archive, or if there are no samples.
    """

    def __init__(self, spec: str, window: int = 16, cache: str | Path | None = None):
        user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        self.cache = Path(cache) if cache else user / "alignclip_llip"
        self.paths, self.window, tables, skipped = expand_shards(spec), window, [], 0
        self.format = f"tar shards ({len(self.paths)})"
        progress = Progress("indexing" if len(self.paths) >= 100 else "", len(self.paths), "shards")
        for shard, path in enumerate(self.paths):
            index = index_shard(path, self.cache)
            rows = [[shard, *sample[1:]] for sample in index["samples"]]
            tables.append(np.array(rows, dtype=np.int64).reshape(-1, 6))
            skipped += index["skipped"]
            progress.add(1)
        # shard, image offset, size, text offset, size, is_json
        self.table = np.concatenate(tables)  # (N, 6)
        if skipped:
            warn(f"{spec}: {skipped} images without a caption skipped")
        if not len(self.table):
            raise ValueError(f"{spec}: no samples; looked for NAME.jpg .jpeg .png .webp with NAME.txt .json")
        self.captions = ShardCaptions(self)

    def __len__(self):
        return len(self.table)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        # opened for every read: processes share no handle, and decoding takes far longer
        with open(self.paths[shard], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, i: int) -> str:
        path, offset = self.paths[self.table[i, 0]], self.table[i, 1]
        stems = {sample[1]: sample[0] for sample in index_shard(path, self.cache)["samples"]}
        return f"{path}:{stems.get(int(offset), offset)}"

    def image(self, i: int) -> Image.Image:
        shard, offset, size = self.table[i, :3].tolist()
        # one byte more than allowed is enough for open_image to refuse it
        return open_image(self.read(shard, offset, min(size, MAX_IMAGE_BYTES + 1)))

    def epoch_order(self, rng: np.random.Generator) -> np.ndarray:
        """The order of an epoch: archives are shuffled, then samples inside windows of archives."""
        starts = np.searchsorted(self.table[:, 0], np.arange(len(self.paths) + 1))
        shards = rng.permutation(len(self.paths))
        members = [np.arange(starts[s], starts[s + 1]) for s in shards]
        windows = [np.concatenate(members[k : k + self.window]) for k in range(0, len(shards), self.window)]
        return np.concatenate([rng.permutation(some) for some in windows])  # (N,)
