"""Every claim of the two papers' rebuttals as an experiment: the paper's number beside ours, and a verdict.

    python reproduce.py --list                       the 32 claims and what each costs
    python reproduce.py --claim l6 --quick           the ladder between SigLIP and Llip, by id or name
    python reproduce.py --all --quick --jobs 2       everything, in two processes of one thread each
    python reproduce.py --claim l2,l16 --data captions.jsonl            on pairs of your own
    python reproduce.py --claim a4,a16 --data PACS --init RUN --target sketch

What is claimed, on what it is tried and what must be seen is in claims.py; training is train.py's. Runs are
kept by configuration and version of the code under --out: claims share them, and the same command goes on.

The rule: sign and ordering, not the paper's absolute number, unless the claim is a number (A1) or a ratio
of costs (A3, L7, L8), which are the paper's. Every part of a claim is a difference between two arms with
the same seed, data, batches and steps (or a figure and a bound). With its mean d over the seeds and its
standard error s, deviation / sqrt(seeds):

    More, Above, Below   d > s holds;  d < -s does not hold;  else not decidable here
    Same within w        |d| + s <= w holds;  |d| - s > w does not hold;  else not decidable here
    Equal                to the printed digits

A claim holds if all its parts do, and does not hold if one does not. Fewer than three seeds decide
nothing. One standard error is a low bar: with three seeds chance alone passes it one time in five in
either direction. So every part has a p as well, one side of Student's t: the chance of a difference (or a
closeness) like this one if there were none. "at 5 %" is the verdict with p under 0.05 for holds, over 0.95
for does not hold; the report says how many parts stay when one error among all of them may happen once in
twenty (Holm). A claim of many parts fails by chance more easily than one of few, and claims that share
arms (all of Llip's) share luck.

Seed n is --seed and --test-seed 3000 + n of train.py: pictures, weights and tests of their own, that nobody
looked at before. What had to be chosen was chosen on seeds from 100 (--validation); LOG.md's use 0, 1, 2.
With --data the pictures are the same for every seed, and the CLIP of --init: the spread is that of order and
new weights alone, on one data set.
"""

import ast
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import pretrained
from lab import claims
from lab.claims import ARMS, BY_NAME, CLAIMS, SETTINGS, Claim
from lab.compare import finished
from model import CONFIGS
from scale import distributed
from util import flags as options
from util import plots
from util.files import output_folder, write_json, write_text
from util.report import format_table
from util.run import git_commit
from util.text import duration

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decidable here"
REPORTED, VALIDATION = 3000, 100  # first seed
MIN_SEEDS, ROUNDS = 3, 5  # seeds below which nothing is decided; rounds of a timing
MEASURING, TIMING = 20.0, 60.0  # seconds of one core, roughly: for the ETA
ROOT = Path(__file__).parent.parent
# files that cannot change a number: what is said, shown and asked for
SHOWING = {"report", "plots", "options", "rundir", "dryrun", "download"}


# fmt: off
@dataclass(frozen=True)
class Request:
    """Flags of this file."""

    # what is tried
    list: bool = False  # the claims, and minutes of one core for each
    claim: str = ""  # ids or names, separated by commas
    all: bool = False  # every claim
    seeds: int = 3  # repetitions: weights, data and tests of their own
    quick: bool = False  # a third of the steps, on smaller sets
    validation: bool = False  # on the seeds that settings were chosen with, not the reported ones
    # on other data: pairs for claims about pre-training, domains with labels for those about fine-tuning
    data: str = ""  # a list of captions, or a folder DOMAIN/CLASS
    init: str = ""  # domains: the CLIP to fine-tune
    target: str = ""  # domains: the one left out
    zeroshot: str = ""  # l1: a folder of classes to ask
    steps: int = 0  # with --data; 0: that of the settings
    batch_size: int = 0  # with --data; 0: that of the settings; domains ask for a multiple of their number
    # running
    device: str = "auto"  # cpu, cuda (larger settings) or auto
    jobs: int = 1  # processes of one thread each
    out: str = "runs/reproduce"  # runs, results and pictures
    results: str = ""  # where to write the report; empty: RESULTS.md under --out
