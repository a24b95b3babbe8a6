"""A NumPy port passes tests/golden/check.py, and no port with a deliberate error does.

port.py is the port, tape.py its gradients, answers.py its output for each file, and bugs.diff the errors:
each has a name, lines of port.py that begin with "-", and what replaces them, with "+".
"""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import answers
import numpy as np
import port
import pytest
import tape

HERE = Path(__file__).parent
SOURCE = (HERE / "port.py").read_text(encoding="utf-8")


def bugs():
    """[(name, lines to replace, new lines)]"""
    found = []
    for part in (HERE / "bugs.diff").read_text(encoding="utf-8").split("\n\n"):
        name, *lines = part.strip().split("\n")
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        found.append((name, old, new))
    return found


def port_with(old, new):
    """The port with one replacement."""
    assert SOURCE.count(old) == 1, old
    module = ModuleType("port")
    exec(compile(SOURCE.replace(old, new), "port.py", "exec"), module.__dict__)
    return module


def first_wrong(changed):
    """The first file of which a port computes an array wrongly, or None."""
    for case in answers.CASES:
        with np.errstate(all="ignore"):
            mine = answers.answers(changed, case)
        lines, _ = answers.check.check(mine)
        # an error that makes arrays disappear would prove nothing
        assert not any(line.startswith(("MISSING", "UNKNOWN")) for line in lines)
        if any(line.startswith("WRONG") for line in lines):
            return case
    return None


def test_the_port_passes(tmp_path):
    mine = {}
    for case in answers.CASES:
        mine |= answers.answers(port, case)
    assert {value.dtype for value in map(np.asarray, mine.values())} == {np.dtype("float32")}
    np.savez(tmp_path / "mine.npz", **mine)
    command = [sys.executable, str(answers.FOLDER / "check.py"), str(tmp_path / "mine.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{len(mine)} arrays compared, 0 wrong, missing or unknown" in done.stdout
    shares = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ok")]
    assert len(shares) == len(mine) > 350 and max(shares) < 0.5
    absent = done.stdout.split("cases without arrays: ")[1].split("\n")[0].split(", ")
    others = ("clip_benchmark", "clipood_bma", "clipood_train", "preprocess", "surgery", "tes_loss", "views")
    assert all(name.startswith(others) for name in absent), "the port covers everything else"


def test_our_recordings_in_fp64(monkeypatch):
    """record.py and the port are written independently; in fp64 only the rounding to float32 is left."""
    monkeypatch.setattr(answers, "DTYPE", np.float64)
    own = [case for case in answers.CASES if answers.FILES[case + ".npz"].get("own")]
    assert len(own) == 10
    for case in own:
        lines, bad = answers.check.check(answers.answers(port, case))
        shares = [float(line.split()[1]) for line in lines if line.startswith("ok")]
        assert bad == 0 and max(shares) < 0.01, case


def test_a_port_without_gradients(tmp_path):
    mine = {k: v for k, v in answers.answers(port, "llip_small").items() if "grad" not in k}
    lines, bad = answers.check.check(mine, values=True)
    assert bad == 0 and len(mine) == 11
    assert answers.check.check(mine)[1] == 9, lines


def test_the_port_uses_numpy_only():
    for name in ("port.py", "tape.py"):
        tree = ast.parse((HERE / name).read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {getattr(node, "module", None) or node.names[0].name for node in nodes}
        assert names <= {"math", "numpy", "tape"}


def test_gradients_of_the_tape_equal_differences():
    """Each operation, against central differences in fp64."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape) for shape in ((3, 4), (4, 3), (1, 3))]

    def scalar(a, b, c):
        x = a @ b / (tape.exp(c) + 2.0) - 1.5 * c
        x = tape.sigmoid(x) * tape.softplus(-x) + tape.sqrt(tape.log(x * x + 3.0))
        x = tape.concatenate([x.T, 1.0 - x[:, [0, 2, 2]]], 0).reshape(2, 3, 3).transpose(2, 0, 1)
        return (x.mean(1, keepdims=True) * x).sum((0, 2)).mean() + (tape.constant(a) * a).sum()

    leaves = [tape.Array(x) for x in start]
    # the value that constant holds does not move in a derivative
    held = tape.Array(start[0])
    found = tape.gradients(scalar(*leaves), leaves)
    for i, gradient in enumerate(found):
        for index in np.ndindex(*start[i].shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in start]
                moved[i][index] += step
                whole = scalar(*(tape.Array(x) for x in moved)).data
                ends.append(whole - (moved[0] * moved[0]).sum() + (held.data * moved[0]).sum())
            assert gradient[index] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", ["log(a + 1e-8)", "LayerNorm with eps 1e-6", "Q-Q and K-K swapped"])
def test_a_bug_is_found(name):
    """The other errors are in the slow test."""
    [(old, new)] = [bug[1:] for bug in bugs() if bug[0] == name]
    assert first_wrong(port_with(old, new))


@pytest.mark.slow
@pytest.mark.parametrize("name, old, new", bugs(), ids=[bug[0] for bug in bugs()])
def test_every_bug_is_found(name, old, new):
    assert first_wrong(port_with(old, new))


def test_the_list_of_bugs():
    names = [name for name, _, _ in bugs()]
    document = (HERE.parent.parent / "docs" / "porting.md").read_text(encoding="utf-8")
    assert f" {len(names)} deliberate errors" in document and len(names) == len(set(names))
    for _, old, new in bugs():
        assert SOURCE.count(old) == 1 and old != new, old
