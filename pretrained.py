"""Checkpoints of OpenAI, open_clip, Hugging Face, Llip's release, and ours: load, save, convert.

The content tells the format, never the suffix, and sizes are read from the shapes. Activation and heads are
not in the shapes, and a wrong one loads silently and costs several points: docs/checkpoints.md says where
they come from. No weight may be missing or left.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llip import Llip, PooledTokens
from model import CLIP, Config, DualEncoder
from tokenizer import Tokenizer, is_saved, open_vocabulary
from util.evaluation import LoadFlags, load_options
from util.files import replacing, write_json
from util.flags import parse
from util.program import leave, program
from util.run import read_config as run_config
from util.text import one_line, printable
from weights import archive, layouts
from weights.download import fetch

CLASSES = {c.__name__: c for c in (CLIP, Llip, PooledTokens)}
FOLDER_FILES = "checkpoint.pt model.safetensors model.safetensors.index.json open_clip_model.safetensors "
FOLDER_FILES += "pytorch_model.bin open_clip_pytorch_model.bin model.fp16.safetensors"
# TRAP: heads are not in the shapes. Image towers of these widths have heads that are not 64 wide.
HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}
# (image width, embedding) of Llip's published models -> temperature; all of them have eight heads
LLIP_TEMPERATURE = {(768, 512): 5.0, (1024, 768): 1.0, (1280, 1024): 5.0, (1664, 1280): 5.0}
# entries that hold a state dict; averaged weights (EMA) come first, because they are the result of a training
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module")
NOT_WEIGHTS = "input_resolution context_length vocab_size position_ids attn_mask n_averaged".split()
ARGUMENT = {"heads": "mixture_heads", "activation": "quick_gelu"}  # where the names differ
# what the shapes do not tell, or not always (a size that is no multiple of the patch)
KNOWN = {"activation": str, "vision_heads": int, "text_heads": int, "image_size": int, "preprocessing": dict}
KNOWN |= {"heads": int, "temperature": float | int, "pooling": str}


def load(source: str | Path, **options) -> DualEncoder:
    """Rebuilds the model of a checkpoint.

    Args:    source: a file, a folder (a run, or a Hugging Face repository), or a name to download
             options: those of LoadFlags, which shapes cannot tell: quick_gelu, vision_heads, text_heads,
             mixture_heads, temperature, pooling. They replace customs (TorchScript archives and Llip's
             files are QuickGELU), but may not contradict a configuration; the temperature may.
    Returns: CLIP, Llip or PooledTokens in fp32, in eval mode, on the CPU.   Raises: ValueError, OSError.
    """
    given = LoadFlags(**options)
    explicit = {"activation": {True: "quick_gelu", False: "gelu"}.get(given.quick_gelu)}
    explicit |= {"heads": given.mixture_heads, "temperature": given.temperature, "pooling": given.pooling}
    explicit |= {"vision_heads": given.vision_heads, "text_heads": given.text_heads}
    explicit = {key: value for key, value in explicit.items() if value is not None}
    path = locate(source)
    try:
        checkpoint = archive.read(path)
        arrays, description = weights(checkpoint)
        layout = layouts.detect(arrays)
        state = layouts.to_openai(checkpoint.tensors(arrays))
        stated = flat(description or {})
        if description is not None:
            stated |= {"temperature": given.temperature} if given.temperature else {}
            known = {"vision_heads": None, "text_heads": None}  # here they are never guessed
            known |= {key: value for key, value in stated.items() if key in KNOWN}
        elif checkpoint.kind == "TorchScript archive" or layout == "Llip":
            known = {"activation": "quick_gelu"} | explicit
        else:
            known = explicit | layouts.settings_beside(path, layout)
        found = infer(state, known)
        agree(found, explicit, "was given")
        agree(found, stated, "is in its description")
        with torch.device("meta"), NoStart():
            model = build(found)
        fill(model, state)
    except (ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        text = printable(one_line(error))
        raise ValueError(text if str(path) in str(error) else f"{path}: {text}") from error
    return model.eval()


def locate(source: str | Path) -> Path:
    """A file, the weights in a folder, or a download."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / file for file in FOLDER_FILES.split() if (path / file).exists()]
        if not found:
            raise ValueError(f"{path}: a folder without any of {FOLDER_FILES}")
        return found[0]
    return path if path.exists() else fetch(str(source))


