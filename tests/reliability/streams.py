"""Streams that end, signals, lost ranks and values without sense: one line each, and nothing is lost."""

import contextlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
import typing
from dataclasses import fields
from pathlib import Path

import torch

import train
from baselines.methods import METHODS
from reliability import kills

ROOT = kills.ROOT
# how the shell starts a program whose output goes nowhere
STREAMS = (
    ">&-",
    "2>&-",
    "<&- >&- 2>&-",
    ">/dev/full",
    ">/dev/full 2>/dev/full",
    "| head -1",
    "2>&1 | head -1",
)
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU")
ODD = {
    int: ("-1", "0", "7", "99999999999999999999", "nan", "1e3"),
    float: ("nan", "inf", "-inf", "-1", "0", "1e-320", "1e9", "1e308"),
    str: ("", "nonsense", "\x1b[31m", "a" * 5000, "/dev/null", "/"),
}
# these are sensible and only take long
LONG = {("steps", "99999999999999999999")}


def step(out: Path) -> int:
    return torch.load(out / "checkpoint.pt", weights_only=True)["step"]


def environment(**more) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1"} | more


def streams(place: Path, some: tuple = STREAMS) -> int:
    """Training with closed, full and broken streams.   Returns: the number of runs."""
    flags = kills.make_data(place / "data")["llip"]
    for n, redirection in enumerate(some):
        out = place / f"stream-{n}"
        program = " ".join(
            [sys.executable, str(ROOT / "train.py"), *flags, "--workers", "1", "--out", str(out)]
        )
        command = ["bash", "-o", "pipefail", "-c", f"{program} {redirection}"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=kills.WAIT)
        said = done.stdout + done.stderr
        assert done.returncode == 0 and "Traceback" not in said, f"{redirection}: {said[-1500:]}"
        assert step(out) == 8 and (out / "results.json").exists(), redirection
    return len(some)


def signals(place: Path, some: tuple = SIGNALS) -> int:
    """A signal for the whole process group, as torchrun and schedulers send it."""
    flags = [x if x != "8" else "100000" for x in kills.make_data(place / "data")["llip"]]
    for name in some:
        out = place / name
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--workers", "2", "--out", str(out)]
        process = subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        until = time.monotonic() + kills.WAIT
        while not (out / "checkpoint.previous.pt").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, getattr(signal, name))
        _, said = process.communicate(timeout=kills.WAIT)
        lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
        assert process.returncode == 130 and len(lines) == 1, f"{name}: {process.returncode} {said[-1500:]}"
        assert f"stopped at step {step(out)}; " in lines[0], lines
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            raise AssertionError(f"{name}: a worker is left")
    return len(some)


def lost(place: Path, seconds: int = 20) -> int:
    """A rank of train.py or evaluate.py is stopped or killed: the other one ends within the timeout."""
    flags = [x if x != "8" else "100000" for x in kills.make_data(place / "data")["llip"]]
    trained = ["train.py", *flags, "--save-every", "100000", "--out", str(place / "run")]
    evaluated = ["evaluate.py", "zeroshot", "--model", str(place / "data" / "start"), "--data", "scenes"]
    evaluated += ["--limit", "60000", "--batch-size", "1", "--device", "cpu"]
    cases = list(itertools.product((trained, evaluated), (signal.SIGSTOP, signal.SIGKILL), (0, 1)))
    for argv, number, victim in cases:
        port, ranks = kills.free_port(), []
        for rank in range(2):
            env = environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
            env |= {"MASTER_PORT": str(port), "ALIGNCLIP_TIMEOUT": str(seconds)}
            command = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
            ranks.append(
                subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
        time.sleep(10)  # both are at work then, on a fast machine too
        began = time.monotonic()
        ranks[victim].send_signal(number)
        other = ranks[1 - victim]
        try:
            said = other.communicate(timeout=seconds + 120)[1].decode()
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        spent = time.monotonic() - began
        lines = [line for line in said.splitlines() if line.startswith("error")]
        what = (
            f"{argv[0]}, rank {victim}, {number.name}: {other.returncode} after {spent:.0f} s: {said[-900:]}"
        )
        assert other.returncode in (1, 2) and len(lines) == 1 and "Traceback" not in said, what
        words = {1: "lost or stopped", 2: "the ranks do not meet"}[other.returncode]
        # an evaluation first finishes its own share
        assert words in lines[0] and spent < seconds + 100, what
    return len(cases)


def odd_commands(place: Path, methods) -> list[list[str]]:
    """Every flag of train.py with every odd value of its type."""
    place, found = place / "data", []
    common = "--threads 1 --train-size 48 --steps 2 --save-every 1 --log-every 1 --warmup 1 --device cpu"
    labels = f"--batch-size 6 --init {place / 'start'} --target-domain sketch --train-data {place / 'bed'}"
    for n, method in enumerate(methods):
        module = METHODS[method].module
        own = f"{common} {'--batch-size 12' if module.TASK == 'pairs' else labels}".split()
        # the flags of every run once
        for cls in (train.CONFIG[module.TASK], module.Settings)[bool(n) :]:
            hints = typing.get_type_hints(cls)
            for name in (field.name for field in fields(cls) if field.name != "out"):
                values = [v for v in ODD.get(hints[name], ()) if (name, v) not in LONG]
                flag = f"--{name.replace('_', '-')}"
                found += [["--method", method, *own, f"{flag}={value}"] for value in values]
    return found


def nonsense(place: Path, methods=("llip", "alignclip", "coop", "tes"), every: int = 1) -> int:
    """Odd values: one line of error, or a run; in forks, with at most 4 GB and a minute each."""
    kills.make_data(place / "data")
    tried = odd_commands(place, methods)[::every]
    for n, argv in enumerate(tried):
        log, out = place / f"odd-{n}.log", place / f"odd-{n}"
        if (pid := os.fork()) == 0:
            file = os.open(log, os.O_CREAT | os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (open(k, "w", buffering=1, closefd=False) for k in (1, 2))
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2)
            signal.alarm(60)
            code = 99
            try:
                code = train.main([*argv, "--out", str(out)])
            except SystemExit as stop:
                code = stop.code
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = log.read_text(errors="replace")
        lines = [line for line in said.splitlines() if line.startswith("error")]
        good = code == 0 or (
            code == 2 and len(lines) == 1 and lines[0].isprintable() and len(lines[0]) < 1100
        )
        assert good and "Traceback" not in said, f"{argv[-1][:80]!r} ({argv[1]}): {code} {said[-900:]}"
    return len(tried)
