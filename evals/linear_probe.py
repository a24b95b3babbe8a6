"""Linear probe: top-1 of a logistic regression on the features of a frozen image tower.

    python -m evals.linear_probe --model runs/llip --data scenes

The features are the output of ln_post before any projection, as in CLIP's own probes. Llip's rebuttal does
not say how the M mixture tokens become one feature. Their mean and their concatenation are evaluated.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import evaluate
from llip import mixture_tokens
from util.evaluation import DataFlags, ModelFlags, load_options, options_of, start, where_of, write_results
from util.flags import parse
from util.program import leave, program
from util.report import Progress, format_table
from util.text import warn


def encode(model: nn.Module, dataset, precision="fp32", **options) -> Tensor:
    """The output of ln_post for the class or mixture tokens of every image: (N, M, D) fp32 on the CPU."""
    rows = []
    with evaluate.evaluating(model) as device:
        for images, _ in evaluate.image_batches(model, dataset, **options):
            with evaluate.towers(device, precision):
                tokens = mixture_tokens(model.visual, images)
            rows.append(tokens.float().cpu())  # (b, M, D)
    return torch.cat(rows)


def reduced(tokens: Tensor) -> dict[str, Tensor]:
    """One feature an image: (N, M, D) -> "mean" (N, D), "concatenation" (N, M D); "class token" if M = 1."""
    if tokens.shape[1] == 1:
        return {"class token": tokens[:, 0]}
    return {"mean": tokens.mean(1), "concatenation": tokens.flatten(1)}


def fit_lbfgs(x: Tensor, y: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS in fp64, from zero.

    Radford et al. 2021, appendix A.3 (scikit-learn's objective): sum_i CE_i + strength / 2 |W|^2 with a free
    bias, at most 1,000 iterations. REF: it ends where no slope exceeds 1e-5; scikit-learn's default is 1e-4.
    SPEED: W = P A, with the principal axes P of x, scaled to equal curvature of the loss. A takes tens of
    iterations, not thousands. Directions without an image get weight 0.
    Args: x (N, D), y (N,).   Returns: W (D, C), b (C,).
    """
    N, mean = len(x), x.double().mean(0)
    x = x.double() - mean
    if N < x.shape[1]:
        _, values, axes = torch.linalg.svd(x, full_matrices=False)  # (N,), (N, D)
        squares, axes = values.square(), axes.t()  # (D, N)
    else:
        squares, axes = torch.linalg.eigh(x.t() @ x)  # (D,), (D, D)
    length = N**0.5 * (squares.clamp(min=0) / classes + strength).rsqrt()  # (r,)
    basis = axes * length  # (D, r), P above
    z = x @ basis  # (N, r)
    weight, bias = (z.new_zeros(shape, requires_grad=True) for shape in ((z.shape[1], classes), classes))
    options = dict(tolerance_grad=1e-5, tolerance_change=1e-12, line_search_fn="strong_wolfe")
    solver = torch.optim.LBFGS([weight, bias], max_iter=1000, history_size=20, **options)

    def objective() -> Tensor:
        solver.zero_grad()
        penalty = strength / 2 * (length[:, None] * weight).square().sum()
        loss = F.cross_entropy(z @ weight + bias, y) + penalty / N
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    weight = basis @ weight.detach()  # (D, C)
    return weight, bias.detach() - mean @ weight


def fit_adamw(x: Tensor, y: Tensor, classes: int, strength: float, seed=0, epochs=10) -> tuple:
    """A linear layer on features of unit length by AdamW; strength is the weight decay.

    No equation; LAION-AI/CLIP_benchmark metrics/linear_probe.py: lr 0.1, cosine without warm-up, batch 64,
    10 epochs; the start is nn.Linear's.   Args: x (N, D), y (N,).   Returns: W (D, C), b (C,).
    """
    g = torch.Generator().manual_seed(seed)
    bound, shapes = x.shape[1] ** -0.5, ((x.shape[1], classes), (classes,))
    weight, bias = (((2 * torch.rand(s, generator=g) - 1) * bound).requires_grad_() for s in shapes)
    solver = torch.optim.AdamW([weight, bias], weight_decay=strength)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(x), generator=g).split(64)]
    with torch.enable_grad():
        for step, rows in enumerate(batches):
            solver.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            solver.zero_grad()
            F.cross_entropy(x[rows] @ weight + bias, y[rows]).backward()
            solver.step()
    return weight.detach(), bias.detach()


