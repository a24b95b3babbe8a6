"""Hostile image files of up to 10 MB, and what reading one costs: at most 12 s and 1 GB.

FILES makes each of them. They have very many parts, or very costly parts: segments, scans, chunks,
profiles, comments, frames, strips, tags, tiles, blocks, meta data, pictures within a picture.
"""

import functools
import io
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from readers import images  # noqa: E402

SECONDS, MEGABYTES, SIZE = 12, 1000, 10_000_000
SIDE = 4890  # pixels: 24 million in all


def file_of(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@functools.cache
def small(form: str, mode: str = "RGB") -> bytes:
    return file_of(Image.new(mode, (64, 64), 50), form)


def flood(before: bytes, part: bytes, after: bytes) -> bytes:
    return before + part * ((SIZE - len(before) - len(after)) // len(part)) + after


# JPEG


def segment(marker: int, body: bytes = b"") -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_flood(part: bytes) -> bytes:
    return flood(small("JPEG")[:2], part, small("JPEG")[2:])


def jpeg_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    file = file_of(Image.new("RGB", (SIDE, SIDE)), "JPEG", progressive=True, subsampling=0)
    parts = file.removesuffix(b"\xff\xd9").split(b"\xff\xda")
    return b"\xff\xda".join([*parts, *[parts[-1]] * (count + 1 - len(parts))]) + b"\xff\xd9"


# PNG


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, line: int, interlaced: int = 0, more=b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(bytes(height * (line + 1)), 9))
    return b"\x89PNG\r\n\x1a\n" + head + more + pixels + chunk(b"IEND")


def png_flood(part: bytes, after: bool = False) -> bytes:
    file = small("PNG")
    at = file.rindex(b"IEND") - 4 if after else 33
    return flood(file[:at], part, file[at:])


PACKED = zlib.compress(bytes(1_000_000))
PROFILE = chunk(b"iCCP", b"a\0\0" + PACKED)


# GIF, WebP, ICO, BMP, PPM


def gif_flood(part: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    file = small("GIF", "P")
    at = 13 + 3 * 2 ** ((file[10] & 7) + 1)
    return flood(file[:at] + before, part, after + file[at:])


def riff(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)


def webp_flood(part: bytes) -> bytes:
    sides = struct.pack("<I", 63)[:3] * 2
    body = flood(riff(b"VP8X", bytes(4) + sides) + small("WEBP")[12:], part, b"")[: SIZE - 12]
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def ico(inner: bytes, count: int = 1) -> bytes:
    entry = struct.pack("<BBBBHHII", 64, 64, 0, 0, 1, 32, len(inner), 6 + 16 * count)
    return struct.pack("<HHH", 0, 1, count) + entry * count + inner


def dib(width: int, height: int, bits: int, compression: int = 0) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return head + bytes(1024 if bits == 8 else 0)


def bmp_runs(part: bytes) -> bytes:
    head = dib(SIDE, SIDE, 8, 1)
    return flood(b"BM" + struct.pack("<IHHI", SIZE, 0, 0, 14 + len(head)) + head, part, b"")


# TIFF


def tiff(pixels: bytes, *more: tuple, width: int = 64, height: int = 64, compression: int = 1) -> bytes:
    """Entries are (tag, type, count, value); one of a tag that is there already replaces it."""
    usual = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression)]
    usual += [(262, 3, 1, 1), (277, 3, 1, 1), (278, 4, 1, height), (273, 4, 1, 8), (279, 4, 1, len(pixels))]
    tags = dict(sorted({entry[0]: entry for entry in (*usual, *more)}.items()))
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *entry) for entry in tags.values())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + table + bytes(4)


def tiff_strips(count: int, kind: int, compression: int = 1) -> bytes:
    offsets = struct.pack({3: "<H", 4: "<I"}[kind], 8) * count
    tags = ((278, 4, 1, 1), (273, kind, count, 8), (279, kind, count, 8))
    return tiff(offsets, *tags, width=1, height=count, compression=compression)


def tiff_tile(side: int, compression: int) -> bytes:
    pixels = zlib.compress(bytes(side * side), 9) if compression == 8 else bytes(9_000_000)
    tags = ((322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, len(pixels)))
    return tiff(pixels, *tags, compression=compression)


# JPEG 2000, AVIF


@functools.cache
def codestream(tile: int = 0, side: int = SIDE) -> bytes:
    options = {"tile_size": (tile, tile)} if tile else {}
    return file_of(Image.new("RGBA", (side, side), "red"), "JPEG2000", no_jp2=True, **options)


