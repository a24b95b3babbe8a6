"""The parameter names and settings of other projects' checkpoints, and ours, which are OpenAI's.

    layout        names                                  what they are turned into
    OpenAI        as they are                            -
    open_clip     text. in front of the text tower's     without it (CustomTextCLIP)
    Hugging Face  text_model., vision_model.             in_proj stacked, projections transposed
    Llip          k_proj, q_proj, pred.out_proj          names of the first release brought up to date

module. and _orig_mod., which DistributedDataParallel and torch.compile put in front, are dropped.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from model import Config

# Hugging Face's names and OpenAI's: how they begin, then what lies inside a block
BEGINNINGS = (
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # sic
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
)
INSIDE = (
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
TRANSPOSED = ("visual.proj", "text_projection")  # nn.Linear holds the transpose
# What open_clip's configurations may say without changing what these towers compute
OPEN_CLIP_KNOWN = set(
    "width layers heads head_width mlp_ratio image_size patch_size patch_dropout context_length "
    "vocab_size hf_tokenizer_name tokenizer_kwargs".split()
)


def plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def detect(names: Iterable[str]) -> str:
    """The layout of a state dict by its names.

    Raises: ValueError for a ResNet.
    """
    names = {plain_name(name) for name in names}
    if any(re.match(r"visual\.(layer1|attnpool)\.", name) for name in names):
        raise ValueError("ResNet checkpoints are not supported, only vision transformers")
    if any(name.startswith(("text_model.", "vision_model.")) for name in names):
        return "Hugging Face"
    if "text.positional_embedding" in names:
        return "open_clip CustomTextCLIP"
    return "Llip" if {"k_proj", "q_proj"} <= names else "OpenAI"


def to_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any layout's names and shapes to ours, in fp32.

    Raises: ValueError for weights that are no finite floating-point numbers, and for one name twice.
    """
    layout, found = detect(state), {}
    for key, tensor in state.items():
        name = plain_name(key)
        if layout == "open_clip CustomTextCLIP":
            name = name.removeprefix("text.")
        if name in found:
            raise ValueError(f"two tensors are called {name}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected floating point")
        found[name] = tensor.float()
        if not torch.isfinite(found[name]).all():
            raise ValueError(f"{name} holds NaN or infinite values: its training had diverged")
    if layout == "Hugging Face":
        found = from_huggingface(found)
    if layout == "Llip":
        if "out_proj" in found:
            found["pred.out_proj"] = found.pop("out_proj")
        if found.get("visual.class_embedding", found["q_proj"]).dim() == 1:
            found["visual.class_embedding"] = found["visual.class_embedding"][None]  # (1, D)
    for name in ("logit_scale", "logit_bias"):
        if name in found and found[name].shape == (1,):
            found[name] = found[name][0]  # ()
    return found


def translate(name: str, to: int) -> str:
    """Hugging Face's name of a parameter to OpenAI's (to = 1), or back (to = 0)."""
    for pair in BEGINNINGS:
        if name.startswith(pair[1 - to]):
            name = pair[to] + name[len(pair[1 - to]) :]
            break
    for pair in INSIDE:
        name = name.replace(pair[1 - to], pair[to])
    return name


def from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel: query, key and value apart; projections transposed."""
    found = {}
    for key, tensor in state.items():
        name = translate(key, 1)
        part = re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if part and part[2] == "q":
            keys = [key.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
            if missing := [k for k in keys if k not in state]:
                raise ValueError(f"{missing[0]} is missing")
            found[f"{part[1]}.attn.in_proj_{part[3]}"] = torch.cat([state[k] for k in keys])
        elif not part:
            found[name] = tensor.t().contiguous() if name in TRANSPOSED else tensor
    return found


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of from_huggingface."""
    found = {}
    for name, tensor in state.items():
        key = translate(name, 0)
        if ".attn.in_proj_" in key:
            block, kind = key.split(".attn.in_proj_")
            for x, rows in zip("qkv", tensor.chunk(3)):
                found[f"{block}.self_attn.{x}_proj.{kind}"] = rows
        else:
            found[key] = tensor.t() if name in TRANSPOSED else tensor
    return found


def settings_beside(path: Path, layout: str) -> dict:
    """Activation and heads from the configuration that lies beside a checkpoint, {} without one.

    Returns: some of activation, vision_heads, text_heads.
    Raises:  ValueError for an option that these towers do not compute: refused, not ignored.
    """
    name = "config.json" if layout == "Hugging Face" else "open_clip_config.json"
    if not (path.parent / name).exists():
        return {}
    try:
        settings = json.loads((path.parent / name).read_text(encoding="utf-8"))
        if layout == "Hugging Face":
            return from_huggingface_config(settings)
        return from_open_clip_config(settings["model_cfg"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} beside it is not as expected: {error!r:.100}") from error
    except ValueError as error:
        raise ValueError(f"{name} beside it: {error}") from error


def from_huggingface_config(settings: dict) -> dict:
    """transformers' CLIPConfig; what it leaves out has transformers' defaults."""
    if settings.get("model_type", "clip") != "clip":
        raise ValueError(f"model_type {settings['model_type']!a:.40} is not supported, only clip")
    found, activations = {}, set()
    for tower, heads in (("vision", 12), ("text", 8)):
        # older files repeat the sizes in *_config_dict, which counts
        both = (settings.get(f"{tower}_config") or {}) | (settings.get(f"{tower}_config_dict") or {})
        found[f"{tower}_heads"] = both.get("num_attention_heads", heads)
        activations.add(both.get("hidden_act", "quick_gelu"))
        if both.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"layer_norm_eps {both['layer_norm_eps']} is not supported, only 1e-5")
    if len(activations) != 1 or activations - {"quick_gelu", "gelu"}:
        raise ValueError(f"hidden_act {sorted(activations)}: one of quick_gelu and gelu is supported")
    return found | {"activation": activations.pop()}


def from_open_clip_config(settings: dict) -> dict:
    """open_clip's model_cfg."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    if unknown := [key for key in (*vision, *text) if key not in OPEN_CLIP_KNOWN]:
        raise ValueError(f"{', '.join(unknown[:3])}: not supported by this implementation")
    return {
        "activation": "quick_gelu" if settings.get("quick_gelu", False) else "gelu",
        "vision_heads": vision.get("width", 768) // vision.get("head_width", 64),
        "text_heads": text.get("heads", 8),
    }


def to_huggingface_config(config: Config) -> dict:
    """A config.json for transformers.CLIPModel."""
    c = config
    shared = {"hidden_act": c.activation, "layer_norm_eps": 1e-5, "projection_dim": c.embed_dim}
    # TRAP: an end token of 2 means argmax pooling to transformers, any other its first occurrence
    text = {
        "model_type": "clip_text_model",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context_length,
        "hidden_size": c.text_width,
        "num_hidden_layers": c.text_layers,
        "num_attention_heads": c.text_heads,
        "intermediate_size": c.text_mlp,
        "bos_token_id": c.vocab_size - 2,
        "eos_token_id": c.vocab_size - 1,
        "pad_token_id": 0,
    }
    vision = {
        "model_type": "clip_vision_model",
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "num_channels": 3,
        "hidden_size": c.vision_width,
        "num_hidden_layers": c.vision_layers,
        "num_attention_heads": c.vision_heads,
        "intermediate_size": c.vision_mlp,
    }
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": c.embed_dim,
        "text_config": text | shared,
        "vision_config": vision | shared,
    }
