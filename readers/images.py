"""From an image file to what an image tower reads: safe opening, OpenAI's transform, random crops.

Radford et al. 2021 (arXiv:2103.00020), section 2.4: a random square crop is the only augmentation. Pillow
does all decoding and resizing, so that preprocess equals OpenAI's transform bit for bit.
"""

import contextlib
import functools
import io
import math
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.text import one_line

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_IMAGE_BYTES = 64 << 20  # a larger file is refused
IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .webp .ppm .bmp .pgm .tif .tiff .gif".split())
# Formats that Pillow decodes within this process. TRAP: for EPS it starts Ghostscript, which runs the file.
FORMATS = "JPEG PNG WEBP GIF BMP PPM TIFF JPEG2000 AVIF MPO ICO TGA PCX BLP CUR DCX DDS DIB FLI FTEX GBR ICNS"
FORMATS += " IM IMT MCIDAS MSP PCD PIXAR PSD QOI SGI SUN XBM XPM XVTHUMB"
IMAGE_ERRORS = (OSError, ValueError)  # what open_image and the transforms raise for a broken image


@contextlib.contextmanager
def decoding():
    """Turns whatever Pillow raises on a broken file, such as KeyError or SyntaxError, into a ValueError."""
    try:
        yield
    except IMAGE_ERRORS:
        raise
    except Exception as error:
        raise ValueError(f"cannot decode the image: {one_line(error)}") from error


@functools.cache
def formats() -> list[str]:
    """Those of FORMATS that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS.split() if name in Image.OPEN]


def open_image(source: str | bytes) -> Image.Image:
    """An image from a path or from its bytes: opened, not yet decoded, within limits of bytes and pixels.

    An animation gives its first frame. Orientation tags are ignored, as in OpenAI's pipeline.
    Raises: ValueError or OSError: not an image, not one of FORMATS, too large, or damaged.
    """
    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{size} bytes, more than the {MAX_IMAGE_BYTES} allowed for one image")
    with decoding(), warnings.catch_warnings():
        # TRAP: up to twice MAX_IMAGE_PIXELS Pillow only warns of a decompression bomb
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats())
        if image.mode == "F":
            raise ValueError("floating-point pixels without a known range: save the image with 8 bits")
        if image.mode.startswith("I"):  # Pillow's own conversion of 16-bit grey clips it to white
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image


def normalise(pixels: np.ndarray) -> Tensor:
    """(x / 255 - mean) / std in this order: (..., S, S, 3) uint8 -> (..., 3, S, S) float32."""
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))  # (..., 3, S, S)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (MEAN, STD))
    return x.to(torch.float32).div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class Preprocess:
    """OpenAI's transform: short side to S, centre crop, RGB, normalise.

    No equation; openai/CLIP clip/clip.py _transform @d05afc4: torchvision's Resize and CenterCrop. The
    loaders of CLIPood and AlignCLIP resize with interpolation "bilinear".
    """

    image_size: int
    interpolation: str = "bicubic"

    @decoding()
    def pixels(self, image: Image.Image, rng=None) -> np.ndarray:
        """(S, S, 3) uint8; rng is not used."""
        size, short = self.image_size, min(image.size)
        # TRAP: the long side is cut to an integer, not rounded
        target = tuple(size if side == short else int(size * side / short) for side in image.size)
        if target[0] * target[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{image.width}x{image.height} pixels are too long and thin to resize")
        if target != image.size:
            image = image.resize(target, FILTERS[self.interpolation])
        # TRAP: Python's round, halves to even: 55.5 -> 56 and 0.5 -> 0
        left, top = (round((side - size) / 2) for side in target)
        image = image.crop((left, top, left + size, top + size))
        # REF: OpenAI converts last; palettes and transparency differ if the conversion is first
        return np.asarray(image.convert("RGB"))

    def __call__(self, image: Image.Image) -> Tensor:
        return normalise(self.pixels(image))  # (3, S, S)


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
        else:
            image, box = image.crop((left, top, left + w, top + h)), None
        # RGB comes last, as in evaluation: a model must not see other colours in training
        image = image.resize((size, size), FILTERS[self.interpolation], box).convert("RGB")
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)
