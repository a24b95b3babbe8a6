"""Speed and memory as ratios: the arms of a comparison take turns in one run; median and quartiles.

    python -m lab.bench --threads 1                     everything, on the CPU
    python -m lab.bench objective llip --device cuda    some sections, on a GPU
    python -m lab.bench --quick --threads 1             small shapes, compared with docs/speed.md

On a shared machine only ratios of arms that alternate mean something. Every repetition runs each arm once,
and the table shows the median of the ratios to the first arm. On a CPU with --threads 1 the time is that of
this process, so that other processes hardly count. open_clip and transformers are measured where they are
installed. Weights are random.
"""

import gc
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import evaluate
import losses
import model as models
import train
from baselines.methods import METHODS
from clipood import Classes, unit
from lab import peers
from model import CONFIGS
from scale import costs, distributed
from scale import llip_tiles as tiles
from scale.gradcache import training_step
from util.files import output_folder, write_json
from util.flags import parse
from util.program import leave, program
from util.report import format_table


@dataclass(frozen=True)
class BenchConfig:
    """Flags of this program."""

    sections: tuple[str, ...] = ()  # objective towers alignclip prompts llip (default), largest
    device: str = "auto"  # cpu, cuda or auto
    threads: int = 0  # CPU threads; 0: torch's choice; 1 on a shared machine
    precision: str = "fp32"  # of the towers: fp32 or bf16
    repeats: int = 5  # of every arm, after one run that is not measured
    quick: bool = False  # small shapes; the ratios are compared with those of docs/speed.md
    toy: bool = False  # the smallest shapes, only to see that everything runs
    out: str = "runs/bench"  # folder of bench.json; empty: none


SPEED = Path(__file__).parent.parent / "docs" / "speed.md"
PEAK = 989e12  # FLOP/s of an H100 or H200, dense bf16
B32, B16, L14 = "ViT-B-32", "ViT-B-16", "ViT-L-14"
# shapes of a scale: pairs and tokens of the objective, the towers of the sections, and their batches
TOY = dict(pairs=(16,), tokens=(4,), towers=("tiny",), tuned="tiny", prompted="tiny", llip="tiny")
QUICK = dict(pairs=(64,), tokens=(32, 64), towers=(B32,), tuned=B32, prompted=B32, llip=B32)
CPU = dict(pairs=(256,), tokens=(32, 64), towers=(B32, B16), tuned=B16, prompted="ViT-S-16", llip=L14)
GPU = dict(pairs=(1024, 4096), tokens=(32, 64), towers=(B32, B16, L14), tuned=B16, prompted=B16, llip=L14)
FEW, MANY = dict(batch=2, tuning=(2,), prompting=(4,)), dict(batch=64, tuning=(36, 108), prompting=(36, 108))


# Measuring -------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds: on a GPU after its work is done, on one CPU thread those of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def alternate(arms: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list]:
    """Seconds of every arm in each repetition. Arms have run once before."""
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
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max(accumulate((e.nbytes() for e in events if e.name() == "[memory]"), initial=0))


class Bench:
    """The rows of one run."""

    def __init__(self, c: BenchConfig):
        self.c, self.device = c, distributed.setup(c.device)
        if c.threads:
            torch.set_num_threads(c.threads)
        self.gpu = self.device.type == "cuda"
        own = TOY if c.toy else QUICK if c.quick else GPU if self.gpu else CPU
        self.shapes = SimpleNamespace(**own, **(MANY if own is GPU else FEW))
        self.rows, self.section = [], ""

    def add(self, **row) -> None:
        """Adds a row and writes bench.json, so that a run that is stopped has what it measured."""
        self.rows.append({"section": self.section} | row)
        print(table([row]).splitlines()[-1], flush=True)
        if self.c.out:
            about = {"torch": torch.__version__, "machine": machine(self.device), "config": asdict(self.c)}
            write_json(Path(self.c.out) / "bench.json", about | {"rows": self.rows})

    def start(self, case: Callable, **about) -> Callable | None:
        """What a case times, after one run; None and a row that says so if the memory does not suffice."""
        try:
            run = case(device=self.device)
            run()
            return run
        except torch.OutOfMemoryError:
            self.add(**about, ms="no memory")
        torch.cuda.empty_cache()

    def seconds(self, run: Callable) -> float:
        return statistics.median(alternate({"": run}, self.c.repeats, self.device)[""])

    def compare(self, what: str, cases: dict, memory: bool = False, images: int = 0) -> None:
        """Alternates cases {arm: function of a device, which returns what is timed}; images: of a run."""
        arms = {name: run for name, case in cases.items() if (run := self.start(case, what=what, arm=name))}
        seconds = alternate(arms, self.c.repeats, self.device)
        for name, taken in seconds.items():
            ratios = [a / b for a, b in zip(taken, next(iter(seconds.values())))]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row = {"ms": 1e3 * statistics.median(taken), "ratio": middle, "ratios": ratios}
            row["quartiles"] = f"{low:.3f}-{high:.3f}"
            if images:
                row["images/s"] = images / statistics.median(taken)
            if memory:
                row["peak MiB"] = peak_bytes(arms[name], self.device) / 2**20
            self.add(what=what, arm=name, **row, **getattr(arms[name], "about", {}))


