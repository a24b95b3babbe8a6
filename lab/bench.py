"""Speed and memory as ratios: the arms of a comparison take turns in one run; median and quartiles.

    python -m lab.bench --threads 1                     everything, on the CPU
    python -m lab.bench objective llip --device cuda    some sections, on a GPU
    python -m lab.bench --quick --threads 1             small shapes, compared with docs/speed.md

On a shared machine only ratios of arms that alternate mean something. Every repetition runs each arm once,
and the table shows the median of the ratios to the first arm. On a CPU with --threads 1 the time is that of
this process, so that other processes hardly count. open_clip and transformers are measured where they are
installed. Weights are random. lab/reproduce.py takes the timings of claims from here.
"""

import contextlib
import gc
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import losses
import model as models
import train
from baselines.methods import METHODS
from clipood import Classes, unit
from evaluate import map_features
from lab import peers
from model import CONFIGS
from scale import distributed
from scale import llip_tiles as tiles
from scale.gradcache import training_step
from util.files import output_folder, write_json
from util.flags import parse
from util.program import leave, program
from util.report import format_table


# fmt: off
@dataclass(frozen=True)
class BenchConfig:
    """Flags of this program."""

    sections: tuple[str, ...] = ()  # objective towers alignclip prompts llip; default: all
    device: str = "auto"  # cpu, cuda or auto
    threads: int = 0  # CPU threads; 0: torch's choice; 1 on a shared machine
    precision: str = "fp32"  # of the towers: fp32 or bf16
    repeats: int = 5  # of every arm, after one run that is not measured
    quick: bool = False  # small shapes; the ratios are compared with those of docs/speed.md
    batch: int = 0  # images of a tower's step; 0: 2 on a CPU, 64 on a GPU
    large: str = "ViT-L-14"  # the model of section llip
    out: str = "runs/bench"  # folder of bench.json; empty: none
# fmt: on


SPEED = Path(__file__).parent.parent / "docs" / "speed.md"


# Measuring -------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds: on a GPU after its work is done, on one CPU thread those of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def alternate(arms: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list]:
    """Seconds of every arm in each repetition; all arms run once before anything is measured."""
    for run in arms.values():
        run()
    seconds = {name: [] for name in arms}
    for k in range(repeats):
        for name in list(arms) if k % 2 == 0 else list(arms)[::-1]:
            gc.collect()
            start = clock(device)
            arms[name]()
            seconds[name].append(clock(device) - start)
    return seconds


