"""The directory of a run: who may write to it, what is in it, and how it survives a kill at any moment.

A folder with a file of one of the NAMES but without our lock belongs to someone else: it is refused and left
as it is. A checkpoint holds only tensors and plain values, in a zip file with a CRC-32 of every member.
torch.load does not check it; here it is checked before a run continues. A damaged checkpoint is put aside and
the previous one is used. The disk needs room for three checkpoints.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import signal
import time
import zipfile
from pathlib import Path

import torch

from scale import distributed
from util import plots
from util.files import PART, lock, open_file, open_own, output_folder, read_text, replacing, write_text
from util.program import STOPPING
from util.report import results_table
from util.text import duration, one_line, say, warn

# what reading JSON that this program did not write may raise
FOREIGN = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
MARK = b"lock of a run of train.py\n"
NAMES = "config.json metrics.jsonl checkpoint.pt checkpoint.previous.pt checkpoint.damaged.pt tokenizer.json"
NAMES = (*NAMES.split(), "results.json", "curves.png", "results.png")


class Run:
    """A run's directory. Every rank has one; only rank 0 writes.

    Args:   out: --out, or empty for runs/NAME, or the next free runs/NAME-N
            resume: "" for a fresh run, "auto" for the newest one under these names, or a directory
    Raises: ValueError if the folder is in use, holds a run already, or belongs to someone else.
    """

    def __init__(self, out: str, resume: str, name: str):
        path = str(find(out, resume, name)) if distributed.rank() == 0 else ""
        self.path, self.writes = Path(distributed.broadcast(path)), distributed.rank() == 0
        self.checkpoint, self.previous = self.path / "checkpoint.pt", self.path / "checkpoint.previous.pt"
        self.resumed, self.handle = bool(resume) and holds_checkpoint(self.path), None
        if self.writes and self.path.exists():
            self.claim()
        elif self.writes:  # made by begin(), so that a run that cannot start leaves nothing
            output_folder(next(folder for folder in self.path.parents if folder.exists()))

    def claim(self) -> None:
        """Takes the folder for this process alone, if all files under our names are of a run of train.py."""
        path = self.path / "lock"
        if os.path.lexists(path):
            with open_own(path, os.O_RDWR) as file:
                if file.read(len(MARK)) not in (MARK, b""):
                    raise ValueError(f"{path} is not of a run of train.py: choose another --out")
        elif not self.resumed and (found := [name for name in NAMES if os.path.lexists(self.path / name)]):
            raise ValueError(f"{self.path} holds a {found[0]} that no run wrote: choose another --out")
        output_folder(self.path)
        self.handle = open_own(path, os.O_RDWR)
        try:
            if not lock(self.handle):
                warn(f"{self.path} cannot be locked on this disk: start one process only")
        except BlockingIOError as error:
            raise ValueError(f"{self.path} is in use by another process: choose another --out") from error
        self.handle.seek(0)
        self.handle.write(MARK)
        self.handle.flush()
        # left by a run that was killed while it wrote
        for part in self.path.glob(f"*{PART}"):
            part.unlink(missing_ok=True)

    def save(self, state: dict) -> None:
        """TRAP: under another name, synced, then renamed: a kill leaves the old checkpoint whole."""
        if not self.writes:
            return
        with self.writing(), replacing(self.checkpoint) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            if self.checkpoint.exists():
                os.replace(self.checkpoint, self.previous)
            # killed here: load() takes the previous one

    @contextlib.contextmanager
    def writing(self, path: Path | None = None):
        """For every write: an error says what is kept and how to continue.   Raises: ValueError, one line."""
        try:
            yield
        except OSError as error:
            reason = f"cannot write {path}: {error.strerror}" if path else one_line(error)
            raise ValueError(f"{reason}; {self.kept()}. Make room, then --resume auto continues") from error

    def kept(self) -> str:
        """What a run can continue from, for messages."""
        found = [p for p in (self.checkpoint, self.previous) if p.exists()]
        return f"the last checkpoint is whole: {found[0]}" if found else "there is no checkpoint yet"

    def load(self) -> dict | None:
        """The last whole checkpoint, or None.   Raises: ValueError if there are some, all of them damaged."""
        damage = []
        for path in (p for p in (self.checkpoint, self.previous) if p.exists()):
            try:
                state = read_checkpoint(path)
            except ValueError as error:
                damage.append(str(error))
                continue
            if path == self.previous and self.writes:
                say(f"{'; '.join(damage) or f'{self.checkpoint} is missing'}: {path} is used")
                if damage:
                    # TRAP: the next save would move the damaged checkpoint over the whole one
                    os.replace(self.checkpoint, self.path / "checkpoint.damaged.pt")
            return state
        if damage:
            raise ValueError(f"{'; '.join(damage)}: delete {self.path}, or choose another --out")

    def log(self, **values) -> None:
        """One line of metrics.jsonl. It holds no times, so that a repeated run writes the same line."""
        if self.writes:
            path = self.path / "metrics.jsonl"
            with self.writing(path), open_own(path, os.O_WRONLY | os.O_APPEND) as file:
                file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict]:
        path = self.path / "metrics.jsonl"
        lines = read_text(path, "replace").splitlines(keepends=True) if path.exists() else []
        try:
            found = [json.loads(line) for line in lines if line.endswith("\n")]  # a full disk cuts lines
            for m in found:
                results_table({name: result for name, result in m.items() if isinstance(result, dict)})
            return [m for m in found if m["step"] >= 0 and math.isfinite(m.get("loss", 0.0))]
        except FOREIGN as error:
            raise ValueError(f"{path} has a line that no run wrote: move the file away") from error

    def results(self) -> dict | None:
        """results.json of a finished run, on every rank; None if it is missing or damaged."""
        try:
            found = json.loads(read_text(self.path / "results.json"))
            results_table(found)
        except (OSError, *FOREIGN):
            found = None
        return distributed.broadcast(found)

    def vocabulary(self) -> Path | None:
        """The tokenizer of the run that this one continues."""
        path = self.path / "tokenizer.json"
        return path if self.resumed and path.exists() else None

    def begin(self, step: int) -> None:
        """Drops what was logged after the checkpoint of this step, and its evaluation, which is run again."""
        if self.handle is None:
            self.claim()
        kept = [m for m in self.metrics() if m["step"] < step or (m["step"] == step and "loss" in m)]
        with self.writing():
            write_text(self.path / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in kept))

    def draw(self, results: dict) -> None:
        """curves.png: the loss, and figures measured more than once; results.png: the final figures."""
        logged = self.metrics()
        panels = {"training loss": {"loss": [(m["step"], m["loss"]) for m in logged if "loss" in m]}}
        bars, levels = {}, {}
        for name, result in results.items():
            shown = [k for k in result["chance"] if k not in ("i2t@5", "t2i@5", "i2t@10", "t2i@10", "top5")]
            chance = {k: 100 * result["chance"][k] for k in shown}
            evaluated = [m for m in logged if name in m and set(shown) <= m[name].keys()]
            if len(evaluated) > 1:
                title = f"{name}, per cent (dotted: chance)"
                panels[title] = {k: [(m["step"], 100 * m[name][k]) for m in evaluated] for k in shown}
                levels[title] = chance
            for k in shown:
                bars[f"{name} {k}"] = {"here": (100 * result[k], 0.0), "chance": (chance[k], 0.0)}
        plots.lines(self.path / "curves.png", panels, levels=levels)
        if bars:
            plots.bars(self.path / "results.png", bars, "per cent")


def find(out: str, resume: str, name: str) -> Path:
    """The directory of a run, see Run."""
    if resume not in ("", "auto"):
        if not holds_checkpoint(Path(resume)):
            raise ValueError(f"{resume}: no checkpoint to continue from")
        return Path(resume)
    if out:
        if holds_checkpoint(Path(out)) and not resume:
            raise ValueError(f"{out} holds a run: --resume auto continues it, another --out keeps both")
        return Path(out)
    names = [Path("runs") / (name + (f"-{n}" if n > 1 else "")) for n in range(1, 10000)]
    free = next(n for n, path in enumerate(names) if not holds_checkpoint(path))
    return names[max(free - 1, 0) if resume else free]


def holds_checkpoint(path: Path) -> bool:
    return any((path / f"checkpoint{name}.pt").exists() for name in ("", ".previous"))


def read_config(source: str | Path) -> dict:
    """config.json of a run from its folder or checkpoint; {} for others.   Raises: ValueError if broken."""
    path = Path(source).expanduser()
    if not path.is_dir() and not path.name.startswith("checkpoint."):
        return {}
    path = (path if path.is_dir() else path.parent) / "config.json"
    try:
        config = json.loads(read_text(path)) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({one_line(error)}); restore it or move the checkpoint") from None
    return config if isinstance(config, dict) and isinstance(config.get("method"), str) else {}


def read_checkpoint(path: Path) -> dict:
    """A checkpoint whose checksums are right.   Raises: OSError if unreadable now; ValueError if damaged."""
    with open_file(path) as file:  # an OSError here says nothing about the file
        try:
            with zipfile.ZipFile(file) as archive:
                # TRAP: torch.load reads flipped weights without an error
                if wrong := archive.testzip():
                    raise ValueError(f"the checksum of {wrong} is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # an error of the disk or the network says nothing about the file; a wrong offset is EINVAL
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise OSError(f"{path} cannot be read now ({one_line(error)}): try again") from error
            # TRAP: a whole checkpoint must not be put aside because memory was short
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise OSError(f"{path} cannot be read: there is not enough memory") from error
            raise ValueError(f"{path} is damaged ({one_line(error)})") from error


def git_commit() -> str:
    """Commit of this checkout, or "" outside of one."""
    head = Path(__file__).parent.parent / ".git" / "HEAD"
    try:
        ref = head.read_text().strip()
        return ref if not ref.startswith("ref: ") else (head.parent / ref[5:]).read_text().strip()
    except OSError:
        return ""


# flags that may change when a run continues: how it is computed and reported, and where its data are
FREE = "accumulate workers precision compile grad_checkpointing device threads log_every eval_every "
FREE += "save_every out resume preset dry_run commit data_changed train_data val_data zeroshot_data"
FREE = {*FREE.split(), "image_root", "val_image_root", "zeroshot_image_root"}


def check_same_run(old: dict, new: dict) -> None:
    """Raises: ValueError if flags differ that would make it another run."""
    changed = [k for k in new if k not in FREE and k in old and str(old[k]) != str(new[k])]
    if changed:
        what = ", ".join(f"{k} {old.get(k)!r} -> {new[k]!r}" for k in changed)
        raise ValueError(f"the checkpoint is of another run ({what}): use the same flags or another --out")


def fingerprint(dataset) -> dict:
    """The number of rows of a data set, and a hash of them in order: names below a common folder, captions or
    labels, and file sizes; in tar shards the positions and sizes of the members.
    """
    if (table := getattr(dataset, "table", None)) is not None:
        return {"rows": len(table), "order": hashlib.sha256(table.tobytes()).hexdigest()}
    names = [dataset.name(i) for i in range(len(dataset))]
    folder = len(os.path.commonprefix([os.path.dirname(name) for name in names[:1] + names[-1:]]))
    texts = dataset.captions if hasattr(dataset, "captions") else dataset.labels
    stride = max(1, len(names) // 10_000)  # file sizes of so many images at most
    order = hashlib.sha256()
    for i, name in enumerate(names):
        size = os.path.getsize(name) if i % stride == 0 and os.path.isfile(name) else 0
        row = repr((name[folder:], texts[i], size)).encode("utf-8", "replace")
        order.update(hashlib.sha256(row).digest())
    return {"rows": len(names), "order": order.hexdigest()}


def check_same_data(old: dict, new: dict, allowed: bool, say) -> None:
    """Says which data changed.   Raises: ValueError if --train-data did, without --data-changed."""
    for flag in (flag for flag in old if flag in new and old[flag]["order"] != new[flag]["order"]):
        before, now = old[flag]["rows"], new[flag]["rows"]
        change = f"{before:,} rows became {now:,}" if before != now else "images, captions, labels or order"
        message = f"changed since the checkpoint: {change}"
        if flag == "train_data" and not allowed:
            raise ValueError(f"the training data {message}; --data-changed continues")
        say(f"--{flag.replace('_', '-')} {message}")


class Meter:
    """Sums of logged values over the steps since the last log line. They stay on the GPU until means()."""

    def __init__(self, sums: dict | None = None, count: int = 0):
        self.sums, self.count = dict(sums or {}), count

    def add(self, **values) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, float]:
        """Means over steps and ranks; starts anew."""
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return distributed.mean(means)

    def state(self) -> dict:
        """Plain numbers for a checkpoint; Meter(**state) continues."""
        return {"sums": distributed.mean({k: float(v) for k, v in self.sums.items()}), "count": self.count}


class Clock:
    """Rate, time left, and the share of time that the loop waits for data; c is the TrainConfig."""

    def __init__(self, c, start: int, unit: str):
        self.c, self.start, self.unit = c, start, unit
        self.began, self.waited = time.monotonic(), 0.0

    def spent(self) -> float:
        return max(time.monotonic() - self.began, 1e-9)

    def waiting(self, batches):
        before = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - before
        return batch

    def line(self, step: int, loss: float, scale: float) -> str:
        done, spent = step - self.start, self.spent()
        line = f"step {step:6}/{self.c.steps}  loss {loss:7.4f}  scale {scale:5.1f}"
        line += f"  {done * self.c.batch_size / spent:7.0f} {self.unit}/s  waiting for data"
        return f"{line} {self.waited / spent:4.0%}  ETA {duration(spent / done * (self.c.steps - step))}"


class StopSignal:
    """Ctrl-C, SIGTERM, SIGHUP, SIGXCPU end the run after a step and a save. A second one ends it at once."""

    def __init__(self):
        self.received, self.before = False, {}
        for number in STOPPING:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup ignores SIGHUP, and so do its programs
            with contextlib.suppress(ValueError):  # not in the main thread: leave the signals alone
                self.before[number] = signal.signal(number, self.handle)

    def close(self):
        """TRAP: without this a later Ctrl-C in the same process would have no effect."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.close()
        self.received = True

    def agreed(self) -> bool:
        """Whether any rank received a signal: one byte over gloo, without waiting for a GPU."""
        return distributed.mean({"received": self.received})["received"] > 0
