"""tests/golden/manifest.json describes every golden file and every array, and check.py reads it."""

import ast
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED

FOLDER = ROOT / "tests" / "golden"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
FILES = MANIFEST["files"]


def arrays_of(path):
    """Name -> array of an .npz file or of the state dict in a .pt file, name -> value of a .json file."""
    if path.suffix == ".npz":
        return dict(np.load(path))
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if "jit" in path.name:
        return dict(torch.jit.load(str(path)).state_dict())
    return torch.load(path, weights_only=True)["state_dict"]


def size(part, sizes):
    """A number, a letter of the manifest, or a sum such as "1+P"."""
    return sum(int(x) if x.isdigit() else sizes[x] for x in str(part).split("+"))


def test_every_golden_file_is_listed():
    found = {path.name for path in FOLDER.iterdir() if path.suffix in (".npz", ".pt", ".json")}
    assert found - {"manifest.json"} == set(FILES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 6 * 2**20


@pytest.mark.parametrize("name", FILES)
def test_sums_shapes_and_types(name):
    entry, path = FILES[name], FOLDER / name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    for source in entry["producer"]:
        assert {"repository", "commit", "file", "function", "licence"} <= set(source)
    arrays = arrays_of(path)
    assert set(arrays) == set(entry["arrays"])
    for key, described in entry["arrays"].items():
        if path.suffix == ".json":
            assert len(arrays[key]) == described["length"] and type(arrays[key]).__name__ == described["type"]
            continue
        shape = [size(part, entry["sizes"]) for part in described["shape"]]
        assert shape == list(arrays[key].shape), key
        assert str(arrays[key].dtype).removeprefix("torch.") == described["dtype"], key
        if key.startswith("out."):
            assert described["meaning"] and described["rtol"] >= 0 and described["atol"] >= 0
    order = entry.get("grad_norms_order")
    assert order is None or order == sorted(key[2:] for key in arrays if key.startswith("w."))


@pytest.mark.parametrize("name", FILES)
def test_the_named_tests_exist(name):
    assert FILES[name]["tests"]
    for test in FILES[name]["tests"]:
        path, _, function = test.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function in functions, test


@pytest.mark.slow
@pytest.mark.skipif(SHARED is None, reason="some of the tests need recordings of ../shared/golden")
def test_tests_read_every_array(tmp_path):
    """Runs the named tests. An array that they do not read must be informational, and no other may be."""
    path = tmp_path / "reads.json"
    tests = sorted({test for entry in FILES.values() for test in entry["tests"] if "::" in test})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "GOLDEN_READS": str(path)}, text=True)
    assert done.returncode == 0
    read = {tuple(pair) for pair in json.loads(path.read_text())}
    for name, entry in FILES.items():
        if not name.endswith(".npz") or name == "preprocess_small.npz":  # its test reads the file itself
            continue
        recorded = [key for key in entry["arrays"] if not key.startswith("w.")]
        unread = {key for key in recorded if (name, key) not in read}
        named = {key for key in recorded if entry["arrays"][key].get("informational")}
        assert unread == named, name
