"""Released weights by name: downloaded once, continued after an interruption, and verified.

OpenAI's files have known hashes and go where OpenAI's own code keeps them. Meta published none for Llip's.
"""

import hashlib
import http.client
import os
import sys
import time
import urllib.request
from pathlib import Path

from util.files import lock

OPENAI = "https://openaipublic.azureedge.net/clip/models"
LLIP = "https://dl.fbaipublicfiles.com/llip"
CACHE = Path("~/.cache/clip")
LARGEST = 64 << 30  # bytes; the largest release, Llip G/14 with its optimizer, has about 34 GB
LARGEST_WITH_HASH = 2 << 30  # bytes; OpenAI's files are smaller than 1 GB
CHUNK = 1 << 20  # bytes
SCHEMES = ("https",)
# name -> (sha256 or None, file); openai/CLIP clip.py@d05afc4
NAMES = {
    "ViT-B-32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B-16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L-14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L-14-336": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
    "llip-B-16": (None, "llip_b16_k32.pt"),
    "llip-G-14": (None, "llip_G14_k64.pt"),
}


def fetch(name: str, folder: Path = CACHE) -> Path:
    """The file of a released model.   Raises: ValueError for another name or a damaged file; OSError."""
    known = name.replace("/", "-").replace("@", "-").removesuffix("px")  # OpenAI's spelling ViT-L/14@336px
    if known not in NAMES:
        raise ValueError(f"{name}: no such file, and not one of {', '.join(NAMES)}")
    sha256, filename = NAMES[known]
    path = Path(folder).expanduser() / filename
    if not path.exists():
        if not sha256:
            print(f"{filename}: no hash was published, only the size is checked", file=sys.stderr)
        download(f"{OPENAI}/{sha256}/{filename}" if sha256 else f"{LLIP}/{filename}", path, sha256)
    elif sha256:
        with open(path, "rb") as file:
            if hash_of(file) != sha256:
                raise ValueError(f"{path}: damaged, its sha256 is wrong: delete it and run again")
    return path


def hash_of(file) -> str:
    """The sha256 of an open file, from its beginning."""
    found = hashlib.sha256()
    file.seek(0)
    while block := file.read(CHUNK):
        found.update(block)
    return found.hexdigest()


class SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if newurl.split(":", 1)[0].lower() not in SCHEMES:
            raise OSError(f"{newurl!a:.200}: only {', '.join(SCHEMES)} is followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Downloads to path.part, continued by a later call, and renames it at the end.   Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    locked = path.with_name(path.name + ".lock")
    with open(locked, "wb") as handle:
        # TRAP: all ranks of a run fetch the checkpoint that they start from. Two writers would ruin it.
        try:
            lock(handle)
        except BlockingIOError:
            print(f"{path.name}: another process downloads it, waiting", file=sys.stderr)
            lock(handle, wait=True)
        if not path.exists():
            complete(url, path, sha256)
        # TRAP: not after a failure: a process that waits for this file would no longer keep others out
        locked.unlink(missing_ok=True)


def complete(url: str, path: Path, sha256: str | None) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "a+b", buffering=0) as file:
        try:
            total = request(url, file, LARGEST_WITH_HASH if sha256 else LARGEST)
            size = file.seek(0, os.SEEK_END)
            if size < total:
                raise OSError(f"ended at {size:,} of {total:,} bytes")
            found = hash_of(file) if sha256 else None
            if found != sha256 or 0 <= total < size:
                raise ValueError(f"{size:,} bytes with sha256 {found}, expected {sha256}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            # a ValueError, or status 416: the partial file cannot become the right one
            useless = isinstance(error, ValueError) or getattr(error, "code", 0) == 416
            keep = os.fstat(file.fileno()).st_size and not useless
            if not keep:
                part.unlink()
            # TRAP: the text comes from a server and could control the terminal
            text = ascii(str(error))[1:-1][:300]
            remedy = "run again to continue" if keep else "run again"
            raise OSError(f"{url} to {part}: {text}; {remedy}, or give the path of a file") from error
        os.fsync(file.fileno())
        os.replace(part, path)


def request(url: str, file, limit: int) -> int:
    """Appends the missing bytes to the partial file.   Returns: the size the server states, or -1."""
    have = file.seek(0, os.SEEK_END)
    headers = {"Range": f"bytes={have}-"} if have else {}
    opener = urllib.request.build_opener(SameScheme)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=60) as response:
        if response.status != 206:  # a server without ranges sends the whole file
            file.truncate(0)
            have = 0
        elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            raise OSError(f"the server sent another range than bytes {have}-")
        length = response.headers.get("Content-Length") or ""
        total = have + int(length) if length.isdecimal() else -1
        if total > limit:
            raise ValueError(f"{total:,} bytes; at most {limit:,} are accepted")
        shown = 0.0
        # TRAP: read() would wait for a whole block, and an interruption would lose up to one
        while block := response.read1(CHUNK):
            have += len(block)
            if have > limit:
                raise ValueError(f"more than {limit:,} bytes")
            while block:
                block = block[file.write(block) :]
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                print(f"{have / 1e6:,.0f} MB of {max(total, have) / 1e6:,.0f} MB", file=sys.stderr)
    return total
