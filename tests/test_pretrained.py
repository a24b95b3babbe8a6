"""pretrained.py and layouts.py: every layout gives the same model; whatever is uncertain is an error."""

import importlib
import json
import os
import resource
import shutil
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import evaluate
import pretrained
from llip import Llip, PooledTokens
from model import CLIP, CONFIGS, Config
from tokenizer import Tokenizer
from weights import layouts

# Heads are 64 wide in neither tower, the activation is QuickGELU
CONFIG = Config(24, 16, 8, 48, 2, 3, 96, 10, 60, 32, 2, 4, 64)
KNOWN = dict(quick_gelu=True, vision_heads=3, text_heads=4)


def make(kind=CLIP, *args, config=CONFIG, **options):
    torch.manual_seed(0)
    model = kind(config, *args, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros or ones that could be taken for each other
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def inputs(config=CONFIG, n=3):
    g = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, config.image_size, config.image_size, generator=g)
    tokens = torch.randint(1, config.vocab_size - 2, (n, config.context_length), generator=g)
    tokens[:, 0] = config.vocab_size - 2
    for row, end in enumerate((4, config.context_length - 1, 6)[:n]):
        tokens[row, end], tokens[row, end + 1 :] = config.vocab_size - 1, 0
    return images, tokens


@torch.no_grad()
def logits(model):
    images, tokens = inputs(model.config)
    return model.pair_logits(model.encode_image(images), model.encode_text(tokens))


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and type(model) is type(other)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert pretrained.describe(model) == pretrained.describe(other)
    assert torch.equal(logits(model), logits(other))
    assert not other.training and {p.dtype for p in other.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in other.parameters())


