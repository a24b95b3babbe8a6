"""The project computes every output of tests/golden within the tolerances of manifest.json.

The other test files compare the same recordings part by part. Here the project is treated as a port: every
array of a file must be computed, and tests/golden/check.py's rule decides.
"""

import ast
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_golden
from golden_files import FOLDER, MANIFEST, agrees, record

import alignclip
import pretrained
from alignclip import AlignCLIP, cls_attention, guidance, two_paths
from attention import KINDS, attend
from clipood import FineTune, unit
from llip import Llip, PooledTokens, mixture_tokens, project_each
from losses import (
    attention_alignment,
    info_nce,
    siglip,
    siglip_sum,
    similarity_alignment,
    smoothing_targets,
    soft_cross_entropy,
)
from model import CLIP, Block, Config, QuickGELU
from weights import archive

CONFIG = ("embed", "image_size", "patch", "vision_width", "vision_layers", "vision_heads", "vision_mlp")
CONFIG += ("context_length", "vocab_size", "text_width", "text_layers", "text_heads", "text_mlp")


def facts(name):
    return MANIFEST["files"][name + ".npz"]


def config_of(name):
    return Config(*(facts(name)["config"][key] for key in CONFIG))


def filled(module, g, prefix="w."):
    module.load_state_dict({k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)})
    return module


def leaf(x):
    return x.clone().requires_grad_()


def parameter_gradients(module, loss, g, norms, prefix):
    """The norms of all gradients, and the gradients whose recordings begin with the prefix."""
    module.zero_grad()
    loss.backward(retain_graph=True)
    names = dict(module.named_parameters())
    found = {norms: torch.stack([names[name].grad.norm() for name in sorted(names)])}
    for key in (key[4:] for key in g if key.startswith("out." + prefix)):
        found[key] = names[key.removeprefix(prefix)].grad.clone()
    return found


# Losses and layers


@pytest.mark.parametrize("name", ["openclip_losses_a", "openclip_losses_b"])
def test_openclip_losses(name):
    g, found = load_golden(name + ".npz"), {}
    for case in ("clip", "clip_with_bias", "siglip", "siglip_nobias", "siglip_chunk"):
        x = {k: leaf(g["in." + k]) for k in ("image_features", "text_features", "logit_scale", "logit_bias")}
        logits = x["logit_scale"] * x["image_features"] @ x["text_features"].t()
        if case in ("clip_with_bias", "siglip", "siglip_chunk"):
            logits = logits + x["logit_bias"]
        if case == "siglip_chunk":
            parts = [siglip_sum(logits[:, j : j + 3], -j) for j in range(0, len(logits), 3)]
            loss = sum(parts) / len(logits)
        else:
            loss = (info_nce if case.startswith("clip") else siglip)(logits)
        loss.backward()
        found[f"{case}.loss"] = loss
        found |= {f"{case}.grad.{k}": v.grad for k, v in x.items() if v.grad is not None}
    agrees(name, found)


def test_losses_small():
    g, found = load_golden("losses_small.npz"), {}
    for case in ("info_nce", "info_nce_rank", "info_nce_large", "siglip", "siglip_rank", "siglip_large"):
        x = {k: leaf(g["in." + k]) for k in ("image_features", "text_features", "scale", "bias")}
        logits = x["scale"] * x["image_features"] @ x["text_features"].t()
        if case in ("siglip", "siglip_rank"):
            logits = logits + x["bias"]
        loss = {
            "info_nce": lambda s: info_nce(s),
            "info_nce_rank": lambda s: info_nce(s[2:4], s.t()[2:4], offset=2),
            "info_nce_large": lambda s: info_nce(40 * s),
            "siglip": lambda s: siglip(s),
            "siglip_large": lambda s: siglip(100 * s),
            "siglip_rank": lambda s: siglip(s[2:4], offset=2),
        }[case](logits)
        loss.backward()
        found[f"{case}.loss"] = loss
        found |= {f"{case}.grad.{k}": v.grad for k, v in x.items() if v.grad is not None}
    assert 0.5 < found["info_nce.loss"] < 2, "a constant must be far from the loss"
    agrees("losses_small", found)


