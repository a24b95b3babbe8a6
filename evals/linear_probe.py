"""Three questions to a frozen model: what its features tell, how rich they are, and whether words fool it.

    python evaluate.py linear-probe --model runs/llip --data scenes
    python evaluate.py spectrum     --model runs/llip --more runs/clip --data scenes --out spectrum
    python evaluate.py typographic  --model runs/llip --more runs/clip --data PACS --out typographic

linear-probe  top-1 of a logistic regression on the image tower's output: by L-BFGS as Radford et al. 2021,
              appendix A.3, and by AdamW as CLIP_benchmark. Lavoie et al. probe "the mixture tokens directly"
              and do not say how M tokens become one feature: their mean and their concatenation, both.
spectrum      log singular values of the covariance of the same output, Lavoie et al. 2024, Fig. 5.
typographic   a wrong class name is written over each image. Lavoie et al. show one such image in their
              rebuttal, an apple with "iPod" on it; here it is counted, and a blank note beside it tells what
              covering the image costs anyway.

One protocol serves CLIP, SigLIP, PooledTokens (M tokens) and Llip (M tokens): the output of ln_post before
any projection, which is Llip's "vision-encoder output" and CLIP's choice for its probes.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import data
import evaluate
import pretrained
from evals import open_world as openworld
from llip import mixture_tokens
from readers import templates as prompts
from scale import distributed
from util import plots
from util.files import write_image, write_json
from util.metrics import no_nan, places
from util.report import Progress, format_table
from util.text import warn

# Features, computed once ---------------------------------------------------------------------------------


def encode(
    model: nn.Module,
    dataset,
    batch_size: int = 256,
    precision: str = "fp32",
    workers: int = 0,
    progress: str = "",
) -> Tensor:
    """The image tower's output tokens of every image: (N, M, D) fp32 on the CPU; CLIP has M = 1."""
    transform = data.preprocess(model.config.image_size)
    shown, rows = Progress(progress, len(dataset), "images"), []
    with evaluate.evaluating(model) as device:
        for images, _ in data.eval_batches(dataset, transform, batch_size, workers=workers):
            with evaluate.towers(device, precision):
                tokens = mixture_tokens(model.visual, images.to(device, non_blocking=True))
            rows.append(tokens.float().cpu())  # (b, M, D)
            shown.add(len(images))
    return torch.cat(rows)


