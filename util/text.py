"""How names, numbers and errors are printed. Names come from strangers' files."""

import contextlib
import math
import sys

WARNED = set()  # what this process has warned of


def printable(text: str) -> str:
    """The text without what could break a line or command a terminal: such characters become "?"."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type, in at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def say(*values, file=None) -> None:
    """print for work that must go on when its reader is gone: a closed pipe or stream, a full log disk."""
    with contextlib.suppress(OSError, ValueError):
        lines = " ".join(map(str, values)).split("\n")
        print(*map(printable, lines), sep="\n", file=file or sys.stdout, flush=True)


def warn(text: str, once: object = None) -> None:
    """One line on stderr, "warning: ...": the program continues. The same `once` prints one line only."""
    if once is None or once not in WARNED:
        WARNED.add(once)
        say(f"warning: {printable(text)}", file=sys.stderr)


def number(x: float) -> str:
    """1,234 or 0.123: at least three digits."""
    if not math.isfinite(x):
        return str(x)
    return f"{x:,.0f}" if abs(x) >= 100 or x == int(x) else f"{x:.3g}"


def duration(seconds: float) -> str:
    """8.4 s, 3:05 min, 2:07 h; 0.0 s where the clock went back."""
    seconds = max(seconds, 0.0)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, unit = (seconds / 60, "min") if seconds < 3600 else (seconds / 3600, "h")
    return f"{int(minutes)}:{int(minutes % 1 * 60):02} {unit}"
