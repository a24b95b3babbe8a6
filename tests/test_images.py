"""readers/images.py: grey ranges, limits of memory and time, broken files, orientation."""

import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from conftest import ROOT, SHARED
from PIL import Image, ImageFile, TiffImagePlugin
from reliability import pictures

import data
import evaluate
import train
from evals import surgery
from readers import images, limits
from util import text

SIZE = 16


def noise(width: int, height: int, bands: int = 3, most: int = 255) -> np.ndarray:
    shape = (height, width, bands) if bands > 1 else (height, width)
    return np.random.default_rng(0).integers(0, most + 1, shape)


def file_of(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey_file(values: np.ndarray, kind, form: str, **options) -> bytes:
    return file_of(Image.fromarray(values.astype(kind)), form, **options)


@pytest.fixture(autouse=True)
def no_notes_yet():
    text.WARNED.clear()


# Grey values of 16 and 32 bits --------------------------------------------------------------------


@pytest.mark.parametrize("most, white", [(200, 255), (3000, 4095), (60000, 65535)])
@pytest.mark.parametrize("kind, form", [("<u2", "PNG"), ("<u2", "TIFF"), ("<i4", "TIFF"), (">u2", "TIFF")])
def test_integer_grey_is_scaled_by_its_range(most, white, kind, form):
    values = noise(40, 30, 1, most)
    values[0, :2] = 0, most
    got = images.open_image(grey_file(values, kind, form))
    assert got.mode == "L"
    np.testing.assert_array_equal(np.asarray(got), values * 256 // (white + 1))


def test_values_above_16_bits_use_their_maximum_and_negative_ones_are_black():
    values = np.array([[-5, 0, 500_000, 1_000_000]])
    got = np.asarray(images.open_image(grey_file(values, "<i4", "TIFF")))
    assert got.tolist() == [[0, 0, 127, 255]]


def test_the_largest_value_that_a_tiff_names_is_white():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 1023
    values = np.array([[0, 100, 512, 1023]])
    got = np.asarray(images.open_image(grey_file(values, "<u2", "TIFF", tiffinfo=tags)))
    assert got.tolist() == [[0, 25, 128, 255]]


def with_sbit(file: bytes, bits: int) -> bytes:
    chunk = b"sBIT" + bytes([bits])
    return file[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + file[33:]


@pytest.mark.parametrize("bits, shift, white", [(10, 0, 1023), (16, 0, 65535), (12, 4, 65535)])
def test_the_bits_that_a_png_names_are_its_range(bits, shift, white):
    """With 12 bits in the upper part of 16, as the standard says, the values are larger than 4095."""
    values = noise(20, 20, 1, (1 << min(bits, 12)) - 1) << shift
    got = images.open_image(with_sbit(grey_file(values, "<u2", "PNG"), bits))
    np.testing.assert_array_equal(np.asarray(got), values * 256 // (white + 1))


def test_one_note_says_that_the_range_belongs_to_the_file(capsys):
    for most in (255, 4095):
        images.open_image(grey_file(noise(9, 9, 1, most), "<u2", "PNG"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "warning: grey values of more than 8 bits: 0 to 255" in said


# Limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "CMYK"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
def test_large_images_are_resized_in_strips_to_the_same_bits(monkeypatch, mode, size):
    image = Image.fromarray(noise(*size, 4).astype(np.uint8), "RGBA").convert(mode)
    transforms = images.Preprocess(SIZE), images.RandomCrop(SIZE, flip=True, interpolation="bilinear")
    expected = [t.pixels(image, random.Random(3)) for t in transforms]
    monkeypatch.setattr(images, "STRIP", 700)
    for transform, pixels in zip(transforms, expected):
        np.testing.assert_array_equal(transform.pixels(image, random.Random(3)), pixels)


MEASURE = """
import json, random, re, sys, time
from readers import images
# TRAP: ru_maxrss of getrusage also counts the parent process before exec
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
base, start = peak(), time.monotonic()
images.Preprocess(224).pixels(images.open_image(sys.argv[1]))
once = time.monotonic() - start
images.RandomCrop(224).pixels(images.open_image(sys.argv[1]), random.Random(0))
print(json.dumps([(peak() - base) / 1e6, once]))
"""


def measure(path) -> list:
    """Megabytes that reading an image for evaluation and training adds to a process; seconds of the first."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("this system does not report the peak of a process")
    command = [sys.executable, "-c", MEASURE, str(path)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


LARGE = {  # name: (mode, side, format, options)
    "png": ("RGBA", 9790, "PNG", dict(compress_level=1)),
    "png-16": ("I;16", 9790, "PNG", dict(compress_level=1)),
    "jpeg": ("RGB", 9790, "JPEG", dict(subsampling=0)),
    "progressive": ("RGB", 4890, "JPEG", dict(progressive=True, subsampling=0)),
    "cmyk": ("CMYK", 4890, "JPEG", dict(progressive=True)),
    "webp": ("RGBA", 4890, "WEBP", dict(method=0)),
    "jp2": ("RGBA", 4890, "JPEG2000", {}),
    "tiff": ("RGBA", 4890, "TIFF", dict(compression="tiff_lzw")),
    "avif": ("RGBA", 4890, "AVIF", dict(speed=10, subsampling="4:4:4")),
}


FAST = ("progressive", "tiff")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LARGE])
def test_an_image_within_the_limits_needs_less_than_600_mb(tmp_path, name):
    mode, side, form, options = LARGE[name]
    if form not in images.FORMATS:
        pytest.skip(f"this Pillow has no {form}")
    Image.new(mode, (side, side)).save(tmp_path / "x", form, **options)
    megabytes, seconds = measure(tmp_path / "x")
    print(name, round(megabytes), "MB", round(seconds, 1), "s")
    assert 20 < megabytes < 600 and seconds < 12


@pytest.mark.parametrize(
    "form, mode, options, limit",
    [
        ("PNG", "RGB", {}, 96),
        ("JPEG", "RGB", {}, 96),
        ("MPO", "RGB", {}, 96),
        ("JPEG", "RGB", dict(progressive=True), 24),
        ("JPEG", "CMYK", {}, 24),
        ("WEBP", "RGB", {}, 24),
        ("TIFF", "RGB", {}, 24),
        ("JPEG2000", "RGB", {}, 24),
        ("BMP", "RGB", {}, 24),
    ],
)
def test_each_format_has_its_limit(monkeypatch, form, mode, options, limit):
    monkeypatch.setattr(limits, "MAX_PIXELS", 96_000)
    monkeypatch.setattr(limits, "MAX_PIXELS_COSTLY", 24_000)
    for pixels in (limit * 1000, limit * 1000 + 100):
        file = file_of(Image.new(mode, (pixels // 100, 100)), form, **options)
        if pixels == limit * 1000:
            images.open_image(file).load()
        else:
            with pytest.raises(ValueError, match="pixels are more than the [0-9,]+ allowed .* --max-pixels"):
                images.open_image(file)


def scans_in(file: bytes) -> list[bytes]:
    """The parts of a JPEG between its scan headers."""
    return file.split(b"\xff\xda")


def test_a_jpeg_with_one_scan_for_each_component_is_costly(monkeypatch):
    """It is not marked as progressive, but the decoder keeps all coefficients."""
    head, scan = scans_in(file_of(Image.new("RGB", (64, 64)), "JPEG", subsampling=0))
    separate = b"\0\x08\x01\x01\0\0\x3f\0" + scan[12:]
    images.open_image(head + b"\xff\xda" + scan)
    monkeypatch.setattr(limits, "MAX_PIXELS_COSTLY", 4000)
    images.open_image(head + b"\xff\xda" + scan)
    with pytest.raises(ValueError, match="64x64 pixels"):
        images.open_image(head + b"\xff\xda" + separate)


def test_a_jpeg_with_very_many_scans_is_refused():
    file = file_of(Image.new("RGB", (4890, 4890)), "JPEG", progressive=True)
    images.open_image(file)
    parts = scans_in(file)
    last = b"\xff\xda" + parts[-1].removesuffix(b"\xff\xd9")
    with pytest.raises(ValueError, match="65 JPEG scans, more than the 64 allowed"):
        images.open_image(file.removesuffix(b"\xff\xd9") + last * 500 + b"\xff\xd9")


@pytest.mark.slow
def test_the_most_scans_take_bounded_time(tmp_path):
    file = file_of(Image.new("RGB", (4890, 4890)), "JPEG", progressive=True, subsampling=0)
    parts = scans_in(file)
    last = b"\xff\xda" + parts[-1].removesuffix(b"\xff\xd9")
    more = limits.MAX_JPEG_SCANS + 1 - len(parts)
    (tmp_path / "x.jpg").write_bytes(file.removesuffix(b"\xff\xd9") + last * more + b"\xff\xd9")
    megabytes, seconds = measure(tmp_path / "x.jpg")
    print("64 scans:", round(megabytes), "MB", round(seconds, 1), "s")
    assert megabytes < 600 and seconds < 12


def test_pillows_warnings_are_printed_once(monkeypatch, capsys):
    load = ImageFile.ImageFile.load

    def load_with_warning(image):
        warnings.warn("odd palette", stacklevel=1)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load_with_warning)
    for _ in range(3):
        images.Preprocess(SIZE).pixels(images.open_image(file_of(Image.new("RGB", (20, 20)), "PNG")))
    assert capsys.readouterr().err == "warning: odd palette (printed once)\n"


# What is not an image -----------------------------------------------------------------------------


def test_pipes_sockets_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        start = time.monotonic()
        for name in ("pipe.png", "s.png", "link.png", "zero.png", "."):
            with pytest.raises(ValueError, match="pipe, socket or device"):
                images.open_image(str(tmp_path / name))
    assert time.monotonic() - start < 1


@pytest.mark.skipif(SHARED is None, reason="needs the files beside the development checkout")
@pytest.mark.parametrize("pattern", ["*.bin", "eps.jpg", "icns_*", "*.jp2", "*.webp"])
def test_attacks_are_broken_images(pattern):
    for path in (SHARED / "attacks").glob(pattern):
        with pytest.raises(images.IMAGE_ERRORS) as caught:
            images.Preprocess(SIZE).pixels(images.open_image(str(path)))
        assert "\n" not in str(caught.value)


def test_a_broken_icns_is_replaced_in_training_and_named_in_evaluation(tmp_path, capsys):
    inner = b"ic07" + struct.pack(">I", 40) + b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(20)
    broken = b"icns" + struct.pack(">I", 8 + len(inner)) + inner
    (tmp_path / "broken.png").write_bytes(broken)
    rows = ["filepath,title", "broken.png,a", *(f"{k}.png,b" for k in range(20))]
    for k in range(20):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{k}.png")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    pairs = data.open_dataset(str(tmp_path / "list.csv"))
    _, index = data.Source(pairs, data.RandomCrop(SIZE)).sample(0, (0, 0), names := [])
    assert index > 0 and "broken.png: " in names[0]
    with pytest.raises(ValueError, match="cannot read .*broken.png"):
        list(data.eval_batches(pairs, data.preprocess(SIZE), 2))


# Orientation --------------------------------------------------------------------------------------


def test_pictures_of_heat_maps_are_upright(tmp_path):
    """A camera stores a picture that lies on its side and the tag 6; training does not use the tag."""
    picture, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert surgery.read_image(str(tmp_path / "a.jpg")).size == (20, 40)
    assert images.open_image(str(tmp_path / "a.jpg")).size == (40, 20)


# Costly files ------------------------------------------------------------------------------------

QUICK = ["JPEG: empty segments", "JPEG: fill bytes", "JPEG: segments after the pixels", "PNG: profiles"]
QUICK += ["PNG: profiles at the end", "PNG: texts", "GIF: one comment", "GIF: comments", "GIF: extensions"]
QUICK += ["ICO: a picture of 176 million pixels", "ICO: a bitmap of 353 million pixels", "ICO: pictures"]
QUICK += ["PPM: comments between numbers", "PPM: comments between bits", "PPM: a long header", "TIFF: strips"]
QUICK += ["TIFF: short strips", "TIFF: tags", "TIFF: a tile of a gigabyte", "AVIF: 50,000 items"]
QUICK += [
    "JPEG 2000: 65,025 tiles",
    "JPEG 2000: code blocks of 4",
    "JPEG 2000: precincts of 4",
    "JPEG 2000: precincts of 4 in a tile",
]


@pytest.mark.parametrize("name", QUICK)
def test_files_of_very_many_parts_are_refused_at_once(name):
    """Each once took seconds or gigabytes. The measurement runs in a separate process."""
    spent = pictures.cost(pictures.FILES[name]())
    assert spent["said"].startswith("ValueError") and "\n" not in spent["said"], spent
    assert spent["seconds"] < 3 and spent["megabytes"] < 150, spent


def test_ordinary_files_of_every_format_are_within_the_limits():
    """As cameras, phones and programs write them: profiles, comments, previews, a film after the image."""
    picture = Image.fromarray(noise(200, 160).astype(np.uint8))
    profile, film = b"p" * 200_000, os.urandom(20_000_000)
    jpeg = file_of(picture, "JPEG", progressive=True, icc_profile=profile, comment=b"a # comment")
    files = [jpeg + film, file_of(picture, "PNG", icc_profile=profile), file_of(picture, "MPO")]
    files += [b"P3\n# CREATOR: a program\n2 1\n255\n" + b"1 2 3 4 5 6\n"]
    files += [file_of(picture, "TIFF", compression="tiff_lzw", tiffinfo={278: 1}, icc_profile=profile)]
    files += [file_of(picture, "TIFF", big_tiff=True), file_of(picture, "AVIF", quality=50)]
    files += [
        file_of(picture, "JPEG2000", tile_size=(64, 64), codeblock_size=(32, 32), precinct_size=(64, 64))
    ]
    files += [file_of(picture, "GIF", comment=b"x" * 10_000), file_of(picture, "WEBP", icc_profile=profile)]
    files += [file_of(picture, "ICO"), file_of(picture, "BMP"), file_of(picture, "SGI")]
    for file in files:
        assert images.open_image(file).convert("RGB").getextrema() is not None


@pytest.mark.slow
def test_no_file_of_10_mb_takes_long_or_much():
    found = pictures.check()
    assert not found["failures"] and found["tried"] == len(pictures.FILES)


def test_max_pixels_lowers_and_raises_the_limits_of_every_format(monkeypatch):
    monkeypatch.setattr(limits, "MAX_PIXELS_COSTLY", 5000)
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "JPEG2000", "GIF", "ICO"):
        file = file_of(Image.new("RGB", (100, 60)), form, **({"sizes": [(100, 60)]} if form == "ICO" else {}))
        with pytest.raises(ValueError, match="more than the 5,999 allowed .* --max-pixels"):
            images.open_image(file, 5999)
        images.open_image(file, 6000).load()


@pytest.mark.parametrize("program", ["data", "training", "evaluation"])
def test_max_pixels_is_a_flag(tmp_path, capsys, program):
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(12):
        Image.new("RGB", (80, 50) if k == 3 else (20, 20)).save(folder / f"{k}.png")
    rows = [
        "filepath,title,label",
        *(f"images/{k}.png,a {'dog cat'.split()[k % 2]},{k % 2}" for k in range(12)),
    ]
    (tmp_path / "l.csv").write_text("\n".join(rows))
    flags = ["--max-pixels", "3999"]
    if program == "data":
        assert data.main([str(tmp_path / "l.csv"), "--out", str(tmp_path / "s.png"), *flags]) == 0
        said = capsys.readouterr().err
        assert "another image replaces" in said and "3.png: 80x50 pixels are more than the 3,999" in said
        return
    argv = ["--method", "clip", "--train-data", str(tmp_path / "l.csv"), "--out", str(tmp_path / "run")]
    argv += "--image-size 16 --vocab learn --batch-size 6 --steps 3 --threads 1 --device cpu".split()
    status = train.main([*argv, "--caption-key", "title", *(flags if program == "training" else [])])
    said = capsys.readouterr().err
    assert status == 0, said
    if program == "training":
        assert "another image replaces" in said and "3.png: 80x50 pixels" in said
        return
    argv = ["zeroshot", "--model", str(tmp_path / "run"), "--data", str(tmp_path / "l.csv")]
    argv += ["--label-key", "label", "--templates", "a {}"]
    assert evaluate.main(argv) == 0
    assert evaluate.main([*argv, *flags]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "3.png" in error[0] and "--max-pixels" in error[0]
