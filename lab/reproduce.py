"""Tests every claim of the two papers' rebuttals: the paper's number beside ours, and a verdict.

    python -m lab.reproduce --list                      the 32 claims
    python -m lab.reproduce --claim l6 --quick          one claim, by id or name
    python -m lab.reproduce --all --quick --jobs 2      all of them, in two processes of one thread each
    python -m lab.reproduce --claim l2,l16 --data captions.jsonl                        on other pairs
    python -m lab.reproduce --claim a4,a16 --data PACS --init RUN --target sketch       on other domains

lab/claims.txt has the claims, lab/measures.py what is measured, lab/report.txt the rule of the verdicts. Runs
are kept by flags and by what the code computes, and claims share them. A command continues where it stopped.
"""

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch

import evaluate
import tasks
import train
from lab import beds, bench, claims, evidence, latent_text, measures  # noqa: F401  (adds the method latent)
from lab.claims import ARMS, BY_NAME, CLAIMS, FEW, FIGURES, RECALL, SETTINGS, Claim
from lab.compare import published, run_training
from model import CONFIGS
from readers import scenes
from scale import distributed
from util.files import output_folder, write_json
from util.flags import parse
from util.program import leave, program
from util.report import Progress, format_table

VALIDATION_SEED, ROOT = 100, Path(__file__).parent.parent


@dataclass(frozen=True)
class Request:
    """Flags of this program."""

    # claims
    list: bool = False  # print the claims
    claim: str = ""  # ids or names, separated by commas
    all: bool = False  # every claim
    table: str = ""  # instead: vlcs, epsilon, pooling or base-to-new, with --init and --data
    seeds: int = 5  # repetitions; at most 3 of claims whose runs take longer than a core-minute
    quick: bool = False  # a few steps: shows that everything works
    validation: bool = False  # seeds on which settings were chosen, instead of the reported ones
    # real data, for claims about pre-training or fine-tuning
    data: str = ""  # a list of captions, or a folder DOMAIN/CLASS
    init: str = ""  # domains: the CLIP to fine-tune; empty: one that is trained on --flickr8k and --emoji
    target: str = ""  # domains: the one left out of training
    flickr8k: str = ""  # a list of real pairs: with --all for l2 and l16, with --target to train the CLIP
    emoji: str = ""  # a list of more pairs to train the CLIP that is fine-tuned
    pacs: str = ""  # with --all: a folder DOMAIN/CLASS for a4, a5 and a9, whose sketches are left out
    steps: int = 0  # with --data; 0: that of the settings
    batch_size: int = 0  # with --data; 0: that of the settings; domains: a multiple of their number
    # running
    device: str = "auto"  # cpu, cuda or auto
    jobs: int = 1  # processes of one thread each
    out: str = "runs/reproduce"  # runs, results and pictures
    results: str = ""  # the report; empty: evidence.md under --out
    pictures: str = ""  # a folder for the pictures of docs/papers.md; empty: none are copied


# arms whose first steps show what the code computes: for arms that pre-train, and for those that fine-tune
PROBES = {
    "pairs": ("clip", "siglip", "llip", "llip infonce", "learned", "llip text tokens"),
    "labels": ("bed", "sls", "alignclip", "detached", "alignclip wild", "coop", "cocoop", "maple", "tes"),
}


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def stamp(path: str) -> list:
    """A name, and the size and time of its file: another file of the same name gives another stamp."""
    file = Path(path) / "checkpoint.pt" if (Path(path) / "checkpoint.pt").exists() else Path(path)
    return [path, file.stat().st_size, file.stat().st_mtime_ns] if path and file.is_file() else [path]


def source(*patterns: str) -> list:
    """Names and texts of files of this project."""
    files = sorted({file for pattern in patterns for file in ROOT.glob(pattern)})
    return [[str(file.relative_to(ROOT)), file.read_text()] for file in files if file.parent.name != "tests"]


@functools.cache
def versions(out: Path) -> dict[str, str]:
    """What the code computes: {kind of arms: a hash of the weights and figures of their first steps}.

    Code that computes the same bits continues the runs of other code, and reads their results.
    """
    path = output_folder(out / "versions") / f"{digest(source('*.py', '[a-z]*/*.py'))}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=out) as folder:
            found = {kind: digest([probe(arm, Path(folder)) for arm in PROBES[kind]]) for kind in PROBES}
        write_json(path, found)
    return json.loads(path.read_text())


