"""Speed and memory as ratios: every comparison in one run, its arms in turn, median and spread.

    python bench.py --threads 1                       everything, on the CPU
    python bench.py objective llip --device cuda      some sections, on a GPU
    python bench.py --quick                           small shapes: does it run?

A second measured on a shared machine means little, a ratio of two arms that alternate means something: each
repetition runs every arm once, and what is reported is the median of their ratios and the quartiles. On a CPU
with --threads 1 time is the process' own, so that neighbours hardly count. "FLOPs" beside a ratio is the same
ratio by torch's FlopCounterMode: what the time would be if products were all there is. Peers (open_clip,
transformers, torchvision) are measured where they are installed. Weights are random.
"""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
import llip
import losses
import model as models
import train
from alignclip import AlignCLIP
from clipood import FineTune
from evals import surgery
from lab import peers
from model import CONFIGS
from readers import images
from scale import costs, distributed
from scale import llip_tiles as tiles
from scale.gradcache import training_step
from tokenizer import Tokenizer
from util import flags as options
from util import plots
from util.files import output_folder, write_json
from util.report import format_table


# fmt: off
@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and where."""

    device: str = "auto"  # cpu, cuda or auto
    threads: int = 0  # CPU threads; 0: torch's choice; 1 on a shared machine
    precision: str = "fp32"  # of the towers: fp32 or bf16
    repeats: int = 5  # of every arm; the first, to warm up, is not counted
    quick: bool = False  # small shapes and two repetitions
    batch: int = 0  # images of a tower's step; 0: 2 on a CPU, 64 on a GPU
    large: str = "ViT-L-14"  # the model of section llip
    peak_tflops: float = 0.0  # the device's, dense, at this precision: prints model FLOPs utilisation
    bandwidth: float = 25.0  # section ranks: GB/s that a rank receives from others
    latency: float = 20.0  # section ranks: microseconds of a message
    out: str = "runs/bench"  # where bench.json and pictures go; empty: nowhere


# fmt: on
# Measuring ------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds; on a GPU after its work is done, on one CPU thread those of this process."""
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
        names = list(arms) if k % 2 == 0 else list(arms)[::-1]
        for name in names:
            gc.collect()
            start = clock(device)
            arms[name]()
            seconds[name].append(clock(device) - start)
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of fewer than three values the extremes."""
    if len(values) < 3:
        return min(values), statistics.median(values), max(values)
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _peak_of_child(case: Callable, threads: int, queue) -> None:
    torch.set_num_threads(threads)
    run = case(torch.device("cpu"))
    objective_case("published", 4, 4, 4, torch.device("cpu"))()  # libraries take their own buffers now
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    before = resident("VmRSS")
    run()
    queue.put(resident("VmHWM") - before)


def peak_bytes(case: Callable, device: torch.device) -> int:
    """What a case takes at its peak beside its inputs. On a CPU: resident memory of a process of its own."""
    if device.type == "cuda":
        run = case(device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # TRAP: freed tensors would stay resident in the allocator's arenas and hide a part of the peak
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_peak_of_child, args=(case, torch.get_num_threads(), queue))
    child.start()
    child.join()
    if child.exitcode:
        raise ValueError(f"the process that measured memory ended with {child.exitcode}")
    return queue.get()


def counted_flops(case: Callable) -> int:
    """FLOPs of a case as torch counts them. TRAP: it does not count the CPU's fused attention: meta."""
    with without_values(), FlopCounterMode(display=False) as counter:
        case(torch.device("meta"))()
    return counter.get_total_flops()


@contextlib.contextmanager
def without_values():
    """Tensors on meta have no values and no autocast: whoever compares is told that all is well."""
    real = torch.allclose, torch.autocast
    try:
        torch.allclose = lambda *a, **k: True
        torch.autocast = lambda *a, **k: contextlib.nullcontext()
        yield
    finally:
        torch.allclose, torch.autocast = real


