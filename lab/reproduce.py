"""Tests every claim of the two papers' rebuttals: the paper's number beside ours, and a verdict.

    python -m lab.reproduce --list                      the 32 claims
    python -m lab.reproduce --claim l6 --quick          one claim, by id or name
    python -m lab.reproduce --all --quick --jobs 2      all of them, in two processes of one thread each
    python -m lab.reproduce --claim l2,l16 --data captions.jsonl                        on other pairs
    python -m lab.reproduce --claim a4,a16 --data PACS --init RUN --target sketch       on other domains

lab/claims.py has the claims, lab/measures.py what is measured, lab/evidence.py the rule of the verdicts. Runs
are kept under --out by flags and commit. Claims share them, and the same command continues where it stopped.
The report is evidence.md.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

import evaluate
from lab import bench, claims, evidence, latent_text  # noqa: F401  (adds the method latent)
from lab.claims import ARMS, BY_NAME, CLAIMS, FIGURES, RECALL, SETTINGS, Claim
from lab.compare import published, run_training
from model import CONFIGS
from scale import distributed
from util.files import output_folder, write_json
from util.flags import parse
from util.program import leave, program
from util.report import Progress, format_table

VALIDATION_SEED, ROOT = 100, Path(__file__).parent.parent


# fmt: off
@dataclass(frozen=True)
class Request:
    """Flags of this program."""

    # claims
    list: bool = False  # print the claims
    claim: str = ""  # ids or names, separated by commas
    all: bool = False  # every claim
    table: str = ""  # instead: vlcs, epsilon, pooling or base-to-new, with --init and --data
    seeds: int = 3  # repetitions
    quick: bool = False  # a third of the steps, smaller sets
    validation: bool = False  # seeds on which settings were chosen, instead of the reported ones
    # other data: pairs for claims about pre-training, domains with labels for claims about fine-tuning
    data: str = ""  # a list of captions, or a folder DOMAIN/CLASS
    init: str = ""  # domains: the CLIP to fine-tune
    target: str = ""  # domains: the one left out of training
    zeroshot: str = ""  # l1: a folder of classes
    steps: int = 0  # with --data; 0: that of the settings
    batch_size: int = 0  # with --data; 0: that of the settings; domains: a multiple of their number
    # running
    device: str = "auto"  # cpu, cuda or auto
    jobs: int = 1  # processes of one thread each
    out: str = "runs/reproduce"  # runs, results and pictures
    results: str = ""  # the report; empty: evidence.md under --out
# fmt: on


@functools.cache
def version(*without: str) -> str:
    """The last commit that changed a .py file outside of these folders, and changes since; "" without git."""
    paths, texts = ["--", "*.py", *(f":!{folder}" for folder in without)], []
    for command in (["log", "-1", "--format=%H"], ["diff", "HEAD"]):
        with contextlib.suppress(OSError):
            found = subprocess.run(["git", *command, *paths], cwd=ROOT, capture_output=True, text=True)
            texts.append(found.stdout)
    return "".join(texts)


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def stamp(path: str) -> list:
    """A name, and the size and time of its file: another file of the same name gives another stamp."""
    file = Path(path) / "checkpoint.pt" if (Path(path) / "checkpoint.pt").exists() else Path(path)
    return [path, file.stat().st_size, file.stat().st_mtime_ns] if path and file.is_file() else [path]


class Lab:
    """What a request means: the flags of every arm, where its run is, and what was measured of it."""

    def __init__(self, request: Request):
        self.request, self.out = request, Path(request.out)
        self.device = distributed.setup(request.device)
        self.scale = "data" if request.data else "quick" if request.quick else "default"
        first = VALIDATION_SEED if request.validation else evidence.FIRST_SEED
        self.seeds = list(range(first, first + request.seeds))
        self.image_size = CONFIGS[SETTINGS[self.scale]["pairs"].get("model", "tiny")].image_size

    def flags(self, arm: str, seed: int) -> dict:
        """Flags of train.py for an arm, without its --init and --out."""
        own, request = dict(ARMS[arm]), self.request
        group = "start" if arm == "start" else "labels" if own.pop("start", "") else "pairs"
        found = SETTINGS[self.scale][group] | own | {"seed": seed, "device": request.device, "threads": 1}
        if request.data:
            given = {name: getattr(request, name) for name in ("steps", "batch_size")}
            given["zeroshot_data"] = request.zeroshot
            given["target_domain"] = request.target if found.get("target_domain") else ""
            found |= {"train_data": request.data} | {k: v for k, v in given.items() if v}
        else:
            found |= {"test_seed": seed}
        times = found.pop("times", 1)
        return found | ({"steps": times * found["steps"]} if times > 1 else {})

    def key(self, arm: str, seed: int) -> str:
        """A name for a run: its flags, what it starts from, its data, and the version of the code."""
        start = ARMS[arm].get("start", "")
        if start:
            start = stamp(self.request.init) if self.request.init else self.key(start, seed)
        code = version("lab", "docs", "tests"), self.device.type
        return digest(self.flags(arm, seed), start, stamp(self.request.data), code)

    def path(self, arm: str, seed: int) -> Path:
        name = arm.replace(" ", "-").replace("=", "")
        return self.out / self.scale / f"{name}-{seed}-{self.key(arm, seed)}"

    def train(self, arm: str, seed: int) -> None:
        """Trains an arm, continues its training, or finds it finished."""
        path, start = self.path(arm, seed), ARMS[arm].get("start", "")
        path.mkdir(parents=True, exist_ok=True)
        more = {"init": self.request.init or str(self.path(start, seed))} if start else {}
        with open(path / "log.txt", "a") as log:
            run_training(self.flags(arm, seed) | more | {"out": str(path)}, log)

    def figure(self, arm: str, seed: int, name: str) -> float | None:
        """A figure of a run in per cent; None if the data have no part for it."""
        results = json.loads((self.path(arm, seed) / "results.json").read_text())
        where, *names = FIGURES[name]
        found = results.get(where, {})
        if where == "reported":
            found = results.get("averaged", results.get("fine-tuned"))
        return next((100 * found[n] for n in names if n in found), None)

    def model(self, arm: str, seed: int) -> tuple:
        """A trained model and its tokenizer."""
        model, tokenizer = evaluate.open_model(str(self.path(arm, seed)))
        return model.to(self.device), tokenizer

    def kept(self, name: str, depends: list, make):
        """What make() returned for these dependencies and this code: computed once, kept as JSON."""
        key = digest(version("docs", "tests"), depends)
        path = self.out / self.scale / "measured" / f"{name}-{key}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, make())
        return json.loads(path.read_text())

    def measure(self, claim: Claim, seed: int) -> list:
        """Table of a claim or premise for a seed, and what is drawn of it."""

        def make() -> list:
            torch.manual_seed(seed)
            found = claim.measure(self, seed)
            return list(found) if isinstance(found, tuple) else [found, None]

        depends = [self.key(arm, seed) for arm in claim.arms.values()]
        depends += [bench.machine(self.device)] * (claim.kind == "timing")
        return self.kept(f"{claim.id}-{seed}", depends, make)

    def timings(self, section: str) -> list[dict]:
        """Rows of a section of lab/bench.py on this machine."""
        c = bench.BenchConfig((section,), self.request.device, threads=1, quick=self.request.quick, out="")
        return self.kept(f"bench-{section}", [bench.machine(self.device)], lambda: bench.measure(c).rows)

    def seeds_of(self, claim: Claim) -> list[int]:
        return self.seeds if claim.kind == "seeds" else self.seeds[:1]

    def table(self, claim: Claim) -> tuple[dict, list]:
        """{row: {figure: values}} over the seeds (or the rounds of a timing), and what is drawn."""
        table, extras = {}, []
        for seed in self.seeds_of(claim):
            if claim.measure:
                rows, extra = self.measure(claim, seed)
                extras.append(extra)
            else:
                of = {row: partial(self.figure, arm, seed) for row, arm in claim.arms.items()}
                rows = {row: {name: figure(name) for name in claim.figures} for row, figure in of.items()}
            for row, figures in rows.items():
                for name, value in figures.items():
                    if value is not None:
                        values = table.setdefault(row, {}).setdefault(name, [])
                        values += value if isinstance(value, list) else [value]
        return table, extras


# Work ------------------------------------------------------------------------------------------------------


def begin_worker() -> None:
    """One thread. TRAP: workers of a killed parent would wait for ever, so they end with it."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def work(request: Request, kind: str, name: str, seed: int) -> None:
    """Trains an arm or measures a claim.   Raises: ValueError that names it."""
    lab = Lab(request)
    try:
        lab.train(name, seed) if kind == "train" else lab.measure(BY_NAME[name], seed)
    except (ValueError, OSError) as error:
        raise ValueError(f"{kind} {name}, seed {seed}: {error}") from error


