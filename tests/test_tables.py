"""The papers' tables of lab/compare.py on tiny copies of their data, with a tiny CLIP and one step."""

import json
import shutil
from statistics import fmean, stdev

import pytest
from test_benchmarks import clip, make  # noqa: F401

import train
from lab import compare, reproduce

# ruff: noqa: F811  (fixture of the other file)


def table(name, data, clip, out, *more):
    flags = ["--table", name, "--data", str(data), "--init", clip, "--out", str(out), "--steps", "1"]
    return reproduce.main([*flags, "--batch-size", "6", "--device", "cpu", "--seeds", "2", *more])


def results(out, name):
    return json.loads((out / f"table-{name}" / "results.json").read_text())


def test_pooling_runs_every_arm_and_goes_on(tmp_path, clip, capsys, monkeypatch):
    make(tmp_path, "VLCS")
    # the folder above VLCS serves as well
    assert table("pooling", tmp_path, clip, tmp_path / "out") == 0
    said, found = capsys.readouterr().out, results(tmp_path / "out", "pooling")
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/*/config.json")]
    names = ("target_domain", "seed", "image_pooling")
    assert len({tuple(run[name] for name in names) for run in runs}) == 4 * 2 * 2 == len(runs)
    assert {run["method"] for run in runs} == {"finetune"} and {run["steps"] for run in runs} == {1}
    paper = {row["method"]: row["average"] for row in found["table"] if row["from"] == "paper"}
    assert paper == {"class token": "83.7", "average": "82.0"}
    # the mean and the deviation of two runs
    for row in (row for row in found["table"] if row["from"] == "here"):
        name = f"domain-shift-SUN09-{row['method'].replace(' ', '-')}"
        files = [tmp_path / "out" / "table-pooling" / f"{name}-{seed}" / "results.json" for seed in (0, 1)]
        values = [100 * json.loads(file.read_text())["fine-tuned"]["target"] for file in files]
        assert row["SUN09"] == f"{fmean(values):.1f} +- {stdev(values):.1f}"
    assert "2 of 3 seeds; steps 1; batch_size 6; settings for a small CLIP" in said.splitlines()[-1]

    def forbidden(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "train", forbidden)
    assert table("pooling", tmp_path / "VLCS", clip, tmp_path / "out") == 0
    assert results(tmp_path / "out", "pooling")["table"] == found["table"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vlcs", "epsilon"])
def test_tables_of_vlcs(tmp_path, clip, name):
    folder = make(tmp_path, "VLCS")[0]
    assert table(name, folder, clip, tmp_path / "out") == 0
    found = results(tmp_path / "out", name)
    assert len(found["table"]) == 2 * len(compare.TABLES[name][2])
    assert all(" +- " in row["LabelMe"] for row in found["table"] if row["from"] == "here")
    assert found["table"][-2]["LabelMe"] == {"vlcs": "68.7", "epsilon": "67.9"}[name]
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/*/config.json")]
    if name == "vlcs":
        assert {(run["method"], run.get("branch")) for run in runs} == {
            ("clipood", None),
            ("alignclip", "dv"),
            ("alignclip", "vvv"),
        }
    else:
        assert {(run["smoothing"], run["epsilon"]) for run in runs} == {
            (form, e) for form in ("released", "mixture") for e in compare.SHARES
        }
    # the losses of the released code
    assert {run["similarity"] for run in runs if run["method"] == "alignclip"} == {"all"}


@pytest.mark.slow
def test_base_to_new_averages_over_the_data_sets(tmp_path, clip, capsys):
    for name in ("EuroSAT", "FGVCAircraft", "ImageNet"):
        make(tmp_path / "data", name)
    shutil.rmtree(make(tmp_path / "data", "ImageNetA")[0])
    assert table("base-to-new", tmp_path / "data", clip, tmp_path / "out") == 0
    found = results(tmp_path / "out", "base-to-new")
    assert "3 of 11 data sets (absent: Caltech101, OxfordPets" in capsys.readouterr().out
    runs = {path.parent.name.split("-")[0] for path in tmp_path.glob("out/*/*/config.json")}
    assert runs == {"EuroSAT", "FGVCAircraft", "ImageNet"}
    rows = {(row["method"], row["domain"]): row for row in found["rows"]}
    base = [rows["CoOp", name]["base"][0] for name in runs]
    assert rows["CoOp", "average"]["base"][0] == pytest.approx(sum(base) / 3)
    here = next(row for row in found["table"] if (row["method"], row["from"]) == ("CoOp", "here"))
    assert here["base"].startswith(f"{100 * sum(base) / 3:.1f} +- ")
    # one data set alone is its own average
    assert table("base-to-new", tmp_path / "data" / "eurosat", clip, tmp_path / "one") == 0


