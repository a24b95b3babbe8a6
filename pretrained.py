"""Checkpoints in and out: OpenAI's, open_clip's, Hugging Face's, Llip's release, and ours.

    layout        recognised by                           activation and heads come from
    OpenAI        a TorchScript archive                   QuickGELU; heads 64 wide
    ours          a "model" entry beside "state_dict"     that entry, exactly
    Hugging Face  names (layouts.py)                      config.json beside it
    Llip          names                                   QuickGELU; tau of the released shapes
    open_clip     what is left: OpenAI's names            open_clip_config.json beside it, or arguments

The format is found by content, never by suffix (archive.py), names and shapes become OpenAI's
(layouts.py), sizes are read from shapes. What shapes cannot tell must be in the file, beside it, or an
argument: a wrong activation or number of heads loads without a murmur and costs several points. Nothing
may be missing and nothing unused. ResNets, SigLIP's own towers and other text towers are not supported.

    python pretrained.py CHECKPOINT                                      what is in it
    python pretrained.py CHECKPOINT --to huggingface --out FOLDER        conversion
"""

import argparse
import inspect
import json
import math
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llip import Llip, PooledTokens
from model import CLIP, Config, DualEncoder
from tokenizer import Tokenizer, is_saved
from weights import archive, layouts
from weights.download import NAMES, canonical_name, fetch

CLASSES = {c.__name__: c for c in (CLIP, Llip, PooledTokens)}
FOLDER_FILES = (
    "checkpoint.pt",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
# TRAP: heads are not in the shapes. Image towers of these widths have heads that are not 64 wide.
HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}
# (image width, embedding) of Llip's published models -> temperature; all of them have eight heads
LLIP_TEMPERATURE = {(768, 512): 5.0, (1024, 768): 1.0, (1280, 1024): 5.0, (1664, 1280): 5.0}
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")
ARGUMENT = {"heads": "mixture_heads", "activation": "quick_gelu"}  # where the names differ
ARCHIVE = "TorchScript archive"


def load(
    source: str | Path,
    *,
    quick_gelu: bool | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    mixture_heads: int | None = None,
    temperature: float | None = None,
    pooling: str | None = None,
) -> DualEncoder:
    """Rebuilds the model of a checkpoint.

    Args:    source: a file, a folder (our run, or a Hugging Face repository), or a name to download
             the others: what shapes cannot tell. What the checkpoint says itself may not be
             contradicted, but for the temperature of our own.
    Returns: CLIP, Llip or PooledTokens in fp32, in eval mode, on the CPU.
    Raises:  ValueError in one line; OSError for a file that cannot be opened.
    """
    given = {
        "activation": None if quick_gelu is None else "quick_gelu" if quick_gelu else "gelu",
        "vision_heads": vision_heads,
        "text_heads": text_heads,
        "heads": mixture_heads,
        "temperature": temperature,
        "pooling": pooling,
    }
    given = {key: value for key, value in given.items() if value is not None}
    path = locate(source)
    try:
        checkpoint = archive.read(path)
        arrays, description = weights(checkpoint)
        layout = layouts.detect(arrays)
        state = layouts.to_openai(checkpoint.tensors(arrays))
        if description is None:
            if checkpoint.kind == ARCHIVE or layout == "Llip":
                told = {"activation": "quick_gelu"}
            else:
                told = layouts.settings_beside(path, layout)
            description = infer(state, told, given)
        else:
            description = agree(description, given)
        with torch.device("meta"), NoStart():
            model = build(description)
        fill(model, state)
    except ValueError as error:
        said = str(error) if str(path) in str(error) else f"{path}: {error}"
        previous = path.with_name("checkpoint.previous.pt")
        damaged = "damaged" in said or "truncated" in said
        if damaged and path.name == "checkpoint.pt" and previous.exists():
            said += f"; the one before: {previous}"
        raise ValueError(said) from error
    return model.eval()


def locate(source: str | Path) -> Path:
    """A file, the weights in a folder, or a download."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).exists()]
        if not found:
            raise ValueError(f"{path}: a folder with none of {', '.join(FOLDER_FILES)} in it")
        return found[0]
    if path.exists():
        return path
    if canonical_name(str(source)) in NAMES:
        return fetch(str(source))
    if canonical_name(str(source)).startswith("RN"):
        raise ValueError(f"{source}: ResNet checkpoints are not supported")
    raise ValueError(f"{source}: no such file, and not one of {', '.join(NAMES)}")


def tokenizer_beside(source: str | Path) -> Tokenizer | None:
    """The vocabulary that a run of ours keeps beside its checkpoint, or None."""
    path = Path(source).expanduser()
    path = (path if path.is_dir() else path.parent) / "tokenizer.json"
    # Hugging Face repositories have another file of this name
    return Tokenizer.load(path) if path.is_file() and is_saved(path) else None


def tokenizer_for(source: str | Path, vocab: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: the vocabulary named, else the one beside it, else OpenAI's."""
    if vocab:
        return Tokenizer.load(vocab) if is_saved(vocab) else Tokenizer.from_openai(vocab)
    return tokenizer_beside(source) or Tokenizer.from_openai()