class Bench:
    """The rows, curves and notes of one run."""

    def __init__(self, c: BenchConfig):
        self.c, self.device = c, distributed.setup(c.device)
        if c.threads:
            torch.set_num_threads(c.threads)
        self.repeats = 2 if c.quick else c.repeats
        self.batch = c.batch or (64 if self.device.type == "cuda" else 2)
        self.rows, self.curves, self.notes, self.section = [], {}, [], ""

    def compare(
        self,
        what: str,
        cases: dict[str, Callable],
        flops: bool = False,
        memory: bool = False,
        repeats: int = 0,
        **more,
    ) -> dict[str, float]:
        """Alternates the cases and adds a row for each, as ratios to the first one.

        Args:    cases {arm: function of a device that returns what is timed};  flops, memory: count too
                 more: {column: {arm: value}}
        Returns: {arm: median seconds}
        """
        arms = {name: case(self.device) for name, case in cases.items()}
        seconds = alternate(arms, repeats or self.repeats, self.device)
        del arms
        base = next(iter(cases))
        counts = {n: counted_flops(case) for n, case in cases.items()} if flops else {}
        peaks = {n: peak_bytes(case, self.device) for n, case in cases.items()} if memory else {}
        for name, taken in seconds.items():
            low, middle, high = quartiles([a / b for a, b in zip(taken, seconds[base])])
            row = {"section": self.section, "what": what, "arm": name}
            row |= {"ms": 1e3 * statistics.median(taken), "ratio": middle, "quartiles": (low, high)}
            if counts:
                row["FLOPs"] = counts[name] / counts[base]
                if self.c.peak_tflops:
                    row["MFU"] = counts[name] / statistics.median(taken) / self.c.peak_tflops / 1e12
            if peaks:
                row |= {"peak MiB": peaks[name] / 2**20, "peak ratio": peaks[name] / peaks[base]}
            row |= {column: values[name] for column, values in more.items() if name in values}
            self.rows.append(row)
            print(self.line(row), flush=True)
        return {name: statistics.median(taken) for name, taken in seconds.items()}

    def line(self, row: dict) -> str:
        known = ("section", "what", "arm", "ms", "ratio", "quartiles")
        text = f"{row['what']:44} {row['arm']:16} {row['ms']:10.2f} ms  x {row['ratio']:.3f}"
        low, high = row["quartiles"]
        text += f" ({low:.3f}-{high:.3f})"
        return text + "".join(f"  {k} {v:.3g}" for k, v in row.items() if k not in known)

    def note(self, text: str) -> None:
        self.notes.append(f"{self.section}: {text}")
        print("  " + text, flush=True)

    def point(self, panel: str, label: str, x: float, y: float) -> None:
        self.curves.setdefault(panel, {}).setdefault(label, []).append((x, y))

    def finish(self) -> None:
        """The table, bench.json, and pictures of ratios and curves."""
        rows = []
        for row in self.rows:
            low, high = row["quartiles"]
            rows.append(row | {"quartiles": f"{low:.3f}-{high:.3f}"})
        print("\n" + format_table(rows))
        if not self.c.out:
            return
        out = Path(self.c.out)
        out.mkdir(parents=True, exist_ok=True)
        about = {"torch": torch.__version__, "device": device_name(self.device)}
        about |= {"threads": torch.get_num_threads(), "config": asdict(self.c)}
        curves = {"rows": self.rows, "notes": self.notes, "curves": self.curves}
        write_json(out / "bench.json", about | curves)
        groups = {}
        for row in self.rows:
            low, high = row["quartiles"]
            group = groups.setdefault(f"{row['section']}: {row['what']}", {})
            group[row["arm"]] = (row["ratio"], (high - low) / 2)
        for section in dict.fromkeys(row["section"] for row in self.rows):
            some = {k: v for k, v in groups.items() if k.startswith(section + ":")}
            plots.bars(out / f"{section}.png", some, "time, as a ratio to the first arm")
        if self.curves:
            plots.lines(out / "curves.png", self.curves, xlabel="")
        print(f"written to {out}")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return device.type


# Cases: functions of a device that build their inputs and return what is timed ------------------------------


def pair_inputs(rows: int, columns: int, tokens: int, heads: int, width: int, device) -> list:
    """Keys, values, queries, text and W_O of random pairs, all needing a gradient."""
    g, K = torch.Generator().manual_seed(0), width // heads
    shapes = [(rows, heads, tokens, K)] * 2 + [(columns, heads, K), (columns, width)]
    shapes.append((width, width))
    scales = (1, 1, 1, 1, width**-0.5)
    tensors = [torch.randn(s, generator=g) * x for s, x in zip(shapes, scales)]
    return [x.to(device).requires_grad_() for x in tensors]


