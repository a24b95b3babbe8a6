"""Names, shapes and files of other projects, turned into OpenAI's, which are ours, and back."""

import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from model import Config
from readers.images import FILTERS, MEAN, STD
from tokenizer import Tokenizer, parse_merges
from util.files import read_text
from util.text import one_line
from weights import archive

# Parts of Hugging Face's names and of OpenAI's; an earlier one is replaced first
NAMES = (
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
    *(("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")),
    *(("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
)
TRANSPOSED = ("visual.proj", "text_projection")  # nn.Linear holds the transpose
# Options of open_clip that do not change what these towers compute
OPEN_CLIP_OPTIONS = "width layers heads head_width mlp_ratio image_size patch_size patch_dropout "
OPEN_CLIP_OPTIONS += "context_length vocab_size hf_tokenizer_name tokenizer_kwargs"
# OpenAI's values of readers.images.Preprocess
OPENAI = {"interpolation": "bicubic", "resize_mode": "shortest", "mean": [*MEAN], "std": [*STD]}
HALF = "laion2b_s32b_b82k"  # in the name of LAION's ViT-L/14, which was trained with mean and std of 0.5


def plain_name(name: str) -> str:
    """The name without the prefixes of DistributedDataParallel, torch.compile, PEFT, CustomTextCLIP etc."""
    name = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
    return re.sub(r"^((model|clip|clip_model|base_model|text)\.)+", "", name)


def detect(names: Iterable[str]) -> str:
    """The layout of a state dict.   Raises: ValueError for the towers of a ResNet or of SigLIP."""
    names = {plain_name(name) for name in names}
    if any(re.match(r"(visual\.)?(layer1|attnpool)\.", name) for name in names):
        raise ValueError("ResNet checkpoints are not supported, only vision transformers")
    if names & {"vision_model.head.probe", "visual.trunk.attn_pool.latent", "text_model.head.weight"}:
        raise ValueError("SigLIP's towers (no class token) are not supported, only CLIP's")
    if any(name.startswith(("text_model.", "vision_model.")) for name in names):
        return "Hugging Face"
    return "Llip" if {"k_proj", "q_proj"} <= names else "OpenAI"


def to_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any layout to our names and shapes, in fp32.   Raises: ValueError for one name twice and for NaN."""
    layout, found = detect(state), {}
    for key, tensor in state.items():
        name = plain_name(key)
        if name in found:
            raise ValueError(f"two tensors are called {name}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected floating point")
        alone = name in ("logit_scale", "logit_bias") and tensor.shape == (1,)
        found[name] = (tensor[0] if alone else tensor).float()
        if not torch.isfinite(found[name]).all():
            raise ValueError(f"{name} holds NaN or infinite values: its training had diverged")
    if layout == "Hugging Face":
        found = from_huggingface(found)
    if layout == "Llip":  # names of the first release
        if "out_proj" in found:
            found["pred.out_proj"] = found.pop("out_proj")
        if (first := found.get("visual.class_embedding", torch.empty(0, 0))).dim() == 1:
            found["visual.class_embedding"] = first[None]  # (1, D)
    return found


def translate(name: str, to: int) -> str:
    """Hugging Face's name to OpenAI's (to = 1), or back (to = 0)."""
    for pair in NAMES:
        name = name.replace(pair[1 - to], pair[to])
    return name


def from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel: query, key and value are apart, projections transposed."""
    found = {}
    for key, tensor in state.items():
        name = translate(key, 1)
        if ".self_attn.q_proj." in name:
            keys = [key.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
            if state.keys() >= set(keys):
                name = name.replace("self_attn.q_proj.", "attn.in_proj_")
                found[name] = torch.cat([state[k] for k in keys])
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
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


def read_settings(path: Path, convert: Callable) -> dict | None:
    """A JSON file of settings, converted; None if there is no such file.   Raises: ValueError, one line."""
    try:
        return convert(json.loads(read_text(path))) if path.exists() else None
    except (*archive.BROKEN, RecursionError) as error:
        raise ValueError(f"{path} is not as expected: {one_line(error)}") from error


def settings_beside(path: Path, layout: str) -> dict:
    """Activation, heads and preprocessing by the files in a checkpoint's folder.   Raises: ValueError."""
    own, theirs = "open_clip_config.json", ["preprocessor_config.json", "processor_config.json"]
    if layout == "Hugging Face":
        found, names = read_settings(path.parent / "config.json", from_huggingface_config), [*theirs, own]
    else:
        found, names = read_settings(path.parent / own, from_open_clip_config), [own, *theirs]
    stated = (read_settings(path.parent / name, preprocessing_of) for name in names)
    half = {"mean": [0.5] * 3, "std": [0.5] * 3} if HALF in path.name.lower().replace("-", "_") else {}
    return (found or {}) | next(filter(None, stated), {"preprocessing": half})


def from_huggingface_config(settings: dict) -> dict:
    """transformers' CLIPConfig; missing values have transformers' defaults."""
    if settings.get("model_type", "clip") != "clip":
        raise ValueError(f"model_type {settings['model_type']!a:.40} is not supported, only clip")
    found, activations = {}, set()
    for tower, heads in (("vision", 12), ("text", 8)):
        # older files repeat the sizes in *_config_dict, which has precedence
        both = (settings.get(f"{tower}_config") or {}) | (settings.get(f"{tower}_config_dict") or {})
        found[f"{tower}_heads"] = both.get("num_attention_heads", heads)
        activations.add(both.get("hidden_act", "quick_gelu"))
        if both.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"layer_norm_eps {both['layer_norm_eps']!a:.20} is not supported, only 1e-5")
    if len(activations) != 1 or activations - {"quick_gelu", "gelu"}:
        raise ValueError(f"hidden_act {sorted(activations)!a:.60}: quick_gelu or gelu is supported")
    return found | {"activation": activations.pop()}


def from_open_clip_config(settings: dict) -> dict:
    """The model_cfg of open_clip_config.json."""
    settings = settings["model_cfg"]
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    if unknown := [key for key in (*vision, *text) if key not in OPEN_CLIP_OPTIONS.split()]:
        raise ValueError(f"{', '.join(unknown[:3])!a:.80}: not supported by this implementation")
    heads = {"vision_heads": vision.get("width", 768) // vision.get("head_width", 64)}
    heads["text_heads"] = text.get("heads", 8)
    return heads | {"activation": "quick_gelu" if settings.get("quick_gelu", False) else "gelu"}


def preprocessing_of(settings: dict) -> dict | None:
    """The size and the preprocessing that a file states; missing values are OpenAI's; None without any."""
    if "model_cfg" not in settings:
        return from_huggingface_preprocessing(settings.get("image_processor", settings))
    if (own := settings.get("preprocess_cfg")) is None:
        return None
    size, mode, _ = own.pop("size", None), own.pop("mode", "RGB"), own.pop("fill_color", 0)
    if mode != "RGB":
        raise ValueError(f"mode {mode!a:.40} is not supported, only RGB")
    return stated(own, size)


def from_huggingface_preprocessing(settings: dict) -> dict:
    """transformers' CLIPImageProcessor, whose defaults are OpenAI's values."""
    kind = settings.get("image_processor_type", settings.get("feature_extractor_type", "CLIP"))
    if not str(kind).startswith("CLIP"):
        raise ValueError(f"image processor {kind!a:.40} is not supported, only CLIPImageProcessor")
    size, cut = settings.get("size"), settings.get("do_center_crop", True)
    squash = isinstance(size, dict) and "height" in size
    if isinstance(size, dict) and not squash and [*size] != ["shortest_edge"]:
        raise ValueError(f"size {[*size]!a:.60} is not supported, only shortest_edge, or height and width")
    steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    steps |= {"do_center_crop": cut if squash else True, "rescale_factor": 1 / 255}
    for step, value in steps.items():
        if settings.get(step, value) != value:
            raise ValueError(f"{step} {settings[step]!a:.20} is not supported, only {value}")
    own = {"resize_mode": "squash" if squash else "shortest"}
    own |= {"mean": settings.get("image_mean"), "std": settings.get("image_std")}
    resample = settings.get("resample", FILTERS["bicubic"])
    own["interpolation"] = next((name for name, number in FILTERS.items() if number == resample), resample)
    return stated(own, size, settings.get("crop_size") if cut else None)


def stated(values: dict, *sizes) -> dict:
    """Preprocessing, and the side of the square that all given sizes have in common.   Raises: ValueError."""
    sides = set()
    for size in filter(None, sizes):
        sides |= {*size.values()} if isinstance(size, dict) else {*size} if isinstance(size, list) else {size}
    if len(sides) > 1:
        raise ValueError(f"{' and '.join(map(str, sides)):.60} pixels: only one square size is supported")
    return {"preprocessing": check_preprocessing(values)} | ({"image_size": sides.pop()} if sides else {})


def check_preprocessing(values: dict) -> dict:
    """Those arguments of Preprocess that differ from OpenAI's.   Raises: ValueError for unsupported ones."""
    if unknown := [str(name)[:40] for name in values if name not in OPENAI]:
        raise ValueError(f"preprocessing {', '.join(unknown[:3])!a} is not supported by this implementation")
    found = {name: x for name, x in values.items() if x not in (None, OPENAI[name])}
    for name, choices in (("interpolation", [*FILTERS]), ("resize_mode", ["shortest", "squash"])):
        if (value := found.get(name, choices[0])) not in choices:
            raise ValueError(f"{name} {archive.short(value)} is not supported, only {' and '.join(choices)}")
    for name, least in (("mean", -1e3), ("std", 1e-6)):
        x = found.get(name, OPENAI[name])
        if not isinstance(x, list) or [type(n) in (int, float) and least < n < 1e3 for n in x] != [True] * 3:
            raise ValueError(f"{name} is not a list of three numbers that can normalise an image")
    return found


def to_huggingface_files(c: Config, tokenizer: Tokenizer | None) -> dict[str, dict]:
    """The files beside the weights, for transformers' CLIPModel and, with a tokenizer, CLIPProcessor.

    huggingface.json holds them with "$name" for each value of a model. TRAP: a padding token is special
    everywhere: with "!", which has id 0, a typed "!" would become id 0 too.
    """
    files = json.loads(Path(__file__).with_name("huggingface.json").read_text(encoding="utf-8"))
    own, square = OPENAI | c.preprocessing, {"height": c.image_size, "width": c.image_size}
    # TRAP: an end token of 2 means argmax pooling to transformers, any other its first occurrence
    values = asdict(c) | own | {"start": c.vocab_size - 2, "end": c.vocab_size - 1, "square": square}
    values["size"] = square if own["resize_mode"] == "squash" else {"shortest_edge": c.image_size}
    values["resample"] = int(FILTERS[own["interpolation"]])
    if tokenizer is None:
        files = {name: content for name, content in files.items() if not name.startswith("tokenizer")}
    else:
        values["merges"], names = tokenizer.spelled()
        values["vocab"] = {name: i for i, name in enumerate(names)}
    return filled(files, values)


def filled(template, values: dict):
    """A template of JSON with the values of all "$name" in it."""
    if isinstance(template, dict):
        return {key: filled(x, values) for key, x in template.items()}
    if isinstance(template, list):
        return [filled(x, values) for x in template]
    return values[template[1:]] if str(template).startswith("$") else template


def from_huggingface_tokenizer(settings: dict) -> Tokenizer:
    """A tokenizer.json of transformers.   Raises: ValueError if it is not laid out as CLIP's."""
    merges, vocab = settings["model"]["merges"], settings["model"]["vocab"]
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    found = Tokenizer(parse_merges(lines, "merges"))
    if vocab != {name: i for i, name in enumerate(found.spelled()[1])}:
        raise ValueError("its vocabulary is not laid out as CLIP's")
    return found


def write_safetensors(tensors: dict[str, Tensor], file) -> None:
    """Writes fp32 tensors into an open binary file, in the safetensors format."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8 bytes
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