def weights(checkpoint: archive.Checkpoint) -> tuple[dict[str, archive.Array], dict | None]:
    """The model's tensors by name, out of whatever wraps them; and our own "model" entry, or None."""
    content, description = checkpoint.content, None
    if checkpoint.kind == ARCHIVE:
        content = archive.flatten(content)
    for _ in WRAPPERS:
        content = content if isinstance(content, dict) else {}
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
        if not inner:
            break
        entry = content.get("model")
        if "state_dict" in content and isinstance(entry, dict) and "class" in entry:
            description = entry
        content = inner[0]
    arrays = {
        name: value
        for name, value in content.items()
        if type(name) is str and isinstance(value, archive.Array) and name.split(".")[-1] not in NOT_WEIGHTS
    }
    if not arrays:
        held = checkpoint.content
        text = ", ".join(map(short, held)) if isinstance(held, dict) else short(held)
        raise ValueError(f"no state dict in it, only {text:.100}: save model.state_dict()")
    if odd := [name for name in arrays if not name.isprintable()]:
        raise ValueError(f"a tensor is called {odd[0]!a:.60}")
    return arrays, description


def infer(state: dict[str, Tensor], told: dict, given: dict) -> dict:
    """The description of a model from its shapes, what its format says, and what is given.

    Raises: ValueError for what is unknown, contradicts, or belongs to another class of models.
    """
    for key in told.keys() & given.keys():
        if told[key] != given[key]:
            raise ValueError(f"{key} is {told[key]} by the checkpoint, {given[key]} was given")
    known = told | given
    config = read_config(state, known)
    found = {"config": asdict(config)}
    if "k_proj" in state and "q_proj" in state:
        tokens, k_proj = len(state["visual.class_embedding"]), state["k_proj"]
        released = LLIP_TEMPERATURE.get((config.vision_width, config.embed_dim))
        found |= {
            "class": "Llip",
            "mixture_tokens": tokens,
            "heads": known.get("heads", released and 8),
            "temperature": known.get("temperature", released),
            "norm": "K_norm.weight" in state,
            "all_tokens": k_proj.dim() == 3 and len(k_proj) == tokens + config.patches,
            "shared": k_proj.dim() == 2,  # of a shared matrix all_tokens cannot be seen: not then
        }
    elif state["visual.proj"].dim() == 3:
        found |= {"class": "PooledTokens", "mixture_tokens": len(state["visual.proj"])}
        found["pooling"] = known.get("pooling", "learned" if "query" in state else None)
        if found["pooling"] == "learned":
            found |= {key: known.get(key) for key in ("heads", "temperature")}
    else:
        found["class"] = "CLIP"
    if foreign := [k for k in ("heads", "temperature", "pooling") if k in given and k not in found]:
        raise ValueError(f"{ARGUMENT.get(foreign[0], foreign[0])} has no use in this {found['class']}")
    if unknown := [ARGUMENT.get(k, k) for k in found if found[k] is None]:
        raise ValueError(
            f"{' and '.join(unknown)} of this {found['class']} cannot be read from the weights: "
            "give what it was trained with"
        )
    if found["class"] != "Llip":
        found["bias"] = -10.0 if "logit_bias" in state else None
    return found


