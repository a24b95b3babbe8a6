"""One training loop for every method, from a laptop to torchrun.

    python train.py --method llip                                    embedded scenes, CPU, two minutes
    python train.py --method clip --train-data captions.csv          your own pairs
    torchrun --nproc_per_node 8 train.py --preset llip-B-16 --train-data 'shards/{00000..00999}.tar'
    python train.py --preset llip-L-14 --dry-run                     parameters, FLOPs, memory, steps
    python train.py --resume runs/llip                               continue a run
    python train.py --method alignclip --help                        the flags of one method

The global batch is --batch-size. Ranks and chunks (--accumulate) only decide where it is computed: the
contrastive gradient is exact for any of them. Every random choice of the data is a function of (seed,
epoch, sample), so a resumed run, or one on more ranks, sees the same batches. On a CPU the same seed gives
the same bits, interrupted or not, with any number of workers; on other ranks the same up to rounding. A GPU
adds in any order.
"""

import math
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import evaluate
import tasks
from baselines import methods
from baselines.methods import parse, resolve
from model import CONFIGS
from scale import costs, distributed
from util import text
from util.evaluation import WhereFlags
from util.files import write_json
from util.flags import flag_of
from util.program import leave, program
from util.report import format_table
from util.run import Clock, Meter, Run, StopSignal, check_same_data, check_same_run, git_commit
from util.text import duration, one_line


# fmt: off
@dataclass(frozen=True)
class TrainConfig(WhereFlags):
    """The flags of every run. The parser and its help are generated from these lines."""

    # what is trained
    method: str = next(iter(methods.METHODS))  # one of the methods listed above
    preset: str = ""  # a published run, which selects its method; listed above
    model: str = "tiny"  # tiny small ViT-S-16 ViT-B-32 ViT-B-16 ViT-L-14 ViT-L-14-336 ViT-H-14 ViT-bigG-14
    init: str = ""  # start from this checkpoint: a path, a run, or a name as ViT-B/32
    image_size: int = 0  # pixels; 0: the model's own. Positions of --init are interpolated
    # data
    train_data: str = "scenes"  # scenes, broad, a CSV/TSV/JSON/JSONL list, a folder, shards a{00..99}.tar
    vocab: str = ""  # learn, openai, or a vocabulary file; empty: learn for models under 49,408 tokens
    train_size: int = 12288  # scenes to draw
    test_seed: int = 0  # scenes: of the test images, which are the same for every --seed
    bias: float = 0.0  # scenes: how often a background belongs to the thing in front of it
    crop_scale: float = 0.9  # random crops keep at least this share of the area; 1: no crops
    workers: int = 0  # loader processes per rank
    # optimisation
    optimizer: str = "adamw"  # adamw, or sgd or nesterov with momentum beta1
    batch_size: int = 96  # pairs or images over all ranks and chunks
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
    # running
    precision: str = "auto"  # fp32 or bf16 (towers only); auto: bf16 on GPUs
    compile: bool = False  # torch.compile the towers
    grad_checkpointing: bool = False  # recompute blocks in the backward pass
    device: str = "auto"  # cpu, cuda, mps or auto
    threads: int = 0  # CPU threads per process; 0: torch's choice
    seed: int = 0  # of weights, data order, crops and captions
    out: str = ""  # run directory; empty: runs/METHOD, or the next free runs/METHOD-N
    resume: str = ""  # a run directory to continue, or auto: the newest one of this --out or method
    log_every: int = 50  # steps
    eval_every: int = 0  # steps; 0: only at the end
    save_every: int = 500  # steps; the end and a signal always save
    overfit: int = 0  # test: train on the first N samples only, which must reach a loss near 0
    data_changed: bool = False  # continue a run although its training data changed
    dry_run: bool = False  # print parameters, FLOPs, bytes and memory, and stop


@dataclass(frozen=True)
class PairConfig(TrainConfig):
    """The flags of methods that learn from image-caption pairs."""

    # pairs
    captions: str = "mixed"  # scenes: mixed (each about one aspect), full (about several things) or both
    freeze: str = ""  # image or text: this tower of --init is not trained (LiT)
    val_data: str = ""  # for retrieval; empty: the training data's own test or val split
    zeroshot_data: str = ""  # classes, or scenes; empty: the labels of the validation data, or scenes
    val_image_root: str = ""  # as --image-root, for --val-data; empty: --image-root
    zeroshot_image_root: str = ""  # as --image-root, for --zeroshot-data


@dataclass(frozen=True)
class LabelConfig(TrainConfig):
    """The flags of methods that fine-tune on classes."""

    # classes
    open_task: str = "domain-shift"  # what is held out: domain-shift, open-class, in-the-wild or all-classes
    target_domain: str = ""  # the domain left out of training
    whole_target: bool = False  # domain-shift: test on all of the target, not on DomainBed's 20 %
    shots: int = 0  # images per class to train on; 0: all
    template: str = ""  # a text with {}, or a name in readers/templates.py; empty: the data's own
# fmt: on


