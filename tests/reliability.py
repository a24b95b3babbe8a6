"""The reliability table: kills, lost ranks, full disks, hostile files, wrong commands. One command:

    python tests/reliability.py --quick         a few of each: some minutes
    python tests/reliability.py                 50 kills of every kind of run, 2,000 inputs a format
    python tests/reliability.py --only fuzz     one part: kills ranks disk fuzz commands determinism

Prints a line when a part ends, then the table; writes it as JSON with --json FILE. The status is 1 if
anything did not end as it should, and what that was is printed. tests/test_reliability.py calls the same.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import fuzz  # noqa: E402
import invocations  # noqa: E402
import kills  # noqa: E402
import torch  # noqa: E402

from report import duration, format_table, write_json  # noqa: E402

PARTS = ("kills", "ranks", "disk", "fuzz", "commands", "determinism")


def row(what: str, tried: int, outcome: str, began: float, failures=()) -> dict:
    return {
        "what": what, "tried": tried, "outcome": outcome, "time": duration(time.monotonic() - began),
        "failures": list(failures),
    }  # fmt: skip


def attempt(what: str, tried: int, work) -> dict:
    """work() -> outcome, or an AssertionError, as a row."""
    began = time.monotonic()
    try:
        return row(what, tried, work(), began)
    except AssertionError as error:
        return row(what, tried, "FAILED", began, [str(error)[-1500:]])


def kill_rows(count: int, methods=("llip", "alignclip"), workers=(0, 2), worlds=(1, 2), seed=0):
    """`count` kills of each kind of run: resumed, it ends with the bits of the run that was never killed."""
    for method, world, w in itertools.product(methods, worlds, workers):
        with tempfile.TemporaryDirectory() as place:
            flags = [*kills.make_data(Path(place) / "data")[method], "--workers", str(w)]

            def work(flags=flags, place=place, world=world):
                found = kills.kill_and_resume(flags, Path(place), count, seed, world)
                ways = ", ".join(f"{n} by {how}" for how, n in found["by"].items() if n)
                return f"{found['runs']} runs equal to the bit ({ways})"

            yield attempt(f"SIGKILL: {method}, {world} process(es), {w} workers", count, work)


# Ranks ---------------------------------------------------------------------------------------------------


def lost_rank(place: Path, victim: int = 1) -> str:
    """One of torchrun's ranks is killed; --max-restarts goes on to the same bits."""
    flags = kills.make_data(place / "data")["llip"]
    kills.reference(flags, place / "whole", 2)
    launcher = kills.torchrun(flags, place / "lost", restarts=3)
    try:
        kills.wait_for(lambda: kills.steps_logged(place / "lost") >= 3, "three steps")
        ranks = kills.ranks_of(launcher)
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[victim], signal.SIGKILL)
        code = launcher.wait(timeout=3 * kills.WAIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert code == 0, Path(f"{place}/lost.log").read_text()[-1500:]
    a, b = (torch.load(place / n / "checkpoint.pt", weights_only=True) for n in ("whole", "lost"))
    assert kills.same(a["state_dict"], b["state_dict"]) and kills.same(
        a["optimizer"], b["optimizer"]
    )
    logs = [(place / n / "metrics.jsonl").read_bytes() for n in ("whole", "lost")]
    assert logs[0] == logs[1], "metrics.jsonl differs"
    return "went on by itself, equal to the bit"


def other_world(place: Path, method: str, first: int = 1, then: int = 2) -> str:
    """A run begun on `first` ranks goes on on `then`: the same batches, the same losses up to rounding."""
    flags = kills.make_data(place / "data")[method]
    kills.reference(flags, place / "whole", first)
    ranks = kills.start(flags, place / "moved", first)
    moved = place / "moved"
    kills.wait_for(lambda: (moved / "checkpoint.pt").exists(), "a checkpoint")
    for process in ranks:
        process.kill()
    kills.ended(ranks)
    assert kills.ended(kills.start(flags, moved, then)) == [0] * then
    a, b = (
        [json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (place / "whole", moved)
    )
    assert [m["step"] for m in a] == [m["step"] for m in b]
    worst = max(abs(x["loss"] - y["loss"]) / abs(x["loss"]) for x, y in zip(a, b) if "loss" in x)
    assert worst < 1e-4, f"losses differ by {worst:.1e}"
    return f"losses within {worst:.0e}"


def rank_rows(victims=(0, 1), methods=("llip", "alignclip")):
    for victim in victims:
        with tempfile.TemporaryDirectory() as place:
            what = f"rank {victim} of torchrun's two killed, --max-restarts 3"
            yield attempt(what, 1, lambda p=Path(place), v=victim: lost_rank(p, v))
    for method, (first, then) in itertools.product(methods, ((1, 2), (2, 1))):
        with tempfile.TemporaryDirectory() as place:
            work = lambda p=Path(place), m=method, f=first, t=then: other_world(p, m, f, t)  # noqa: E731
            yield attempt(f"{method}: begun on {first} rank(s), resumed on {then}", 1, work)


# Disks ---------------------------------------------------------------------------------------------------


def limited(argv: list[str], size: int) -> subprocess.CompletedProcess:
    """train.py where no file can grow beyond size bytes."""

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


def failing_writes(place: Path) -> str:
    """A write that fails in the middle of a save: the last checkpoint is whole, and the run goes on."""
    flags = [
        *kills.make_data(place / "data")["llip"],
        "--out",
        str(place / "run"),
        "--resume",
        "auto",
    ]
    one_error(limited(flags, 300_000), "File too large", "checkpoint.pt", "no checkpoint yet")
    assert kills.ended(kills.start(flags, place / "run")) == [0]
    more = [x if x != "8" else "12" for x in flags]
    kept = (place / "run" / "checkpoint.pt").read_bytes()
    one_error(limited(more, 300_000), "steps 8 -> 12")  # another run is refused before it writes
    assert (place / "run" / "checkpoint.pt").read_bytes() == kept
    for name, size in (("metrics.jsonl", 60), ("tokenizer.json", 10)):
        other = [x.replace("/run", f"/{name}") for x in flags]
        one_error(limited(other, size), "cannot write")
    return "one line each, the last checkpoint whole"


def full_disk(place: Path) -> str:
    """A disk of 12 MB, which two checkpoints and a half fill: the run stops, and later goes on."""
    disk = place / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True).returncode:
        return "not tried: mounting a small disk needs root"
    try:
        flags = kills.make_data(place / "data")["llip"]
        flags = [*flags, "--out", str(disk / "run"), "--resume", "auto"]
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        one_error(
            subprocess.run(command, env=env, capture_output=True, text=True),
            "No space left", "the last checkpoint is whole", "Make room",
        )  # fmt: skip
        assert not list((disk / "run").glob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=False)
    return "stopped with one line, went on when there was room"


def disk_rows(mount=True):
    for what, tried, work in (
        ("a write fails: checkpoint, metrics, tokenizer", 3, failing_writes),
        ("a full disk (tmpfs of 12 MB)", 1, full_disk),
    )[: 2 if mount else 1]:
        with tempfile.TemporaryDirectory() as place:
            yield attempt(what, tried, lambda w=work, p=Path(place): w(p))


# Files, commands, determinism ----------------------------------------------------------------------------


def fuzz_rows(count: int, formats=fuzz.FORMATS):
    for name in formats:
        began, found = time.monotonic(), fuzz.fuzz(name, count)
        outcome = (
            f"{found['read']:,} read, {found['refused']:,} refused, at most {found['peak_mb']} MB"
        )
        yield row(f"mutated: {name}", count, outcome, began, found["failures"])


def command_rows(every: int = 1, apart: int = 10):
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        found = invocations.check(invocations.make_place(Path(place) / "data"), every, apart)
        good = f"{found['tried'] - len(found['failures'])} with status 2 and one line"
        yield row("wrong command lines", found["tried"], good, began, found["failures"])


METHODS = (
    "clip siglip llip finetune labelsmooth clipood alignclip flyp coop cocoop maple tes".split()
)


def determinism_rows(methods=METHODS, workers=(0, 2)):
    """The same seed twice, with other numbers of workers: the same bits on a CPU, whatever the method."""
    for method in methods:
        with tempfile.TemporaryDirectory() as place:
            paired = method in ("clip", "siglip", "llip")
            flags = kills.make_data(Path(place) / "data")["llip" if paired else "alignclip"]
            flags = [method if x in ("llip", "alignclip") else x for x in flags]
            flags += ["--prompt-depth", "1"] if method == "maple" else []

            def work(flags=flags, place=Path(place)):
                for w in workers:
                    kills.reference([*flags, "--workers", str(w)], place / f"w{w}")
                for w in workers[1:]:
                    kills.check_equal(place / f"w{workers[0]}", place / f"w{w}")
                return "equal to the bit"

            names = " and ".join(map(str, workers))
            yield attempt(f"same seed, {names} workers: {method}", len(workers), work)


def long_rows(only, quick: bool):
    parts = {
        "kills": lambda: kill_rows(3 if quick else 50),
        "ranks": lambda: rank_rows((1,) if quick else (0, 1)),
        "disk": disk_rows,
        "fuzz": lambda: fuzz_rows(100 if quick else 2000),
        "commands": command_rows,
        "determinism": lambda: determinism_rows(("llip", "alignclip") if quick else METHODS),
    }
    for name in only:
        yield from parts[name]()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--json", help="write the table here too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began, rows = time.monotonic(), []
    for found in long_rows(args.only, args.quick):
        rows.append(found)
        bad = f"  {len(found['failures'])} FAILED" if found["failures"] else ""
        print(
            f"{found['what']}: {found['outcome']} in {found['time']}{bad}",
            file=sys.stderr,
            flush=True,
        )
        for failure in found["failures"][:10]:
            print(f"    {failure}", file=sys.stderr)
        if args.json:
            write_json(args.json, rows)
    shown = [{k: v for k, v in r.items() if k != "failures"} for r in rows]
    print(format_table(shown))
    failed = sum(bool(r["failures"]) for r in rows)
    print(f"{len(rows) - failed} of {len(rows)} held, in {duration(time.monotonic() - began)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
