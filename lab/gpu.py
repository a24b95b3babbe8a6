"""Everything that only a GPU can show, in one command of some minutes.

    python -m lab.gpu --minutes 8                    one GPU with 80 GB, torch 2.6 or newer, no network
    python -m lab.gpu steps inference --minutes 3    some parts
    python -m lab.gpu --rehearse                     the same at toy sizes on the CPU

Parts run in order of value, each in its own process and with its own time limit. A part writes OUT/PART.json
after every row, so a fault or the end of its time loses nothing. open_clip and transformers are measured
where they are installed. Without a network, bring their wheels: `pip download open_clip_torch transformers
-d wheels` on another machine, then `pip install --no-index --no-deps --find-links wheels ...`.
"""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product as product_of
from pathlib import Path
from types import SimpleNamespace

import torch

from evals import surgery
from lab import bench, peers
from model import CONFIGS
from scale import costs, distributed
from scale.gradcache import training_step
from util.files import output_folder, write_json
from util.flags import parse
from util.program import leave, program
from util.report import format_table
from util.text import duration, number

# FLOP/s of an H100 or H200, dense bf16
PEAK = 989e12


# fmt: off
@dataclass(frozen=True)
class GpuConfig:
    """Flags of this program."""

    parts: tuple[str, ...] = ()  # tests objective steps finetune inference training; default: all
    minutes: float = 8.0  # for all parts together
    out: str = "runs/gpu"  # folder of the results
    data: str = ""  # captions of real images, as Flickr8k's, for the part training; empty: left out
    rehearse: bool = False  # toy sizes on the CPU
    worker: bool = False  # run one part in this process, as the program itself does
# fmt: on


class Part:
    """One part in this process: its device, the end of its time, and its rows."""

    def __init__(self, c: GpuConfig):
        self.c, self.toy, self.rows, self.end = c, c.rehearse, [], time.monotonic() + 60 * c.minutes
        self.device = distributed.setup("cpu" if c.rehearse else "cuda")
        self.bench = bench.Bench(bench.BenchConfig(device=self.device.type, quick=c.rehearse, threads=1))

    def write(self, rows: list[dict]) -> None:
        self.rows += rows
        write_json(Path(self.c.out) / f"{self.c.parts[0]}.json", self.rows)

    def add(self, **row) -> None:
        print(
            "  ".join(f"{k} {number(v) if isinstance(v, float) else v}" for k, v in row.items()), flush=True
        )
        self.write([row])

    def fits(self, case: Callable) -> bool:
        """Whether the time is not over and the memory suffices."""
        if time.monotonic() >= self.end:
            return False
        try:
            case(self.device)()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    def compare(self, what: str, cases: dict, **columns) -> None:
        """Rows of lab/bench.py for the arms that fit, and a row that says so for the others."""
        fitting = {arm: case for arm, case in cases.items() if self.fits(case)}
        for arm in cases.keys() - fitting.keys():
            self.add(what=what, arm=arm, ms="no memory, or no time")
        if fitting:
            self.bench.rows = []
            self.bench.compare(what, fitting, **columns)
            self.write(self.bench.rows)

    def seconds(self, run: Callable) -> float:
        return statistics.median(bench.alternate({"": run}, self.bench.repeats, self.device)[""])

    def held(self, run: Callable) -> int:
        """Peak bytes of a run, weights included; on a CPU without them."""
        if self.toy:
            return bench.peak_bytes(run, self.device)
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()


def tests(p: Part) -> None:
    """Values and gradients on the GPU against the CPU: the tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rf", *["tests/test_gpu.py"] * p.toy]
    run = subprocess.run(command, env=os.environ | {"ALIGNCLIP_DEVICE": p.device.type})
    p.add(what="pytest -m gpu", status=run.returncode)


def objective(p: Part) -> None:
    """Llip's objective in tiles and as published: error against fp64, time and peak memory."""
    for pairs, tokens in [(16, 4)] if p.toy else [(n, m) for n in (1024, 4096) for m in (32, 64)]:
        forms = {form: partial(bench.objective_case, form) for form in ("tiles", "published")}
        few = (min(pairs, 64), min(pairs, 64), tokens, p.device)
        exact = forms["published"](*few, dtype=torch.float64)()[0]
        for form, case in forms.items():
            p.add(what=f"loss, {tokens} tokens", arm=form, error=(case(*few)()[0] / exact - 1).abs().item())
        cases = {form: partial(case, pairs, pairs, tokens) for form, case in forms.items()}
        cases |= {f"{form} under bf16": partial(in_bf16, case) for form, case in cases.items()}
        p.compare(f"{pairs} x {pairs} pairs, {tokens} tokens", cases, memory=True)


