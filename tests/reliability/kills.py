"""Kills: a run that is killed anywhere, any number of times, must end like the run that was never killed.

A run is train.main in a new process. A server that has already imported torch forks it, so that a start takes
a fraction of a second. Several ranks are several such processes, or those of the real torchrun. A run is
ended by SIGKILL after a random time, by SIGKILL before a random file operation (an audit hook sees all of
them), or by the kernel's SIGXFSZ in the middle of a write (a limit on the size of files). None of the three
can be caught, and the tested programs contain no code for these tests.
"""

import contextlib
import ctypes
import errno
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import data  # noqa: E402
import pretrained  # noqa: E402
import train  # noqa: E402
from model import CLIP, Config  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

# SPEED: the first optimizer of a process makes torch import its compiler; the server does this once
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

COMMON = "--device cpu --threads 1 --batch-size 6 --steps 8 --save-every 2 --log-every 1 --warmup 2"
COMMON += " --eval-every 4"
KINDS, DOMAINS = ("cat", "dog", "elk"), ("art", "photo", "sketch")
# seconds until a run counts as hanging: gloo waits longer, and a busy machine needs less
WAIT = 240


def make_data(root: Path) -> dict[str, list[str]]:
    """Makes tiny data and a small CLIP.   Returns: flags of a run of llip and of one of alignclip."""
    root.mkdir(parents=True, exist_ok=True)
    rows = ["filepath,title,split"]
    for d, domain in enumerate(DOMAINS):
        for c, kind in enumerate(KINDS):
            (root / "bed" / domain / kind).mkdir(parents=True)
            for k in range(4):
                noise = np.random.default_rng((c, d, k)).integers(0, 99, (20, 20, 3))
                name = f"bed/{domain}/{kind}/{k}.png"
                Image.fromarray(np.uint8(noise + (70 * c, 60 * d, 30 * k))).save(root / name)
                rows.append(f"{name},a {domain} of a {kind} {k},{'test' if k == 3 else 'train'}")
    (root / "pairs.csv").write_text("\n".join(rows) + "\n")
    start = root / "start"
    start.mkdir()
    tokenizer = Tokenizer.learn(rows, 600)
    tokenizer.save(start / "tokenizer.json")
    torch.manual_seed(0)
    clip = CLIP(Config(16, 16, 8, 32, 2, 2, 64, 16, tokenizer.vocab_size, 32, 1, 2, 64))
    pretrained.save(clip, start / "checkpoint.pt")
    pairs = ["--train-data", str(root / "pairs.csv"), "--image-size", "16", "--crop-scale", "0.5"]
    tuned = ["--train-data", str(root / "bed"), "--init", str(start), "--target-domain", "sketch"]
    return {
        "llip": ["--method", "llip", *pairs, *COMMON.split()],
        "alignclip": ["--method", "alignclip", *tuned, *COMMON.split()],
    }


# One process of a run


def rank_of_a_run(argv: list[str], out: str, env: dict, end: dict) -> None:
    """Runs train.main(argv) in this process, which build_in ends."""
    os.environ.update(env)
    # loader workers start as in an ordinary run
    multiprocessing.set_start_method("fork", force=True)
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    build_in(out, **end)
    with open(f"{out}.ids", "a") as seen:
        note_samples(seen)
        try:
            code = train.main(argv)
        except BaseException:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    os._exit(code)


def build_in(out: str, operation=0, name="", size=0, batch=0, evaluation=0.0, full=False) -> None:
    """Ends this process by SIGKILL, or in another way, at one of these moments; without any, nothing happens.

    Args: operation, name: before the n-th time that a file in `out` whose name begins with `name` is opened
          for writing, renamed or removed;  batch: before the n-th batch;  evaluation: so many seconds after
          the first evaluation begins;  size: instead of SIGKILL, no file can grow beyond this many bytes, and
          the kernel ends a process that tries;  full: instead, the operation fails as on a full disk
    """
    left = [operation]

    def end():
        Path(f"{out}.ended").touch()
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        if size:
            # Python would turn the signal into an OSError
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(f"{out}/{name}"):
            if event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR):
                left[0] -= 1
                if left[0] == 0:
                    end()

    if operation:
        sys.addaudithook(hook)
    elif size:
        end()
    if batch:
        following, count = data.Batches.__next__, itertools.count(1)
        data.Batches.__next__ = lambda self: end() if next(count) == batch else following(self)
    if evaluation:
        evaluating = train.evaluate.evaluating

        def begin(model):
            # a CLIP to start from is evaluated before, in eval mode
            if model.training:
                threading.Timer(evaluation, end).start()
            return evaluating(model)

        train.evaluate.evaluating = begin


