"""data.py and the files of readers/: transforms bit by bit, every format of data, exact resume."""

import io
import itertools
import json
import os
import pickle
import random
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import data
from readers import images, limits, scenes, shards
from tokenizer import Tokenizer
from util import report

SIZE = 16


def picture(seed, width=24, height=20):
    """A smooth picture of its own colour, so that JPEG keeps pictures apart."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_images(folder, names):
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(folder / name)


def write_tar(path, members, end=True):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        size = archive.offset
    if not end:
        path.write_bytes(path.read_bytes()[:size])
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.learn(["a photo of a dog", "two cats"] * 4, 520)


@pytest.fixture
def pairs(tmp_path):
    """23 pictures with 1 to 4 captions each."""
    names = [f"{k:02d}.png" for k in range(23)]
    write_images(tmp_path / "pics", names)
    captions = [[f"picture {k} text {j}" for j in range(1 + k % 4)] for k in range(23)]
    return data.Images(str(tmp_path / "pics"), names, captions=captions)


def batches(dataset, tokenizer, transform=None, **options):
    options = dict(batch_size=4, context_length=24, seed=3) | options
    return data.train_batches(dataset, tokenizer, transform or data.RandomCrop(SIZE), **options)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def assert_same(some, others):
    assert len(some) == len(others)
    for a, b in zip(some, others):
        for x, y in zip(a, b):
            assert torch.equal(x, y)


# Transforms --------------------------------------------------------------------------------------


def test_preprocess_is_openais_bit_by_bit(golden):
    arrays = np.load(golden("preprocess_small.npz"))
    numbers = [k[5:] for k in arrays if k.startswith("mode.")]
    assert len(numbers) == 14
    for n in numbers:
        x, expected = arrays[f"in.{n}.image"], arrays[f"out.{n}.rgb_uint8"]
        image = Image.frombytes(str(arrays[f"mode.{n}"]), x.shape[1::-1], x.tobytes())
        if image.mode == "P":
            image.putpalette(arrays[f"in.{n}.palette"].tobytes())
        make = data.preprocess(expected.shape[0])
        np.testing.assert_array_equal(make.pixels(image), expected, err_msg=n)
        if f"out.{n}.tensor" in arrays:
            error = make(image) - torch.from_numpy(arrays[f"out.{n}.tensor"])
            assert error.abs().max() <= 1e-6
        if f"out.{n}.bilinear_rgb_uint8" in arrays:
            bilinear = data.preprocess(expected.shape[0], "bilinear").pixels(image)
            np.testing.assert_array_equal(bilinear, arrays[f"out.{n}.bilinear_rgb_uint8"])


def test_preprocess_of_real_jpegs(shared):
    folder = shared / "data" / "clip_reference" / "preprocess"
    recorded = np.load(folder / "golden.npz")
    for name, expected in zip(recorded["names"], recorded["crops_uint8"]):
        image = images.open_image(str(folder / "images" / f"{name}.jpg"))
        np.testing.assert_array_equal(data.preprocess(224).pixels(image), expected)


def test_preprocess_refuses_a_line():
    with pytest.raises(ValueError, match="1x30000 pixels"):
        data.preprocess(224)(Image.new("L", (1, 30000)))


def test_transforms_can_be_pickled():
    image = picture(0)
    for make in (data.preprocess(SIZE), data.RandomCrop(SIZE, flip=True)):
        again = pickle.loads(pickle.dumps(make))
        one, other = (m.pixels(image, random.Random(1)) for m in (make, again))
        np.testing.assert_array_equal(one, other)


def test_crop_box_has_the_area_and_ratio_asked_for():
    rng = random.Random(0)
    boxes = [images.crop_box(640, 480, rng, (0.25, 0.5), (0.75, 4 / 3)) for _ in range(400)]
    for left, top, w, h in boxes:
        assert 0 <= left <= 640 - w and 0 <= top <= 480 - h
        assert 0.245 < w * h / (640 * 480) < 0.505 and 0.74 < w / h < 1.35
    area = np.array([w * h for _, _, w, h in boxes]) / (640 * 480)
    log_ratio = np.log([w / h for _, _, w, h in boxes])
    assert abs(area.mean() - 0.375) < 0.02 and abs(log_ratio.mean()) < 0.05  # uniform, log-uniform
    corners = [images.crop_box(9, 9, rng, (0.75, 0.8), (1, 1)) for _ in range(100)]
    assert {box[:2] for box in corners} == {(x, y) for x in (0, 1) for y in (0, 1)}


def test_crop_box_falls_back_to_the_centre():
    rng = random.Random(0)
    assert images.crop_box(400, 100, rng, (0.9, 1), (3 / 4, 4 / 3)) == (133, 0, 133, 100)
    assert images.crop_box(100, 400, rng, (0.9, 1), (3 / 4, 4 / 3)) == (0, 133, 100, 133)
    assert images.crop_box(100, 100, rng, (2, 3), (1, 1)) == (0, 0, 100, 100)


def test_random_crop_is_crop_then_resize():
    image = picture(1, 60, 50)
    left, top, w, h = images.crop_box(60, 50, random.Random(5), (0.3, 0.5), (3 / 4, 4 / 3))
    part = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    got = data.RandomCrop(SIZE, (0.3, 0.5)).pixels(image, random.Random(5))
    assert got.tobytes() == part.tobytes()
    crop = data.RandomCrop(SIZE, (1, 1), flip=True, ratio=(1.2, 1.2))
    flips = [crop.pixels(image, random.Random(s)).tobytes() for s in range(40)]
    plain = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    mirrored = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert set(flips) == {plain.tobytes(), mirrored} and 8 < flips.count(mirrored) < 32


def test_random_crop_of_a_large_jpeg_decodes_it_smaller():
    file = encoded(picture(2, 640, 480), quality=95)
    lazy, loaded = Image.open(io.BytesIO(file)), Image.open(io.BytesIO(file))
    loaded.load()
    got = data.RandomCrop(32).pixels(lazy, random.Random(7)).astype(int)
    assert lazy.size == (80, 60)
    assert np.abs(got - data.RandomCrop(32).pixels(loaded, random.Random(7))).mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode, tmp_path):
    image, form = picture(3), "TIFF" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "x", form)
    got = data.RandomCrop(SIZE, (1, 1)).pixels(images.open_image(str(tmp_path / "x")), random)
    assert got.shape == (SIZE, SIZE, 3) and 20 < got.mean() < 235 and got.std() > 5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"])
def test_a_crop_of_everything_is_what_evaluation_sees(mode):
    """Palettes, transparency and inks: training and evaluation convert to RGB in the same order."""
    rng = np.random.default_rng(4)
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)))
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    crop = data.RandomCrop(SIZE, (1, 1), ratio=(1, 1)).pixels(image, random.Random(0))
    np.testing.assert_array_equal(crop, data.preprocess(SIZE).pixels(image))
    if mode == "RGBA":  # the order matters: pixels under full transparency count less
        early = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(early, int) - crop).max() > 5


@pytest.mark.parametrize(
    "form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "ICO", "TGA", "PCX"]
)
def test_formats_that_pillow_decodes_itself_are_read(form):
    if form not in images.FORMATS:
        pytest.skip(f"this Pillow has no {form}")
    assert images.open_image(encoded(picture(0, 32, 32), form)).convert("RGB").size == (32, 32)


def test_postscript_is_never_opened():
    """TRAP: Pillow hands EPS files to Ghostscript, which executes them."""
    with pytest.raises(OSError, match="cannot identify"):
        images.open_image(encoded(picture(0), "EPS"))
    assert {"EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS"}.isdisjoint(images.FORMATS)


@pytest.mark.parametrize(
    "error", [KeyError, TypeError, RuntimeError, ZeroDivisionError, MemoryError, SyntaxError]
)
def test_whatever_pillow_raises_is_a_broken_image(pairs, tokenizer, monkeypatch, capsys, error):
    load = ImageFile.ImageFile.load
    picture(5, 25, 21).save(pairs.name(5))

    def fail(image):
        if image.size == (25, 21):
            raise error("inside a decoder")
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    used = {i for b in take(batches(pairs, tokenizer), 10) for i in b.ids.tolist()}
    assert 5 not in used and "05.png: cannot decode the image: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot read .*05.png"):
        list(data.eval_batches(pairs, data.preprocess(SIZE), 4))


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    got = data.preprocess(SIZE).pixels(images.open_image(str(tmp_path / "x.gif")))
    assert got[0, 0].tolist() == [255, 0, 0]


def test_bombs_and_huge_files_are_refused(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "x.png")
    monkeypatch.setattr(limits, "MAX_PIXELS", 400)
    with pytest.raises(ValueError, match="24x20 pixels"):
        images.open_image(str(tmp_path / "x.png"))
    monkeypatch.setattr(limits, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(ValueError, match="more than the 10 allowed"):
        images.open_image(str(tmp_path / "x.png"))


# Lists -------------------------------------------------------------------------------------------


def opened(dataset):
    return {dataset.files[i]: dataset.captions[i] for i in range(len(dataset))}


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
def test_tables_with_any_separator(tmp_path, separator):
    write_images(tmp_path, ["a.png", "b.png"])
    lines = [["filepath", "title"], ["a.png", "a dog"], ["b.png", "a cat"], ["a.png", "two dogs"]]
    (tmp_path / "t.csv").write_text("".join(separator.join(line) + "\r\n" for line in lines))
    dataset = data.open_dataset(tmp_path / "t.csv")
    assert opened(dataset) == {"a.png": ["a dog", "two dogs"], "b.png": ["a cat"]}
    assert dataset.image(1).size == (24, 20) and dataset.name(1) == str(tmp_path / "b.png")


def test_tables_keep_commas_of_captions(tmp_path):
    write_images(tmp_path, ["a.jpg"])
    text = '\ufeffimage,caption\na.jpg,One dog , two "cats"\na.jpg,"quoted, too"\na.jpg\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    want = {"a.jpg": ['One dog , two "cats"', "quoted, too"]}
    assert opened(data.open_dataset(tmp_path / "t.csv")) == want


@pytest.mark.parametrize(
    "text", ["a.jpg,one, two\n", "a.jpg#0\tone, two\n", "image_name| n| comment\na.jpg| 0| one, two"]
)
def test_flickr_lists(tmp_path, text):
    write_images(tmp_path / "flickr-images", ["a.jpg"])
    (tmp_path / "t.txt").write_text(text)
    dataset = data.open_dataset(tmp_path / "t.txt")
    assert opened(dataset) == {"a.jpg": ["one, two"]}
    assert dataset.root == str(tmp_path / "flickr-images")


def test_tables_of_classes_splits_and_domains(tmp_path):
    write_images(tmp_path, ["a.png", "b.png", "c.png"])
    text = "path,label,domain,split\na.png,big_dog,s,train\nb.png,cat,p,train\nc.png,cat,p,test\n"
    (tmp_path / "t.csv").write_text(text)
    dataset = data.open_dataset(tmp_path / "t.csv", "test")
    assert (dataset.labels, dataset.classes) == ([1], ["big dog", "cat"])
    assert (dataset.domains, dataset.domain_names) == ([0], ["p", "s"])
    assert dataset.splits == {"train": 2, "test": 1}
    as_text = data.open_dataset(tmp_path / "t.csv", caption_key="label")
    assert opened(as_text)["a.png"] == ["big_dog"]


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("x,y\n1,2\n", {}, "no image column .*; there are: x, y; --image-key names it"),
        (
            "image,y\na.png,2\n",
            {},
            r"no caption column \(any of title, .*; there are: image, y; --caption-key",
        ),
        ("image,title\na.png,t\n", {"caption_key": "z"}, r"\('z'\); there are: image, title"),
        ("image,y\na.png,2\n", {"label_key": "z"}, "no label column .*; --label-key names it"),
        ("image,title\n/etc/passwd,t\na.png,t\n", {}, "is outside .*--allow-outside"),
        ("image,title\na.png,t\nb.png,t\n", {}, r"1 of its 2 images are missing, .*b\.png; --image-root"),
        ("image,title\nb.png,t\n", {}, r"no image at .*b\.png"),
        ("image,title\na.png,\n", {}, "no caption in 1 rows"),
        ("image,title\n,dog\n", {}, "t.csv: no file name in 1 rows"),
        ("image,title\n../t.csv,dog\n", {}, r"'../t\.csv' is outside"),
        ("image,title\na.png,t\n/etc/passwd,t\n", {}, "'/etc/passwd' is outside"),
        ("image,title\na.png,t\nx/../../p,t\n", {}, r"'x/\.\./\.\./p' is outside"),
        ("image,title\na.png,t\n", {"split": "val"}, "no split 'val'; it has no splits"),
        ("image,title,split\na.png,t,dev\n", {"split": "val"}, "no split 'val'; there are: dev"),
        ("image,title\n", {}, "no rows"),
        ("", {}, "first line is empty"),
        ('image,title\na.png,"t' + "x" * 200000, {}, "row 1: .*unbalanced quote"),
        ("image,title," + "x" * 200000, {}, r"t\.csv, row 1: field larger than field limit"),
        ("image,title\na.png,t\n", {"image_root": "/nowhere"}, r"no image at /nowhere/a\.png;"),
    ],
)
def test_table_errors_say_what_is_wrong(tmp_path, text, options, message):
    folder = tmp_path / "d"
    write_images(folder, ["a.png"])
    (tmp_path / "t.csv").write_text("secret")
    (folder / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        data.open_dataset(folder / "t.csv", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["csv", "jsonl", "labels"])
def test_few_missing_images_are_skipped_wherever_they_are(tmp_path, form, capsys):
    for k in range(25, 3000):
        (tmp_path / "i").mkdir(exist_ok=True)
        (tmp_path / "i" / f"{k}.jpg").touch()
    names, path = [f"{k}.jpg" for k in range(3000)], tmp_path / f"t.{form.replace('labels', 'csv')}"
    if form == "jsonl":
        path.write_text("".join(json.dumps({"image": n, "caption": f"of {n}"}) + "\n" for n in names))
    else:
        column = "title" if form == "csv" else "label"
        path.write_text(f"image,{column}\n" + "".join(f"{n},of {n}\n" for n in names))
    dataset = data.open_dataset(path)
    assert list(dataset.files) == names[25:] and dataset.root.endswith("/i")
    text = dataset.captions[0][0] if form != "labels" else dataset.classes[dataset.labels[0]]
    assert text == "of 25.jpg"
    message = "25 of its 3000 images are missing, the first is "
    assert capsys.readouterr().err.count(message + str(tmp_path / "i" / "0.jpg")) == 1
    for k in range(200, 210):
        (tmp_path / "i" / f"{k}.jpg").unlink()
    with pytest.raises(ValueError, match="35 of its 3000 images are missing, .*0.jpg; --image-root"):
        data.open_dataset(path)


def test_null_captions_and_names_are_skipped(tmp_path, capsys):
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "t.csv").write_text("image,title\na.png,dog\nb.png,nan\n,cow\nNaN,cat\nb.png,null\n")
    records = '{"image": "a.png", "caption": "dog"}\n{"image": "b.png", "caption": null}\n'
    records += '{"image": null, "caption": "x"}\n{"image": NaN, "caption": "x"}\n'
    (tmp_path / "t.jsonl").write_text(records + '{"image": "b.png", "captions": [NaN]}\n')
    for name in ("t.csv", "t.jsonl"):
        assert opened(data.open_dataset(tmp_path / name)) == {"a.png": ["dog"]}
        err = capsys.readouterr().err
        assert "2 rows without a file name skipped" in err and "2 empty captions skipped" in err
    (tmp_path / "l.csv").write_text("image,label\na.png,null\nb.png,nan\n")  # these may be names of classes
    assert data.open_dataset(tmp_path / "l.csv").classes == ["nan", "null"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_list_with_captions_and_labels_has_both(tmp_path, form, capsys):
    write_images(tmp_path, ["a.png", "b.png", "c.png"])
    rows = [("a.png", "one", "7"), ("a.png", "two", "7"), ("b.png", "three", "10"), ("c.png", "four", "7")]

    def write(rows):
        if form == "csv":
            (tmp_path / "t.csv").write_text("f,t,l\n" + "".join(",".join(row) + "\n" for row in rows))
        else:
            lines = [json.dumps(dict(zip("ftl", (f, t, None if y == "" else y)))) for f, t, y in rows]
            (tmp_path / "t.jsonl").write_text("\n".join(lines))

    keys = dict(image_key="f", caption_key="t", label_key="l")
    write(rows)
    dataset = data.open_dataset(tmp_path / f"t.{form}", kind="labels", **keys)
    assert opened(dataset) == {"a.png": ["one", "two"], "b.png": ["three"], "c.png": ["four"]}
    assert (dataset.labels, dataset.classes) == ([0, 1, 0], ["7", "10"])
    assert data.Subset(dataset, [2, 1]).captions == [["four"], ["three"]]
    for label in ("", "10"):  # no label, or a second one: the captions are still good
        write([*rows, ("c.png", "five", label)])
        dataset = data.open_dataset(tmp_path / f"t.{form}", kind="captions", **keys)
        assert dataset.captions[2] == ["four", "five"] and not hasattr(dataset, "labels")
        assert "1 of 3 images have no label or several; no label is used" in capsys.readouterr().err
    write(rows)
    assert not hasattr(data.open_dataset(tmp_path / f"t.{form}", image_key="f", caption_key="t"), "labels")
    assert not hasattr(data.open_dataset(tmp_path / f"t.{form}", image_key="f", label_key="l"), "captions")
    with pytest.raises(ValueError, match="has no labels, which are needed here"):
        data.open_dataset(tmp_path / f"t.{form}", image_key="f", caption_key="t", kind="labels")


@pytest.mark.parametrize("missing", ["", None])
def test_a_missing_label_or_domain_is_one_line(tmp_path, missing):
    write_images(tmp_path, ["a.png", "b.png"])
    records = [{"image": "a.png", "label": "x"}, {"image": "b.png", "label": missing}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "l.csv").write_text("image,label\na.png,x\nb.png,\n")
    for name in ("l.jsonl", "l.csv"):
        with pytest.raises(ValueError, match=f"{name}: no label in 1 rows; complete them, or delete them"):
            data.open_dataset(tmp_path / name)
    (tmp_path / "l.csv").write_text("image,label,domain\na.png,x,art\nb.png,y,\n")
    with pytest.raises(ValueError, match="l.csv: no domain in 1 rows; complete them"):
        data.open_dataset(tmp_path / "l.csv")


def test_links_of_a_list_stay_inside(tmp_path):
    """A folder that a stranger packed may hold links; what they lead to must not be shown."""
    for place in ("d/a.png", "d/b.png", "secret.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    (tmp_path / "d" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "d" / "in.png").symlink_to("b.png")
    (tmp_path / "d" / "t.csv").write_text("image,title\na.png,t\nout.png,t\nin.png,t\n")
    dataset = data.open_dataset(tmp_path / "d" / "t.csv")
    assert dataset.image(0).size == dataset.image(2).size == (8, 8)
    with pytest.raises(ValueError, match="a link out of"):
        dataset.image(1)
    assert data.open_dataset(tmp_path / "d" / "t.csv", allow_outside=True).image(1).size == (8, 8)
    (tmp_path / "linked").symlink_to(tmp_path / "d")  # the folder itself may be one
    assert data.open_dataset(tmp_path / "linked" / "t.csv").image(0).size == (8, 8)


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\u202eb", "a\x00b"])
def test_messages_show_no_control_characters(tmp_path, name):
    for text in (f"{name},title\nx,y\n", f"image,title\n{name},y\n"):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(ValueError) as error:
            data.open_dataset(tmp_path / "t.csv")
        assert str(error.value).isprintable()


def test_names_of_classes_domains_and_members_print_no_control_characters(tmp_path, capsys):
    write_images(tmp_path / "d", [f"{d}/{c}/1.png" for d in ("p", "q\x1b[2J") for c in ("x\x1b[2J", "y\x07")])
    assert data.main([str(tmp_path / "d"), "--no-show"]) == 0
    member = [("a.jpg", encoded(picture(0))), ("a.txt", b"x"), ("b.\x1b[2J", b"")]
    assert data.main([write_tar(tmp_path / "a.tar", member), "--no-show"]) == 0
    out, err = capsys.readouterr()
    assert "x?[2J, y?" in out and "q?[2J" in out and "1 .?[2j" in err
    assert all(line.isprintable() for line in (out + err).splitlines())
    assert report.format_table([{"domain": "q\x1b[2J"}]).splitlines()[2] == "| q?[2J  |"


@pytest.mark.parametrize("nasty", ["\x1b[2J", "a\nb", "\ud800", "x" * 5000])
def test_messages_about_json_are_one_short_plain_line(tmp_path, nasty):
    contents = [
        {"train": [nasty, 0]},
        {nasty: 1},
        {"images": [{nasty: 1}]},
        [{nasty: 1}],
        {"train": [["a.png", 0, nasty], ["a.png", 0, "cat"]]},
        {"images": [{"filename": "a.png", "split": nasty, "sentences": []}]},
    ]
    write_images(tmp_path, ["a.png"])
    for content in contents:
        (tmp_path / "x.json").write_text(json.dumps(content))
        with pytest.raises(ValueError) as error:
            data.open_dataset(tmp_path / "x.json", split="test")
        assert str(error.value).isprintable() and len(str(error.value)) < 600, str(error.value)


def test_outside_can_be_allowed(tmp_path):
    write_images(tmp_path, ["a.png", "d/b.png"])
    (tmp_path / "d" / "t.csv").write_text("image,title\nb.png,t\n../a.png,u\n")
    dataset = data.open_dataset(tmp_path / "d" / "t.csv", allow_outside=True)
    assert dataset.image(1).size == (24, 20)
    (tmp_path / "d" / "t.csv").write_text(f"image,title\n{tmp_path}/d/b.png,t\n")  # inside anyway
    assert len(data.open_dataset(tmp_path / "d" / "t.csv")) == 1


def test_specials_and_empty_captions_are_taken_out(tmp_path, capsys):
    write_images(tmp_path, ["a.png", "b.png"])
    text = "image,title\na.png,a <|endoftext|> dog\na.png,  \nb.png,<|endoftext|>\n"
    (tmp_path / "t.csv").write_text(text)
    assert [*opened(data.open_dataset(tmp_path / "t.csv"))["a.png"][0].split()] == ["a", "dog"]
    assert "2 empty captions skipped" in capsys.readouterr().err


def test_json_lines(tmp_path):
    write_images(tmp_path / "images", ["a.png", "b.png"])
    records = [
        {"image": "images/a.png", "split": "train", "captions": ["x", "y"]},
        {"image": "images/b.png", "split": "val", "caption": "z\ud800"},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    dataset = data.open_dataset(tmp_path)  # the only list in a folder that holds no classes
    assert opened(dataset) == {"images/a.png": ["x", "y"], "images/b.png": ["z?"]}
    assert len(data.open_dataset(tmp_path, default_split="train")) == 1


def test_karpathy_json_counts_restval_as_train(tmp_path):
    write_images(tmp_path / "val2014", ["a.png", "b.png", "c.png"])
    entries = [
        {
            "filename": f"{name}.png",
            "filepath": "val2014",
            "split": split,
            "sentences": [{"raw": f"{name} one"}, {"raw": f"{name} two"}],
        }
        for name, split in (("a", "train"), ("b", "restval"), ("c", "test"))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    dataset = data.open_dataset(tmp_path / "dataset_coco.json", "train")
    assert dataset.captions == [["a one", "a two"], ["b one", "b two"]]
    assert dataset.splits == {"train": 2, "test": 1} and dataset.image(0).size == (24, 20)


def test_coco_json_beside_its_images(tmp_path):
    write_images(tmp_path / "val2014", ["a.png", "b.png"])
    content = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 5, "file_name": "b.png"}],
        "annotations": [{"image_id": 7, "caption": "x"}, {"image_id": 7, "caption": "y"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    dataset = data.open_dataset(tmp_path / "annotations" / "captions_val2014.json")
    assert opened(dataset) == {"a.png": ["x", "y"]}


def test_coop_json(tmp_path):
    write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    content = {"train": [["a.jpg", 10, "yorkshire_terrier"]], "val": [["b.jpg", 9, "abyssinian"]], "test": []}
    (tmp_path / "split_zhou_OxfordPets.json").write_text(json.dumps(content))
    dataset = data.open_dataset(tmp_path / "split_zhou_OxfordPets.json", "train")
    assert dataset.classes == ["abyssinian", "yorkshire terrier"] and dataset.labels == [1]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"images": 3}', "has the wrong form"),
        ('{"images": [{"filename": 3, "split": "x", "sentences": []}]}', "wrong form|expected"),
        ('{"train": [["a.jpg", 0]]}', "train 0: .*expected .file, number, name."),
        ('{"train": [["a", 0, "x"], ["b", 0, "y"]]}', "class 0 is 'y' and was 'x'"),
        ('{"foo": 1, "bar": 2}', "unknown JSON.*found: bar, foo"),
        ('[{"image": "a", "caption": 5}]', "record 1: captions are '5', expected text"),
        ('["a"]', "record 1: 'a', expected an object"),
        ("[" * 100000, "l.json: "),
        ("nonsense", "l.json: Expecting value"),
        ('{"images": [], "annotations": [{"image_id": 1}]}', "has the wrong form"),
        ("\udcff", "can't decode"),
    ],
)
def test_json_errors_are_one_line(tmp_path, content, message):
    (tmp_path / "l.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        data.open_dataset(tmp_path / "l.json")
    assert "\n" not in str(caught.value) and "l.json" in str(caught.value)


# Folders and splits ------------------------------------------------------------------------------


def test_folder_of_classes_in_imagefolder_order(tmp_path):
    write_images(tmp_path, ["cat/2.png", "cat/10.PNG", "big_dog/1.jpg", "Zebra/1.jpg", "cat/.x.png"])
    (tmp_path / "cat" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    dataset = data.open_dataset(tmp_path)
    assert dataset.classes == ["Zebra", "big dog", "cat"] and dataset.labels == [0, 1, 2, 2]
    assert list(dataset.files) == ["Zebra/1.jpg", "big_dog/1.jpg", "cat/10.PNG", "cat/2.png"]


def test_numeric_classes_are_in_the_order_of_numbers(tmp_path):
    write_images(tmp_path / "d", [f"{k}/1.png" for k in (10, 9, 0, 2)])
    dataset = data.open_dataset(tmp_path / "d")
    assert dataset.classes == ["0", "2", "9", "10"] and dataset.labels == [0, 1, 2, 3]
    assert dataset.files[-1] == "10/1.png"
    write_images(tmp_path / "s", [f"{s}/{k}/1.png" for s in ("train", "val") for k in (10, 9)])
    assert data.open_dataset(tmp_path / "s", "val").classes == ["9", "10"]
    (tmp_path / "d" / "t.csv").write_text("path,label\n" + "".join(f"{k}/1.png,{k}\n" for k in (10, 9, 2)))
    dataset = data.open_dataset(tmp_path / "d" / "t.csv")
    assert dataset.classes == ["2", "9", "10"] and dataset.labels == [2, 1, 0]
    write_images(tmp_path / "d", ["x/1.png"])  # one name is no number: texts
    assert data.open_dataset(tmp_path / "d").classes == ["0", "10", "2", "9", "x"]


def test_folder_of_splits(tmp_path):
    write_images(tmp_path, ["train/a/1.png", "train/b/1.png", "val/b/2.png"])
    dataset = data.open_dataset(tmp_path, "val")
    assert dataset.labels == [1] and dataset.classes == ["a", "b"] and dataset.domains is None
    with pytest.raises(ValueError, match="no split 'test'; there are: train, val"):
        data.open_dataset(tmp_path, "test")


def test_folder_of_domains(tmp_path):
    names = ["Art/dog/1.png", "Art/cat/1.png", "Real World/dog/1.png", "Real World/cat/1.png"]
    write_images(tmp_path, names)
    (tmp_path / "imagelist.txt").write_text("not a domain")
    (tmp_path / "lists").mkdir()
    dataset = data.open_dataset(tmp_path)
    assert dataset.domain_names == ["Art", "Real World"] and dataset.domains == [0, 0, 1, 1]
    assert dataset.labels == [0, 1, 0, 1] and dataset.files[0] == "Art/cat/1.png"
    write_images(tmp_path, ["Art/cow/1.png"])
    with pytest.raises(ValueError, match="there is no class 'cow' in the domain 'Real World'"):
        data.open_dataset(tmp_path)
    write_images(tmp_path, ["Flat/1.png"])
    with pytest.raises(ValueError, match="'Art' holds folders and 'Flat' images"):
        data.open_dataset(tmp_path)


def test_split_folders_inside_domain_folders(tmp_path, capsys):
    parts = [f"{d}/{s}/{c}/1.png" for d in "pq" for s in ("train", "crossval", "test", "full") for c in "34"]
    write_images(tmp_path, parts)
    dataset = data.open_dataset(tmp_path, "test")
    assert dataset.classes == ["3", "4"] and dataset.domain_names == ["p", "q"]
    assert list(dataset.files) == [f"{d}/test/{c}/1.png" for d in "pq" for c in "34"]
    assert dataset.splits == {"train": 4, "val": 4, "test": 4}
    out = capsys.readouterr().out
    assert "read as domain/split/class; 'crossval' is taken for the split val" in out and out.count("\n") == 1
    assert "'full' is left out" in out


def test_domain_folders_inside_split_folders(tmp_path):
    write_images(tmp_path, [f"{s}/{d}/{c}/1.png" for s in ("Train", "Test") for d in "pq" for c in "xyz"])
    dataset = data.open_dataset(tmp_path, default_split="test")
    assert dataset.classes == ["x", "y", "z"] and dataset.domains == [0, 0, 0, 1, 1, 1]
    assert all(file.startswith("Test/") for file in dataset.files)


@pytest.mark.parametrize("pattern", ["kfold/{}/{}/1.png", "a/b/{}/{}/1.png", "{}/images/{}/1.png"])
def test_one_folder_level_too_many(tmp_path, pattern, capsys):
    write_images(tmp_path, [pattern.format(d, c) for d in ("art", "photo") for c in ("cat", "dog")])
    dataset = data.open_dataset(tmp_path)
    assert dataset.classes == ["cat", "dog"] and dataset.domain_names == ["art", "photo"]
    assert dataset.labels == [0, 1, 0, 1] and dataset.domains == [0, 0, 1, 1] and dataset.image(3)
    assert ("is read" in capsys.readouterr().out) == (not pattern.startswith("{"))


@pytest.mark.parametrize(
    "train, test, more",
    [
        ("Train", "Test", "unlabeled/7.png"),
        ("training_set", "test_set", "extra/x/7.png"),
        ("seg_train/seg_train", "seg_test/seg_test", "seg_pred/seg_pred/7.png"),
        ("train2017", "testing", "validation/x/7.png"),
        ("data/train", "data/test", "data/unlabeled/images/7.png"),
    ],
)
def test_other_names_of_splits(tmp_path, train, test, more, capsys):
    """Training images that count as test images would give a score that is too high, without a sign."""
    write_images(tmp_path, [f"{s}/{c}/{k}.png" for s in (train, test) for c in "xy" for k in (1, 2)] + [more])
    dataset = data.open_dataset(tmp_path, default_split="test")
    assert list(dataset.files) == [f"{test}/{c}/{k}.png" for c in "xy" for k in (1, 2)]
    assert dataset.classes == ["x", "y"] and dataset.domains is None and dataset.image(0)
    assert {"train": 4, "test": 4}.items() <= dataset.splits.items()
    assert f"{tmp_path}: read as split/class; " in capsys.readouterr().out


def test_folders_of_img2dataset(tmp_path, capsys):
    """Its two formats: tars beside other files, and images with texts beside them in numbered folders."""
    shard_files(tmp_path, 2)
    for k in range(2):
        (tmp_path / f"0000{k}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"0000{k}_stats.json").write_text("{}")
    assert len(data.open_dataset(tmp_path)) == 10
    names = [f"0000{s}/{s}{k:02d}.jpg" for s in range(2) for k in range(10)]
    write_images(tmp_path / "files", names)
    for name in names[:-1]:
        (tmp_path / "files" / name).with_suffix(".txt").write_text(f"of {name}\n")
        (tmp_path / "files" / name).with_suffix(".json").write_text("{}")
    dataset = data.open_dataset(tmp_path / "files", default_split="train")
    assert opened(dataset) == {name: [f"of {name}"] for name in names[:-1]}
    said = capsys.readouterr()
    assert "a caption in the .txt of the same name" in said.out and "1 empty captions skipped" in said.err
    assert len(data.open_dataset(tmp_path / "files" / "00000")) == 10
    for name in names[:3]:
        (tmp_path / "files" / name).with_suffix(".txt").unlink()
    assert data.open_dataset(tmp_path / "files").classes == ["00000", "00001"]  # too few texts


def test_image_lists_with_numbers(tmp_path):
    """DomainNet and Office-Home come with lists of lines `file number`."""
    write_images(tmp_path, ["d/a.jpg", "d/b.jpg"])
    (tmp_path / "t.txt").write_text("d/a.jpg 10\nd/b.jpg 2\n")
    dataset = data.open_dataset(tmp_path / "t.txt")
    assert dataset.classes == ["2", "10"] and dataset.labels == [1, 0]


def test_linked_class_folders_are_followed(tmp_path):
    write_images(tmp_path, [f"store/{c}/1.png" for c in "xy"])
    (tmp_path / "d" / "p").mkdir(parents=True)
    for c in "xy":
        (tmp_path / "d" / "p" / c).symlink_to(tmp_path / "store" / c)
    (tmp_path / "d" / "circle").mkdir()
    (tmp_path / "d" / "circle" / "up").symlink_to(tmp_path / "d" / "circle")
    assert data.open_dataset(tmp_path / "d").classes == ["x", "y"]


def test_folders_in_a_circle_and_very_deep_folders(tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "d", [f"{c}/1.png" for c in "xy"])
    for c in "xy":
        (tmp_path / "d" / c / "up").symlink_to(tmp_path / "d" / c)
        (tmp_path / "d" / c / "inner").mkdir()
        picture(3).save(tmp_path / "d" / c / "inner" / "2.png")  # ImageFolder reads these too
    files = data.open_dataset(tmp_path / "d").files
    assert list(files) == [f"{c}/{n}.png" for c in "xy" for n in ("1", "inner/2")]
    monkeypatch.chdir(tmp_path / "d" / "x")
    for _ in range(1500):
        os.mkdir("e")
        os.chdir("e")
    assert len(data.open_dataset(tmp_path / "d")) == 4
    assert "folders more than 8 levels deep are not read" in capsys.readouterr().err
    for _ in range(1500):  # pytest's own cleaning is recursive
        os.chdir("..")
        os.rmdir("e")


def test_classes_with_names_of_splits_are_classes(tmp_path):
    write_images(tmp_path / "d", [f"{d}/{c}/1.png" for d in "pq" for c in ("bus", "train")])
    assert data.open_dataset(tmp_path / "d").classes == ["bus", "train"]
    assert data.open_dataset(tmp_path / "d" / "p").classes == ["bus", "train"]


def test_unknown_paths_say_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="no images found; looked for class/.*0 of .csv"):
        data.open_dataset(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such file"):
        data.open_dataset(tmp_path / "nowhere")
    (tmp_path / "x.xlsx").write_text("")
    with pytest.raises(ValueError, match="unknown format '.xlsx'; known: .csv"):
        data.open_dataset(tmp_path / "x.xlsx")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="no images found; .*docs/data.md converts parquet"):
        data.open_dataset(tmp_path / "p")
    for path in (tmp_path / "x.parquet", "pipe:cat x.tar", "a.tar::s3://b/{0..3}.tar", "https://h/a.csv"):
        with pytest.raises(ValueError, match="not a list or folder on this disk; docs/data.md converts"):
            data.open_dataset(path)


def test_scenes_are_opened_by_name():
    dataset = data.open_dataset("scenes", "val")
    assert dataset.split == "val" and dataset.captions and data.open_dataset("objects").classes


def test_domainbed_splits(golden):
    for ref in json.loads(golden("domainbed_splits.json").read_text())["splits"]:
        trial, env, *part = ref["seed_args"]
        train, holdout = data.domainbed_split(
            ref["n"], env, ref["holdout_fraction"], trial, part[0] if part else None
        )
        assert holdout == ref["holdout_keys"] and len(train) == ref["n_rest"]
        assert sum((j + 1) * i for j, i in enumerate(train)) == ref["rest_keys_sum_weighted"]


def test_base_and_new_classes():
    assert data.base_new_classes(5) == ([0, 1, 2], [3, 4])
    assert [len(half) for half in data.base_new_classes(65, "down")] == [32, 33]


def test_subset_renumbers_classes(tmp_path):
    names = [f"{d}/{c}/{k}.png" for d in "ab" for c in "xyz" for k in range(2)]
    write_images(tmp_path, names)
    full = data.open_dataset(tmp_path)
    some = data.Subset(full, range(2, 12), classes=[2, 0])
    assert some.classes == ["z", "x"] and some.labels == [0, 0, 1, 1, 0, 0]
    assert some.domains == [0, 0, 1, 1, 1, 1] and some.name(0) == full.name(4)
    assert len(data.Subset(full, classes=[])) == 0
    held = scenes.Scenes(size=4, image_size=SIZE)
    part = data.Subset(held, [3, 1])
    assert part.captions == [held.captions[3], held.captions[1]]
    np.testing.assert_array_equal(part.pixels, held.pixels[[3, 1]])


# Shards ------------------------------------------------------------------------------------------


def shard_files(folder, count=3, each=5):
    for s in range(count):
        members = []
        for k in range(each):
            stem = f"part/{s}{k:03d}.x"
            members += [
                (stem + ".jpg", encoded(picture(100 * s + k))),
                (stem + ".json", json.dumps({"caption": "from json", "width": 24}).encode()),
                (stem + ".txt", f"shard {s} image {k}".encode()),
            ]
        write_tar(folder / f"{s:05d}.tar", members)
    return str(folder / f"{{00000..{count - 1:05d}}}.tar")


def test_shard_names_expand():
    assert shards.expand_shards("a/{08..10}.tar::b.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "b.tar"]
    assert shards.expand_shards("{0..1}{2..3}") == ["02", "03", "12", "13"]
    with pytest.raises(ValueError, match="a range is empty"):
        shards.expand_shards("{3..1}.tar")


def test_shard_names_with_lists_and_globs(tmp_path):
    for name in ("a", "b", "c0"):
        members = [(f"{name}.gif", encoded(picture(0), "GIF")), (f"{name}.txt", b"x")]
        write_tar(tmp_path / f"{name}.tar", members)
    for spec in ("{a,b,c0}.tar", "*.tar", "{a.tar,b.tar,c0.tar}", "{a,[bc]*}.tar"):
        dataset = data.open_dataset(f"{tmp_path}/{spec}")
        assert [dataset.name(i)[-2:] for i in range(3)] == [":a", ":b", "c0"] and len(dataset) == 3
    with pytest.raises(ValueError, match=r"x\*\.tar: no such tar shard"):
        data.open_dataset(f"{tmp_path}/x*.tar")
    for spec in ("{0..999999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(ValueError, match="more than 1000000 shards; correct it"):
            data.open_dataset(spec)


def test_lines_of_shards_are_captions(tmp_path, capsys):
    """CLIP_benchmark's exporter writes one caption per line, without a mark that says so."""
    images = [(f"{k}.jpg", encoded(picture(k))) for k in range(10)]
    texts = [(f"{k}.txt", b"a dog\n\na cat \n" if k else b"one") for k in range(10)]
    dataset = data.open_dataset(write_tar(tmp_path / "a.tar", images + texts))
    assert dataset.captions[3] == ["a dog", "a cat"] and dataset.captions[0] == ["one"]
    assert (
        "9 of the first 10 .txt members have several lines: each line is a caption" in capsys.readouterr().out
    )
    dataset = data.open_dataset(tmp_path / "a.tar", caption_lines="no")
    assert dataset.captions[3] == ["a dog\n\na cat"] and not capsys.readouterr().out
    texts[1] = ("1.txt", b"two")
    dataset = data.open_dataset(write_tar(tmp_path / "b.tar", images + texts))
    assert dataset.captions[3] == ["a dog\n\na cat"] and not capsys.readouterr().out
    assert data.open_dataset(tmp_path, caption_lines="yes").captions[3] == ["a dog", "a cat"]
    write_images(tmp_path / "files", ["0.jpg", "1.jpg"])
    for k in range(2):
        (tmp_path / "files" / f"{k}.txt").write_text("a dog\na cat\n")
    assert data.open_dataset(tmp_path / "files").captions[1] == ["a dog\na cat"]
    assert data.open_dataset(tmp_path / "files", caption_lines="yes").captions[1] == ["a dog", "a cat"]