def in_bf16(case: Callable, device: torch.device) -> Callable:
    run, cast = case(device), bench.autocast("bf16", device)

    def under_autocast():
        with cast():
            return run()

    return under_autocast


def step_case(kind: str, name: str, batch: int, device, checkpointing=False, compiled=False) -> Callable:
    """A training step in bf16 as train.py runs it, AdamW included."""
    module, cast = bench.build(kind, CONFIGS[name], device).train(), bench.autocast("bf16", device)
    module.set_grad_checkpointing(checkpointing)
    inputs = bench.random_batch(CONFIGS[name], batch, device)
    call = partial(training_step, torch.compile(module) if compiled else module, *inputs, OBJECTIVE[kind])
    return bench.step_of(module, partial(call, autocast=cast), device, True)


def expected_cost(kind: str, name: str, batch: int, checkpointing: bool) -> tuple[float, float]:
    """FLOPs of a step without recomputation, and GB in all, as --dry-run counts them."""
    module, objective = bench.build(kind, CONFIGS[name], "meta"), OBJECTIVE[kind]
    c = SimpleNamespace(batch_size=batch, accumulate=1, grad_checkpointing=False)
    flops = sum(costs.step_flops(module, c, objective).values())
    held = 16 * costs.parameters(module)["all"] + costs.pair_bytes(module, objective, batch, batch)
    return flops, (held + batch * costs.activation_bytes(module, True, checkpointing)) / 1e9


def steps(p: Part) -> None:
    """Training steps: images per second at the largest batch, MFU, memory against --dry-run, and peers."""
    n, start, limit = (256, 4, 4) if p.toy else (8192, 64, 2**14)
    a = torch.randn(n, n, device=p.device, dtype=torch.bfloat16)
    product = 2 * n**3 / p.seconds(lambda: a @ a)
    p.add(what=f"product of {n} x {n} matrices, bf16", TFLOPs=product / 1e12)
    for name in ("tiny",) if p.toy else ("ViT-B-32", "ViT-B-16", "ViT-L-14"):
        cases = {kind: partial(step_case, kind, name, start) for kind in OBJECTIVE}
        p.compare(f"{name} step, bf16, batch {start}", cases)
        cases = {k: partial(bench.step_case, k, name, start, "bf16") for k in ("clip", *peers.installed())}
        p.compare(f"{name} step, bf16, batch {start}, other packages", cases)
        for kind, checkpointing in product_of(OBJECTIVE, (False, True)):
            case, batch = partial(step_case, kind, name, checkpointing=checkpointing), start
            while batch < limit and p.fits(partial(case, 2 * batch)):
                batch *= 2
            flops, expected = expected_cost(kind, name, batch, checkpointing)
            for compiled in (False, True)[: 2 - p.toy]:
                if not p.fits(run := partial(case, batch, compiled=compiled)):
                    continue
                run = run(p.device)
                seconds, what = p.seconds(run), " checkpointing" * checkpointing + " compiled" * compiled
                row = {"batch": batch, "images/s": batch / seconds, "MFU %": 100 * flops / seconds / PEAK}
                row |= {"% of the product": 100 * flops / seconds / product, "GB expected": expected}
                p.add(what=f"{name}{what}", arm=kind, **row, **{"GB": p.held(run) / 1e9})
                del run


def finetune(p: Part) -> None:
    """Steps of fine-tuning over CLIPood as published. The paper has 0.19 s, D-V 0.21 s and V-V-V 0.25 s."""
    arms = {"CLIPood as published": ("clipood", {"published": True}), "CLIPood": ("clipood", {})}
    arms |= {f"AlignCLIP {branch}": ("alignclip", {"branch": branch}) for branch in ("dv", "vvv")}
    arms |= {method: (method, {"context_words": ""}) for method in ("coop", "cocoop", "maple")}
    name = "tiny" if p.toy else "ViT-B-16"
    for batch in (4,) if p.toy else (36, 108):
        cases = {
            arm: partial(bench.finetune_case, method, name, batch, **flags)
            for arm, (method, flags) in arms.items()
        }
        p.compare(f"{name} fine-tuning step, batch {batch}", cases, memory=True)


