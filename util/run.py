"""A run's directory: who may write to it, what is in it, and how a kill leaves it whole.

config.json, metrics.jsonl, checkpoint.pt (tensors and plain values; the model under "state_dict" with
OpenAI's names), checkpoint.previous.pt (the one before), tokenizer.json, results.json and pictures.

A checkpoint is a zip, and a zip carries a CRC-32 of every member. torch.load does not look at them, so a
flipped bit in a weight would go unseen; here they are checked (as `unzip -t checkpoint.pt` does) before a
run goes on from one. A damaged checkpoint is put aside and the previous one taken. On the disk there must
be room for three of them: the last, the previous, and the one being written.
"""

import contextlib
import json
import os
import signal
import zipfile
from pathlib import Path

import torch

from scale import distributed
from util.files import output_folder, sync_folder, write_text
from util.text import one_line


class Run:
    """A run's directory: lock, configuration, metrics, checkpoint. Only rank 0 writes."""

    def __init__(self, c):
        self.path = Path(distributed.broadcast(str(self.choose(c)) if distributed.rank() == 0 else ""))
        self.checkpoint, self.writes = self.path / "checkpoint.pt", distributed.rank() == 0
        self.previous = self.path / "checkpoint.previous.pt"
        self.made = []  # folders that were not there before, the innermost first
        if self.writes:
            self.made = [p for p in (self.path, *self.path.parents) if not p.exists()]
            output_folder(self.path)
            self.lock = lock(self.path / "lock")
            for left in self.path.glob("*.part"):  # by a run that was killed while it wrote
                left.unlink(missing_ok=True)

    @staticmethod
    def choose(c) -> Path:
        """--out, or runs/METHOD; a fresh run goes to the next free name, a resumed one to the newest."""
        if c.resume and c.resume != "auto":
            if not holds_checkpoint(Path(c.resume)):
                raise ValueError(f"{c.resume}: no checkpoint to go on from")
            return Path(c.resume)
        if c.out:
            if holds_checkpoint(Path(c.out)) and not c.resume:
                raise ValueError(
                    f"{c.out} already holds a run: --resume auto goes on with it, another --out keeps both"
                )
            return Path(c.out)
        names = [Path("runs") / (c.method + (f"-{n}" if n > 1 else "")) for n in range(1, 10000)]
        free = next(n for n, path in enumerate(names) if not holds_checkpoint(path))
        return names[max(free - 1, 0) if c.resume else free]

    def withdraw(self) -> None:
        """Takes back a new folder in which there is neither a figure nor a checkpoint: the run was refused.

        TRAP: what was there before the run, and what someone else put in since, stays.
        """
        if not self.made or holds_checkpoint(self.path) or self.metrics():
            return
        self.lock.close()
        with contextlib.suppress(OSError):
            for name in ("lock", "config.json", "tokenizer.json", "metrics.jsonl"):
                (self.path / name).unlink(missing_ok=True)
            for folder in self.made:
                folder.rmdir()  # which fails if anything is in it

    def save(self, state: dict) -> None:
        """TRAP: written to another name, synced, then renamed: a kill leaves the old checkpoint whole."""
        if not self.writes:
            return
        part = self.checkpoint.with_suffix(".part")
        with self.writing(self.checkpoint):
            try:
                with open(part, "wb") as f:
                    torch.save(state, f)
                    f.flush()
                    os.fsync(f.fileno())
                if self.checkpoint.exists():
                    os.replace(self.checkpoint, self.previous)
                os.replace(part, self.checkpoint)  # killed before this: load() takes the previous
                sync_folder(self.path)
            finally:
                with contextlib.suppress(OSError):
                    part.unlink()

    @contextlib.contextmanager
    def writing(self, path: Path | None = None):
        """Around every write: where it fails, the message says what is kept and how to go on.

        Args:   path where the error itself does not name the file
        Raises: ValueError, one line.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            if isinstance(error, RuntimeError) and not path:
                raise
            # TRAP: torch.save closes its zip after a failed write, fails again, and reports only that
            said = one_line((path and error.__context__) or error)
            said = f"cannot write {path} ({said})" if path else said
            raise ValueError(
                f"{said}; {self.kept()}. Make room, then --resume auto goes on from there"
            ) from error

    def kept(self) -> str:
        """What there is to go on from, for messages."""
        found = [p for p in (self.checkpoint, self.previous) if p.exists()]
        return f"the last checkpoint is whole: {found[0]}" if found else "there is no checkpoint yet"

    def load(self) -> dict | None:
        """The last checkpoint that is whole, or None. Nothing in it can run.

        Raises: ValueError if there are checkpoints and all are damaged.
        """
        damage = []
        for path in (self.checkpoint, self.previous):
            try:
                state = read_checkpoint(path)
            except FileNotFoundError:
                continue
            except ValueError as error:
                damage.append(str(error))
                continue
            if path == self.previous and self.writes:
                print(f"{'; '.join(damage) or f'{self.checkpoint} is missing'}: {path} is used")
                if damage:  # TRAP: the next save would put the damaged one over the whole one
                    os.replace(self.checkpoint, self.path / "checkpoint.damaged.pt")
            return state
        if damage:
            raise ValueError(f"{'; '.join(damage)}: delete {self.path}, or give another --out")
        return None

    def log(self, **values) -> None:
        """One line of metrics.jsonl; only numbers that a repeated run gives again, so no times."""
        if not self.writes:
            return
        path = self.path / "metrics.jsonl"
        with self.writing(path), open(path, "a") as f:
            f.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict]:
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a full disk cuts lines

    def results(self) -> dict | None:
        """results.json of a run that has come to its end, on every rank; None: missing or broken."""
        found = None
        if self.writes:
            with contextlib.suppress(OSError, ValueError):
                found = json.loads((self.path / "results.json").read_text())
        return distributed.broadcast(found)

    def rewind(self, step: int) -> None:
        """Drops what was logged after the checkpoint of this step."""
        if self.writes:
            kept = [json.dumps(m) + "\n" for m in self.metrics() if m["step"] <= step]
            with self.writing():
                write_text(self.path / "metrics.jsonl", "".join(kept))


def holds_checkpoint(path: Path) -> bool:
    return any((path / f"checkpoint{name}.pt").exists() for name in ("", ".previous"))


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of ours whose every byte is what was written.

    Raises: FileNotFoundError; OSError where it cannot be read now; ValueError, one line, if damaged.
    """
    with open(path, "rb") as file:  # not allowed, too many open files: says nothing about the file
        try:
            with zipfile.ZipFile(file) as archive:
                if wrong := archive.testzip():  # TRAP: torch.load reads flipped weights in silence
                    raise ValueError(f"the checksum of {wrong} is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files fail in many ways; all mean the same to the user
            # TRAP: a whole checkpoint must not be put aside because the memory was full just then
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise OSError(f"{path} cannot be read: there is not enough memory") from error
            raise ValueError(f"{path} is damaged ({one_line(error)})") from error


def lock(path: Path):
    """A lock that the system drops when the process ends, however it ends.

    TRAP: lockf, not flock: loader workers would inherit flock's, outlive a killed run for seconds, and
    keep its successor out.
    """
    handle = open(path, "w")
    try:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such lock
        pass
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"{path.parent} is in use by another process") from error
    except OSError as error:  # some network disks have no locks: training is possible there too
        print(f"warning: {path.parent} cannot be locked ({one_line(error)}): one process only")
    return handle


def git_commit() -> str:
    """Commit of this checkout, or "" outside of one."""
    head = Path(__file__).parent.parent / ".git" / "HEAD"
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
        raise ValueError(f"the checkpoint is of another run ({what}): give the same flags, or another --out")


class StopSignal:
    """SIGTERM and Ctrl-C end the run at a step boundary, after saving. A second one ends it at once."""

    def __init__(self):
        self.asked = self.now = False
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: leave the signals alone
                self.before[number] = signal.signal(number, self.handle)

    def close(self):
        """TRAP: what comes after, another run perhaps, would otherwise swallow a Ctrl-C in silence."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.asked = True

    def agreed(self) -> bool:
        """Whether all ranks stop here: one byte over gloo, no waiting for a GPU."""
        self.now = distributed.mean({"asked": self.asked})["asked"] > 0
        return self.now
