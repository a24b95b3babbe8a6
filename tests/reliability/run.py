"""The reliability table: kills, lost ranks, full disks, hostile files, wrong commands. One command:

    python tests/reliability/run.py                 50 kills per kind of run, 2,000 to 10,000 mutants
    python tests/reliability/run.py --quick         a few of each; takes some minutes
    python tests/reliability/run.py --only fuzz     only some parts: PARTS
    python tests/reliability/run.py --list          all jobs, with the minutes that each takes on one core

Jobs run side by side, one per core (--jobs). Each prints a line with the time left when it ends; the table
follows, and --json FILE writes it to a file. The status is 1 if anything failed; the failures are printed.
Ctrl-C ends every process that was started. tests/test_reliability.py runs a small part of the jobs.
"""

import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402

from baselines.methods import METHODS  # noqa: E402
from reliability import fuzz, invocations, kills, outputs, pictures, streams  # noqa: E402
from util.files import PART, write_json  # noqa: E402
from util.flags import parse  # noqa: E402
from util.program import leave, program  # noqa: E402
from util.report import format_table  # noqa: E402
from util.text import duration  # noqa: E402


@dataclass
class Job:
    """One row of the table. work(folder) returns the outcome, or (number of trials, outcome)."""

    what: str
    tried: int
    seconds: float  # of one core, roughly; for the order and the ETA
    work: Callable = field(repr=False)


def attempt(job: Job) -> dict:
    """Does a job and returns its row. The message of an AssertionError is the failure."""
    began, failures, tried = time.monotonic(), [], job.tried
    with tempfile.TemporaryDirectory() as place:
        try:
            outcome = job.work(Path(place))
            tried, outcome = outcome if isinstance(outcome, tuple) else (tried, outcome)
        except AssertionError as error:
            outcome, failures = "FAILED", str(error)[-3000:].splitlines()
    spent = time.monotonic() - began
    return {"what": job.what, "tried": tried, "outcome": outcome, "seconds": spent, "failures": failures}


def no_failures(found: dict) -> dict:
    assert not found["failures"], "\n".join(found["failures"][:20])
    return found


def kill_jobs(count: int, methods=("llip", "alignclip"), workers=(0, 2), worlds=(1, 2), seed=0):
    """`count` kills of each kind of run. The resumed run must equal the run without kills to the bit."""
    for method, world, w in itertools.product(methods, worlds, workers):

        def work(place, method=method, world=world, w=w):
            flags = [*kills.make_data(place / "data")[method], "--workers", str(w)]
            found = kills.kill_and_resume(flags, place, count, seed, world)
            ways = ", ".join(f"{n} by {how}" for how, n in found["by"].items() if n)
            return found["kills"], f"runs equal to the bit: {found['runs']} ({ways})"

        ranks = "one process" if world == 1 else f"{world} ranks"
        what = f"SIGKILL, then --resume auto: {method}, {ranks}, {w} workers"
        yield Job(what, count, count * (0.9 + 1.6 * (world - 1)) * (1 + w / 4), work)


# Ranks

# how a rank is lost: arguments of build_in; the operations are those of the second save on checkpoint files
# TRAP: the worst moments are inside a save, when its file is incomplete or the previous one is renamed
LOST = {
    "at a step": {"batch": 5},
    "before a save": {"operation": 4, "name": "checkpoint"},
    "in the middle of writing a checkpoint": {"operation": 4, "name": "checkpoint", "size": 100_000},
    "before the last checkpoint moves": {"operation": 5, "name": "checkpoint"},
    "between the two renames of a save": {"operation": 6, "name": "checkpoint"},
}