def read_config(state: dict[str, Tensor], known: dict) -> Config:
    """Sizes from the shapes; activation as known; heads as known, or by the width."""

    def shape(name, *dims):
        if name not in state or state[name].dim() not in dims:
            what = f"{name} is {list(state[name].shape)}" if name in state else f"{name} is missing"
            raise ValueError(f"not a CLIP with vision transformer: {what}")
        return state[name].shape

    def layers(prefix):
        return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

    def heads(tower, width):
        head = HEAD_WIDTH.get(width, 64) if tower == "vision" else 64
        if f"{tower}_heads" not in known and width % head:
            raise ValueError(f"heads of the {tower} tower, width {width}, unknown: give {tower}_heads")
        return known.get(f"{tower}_heads", width // head)

    conv1, positions = shape("visual.conv1.weight", 4), shape("visual.positional_embedding", 2)
    first, words = shape("visual.class_embedding", 1, 2), shape("token_embedding.weight", 2)
    if not {"k_proj", "q_proj"} <= state.keys():
        shape("visual.proj", 2, 3)
    tokens = first[0] if len(first) == 2 else 1
    side = math.isqrt(max(positions[0] - tokens, 0))
    if side == 0 or side**2 != positions[0] - tokens:
        raise ValueError(f"{positions[0]} image positions: not {tokens} tokens and a square of patches")
    if "activation" not in known:
        raise ValueError(
            "the activation is not in the weights, and no configuration beside them names it; the wrong "
            "one loads and costs accuracy: give quick_gelu=True (OpenAI, MetaCLIP, DFN) or False (most "
            "of LAION and DataComp), on the command line --quick-gelu or --no-quick-gelu"
        )
    vision, text = "visual.transformer.resblocks.", "transformer.resblocks."
    return Config(
        embed_dim=shape("text_projection", 2)[1],
        image_size=side * conv1[-1],
        patch_size=conv1[-1],
        vision_width=conv1[0],
        vision_layers=layers(vision),
        vision_heads=heads("vision", conv1[0]),
        vision_mlp=shape(vision + "0.mlp.c_fc.weight", 2)[0],
        context_length=shape("positional_embedding", 2)[0],
        vocab_size=words[0],
        text_width=words[1],
        text_layers=layers(text),
        text_heads=heads("text", words[1]),
        text_mlp=shape(text + "0.mlp.c_fc.weight", 2)[0],
        activation=known["activation"],
    )


def agree(description: dict, given: dict) -> dict:
    """Our own description, with the temperature that was given; the other arguments may only agree."""
    if not isinstance(description.get("config"), dict):
        raise ValueError("model description: no config in it")
    stated = description["config"] | description
    for key, value in given.items():
        if key not in stated or key != "temperature" and stated[key] != value:
            name = ARGUMENT.get(key, key)
            raise ValueError(f"{name}: the checkpoint says {short(stated.get(key))}, {value} was given")
    temperature = {"temperature": given["temperature"]} if "temperature" in given else {}
    return description | temperature


def describe(model: DualEncoder) -> dict:
    """The "model" entry of our checkpoints: class, configuration, constructor arguments.

    Plain values only, so that weights_only=True loads them. The starts of scale and bias are not kept,
    since both are weights, only whether there is a bias.
    """
    known = [name for name, cls in reversed(CLASSES.items()) if isinstance(model, cls)]
    if not known:
        raise ValueError(f"{type(model).__name__} is none of {', '.join(CLASSES)}")
    name = known[0]
    found = {"class": name, "config": asdict(model.config)}
    if name != "CLIP":
        found["mixture_tokens"] = model.visual.tokens
        found |= {"heads": model.heads, "temperature": float(model.temperature)}
    if name == "Llip":
        norm, shared = isinstance(model.K_norm, nn.LayerNorm), model.k_proj.dim() == 2
        return found | {"norm": norm, "all_tokens": bool(model.all_tokens), "shared": shared}
    if name == "PooledTokens":
        found["pooling"] = model.pooling
    return found | {"bias": None if model.logit_bias is None else -10.0}


def build(description: dict) -> DualEncoder:
    """The model of a description, with fresh weights.

    Raises: ValueError for an unknown class, and for a missing, unknown or absurd value.
    """
    arguments = dict(description)
    name, config = arguments.pop("class", None), arguments.pop("config", None)
    if type(name) is not str or name not in CLASSES or not isinstance(config, dict):
        raise ValueError(f"model description: class {short(name)}, expected {', '.join(CLASSES)}")

    def size(largest):
        return lambda value: type(value) is int and 1 <= value <= largest

    def number(value):
        return type(value) in (int, float) and math.isfinite(value)

    sizes = {f.name: size(512 if f.name.endswith(("layers", "heads")) else 2**20) for f in fields(Config)}
    allowed = sizes | {"activation": lambda value: value in ("quick_gelu", "gelu")}
    check("config's ", config, allowed, allowed)
    pooled = {
        "mixture_tokens": size(2**16),
        "heads": size(2**16),
        "temperature": lambda value: number(value) and value > 0,
        "norm": lambda value: type(value) is bool,
        "all_tokens": lambda value: type(value) is bool,
        "shared": lambda value: type(value) is bool,
        "pooling": lambda value: type(value) is str,
        "scale": lambda value: number(value) and value > 0,
        "bias": lambda value: value is None or number(value),
    }
    parameters = inspect.signature(CLASSES[name]).parameters
    allowed = {key: pooled[key] for key in parameters if key in pooled}
    needed = [key for key in allowed if parameters[key].default is inspect.Parameter.empty]
    check("", arguments, allowed, needed)
    return CLASSES[name](Config(**config), **arguments)


def check(where: str, values: dict, allowed: dict, needed) -> None:
    """Every value known and accepted by its test, none missing."""
    for key, value in values.items():
        if key not in allowed or not allowed[key](value):
            name = ascii(key)[1:-1] if type(key) is str else short(key)  # TRAP: a key may hold newlines
            raise ValueError(f"model description: {where}{name:.40} is {short(value)}")
    if missing := [key for key in needed if key not in values]:
        raise ValueError(f"model description: {where}{missing[0]} is missing")


def short(value: object) -> str:
    """For messages. TRAP: the repr of a container in a hostile file can be larger than memory."""
    plain = isinstance(value, (str, int, float, bool, type(None)))
    return f"{value!a:.40}" if plain else f"a {getattr(value, 'name', type(value).__name__)!s:.40}"


class NoStart(TorchFunctionMode):
    """Leaves out the random start of a model on the meta device, which has no numbers anyway.

    SPEED: the first random number or product there makes torch import sympy, two seconds or more.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "mul"):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts the tensors themselves into a model built on the meta device: nothing missing or unused."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unused": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {found[name]} for {shape}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ],
    }
    said = [f"{len(some)} {what} ({', '.join(some[:3])})" for what, some in problems.items() if some]
    if said:
        raise ValueError(f"not a {type(model).__name__} of this configuration: {'; '.join(said)}")
    model.load_state_dict(state, assign=True)


def save(model: DualEncoder, path: str | Path, layout: str = "openai") -> Path:
    """Writes a checkpoint that load reads, fp32, so that nobody ever finds half a file.

    Args: layout "openai": one file {"state_dict": OpenAI's names, "model": describe(model)}, which
          open_clip reads too; "huggingface": a folder for transformers.CLIPModel.from_pretrained.
    """
    path, description = Path(path), describe(model)
    state = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in model.state_dict().items()}
    if layout == "openai":
        content = {"state_dict": state, "model": description}
        write(path, lambda file: torch.save(content, file))
    elif layout == "huggingface":
        if description["class"] != "CLIP" or "logit_bias" in state:
            raise ValueError(f"{path}: Hugging Face's layout holds a CLIP without logit_bias only")
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(layouts.to_huggingface_config(model.config), indent=2) + "\n"
        write(path / "config.json", lambda file: file.write(text.encode()))
        tensors = layouts.to_huggingface(state)
        write(path / "model.safetensors", lambda file: archive.write_safetensors(tensors, file))
    else:
        raise ValueError(f"layout {layout!r}: expected openai or huggingface")
    return path


def write(path: Path, writer) -> None:
    """writer(file) into a file beside path, which then takes its place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        # TRAP: torch.save closes its zip after a failed write, fails again, and reports only that
        raise OSError(f"{path} cannot be written: {error.__context__ or error!s:.100}") from error


def summary(source: str | Path, model: DualEncoder) -> dict:
    """What is in a checkpoint: file, layout, precision, the description, parameters of each part."""
    checkpoint = archive.read(locate(source))
    arrays, description = weights(checkpoint)
    count = dict.fromkeys(("image tower", "text tower", "pooling", "scale, bias"), 0)
    for name, parameter in model.named_parameters():
        if name.startswith("visual."):
            part = "image tower"
        elif name.startswith(("transformer.", "token_", "positional_", "ln_final.", "text_projection")):
            part = "text tower"
        else:
            part = "scale, bias" if name.startswith("logit_") else "pooling"
        count[part] += parameter.numel()
    return {
        "file": str(checkpoint.path),
        "format": checkpoint.kind,
        "layout": "ours" if description else layouts.detect(arrays),
        "precision": sorted({str(a.storage.dtype).split(".")[1] for a in arrays.values()}),
        **describe(model),
        "parameters": count | {"total": sum(count.values())},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="What is in a checkpoint, and its conversion.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="file, folder, or one of " + ", ".join(NAMES))
    parser.add_argument("--quick-gelu", action=argparse.BooleanOptionalAction, help="the activation")
    for name in ("vision-heads", "text-heads", "mixture-heads"):
        parser.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, metavar="TAU", help="of Llip's pooling")
    parser.add_argument("--pooling", choices=("register", "average", "learned"))
    parser.add_argument("--to", choices=("openai", "huggingface"), help="convert to this layout")
    parser.add_argument("--out", type=Path, help="file (openai) or folder (huggingface) to write")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = vars(parser.parse_args(argv))
    source, to, out, as_json = (args.pop(key) for key in ("checkpoint", "to", "out", "json"))
    if (to is None) != (out is None):
        parser.error("--to and --out go together")
    try:
        model = load(source, **args)
        found = summary(source, model)
        if to:
            found["written"] = str(save(model, out, to))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    for key, value in found.items():
        for name, entry in value.items() if isinstance(value, dict) else [(key, value)]:
            text = f"{entry:>13,}" if key == "parameters" else entry
            print(f"{name:15} {', '.join(text) if isinstance(text, list) else text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