def tokenizer_beside(source: str | Path) -> Tokenizer | None:
    """The vocabulary that a run of ours, or a Hugging Face repository, keeps with its checkpoint, or None."""
    path = Path(source).expanduser()
    path = (path if path.is_dir() else path.parent) / "tokenizer.json"
    try:
        if path.is_file() and is_saved(path):
            return Tokenizer.load(path)
        return layouts.read_settings(path, layouts.from_huggingface_tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}: restore this file, or name another vocabulary with --vocab") from error


def tokenizer_for(source: str | Path, vocab: str | None = None, vocab_size: int = 49408) -> Tokenizer:
    """The tokenizer of a checkpoint: the vocabulary of this path, else that of the run, else OpenAI's."""
    if vocab:
        return open_vocabulary(vocab)
    if beside := tokenizer_beside(source):
        return beside
    if vocab_size != 49408:
        raise ValueError(f"{source}: no tokenizer.json for its {vocab_size} tokens: name it with --vocab")
    try:
        return Tokenizer.from_openai()
    except OSError as error:
        raise OSError(f"no tokenizer.json beside {source}, and {error}") from error


def check_vocabulary(model: nn.Module, tokenizer) -> None:
    """TRAP: a tokenizer of another vocabulary runs without an error and scores like chance."""
    if (own := tokenizer.vocab_size) != (wanted := model.config.vocab_size):
        raise ValueError(f"the tokenizer has {own} tokens, the model {wanted}: give --vocab, as in training")


def weights(checkpoint: archive.Checkpoint) -> tuple[dict[str, archive.Array], dict | None]:
    """The model's tensors by name, without their wrappers; and the "model" entry of our files, or None."""
    content, description = checkpoint.content, None
    for _ in WRAPPERS:
        entry = content.get("model")
        if "state_dict" in content and isinstance(entry, dict) and "class" in entry:
            description = entry
        content = next((content[k] for k in WRAPPERS if isinstance(content.get(k), dict)), content)
    arrays = {name: a for name, a in content.items() if type(name) is str and isinstance(a, archive.Array)}
    arrays = {name: a for name, a in arrays.items() if name.split(".")[-1] not in NOT_WEIGHTS}
    if not arrays:
        raise ValueError("no state dict in it: save model.state_dict()")
    return arrays, description


def more_than_clip(task: object, config: dict) -> str:
    """Why a CLIP is not the whole model of its run, by the checkpoint's "task" and config.json; or empty."""
    if isinstance(task, dict) and task.get("learned"):
        return f"{config.get('method', 'its method')} learned more than the weights of a CLIP"
    pooling = config.get("image_pooling", "cls")
    return "" if pooling == "cls" else f"it was trained with --image-pooling {pooling}"


def infer(state: dict[str, Tensor], known: dict, config: Config | None = None) -> dict:
    """The description of a model from its shapes and known properties.   Raises: ValueError."""
    for key, value in known.items():
        number = KNOWN[key] not in (str, dict)
        if not isinstance(value, KNOWN[key]) or value is True or (number and not 0 < value < 1e9):
            raise ValueError(f"{ARGUMENT.get(key, key)} is {archive.short(value)}")
    config = config or read_config(state, known)
    found = {"class": "CLIP", "config": asdict(config)}
    if {"k_proj", "q_proj"} <= state.keys():
        tokens = len(state["visual.class_embedding"])
        released = LLIP_TEMPERATURE.get((config.vision_width, config.embed_dim))
        found |= {"class": "Llip", "mixture_tokens": tokens, "heads": known.get("heads", released and 8)}
        found |= {"temperature": known.get("temperature", released), "norm": "K_norm.weight" in state}
        found["all_tokens"] = state["k_proj"].shape[:1] == (tokens + config.patches,)
    elif state["visual.proj"].dim() == 3:
        found |= {"class": "PooledTokens", "mixture_tokens": len(state["visual.proj"])}
        found["pooling"] = known.get("pooling", "learned" if "query" in state else None)
        used = ("heads", "temperature") if found["pooling"] == "learned" else ()
        found |= {key: known.get(key) for key in ("heads", "temperature") if key in used or key in known}
    if unknown := " and ".join(ARGUMENT.get(k, k) for k in found if found[k] is None):
        raise ValueError(f"{unknown} of this {found['class']} cannot be read from the weights: give a value")
    if found["class"] != "Llip":
        found["bias"] = -10.0 if "logit_bias" in state else None
    return found


