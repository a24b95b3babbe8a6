"""From an image file to what an image tower reads: safe opening, OpenAI's transform, random crops.

Radford et al. 2021 (arXiv:2103.00020), section 2.4: a random square crop is the only augmentation. Pillow
does all decoding and resizing, so that preprocess equals OpenAI's transform bit for bit.
"""

import contextlib
import functools
import io
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.text import one_line, warn

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Limits of one image. Within them decoding adds less than 600 MB to a process (tests/test_images.py).
MAX_IMAGE_BYTES = 64 << 20
MAX_PIXELS = 96_000_000  # PNG and baseline JPEG: 4 bytes for a pixel
MAX_PIXELS_COSTLY = 24_000_000  # everything else: decoders need up to 22 bytes for a pixel
MAX_JPEG_SEGMENTS = 10_000  # before the first scan; a JPEG with more counts as costly
MAX_JPEG_SCANS = 64  # an ordinary progressive JPEG has about 10
STRIP = 1 << 20  # pixels of a large image that are copied at a time
WARNED = set()  # what this process has warned of
IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .webp .ppm .bmp .pgm .tif .tiff .gif".split())
# Formats that Pillow decodes within this process. TRAP: for EPS it starts Ghostscript, which runs the file.
FORMATS = "JPEG PNG WEBP GIF BMP PPM TIFF JPEG2000 AVIF MPO ICO TGA PCX BLP CUR DCX DDS DIB FLI FTEX GBR ICNS"
FORMATS += " IM IMT MCIDAS MSP PCD PIXAR PSD QOI SGI SUN XBM XPM XVTHUMB"
IMAGE_ERRORS = (OSError, ValueError)  # what open_image and the transforms raise for a broken image


def warn_once(text: str, key) -> None:
    if key not in WARNED:
        WARNED.add(key)
        warn(text)


@contextlib.contextmanager
def decoding():
    """Turns whatever Pillow raises on a broken file into a ValueError, and prints its warnings once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_limits is stricter
        try:
            yield
        except IMAGE_ERRORS:
            raise
        except Exception as error:
            raise ValueError(f"cannot decode the image: {one_line(error)}") from error
    for w in caught:
        warn_once(f"{one_line(w.message)} (printed once)", (w.filename, w.lineno))


@functools.cache
def formats() -> list[str]:
    """Those of FORMATS that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS.split() if name in Image.OPEN]


def one_scan(data: bytes) -> bool:
    """Whether a JPEG has all components in its first scan and may be decoded row by row.

    Raises: ValueError for a JPEG with very many scans, each of which takes as long as a whole image.
    """
    at, components, progressive = 2, -1, False
    for _ in range(MAX_JPEG_SEGMENTS):
        if data[at : at + 1] != b"\xff" or data[at + 1] == 0xDA:
            break
        marker, fill = data[at + 1], data[at + 1] == 0xFF
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            components, progressive = data[at + 9], marker not in (0xC0, 0xC1)
        at += 1 if fill else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if (scans := data.count(b"\xff\xda", at)) > MAX_JPEG_SCANS:
        raise ValueError(f"{scans} JPEG scans, more than the {MAX_JPEG_SCANS} allowed: save the image again")
    return data[at + 4 : at + 5] == bytes([max(components, 0)]) and not progressive


def check_limits(image: Image.Image) -> None:
    """Raises: ValueError for an image whose decoding would take too much memory or time."""
    cheap = image.format == "PNG"
    if image.format in ("JPEG", "MPO"):
        image.fp.seek(0)
        # TRAP: a JPEG with its components in several scans needs as much memory as a progressive one
        cheap = one_scan(image.fp.read()) and image.mode != "CMYK"
    limit = MAX_PIXELS if cheap else MAX_PIXELS_COSTLY
    if math.prod(image.size) > limit:
        allowed = f"more than the {limit // 10**6} million allowed for this kind of {image.format}"
        raise ValueError(f"{image.width}x{image.height} pixels are {allowed}: make the image smaller")


