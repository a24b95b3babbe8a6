"""Fine-tuning methods on the open-world protocol: every method, task, left-out domain and seed.

    python -m lab.compare --scenes                           pre-train, fine-tune with each method, the tables
    python -m lab.compare --data PACS --init CHECKPOINT      the same on your data, each domain left out once

Every run is a directory of train.py under --out. The same command continues where it stopped.
"""

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from evals.open_world import FIGURES, TASKS, domains_of, summarise, table
from lab.reproduce import run_training
from util.evaluation import WhereFlags, where_of
from util.files import output_folder, write_json
from util.flags import parse
from util.program import leave, program
from util.report import Progress

METHODS = ("finetune", "labelsmooth", "clipood", "alignclip", "flyp", "coop", "cocoop", "maple", "tes")


# fmt: off
@dataclass(frozen=True)
class Comparison(WhereFlags):
    """Flags of this program."""

    # what is compared
    scenes: bool = False  # the embedded data, on which a small CLIP is pre-trained first
    data: str = ""  # a DomainBed folder, a CoOp split, or a list with labels
    init: str = ""  # the CLIP to fine-tune; for --scenes instead of pre-training
    tasks: str = ",".join(TASKS[:3])  # separated by commas
    methods: str = ",".join(METHODS[:5])  # separated by commas; zero-shot is always included
    targets: str = ""  # domains, separated by commas; empty: every one in turn, for scenes cartoon
    seeds: int = 3  # runs of each: seeds 0, 1, ...
    # training
    steps: int = 0  # of each fine-tuning; 0: train.py's, for scenes 150
    lr: float = 0.0  # 0: train.py's
    batch_size: int = 0  # images over all source domains; 0: train.py's
    # running
    device: str = "auto"  # cpu, cuda or auto
    threads: int = 0  # CPU threads; 0: torch's choice
    workers: int = 0  # loader processes
    out: str = ""  # empty: runs/open-world-SCENES_OR_DATA
# fmt: on


def choose(what: str, wanted: str, known) -> list[str]:
    """Names from a list with commas.   Raises: ValueError for an unknown one."""
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{what} {name!r}: there are {', '.join(known)}")
    return names


def runs_of(arms: dict[str, dict], task: str, targets, seeds: int, out: Path, flags: dict) -> list[tuple]:
    """What every run is, and its flags of train.py: an arm's own and those of all.   arms: {name: flags}"""
    runs = []
    for target, seed, (arm, own) in product(targets, range(seeds), arms.items()):
        name = "-".join(x for x in (task, target, arm, str(seed)) if x).replace(", ", "-").replace(" ", "-")
        about = dict(task=task, domain=target, seed=seed, method=arm)
        run = dict(open_task=task, target_domain=target, seed=seed, out=str(out / name))
        runs.append((about, own | run | flags))
    return runs


def plan(c: Comparison, init: str, out: Path) -> list[tuple]:
    """The runs of a comparison, as runs_of returns them."""
    source, where, runs = "scenes" if c.scenes else c.data, where_of(c), []
    passed = ("lr", "batch_size", "threads", *where)
    common = {k: getattr(c, k) for k in passed if getattr(c, k)} | {"device": c.device, "workers": c.workers}
    if steps := c.steps or (150 if c.scenes else 0):
        common["steps"] = steps
    arms = {method: {"method": method} for method in choose("method", c.methods, METHODS)}
    for task in choose("task", c.tasks, TASKS):
        targets = domains_of(source, task, **where)
        if targets != [""] and (c.targets or c.scenes):
            targets = choose("domain", c.targets or "cartoon", targets)
        runs += runs_of(arms, task, targets, c.seeds, out, common | dict(init=init, train_data=source))
    return runs


def run_all(runs: list[tuple], log) -> list[dict]:
    """Runs what is missing.

    Returns: records of the reported models (the averaged ones where there are any), zero-shot and chance.
    """
    progress, records = Progress("fine-tuning", len(runs), "runs"), {}
    for about, flags in runs:
        results, method = run_training(flags, log), about["method"]
        reported = results.get("averaged", results["fine-tuned"])
        found = {"chance": reported["chance"], "zero-shot": results["zero-shot"], method: reported}
        if "averaged" in results:
            found[f"{method}, last step"] = results["fine-tuned"]
        for name, result in found.items():
            # zero-shot is the same for all methods of a seed
            record = about | {"method": name, **{f: result[f] for f in FIGURES if f in result}}
            records[about["task"], name, about["domain"], about["seed"]] = record
        progress.add(1)
    return list(records.values())


def compare(c: Comparison) -> list[dict]:
    """Runs what is missing, prints the tables, writes results.json.   Returns: summarise's rows."""
    if c.scenes == bool(c.data):
        raise ValueError("give --scenes, or --data with --init: exactly one of them")
    if not c.scenes and not c.init:
        raise ValueError(f"--data {c.data} needs --init: the CLIP to fine-tune")
    if c.seeds < 1:
        raise ValueError(f"--seeds {c.seeds}: must be at least 1")
    out = Path(c.out or f"runs/open-world-{'scenes' if c.scenes else Path(c.data).stem}")
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
    print(f"\n{table(rows)}\n\nval: held out of the source domains. written to {out / 'results.json'}")
    write_json(out / "results.json", {"comparison": asdict(c), "rows": rows, "records": records})
    return rows


@program
def main(argv: list[str]) -> None:
    compare(parse(Comparison, argv, __doc__))


if __name__ == "__main__":
    leave(main())
