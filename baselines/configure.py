"""Which values a run gets: defaults, presets, published settings, the command line, and a run to continue.

configs maps a method's TASK to the dataclass of its shared flags (train.py). Later values win: the defaults
of the flags, those of the method (DEFAULTS, then published settings for the task and the data set, or TINY
for a CLIP of this project), the preset, the run that --resume continues, and the flags that are given.
"""

import argparse
import math
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import pretrained
from baselines import methods
from model import CONFIGS
from util.flags import Parser, add_flags, flag_of
from util.run import check_same_run, find, holds_checkpoint, read_config
from util.text import say
from weights import archive

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


def resolve(configs: dict[str, type], flags: dict) -> tuple:
    """The configuration of a run: shared flags and the method's Settings.

    Raises: ValueError for a flag that the method does not have, and for values that cannot be.
    """
    preset, owner = {}, ""
    if flags.get("preset"):
        presets = methods.presets()
        if flags["preset"] not in presets:
            raise ValueError(f"--preset {flags['preset']}: there are {', '.join(presets)}")
        owner, preset = presets[flags["preset"]]
    name = flags.get("method") or owner or next(iter(methods.METHODS))
    method = methods.find(name)
    if owner and methods.find(owner).module is not method.module:
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
    having = [n for n, m in methods.METHODS.items() if flag in m.flags()]
    having = having or [n for n, m in methods.METHODS.items() if hasattr(configs[m.module.TASK], flag)]
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
    owner = methods.presets().get(chosen.preset, ("",))[0]
    name = chosen.method or owner or resumed.get("method") or next(iter(methods.METHODS))
    method = methods.find(name)
    lists = f"methods: {' '.join(methods.METHODS)}\npresets: {' '.join(methods.presets())}"
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
    path = find(chosen.out, chosen.resume or "auto", chosen.method or next(iter(methods.METHODS)))
    if not chosen.resume or not holds_checkpoint(path):
        return {}
    config = read_config(path)
    if not config:
        raise ValueError(f"{path / 'config.json'} is missing or not of a run: restore it")
    known = {f.name for cls in configs.values() for f in fields(cls)}
    known |= {flag for method in methods.METHODS.values() for flag in method.flags()}
    return {k: v for k, v in config.items() if k in known - {"out", "resume", "dry_run", "data_changed"}}


def is_tiny(source: str) -> bool:
    """Whether --init is a CLIP of this project, narrower than any published one; reads no tensor."""
    if not Path(source).exists():
        return False  # a name to download
    _, description = pretrained.weights(archive.read(pretrained.locate(source)))
    width = pretrained.flat(description or {}).get("vision_width")
    return isinstance(width, int) and width < methods.TINY_WIDTH