def test_shards_with_labels(tmp_path, capsys):
    members = [(f"{k}.png", encoded(picture(k), "PNG")) for k in range(3)]
    members += [(f"{k}.cls", str(10 - k).encode()) for k in range(3)] + [("0.npy", b""), ("1.npy", b"")]
    dataset = data.open_dataset(write_tar(tmp_path / "a.tar", members))
    assert dataset.classes == ["8", "9", "10"] and dataset.labels == [2, 1, 0]
    assert not hasattr(dataset, "captions") and "classes   3" in data.describe(dataset)
    assert "warning: " in (err := capsys.readouterr().err) and "other kinds skipped: 2 .npy" in err
    dataset = data.open_dataset(write_tar(tmp_path / "b.tar", members + [("0.txt", b"x"), ("2.txt", b"z")]))
    assert [*dataset.captions] == [["x"], ["z"]] and dataset.labels == [1, 0]
    assert "1 images without a caption and label skipped" in capsys.readouterr().err


def test_the_last_copy_of_a_member_counts(tmp_path):
    old, new = encoded(picture(0)), encoded(picture(1, 30, 30))
    members = [("a.jpg", old), ("a.txt", b"old"), ("b.jpg", old), ("b.txt", b"b")]
    dataset = data.open_dataset(
        write_tar(tmp_path / "a.tar", members + [("./a.jpg", new), ("a.txt", b"new")])
    )
    assert dataset.captions[0] == ["new"] and dataset.image(0).size == (30, 30) and len(dataset) == 2