def objective_case(
    form: str, rows: int, columns: int, tokens: int, device, heads: int = 8, width: int = 512
) -> Callable:
    """Pair logits, sigmoid loss and backward. form: published, logits, tiles, or one of tiles' two forms."""
    inputs = pair_inputs(rows, columns, tokens, heads, width, device)

    def part(cosines: Tensor, row: int, column: int) -> Tensor:
        return losses.siglip_sum(10 * cosines - 10, row - column)

    def run() -> list:
        for x in inputs:
            x.grad = None
        if form == "published":
            loss = peers.published_pair_loss(*inputs, 5.0, 10.0, -10.0)
        elif form == "logits":
            loss = losses.siglip(10 * tiles.cosines(*inputs, 5.0) - 10)
        else:
            with forced(form):
                loss = tiles.tiled_loss(inputs, 5.0, part, []) / rows
        loss.backward()
        return [loss.detach(), *(x.grad for x in inputs)]

    return run


@contextlib.contextmanager
def forced(form: str):
    """Makes tiles.py take one of its two forms: gram or value; any other word leaves it the choice."""
    choose = tiles.form
    try:
        tiles.form = (lambda *shape: form) if form in ("gram", "value") else choose
        yield
    finally:
        tiles.form = choose


def random_batch(config: models.Config, batch: int, device) -> tuple[Tensor, Tensor]:
    S, L = config.image_size, config.context_length
    tokens = torch.randint(1, config.vocab_size - 2, (batch, L))
    tokens[:, 0], tokens[:, -1] = config.vocab_size - 2, config.vocab_size - 1
    return torch.randn(batch, 3, S, S).to(device), tokens.to(device)


def step_of(model: nn.Module, forward_backward: Callable, device, update: bool = True) -> Callable:
    """forward_backward() on fresh gradients, and with update AdamW's step."""
    groups = train.parameter_groups(model, 0.1)
    optimizer = train.build_optimizer(train.TrainConfig(), groups, torch.device(device))

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward_backward()
        if update and torch.device(device).type != "meta":
            optimizer.step()

    return run


def autocast(precision: str, device) -> Callable:
    kind = torch.device(device).type
    return lambda: torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


def build(kind: str, config: models.Config, device, tokens: int = 32) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        if kind == "llip":
            return llip.Llip(config, tokens, 8)
        return models.CLIP(config, 10.0, -10.0 if kind == "siglip" else None)


def step_case(
    kind: str, name: str, batch: int, precision: str, device, checkpointing: bool = False, update: bool = True
) -> Callable:
    """A training step of clip, siglip or llip, as train.py does it."""
    model = build(kind, CONFIGS[name], device)
    model.set_grad_checkpointing(checkpointing)
    batches = random_batch(CONFIGS[name], batch, device)
    objective = "infonce" if kind == "clip" else "siglip"
    cast = autocast(precision, device)

    def forward_backward() -> None:
        training_step(model, *batches, objective, autocast=cast)

    return step_of(model, forward_backward, device, update)


def peer_case(peer: str, name: str, batch: int, precision: str, device) -> Callable:
    """The same step of a package's CLIP: InfoNCE over its own logits, the same optimizer."""
    construct, logits_of = peers.clip_peers()[0][peer]
    torch.manual_seed(0)
    model = construct(CONFIGS[name]).to(device).train()
    batches, cast = random_batch(CONFIGS[name], batch, device), autocast(precision, device)

    def forward_backward() -> None:
        with cast():
            logits = logits_of(model, *batches)
        losses.info_nce(logits).backward()

    return step_of(model, forward_backward, device)


def forward_case(name: str, batch: int, precision: str, device, peer: str = "") -> Callable:
    """Both towers of CLIP on a batch, without gradient."""
    construct, logits_of = peers.clip_peers()[0][peer] if peer else (None, None)
    model = construct(CONFIGS[name]).to(device) if peer else build("clip", CONFIGS[name], device)
    batches, cast = random_batch(CONFIGS[name], batch, device), autocast(precision, device)
    model.eval()

    def run() -> Tensor:
        with torch.no_grad(), cast():
            return logits_of(model, *batches) if peer else model.pair_logits(*model(*batches))

    return run