def saved(tmp_path, content, name="weights.any"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


# ---- the official implementations' files


def golden_model(golden):
    return pretrained.load(golden("clip_vitA_jit_fp16.pt"))


def parity(model, io, case="clip_load.jit_fp16"):
    image, text = model.encode_image(io["in.image"]), model.encode_text(io["in.tokens"])
    torch.testing.assert_close(image, io[f"out.{case}.encode_image"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(text, io[f"out.{case}.encode_text"], rtol=1e-4, atol=2e-5)
    logits = model.pair_logits(image, text)
    torch.testing.assert_close(logits, io[f"out.{case}.logits_per_image"], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(logits.t(), io[f"out.{case}.logits_per_text"], rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_openai_archive_gives_openai_features(golden, golden_arrays):
    model, io = golden_model(golden), golden_arrays("clip_vitA_io.npz")
    # OpenAI's loader rounds the weights of all three files to fp16
    for file in ("jit_fp16", "jit_fp32", "statedict"):
        parity(model, io, "clip_load." + file)
    assert model.config.activation == "quick_gelu" and model.config.vision_heads == 1
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


@torch.no_grad()
def test_fp32_weights_give_the_features_of_fp32(golden, golden_arrays):
    model = pretrained.load(golden("clip_vitA_statedict.pt"), quick_gelu=True, vision_heads=1, text_heads=2)
    parity(model, golden_arrays("clip_vitA_io.npz"), "raw_fp32")


def gelu(model):
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
        block.mlp.gelu = nn.GELU()


def epsilon(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def looks_ahead(model):
    forward = model.transformer.forward
    model.transformer.forward = lambda x, mask=None, keep_tokens=None: forward(x, None, keep_tokens)


def last_token(model):
    features = model.text_features_of
    model.text_features_of = lambda x, end: features(x, torch.full_like(end, x.shape[1] - 1))


def other_heads(model):
    for block in model.visual.transformer.resblocks:
        block.attn.heads *= 2


@pytest.mark.parametrize("mutant", [gelu, epsilon, looks_ahead, last_token, other_heads])
@torch.no_grad()
def test_parity_notices(golden, golden_arrays, mutant):
    model, io = golden_model(golden), golden_arrays("clip_vitA_io.npz")
    mutant(model)
    with pytest.raises(AssertionError):
        parity(model, io)


@pytest.mark.parametrize("file", ["plain", "module", "orig_mod_module"])
@torch.no_grad()
def test_llip_release(golden, golden_arrays, file):
    io = golden_arrays("llip_ckpt_io.npz")
    path = golden(f"llip_ckpt_{file}.pt")
    known = dict(vision_heads=2, text_heads=2, mixture_heads=4, temperature=5.0)
    model = pretrained.load(path, **known)  # QuickGELU without being told
    keys, values = model.encode_image(io["in.image"])
    queries, text = model.encode_text(io["in.tokens"])
    torch.testing.assert_close(keys, io["out.K"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(queries, io["out.Q"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, io["out.zt"], rtol=1e-4, atol=1e-5)
    found = model.mix(keys, values, queries)
    torch.testing.assert_close(found, io["out.pred_ws5"], rtol=1e-4, atol=1e-5)
    del known["temperature"]
    with pytest.raises(ValueError, match="temperature"):
        pretrained.load(path, **known)


def test_torchscript_is_quick_gelu_unless_told_otherwise(golden):
    path = golden("clip_vitA_jit_fp16.pt")
    same(pretrained.load(path), pretrained.load(path, quick_gelu=True, vision_heads=1))
    assert pretrained.load(path, quick_gelu=False).config.activation == "gelu"
    with pytest.raises(ValueError, match="mixture_heads: the checkpoint says None"):
        pretrained.load(path, mixture_heads=8)


def test_llip_is_quick_gelu_unless_told_otherwise(tmp_path):
    path = saved(tmp_path, make(Llip, 4, 3).state_dict())
    known = dict(vision_heads=3, text_heads=4, mixture_heads=3, temperature=5.0)
    assert pretrained.load(path, **known).config.activation == "quick_gelu"
    assert pretrained.load(path, quick_gelu=False, **known).config.activation == "gelu"


# ---- wrappers, prefixes, layouts


PREFIXES = "module. _orig_mod. module._orig_mod. _orig_mod.module. model. clip. clip_model. base_model.model."
PREFIXES += " module.model. model.clip. model._orig_mod.clip_model. module.base_model.model.clip."


@pytest.mark.parametrize("prefix", ["", *PREFIXES.split()])
def test_wrappers_and_prefixes(tmp_path, prefix):
    model = make()
    state = {prefix + k: v for k, v in model.state_dict().items()}
    for wrap in (
        state,
        {"state_dict": state, "epoch": 3, "rng": torch.get_rng_state()},
        {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        {"model": {"state_dict": state}},
        {"state_dict_ema": state, "state_dict": {k: v + 1 for k, v in state.items()}},
        {"state_dict_ema": None, "state_dict": state},
        {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in state.items()},
    ):
        same(model, pretrained.load(saved(tmp_path, wrap), **KNOWN))


def test_parameters_with_attributes(tmp_path):
    """torch pickles an nn.Parameter with extra attributes in another way."""
    model = make()
    state = {k: nn.Parameter(v) for k, v in model.state_dict().items()}
    state["ln_final.bias"].weight_decay = [0.0, {"table": torch.zeros(3)}]
    torch.save(state, tmp_path / "x")
    same(model, pretrained.load(tmp_path / "x", **KNOWN))


def test_averaged_models_of_torch(tmp_path):
    model = make()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    same(model, pretrained.load(saved(tmp_path, averaged.state_dict()), **KNOWN))


def test_sharded_and_half_precision_repositories(tmp_path):
    model = make()
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config()))
    state = {k: v.half().float() for k, v in huggingface_state(model).items()}
    places = {}
    for name in state:
        places[name] = f"model-{1 + ('text' in name)}.safetensors"
    for file in set(places.values()):
        with open(tmp_path / file, "wb") as opened:
            layouts.write_safetensors({n: t for n, t in state.items() if places[n] == file}, opened)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=2))
    found = pretrained.load(tmp_path)
    assert all(torch.equal(v, model.state_dict()[k].half().float()) for k, v in found.state_dict().items())
    same(found, pretrained.load(index))
    with pytest.raises(ValueError, match="missing"):
        pretrained.load(tmp_path / "model-1.safetensors")
    index.unlink()
    with open(tmp_path / "model.fp16.safetensors", "wb") as opened:
        layouts.write_safetensors(state, opened)
    same(found, pretrained.load(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(tmp_path, dtype):
    model = make()
    state = {k: v.to(dtype) for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "x")
    found = pretrained.load(tmp_path / "x", **KNOWN)
    assert all(torch.equal(v, state[k].float()) for k, v in found.state_dict().items())


def test_the_format_before_torch_1_6_is_refused(tmp_path):
    torch.save(make().state_dict(), tmp_path / "x", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before 1.6: load it with torch and save it again"):
        pretrained.load(tmp_path / "x", **KNOWN)


def test_openai_buffers_are_dropped(tmp_path):
    model, extra = make(), {"input_resolution": 16, "context_length": 10, "vocab_size": 60}
    state = dict(model.state_dict()) | {k: torch.tensor(v) for k, v in extra.items()}
    same(model, pretrained.load(saved(tmp_path, state), **KNOWN))


@pytest.mark.parametrize("bias", [None, -3.0])
def test_custom_text_clip(tmp_path, bias):
    model = make(bias=bias)
    state = {}
    for name, tensor in model.state_dict().items():
        inside = name.startswith("visual.") or name.startswith("logit_")
        state[name if inside else "text." + name] = tensor[None] if "logit_" in name else tensor
    state["text.attn_mask"] = torch.zeros(10, 10)
    same(model, pretrained.load(saved(tmp_path, state), **KNOWN))


def huggingface_state(model):
    """transformers' names, written out by hand and not by the table under test."""
    s, found = model.state_dict(), {"logit_scale": model.logit_scale.data}
    for ours, theirs in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for i in range(2):
            a, b = f"{ours}.resblocks.{i}.", f"{theirs}.encoder.layers.{i}."
            for kind in ("weight", "bias"):
                q, k, v = s[f"{a}attn.in_proj_{kind}"].chunk(3)
                found[f"{b}self_attn.q_proj.{kind}"] = q
                found[f"{b}self_attn.k_proj.{kind}"] = k
                found[f"{b}self_attn.v_proj.{kind}"] = v
                found[f"{b}self_attn.out_proj.{kind}"] = s[f"{a}attn.out_proj.{kind}"]
                found[f"{b}layer_norm1.{kind}"] = s[f"{a}ln_1.{kind}"]
                found[f"{b}layer_norm2.{kind}"] = s[f"{a}ln_2.{kind}"]
                found[f"{b}mlp.fc1.{kind}"] = s[f"{a}mlp.c_fc.{kind}"]
                found[f"{b}mlp.fc2.{kind}"] = s[f"{a}mlp.c_proj.{kind}"]
    for kind in ("weight", "bias"):
        found[f"vision_model.pre_layrnorm.{kind}"] = s[f"visual.ln_pre.{kind}"]
        found[f"vision_model.post_layernorm.{kind}"] = s[f"visual.ln_post.{kind}"]
        found[f"text_model.final_layer_norm.{kind}"] = s[f"ln_final.{kind}"]
    found["vision_model.embeddings.class_embedding"] = s["visual.class_embedding"]
    found["vision_model.embeddings.patch_embedding.weight"] = s["visual.conv1.weight"]
    found["vision_model.embeddings.position_embedding.weight"] = s["visual.positional_embedding"]
    found["text_model.embeddings.token_embedding.weight"] = s["token_embedding.weight"]
    found["text_model.embeddings.position_embedding.weight"] = s["positional_embedding"]
    found["visual_projection.weight"] = s["visual.proj"].t()
    found["text_projection.weight"] = s["text_projection"].t()
    return found


def huggingface_config(**changes):
    text = {"num_attention_heads": 4, "hidden_act": "quick_gelu", **changes}
    vision = {"num_attention_heads": 3, "hidden_act": "quick_gelu", **changes}
    return {"model_type": "clip", "text_config": text, "vision_config": vision}


def test_huggingface_bin_with_its_config(tmp_path):
    model = make()
    state = huggingface_state(model) | {
        "text_model.embeddings.position_ids": torch.arange(10)[None],
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    path = saved(tmp_path, state, "pytorch_model.bin")
    with pytest.raises(ValueError, match="--quick-gelu"):
        pretrained.load(path)
    same(model, pretrained.load(path, **KNOWN))
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config()))
    same(model, pretrained.load(path))
    same(model, pretrained.load(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(hidden_act="gelu")))
    assert pretrained.load(tmp_path).config == replace(CONFIG, activation="gelu")
    with pytest.raises(ValueError, match="quick_gelu: the checkpoint says 'gelu'"):
        pretrained.load(tmp_path, quick_gelu=True)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu_new"},
        {"layer_norm_eps": 1e-6},
        {"hidden_act": None},
        {"num_attention_heads": "3"},
    ],
)
def test_huggingface_configs_that_are_not_computed(tmp_path, change):
    saved(tmp_path, huggingface_state(make()), "pytorch_model.bin")
    for text in (json.dumps(huggingface_config(**change)), '{"model_type": "siglip"}', "[]", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config"):
            pretrained.load(tmp_path)


@pytest.mark.parametrize("value", [3.5, "3", None, True, [3], {"a": 1}, 0, -3, 10**400, float("nan")])
def test_configuration_values_of_the_wrong_kind(tmp_path, value):
    """Each gives one line, whatever the value is of."""
    saved(tmp_path, huggingface_state(make()), "pytorch_model.bin")
    good = huggingface_config()
    tower = good["vision_config"]
    changed = [good | {"vision_config": tower | {key: value}} for key in (*tower, "layer_norm_eps")]
    for settings in (*changed, good | {"vision_config": value}, good | {"vision_config_dict": value}):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        try:
            pretrained.load(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
    (tmp_path / "pytorch_model.bin").unlink()
    saved(tmp_path, make().state_dict(), "open_clip_pytorch_model.bin")
    for part, key in (("vision", "width"), ("vision", "head_width"), ("text", "heads"), ("vision", "layers")):
        settings = {"vision_cfg": {"head_width": 16, "width": 48}, "text_cfg": {"heads": 4}}
        settings[f"{part}_cfg"][key] = value
        for model_cfg in (settings, settings | {f"{part}_cfg": value}, value):
            (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
            try:
                pretrained.load(tmp_path)
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 400


@pytest.mark.parametrize("name", ["vision_model.head.probe", "visual.trunk.attn_pool.latent"])
def test_bare_siglip_weights_are_named(tmp_path, name):
    with pytest.raises(ValueError, match="SigLIP's towers.*not supported") as error:
        pretrained.load(saved(tmp_path, {name: torch.zeros(1, 1, 8), "logit_scale": torch.zeros(1)}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual."])
def test_bare_resnet_towers_are_named(tmp_path, prefix):
    state = {
        f"{prefix}layer1.0.conv1.weight": torch.zeros(2),
        f"{prefix}attnpool.c_proj.bias": torch.zeros(2),
    }
    with pytest.raises(ValueError, match="ResNet checkpoints are not supported"):
        pretrained.load(saved(tmp_path, state))


def test_shapes_that_no_layout_has_are_one_line(tmp_path):
    """Tensors with other numbers of dimensions, and of size 0."""
    others = (torch.zeros(()), torch.zeros(2), torch.zeros(2, 0, 1), torch.zeros(1, 2, 1, 1, 1))
    for model in (make().state_dict(), make(Llip, 2, 2).state_dict(), huggingface_state(make())):
        for number, name in enumerate(model):
            other = others[number % 4]
            if other.dim() == model[name].dim() or ".1." in name:
                continue
            with pytest.raises(ValueError) as error:
                pretrained.load(saved(tmp_path, dict(model) | {name: other}), **KNOWN)
            assert "\n" not in str(error.value)


def test_huggingface_with_a_part_missing(tmp_path):
    state = huggingface_state(make())
    del state["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(transformer.resblocks.1.attn.in_proj_bias"):
        pretrained.load(saved(tmp_path, state), **KNOWN)


def test_open_clip_config(tmp_path):
    model = make(config=replace(CONFIG, activation="gelu"))
    saved(tmp_path, model.state_dict(), "open_clip_pytorch_model.bin")
    vision = {"image_size": 16, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
    text = {"context_length": 10, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2}
    settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    same(model, pretrained.load(tmp_path))
    settings["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    assert pretrained.load(tmp_path).config.activation == "quick_gelu"
    vision["pool_type"] = "avg"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    with pytest.raises(ValueError, match="pool_type"):
        pretrained.load(tmp_path)


def variants():
    yield make()
    yield make(bias=-4.0)
    yield make(Llip, 4, 3, temperature=2.0)
    yield make(Llip, 1, 4, norm=True)
    yield make(Llip, 4, 2, all_tokens=True)
    yield make(PooledTokens, 4)
    yield make(PooledTokens, 4, "register", bias=None)
    yield make(PooledTokens, 4, "learned", heads=3, temperature=0.5)


@pytest.mark.parametrize("number", range(8))
def test_our_checkpoints_need_no_argument(tmp_path, number):
    model = list(variants())[number]
    path = pretrained.save(model, tmp_path / "run" / "checkpoint.pt")
    same(model, pretrained.load(path))
    same(model, pretrained.load(tmp_path / "run"))
    content = torch.load(path, weights_only=True)
    assert content["model"] == pretrained.describe(model) == json.loads(json.dumps(content["model"]))
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"], "no temporary file is left"
    if "all_tokens" in content["model"]:  # older files have a variant that is gone
        older = content | {"model": content["model"] | {"shared": False}}
        same(model, pretrained.load(saved(tmp_path, older)))
    trained = content | {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "step": 7}
    same(model, pretrained.load(saved(tmp_path, trained)))
    with pytest.raises(ValueError, match="quick_gelu: the checkpoint says 'quick_gelu', gelu was given"):
        pretrained.load(path, quick_gelu=False)


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 7])
def test_bare_state_dicts_of_llip_and_pooled(tmp_path, number):
    model = list(variants())[number]
    told = pretrained.describe(model)
    extra = {"pooling": told["pooling"]} if "pooling" in told else {}
    if told.get("pooling") in (None, "learned"):
        extra |= {"mixture_heads": told["heads"], "temperature": told["temperature"]}
    found = pretrained.load(saved(tmp_path, model.state_dict()), **KNOWN, **extra)
    same(model, found)
    if "pooling" in told and told["pooling"] != "learned":
        with pytest.raises(ValueError, match="pooling"):
            pretrained.load(tmp_path / "weights.any", **KNOWN)


def test_temperature_of_ours_can_be_changed(tmp_path):
    path = pretrained.save(make(Llip, 4, 3, temperature=2.0), tmp_path / "x")
    assert pretrained.load(path, temperature=8.0).temperature == 8.0
    with pytest.raises(ValueError, match="mixture_heads"):
        pretrained.load(path, mixture_heads=4)


def test_llip_legacy_names(tmp_path):
    model = make(Llip, 1, 3)
    state = dict(model.state_dict())
    state["out_proj"] = state.pop("pred.out_proj")
    state["visual.class_embedding"] = state["visual.class_embedding"][0]
    extra = dict(mixture_heads=3, temperature=5.0)
    same(model, pretrained.load(saved(tmp_path, state), **KNOWN, **extra))


@pytest.mark.parametrize("width, embed, temperature", [(768, 512, 5.0), (1024, 768, 1.0), (1280, 1024, 5.0)])
def test_released_llip_shapes_are_recognised(width, embed, temperature):
    with torch.device("meta"):
        config = Config(embed, 32, 16, width, 1, width // 64, width, 8, 60, 64, 1, 1, 64)
        state = Llip(config, 4, 8, norm=width == 1280).state_dict()
    found = pretrained.infer(state, {"activation": "quick_gelu"})
    assert found["temperature"] == temperature and found["heads"] == 8
    assert found["norm"] == (width == 1280)
    assert found["config"]["vision_heads"] == 16 if width > 768 else 12


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("ViT")])
def test_heads_and_sizes_of_the_named_models_come_from_the_shapes(name):
    with torch.device("meta"):
        state = CLIP(CONFIGS[name]).state_dict()
    found = pretrained.infer(state, {"activation": "quick_gelu"})
    assert found == {"class": "CLIP", "config": asdict(CONFIGS[name]), "bias": None}


# ---- what must not load


def spoil(state, name):
    if name == "missing":
        del state["visual.ln_post.weight"], state["transformer.resblocks.1.ln_1.bias"]
    elif name == "unused":
        state["visual.extra"] = torch.zeros(1)
    elif name == "shape":
        state["ln_final.bias"] = torch.zeros(7)
    elif name == "nan":
        state["ln_final.bias"][3] = float("nan")
    elif name == "inf":
        state["logit_scale"] = torch.tensor(float("inf"))
    elif name == "integers":
        state["ln_final.bias"] = state["ln_final.bias"].long()
    elif name == "positions":
        state["visual.positional_embedding"] = torch.zeros(7, 48)
    elif name == "resnet":
        state["visual.layer1.0.conv1.weight"] = torch.zeros(2)
        state["visual.bn1.num_batches_tracked"] = torch.tensor(3)
    elif name == "no text":
        del state["text_projection"]
    elif name == "twice":
        state["module.ln_final.bias"] = state["ln_final.bias"]
    elif name == "odd name":
        state["ln_final\n\x1b[2J.bias"] = state.pop("ln_final.bias")
    elif name == "half a Llip":
        state["q_proj"] = state.pop("visual.proj")
    elif name == "layers":
        state["visual.transformer.resblocks.9.ln_1.bias"] = torch.zeros(48)
    return state


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing", r"2 missing \(.*visual.ln_post.weight"),
        ("unused", r"1 unused \(visual.extra\)"),
        ("shape", r"ln_final.bias \(7,\) for \(32,\)"),
        ("nan", "NaN"),
        ("inf", "infinite"),
        ("integers", "torch.int64"),
        ("positions", "7 image positions"),
        ("resnet", "ResNet checkpoints are not supported"),
        ("no text", "text_projection is missing"),
        ("twice", "two tensors are called"),
        ("odd name", r"1 unused \(ln_final"),
        ("half a Llip", "visual.proj is missing"),
        ("layers", "unused|missing"),
    ],
)
def test_spoiled_state_dicts(tmp_path, name, words):
    state = spoil({k: v.clone() for k, v in make().state_dict().items()}, name)
    path = saved(tmp_path, state)
    with pytest.raises(ValueError, match=words) as error:
        pretrained.load(path, **KNOWN)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_what_shapes_cannot_tell_must_be_said(tmp_path):
    path = saved(tmp_path, make().state_dict())
    with pytest.raises(ValueError, match="quick_gelu=True.*or False"):
        pretrained.load(path, vision_heads=3, text_heads=4)
    with pytest.raises(ValueError, match="give vision_heads"):  # 48 is no multiple of 64
        pretrained.load(path, quick_gelu=True, text_heads=4)
    with pytest.raises(ValueError, match="5 heads"):
        pretrained.load(path, quick_gelu=True, vision_heads=5, text_heads=4)
    with pytest.raises(ValueError, match="vision_heads is 0"):
        pretrained.load(path, quick_gelu=True, vision_heads=0, text_heads=4)


@pytest.mark.parametrize(
    "content", [{"a": 1}, [1], 3, {"state_dict": {}}, {0: torch.zeros(1)}, nn.Linear(1, 1)]
)
def test_files_without_a_state_dict(tmp_path, content):
    with pytest.raises(ValueError, match="no state dict"):
        pretrained.load(saved(tmp_path, content))


def test_names_and_paths(tmp_path, monkeypatch):
    for source in ("RN50x4", tmp_path / "nothing.pt"):
        with pytest.raises(ValueError, match="no such file.*ViT-B-32"):
            pretrained.load(source)
    with pytest.raises(ValueError, match="without any of checkpoint.pt"):
        pretrained.load(tmp_path)
    path = pretrained.save(make(), tmp_path / "x")
    asked = []
    monkeypatch.setattr(pretrained, "fetch", lambda name: asked.append(name) or path)
    for name in ("ViT-B/32", "ViT-L/14@336px", "llip-G-14"):
        pretrained.load(name)
    assert asked == ["ViT-B/32", "ViT-L/14@336px", "llip-G-14"]


def nested(depth=60):
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        {"class": "os.system"},
        {"class": nested()},
        {"config": None},
        {"config": {}},
        {"config": asdict(CONFIG) | {"vision_layers": 10**9}},
        {"config": asdict(CONFIG) | {"vision_layers": nested()}},
        {"config": asdict(CONFIG) | {"vision_width": True}},
        {"config": asdict(CONFIG) | {"activation": "relu"}},
        {"config": asdict(CONFIG) | {"more": 1}},
        {"heads": 0},
        {"heads": 5},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"mixture_tokens": 10**9},
        {"norm": 1},
        {"more": 1},
        {"pooling": "average"},
    ],
)
def test_descriptions_that_do_not_describe(tmp_path, change):
    model = make(Llip, 4, 3)
    good = pretrained.describe(model)
    path = saved(tmp_path, {"state_dict": model.state_dict(), "model": good})
    same(model, pretrained.load(path))
    saved(tmp_path, {"state_dict": model.state_dict(), "model": good | change})
    with pytest.raises(ValueError) as error:
        pretrained.load(path)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["activation", "vision_heads", "text_heads", "heads", "temperature"])
def test_a_description_without_what_it_needs(tmp_path, key):
    """A missing value is never guessed from the shapes."""
    content = torch.load(pretrained.save(make(Llip, 4, 3), tmp_path / "x"), weights_only=True)
    content["model"].pop(key, None)
    content["model"]["config"].pop(key, None)
    with pytest.raises(ValueError, match=key):
        pretrained.load(saved(tmp_path, content))
    with pytest.raises(ValueError, match="Linear is none of"):
        pretrained.describe(nn.Linear(1, 1))


# ---- writing


def test_huggingface_round_trip(tmp_path):
    model = make(config=replace(CONFIG, activation="gelu"))
    folder = pretrained.save(model, tmp_path / "hf", "huggingface")
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    same(model, pretrained.load(folder))
    settings = json.loads((folder / "config.json").read_text())
    assert settings["text_config"]["eos_token_id"] == 59, "2 would mean another pooling"
    expected = huggingface_state(model)
    found = layouts.to_huggingface(model.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_what_cannot_be_written(tmp_path):
    for model in (make(bias=-1.0), make(Llip, 2, 2)):
        with pytest.raises(ValueError, match="without logit_bias only"):
            pretrained.save(model, tmp_path / "x", "huggingface")
    with pytest.raises(ValueError, match="expected openai or huggingface"):
        pretrained.save(make(), tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = pretrained.save(make(), tmp_path / "x")
    old = path.read_bytes()

    def full(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        pretrained.save(make(bias=-1.0), path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_named(tmp_path):
    """The kernel's error, which torch.save replaces with a message about positions in a zip."""
    if (pid := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            pretrained.save(make(), tmp_path / "x.pt")
        except OSError as error:
            os._exit(0 if "x.pt" in str(error) and "File too large" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not list(tmp_path.iterdir())


def test_tokenizer_beside(tmp_path):
    assert pretrained.tokenizer_beside(tmp_path) is None
    learned = Tokenizer.learn(["a cat", "a cat"], 520)
    learned.save(tmp_path / "tokenizer.json")
    for source in (tmp_path, tmp_path / "checkpoint.pt"):
        assert pretrained.tokenizer_beside(source).encode("a cat") == learned.encode("a cat")


@pytest.mark.parametrize(
    "content", [b"", b"#alignclip-bpe version 1, 6 merges\nc a\n", b"Xalignclip\n", b"\xf5"]
)
def test_a_damaged_vocabulary_of_a_run_is_named(tmp_path, content):
    pretrained.save(make(), tmp_path / "checkpoint.pt")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json.*restore this file, or name another vocab.*--vocab"):
        evaluate.open_model(str(tmp_path))


def test_the_lost_vocabulary_of_a_run_is_not_replaced_by_openais(tmp_path):
    pretrained.save(make(), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="no tokenizer.json for its 60 tokens.*--vocab"):
        evaluate.open_model(str(tmp_path))


def test_a_lost_vocabulary_is_told_where_openais_is_absent_too(tmp_path, monkeypatch):
    """Maps and --init look for OpenAI's before they know the size of the model's."""
    pretrained.save(make(), tmp_path / "checkpoint.pt")
    monkeypatch.setenv("ALIGNCLIP_VOCAB", str(tmp_path / "none.gz"))
    with pytest.raises(OSError, match=f"no tokenizer.json beside {tmp_path}, and .*none.gz"):
        evaluate.open_model(str(tmp_path), towers=True)


HARD = ["a photo of a cat!", "It's  12 o'clock ## #cats", "ünïcode — ok…", "WOW!! A CAT", "#... hash"]


def vocabularies(shared=None):
    yield Tokenizer.learn(["a ## red cat, it's 12 o'clock ##", *["two cats #cats"] * 5], 600)
    if shared is not None:
        yield Tokenizer.from_openai(shared / "data" / "tokenizer_prompts" / "bpe_simple_vocab_16e6.txt.gz")


def exported(folder, tokenizer, **preprocessing):
    config = replace(CONFIG, context_length=20, vocab_size=tokenizer.vocab_size, preprocessing=preprocessing)
    return pretrained.save(make(config=config), folder, "huggingface", tokenizer)


@pytest.mark.parametrize("number", [0, 1])
def test_the_export_brings_its_vocabulary_back(tmp_path, request, number):
    tokenizer = list(vocabularies(request.getfixturevalue("shared") if number else None))[number]
    stated = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    for own in ({}, stated, {"resize_mode": "squash"}):
        folder = exported(tmp_path / "hf", tokenizer, **own)
        assert pretrained.load(folder).config.preprocessing == own
    found = pretrained.tokenizer_for(folder)
    assert torch.equal(found(HARD, 20), tokenizer(HARD, 20)) and found.merges == tokenizer.merges
    assert json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] != "!"
    with pytest.raises(ValueError, match="tokens, the model 60: give --vocab"):
        pretrained.save(make(), tmp_path / "other", "huggingface", tokenizer)
    assert not (tmp_path / "other").exists()


def test_the_program_exports_the_vocabulary_of_a_run(tmp_path, small_runs):
    command = [str(small_runs["clip"]), "--to", "huggingface", "--out", str(tmp_path / "hf")]
    assert pretrained.main(command) == 0
    ours, found = (pretrained.tokenizer_beside(path) for path in (small_runs["clip"], tmp_path / "hf"))
    assert found.merges == ours.merges
    ours.save(tmp_path / "vocab")
    (tmp_path / "bare").mkdir()
    shutil.copy(small_runs["clip"] / "checkpoint.pt", tmp_path / "bare")
    command = [str(tmp_path / "bare"), "--to", "huggingface", "--out", str(tmp_path / "two")]
    assert pretrained.main(command) == 0 and pretrained.tokenizer_beside(tmp_path / "two") is None
    assert pretrained.main([*command, "--vocab", str(tmp_path / "vocab")]) == 0
    assert pretrained.tokenizer_beside(tmp_path / "two").merges == ours.merges


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model["vocab"].update({"zz": 3}),
        lambda model: model["merges"].insert(0, "q u zz"),
        lambda model: model["merges"].reverse(),
        lambda model: model.pop("merges"),
        lambda model: model.update(vocab=3),
        lambda model: model.update(merges=[3]),
    ],
)
def test_vocabularies_of_another_kind_are_one_line(tmp_path, change):
    folder = exported(tmp_path, next(vocabularies()))
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content["model"])
    for text in (json.dumps(content), json.dumps(content)[:-9], "[]", "[" * 100_000):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="tokenizer.json") as error:
            pretrained.tokenizer_for(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_merges_as_pairs_are_read(tmp_path):
    """transformers 5 writes ["a", "b"] where older versions write "a b"."""
    tokenizer = next(vocabularies())
    path = exported(tmp_path, tokenizer) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [pair.split(" ") for pair in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    assert pretrained.tokenizer_beside(tmp_path).merges == tokenizer.merges


def test_command_line(tmp_path, capsys):
    model = make(Llip, 4, 3)
    path = saved(tmp_path, model.state_dict())
    flags = "--quick-gelu --vision-heads 3 --text-heads 4 --mixture-heads 3 --temperature 5".split()
    assert pretrained.main([str(path), *flags, "--to", "openai", "--out", str(tmp_path / "y")]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["class"] == shown["layout"] == "Llip" and shown["vision_width"] == "48"
    assert shown["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    same(model, pretrained.load(tmp_path / "y"))
    assert pretrained.main([str(tmp_path / "y")]) == 0
    assert "layout          ours" in capsys.readouterr().out
    for bad in ([str(path)], [str(tmp_path / "nothing")]):
        assert pretrained.main(bad) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    with pytest.raises(SystemExit) as exit:
        pretrained.main([str(path), "--unknown"])
    assert exit.value.code == 2


@pytest.mark.parametrize("layout", ["openai", "huggingface"])
@pytest.mark.parametrize("pooling, learned", [("cls", True), ("average", False), ("cls", False)])
def test_a_run_that_is_more_than_its_clip_is_not_converted(tmp_path, capsys, layout, pooling, learned):
    content = torch.load(pretrained.save(make(), tmp_path / "start.pt"), weights_only=True)
    task = {"classes": ["a"], "learned": {"context": torch.zeros(2, 32)} if learned else {}}
    saved(tmp_path, content | {"task": task}, "checkpoint.pt")
    settings = {"method": "coop", "image_pooling": pooling}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    status = pretrained.main([str(tmp_path), "--to", layout, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    if learned or pooling == "average":
        words = "coop learned more" if learned else "trained with --image-pooling average"
        assert status == 2 and words in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        assert pretrained.main([str(tmp_path)]) == 0
    else:
        assert status == 0
        same(make(), pretrained.load(tmp_path / "out"))


# ---- the peers, where they are installed


def peer(name, part="CLIPModel"):
    """An installed peer, or the test is skipped. A torchvision without its compiled part stops both."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        for operator in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", signature)
    try:
        module = importlib.import_module(name)
        return getattr(module, part, module)
    except Exception as error:
        pytest.skip(f"{name}: {error}")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_transformers_agrees_both_ways(tmp_path, activation):
    model = make(config=replace(CONFIG, activation=activation))
    images, tokens = inputs()
    folder = pretrained.save(model, tmp_path / "hf", "huggingface")
    theirs = peer("transformers").from_pretrained(folder).eval()
    found = theirs(pixel_values=images, input_ids=tokens)
    torch.testing.assert_close(found.logits_per_image, logits(model), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    same(model, pretrained.load(tmp_path / "shards"))
    theirs.save_pretrained(tmp_path / "theirs")
    same(model, pretrained.load(tmp_path / "theirs"))
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    same(model, pretrained.load(tmp_path / "theirs"))


@pytest.mark.parametrize("number", [0, 1])
@torch.no_grad()
def test_clip_processor_agrees_both_ways(tmp_path, request, number):
    """Ids, pixels up to one step of 255, and features of the same pixels; and what the processor writes."""
    processor = peer("transformers", "CLIPProcessor")
    tokenizer = list(vocabularies(request.getfixturevalue("shared") if number else None))[number]
    stated = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    folder = exported(tmp_path / "hf", tokenizer, **stated)
    model, theirs = pretrained.load(folder), processor.from_pretrained(folder)
    image = Image.fromarray(torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8).numpy())
    batch = theirs(text=HARD, images=image, padding="max_length", truncation=True, return_tensors="pt")
    ours = tokenizer(HARD, 20)
    used = torch.arange(20) <= ours.argmax(-1, keepdim=True)
    assert torch.equal(batch["input_ids"][used], ours[used])
    pixels = data.preprocess_of(model.config)(image)
    assert (batch["pixel_values"][0] - pixels).abs().max() < 1.01 / 255 / 0.2
    found = peer("transformers").from_pretrained(folder).eval()(**batch)
    image, text = model.encode_image(batch["pixel_values"]), model.encode_text(ours)
    torch.testing.assert_close(found.image_embeds, F.normalize(image, dim=-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.text_embeds, F.normalize(text, dim=-1), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    shutil.copy(folder / "model.safetensors", tmp_path / "again")
    shutil.copy(folder / "config.json", tmp_path / "again")
    assert pretrained.load(tmp_path / "again").config == model.config
    assert pretrained.tokenizer_beside(tmp_path / "again").merges == tokenizer.merges


@torch.no_grad()
def test_positions_are_resized_as_in_open_clip(small_runs):
    open_clip, model = peer("open_clip"), pretrained.load(small_runs["clip"])
    state = {"visual.positional_embedding": model.visual.positional_embedding.clone()}
    model.visual.grid_size = (5, 5)
    open_clip.model.resize_pos_embed(state, model)
    model.set_image_size(40)
    torch.testing.assert_close(model.visual.positional_embedding.data, state["visual.positional_embedding"])


@torch.no_grad()
def test_open_clip_agrees_both_ways(tmp_path):
    open_clip = peer("open_clip")
    for quick_gelu in (True, False):
        vision = dict(image_size=16, layers=2, width=48, head_width=16, patch_size=8, mlp_ratio=2.0)
        text = dict(context_length=10, vocab_size=60, width=32, heads=4, layers=2, mlp_ratio=2.0)
        theirs = open_clip.model.CLIP(24, vision, text, quick_gelu=quick_gelu).eval()
        torch.save({"state_dict": theirs.state_dict()}, tmp_path / "x.pt")
        model = pretrained.load(tmp_path / "x.pt", **KNOWN | {"quick_gelu": quick_gelu})
        images, tokens = inputs()
        for a, b in ((model.encode_image, theirs.encode_image), (model.encode_text, theirs.encode_text)):
            x = images if "image" in a.__name__ else tokens
            torch.testing.assert_close(a(x), b(x), rtol=0, atol=1e-5)
        path = pretrained.save(model, tmp_path / "y.pt")
        theirs.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
