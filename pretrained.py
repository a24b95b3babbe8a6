"""Checkpoints of OpenAI, open_clip, Hugging Face, Llip's release, and ours: load, save, convert.

The content tells the format, never the suffix, and sizes are read from the shapes. Activation and heads are
not in the shapes, and a wrong one loads silently and costs several points: docs/checkpoints.md says where
they come from. No weight may be missing or left.
"""

import inspect
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
from weights.download import NAMES, canonical_name, fetch

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

    Args:    source: a file, a folder (a run, or a Hugging Face repository), or a name to download
             others: properties that shapes cannot tell. They replace customs (TorchScript archives and Llip's
             files are QuickGELU), but may not contradict a configuration; the temperature may.
    Returns: CLIP, Llip or PooledTokens in fp32, in eval mode, on the CPU.   Raises: ValueError, OSError.
    """
    activation = {None: None, True: "quick_gelu", False: "gelu"}[quick_gelu]
    explicit = {"activation": activation, "vision_heads": vision_heads, "text_heads": text_heads}
    explicit |= {"heads": mixture_heads, "temperature": temperature, "pooling": pooling}
    explicit = {key: value for key, value in explicit.items() if value is not None}
    path = locate(source)
    try:
        checkpoint = archive.read(path)
        arrays, description = weights(checkpoint)
        layout = layouts.detect(arrays)
        state = layouts.to_openai(checkpoint.tensors(arrays))
        if description is None:
            if checkpoint.kind == "TorchScript archive" or layout == "Llip":
                known = {"activation": "quick_gelu"} | explicit
            else:
                known = explicit | layouts.settings_beside(path, layout)
            description = infer(state, known)
        description = agree(description, explicit)
        with torch.device("meta"), NoStart():
            model = build(description)
        fill(model, state)
    except (ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        text = printable(one_line(error))
        text = text if str(path) in str(error) else f"{path}: {text}"
        previous = path.with_name("checkpoint.previous.pt")
        if ("damaged" in text or "truncated" in text) and path.name == "checkpoint.pt" and previous.exists():
            text += f"; the previous one is {previous}"
        raise ValueError(text) from error
    return model.eval()


def locate(source: str | Path) -> Path:
    """A file, the weights in a folder, or a download."""
    path, name = Path(source).expanduser(), canonical_name(str(source))
    if path.is_dir():
        found = [path / file for file in FOLDER_FILES.split() if (path / file).exists()]
        if not found:
            raise ValueError(f"{path}: a folder without any of {FOLDER_FILES}")
        return found[0]
    if path.exists():
        return path
    if name in NAMES:
        return fetch(name)
    raise ValueError(f"{source}: no such file, and not one of {', '.join(NAMES)}")


def tokenizer_beside(source: str | Path) -> Tokenizer | None:
    """The vocabulary that a run of ours keeps with its checkpoint, or None."""
    path = Path(source).expanduser()
    path = (path if path.is_dir() else path.parent) / "tokenizer.json"
    # Hugging Face repositories have another file of this name
    return Tokenizer.load(path) if path.is_file() and is_saved(path) else None


def tokenizer_for(source: str | Path, vocab: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: the vocabulary of this path, else that of the run, else OpenAI's."""
    return (not vocab and tokenizer_beside(source)) or open_vocabulary(vocab)


def weights(checkpoint: archive.Checkpoint) -> tuple[dict[str, archive.Array], dict | None]:
    """The model's tensors by name, without their wrappers; and the "model" entry of our files, or None."""
    content, description = entries(checkpoint), None
    if checkpoint.kind == "TorchScript archive":
        content = archive.flatten(checkpoint.content)
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


def entries(checkpoint: archive.Checkpoint) -> dict:
    """The content of a checkpoint; empty if it is not a dict."""
    return checkpoint.content if isinstance(checkpoint.content, dict) else {}


def more_than_clip(task: object, config: dict) -> str:
    """Why the CLIP in a checkpoint is not the model of its run; empty if it is.

    Args: task: the entry of the checkpoint;  config: config.json of the run
    """
    if isinstance(task, dict) and task.get("learned"):
        return f"{config.get('method', 'its method')} learned more than the weights of a CLIP"
    pooling = config.get("image_pooling", "cls")
    return "" if pooling == "cls" else f"it was trained with --image-pooling {pooling}"


def infer(state: dict[str, Tensor], known: dict, config: Config | None = None) -> dict:
    """The description of a model from its shapes and known properties.   Raises: ValueError."""
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
        if found["pooling"] == "learned":
            found |= {key: known.get(key) for key in ("heads", "temperature")}
    if unknown := [ARGUMENT.get(k, k) for k in found if found[k] is None]:
        text = f"{' and '.join(unknown)} of this {found['class']}"
        raise ValueError(f"{text} cannot be read from the weights: give the value of the training")
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
    if "activation" not in known:
        text = "the activation is not in the weights, and a wrong one costs accuracy: quick_gelu=True, "
        text += "--quick-gelu (OpenAI, MetaCLIP, DFN), or False, --no-quick-gelu (most others)"
        raise ValueError(text)
    size = side * conv1[-1]
    if known.get("size") not in (None, size):
        raise ValueError(f"images of {known['size']} pixels by the files beside it, {size} by its weights")
    return Config(
        embed_dim=shape("text_projection", 2)[1],
        image_size=size,
        patch_size=conv1[-1],
        context_length=shape("positional_embedding", 2)[0],
        vocab_size=words[0],
        activation=known["activation"],
        preprocessing=known.get("preprocessing", {}),
        **tower("vision", "visual.transformer.resblocks.", conv1[0]),
        **tower("text", "transformer.resblocks.", words[1]),
    )