def top1(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    return ((x.to(weight.dtype) @ weight + bias).argmax(1) == y).double().mean().item()


def search(score, count: int = 97) -> int:
    """The index below count with the highest score(index), and the largest of equal ones.

    Radford et al. 2021, appendix A.3: 96 steps in log space, every 16th first, then nearer to the best.
    """
    scores = {k: score(k) for k in range(0, count, 16)}
    for span in (8, 4, 2, 1):
        best = max(scores, key=lambda k: (scores[k], k))
        for k in (best - span, best + span):
            if 0 <= k < count and k not in scores:
                scores[k] = score(k)
    return max(scores, key=lambda k: (scores[k], k))


# name: (fit, the weakest and the strongest regularisation, whether features get unit length)
SOLVERS = {"l-bfgs": (fit_lbfgs, 1e-6, 1e6, False), "adamw": (fit_adamw, 1e-6, 1e2, True)}


def probe(solver: str, parts: dict, classes: int, progress: str = "", **more) -> dict:
    """Chooses the regularisation on validation, then fits train and validation together and tests.

    Args:    parts: {"train" | "val" | "test": (x (N, D), y (N,))};  more: arguments of fit
    Returns: "top1" and "val" in [0, 1], "strength"
    """
    fit, low, high, unit = SOLVERS[solver]
    if unit:
        parts = {name: (F.normalize(x, dim=-1), y) for name, (x, y) in parts.items()}
    strengths = [low * (high / low) ** (k / 96) for k in range(97)]
    # at most 7 + 4 x 2 fits of the search, and the last one
    shown, accuracy = Progress(progress, 16, "fits at most"), {}

    def score(k: int) -> float:
        accuracy[k] = top1(*parts["val"], *fit(*parts["train"], classes, strengths[k], **more))
        shown.add(1)
        return accuracy[k]

    best = search(score)
    shown.total, shown.unit = shown.done + 1, "fits"
    x, y = (torch.cat(pair) for pair in zip(parts["train"], parts["val"]))
    fitted = fit(x, y, classes, strengths[best], **more)
    shown.add(1)
    return {"top1": top1(*parts["test"], *fitted), "val": accuracy[best], "strength": strengths[best]}


def split_for(parts: dict, seed: int) -> dict:
    """{"train" | "val" | "test": (x, y)}: missing parts are drawn from "train", or from "all".

    Each part gets its share of every class; a class with fewer images than parts is in train only.
    PAPER: CLIP splits the training set where there is no validation part. Shares here: 60, 20, 20 or 80, 20.
    """
    if "val" in parts:
        return parts
    x, y = parts["all" if "all" in parts else "train"]
    first, others, draw = [], [[] for _ in range(2 if "all" in parts else 1)], data.generator(seed, "probe")
    least, few = 1 + len(others), 0
    for c in y.unique().tolist():
        ids = (y == c).nonzero()[:, 0].tolist()
        few += len(ids) < least
        if len(ids) >= least:
            share, ids = max(1, round(0.2 * len(ids))), draw.sample(ids, len(ids))
            for part in others:
                part += ids[-share:]
                ids = ids[:-share]
        first += ids
    if not others[-1]:
        raise ValueError(f"no class has {least} images, one for each part of the split")
    if few:
        warn(f"{few} classes have fewer than {least} images and are not tested")
    rows = zip(("train", "val", "test"), map(sorted, [first, *others]))
    return parts | {name: (x[ids], y[ids]) for name, ids in rows}


@dataclass(frozen=True, kw_only=True)
class Flags(DataFlags, ModelFlags):
    seed: int = 0  # of AdamW, and of the split where the data have none


def probe_data(flags: Flags, model: nn.Module) -> dict:
    """Labelled data: "train", "test" (or the validation part, as for ImageNet), perhaps "val"; or "all"."""
    if flags.split:
        raise ValueError("--split: a probe trains on one part and tests on another, leave it out")
    names = ["train", "val", "test"]
    if flags.data != "scenes":
        splits = getattr(data.open_dataset(flags.data, **where_of(flags)), "splits", {})
        names = [name for name in names if name in splits]
    if "train" not in names or len(names) < 2:
        return {"all": evaluate.open_data(flags, model, "labels")}
    parts = {name: evaluate.open_data(replace(flags, split=name), model, "labels") for name in names}
    return parts if "test" in parts else {"train": parts["train"], "test": parts["val"]}


@program
def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, __doc__)
    device = start(flags, one_process=True)
    model, _ = evaluate.open_model(flags.model, flags.vocab, towers=True, **load_options(flags))
    tokens, rows = {}, []
    for name, dataset in probe_data(flags, model).items():
        x = encode(model.to(device), dataset, **options_of(flags, f"linear-probe {name}"))  # (N, M, D)
        tokens[name], classes = (x, torch.tensor(dataset.labels)), dataset.classes
    split = split_for(tokens, flags.seed)
    for kind in reduced(x):
        parts = {name: (reduced(x)[kind], y) for name, (x, y) in split.items()}
        for solver, more in (("l-bfgs", {}), ("adamw", {"seed": flags.seed})):
            found = probe(solver, parts, len(classes), f"linear-probe {kind}, {solver}", **more)
            rows.append({"feature": kind, "width": parts["train"][0].shape[1], "solver": solver} | found)
    shown = [row | {"top1": 100 * row["top1"], "val": 100 * row["val"]} for row in rows]
    print(f"top-1 on test and validation images, %\n{format_table(shown, digits=2)}")
    counts = ", ".join(f"{name} {len(y):,}" for name, (_, y) in tokens.items())
    print(f"images: {counts}  classes {len(classes)}  chance {100 / len(classes):.2f} %")
    about = {"task": "linear-probe", "data": flags.data, "models": [flags.model], "chance": 1 / len(classes)}
    write_results(flags, about | {"rows": rows})


if __name__ == "__main__":
    leave(main())
