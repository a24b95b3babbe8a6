"""Limits of image files, checked before decoding: decoding then adds less than 600 MB to a process.

Any file of up to 10 MB takes at most 12 s and 1 GB (tests/reliability).
"""

import io
import math
import re
import struct

from PIL.TiffImagePlugin import ImageFileDirectory_v2

MAX_IMAGE_BYTES = 64 << 20
MAX_PIXELS = 96_000_000  # PNG and baseline JPEG: 4 bytes for a pixel
MAX_PIXELS_COSTLY = 24_000_000  # everything else: decoders need up to 22 bytes for a pixel
MAX_READS = 5_000  # of a header; Pillow reads each part of it with one to four calls
MAX_READS_PIXELS = 2_000_000  # a PPM with other values than 0 to 255 needs one for each pixel
MAX_PROFILES = 8  # of a PNG, each of which is decompressed
MAX_COMMENTS = 100  # in a PPM of digits; each moves what follows it
MAX_STRIPS = 100_000  # of a TIFF
MAX_TILE_PIXELS = 1 << 24  # of a TIFF, whose tiles may be larger than the image
MAX_META_BYTES = 1 << 18  # of an AVIF
MAX_TILES = 10_000  # of a JPEG 2000
MAX_JPEG_SEGMENTS = 10_000
MAX_JPEG_SCANS = 64  # each takes as long as a whole image; an ordinary progressive JPEG has about 10

JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")  # those without a length do not matter
# A coding style of JPEG 2000: flags, levels, width and height of code blocks, precincts.
# TRAP: a lookahead, so that a wrong marker cannot hide a right one that follows within its fields
COD = re.compile(rb"(?=\xff(?:\x52.{2}(.).{4}|\x53.{3}(.))(.)(.)(.)..(.{0,33}))", re.DOTALL)


class CountedReads(io.BytesIO):
    """A file in memory. A header of very many parts ends after MAX_READS."""

    left = MAX_READS

    def read(self, size=-1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ValueError("an image file of very many parts: save the image again")
        return super().read(size)


def check_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"{count} {what}, more than the {most} allowed: save the image again")


def check_file(data: bytes) -> bool:
    """Whether the pixels need little memory.   Raises: ValueError if they need very much, or very long."""
    if data.startswith(b"\xff\xd8"):
        return check_jpeg(data)
    check_count(data.count(b"iCCP"), MAX_PROFILES, "PNG profiles")
    if data.startswith((b"P1", b"P2", b"P3")):
        check_count(data.count(b"#"), MAX_COMMENTS, "comments")
    elif data.startswith((b"II", b"MM")):  # the first directory of a TIFF or BigTIFF
        file, tags = CountedReads(data), ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
        file.seek(tags.next)
        tags.load(file)
        strips = tags.get(273, tags.get(324))
        check_count(len(strips) if isinstance(strips, tuple) else 1, MAX_STRIPS, "TIFF strips")
        tile = math.prod(tags.get(side, 1) for side in (322, 323))
        check_count(tile, MAX_TILE_PIXELS, "pixels in a TIFF tile")
    elif data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")):
        check_jpeg2000(data)
    elif data[4:8] == b"ftyp":  # an AVIF
        # TRAP: the time grows with the square of the number of items. A size below 8 means a very large one
        for size in re.findall(rb"(?s)(.{4})(?:meta\0|moov)", data):
            size = int.from_bytes(size, "big")
            check_count(size if size > 7 else len(data), MAX_META_BYTES, "bytes of meta data")
    return data.startswith(b"\x89PNG")


def check_jpeg(data: bytes) -> bool:
    """Whether a JPEG has all components in its first scan and may be decoded row by row."""
    at, segments, scans = 2, 0, []
    # the end is D9; phones append a film, which may hold any bytes
    while (found := JPEG_MARKER.search(data, at)) and (marker := found[1][0]) != 0xD9:
        at, segments = found.end(), segments + 1
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            components, baseline = data[at + 7], marker in (0xC0, 0xC1)
        if marker == 0xDA:
            # TRAP: a JPEG with its components in several scans needs as much as a progressive one
            scans.append(baseline and components == data[at + 2])
        check_count(len(scans), MAX_JPEG_SCANS, "JPEG scans")
        check_count(segments, MAX_JPEG_SEGMENTS, "JPEG segments")
        at += int.from_bytes(data[at : at + 2], "big")
    return scans[0]


def check_jpeg2000(data: bytes) -> None:
    """Every header of a JPEG 2000 file."""
    for start in re.finditer(rb"\xff\x4f\xff\x51", data):
        x, y, _, _, width, height, left, top = struct.unpack_from(">8I", data, start.end() + 4)
        check_count(-(-(x - left) // width) * -(-(y - top) // height), MAX_TILES, "tiles")
    # compressed data cannot contain these two markers: the start of a tile part, and of its data
    for part in data.split(b"\xff\x90\x00\x0a"):
        for *flags, levels, width, height, precincts in COD.findall(part.partition(b"\xff\x93")[0]):
            precincts = precincts[: levels[0] + 1] if b"".join(flags)[0] & 1 else b""
            # each resolution has half the sides of the next
            least = min((e + k for k, p in enumerate(precincts[::-1]) for e in (p & 15, p >> 4)), default=15)
            if min(width, height)[0] < 2 or least < 5:  # code blocks of 16, precincts of 32 pixels a side
                raise ValueError("JPEG 2000 in very small blocks: save the image again")