def strips(image: Image.Image, box: tuple) -> Iterator[Image.Image]:
    """The part (left, top, right, bottom) of an image, a few rows at a time."""
    left, top, right, bottom = box
    rows = max(1, STRIP // (right - left))
    for y in range(top, bottom, rows):
        yield image.crop((left, y, right, min(y + rows, bottom)))


def resized(image: Image.Image, box: tuple, size: tuple, interpolation: str) -> Image.Image:
    """image.crop(box).resize(size) to the bit, without a copy of a large image."""
    (left, top, right, bottom), kind = box, FILTERS[interpolation]
    if image.mode not in ("RGB", "RGBA", "LA") or (right - left) * (bottom - top) <= STRIP:
        whole = box == (0, 0, *image.size)
        return (image if whole else image.crop(box)).resize(size, kind)
    # Pillow multiplies colours by alpha, resizes the rows, rounds, and then resizes the columns
    mode = {"RGBA": "RGBa", "LA": "La"}.get(image.mode, image.mode)
    rows, y = Image.new(mode, (size[0], bottom - top)), 0
    for strip in strips(image, box):
        rows.paste(strip.convert(mode).resize((size[0], strip.height), kind), (0, y))
        y += strip.height
    return rows.resize(size, kind).convert(image.mode)


def grey(image: Image.Image) -> Image.Image:
    """An image with integers of 16 or 32 bits as one with 8 bits; docs/data.md says which value is white."""
    box, header = (0, 0, *image.size), b""
    if image.format == "PNG":  # Pillow has read up to the pixels
        end = image.fp.tell()
        image.fp.seek(0)
        header = image.fp.read(end)
    most = max(int(np.asarray(strip).max()) for strip in strips(image, box))
    white = next((usual for usual in (255, 4095, 65535) if usual >= most), most)
    if image.format == "TIFF" and image.tag_v2.get(281, (0,))[0] > 0:  # MaxSampleValue
        white = image.tag_v2[281][0]
    # TRAP: the PNG standard shifts such values to the upper bits, and then 65535 is white
    elif (bits := re.search(rb"\0\0\0\x01sBIT(.)", header, re.DOTALL)) and most < 1 << bits[1][0]:
        white = (1 << bits[1][0]) - 1
    text = f"grey values of more than 8 bits: 0 to {white} become black to white in the first such image"
    warn_once(f"{text}, and another image may get another range (docs/data.md, Images)", "grey")
    result, y = Image.new("L", image.size), 0
    for strip in strips(image, box):
        values = np.asarray(strip).astype(np.int64).clip(0, white) * 256 // (white + 1)
        result.paste(Image.fromarray(values.astype(np.uint8)), (0, y))
        y += strip.height
    return result


def open_image(source: str | bytes) -> Image.Image:
    """An image from a path or from its bytes: opened, not yet decoded, within limits of bytes and pixels.

    An animation gives its first frame. Orientation tags are ignored, as in OpenAI's pipeline.
    Raises: ValueError or OSError: not an image, not one of FORMATS, too large, or damaged.
    """
    if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("a folder, pipe, socket or device, not an image file")
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{size} bytes, more than the {MAX_IMAGE_BYTES} allowed for one image")
    with decoding():
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats())
        check_limits(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels without a known range: save the image with 8 bits")
        if image.mode.startswith("I"):  # Pillow's own conversion of 16-bit grey clips it to white
            image = grey(image)
    return image


def normalise(pixels: np.ndarray, mean=MEAN, std=STD) -> Tensor:
    """(x / 255 - mean) / std in this order: (..., S, S, 3) uint8 -> (..., 3, S, S) float32."""
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))  # (..., 3, S, S)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (mean, std))
    return x.to(torch.float32).div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class Preprocess:
    """OpenAI's transform: short side to S, centre crop, RGB, normalise.

    No equation; openai/CLIP clip/clip.py _transform @d05afc4: torchvision's Resize and CenterCrop. The
    loaders of CLIPood and AlignCLIP resize with interpolation "bilinear". Other checkpoints state other
    values (docs/checkpoints.md).
    """

    image_size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"  # or "squash": to S x S, without a crop
    mean: tuple = MEAN
    std: tuple = STD

    @decoding()
    def pixels(self, image: Image.Image, rng=None) -> np.ndarray:
        """(S, S, 3) uint8; rng is not used."""
        size, short = self.image_size, min(image.size)
        # TRAP: the long side is cut to an integer, not rounded
        target = tuple(size if side == short else int(size * side / short) for side in image.size)
        target = (size, size) if self.resize_mode == "squash" else target
        if math.prod(target) + math.prod(image.size) > MAX_PIXELS + MAX_PIXELS_COSTLY:
            raise ValueError(f"{image.width}x{image.height} pixels are too long and thin to resize")
        if target != image.size:
            image = resized(image, (0, 0, *image.size), target, self.interpolation)
        # TRAP: Python's round, halves to even: 55.5 -> 56 and 0.5 -> 0
        left, top = (round((side - size) / 2) for side in target)
        image = image.crop((left, top, left + size, top + size))
        # REF: OpenAI converts last; palettes and transparency differ if the conversion is first
        return np.asarray(image.convert("RGB"))

    def __call__(self, image: Image.Image) -> Tensor:
        return normalise(self.pixels(image), self.mean, self.std)  # (3, S, S)

    def random(self, scale: tuple, flip: bool = False) -> "RandomCrop":
        """The transform of training with the same interpolation, mean and std."""
        return RandomCrop(self.image_size, scale, flip, self.interpolation, mean=self.mean, std=self.std)