def lost_rank(place: Path, victim: int, how: str, method: str = "llip") -> str:
    """A rank of torchrun is killed. With --max-restarts the run must go on and end with the same bits."""
    flags = kills.make_data(place / "data")[method]
    kills.reference(flags, place / "whole", 2)
    code = kills.torchrun(flags, place / "lost", 2, restarts=3, victim=victim, **LOST[how])
    log = Path(f"{place}/lost.log").read_text()
    assert code == 0, log[-1500:]
    assert Path(f"{place}/lost.ended").exists(), f"rank {victim} was not killed: {log[-1500:]}"
    assert "resuming" in log, f"nothing was resumed: {log[-1500:]}"
    a, b = (torch.load(place / n / "checkpoint.pt", weights_only=True) for n in ("whole", "lost"))
    for key in ("state_dict", "optimizer", "step"):
        assert kills.same(a[key], b[key]), f"{key} differs"
    for name in ("metrics.jsonl", "results.json"):
        both = [(place / n / name).read_bytes() for n in ("whole", "lost")]
        assert both[0] == both[1], f"{name} differs"
    return "went on by itself, equal to the bit"


def other_world(place: Path, method: str, first: int = 1, then: int = 2) -> str:
    """Starts a run on `first` ranks and resumes it on `then`: same batches and, up to rounding, losses."""
    flags = kills.make_data(place / "data")[method]
    kills.reference(flags, place / "whole", first)
    moved = place / "moved"
    codes = kills.ended(kills.start(flags, moved, first, operation=6, name="checkpoint"))
    assert -signal.SIGKILL in codes, codes
    assert kills.ended(kills.start(flags, moved, then)) == [0] * then
    a, b = (
        [json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (place / "whole", moved)
    )
    assert [m["step"] for m in a] == [m["step"] for m in b]
    worst = max(abs(x["loss"] - y["loss"]) / abs(x["loss"]) for x, y in zip(a, b) if "loss" in x)
    assert worst < 1e-4, f"losses differ by {worst:.1e}"
    return f"losses within {worst:.0e}"


def rank_jobs(cases=None, methods=("llip", "alignclip")):
    """Args: cases: (victim, how, method); all if None"""
    every = [(r, how, "llip") for r in (0, 1) for how in LOST if r == 0 or how == "at a step"]
    for victim, how, method in cases or [*every, (0, "at a step", "alignclip")]:
        what = f"torchrun --max-restarts 3, {method}: rank {victim} killed {how}"
        yield Job(what, 1, 35, lambda p, v=victim, h=how, m=method: lost_rank(p, v, h, m))
    for method, (first, then) in itertools.product(methods, ((1, 2), (2, 1))):
        what = f"{method}: begun on {first} rank(s), resumed on {then}"
        yield Job(what, 1, 12, lambda p, m=method, f=first, t=then: other_world(p, m, f, t))


# Disks

# file of a run: the number of the operation on it that fails
FULL = {
    "checkpoint.pt.": 2,
    "metrics.jsonl": 6,
    "config.json": 1,
    "tokenizer.json": 1,
    "results.json": 1,
    "curves.png": 1,
    "results.png": 1,
}


def no_room(place: Path, names=tuple(FULL), method="llip") -> str:
    """The disk is full when a file is written: one line names it, nothing is lost, and the run can go on."""
    flags = kills.make_data(place / "data")[method]
    kills.reference(flags, place / "whole")
    for name in names:
        out = place / name.replace(".", "-")
        end = {"operation": FULL[name], "name": name, "full": True}
        codes = kills.ended(kills.start(flags, out, 1, **end))
        said = Path(f"{out}.log").read_text()
        errors = [line for line in said.splitlines() if line.startswith("error")]
        assert codes == [2] and len(errors) == 1 and "Traceback" not in said, said[-1500:]
        file = name.rstrip(".")
        kept = "the last checkpoint is whole" if (out / "checkpoint.pt").exists() else "no checkpoint"
        for words in (str(out / file), "No space left", kept, "Make room, then --resume auto"):
            assert words in errors[0], f"{words!r} is not in {errors[0]!r}"
        assert kills.ended(kills.start(flags, out)) == [0], Path(f"{out}.log").read_text()[-1500:]
        kills.check_equal(place / "whole", out)
        there = [{p.name for p in (place / d).iterdir()} for d in ("whole", out.name)]
        assert there[0] == there[1], there
    return "one line that names it; the last checkpoint is whole; finished later with the same bits"


def limited(argv: list[str], size: int) -> subprocess.CompletedProcess:
    """Runs train.py where no file can grow beyond `size` bytes."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, str(ROOT / "train.py"), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=limit)


def one_error(done, *words: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in errors[0], f"{word!r} is not in {errors[0]!r}"


def cut_write(place: Path) -> str:
    """The kernel allows no file beyond half a checkpoint: one line; with more room the run goes on."""
    flags = kills.make_data(place / "data")["llip"]
    flags = [*flags, "--out", str(place / "run"), "--resume", "auto"]
    one_error(limited(flags, 300_000), "File too large", "checkpoint.pt", "no checkpoint yet")
    assert kills.ended(kills.start(flags, place / "run")) == [0]
    more = [x if x != "8" else "12" for x in flags]
    kept = (place / "run" / "checkpoint.pt").read_bytes()
    one_error(limited(more, 300_000), "steps 8 -> 12")  # refused before anything is written
    assert (place / "run" / "checkpoint.pt").read_bytes() == kept
    return "one line, then went on"


def full_disk(place: Path) -> str | tuple:
    """A disk of 12 MB has room for two and a half checkpoints: the run stops, and goes on later."""
    disk = place / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    try:
        refused = subprocess.run(mounted, capture_output=True).returncode
    except OSError:
        refused = True
    if refused:
        return 0, "not tried: mounting a small disk needs root on Linux"
    try:
        flags = kills.make_data(place / "data")["llip"]
        flags = [*flags, "--out", str(disk / "run"), "--resume", "auto"]
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        one_error(
            subprocess.run(command, env=env, capture_output=True, text=True),
            "No space left",
            "the last checkpoint is whole",
            "Make room",
        )
        assert not list((disk / "run").glob(f"*{PART}"))
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False, capture_output=True)
    return "stopped with one line, went on when there was room"


def output_job(what: str, tried: int, seconds: float, check: Callable, outcome: str, leave_out=()):
    def work(place):
        before = os.getcwd()
        os.chdir(place)  # some commands write below runs/
        try:
            found = no_failures(check(place, outputs.make_place(place), leave_out))
        finally:
            os.chdir(before)
        return found["tried"], outcome

    return Job(what, tried, seconds, work)


def disk_jobs():
    names = ", ".join(name.rstrip(".") for name in FULL)
    yield Job(f"no room for {names}", len(FULL), 25, no_room)
    names = ("checkpoint.pt.", "results.json")
    yield Job(
        "no room for checkpoint, results.json: alignclip", 2, 12, lambda p: no_room(p, names, "alignclip")
    )
    yield Job("no file can grow beyond half a checkpoint", 2, 20, cut_write)
    yield Job("a full disk (tmpfs of 12 MB)", 1, 25, full_disk)
    yield output_job(
        "read-only folders, folders below a file: every command that writes",
        68,
        15,
        outputs.unwritable,
        "status 2, one line, before the work begins",
    )
    yield output_job(
        "a table or a picture that cannot be written at the end",
        13,
        15,
        outputs.in_the_way,
        "one line; figures printed, results kept; finished later",
    )


def stop_jobs():
    yield output_job(
        "Ctrl-C in a command other than train.py", 14, 5, outputs.interrupted, "status 130, one line"
    )
    yield tested(
        "SIGTERM and Ctrl-C while training: saves, says how to resume",
        6,
        "test_train.py",
        "sigterm or signal",
    )


def stream_jobs(quick: bool):
    """Streams, signals, ranks that are lost or never meet, clocks, and odd values."""
    good = "goes on, saved to the end"
    some = streams.STREAMS[::3] if quick else streams.STREAMS
    yield Job("closed, full and broken streams", len(some), 40, lambda p: (streams.streams(p, some), good))
    stops = streams.SIGNALS[2:] if quick else streams.SIGNALS
    outcome = "saves, one line, no worker left"
    what = "a signal for a run and its loader workers"
    yield Job(what, len(stops), 30, lambda p: (streams.signals(p, stops), outcome))
    yield tested("ranks that do not meet", 15, "test_distributed.py", "meet or stopped", "one line on each")
    if not quick:
        what = "train.py and evaluate.py: a rank stopped or killed"
        yield Job(what, 8, 160, lambda p: (streams.lost(p), "one line of the other within the timeout"))
    every, what = (40 if quick else 1), "odd values for every flag of train.py"
    yield Job(
        what, 300 // every, 300 / every, lambda p: (streams.nonsense(p, every=every), "one line, or a run")
    )
    words = "clock or damaged_checkpoint or lacks or finished or another_place or warm"
    yield tested("clocks, damaged results and checkpoints, data that moved", 15, "test_train.py", words)
    yield tested("errors of torch, memory, files; no float64 on a device", 8, "test_program.py")


def tested(what: str, seconds: float, file: str, words: str = "", outcome="as it should") -> Job:
    """A row for tests of the suite: the number of tests, none of which may fail."""
    assert (ROOT / "tests" / file).is_file(), file

    def work(place):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / file)]
        command += ["-k", words] * bool(words) + [f"--junitxml={place}/found.xml"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-300:]
        suite = next(xml.etree.ElementTree.parse(place / "found.xml").iter("testsuite"))
        return int(suite.get("tests")) - int(suite.get("skipped")), outcome

    return Job(what, 0, seconds, work)


def file_jobs():
    yield tested(
        "every operation on a run's files: SIGKILL, no space; every 31st bit flipped; damage",
        15,
        "test_run.py",
        outcome="resumed, or refused and the previous one used",
    )
    yield tested(
        "hostile pickles, each as torch.save file, TorchScript and legacy file",
        6,
        "test_archive.py",
        "do_nothing",
        "nothing runs, one line",
    )
    yield tested(
        "zip bombs, shapes, offsets, headers, NaN, dtypes, paths in checkpoints",
        8,
        "test_archive.py",
        "not do_nothing and not armed",
        "one line, bounded memory",
    )
    yield tested(
        "decompression bombs, links and paths that lead outside, control characters",
        4,
        "test_data.py",
        "bomb or link or outside or control or oversized or damaged",
        "refused and named",
    )
    yield tested("downloads from a hostile server", 3, "test_download.py", outcome="fail cleanly")
    yield tested(
        "numbers at the edge: not finite, bf16, scale, empty and equal captions",
        20,
        "test_numbers.py",
        outcome="defined",
    )


# Mutants, commands, determinism


# formats of which the long form reads more
MORE = {
    *"JPEG PNG WebP GIF BMP PPM TIFF AVIF ICO MPO".split(),
    "JPEG 2000",
    "TGA, PCX, SGI",
    "random pickles",
}


def fuzz_jobs(count: int, formats=fuzz.FORMATS):
    for name in formats:
        number = 5 * count if name in MORE and count > 1000 else count

        def work(place, name=name, number=number):
            found = no_failures(fuzz.fuzz(name, number))
            done = f"{found['read']:,} read, {found['refused']:,} refused, at most {found['peak_mb']} MB"
            return found["tried"], done

        yield Job(f"mutated: {name}", number, 1 + number * 0.003, work)


def picture_jobs(quick: bool):
    def work(place):
        found = no_failures(pictures.check(list(pictures.FILES)[:: 5 if quick else 1]))
        most = f"at most {found['seconds']:.1f} s and {found['megabytes']:.0f} MB"
        return found["tried"], f"refused, or read; {most}"

    yield Job("hostile images of 10 MB: time and memory", len(pictures.FILES), 90, work)


def command_jobs(every: int = 1, apart: int = 10):
    def work(place):
        place = invocations.make_place(place / "data")
        found = no_failures(invocations.check(place, every, apart))
        return found["tried"], "status 2, one line"

    yield Job("wrong command lines", len(invocations.WRONG.split("\n")), 50, work)


def determinism_jobs(methods=METHODS, workers=(0, 2)):
    """The same seed with other numbers of workers gives the same bits on a CPU, for every method."""
    for method in methods:

        def work(place, method=method):
            paired = METHODS[method].module.TASK == "pairs"
            flags = kills.make_data(place / "data")["llip" if paired else "alignclip"]
            flags = [method if x in ("llip", "alignclip") else x for x in flags]
            flags += ["--prompt-depth", "1"] if method == "maple" else []
            for w in workers:
                kills.reference([*flags, "--workers", str(w)], place / f"w{w}")
            for w in workers[1:]:
                kills.check_equal(place / f"w{workers[0]}", place / f"w{w}")
            return "equal to the bit"

        names = " and ".join(map(str, workers))
        yield Job(f"same seed, {names} workers: {method}", len(workers), 8, work)


QUICK_RANKS = [(0, "between the two renames of a save", "llip"), (1, "at a step", "llip")]
# name: function of `quick` that gives the jobs
PARTS = {
    "kills": lambda quick: kill_jobs(3 if quick else 50),
    "ranks": lambda quick: rank_jobs(QUICK_RANKS if quick else None),
    "disk": lambda quick: disk_jobs(),
    "stops": lambda quick: stop_jobs(),
    "streams": stream_jobs,
    "files": lambda quick: file_jobs(),
    "pictures": picture_jobs,
    "fuzz": lambda quick: fuzz_jobs(100 if quick else 2000),
    "commands": lambda quick: command_jobs(),
    "determinism": lambda quick: determinism_jobs(("llip", "alignclip") if quick else METHODS),
}


# Side by side


def in_a_process(job: Job, answer) -> None:
    """Does a job in a new process group, so that only the first process receives Ctrl-C of the terminal."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        found = attempt(job)
    except Exception as error:
        # a fault of these tests fails one row and not all of them
        failure = f"{type(error).__name__}: {error}"
        found = {"what": job.what, "tried": 0, "outcome": "FAILED", "seconds": 0, "failures": [failure]}
    answer.send(found)


def side_by_side(jobs: list[Job], count: int, tell: Callable) -> list[dict]:
    """Does all jobs, the longest first, and returns their rows. Calls tell(rows so far, running, waiting)."""
    context = multiprocessing.get_context("fork")
    waiting = sorted(range(len(jobs)), key=lambda n: -jobs[n].seconds)
    running, rows = {}, {}
    while waiting or running:
        while waiting and len(running) < count:
            n = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=in_a_process, args=(jobs[n], theirs))
            process.start()
            theirs.close()
            running[ours] = (n, process, time.monotonic())
        ready = multiprocessing.connection.wait(list(running), 1)
        for ours in ready:
            n, process, began = running.pop(ours)
            try:
                rows[n] = ours.recv()
            except EOFError:
                spent, failure = time.monotonic() - began, "its process ended without an answer"
                rows[n] = {
                    "what": jobs[n].what,
                    "tried": 0,
                    "outcome": "FAILED",
                    "seconds": spent,
                    "failures": [failure],
                }
            process.join()
        tell(rows, {n: time.monotonic() - since for n, _, since in running.values()}, waiting)
    return [rows[n] for n in range(len(jobs))]


