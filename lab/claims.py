"""The 32 claims of the two rebuttals, and two findings of this project, read from texts.

lab/claims.txt says what each claims, which arms test it, and what must be seen; lab/arms.txt has the arms,
which are flags of train.py. Their settings are here.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lab import beds, measures

# Settings and arms -----------------------------------------------------------------------------------------

# four epochs of a set of Flickr8k's size
FLICKR8K = dict(steps=400, batch_size=64, lr=1e-3, weight_decay=0.2)
BED = dict(method="clip", zeroshot_data="scenes", crop_scale=1.0, batch_size=64, lr=1e-3)
# "pairs": pre-training. "bed": the CLIPs that are fine-tuned, one for each seed. "labels": fine-tuning.
SETTINGS = {
    "quick": {  # shows that everything works
        "pairs": dict(steps=60, batch_size=64, train_size=2048, captions="both"),
        "bed": BED | dict(steps=150, train_size=1024),
        "labels": dict(steps=40, train_size=1024, lr=2e-3, batch_size=48),
    },
    "default": {  # the report
        "pairs": dict(steps=1000, batch_size=64, train_size=8192, captions="both"),
        "bed": BED | dict(steps=3000, train_size=4096),
        "labels": dict(steps=200, train_size=2048, lr=1e-3, batch_size=48),
    },
    "data": {"pairs": FLICKR8K | dict(crop_scale=0.7), "bed": {}, "labels": dict(steps=300)},  # real data
}


def arms_of(text: str) -> dict[str, dict]:
    """Flags of every arm, from lines "NAME: OTHER, flag=value, ..."; values are JSON, or else strings."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, items = line.partition(": ")
            found[name] = {}
            for item in items.split(", "):
                flag, _, value = item.partition("=")
                with contextlib.suppress(ValueError):
                    value = json.loads(value)
                found[name] |= found.get(item, {flag: value})
    return found


ARMS = arms_of(Path(__file__).with_name("arms.txt").read_text())
# arms with three seeds: a run takes over a core-minute, or the arm is beside the question
FEW = {arm for arm, own in ARMS.items() if "bed 12" in (arm, own.get("start")) or "times" in own}
FEW |= {"kkv", "qqv", "coop", "cocoop", "maple", "tes"}

# Figures, parts and claims ---------------------------------------------------------------------------------

# figure: part of results.json ("reported": the averaged model where there is one), and names in it
FIGURES = {name: ("reported", name) for name in ("target", "val", "base", "new", "H")}
FIGURES |= {"AUROC": ("reported", "auroc"), "zero-shot": ("zeroshot", "top1")}
START = {f"{key.replace('auroc', 'AUROC')} before": ("zero-shot", key) for key in ("target", "H", "auroc")}
FIGURES |= START  # of the CLIP that is fine-tuned
# 450 captions ranked for an unseen picture; a single thing named among 16 kinds
FIGURES |= {"captions mAP": ("aspects", "i2t_map"), "kinds top-1": ("zeroshot", "top1")}
FIGURES["P@10"] = ("aspects", "t2i_p@10")
RECALL = {f"{way} R@{k}": f"{key}@{k}" for way, key in measures.WAYS.items() for k in (1, 5, 10)}
FIGURES |= {name: ("retrieval", key) for name, key in RECALL.items()}
LLIP_FIGURES = ("captions mAP", "text to image R@1")  # captions about one aspect, and about several things
GROUPS = {"labels": ("target", "val"), "open": ("base", "new", "H", "AUROC"), "named": ("zero-shot",)}
GROUPS |= {"moved": ("target", "val", *beds.LIFTS), "retrieval": ("captions mAP", "P@10", *RECALL)}
GROUPS["world"] = ("target", "val", "base", "new", "H", "AUROC", *START)
GROUPS["llip"] = ("captions mAP", "kinds top-1", "image to text R@1", "text to image R@1")


class Part(NamedTuple):
    """One comparison that is judged: a row's figure against another row (a name) or a number."""

    figure: str
    row: str
    relation: str  # ">", "<" or "="
    other: str | float
    margin: float = 0.0  # of "="

    def __str__(self) -> str:
        other = self.other if isinstance(self.other, str) else f"{self.other:g}"
        margin = f" within {self.margin:g}" if self.margin else ""
        return f"{self.figure}: {self.row} {self.relation} {other}{margin}"


@dataclass(frozen=True)
class Claim:
    """A claim, or the premise of one: what must be true so that the claim can be tested."""

    id: str
    name: str
    says: str
    parts: tuple[Part, ...]
    arms: dict[str, str] = field(default_factory=dict)  # row: arm
    figures: tuple[str, ...] = ()
    measure: Callable | None = None  # (lab, seed) -> {row: {figure: value}}, or that and what is drawn
    kind: str = "seeds"  # few: at most three;  once: one value is enough;  timing: a list of rounds
    picture: Callable | None = None  # of (path, [what is drawn, for each seed]); None: bars of the figures
    premise: "Claim | None" = None
    paper: str = ""
    notes: str = ""


def parts_of(text: str, rows=()) -> tuple[Part, ...]:
    """Parts of a line "seen"; `other` is a number if it looks like one and is none of `rows`."""
    found = []
    for group in text.split("; "):
        figure, _, comparisons = group.partition(": ")
        for item in comparisons.split(", "):
            relation = next(sign for sign in "><=" if f" {sign} " in item)
            row, _, other = item.partition(f" {relation} ")
            other, _, margin = other.partition(" within ")
            if other not in rows and other.replace(".", "", 1).isdigit():
                other = float(other)
            names = LLIP_FIGURES if figure == "both" else (figure,)
            found += [Part(name, row, relation, other, float(margin or 0)) for name in names]
    return tuple(found)


def claim_of(lines: list[str], premises: dict[str, Claim]) -> Claim:
    """A claim from its lines of claims.txt."""
    head, says = lines[0].split(": ", 1)
    text = dict(line.split(maxsplit=1) for line in lines[1:])
    pairs = [item.rpartition(": ") for item in text.get("arms", "").split(", ") if item]
    arms = {row or arm: arm for row, _, arm in pairs}
    values = {key: text[key] for key in ("paper", "notes") if key in text}
    for word in text.get("with", "").split(", "):
        if word in ("few", "once", "timing"):
            values["kind"] = word
        elif word in premises:
            values["premise"] = premises[word]
        elif word:
            values["picture" if word.startswith("draw_") else "measure"] = getattr(measures, word)
    if "measure" not in values:
        starts = any("start" in ARMS[arm] for arm in arms.values())
        values["figures"] = GROUPS[text.get("figures", "labels" if starts else "llip")]
    return Claim(*head.split(), says, parts_of(text["seen"], arms), arms, **values)


TEXT, NAMED = Path(__file__).with_name("claims.txt").read_text(), {}
for paragraph in TEXT.replace("\n    ", " ").replace("\n  ", "\t").splitlines():
    if paragraph.startswith("#"):
        continue
    one = claim_of(paragraph.split("\t"), NAMED)
    NAMED[one.name] = one
CLAIMS = tuple(claim for claim in NAMED.values() if claim.id[0] != "p")  # and findings: f1, f2
BY_NAME = NAMED | {claim.id: claim for claim in NAMED.values()}
