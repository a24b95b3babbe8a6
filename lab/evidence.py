"""Verdicts and the report: what the figures of lab/reproduce.py say about the claims of lab/claims.py.

Claims are judged by sign and order, not by the paper's number, unless the claim is a number (A1) or a ratio
of costs (A3, L7, L8). A part compares two arms with the same seed, data, batches and steps, or a figure with
a bound. Let d be the mean difference over the seeds and s its standard error.

    >, <           d > s in the claimed direction: holds;  d < -s: does not hold;  else not decidable here
    = within w     |d| + s <= w: holds;  |d| - s > w: does not hold;  else not decidable here
    = a number     equal to the printed digits

A claim holds if all its parts hold, and does not hold if one part does not. If the mean of what it presumes
misses a bound, the verdict is "premise not met". Fewer than three seeds decide nothing. With three seeds
chance passes one standard error in one of five cases, so every part has a p, one side of Student's t: "at
5 %" takes p < 0.05 for holds and p > 0.95 for does not hold. The report counts the parts that remain under
Holm's correction. Claims that share arms share luck. Seed n sets weights, pictures and test pictures;
reported seeds start at 3000 and were used for no choice. With --data all seeds have the same pictures.
"""

import json
import math
import statistics
from pathlib import Path

import torch

from lab import bench, claims
from lab.claims import CLAIMS, SETTINGS, Claim, Part
from util import plots
from util.files import write_json, write_text
from util.report import format_table
from util.run import git_commit

HOLDS, FAILS, OPEN, UNMET = "holds", "does not hold", "not decidable here", "premise not met"
FIRST_SEED, MIN_SEEDS = 3000, 3


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
    if part.relation == "=" and number:
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
    """Parts, premise and verdict of a claim whose runs exist in a Lab; written as JSON, with a picture."""
    found = {key: getattr(claim, key) for key in ("id", "name", "says", "paper", "notes")}
    table, extras = lab.table(claim)
    found |= {"table": table, "command": command, "commit": git_commit()[:7]}
    found |= {"scale": lab.scale, "data": Path(lab.request.data).name, "first seed": lab.seeds[0]}
    found["parts"] = [judge(part, table, claim.kind) for part in claim.parts]
    found |= {"verdict": together([part["verdict"] for part in found["parts"]]), "premise": "", "missed": []}
    if claim.premise:
        found |= {"premise": claim.premise.says, "missed": missed(claim.premise, lab.table(claim.premise)[0])}
        found["verdict"] = UNMET if found["missed"] else found["verdict"]
    names = [claim.id, lab.scale, Path(lab.request.data).stem, "validation" * lab.request.validation]
    path = lab.out / "claims" / ("-".join(filter(None, names)) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if claim.picture:
        claim.picture(path.with_suffix(".png"), extras)
    elif claim.kind != "once":
        draw(path.with_suffix(".png"), table, {part.figure for part in claim.parts})
    write_json(path, found)
    return found


def missed(premise: Claim, table: dict) -> list[str]:
    """The bounds that the mean over the seeds does not satisfy, with its value."""
    found = []
    for part in premise.parts:
        mean, _ = mean_error(table[part.row][part.figure])
        if judge(part, table)["difference"] <= 0:
            found.append(f"{part.row} {part.figure} {mean:.3g} is not {part.relation} {part.other:g}")
    return found


def draw(path: Path, table: dict, figures: set) -> None:
    """Bars of the judged figures, with standard errors."""
    groups = {}
    for name in sorted(figures):
        rows = {row: mean_error(found[name]) for row, found in table.items() if name in found}
        groups[name] = {row: (mean, error or 0.0) for row, (mean, error) in rows.items()}
    plots.bars(path, groups, "mean and standard error")


def cell(values: list[float]) -> str:
    """Mean +- standard error."""
    mean, error = mean_error(values)
    return f"{mean:.5g}" + (f" +- {error:.2g}" if error else "")


def sure(found: dict) -> str:
    """The verdict at 5 %."""
    return UNMET if found["missed"] else together([at_level(part) for part in found["parts"]])


def section(found: dict) -> str:
    """A claim as text: sentence, source, premise, verdict, figures, parts."""
    premise = "Premise: none is measured."
    if found["premise"]:
        state = f"not met: {', '.join(found['missed'])}" if found["missed"] else "met"
        premise = f"Premise: {found['premise']}. It is {state}."
    table = [{"": row} | {k: cell(v) for k, v in figures.items()} for row, figures in found["table"].items()]
    parts = []
    for part in found["parts"]:
        error = "" if part["error"] is None else f" +- {part['error']:.2g}"
        row = {"part": part["part"], "difference": f"{part['difference']:+.4g}{error}"}
        row |= {"p": "" if part["p"] is None else part["p"]}
        parts.append(row | {"verdict": part["verdict"], "at 5 %": at_level(part)})
    held = sum(part["verdict"] == HOLDS for part in parts)
    lines = [
        f"{found['id'].upper()} {found['name']}: {found['says']}",
        f"Paper: {found['paper']}.",
        premise,
        f"Verdict: **{found['verdict']}** ({held} of {len(parts)} parts hold; at 5 %: {sure(found)})",
        format_table(table),
        format_table(parts),
        found["notes"],
        f"`{found['command']}`, settings {found['scale']}, commit {found['commit']}",
    ]
    return "\n\n".join(filter(None, lines))


def write_report(folder: Path, path: Path, device: torch.device) -> None:
    """The report of all conclusions in a folder: of each claim and data set those of the largest settings."""
    scales, order, largest = list(SETTINGS), [claim.id for claim in CLAIMS], {}
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
    counts = ", ".join(f"{sum(r['at 5 %'] == v for r in rows)} {v}" for v in (HOLDS, FAILS, OPEN, UNMET))
    parts = [part for found in every for part in found["parts"]]
    holm = after_holm([part["p"] for part in parts if part["p"] is not None and part["error"]])
    missing = ", ".join(id.upper() for n, id in enumerate(order) if ("", n) not in largest)
    used = {row["settings"] for row in rows}
    text = [
        "# The rebuttals' claims, tested",
        "Generated by `python -m lab.reproduce`; do not edit. Drawn scenes and small models show whether a"
        " mechanism exists. They are no evidence about photographs or about the papers' numbers.",
        f"{len(every)} results at 5 %: {counts}. Of their {len(parts)} parts {holm[0]} hold and {holm[1]} do"
        f" not with Holm's correction. {bench.machine(device)}; torch {torch.__version__}.",
        f"Not run: {missing}." if missing else "",
        __doc__.split("\n\n", 1)[1].strip(),
        format_table(rows),
        "## Settings",
        claims.CHOICES,
        "\n".join(f"- {scale}: {SETTINGS[scale]}" for scale in scales if scale in used),
        *(f"## {section(found)}" for found in every),
    ]
    write_text(path, "\n\n".join(filter(None, text)) + "\n")
