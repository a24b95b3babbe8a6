"""What the programs of evals/ do alike: mistakes in one line, all models opened first, columns of a list."""

import json
import shutil

import pytest
from PIL import Image
from small_models import CONFIG, MODELS, evaluate_all, save_run

from evals import linear_probe, maps, mixtures, open_world, spectrum, surgery, typographic
from model import CLIP
from tokenizer import Tokenizer

SEVERAL = (maps, open_world, spectrum, typographic)


def call(program, model, *flags):
    return program.main(["--model", str(model), "--device", "cpu", *map(str, flags)])


@pytest.fixture
def broken(tmp_path, small_runs):
    """Models that no program can use, and what the line about each must say."""
    (tmp_path / "text.pt").write_text("not a checkpoint")
    whole = (small_runs["clip"] / "checkpoint.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    return {tmp_path / name: name for name in ("nowhere.pt", "text.pt", "cut.pt", "empty")}


@pytest.mark.parametrize("program", SEVERAL, ids=lambda program: program.__name__)
def test_all_models_are_opened_before_the_first_is_evaluated(program, small_runs, broken, capsys):
    """One line on stderr: no progress line of the first model comes before it."""
    for path, name in broken.items():
        more = ["--more", small_runs["clip"], path]
        assert call(program, small_runs["clip"], "--data", "scenes", *more) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and name in said.err
        assert said.out == ""


@pytest.mark.parametrize("program", (maps, open_world, typographic), ids=lambda program: program.__name__)
def test_a_vocabulary_of_another_size_is_found_before_the_first_is_evaluated(
    program, small_runs, tmp_path, capsys
):
    run = save_run(tmp_path / "run", CLIP, CONFIG)
    Tokenizer.learn(["a dog"], 515).save(run / "tokenizer.json")
    assert call(program, small_runs["clip"], "--data", "scenes", "--more", run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the tokenizer has" in error


@pytest.fixture
def columns(tmp_path):
    """A list with unusual column names, and the flags that name them."""
    rows = ["where;what;kind;tail".replace(";", ",")]
    for k in range(24):
        Image.new("RGB", (16, 16), (60 * (k % 4), 9 * k, 0)).save(tmp_path / f"{k}.png")
        rows.append(f"{k}.png,picture {k},{'abcd'[k % 4]},x")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    return ["--data", tmp_path / "list.csv", "--image-key", "where"]


@pytest.mark.parametrize(
    "program, keys",
    [
        (linear_probe, ["--label-key", "kind"]),
        (typographic, ["--label-key", "kind"]),
        (spectrum, ["--caption-key", "what"]),
        (mixtures, ["--caption-key", "what"]),
        (mixtures, ["--label-key", "kind"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_columns_of_a_list_are_named_by_flags(
    program, keys, columns, small_runs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(linear_probe, "search", lambda score: max((40, 56), key=score))
    out = ["--out", tmp_path / "out"]
    assert call(program, small_runs["llip"], *columns, *keys, *out) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    if keys[0] == "--caption-key" and program is mixtures:
        assert result["captions"][:2] == ["picture 0", "picture 1"]
    if keys[0] == "--label-key":
        assert "classes 4" in capsys.readouterr().out or len(result["captions"]) == 4
    # without the flags the columns are not found
    assert call(program, small_runs["llip"], *columns[:2]) == 2
    assert "list.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program, flags, message",
    [
        (linear_probe, ["--split", "val"], "--split: a probe trains on one"),
        (linear_probe, ["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (linear_probe, ["--data", "nowhere"], "nowhere: no such file"),
        (typographic, ["--templates", "a photo"], "templates 'a photo'"),
        (mixtures, ["--limit", "0"], "--limit 0 must be at least 1"),
        (spectrum, ["--out", __file__], "it is a file, not a folder"),
        (maps, ["--out", f"{__file__}/out"], "cannot write in"),
    ],
)
def test_mistakes_get_one_line(program, small_runs, capsys, flags, message):
    assert call(program, small_runs["llip"], "--data", "scenes", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


WRONG = [("template", 7), ("open_task", ["x"]), ("target_domain", 5), ("whole_target", "no"), ("seed", [])]


@pytest.mark.parametrize("name, value", WRONG)
def test_a_damaged_description_of_a_run_is_named(name, value, small_runs, tmp_path, capsys):
    run = shutil.copytree(small_runs["clip"], tmp_path / "run")
    config = {"method": "clipood", "open_task": "domain-shift", "target_domain": "sketch", name: value}
    (run / "config.json").write_text(json.dumps(config))
    assert call(open_world, run, "--data", "scenes") == 2
    error = capsys.readouterr().err
    assert f"run: config.json has {name} {value!r}, expected" in error and error.count("\n") == 1


def test_files_of_templates_and_sizes_of_maps_get_one_line(small_runs, tmp_path, capsys):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00{}")
    words = ["--data", "scenes", "--templates", tmp_path / "bytes.txt"]
    assert call(typographic, small_runs["clip"], *words) == 2
    assert "bytes.txt: not JSON, or not text" in capsys.readouterr().err
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    for size, fitting in (("100000", 2048), ("-8", 8), ("0", 8), ("20", 16)):
        words = [tmp_path / "a.png", "a dog", "--model", small_runs["clip"], "--out", tmp_path / "b.png"]
        assert surgery.main([*map(str, words), "--size", size]) == 2
        assert f"a multiple of the patch, take {fitting}" in capsys.readouterr().err


def test_a_result_replaces_a_link_and_never_what_it_points_to(small_runs, tmp_path):
    (tmp_path / "precious").write_text('{"task": "spectrum"}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").symlink_to(tmp_path / "precious")
    flags = ["--data", "scenes", "--limit", 20, "--out", tmp_path / "out"]
    assert call(spectrum, small_runs["clip"], *flags) == 0
    assert (tmp_path / "precious").read_text() == '{"task": "spectrum"}'
    assert not (tmp_path / "out" / "results.json").is_symlink()
    # the same program may write again
    assert call(spectrum, small_runs["clip"], *flags) == 0


@pytest.mark.parametrize("content", ['{"zeroshot": {}}', "not JSON", "[1]", "[" * 100_000, '{"task": 3}'])
def test_results_of_others_in_the_output_folder_stay(content, small_runs, tmp_path, capsys):
    """Such as those of a training run, whose folder is a likely mistake."""
    path = tmp_path / "results.json"
    path.write_text(content)
    assert call(spectrum, small_runs["clip"], "--data", "scenes", "--limit", 20, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} was not written by an evaluation") and error.count("\n") == 1
    assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("program", [linear_probe, typographic, open_world], ids=lambda p: p.__name__)
def test_data_without_labels_are_refused(program, small_runs, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("image,caption\na.png,a dog\n")
    assert call(program, small_runs["clip"], "--data", tmp_path / "list.csv") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("no labels" in error or "no classes" in error)


@pytest.mark.parametrize("program, what", [(spectrum, "spectrum"), (typographic, "typographic")])
def test_every_kind_of_model_gets_its_progress_and_its_result(program, what, small_runs, tmp_path, capsys):
    paths = [str(small_runs[name]) for name in MODELS]
    assert evaluate_all(program.main, small_runs, tmp_path)["models"] == paths
    said = capsys.readouterr()
    kinds = [f", {kind}" for kind in ("clean", "blank", "word")] if program is typographic else [""]
    for path in paths:
        assert path in said.out
        assert all(f"{what} {path}{kind}  20 of 20 images" in said.err for kind in kinds)


def test_a_picture_on_its_side_is_shown_and_searched_upright(small_runs, tmp_path):
    """The EXIF orientation of a camera counts for heat maps; training and evaluation follow OpenAI's code."""
    picture, exif = Image.new("RGB", (64, 32), "blue"), Image.Exif()
    picture.paste("red", (0, 0, 32, 32))
    picture.save(tmp_path / "upright.png")
    exif[0x0112] = 6  # shown after a turn of 90 degrees clockwise
    picture.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    pages = []
    for name in ("upright", "turned"):
        out = tmp_path / f"{name}-map.png"
        flags = [tmp_path / f"{name}.png", "a dog", "--model", small_runs["clip"], "--out", out]
        assert surgery.main([*map(str, flags)]) == 0
        with Image.open(out) as page:
            pages.append(page.crop((0, 26, 520, 154)).tobytes())
    assert pages[0] == pages[1]
    assert mixtures.Photos("", [str(tmp_path / "turned.png")]).image(0).size == (64, 32)
