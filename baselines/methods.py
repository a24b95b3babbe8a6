"""The one list of all methods, and which values a run of one gets: training and evaluation use both.

A method's file ends with Settings (its own flags), DEFAULTS and TINY (changes to train.py's shared flags:
the paper's values and values for a CLIP narrower than TINY_WIDTH), PRESETS, TASK and build. To add a
method, write such a file and add one line to METHODS. No other code compares names.

resolve: later values win. These are the defaults of the flags, those of the method (DEFAULTS, then published
settings for the task and the data set, or TINY), the preset, the run that --resume continues, and the flags
that are given. configs maps a method's TASK to the dataclass of its shared flags (train.py).
"""

import argparse
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

import alignclip
import clipood
import llip
import pretrained
from baselines import clip, cocoop, coop, flyp, maple, tes
from model import CONFIGS
from util.flags import Parser, add_flags, flag_of
from util.run import check_same_run, holds_checkpoint, read_config
from util.run import find as find_run
from util.text import say
from weights import archive

TINY_WIDTH = 384  # published CLIPs have image towers at least this wide
# (lowest, highest): flags
LIMITS = {
    (1, math.inf): "batch_size steps accumulate log_every save_every",
    (0, math.inf): "eval_every warmup overfit clip_norm shots align_layers prompt_depth",
    (1, 2_000_000): "train_size",
    (1, 1024): "mixture_tokens mixture_heads text_tokens context",
    (0, 1024): "image_size workers threads",
    (0, 2**63 - 1): "seed test_seed",
    (0, 1e6): "epochs weight_decay margin smoothing_scale align_weight bma_beta tes_weight logit_scale",
    (1e-30, 1e30): "lr eps temperature guidance_temperature tes_temperature",
    (0, 0.999999): "beta1 beta2",
    (0, 1): "bias epsilon tes_share",
    (1e-9, 1): "crop_scale",
    (-500, 500): "logit_bias",
}
LIMITS = {flag: limits for limits, flags in LIMITS.items() for flag in flags.split()}
CHOICES = {"model": CONFIGS, "precision": ("auto", "fp32", "bf16"), "optimizer": ("adamw", "sgd", "nesterov")}
CHOICES |= {"objective": ("infonce", "siglip"), "pooling": ("text", "register", "average", "learned")}
CHOICES |= {"open_task": ("domain-shift", "open-class", "in-the-wild", "all-classes")}
CHOICES |= {"pairs": ("auto", "plain", "tiled")}


@dataclass(frozen=True)
class Method:
    """A method's file, and changes to the defaults of its settings where one file holds several methods."""

    module: ModuleType
    changes: dict = field(default_factory=dict)

    def settings(self, **flags):
        """The method's Settings.   Raises: TypeError for a flag that it does not have."""
        return self.module.Settings(**{**self.changes, **flags})

    def flags(self) -> set[str]:
        """Names of the method's own flags."""
        return {f.name for f in fields(self.module.Settings)}

    def published(self, task: str, data: str) -> tuple[dict, str]:
        """Published changes to DEFAULTS for a task and a data set, and their name; or nothing."""
        # the last part of the path: a folder above it may have the name of another data set
        table, name = getattr(self.module, "PUBLISHED", {}), re.sub(r"[^a-z0-9]", "", Path(data).name.lower())
        known = next((k for t, k in table if k and t == task and k.lower() in name), "")
        # finetune and labelsmooth keep their own margin and average: these are not CLIPood's
        values = {k: v for k, v in table.get((task, known), {}).items() if k not in self.changes}
        return values, f"{known}, {task}" if known else task


METHODS = {
    "llip": Method(llip),
    "clip": Method(clip),
    "siglip": Method(clip, dict(objective="siglip")),
    "finetune": Method(clipood, dict(margin=0.0, bma_beta=0.0)),
    "labelsmooth": Method(clipood, dict(smoothing="uniform", margin=0.0, bma_beta=0.0)),
    "clipood": Method(clipood),
    "alignclip": Method(alignclip),
    "flyp": Method(flyp),
    "coop": Method(coop),
    "cocoop": Method(cocoop),
    "maple": Method(maple),
    "tes": Method(tes),
}


