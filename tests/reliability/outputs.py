"""Folders that cannot be written, files that are in the way, Ctrl-C: one line each, and no result is lost.

Every command runs in a fork of this process, so that changes end with the fork. File modes do not bind root;
a fork therefore gives up that privilege first.
"""

import contextlib
import ctypes
import json
import os
import shlex
import signal
import traceback
from pathlib import Path

from reliability import invocations

MODEL = "--model START --device cpu --batch-size 16"
BED = f"{MODEL} --data DATA/bed"
SCENES = f"{MODEL} --data scenes --limit 8"
TUNED = "--data DATA/bed --init START --seeds 1 --targets sketch --tasks domain-shift"
# OUT is a folder that cannot be written
COMMANDS = f"""
train.py --method clip --train-size 24 --batch-size 8 --steps 1 --threads 1 --device cpu --out OUT
lab.compare {TUNED} --methods finetune --steps 1 --threads 1 --device cpu --out OUT
evaluate.py zeroshot {BED} --out OUT
evaluate.py retrieval {MODEL} --data DATA/pairs.csv --split train --out OUT
evals.open_world {BED} --out OUT
evals.maps {SCENES} --out OUT
evals.typographic {BED} --out OUT
evals.spectrum {BED} --out OUT
evals.linear_probe {BED} --out OUT
pretrained.py START --to huggingface --out OUT
pretrained.py START --to openai --out OUT/x.pt
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --t 9 --out OUT/kept
data.py DATA/pairs.csv --out OUT/x.png
readers.scenes --count 2 --out OUT/x.png
evals.surgery DATA/bed/art/cat/0.png cat --model START --out OUT/x.png
lab.reproduce --claim l1 --quick --seeds 1 --out OUT
lab.bench alignclip --quick --out OUT
"""
PLACES = ("locked", "locked/new", "file", "file/new")
# command | name of a file that is a folder here | result that must exist nevertheless
IN_THE_WAY = f"""
evaluate.py zeroshot {BED} | results.json | the table
evaluate.py zeroshot {BED} | confusion.png | results.json
evaluate.py retrieval {MODEL} --data DATA/pairs.csv --split train | results.json | the table
evals.open_world {BED} | results.json | the table
evals.maps {SCENES} | results.json | the table
evals.maps {SCENES} | maps-1.png | results.json
evals.typographic {BED} | results.json | the table
evals.spectrum {BED} | results.json | the table
evals.spectrum {BED} | spectrum.png | results.json
lab.compare {TUNED} --methods finetune --steps 1 --threads 1 --device cpu | results.json | the table
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --t 9 | kept.json |
"""
LATE = (
    "data.py",
    "readers.scenes",
    "evals.surgery",
    "pretrained.py",
)  # these notice the problem when they write, which is soon


