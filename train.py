"""One training loop for every method, from a laptop to torchrun.

    python train.py --method llip                                    embedded scenes, CPU, two minutes
    python train.py --method clip --train-data captions.csv          your own pairs
    torchrun --nproc_per_node 8 train.py --preset llip-B-16 --train-data 'shards/{00000..00999}.tar'
    python train.py --preset llip-L-14 --dry-run                     parameters, FLOPs, memory, steps
    python train.py --resume auto                                    go on where the last run stopped

The global batch is what you give; ranks and chunks (--accumulate) only decide where it is computed. The
contrastive gradient is exact for any of them: local rows against every rank's columns, GradCache (Gao et
al. 2021, arXiv:2101.06983) over chunks. Every random choice of the data is a function of (seed, epoch,
sample), so that a resumed run, or one on more ranks, sees the same batches. On a CPU the same seed gives
the same bits, interrupted or not, with any number of workers; on other ranks, the same up to rounding. A GPU
promises none of it: its sums are taken in whatever order its threads arrive.

A run directory holds config.json, metrics.jsonl, checkpoint.pt, tokenizer.json, results.json, curves.png.
"""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import evaluate
import tasks
from baselines import finetuning
from model import CONFIGS
from scale import costs, distributed
from scale.gradcache import training_step  # noqa: F401  (train.training_step is public)
from tasks import PairTask
from util import files, plots, text
from util import flags as options
from util.report import format_table
from util.run import Run, StopSignal, check_same_run, git_commit

OBJECTIVES = {"clip": "infonce", "siglip": "siglip", "llip": "siglip"}
TASKS = dict.fromkeys(OBJECTIVES, PairTask) | dict.fromkeys(finetuning.METHODS, finetuning.LabelTask)


# what torch says when another rank, or a loader worker, was killed (out of memory, most often)
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")
LOST += ("DataLoader worker",)