def test_shards_are_map_style(tmp_path):
    dataset = data.open_dataset(shard_files(tmp_path))
    assert len(dataset) == 15
    assert dataset.captions[7] == ["shard 1 image 2"] and len(dataset.captions) == 15
    assert dataset.name(7) == f"{tmp_path}/00001.tar:part/1002.x"
    assert dataset.image(7).tobytes() == Image.open(io.BytesIO(encoded(picture(102)))).tobytes()
    assert [*data.open_dataset(tmp_path).captions] == [*dataset.captions]  # a folder of shards
    assert pickle.loads(pickle.dumps(dataset)).captions[3] == dataset.captions[3]
    with pytest.raises(ValueError, match="shards have no splits; leave out 'val'"):
        data.open_dataset(str(tmp_path / "00000.tar"), "val")


def test_shards_accept_json_and_skip_what_is_no_sample(tmp_path, capsys):
    jpeg = encoded(picture(0))
    link = tarfile.TarInfo("l.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        ("../../up.jpg", jpeg),
        ("../../up.json", b'{"captions": ["one", "two", 3]}'),
        ("no_caption.jpg", jpeg),
        ("bad.jpg", jpeg),
        ("bad.json", b"[1"),
        ("._a.jpg", b"junk"),
        ("._a.txt", b"junk"),
        ("empty.jpg", jpeg),
        ("empty.txt", b" \n"),
        ("l.txt", b"link"),
        ("long.jpg", jpeg),
        ("long.txt", b"x" * (shards.MAX_TEXT_BYTES + 1)),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as archive:
        archive.addfile(link)
    dataset = data.open_dataset(path)
    assert len(dataset) == 1 and dataset.captions[0] == ["one", "two"]
    assert "4 images without a caption skipped" in capsys.readouterr().err


def test_shard_index_is_remembered_and_checked(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", encoded(picture(0))), ("a.txt", b"old")])
    assert data.open_dataset(path).captions[0] == ["old"]
    scans, scan = [], shards.scan_members
    monkeypatch.setattr(shards, "scan_members", lambda p: scans.append(p) or scan(p))
    assert data.open_dataset(path).captions[0] == ["old"] and not scans
    write_tar(tmp_path / "a.tar", [("b.txt", b"newer"), ("b.jpg", encoded(picture(1, 90, 90)))])
    assert data.open_dataset(path).captions[0] == ["newer"] and len(scans) == 1
    for idx in (tmp_path / "cache").rglob("*.idx"):
        idx.write_text("{")
    assert len(data.open_dataset(path)) == 1 and len(scans) == 2


def test_names_of_samples_read_an_index_once(tmp_path, monkeypatch):
    dataset, read, index = data.open_dataset(shard_files(tmp_path)), [], shards.index_shard
    monkeypatch.setattr(shards, "index_shard", lambda *args: read.append(args[0]) or index(*args))
    assert [dataset.name(i)[-11:] for i in (0, 7, 14, 2)] == [
        f"part/{k}.x" for k in ("0000", "1002", "2004", "0002")
    ]
    assert len([dataset.name(i) for i in range(15)]) == 15 and len(read) == 3


def test_a_shard_that_is_written_again_during_a_run_is_named(tmp_path, tokenizer):
    """The positions of its members are then wrong, and another text would be the caption."""
    dataset = data.open_dataset(shard_files(tmp_path, count=1))
    steps = batches(dataset, tokenizer)
    next(steps)
    content = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(content[1024:] + bytes(1024))
    os.utime(tmp_path / "00000.tar", (1, 1))
    with pytest.raises(ValueError, match="00000.tar: the shard was written again since it was opened"):
        dataset.captions[0]
    with pytest.raises(ValueError, match="the shard was written again"):
        take(steps, 20)


def pax(key, value, rest=b""):
    """A pax header with one record, and blocks that follow it."""
    size = len(f" {key}={value}\n")
    while len(f"{size} {key}={value}\n") != size:
        size += 1
    text = f"{size} {key}={value}\n".encode()
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT) + text + bytes(-size % 512) + rest


@pytest.mark.parametrize("kind", ["long names", "long name", "pax chain", "map", "size", "realsize", "2^62"])
def test_hostile_tar_headers_are_one_line(tmp_path, kind):
    """Thousands of long names, sparse members with false sizes: recursion and overflow inside tarfile."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**40 if kind == "long name" else 5
    name = info.tobuf(tarfile.GNU_FORMAT) + b"abcd".ljust(512, b"\0")
    headers = {"long names": 3000 * name, "long name": name, "pax chain": 3000 * pax("path", "x.jpg")}
    headers |= {"map": pax("GNU.sparse.map", "0,x"), "size": pax("size", "9" * 25)}
    headers |= {"realsize": pax("GNU.sparse.major", "1", pax("GNU.sparse.realsize", "8" * 30))}
    info = tarfile.TarInfo("a.jpg")
    info.size = 2**62 if kind == "2^62" else 512
    content = headers.get(kind, b"") + info.tobuf(tarfile.GNU_FORMAT) + b"1" * 512 + bytes(1024)
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"a\.tar: truncated or damaged tar, the last good member is"
    ) as error:
        data.open_dataset(tmp_path / "a.tar")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize("source", ["csv", "json", "tar", "files"])
def test_captions_of_every_source_are_cut(tmp_path, source):
    text = "dog " * shards.MAX_CAPTION
    write_images(tmp_path, ["a.jpg"])
    path = tmp_path / f"t.{source}"
    if source == "csv":
        path.write_text(f"image,caption\na.jpg,{text}\n")
    elif source == "json":
        path.write_text(json.dumps([{"image": "a.jpg", "captions": ["short", text]}]))
    elif source == "tar":
        write_tar(path, [("a.jpg", encoded(picture(0))), ("a.txt", text.encode())])
    else:
        (tmp_path / "a.txt").write_text(text)
        path = tmp_path
    assert data.open_dataset(path).captions[0][-1] == text[: shards.MAX_CAPTION].strip()


@pytest.mark.parametrize("cut", ["payload", "boundary", "header", "negative", "gzip", "empty"])
def test_damaged_shards_name_file_and_member(tmp_path, cut):
    jpeg = encoded(picture(0))
    members = [("a.jpg", jpeg), ("a.txt", b"x"), ("b.jpg", jpeg), ("b.txt", b"y")]
    path = write_tar(tmp_path / "cut.tar", members, end=cut != "boundary")
    content = bytearray((tmp_path / "cut.tar").read_bytes())
    second = content.index(b"b.jpg")
    if cut == "payload":
        content = content[: second + 600]
    elif cut == "header":
        content[second + 100 : second + 400] = b"\xff" * 300
    elif cut == "negative":
        info = tarfile.TarInfo("b.jpg")
        info.size = -1024
        content[second : second + 512] = info.tobuf(tarfile.GNU_FORMAT)
    elif cut == "gzip":
        path = str(tmp_path / "cut.tar.gz")
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "cut.tar")
    elif cut == "empty":
        content = b""
    (tmp_path / "cut.tar").write_bytes(content)
    last = {"boundary": "b.txt", "payload": "b.jpg", "gzip": "none", "empty": "none"}
    with pytest.raises(ValueError, match="truncated or damaged tar") as caught:
        data.open_dataset(path)
    assert path in str(caught.value) and f"{last.get(cut, 'a.txt')!r}" in str(caught.value)
    assert ("decompressed first" in str(caught.value)) == (cut == "gzip")


def test_shards_without_samples_or_missing(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.cls", b"1")])
    with pytest.raises(ValueError, match=r"a.tar: no samples; looked for NAME\.jpg"):
        data.open_dataset(path)
    with pytest.raises(ValueError, match="b.tar: no such tar shard"):
        data.open_dataset(str(tmp_path / "{a..b}.tar").replace("{a..b}", "b"))


def test_oversized_members_are_broken_images(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", encoded(picture(0))), ("a.txt", b"x")])
    dataset = data.open_dataset(path)
    monkeypatch.setattr(limits, "MAX_IMAGE_BYTES", 50)
    with pytest.raises(ValueError, match="more than the 50 allowed"):
        dataset.image(0)


def test_epoch_order_of_shards_stays_within_windows(tmp_path):
    dataset = data.Shards(shard_files(tmp_path, count=6, each=4))
    dataset.window = 2
    orders = [dataset.epoch_order(np.random.default_rng((0, e))) for e in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    for order in orders:
        assert sorted(order) == list(range(24))
        windows = [set(dataset.table[order[k : k + 8], 0]) for k in (0, 8, 16)]
        assert all(len(w) == 2 for w in windows)
    assert any((np.diff(dataset.table[orders[0][:8], 0]) != 0)[[0, 1, 2, 4, 5, 6]])  # mixed inside


def test_more_workers_than_shards(tmp_path, tokenizer):
    dataset = data.open_dataset(shard_files(tmp_path, count=1))
    alone = take(batches(dataset, tokenizer), 3)
    assert_same(take(batches(dataset, tokenizer, workers=2), 3), alone)


# Training batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(pairs, tokenizer, workers):
    whole = take(batches(pairs, tokenizer), 12)  # 5 steps an epoch: two epochs and a bit
    assert_same(take(batches(pairs, tokenizer, start_step=7, workers=workers), 5), whole[7:])
    assert whole[0].images.shape == (4, 3, SIZE, SIZE) and whole[0].tokens.shape == (4, 24)


def test_ranks_share_one_global_batch(pairs, tokenizer):
    alone = take(batches(pairs, tokenizer), 6)
    for world in (2, 4):
        ranks = [take(batches(pairs, tokenizer, rank=r, world=world), 6) for r in range(world)]
        assert_same([tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks)], alone)


def test_workers_do_not_touch_the_global_random_state(pairs, tokenizer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(batches(pairs, tokenizer, workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_do_not_mix_and_differ(pairs, tokenizer):
    steps = batches(pairs, tokenizer)  # 5 an epoch
    epochs = [[b.ids.tolist() for b in take(steps, 5)] for _ in range(3)]
    for epoch in epochs:
        assert len(set(sum(epoch, []))) == 20  # no image twice, three left out
    assert epochs[0] != epochs[1] != epochs[2]
    other = take(batches(pairs, tokenizer, seed=4), 5)
    assert [b.ids.tolist() for b in other] != epochs[0]


def test_all_captions_are_seen_in_as_many_epochs(pairs, tokenizer):
    source = batches(pairs, tokenizer).source
    firsts = set()
    for i in range(len(pairs)):
        texts = pairs.captions[i]
        n = len(texts)
        for start in (0, 5):
            shown = [source.caption(i, epoch) for epoch in range(start, start + n)]
            assert sorted(shown) == sorted(texts)
        if n == 4:
            firsts.add(texts.index(source.caption(i, 0)))
    assert len(firsts) > 1  # not the same one of every image


def test_tokens_belong_to_the_image(pairs, tokenizer):
    for batch in take(batches(pairs, tokenizer), 6):
        for row, i in zip(batch.tokens, batch.ids.tolist()):
            assert any(torch.equal(row, tokenizer([t], 24)[0]) for t in pairs.captions[i])


def test_crops_differ_between_epochs_and_can_be_switched_off(pairs, tokenizer):
    def images_of(sample, **options):
        steps = take(batches(pairs, tokenizer, **options), 15)
        return [b.images[b.ids.tolist().index(sample)] for b in steps if sample in b.ids.tolist()]

    sample = next(batches(pairs, tokenizer)).ids[0].item()
    first, second, *_ = images_of(sample)
    assert not torch.equal(first, second)
    first, second, *_ = images_of(sample, transform=data.preprocess(SIZE))
    assert torch.equal(first, second)
    assert torch.equal(first, data.preprocess(SIZE)(pairs.image(sample)))
    crop = data.RandomCrop(SIZE, (0.2, 0.3))
    assert not torch.equal(images_of(sample, transform=crop)[0], images_of(sample)[0])


def test_each_caption_is_tokenised_once(pairs, tokenizer, monkeypatch):
    asked = Counter()

    def counting(texts, context_length):
        asked.update(texts)
        return tokenizer(texts, context_length)

    take(batches(pairs, counting), 40)
    assert len(asked) > 40 and max(asked.values()) == 1
    tokens = data.Tokens(tokenizer, 24)
    monkeypatch.setattr(data, "TOKEN_CACHE", 3)
    for texts in (["a", "b"], ["b", "c", "d"], ["a", "b", "c", "d", "e"]):
        assert torch.equal(tokens(texts), tokenizer(texts, 24)) and len(tokens.cache) <= 5


def test_sources_travel_to_spawned_workers(pairs, tokenizer):
    source = batches(pairs, tokenizer).source
    assert_same([pickle.loads(pickle.dumps(source))[9][0]], [source[9][0]])


def test_sizes_that_do_not_fit_are_named(pairs, tokenizer):
    with pytest.raises(ValueError, match="23 images are fewer than one batch of 24"):
        batches(pairs, tokenizer, batch_size=24)
    with pytest.raises(ValueError, match="global batch 4 is not divisible by 3 ranks"):
        batches(pairs, tokenizer, world=3)


class Held:
    """A data set in memory; decoding one of its pictures is an error."""

    pixels = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8)
    captions = [[f"t {k}"] for k in range(9)]

    def __len__(self):
        return 9

    def image(self, i):
        raise AssertionError("decoded")


def test_pixels_in_memory_are_not_decoded(tokenizer):
    batch = next(batches(Held(), tokenizer, data.preprocess(SIZE)))
    for row, i in zip(batch.images, batch.ids.tolist()):
        assert torch.equal(row, data.preprocess(SIZE)(Image.fromarray(Held.pixels[i])))
    x, ids = next(data.eval_batches(Held(), data.preprocess(SIZE), 4))
    assert torch.equal(x, data.normalise(Held.pixels[:4])) and ids.tolist() == [0, 1, 2, 3]
    for transform in (data.preprocess(8), data.RandomCrop(SIZE)):  # another size, a crop: through Pillow
        with pytest.raises(AssertionError, match="decoded"):
            next(batches(Held(), tokenizer, transform))


# Broken images -----------------------------------------------------------------------------------


def damage(dataset, numbers):
    for k, i in enumerate(numbers):
        with open(dataset.name(i), "r+b") as file:
            file.truncate((0, 30, 120)[k % 3])  # empty, no header to speak of, cut in the pixels


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_replaced_counted_and_named(pairs, tokenizer, workers, capsys):
    damage(pairs, [3, 8, 11])
    steps = batches(pairs, tokenizer, workers=workers)
    got = take(steps, 5)
    assert 1 <= steps.broken_count <= 3 + 2 and pairs.root in steps.broken[0]
    assert capsys.readouterr().err.count("another image replaces") == len(steps.broken)
    used = {i for b in got for i in b.ids.tolist()}
    assert not used & {3, 8, 11}
    assert_same(take(batches(pairs, tokenizer), 5), got)
    for batch in got:  # caption and id are those of the replacement
        for row, i in zip(batch.tokens, batch.ids.tolist()):
            assert any(torch.equal(row, tokenizer([t], 24)[0]) for t in pairs.captions[i])


def test_more_than_one_percent_broken_stops_the_run(pairs, tokenizer):
    damage(pairs, [3])
    steps = batches(pairs, tokenizer)
    with pytest.raises(ValueError, match=r"11 of \d+ images cannot be read, more than 1 %; the first"):
        take(steps, 100)
    assert len(steps.broken) == 10
    assert next(steps, None) is None  # it is over, and the workers are gone
    steps = batches(pairs, tokenizer)
    steps.seen = 10**6  # eleven in a million are no reason
    take(steps, 100)
    assert steps.broken_count > 10


def test_all_broken_is_one_line(pairs, tokenizer):
    damage(pairs, range(23))
    for workers in (0, 1):
        with pytest.raises(ValueError, match="ten images in a row") as caught:
            next(batches(pairs, tokenizer, workers=workers))
        assert "\n" not in str(caught.value)


# Evaluation and fine-tuning ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches_are_every_image_once_in_order(pairs, workers):
    make = data.preprocess(SIZE)
    ids, rows = [], []
    for rank in range(3):
        steps = data.eval_batches(pairs, make, 3, rank, 3, workers if rank == 1 else 0)
        got = list(steps)
        assert len(got) == 3
        rows += [x for x, _ in got]
        ids += sum((i.tolist() for _, i in got), [])
    assert ids == list(range(23))
    assert torch.equal(torch.cat(rows), torch.stack([make(pairs.image(i)) for i in ids]))
    assert list(data.eval_batches(pairs, make, 3, 0, 30)) == []  # more ranks than images


def test_eval_names_a_broken_image(pairs):
    damage(pairs, [5])
    with pytest.raises(ValueError, match=r"cannot read .*05\.png") as caught:
        list(data.eval_batches(pairs, data.preprocess(SIZE), 4, workers=1))
    assert "\n" not in str(caught.value)


@pytest.fixture
def labelled(tmp_path):
    names = [f"{d}/{c}/{k}.png" for d in "pqr" for c in "xy" for k in range(3 + (d == "q"))]
    write_images(tmp_path / "domains", names)
    return data.open_dataset(tmp_path / "domains")


def test_domain_batches(labelled):
    make = dict(transform=data.RandomCrop(SIZE, (0.7, 1.0), True, "bilinear"), batch_size=4, seed=2)
    alone = take(data.domain_batches(labelled, **make), 6)
    for images_, labels, ids, _ in alone:
        assert images_.shape == (12, 3, SIZE, SIZE)
        assert labels.tolist() == [labelled.labels[i] for i in ids.tolist()]
        assert [labelled.domains[i] for i in ids.tolist()] == [0] * 4 + [1] * 4 + [2] * 4
    drawn = Counter(i for b in alone for i in b.ids.tolist())
    assert max(drawn.values()) > 1 and len(drawn) > 15  # with replacement, from all of them
    assert_same(take(data.domain_batches(labelled, **make, start_step=2, workers=1), 4), alone[2:])
    ranks = [take(data.domain_batches(labelled, **make, rank=r, world=2), 6) for r in range(2)]
    assert_same([tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks)], alone)
    with pytest.raises(ValueError, match="batch of 3 x 3 images is not divisible by 2 ranks"):
        data.domain_batches(labelled, **make | {"batch_size": 3}, world=2)


def test_domain_batches_of_some_domains_flip(labelled):
    some = data.Subset(labelled, [i for i, d in enumerate(labelled.domains) if d != 1])
    crop = data.RandomCrop(SIZE, (0.7, 1.0), True)
    batch = next(data.domain_batches(some, crop, batch_size=5))
    assert {some.domains[i] for i in batch.ids.tolist()} == {0, 2}
    one = data.Subset(labelled, [0])
    one.domains = None
    x = next(data.domain_batches(one, crop, batch_size=16)).images.mean(1)
    ramp = torch.linspace(-1, 1, SIZE)
    assert len({bool(v) for v in (x * ramp).mean((1, 2)) > 0}) == 2  # both ways round
    plain = data.preprocess(SIZE, "bilinear")
    assert torch.equal(next(data.domain_batches(one, plain, batch_size=2)).images[0], plain(one.image(0)))


# Command line ------------------------------------------------------------------------------------


def test_show_prints_and_draws(tmp_path, capsys):
    write_images(tmp_path / "d", ["a/1.png", "b/1.png", "b/2.png"])
    assert data.main([str(tmp_path / "d"), "--show", "--out", str(tmp_path / "s.png")]) == 0
    printed = capsys.readouterr().out
    assert "images    3" in printed and "2, images per class: min 1  mean 1.50  max 2" in printed
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width == 3 * 134 and sheet.height > 128
    (tmp_path / "d" / "l.csv").write_text("image,title\na/1.png,dog \u72ac\na/1.png,cat\n")
    assert data.main([str(tmp_path / "d" / "l.csv"), "--out", str(tmp_path / "s.png")]) == 0
    assert "captions  2, per image: min 2  mean 2.00  max 2" in capsys.readouterr().out


def test_the_flags_of_lists_reach_the_reader(tmp_path, capsys):
    write_images(tmp_path / "p", ["a.png", "b.png"])
    (tmp_path / "t.csv").write_text("img_path,species\na.png,dog\nb.png,cat\n")
    flags = ["--no-show", "--image-key", "img_path", "--image-root", str(tmp_path / "p")]
    assert data.main([str(tmp_path / "t.csv"), *flags, "--label-key", "species"]) == 0
    assert "cat, dog" in capsys.readouterr().out
    write_tar(tmp_path / "a.tar", [("a.jpg", encoded(picture(0))), ("a.txt", b"one\ntwo")])
    assert data.main([str(tmp_path / "a.tar"), "--no-show", "--caption-lines", "no"]) == 0
    assert "captions  1, per image" in capsys.readouterr().out


def test_show_fails_in_one_line(tmp_path, capsys):
    assert data.main([str(tmp_path / "nothing"), "--show"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        data.main(["--colour"])


def test_the_sheet_shows_the_training_crop_above_the_text(pairs, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        data, "sheet", lambda *args: shown.update(zip(("pictures", "texts", "columns", "tile"), args))
    )
    damage(pairs, [4])
    data.contact_sheet(pairs, SIZE)
    assert len(shown["pictures"]) == 23 and shown["tile"] == SIZE
    expected = data.RandomCrop(SIZE).pixels(pairs.image(7), data.generator(0, "crop", 0, 7))
    np.testing.assert_array_equal(shown["pictures"][7], expected)
    assert shown["texts"][7] == "picture 7 text 0" and "picture 4 text 0" not in shown["texts"]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="floating-point pixels"):
        images.open_image(tmp_path / "a.tiff")