def probe(arm: str, folder: Path) -> str:
    """A hash of the weights and figures after three steps of an arm on a few pictures, in its own folder."""
    own, out = dict(ARMS[arm]), folder / arm
    flags = dict(steps=3, warmup=1, batch_size=48, train_size=96, threads=1, device="cpu", out=str(out))
    if own.pop("start", ""):
        flags["init"] = str(folder / "bed")
    if share := own.pop("share", 0):
        flags |= claims.BED | dict(train_data=str(folder / "pictures" / "captions.csv"))
        beds.write_bed(Path(flags["train_data"]), scenes.Objects("train", 96, bias=own["bias"]), share)
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(*train.configure(**flags | own))
    weights = torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"]
    bits = [weights[name].numpy().tobytes() for name in sorted(weights)]
    return digest(hashlib.sha256(b"".join(bits)).hexdigest(), figures_of(out))


def figures_of(run: Path) -> dict[str, float]:
    """The figures of a run that claims read, accuracies in per cent, as far as its data have them."""
    results, found = json.loads((run / "results.json").read_text()), {}
    results["reported"] = results.get("averaged", results.get("fine-tuned"))
    for name, (where, key) in FIGURES.items():
        if key in (part := results.get(where) or {}):
            found[name] = 100 * part[key]
    if (lifts := run / "lifts.json").exists():
        found |= [*json.loads(lifts.read_text()).values()][-1]
    return found


def group_of(arm: str) -> str:
    """The part of SETTINGS that an arm takes."""
    return "labels" if "start" in ARMS[arm] else "bed" if "share" in ARMS[arm] else "pairs"


class Lab:
    """What a request means: the flags of every arm, where its run is, and what was measured of it."""

    def __init__(self, request: Request):
        self.request, self.out, self.claim = request, Path(request.out), BY_NAME.get
        self.device = distributed.setup(request.device)
        self.scale = "data" if request.data else "quick" if request.quick else "default"
        first = VALIDATION_SEED if request.validation else evidence.FIRST_SEED
        self.seeds = list(range(first, first + request.seeds))
        self.image_size = CONFIGS[SETTINGS[self.scale]["pairs"].get("model", "tiny")].image_size

    def flags(self, arm: str, seed: int) -> dict:
        """Flags of train.py for an arm, without --out and the --init of an arm that fine-tunes."""
        request, found = self.request, SETTINGS[self.scale][group_of(arm)] | ARMS[arm]
        found |= {"seed": seed, "device": self.device.type, "threads": 1}
        if request.data:
            given = {name: getattr(request, name) for name in ("steps", "batch_size")}
            given["target_domain"] = request.target if found.get("target_domain") else ""
            found |= {"train_data": request.data} | {k: v for k, v in given.items() if v}
        else:
            found |= {"test_seed": seed}
        if arm == "real":
            found |= {"train_data": str(self.out / "pictures" / "real.jsonl"), "zeroshot_data": request.data}
            found |= {"allow_outside": True, "image_root": "/"}
        if group_of(arm) == "bed":
            found["train_data"] = str(self.out / "pictures" / self.path(arm, seed).name / "captions.csv")
        if "times" in found:
            found["steps"] *= found["times"]
        return {k: v for k, v in found.items() if k not in ("start", "share", "times")}

    def start(self, arm: str) -> str:
        """The arm that another arm fine-tunes."""
        return "real" if self.request.data else ARMS[arm]["start"]

    def key(self, arm: str, seed: int) -> str:
        """A name for a run: what it is trained on, from and with, and the code that trains it."""
        start, request = ARMS[arm].get("start", ""), self.request
        if start:
            start = stamp(request.init) if request.init else self.key(self.start(arm), seed)
        pairs = request.flickr8k + request.emoji  # of the arm "real"
        given = stamp(request.data), request.target, pairs, request.steps, request.batch_size
        group = group_of(arm)
        code = versions(self.out)["pairs" if group == "pairs" else "labels"], self.device.type
        return digest(ARMS[arm], SETTINGS[self.scale][group], seed, start, given, code)

    def path(self, arm: str, seed: int) -> Path:
        name = arm.replace(" ", "-").replace("=", "")
        return self.out / self.scale / f"{name}-{seed}-{self.key(arm, seed)}"

    def train(self, arm: str, seed: int) -> None:
        """Trains an arm, continues its training, or finds it finished."""
        path, own, flags = self.path(arm, seed), ARMS[arm], self.flags(arm, seed)
        path.mkdir(parents=True, exist_ok=True)
        if start := own.get("start", ""):
            flags["init"] = self.request.init or str(self.path(self.start(arm), seed))
        if arm == "real":
            beds.write_pairs(Path(flags["train_data"]), [self.request.flickr8k, self.request.emoji])
        if "share" in own and not Path(flags["train_data"]).exists():
            pictures = scenes.Objects("train", flags["train_size"], seed, bias=flags["bias"])
            beds.write_bed(Path(flags["train_data"]), pictures, own["share"])
        watched = {"labels": beds.Watched} if "share" in ARMS.get(start, {}) and not self.request.data else {}
        with open(path / "log.txt", "a") as log, mock.patch.dict(tasks.TASKS, watched):
            run_training(flags | {"out": str(path)}, log)

    def runs(self, arm: str, seed: int) -> bool:
        """Whether an arm has this seed."""
        return seed in self.seeds[:3] or arm not in FEW

    def figure(self, arm: str, seed: int, name: str) -> float | None:
        """A figure of a run; None if its data have no part for it."""
        return figures_of(self.path(arm, seed)).get(name)

    def model(self, arm: str, seed: int) -> tuple:
        """A trained model and its tokenizer."""
        model, tokenizer = evaluate.open_model(str(self.path(arm, seed)))
        return model.to(self.device), tokenizer

    def kept(self, name: str, depends: list, make):
        """What make() returned for these dependencies and this code: computed once, kept as JSON."""
        code = source("evaluate.py", "evals/*.py", "lab/beds.py", "lab/measures.py", "lab/bench.py")
        key = digest(code, depends)
        path = output_folder(self.out / self.scale / "measured") / f"{name}-{key}.json"
        if not path.exists():
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
        return self.seeds[: {"seeds": None, "few": 3}.get(claim.kind, 1)]

    def table(self, claim: Claim) -> tuple[dict, list]:
        """{row: {figure: values}} over the seeds (or the rounds of a timing), and what is drawn."""
        table, extras = {}, []
        for seed in self.seeds_of(claim):
            if claim.measure:
                rows, extra = self.measure(claim, seed)
                extras.append(extra)
            else:
                arms = {row: arm for row, arm in claim.arms.items() if self.runs(arm, seed)}
                rows = {row: {n: self.figure(a, seed, n) for n in claim.figures} for row, a in arms.items()}
            for row, figures in rows.items():
                for name, value in figures.items():
                    if value is not None:
                        values = table.setdefault(row, {}).setdefault(name, [])
                        values += value if isinstance(value, list) else [value]
        return table, extras