def find(name: str) -> Method:
    """Raises: ValueError that lists the methods."""
    if name not in METHODS:
        raise ValueError(f"--method {name}: there are {', '.join(METHODS)}")
    return METHODS[name]


def presets() -> dict[str, tuple[str, dict]]:
    """Every preset by name: its method, and the flags it sets."""
    found = {}
    for name, method in METHODS.items():
        for preset, flags in method.module.PRESETS.items():
            found.setdefault(preset, (flags.get("method", name), flags))
    return found


def fine_tuned(source: str) -> dict:
    """config.json of a run that was fine-tuned on labelled images; {} for any other source."""
    config = read_config(source)
    return config if METHODS.get(config.get("method"), METHODS["clip"]).module.TASK == "labels" else {}


def read_saved(source: str, towers: bool) -> tuple[dict, dict]:
    """config.json and the entry "task" in the checkpoint of a run that is more than its CLIP, or {} for both.

    Such a run also learned prompts or heads (CoOp, CoCoOp, MaPLe, TeS), or embeds images by average pooling.
    Raises: ValueError if the run cannot be rebuilt, or towers: the caller uses the two towers alone.
    """
    if not Path(source).expanduser().exists():
        return {}, {}  # a name to download
    checkpoint, config = archive.read(pretrained.locate(source)), fine_tuned(source)
    task = checkpoint.content.get("task")
    task = task if isinstance(task, dict) else {}
    learned = task.get("learned")
    task = task | {"learned": checkpoint.tensors(learned) if isinstance(learned, dict) else {}}
    if not (reason := pretrained.more_than_clip(task, config)):
        return {}, {}
    reason = f"{source}: {reason}"
    if towers:
        raise ValueError(f"{reason}, so its towers alone are not its model: choose another run")
    texts = [task.get(name) for name in ("classes", "templates")]
    listed = all(isinstance(x, list) and x and all(isinstance(text, str) for text in x) for x in texts)
    if not config or not listed:
        raise ValueError(f"{reason}, and cannot be rebuilt from this checkpoint: see its results.json")
    return config, task


def rebuild(source: str, config: dict, task: dict, clip: nn.Module, tokenizer, text: Tensor) -> nn.Module:
    """The run's dual encoder around its CLIP; text (C, E) are the features of its classes.

    Raises: ValueError for flags of another type, and learned tensors of other shapes.
    """
    method = METHODS[config["method"]]
    flags = {name: config[name] for name in method.flags() & config.keys()}
    for name, value in flags.items():
        kind = type(getattr(method.settings(), name))
        if type(value) is not kind and (type(value), kind) != (int, float):
            problem = f"config.json has {name} {value!r}, expected {kind.__name__}"
            raise ValueError(f"{source}: {problem}: restore the file")
    classes = clipood.Classes(task["classes"], tuple(task["templates"]), tokenizer, text)
    built = method.module.build(method.settings(**flags), clip, classes)
    built.load_learned(task["learned"])
    return built.eval().dual_encoder().eval()