def obey_modes() -> None:
    """Root without CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER obeys file modes like any user."""

    class Head(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Sets(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inherited")]

    libc, head, sets = ctypes.CDLL(None), Head(0x20080522, 0), (Sets * 2)()
    libc.capget(ctypes.byref(head), sets)
    sets[0].effective &= ~0b1110
    libc.capset(ctypes.byref(head), sets)


def interrupt() -> None:
    """Sends Ctrl-C when the command first opens one of its inputs."""
    import sys

    done = []

    def hook(event, args):
        if event == "open" and "/data/" in str(args[0]) and not done:
            done.append(args)
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(hook)


def apart(words: list[str], before=lambda: None) -> tuple[object, str, str]:
    """Runs before() and then the program's main in a fork.   Returns: status, stdout, stderr."""
    ends, lines = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.close(ends)
            # an earlier command may have changed the handler
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            found = invocations.run_here(words)
            with open(lines, "w") as out:
                json.dump(found, out)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(lines)
    with open(ends) as said:
        found = said.read()
    os.waitpid(pid, 0)
    return tuple(json.loads(found)) if found else ("no answer", "", "")


def make_place(root: Path) -> dict[str, str]:
    """Makes the data, a read-only folder and a file.   Returns: the path of each placeholder."""
    place = invocations.make_place(root / "data")
    (root / "locked").mkdir()
    (root / "locked").chmod(0o555)
    (root / "file").write_text("")
    return place


def filled(line: str, place: dict[str, str]) -> list[str]:
    for word, path in place.items():
        line = line.replace(word, path)
    return shlex.split(line)


def unwritable(root: Path, place: dict[str, str], leave_out=()) -> dict:
    """Tries every command with every unwritable place.   Returns: {"tried", "failures"}."""
    tried, failures = 0, []
    for line in COMMANDS.strip().splitlines():
        for name in PLACES if line.split()[0] not in leave_out else ():
            if name == "file" and "OUT/" not in line and line.startswith("baselines.metaclip"):
                continue
            tried += 1
            words = filled(line, place | {"OUT": str(root / name)})
            code, out, err = apart(words, obey_modes)
            wrong = invocations.wrong_in(code, out, err)
            if not wrong and name.split("/")[0] not in err:
                wrong = f"the message does not name the place: {err!r}"
            if not wrong and words[0] not in LATE and (" done in " in err or "|" in out):
                wrong = f"found only after the work: {(out + err)[-300:]!r}"
            failures += [f"{' '.join(words)}: {wrong}"] * bool(wrong)
    left = [p.name for p in (root / "locked").iterdir()]
    return {"tried": tried, "failures": failures + [f"left behind: {left}"] * bool(left)}


def in_the_way(root: Path, place: dict[str, str], leave_out=()) -> dict:
    """Makes a write at the end of the work fail. Without the obstacle, the same command must finish."""
    tried, failures = 0, []
    for number, line in enumerate(IN_THE_WAY.strip().splitlines()):
        line, name, kept = (part.strip() for part in line.split("|"))
        out = root / f"way-{number}"
        (out / name).mkdir(parents=True)
        words = filled(line, place)
        if words[0] in leave_out:
            continue
        words += ["--out", str(out / "kept" if words[0] == "baselines.metaclip" else out)]
        tried += 1
        code, said, err = apart(words)
        wrong = in_one_line(code, said, err, name)
        if kept == "the table":
            wrong = wrong or "" if "| " in said else f"no table: {said!r}"
        elif kept and not (out / kept).is_file():
            wrong = f"no {kept}"
        with contextlib.suppress(OSError):
            (out / name).rmdir()
        again = apart(words)
        if not wrong and (again[0] != 0 or not (out / name).is_file()):
            wrong = f"again: {again}"
        failures += [f"{' '.join(words)} with a folder {name}: {wrong}"] * bool(wrong)
    return {"tried": tried, "failures": failures}


def in_one_line(code, out: str, err: str, name: str) -> str:
    errors = [line for line in err.splitlines() if line.startswith("error")]
    if code != 2 or len(errors) != 1 or "Traceback" in err or name not in errors[0]:
        return f"status {code}: {err[-300:]!r}"
    return ""


def interrupted(root: Path, place: dict[str, str], leave_out=()) -> dict:
    """Sends Ctrl-C to every command: status 130, no traceback, no incomplete file."""
    tried, failures = 0, []
    for number, line in enumerate(COMMANDS.strip().splitlines()):
        if "DATA" not in line and "START" not in line or line.split()[0] in leave_out:
            continue
        tried += 1
        out = root / f"stopped-{number}"
        out.mkdir()
        words = filled(line, place | {"OUT": str(out)})
        code, said, err = apart(words, interrupt)
        wrong = "" if code == 130 and "Traceback" not in err else f"status {code}: {err[-300:]!r}"
        if left := [p for p in out.rglob("*") if p.name not in ("lock", "log.txt") and p.is_file()]:
            wrong = wrong or f"left {left}"
        failures += [f"{' '.join(words)}: {wrong}"] * bool(wrong)
    return {"tried": tried, "failures": failures}