def test_layers():
    g = load_golden("layers.npz")
    norm, x = filled(Block(12, 2, 4, "gelu").ln_1, g, "w.ln."), leaf(g["in.x"])
    y = norm(x)
    (y * g["in.cotangent"]).sum().backward()
    gelu = Block(12, 2, 4, "gelu").mlp.gelu
    variance = x.detach().var(-1, unbiased=False)
    assert ((9e-6 < variance) & (variance < 1.1e-5)).sum() == 2
    found = {"layer_norm": y, "layer_norm.grad.x": x.grad, "unit": F.normalize(x, dim=-1)}
    found |= {"layer_norm.grad.weight": norm.weight.grad, "layer_norm.grad.bias": norm.bias.grad}
    found |= {"softmax": g["in.scores"].softmax(-1), "log_softmax": g["in.scores"].log_softmax(-1)}
    found |= {"quick_gelu": QuickGELU()(g["in.activation"]), "gelu": gelu(g["in.activation"])}
    agrees("layers", found)


def test_attention_kinds():
    g, found = load_golden("attention_kinds.npz"), {}
    for kind in KINDS:
        mixed, weights = attend(g["in.q"], g["in.k"], g["in.v"], kind, need_weights=True)
        found |= {f"{kind}.mixed": mixed, f"{kind}.weights": weights}
    agrees("attention_kinds", found)
    # the fused form is the one of training
    fused = {f"{kind}.mixed": attend(g["in.q"], g["in.k"], g["in.v"], kind) for kind in KINDS}
    agrees("attention_kinds", found | fused)


# Towers