def resolve(configs: dict[str, type], flags: dict) -> tuple:
    """The configuration of a run: shared flags and the method's Settings.

    Raises: ValueError for a flag that the method does not have, and for values that cannot be.
    """
    preset, owner = {}, ""
    if flags.get("preset"):
        if flags["preset"] not in presets():
            raise ValueError(f"--preset {flags['preset']}: there are {', '.join(presets())}")
        owner, preset = presets()[flags["preset"]]
    name = flags.get("method") or owner or next(iter(METHODS))
    method = find(name)
    if owner and find(owner).module is not method.module:
        raise ValueError(f"--preset {flags['preset']} is a run of --method {owner}, not of {name}")
    own, shared = method.flags(), {f.name for f in fields(configs[method.module.TASK])}
    if foreign := [flag for flag in flags if flag not in own | shared]:
        raise ValueError(refusal(configs, foreign[0], name))
    values = dict(method.module.DEFAULTS)
    if method.module.TASK == "labels":
        if not flags.get("init"):
            raise ValueError(f"--method {name} starts from a CLIP: name a checkpoint or a run with --init")
        if flags.get("dry_run"):
            raise ValueError(f"--dry-run computes the cost of pre-training, not of --method {name}")
        if is_tiny(flags["init"]):
            values |= method.module.TINY
        else:
            task = flags.get("open_task", "domain-shift")
            published, where = method.published(task, flags.get("train_data", ""))
            values |= published
            shown = [f"{flag_of(k)} {v}" for k, v in published.items() if k not in preset | flags]
            if shown and os.environ.get("RANK", "0") == "0":
                say(f"published settings for {where}: {', '.join(shown)}")
    values |= preset
    if "steps" in flags or flags.get("overfit"):
        values["epochs"] = 0.0
    values |= flags | {"method": name}
    c = configs[method.module.TASK](**{k: v for k, v in values.items() if k in shared})
    s = method.settings(**{k: v for k, v in values.items() if k in own})
    if c.overfit:
        c = replace(c, batch_size=c.overfit, weight_decay=0.0, warmup=min(c.warmup, 5))
        c = c if "steps" in flags else replace(c, steps=300)
    for flag, value in (asdict(c) | asdict(s)).items():
        low, high = LIMITS.get(flag, (value, value))
        unset = flag == "logit_bias" and math.isnan(value)
        if flag in LIMITS and not low <= value <= high and not unset:
            wanted = f"at least {low}" if high == math.inf else f"in [{low:,}, {high:,}]"
            raise ValueError(f"{flag_of(flag)} {value}: must be {wanted}")
        if flag in CHOICES and value not in CHOICES[flag]:
            raise ValueError(f"{flag_of(flag)} {value}: expected one of {', '.join(CHOICES[flag])}")
    return c, s


def refusal(configs: dict[str, type], flag: str, name: str) -> str:
    """Why a method does not take a flag."""
    having = [n for n, m in METHODS.items() if flag in m.flags()]
    having = having or [n for n, m in METHODS.items() if hasattr(configs[m.module.TASK], flag)]
    if not having:
        return f"there is no flag {flag_of(flag)} (--help lists the flags)"
    return f"--method {name} has no flag {flag_of(flag)}; it belongs to {', '.join(having)}"


def parse(configs: dict[str, type], argv: list[str], about: str) -> dict:
    """The flags that a command line gives, with those of the run that it resumes."""
    first = Parser(add_help=False)
    for flag in ("method", "preset", "resume", "out"):
        first.add_argument(flag_of(flag), default="")
    chosen, _ = first.parse_known_args(argv)
    resumed = resumed_flags(configs, chosen)
    owner = presets().get(chosen.preset, ("",))[0]
    name = chosen.method or owner or resumed.get("method") or next(iter(METHODS))
    method = find(name)
    lists = f"methods: {' '.join(METHODS)}\npresets: {' '.join(presets())}"
    about = f"{about}\n{lists}\n\nThe flags below are those of --method {name}."
    parser = Parser(about, argument_default=argparse.SUPPRESS)
    add_flags(parser, configs[method.module.TASK], **method.module.DEFAULTS)
    add_flags(parser, method.module.Settings, **method.changes)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        raise ValueError(refusal(configs, word, name) if "--" in unknown[0] else f"{unknown[0]}: not a flag")
    if chosen.resume and resumed:
        check_same_run(resumed, vars(args))
    return resumed | vars(args)


def resumed_flags(configs: dict[str, type], chosen) -> dict:
    """The flags in config.json of the run that --resume continues; {} if there is no such run."""
    path = find_run(chosen.out, chosen.resume or "auto", chosen.method or next(iter(METHODS)))
    if not chosen.resume or not holds_checkpoint(path):
        return {}
    config = read_config(path)
    if not config:
        raise ValueError(f"{path / 'config.json'} is missing or not of a run: restore it")
    known = {f.name for cls in configs.values() for f in fields(cls)}
    known |= {flag for method in METHODS.values() for flag in method.flags()}
    return {k: v for k, v in config.items() if k in known - {"out", "resume", "dry_run", "data_changed"}}


def is_tiny(source: str) -> bool:
    """Whether --init is a CLIP of this project, narrower than any published one; reads no tensor."""
    if not Path(source).exists():
        return False  # a name to download
    _, description = pretrained.weights(archive.read(pretrained.locate(source)))
    width = pretrained.flat(description or {}).get("vision_width")
    return isinstance(width, int) and width < TINY_WIDTH