def map_case(method: str, name: str, device) -> Callable:
    """The features of every token of one image, as a heat map needs them."""
    model, batch = bench.build("clip", CONFIGS[name], device), bench.random_batch(CONFIGS[name], 1, device)
    return torch.no_grad()(partial(surgery.dense_features, model.visual, batch[0], method))


def inference(p: Part) -> None:
    """Llip over CLIP by the number of prompts (the paper has 1.22 at 1,000), and heat maps of one image."""
    name, batch = ("tiny", 4) if p.toy else ("ViT-L-14", 256)
    for prompts in (10, 100) if p.toy else (10, 100, 1000, 10000):
        cases = {k: partial(bench.prompts_case, k, name, batch, prompts, "bf16") for k in ("clip", "llip")}
        p.compare(f"{name}, {batch} images, {prompts} prompts", cases)
    p.compare(f"{name} heat map", {method: partial(map_case, method, name) for method in surgery.METHODS})


def training(p: Part) -> None:
    """Real training: Llip, CLIP and SigLIP on the captions of --data, a third of the time for each."""
    flags = "--model ViT-S-16 --image-size 128 --batch-size 512 --workers 8 --epochs 100 --eval-every 200"
    flags = "--model tiny --train-size 256 --steps 4" if p.toy else flags
    third = (p.end - time.monotonic()) / 3
    for method in OBJECTIVE if p.toy or p.c.data else ():
        out = Path(p.c.out) / f"training-{method}"
        command = [sys.executable, "train.py", "--method", method, "--out", str(out), *shlex.split(flags)]
        command += ["--device", p.device.type] + ["--train-data", p.c.data] * bool(p.c.data)
        run = subprocess.Popen(command)
        try:
            run.wait(third)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGTERM)  # which saves
            run.wait()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        p.add(what=f"training {method}", status=run.returncode, **{k: v for x in lines for k, v in x.items()})


OBJECTIVE = {"llip": "siglip", "clip": "infonce", "siglip": "siglip"}
PARTS = {f.__name__: f for f in (tests, objective, steps, finetune, inference, training)}


@program
def main(argv: list[str]) -> None:
    c = parse(GpuConfig, argv, __doc__, positional=("parts",))
    if unknown := [name for name in c.parts if name not in PARTS]:
        raise ValueError(f"part {unknown[0]!r}: there are {', '.join(PARTS)}")
    # a missing GPU ends here, in one line
    device = distributed.setup("cpu" if c.rehearse else "cuda")
    if c.worker:
        PARTS[c.parts[0]](Part(c))
        return
    out, end, table, parts = output_folder(c.out), time.monotonic() + 60 * c.minutes, [], c.parts or [*PARTS]
    if os.listdir(out):
        raise ValueError(f"{out} is not empty: choose another --out")
    for n, name in enumerate(parts):
        # an equal share of the time that is left: what a part does not use goes to the later ones
        began, file = time.monotonic(), out / f"{name}.json"
        seconds = (end - began) / (len(parts) - n)
        print(f"\n{name}: {PARTS[name].__doc__.splitlines()[0]} At most {duration(seconds)}.", flush=True)
        flags = ["--worker", "--out", c.out, "--minutes", str(seconds / 60)]
        flags += ["--data", c.data] * bool(c.data) + ["--rehearse"] * c.rehearse
        try:
            command = [sys.executable, "-m", "lab.gpu", name, *flags]
            status = subprocess.run(command, timeout=1.2 * seconds).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        rows = len(json.loads(file.read_text())) if file.exists() else 0
        table.append({"part": name, "status": status, "rows": rows, "seconds": time.monotonic() - began})
        about = {"torch": torch.__version__, "machine": bench.machine(device), "parts": table}
        write_json(out / "gpu.json", about)
    print(f"\n{format_table(table)}\nrows in {out}/PART.json")
    if failed := [row["part"] for row in table if row["status"]]:
        raise ValueError(f"did not end well: {', '.join(failed)}")


if __name__ == "__main__":
    leave(main())
