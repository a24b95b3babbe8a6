"""The rule of the verdicts, the keys of runs and measurements, the list of claims, and the whole command."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import draw_few

import evaluate
import pretrained
import train
from evals import protocol as protocols
from lab import bench, claims, evidence, reproduce
from lab.claims import ARMS, BY_NAME, CLAIMS, Claim, Part, parts_of
from lab.evidence import FAILS, HOLDS, OPEN, UNMET, at_level, judge, together
from lab.reproduce import Lab, Request, main
from model import CLIP, CONFIGS, Config
from tokenizer import Tokenizer
from train import configure


def verdict(part, kind="seeds", **rows):
    table = {row: {"x": values} for row, values in rows.items()}
    return judge(part, table, kind)["verdict"]


def test_greater_is_the_sign_of_a_paired_difference_larger_than_its_standard_error():
    part = Part("x", "a", ">", "b")
    # paired: every seed gains 1 although seeds differ by 10
    assert verdict(part, a=[11.0, 21, 31], b=[10.0, 20.1, 29.9]) == HOLDS
    assert verdict(part, a=[10.0, 20.1, 29.9], b=[11.0, 21, 31]) == FAILS
    assert verdict(part, a=[1.0, 2, 3], b=[1.1, 1.8, 3.1]) == OPEN
    assert verdict(part, a=[2.0, 2.1], b=[0.0, 0.0]) == OPEN  # two seeds decide nothing
    assert verdict(Part("x", "b", "<", "a"), a=[11.0, 21, 31], b=[10.0, 20.1, 29.9]) == HOLDS
    found = judge(part, {"a": {"x": [1.0, 2, 6]}, "b": {"x": [0.0, 0, 0]}})
    error = np.std([1, 2, 6], ddof=1) / 3**0.5
    assert found["difference"] == 3 and found["error"] == pytest.approx(error)
    assert found["p"] == pytest.approx(evidence.student_tail(3 / error, 2))


def test_an_equivalence_is_not_a_failure_to_see_a_difference():
    part = Part("x", "a", "=", "b", 1.0)
    assert verdict(part, a=[5.1, 5.0, 5.2], b=[5.0, 5.0, 5.0]) == HOLDS
    assert verdict(part, a=[9.0, 9.1, 9.2], b=[5.0, 5.0, 5.0]) == FAILS
    assert verdict(part, a=[9.0, 1.0, 5.0], b=[5.0, 5.0, 5.0]) == OPEN  # too noisy to say


def test_bounds_and_numbers():
    assert verdict(Part("x", "a", "<", 1.0), a=[0.8, 0.9, 0.85]) == HOLDS
    assert verdict(Part("x", "a", "<", 1.0), a=[1.2, 1.3, 1.25]) == FAILS
    assert verdict(Part("x", "a", ">", 1.0), a=[1.2, 1.3, 1.25]) == HOLDS
    assert verdict(Part("x", "a", ">", 1.0), a=[0.9, 1.2, 1.0]) == OPEN
    assert verdict(Part("x", "a", ">", 1.0), "once", a=[1.1]) == HOLDS
    assert verdict(Part("x", "a", "=", 0.46478, 5e-6), "once", a=[0.464781]) == HOLDS
    assert verdict(Part("x", "a", "=", 0.0003, 5e-5), "once", a=[0.000151]) == FAILS
    assert verdict(Part("x", "a", "=", 0.0), a=[0.0, 0.0, 1.0]) == FAILS
    assert verdict(Part("x", "a", "=", "b"), "once", a=[5.0], b=[5.0]) == HOLDS
    assert verdict(Part("x", "a", "=", "b"), "once", a=[5.0], b=[6.0]) == FAILS


def test_parts_are_read_from_text():
    found = parts_of("top-1: llip > clip, 4 = 8 within 2; both: a < 1.5", rows=("4", "8"))
    assert found[:2] == (Part("top-1", "llip", ">", "clip"), Part("top-1", "4", "=", "8", 2.0))
    assert found[2:] == tuple(Part(name, "a", "<", 1.5) for name in claims.LLIP_FIGURES)
    assert parts_of("x: 4 > 8")[0].other == 8.0  # a number where no row has this name
    assert str(found[1]) == "top-1: 4 = 8 within 2"


@pytest.mark.parametrize(
    "t, freedom", [(6.3138, 1), (2.9200, 2), (2.3534, 3), (2.1318, 4), (1.9432, 6), (1.8125, 10)]
)
def test_p_is_student_s_one_sided(t, freedom):
    """The 5 % points that every table prints; without noise a difference is certain."""
    assert evidence.student_tail(t, freedom) == pytest.approx(0.05, abs=2e-5)
    assert evidence.student_tail(-t, freedom) == pytest.approx(0.95, abs=2e-5)
    assert evidence.student_tail(0.0, freedom) == 0.5
    certain = {"a": {"x": [2.0] * (freedom + 2)}, "b": {"x": [1.0] * (freedom + 2)}}
    assert judge(Part("x", "a", ">", "b"), certain)["p"] == pytest.approx(0, abs=1e-9)
    assert judge(Part("x", "b", ">", "a"), certain)["p"] == pytest.approx(1, abs=1e-9)


def test_what_passes_one_standard_error_may_not_pass_five_per_cent():
    table = {"a": {"x": [1.0, 2.0, 3.5]}, "b": {"x": [0.0, 0.0, 2.5]}}
    found = judge(Part("x", "a", ">", "b"), table)  # 1, 2, 1: t = 4 at 2.92
    assert (found["verdict"], at_level(found)) == (HOLDS, HOLDS)
    table["a"]["x"][1] = 4.0  # 1, 4, 1: t = 2
    found = judge(Part("x", "a", ">", "b"), table)
    assert (found["verdict"], at_level(found)) == (HOLDS, OPEN)
    table["a"]["x"] = [5.0, 5.1, 7.4]
    same = judge(Part("x", "a", "=", "b", 1.0), table)
    assert (same["verdict"], at_level(same)) == (FAILS, FAILS)
    assert at_level({"p": None, "verdict": HOLDS}) == HOLDS


def test_holm_counts_the_parts_that_remain_together():
    """p of 0.001, 0.009 and 0.02 among three parts are six hypotheses: 0.05 / 6, / 5, / 4, ..."""
    assert evidence.after_holm([0.001, 0.009, 0.02]) == (2, 0)
    assert evidence.after_holm([0.999, 0.991, 0.98]) == (0, 2)
    assert evidence.after_holm([0.02, 0.03]) == (0, 0)
    assert evidence.after_holm([]) == (0, 0)


def test_a_claim_holds_if_all_its_parts_do_and_fails_if_one_does():
    assert together([HOLDS, HOLDS]) == HOLDS
    assert together([HOLDS, OPEN]) == OPEN
    assert together([HOLDS, OPEN, FAILS]) == FAILS


def test_every_claim_has_an_experiment_whose_parts_are_in_its_table():
    ids = [f"{author}{n}" for author in "al" for n in range(1, 17)]
    assert [c.id for c in CLAIMS] == [*ids, "f1", "f2"]  # the authors' claims, and findings of this project
    assert len({c.name for c in CLAIMS}) == 34
    for claim in CLAIMS:
        assert claim.parts and claim.paper and bool(claim.measure) != bool(claim.figures), claim.id
        assert set(claim.arms.values()) <= set(ARMS), claim.id
        for part in claim.parts if claim.figures else ():
            rows = {part.row, part.other} - {part.other if isinstance(part.other, float) else ""}
            assert part.figure in claim.figures and rows <= set(claim.arms), (claim.id, part)
    premises = {c.id: c.premise.name for c in CLAIMS if c.premise}
    alignment = dict.fromkeys(("a2", "a4", "a6", "a7", "a11", "a16", "f1"), "alignment")
    smoothing = dict.fromkeys(("a5", "a8"), "smoothing")
    able = dict.fromkeys(("a9", "a10", "a12", "a14"), "able")
    aspects = dict.fromkeys((*(f"l{n}" for n in (1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15, 16)), "f2"), "aspects")
    assert premises == alignment | smoothing | able | aspects
    real = {"real", "llip infonce patches"}  # arms of real data
    used = {arm for claim in BY_NAME.values() for arm in claim.arms.values()}
    assert set(ARMS) == used | real


def test_arms_are_what_train_accepts():
    lab = Lab(Request(quick=True))
    for arm in ARMS:
        start = {"init": "ViT-B/16"} if ARMS[arm].get("start") else {}
        c, _ = configure(**lab.flags(arm, 3000), **start)
        assert (c.seed, c.test_seed) == (3000, 3000)


def test_arms_that_are_compared_have_the_same_budget():
    lab, compared = Lab(Request()), 0

    def budget(arm, free=()):
        flags = lab.flags(arm, 0)
        names = (
            "steps",
            "batch_size",
            "lr",
            "train_size",
            "model",
            "shots",
            "target_domain",
            "captions",
            "bias",
        )
        return {name: flags.get(name) for name in names if name not in free}

    for claim in CLAIMS:
        free = ("captions",) if claim.id == "f2" else ()  # what that finding is about
        for part in claim.parts:
            arms = [claim.arms[row] for row in (part.row, part.other) if row in claim.arms]
            if len(arms) == 2 and "bed" not in arms:
                assert budget(arms[0], free) == budget(arms[1], free), (claim.id, part)
                compared += 1
    assert compared > 50
    longer, plain = budget("plain sls longer"), budget("plain sls")
    assert longer == budget("tes longer") and plain == budget("tes")
    assert longer["steps"] == 4 * plain["steps"]


def test_reported_seeds_and_validation_seeds_and_those_of_the_log_do_not_meet():
    reported, validation = (Lab(Request(seeds=20)).seeds, Lab(Request(seeds=20, validation=True)).seeds)
    assert not {*reported} & {*validation} and not {0, 1, 2} & {*reported, *validation}


@pytest.fixture
def one_version(monkeypatch):
    """The probes of the code's version take a minute."""
    monkeypatch.setattr(reproduce, "versions", lambda out: {"pairs": "code", "labels": "code"})


