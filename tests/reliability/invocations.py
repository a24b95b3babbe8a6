"""Wrong invocations of every command line: exit status 2, one line that begins with an error, no traceback.

Each line of the table is one command: a program of the root, or a module that `python -m` runs, and flags.
START is a small CLIP, DATA a folder with a list, images, and files whose contents do not fit their names.
"""

import contextlib
import importlib
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WRONG = """
train.py --method clap
train.py --method clip --margin 0.9
train.py --method clip --tes-weight 7
train.py --method
train.py --method llip extra
train.py --model ViT-B
train.py --preset llip
train.py --learning-rate 1
train.py --lr fast
train.py --lr 0
train.py --lr -1
train.py --lr nan
train.py --lr inf
train.py --comp
train.py --steps 0
train.py --steps -5
train.py --steps 1.5
train.py --epochs -1
train.py --batch-size 0
train.py --batch-size 8 --train-size 4
train.py --batch-size 7 --accumulate 2 --train-size 16
train.py --accumulate 0
train.py --mixture-tokens 0
train.py --mixture-heads 0
train.py --mixture-heads 5 --train-size 16
train.py --temperature 0
train.py --temperature nan
train.py --crop-scale 0
train.py --crop-scale 2
train.py --eps 0
train.py --beta1 1.5
train.py --beta2 -0.1
train.py --beta2 1
train.py --weight-decay -1
train.py --warmup -1
train.py --clip-norm -1
train.py --image-size -8
train.py --image-size 31 --train-size 16
train.py --workers -1 --train-size 16
train.py --threads -1
train.py --log-every 0
train.py --save-every 0
train.py --eval-every -1
train.py --overfit -1
train.py --train-size 0
train.py --seed x
train.py --seed -1 --train-size 16
train.py --precision fp16
train.py --objective hinge
train.py --optimizer adam
train.py --device tpu
train.py --device cuda:99
train.py --logit-scale -1
train.py --train-data nowhere.csv
train.py --train-data DATA/empty.csv
train.py --train-data DATA/broken.json
train.py --train-data DATA/not-a.tar
train.py --train-data DATA/pairs.csv --caption-key title2
train.py --train-data DATA/pairs.csv --image-key nothing
train.py --train-data DATA/pairs.csv --image-root nowhere
train.py --train-data DATA/pairs.csv --batch-size 1000
train.py --train-data DATA/pairs.csv --vocab nowhere.txt
train.py --train-data DATA/pairs.csv --vocab DATA/pairs.csv
train.py --train-data DATA/outside.csv
train.py --train-data START
train.py --init nowhere.pt
train.py --init RN50
train.py --init DATA/pairs.csv
train.py --init START --method llip --vocab learn --train-size 16
train.py --init START --image-size 64 --train-size 16
train.py --resume nowhere --train-size 16
train.py --out DATA/pairs.csv --train-size 16
train.py --method alignclip
train.py --method alignclip --init START --train-data nowhere
train.py --method alignclip --init START --train-data DATA/bed
train.py --method alignclip --init START --train-data DATA/bed --target-domain moon
train.py --method alignclip --init START --train-data DATA/bed --target-domain sketch --open-task none
train.py --method alignclip --init START --train-data DATA/bed --target-domain sketch --batch-size 7
train.py --method alignclip --init START --train-data DATA/bed --target-domain sketch --branch qkk
train.py --method alignclip --init START --train-data DATA/bed --target-domain sketch --similarity some
train.py --method alignclip --init START --train-data DATA/bed --target-domain sketch --align-layers 99
train.py --method alignclip --init START --train-data DATA/bed --target-domain sketch --epsilon 2
train.py --method alignclip --init START --train-data DATA/bed --target-domain sketch --smoothing much
train.py --method alignclip --init START --train-data DATA/bed --target-domain sketch --template noplace
train.py --method clipood --init START --train-data DATA/bed --target-domain sketch --shots -1
train.py --method coop --init START --train-data DATA/bed --target-domain sketch --context 999
train.py --method coop --init START --train-data DATA/bed --target-domain sketch --context-position top
train.py --method maple --init START --train-data DATA/bed --target-domain sketch --prompt-depth 99
evaluate.py
evaluate.py juggle --model START --data scenes
evaluate.py open-world --model START --data DATA/bed
evaluate.py linear-probe --model START --data DATA/bed
evaluate.py zeroshot --model START
evaluate.py zeroshot --data scenes
evaluate.py zeroshot --model nowhere --data scenes
evaluate.py zeroshot --model START --data nowhere
evaluate.py zeroshot --model START --data scenes --limit 0
evaluate.py zeroshot --model START --data scenes --limit x
evaluate.py zeroshot --model START --data scenes --batch-size 0
evaluate.py zeroshot --model START --data scenes --precision int8
evaluate.py zeroshot --model START --data scenes --device moon
evaluate.py zeroshot --model START --data scenes --split tomorrow
evaluate.py zeroshot --model START --data scenes --limit 16 --workers -1
evaluate.py zeroshot --model START --data scenes --vision-heads 3
evaluate.py zeroshot --model START --data scenes --no-quick-gelu --pooling sum
evaluate.py zeroshot --model START --data scenes --limit 16 --templates nowhere.txt
evaluate.py zeroshot --model START --data scenes --limit 16 --vocab nowhere
evaluate.py zeroshot --model START --data DATA/pairs.csv
evaluate.py zeroshot --model START --data DATA/bed --out DATA/pairs.csv
evaluate.py retrieval --model START --data DATA/bed
evaluate.py retrieval --model START --data DATA/pairs.csv --split summer
evaluate.py retrieval --model DATA/damaged.pt --data scenes
evaluate.py retrieval --model DATA/bed --data scenes
evals.linear_probe --model START --data DATA/bed --precision magic
evals.linear_probe --model START --data DATA/bed --batch-size 0
evals.open_world --model START --data DATA/bed --limit 3
evals.open_world --model START --data DATA/bed --target-domain moon --open-task domain-shift
evals.maps --model START --data scenes --limit -1
evals.mixtures --model START
evals.mixtures --model START --image DATA/bed/art/cat/0.png
evals.mixtures --data scenes
evals.spectrum --model START --data nowhere
evals.spectrum --model START
evals.typographic --model START --data nowhere
evals.typographic --data DATA/bed
evals.maps --model START --data DATA/bed --target x
evals.linear_probe --model START --data DATA/pairs.csv
evals.open_world --model nowhere --data DATA/bed
pretrained.py
pretrained.py nowhere.pt
pretrained.py RN50x64
pretrained.py DATA/damaged.pt
pretrained.py DATA/pairs.csv
pretrained.py DATA
pretrained.py START --to openai
pretrained.py START --to tensorflow --out x
pretrained.py START --vision-heads 3
pretrained.py START --temperature hot
pretrained.py START --to huggingface --out DATA/pairs.csv
pretrained.py START --to openai --out DATA/pairs.csv/x.pt
tokenizer.py text --vocab nowhere
tokenizer.py text --vocab DATA/pairs.csv
data.py
data.py nowhere
data.py DATA/empty.csv
data.py DATA/outside.csv
data.py DATA/broken.json
data.py DATA/not-a.tar
data.py DATA/pairs.csv --split summer
data.py DATA/pairs.csv --caption-key no
data.py DATA/pairs.csv --out nowhere/sheet.png
data.py DATA/pairs.csv --out DATA/sheet.unknown
data.py 'DATA/{00..01}.tar'
data.py 'DATA/{02..01}.tar'
readers.scenes --count 0 --out DATA/s.png
readers.scenes --count -1 --out DATA/s.png
readers.scenes --split summer --out DATA/s.png
readers.scenes --domain moon --out DATA/s.png
readers.scenes --count 2 --out nowhere/s.png
evals.surgery DATA/bed/art/cat/0.png cat --out DATA/m.png
evals.surgery DATA/bed/art/cat/0.png cat --model nowhere --out DATA/m.png
evals.surgery DATA/bed/art/cat/0.png --model START --out DATA/m.png
evals.surgery nowhere.png cat --model START --out DATA/m.png
evals.surgery DATA/pairs.csv cat --model START --out DATA/m.png
evals.surgery DATA/bed/art/cat/0.png cat --model START --out DATA/m.png --method magic
evals.surgery DATA/bed/art/cat/0.png cat --model START --out nowhere/m.png
baselines.metaclip nowhere.tsv --build-entries 1 --t 9 --out DATA/kept
baselines.metaclip DATA/pairs.csv --t 9 --out DATA/kept
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --out DATA/kept
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --t 9
baselines.metaclip DATA/pairs.csv --entries nowhere --column title --t 9 --out DATA/kept
baselines.metaclip DATA/pairs.csv --entries DATA/broken.json --column title --t 9 --out DATA/kept
baselines.metaclip DATA/pairs.csv --entries DATA/broken.json --build-entries 1 --t 9 --out DATA/kept
baselines.metaclip DATA/pairs.csv --build-entries 0 --column title --t 9 --out DATA/kept
baselines.metaclip DATA/pairs.csv --build-entries 1 --column nothing --t 9 --out DATA/kept
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --t -1 --out DATA/kept
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --t 9 --tail-share 2 --out DATA/kept
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --t 9 --out DATA/pairs.csv/kept
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --t 9 --out DATA/pairs.csv
lab.compare
lab.compare --scenes --tasks juggle
lab.compare --scenes --methods magic
lab.compare --scenes --seeds 0
lab.compare --data nowhere --init START
lab.compare --data DATA/bed
lab.compare --data DATA/bed --init START --targets moon
lab.compare --scenes --seed 3
baselines.metaclip DATA/pairs.csv --build-entries 1 --column title --t 9 --out DATA
baselines.metaclip DATA/pairs.csv --build 1 --column title --t 9 --out DATA/kept
tokenizer.py text --voc DATA/pairs.csv
data.py DATA/pairs.csv --spl train --out DATA/s.png
readers.scenes --coun 3 --out DATA/s.png
evals.surgery DATA/bed/art/cat/0.png cat --mod START --out DATA/m.png
pretrained.py START --temperat 3
evaluate.py zeroshot --model START --dat scenes
lab.bench juggle
lab.bench loss --repeats 1
lab.bench loss --precision fp16
lab.bench loss --repeat 9
lab.bench loss --device moon
lab.reproduce
lab.reproduce --claim nothing
lab.reproduce --all --claim l1
lab.reproduce --all --data DATA/pairs.csv
lab.reproduce --claim l1 --seeds 0
lab.reproduce --claim l1 --jobs 0
lab.reproduce --claim a4 --target sketch
lab.reproduce --clai l1
lab.reproduce --list --device moon
"""