# fmt: off
@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. The parser and its help are generated from these lines."""

    # what is trained
    method: str = "llip"  # clip siglip llip finetune labelsmooth clipood alignclip flyp coop cocoop maple tes
    preset: str = ""  # a paper's run: llip-B-32 llip-B-16 llip-L-14 llip-H-14 llip-G-14 clip-B-32 siglip-B-32
    model: str = "tiny"  # tiny small ViT-S-16 ViT-B-32 ViT-B-16 ViT-L-14 ViT-L-14-336 ViT-H-14 ViT-bigG-14
    init: str = ""  # start from this checkpoint: a path, a run, or a name as ViT-B/32
    image_size: int = 0  # pixels; 0: the model's own
    mixture_tokens: int = 8  # Llip: mixture tokens M
    mixture_heads: int = 4  # Llip: heads of the pooling
    temperature: float = 5.0  # Llip: tau, larger is softer
    mixture_norm: bool = False  # Llip: LayerNorm on keys, values and queries
    pooling: str = "text"  # Llip: by the text; without it, the ladder of its Fig. 3: register average learned
    all_tokens: bool = False  # Llip: patches are keys and values too
    text_tokens: int = 0  # Llip: latent tokens of a caption, an experiment of ours; 0: none
    objective: str = ""  # infonce or siglip; empty: the method's own
    # data
    train_data: str = "scenes"  # scenes, broad, a CSV/TSV/JSON/JSONL list, a folder, shards a{00..99}.tar
    val_data: str = ""  # for retrieval; empty: the training data's own test or val split
    zeroshot_data: str = ""  # a folder of classes, or scenes; empty: scenes for scenes, otherwise none
    image_root: str = ""  # where the images of a list are; empty: beside the list
    allow_outside: bool = False  # read what a list names, or links to, outside of its images' folder
    image_key: str = ""  # column or field of the image path; empty: guessed
    caption_key: str = ""  # column or field of the caption; empty: guessed
    vocab: str = ""  # learn, openai, or a vocabulary file; empty: learn for models under 49,408 tokens
    train_size: int = 12288  # scenes to draw
    test_seed: int = 0  # scenes: of the test pictures, the same ones for every --seed
    bias: float = 0.0  # scenes: how often a background is the home of what stands before it
    crop_scale: float = 0.9  # random crops keep at least this share of the area; 1: no crops
    workers: int = 0  # loader processes per rank
    # fine-tuning on classes (defaults of the flags above and below: finetuning.py)
    open_task: str = "domain-shift"  # what is held out: domain-shift, open-class or in-the-wild
    target_domain: str = ""  # the domain left out of training
    whole_target: bool = False  # domain-shift: test on all of the target, not on DomainBed's 20 %
    shots: int = 0  # images per class to train on; 0: all
    template: str = ""  # a text with {}, or a name in prompts.py; empty: the data's own
    margin: float = 0.3  # lambda of the margin metric softmax; finetune, labelsmooth: 0
    smoothing: str = ""  # none, uniform, mixture or released; empty: the method's own
    epsilon: float = 0.9  # the label's own share of a smoothed target
    smoothing_scale: float = 35.0  # of the text cosines that share out the rest
    align_attention: bool = True  # AlignCLIP: attention alignment
    similarity: str = "label"  # AlignCLIP: align the label's map in the last layer, all maps, or none
    align_weight: float = 10.0  # AlignCLIP: of both; the submission had 1
    align_layers: int = 0  # AlignCLIP: first blocks whose attention is aligned; 0: 5
    branch: str = "dv"  # AlignCLIP: second branch, dv vvv qqv or kkv
    guidance_temperature: float = 1.0  # AlignCLIP: 1 is nearly uniform, 0.01 pointed
    detach: bool = False  # AlignCLIP: no gradient into the second branch
    image_pooling: str = "cls"  # finetune, labelsmooth, clipood: cls, or average of the patches
    bma_beta: float = 0.5  # Beta moving average of the weights, the model reported; 0: off
    context: int = 0  # coop, cocoop, maple: learned vectors; 0: 16, 4, 2
    context_words: str = ""  # coop, cocoop, maple: what they start as; empty: random, "a photo of a" twice
    context_position: str = "end"  # coop: the class name after, amid or before the context: end middle front
    class_context: bool = False  # coop: a context for each class
    prompt_depth: int = 0  # maple: blocks with prompts; 0: 9, or all there are
    tes_temperature: float = 0.03  # tes: of the names' distribution
    tes_share: float = 0.2  # tes: of the names in the target
    tes_weight: float = 0.4  # tes: of the projection's own loss
    # optimisation
    optimizer: str = "adamw"  # adamw, or sgd or nesterov with momentum beta1
    batch_size: int = 96  # pairs over all ranks and chunks
    accumulate: int = 1  # chunks of a rank's batch, exact
    steps: int = 1000  # optimizer steps
    epochs: float = 0.0  # instead of steps
    lr: float = 1.5e-3  # peak learning rate
    warmup: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # not on biases, norms and scalars
    beta1: float = 0.9  # AdamW, or the momentum of SGD
    beta2: float = 0.95  # AdamW
    eps: float = 1e-6  # AdamW
    clip_norm: float = 0.0  # clip the gradient's norm; 0: off
    logit_scale: float = 0.0  # start of exp(logit_scale); 0: 1/0.07 for infonce, 10 for siglip
    logit_bias: float = math.nan  # start of the bias; nan: -ln(batch - 1), at least -10
    # running
    precision: str = "auto"  # fp32 or bf16 (towers only); auto: bf16 on GPUs
    compile: bool = False  # torch.compile the towers
    grad_checkpointing: bool = False  # recompute blocks in the backward pass
    device: str = "auto"  # cpu, cuda or auto
    threads: int = 0  # CPU threads per process; 0: torch's choice
    seed: int = 0  # of weights, data order, crops and captions
    out: str = ""  # run directory; empty: runs/METHOD, or the next free runs/METHOD-N
    resume: str = ""  # auto: the newest checkpoint of this run or method; or a run directory
    log_every: int = 50  # steps
    eval_every: int = 0  # steps; 0: only at the end
    save_every: int = 500  # steps; the end and a signal always save
    overfit: int = 0  # sanity: fit only the first N pairs, which must reach a loss near 0
    dry_run: bool = False  # print parameters, FLOPs, bytes and memory, and stop


# fmt: on
def _paper(model, tokens, heads, tau, lr, **more) -> dict:
    """Llip's recipe (facebookresearch/Llip@d5649c3): 12.8 billion samples, 2,000 steps of warm-up."""
    run = dict(method="llip", model=model, mixture_tokens=tokens, mixture_heads=heads, temperature=tau)
    run |= dict(batch_size=32768, steps=390625, lr=lr, beta2=0.95, eps=1e-6, weight_decay=0.2, warmup=2000)
    return run | dict(precision="bf16", compile=True, workers=8, log_every=100, save_every=1000) | more


