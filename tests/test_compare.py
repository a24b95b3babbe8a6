"""lab/compare.py: a comparison runs, goes on after a kill, plans every run once and refuses wrong flags."""

import json
from dataclasses import replace

import pytest
from test_open_world import DOMAINS, clip, few_scenes, folder  # noqa: F401

import train
from lab import compare as comparison
from lab.compare import Comparison

# ruff: noqa: F811  (fixtures of the other file)


def compare(out, clip, **more):
    c = dict(
        scenes=True,
        init=str(clip),
        out=str(out),
        steps=2,
        device="cpu",
        threads=1,
        seeds=2,
        tasks="in-the-wild",
        methods="finetune,clipood",
    )
    return comparison.compare(Comparison(**c | more))


def test_comparison_runs_and_goes_on(tmp_path, clip, monkeypatch, capsys):
    rows, said = compare(tmp_path / "out", clip), capsys.readouterr().out
    methods = ["chance", "constant", "zero-shot", "finetune", "clipood", "clipood, last step"]
    assert [row["method"] for row in rows] == methods and all(row["runs"] == 2 for row in rows)
    assert rows[0]["H"] == pytest.approx((1 / 16, 0.0)) and "cartoon" in said and "clipood" in said
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(saved["records"]) == 12 and saved["comparison"]["steps"] == 2
    assert (tmp_path / "out" / "in-the-wild-cartoon-clipood-1" / "checkpoint.pt").exists()

    def forbidden(c):
        raise AssertionError("trained again")

    whole = train.train
    monkeypatch.setattr(train, "train", forbidden)
    again = compare(tmp_path / "out", clip)
    assert again == rows
    with pytest.raises(ValueError, match="steps 2 -> 3"):
        compare(tmp_path / "out", clip, steps=3)
    # killed between the checkpoint and the results: evaluated, not trained
    monkeypatch.setattr(train, "train", whole)
    (tmp_path / "out" / "in-the-wild-cartoon-finetune-0" / "results.json").unlink()
    again = compare(tmp_path / "out", clip)
    assert again == rows


def test_plan_has_every_run_once(folder):
    c = Comparison(data=str(folder), init="x", seeds=2, batch_size=7)
    tmp = folder.parent
    runs = [flags for _, flags in comparison.plan(c, "x", tmp)]
    assert len(runs) == 2 * 5 * (3 + 1 + 3) == len({r["out"] for r in runs})
    assert {r["target_domain"] for r in runs if r["open_task"] == "domain-shift"} == set(DOMAINS)
    assert all(r["batch_size"] == 7 and "steps" not in r for r in runs)
    some = comparison.plan(replace(c, targets="art", tasks="domain-shift", seeds=1), "x", tmp)
    assert len(some) == 5 and {about["domain"] for about, _ in some} == {"art"}


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "exactly one of them"),
        (["--scenes", "--data", "x"], "exactly one of them"),
        (["--data", "x"], "--data x needs --init"),
        (["--scenes", "--init", "x", "--methods", "erm"], "method 'erm': there are finetune"),
        (["--scenes", "--init", "x", "--targets", "clipart"], "domain 'clipart': there are photo"),
        (["--scenes", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--data", "nowhere", "--init", "x"], "nowhere: no such file or folder"),
    ],
)
def test_comparison_mistakes(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert comparison.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_comparison_passes_allow_outside_to_every_run(folder, tmp_path):
    flags = Comparison(data=str(folder), init="c", allow_outside=True, tasks="in-the-wild")
    runs = comparison.plan(flags, "c", tmp_path)
    assert runs and all(run["allow_outside"] for _, run in runs)
