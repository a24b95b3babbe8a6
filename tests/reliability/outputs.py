"""Places that cannot be written, files that are in the way, Ctrl-C: one line, and no figure is lost.

Every command here runs in a fork of this process, so that what is done to it ends with it. Root obeys no
modes; a fork gives up that privilege first, which an ordinary user does not have.
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
TUNED = "--data DATA/bed --init START --quick --targets sketch --tasks domain-shift"
# OUT is a folder, or a file in it, that cannot be written
COMMANDS = f"""
train.py --method clip --train-size 24 --batch-size 8 --steps 1 --threads 1 --device cpu --out OUT
lab.compare {TUNED} --methods finetune --steps 1 --threads 1 --device cpu --out OUT
evaluate.py zeroshot {BED} --out OUT
evaluate.py retrieval {MODEL} --data DATA/pairs.csv --split train --out OUT
evals.open_world {BED} --out OUT
evals.maps {SCENES} --out OUT
evals.typographic {BED} --out OUT
evals.spectrum {BED} --out OUT
evals.linear_probe {BED} --solvers l-bfgs --seeds 1 --out OUT
pretrained.py START --to huggingface --out OUT
pretrained.py START --to openai --out OUT/x.pt
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --t 9 --out OUT/kept
data.py DATA/pairs.csv --size 16 --out OUT/x.png
readers.scenes --count 2 --out OUT/x.png
evals.surgery DATA/bed/art/cat/0.png cat --model START --out OUT/x.png
lab.reproduce --claim l1 --quick --seeds 1 --out OUT
lab.bench wire --quick --out OUT
"""
PLACES = ("locked", "locked/new", "file", "file/new")
# a folder lies where this file should: command, file, and what must be there all the same
IN_THE_WAY = f"""
evaluate.py zeroshot {BED} | results.json | the table
evaluate.py zeroshot {BED} | confusion.png | results.json
evaluate.py retrieval {MODEL} --data DATA/pairs.csv --split train | results.json | the table
evals.open_world {BED} | results.json | the table
evals.maps {SCENES} --show 1 --structures vvv | results.json | the table
evals.maps {SCENES} --show 1 --structures vvv | maps-1.png | results.json
evals.typographic {BED} | results.json | the table
evals.typographic {BED} | typographic.png | results.json
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
)  # find out when they write, soon enough


def obey_modes() -> None:
    """Root without CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER: as an ordinary user before a mode."""

    class Head(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Sets(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inherited")]

    libc, head, sets = ctypes.CDLL(None), Head(0x20080522, 0), (Sets * 2)()
    libc.capget(ctypes.byref(head), sets)
    sets[0].effective &= ~0b1110
    libc.capset(ctypes.byref(head), sets)


def interrupt() -> None:
    """Ctrl-C at the moment when the command first opens what it was given."""
    import sys

    done = []

    def hook(event, args):
        if event == "open" and "/data/" in str(args[0]) and not done:
            done.append(args)
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(hook)


def apart(words: list[str], before=lambda: None) -> tuple[object, str, str]:
    """before(), then the command's main, in a fork: status, stdout, stderr."""
    ends, lines = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.close(ends)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran here before
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
    """The words that stand for paths; beside the data a folder that nobody may write, and a file."""
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
    """Every command on every place.   Returns: {"tried", "failures"}."""
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
                wrong = f"the place is not named: {err!r}"
            if not wrong and words[0] not in LATE and (" done in " in err or "|" in out):
                wrong = f"only found out after the work: {(out + err)[-300:]!r}"
            failures += [f"{' '.join(words)}: {wrong}"] * bool(wrong)
    left = [p.name for p in (root / "locked").iterdir()]
    return {"tried": tried, "failures": failures + [f"left behind: {left}"] * bool(left)}


def in_the_way(root: Path, place: dict[str, str], leave_out=()) -> dict:
    """Failing writes at the end of the work; the file in the way gone, the same command finishes."""
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
    """Ctrl-C in every command: status 130, a line at most, no traceback, nothing half written."""
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