def peak_bytes(run: Callable, device: torch.device) -> int:
    """Peak of the memory that torch allocates during a run: inputs and weights are not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities, now, peak = [torch.profiler.ProfilerActivity.CPU], 0, 0
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def counted_flops(case: Callable) -> int:
    """FLOPs of a case as torch counts them.

    TRAP: the fused attention of the CPU is not counted, so the case runs on the meta device, whose tensors
    have no values to compare and no autocast.
    """
    real = torch.allclose, torch.autocast
    try:
        torch.allclose, torch.autocast = lambda *a, **k: True, lambda *a, **k: contextlib.nullcontext()
        with FlopCounterMode(display=False) as counter:
            case(torch.device("meta"))()
    finally:
        torch.allclose, torch.autocast = real
    return counter.get_total_flops()


class Bench:
    """The rows of one run."""

    def __init__(self, c: BenchConfig):
        self.c, self.device = c, distributed.setup(c.device)
        if c.threads:
            torch.set_num_threads(c.threads)
        self.repeats = c.repeats
        self.batch = c.batch or (64 if self.device.type == "cuda" else 2)
        self.rows, self.section = [], ""

    def compare(self, what: str, cases: dict, flops: bool = False, memory: bool = False) -> None:
        """Alternates the cases {arm: function of a device, which returns what is timed}; adds their rows."""
        arms = {name: case(self.device) for name, case in cases.items()}
        seconds = alternate(arms, self.repeats, self.device)
        counts, base = {}, next(iter(cases))
        if flops:
            counts["FLOPs"] = {name: counted_flops(case) for name, case in cases.items()}
        if memory:
            counts["peak MiB"] = {name: peak_bytes(run, self.device) / 2**20 for name, run in arms.items()}
        for name, taken in seconds.items():
            ratios = [a / b for a, b in zip(taken, seconds[base])]
            row = {"section": self.section, "what": what, "arm": name, "ms": 1e3 * statistics.median(taken)}
            row |= {"ratio": statistics.median(ratios), "ratios": ratios}
            for column, values in counts.items():
                row |= {column: values[name], f"{column} ratio": values[name] / values[base]}
            self.rows.append(row | getattr(arms[name], "about", {}))
            print(f"{what:44} {name:22} {row['ms']:10.2f} ms  x {row['ratio']:.3f}", flush=True)

    def finish(self) -> None:
        """Prints the table and what became slower, and writes bench.json."""
        shown = []
        for row in self.rows:
            low, _, high = statistics.quantiles(row["ratios"], n=4, method="inclusive")
            some = {k: v for k, v in row.items() if k != "ratios"}
            shown.append(some | {"quartiles": f"{low:.3f}-{high:.3f}"})
        print("\n" + format_table(shown))
        if self.c.quick:
            print("\n".join(slower(shown, SPEED.read_text())))
        if self.c.out:
            about = {"torch": torch.__version__, "machine": machine(self.device), "config": asdict(self.c)}
            write_json(Path(self.c.out) / "bench.json", about | {"rows": self.rows})
            print(f"written to {Path(self.c.out) / 'bench.json'}")


def slower(rows: list[dict], recorded: str) -> list[str]:
    """A line for each ratio that is worse than its row in a Markdown table by more than the spread of both.

    The table's columns are what, arm, ratio, quartiles. Our arms should be low, those of other packages high.
    """
    found = re.findall(r"^\| (.+?) +\| (.+?) +\| +([\d.]+) \| ([\d.]+)-([\d.]+) +\|$", recorded, flags=re.M)
    before = {(what.strip(), arm): tuple(map(float, numbers)) for what, arm, *numbers in found}
    lines, count = [], 0
    for row in rows:
        if old := before.get((row["what"], row["arm"])):
            count += 1
            low, high = map(float, row["quartiles"].split("-"))
            other = row["arm"] in peers.PEERS
            if (high < old[1] and other) or (low > old[2] and not other):
                lines.append(
                    f"slower: {row['what']}, {row['arm']}: {row['ratio']:.3f}, recorded {old[0]:.3f}"
                )
    return [
        *lines,
        f"{count} ratios compared with docs/speed.md, {len(lines)} worse by more than their spread",
    ]


def machine(device: torch.device) -> str:
    """The GPU, or the processor and the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else 'a CPU'}"


# Cases: functions of a device that build their inputs and return what is timed ------------------------------


def objective_case(
    form: str, rows: int, columns: int, tokens: int, device, heads=8, width=512, dtype=torch.float32
) -> Callable:
    """Pair logits, sigmoid loss and backward of random pairs: as published, or in tiles."""
    g, K = torch.Generator().manual_seed(0), width // heads
    shapes = [(rows, heads, tokens, K)] * 2 + [(columns, heads, K), (columns, width), (width, width)]
    # keys, values, queries, text, W_O
    inputs = [torch.randn(shape, generator=g) for shape in shapes]
    inputs[-1] *= width**-0.5
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]

    def part(cosines: Tensor, row: int, column: int) -> Tensor:
        return losses.siglip_sum(10 * cosines - 10, row - column)

    def run() -> list:
        for x in inputs:
            x.grad = None
        if form == "published":
            loss = peers.published_pair_loss(*inputs, 5.0, 10.0, -10.0)
        else:
            loss = tiles.TiledLoss.apply(part, 5.0, *inputs) / rows
        loss.backward()
        return [loss.detach(), *(x.grad for x in inputs)]

    return run


