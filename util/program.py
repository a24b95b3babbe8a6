"""What every program of this project does at its edges: errors become one line and an exit status.

status 0    done
status 1    another process of the run was lost
status 2    a value, a file or a flag is wrong; one line on stderr says which and what to do
status 130  stopped by Ctrl-C
"""

import functools
import os
import sys
from collections.abc import Callable

import torch

from util.text import say

# what torch says when another rank or a loader worker was killed, mostly because memory ran out
LOST = "Connection closed by peer, Connection reset by peer, Broken pipe, Socket Timeout, DataLoader worker"


def program(main: Callable[[list[str]], int | None]) -> Callable[[list[str] | None], int]:
    """Decorator of main(argv). The result takes argv (default: the command line) and returns a status.

    ValueError and OSError are about what the user gave: their message is the one line. Any other error is a
    fault of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a cp1252 or ascii terminal lacks most characters
        rank, status = os.environ.get("RANK", "0"), 2
        where = "" if rank == "0" else f" on rank {rank}"
        try:
            return main(sys.argv[1:] if argv is None else list(argv)) or 0
        except KeyboardInterrupt as stop:
            if where:  # rank 0 says it for all
                return 130
            line, status = str(stop) or "stopped", 130
        except BrokenPipeError:  # `program | head`
            return 141
        except (MemoryError, RecursionError) as error:
            line = f"error{where}: not enough memory or a file nested too deeply ({type(error).__name__})"
        except torch.cuda.OutOfMemoryError:
            line = "error: out of GPU memory: try a smaller --batch-size"
        except (ValueError, OSError) as error:
            line = f"error{where}: {error}"
        except RuntimeError as error:
            words, status = [words for words in LOST.split(", ") if words in str(error)], 1
            if not words:
                raise
            line = f"error{where}: another process was lost ({words[0]}); --resume auto continues a run"
        say(line, file=sys.stderr)
        return status

    return run


def leave(status: int) -> None:
    """Ends the program.

    TRAP: under torchrun gloo's destructor can hang when the interpreter exits, and with a closed stdout the
    interpreter prints a traceback at its end: both are avoided by os._exit.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        os._exit(status)
    if "WORLD_SIZE" in os.environ:
        os._exit(status)
    sys.exit(status)