def test_the_key_of_a_run_depends_on_its_flags_and_on_the_code(monkeypatch, one_version):
    lab = Lab(Request(quick=True))
    keys = {lab.key(arm, 3000) for arm in ARMS}
    assert len(keys) == len(ARMS)
    assert lab.key("llip", 3000) != lab.key("llip", 3001)
    assert Lab(Request()).key("llip", 3000) != lab.key("llip", 3000)
    assert Lab(Request(quick=True, device="cpu", jobs=2)).key("llip", 3000) == lab.key("llip", 3000)
    before = [lab.key(arm, 3000) for arm in ("alignclip", "clipood", "llip")]
    monkeypatch.setitem(ARMS, "bed", ARMS["bed"] | {"steps": 7})
    after = [lab.key(arm, 3000) for arm in ("alignclip", "clipood", "llip")]
    assert before[0] != after[0] and before[1] != after[1] and before[2] == after[2]
    monkeypatch.setattr(reproduce, "versions", lambda out: {"pairs": "another", "labels": "code"})
    assert lab.key("llip", 3000) != before[2] and lab.key("alignclip", 3000) == after[0]


def test_towers_of_twelve_blocks_have_three_seeds():
    lab = Lab(Request())
    assert [len(lab.seeds_of(BY_NAME[id])) for id in ("a4", "a7", "a1")] == [5, 3, 1]
    for arm in ("bed 12", "layers 5"):
        assert lab.runs(arm, 3002) and not lab.runs(arm, 3003)
    assert lab.runs("alignclip", 3004)