def note_samples(seen) -> None:
    """Writes a line for every training batch: rank and step, then the samples."""
    make, following, rank = (data.Batches.__init__, data.Batches.__next__, os.environ.get("RANK", "0"))

    def begin(self, source, steps, workers=0):
        # training counts without end from its first step, repr "count(3)"; evaluation has a range
        # TRAP: before make, because workers take steps ahead
        self.number = int(repr(steps)[6:-1]) if isinstance(steps, itertools.count) else None
        make(self, source, steps, workers)

    def note(self):
        batch = following(self)
        if self.number is not None:
            seen.write(f"{rank}/{self.number} {batch.ids.tolist()}\n")
            seen.flush()
            self.number += 1
        return batch

    data.Batches.__init__, data.Batches.__next__ = begin, note


def server():
    """A server that has imported everything and forks processes. PYTHONPATH leads it to this file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reliability.kills"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ["OMP_NUM_THREADS"] = "1"
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def no_main():
    """SPEED: without this, every process of the server would first import the main program."""
    real, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real


def start(argv, out, world=1, **end) -> list:
    """Starts the processes of one run.   Args: end: arguments of build_in"""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(world):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} | address
        argv = [*argv] if "--out" in argv else [*argv, "--out", str(out), "--resume", "auto"]
        args = (argv, str(out), env if world > 1 else {}, end)
        ranks.append(server().Process(target=rank_of_a_run, args=args))
        with no_main():
            ranks[-1].start()
    return ranks


def ended(ranks, timeout=WAIT, met=lambda: True) -> list[int]:
    """Waits for the ranks and returns their exit codes.   Raises: AssertionError if one of them hangs.

    Ranks that have not connected yet wait ten minutes for a rank that died before. torchrun ends them in this
    case, and so does this function if met() is false.
    """
    until = time.monotonic() + timeout
    while any(p.is_alive() for p in ranks) and time.monotonic() < until:
        if any(p.exitcode for p in ranks) and not met():
            for process in ranks:
                process.kill()
        multiprocessing.connection.wait([p.sentinel for p in ranks if p.is_alive()], 0.5)
    hanging = [p for p in ranks if p.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, f"{len(hanging)} of {len(ranks)} ranks hang"
    return [p.exitcode for p in ranks]


# Results of a run


def same(a, b) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def samples(out) -> dict[str, set]:
    """'rank/step' -> the batches that it had. Incomplete lines, which a kill leaves, do not count."""
    found = {}
    for line in Path(f"{out}.ids").read_text().splitlines(keepends=True):
        if line.endswith("]\n"):
            key, ids = line.rstrip().split(" ", 1)
            found.setdefault(key, set()).add(ids)
    return found


def ranks_seen(out) -> list[str]:
    """The rank of every batch so far."""
    path = Path(f"{out}.ids")
    return [line.split("/")[0] for line in path.read_text().splitlines()] if path.exists() else []


def check_equal(whole: Path, other: Path) -> None:
    """Compares weights, optimizer, metrics, results and data order of two runs.   Raises: AssertionError."""
    a, b = (torch.load(p / "checkpoint.pt", weights_only=True) for p in (whole, other))
    for key in a:
        # the configuration contains the path of the run
        if key not in ("config", "commit"):
            assert same(a[key], b[key]), f"{other}: {key} differs"
    for name in ("metrics.jsonl", "results.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (other / name).read_bytes(), f"{other}: {name}"
    assert samples(whole), f"{whole}: no batch was noted"
    assert samples(whole) == samples(other), f"{other}: the order of the data differs"
    left = [p.name for p in other.iterdir() if p.name.startswith("checkpoint.")]
    assert sorted(left) == ["checkpoint.previous.pt", "checkpoint.pt"], left


def reference(flags: list[str], out: Path, world: int = 1) -> float:
    """Runs without a kill.   Returns: seconds."""
    began = time.monotonic()
    codes = ended(start(flags, out, world))
    assert codes == [0] * world, Path(f"{out}.log").read_text()[-2000:]
    return time.monotonic() - began


# Killing


WAYS = ("time", "file operation", "write", "evaluation")


def kill_and_resume(flags, folder: Path, kills: int, seed: int, world=1, tell=None) -> dict:
    """Kills runs at random moments until `kills` kills are done. Each run then finishes and is compared.

    Returns: {"kills", "runs", "by": {how: times}}.   Raises: AssertionError where a run differs or fails.
    """
    rng, whole = random.Random(f"{seed} {flags[:2]} {flags[-1]} {world}"), folder / "whole"
    warm = server().Process(target=int)
    with no_main():
        warm.start()
    warm.join()
    seconds = reference(flags, whole, world)
    largest = (whole / "checkpoint.pt").stat().st_size
    by, runs, done = dict.fromkeys(WAYS, 0), 0, 0
    while done < kills:
        runs += 1
        out = folder / f"killed-{runs}"
        finished = False
        while not finished:
            how = rng.choice(["time", *WAYS]) if done < kills else ""
            end = {
                "file operation": {"operation": rng.randint(1, 60)},
                "write": {"size": rng.randint(20_000, largest)},
                "evaluation": {"evaluation": rng.uniform(0, 0.1) * seconds},
            }.get(how, {})
            before = len(ranks_seen(out))
            ranks = start(flags, out, world, **end)
            if how == "time":
                time.sleep(rng.uniform(0.1, 1.1) * seconds)
                for process in rng.sample(ranks, rng.randint(1, world)):  # one rank or all
                    process.kill()
            codes = ended(ranks, met=lambda n=before, out=out: len({*ranks_seen(out)[n:]}) == world)
            finished = codes == [0] * world
            log = Path(f"{out}.log").read_text() if Path(f"{out}.log").exists() else ""
            if any(code in (-signal.SIGKILL, -signal.SIGXFSZ) for code in codes):
                done, by[how] = done + 1, by[how] + 1
            elif not finished:
                raise AssertionError(f"{codes}: {log[-2000:]}")
            if tell:
                tell(done, kills)
        check_equal(whole, out)
    return {"kills": done, "runs": runs, "by": by}


# The real launcher


def torchrun(flags, out, world=2, restarts=0, victim=None, **end) -> int:
    """Runs torchrun train.py as users do. build_in ends rank `victim` in the first attempt.

    Returns: the status of torchrun; the output is in OUT.log.   Raises: AssertionError if it hangs.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    launcher += ["--max-restarts", str(restarts), "--master_port", str(free_port())]
    command = [*launcher, __file__, *flags, "--out", str(out), "--resume", "auto"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "END": json.dumps([victim, str(out), end])}
    with open(f"{out}.log", "a") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        return process.wait(timeout=3 * WAIT)
    except subprocess.TimeoutExpired:
        end_all(process.pid)
        process.kill()
        raise AssertionError(f"torchrun hangs: {Path(f'{out}.log').read_text()[-1500:]}") from None


def descendants(of: int) -> list[int]:
    """Process ids of all descendants of a process, in any session."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [of]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def adopt() -> None:
    """Makes this process the parent of orphaned descendants, so that end_all finds them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, Linux


def end_all(of: int) -> None:
    """Sends SIGKILL to all descendants of a process until none is left."""
    until = time.monotonic() + 20
    while (found := descendants(of)) and time.monotonic() < until:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":  # a rank under the real launcher
    victim, out, end = json.loads(os.environ["END"])
    if os.environ["RANK"] == str(victim) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        build_in(out, **end)
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
