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
import torch.nn.functional as F
from conftest import ROOT, SHARED, load_golden
from golden_files import FOLDER, MANIFEST
from golden_files import check as golden_check
from torch import nn

import pretrained
from alignclip import cls_attention, guidance
from attention import KINDS, attend
from llip import Llip
from losses import attention_alignment, info_nce, siglip
from model import Config

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
    assert names <= {"json", "sys", "pathlib", "numpy"}


# Deliberate errors of a port


def port_of_llip(change=None):
    """Every output of llip_k4, computed by the project after a change of its model."""
    g = load_golden("llip_k4.npz")
    model = Llip(
        Config(32, 32, 8, 64, 2, 2, 256, 16, 150, 64, 2, 2, 256), mixture_tokens=4, heads=4, temperature=1.0
    )
    model.load_state_dict({k[2:]: v for k, v in g.items() if k.startswith("w.")})
    if change:
        change(model)
    names, found = dict(model.named_parameters()), {}
    image, text = model.encode_image(g["in.image"]), model.encode_text(g["in.tokens_all"])
    found |= {"K": image[0], "V": image[1], "Q": text[0], "zt": text[1]}
    factor = model.temperature  # 1, or what a change adds
    for tau in (1, 5):
        model.temperature = tau * factor
        found[f"pred_ws{tau}"] = model.mix(*image, text[0])
        found[f"logits_ws{tau}"] = model.pair_logits(image, text)
        model.zero_grad()
        loss = siglip(model.pair_logits(model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"])))
        loss.backward()
        found[f"loss_ws{tau}"] = loss
        found[f"grad_norms_ws{tau}"] = torch.stack([names[name].grad.norm() for name in sorted(names)])
        prefix = f"out.grad_ws{tau}."
        for key in (key for key in g if key.startswith(prefix)):
            found[key] = names[key.removeprefix(prefix)].grad.clone()
    return {f"llip_k4/{name}": value.detach().numpy() for name, value in found.items()}


def epsilon(value):
    def change(model):
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = value

    return change


def gelu(model):
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
        block.mlp.gelu = nn.GELU()


def root_of_the_head_width(model):
    model.temperature *= 8**0.5


def no_mask(model):
    run = model.transformer.forward
    model.transformer.forward = lambda x, mask=None, keep_tokens=None: run(x, None, keep_tokens)


def last_position(model):
    features = model.text_features_of
    model.text_features_of = lambda x, end: features(x, torch.full_like(end, x.shape[1] - 1))


def softmax_over_heads(model):
    def weights(keys, queries):
        return (torch.einsum("ihmk,jhk->ijhm", keys, queries) / model.temperature).softmax(2)

    model.mixing_weights = weights


def unit_queries(model):
    split = model.split
    model.split = lambda x: F.normalize(split(x), dim=-1)


def negative_bias(model):
    model.logit_bias.data.neg_()


def scale_without_exponential(model):
    model.logit_scale.data.log_()


CHANGES = [
    epsilon(1e-6),
    epsilon(1e-12),
    gelu,
    root_of_the_head_width,
    no_mask,
    last_position,
    softmax_over_heads,
    unit_queries,
    negative_bias,
    scale_without_exponential,
]


def test_check_accepts_a_whole_port():
    lines, bad = golden_check.check(port_of_llip(), "llip_k4")
    assert bad == 0, lines
    assert all(float(line.split()[1]) < 0.5 for line in lines if line.startswith("ok")), lines


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__qualname__)
def test_check_finds_the_errors_of_ports(change):
    lines, _ = golden_check.check(port_of_llip(change), "llip_k4")
    assert [line for line in lines if line.startswith("WRONG")]


def port_of_the_losses(attention, contrastive, guide=guidance, layers=5):
    """AAL and InfoNCE with their gradients, computed with the given functions."""
    g, found = load_golden("alignclip_aal.npz"), {}
    rows, similarity = (g["in." + k].requires_grad_() for k in ("cls_attention_rows", "similarity_fs"))
    loss = attention(cls_attention(list(rows[:layers, :, None])), guide(similarity, g["in.labels"]))
    loss.backward()
    found["alignclip_aal/attention.loss"] = loss
    found["alignclip_aal/attention.grad_cls_rows"] = rows.grad
    found["alignclip_aal/attention.grad_similarity_fs"] = similarity.grad
    g = load_golden("openclip_losses_a.npz")
    x = {k: g["in." + k].requires_grad_() for k in ("image_features", "text_features", "logit_scale")}
    loss = contrastive(x["logit_scale"] * x["image_features"] @ x["text_features"].t())
    loss.backward()
    found["openclip_losses_a/clip.loss"] = loss
    found |= {f"openclip_losses_a/clip.grad.{k}": v.grad for k, v in x.items()}
    return {name: value.detach().numpy() for name, value in found.items()}


def over_classes(similarity, labels):
    """A wrong guidance: the softmax over classes."""
    return similarity.softmax(2)[torch.arange(len(labels)), :, labels]


def small_number_in_the_logarithm(attention, guide):
    return F.kl_div((attention + 1e-8).log(), guide, reduction="batchmean")


@pytest.mark.parametrize(
    "wrong, changes",
    [
        ("", {}),
        ("alignclip_aal", {"attention": small_number_in_the_logarithm}),
        ("alignclip_aal", {"attention": lambda a, b: attention_alignment(b, a)}),
        ("alignclip_aal", {"guide": over_classes}),
        ("alignclip_aal", {"layers": 6}),
        ("openclip_losses_a", {"contrastive": lambda logits: 0 * info_nce(logits)}),
        ("openclip_losses_a", {"contrastive": lambda x: F.cross_entropy(x, torch.arange(len(x)))}),
    ],
)
def test_check_finds_wrong_losses(wrong, changes):
    functions = {"attention": attention_alignment, "contrastive": info_nce} | changes
    lines, _ = golden_check.check(port_of_the_losses(**functions))
    compared = [line.split() for line in lines if line.startswith(("ok", "WRONG"))]
    assert len(compared) == 7
    assert {name.split("/")[0] for word, _, name, *_ in compared if word == "WRONG"} == {wrong} - {""}


def mixed_by(attention):
    """Outputs of attention_kinds from a function of (q, k, v, kind) that returns mixed values and weights."""
    g = load_golden("attention_kinds.npz")
    found = {}
    for kind in KINDS:
        mixed, weights = attention(g["in.q"], g["in.k"], g["in.v"], kind)
        found |= {f"attention_kinds/{kind}.mixed": mixed, f"attention_kinds/{kind}.weights": weights}
    return {name: value.numpy() for name, value in found.items()}


def weighted(q, k, v, kind):
    return attend(q, k, v, kind, need_weights=True)


def no_root(q, k, v, kind):
    """K is 4, so q, k and v times the square root of 2 remove the division by 2."""
    mixed, weights = weighted(*(2**0.5 * x for x in (q, k, v)), kind)
    return mixed / 2**0.5, weights


def swapped(q, k, v, kind):
    return weighted(q, k, v, {"qqv": "kkv", "kkv": "qqv"}.get(kind, kind))


def mixes_queries(q, k, v, kind):
    mixed, weights = weighted(q, k, v, kind)
    return (weights @ q if kind == "vvv" else mixed), weights


def mean_of_values(q, k, v, kind):
    mixed, weights = weighted(q, k, v, kind)
    return (v.mean(2, keepdim=True).expand_as(v) if kind == "dv" else mixed), weights


def keys_for_dv(q, k, v, kind):
    mixed, weights = weighted(q, k, v, kind)
    return (k if kind == "dv" else mixed), weights


def test_attention_kinds_equal_the_loops():
    g = load_golden("attention_kinds.npz")
    for kind in KINDS:
        assert (f"out.{kind}.mixed" in g) and (f"out.{kind}.weights" in g)
        close = {"rtol": 1e-5, "atol": 2e-6}
        mixed, weights = attend(g["in.q"], g["in.k"], g["in.v"], kind, need_weights=True)
        torch.testing.assert_close(mixed, g[f"out.{kind}.mixed"], **close)
        torch.testing.assert_close(weights, g[f"out.{kind}.weights"], **close)
        fused = attend(g["in.q"], g["in.k"], g["in.v"], kind)
        torch.testing.assert_close(fused, g[f"out.{kind}.mixed"], **close)


def test_check_accepts_the_attention_kinds():
    assert golden_check.check(mixed_by(weighted))[1] == 0


@pytest.mark.parametrize("attention", [no_root, swapped, mixes_queries, mean_of_values, keys_for_dv])
def test_check_finds_wrong_attention(attention):
    assert golden_check.check(mixed_by(attention))[1] > 0
