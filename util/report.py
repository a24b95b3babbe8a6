"""What a run shows and leaves behind: progress on the terminal, tables, files that are never half written."""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path


class Progress:
    """How far, how fast, how long to go: one line rewritten on a terminal, else one every ten seconds."""

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.start = self.shown = time.monotonic()
        self.tty = sys.stderr.isatty()

    def add(self, count: int) -> None:
        self.done += count
        now, finished = time.monotonic(), self.done >= self.total
        if not self.label or (now - self.shown < (0.5 if self.tty else 10) and not finished):
            return
        self.shown, spent = now, max(now - self.start, 1e-9)
        rate = self.done / spent
        left = duration(spent if finished else (self.total - self.done) / rate)
        left = f"done in {left}" if finished else f"ETA {left}"
        line = f"{self.label}  {self.done:,} of {self.total:,} {self.unit}  {rate:,.1f}/s  {left}"
        end = "" if self.tty and not finished else "\n"
        print(("\r\x1b[K" if self.tty else "") + line, end=end, file=sys.stderr, flush=True)


# also nothing, 1,024 and "0.31 +- 0.02" or "0.31 ± 0.02"
NUMBER = re.compile(r"|[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( (\+-|±) [\d,.e-]+)?|nan|-?inf")


def format_table(rows: list[dict], digits: int = 3) -> str:
    """Rows of {column: value} as an aligned Markdown table; numbers to the right.

    Columns are those of all rows in order of appearance; a value that a row lacks stays empty.
    Args: digits of a float after the point
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def cell(value) -> str:
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    table = [[cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(3, *(len(line[n]) for line in [columns, *table])) for n in range(len(columns))]
    right = [rows != [] and all(NUMBER.fullmatch(line[n]) for line in table) for n in range(len(columns))]

    def line(cells: list[str]) -> str:
        padded = [x.rjust(w) if r else x.ljust(w) for x, w, r in zip(cells, widths, right)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right)]
    return "\n".join([line(columns), line(rule), *map(line, table)])


def duration(seconds: float) -> str:
    """8.4 s, 3:05 min, 2:07 h"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, unit = (seconds / 60, "min") if seconds < 3600 else (seconds / 3600, "h")
    return f"{int(minutes)}:{int(minutes % 1 * 60):02} {unit}"


def output_folder(path: str | Path) -> Path:
    """Makes a folder and tries to write in it: what cannot be kept is known before the work, not after.

    Raises: OSError, one line.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"cannot write in {path}: it is a file, not a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"cannot write in {path}: {error.strerror or error}") from error
    return path


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes a file so that nobody ever sees half of it, not even after a power cut.

    Raises: OSError naming the file, which is then what it was before.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:  # a full disk does not say which file it was
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_text(path: str | Path, text: str) -> None:
    write_whole(path, text.encode())


def write_image(path: str | Path, image) -> None:
    """A Pillow image, in the format of its name.   Raises: ValueError if there is no such format."""
    file = io.BytesIO()
    file.name = str(path)  # where Pillow looks for the format
    image.save(file)
    write_whole(path, file.getvalue())


def write_json(path: str | Path, content) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
