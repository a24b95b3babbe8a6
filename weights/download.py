"""Released weights by name: downloaded once, resumed after an interruption, and verified.

OpenAI's files carry their sha256 in the URL and lie where OpenAI's own code puts them, ~/.cache/clip.
For Llip's no hash was published: only the size that the server states is checked, and this is said.
Of several processes one fetches, and the others wait for it.
"""

import contextlib
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

OPENAI = "https://openaipublic.azureedge.net/clip/models"
LLIP = "https://dl.fbaipublicfiles.com/llip"
CACHE = Path("~/.cache/clip")
LARGEST = 64 << 30  # bytes; the largest release, Llip G/14 with its optimizer, is some 34 GB
HASHED = 2 << 30  # and those of which a hash is known: OpenAI's, below 1 GB
CHUNK = 1 << 20
WINDOW, LEAST = 60, 60_000  # seconds, and the bytes that must come in them: slower is a broken line
# name -> (sha256 or None, file); openai/CLIP clip.py@d05afc4
NAMES = {
    "ViT-B-32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B-16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L-14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L-14-336": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
    "llip-B-16": (None, "llip_b16_k32.pt"),
    "llip-G-14": (None, "llip_G14_k64.pt"),
}


def canonical_name(name: str) -> str:
    """ViT-L/14@336px, as OpenAI writes it, to ViT-L-14-336."""
    return name.replace("/", "-").replace("@", "-").removesuffix("px")