class Teller:
    """Prints a line for each finished row, with the time left."""

    def __init__(self, jobs: list[Job], count: int):
        self.jobs, self.count, self.told, self.shown = jobs, count, set(), time.monotonic()
        self.tty, self.began = sys.stderr.isatty(), time.monotonic()

    def __call__(self, rows: dict, running: dict, waiting: list) -> None:
        new = [n for n in rows if n not in self.told]
        spent = time.monotonic() - self.began
        done = sum(self.jobs[n].seconds for n in rows)
        done += sum(min(s, 0.9 * self.jobs[n].seconds) for n, s in running.items())
        left = sum(job.seconds for job in self.jobs) - done
        # at the start the estimates count, later the measured times
        rate = (done + 60 * self.count) / (spent + 60)
        eta = f"{len(rows)} of {len(self.jobs)}  ETA {duration(max(left, 0) / rate)}"
        clear = "\r\x1b[K" if self.tty else ""
        for n in new:
            self.told.add(n)
            bad = f"  {len(rows[n]['failures'])} FAILED" if rows[n]["failures"] else ""
            text = f"{rows[n]['what']}: {rows[n]['outcome']} in {duration(rows[n]['seconds'])}{bad}"
            print(f"{clear}{text}  ({eta})", file=sys.stderr, flush=True)
            for failure in rows[n]["failures"][:20]:
                print(f"    {failure}", file=sys.stderr, flush=True)
        names = "; ".join(self.jobs[n].what for n in running)
        if running and (self.tty or time.monotonic() - self.shown > 60):
            self.shown = time.monotonic()
            line = f"{eta}  now: {names}"
            print(
                clear + (line[:150] if self.tty else line),
                end="" if self.tty else "\n",
                file=sys.stderr,
                flush=True,
            )
        elif self.tty and not running:
            print(clear, end="", file=sys.stderr, flush=True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Flags:
    quick: bool = False  # a few of each
    only: tuple[str, ...] = ()  # only these parts
    jobs: int = min(cores(), 8)  # at a time, one per core
    list: bool = False  # print the jobs and do nothing
    json: str = ""  # file for the table


@program
def main(argv: list[str]) -> int:
    c = parse(Flags, argv, __doc__.replace("PARTS", " ".join(PARTS)))
    if c.jobs < 1 or not set(c.only) <= set(PARTS):
        raise ValueError(f"--jobs must be at least 1, and --only takes {', '.join(PARTS)}")
    jobs = [job for name in c.only or PARTS for job in PARTS[name](c.quick)]
    if c.list:
        print(format_table([{"what": j.what, "minutes": j.seconds / 60} for j in jobs], digits=1))
        print(f"{len(jobs)} jobs, {duration(sum(j.seconds for j in jobs) / c.jobs)} on {c.jobs} cores")
        return 0
    return run_all(jobs, c.jobs, c.json)


def run_all(jobs: list[Job], count: int, path: str) -> int:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    kills.adopt()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began, teller = time.monotonic(), Teller(jobs, count)

    def tell(rows, running, waiting):
        fresh = len(rows) != len(teller.told)
        teller(rows, running, waiting)
        if path and fresh:
            write_json(path, [rows[n] for n in sorted(rows)])

    # a short name: sockets are made in this folder, and their paths may have 107 characters at most
    with tempfile.TemporaryDirectory(prefix="rel-", ignore_cleanup_errors=True) as place:
        tempfile.tempdir = place  # removed with everything in it, whatever happens
        try:
            rows = side_by_side(jobs, count, tell)
        finally:
            tempfile.tempdir = None
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave processes
            kills.end_all(os.getpid())
            signal.signal(signal.SIGINT, signal.default_int_handler)
    shown = [
        {k: v for k, v in r.items() if k not in ("failures", "seconds")} | {"time": duration(r["seconds"])}
        for r in rows
    ]
    print(format_table(shown))
    failed = sum(bool(r["failures"]) for r in rows)
    print(f"{len(rows) - failed} of {len(rows)} held, in {duration(time.monotonic() - began)}")
    return 1 if failed else 0


if __name__ == "__main__":
    leave(main())