def test_an_arm_with_three_seeds_has_three_values_beside_five(tmp_path, monkeypatch, one_version):
    claim, lab = BY_NAME["a2"], Lab(Request(out=str(tmp_path)))
    for arm in claim.arms.values():
        for seed in (seed for seed in lab.seeds if lab.runs(arm, seed)):
            lab.path(arm, seed).mkdir(parents=True)
            results = {"averaged": {"target": seed / 1e5, "val": 0.5}}
            (lab.path(arm, seed) / "results.json").write_text(json.dumps(results))
    table, _ = lab.table(claim)
    assert {row: len(found["target"]) for row, found in table.items() if len(found["target"]) != 5} == {
        "K-K": 3,
        "Q-Q": 3,
    }
    assert table["K-K"]["target"] == table["D-V"]["target"][:3]  # paired by seed


def test_the_version_is_what_the_code_computes(tmp_path, monkeypatch):
    """Another text with the same numbers is the same version; another number is another one."""
    texts, numbers, probed = ["x = 1"], {"llip": "a", "bed": "b"}, []

    def probe(arm, folder):
        probed.append(arm)
        return numbers[arm]

    def version():
        reproduce.versions.cache_clear()
        return reproduce.versions(tmp_path)

    monkeypatch.setattr(reproduce, "PROBES", {"pairs": ("llip",), "labels": ("bed",)})
    monkeypatch.setattr(reproduce, "source", lambda *patterns: texts)
    monkeypatch.setattr(reproduce, "probe", probe)
    first = version()
    assert version() == first and probed == ["llip", "bed"]  # the same text is not tried again
    texts[0] = "x = 1  # one"
    assert version() == first and len(probed) == 4
    texts[0], numbers["llip"] = "x = 2", "c"
    assert version()["pairs"] != first["pairs"] and version()["labels"] == first["labels"]
    reproduce.versions.cache_clear()


