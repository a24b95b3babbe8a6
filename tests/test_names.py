"""No name of a file, class, domain, split, member or key commands the terminal: they come from strangers."""

import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import CONFIG, TOKENIZER

import data
import evaluate
import pretrained
import train
from evals import open_world
from model import CLIP, Config
from util.text import printable, say

# ESC, carriage return, bell, a C1 control, a bidirectional override, a line separator
EVIL = "\x1b[2J\r\a\x9b31m\u202e\u2028"
CLASSES = (f"dog{EVIL}", f"cat{EVIL}")


def png(k: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 20, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clean(capfd):
    """Calls a program and checks everything that it prints; returns the status and the text."""

    def call(main, argv, status=0):
        assert main(argv) == status, capfd.readouterr()
        found = capfd.readouterr()
        for text in found:
            assert not [c for c in text if not c.isprintable() and c not in "\n\t"], repr(text)
        return found.out + found.err

    return call


def folder(place, domains=("photo", f"art{EVIL}"), classes=CLASSES, count=4):
    for d, domain in enumerate(domains):
        for c, name in enumerate(classes):
            (place / domain / name).mkdir(parents=True)
            for k in range(count):
                (place / domain / name / f"{k}{EVIL}.png").write_bytes(png(100 * d + 10 * c + k))
    return place


def rows(place, broken=""):
    """A list whose images, captions, labels, splits and domains have control characters."""
    place.mkdir()
    records = []
    for k in range(12):
        name = f"{k}{EVIL}.png"
        (place / name).write_bytes(b"no image" if name == broken else png(k))
        records.append(
            {"image": name, "captions": [f"a {EVIL} dog {k}"], "split": f"s{EVIL}" if k % 4 == 1 else "train"}
        )
    path = place / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_one_function_and_one_printer(capsys):
    assert printable(f"a{EVIL}b") == "a?[2J???31m??b"
    say(f"a{EVIL}", "b\nc")
    assert capsys.readouterr().out == "a?[2J???31m?? b\nc\n"


def test_classes_domains_and_files_of_a_folder(here, clean):
    place = folder(here / f"set{EVIL}")
    said = clean(data.main, [str(place)])
    assert "dog?" in said and "art?" in said
    (place / "photo" / CLASSES[0] / f"broken{EVIL}.png").write_bytes(b"no image")
    assert "broken?" in clean(data.main, [str(place), "--split", ""])


def test_splits_captions_and_rows_of_a_list(here, clean):
    path = rows(here / "l", broken=f"3{EVIL}.png")
    assert "3?" in clean(data.main, [str(path)])
    assert "s?" in clean(data.main, [str(path), "--split", "none"], 2)
    assert "--caption-key names it" in clean(data.main, [str(path), "--caption-key", f"key{EVIL}"], 2)
    path.write_text(json.dumps({"image": f"../../x{EVIL}.png", "captions": ["x"]}))
    assert "x?" in clean(data.main, [str(path)], 2)
    path.write_text(json.dumps({f"column{EVIL}": 1}))
    assert "column?" in clean(data.main, [str(path)], 2)
    (here / f"table{EVIL}.csv").write_text(f"filepath{EVIL},title\n")
    clean(data.main, [f"table{EVIL}.csv"], 2)


def test_members_of_shards(here, clean):
    with tarfile.open(here / f"a{EVIL}.tar", "w") as tar:
        for k in range(12):
            for suffix, body in (
                (".png", b"no image" if k == 2 else png(k)),
                (".txt", b"a dog"),
                (f".x{EVIL}", b""),
            ):
                info = tarfile.TarInfo(f"{k}{EVIL}{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    os.environ["XDG_CACHE_HOME"] = str(here / "cache")
    assert "?" in clean(data.main, [f"a{EVIL}.tar"])
    (here / f"b{EVIL}.tar").write_bytes((here / f"a{EVIL}.tar").read_bytes()[:5000])
    clean(data.main, [f"b{EVIL}.tar"], 2)


def test_programs_that_score_classes_and_domains(here, clean):
    place, start = folder(here / "set"), here / "start.pt"
    torch.manual_seed(0)
    pretrained.save(CLIP(CONFIG), start)
    TOKENIZER.save(here / "v.json")
    common = ["--data", str(place), "--model", str(start), "--vocab", "v.json"]
    assert "art?" in clean(evaluate.main, ["zeroshot", *common, "--out", str(here / "out")])
    assert "art?" in clean(open_world.main, common)


def test_training_on_such_a_list(here, clean):
    path = rows(here / "l", broken=f"4{EVIL}.png")
    argv = ["--method", "clip", "--train-data", str(path), "--out", f"run{EVIL}", "--image-size", "16"]
    argv += "--vocab learn --batch-size 3 --steps 4 --threads 1 --device cpu --eval-every 2".split()
    said = clean(train.main, argv)
    assert "run?" in said


def test_keys_and_members_of_checkpoints(here, clean):
    path = here / f"w{EVIL}.pt"
    torch.save({"state_dict": {f"weight{EVIL}": torch.ones(3)}}, path)
    clean(pretrained.main, [str(path)], 2)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"a{EVIL}/data.pkl", b"}.")
    clean(pretrained.main, [str(path)], 2)
    model = CLIP(Config(16, 16, 8, 32, 1, 1, 64, 8, 600, 32, 1, 1, 64))
    assert "w?" in clean(pretrained.main, [str(pretrained.save(model, path))])
    clean(pretrained.main, [str(path), "--to", f"lay{EVIL}", "--out", "x"], 2)