def agree(description: dict, explicit: dict) -> dict:
    """The description with an explicit temperature.   Raises: ValueError if other arguments contradict it."""
    config = description.get("config")
    stated = description | (config if isinstance(config, dict) else {})
    for key, value in explicit.items():
        name = ARGUMENT.get(key, key)
        if key not in stated or (key != "temperature" and stated[key] != value):
            raise ValueError(f"{name}: the checkpoint says {short(stated.get(key))}, {value} was given")
    return description | {key: explicit[key] for key in explicit if key == "temperature"}


def describe(model: DualEncoder) -> dict:
    """The "model" entry of our checkpoints: plain values, for torch.load(weights_only=True)."""
    if not isinstance(model, tuple(CLASSES.values())):
        raise ValueError(f"{type(model).__name__} is none of {', '.join(CLASSES)}")
    known = {key: getattr(model, key) for key in ("heads", "temperature", "pooling") if hasattr(model, key)}
    return infer(model.state_dict(), known, model.config)


def build(description: dict) -> DualEncoder:
    """The model of a description, with random weights.

    Raises: ValueError for an unknown class, and for a missing, unknown or absurd value.
    """
    # older checkpoints say "shared": False, a variant of Llip that was never published
    arguments = {k: v for k, v in description.items() if k != "shared" or v is not False}
    name, config = arguments.pop("class", None), arguments.pop("config", None)
    if type(name) is not str or name not in CLASSES or not isinstance(config, dict):
        raise ValueError(f"model description: class {short(name)}, expected {', '.join(CLASSES)}")

    sizes = inspect.signature(Config).parameters
    check("config's ", config, sizes, [key for key in sizes if key != "preprocessing"])  # older files lack it
    own = {"preprocessing": layouts.check_preprocessing(config.get("preprocessing", {}))}
    parameters = {k: p for k, p in inspect.signature(CLASSES[name]).parameters.items() if k != "config"}
    needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    check("", arguments, parameters, needed)
    return CLASSES[name](Config(**config | own), **arguments)


def check(place: str, values: dict, parameters: dict, needed: list[str]) -> None:
    """Raises: ValueError for a value that is unknown, missing, or of the wrong type or size."""
    for key, value in values.items():
        if key not in parameters or not plausible(key, value, parameters[key].annotation):
            raise ValueError(f"model description: {place}{key!s:.40} is {short(value)}")
    if missing := [key for key in needed if key not in values]:
        raise ValueError(f"model description: {place}{missing[0]} is missing")


def plausible(key: str, value: object, kind: object) -> bool:
    """Whether a value has the type of a parameter, and a size that a model can have."""
    if kind is int:
        return type(value) is int and 1 <= value <= (512 if key.endswith(("layers", "heads")) else 2**20)
    if kind in (bool, str):
        return type(value) is kind and (key != "activation" or value in ("quick_gelu", "gelu"))
    if value is None or kind is dict:
        return kind == float | None or isinstance(value, dict)
    return type(value) in (int, float) and abs(value) < 1e9 and (value > 0 or key == "bias")


def short(value: object) -> str:
    """For messages. TRAP: the repr of a container in a hostile file can be larger than memory."""
    plain = isinstance(value, (str, int, float, bool, type(None)))
    return f"{value!a:.40}" if plain else f"a {getattr(value, 'name', type(value).__name__)!s:.40}"


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


def save(model: DualEncoder, path: str | Path, layout: str = "openai") -> Path:
    """Writes a checkpoint in fp32 that load reads, atomically.

    Args: layout "openai": one file {"state_dict": OpenAI's names, "model": describe(model)}, which
          open_clip reads too; "huggingface": a folder for transformers.CLIPModel.from_pretrained.
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
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "config.json", layouts.to_huggingface_config(model.config))
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
    found |= {"layout": "ours" if description else layouts.detect(arrays)} | describe(model)
    found |= found.pop("config") | {"preprocessing": model.config.preprocessing or "as OpenAI's"}
    found |= {"parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    if to:
        if reason := more_than_clip(entries(checkpoint).get("task"), run_config(source)):
            raise ValueError(f"{source}: {reason}, so {to}'s layout cannot hold it: use evaluate.open_model")
        found["written"] = save(model, out, to)
    for name, value in found.items():
        print(f"{name:15} {value}")


if __name__ == "__main__":
    leave(main())
