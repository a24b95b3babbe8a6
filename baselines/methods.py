"""The one list of all methods: training and evaluation both use it, and no other code compares names.

A method's file ends with Settings (its own flags), DEFAULTS and TINY (changes to train.py's shared flags:
the paper's values and values for a CLIP narrower than TINY_WIDTH), PRESETS, TASK and build. To add a
method, write such a file and add one line to METHODS.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

import alignclip
import clipood
import llip
import pretrained
from baselines import clip, cocoop, coop, flyp, maple, tes
from util.run import read_config
from weights import archive

TINY_WIDTH = 384  # published CLIPs have image towers at least this wide


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


def fine_tuned(config: dict) -> bool:
    """Whether a run was fine-tuned on labelled images."""
    name = config.get("method")
    return name in METHODS and METHODS[name].module.TASK == "labels"


def read_saved(source: str, towers: bool) -> tuple[dict, dict]:
    """config.json and the entry "task" in the checkpoint of a run that is more than its CLIP, or {} for both.

    Such a run also learned prompts or heads (CoOp, CoCoOp, MaPLe, TeS), or embeds images by average pooling.
    Raises: ValueError if the run cannot be rebuilt, or towers: the caller uses the two towers alone.
    """
    if not Path(source).expanduser().exists():
        return {}, {}  # a name to download
    checkpoint, config = archive.read(pretrained.locate(source)), read_config(source)
    config = config if fine_tuned(config) else {}
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