_BIG = dict(grad_checkpointing=True, compile=False)
PRESETS = {
    # Lavoie et al. 2024, Table 1, on MetaCLIP's 2.5 billion pairs; zero-shot ImageNet top-1 at the end
    "llip-B-32": _paper("ViT-B-32", 64, 8, 5.0, 5e-4),  # 128 V100; 70.4
    "llip-B-16": _paper(
        "ViT-B-16", 32, 8, 5.0, 5e-4
    ),  # 128 V100; 75.3 with 64 tokens; the released one has 32
    "llip-L-14": _paper("ViT-L-14", 32, 8, 1.0, 4e-4),  # 128 A100; 80.9
    "llip-H-14": _paper("ViT-H-14", 64, 8, 5.0, 4e-4, mixture_norm=True, **_BIG),  # 82.7
    "llip-G-14": _paper("ViT-bigG-14", 64, 8, 5.0, 4e-4, mixture_norm=True, **_BIG),  # 83.5
    # the baselines of the same table
    "clip-B-32": _paper("ViT-B-32", 1, 8, 5.0, 5e-4, method="clip", beta2=0.98),  # 67.6 (MetaCLIP)
    "siglip-B-32": _paper("ViT-B-32", 1, 8, 5.0, 5e-4, method="siglip"),  # 67.3
}


# ---- model, optimizer, schedule ------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay on matrices only. PAPER: embeddings, positions and projections are matrices and do decay."""
    some = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in some if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in some if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(c: TrainConfig, groups: list[dict], device: torch.device):
    if c.optimizer == "adamw":
        fused = device.type in ("cuda", "cpu") or None  # SPEED: one pass over the weights
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=fused)
    return torch.optim.SGD(groups, lr=c.lr, momentum=c.beta1, nesterov=c.optimizer == "nesterov")


def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up to c.lr, then a cosine to 0 at c.steps; step counts from 0."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    return c.lr * 0.5 * (1 + math.cos(math.pi * (step - c.warmup) / max(1, c.steps - c.warmup)))


# ---- the loop ------------------------------------------------------------------------------------------


def train(c: TrainConfig) -> dict:
    """Trains, evaluates and saves one run; the same code for every method, on one process or many.

    Returns: {"retrieval": {...}, "zeroshot": {...}} as written to results.json.
    """
    device = distributed.setup(c.device)
    torch.manual_seed(c.seed)  # the same weights on every rank
    if c.threads:
        torch.set_num_threads(c.threads)
    world = distributed.world_size()
    if c.batch_size % (world * c.accumulate):
        raise ValueError(f"batch {c.batch_size} is not divisible by {world} ranks x {c.accumulate} chunks")
    run = Run(c)
    try:
        return loop(c, run, device)
    except BaseException:
        run.withdraw()
        raise