preprocess = Preprocess  # the transform of evaluation under its public name: preprocess(S)(image)


def crop_box(width: int, height: int, rng, scale: tuple, ratio: tuple) -> tuple:
    """(left, top, width, height) in pixels of a random part of a picture.

    No equation; torchvision RandomResizedCrop.get_params: ten tries, then the largest centred part allowed.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1)), w, h
    w = round(height * ratio[1]) if width / height > ratio[1] else width
    h = round(width / ratio[0]) if width / height < ratio[0] else height
    return (width - w) // 2, (height - h) // 2, w, h


@dataclass(frozen=True)
class RandomCrop:
    """The transform of training: a random part of the picture as a square (torchvision's RandomResizedCrop).

    REF: Llip and open_clip crop 0.9 to 1 of the area and do not flip; that is the default.
    """

    image_size: int
    scale: tuple = (0.9, 1.0)  # share of the area
    flip: bool = False  # mirrors half of the pictures
    interpolation: str = "bicubic"
    ratio: tuple = (3 / 4, 4 / 3)  # width to height
    mean: tuple = MEAN
    std: tuple = STD

    @decoding()
    def pixels(self, image: Image.Image, rng) -> np.ndarray:
        """(S, S, 3) uint8.   Args: rng with .random() and .uniform(a, b)"""
        size, (width, height) = self.image_size, image.size
        left, top, w, h = crop_box(width, height, rng, self.scale, self.ratio)
        if image.format == "JPEG" and min(w, h) >= 2 * size:
            # SPEED: the decoder can halve the picture as long as the part stays larger than S. Edges then lie
            # between pixels, and values differ by about 1 of 255 on average. Evaluation does not do it
            image.draft("RGB", (math.ceil(width * size / w), math.ceil(height * size / h)))
            x, y = image.width / width, image.height / height
            box = (left * x, top * y, min(image.width, (left + w) * x), min(image.height, (top + h) * y))
            image = image.resize((size, size), FILTERS[self.interpolation], box)
        else:
            image = resized(image, (left, top, left + w, top + h), (size, size), self.interpolation)
        # RGB comes last, as in evaluation: a model must not see other colours in training
        image = image.convert("RGB")
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)
