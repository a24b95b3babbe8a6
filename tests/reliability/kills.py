"""Kills: a run killed anywhere, any number of times, must end as the run that nothing happened to.

A run here is train.main in a process of its own, forked from a server that has imported torch already, so
that a start costs a fraction of a second; torchrun's ranks are two such processes, or the real launcher. The
end is SIGKILL after a random time, SIGKILL before a random file operation (an audit hook sees them all), or
the kernel's SIGXFSZ in the middle of a write (a limit on the size of files): none of the three can be
caught, and the product has no code that knows of them.
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

# SPEED: a process' first optimizer makes torch import its compiler, seconds that the server takes once
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

COMMON = "--device cpu --threads 1 --batch-size 6 --steps 8 --save-every 2 --log-every 1 --warmup 2"
COMMON += " --eval-every 4"
KINDS, DOMAINS = ("cat", "dog", "elk"), ("art", "photo", "sketch")
WAIT = 240  # seconds after which a run counts as hanging: less than gloo waits, more than a busy machine


def make_data(root: Path) -> dict[str, list[str]]:
    """method -> flags: a list of pairs for llip, three domains and a start for alignclip; all tiny."""
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


# One process of a run --------------------------------------------------------------------------------


def rank_of_a_run(argv: list[str], out: str, env: dict, end: dict) -> None:
    """train.main(argv) in this process, with an end of it built in."""
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # loader workers as in a run of its own
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
    """SIGKILL, or another end, at one of these moments; without any, nothing happens.

    Args: operation n, name: before the n-th time that something in the directory `out` whose name begins
          so is opened to write, renamed or removed;  size: not SIGKILL, but from then on no file can
          grow beyond so many bytes, and the kernel ends a process that tries;  full: nor this, but that
          operation fails as on a full disk
          batch: before the n-th batch;  evaluation: so many seconds after the first begins
    """
    left = [operation]

    def end():
        Path(f"{out}.ended").touch()
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        if size:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an OSError of it
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
        evaluate = train.timed_evaluation

        def begin(*args):
            threading.Timer(evaluation, end).start()
            return evaluate(*args)

        train.timed_evaluation = begin


def note_samples(seen) -> None:
    """Every batch that training takes leaves a line: rank and step, then its samples."""
    make, following, rank = (data.Batches.__init__, data.Batches.__next__, os.environ.get("RANK", "0"))

    def begin(self, source, steps, workers=0):
        make(self, source, steps, workers)
        self.number = getattr(steps, "start", None) if not isinstance(steps, range) else None

    def note(self):
        batch = following(self)
        if self.number is not None:
            seen.write(f"{rank}/{self.number} {batch.ids.tolist()}\n")
            seen.flush()
            self.number += 1
        return batch

    data.Batches.__init__, data.Batches.__next__ = begin, note


def server():
    """Forks processes that have imported everything; it finds this file through the environment."""
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
    """SPEED: every process of the server would import the main program first."""
    real, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real


def start(argv, out, world=1, **end) -> list:
    """The processes of one run, started; end: as build_in takes it."""
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
    """Exit codes. One rank that is lost must not leave the other waiting.   Raises: AssertionError.

    Ranks that have not met yet do wait, ten minutes, for one that died on its way: the launcher ends
    them, and so does this, where met() says that they have not.
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


# What a run left ----------------------------------------------------------------------------------------


def same(a, b) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def samples(out) -> dict[str, set]:
    """'rank/step' -> the batches seen there; a half line is one that a kill cut."""
    found = {}
    for line in Path(f"{out}.ids").read_text().splitlines(keepends=True):
        if line.endswith("]\n"):
            key, ids = line.rstrip().split(" ", 1)
            found.setdefault(key, set()).add(ids)
    return found


def ranks_seen(out) -> list[str]:
    """The rank of every batch noted so far."""
    path = Path(f"{out}.ids")
    return [line.split("/")[0] for line in path.read_text().splitlines()] if path.exists() else []


def check_equal(whole: Path, other: Path) -> None:
    """Weights, optimizer, metrics, results and data order of two runs.   Raises: AssertionError."""
    a, b = (torch.load(p / "checkpoint.pt", weights_only=True) for p in (whole, other))
    for key in a:
        if key not in ("config", "commit"):  # where a run lies is in its configuration
            assert same(a[key], b[key]), f"{other}: {key} differs"
    for name in ("metrics.jsonl", "results.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (other / name).read_bytes(), f"{other}: {name}"
    assert samples(whole) == samples(other), f"{other}: the order of the data differs"
    left = [p.name for p in other.iterdir() if p.name.startswith("checkpoint.")]
    assert sorted(left) == ["checkpoint.previous.pt", "checkpoint.pt"], left


def reference(flags: list[str], out: Path, world: int = 1) -> float:
    """The run that nothing happens to; returns its seconds."""
    began = time.monotonic()
    codes = ended(start(flags, out, world))
    assert codes == [0] * world, Path(f"{out}.log").read_text()[-2000:]
    return time.monotonic() - began


# Killing -------------------------------------------------------------------------------------------------


WAYS = ("time", "file operation", "write", "evaluation")


def kill_and_resume(flags, folder: Path, kills: int, seed: int, world=1, tell=None) -> dict:
    """Kills runs at random until there were `kills` of them, lets each finish, and compares.

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
                for process in rng.sample(ranks, rng.randint(1, world)):  # one rank, or all
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


# The real launcher ---------------------------------------------------------------------------------------


def torchrun(flags, out, world=2, restarts=0, victim=None, **end) -> int:
    """torchrun train.py, as users start it; rank `victim` has an end built in, the first time.

    Returns: the launcher's status; what was said is in OUT.log.   Raises: AssertionError if it hangs.
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
    """Process ids of a process' children, their children..., of any session."""
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
    """Processes below this one whose parent ends become its own children, so that end_all finds them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, Linux


def end_all(of: int) -> None:
    """SIGKILL to all below a process, until there are none."""
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
