"""Fine-tuning methods side by side on the open-world protocol, or runs beside a table of the papers.

    python -m lab.compare --scenes                           pre-train, fine-tune with each method, the tables
    python -m lab.compare --data PACS --init CHECKPOINT      the same on your data, each domain left out once
    python -m lab.reproduce --table vlcs --init ViT-B/16 --data VLCS            also epsilon and pooling
    python -m lab.reproduce --table base-to-new --init ViT-B/16 --data COOP     the folder of CoOp's data sets

vlcs: methods, and branches of AlignCLIP. epsilon: the label's share of a smoothed target, in both forms of
smoothing. pooling: plain fine-tuning. base-to-new: prompt methods. Runs have the published settings.

Every run is a directory of train.py under --out. The same command continues where it stopped.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import train
from baselines.methods import is_tiny
from evals.open_world import FIGURES, TASKS, domains_of, summarise, table
from readers.templates import BENCHMARKS, recognise
from util.evaluation import WhereFlags, where_of
from util.files import output_folder, write_json
from util.flags import parse
from util.program import leave, program
from util.report import Progress, format_table
from util.run import check_same_run

METHODS = ("finetune", "labelsmooth", "clipood", "alignclip", "flyp", "coop", "cocoop", "maple", "tes")


@dataclass(frozen=True)
class Comparison(WhereFlags):
    """Flags of this program."""

    # what is compared
    scenes: bool = False  # the embedded data, on which a small CLIP is pre-trained first
    data: str = ""  # a DomainBed folder, a CoOp split, or a list with labels
    init: str = ""  # the CLIP to fine-tune; for --scenes instead of pre-training
    table: str = ""  # a table of the papers, instead of --tasks, --methods and --targets
    tasks: str = ",".join(TASKS[:3])  # separated by commas
    methods: str = ",".join(METHODS[:5])  # separated by commas; zero-shot is always included
    targets: str = ""  # domains, separated by commas; empty: every one in turn, for scenes cartoon
    seeds: int = 3  # runs of each: seeds 0, 1, ...
    # training
    steps: int = 0  # of each fine-tuning; 0: train.py's, for scenes 150
    batch_size: int = 0  # images over all source domains; 0: train.py's
    # running
    device: str = "auto"  # cpu, cuda or auto
    threads: int = 0  # CPU threads; 0: torch's choice
    workers: int = 0  # loader processes
    out: str = ""  # empty: runs/open-world-SCENES_OR_DATA


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
    for form, (epsilon, numbers) in product(("released", "mixture"), SHARES.items())
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
ALL = (*DOMAINS, "average")
# name: source, columns (domains and their average, or figures averaged over the data sets), rows
TABLES = {
    "vlcs": ("AlignCLIP, reviewer 1, Table 1 (D-V averages 84.98); others quoted", ALL, BRANCHES),
    "epsilon": ("AlignCLIP, reviewer 3, Table 2, of either form", ("LabelMe", "VOC2007"), EPSILON),
    "pooling": ("AlignCLIP, reviewer 3, Table 3", ALL, POOLING),
    "base-to-new": ("README of MaPLe, averages over 11 data sets", ("base", "new", "H"), PROMPTS),
}


def run_training(options: dict, log) -> dict:
    """Results of a run of train.py with these flags: read if it is finished, continued, or started."""
    out = Path(options["out"])
    if (out / "checkpoint.pt").exists():
        options = options | {"resume": "auto"}
    c, s = train.configure(**options)
    if (out / "results.json").exists():
        check_same_run(json.loads((out / "config.json").read_text()), asdict(c) | asdict(s))
        return json.loads((out / "results.json").read_text())
    with contextlib.redirect_stdout(log):
        return train.train(c, s)


def choose(what: str, wanted: str, known) -> list[str]:
    """Names from a list with commas.   Raises: ValueError for an unknown one."""
    names = [name.strip() for name in wanted.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{what} {unknown[0]!r}: there are {', '.join(known)}")
    return names


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


def plan(c: Comparison, init: str, out: Path) -> list[tuple[dict, dict]]:
    """What every run is, and its flags of train.py.   Raises: ValueError for what the data do not have."""
    where, sets, runs = where_of(c), {"": "scenes" if c.scenes else c.data}, []
    given = where | dict(batch_size=c.batch_size, threads=c.threads, steps=c.steps or 150 * c.scenes)
    common = {k: v for k, v in given.items() if v} | {"device": c.device, "workers": c.workers}
    tasks, wanted = choose("task", c.tasks, TASKS), c.targets or "cartoon" * c.scenes
    arms = {method: {"method": method} for method in choose("method", c.methods, METHODS)}
    _, columns, rows = TABLES.get(c.table, ("", (), {}))
    if c.table:
        tasks, wanted = ["open-class" if "base" in columns else "domain-shift"], ",".join(DOMAINS)
        arms = {row: own for row, (own, _) in rows.items() if own}
        below = Path(c.data, "VLCS")
        sets = data_sets(Path(c.data)) if "base" in columns else {"": below if below.is_dir() else c.data}
    for (name, source), task in product(sets.items(), tasks):
        domains = domains_of(source, task, **where)
        if domains != [""] and wanted:
            chosen = choose(f"{source}: domain", wanted, domains)
            # training needs all domains of a table, which may have the columns of some
            domains = [domain for domain in chosen if not c.table or domain in columns]
        for domain, seed, (arm, own) in product(domains, range(c.seeds), arms.items()):
            words = (name, task, domain, arm.replace(", ", "-").replace(" ", "-"), str(seed))
            run = dict(init=init, train_data=str(source), open_task=task, target_domain=domain, seed=seed)
            run |= dict(out=str(out / "-".join(word for word in words if word)))
            about = dict(task=task, domain=domain or name, seed=seed, method=arm)
            runs.append((about, own | run | common))
    return runs


def run_all(runs: list[tuple[dict, dict]], log) -> list[dict]:
    """Runs what is missing.

    Returns: records of the reported models (the averaged ones where there are any), of zero-shot, chance, and
             the best constant answer where that is above chance.
    """
    progress, records = Progress("fine-tuning", len(runs), "runs"), {}
    for about, flags in runs:
        results, method = run_training(flags, log), about["method"]
        reported = results.get("averaged", results["fine-tuned"])
        found = {name: reported[name] for name in ("chance", "constant") if reported.get(name)}
        found |= {"zero-shot": results["zero-shot"], method: reported}
        if "averaged" in results:
            found[f"{method}, last step"] = results["fine-tuned"]
        for name, result in found.items():
            # zero-shot is the same for all methods of a seed
            record = about | {"method": name, **{f: result[f] for f in FIGURES if f in result}}
            records[about["task"], name, about["domain"], about["seed"]] = record
        progress.add(1)
    return list(records.values())


def beside_the_paper(c: Comparison, rows: list[dict]) -> tuple[list[dict], list[str]]:
    """Rows of a table of the papers, published numbers and those of the runs, and what is smaller here."""
    (_, columns, arms), found, shown, smaller = TABLES[c.table], {}, [], []
    sets = {row["domain"] for row in rows} - {"average"}
    for row in rows:
        if "target" in row:
            found[row["method"], row["domain"]] = row["target"]
        elif row["domain"] == "average" or len(sets) == 1:
            found |= {(row["method"], name): row[name] for name in columns}
    for arm, (_, numbers) in arms.items():
        shown.append({"method": arm, "from": "paper"} | dict(zip(columns, numbers.split())))
        here = {name: [f"{100 * x:.1f}" for x in found[arm, name] if x is not None] for name in columns}
        shown.append({"method": arm, "from": "here"} | {name: " +- ".join(x) for name, x in here.items()})
    if "base" in columns and (absent := [name for name in SETS if name not in sets]):
        smaller.append(f"{len(sets)} of {len(SETS)} data sets (absent: {', '.join(absent)})")
    smaller += [f"{c.seeds} of 3 seeds"] * (c.seeds < 3)
    smaller += [f"{name} {getattr(c, name)}" for name in ("steps", "batch_size") if getattr(c, name)]
    smaller += ["settings for a small CLIP, not the published ones"] * is_tiny(c.init)
    return shown, smaller


def compare(c: Comparison) -> list[dict]:
    """Runs what is missing, prints the tables, writes results.json.   Returns: summarise's rows."""
    if c.table and c.table not in TABLES:
        raise ValueError(f"--table {c.table}: there are {', '.join(TABLES)}")
    if c.scenes == bool(c.data) or (c.table and c.scenes):
        raise ValueError("give --scenes, or --data with --init: exactly one of them, and --table with --data")
    if not c.scenes and not c.init:
        raise ValueError(f"--data {c.data} needs --init: the CLIP to fine-tune, ViT-B/16 in the papers")
    if c.seeds < 1:
        raise ValueError(f"--seeds {c.seeds}: must be at least 1")
    out = Path(c.out or f"runs/open-world-{'scenes' if c.scenes else c.table or Path(c.data).stem}")
    init = c.init or str(out / "clip")
    runs = plan(c, init, out)
    output_folder(out)
    with open(out / "log.txt", "a") as log:
        if c.scenes and not c.init:
            print(f"pre-training a small CLIP on broad scenes -> {init}", flush=True)
            flags = dict(method="clip", train_data="broad", steps=1000, out=init)
            run_training(flags | dict(device=c.device, threads=c.threads), log)
        records = run_all(runs, log)
    rows = summarise(records)
    content = {"comparison": asdict(c), "rows": rows, "records": records}
    text = f"{table(rows)}\n\nval: held out of the source domains"
    if c.table:
        shown, smaller = beside_the_paper(c, rows)
        content |= {"table": shown, "smaller": smaller}
        text = f"{c.table}, %: {TABLES[c.table][0]}\n{format_table(shown)}\n"
        text += f"smaller here than in the paper: {'; '.join(smaller) or 'nothing'}"
    print(f"\n{text}. written to {out / 'results.json'}")
    write_json(out / "results.json", content)
    return rows


def published(request) -> None:
    """--table of lab/reproduce.py, whose flags these are.   Raises: ValueError for flags of claims."""
    others = ("claim", "all", "list", "quick", "validation", "target", "results")
    if more := [name for name in others if getattr(request, name)]:
        raise ValueError(f"--{more[0]}: not with --table")
    shared = ("table", "data", "init", "seeds", "steps", "batch_size", "device")
    values = {name: getattr(request, name) for name in shared} | {"seeds": min(3, request.seeds)}
    compare(Comparison(**values, out=f"{request.out}/table-{request.table}"))


@program
def main(argv: list[str]) -> None:
    compare(parse(Comparison, argv, __doc__))


if __name__ == "__main__":
    leave(main())