# Work ------------------------------------------------------------------------------------------------------


def begin_worker() -> None:
    """One thread. TRAP: workers of a killed parent would wait for ever, so they end with it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work(request: Request, kind: str, name: str, seed: int) -> None:
    """Trains an arm or measures a claim.   Raises: ValueError that names it."""
    lab = Lab(request)
    try:
        lab.train(name, seed) if kind == "train" else lab.measure(BY_NAME[name], seed)
    except (ValueError, OSError) as error:
        raise ValueError(f"{kind} {name}, seed {seed}: {error}") from error


def work_all(request: Request, todo: list[tuple], label: str) -> None:
    """Does work (kind, name, seed) in --jobs processes."""
    progress = Progress(label, len(todo), "done")
    if request.jobs == 1 or not todo:
        for task in todo:
            work(request, *task)
            progress.add(1)
        return
    with ProcessPoolExecutor(request.jobs, multiprocessing.get_context("spawn"), begin_worker) as pool:
        try:
            for future in as_completed([pool.submit(work, request, *task) for task in todo]):
                future.result()
                progress.add(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run(lab: Lab, chosen: list[Claim]) -> None:
    """Trains and measures what is missing: first what other arms start from, timings last and alone."""
    if lab.request.data and (premises := {c.premise.id: c.premise for c in chosen if c.premise}):
        # on real data a claim whose premise is not met is not tried
        run(lab, list(premises.values()))
        met = {id for id, one in premises.items() if all(evidence.bounds_of(one, lab.table(one)[0]).values())}
        chosen = [claim for claim in chosen if not claim.premise or claim.premise.id in met]
    chosen = list({c.id: c for claim in chosen for c in (claim, claim.premise) if c}.values())
    wanted = {(arm, seed) for c in chosen for arm in c.arms.values() for seed in lab.seeds_of(c)}
    wanted = {one for one in wanted if lab.runs(*one)}
    if not lab.request.init:
        wanted |= {(lab.start(arm), seed) for arm, seed in wanted if "start" in ARMS[arm]}
    wanted = [one for one in sorted(wanted) if not (lab.path(*one) / "results.json").exists()]
    for later, label in ((False, "train"), (True, "fine-tune")):
        some = [("train", *one) for one in wanted if ("start" in ARMS[one[0]]) == later]
        work_all(lab.request, some, label)
    measured = [claim for claim in chosen if claim.measure and claim.kind != "timing"]
    work = [("measure", claim.id, seed) for claim in measured for seed in lab.seeds_of(claim)]
    work_all(lab.request, work, "measure")
    torch.set_num_threads(1)
    for claim in chosen:
        if claim.kind == "timing":
            lab.measure(claim, lab.seeds[0])


def adapted(claim: Claim, request: Request) -> Claim:
    """The claim on the data of a request: domains keep its figures, pairs compare its arms by R@10 both ways.

    Raises: ValueError if it cannot be tested there.
    """
    if not request.data:
        return claim
    flags, domains = [ARMS[arm] for arm in claim.arms.values()], bool(request.target)
    # captions of one's own have one form
    if claim.measure or any("captions" in own or ("start" in own) != domains for own in flags):
        runs = "runs of fine-tuning" if domains else "runs of pre-training"
        raise ValueError(f"{claim.id}: --data with these flags is for claims that only compare {runs}")
    if domains:
        return replace(claim, premise=None if request.init else BY_NAME["named"])
    base = BY_NAME["l2"] if claim.id == "l16" else claim  # a list of captions is little data as a whole
    parts = dict.fromkeys(part._replace(figure=f"{way} R@10") for way in measures.WAYS for part in base.parts)
    arms = base.arms | ({"llip (InfoNCE) with patches": "llip infonce patches"} if base.id == "l2" else {})
    claim = replace(claim, kind="seeds", premise=None)
    return replace(claim, arms=arms, figures=tuple(RECALL), parts=tuple(parts))


def chosen_by(request: Request) -> list[Claim]:
    """The claims of a request.   Raises: ValueError for unknown claims."""
    names = [c.id for c in CLAIMS] if request.all else request.claim.lower().replace(" ", "").split(",")
    if unknown := [name for name in names if BY_NAME.get(name) not in CLAIMS]:
        raise ValueError(f"claim {unknown[0]!r}: --list shows the {len(CLAIMS)} claims")
    return [adapted(BY_NAME[name], request) for name in names]


def command(claim: Claim, request: Request) -> str:
    """The command line for a claim. Paths are names only: the report has no folders of this machine."""
    words = ["python -m lab.reproduce", f"--claim {claim.id}"]
    for name, value in asdict(request).items():
        if value != getattr(Request, name) and name not in "claim all jobs out results pictures".split():
            words += [f"--{name.replace('_', '-')}", *[Path(str(value)).name] * (value is not True)]
    return " ".join(words)


def requests(request: Request) -> list[Request]:
    """With --all one for scenes and each set of real data (domains: three seeds).   Raises: ValueError."""
    r, pairs = request, request.flickr8k or request.emoji
    problems = {
        f"--seeds {r.seeds}, --jobs {r.jobs}: must be at least 1": min(r.seeds, r.jobs) < 1,
        "give --list, --all, or --claim with ids or names: exactly one of them": r.all == bool(r.claim),
        "--data, --init, --target: not with --all": r.all and (r.data or r.init or r.target),
        "--steps, --batch-size: go with --data": (r.steps or r.batch_size) and not r.data,
        "--flickr8k, --emoji, --pacs: go with --all": (pairs or r.pacs) and not (r.all or r.data),
        "--pacs needs --flickr8k or --emoji: pairs for the CLIP that is fine-tuned": r.pacs and not pairs,
        "--target goes with --data, and with --init or pairs to train a CLIP on": not r.all
        and (bool(r.target) != bool(r.init or pairs) or (r.target and not r.data)),
    }
    if wrong := [problem for problem, there in problems.items() if there]:
        raise ValueError(wrong[0])
    if not r.all:
        return [r]
    found = [replace(r, flickr8k="", emoji="", pacs="")]
    if r.flickr8k:
        found.append(replace(found[0], all=False, claim="l2,l16", data=r.flickr8k))
    if r.pacs:
        own = dict(claim="a4,a5,a9", data=r.pacs, target="sketch", pacs="")
        found.append(replace(r, all=False, seeds=min(3, r.seeds), **own))
    return found


@program
def main(argv: list[str]) -> None:
    request = parse(Request, argv, __doc__)
    if request.table:
        return published(request)
    distributed.setup(request.device)  # a device that does not exist is refused
    if request.list:
        return print(format_table([{"id": c.id, "name": c.name, "claim": c.says} for c in CLAIMS]))
    parts = [(part, chosen_by(part)) for part in requests(request)]
    output_folder(request.out)
    for part, chosen in parts:
        lab = Lab(part)
        run(lab, chosen)
        for claim in chosen:
            print(f"\n{evidence.section(evidence.conclude(lab, claim, command(claim, part)))}")
    path = Path(request.results or lab.out / "evidence.md")
    evidence.write_report(lab.out / "claims", path, lab.device)
    if request.pictures:
        evidence.copy_pictures(lab.out / "claims", Lab(request).scale, Path(request.pictures))
    print(f"\nreport in {path}")


if __name__ == "__main__":
    leave(main())
