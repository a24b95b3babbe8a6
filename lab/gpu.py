"""Everything that only a GPU can show, in one command of some minutes.

    python -m lab.gpu --minutes 8                    one GPU with 80 GB, torch 2.6 or newer, no network
    python -m lab.gpu steps inference --minutes 3    some parts
    python -m lab.gpu --rehearse                     the same at toy sizes on the CPU

Parts are commands that run in order of value, each with its own time limit. lab.bench writes its file after
every row, and so does train.py, so that the end of its time loses nothing. Training without a network needs
the vocabulary's path in $ALIGNCLIP_VOCAB.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from lab import bench
from scale import distributed
from util.files import output_folder, write_json
from util.flags import parse
from util.program import leave, program
from util.report import format_table
from util.text import duration

# parts and their sections of lab.bench; tests compares with the CPU, training is Llip and CLIP on --data
PARTS = dict(tests="", objective="objective", steps="towers", finetune="alignclip prompts", inference="llip")
PARTS |= dict(largest="largest", training="")


@dataclass(frozen=True)
class GpuConfig:
    """Flags of this program."""

    parts: tuple[str, ...] = ()  # tests objective steps finetune inference largest training
    minutes: float = 8.0  # for all parts together
    out: str = "runs/gpu"  # folder of the results
    data: str = ""  # captions of real images, as Flickr8k's, for the part training; empty: left out
    rehearse: bool = False  # toy sizes on the CPU


def commands(c: GpuConfig, part: str, device: str) -> list[list[str]]:
    """The commands of a part. Training lasts until its time is over."""
    out = f"{c.out}/{part}"
    if part == "tests":
        return [["-m", "pytest", "-m", "gpu", "-rf", "tests/test_gpu.py"]]
    if part == "training":
        flags = "--model ViT-S-16 --image-size 128 --batch-size 512 --workers 8 --epochs 100 --eval-every 200"
        flags = "--model tiny --train-size 256 --steps 4" if c.rehearse else flags
        flags = [*flags.split(), "--device", device, *["--train-data", c.data] * bool(c.data)]
        methods = ("llip", "clip", "siglip") if c.rehearse or c.data else ()
        return [["train.py", "--method", m, "--out", f"{out}-{m}", *flags] for m in methods]
    flags = f"--device {device} --precision bf16{' --toy --threads 1' * c.rehearse}"
    return [["-m", "lab.bench", *PARTS[part].split(), *flags.split(), "--out", out]]


@program
def main(argv: list[str]) -> None:
    c = parse(GpuConfig, argv, __doc__, positional=("parts",))
    if unknown := [name for name in c.parts if name not in PARTS]:
        raise ValueError(f"part {unknown[0]!r}: there are {', '.join(PARTS)}")
    device = distributed.setup("cpu" if c.rehearse else "cuda")  # a missing GPU ends here, in one line
    out, end, table, parts = output_folder(c.out), time.monotonic() + 60 * c.minutes, [], c.parts or [*PARTS]
    if os.listdir(out):
        raise ValueError(f"{out} is not empty: choose another --out")
    work = [(name, command) for name in parts for command in commands(c, name, device.type)]
    for n, (name, command) in enumerate(work):
        # a share of the time that is left: what a command does not use goes to the later ones
        began = time.monotonic()
        seconds = (end - began) / (len(work) - n)
        print(f"\n{name}: python {' '.join(command)}, at most {duration(seconds)}", flush=True)
        try:
            environment = os.environ | {"ALIGNCLIP_DEVICE": device.type}
            status = subprocess.run([sys.executable, *command], env=environment, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        table.append({"part": name, "status": status, "seconds": time.monotonic() - began})
        about = {"torch": torch.__version__, "machine": bench.machine(device), "parts": table}
        write_json(out / "gpu.json", about)
    print(f"\n{format_table(table)}\nrows in {out}/PART/bench.json and {out}/training-METHOD/metrics.jsonl")
    if failed := [row["part"] for row in table if row["status"] not in (0, "out of time")]:
        raise ValueError(f"did not end well: {', '.join(failed)}")


if __name__ == "__main__":
    leave(main())
