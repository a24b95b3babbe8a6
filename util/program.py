"""What every program of this project does at its edges: errors become one line and an exit status.

status 0    done
status 1    another process of the run was lost
status 2    a value, a file or a flag is wrong; one line on stderr says which and what to do
status 130  stopped by Ctrl-C
"""

import functools
import os
import signal
import sys
from collections.abc import Callable

import torch

from util.text import printable, say

# signals that end a program: train.py saves before; Windows lacks two of them
STOPPING = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU")]
STOPPING = [number for number in STOPPING if number is not None]
KEPT = []  # see keep
# what torch says when memory is short, and when another rank or a loader worker was lost
NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "Storage size calculation overflowed")
LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "DataLoader worker")


def explain(error: Exception) -> tuple[str, int]:
    """One line about an error, and the exit status; an empty line for a fault of ours."""
    text = str(error)
    if isinstance(error, FileNotFoundError) and error.filename:
        text = f"{error.filename}: {error.strerror}; is the path right?"
    if isinstance(error, ValueError | OSError | OverflowError):
        return text, 2
    if isinstance(error, MemoryError | RecursionError) or any(words in text for words in NO_MEMORY):
        return "not enough memory, or a file is nested too deeply: try smaller batches, images or files", 2
    if isinstance(error, torch.distributed.DistError) or any(words in text for words in LOST):
        where = text.splitlines()[0].rsplit("] ", 1)[-1][:100]
        return f"another process was lost or stopped ({where}); --resume auto continues a training", 1
    return "", 1


def program(main: Callable[[list[str]], int | None]) -> Callable[[list[str] | None], int]:
    """Decorator of main(argv). The result takes argv (default: the command line) and returns a status.

    ValueError and OSError are about what the user gave: their message is the one line. There is also one
    for a lack of memory and for a lost process. Any other error is a fault of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        for number in range(3):
            # TRAP: in place of a closed stream, the next file that is opened would get what libraries print
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a cp1252 or ascii terminal lacks most characters
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" on rank {rank}"
        try:
            return main(sys.argv[1:] if argv is None else list(argv)) or 0
        except KeyboardInterrupt as stop:
            keep(stop)
            if not where:  # rank 0 says it for all
                say(str(stop) or "stopped", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `program | head`
            return 141
        except Exception as error:
            keep(error)
            line, status = explain(error)
            if not line:
                raise
            say(printable(f"error{where}: {' '.join(line.splitlines())[:1000]}"), file=sys.stderr)
            return status

    return run


def keep(error: BaseException) -> None:
    """Keeps an error of a rank, and with it the local variables of its traceback, until leave().

    TRAP: without it they are released here, a process group of gloo among them. Its destructor waits for a
    thread, which can wait for Python: a rank whose peer was killed then hangs.
    """
    if "WORLD_SIZE" in os.environ:
        KEPT.append(error)


def leave(status: int) -> None:
    """Ends the program.

    TRAP: under torchrun gloo's destructor can hang when the interpreter exits, and with a closed stdout the
    interpreter prints a traceback at its end: both are avoided by os._exit.
    """
    end = os._exit if "WORLD_SIZE" in os.environ else sys.exit
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        end = os._exit
    end(status)