def table(rows: list[dict]) -> str:
    return format_table([{name: value for name, value in row.items() if name != "ratios"} for row in rows])


def slower(rows: list[dict], recorded: str) -> list[str]:
    """A line for each ratio that is worse than its row in a Markdown table by more than the spread of both.

    The table's columns are what, arm, ratio, quartiles. Our arms should be low, those of other packages high.
    """
    found = re.findall(r"^\| (.+?) +\| (.+?) +\| +([\d.]+) \| ([\d.]+)-([\d.]+) +\|$", recorded, flags=re.M)
    before = {(what.strip(), arm): tuple(map(float, numbers)) for what, arm, *numbers in found}
    lines, known = [], [row for row in rows if "ratio" in row and (row["what"], row["arm"]) in before]
    for row in known:
        old, (low, high) = before[row["what"], row["arm"]], map(float, row["quartiles"].split("-"))
        if high < old[1] if row["arm"] in peers.PEERS else low > old[2]:
            lines.append(f"slower: {row['what']}, {row['arm']}: {row['ratio']:.3f}, recorded {old[0]:.3f}")
    worse = f"{len(lines)} worse by more than their spread"
    return [*lines, f"{len(known)} ratios compared with docs/speed.md, {worse}"]


def machine(device: torch.device) -> str:
    """The GPU, or the processor and the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else 'a CPU'}"


# Cases: functions of a device that build their inputs and return what is timed ------------------------------


def objective_case(form: str, rows: int, tokens: int, device, dtype=torch.float32, bf16=False) -> Callable:
    """Logits of rows x rows random pairs, sigmoid loss and backward: as published, or in tiles."""
    g, H, E = torch.Generator().manual_seed(0), 8, 512
    shapes = [(rows, H, tokens, E // H)] * 2 + [(rows, H, E // H), (rows, E), (E, E)]
    # keys, values, queries, text, W_O
    inputs = [torch.randn(shape, generator=g) for shape in shapes]
    inputs[-1] *= E**-0.5
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]

    def part(cosines: Tensor, row: int, column: int) -> Tensor:
        return losses.siglip_sum(10 * cosines - 10, row - column)

    def run() -> list:
        for x in inputs:
            x.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if form == "published":
                loss = peers.published_pair_loss(inputs, 5.0, 10.0, -10.0)
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
        return peers.PEERS[kind](config).to(device)
    method, published = METHODS[kind], dict(mixture_tokens=32, mixture_heads=8)
    settings = method.settings(**{flag: published[flag] for flag in published.keys() & method.flags()})
    with torch.device(device):
        return tiles.select(method.module.build(settings, config, 32768), "tiled", 1, 1)


def step_of(module: nn.Module, forward_backward: Callable, update: bool) -> Callable:
    """forward_backward() on fresh gradients, and with update AdamW's step."""
    optimizer = torch.optim.AdamW(train.parameter_groups(module, 0.1), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward_backward()
        if update:
            optimizer.step()

    return run


def step_case(
    kind: str, name: str, batch, device, precision="fp32", update=True, checkpointing=False, compiled=False
) -> Callable:
    """A training step of pre-training; other packages with InfoNCE over their own logits."""
    model, batches = build(kind, CONFIGS[name], device).train(), random_batch(CONFIGS[name], batch, device)
    cast = partial(evaluate.towers, device, precision)

    def step_of_peer() -> None:
        with cast():
            logits = peers.peer_logits(model, *batches)
        losses.info_nce(logits).backward()

    if kind in peers.PEERS:
        return step_of(model, step_of_peer, update)
    model.set_grad_checkpointing(checkpointing)
    called, objective = torch.compile(model) if compiled else model, METHODS[kind].settings().objective
    return step_of(model, partial(training_step, called, *batches, objective, autocast=cast), update)


def prompts_case(kind: str, name: str, batch: int, prompts: int, device, precision="fp32") -> Callable:
    """Images against the features of so many prompts, which were computed before."""
    model, pictures = build(kind, CONFIGS[name], device), random_batch(CONFIGS[name], batch, device)[0]
    text = torch.randn(prompts, CONFIGS[name].embed_dim).to(device)
    if model.conditional:
        text = (model.split(torch.randn_like(text)), text)

    @torch.no_grad()
    def run() -> Tensor:
        with evaluate.towers(device, precision):
            image = model.encode_image(pictures)
        return model.pair_logits(evaluate.map_features(Tensor.float, image), text)

    return run


def finetune_case(
    kind: str, name: str, batch: int, device, classes=10, update=True, published=False, answers=False, **flags
) -> Callable:
    """A step of fine-tuning by a method with these flags, or (answers) the answers of the trained model.

    Args: published: the last MLP runs on all tokens
    """
    config, g = CONFIGS[name], torch.Generator().manual_seed(0)
    clip = build("clip", config, device)
    text = unit(torch.randn(classes, config.embed_dim, generator=g)).to(device)

    def tokenizer(texts: list[str], length: int) -> Tensor:
        """Prompts of at most eight tokens: start, the same words for every text, end, zeros."""
        ids, end = torch.zeros(len(texts), length, dtype=torch.long), min(8, length - 5)
        ids[:, 0], ids[:, 1:end], ids[:, end] = config.vocab_size - 2, 7, config.vocab_size - 1
        return ids

    names, method = [f"class {c}" for c in range(classes)], METHODS[kind]
    classes_of = Classes(names, ("{}",), tokenizer, text)
    module = method.module.build(method.settings(**flags), clip, classes_of).to(device)
    if published:
        tower = clip.visual
        clip.encode_image = lambda images: tower.head(tower.transformer(tower.embed(images)))[:, 0]  # (B, E)
    pictures = random_batch(config, batch, device)[0]
    if answers:
        return torch.no_grad()(partial(module.eval().predict, pictures))
    labels = torch.arange(batch).remainder(classes).to(device)
    run = step_of(module, lambda: module.loss(pictures, labels)[0].backward(), update)
    learn = sum(p.numel() for p in module.parameters() if p.requires_grad)
    run.about = {"thousand parameters that learn": learn / 1e3}
    return run


# Sections --------------------------------------------------------------------------------------------------


def objective(b: Bench) -> None:
    """Llip's objective as published and in tiles: time, memory, and error of 64 pairs against fp64."""
    for N, M in product(b.shapes.pairs, b.shapes.tokens):
        cases = {form: partial(objective_case, form, N, M) for form in ("published", "tiles")}
        if b.gpu:
            cases |= {f"{form} under bf16": partial(case, bf16=True) for form, case in cases.items()}
        b.compare(f"{N} x {N} pairs, {M} tokens, 8 heads, E = 512", cases, memory=True)
    for form, M in product(("published", "tiles"), b.shapes.tokens):
        exact, found = (objective_case(form, 64, M, b.device, d)()[0] for d in (torch.float64, torch.float32))
        b.add(what=f"loss, {M} tokens", arm=form, error=(found / exact - 1).abs().item())


def towers(b: Bench) -> None:
    """A training step of CLIP beside open_clip and transformers."""
    kinds = {"here": "clip"} | {peer: peer for peer in peers.installed()}
    for name in b.shapes.towers:
        case = partial(step_case, name=name, batch=b.shapes.batch, precision=b.c.precision)
        cases = {arm: partial(case, kind) for arm, kind in kinds.items()}
        b.compare(f"{name} step, batch {b.shapes.batch}", cases)


def largest(b: Bench) -> None:
    """Training steps at the largest batch: images per second, MFU, memory against --dry-run; for a GPU."""
    n, start, limit = (8192, 64, 2**14) if b.gpu else (256, 4, 4)
    a = torch.randn(n, n, device=b.device, dtype=torch.bfloat16)
    multiply = 2 * n**3 / b.seconds(lambda: a @ a)
    b.add(what=f"product of {n} x {n} matrices, bf16", TFLOPs=multiply / 1e12)
    for name, kind, checkpointing in product(b.shapes.towers, ("llip", "clip", "siglip"), (False, True)):
        case, batch = partial(step_case, kind, name, precision="bf16", checkpointing=checkpointing), start
        what = f"{name}{' checkpointing' * checkpointing}"
        while batch < limit and b.start(partial(case, 2 * batch), what=what, arm=kind, batch=2 * batch):
            batch *= 2
        # as --dry-run counts them: FLOPs of a step without recomputation, and GB in all
        module, objective = build(kind, CONFIGS[name], "meta"), METHODS[kind].settings().objective
        c = SimpleNamespace(batch_size=batch, accumulate=1, grad_checkpointing=False)
        flops = sum(costs.step_flops(module, c, objective).values())
        held = 16 * costs.parameters(module)["all"] + costs.pair_bytes(module, objective, batch, batch)
        held += batch * costs.activation_bytes(module, True, checkpointing)
        for compiled in (False, True)[: 1 + b.gpu]:
            about = dict(what=what + " compiled" * compiled, arm=kind, batch=batch)
            if run := b.start(partial(case, batch, compiled=compiled), **about):
                seconds = b.seconds(run)
                row = {"images/s": batch / seconds, "MFU %": 100 * flops / seconds / PEAK}
                row |= {"% of the product": 100 * flops / seconds / multiply, "GB expected": held / 1e9}
                peak = peak_bytes(run, b.device) + torch.cuda.memory_allocated()
                b.add(**about, **row, GB=peak / 1e9)
            del run


def alignclip(b: Bench) -> None:
    """A step of AlignCLIP over CLIPood's as published. The paper has 1.105 (D-V) and 1.316 (V-V-V).

    CLIPood here leaves out the last MLP of the patches, which AlignCLIP's L_sim needs.
    """
    for batch in b.shapes.tuning:
        case = partial(finetune_case, name=b.shapes.tuned, batch=batch)
        cases = {"CLIPood as published": partial(case, "clipood", published=True)}
        cases["CLIPood"] = partial(case, "clipood")
        cases |= {f"AlignCLIP {form}": partial(case, "alignclip", branch=form) for form in ("dv", "vvv")}
        b.compare(f"{b.shapes.tuned} step, batch {batch}", cases, memory=b.gpu)


def prompts(b: Bench) -> None:
    """A step of the prompt methods over CLIPood's, memory, parameters that learn; inference over CLIP's."""
    name, arms = b.shapes.prompted, {"CLIPood": {}, "AlignCLIP": {}}
    arms |= {"CoOp": dict(context=4), "CoCoOp": dict(context_words=""), "MaPLe": dict(context_words="")}
    for batch, answers in product(b.shapes.prompting, (False, True)):
        case = partial(finetune_case, name=name, batch=batch, classes=50, answers=answers)
        cases = {arm: partial(case, arm.lower(), **flags) for arm, flags in arms.items()}
        # the trained model of CLIPood is a CLIP
        cases = {"CLIP": cases.pop("CLIPood")} | cases if answers else cases
        what = f"{name} {'inference' if answers else 'step'}, batch {batch}, 50 classes"
        b.compare(what, cases, memory=not answers, images=batch * answers)


def llip_section(b: Bench) -> None:
    """Llip over CLIP on the same tower, 32 tokens. The paper has 1.29 for a step and 1.22 for inference."""
    name, batch, cast = b.shapes.llip, b.shapes.batch, dict(precision=b.c.precision)
    # two models of L/14 with AdamW's moments need more memory than a usual machine has
    pairs, images, step = (batch, 256, "step") if b.gpu else (1, batch, "forward and backward")
    cases = {k: partial(step_case, k, name, pairs, update=b.gpu, **cast) for k in ("siglip", "llip")}
    b.compare(f"{step}, {name}, batch {pairs}", cases)
    cases = {k: partial(prompts_case, k, name, images, 1000, **cast) for k in ("clip", "llip")}
    b.compare(f"inference, {name}, {images} images, 1,000 prompts", cases)
    counts = (10, 100, 1000, 10000)
    cases = {f"{n} prompts": partial(prompts_case, "llip", name, 1, n, **cast) for n in counts}
    b.compare(f"Llip by prompts, {name}, one image", cases)


DEFAULT = dict(objective=objective, towers=towers, alignclip=alignclip, prompts=prompts, llip=llip_section)
SECTIONS = DEFAULT | dict(largest=largest)


def measure(c: BenchConfig) -> Bench:
    """Runs sections.   Raises: ValueError for a section or a value that does not exist."""
    if unknown := [name for name in c.sections if name not in SECTIONS]:
        raise ValueError(f"section {unknown[0]!r}: there are {', '.join(SECTIONS)}")
    if c.precision not in ("fp32", "bf16") or c.repeats < 2:
        raise ValueError("--precision is fp32 or bf16, --repeats at least 2")
    b = Bench(c)
    if c.out:
        output_folder(c.out)
    print(f"{machine(b.device)}, torch {torch.__version__}")
    for b.section in c.sections or DEFAULT:
        print(f"\n{b.section}: {SECTIONS[b.section].__doc__.splitlines()[0]}")
        SECTIONS[b.section](b)
    return b


@program
def main(argv: list[str]) -> None:
    b = measure(parse(BenchConfig, argv, __doc__, positional=("sections",)))
    print(f"\n{table(b.rows)}")
    if b.c.quick:
        print("\n".join(slower(b.rows, SPEED.read_text())))


if __name__ == "__main__":
    leave(main())
