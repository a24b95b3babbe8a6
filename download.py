"""Released weights by name: downloaded once, resumed after an interruption, and verified.

OpenAI's files carry their sha256 in the URL and lie where OpenAI's own code puts them, ~/.cache/clip.
For Llip's no hash was published: only the size that the server states is checked, and this is said.
Under several processes let one call fetch before the others do.
"""

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
CHUNK = 1 << 20
WINDOW, LEAST = 60, 60_000  # seconds, and the bytes that must come in them: slower is a broken line
# name -> (sha256 or None, file); openai/CLIP clip.py@d05afc4
NAMES = {
    "ViT-B-32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B-16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L-14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L-14-336": (
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "ViT-L-14-336px.pt",
    ),
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
        if sha256 and file_hash(path).hexdigest() != sha256:
            raise ValueError(f"{path}: a wrong sha256: damaged; delete it and run again")
        return path
    url = f"{base or OPENAI}/{sha256}/{file}" if sha256 else f"{base or LLIP}/{file}"
    if not sha256:
        print(f"{file}: no hash was published, only its size is checked", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    download(url, path, sha256, schemes)
    return path


def file_hash(path: Path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            found.update(block)
    return found


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
    """url into path, by way of path.part, which a later call continues.

    Raises: ValueError for a wrong hash (the part is deleted), a wrong size (the part is kept if it is
            short), or a body beyond LARGEST bytes; OSError for a failing network.
    """
    check_scheme(url, schemes)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    opener = urllib.request.build_opener(SameScheme(schemes))
    try:
        with opener.open(request, timeout=60) as response:
            resumed = response.status == 206
            if resumed and not (response.headers["Content-Range"] or "").startswith(
                f"bytes {have}-"
            ):
                raise ValueError(f"{url}: the server sent another range than bytes {have}-")
            have = have if resumed else 0  # a server without ranges sends everything again
            total = have + int(response.headers.get("Content-Length") or -1 - have)
            if total > LARGEST:
                raise ValueError(f"{url}: {total:,} bytes; at most {LARGEST:,} are taken")
            receive(response, part, have, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is no beginning of what the server has now
            part.unlink()
            raise ValueError(f"{url}: the part that was there did not fit: run again") from error
        raise OSError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}; run again to continue, or give a file's path") from error
    size = part.stat().st_size
    if total >= 0 and size < total:
        raise ValueError(f"{url}: ended at {size:,} of {total:,} bytes: run again to continue")
    found = file_hash(part).hexdigest() if sha256 else None
    if found != sha256 or total >= 0 and size > total:
        part.unlink()
        raise ValueError(f"{url}: {size:,} bytes with sha256 {found}, expected {sha256}: run again")
    os.replace(part, path)


def receive(response, part: Path, have: int, total: int) -> None:
    """Appends the body to part, which has its first bytes already, and says how far it is."""
    start, begun, said = have, time.monotonic(), 0.0
    mark, since = have, begun
    live = sys.stderr.isatty()
    with open(part, "ab" if have else "wb") as file:
        # TRAP: read() waits for a whole block, which a byte a minute never times out of; read1() does not
        while block := response.read1(CHUNK):
            have += len(block)
            if have > LARGEST:
                raise ValueError(f"{part.name}: more than {LARGEST:,} bytes")
            file.write(block)
            now = time.monotonic()
            if now - since > WINDOW:
                if have - mark < LEAST:
                    raise OSError(f"only {have - mark:,} bytes in {WINDOW} s")
                mark, since = have, now
            if now - said > (0.2 if live else 20):
                said, rate = now, (have - start) / max(now - begun, 1e-3)
                left = f", {(total - have) / rate:.0f} s left" if total >= 0 else ""
                text = f"{part.stem}: {have / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s{left}"
                print(text, end="   \r" if live else "\n", file=sys.stderr, flush=True)
    if live and said:
        print(file=sys.stderr)