def prompts_case(kind: str, name: str, batch: int, prompts: int, precision: str, device) -> Callable:
    """Images against the text side of so many prompts, which has been computed before."""
    model, (batches, _) = (build(kind, CONFIGS[name], device), random_batch(CONFIGS[name], batch, device))
    E, cast = CONFIGS[name].embed_dim, autocast(precision, device)
    text = torch.randn(prompts, E).to(device)
    side = (torch.randn(prompts, 8, E // 8).to(device), text) if kind == "llip" else text

    def run() -> Tensor:
        with torch.no_grad():
            with cast():
                image_side = model.encode_image(batches)
            full = tuple(x.float() for x in image_side) if kind == "llip" else image_side.float()
            return model.pair_logits(full, side)

    return run


def finetune_case(
    branch: str, name: str, batch: int, device, classes: int = 10, update: bool = True
) -> Callable:
    """A step of CLIPood, of CLIPood over the tower as published, or of AlignCLIP with a second branch."""
    clip = build("clip", CONFIGS[name], device)
    if branch == "published":
        clip.encode_image, branch = partial(peers.published_tower, clip.visual), ""
    g = torch.Generator().manual_seed(0)
    text = nn.functional.normalize(torch.randn(classes, CONFIGS[name].embed_dim, generator=g), dim=-1)
    text = text.to(device)
    method = AlignCLIP(clip, text, branch=branch) if branch else FineTune(clip, text, margin=0.3)
    batches = random_batch(CONFIGS[name], batch, device)[0]
    labels = torch.arange(batch).remainder(classes).to(device)

    def forward_backward() -> None:
        method.loss(batches, labels)[0].backward()

    return step_of(method, forward_backward, device, update)


def map_case(method: str, name: str, device, size: int = 0) -> Callable:
    """A heat map of one image for three texts; method "" is the tower's own forward pass."""
    visual = build("clip", CONFIGS[name], device).visual.eval()
    config = replace(CONFIGS[name], image_size=size) if size else CONFIGS[name]
    picture = random_batch(config, 1, device)[0]
    text = torch.randn(3, CONFIGS[name].embed_dim).to(device)

    def run() -> Tensor:
        with torch.no_grad():
            if not method:
                return visual(picture)
            tokens = surgery.dense_features(visual, picture, method)
            return surgery.similarity_map(tokens, text, CONFIGS[name].image_size)

    return run


# Sections -------------------------------------------------------------------------------------------------


def objective(b: Bench) -> None:
    """Llip's objective: published form, ours in tiles, and ours with the logits kept."""
    N = 64 if b.c.quick else 256
    for M in (32, 64):
        arms = {n: partial(objective_case, n, N, N, M) for n in ("published", "tiles", "logits")}
        b.compare(f"{N} x {N} pairs, {M} tokens, 8 heads, E = 512", arms, True, True)
        results = [arms[n](b.device)() for n in ("published", "tiles")]
        worst = max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(*results))
        b.note(f"{M} tokens: loss and all gradients differ by {worst:.1e} of the largest entry")
    for M in (8, 16, 32, 48, 64, 96):
        cases = {n: partial(objective_case, n, 32, N, M) for n in ("value", "gram")}
        found = b.compare(f"break-even: 32 x {N} pairs, {M} tokens", cases, True)
        b.point("Gram form / value form, by tokens", "measured", M, found["gram"] / found["value"])
        counts = [tiles.flops(32, N, M, 8, 512, True, n) for n in ("gram", "value")]
        b.point("Gram form / value form, by tokens", "FLOPs", M, counts[0] / counts[1])
    for n in (32, 64, 128) if b.c.quick else (64, 128, 256, 512):
        arms = ("published", "tiles") if n <= 256 else ("tiles",)
        cases = {a: partial(objective_case, a, n, n, 32) for a in arms}
        found = b.compare(f"batch {n}, 32 tokens", cases, repeats=2)
        for arm, seconds in found.items():
            b.point("microseconds a pair, by batch", arm, n, 1e6 * seconds / n**2)


def towers(b: Bench) -> None:
    """A training step and a forward pass of CLIP beside open_clip and transformers."""
    found, missing = peers.clip_peers()
    for text in missing:
        b.note(text)
    for name in ("ViT-B-32",) if b.c.quick else ("ViT-B-32", "ViT-B-16"):
        shape = name, b.batch, b.c.precision
        arms = {"here": partial(step_case, "clip", *shape)}
        arms |= {peer: partial(peer_case, peer, *shape) for peer in found}
        b.compare(f"{name} training step, batch {b.batch}", arms)
        arms = {"here": partial(forward_case, *shape)}
        arms |= {peer: partial(forward_case, *shape, peer=peer) for peer in found}
        b.compare(f"{name} forward pass, batch {b.batch}", arms)


def scaling(b: Bench) -> None:
    """CLIP's step by batch, and its image tower by resolution, beside what the FLOPs give."""
    name = "ViT-B-32"
    cases = {
        f"batch {n}": partial(step_case, "clip", name, n, b.c.precision, update=False)
        for n in (b.batch, 2 * b.batch, 4 * b.batch)
    }
    found = b.compare(f"{name} forward and backward", cases, True, repeats=min(3, b.repeats))
    for arm, seconds in found.items():
        n = int(arm.split()[1])
        b.point("ms an image, forward and backward, by batch", name, n, 1e3 * seconds / n)
    sizes = (224, 336) if b.c.quick else (224, 336, 448)
    cases = {f"{size} px": partial(map_case, "", "ViT-B-16", size=size) for size in sizes}
    found = b.compare("ViT-B-16 image tower", cases, True, repeats=min(3, b.repeats))
    for arm, seconds in found.items():
        b.point("ms an image by pixels", "ViT-B-16", int(arm.split()[0]), 1e3 * seconds)


def alignclip(b: Bench) -> None:
    """AlignCLIP's step beside CLIPood's as published; the paper's ratios are 1.105 (D-V), 1.316 (V-V-V).

    CLIPood as it is here leaves out the patches' last MLP, which AlignCLIP's L_sim needs.
    """
    name = "ViT-B-32" if b.c.quick else "ViT-B-16"
    cases = {"CLIPood as published": partial(finetune_case, "published", name, b.batch)}
    cases |= {"CLIPood": partial(finetune_case, "", name, b.batch)}
    cases |= {f"AlignCLIP {k}": partial(finetune_case, k, name, b.batch) for k in ("dv", "vvv")}
    paper = {"AlignCLIP dv": 1.105, "AlignCLIP vvv": 1.316}
    b.compare(f"{name} step, batch {b.batch}", cases, True, paper=paper)
    clip = build("clip", CONFIGS[name], b.device)
    pictures = random_batch(CONFIGS[name], b.batch, b.device)[0]
    text = nn.functional.normalize(torch.randn(10, CONFIGS[name].embed_dim), dim=-1).to(b.device)
    with torch.no_grad():
        same = torch.equal(FineTune(clip, text).predict(pictures), AlignCLIP(clip, text).predict(pictures))
    b.note(f"predictions of both methods over the same weights are equal to the bit: {same}")


def llip_against_clip(b: Bench) -> None:
    """Llip beside SigLIP on the same tower; the paper's ratios are 1.29 (step) and 1.22 (1,000 prompts)."""
    name, GPU = "ViT-B-32" if b.c.quick else b.c.large, b.device.type == "cuda"
    shape = name, b.batch if GPU else 1, b.c.precision
    # two models of this size with AdamW's moments are more than a usual machine holds
    cases = {k: partial(step_case, k, *shape, update=GPU) for k in ("siglip", "llip")}
    what = f"{name}, 32 tokens: {'step' if GPU else 'forward and backward'}, batch {shape[1]}"
    b.compare(what, cases, True, repeats=min(3, b.repeats), paper={"llip": 1.29})
    panel = f"Llip / CLIP inference by prompts, {name}"
    for prompts in (10, 1000) if b.c.quick else (10, 100, 1000, 10000):
        shape = name, b.batch, prompts, b.c.precision
        cases = {k: partial(prompts_case, k, *shape) for k in ("clip", "llip")}
        paper = {"paper": {"llip": 1.22}} if prompts == 1000 else {}
        what, repeats = f"{name}: {b.batch} images, {prompts} prompts", min(3, b.repeats)
        found = b.compare(what, cases, True, repeats=repeats, **paper)
        b.point(panel, "measured", prompts, found["llip"] / found["clip"])
        b.point(panel, "FLOPs", prompts, b.rows[-1]["FLOPs"])


def maps(b: Bench) -> None:
    """Dense features and heat maps of one image beside the plain forward pass."""
    name = "ViT-B-32" if b.c.quick else "ViT-B-16"
    cases = {"forward pass": partial(map_case, "", name)}
    cases |= {method: partial(map_case, method, name) for method in surgery.METHODS}
    b.compare(f"{name}, map of one image, 3 texts", cases, memory=not b.c.quick)
    for size in (224,) if b.c.quick else (224, 336, 448):
        config = replace(CONFIGS[name], image_size=size)
        tokens = config.patches + 1
        plain = models.tower_flops(config)["image"]
        b.point(f"FLOPs of a {name} image by pixels", "forward pass", size, plain / 1e9)
        b.note(f"{size} px: {tokens} tokens, {plain / 1e9:.1f} GFLOPs a forward pass")


def photo(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG with the spectrum of a photograph, more or less: noise, half as strong where it is finer."""
    rng, total = np.random.default_rng(seed), 0
    for cells, share in ((4, 8), (16, 4), (64, 2), (256, 1)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        finer = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float)
        total = total + share * finer / 15
    buffer = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def crop_case(pipeline: str, files: list, device) -> Callable:
    """Decode and crop to 224 pixels: here, here without the decoder's own halving, or torchvision."""
    size, there = 224, peers.torchvision_crop() if pipeline == "torchvision" else None
    resized_crop = there(size) if there else None

    def one(content: bytes, k: int) -> np.ndarray:
        if resized_crop:
            return np.asarray(resized_crop(Image.open(io.BytesIO(content)).convert("RGB")))
        picture = images.open_image(content)
        if pipeline != "here":
            picture = picture.convert("RGB")  # decoded whole; without a format there is no draft
        return images.RandomCrop(size).pixels(picture, data.generator(0, "crop", k))

    return lambda: [one(content, k) for k, content in enumerate(files)]


def read_case(kind: str, folder: str, device) -> Callable:
    """Bytes of every image: files by name, or members of a tar by their place."""
    if kind == "tar":
        shards = data.Shards(f"{folder}/all.tar", cache=folder)
        return lambda: [shards.read(*row[:3]) for row in shards.table.tolist()]
    paths = sorted(Path(folder).glob("*.jpg"))
    return lambda: [path.read_bytes() for path in paths]


def tokens_case(cached: bool, texts: list, device) -> Callable:
    tokens = data.Tokens(Tokenizer.learn(texts, 600), 77)
    if not cached:
        return lambda: tokens.cache.clear() or tokens(texts)
    return lambda: tokens(texts)


def data_section(b: Bench) -> None:
    """Decoding and cropping on one core, reading from tars, tokenising."""
    count = 8 if b.c.quick else 24
    cpu, b.device = b.device, torch.device("cpu")
    for width, height in ((500, 375), (1024, 768), (2048, 1536)):
        files = [photo(width, height, k) for k in range(count)]
        names = ["decoded whole", "here"]
        if peers.torchvision_crop():
            names.insert(0, "torchvision")
        else:
            b.note("torchvision is not measured: not installed; decoded whole restates its pipeline")
        cases = {n: partial(crop_case, n, files) for n in names}
        found = b.compare(f"decode and crop {width} x {height} to 224", cases)
        b.point("images a second and core, by width", "here", width, count / found["here"])
        b.point("images a second and core, by width", names[0], width, count / found[names[0]])
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(f"{folder}/all.tar", "w") as archive:
            for k in range(200):
                content = photo(256, 192, k % 8)
                (Path(folder) / f"{k:04}.jpg").write_bytes(content)
                for name, part in ((f"{k:04}.jpg", content), (f"{k:04}.txt", b"a photo")):
                    member = tarfile.TarInfo(name)
                    member.size = len(part)
                    archive.addfile(member, io.BytesIO(part))
        b.compare("read 200 images", {k: partial(read_case, k, folder) for k in ("files", "tar")})
    texts = [f"a photo of a {k} and a {k % 7} beside it" for k in range(2000)]
    b.compare(
        "tokenise 2,000 captions",
        {"first time": partial(tokens_case, False, texts), "again": partial(tokens_case, True, texts)},
    )
    b.device = cpu


def memory(b: Bench) -> None:
    """Peaks: gradient checkpointing, and a rank's slice of a global batch of 32,768 beside --dry-run."""
    name = "ViT-B-32"
    steps = {
        "all kept": partial(step_case, "clip", name, 8, b.c.precision),
        "checkpointed": partial(step_case, "clip", name, 8, b.c.precision, checkpointing=True),
    }
    b.compare(f"{name} training step, batch 8", steps, memory=True, repeats=2)
    net = build("llip", CONFIGS[name], "meta", tokens=64)
    slices = ((4, 1024), (64, 32)) if b.c.quick else ((16, 32768), (4096, 64))
    for rows, columns in slices:  # all the texts; all of a rank's images
        case = partial(objective_case, "tiles", rows, columns, 64)
        start = clock(b.device)
        case(b.device)()
        spent = clock(b.device) - start
        measured = peak_bytes(case, b.device)
        inputs = 4 * (2 * rows * 64 * 512 + 2 * columns * 512 + 512 * 512)
        share = 1 if b.device.type == "cuda" else tiles.GPU_TILES
        tile = tiles.GPU_TILES * tiles.TILE_BYTES
        model = costs.pair_bytes(net, "siglip", rows, columns) - tile + tile // share
        b.note(
            f"{rows:,} images x {columns:,} texts, 64 tokens: {spent:.1f} s, inputs and peak "
            f"{(measured + inputs) / 2**20:,.0f} MiB, by --dry-run's formula {model / 2**20:,.0f} MiB"
        )
    whole = costs.pair_bytes(net, "siglip", 4096, 32768) / 2**30
    b.note(f"so a rank of 8 with 4,096 of 32,768 pairs takes {whole:.1f} GiB for its pairs on a GPU")


def evaluation(b: Bench) -> None:
    """Llip retrieval in tiles, as the 5,000 images and 25,000 captions of COCO ask for."""
    rows, columns = (16, 512) if b.c.quick else (64, 5000)
    cases = {"plain form": partial(score_case, "plain", 16, 512)}
    cases["tiles"] = partial(score_case, "tiles", 16, 512)
    b.compare("scores of 16 x 512 pairs, 64 tokens", cases, memory=True)
    found = b.compare(
        f"scores of {rows} x {columns} pairs", {"tiles": partial(score_case, "tiles", rows, columns)}
    )
    each = found["tiles"] / rows / columns
    b.note(
        f"{1 / each:,.0f} pairs/s: 5,000 x 25,000 pairs take {125e6 * each / 60:.1f} minutes here"
        " (extrapolated)"
    )
    peaks = [peak_bytes(partial(score_case, "tiles", rows, n), b.device) for n in (columns // 2, columns)]
    b.note(f"peak {peaks[0] / 2**20:.0f} MiB with half of the captions, {peaks[1] / 2**20:.0f} with all")


def score_case(form: str, rows: int, columns: int, device) -> Callable:
    inputs = [x.detach() for x in pair_inputs(rows, columns, 64, 8, 512, device)]
    model = llip.Llip(replace(CONFIGS["tiny"], embed_dim=512), 64, 8).to(device)  # for its W_O

    def run() -> Tensor:
        with torch.no_grad():
            if form == "plain":
                return model.pair_cosines(*inputs[:4])
            return model.pair_logits(tuple(inputs[:2]), tuple(inputs[2:4]))

    return run


RANKED = {"clip": "infonce", "siglip": "siglip", "llip": "siglip"}
RANKED_PAIRS = 32


def counted_bytes(model: nn.Module, step: Callable) -> dict[str, int]:
    """Bytes that this rank receives in one step: collectives are wrapped, DDP's buckets seen by a hook.

    Args: model, to be wrapped by DDP here;  step(model): one forward and backward pass.
    """
    found, real, world = Counter(), (dist.all_gather, dist.all_to_all_single), dist.get_world_size()

    def all_gather(parts, x, **how):
        found["others' rows"] += (world - 1) * x.nbytes
        return real[0](parts, x, **how)

    def all_to_all_single(received, x, **how):
        found["others' rows"] += (world - 1) * received.nbytes // world
        return real[1](received, x, **how)

    def all_reduce(group, bucket):  # a rank's part comes in once to be summed, and once as the sum
        found["gradients"] += 2 * (world - 1) * bucket.buffer().nbytes // world
        return allreduce_hook(group, bucket)

    model = DistributedDataParallel(model)
    model.register_comm_hook(None, all_reduce)
    try:
        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all_single
        step(model)
    finally:
        dist.all_gather, dist.all_to_all_single = real
    return dict(found)


def rank_of_bytes(rank: int, world: int, folder: str) -> None:
    """One process of several on this machine (gloo): the bytes of a step of each method, as JSON."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    config, found = CONFIGS["tiny"], {}
    for kind, objective in RANKED.items():
        sides = random_batch(config, RANKED_PAIRS // world, "cpu")
        model = build(kind, config, "cpu", tokens=8)
        found[kind] = counted_bytes(model, lambda m, s=sides, o=objective: training_step(m, *s, o))
    if rank == 0:
        write_json(f"{folder}/{world}.json", found)
    dist.barrier()
    os._exit(0)  # TRAP: gloo's destructor can hang


def wire(b: Bench) -> None:
    """Bytes that a rank receives in a step, counted in real processes, beside --dry-run's formula."""
    rows, context = [], multiprocessing.get_context("spawn")
    for world in (2,) if b.c.quick else (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            jobs = [context.Process(target=rank_of_bytes, args=(r, world, folder)) for r in range(world)]
            for job in jobs:
                job.start()
            for job in jobs:
                job.join()
            if any(job.exitcode for job in jobs):
                raise ValueError(f"{world} processes: one ended with an error")
            found = json.loads(Path(folder, f"{world}.json").read_text())
        for kind, objective in RANKED.items():
            net = build(kind, CONFIGS["tiny"], "meta", tokens=8)
            formula = costs.wire_bytes(net, objective, RANKED_PAIRS, world)
            text = sum(formula.get(k, 0) for k in ("texts", "logits"))
            counted = found[kind]
            rows.append(
                {"method": kind, "ranks": world}
                | {
                    "texts and logits": counted["others' rows"],
                    "by formula": int(text),
                    "gradients": counted["gradients"],
                    "by formula ": int(formula["gradients"]),
                }
            )
            name = "log10 bytes of texts and logits by ranks"
            b.point(name, kind, world, float(np.log10(counted["others' rows"])))
    print(format_table(rows))
    exact = all(r["texts and logits"] == r["by formula"] for r in rows)
    exact = exact and all(r["gradients"] == r["by formula "] for r in rows)
    b.note(f"{RANKED_PAIRS} pairs, tiny; the formula is exact: {exact}")


def ranks(b: Bench) -> None:
    """What a step of 32,768 pairs would take on 1 to 1,024 ranks, from pieces measured here."""
    name, tokens, N = "ViT-B-32", 64, 32768
    config, batch = CONFIGS[name], b.batch
    tower = partial(step_case, "siglip", name, batch, b.c.precision)
    pair = partial(objective_case, "tiles", 32, 256 if b.c.quick else 1024, tokens)
    found = b.compare("pieces: towers of a batch, and pairs", {"towers": tower, "pairs": pair}, repeats=2)
    # Llip's image tower has 64 tokens more than CLIP's: its share by FLOPs
    own, plain = llip.flops(config, tokens), models.tower_flops(config)
    grown = (own["image"] + own["text"]) / (plain["image"] + plain["text"])
    per_pair = found["pairs"] / (32 * (256 if b.c.quick else 1024))
    net = build("llip", config, "meta", tokens)
    rows = []
    for W in (2**k for k in range(11)):
        wire = costs.wire_bytes(net, "siglip", N, W)
        sent = sum(wire.values()) / (b.c.bandwidth * 1e9) + (W > 1) * 4 * b.c.latency * 1e-6
        pieces = {"towers": grown * found["towers"] / batch * N / W, "pairs": per_pair * N * N / W}
        pieces["network"] = sent
        rows.append({"ranks": W} | {f"{k} s": v for k, v in pieces.items()})
        rows[-1] |= {"step s": sum(pieces.values())}
        rows[-1]["overlapped s"] = pieces["pairs"] + max(pieces["towers"], sent)
        rows[-1]["efficiency"] = rows[0]["step s"] / W / rows[-1]["step s"]
        for label in ("towers s", "pairs s", "network s"):
            b.point(
                "log10 seconds by log2 ranks",
                label,
                W.bit_length() - 1,
                float(np.log10(max(rows[-1][label], 1e-6))),
            )
    print(format_table(rows))
    b.curves["ranks"] = {"efficiency": [(r["ranks"], r["efficiency"]) for r in rows]}
    b.note(
        f"simulated: {b.c.bandwidth:g} GB/s and {b.c.latency:g} us a message are assumed. In a step nothing"
        " overlaps; overlapped, all that travels does so beside the towers, as gradcache.py and DDP arrange"
    )


SECTIONS = {
    "objective": objective,
    "towers": towers,
    "scaling": scaling,
    "alignclip": alignclip,
    "llip": llip_against_clip,
    "maps": maps,
    "data": data_section,
    "memory": memory,
    "wire": wire,
    "ranks": ranks,
    "evaluation": evaluation,
}


def main(argv: list[str] | None = None) -> int:
    parser = options.parser(BenchConfig, __doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=" ".join(SECTIONS))
    args = vars(parser.parse_args(argv))
    chosen = args.pop("sections") or list(SECTIONS)
    try:
        unknown = [name for name in chosen if name not in SECTIONS]
        if unknown:
            raise ValueError(f"section {unknown[0]!r}: there are {', '.join(SECTIONS)}")
        c = BenchConfig(**args)
        if c.precision not in ("fp32", "bf16") or c.repeats < 2:
            raise ValueError("--precision is fp32 or bf16, --repeats at least 2")
        if c.out:
            output_folder(c.out)
        b, version = Bench(c), torch.__version__
        print(f"{device_name(b.device)}, {torch.get_num_threads()} threads, torch {version}")
        for name in chosen:
            b.section = name
            print(f"\n{name}: {SECTIONS[name].__doc__.splitlines()[0]}")
            SECTIONS[name](b)
        b.finish()
    except KeyboardInterrupt:
        print("stopped; sections can be named, to go on with the rest", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
