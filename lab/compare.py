"""Fine-tuning methods on the open-world protocol: every method, task, left-out domain and seed.

    python -m lab.compare --scenes                           pre-train, fine-tune with each method, the tables
    python -m lab.compare --data PACS --init CHECKPOINT      the same on your data, each domain left out once

Every run is a directory of train.py under --out. The same command continues where it stopped.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from evals.open_world import FIGURES, TASKS, domains_of, summarise, table
from lab.reproduce import run_training
from util.evaluation import WhereFlags, where_of
from util.files import output_folder, write_json
from util.flags import parse
from util.program import leave, program
from util.report import Progress

METHODS = ("finetune", "labelsmooth", "clipood", "alignclip", "flyp")
ON_REQUEST = ("coop", "cocoop", "maple", "tes")


# fmt: off
@dataclass(frozen=True)
class Comparison(WhereFlags):
    """Flags of this program."""

    # what is compared
    scenes: bool = False  # the embedded data, on which a small CLIP is pre-trained first
    data: str = ""  # a DomainBed folder, a CoOp split, or a list with labels
    init: str = ""  # the CLIP to fine-tune; for --scenes instead of pre-training
    tasks: str = ",".join(TASKS[:3])  # separated by commas
    methods: str = ",".join(METHODS)  # separated by commas; zero-shot is always included
    targets: str = ""  # domains, separated by commas; empty: every one in turn, for scenes cartoon
    seeds: int = 3  # runs of each: seeds 0, 1, ...
    # training
    quick: bool = False  # a tenth of the steps and one seed: only to see that it works
    pretrain_steps: int = 1000  # of the small CLIP
    steps: int = 0  # of each fine-tuning; 0: train.py's, for scenes 150
    lr: float = 0.0  # 0: train.py's
    batch_size: int = 0  # images over all source domains; 0: train.py's
    bias: float = 0.0  # scenes: share of training pictures with the background of their class
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


def plan(c: Comparison, init: str, out: Path) -> list[dict]:
    """The flags of every run of train.py."""
    source = "scenes" if c.scenes else c.data
    where = where_of(c)
    passed = ("lr", "batch_size", "bias", "threads", *where)
    common = {k: getattr(c, k) for k in passed if getattr(c, k)} | {"device": c.device, "workers": c.workers}
    steps = c.steps or (150 if c.scenes else 0)
    if c.quick:
        steps = max(1, (steps or 300) // 10)
    common |= {"steps": steps} if steps else {}
    runs = []
    for task in choose("task", c.tasks, TASKS):
        targets = domains_of(source, task, **where)
        if targets != [""] and (c.targets or c.scenes):
            targets = choose("domain", c.targets or "cartoon", targets)
        for target in targets:
            for seed in range(1 if c.quick else c.seeds):
                for method in choose("method", c.methods, (*METHODS, *ON_REQUEST)):
                    name = "-".join(x for x in (task, target, method, str(seed)) if x)
                    run = dict(method=method, init=init, train_data=source, open_task=task)
                    run |= dict(target_domain=target, seed=seed, out=str(out / name))
                    runs.append(run | common)
    return runs


def records_of(flags: dict, results: dict) -> list[dict]:
    """Records of the reported model (the averaged one where there is one), zero-shot and chance."""
    about = {"task": flags["open_task"], "domain": flags["target_domain"], "seed": flags["seed"]}
    reported = results.get("averaged", results["fine-tuned"])
    found = {"chance": reported["chance"], "zero-shot": results["zero-shot"], flags["method"]: reported}
    if "averaged" in results:
        found[f"{flags['method']}, last step"] = results["fine-tuned"]
    return [
        {**about, "method": name, **{f: result[f] for f in FIGURES if f in result}}
        for name, result in found.items()
    ]


def compare(c: Comparison) -> list[dict]:
    """Runs what is missing, prints the tables, writes results.json.   Returns: summarise's rows."""
    if c.scenes == bool(c.data):
        raise ValueError("give --scenes, or --data with --init: exactly one of them")
    if not c.scenes and not c.init:
        raise ValueError(f"--data {c.data} needs --init: the CLIP to fine-tune")
    if c.seeds < 1:
        raise ValueError(f"--seeds {c.seeds}: must be at least 1")
    if not 0 <= c.bias <= 1:
        raise ValueError(f"--bias {c.bias}: must lie in [0, 1]")
    name = ("scenes" if c.scenes else Path(c.data).stem) + ("-quick" if c.quick else "")
    out = Path(c.out or f"runs/open-world-{name}")
    init, records = c.init or str(out / "clip"), {}
    runs = plan(c, init, out)
    output_folder(out)
    with open(out / "log.txt", "a") as log:
        if c.scenes and not c.init:
            steps = max(1, c.pretrain_steps // (10 if c.quick else 1))
            flags = dict(method="clip", train_data="broad", steps=steps, out=init)
            print(f"pre-training a small CLIP on broad scenes, {steps} steps -> {init}", flush=True)
            run_training(flags | dict(device=c.device, threads=c.threads), log)
        progress = Progress("fine-tuning", len(runs), "runs")
        for flags in runs:
            for r in records_of(flags, run_training(flags, log)):
                # zero-shot is the same for all methods of a seed
                records[r["task"], r["method"], r["domain"], r["seed"]] = r
            progress.add(1)
    rows = summarise(list(records.values()))
    print(f"\n{table(rows)}\n\nval: held out of the source domains. written to {out / 'results.json'}")
    content = {"comparison": asdict(c), "rows": rows, "records": list(records.values())}
    write_json(out / "results.json", content)
    return rows


@program
def main(argv: list[str]) -> None:
    compare(parse(Comparison, argv, __doc__))


if __name__ == "__main__":
    leave(main())