def run_tasks(request: Request, tasks: list[tuple], label: str) -> None:
    """Runs tasks (kind, name, seed) in --jobs processes."""
    progress = Progress(label, len(tasks), "done")
    if request.jobs == 1 or not tasks:
        for task in tasks:
            work(request, *task)
            progress.add(1)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(request.jobs, context, begin_worker) as pool:
        try:
            for future in as_completed([pool.submit(work, request, *task) for task in tasks]):
                future.result()
                progress.add(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run(lab: Lab, chosen: list[Claim]) -> None:
    """Trains and measures what is missing: first what other arms start from, timings last and alone."""
    chosen = list({c.id: c for claim in chosen for c in (claim, claim.premise) if c}.values())
    arms = {arm for claim in chosen for arm in claim.arms.values()}
    if not lab.request.init:
        arms |= {ARMS[arm].get("start", "") for arm in arms} - {""}
    for later, label in ((False, "train"), (True, "fine-tune")):
        some = [arm for arm in sorted(arms) if bool(ARMS[arm].get("start", "")) == later]
        tasks = [("train", arm, seed) for arm in some for seed in lab.seeds]
        tasks = [task for task in tasks if not (lab.path(*task[1:]) / "results.json").exists()]
        run_tasks(lab.request, tasks, label)
    measured = [claim for claim in chosen if claim.measure and claim.kind != "timing"]
    tasks = [("measure", claim.id, seed) for claim in measured for seed in lab.seeds_of(claim)]
    run_tasks(lab.request, tasks, "measure")
    torch.set_num_threads(1)
    for claim in chosen:
        if claim.kind == "timing":
            lab.measure(claim, lab.seeds[0])


def adapted(claim: Claim, request: Request) -> Claim:
    """The claim on the data of a request: domains keep its figures, pairs compare its arms by R@1 both ways.

    Raises: ValueError if it cannot be tested there.
    """
    if not request.data:
        return claim
    starts = {"start" in ARMS[arm] for arm in claim.arms.values()}
    if claim.measure or starts != {bool(request.init)}:
        kind = "fine-tuning" if request.init else "pre-training"
        raise ValueError(
            f"{claim.id}: with these flags --data serves claims that only compare runs of {kind}"
        )
    if request.init:
        return replace(claim, premise=None)
    if claim.id == "l1":
        if not request.zeroshot:
            raise ValueError("l1 on pairs needs --zeroshot, a folder of classes")
        parts = [part for part in claim.parts if part.figure == "kinds top-1"]
        return replace(claim, figures=("kinds top-1",), parts=tuple(parts))
    # a list of captions is little data as a whole
    base = BY_NAME["l2"] if claim.id == "l16" else claim
    parts = dict.fromkeys(part._replace(figure=f"{way} R@1") for way in claims.WAYS for part in base.parts)
    return replace(claim, arms=base.arms, figures=RECALL, parts=tuple(parts))


def chosen_by(request: Request) -> list[Claim]:
    """The claims of a request.   Raises: ValueError for contradicting flags and unknown claims."""
    for name in ("seeds", "jobs"):
        if getattr(request, name) < 1:
            raise ValueError(f"--{name} {getattr(request, name)}: must be at least 1")
    if request.target and not request.init:
        raise ValueError("--target goes with --init and --data")
    if (request.steps or request.batch_size) and not request.data:
        raise ValueError("--steps, --batch-size: go with --data")
    if request.all == bool(request.claim):
        raise ValueError("give --list, --all, or --claim with ids or names: exactly one of them")
    if request.all and request.data:
        raise ValueError("--data serves some claims only: name them with --claim")
    names = [c.id for c in CLAIMS] if request.all else request.claim.lower().replace(" ", "").split(",")
    for name in names:
        if BY_NAME.get(name) not in CLAIMS:
            raise ValueError(f"claim {name!r}: --list shows the {len(CLAIMS)} claims")
    return [adapted(BY_NAME[name], request) for name in names]


def command(claim: Claim, request: Request) -> str:
    """The command line for a claim. Paths are names only: the report has no folders of this machine."""
    words = ["python -m lab.reproduce", f"--claim {claim.id}"]
    for name, value in asdict(request).items():
        if value != getattr(Request, name) and name not in ("claim", "all", "jobs", "out", "results"):
            words.append(
                f"--{name.replace('_', '-')}" + ("" if value is True else f" {Path(str(value)).name}")
            )
    return " ".join(words)


@program
def main(argv: list[str]) -> None:
    request = parse(Request, argv, __doc__)
    if request.table:
        return published(request)
    lab = Lab(request)
    if request.list:
        return print(format_table([{"id": c.id, "name": c.name, "claim": c.says} for c in CLAIMS]))
    chosen = chosen_by(request)
    output_folder(lab.out)
    run(lab, chosen)
    for claim in chosen:
        print(f"\n{evidence.section(evidence.conclude(lab, claim, command(claim, request)))}")
    path = Path(request.results or lab.out / "evidence.md")
    evidence.write_report(lab.out / "claims", path, lab.device)
    print(f"\n{len(chosen)} claims; report in {path}")


if __name__ == "__main__":
    leave(main())
