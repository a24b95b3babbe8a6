"""From an image file to what an image tower reads: safe opening, OpenAI's transform, random crops.

Radford et al. 2021 (arXiv:2103.00020), section 2.4: a random square crop is the only augmentation. Pillow
does all decoding and resizing, so that preprocess equals OpenAI's transform bit for bit.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from readers import limits
from util.files import open_file
from util.text import one_line, warn

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
STRIP = 1 << 20  # pixels of a large image that are copied at a time
IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .webp .ppm .bmp .pgm .tif .tiff .gif".split())
# TRAP: for EPS Pillow starts Ghostscript, which runs the file; and many old formats have slow decoders
Image.init()
FORMATS = "JPEG MPO PNG WEBP GIF BMP DIB PPM TIFF JPEG2000 AVIF ICO TGA PCX SGI".split()
# Pillow compares twice this number with all pictures within a file, as those of an icon
Image.MAX_IMAGE_PIXELS = limits.MAX_PIXELS // 2
SMALLER = "make the image smaller, or raise --max-pixels"
IMAGE_ERRORS = (OSError, ValueError)  # what open_image and the transforms raise for a broken image


@contextlib.contextmanager
def decoding():
    """Turns whatever Pillow raises on a broken file into a ValueError, and prints its warnings once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_image is stricter
        try:
            yield
        except Image.DecompressionBombError as error:
            raise ValueError(f"{one_line(error).partition(',')[0]}: {SMALLER}") from error
        except UnidentifiedImageError:
            raise OSError(f"cannot identify the image: none of {', '.join(FORMATS)}") from None
        except IMAGE_ERRORS:
            raise
        except Exception as error:
            raise ValueError(f"cannot decode the image: {one_line(error)}") from error
    for w in caught:
        warn(f"{one_line(w.message)} (printed once)", (w.filename, w.lineno))


def strips(image: Image.Image, box: tuple) -> Iterator[tuple[int, Image.Image]]:
    """The part (left, top, right, bottom) of an image, a few rows at a time, and where in it they begin."""
    left, top, right, bottom = box
    rows = max(1, STRIP // (right - left))
    for y in range(top, bottom, rows):
        yield y - top, image.crop((left, y, right, min(y + rows, bottom)))


def resized(image: Image.Image, box: tuple, size: tuple, interpolation: str) -> Image.Image:
    """image.crop(box).resize(size) to the bit, without a copy of a large image."""
    (left, top, right, bottom), kind = box, FILTERS[interpolation]
    if image.mode not in ("RGB", "RGBA", "LA") or (right - left) * (bottom - top) <= STRIP:
        whole = box == (0, 0, *image.size)
        return (image if whole else image.crop(box)).resize(size, kind)
    # Pillow multiplies colours by alpha, resizes the rows, rounds, and then resizes the columns
    mode = {"RGBA": "RGBa", "LA": "La"}.get(image.mode, image.mode)
    rows = Image.new(mode, (size[0], bottom - top))
    for y, strip in strips(image, box):
        rows.paste(strip.convert(mode).resize((size[0], strip.height), kind), (0, y))
    return rows.resize(size, kind).convert(image.mode)


def grey(image: Image.Image, data: bytes) -> Image.Image:
    """An image with integers of 16 or 32 bits as one with 8 bits; docs/data.md says which value is white."""
    box = (0, 0, *image.size)
    most = max(int(np.asarray(strip).max()) for _, strip in strips(image, box))
    white = next((usual for usual in (255, 4095, 65535) if usual >= most), most)
    if image.format == "TIFF" and image.tag_v2.get(281, (0,))[0] > 0:  # MaxSampleValue
        white = image.tag_v2[281][0]
    # TRAP: the PNG standard shifts such values to the upper bits, and then 65535 is white
    elif (bits := re.search(rb"(?s)\0{3}\x01sBIT(.)", data.partition(b"IDAT")[0])) and not most >> bits[1][0]:
        white = (1 << bits[1][0]) - 1
    text = f"grey values of more than 8 bits: 0 to {white} become black to white in the first such image"
    warn(f"{text}, and another image may get another range (docs/data.md, Images)", "grey")
    result = Image.new("L", image.size)
    for y, strip in strips(image, box):
        values = np.asarray(strip).astype(np.int64).clip(0, white) * 256 // (white + 1)
        result.paste(Image.fromarray(values.astype(np.uint8)), (0, y))
    return result


def open_image(source: str | bytes, max_pixels: int | None = None) -> Image.Image:
    """An image of a path or of bytes: opened, not yet decoded, within the limits of limits.py or max_pixels.

    An animation gives its first frame. Orientation tags are ignored, as in OpenAI's pipeline.
    Raises: ValueError or OSError: not an image, not one of FORMATS, too large, or damaged.
    """
    if not isinstance(source, bytes):
        with open_file(source) as file:
            source = file.read(limits.MAX_IMAGE_BYTES + 1)
    limits.check_count(len(source), limits.MAX_IMAGE_BYTES, "bytes")
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, (max_pixels or 0) // 2 + 1)
    with decoding():
        row_by_row, file = limits.check_file(source), limits.CountedReads(source)
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        file.left = limits.MAX_READS_PIXELS
        usual = limits.MAX_PIXELS if row_by_row and image.mode != "CMYK" else limits.MAX_PIXELS_COSTLY
        if math.prod(image.size) > (most := max_pixels or usual):
            allowed = f"more than the {most:,} allowed for this kind of {image.format}"
            raise ValueError(f"{image.width}x{image.height} pixels are {allowed}: {SMALLER}")
        if image.mode == "F":
            raise ValueError("floating-point pixels without a known range: save the image with 8 bits")
        if image.mode.startswith("I"):  # Pillow's own conversion of 16-bit grey clips it to white
            image = grey(image, source)
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
        if math.prod(target) > limits.MAX_PIXELS_COSTLY:
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
