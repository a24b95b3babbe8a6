"""The one list of all methods: training and evaluation both use it, and no other code compares names.

A method's file ends with Settings (its own flags), DEFAULTS and TINY (changes to train.py's shared flags:
the paper's values and values for a CLIP narrower than TINY_WIDTH), PRESETS, TASK and build. To add a
method, write such a file and add one line to METHODS.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType

import alignclip
import clipood
import llip
from baselines import clip, cocoop, coop, flyp, maple, tes

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
