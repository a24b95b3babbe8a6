"""tests/golden/manifest.json describes every golden file and every array, and check.py reads it."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, load_golden
from golden_files import FOLDER, MANIFEST
from golden_files import check as golden_check

import pretrained

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


def test_the_readme_has_a_row_for_every_file():
    table = (FOLDER / "README.md").read_text(encoding="utf-8").split("## What each file verifies")[1]
    first = " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("|"))
    named = set(re.findall(r"`([^`]+)`", first))
    # a .npz beside a .pt is in the row of the .pt
    files = {name for name in FILES if name[-4:] != ".npz" or name.replace(".npz", ".pt") not in FILES}
    assert named - {"views"} == {name.removesuffix(".npz") for name in files}


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
        letters = {x for part in described["shape"] for x in str(part).split("+") if not x.isdigit()}
        assert letters <= set(MANIFEST["letters"]), key
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
    """Runs the named tests, which must read every input and every output of every .npz file."""
    path = tmp_path / "reads.json"
    tests = sorted({test for entry in FILES.values() for test in entry["tests"] if "::" in test})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "GOLDEN_READS": str(path)}, text=True)
    assert done.returncode == 0
    read = {tuple(pair) for pair in json.loads(path.read_text())}
    for name, entry in FILES.items():
        if not name.endswith(".npz") or name == "preprocess_small.npz":  # its test reads the file itself
            continue
        recorded = {key for key in entry["arrays"] if not key.startswith("w.")}
        assert not {key for key in recorded if (name, key) not in read}, name


# check.py


def check(path, *arguments):
    command = [sys.executable, str(FOLDER / "check.py"), str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@torch.no_grad()
def llip_of_the_project(temperature=5.0):
    """Every output of llip_ckpt_io, computed by the project."""
    io = load_golden("llip_ckpt_io.npz")
    path = FOLDER / "llip_ckpt_orig_mod_module.pt"
    model = pretrained.load(
        path, vision_heads=2, text_heads=2, mixture_heads=4, temperature=temperature, quick_gelu=True
    )
    keys, values = model.encode_image(io["in.image"])
    queries, text = model.encode_text(io["in.tokens"])
    found = {"K": keys, "Q": queries, "zt": text, "pred_ws5": model.mix(keys, values, queries)}
    return {f"llip_ckpt_io/{name}": value.numpy() for name, value in found.items()}


def test_check_accepts_the_project(tmp_path):
    np.savez(tmp_path / "mine.npz", **llip_of_the_project())
    done = check(tmp_path / "mine.npz", "--only", "llip_ckpt")
    assert done.returncode == 0, done.stdout
    assert "4 arrays compared, 0 wrong, missing or unknown" in done.stdout


def test_check_finds_wrong_missing_and_unknown_arrays(tmp_path):
    # the root of the head width, which Llip does not have
    arrays = llip_of_the_project(temperature=5.0 * 8**0.5)
    del arrays["llip_ckpt_io/Q"]
    arrays["llip_ckpt_io/K"] = arrays["llip_ckpt_io/K"][:2]
    arrays["llip_ckpt_io/out.zt"] = np.full_like(arrays.pop("llip_ckpt_io/zt"), np.nan)
    np.savez(tmp_path / "mine.npz", **arrays, **{"llip_ckpt_io/z": np.zeros(3)})
    done = check(tmp_path / "mine.npz")
    assert done.returncode == 1
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {(words[0], words[-1]) for words in lines if words[0] in ("MISSING", "UNKNOWN")} == {
        ("MISSING", "llip_ckpt_io/out.Q"),
        ("UNKNOWN", "llip_ckpt_io/z"),
    }
    wrong = {words[2].rstrip(":") for words in lines if words[0] == "WRONG"}
    assert wrong == {"llip_ckpt_io/out." + key for key in ("K", "zt", "pred_ws5")}
    assert "expected (3, 4, 5, 8)" in done.stdout and "not finite" in done.stdout


def test_check_accepts_every_recording_and_no_changed_one(tmp_path):
    """The recorded arrays pass, and each array fails when it moves by three tolerances."""
    arrays = {}
    for name, entry in FILES.items():
        if name.endswith(".npz"):
            recorded = np.load(FOLDER / name)
            for key in entry["arrays"]:
                if key.startswith("out."):
                    arrays[f"{name[:-4]}/{key}"] = recorded[key]
    np.savez(tmp_path / "all.npz", **arrays)
    done = check(tmp_path / "all.npz")
    assert done.returncode == 0 and "cases without" not in done.stdout
    for name, value in arrays.items():
        described = FILES[name.split("/")[0] + ".npz"]["arrays"][name.split("/")[1]]
        value = value.astype(np.float64)
        limit = described["atol"] + described["rtol"] * np.abs(value)
        arrays[name] = value + np.where(limit > 0, 3 * limit, 1)
    np.savez(tmp_path / "all.npz", **arrays)
    done = check(tmp_path / "all.npz")
    assert done.returncode == 1 and not [x for x in done.stdout.splitlines() if x.startswith("ok")]


def test_check_explains_itself(tmp_path):
    assert check(tmp_path / "none.npz").returncode == 2
    (tmp_path / "text.npz").write_text("no archive")
    done = check(tmp_path / "text.npz")
    assert done.returncode == 2 and "text.npz" in done.stderr and "Traceback" not in done.stderr
    np.savez(tmp_path / "empty.npz")
    assert check(tmp_path / "empty.npz").returncode == 1


def test_check_needs_numpy_only():
    tree = ast.parse((FOLDER / "check.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= {"argparse", "json", "sys", "pathlib", "numpy"}


def test_check_knows_the_aliases(tmp_path):
    """An array may have its name or an alias, and an alias never hides another array."""
    for name, entry in FILES.items():
        keys = [a for array in entry["arrays"].values() for a in array.get("aliases", [])]
        assert len(set(keys)) == len(keys) and not set(keys) & set(entry["arrays"]), name
        kinds = {(key.split(".")[0], alias.split(".")[0]) for key, array in entry["arrays"].items()
                 for alias in array.get("aliases", [])}  # fmt: skip
        assert kinds <= {("in", "in"), ("out", "out")}
    renamed = {"zt": "text_raw", "pred_ws5": "out.z_tau5"}
    mine = {
        f"llip_ckpt_io/{renamed.get(k.split('/')[1], k.split('/')[1])}": v
        for k, v in llip_of_the_project().items()
    }
    np.savez(tmp_path / "mine.npz", **mine)
    done = check(tmp_path / "mine.npz")
    assert done.returncode == 0 and "4 arrays compared, 0 wrong" in done.stdout, done.stdout
    mine["llip_ckpt_io/out.z_tau5"] = mine["llip_ckpt_io/out.z_tau5"] + 1
    np.savez(tmp_path / "mine.npz", **mine)
    assert "WRONG" in check(tmp_path / "mine.npz").stdout


def test_the_named_aliases():
    def aliases(name, key):
        return FILES[name]["arrays"][key]["aliases"]

    assert aliases("llip_k4.npz", "out.pred_ws5") == ["out.z_tau5"]
    assert "out.text" in aliases("llip_k4.npz", "out.zt")
    assert "out.grad_tau5.pred.out_proj" in aliases("llip_k4.npz", "out.grad_ws5.pred.out_proj")
    assert "in.tokens_branch" in aliases("alignclip_total.npz", "in.f_s")
    assert aliases("openclip_losses_a.npz", "in.logit_scale") == ["in.scale"]
    assert aliases("clip_vitA_io.npz", "out.raw_fp32.encode_image") == ["out.raw_fp32.image_raw"]
    # nothing keeps only an unclear name
    unclear = ("_ws", "zt", "pred_ws", "f_s", "_fs")
    for name, entry in FILES.items():
        for key, array in entry["arrays"].items():
            if name.endswith(".npz") and not key.startswith("w.") and key.split(".")[-1].endswith(unclear):
                assert array.get("aliases"), (name, key)


def test_load_gives_float32_under_every_name():
    arrays = golden_check.load("llip_k4")
    recorded = np.load(FOLDER / "llip_k4.npz")
    assert recorded["w.k_proj"].dtype == np.float16 and arrays["w.k_proj"].dtype == np.float32
    assert np.array_equal(arrays["out.z_tau5"], recorded["out.pred_ws5"])
    assert arrays["in.tokens"].dtype == np.int64 and set(recorded) < set(arrays)


def test_without_gradients_only_values_may_not_be_missing(tmp_path):
    recorded = golden_check.load("losses_small")
    mine = {f"losses_small/{k}": v for k, v in recorded.items() if k.endswith(".loss")}
    np.savez(tmp_path / "mine.npz", **mine)
    assert check(tmp_path / "mine.npz").returncode == 1
    assert check(tmp_path / "mine.npz", "--values").returncode == 0
    del mine["losses_small/out.siglip.loss"]
    np.savez(tmp_path / "mine.npz", **mine)
    assert check(tmp_path / "mine.npz", "--values").returncode == 1


def test_a_prefix_without_recordings_is_named(tmp_path):
    np.savez(tmp_path / "mine.npz", x=np.zeros(1))
    done = check(tmp_path / "mine.npz", "--only", "nonsense")
    assert done.returncode == 1 and "no recorded array starts with nonsense" in done.stdout
