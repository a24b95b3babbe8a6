"""A run's directory: who may write to it, what is in it, and how a kill leaves it whole.

config.json, metrics.jsonl, checkpoint.pt (tensors and plain values; the model under "state_dict" with
OpenAI's names), tokenizer.json, results.json and pictures. Only rank 0 writes.
"""

import contextlib
import json
import os
import signal
from pathlib import Path

import torch

import distributed
from report import write_text


class Run:
    """A run's directory: lock, configuration, metrics, checkpoint. Only rank 0 writes."""

    def __init__(self, c):
        self.path = Path(
            distributed.broadcast(str(self.choose(c)) if distributed.rank() == 0 else "")
        )
        self.checkpoint, self.writes = self.path / "checkpoint.pt", distributed.rank() == 0
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.path / "lock")

    @staticmethod
    def choose(c) -> Path:
        """--out, or runs/METHOD; a fresh run goes to the next free name, a resumed one to the newest."""
        if c.resume and c.resume != "auto":
            return Path(c.resume)
        if c.out:
            if (Path(c.out) / "checkpoint.pt").exists() and not c.resume:
                raise ValueError(
                    f"{c.out} already holds a run: --resume auto goes on with it, another --out keeps both"
                )
            return Path(c.out)
        names = [Path("runs") / (c.method + (f"-{n}" if n > 1 else "")) for n in range(1, 10000)]
        free = next(n for n, path in enumerate(names) if not (path / "checkpoint.pt").exists())
        return names[max(free - 1, 0) if c.resume else free]

    def save(self, state: dict) -> None:
        """TRAP: written to another name, synced, then renamed: a kill leaves the old checkpoint whole."""
        if not self.writes:
            return
        part = self.checkpoint.with_suffix(".part")
        try:
            with open(part, "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, self.checkpoint)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            part.unlink(missing_ok=True)
            kept = (
                "the last checkpoint is whole"
                if self.checkpoint.exists()
                else "there is no checkpoint yet"
            )
            raise ValueError(
                f"cannot write {self.checkpoint} ({one_line(error)}); {kept}"
            ) from error

    def load(self) -> dict | None:
        """The checkpoint, or None. Only tensors and plain values are read: nothing in it can run."""
        if not self.checkpoint.exists():
            return None
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files fail in many ways; all mean the same to the user
            raise ValueError(
                f"{self.checkpoint} cannot be read ({one_line(error)}): delete it to start again"
            ) from error

    def log(self, **values) -> None:
        """One line of metrics.jsonl; only numbers that a repeated run gives again, so no times."""
        if self.writes:
            with open(self.path / "metrics.jsonl", "a") as f:
                f.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict]:
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rewind(self, step: int) -> None:
        """Drops what was logged after the checkpoint of this step."""
        if self.writes:
            kept = [json.dumps(m) + "\n" for m in self.metrics() if m["step"] <= step]
            write_text(self.path / "metrics.jsonl", "".join(kept))


def lock(path: Path):
    """An advisory lock that the system drops when the process ends, however it ends."""
    handle = open(path, "w")
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock: no lock there
        pass
    except OSError as error:
        raise ValueError(f"{path.parent} is in use by another process") from error
    return handle


def one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def git_commit() -> str:
    """Commit of this checkout, or "" outside of one."""
    head = Path(__file__).parent / ".git" / "HEAD"
    try:
        ref = head.read_text().strip()
        return ref if not ref.startswith("ref: ") else (head.parent / ref[5:]).read_text().strip()
    except OSError:
        return ""


def check_same_run(old: dict, new: dict) -> None:
    """A resumed run must be the same run; how it is computed and reported may change."""
    free = "accumulate workers precision compile grad_checkpointing device threads out resume log_every"
    free = {*free.split(), "eval_every", "save_every", "dry_run", "preset"}
    # a flag that did not exist when the run began cannot have been another one
    changed = [k for k in new if k not in free and k in old and str(old[k]) != str(new[k])]
    if changed:
        what = ", ".join(f"{k} {old.get(k)!r} -> {new[k]!r}" for k in changed)
        raise ValueError(
            f"the checkpoint is of another run ({what}): give the same flags, or another --out"
        )


class StopSignal:
    """SIGTERM and Ctrl-C end the run at a step boundary, after saving. A second one ends it at once."""

    def __init__(self):
        self.asked = self.now = False
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: leave the signals alone
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.asked = True

    def agreed(self) -> bool:
        """Whether all ranks stop here: one byte over gloo, no waiting for a GPU."""
        self.now = distributed.mean({"asked": self.asked})["asked"] > 0
        return self.now