def test_clip_train_step():
    g = load_golden("clip_train_step.npz")
    model = filled(CLIP(config_of("clip_train_step")), g)
    logits = model.pair_logits(model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"]))
    loss = info_nce(logits)
    found = parameter_gradients(model, loss, g, "grad_norms", "grad.")
    agrees("clip_train_step", found | {"logits_per_image": logits, "loss": loss})


def test_clip_texts():
    g = load_golden("clip_texts.npz")
    model = filled(CLIP(config_of("clip_texts")), g)
    image, text = model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"])
    logits = model.pair_logits(image, text)
    loss = info_nce(logits)
    found = parameter_gradients(model, loss, g, "grad_norms", "grad.")
    agrees("clip_texts", found | {"image_raw": image, "text_raw": text, "logits": logits, "loss": loss})
    # what the texts are for
    tokens = g["in.tokens"].tolist()
    assert any(row.count(39) == 2 for row in tokens) and any(0 in row[: row.index(39)] for row in tokens)


def test_clip_vitA_io():
    """The weights as .npz are enough: no torch file is read."""
    g, w = load_golden("clip_vitA_io.npz"), load_golden("clip_vitA_jit_fp16.npz")
    model = CLIP(config_of("clip_vitA_io"))
    sizes = ("input_resolution", "context_length", "vocab_size")
    filled(model, {k: v for k, v in w.items() if k.removeprefix("w.") not in sizes})
    image, text = model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"])
    logits = model.pair_logits(image, text)
    found = {"encode_image": image, "encode_text": text}
    found |= {"logits_per_image": logits, "logits_per_text": logits.t()}
    files = ("statedict", "jit_fp32", "jit_fp16")
    agrees("clip_vitA_io", {f"clip_load.{file}.{key}": v for file in files for key, v in found.items()})


# Llip


def llip_of(name, temperature, **options):
    c = facts(name)["config"]
    options = {"norm": c["norm"], "all_tokens": c["all_tokens"]} | options
    return Llip(config_of(name), c["mixture_tokens"], c["mixture_heads"], temperature, **options)


def test_llip_k4():
    g, found = load_golden("llip_k4.npz"), {}
    model = filled(llip_of("llip_k4", 1.0), g)
    image, text = model.encode_image(g["in.image"]), model.encode_text(g["in.tokens_all"])
    found |= {"K": image[0], "V": image[1], "Q": text[0], "zt": text[1]}
    for tau in (1, 5):
        model.temperature = float(tau)
        found[f"pred_ws{tau}"] = model.mix(*image, text[0])
        found[f"logits_ws{tau}"] = model.pair_logits(image, text)
        loss = siglip(model.pair_logits(model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"])))
        found |= parameter_gradients(model, loss, g, f"grad_norms_ws{tau}", f"grad_ws{tau}.")
        found[f"loss_ws{tau}"] = loss
    agrees("llip_k4", found)


@pytest.mark.parametrize("name", ["llip_baseline_avg", "llip_baseline_register"])
def test_llip_baselines(name):
    g, c = load_golden(name + ".npz"), facts(name)["config"]
    model = filled(PooledTokens(config_of(name), c["mixture_tokens"], c["pooling"]), g)
    image, text = model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"])
    tokens = project_each(mixture_tokens(model.visual, g["in.image"]), model.visual.proj)
    found = {"visual": tokens, "encode_image": image, "image_features": unit(image)}
    found["text_features"] = unit(text)
    for case, function in (("siglip", siglip), ("clip", info_nce)):
        loss = function(model.pair_logits(image, text))
        norms = f"{case}.grad_norms"
        found |= parameter_gradients(model, loss, g, norms, f"{case}.grad.") | {f"{case}.loss": loss}
    agrees(name, found)


def test_llip_ckpt_io():
    g, w = load_golden("llip_ckpt_io.npz"), load_golden("llip_ckpt_orig_mod_module.npz")
    model = filled(llip_of("llip_ckpt_io", 5.0), w)
    keys, values = model.encode_image(g["in.image"])
    queries, text = model.encode_text(g["in.tokens"])
    found = {"K": keys, "Q": queries, "zt": text, "pred_ws5": model.mix(keys, values, queries)}
    agrees("llip_ckpt_io", found)


@pytest.mark.parametrize("name", ["llip_small", "llip_norm", "llip_all_tokens"])
def test_llip_variants(name):
    g = load_golden(name + ".npz")
    model = filled(llip_of(name, facts(name)["constants"]["temperature"]), g)
    image, text = model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"])
    logits = model.pair_logits(image, text)
    loss = siglip(logits)
    found = parameter_gradients(model, loss, g, "grad_norms", "grad.")
    found |= {"K": image[0], "V": image[1], "Q": text[0], "text_raw": text[1]}
    found |= {"phi": model.mixing_weights(image[0], text[0]), "z": model.mix(*image, text[0])}
    found |= {"logits": logits, "loss": loss}
    if "in.prompts" in g:
        classes = model.ensemble_text(model.encode_text(g["in.prompts"]), g["in.prompt_class"])
        found |= {"class_Q": classes[0], "class_text": classes[1]}
        found["class_logits"] = model.pair_logits(image, classes)
    agrees(name, found)


def test_llip_learned():
    g, c = load_golden("llip_learned.npz"), facts("llip_learned")["config"]
    sizes = config_of("llip_learned"), c["mixture_tokens"], "learned", c["mixture_heads"]
    model = filled(PooledTokens(*sizes, facts("llip_learned")["constants"]["temperature"]), g)
    image, text = model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"])
    logits = model.pair_logits(image, text)
    loss = siglip(logits)
    found = parameter_gradients(model, loss, g, "grad_norms", "grad.")
    agrees("llip_learned", found | {"image_raw": image, "text_raw": text, "logits": logits, "loss": loss})


# AlignCLIP


def test_second_branch():
    g, c, found = load_golden("second_branch.npz"), facts("second_branch")["config"], {}
    sizes = 24, 8, c["vision_width"], c["vision_layers"], c["vision_heads"], c["vision_mlp"]
    visual = CLIP(Config(8, *sizes, 8, 16, 8, 1, 2, 8)).visual
    filled(visual.transformer, g, "w.transformer.")
    for kind in alignclip.BRANCHES:
        start = leaf(g["in.x"])
        x, z, rows = two_paths(visual, start, kind, 2, facts("second_branch")["constants"]["aligned_layers"])
        rows = torch.stack(rows)[:, :, 0]
        loss = (x * g["in.cotangent_x"]).sum() + (z * g["in.cotangent_z"]).sum()
        loss = loss + (rows * g["in.cotangent_rows"]).sum()
        prefix = f"{kind}.grad.transformer."
        found |= parameter_gradients(visual.transformer, loss, g, f"{kind}.grad_norms", prefix)
        found |= {
            f"{kind}.x": x,
            f"{kind}.z": z,
            f"{kind}.attention_rows": rows,
            f"{kind}.grad.x": start.grad,
        }
    agrees("second_branch", found)


def small_method(embed, text, **options):
    scale = options.pop("logit_scale", 1 / 0.07)
    return AlignCLIP(CLIP(Config(embed, 8, 4, 8, 2, 2, 8, 8, 16, 8, 1, 2, 8), scale), text, **options)


def one_step(method, plain, branch, rows, labels):
    """AlignCLIP's losses from token features on, with the gradients of the three leaves."""
    image = unit(plain)
    parts = {"classification": method.classification(image[:, 0], labels)[0]}
    parts |= method.alignment(image[:, 1:], unit(branch[:, 1:]), list(rows[:5, :, None]), labels)
    total = parts["classification"] + method.weight * (parts["attention"] + parts["similarity"])
    total.backward()
    return parts | {"total": total}


def test_alignclip_options():
    g, constants = load_golden("alignclip_options.npz"), facts("alignclip_options")["constants"]
    text, labels, found = unit(g["in.text_raw"]), g["in.labels"], {}
    for form in ("mixture", "released", "uniform", "none"):
        found[f"targets.{form}"] = smoothing_targets(text, constants["epsilon"], form=form)
    given = dict(epsilon=constants["epsilon"], margin=constants["margin"], logit_scale=constants["scale"])
    # "default" passes nothing else: the defaults of AlignCLIP are the recorded ones
    variants = {"default": {}, "detach": dict(detach=True), "all": dict(similarity="all")}
    variants["temperature0.1"] = dict(guidance_temperature=0.1)
    for tag, options in variants.items():
        method = small_method(10, text, **given, **options)
        names = ("tokens_plain_raw", "tokens_branch_raw", "attention_rows")
        leaves = [leaf(g["in." + name]) for name in names]
        parts = one_step(method, *leaves, labels)
        found |= {f"{tag}.{name}_loss": value for name, value in parts.items()}
        for name, x in zip(names, leaves):
            grad = torch.zeros_like(x) if x.grad is None else x.grad
            found[f"{tag}.grad.{name.removesuffix('_raw')}"] = grad
        maps = unit(leaves[1][:, 1:]) @ text.t()
        found[f"{tag}.guidance"] = guidance(maps, labels, method.guidance_temperature)
        found[f"{tag}.attention"] = cls_attention(list(leaves[2][:, :, None]))
    found["zero.attention_loss"] = attention_alignment(g["in.attention_with_zero"], g["in.guidance"])
    assert not found["detach.grad.tokens_branch"].any() and found["default.grad.tokens_branch"].any()
    agrees("alignclip_options", found)


def test_alignclip_aal():
    g = load_golden("alignclip_aal.npz")
    rows, guide = leaf(g["in.cls_attention_rows"]), leaf(g["in.similarity_fs"])
    loss = attention_alignment(cls_attention(list(rows[:5, :, None])), guidance(guide, g["in.labels"]))
    loss.backward()
    found = {"attention.loss": loss, "attention.grad_cls_rows": rows.grad}
    found["attention.grad_similarity_fs"] = guide.grad
    plain, guide = leaf(g["in.similarity_f"]), leaf(g["in.similarity_fs"])
    loss = similarity_alignment(plain, guide)
    loss.backward()
    found |= {"similarity.loss": loss, "similarity.grad_similarity_f": plain.grad}
    agrees("alignclip_aal", found | {"similarity.grad_similarity_fs": guide.grad})


def test_alignclip_sls():
    g = load_golden("alignclip_sls.npz")
    text = unit(g["in.text_features_raw"])
    # the mixture with epsilon 0 is D
    found = {"text_features": text, "distribution": smoothing_targets(text, 0.0)}
    for epsilon in (0.9, 1.0, 0.5):
        logits = leaf(g["in.logits"])
        loss = soft_cross_entropy(logits, smoothing_targets(text, epsilon, form="released")[g["in.labels"]])
        loss.backward()
        found |= {f"eps{epsilon}.loss": loss, f"eps{epsilon}.grad_logits": logits.grad}
    agrees("alignclip_sls", found)


def test_alignclip_total():
    g, found = load_golden("alignclip_total.npz"), {}
    text = unit(g["in.text_features_raw"])
    for weight in (10, 1):
        released = dict(smoothing="released", similarity="all", weight=weight, logit_scale=100.0)
        leaves = [leaf(g["in." + name]) for name in ("f", "f_s", "cls_attention_rows")]
        parts = one_step(small_method(12, text, **released), *leaves, g["in.labels"])
        names = ("cls_loss", "attention_align_loss", "similarity_align_loss", "total_loss")
        found |= {f"w{weight}.{name}": value for name, value in zip(names, parts.values())}
        for name, x in zip(("f", "f_s", "cls_rows"), leaves):
            found[f"w{weight}.grad_{name}"] = x.grad
    agrees("alignclip_total", found)


def test_clipood_mms():
    g, found = load_golden("clipood_mms.npz"), {}
    for tag in ("lam0.3_temp100", "lam0.1_temp100", "lam0.0_temp100", "lam0.3_temp10"):
        margin, scale = (float(x) for x in tag[3:].split("_temp"))
        clip = CLIP(Config(24, 8, 4, 8, 1, 2, 8, 8, 16, 8, 1, 2, 8), scale=scale)
        features = leaf(g["in.features"])
        loss, logs = FineTune(clip, g["in.text_features"], margin=margin).classification(
            unit(features), g["in.labels"]
        )
        loss.backward()
        found |= {f"{tag}.loss": loss, f"{tag}.grad_features": features.grad}
        found[f"{tag}.train_acc_percent"] = 100 * logs["accuracy"]
    agrees("clipood_mms", found)


# Files


def test_views():
    """A transposed view and a storage offset in a checkpoint, read without torch's unpickler and with it."""
    checkpoint = archive.read(FOLDER / "views.pt")
    arrays = pretrained.weights(checkpoint)[0]
    agrees("views", checkpoint.tensors(arrays))
    loaded = torch.load(FOLDER / "views.pt", weights_only=True)["state_dict"]
    assert not loaded["transposed"].is_contiguous() and loaded["offset"].storage_offset() == 6
    agrees("views", loaded)


@pytest.mark.parametrize("name", record.COPIES)
def test_npz_copies(name):
    copied, expected = np.load(FOLDER / f"{name}.npz"), record.copy_of(name)
    assert copied.keys() == expected.keys()
    for key, value in expected.items():
        assert copied[key].dtype == value.dtype and np.array_equal(copied[key], value)


@pytest.mark.parametrize("name", record.CASES)
def test_recording_again_gives_the_same_arrays(name):
    recorded, again = np.load(FOLDER / f"{name}.npz"), record.arrays(record.CASES[name]())
    assert recorded.keys() == again.keys()
    for key, value in again.items():
        assert recorded[key].dtype == value.dtype
        if key.startswith("out."):
            np.testing.assert_allclose(recorded[key], value, rtol=1e-6, atol=1e-9, err_msg=key)
        else:
            assert np.array_equal(recorded[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("name", record.CASES)
def test_the_manifest_says_what_the_recording_says(name):
    case = record.CASES[name]()
    written, again = facts(name), record.entry(name, case, record.arrays(case))
    for key, array in again["arrays"].items():
        # a tolerance is rounded to one digit, and another machine may round it the other way
        atol = array.pop("atol", None)
        recorded = dict(written["arrays"][key])
        assert recorded.pop("atol", None) == (atol and pytest.approx(atol, rel=1)), key
        assert recorded == array, key
    for key in again.keys() - {"arrays", "sha256"}:
        assert json.loads(json.dumps(again[key])) == written[key]


def test_the_recording_uses_nothing_of_the_project():
    tree = ast.parse((FOLDER / "record.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & {path.stem for path in ROOT.glob("*.py")}
    assert names == {"hashlib", "json", "math", "dataclasses", "pathlib", "numpy", "torch"}
    assert all(facts(name)["own"] for name in record.CASES)