def styled(block: int = 4, precinct: int = 15, layers: int = 1, levels: int = 5) -> bytes:
    """The segment COD: exponents of the sides of code blocks less two, and of precincts."""
    body = struct.pack(">BBHBBBBBB", precinct < 15, 0, layers, 1, levels, block, block, 0, 1)
    return segment(0x52, body + bytes([precinct * 17] * (levels + 1)) * (precinct < 15))


def jp2_style(**style) -> bytes:
    return re.sub(rb"\xff\x52\x00\x0c.{10}", lambda _: styled(**style), codestream(), count=1, flags=re.S)


def jp2_tile_style(**style) -> bytes:
    """The style lies in the header of the first tile."""
    file, body = codestream(), styled(**style)
    at = file.index(b"\xff\x90\0\x0a")
    length = struct.pack(">I", struct.unpack(">I", file[at + 6 : at + 10])[0] + len(body))
    return file[: at + 6] + length + file[at + 10 : at + 12] + body + file[at + 12 :]


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        found.append((kind, data[at + 8 : at + size]))
        at += size
    return found


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, kind) + body


def avif_items(count: int) -> bytes:
    """An image whose meta data lists very many items without content."""
    inner, out = [], []
    for kind, body in boxes(small("AVIF")):
        if kind == b"meta":
            for name, content in boxes(body[4:]):
                if name == b"iinf":
                    here = struct.unpack(">H", content[4:6])[0]
                    items = (struct.pack(">IIH4sB", 0x03000000, i + 500, 0, b"abcd", 0) for i in range(count))
                    more = b"".join(box(b"infe", item) for item in items)
                    content = b"\1\0\0\0" + struct.pack(">I", here + count) + content[6:] + more
                inner.append(box(name, content))
            body = body[:4] + b"".join(inner)
        out.append(box(kind, body))
    return b"".join(out)


def sub(body: bytes) -> bytes:
    """A sub-block of a GIF."""
    return bytes([len(body)]) + body


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG: empty segments": lambda: jpeg_flood(segment(0xE3)),
    "JPEG: comments": lambda: jpeg_flood(segment(0xFE, b"x")),
    "JPEG: Exif": lambda: jpeg_flood(segment(0xE1, b"Exif\0\0")),
    "JPEG: profiles": lambda: jpeg_flood(segment(0xE2, b"ICC_PROFILE\0\1\1")),
    "JPEG: tables": lambda: jpeg_flood(segment(0xDB, b"\0" + bytes(range(1, 65)))),
    "JPEG: fill bytes": lambda: jpeg_flood(b"\xff"),
    "JPEG: segments after the pixels": lambda: flood(small("JPEG")[:-2], segment(0xE3), b"\xff\xd9"),
    "JPEG: 64 scans": lambda: jpeg_scans(64),
    "JPEG: 600 scans": lambda: jpeg_scans(600),
    "PNG: texts": lambda: png_flood(chunk(b"tEXt", b"a\0b")),
    "PNG: packed texts": lambda: png_flood(chunk(b"zTXt", b"a\0\0" + PACKED)),
    "PNG: packed Unicode": lambda: png_flood(chunk(b"iTXt", b"a\0\1\0\0\0" + PACKED)),
    "PNG: a text of 100 MB": lambda: png_flood(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 9))),
    "PNG: profiles": lambda: png_flood(PROFILE),
    "PNG: profiles at the end": lambda: png_flood(PROFILE, after=True),
    "PNG: unknown chunks": lambda: png_flood(chunk(b"abCd")),
    "PNG: empty pixel chunks": lambda: png_flood(chunk(b"IDAT")),
    "PNG: chunks at the end": lambda: png_flood(chunk(b"tEXt", b"a\0b"), after=True),
    "PNG: 96 million pixels, 16 bits": lambda: png(9790, 9790, 16, 6, 9790 * 8),
    "PNG: 96 million pixels, interlaced": lambda: png(9790, 9790, 8, 6, 9790 * 4 + 8, 1),
    "PNG: one row of 95 million": lambda: png(95_000_000, 1, 8, 0, 95_000_000),
    "GIF: one comment": lambda: gif_flood(sub(b"x" * 255), b"!\xfe", b"\0"),
    "GIF: comments": lambda: gif_flood(b"!\xfe" + sub(b"x") + b"\0"),
    "GIF: extensions": lambda: gif_flood(b"!\xf9" + sub(bytes(4)) + b"\0"),
    "GIF: bytes between blocks": lambda: gif_flood(b"\1"),
    "GIF: frames": lambda: flood(small("GIF", "P")[:-1], small("GIF", "P")[-40:-1], b";"),
    "WebP: chunks": lambda: webp_flood(riff(b"abcd")),
    "ICO: a picture of 176 million pixels": lambda: ico(png(13300, 13300, 8, 6, 13300 * 4)),
    "ICO: a bitmap of 353 million pixels": lambda: ico(dib(13300, 26600, 1) + bytes(9_000_000)),
    "ICO: pictures": lambda: ico(small("PNG"), 65_535),
    "BMP: runs of one": lambda: bmp_runs(b"\1\2"),
    "BMP: ends of lines": lambda: bmp_runs(b"\0\0"),
    "BMP: steps": lambda: bmp_runs(b"\0\2\1\0"),
    "PPM: numbers": lambda: flood(b"P3 1800 1800 255\n", b"1 ", b""),
    "PPM: comments between numbers": lambda: flood(b"P3 3000 1600 255\n", b"#\n1 ", b""),
    "PPM: comments between bits": lambda: flood(b"P1 4800 2000\n", b"#\n1", b""),
    "PPM: a long header": lambda: flood(b"P6\n", b"#\n", b"1 1 255\n123"),
    "PPM: values up to 100": lambda: flood(b"P5 4890 2040 100\n", b"1", b""),
    "TIFF: strips": lambda: tiff_strips(2_400_000, 4),
    "TIFF: short strips": lambda: tiff_strips(4_800_000, 3),
    "TIFF: packed strips": lambda: tiff_strips(2_400_000, 4, 5),
    "TIFF: tags": lambda: tiff(bytes(5000), *((tag, 1, 1, 0) for tag in range(1000, 61_000))),
    "TIFF: tags of 9 MB": lambda: tiff(
        bytes(9_000_000), *((t, 1, 9_000_000, 8) for t in range(1000, 61_000))
    ),
    "TIFF: fractions": lambda: tiff(bytes(9_000_000), *((t, 5, 1_100_000, 8) for t in (282, 283, 33437))),
    "TIFF: a tile of a gigabyte": lambda: tiff_tile(32_768, 5),
    "TIFF: a packed tile of a gigabyte": lambda: tiff_tile(32_768, 8),
    "JPEG 2000: code blocks of 4": lambda: jp2_style(block=0),
    "JPEG 2000: code blocks of 16": lambda: jp2_style(block=2, precinct=5, layers=65_535),
    "JPEG 2000: precincts of 4": lambda: jp2_style(precinct=2),
    "JPEG 2000: precincts of 16": lambda: jp2_style(precinct=4),
    "JPEG 2000: layers": lambda: jp2_style(layers=65_535, levels=32, precinct=5),
    "JPEG 2000: precincts of 4 in a tile": lambda: jp2_tile_style(precinct=2),
    "JPEG 2000: 65,025 tiles": lambda: codestream(19, 4845),
    "AVIF: items": lambda: avif_items(350_000),
    "AVIF: 50,000 items": lambda: avif_items(50_000),
}