def loop(c: TrainConfig, run: Run, device: torch.device) -> dict:
    """The run itself, in a directory that is this process' alone; returns what train returns."""
    main, world = distributed.rank() == 0, distributed.world_size()
    say = print if main else (lambda *a, **k: None)
    task = TASKS[c.method](c)
    if c.epochs:
        c = replace(c, steps=max(1, round(c.epochs * (len(task.train) // c.batch_size))))

    # initialisation, in this order: the run's own checkpoint, else --init, else random
    raw = task.model.to(device).train()
    task.clip.set_grad_checkpointing(c.grad_checkpointing)
    task.begin(c)
    optimizer = build_optimizer(c, parameter_groups(raw, c.weight_decay), device)
    start, window = 0, [0.0, 0]
    chance = task.chance()  # of the start: afterwards bias and scale are learned ones
    saved = run.load() if c.resume else None
    if saved:
        check_same_run(saved["config"], asdict(c))
        task.load(saved)
        optimizer.load_state_dict(saved["optimizer"])
        start, window = saved["step"], list(saved["window"])
        done = f"{run.path}: all {start} steps done"
        say(done if start == c.steps else f"resuming {run.path} at step {start}")
    if distributed.mean({"start": start})["start"] != start:
        raise ValueError(f"{run.path}: not every rank sees the checkpoint; use a shared folder")
    if saved and start == c.steps and (results := run.results()) is not None:
        if results:
            say(f"\n{evaluate.results_table(results)}")
        if main:  # the run may have ended before its pictures were whole
            with run.writing():
                pictures(run, results)
        say(f"as in {run.path / 'results.json'}: finished before, nothing was computed now")
        return results
    run.rewind(start)
    model = torch.compile(raw) if c.compile else raw
    if world > 1:
        model = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    bf16 = c.precision == "bf16" or (c.precision == "auto" and device.type == "cuda")
    if bf16:
        task.autocast = lambda: torch.autocast(device.type, torch.bfloat16)

    if main:
        with run.writing():
            files.write_json(run.path / "config.json", asdict(c) | {"commit": git_commit()})
            task.tokenizer.save(run.path / "tokenizer.json")
    parameters = sum(p.numel() for p in raw.parameters())
    say(f"{c.method} {c.init or c.model}: {parameters:,} parameters, {len(task.train):,} images")
    precision = "bf16" if bf16 else "fp32"
    say(f"{c.steps:,} steps of {c.batch_size} {task.unit} over {world} x {device.type}, {precision}")
    say(f"-> {run.path}")
    say(f"chance loss: {chance}")

    def state(step: int) -> dict:
        return {
            **task.state(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "samples": step * c.batch_size,
            "window": [distributed.mean({"loss": float(window[0])})["loss"], window[1]],
            "config": asdict(c),
            "commit": git_commit(),
        }

    batches, stop, results = task.batches(start), StopSignal(), {}
    began, seen, waited, last_ids = time.time(), 0, 0.0, None
    for step in range(start, c.steps + 1):  # once more than steps: the last pass evaluates and saves
        last = step == c.steps
        due = last or (c.eval_every and step > start and step % c.eval_every == 0)
        if due and not c.overfit:
            results = timed_evaluation(task, raw, say)
            if results and step > start:
                run.log(step=step, **results)
        stopping = stop.agreed()  # TRAP: asked first, or a step that saves anyway never asks
        if step > start and (last or step % c.save_every == 0 or stopping):
            check_finite(window, step, c, task, last_ids, run, raw.parameters())
            run.save(state(step))
        if stopping:
            say(f"stopped at step {step}; python train.py --resume {run.path} with the same flags goes on")
            raise KeyboardInterrupt
        if last:
            break

        clock = time.time()
        batch = next(batches)
        waited += time.time() - clock
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        optimizer.zero_grad(set_to_none=True)
        loss = task.step(model, batch, device)
        if c.clip_norm:
            nn.utils.clip_grad_norm_(raw.parameters(), c.clip_norm)
        optimizer.step()
        task.after_step()
        window, last_ids = [window[0] + loss, window[1] + 1], batch.ids
        seen += c.batch_size

        if (step + 1) % c.log_every == 0 or step + 1 == c.steps:
            check_finite(window, step + 1, c, task, last_ids, run)  # the only place that waits for the GPU
            mean = {"loss": float(window[0]) / window[1]} | task.logged(window[1])
            mean = distributed.mean(mean, device)
            window = [0.0, 0]
            scale = task.clip.logit_scale.exp().item()
            run.log(step=step + 1, **mean, lr=learning_rate(step, c), scale=scale)
            spent = time.time() - began
            left = spent / (step + 1 - start) * (c.steps - step - 1)
            say(
                f"step {step + 1:6}/{c.steps}  loss {mean['loss']:7.4f}  scale {scale:5.1f}  "
                f"{seen / spent:7.0f} {task.unit}/s  waiting for data {waited / spent:4.0%}  "
                f"ETA {text.duration(left)}",
                flush=True,
            )
    finish(run, task, c, results, time.time() - began if start < c.steps else 0.0, say)
    stop.close()
    return results


def timed_evaluation(task, model: nn.Module, say) -> dict:
    began = time.time()
    model.eval()
    with torch.no_grad():
        results = task.evaluate(model)
    model.train()
    say(f"evaluated in {text.duration(time.time() - began)}")
    return results


def check_finite(window: list, step: int, c: TrainConfig, task, ids, run: Run, weights=()) -> None:
    """Stops all ranks before a broken state is saved.

    Raises: ValueError with steps, samples, the last good checkpoint and a hint: the loss of any rank,
            or a weight, is not finite.
    """
    bad = not math.isfinite(float(window[0])) or not all(bool(p.isfinite().all()) for p in weights)
    if not distributed.mean({"bad": bad})["bad"]:
        return
    names = [task.train.name(int(i)) for i in ids[:3]]
    raise ValueError(
        f"the loss or a gradient is not finite in steps {step - window[1] + 1}..{step}"
        f" (last batch: {', '.join(names)}); nothing was saved since, {run.kept()}."
        f" Try a lower --lr (now {c.lr:g}), --clip-norm 1 or --precision fp32"
    )


def finish(run: Run, task, c: TrainConfig, results: dict, seconds: float, say) -> None:
    """Results table, results.json, curves.png and results.png; seconds of training, 0 if there was none."""
    if not run.writes:
        return
    if c.overfit:
        loss = run.metrics()[-1]["loss"]
        verdict = (
            f"the model can learn these {task.unit} by heart"
            if task.fits(loss)
            else "too high: something is wrong"
        )
        say(f"overfit {c.overfit} {task.unit}: loss {loss:.4f}, {verdict}")
        return
    if results:
        say(f"\n{evaluate.results_table(results)}")
    with run.writing():
        files.write_json(run.path / "results.json", results)
        pictures(run, results)
    trained = f"trained in {text.duration(seconds)}; " if seconds else ""
    say(f"{trained}model, metrics and picture in {run.path}")


def pictures(run: Run, results: dict) -> None:
    """curves.png: the loss, and figures that were measured more than once; results.png: against chance."""
    logged = run.metrics()
    panels = {"training loss": {"loss": [(m["step"], m["loss"]) for m in logged if "loss" in m]}}
    for name, result in results.items():
        shown = [k for k in result["chance"] if k in result]
        points = {k: [(m["step"], m[name][k]) for m in logged if name in m] for k in shown}
        panels |= {name: points} if any(len(line) > 1 for line in points.values()) else {}
    plots.lines(run.path / "curves.png", panels)
    bars = {
        f"{name} {k}": {"here": (100 * result[k], 0.0), "chance": (100 * chance, 0.0)}
        for name, result in results.items()
        for k, chance in result["chance"].items()
        if k in result and k not in ("i2t@5", "t2i@5", "i2t@10", "t2i@10", "top5")
    }
    if bars:
        plots.bars(run.path / "results.png", bars, "per cent")


# ---- command line --------------------------------------------------------------------------------------


def check_numbers(c: TrainConfig) -> None:
    """Raises: ValueError for a number that cannot be meant."""
    positive = "batch_size steps accumulate log_every save_every mixture_tokens mixture_heads train_size"
    limits = {name: (1, math.inf, "must be at least 1") for name in positive.split()}
    counts = "image_size workers threads eval_every warmup overfit epochs clip_norm weight_decay seed"
    counts += " logit_scale"
    limits |= {name: (0, math.inf, "must not be negative") for name in counts.split()}
    limits |= {name: (0, 0.999999, "must lie in [0, 1)") for name in ("beta1", "beta2")}
    tiny = sys.float_info.min
    limits |= {name: (tiny, 1e30, "must be positive") for name in ("lr", "temperature", "eps")}
    limits["bias"] = (0, 1, "must lie in [0, 1]")
    limits["crop_scale"] = (tiny, 1, "must lie in (0, 1]")
    for name, (low, high, message) in limits.items():
        if not low <= getattr(c, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: {message}")


def resolve(c: TrainConfig, given: set[str]) -> TrainConfig:
    """Presets and derived values, computed once.   Raises: ValueError for values that cannot be."""
    if c.preset:
        if c.preset not in PRESETS:
            raise ValueError(f"preset {c.preset!r}: there are {', '.join(PRESETS)}")
        c = replace(c, **{k: v for k, v in PRESETS[c.preset].items() if k not in given})
    if c.method not in TASKS:
        raise ValueError(f"method {c.method!r}: there are {', '.join(TASKS)}")
    if c.model not in CONFIGS:
        raise ValueError(f"model {c.model!r}: there are {', '.join(CONFIGS)}")
    if c.method in finetuning.METHODS:
        c = finetuning.defaults(c, given)
    if c.overfit:
        c = replace(c, batch_size=c.overfit, weight_decay=0.0, warmup=min(c.warmup, 5))
        c = c if "steps" in given else replace(c, steps=300)
    c = replace(c, objective=c.objective or OBJECTIVES.get(c.method, "infonce"))
    allowed = {"objective": ("infonce", "siglip"), "precision": ("auto", "fp32", "bf16")}
    allowed["optimizer"] = ("adamw", "sgd", "nesterov")
    allowed["pooling"] = ("text", "register", "average", "learned")
    for name, values in allowed.items():
        if getattr(c, name) not in values:
            raise ValueError(f"{name} {getattr(c, name)!r}: expected one of {', '.join(values)}")
    variant = c.pooling != "text" or c.all_tokens or c.text_tokens
    if variant and c.method != "llip" or c.pooling != "text" and (c.all_tokens or c.text_tokens):
        raise ValueError("--pooling, --all-tokens, --text-tokens: variants of llip, one at a time")
    check_numbers(c)
    return c


def describe_costs(c: TrainConfig) -> str:
    """The report of --dry-run. The model is built on the meta device, without memory for its weights."""
    if c.init or c.epochs or c.text_tokens:
        raise ValueError(
            "--dry-run counts a model of --model over --steps: leave out --init, --epochs, --text-tokens"
        )
    config = CONFIGS[c.model]
    if c.image_size:
        config = replace(config, image_size=c.image_size)
    with torch.device("meta"):
        model = tasks.build_model(c, config)
    title = f"{c.preset or c.method} {c.model}"
    half, checkpointed = c.precision != "fp32", c.grad_checkpointing
    run = (c.steps, c.batch_size, c.objective, c.accumulate, half, checkpointed)
    lines, rows = costs.report(model, title, *run)
    return "\n".join([*lines, format_table(rows)])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    flags = options.parse(TrainConfig, argv, __doc__)
    try:
        c = resolve(flags, options.explicit(argv))
        if c.dry_run:
            print(describe_costs(c))
        else:
            train(c)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        rank = f" on rank {distributed.rank()}" if distributed.rank() else ""
        print(f"error{rank}: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not (words := [words for words in LOST if words in str(error)]):
            raise
        print(
            f"error on rank {distributed.rank()}: another process was lost ({words[0]});"
            " --resume auto goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return 1
    finally:
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)  # TRAP: gloo's destructor can hang at exit
    sys.exit(code)
