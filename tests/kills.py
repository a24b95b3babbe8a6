"""Kills: a run killed anywhere, any number of times, must end as the run that nothing happened to.

A run here is train.main in a process of its own, forked from a server that has imported torch already, so
that a start costs a fraction of a second; torchrun's ranks are two such processes, or the real launcher. The
end is SIGKILL after a random time, SIGKILL before a random file operation (an audit hook sees them all), or
the kernel's SIGXFSZ in the middle of a write (a limit on the size of files): none of the three can be
caught, and the product has no code that knows of them.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pretrained  # noqa: E402
import train  # noqa: E402
from model import CLIP, Config  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

# SPEED: a process' first optimizer makes torch import its compiler, seconds that the server takes once
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

COMMON = "--device cpu --threads 1 --batch-size 6 --steps 8 --save-every 2 --log-every 1 --warmup 2"
COMMON += " --eval-every 4"
KINDS, DOMAINS = ("cat", "dog", "elk"), ("art", "photo", "sketch")
WAIT = 90  # seconds after which a run counts as hanging


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


def rank_of_a_run(argv: list[str], out: str, env: dict, operation: int, size: int) -> None:
    """train.main(argv) in this process, with an end built in: before a file operation, or in a write."""
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # loader workers as in a run of its own
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    if operation:
        die_before(out, operation)
    if size:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an OSError of it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with open(f"{out}.ids", "a") as seen:
        note_samples(seen)
        try:
            code = train.main(argv)
        except BaseException:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    os._exit(code)


def die_before(out: str, operation: int) -> None:
    """SIGKILL before the n-th time that something in the run's directory is opened to write, renamed..."""
    left = [operation]

    def hook(event, args):
        if event == "open":
            changes = str(args[0]).startswith(out + "/") and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in ("os.rename", "os.remove") and str(args[0]).startswith(out + "/")
        if changes:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def note_samples(seen) -> None:
    """Every batch that training takes leaves a line: rank and step, then its samples."""
    import data

    make, following, rank = (
        data.Batches.__init__,
        data.Batches.__next__,
        os.environ.get("RANK", "0"),
    )

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
    context.set_forkserver_preload(["kills"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ["OMP_NUM_THREADS"] = "1"
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(argv, out, world=1, operation=0, size=0) -> list:
    """The processes of one run, started."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(world):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} | address
        argv = [*argv] if "--out" in argv else [*argv, "--out", str(out), "--resume", "auto"]
        args = (argv, str(out), env if world > 1 else {}, operation, size)
        ranks.append(server().Process(target=rank_of_a_run, args=args))
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


def kill_and_resume(flags, folder: Path, kills: int, seed: int, world=1, tell=None) -> dict:
    """Kills runs at random until there were `kills` of them, lets each finish, and compares.

    Returns: {"kills", "runs", "by": {how: times}}.   Raises: AssertionError where a run differs or fails.
    """
    rng, whole = random.Random(seed), folder / "whole"
    warm = server().Process(target=int)
    warm.start()
    warm.join()
    seconds = reference(flags, whole, world)
    largest = (whole / "checkpoint.pt").stat().st_size
    by, runs, done = {"time": 0, "file operation": 0, "write": 0}, 0, 0
    while done < kills:
        runs += 1
        out = folder / f"killed-{runs}"
        finished = False
        while not finished:
            how = rng.choice(["time", "time", "file operation", "write"]) if done < kills else ""
            operation = rng.randint(1, 60) if how == "file operation" else 0
            size = rng.randint(20_000, largest) if how == "write" else 0
            before = len(ranks_seen(out))
            ranks = start(flags, out, world, operation, size)
            if how == "time":
                time.sleep(rng.uniform(0.1, 1.1) * seconds)
                for process in rng.sample(ranks, rng.randint(1, world)):  # one rank, or all
                    process.kill()
            codes = ended(
                ranks, met=lambda n=before, out=out: len({*ranks_seen(out)[n:]}) == world
            )
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


def torchrun(flags, out, world=2, restarts=0):
    """python -m torch.distributed.run train.py, as users start it, in a process group of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    launcher += ["--max-restarts", str(restarts), "--master_port", str(free_port())]
    command = [*launcher, str(ROOT / "train.py"), *flags, "--out", str(out), "--resume", "auto"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = open(f"{out}.log", "a")
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def ranks_of(launcher) -> list[int]:
    """Process ids of the ranks, in order of their start."""
    path = f"/proc/{launcher.pid}/task/{launcher.pid}/children"
    found = []
    for pid in map(int, Path(path).read_text().split()):
        with contextlib.suppress(OSError):
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def wait_for(condition, what: str, timeout: float = WAIT):
    until = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < until, f"waited {timeout} s for {what}"
        time.sleep(0.02)
    return found


def steps_logged(out) -> int:
    path = Path(out) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
