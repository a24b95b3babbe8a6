"""Files that are never half written, and files of a folder that may come from a stranger.

Every file of this project is written under a temporary name, which ends in PART, synced, and then renamed. A
kill or a full disk therefore leaves either the old file or the new one.
"""

import contextlib
import io
import json
import os
import stat
import tempfile
from pathlib import Path

PART = ".alignclip-part"


def open_file(path: str | Path, mode: str = "rb", **options):
    """open() for reading; a ValueError at once for what could make us wait for ever, also behind a link."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is a folder, pipe, socket or device, not a file")
    return open(path, mode, **options)


def read_text(path: str | Path, errors: str = "strict") -> str:
    with open_file(path, "r", encoding="utf-8-sig", errors=errors, newline="") as file:
        return file.read()


@contextlib.contextmanager
def replacing(path: str | Path):
    """A binary file that replaces `path` if the block ends without an error.   Raises: OSError, one line."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        part.unlink(missing_ok=True)  # of an earlier process with this number, which was killed
        with open(part, "x+b") as file:  # never through a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        with contextlib.suppress(OSError):  # the rename survives a power cut; Windows does not open folders
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        # TRAP: torch.save closes its zip after a failed write, fails again, and reports only that
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        # the message of a full disk does not name a file
        raise OSError(f"cannot write {path}: {getattr(reason, 'strerror', None) or reason}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | Path, content) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_image(path: str | Path, image) -> None:
    """Writes a Pillow image in the format of the file's name.   Raises: ValueError for an unknown format."""
    file = io.BytesIO()
    file.name = str(path)  # Pillow takes the format from this name
    image.save(file)
    write_bytes(path, file.getvalue())


def output_folder(path: str | Path) -> Path:
    """Makes a folder and tries to write in it, before the work begins.   Raises: OSError, one line."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = "it is a file, not a folder" if os.path.isfile(path) else error.strerror or error
        raise OSError(f"cannot write in {path}: {reason}") from error
    return path


def open_own(path: str | Path, flags: int):
    """Opens or makes a regular file for writing with flags of os.open.   Raises: OSError, also for a link."""
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise OSError(f"cannot write {path}: it is a link, a folder, a pipe or a device")
    flags |= os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return open(os.open(path, flags, 0o666), "a" if flags & os.O_APPEND else "r+b")


def lock(file, wait: bool = False) -> bool:
    """Locks an open file until the process ends; False where the disk or the system has no locks.

    TRAP: lockf, not flock: loader workers would inherit a lock of flock, outlive a killed run by seconds, and
    keep its successor out.   Raises: BlockingIOError if another process holds it and wait is False.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError(str(error)) from error
    except OSError:  # some network disks
        return False
    return True