def cache_key(source: str, model: nn.Module, dataset, precision: str) -> str:
    """A name for the features of these images under these weights in this precision.

    Images count by name, and by size and time of change where they are files; the first and the last also
    by their pixels, since drawn scenes have no file.
    """
    h = hashlib.sha256()
    with open(pretrained.locate(source), "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    h.update(json.dumps(pretrained.describe(model), sort_keys=True, default=str).encode())
    h.update(f"{precision} {len(dataset)}".encode())
    for i in range(len(dataset)):
        name = dataset.name(i)
        stat = os.stat(name) if os.path.isfile(name) else None
        h.update(f"\0{name}\0{stat and (stat.st_size, stat.st_mtime_ns)}".encode())
    for i in sorted({0, len(dataset) - 1}):
        h.update(dataset.image(i).convert("RGB").tobytes())
    return h.hexdigest()[:32]


def features(source: str, model: nn.Module, dataset, folder: str | Path, **options) -> Tensor:
    """encode(), or what it gave the last time: kept in folder, written whole or not at all."""
    key = cache_key(source, model, dataset, options.get("precision", "fp32"))
    path = Path(folder) / f"{key}.pt"
    if path.is_file():
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # damaged files fail in many ways; all mean the same to the user
            raise ValueError(f"{path} cannot be read: delete it, it is made again") from error
    found = encode(model, dataset, **options)
    try:
        pretrained.write(path, lambda file: torch.save(found, file))
    except OSError as error:  # a full disk must not cost what was computed
        warn(f"{error}; without it the next run encodes again")
    return found


def reduced(tokens: Tensor) -> dict[str, Tensor]:
    """One feature an image: (N, M, D) -> "mean" (N, D), "concatenation" (N, M D); one token is itself."""
    if tokens.shape[1] == 1:
        return {"class token": tokens[:, 0]}
    return {"mean": tokens.mean(1), "concatenation": tokens.flatten(1)}


# Linear probe --------------------------------------------------------------------------------------------


def fit_lbfgs(x: Tensor, y: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS in fp64, from zero.

    Radford et al. 2021, appendix A.3 (scikit-learn's objective): sum_i CE_i + strength / 2 |W|^2; at most
    1,000 iterations; the bias is free.
    REF: it ends where no slope exceeds 1e-5; scikit-learn's default is 1e-4.
    SPEED: solved for A in W = P A, P the principal axes of x, each as long as the loss is flat along it, so
    that all directions curve alike: the same optimum in tens of iterations and not in thousands.
    Args: x (N, D), y (N,).   Returns: W (D, C), b (C,).
    """
    N, mean = len(x), x.double().mean(0)
    x = x.double() - mean
    if N < x.shape[1]:  # W has no part that no image sees
        _, values, axes = torch.linalg.svd(x, full_matrices=False)  # (N,), (N, D)
        squares, axes = values.square(), axes.t()  # (D, N)
    else:
        squares, axes = torch.linalg.eigh(x.t() @ x)  # (D,), (D, D)
    length = N**0.5 * (squares.clamp(min=0) / classes + strength).rsqrt()  # (r,)
    basis = axes * length  # (D, r) this is P
    z = x @ basis  # (N, r)
    weight = torch.zeros(z.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        tolerance_grad=1e-5,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

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


def fit_adamw(
    x: Tensor,
    y: Tensor,
    classes: int,
    strength: float,
    seed: int = 0,
    lr: float = 0.1,
    epochs: int = 10,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """A linear layer on features of unit length by AdamW, strength being the weight decay.

    No equation; LAION-AI/CLIP_benchmark metrics/linear_probe.py: lr 0.1, cosine without warm-up, batch 64,
    10 epochs.   Args: x (N, D), y (N,).   Returns: W (D, C), b (C,).
    """
    g = torch.Generator().manual_seed(seed)
    bound = x.shape[1] ** -0.5  # nn.Linear's start
    weight, bias = (
        ((2 * torch.rand(shape, generator=g) - 1) * bound).requires_grad_()
        for shape in ((x.shape[1], classes), (classes,))
    )
    solver = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=strength)
    steps, step = epochs * -(-len(x) // batch_size), 0
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=g).split(batch_size):
                solver.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                solver.zero_grad()
                F.cross_entropy(x[rows] @ weight + bias, y[rows]).backward()
                solver.step()
                step += 1
    return weight.detach(), bias.detach()


def top1(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    return ((x.to(weight.dtype) @ weight + bias).argmax(1) == y).double().mean().item()


def search(score, count: int = 97) -> int:
    """The best of 0 ... count - 1 by CLIP's search: every 16th first, then half as far around the best.

    Radford et al. 2021, appendix A.3: 96 steps in log space, down to a resolution of 8 a decade. Of equal
    ones the largest, the simplest classifier. Returns what score(k) is highest for, of those it asked.
    """
    scores = {k: score(k) for k in range(0, count, 16)}
    for span in (8, 4, 2, 1):
        best = max(scores, key=lambda k: (scores[k], k))
        for k in (best - span, best + span):
            if 0 <= k < count and k not in scores:
                scores[k] = score(k)
    return max(scores, key=lambda k: (scores[k], k))


# name: (fit, the weakest and the strongest regularisation, features of unit length)
SOLVERS = {"l-bfgs": (fit_lbfgs, 1e-6, 1e6, False), "adamw": (fit_adamw, 1e-6, 1e2, True)}


def probe(solver: str, parts: dict, classes: int, progress: str = "", **more) -> dict:
    """Chooses the regularisation on validation, fits train and validation together, and asks the test.

    Args:    parts: {"train" | "val" | "test": (x (N, D), y (N,))};  progress a label to show it under, empty
             for none;  more: arguments of fit
    Returns: "top1" and "val" in [0, 1], "strength"
    """
    fit, low, high, unit = SOLVERS[solver]
    if unit:
        parts = {name: (F.normalize(x, dim=-1), y) for name, (x, y) in parts.items()}
    asked = {}
    shown = Progress(progress, 16, "fits at most")  # the search's 7 + 4 x 2, and the last one

    def strength(k: int) -> float:
        return low * (high / low) ** (k / 96)

    def score(k: int) -> float:
        asked[k] = top1(*parts["val"], *fit(*parts["train"], classes, strength(k), **more))
        shown.add(1)
        return asked[k]

    best = search(score)
    shown.total, shown.unit = shown.done + 1, "fits"
    x, y = (torch.cat(pair) for pair in zip(parts["train"], parts["val"]))
    fitted = fit(x, y, classes, strength(best), **more)
    shown.add(1)
    return {"top1": top1(*parts["test"], *fitted), "val": asked[best], "strength": strength(best)}


def drawn_split(labels: list[int], shares: tuple[float, ...], seed: int) -> list[list[int]]:
    """Places of labels dealt out class by class: each part gets its share of every class, one at least.

    A class with fewer images than there are parts is in the first part only.
    Raises: ValueError if that leaves the other parts empty.
    """
    parts = [[] for _ in shares]
    draw = data.generator(seed, "probe")
    for c in sorted(set(labels)):
        ids = [i for i, y in enumerate(labels) if y == c]
        if len(ids) < len(shares):
            parts[0] += ids
            continue
        ids, rest = draw.sample(ids, len(ids)), len(ids)
        for part, share in zip(parts[1:], shares[1:]):
            n = min(max(1, round(share * len(ids))), rest - 1)
            part += ids[rest - n : rest]
            rest -= n
        parts[0] += ids[:rest]
    if not parts[-1]:
        raise ValueError(f"no class has {len(shares)} images, one for each part of the split")
    return [sorted(part) for part in parts]


def probe_data(args, model: nn.Module) -> dict:
    """Labelled data by part: train, test and perhaps val; or "all" where the data have no test part."""
    if args.split:
        raise ValueError("--split: a probe trains on one and asks another, leave it out")
    names = ["train", "val", "test"]
    if args.data != "scenes":
        splits = getattr(data.open_dataset(args.data, image_root=args.image_root), "splits", {})
        names = [name for name in names if name in splits]
    if "train" not in names or len(names) < 2:
        return {"all": evaluate.open_data(args, model, "labels")}
    parts = {}
    for name in names:
        args.split = name
        parts[name] = evaluate.open_data(args, model, "labels")
    args.split = None
    if "test" not in parts:
        parts["test"] = parts.pop("val")  # as for ImageNet: what is called val is asked at the end
    return parts


def split_for(parts: dict, seed: int) -> dict:
    """{"train" | "val" | "test": (x (N, M, D), y (N,))}, what is missing drawn from what is there by seed.

    PAPER: CLIP splits the training set where there is no validation part; shares of 60, 20, 20 (or 80, 20).
    """
    if "val" in parts:
        return parts
    source, names = "train", ("train", "val")
    if "all" in parts:
        source, names = "all", ("train", "val", "test")
    x, y = parts[source]
    rows = drawn_split(y.tolist(), (1 - 0.2 * (len(names) - 1),) + (0.2,) * (len(names) - 1), seed)
    return parts | {name: (x[ids], y[ids]) for name, ids in zip(names, rows)}


def linear_probe_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS), help="default: both")
    add("--seeds", type=int, default=3, help="of AdamW, and of splits where the data have none [3]")
    add("--epochs", type=int, default=10, help="of AdamW [10]")
    add("--cache", metavar="DIR", default="runs/features", help="of features [runs/features]")


def linear_probe_command(args, device: torch.device) -> None:
    """Top-1 of logistic regressions on the image tower's output, mean and deviation over seeds."""
    alone(args)
    if args.seeds < 1 or args.epochs < 1:
        raise ValueError(f"--seeds {args.seeds} and --epochs {args.epochs}: must be at least 1")
    model, _ = evaluate.open_on(args, device)
    sets, options = probe_data(args, model), evaluate.options_of(args)
    classes = next(iter(sets.values())).classes
    for name, dataset in sets.items():
        if dataset.classes != classes:
            raise ValueError(f"{args.data}: {name} has other classes than the rest")
    labels = {name: torch.tensor(dataset.labels) for name, dataset in sets.items()}
    if "val" not in sets:
        source, least = ("all", 3) if "all" in sets else ("train", 2)
        counts = torch.bincount(labels[source], minlength=len(classes))
        if few := [name for name, n in zip(classes, counts.tolist()) if n < least]:
            warn(
                f"{len(few)} classes have fewer than {least} images, the first is {few[0]!r}: they are"
                " trained on and not asked"
            )
    tokens = {}
    for name, dataset in sets.items():
        told = options | {"progress": f"{args.task} {name}"}
        tokens[name] = features(args.model, model, dataset, args.cache, **told)
    rows, records = [], []
    for kind in reduced(next(iter(tokens.values()))):
        parts = {name: (reduced(x)[kind], labels[name]) for name, x in tokens.items()}
        for solver in args.solvers:
            runs = []
            for seed in range(args.seeds):
                if seed and solver == "l-bfgs" and "val" in parts:
                    break  # convex, and nothing is drawn: every seed is the first
                more = {} if solver == "l-bfgs" else {"seed": seed, "epochs": args.epochs}
                label = f"{args.task} {kind}, {solver}, seed {seed}"
                runs.append(probe(solver, split_for(parts, seed), len(classes), label, **more))
                records.append({"feature": kind, "solver": solver, "seed": seed, **runs[-1]})
            figures = [100 * run["top1"] for run in runs]
            row = {"feature": kind, "width": parts[next(iter(parts))][0].shape[1], "solver": solver}
            row |= {"strength": f"{runs[0]['strength']:.3g}"}
            row |= {"val %": 100 * statistics.fmean(run["val"] for run in runs)}
            row |= {"top-1 %": statistics.fmean(figures)}
            row["+-"] = statistics.stdev(figures) if len(runs) > 1 else ""
            rows.append(row | {"seeds": len(runs)})
            print(f"{kind}, {solver}: {rows[-1]['top-1 %']:.2f} %", file=sys.stderr, flush=True)
    print(format_table(rows, digits=2))
    counts = ", ".join(f"{name} {len(y):,}" for name, y in labels.items())
    print(f"images: {counts}  classes {len(classes)}  chance {100 / len(classes):.2f} %")
    write_results(
        args, {"models": [args.model], "chance": 1 / len(classes), "rows": rows, "records": records}
    )


# Spectrum ------------------------------------------------------------------------------------------------


def covariance_spectrum(tokens: Tensor) -> Tensor:
    """Singular values of the covariance of all tokens of all images, descending.

    Lavoie et al. 2024, Fig. 5: tokens concatenated on the batch axis, centred, C = Z^T Z / (N M).
    Args: tokens (N, M, D).   Returns: (D,) fp64.
    """
    z = tokens.flatten(0, 1).double()  # (N M, D)
    z = z - z.mean(0)
    return torch.linalg.svdvals(z.t() @ z / len(z))


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of values / their sum: D if all are equal, 1 if one is not 0.

    Roy and Vetterli 2007, "The effective rank", eq. 4; a figure for how slowly a spectrum decays.
    """
    p = values / values.sum()
    return torch.special.entr(p).sum().exp().item()


def spectrum_row(source: str, tokens: Tensor) -> tuple[dict, list]:
    """A row of the table, and the natural logarithms by rank; None where a value is 0 but for rounding."""
    values = covariance_spectrum(tokens)
    N, M, D = tokens.shape
    zero = values[0] * D * torch.finfo(torch.float64).eps
    logs = [math.log(v) if v > zero else None for v in values.tolist()]
    row = {"model": source, "tokens": M, "vectors": N * M, "width": D}
    row["effective rank"] = effective_rank(values)
    for name, k in (("1", 0), ("D/4", D // 4), ("D/2", D // 2), ("3D/4", 3 * D // 4)):
        row[f"ln s at {name}"] = "0" if logs[k] is None else logs[k]
    return row, logs


def more_models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--more", nargs="+", default=[], metavar="RUN", help="further models, beside the first")


def spectrum_arguments(parser: argparse.ArgumentParser) -> None:
    more_models(parser)
    parser.add_argument("--cache", metavar="DIR", default="runs/features", help="of features [runs/features]")


def spectrum_command(args, device: torch.device) -> None:
    """Log singular values of the feature covariance, a table and a picture."""
    alone(args)
    rows, curves, models = [], {}, [args.model, *args.more]
    for source in models:
        args.model = source
        model, _ = evaluate.open_on(args, device)
        dataset = evaluate.open_data(args, model, "image")
        options = evaluate.options_of(args) | {"progress": f"{args.task} {source}"}
        tokens = features(source, model, dataset, args.cache, **options)
        if len(tokens) * tokens.shape[1] <= tokens.shape[2]:
            raise ValueError(
                f"{source}: {len(tokens)} images of {tokens.shape[1]} tokens span less than the width "
                f"{tokens.shape[2]}: the paper took 5,000 images"
            )
        row, curves[source] = spectrum_row(source, tokens)
        rows.append(row)
    print(format_table(rows, digits=2))
    write_results(args, {"models": models, "rows": rows, "log_singular_values": curves})
    if args.out:
        lines = {
            source: [(k, v) for k, v in enumerate(logs) if v is not None] for source, logs in curves.items()
        }
        picture = Path(args.out) / "spectrum.png"
        plots.lines(picture, {"ln of the covariance's singular values": lines}, xlabel="rank")
        print(f"drawn in {picture}")


# Typographic attack --------------------------------------------------------------------------------------


def with_note(image: Image.Image, word: str, blank: bool = False) -> Image.Image:
    """The image with a white note in the lower part of what a centre crop keeps, the word in black on it.

    The type is as large as fits into 0.9 of the width and 0.25 of the height. Args: blank: no word on it
    """
    image = image.convert("RGB")  # a copy, also of an RGB image
    draw, side = ImageDraw.Draw(image), min(image.size)
    for size in range(max(side // 4, 5), 4, -1):
        font = ImageFont.load_default(size)
        left, top, right, bottom = draw.textbbox((0, 0), word, font)
        if right - left <= 0.9 * side and bottom - top <= 0.25 * side:
            break
    pad = max(1, side // 64)
    x = (image.width - (right - left)) // 2
    y = (image.height + side) // 2 - (bottom - top) - 2 * pad - side // 16
    draw.rectangle([x - pad, y - pad, x + right - left + pad, y + bottom - top + pad], "white")
    if not blank:
        draw.text((x - left, y - top), word, "black", font)
    return image


class Noted:
    """Labelled data with a note on every image. Args: words[i] of image i;  blank: as with_note"""

    def __init__(self, dataset, words: list[str], blank: bool = False):
        self.dataset, self.words, self.blank = dataset, words, blank
        self.labels, self.classes, self.name = dataset.labels, dataset.classes, dataset.name

    def __len__(self):
        return len(self.dataset)

    def image(self, i: int) -> Image.Image:
        return with_note(self.dataset.image(i), self.words[i], self.blank)


def wrong_labels(labels: list[int], classes: int, seed: int = 0) -> list[int]:
    """Another class for every image, uniformly among the others.   Raises: ValueError for one class."""
    if classes < 2:
        raise ValueError("one class: there is no wrong name to write on its images")
    return [
        (y + 1 + data.generator(seed, "word", i).randrange(classes - 1)) % classes
        for i, y in enumerate(labels)
    ]


def cosines(model: nn.Module, dataset, text_side, **options) -> Tensor:
    """Cosine of every image to every class, through that class' own caption for Llip: (N, C)."""
    rows = [scores for _, scores in evaluate.score_rows(model, dataset, text_side, **options)]
    logits = torch.cat(rows)  # (N, C)
    bias = 0.0 if model.logit_bias is None else model.logit_bias
    return ((logits - bias) / model.logit_scale.exp()).cpu()


def note_figures(scores: dict[str, Tensor], labels: Tensor, written: Tensor) -> dict[str, dict]:
    """What notes do, for each kind of image.

    Args:    scores {"clean" | "blank" | "word": (N, C)};  labels (N,), written (N,) classes
    Returns: for each kind in [0, 1] "top1"; "word": the answer is the written class; "object_wins": the right
             class scores above the written one, a tie against us; "success": of the images right when clean,
             those now taken for what is written; and the mean cosines "cos_object", "cos_word"
    """
    right = places(scores["clean"], labels) == 0  # (N,)
    found = {}
    for kind, rows in scores.items():
        place, answer = places(rows, labels), no_nan(rows).argmax(1)  # (N,) each
        mine, other = (rows.gather(1, c[:, None])[:, 0] for c in (labels, written))  # (N,) each
        taken = (answer == written) & (place > 0)
        found[kind] = {
            "top1": (place == 0).double().mean().item(),
            "word": taken.double().mean().item(),
            "object_wins": (mine > other).double().mean().item(),
            "success": taken[right].double().mean().item() if right.any() else 0.0,
            "cos_object": mine.double().mean().item(),
            "cos_word": other.double().mean().item(),
        }
    return found


def typographic(
    model: nn.Module, dataset, tokenizer, templates=prompts.PHOTO, seed: int = 0, **options
) -> tuple[dict, list[int], dict]:
    """Clean images, the same with a blank note, and with a wrong class name on the note.

    Returns: note_figures; the written class of every image; the scores they are made of
    """
    written = wrong_labels(dataset.labels, len(dataset.classes), seed)
    words = [dataset.classes[c] for c in written]
    kinds = {"clean": dataset, "blank": Noted(dataset, words, True), "word": Noted(dataset, words)}
    size = {"batch_size": options.get("batch_size", 256), "precision": options.get("precision", "fp32")}
    with evaluate.evaluating(model):
        side = evaluate.encode_classes(model, tokenizer, dataset.classes, templates, **size)
        scores = {}
        for kind, noted in kinds.items():
            label = options.get("progress", "")
            told = options | {"progress": f"{label}, {kind}" if label else ""}
            scores[kind] = cosines(model, noted, side, **told)
    labels, target = torch.tensor(dataset.labels), torch.tensor(written)
    return note_figures(scores, labels, target), written, scores


def contact_sheet(dataset, written: list[int], scores: dict, count: int = 12) -> Image.Image:
    """Some images with their three kinds side by side, and the answer under each."""
    N, side = len(dataset), 112
    ids = [k * N // min(count, N) for k in range(min(count, N))]
    words = [dataset.classes[c] for c in written]
    kinds = {"clean": dataset, "blank": Noted(dataset, words, True), "word": Noted(dataset, words)}
    sheet = Image.new("RGB", (len(ids) * (side + 6) + 6, 3 * (side + 22) + 6), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, i in enumerate(ids):
        for row, (kind, shown) in enumerate(kinds.items()):
            x, y = 6 + column * (side + 6), 6 + row * (side + 22)
            image = shown.image(i).convert("RGB")
            image = image.resize(
                (side, side), Image.Resampling.NEAREST if min(image.size) < side else Image.Resampling.BICUBIC
            )
            sheet.paste(image, (x, y))
            answer = int(scores[kind][i].argmax())
            colour = "#009E73" if answer == dataset.labels[i] else "#D55E00"
            name = dataset.classes[answer].encode("latin-1", "replace").decode("latin-1")
            name = name if len(name) <= 18 else f"{name[:16]}..."
            draw.text((x, y + side + 2), name, colour, font)
    return sheet


def typographic_arguments(parser: argparse.ArgumentParser) -> None:
    more_models(parser)
    parser.add_argument(
        "--templates", nargs="+", metavar="TEXT", help="as for zeroshot (default: the data's own)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the words that are written [0]")


def typographic_command(args, device: torch.device) -> None:
    """Clean, blank-note and attacked accuracy, attack success, cosines under both captions."""
    alone(args)
    rows, results, models, pictures = [], {}, [args.model, *args.more], {}
    for n, source in enumerate(models):
        args.model = source
        model, tokenizer = evaluate.open_on(args, device)
        dataset = evaluate.open_data(args, model, "labels")
        templates = openworld.templates(args.data)
        if args.templates:
            templates = evaluate.read_templates(args.templates)
        options = evaluate.options_of(args) | {"progress": f"{args.task} {source}"}
        found, written, scores = typographic(model, dataset, tokenizer, templates, args.seed, **options)
        results[source] = found
        for kind, figures in found.items():
            row = {"model": source, "image": {"blank": "blank note"}.get(kind, kind)}
            names = {"top1": "top-1 %", "word": "answers the word %", "object_wins": "object wins %"}
            row |= {name: 100 * figures[key] for key, name in names.items()}
            row["attack success %"] = 100 * figures["success"] if kind == "word" else ""
            more = {"cos object": figures["cos_object"], "cos word": figures["cos_word"]}
            rows.append(row | {name: f"{value:.4f}" for name, value in more.items()})
        if args.out:
            picture = Path(args.out) / f"typographic{n + 1 if args.more else ''}.png"
            pictures[picture] = contact_sheet(dataset, written, scores)
    print(format_table(rows, digits=2))
    C = len(dataset.classes)
    print(f"images {len(dataset):,}  classes {C}  chance {100 / C:.2f} %")
    write_results(args, {"models": models, "seed": args.seed, "chance": 1 / C, "results": results})
    for path, picture in pictures.items():
        write_image(path, picture)
        print(f"drawn in {path}")


# What the three commands share ---------------------------------------------------------------------------


def alone(args) -> None:
    if distributed.world_size() > 1:
        raise ValueError(f"{args.task} runs in one process: start it without torchrun")
    for source in [args.model, *getattr(args, "more", [])]:
        pretrained.locate(source)  # a name that is not there is said before hours of work


def write_results(args, content: dict) -> None:
    if args.out:
        about = {"task": args.task, "data": args.data}
        write_json(Path(args.out) / "results.json", about | content)
        print(f"written to {Path(args.out) / 'results.json'}")


COMMANDS = {  # as evaluate.COMMANDS
    "linear-probe": (
        "logistic regression on the features of the image tower",
        linear_probe_arguments,
        linear_probe_command,
    ),
    "spectrum": (
        "how slowly the singular values of the features' covariance decay",
        spectrum_arguments,
        spectrum_command,
    ),
    "typographic": ("write a wrong class name over every image", typographic_arguments, typographic_command),
}