def test_a_probe_sees_one_bit_of_the_weights_and_of_the_figures(tmp_path, monkeypatch):
    def probe(name):
        (tmp_path / name).mkdir()
        return reproduce.probe("clip", tmp_path / name)

    first = probe("a")
    assert probe("b") == first
    rate = train.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda step, c: rate(step, c) * (1 + 1e-3 * (step == 2)))
        assert probe("c") != first
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "summary", lambda *a, own=evaluate.summary: own(*a) | {"top1": 0.123})
        assert probe("d") != first


def test_source_is_the_code_without_tests():
    names = [name for name, _ in reproduce.source("*.py", "[a-z]*/*.py")]
    assert {"train.py", "readers/scenes.py", "lab/claims.py"} <= {*names}
    assert not any(name.startswith("tests") for name in names)


def test_list(capsys):
    assert main(["--list", "--quick"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {c.id} " in out and c.name in out and c.says in out for c in CLAIMS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--claim", "z9"], "claim 'z9': --list shows the 34 claims"),
        ([], "give --list, --all, or --claim"),
        (["--all", "--claim", "a1"], "give --list, --all, or --claim"),
        (["--claim", "a1", "--seeds", "0"], "--seeds 0, --jobs 1: must be at least 1"),
        (["--claim", "alignment"], "claim 'alignment': --list shows the 34 claims"),
        (
            ["--claim", "l9", "--data", "x.jsonl"],
            "l9: --data with these flags is for claims that only compare",
        ),
        (["--claim", "a4", "--data", "x.jsonl"], "compare runs of pre-training"),
        (["--claim", "l4", "--data", "PACS", "--init", "x", "--target", "y"], "compare runs of fine-tuning"),
        (["--claim", "l1", "--data", "x.jsonl"], "compare runs of pre-training"),
        (["--all", "--pacs", "PACS"], "--pacs needs --flickr8k or --emoji"),
        (["--all", "--init", "x", "--target", "sketch"], "--data, --init, --target: not with --all"),
        (["--all", "--data", "x.jsonl"], "--data, --init, --target: not with --all"),
        (["--claim", "a4", "--target", "sketch"], "--target goes with --data"),
        (["--claim", "a4", "--target", "sketch", "--init", "x"], "--target goes with --data"),
        (["--claim", "a4", "--pacs", "PACS"], "--flickr8k, --emoji, --pacs: go with --all"),
        (["--claim", "a4", "--steps", "9"], "--steps, --batch-size: go with --data"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys, tmp_path):
    assert main([*argv, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_claims_on_pairs_compare_the_same_arms_by_recall():
    request = Request(data="captions.jsonl")
    for name in ("l2", "l4", "l5", "l6", "l13", "l14", "l15", "l16"):
        there = reproduce.adapted(BY_NAME[name], request)
        assert {part.figure for part in there.parts} == {"image to text R@10", "text to image R@10"}
        assert all(part.figure in there.figures and part.row in there.arms for part in there.parts)
    ladder = reproduce.adapted(BY_NAME["l6"], request)
    assert ladder.arms["text query (Llip)"] == "llip" and len(ladder.parts) == 8


def test_all_has_a_request_for_each_set_of_real_data():
    """Each is what its printed command asks for; that on scenes knows nothing of the others."""
    given = Request(all=True, flickr8k="f/pairs.jsonl", emoji="e/list.jsonl", pacs="d/PACS")
    drawn, pairs, domains = reproduce.requests(given)
    assert drawn == Request(all=True) and len(reproduce.chosen_by(drawn)) == len(CLAIMS)
    assert [one.id for one in reproduce.chosen_by(pairs)] == ["l2", "l16"]
    tuned = reproduce.chosen_by(domains)
    assert [(one.id, one.premise.name) for one in tuned] == [(id, "named") for id in ("a4", "a5", "a9")]
    words = reproduce.command(tuned[0], domains).split()[3:]
    flags = dict(zip((word[2:] for word in words[::2]), words[1::2]))
    names = dict(data="PACS", target="sketch", flickr8k="pairs.jsonl", emoji="list.jsonl", seeds="3")
    assert flags == names | {"claim": "a4"}
    assert reproduce.requests(replace(domains, all=False)) == [domains]
    assert reproduce.requests(Request(all=True, flickr8k="f", seeds=2))[1].seeds == 2


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(
        "import multiprocessing, os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        f"sys.path.insert(0, {str(reproduce.ROOT)!r})\n"
        "from lab import reproduce\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with ProcessPoolExecutor(1, context, reproduce.begin_worker) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


def test_the_flops_claim_from_end_to_end(tmp_path, capsys):
    assert main(["--claim", "dv-flops", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Verdict: **does not hold** (1 of 3 parts hold; at 5 %: does not hold)" in out
    assert "0.46478" in out and "1.2565" in out
    table = json.loads((tmp_path / "claims" / "a1-default.json").read_text())["table"]
    assert table["rebuttal's V-V-V"]["GFLOP"] == [0.464781312]
    assert table["rebuttal's D-V"]["GFLOP"] == [0.000151296]
    assert table["ratio of the formulas"]["times"] == [3072]
    assert table["exact dv"]["GFLOP"] == [0.464781312]
    text = (tmp_path / "evidence.md").read_text()
    assert "## A1 dv-flops" in text and "Claims are judged by sign" in text and str(tmp_path) not in text


def test_a_false_premise_is_the_verdict_and_has_its_number(tmp_path, monkeypatch):
    premise = Claim("p9", "dark", "pictures are dark", parts_of("lift: attention < 1, guidance > 1"))
    claim = replace(BY_NAME["a9"], premise=premise)
    lab = Lab(Request(out=str(tmp_path)))

    def conclude(attention, guidance):
        lifts = {"attention": {"lift": attention}, "guidance": {"lift": guidance}}
        targets = {row: {"target": [1.0, 2.0, 3.1]} for row in claim.arms}
        monkeypatch.setattr(lab, "table", lambda one: (lifts if one is premise else targets, []))
        return evidence.conclude(lab, claim, "command")

    found = conclude([2.3, 2.4, 0.9], [1.5, 1.5, 1.2])
    assert found["verdict"] == UNMET == evidence.sure(found)
    assert found["missed"] == ["lift of attention 1.87 is not < 1"]
    assert "pictures are dark. It is not met: lift of attention 1.87" in evidence.section(found)
    assert conclude([0.5], [1.2])["verdict"] == OPEN


@pytest.fixture
def small(monkeypatch, one_version):
    """--data settings of a second, not of an hour."""
    micro = dict(model="tiny", steps=2, batch_size=4, warmup=1)
    monkeypatch.setitem(claims.SETTINGS, "data", {"pairs": micro, "bed": {}, "labels": {}})


def pairs_on_disk(folder):
    lines = []
    for n in range(24):
        name = f"{n}.png"
        pixels = np.random.default_rng(n).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        split = "train" if n < 12 else "test"
        texts = [f"picture number {n}", f"the {n}th of all pictures"]
        lines.append(json.dumps({"image": name, "split": split, "captions": texts}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "captions.jsonl"


def test_a_claim_on_pairs_of_ones_own_resumes_reports_and_draws(tmp_path, small, capsys):
    source, out = pairs_on_disk(tmp_path), tmp_path / "out"
    argv = ["--claim", "small-data", "--data", str(source), "--seeds", "3", "--out", str(out)]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert "L16 small-data" in first and "text to image R@1" in first
    found = json.loads((out / "claims" / "l16-data-captions.json").read_text())
    kinds = ("llip (sigmoid)", "llip (InfoNCE)", "llip (InfoNCE) with patches")
    assert set(found["table"]) == {"clip", "siglip", *kinds} and len(found["parts"]) == 4
    values = found["table"]["llip (sigmoid)"]["image to text R@10"]
    assert len(values) == 3 and all(0 <= v <= 100 for v in values)
    assert found["verdict"] in (HOLDS, FAILS, OPEN) and found["data"] == "captions.jsonl"
    picture = Image.open(out / "claims" / "l16-data-captions.png")
    assert len(picture.convert("RGB").getcolors(10**6)) > 5
    text = (out / "evidence.md").read_text()
    assert re.search(r"\| L16 +\|", text) and "--data captions.jsonl" in text
    assert str(tmp_path) not in text
    assert main(argv) == 0  # nothing is trained again
    assert "of 15" not in capsys.readouterr().err


@pytest.fixture
def domains(tmp_path):
    """A folder of DOMAIN/CLASS pictures and a random CLIP to fine-tune."""
    for d, domain in enumerate(("art", "photo", "sketch")):
        for c, name in enumerate(("cat", "dog", "elk")):
            (tmp_path / "bed" / domain / name).mkdir(parents=True)
            for k in range(5):
                noise = np.random.default_rng((c, d, k)).integers(0, 99, (20, 20, 3))
                picture = np.uint8(noise + (70 * c, 60 * d, 30 * k))
                Image.fromarray(picture).save(tmp_path / "bed" / domain / name / f"{k}.png")
    (tmp_path / "clip").mkdir()
    tokenizer = Tokenizer.learn(["a photo of a cat dog elk"], 600)
    tokenizer.save(tmp_path / "clip" / "tokenizer.json")
    config = Config(16, 16, 8, 32, 2, 2, 64, 16, tokenizer.vocab_size, 32, 1, 2, 64)
    pretrained.save(CLIP(config), tmp_path / "clip" / "checkpoint.pt")
    return tmp_path


def test_a_claim_on_domains_of_ones_own(domains, small, monkeypatch, capsys):
    micro = dict(steps=2, batch_size=4)
    monkeypatch.setitem(claims.SETTINGS, "data", {"pairs": {}, "bed": {}, "labels": micro})
    argv = ["--claim", "aal", "--data", str(domains / "bed"), "--init", str(domains / "clip")]
    argv += ["--target", "sketch", "--seeds", "1", "--out", str(domains / "out")]
    assert main(argv) == 0
    assert "**not decidable here** (0 of 1 parts hold" in capsys.readouterr().out  # one seed
    found = json.loads((domains / "out" / "claims" / "a4-data-bed.json").read_text())
    assert {"neither", "L_att", "L_sim", "both", "both detached"} < set(found["table"])
    assert "--target sketch" in found["command"] and str(domains) not in json.dumps(found)
    lab = Lab(Request(data=str(domains / "bed"), init=str(domains / "clip"), target="sketch"))
    before = lab.key("aal", 0)
    (domains / "clip" / "checkpoint.pt").touch()
    assert lab.key("aal", 0) != before  # another file under the same name


def test_a_claim_on_domains_is_not_tried_if_its_clip_knows_too_little(domains, small, capsys):
    """The premise's CLIP is trained on real pairs. Its accuracy is the verdict, and nothing is fine-tuned."""
    pairs, out = pairs_on_disk(domains), domains / "out"
    argv = ["--claim", "a9", "--data", str(domains / "bed"), "--target", "sketch", "--seeds", "1"]
    assert (
        main([*argv, "--flickr8k", str(pairs), "--batch-size", "4", "--steps", "2", "--out", str(out)]) == 0
    )
    found = json.loads((out / "claims" / "a9-data-bed.json").read_text())
    assert found["verdict"] == UNMET and found["missed"][0].endswith("is not > 40")
    assert found["table"] == {} and re.search(r"zero-shot of real \d\S* is not > 40", capsys.readouterr().out)
    assert {path.name.split("-")[0] for path in (out / "data").iterdir()} == {"real"}
    assert UNMET in (out / "evidence.md").read_text()


def test_measurements_are_kept_by_the_runs_they_are_of(tmp_path, one_version):
    lab = Lab(Request(quick=True, out=str(tmp_path)))
    calls = []

    def measure(lab, seed):
        calls.append(seed)
        return {"llip": {"x": float(seed)}}

    claim = replace(BY_NAME["no-leak"], measure=measure)
    for _ in range(2):
        lab.measure(claim, 3000)
    assert calls == [3000]
    assert lab.table(claim) == ({"llip": {"x": [3000.0]}}, [None])


@pytest.mark.slow
def test_timings_come_from_the_bench(monkeypatch, tmp_path):
    """Each section runs once, and a claim has one value for each of its rounds."""
    tower = dict(image_size=224, patch_size=56, context_length=77)
    monkeypatch.setattr(bench, "CONFIGS", {name: replace(CONFIGS["tiny"], **tower) for name in CONFIGS})
    lab, ran, measure = Lab(Request(quick=True, out=str(tmp_path))), [], bench.measure
    monkeypatch.setattr(bench, "measure", lambda c: ran.append(c.sections) or measure(c))
    for claim in (claim for claim in CLAIMS if claim.kind == "timing"):
        table, _ = lab.table(claim)
        for part in claim.parts:
            rows = [part.row, part.other] if isinstance(part.other, str) else [part.row]
            assert all(part.figure in table[row] for row in rows), claim.id
            assert judge(part, table)["verdict"] in (HOLDS, FAILS, OPEN)
    assert sorted(ran) == [("alignclip",), ("llip",), ("prompts",)]


@pytest.mark.slow
def test_all_claims_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Every arm, measurement and picture on sets of 80 pictures and two steps; timings on small towers."""
    draw_few(monkeypatch)
    protocols.scenes_protocol.cache_clear()
    monkeypatch.setattr(protocols, "HELD_OUT", 80)
    steps = dict(steps=2, train_size=64)
    micro = {"pairs": steps | {"batch_size": 8}, "labels": steps}
    micro["bed"] = claims.BED | steps | {"batch_size": 8}
    monkeypatch.setitem(claims.SETTINGS, "quick", micro)
    tower = dict(image_size=224, patch_size=56, context_length=77)
    published = {n: replace(CONFIGS["tiny"], **tower) for n in CONFIGS if n.startswith("ViT")}
    monkeypatch.setattr(bench, "CONFIGS", CONFIGS | published)
    assert main(["--all", "--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "report in" in out
    text = (tmp_path / "evidence.md").read_text()
    assert text.count("\n## ") == 35 and "Not run" not in text and "nan" not in text
    assert text.count("Premise: it presumes nothing") == 8 and "lift" in text
    protocols.scenes_protocol.cache_clear()
