"""lab/measures.py: every measured claim has the rows and figures that its parts judge."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from small_models import draw_few

from lab import beds, claims, measures
from lab.claims import ARMS, BY_NAME
from llip import Llip
from model import CLIP, CONFIGS
from readers import scenes
from tokenizer import Tokenizer

SLOW = ("l3",)  # four probes of 3,000 pictures
MEASURED = [c for c in claims.NAMED.values() if c.measure and c.kind != "timing" and c.id not in SLOW]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.learn([text for some in scenes.Objects("train", 96).captions for text in some], 600)


@pytest.fixture
def lab(tokenizer, tmp_path, monkeypatch):
    """Random models of the size of each arm, figures and lifts as a run has them."""
    draw_few(monkeypatch)
    lab = SimpleNamespace(image_size=32, device=torch.device("cpu"), claim=BY_NAME.get, asked=set())

    def model(arm, seed):
        lab.asked.add(arm)
        size = "deep" if "bed 12" in (arm, ARMS[arm].get("start")) else "tiny"
        config = beds.replace(CONFIGS[size], vocab_size=tokenizer.vocab_size)
        torch.manual_seed(seed)
        method = ARMS[arm].get("method", "clip")
        return (Llip(config, 8, 4) if method == "llip" else CLIP(config)), tokenizer

    def figure(arm, seed, name):
        lab.asked.add(arm)
        task, there = ARMS[arm].get("open_task", "domain-shift"), claims.FIGURES.get(name, ("reported",))[0]
        kinds = ("target", "val") if task == "domain-shift" else ("base", "new", "H", "AUROC")
        known = (*kinds, *beds.LIFTS) if "start" in ARMS[arm] else claims.LLIP_FIGURES + claims.GROUPS["llip"]
        return 50.0 + len(arm) if name in known or there not in ("reported", "zeroshot") else None

    def path(arm, seed):
        lab.asked.add(arm)
        seen = {str(step): {name: step + 1.0 for name in beds.LIFTS} for step in beds.STEPS}
        (tmp_path / "lifts.json").write_text(json.dumps(seen))
        return tmp_path

    flags = dict(smoothing_scale=5.0)
    vars(lab).update(model=model, figure=figure, path=path, runs=lambda *a: True, flags=lambda *a: flags)
    return lab


@pytest.mark.parametrize("claim", MEASURED, ids=lambda claim: claim.id)
def test_a_measured_claim_has_what_its_parts_judge(lab, claim, tmp_path):
    """And asks for no arm that the claim does not name: it would not have been trained."""
    found = claim.measure(lab, 3000)
    rows, extra = found if isinstance(found, tuple) else (found, None)
    for part in claim.parts:
        for row in (part.row, part.other)[: 1 + isinstance(part.other, str)]:
            value = rows[row][part.figure]
            assert math.isfinite(value), (row, part.figure)
    starts = {ARMS[arm]["start"] for arm in claim.arms.values() if "start" in ARMS[arm]}
    assert lab.asked <= {*claim.arms.values(), *starts}
    if claim.picture:
        claim.picture(tmp_path / "a.png", json.loads(json.dumps([extra, extra])))
        assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["clip", "llip"])
def test_names_of_ones_own_are_compared(small_runs, kind, tmp_path, capsys):
    """A second name of the same words has cosine 1; each row of the softmax sums to 1."""
    (tmp_path / "names.json").write_text('{"n1": "red ball", "n2": ["tree", "plant"], "n3": "red ball"}')
    flags = ["--model", str(small_runs[kind]), "--classes", str(tmp_path / "names.json"), "--device", "cpu"]
    assert measures.main(["similarity", *flags, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["classes"] == ["red ball", "tree", "red ball"] and "| red ball" in capsys.readouterr().out
    cosines, softmax = torch.tensor(found["cosines"]), torch.tensor(found["softmax"])
    torch.testing.assert_close(cosines[0, 2], torch.tensor(1.0))
    torch.testing.assert_close(cosines, cosines.t())
    torch.testing.assert_close(softmax, (35 * cosines).softmax(-1))
    assert (tmp_path / "out" / "cosines.png").exists() and (tmp_path / "out" / "softmax.png").exists()
    with pytest.raises(SystemExit):
        measures.main(["cosines", *flags])
    assert "invalid choice: 'cosines'" in capsys.readouterr().err
