"""Tables of the papers: the published numbers beside those of runs with the published settings.

    python -m lab.reproduce --table vlcs --init ViT-B/16 --data VLCS            also epsilon and pooling
    python -m lab.reproduce --table base-to-new --init ViT-B/16 --data COOP     the folder of CoOp's data sets

vlcs: methods and branches of AlignCLIP. epsilon: the label's share of a smoothed target, in both forms of
smoothing. pooling: plain fine-tuning. base-to-new: prompt methods on base and new classes. A run of train.py
for each arm, target or data set, and seed; the same command continues where it stopped.
"""

from pathlib import Path

from baselines.configure import is_tiny
from evals.open_world import domains_of, summarise
from lab.compare import run_all, runs_of
from readers.templates import BENCHMARKS, recognise
from util.files import output_folder, write_json
from util.report import format_table

SEEDS = 3  # of the papers
DOMAINS = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
SETS = [*(found.name for found in BENCHMARKS if found.mark.startswith("file ")), "ImageNet"]
# 36 images of each source domain, also where the folder is not called VLCS
RELEASED = dict(preset="alignclip-released", batch_size=108)
# row: flags of train.py (None: every run has it), published numbers in per cent, "-" where there is none
BRANCHES = {
    "zero-shot": (None, "- - - - 81.7"),
    "CLIPood": (dict(method="clipood"), "- - - - 85.0"),
    "AlignCLIP, D-V": (RELEASED, "100 68.9 80.9 90.1 85.1"),
    "AlignCLIP, V-V-V": (RELEASED | dict(branch="vvv"), "99.6 68.7 81.1 90.1 84.9"),
}
SHARES = {1.0: "67.4 88.8", 0.9: "68.3 89.9", 0.8: "68.3 89.8", 0.7: "67.9 89.7", 0.6: "67.9 89.5"}
EPSILON = {
    f"{form}, epsilon {epsilon}": (RELEASED | dict(smoothing=form, epsilon=epsilon), numbers)
    for form in ("released", "mixture")
    for epsilon, numbers in SHARES.items()
}
POOLING = {
    "class token": (dict(method="finetune"), "99.3 66.4 80.3 88.7 83.7"),
    "average": (dict(method="finetune", image_pooling="average"), "99.6 65.4 77.3 85.6 82.0"),
}
PROMPTS = {
    "zero-shot": (None, "69.34 74.22 71.70"),
    "CoOp": (dict(method="coop"), "82.69 63.22 71.66"),
    "CoCoOp": (dict(method="cocoop"), "80.47 71.69 75.83"),
    "MaPLe": (dict(method="maple"), "82.28 75.14 78.55"),
}
# name: source, columns (domains and their average, or figures averaged over the data sets), rows
TABLES = {
    "vlcs": (
        "AlignCLIP, reviewer 1, Table 1 (D-V averages 84.98); others quoted",
        (*DOMAINS, "average"),
        BRANCHES,
    ),
    "epsilon": (
        "AlignCLIP, reviewer 3, Table 2, which does not name the form",
        ("LabelMe", "VOC2007"),
        EPSILON,
    ),
    "pooling": ("AlignCLIP, reviewer 3, Table 3", (*DOMAINS, "average"), POOLING),
    "base-to-new": ("README of MaPLe, averages over 11 data sets", ("base", "new", "H"), PROMPTS),
}


def data_sets(root: Path) -> dict[str, Path]:
    """CoOp's data sets in a folder, or the folder itself, by name.   Raises: ValueError if there is none."""
    found = {}
    for path in sorted(path for path in (root, *root.glob("*")) if path.is_dir()):
        known = recognise(path, coded=(path / "images" / "train").is_dir())
        if known and known.name in SETS:
            found.setdefault(known.name, path)
    if not found:
        raise ValueError(f"{root}: none of CoOp's data sets is here: {', '.join(SETS)}")
    return found


def plan(request, columns: tuple[str, ...], arms: dict, out: Path) -> tuple[list[tuple], list[str]]:
    """The runs of a table, and what is smaller than in the paper.   Raises: ValueError without the data."""
    root, seeds, smaller = Path(request.data), request.seeds, []
    given = {name: getattr(request, name) for name in ("steps", "batch_size") if getattr(request, name)}
    flags = {"init": request.init, "device": request.device} | given
    if "base" in columns:
        sets, runs = data_sets(root), []
        for name, path in sets.items():
            of_set = runs_of(arms, "open-class", [""], seeds, out / name, flags | {"train_data": str(path)})
            runs += [(about | {"domain": name}, run) for about, run in of_set]
        if absent := [name for name in SETS if name not in sets]:
            smaller.append(f"{len(sets)} of {len(SETS)} data sets (absent: {', '.join(absent)})")
    else:
        root = root / "VLCS" if (root / "VLCS").is_dir() else root
        if absent := sorted({*DOMAINS} - {*domains_of(str(root), "domain-shift")}):
            raise ValueError(
                f"{root}: no domain {', '.join(absent)}: the table needs VLCS, {', '.join(DOMAINS)}"
            )
        targets = [name for name in columns if name in DOMAINS]
        runs = runs_of(arms, "domain-shift", targets, seeds, out, flags | {"train_data": str(root)})
    smaller += [f"{seeds} of {SEEDS} seeds"] * (seeds < SEEDS)
    smaller += [f"{name} {value}" for name, value in given.items()]
    smaller += ["settings for a small CLIP, not the published ones"] * is_tiny(request.init)
    return runs, smaller


def run(request) -> None:
    """Runs what is missing of a table, prints it, and writes results.json.   request: of lab/reproduce.py"""
    if request.table not in TABLES:
        raise ValueError(f"--table {request.table}: there are {', '.join(TABLES)}")
    if not request.init or not request.data:
        raise ValueError("--table needs --init, the CLIP to fine-tune (the papers': ViT-B/16), and --data")
    others = ("claim", "all", "list", "quick", "validation", "target", "zeroshot", "results")
    if more := [name for name in others if getattr(request, name)]:
        raise ValueError(f"--{more[0]}: not with --table")
    if request.seeds < 1:
        raise ValueError(f"--seeds {request.seeds}: must be at least 1")
    (source, columns, arms), out = TABLES[request.table], Path(request.out) / f"table-{request.table}"
    runs, smaller = plan(request, columns, {row: own for row, (own, _) in arms.items() if own}, out)
    output_folder(out)
    with open(out / "log.txt", "a") as log:
        rows = summarise(run_all(runs, log))
    found, several = {}, any(row["domain"] == "average" for row in rows)
    for row in rows:
        if "target" in row:
            found[row["method"], row["domain"]] = row["target"]
        elif row["domain"] == "average" or not several:
            found |= {(row["method"], name): row[name] for name in columns}
    shown = []
    for arm, (_, numbers) in arms.items():
        shown.append({"method": arm, "from": "paper"} | dict(zip(columns, numbers.split())))
        here = {name: [f"{100 * x:.1f}" for x in found[arm, name] if x is not None] for name in columns}
        shown.append({"method": arm, "from": "here"} | {name: " +- ".join(x) for name, x in here.items()})
    print(f"\n{request.table}, %: {source}\n{format_table(shown)}")
    print(f"smaller here than in the paper: {'; '.join(smaller) or 'nothing'}. in {out / 'results.json'}")
    write_json(out / "results.json", {"table": shown, "source": source, "smaller": smaller, "rows": rows})