def cost(data: bytes) -> dict:
    """Time and memory of reading an image, in a separate process.

    Returns: {"seconds", "megabytes" beyond the process itself, "said": the error, or ""}
    """

    def status(key: str) -> float:
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

    ends, begins = os.pipe()
    if (pid := os.fork()) == 0:
        base, start, said = status("VmRSS"), time.monotonic(), ""
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30,) * 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5 * SECONDS)
        try:
            images.Preprocess(224).pixels(images.open_image(data))
            images.RandomCrop(224).pixels(images.open_image(data), random.Random(0))
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        spent = {"seconds": time.monotonic() - start, "megabytes": status("VmHWM") - base, "said": said}
        os.write(begins, json.dumps(spent).encode())
        os._exit(0)
    os.close(begins)
    with open(ends) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return json.loads(text or '{"seconds": 60, "megabytes": 0, "said": "killed"}')


def check(names=FILES) -> dict:
    """Reads every file.   Returns: {"tried", "seconds", "megabytes": the most of one, "failures"}"""
    found = {"tried": 0, "seconds": 0.0, "megabytes": 0.0, "failures": []}
    for name in names:
        data = FILES[name]()
        assert len(data) <= SIZE + 100_000, name
        spent = cost(data)
        found["tried"] += 1
        found["seconds"] = max(found["seconds"], spent["seconds"] / (1 if spent["said"] else 2))
        found["megabytes"] = max(found["megabytes"], spent["megabytes"])
        expected = not spent["said"] or spent["said"].startswith(("ValueError", "OSError"))
        within = spent["megabytes"] < MEGABYTES and spent["seconds"] < SECONDS * (1 if spent["said"] else 2)
        if not expected or not within:
            found["failures"].append(f"{name}: {spent}")
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or FILES:
        data = FILES[name]()
        spent = cost(data)
        line = f"{spent['seconds']:6.2f} s {spent['megabytes']:6.0f} MB  {name}: {spent['said'][:60]}"
        print(line, f"({len(data):,} bytes)", flush=True)
