"""The folder tests/golden: its manifest, its two programs, and the comparison of a whole file."""

import importlib.util
import json

import torch
from conftest import ROOT, load_golden

FOLDER = ROOT / "tests" / "golden"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))


def program(name):
    """A program of tests/golden as a module."""
    spec = importlib.util.spec_from_file_location(f"golden_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, record = program("check"), program("record")


def agrees(name, found, limit=0.5):
    """Every output of a file is among the found ones, and its error is below half of the tolerance."""
    g, arrays = load_golden(name + ".npz"), MANIFEST["files"][name + ".npz"]["arrays"]
    expected = {key[4:] for key, array in arrays.items() if key.startswith("out.") and "needs" not in array}
    assert set(found) == expected
    ratios = {}
    for key, value in found.items():
        value = torch.as_tensor(value).detach().numpy()
        ratio, remark = check.compare(value, g["out." + key].numpy(), arrays["out." + key])
        assert not remark, f"{name} {key}: {remark}"
        ratios[key] = ratio
    assert max(ratios.values()) < limit, {key: ratio for key, ratio in ratios.items() if ratio >= limit}
    return ratios