def fetch(name: str, folder: Path = CACHE, base: str | None = None, schemes=("https",)) -> Path:
    """The file of a released model, from the cache or the network.

    Args:   base: another server's URL instead of the publisher's;  schemes: of the URL and of redirects
    Raises: ValueError for an unknown name, a wrong hash or size; OSError for a failing network.
    """
    if canonical_name(name) not in NAMES:
        raise ValueError(f"{name!a:.60}: not one of {', '.join(NAMES)}")
    sha256, file = NAMES[canonical_name(name)]
    path = Path(folder).expanduser() / file
    if path.exists():
        with open(path, "rb") as file:
            if sha256 and hash_of(file) != sha256:
                raise ValueError(f"{path}: a wrong sha256: damaged; delete it and run again")
        return path
    url = f"{base or OPENAI}/{sha256}/{file}" if sha256 else f"{base or LLIP}/{file}"
    if not sha256:
        print(f"{file}: no hash was published, only its size is checked", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    download(url, path, sha256, schemes)
    return path


def hash_of(file) -> str:
    """sha256 of an open file from its beginning."""
    found = hashlib.sha256()
    file.seek(0)
    while block := file.read(CHUNK):
        found.update(block)
    return found.hexdigest()


class SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to anything else."""

    def __init__(self, schemes):
        self.schemes = schemes

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check_scheme(newurl, self.schemes)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_scheme(url: str, schemes) -> None:
    if url.split(":", 1)[0].lower() not in schemes:
        raise ValueError(f"{url!a:.200}: only {', '.join(schemes)} is followed")


def download(url: str, path: Path, sha256: str | None = None, schemes=("https",)) -> None:
    """url into path, by way of path.part, which a later call continues; who comes second waits.

    Raises: ValueError for a wrong hash (the part is deleted), a wrong size (the part is kept if it is
            short), or a body beyond the limit; OSError for a failing network or disk. One line each.
    """
    check_scheme(url, schemes)
    part = path.with_name(path.name + ".part")
    with alone(part, path) as file:
        if file is None:  # another process has brought it
            return
        try:
            total = request(url, file, schemes, min(LARGEST, HASHED) if sha256 else LARGEST)
        except (OSError, http.client.HTTPException, ValueError) as error:
            said = ascii(str(error))[1:-1][:300]  # TRAP: a server's words may steer a terminal
            kept = os.fstat(file.fileno()).st_size and not isinstance(error, TooLong)
            if not kept:
                part.unlink()
            again = "run again to continue" if kept else "run again"
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(f"{url}: {said}; {again}, or give a file's path") from error
        size = part.stat().st_size
        if total >= 0 and size < total:
            raise ValueError(f"{url}: ended at {size:,} of {total:,} bytes: run again to continue")
        # TRAP: to open and close the part once more would drop the lock on it
        found = hash_of(file) if sha256 else None
        if found != sha256 or total >= 0 and size > total:
            part.unlink()
            raise ValueError(f"{url}: {size:,} bytes with sha256 {found}, expected {sha256}: run again")
        os.replace(part, path)


@contextlib.contextmanager
def alone(part: Path, path: Path):
    """part, open for appending by this process alone; None if path came while this waited.

    TRAP: the ranks of a run all fetch what they start from; two writers of one part would ruin it.
    """
    while True:
        with open(part, "a+b", buffering=0) as file:
            lock(file, path)
            if path.exists():
                with contextlib.suppress(FileNotFoundError):
                    part.unlink()
                yield None
                return
            # else it was deleted by the one that was waited for: that was another file
            if part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat()):
                yield file
                return


def lock(file, path: Path) -> None:
    """Waits until no other process holds it; where there are no locks, does not."""
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            print(f"{path.name}: waiting for another process that fetches it", file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:  # some network disks
            pass


def request(url: str, file, schemes, limit: int) -> int:
    """The part of url that file lacks, appended to it.   Returns: the stated size of all, or < 0."""
    have = file.seek(0, os.SEEK_END)
    asked = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    opener = urllib.request.build_opener(SameScheme(schemes))
    try:
        with opener.open(asked, timeout=60) as response:
            resumed = response.status == 206
            begins = response.headers["Content-Range"] or ""
            if resumed and not begins.startswith(f"bytes {have}-"):
                raise ValueError(f"the server sent another range than bytes {have}-")
            if not resumed:  # a server without ranges sends everything again
                file.truncate(0)
                have = 0
            length = response.headers.get("Content-Length") or ""
            total = have + int(length) if length.isdecimal() else -1
            if total > limit:
                raise TooLong(f"{total:,} bytes; at most {limit:,} are taken")
            receive(response, file, have, total, limit)
            return total
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is no beginning of what the server has now
            raise TooLong("the part that was there did not fit") from error
        raise OSError(f"the server answers {error.code} {error.reason}") from error


class TooLong(ValueError):
    """What there is of the file cannot become right."""


def receive(response, file, have: int, total: int, limit: int) -> None:
    """Appends the body to file, which has its first bytes already, and says how far it is."""
    start, begun, said = have, time.monotonic(), 0.0
    mark, since = have, begun
    live, name = sys.stderr.isatty(), Path(file.name).stem
    # TRAP: read() waits for a whole block, which a byte a minute never times out of; read1() does not
    while block := response.read1(CHUNK):
        have += len(block)
        if have > limit:
            raise TooLong(f"more than {limit:,} bytes")
        append(file, block)
        now = time.monotonic()
        if now - since > WINDOW:
            if have - mark < LEAST:
                raise OSError(f"only {have - mark:,} bytes in {WINDOW} s")
            mark, since = have, now
        if now - said > (0.2 if live else 20):
            said, rate = now, (have - start) / max(now - begun, 1e-3)
            left = f", {(total - have) / rate:.0f} s left" if total >= 0 else ""
            of = f" of {total / 1e6:.0f}" if total >= 0 else ""
            text = f"{name}: {have / 1e6:.0f}{of} MB, {rate / 1e6:.1f} MB/s{left}"
            print(text, end="   \r" if live else "\n", file=sys.stderr, flush=True)
    if live and said:
        print(file=sys.stderr)


def append(file, block: bytes) -> None:
    """Raises: OSError naming the file, which the system does not do for a full disk."""
    try:
        while block:
            block = block[file.write(block) :]
    except OSError as error:
        raise OSError(f"cannot write {file.name}: {error.strerror}") from error