def random_batch(config: models.Config, batch: int, device) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and token ids (B, L)."""
    S, L = config.image_size, config.context_length
    tokens = torch.randint(1, config.vocab_size - 2, (batch, L))
    tokens[:, 0], tokens[:, -1] = config.vocab_size - 2, config.vocab_size - 1
    return torch.randn(batch, 3, S, S).to(device), tokens.to(device)


def build(kind: str, config: models.Config, device) -> nn.Module:
    """A method's model, with 32 tokens and 8 heads if it mixes, or the CLIP of another package."""
    torch.manual_seed(0)
    if kind in peers.PEERS:
        return peers.PEERS[kind][0](config).to(device)
    method, published = METHODS[kind], dict(mixture_tokens=32, mixture_heads=8)
    settings = method.settings(**{flag: published[flag] for flag in published.keys() & method.flags()})
    with torch.device(device):
        return tiles.select(method.module.build(settings, config, 32768), "tiled", 1, 1)


def step_of(module: nn.Module, forward_backward: Callable, device, update: bool) -> Callable:
    """forward_backward() on fresh gradients, and with update AdamW's step."""
    optimizer = torch.optim.AdamW(train.parameter_groups(module, 0.1), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward_backward()
        if update and torch.device(device).type != "meta":
            optimizer.step()

    return run


def autocast(precision: str, device) -> Callable:
    return partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def step_case(kind: str, name: str, batch: int, precision: str, device, update: bool = True) -> Callable:
    """A training step of pre-training; other packages with InfoNCE over their own logits."""
    model, batches = build(kind, CONFIGS[name], device).train(), random_batch(CONFIGS[name], batch, device)
    cast = autocast(precision, device)

    def forward_backward() -> None:
        if kind in peers.PEERS:
            with cast():
                logits = peers.PEERS[kind][1](model, *batches)
            losses.info_nce(logits).backward()
        else:
            training_step(model, *batches, METHODS[kind].settings().objective, autocast=cast)

    return step_of(model, forward_backward, device, update)


def prompts_case(kind: str, name: str, batch: int, prompts: int, precision: str, device) -> Callable:
    """Images against the features of so many prompts, which were computed before."""
    model, pictures = build(kind, CONFIGS[name], device), random_batch(CONFIGS[name], batch, device)[0]
    text, cast = torch.randn(prompts, CONFIGS[name].embed_dim).to(device), autocast(precision, device)
    if model.conditional:
        text = (model.split(torch.randn_like(text)), text)

    def run() -> Tensor:
        with torch.no_grad():
            with cast():
                image = model.encode_image(pictures)
            return model.pair_logits(map_features(Tensor.float, image), text)

    return run


def finetune_case(
    kind: str, name: str, batch: int, device, classes=10, update=True, published=False, **flags
) -> Callable:
    """A step of fine-tuning by a method with these flags; published: the last MLP runs on all tokens."""
    config, g = CONFIGS[name], torch.Generator().manual_seed(0)
    clip = build("clip", config, device)
    text = unit(torch.randn(classes, config.embed_dim, generator=g)).to(device)

    def tokenizer(texts: list[str], length: int) -> Tensor:
        """Prompts of at most eight tokens: start, the same words for every text, end, zeros."""
        ids, end = torch.zeros(len(texts), length, dtype=torch.long), min(8, length - 5)
        ids[:, 0], ids[:, 1:end], ids[:, end] = config.vocab_size - 2, 7, config.vocab_size - 1
        return ids

    names, method = [f"class {c}" for c in range(classes)], METHODS[kind]
    module = method.module.build(method.settings(**flags), clip, Classes(names, ("{}",), tokenizer, text))
    if published:
        clip.encode_image = partial(peers.published_tower, clip.visual)
    pictures = random_batch(config, batch, device)[0]
    labels = torch.arange(batch).remainder(classes).to(device)
    run = step_of(module, lambda: module.loss(pictures, labels)[0].backward(), device, update)
    learn = sum(p.numel() for p in module.parameters() if p.requires_grad)
    run.about = {"thousand parameters that learn": learn / 1e3}
    return run


# Sections --------------------------------------------------------------------------------------------------


def objective(b: Bench) -> None:
    """Llip's objective as published and in tiles: time and memory."""
    N = 64 if b.c.quick else 256
    for M in (32, 64):
        cases = {form: partial(objective_case, form, N, N, M) for form in ("published", "tiles")}
        b.compare(f"{N} x {N} pairs, {M} tokens, 8 heads, E = 512", cases, True, True)


def towers(b: Bench) -> None:
    """A training step of CLIP beside open_clip and transformers."""
    kinds = {"here": "clip"} | {peer: peer for peer in peers.installed()}
    for name in ("ViT-B-32",) if b.c.quick else ("ViT-B-32", "ViT-B-16"):
        cases = {arm: partial(step_case, kind, name, b.batch, b.c.precision) for arm, kind in kinds.items()}
        b.compare(f"{name} step, batch {b.batch}", cases)


def alignclip(b: Bench) -> None:
    """A step of AlignCLIP over CLIPood's as published. The paper has 1.105 (D-V) and 1.316 (V-V-V).

    CLIPood here leaves out the last MLP of the patches, which AlignCLIP's L_sim needs.
    """
    name = "ViT-B-32" if b.c.quick else "ViT-B-16"
    cases = {"CLIPood as published": partial(finetune_case, "clipood", name, b.batch, published=True)}
    cases["CLIPood"] = partial(finetune_case, "clipood", name, b.batch)
    for branch in ("dv", "vvv"):
        cases[f"AlignCLIP {branch}"] = partial(finetune_case, "alignclip", name, b.batch, branch=branch)
    b.compare(f"{name} step, batch {b.batch}", cases, flops=True)


def prompts(b: Bench) -> None:
    """A step of the prompt methods over CLIPood's, its memory, and the parameters that learn."""
    name, kinds = "ViT-B-32" if b.c.quick else "ViT-S-16", {"CLIPood": {}, "AlignCLIP": {}}
    kinds |= {"CoOp": dict(context=4), "CoCoOp": dict(context_words=""), "MaPLe": dict(context_words="")}
    cases = {
        arm: partial(finetune_case, arm.lower(), name, 4, classes=7, **flags) for arm, flags in kinds.items()
    }
    b.compare(f"{name} step, batch 4, 7 classes", cases, memory=True)


def llip_section(b: Bench) -> None:
    """Llip over CLIP on the same tower, 32 tokens. The paper has 1.29 for a step and 1.22 for inference."""
    name, gpu = "ViT-B-32" if b.c.quick else b.c.large, b.device.type == "cuda"
    batch = b.batch if gpu else 1
    # two models of this size with AdamW's moments need more memory than a usual machine has
    cases = {k: partial(step_case, k, name, batch, b.c.precision, update=gpu) for k in ("siglip", "llip")}
    b.compare(f"{'step' if gpu else 'forward and backward'}, {name}, batch {batch}", cases, flops=True)
    cases = {k: partial(prompts_case, k, name, b.batch, 1000, b.c.precision) for k in ("clip", "llip")}
    b.compare(f"inference, {name}, {b.batch} images, 1,000 prompts", cases, flops=True)
    counts = (10, 100, 1000, 10000)
    cases = {f"{n} prompts": partial(prompts_case, "llip", name, 1, n, b.c.precision) for n in counts}
    b.compare(f"Llip by prompts, {name}, one image", cases)


SECTIONS = dict(objective=objective, towers=towers, alignclip=alignclip, prompts=prompts, llip=llip_section)


def check(c: BenchConfig) -> None:
    for name in c.sections:
        if name not in SECTIONS:
            raise ValueError(f"section {name!r}: there are {', '.join(SECTIONS)}")
    if c.precision not in ("fp32", "bf16") or c.repeats < 2:
        raise ValueError("--precision is fp32 or bf16, --repeats at least 2")


def measure(c: BenchConfig) -> Bench:
    """Runs sections.   Raises: ValueError for a section or a value that does not exist."""
    check(c)
    b = Bench(c)
    for b.section in c.sections or SECTIONS:
        print(f"\n{b.section}: {SECTIONS[b.section].__doc__.splitlines()[0]}")
        SECTIONS[b.section](b)
    return b


@program
def main(argv: list[str]) -> None:
    c = parse(BenchConfig, argv, __doc__, positional=("sections",))
    device = distributed.setup(c.device)
    check(c)
    if c.out:
        output_folder(c.out)
    print(f"{machine(device)}, torch {torch.__version__}")
    measure(c).finish()


if __name__ == "__main__":
    leave(main())