def make_place(root: Path) -> dict[str, str]:
    """Makes the data and returns the path of each placeholder of the table."""
    from reliability.kills import make_data

    make_data(root)
    (root / "empty.csv").write_text("")
    (root / "broken.json").write_text('{"images": [')
    (root / "not-a.tar").write_text("this is no archive")
    (root / "outside.csv").write_text("filepath,title\nbed/art/cat/0.png,a\n../../etc/passwd,b\n")
    whole = (root / "start" / "checkpoint.pt").read_bytes()
    (root / "damaged.pt").write_bytes(whole[: len(whole) // 2])
    return {"DATA": str(root), "START": str(root / "start")}


def commands(place: dict[str, str]) -> list[list[str]]:
    """Every line of the table as words. Runs write below DATA."""
    found = []
    for number, line in enumerate(WRONG.strip().splitlines()):
        for word, path in place.items():
            line = line.replace(word, path)
        words = shlex.split(line)
        if words[0] in ("train.py", "lab.compare") and "--out" not in words:
            words += ["--out", f"{place['DATA']}/out-{number}"]
        if words[0] == "train.py" and "--train-size" not in words:
            # a mistake that is found late must not take a minute
            words += ["--train-size", "96"]
        found.append(words)
    return found


def wrong_in(code: object, out: str, err: str) -> str:
    """What is wrong with the outcome of a wrong command; "" if it is status 2 with one line of error."""
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    if code != 2:
        return f"status {code}: {err[-300:]!r}"
    if "Traceback" in err + out:
        return f"traceback: {err[-300:]!r}"
    # argparse prints the usage above its own message
    usage = lines and lines[0].startswith("usage: ")
    errors = [line for line in lines if line.startswith("error") or ": error: " in line]
    progress = [line for line in lines if " done in " in line]
    if len(errors) != 1 or (not usage and len(lines) - len(progress) != 1):
        return f"not one line of error: {err[-300:]!r}"
    return "" if errors[0].isprintable() else f"control characters: {errors[0]!r}"


class TooLong(BaseException):
    """A wrong command that did not stop within a minute."""


def too_long(*_):
    raise TooLong


def run_here(words: list[str]) -> tuple[object, str, str]:
    """Runs the program's main in this process.   Returns: status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    signals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(words[0].removesuffix(".py")).main(words[1:])
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    signal.alarm(0)
    for number, handler in signals.items():
        signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def run_apart(words: list[str]) -> tuple[object, str, str]:
    program = [str(ROOT / words[0])] if words[0].endswith(".py") else ["-m", words[0]]
    command = [sys.executable, *program, *words[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def check(place: dict[str, str], every: int = 1, apart: int = 0) -> dict:
    """Tries each `every`-th command in this process, and `apart` of them as new processes.

    Returns: {"tried", "seconds", "failures"}
    """
    began, failures, slowest = time.monotonic(), [], (0.0, "")
    todo = commands(place)[::every]
    before, empty = os.getcwd(), Path(place["DATA"]) / "elsewhere"
    empty.mkdir()
    os.chdir(empty)
    for words in todo:
        start = time.monotonic()
        wrong = wrong_in(*run_here(words))
        slowest = max(slowest, (time.monotonic() - start, " ".join(words)))
        if wrong:
            failures.append(f"{' '.join(words)}: {wrong}")
    chosen = todo[:: max(1, len(todo) // apart)][:apart] if apart else []
    for words in chosen:
        if wrong := wrong_in(*run_apart(words)):
            failures.append(f"as a process: {' '.join(words)}: {wrong}")
    os.chdir(before)
    if left := [p.name for p in empty.iterdir()]:
        failures.append(f"left behind: {left}")
    seconds = time.monotonic() - began
    return {"tried": len(todo) + len(chosen), "seconds": seconds, "slowest": slowest, "failures": failures}


if __name__ == "__main__":
    import tempfile

    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        found = check(make_place(Path(folder) / "data"))
        print(found["tried"], found["seconds"], found["slowest"], len(found["failures"]))
        print(*found["failures"], sep="\n")