def read_config(state: dict[str, Tensor], known: dict) -> Config:
    """Sizes from the shapes; activation and heads from known, or heads by the width."""

    def shape(name, *dims):
        if name not in state or state[name].dim() not in dims or 0 in state[name].shape:
            problem = f"{name} is {list(state[name].shape)}" if name in state else f"{name} is missing"
            raise ValueError(f"not a CLIP with vision transformer: {problem}")
        return state[name].shape

    def tower(kind: str, prefix: str, width: int) -> dict:
        head = HEAD_WIDTH.get(width, 64) if kind == "vision" else 64
        if f"{kind}_heads" not in known and width % head:
            raise ValueError(f"heads of the {kind} tower, width {width}, unknown: give {kind}_heads")
        blocks = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
        sizes = {"width": width, "layers": len(blocks), "heads": known.get(f"{kind}_heads", width // head)}
        sizes["mlp"] = shape(prefix + "0.mlp.c_fc.weight", 2)[0]
        return {f"{kind}_{key}": value for key, value in sizes.items()}

    conv1, positions = shape("visual.conv1.weight", 4), shape("visual.positional_embedding", 2)
    first, words = shape("visual.class_embedding", 1, 2), shape("token_embedding.weight", 2)
    if not {"k_proj", "q_proj"} <= state.keys():
        shape("visual.proj", 2, 3)
    tokens = first[0] if len(first) == 2 else 1
    side = math.isqrt(max(positions[0] - tokens, 0))
    if side == 0 or side**2 != positions[0] - tokens:
        raise ValueError(f"{positions[0]} image positions: not {tokens} tokens and a square of patches")
    if known.get("activation") not in ("quick_gelu", "gelu"):
        ways = "quick_gelu=True, --quick-gelu (OpenAI, MetaCLIP, DFN) or False, --no-quick-gelu (most others)"
        raise ValueError(f"the activation is not in the weights, and a wrong one costs accuracy: {ways}")
    size = known.get("image_size", side * conv1[-1])
    if size // conv1[-1] != side:
        raise ValueError(f"image_size {size}, but the weights are for {side * conv1[-1]} pixels")
    found = tower("vision", "visual.transformer.resblocks.", conv1[0])
    found |= tower("text", "transformer.resblocks.", words[1])
    found |= {"image_size": size, "patch_size": conv1[-1], "vocab_size": words[0]}
    found |= {"embed_dim": shape("text_projection", 2)[1], "activation": known["activation"]}
    found |= {"context_length": shape("positional_embedding", 2)[0]}
    return Config(**found, preprocessing=layouts.check_preprocessing(known.get("preprocessing", {})))


def flat(description: dict) -> dict:
    """All values of a description, with those of its config in place of it."""
    # older checkpoints say "shared": False, a variant of Llip that was never published
    rest = {k: v for k, v in description.items() if k != "config" and (k != "shared" or v is not False)}
    return rest | (description["config"] if isinstance(description.get("config"), dict) else {})


def agree(description: dict, stated: dict, where: str) -> None:
    """Raises: ValueError if a stated value is not that of the description."""
    found = flat(description)
    for key, value in stated.items():
        if key not in found or type(value) is not type(found[key]) or value != found[key]:
            both = f"{archive.short(found.get(key))}, {value if key in ARGUMENT else archive.short(value)}"
            raise ValueError(f"{ARGUMENT.get(key, key)!s:.40}: the checkpoint says {both} {where}")


def describe(model: DualEncoder) -> dict:
    """The "model" entry of our checkpoints: plain values, for torch.load(weights_only=True)."""
    if not isinstance(model, tuple(CLASSES.values())):
        raise ValueError(f"{type(model).__name__} is none of {', '.join(CLASSES)}")
    known = {key: getattr(model, key) for key in ("heads", "temperature", "pooling") if hasattr(model, key)}
    return infer(model.state_dict(), known, model.config)


def build(description: dict) -> DualEncoder:
    """The model of a description, with random weights."""
    others = {key: value for key, value in description.items() if key not in ("class", "config")}
    return CLASSES[description["class"]](Config(**description["config"]), **others)


class NoStart(TorchFunctionMode):
    """SPEED: no random start on the meta device, where it would make torch import sympy for two seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "mul"):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts the tensors into a model on the meta device. None may be missing or unused."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    shapes = {name: (tuple(t.shape), wanted[name]) for name, t in state.items() if name in wanted}
    problems = {
        "missing": [name for name in wanted if name not in shapes],
        "unused": [name for name in state if name not in shapes],
        "of another shape": [f"{name} {a} for {b}" for name, (a, b) in shapes.items() if a != b],
    }
    texts = [f"{len(some)} {problem} ({', '.join(some[:3])})" for problem, some in problems.items() if some]
    if texts:
        raise ValueError(f"not a {type(model).__name__} of this configuration: {'; '.join(texts)}")
    model.load_state_dict(state, assign=True)


def save(model: DualEncoder, path: str | Path, layout="openai", tokenizer: Tokenizer | None = None) -> Path:
    """Writes a checkpoint in fp32 that load reads, atomically.

    Args: layout "openai": a file {"state_dict": OpenAI's names, "model": describe(model)}, for open_clip too;
          "huggingface": a folder for transformers' CLIPModel, and with the tokenizer for CLIPProcessor.
    """
    path, description = Path(path), describe(model)
    state = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in model.state_dict().items()}
    if layout == "openai":
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save({"state_dict": state, "model": description}, file)
    elif layout == "huggingface":
        if description["class"] != "CLIP" or "logit_bias" in state:
            raise ValueError(f"{path}: Hugging Face's layout holds a CLIP without logit_bias only")
        if tokenizer is not None:
            check_vocabulary(model, tokenizer)
        path.mkdir(parents=True, exist_ok=True)
        for name, content in layouts.to_huggingface_files(model.config, tokenizer).items():
            write_json(path / name, content)
        with replacing(path / "model.safetensors") as file:
            layouts.write_safetensors(layouts.to_huggingface(state), file)
    else:
        raise ValueError(f"layout {layout!r}: expected openai or huggingface")
    return path


@dataclass(frozen=True, kw_only=True)
class Flags(LoadFlags):
    checkpoint: str  # file, folder, or a name as ViT-B/32
    to: str = ""  # convert to this layout: openai or huggingface
    out: str = ""  # file (openai) or folder (huggingface) to write
    vocab: str = ""  # huggingface: write this vocabulary (default: the one beside it, else OpenAI's)


@program
def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, "The content of a checkpoint, and its conversion.", ("checkpoint",))
    source, to, out = flags.checkpoint, flags.to, flags.out
    if bool(to) != bool(out):
        raise ValueError("--to and --out go together")
    model = load(source, **load_options(flags))
    checkpoint = archive.read(locate(source))
    arrays, description = weights(checkpoint)
    found = {"file": checkpoint.path, "format": checkpoint.kind}
    found |= {"layout": "ours" if description else layouts.detect(arrays)} | flat(describe(model))
    found["preprocessing"] = model.config.preprocessing or "as OpenAI's"
    found |= {"parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    if to:
        if reason := more_than_clip(checkpoint.content.get("task"), run_config(source)):
            raise ValueError(f"{source}: {reason}, so {to}'s layout cannot hold it: use evaluate.open_model")
        beside = flags.vocab or tokenizer_beside(source) or model.config.vocab_size == 49408
        tokenizer = tokenizer_for(source, flags.vocab) if beside and to == "huggingface" else None
        found["written"] = save(model, out, to, tokenizer)
    for name, value in found.items():
        print(f"{name:15} {printable(value)}")


if __name__ == "__main__":
    leave(main())