CONFIG = {"pairs": PairConfig, "labels": LabelConfig}
FINISHED = "finished before, nothing was computed now; "


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay on matrices only. PAPER: embeddings, positions and projections are matrices and decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = ([p for p in trained if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = {"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}
    return [g for g in groups if g["params"]]


def build_optimizer(c: TrainConfig, groups: list[dict], device: torch.device):
    if c.optimizer == "adamw":
        # SPEED: one pass over the weights
        fused = device.type in ("cuda", "cpu") or None
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=fused)
    return torch.optim.SGD(groups, lr=c.lr, momentum=c.beta1, nesterov=c.optimizer == "nesterov")


def learning_rate(step: int, c: TrainConfig) -> float:
    """Linear warm-up to c.lr, then a cosine to 0 at c.steps; step counts from 0."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    return c.lr * 0.5 * (1 + math.cos(math.pi * (step - c.warmup) / max(1, c.steps - c.warmup)))


def train(c: TrainConfig, s) -> dict:
    """Trains, evaluates and saves one run; the same code for every method, on one process or many.

    Args:    c, s: what configure returns
    Returns: {"retrieval": {...}, "zeroshot": {...}} as written to results.json.
    """
    device = distributed.setup(c.device)
    torch.manual_seed(c.seed)  # the same weights on every rank
    if c.threads:
        torch.set_num_threads(c.threads)
    world = distributed.world_size()
    if c.batch_size % (world * c.accumulate):
        raise ValueError(f"batch {c.batch_size} is not divisible by {world} ranks x {c.accumulate} chunks")
    distributed.check_same(asdict(c) | asdict(s))
    return loop(c, s, Run(c.out, c.resume, c.method), device)


def loop(c: TrainConfig, s, run: Run, device: torch.device) -> dict:
    """The run itself, in its directory."""
    say = text.say if run.writes else (lambda *values: None)
    task = tasks.TASKS[methods.METHODS[c.method].module.TASK](c, s, run.vocabulary())
    if c.epochs:
        c = replace(c, steps=max(1, round(c.epochs * (task.samples() // c.batch_size))))

    # initialisation, in this order: the run's own checkpoint, else --init, else random
    raw = task.model.to(device).train()
    task.clip.set_grad_checkpointing(c.grad_checkpointing)
    task.begin(c)
    optimizer = build_optimizer(c, parameter_groups(raw, c.weight_decay), device)
    expected = task.expected_loss()
    start, meter = restore(c, s, run, task, optimizer, say)
    if start == c.steps and (results := run.results()) is not None:
        finish(run, task, c, results, FINISHED, say)
        return results
    # as the loop calls it: compiled, and averaging gradients over ranks
    model = torch.compile(raw) if c.compile else raw
    if distributed.world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    if c.precision == "bf16" or (c.precision == "auto" and device.type == "cuda"):
        task.autocast = lambda: torch.autocast(device.type, torch.bfloat16)

    step, results, ids, batches = start, {}, (), task.batches(start)
    introduce(c, s, run, task, start, device, expected, say)
    clock, stop = Clock(c, start, task.unit), StopSignal()
    while True:
        last = step == c.steps  # one pass more than steps: the last one only evaluates and saves

        # once in a while: see whether somebody wants us to stop, save, and then evaluate, which may fail
        stopping = stop.agreed()  # on all ranks, and before saving, so that a stop is never missed
        if step > start and (last or stopping or step % c.save_every == 0):
            check_finite(meter, step, c, task, ids, run, raw.parameters())
            run.save(state(c, s, task, optimizer, step, meter))
        if not stopping and not c.overfit and (last or (c.eval_every and step and step % c.eval_every == 0)):
            began = time.time()
            with evaluate.evaluating(raw):
                results = task.evaluate(raw)
            if results:
                say(f"evaluated in {duration(time.time() - began)}")
                run.log(step=step, **results)
            else:
                say("no validation data: no evaluation")
        if stopping:
            raise KeyboardInterrupt(f"stopped at step {step}; python train.py --resume {run.path} continues")
        if last:
            break

        # one optimizer step on the global batch of this step
        batch = clock.waiting(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        optimizer.zero_grad(set_to_none=True)
        loss, logs = task.step(model, batch, device)  # forward and backward of every chunk
        if c.clip_norm:
            nn.utils.clip_grad_norm_(raw.parameters(), c.clip_norm)
        optimizer.step()
        task.after_step()
        meter.add(loss=loss, **logs)  # stays on the GPU
        step, ids = step + 1, batch.ids

        if step % c.log_every == 0 or step == c.steps:
            check_finite(meter, step, c, task, ids, run)  # the only place that waits for the GPU
            means, scale = meter.means(), task.clip.logit_scale.exp().item()
            run.log(step=step, **means, lr=learning_rate(step - 1, c), scale=scale)
            say(clock.line(step, means["loss"], scale))
    stop.close()
    spent = f"trained in {duration(clock.spent())}; " if start < c.steps else ""
    finish(run, task, c, results, spent, say)
    return results


def restore(c: TrainConfig, s, run: Run, task: tasks.Task, optimizer, say) -> tuple[int, Meter]:
    """Continues from the run's checkpoint with --resume: the step, and what was summed since the last log."""
    saved = run.load() if c.resume else None
    start, meter = 0, Meter()
    if saved:
        check_same_run(saved["config"], asdict(c) | asdict(s))
        try:
            check_same_data(saved["data"], task.fingerprints, c.data_changed, say)
            for flag in (flag for flag in saved["data"] if saved["config"][flag] != getattr(c, flag)):
                say(f"{flag_of(flag)} moved: {saved['config'][flag]} -> {getattr(c, flag)}")
            task.load(saved)
            optimizer.load_state_dict(saved["optimizer"])
            start, meter = saved["step"], Meter(**saved["meter"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{run.checkpoint} does not fit this run ({one_line(error)})") from error
        done = f"{run.path}: all {start} steps are done"
        say(done if start == c.steps else f"resuming {run.path} at step {start}")
    if distributed.mean({"start": start})["start"] != start:
        raise ValueError(f"{run.path}: not every rank sees the checkpoint; use a shared folder")
    return start, meter


def state(c: TrainConfig, s, task: tasks.Task, optimizer, step: int, meter: Meter) -> dict:
    """A checkpoint."""
    numbers = {"step": step, "samples": step * c.batch_size, "meter": meter.state()}
    about = {"config": asdict(c) | asdict(s), "commit": git_commit(), "data": task.fingerprints}
    return {**task.state(), "optimizer": optimizer.state_dict(), **numbers, **about}


def introduce(c: TrainConfig, s, run: Run, task, start: int, device, expected: str, say) -> None:
    """Writes config.json and the tokenizer; prints what is trained on what."""
    if run.writes:
        run.begin(start)
        with run.writing():
            write_json(run.path / "config.json", asdict(c) | asdict(s) | {"commit": git_commit()})
            task.tokenizer.save(run.path / "tokenizer.json")
    parameters = sum(p.numel() for p in task.model.parameters())
    say(f"{c.method} {c.init or c.model}: {parameters:,} parameters, {len(task.train):,} images")
    precision = "fp32" if task.autocast is tasks.Task.autocast else "bf16"
    how = f"{distributed.world_size()} x {device.type}, {precision}"
    say(f"{c.steps:,} steps of {c.batch_size} {task.unit} over {how}")
    if c.warmup > c.steps:
        say(f"the warm-up of {c.warmup} steps is longer than the run: lr {c.lr:g} is never reached")
    say(f"-> {run.path}\nexpected loss: {expected}")


def check_finite(meter: Meter, step: int, c: TrainConfig, task, ids, run: Run, weights=()) -> None:
    """Stops all ranks before a broken state is saved.   Raises: ValueError if a number is not finite."""
    numbers = [torch.as_tensor(meter.sums.get("loss", 0.0)), *weights]
    if distributed.mean({"bad": not all(x.isfinite().all() for x in numbers)})["bad"]:
        names = ", ".join(task.train.name(int(i)) for i in ids[:3])
        raise ValueError(
            f"the loss or a gradient is not finite in steps {step - meter.count + 1}..{step} (last batch:"
            f" {names}); nothing was saved since, {run.kept()}. Try a lower --lr (now {c.lr:g}),"
            " --clip-norm 1 or --precision fp32"
        )


def finish(run: Run, task: tasks.Task, c: TrainConfig, results: dict, done: str, say) -> None:
    """The results table, results.json and pictures; done says what was computed now."""
    if not run.writes:
        return
    if c.overfit:
        loss = run.metrics()[-1]["loss"]
        good = f"the model can learn these {task.unit} by heart"
        verdict = good if task.overfit_ok(loss) else "too high: something is wrong"
        say(f"overfit {c.overfit} {task.unit}: loss {loss:.4f}, {verdict}")
        return
    if results:
        say(f"\n{evaluate.results_table(results)}")
    with run.writing():
        if done != FINISHED:
            write_json(run.path / "results.json", results)
        run.draw(results)
    say(f"{done}model, metrics and pictures in {run.path}")


def configure(**flags) -> tuple[TrainConfig, object]:
    """A TrainConfig and the method's Settings.   Raises: ValueError for a flag or a value that cannot be."""
    return resolve(CONFIG, flags)


def cost_report(c: TrainConfig, s) -> str:
    """The report of --dry-run. The model is built on the meta device, without memory for its weights."""
    if c.init or c.epochs:
        raise ValueError("--dry-run counts a model of --model over --steps: leave out --init and --epochs")
    config = CONFIGS[c.model]
    with torch.device("meta"):
        config = replace(config, image_size=c.image_size or config.image_size)
        model = methods.METHODS[c.method].module.build(s, config, c.batch_size)
    lines, rows = costs.report(model, c, s.objective)
    return "\n".join([*lines, format_table(rows)])


@program
def main(argv: list[str]) -> None:
    try:
        c, s = configure(**parse(CONFIG, argv, __doc__))
        if c.dry_run:
            print(cost_report(c, s))
        else:
            train(c, s)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    leave(main())