# fmt: on


# Verdicts --------------------------------------------------------------------------------------------------


def mean_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error; None for one value."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def judge(part, table: dict, exact: bool = False) -> dict:
    """One part on a table {row: {figure: values}}.   Returns: part, difference, error, p, verdict."""

    def of(row: str) -> list[float]:
        return table[row][part.figure]

    if isinstance(part, claims.More):
        text = f"{part.figure}: {part.above} above {part.below}"
        gains = [a - b for a, b in zip(of(part.above), of(part.below))]
    elif isinstance(part, claims.Same):
        text = f"{part.figure}: {part.a} and {part.b} within {part.within:g}"
        gains = [a - b for a, b in zip(of(part.a), of(part.b))]
    elif isinstance(part, claims.Equal):
        text = f"{part.figure}: {part.row} is {part.value:g}"
        gains = [v - part.value for v in of(part.row)]
    else:
        above = isinstance(part, claims.Above)
        text = f"{part.figure}: {part.row} {'over' if above else 'under'} {part.bound:g}"
        gains = [(v - part.bound) * (1 if above else -1) for v in of(part.row)]
    mean, error = mean_error(gains)
    found = {"part": text, "figure": part.figure, "difference": mean, "error": error}
    if isinstance(part, claims.Equal):
        within = all(abs(g) <= 0.5 * 10**-part.digits + 1e-12 for g in gains)
        return found | {"p": None, "verdict": HOLDS if within else FAILS}
    if exact:
        return found | {"p": None, "verdict": HOLDS if mean > 0 else FAILS}
    if len(gains) < MIN_SEEDS:
        return found | {"p": None, "verdict": OPEN}
    beyond = part.within - abs(mean) if isinstance(part, claims.Same) else mean
    p = student_tail(beyond / (error or 1e-30), len(gains) - 1)
    verdict = HOLDS if beyond > error else FAILS if beyond < -error else OPEN
    return found | {"p": p, "verdict": verdict}


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t, degrees of freedom a whole number (Abramowitz and Stegun, 26.7.3 and 4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    term, total, odd = 1.0, 0.0, freedom % 2
    for n in range(freedom // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * n + 1 + odd) / (2 * n + 2 + odd)
    if odd:
        inside = (angle + math.sin(angle) * math.cos(angle) * total) * 2 / math.pi
    else:
        inside = math.sin(angle) * total
    return (1 - inside) / 2


def at_level(part: dict, level: float = 0.05) -> str:
    """The verdict on a part if chance may pass it in one of twenty cases, in either direction."""
    if part["p"] is None:
        return part["verdict"]
    return HOLDS if part["p"] < level else FAILS if part["p"] > 1 - level else OPEN


def after_holm(parts: list[dict], level: float = 0.05) -> tuple[int, int]:
    """How many parts hold and fail if a single error among all of them may happen once in twenty (Holm 1979).

    Two hypotheses a part, one for each direction: p and 1 - p.
    """
    both = sorted((p, sign) for part in parts for p, sign in ((part["p"], 0), (1 - part["p"], 1)))
    counts = [0, 0]
    for n, (p, sign) in enumerate(both):
        if p > level / (len(both) - n):
            break
        counts[sign] += 1
    return counts[0], counts[1]


def together(verdicts: list[str]) -> str:
    """All hold: holds; one does not: does not hold; else not decidable here."""
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else OPEN


# Versions of the code --------------------------------------------------------------------------------------


@functools.lru_cache(None)
def bare(source: str) -> str:
    """Python source without comments, docstrings and layout: what runs."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                node.body = body[1:] or [ast.Pass()]
    return ast.dump(tree)


def needed(module: str, root: Path, found: set[str]) -> set[str]:
    """The project's modules that a module builds on, itself included, without those that only show."""
    path = root / f"{module}.py"
    if module in found or module in SHOWING or not path.exists():
        return found
    found.add(module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            needed(name, root, found)
    return found


@functools.lru_cache(None)
def code_version(module: str, root: Path = ROOT) -> str:
    """A hash of the code behind a module; texts about it do not count."""
    h = hashlib.sha256()
    for name in sorted(needed(module, root, set())):
        h.update(f"{name}\0{bare((root / f'{name}.py').read_text(encoding='utf-8'))}".encode())
    return h.hexdigest()


@functools.lru_cache(None)
def measuring_version() -> str:
    """A hash of the functions in claims.py; its list of claims does not count."""
    body = ast.parse(Path(claims.__file__).read_text(encoding="utf-8")).body
    found = [ast.unparse(node) for node in body if isinstance(node, ast.FunctionDef)]
    return digest([bare(source) for source in found if "def draw_" not in source])


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def stamp(path: str) -> list:
    """A file and the time of its last change, so that another one of its name is another; or a name."""
    found = Path(path) / "checkpoint.pt" if (Path(path) / "checkpoint.pt").exists() else Path(path)
    if not path or not found.is_file():
        return [path]
    return [path, found.stat().st_size, found.stat().st_mtime_ns]


# The laboratory: which runs there are, and where ------------------------------------------------------------


class Lab:
    """What a request means: flags of every arm, where its run lies, what was measured of it."""

    def __init__(self, request: Request):
        self.request, self.out = request, Path(request.out)
        self.device = distributed.setup(request.device)
        self.scale = "quick" if request.quick else "default"
        if self.device.type == "cuda" and not request.quick:
            self.scale = "cuda"
        if request.data:
            self.scale = "data"
        first = VALIDATION if request.validation else REPORTED
        self.seeds = list(range(first, first + request.seeds))
        self.image_size = CONFIGS[SETTINGS[self.scale]["pairs"].get("model", "tiny")].image_size

    def flags(self, arm: str, seed: int) -> dict:
        """train.py's flags of an arm, but for where it starts and is written."""
        own = dict(ARMS[arm])
        times = own.pop("times", 1)
        group = "start" if arm == "start" else "labels" if "start" in own else "pairs"
        found = SETTINGS[self.scale][group] | own
        found.pop("start", None)
        request = self.request
        if request.data:
            found |= {"train_data": request.data}
            if group == "labels":
                found |= {"bias": 0.0}
                found |= {"target_domain": request.target} if "target_domain" in found else {}
            elif request.zeroshot:
                found |= {"zeroshot_data": request.zeroshot}
            for name in ("steps", "batch_size"):
                found |= {name: getattr(request, name)} if getattr(request, name) else {}
        found |= {"steps": times * found["steps"]} if times > 1 else {}
        seeds = {"seed": seed} if request.data else {"seed": seed, "test_seed": seed}
        return found | seeds | {"device": request.device, "threads": 1}

    def starts_from(self, arm: str) -> str:
        return ARMS[arm].get("start", "")

    def key(self, arm: str, seed: int) -> str:
        flags = {k: v for k, v in self.flags(arm, seed).items() if k not in ("device", "threads")}
        start = self.starts_from(arm)
        if start:
            start = stamp(self.request.init) if self.request.data else self.key(start, seed)
        if self.request.data:
            flags["train_data"] = stamp(self.request.data)
        return digest(flags, start, code_version("train"), self.device.type)

    def path(self, arm: str, seed: int) -> Path:
        name = arm.replace(" ", "-").replace("=", "")
        return self.out / self.scale / f"{name}-{seed}-{self.key(arm, seed)}"

    def done(self, arm: str, seed: int) -> bool:
        return (self.path(arm, seed) / "results.json").exists()

    def train(self, arm: str, seed: int) -> None:
        """Runs an arm, or goes on with it, or finds it done."""
        path, start = self.path(arm, seed), self.starts_from(arm)
        path.mkdir(parents=True, exist_ok=True)
        flags = self.flags(arm, seed) | {"out": str(path)}
        if start:
            flags["init"] = self.request.init or str(self.path(start, seed))
        began = time.process_time()
        with open(path / "log.txt", "a") as log:
            finished(flags, log)
        write_json(path / "cpu-seconds.json", time.process_time() - began)

    def results(self, arm: str, seed: int) -> dict:
        return json.loads((self.path(arm, seed) / "results.json").read_text())

    def reported(self, arm: str, seed: int) -> dict:
        """Figures of the model that a fine-tuning run reports: the averaged one where there is one."""
        results = self.results(arm, seed)
        return results.get("averaged", results.get("fine-tuned"))

    def figure(self, arm: str, seed: int, where: str, name) -> float:
        """A figure of a run in per cent; of several names the first that it has."""
        found = self.reported(arm, seed) if where == "reported" else self.results(arm, seed)[where]
        names = (name,) if isinstance(name, str) else name
        return 100 * next(found[n] for n in names if n in found)

    def model(self, arm: str, seed: int):
        """A trained model and its tokenizer."""
        path = self.path(arm, seed)
        return pretrained.load(path).to(self.device), pretrained.tokenizer_for(path)

    def measured(self, claim: Claim, seed: int) -> Path:
        """Where a measurement of a seed is kept."""
        runs = [self.key(arm, seed) for arm in claim.arms.values()]
        version = [code_version("probes"), code_version("maps"), measuring_version()]
        if claim.alone:  # a timing is of one machine
            version += [self.device.type, processor()]
        return self.out / self.scale / "measured" / f"{claim.id}-{seed}-{digest(runs, *version)}.json"

    def measure(self, claim: Claim, seed: int) -> None:
        path = self.measured(claim, seed)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        found = claim.measure(self, seed)
        table, extra = found if isinstance(found, tuple) else (found, None)
        write_json(path, {"table": table, "extra": extra})


def cost(lab: Lab, arm: str) -> float:
    """Seconds of one core that a run takes: a rough figure for the order and the ETA, measured on tiny."""
    flags = lab.flags(arm, 0)
    steps, batch = flags.get("steps", 1000), flags.get("batch_size", 96)
    if lab.starts_from(arm):
        slow = {"cocoop": 4.0, "maple": 1.5, "coop": 1.5}.get(flags["method"], 1.0)
        return 3 + 0.03 * slow * steps
    each = 0.0009 if flags["method"] != "llip" else 0.0012 + 0.00004 * flags.get("mixture_tokens", 8)
    wide = 3.0 if flags.get("model", "tiny") != "tiny" else 1.0
    return 5 + each * wide * steps * batch


def cost_of(lab: Lab, claim: Claim) -> float:
    """Seconds of one core of a claim alone, for one seed."""
    arms = set(claim.arms.values())
    arms |= {lab.starts_from(arm) for arm in arms} - {""}
    return sum(cost(lab, arm) for arm in arms) + (
        TIMING if claim.alone else MEASURING if claim.measure else 0.0
    )


# Doing it --------------------------------------------------------------------------------------------------


def limit_threads() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def begin_worker() -> None:
    """One thread; and an end when the parent ends. TRAP: orphans of a killed pool wait for ever."""
    limit_threads()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def work(request: Request, kind: str, name: str, seed: int) -> None:
    """One task of a pool: train an arm, or measure a claim.   Raises: ValueError that says which."""
    lab = Lab(request)
    try:
        if kind == "train":
            lab.train(name, seed)
        else:
            lab.measure(asked(BY_NAME[name], lab), seed)
    except (ValueError, OSError) as error:
        raise ValueError(f"{kind} {name}, seed {seed}: {error}") from error


def asked(claim: Claim, lab: Lab) -> Claim:
    """The claim as it is asked of the data at hand.   Raises: ValueError if it cannot be."""
    if lab.scale != "data":
        return claim
    request = lab.request
    if (changes := claims.on_pairs(claim)) and not request.init:
        if claim.id == "l1" and not request.zeroshot:
            raise ValueError("l1 on pairs needs --zeroshot, a folder of classes to ask")
        return replace(claim, **changes)
    if claims.on_domains(claim) and request.init:
        return claim
    with_init = ", ".join(c.id for c in CLAIMS if claims.on_domains(c))
    pairs = ", ".join(c.id for c in CLAIMS if claims.on_pairs(c))
    raise ValueError(
        f"{claim.id}: --data alone serves {pairs} (a list of captions); with --init and --target {with_init}"
    )


def in_turn(lab: Lab, tasks: list[tuple], costs: list[float], say) -> None:
    """Runs tasks (kind, name, seed), the longest first, in --jobs processes; says how far."""
    if not tasks:
        return
    order = sorted(range(len(tasks)), key=lambda n: -costs[n])
    count, minutes = len(tasks), sum(costs) / 60 / lab.request.jobs
    say(f"{count} to do, the longest first: some {minutes:.0f} minutes", flush=True)
    began, spent, whole = time.time(), 0.0, sum(costs)

    def progress(n: int, done: int) -> None:
        nonlocal spent
        spent += costs[n]
        kind, name, seed = tasks[n]
        left = duration((time.time() - began) * (whole - spent) / spent)
        say(f"{done} of {len(tasks)}  {kind} {name}, seed {seed}  ETA {left}", flush=True)

    if lab.request.jobs == 1:
        for done, n in enumerate(order, 1):
            work(lab.request, *tasks[n])
            progress(n, done)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(lab.request.jobs, context, begin_worker) as pool:
        waiting = {pool.submit(work, lab.request, *tasks[n]): n for n in order}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()
                progress(waiting[future], done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run(lab: Lab, chosen: list[Claim], say=print) -> None:
    """Trains and measures what is not there yet: first what others start from, timings last and alone."""
    chosen = [asked(claim, lab) for claim in chosen]
    arms = {arm for claim in chosen for arm in claim.arms.values()}
    if not lab.request.init:
        arms |= {lab.starts_from(arm) for arm in arms} - {""}
    for later in (False, True):
        some = [a for a in sorted(arms) if bool(lab.starts_from(a)) == later]
        tasks = [("train", a, s) for a in some for s in lab.seeds if not lab.done(a, s)]
        in_turn(lab, tasks, [cost(lab, name) for _, name, _ in tasks], say)
    measures = [c for c in chosen if c.measure and not c.alone]
    tasks = [
        ("measure", c.id, s)
        for c in measures
        for s in (lab.seeds[:1] if c.exact else lab.seeds)
        if not lab.measured(c, s).exists()
    ]
    in_turn(lab, tasks, [MEASURING] * len(tasks), say)
    limit_threads()
    for claim in (c for c in chosen if c.alone):
        for repetition in range(ROUNDS):
            lab.measure(claim, repetition)
            say(f"timing {claim.id}, round {repetition + 1} of {ROUNDS}", flush=True)


def table_of(lab: Lab, claim: Claim) -> tuple[dict, list]:
    """{row: {figure: values}} over seeds (rounds of a timing), and what was measured beside it."""
    table, extras = {}, []
    if claim.measure:
        seeds = range(ROUNDS) if claim.alone else lab.seeds[:1] if claim.exact else lab.seeds
        for seed in seeds:
            found = json.loads(lab.measured(claim, seed).read_text())
            extras.append(found["extra"])
            for row, figures in found["table"].items():
                for name, value in figures.items():
                    table.setdefault(row, {}).setdefault(name, []).append(value)
        return table, extras
    for row, arm in claim.arms.items():
        table[row] = {
            name: [lab.figure(arm, seed, *where) for seed in lab.seeds]
            for name, where in claim.figures.items()
            if has(lab, arm, where)
        }
    return table, extras


def has(lab: Lab, arm: str, where: tuple) -> bool:
    """Whether a run has this figure: real data may come without a validation part."""
    results = lab.results(arm, lab.seeds[0])
    found = lab.reported(arm, lab.seeds[0]) if where[0] == "reported" else results.get(where[0], {})
    return isinstance(where[1], tuple) or where[1] in found


def conclude(lab: Lab, claim: Claim) -> dict:
    """Table, parts and verdict of a claim; a picture; written as JSON."""
    claim = asked(claim, lab)
    table, extras = table_of(lab, claim)
    parts = [judge(part, table, claim.exact) for part in claim.parts]
    seeds = ROUNDS if claim.alone else 1 if claim.exact else len(lab.seeds)
    folder = lab.out / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    data = f"-{Path(lab.request.data).stem}" if lab.request.data else ""  # a file for each of them
    name = f"{claim.id}-{lab.scale}{data}" + ("-validation" if lab.request.validation else "")
    picture = draw(claim, table, extras, folder / f"{name}.png")
    arms = set(claim.arms.values())
    arms |= {lab.starts_from(arm) for arm in arms} - {""} if not lab.request.init else set()
    spent = [lab.path(a, s) / "cpu-seconds.json" for a in arms for s in lab.seeds]
    content = {
        "claim": claim.id,
        "name": claim.name,
        "says": claim.says,
        "source": claim.source,
        "paper": claim.paper,
        "notes": claim.notes,
        "ours": claim.ours,
        "verdict": together([part["verdict"] for part in parts]),
        "parts": parts,
        "table": table,
        "exact": claim.exact,
        "repetitions": seeds,
        "first seed": lab.seeds[0],
        "scale": lab.scale,
        "unit": "rounds" if claim.alone else "seeds",
        "picture": picture and picture.name,
        "minutes": sum(json.loads(p.read_text()) for p in spent if p.exists()) / 60,
        "command": command(lab, claim.id),
        "commit": git_commit(),
        "data": Path(lab.request.data).name,
    }
    write_json(folder / f"{name}.json", content)
    return content


def draw(claim: Claim, table: dict, extras: list, path: Path) -> Path | None:
    """The claim's picture: bars of each figure, a sweep as lines, or its own."""
    if not claim.picture:
        return None
    if callable(claim.picture):
        claim.picture(path, table, extras)
        return path
    shown = {part.figure for part in claim.parts if not isinstance(part, claims.Equal)}
    if claim.picture == "lines":
        panels = {}
        for name in sorted(shown):
            rows = [(float(row), table[row][name]) for row in table if name in table[row]]
            mean = [(x, statistics.fmean(v)) for x, v in rows]
            panels[name] = {"mean": mean} | {
                f"{'round' if claim.alone else 'seed'} {n + 1}": [(x, v[n]) for x, v in rows]
                for n in range(len(rows[0][1]))
            }
        plots.lines(path, panels, xlabel=claim.name)
        return path
    bars = {}
    for figure in dict.fromkeys(f for row in table.values() for f in row if f in shown):
        spread = {row: mean_error(v[figure]) for row, v in table.items() if figure in v}
        low = min(mean for mean, _ in spread.values())
        bars[figure] = {
            f"{row} ({round(mean - low, 9):+.3g})" if len(shown) == 1 else row: (mean, error or 0.0)
            for row, (mean, error) in spread.items()
        }
    plots.bars(path, bars, "mean and standard error" + "; the gain over the smallest" * (len(shown) == 1))
    return path


def command(lab: Lab, claim: str) -> str:
    parts = ["python reproduce.py", f"--claim {claim}"]
    r = lab.request
    parts += ["--quick"] * r.quick + ["--validation"] * r.validation
    parts += [f"--seeds {r.seeds}"] * (r.seeds != 3)
    parts += [f"--data {Path(r.data).name}"] * bool(r.data)
    parts += [f"--steps {r.steps}"] * bool(r.steps) + [f"--target {r.target}"] * bool(r.target)
    parts += [f"--batch-size {r.batch_size}"] * bool(r.batch_size)
    parts += ["--init CLIP"] * bool(r.init) + ["--zeroshot FOLDER"] * bool(r.zeroshot)
    return " ".join(parts)


# Reporting -------------------------------------------------------------------------------------------------


def cell(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.5f}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def shown_table(found: dict) -> str:
    """Mean +- standard error of every figure."""
    rows = []
    for row, figures in found["table"].items():
        cells = {"": row}
        for name, values in figures.items():
            mean, error = mean_error(values)
            number = f"{mean:.6g}" if found["exact"] else cell(mean)
            cells[name] = number + (f" +- {cell(error)}" if error else "")
        rows.append(cells)
    return format_table(rows)


def shown_parts(found: dict) -> str:
    """Each part with its paired difference, p and verdicts."""
    rows = []
    for part in found["parts"]:
        error = "" if part["error"] is None else f" +- {cell(part['error'])}"
        rows.append(
            {
                "part": part["part"],
                "difference": f"{part['difference']:+.4g}{error}",
                "p": "" if part["p"] is None else f"{part['p']:.3f}",
                "verdict": part["verdict"],
                "at 5 %": at_level(part),
            }
        )
    return format_table(rows)


def verdict_line(found: dict) -> str:
    held = sum(part["verdict"] == HOLDS for part in found["parts"])
    sure = together([at_level(part) for part in found["parts"]])
    line = f"{found['verdict']} ({held} of {len(found['parts'])} parts hold); at 5 %: {sure}"
    figures = {part["figure"]: [] for part in found["parts"]}
    for part in found["parts"]:
        figures[part["figure"]].append(part["verdict"])
    if list(figures) == list(claims.LLIP_FIGURES):
        line += "; by " + ", by ".join(f"{name}: {together(v)}" for name, v in figures.items())
    return line


def section(found: dict) -> str:
    """A claim as text: sentence, source, the paper's numbers, ours, verdict."""
    about = f"{found['repetitions']} {found['unit']}"
    if found["unit"] == "seeds" and not found["exact"]:
        about += f" from {found['first seed']}"
    provenance = [f"`{found['command']}`", "exact" if found["exact"] else about]
    if found["minutes"]:
        provenance.append(f"{found['minutes']:.1f} core minutes of runs, shared with other claims")
    provenance.append(f'settings "{found["scale"]}"')
    provenance += [f"data {found['data']}: one set for all seeds"] * bool(found["data"])
    provenance += [f"commit {found['commit'][:7]}"]
    lines = [
        f"{found['claim'].upper()} {found['name']}: {found['says']}",
        f"Source: {found['source']}. Paper: {found['paper']}."
        + (" A question of ours." if found["ours"] else ""),
        f"Verdict: **{verdict_line(found)}**",
        f"{shown_table(found)}\n\n{shown_parts(found)}",
        found["notes"],
        ", ".join(provenance),
    ]
    return "\n\n".join(filter(None, lines))


def processor() -> str:
    """The processor's model and how many cores there are; no names of machines."""
    name = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores of {name or 'an unnamed processor'} (shared), {gpu}"


def write_report(lab: Lab) -> Path:
    """RESULTS.md of all that was concluded under --out: of each claim the largest settings there are."""
    found = {}
    for path in sorted((lab.out / "claims").glob("*.json")):
        one = json.loads(path.read_text())
        if "-validation" in path.stem or one["first seed"] != REPORTED:
            continue
        kind = one["data"] and f"on {one['data']}"
        rank = ["quick", "default", "cuda", "data"].index(one["scale"])
        key = (one["claim"], kind)
        if key not in found or rank > found[key][0]:
            found[key] = (rank, one)
    order = {claim.id: n for n, claim in enumerate(CLAIMS)}
    all_of_them = [one for _, one in found.values()]
    all_of_them.sort(key=lambda one: (bool(one["data"]), order[one["claim"]]))
    rows = [
        {
            "claim": one["claim"].upper(),
            "what": one["says"] + (f" ({one['data']})" if one["data"] else ""),
            "verdict": one["verdict"],
            "at 5 %": together([at_level(part) for part in one["parts"]]),
            "parts": f"{sum(p['verdict'] == HOLDS for p in one['parts'])}/{len(one['parts'])}",
            "settings": one["scale"],
        }
        for one in all_of_them
    ]
    counts, sure = (
        ", ".join(f"{sum(r[column] == v for r in rows)} {v}" for v in (HOLDS, FAILS, OPEN))
        for column in ("verdict", "at 5 %")
    )
    parts = [part for one in all_of_them for part in one["parts"]]
    by_chance = [part for part in parts if part["p"] is not None and part["error"]]
    holm = after_holm(by_chance)
    tally = ", ".join(f"{sum(p['verdict'] == v for p in parts)} {v}" for v in (HOLDS, FAILS, OPEN))
    there = {one["claim"] for one in all_of_them}
    rows += [
        {
            "claim": c.id.upper(),
            "what": c.says,
            "verdict": "not run",
            "at 5 %": "",
            "parts": "",
            "settings": "",
        }
        for c in CLAIMS
        if c.id not in there
    ]
    text = [
        "# The rebuttals' claims, tried",
        "Generated by `python reproduce.py`; do not edit. On drawn scenes and small models: what is seen is"
        " whether a mechanism shows there, and no evidence about photographs or about the papers' numbers.",
        f"{len(all_of_them)} results: {counts}. At 5 %: {sure}. {processor()}; torch {torch.__version__}.",
        f"A claim holds if all its parts do. Of their {len(parts)} parts: {tally}. Of the {len(by_chance)}"
        f" that chance has a hand in, {holm[0]} hold and {holm[1]} do not when tried together (Holm).",
        rule(),
        format_table(rows),
        settings_text({one["scale"] for one in all_of_them}),
        *(f"## {section(one)}" for one in all_of_them),
    ]
    path = Path(lab.request.results or lab.out / "RESULTS.md")
    write_text(path, "\n\n".join(text) + "\n")
    return path


def rule() -> str:
    """The docstring's rule, for the report."""
    paragraphs = __doc__.split("\n\n")
    first = next(n for n, p in enumerate(paragraphs) if p.startswith("The rule"))
    return "\n\n".join(paragraphs[first:]).strip()


def settings_text(scales: set[str]) -> str:
    """SETTINGS and the choices, for the report."""
    lines = ["## Settings", claims.CHOICES]
    for scale in SETTINGS:
        if scale in scales:
            groups = "; ".join(
                f"{g}: " + (", ".join(f"{k} {v}" for k, v in d.items()) or "train.py's")
                for g, d in SETTINGS[scale].items()
            )
            lines.append(f"- {scale}: {groups}")
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


# Command line ----------------------------------------------------------------------------------------------


def chosen_by(request: Request) -> list[Claim]:
    """Raises: ValueError for a claim that is not there, or none asked for."""
    if request.all == bool(request.claim):
        raise ValueError("give --list, --all, or --claim with ids or names: exactly one of them")
    if request.all and request.data:
        raise ValueError("--data serves some claims only: name them with --claim")
    names = [c.id for c in CLAIMS] if request.all else request.claim.lower().split(",")
    for name in names:
        if name.strip() not in BY_NAME:
            raise ValueError(f"claim {name!r}: --list shows the {len(CLAIMS)} there are")
    return [BY_NAME[name.strip()] for name in names]


def listing(lab: Lab) -> str:
    rows = []
    for claim in CLAIMS:
        seconds = cost_of(lab, claim) * (1 if claim.alone or claim.exact else len(lab.seeds))
        rows.append(
            {"id": claim.id, "name": claim.name, "minutes": f"{seconds / 60:.0f}"} | {"claim": claim.says}
        )
    arms = {arm for claim in CLAIMS for arm in claim.arms.values()} | {"start"}
    whole = sum(cost(lab, arm) for arm in arms) * len(lab.seeds) / 60 + 10
    return f"{format_table(rows)}\nminutes of one core, alone; all of them share runs: {whole:.0f}"


def main(argv: list[str] | None = None) -> int:
    args = options.parser(Request, __doc__).parse_args(argv)
    request = Request(**vars(args))
    try:
        for name in ("seeds", "jobs"):
            if getattr(request, name) < 1:
                raise ValueError(f"--{name} {getattr(request, name)}: must be at least 1")
        if request.target and not request.init:
            raise ValueError("--target goes with --init and --data")
        if (request.steps or request.batch_size) and not request.data:
            raise ValueError("--steps, --batch-size: go with --data")
        lab = Lab(request)
        if request.list:
            print(listing(lab))
            return 0
        chosen = chosen_by(request)
        for claim in chosen:
            asked(claim, lab)
        output_folder(lab.out)
        began = time.time()
        run(lab, chosen)
        for claim in chosen:
            print(f"\n{section(conclude(lab, claim))}")
        path = write_report(lab)
        count = "1 claim" if len(chosen) == 1 else f"{len(chosen)} claims"
        print(f"\n{count} in {duration(time.time() - began)}; report in {path}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