def test_data_sets_are_found_by_their_files(tmp_path):
    for name in ("DescribableTextures", "ImageNet", "PACS", "ImageNetR"):
        make(tmp_path, name)
    found = compare.data_sets(tmp_path)
    assert {name: path.name for name, path in found.items()} == {
        "DescribableTextures": "dtd",
        "ImageNet": "imagenet",
    }
    assert len(compare.SETS) == 11 and compare.data_sets(tmp_path / "dtd") == {
        "DescribableTextures": tmp_path / "dtd"
    }


def test_published_averages_are_those_of_their_rows():
    """Except D-V's, whose rows average 84.98; H is the harmonic mean of the averages."""
    for _, columns, arms in compare.TABLES.values():
        for name, (_, numbers) in arms.items():
            values = [float(x) for x in numbers.replace("-", "nan").split()]
            assert len(values) == len(columns)
            if columns[-1] == "average" and values[0] == values[0]:
                assert abs(sum(values[:4]) / 4 - values[4]) < (0.13 if name == "AlignCLIP, D-V" else 0.051)
            if columns[-1] == "H":
                assert 2 / (1 / values[0] + 1 / values[1]) == pytest.approx(values[2], abs=0.006)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--table", "wild"], "--table wild: there are vlcs, epsilon, pooling, base-to-new"),
        (["--table", "vlcs", "--data", "BED"], "needs --init: the CLIP to fine-tune, ViT-B/16"),
        (["--table", "vlcs", "--init", "CLIP"], "give --scenes, or --data with --init"),
        (
            ["--table", "vlcs", "--init", "CLIP", "--data", "BED"],
            "domain 'Caltech101': there are art_painting, cartoon",
        ),
        (["--table", "vlcs", "--init", "CLIP", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["--table", "base-to-new", "--init", "CLIP", "--data", "BED"], "none of CoOp's data sets is here"),
        (
            ["--table", "vlcs", "--init", "CLIP", "--data", "BED", "--claim", "a4"],
            "--claim: not with --table",
        ),
        (["--table", "vlcs", "--init", "CLIP", "--data", "BED", "--seeds", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, clip, capsys, flags, message):
    folder = make(tmp_path, "PACS")[0]
    flags = [{"BED": str(folder), "CLIP": clip}.get(flag, flag) for flag in flags]
    assert reproduce.main([*flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_arms_of_a_table(tmp_path):
    """Published settings, also in a folder with another name; epsilon leaves out two of the four domains."""
    folder = make(tmp_path, "VLCS")[0].rename(tmp_path / "copy")
    counts = {"vlcs": 4 * 3 * 3, "pooling": 4 * 2 * 3, "epsilon": 2 * 10 * 3}
    for name, count in counts.items():
        runs = compare.plan(compare.Comparison(table=name, data=str(folder), init="x"), "x", tmp_path)
        assert len({flags["out"] for _, flags in runs}) == len(runs) == count
        assert all("steps" not in flags and flags["train_data"] == str(folder) for _, flags in runs)
        released = [flags for _, flags in runs if flags.get("preset") == "alignclip-released"]
        assert len(released) == {"vlcs": 24, "pooling": 0, "epsilon": 60}[name]
        assert all(flags["batch_size"] == 108 for flags in released)
    assert {flags["target_domain"] for _, flags in runs} == {"LabelMe", "VOC2007"}


def test_nothing_is_smaller_with_all_seeds_and_data_sets():
    figures = dict.fromkeys(("base", "new", "H"), (0.5, 0.01))
    sets = [*compare.SETS, "average"]
    rows = [{"method": row, "domain": name, **figures} for row in compare.PROMPTS for name in sets]
    c = compare.Comparison(table="base-to-new", data="x", init="ViT-B/16")
    shown, smaller = compare.beside_the_paper(c, rows)
    assert smaller == [] and shown[1]["base"] == "50.0 +- 1.0"
