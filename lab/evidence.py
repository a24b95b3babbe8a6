"""Verdicts and the report: what the figures of lab/reproduce.py say about the claims of lab/claims.py.

The rule of the verdicts and the choices of settings are in lab/report.txt, which the report quotes.
"""

import json
import math
import statistics
from pathlib import Path

import torch
from PIL import Image

from lab import bench
from lab.claims import CLAIMS, SETTINGS, Claim, Part
from util import plots
from util.files import output_folder, write_image, write_json, write_text
from util.report import format_table
from util.run import git_commit

HOLDS, FAILS, OPEN, UNMET = "holds", "does not hold", "not decidable here", "premise not met"
FIRST_SEED, MIN_SEEDS, NOTHING = 3000, 3, ("it presumes nothing of data or training", "none is measured")


def mean_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error; None for one value."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    term, total, odd = 1.0, 0.0, freedom % 2
    for n in range(freedom // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * n + 1 + odd) / (2 * n + 2 + odd)
    inside = math.sin(angle) * total
    if odd:
        inside = (angle + math.sin(angle) * math.cos(angle) * total) * 2 / math.pi
    return (1 - inside) / 2


def judge(part: Part, table: dict, kind: str = "seeds") -> dict:
    """Judges one part on a table {row: {figure: values}}.   Returns: part, difference, error, p, verdict."""
    values, number = table[part.row][part.figure], not isinstance(part.other, str)
    others = [part.other] * len(values) if number else table[part.other][part.figure]
    sign = -1 if part.relation == "<" else 1
    gains = [sign * (a - b) for a, b in zip(values, others)]
    mean, error = mean_error(gains)
    found = {"part": str(part), "difference": mean, "error": error, "p": None}
    if part.relation == "=" and (number or kind == "once"):
        equal = all(abs(gain) <= part.margin + 1e-12 for gain in gains)
        return found | {"verdict": HOLDS if equal else FAILS}
    if kind == "once":
        return found | {"verdict": HOLDS if mean > 0 else FAILS}
    if len(gains) < MIN_SEEDS:
        return found | {"verdict": OPEN}
    beyond = part.margin - abs(mean) if part.relation == "=" else mean
    p = student_tail(beyond / (error or 1e-30), len(gains) - 1)
    return found | {"p": p, "verdict": HOLDS if beyond > error else FAILS if beyond < -error else OPEN}


def at_level(part: dict, level: float = 0.05) -> str:
    """The verdict on a part where chance may pass it in one of twenty cases, in either direction."""
    if part["p"] is None:
        return part["verdict"]
    return HOLDS if part["p"] < level else FAILS if part["p"] > 1 - level else OPEN


def after_holm(tails: list[float], level: float = 0.05) -> tuple[int, int]:
    """How many parts hold and fail if one error among all of them may happen once in twenty (Holm 1979)."""
    both, counts = sorted([(p, 0) for p in tails] + [(1 - p, 1) for p in tails]), [0, 0]
    for n, (p, direction) in enumerate(both):
        if p > level / (len(both) - n):
            break
        counts[direction] += 1
    return counts[0], counts[1]


def together(verdicts: list[str]) -> str:
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else OPEN


def conclude(lab, claim: Claim, command: str) -> dict:
    """Parts, premise and verdict of a claim whose runs exist in a Lab; written as JSON, with a picture.

    A claim on real data whose premise is not met has no runs, and so no figures.
    """
    found = {key: getattr(claim, key) for key in ("id", "name", "says", "paper", "notes")}
    found |= {"command": command, "commit": git_commit()[:7], "premise": "", "missed": [], "parts": []}
    found |= {"scale": lab.scale, "data": Path(lab.request.data).name, "first seed": lab.seeds[0]}
    if claim.premise:
        bounds = bounds_of(claim.premise, lab.table(claim.premise)[0])
        found["missed"] = [text for text, holds in bounds.items() if not holds]
        met = "not met" if found["missed"] else "met"
        found["premise"] = f"{claim.premise.says}. It is {met}: {', '.join(bounds)}"
    names = [claim.id, lab.scale, Path(lab.request.data).stem, "validation" * lab.request.validation]
    path = output_folder(lab.out / "claims") / ("-".join(filter(None, names)) + ".json")
    found["table"] = {}
    if not (lab.request.data and found["missed"]):
        found["table"], extras = lab.table(claim)
        found["parts"] = [judge(part, found["table"], claim.kind) for part in claim.parts]
        if claim.picture:
            claim.picture(path.with_suffix(".png"), extras)
        elif claim.kind != "once":
            groups = {}
            for name in sorted({part.figure for part in claim.parts}):
                rows = {row: values[name] for row, values in found["table"].items() if name in values}
                groups[name] = {row: (mean_error(v)[0], mean_error(v)[1] or 0.0) for row, v in rows.items()}
            plots.bars(path.with_suffix(".png"), groups, "mean and standard error")
    found["verdict"] = UNMET if found["missed"] else together([part["verdict"] for part in found["parts"]])
    write_json(path, found)
    return found


def bounds_of(premise: Claim, table: dict) -> dict[str, bool]:
    """Each bound of a premise with the mean over the seeds, and whether the mean satisfies it."""
    found = {}
    for part in premise.parts:
        mean, holds = mean_error(table[part.row][part.figure])[0], judge(part, table)["difference"] > 0
        bound = f"is{' not' * (not holds)} {part.relation} {part.other:g}"
        found[f"{part.figure} of {part.row} {mean:.3g} {bound}"] = holds
    return found


def plus_minus(mean: float, error: float | None, form=".5g") -> str:
    return f"{mean:{form}}" + (f" +- {error:.2g}" if error else "")


def sure(found: dict) -> str:
    """The verdict at 5 %."""
    return UNMET if found["missed"] else together([at_level(part) for part in found["parts"]])


def section(found: dict) -> str:
    """A claim as text: sentence, source, premise, verdict, figures, parts."""
    table, parts = [], []
    for row, figures in found["table"].items():
        table.append({"": row} | {name: plus_minus(*mean_error(v)) for name, v in figures.items()})
    for part in found["parts"]:
        row = {"part": part["part"], "difference": plus_minus(part["difference"], part["error"], "+.4g")}
        row |= {"p": "" if part["p"] is None else part["p"]}
        parts.append(row | {"verdict": part["verdict"], "at 5 %": at_level(part)})
    held = sum(part["verdict"] == HOLDS for part in parts)
    lines = [
        f"{found['id'].upper()} {found['name']}: {found['says']}",
        f"Paper: {found['paper']}.",
        f"Premise: {found['premise'] or NOTHING[bool(found['data'])]}.",
        f"Verdict: **{found['verdict']}** ({held} of {len(parts)} parts hold; at 5 %: {sure(found)})",
        *map(format_table, filter(None, (table, parts))),
        found["notes"],
        f"`{found['command']}`, settings {found['scale']}, commit {found['commit']}",
    ]
    return "\n\n".join(filter(None, lines))


def summary(every: list[dict]) -> str:
    """How many claims hold, in one sentence; README has the same sentence."""
    verdicts = [sure(found) for found in every if not found["data"] and found["id"][0] in "al"]
    counts = [f"{verdicts.count(v)} {'are ' * (v == OPEN)}{v}" for v in (HOLDS, FAILS, OPEN)]
    unmet = f", and of {verdicts.count(UNMET)} the premise is not met" if UNMET in verdicts else ""
    words = ", ".join(counts).replace("holds", "hold").replace("does", "do")
    return f"Of {len(verdicts)} claims {words}{unmet} (drawn scenes, small models, 5 % level)."


def write_report(folder: Path, path: Path, device: torch.device) -> None:
    """The report of all conclusions in a folder: of each claim and data set those of the largest settings."""
    scales, order, largest = list(SETTINGS), [claim.id for claim in CLAIMS], {}
    order.sort(key=lambda id: id[0] != "f")  # findings first
    files = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    for found in sorted(files, key=lambda found: scales.index(found["scale"])):
        if found["first seed"] == FIRST_SEED:
            largest[found["data"], order.index(found["id"])] = found
    every = [largest[key] for key in sorted(largest)]
    rows = []
    for found in every:
        says = found["says"] + (f" ({found['data']})" if found["data"] else "")
        row = {"claim": found["id"].upper(), "what": says, "at 5 %": sure(found), "1 s": found["verdict"]}
        rows.append(row | {"settings": found["scale"]})
    parts = [part for found in every for part in found["parts"]]
    holm = after_holm([part["p"] for part in parts if part["p"] is not None and part["error"]])
    missing = ", ".join(id.upper() for n, id in enumerate(order) if ("", n) not in largest)
    used = {row["settings"] for row in rows}
    text = [
        "# The rebuttals' claims, tested",
        "Generated by `python -m lab.reproduce`; do not edit. Drawn scenes and small models show whether a"
        " mechanism exists. They are no evidence about photographs or about the papers' numbers.",
        summary(every),
        f"With Holm's correction {holm[0]} of the {len(parts)} parts of all results hold, {holm[1]} do not."
        f" {bench.machine(device)}; torch {torch.__version__}.",
        f"Not run: {missing}." if missing else "",
        format_table(rows),
        Path(__file__).with_name("report.txt").read_text().strip(),
        "\n".join(f"- {scale}: {SETTINGS[scale]}" for scale in scales if scale in used),
        *(f"## {section(found)}" for found in every),
    ]
    write_text(path, "\n\n".join(filter(None, text)) + "\n")


# picture in docs/: its claim
PICTURES = {"ladder": "l6", "spectrum": "l12", "tokens": "l4", "temperature": "l14", "similarity": "a12"}
PICTURES |= {"attention": "a11", "structures": "a10", "guidance": "f1"}


def copy_pictures(folder: Path, scale: str, to: Path) -> None:
    """Copies the pictures that docs/papers.md shows, with a palette, which makes the files small."""
    for name, id in PICTURES.items():
        if (path := folder / f"{id}-{scale}.png").exists():
            # the default method would mix the flat colours of the drawings
            small = Image.open(path).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
            write_image(to / f"{name}.png", small)
