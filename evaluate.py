"""Zero-shot classification and image-text retrieval, for CLIP, SigLIP and Llip through the same lines.

    python evaluate.py zeroshot  --model runs/llip --data scenes
    python evaluate.py zeroshot  --model ViT-B-16.pt --data imagenet/val --templates imagenet80
    python evaluate.py retrieval --model runs/llip --data dataset_coco.json --precision bf16
    python evaluate.py open-world --model runs/alignclip --data PACS
    python evaluate.py speed --model runs/llip --data scenes --batch-size 64
    python evaluate.py map --model runs/clip --more runs/alignclip --data scenes --out maps
    torchrun --nproc_per_node 8 evaluate.py retrieval --model ViT-B-16.pt --data dataset_coco.json

Texts are encoded first, once, and are held by every rank. Images then stream through: a batch is encoded,
scored against all texts by model.pair_logits, folded into running results, and forgotten. So memory does
not grow with the number of pairs, and of an image neither features nor Llip's keys and values are kept.
Every rank takes a contiguous share of the texts to encode and of the images to score; all get the result.

The figures themselves are in metrics.py: a tie counts against us there. Prompt templates are in prompts.py.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import pretrained
from clipood import Classes
from evals import maps
from evals import open_world as openworld
from readers import scenes
from readers import templates as prompts
from scale import distributed
from scale.distributed import gather_rows
from util import plots
from util.files import output_folder, write_json, write_text

# ruff: noqa: F401  (evaluate.recall_at_k, evaluate.format_table ... are the names that others use)
from util.metrics import KS, Recall, Relevance, accuracy, classification_metrics, no_nan, places, recall_at_k
from util.report import Progress, format_table
from util.text import duration, number, warn
from weights import archive

try:
    from baselines.methods import METHODS
except ImportError:  # until the list of methods exists
    METHODS = {}

LOAD_OPTIONS = ("quick_gelu", "vision_heads", "text_heads", "mixture_heads", "temperature", "pooling")

# Sides: what encoders return, a tensor (CLIP) or a tuple of tensors (Llip) --------------------------------


def map_side(function: Callable, *sides):
    """Applies a function of tensors to sides: map_side(torch.Tensor.float, side)."""
    if isinstance(sides[0], tuple):
        return tuple(function(*parts) for parts in zip(*sides))
    return function(*sides)


def cat_sides(sides: list):
    return map_side(lambda *parts: torch.cat(parts), *sides)


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """No gradients, and eval mode until the end; the mode before is restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def towers(device: torch.device, precision: str):
    """bf16 for the towers only; sides are made fp32 again, and pairs are scored in fp32."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision {precision!r}: choose fp32 or bf16")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def encode_text(model: nn.Module, tokens: Tensor, batch_size: int = 256, precision: str = "fp32"):
    """Text sides of all rows (N, L), in batches of texts of like length.

    SPEED: a text is read at its end token and nothing looks ahead, so what is behind the longest text of
    a batch can be cut off. Captions of COCO have 13 tokens of 77.
    """
    device = next(model.parameters()).device
    end = tokens.argmax(-1)  # (N,) where the text tower reads: the first place of the highest id
    order, sides = end.argsort(), []
    for rows in order.split(batch_size):
        with towers(device, precision):
            side = model.encode_text(tokens[rows, : int(end[rows].max()) + 1].to(device))
        sides.append(map_side(Tensor.float, side))
    back = order.argsort().to(device)
    return map_side(lambda x: x[back], cat_sides(sides))


def shared_out(count: int, encode: Callable):
    """Side of `count` rows where each rank encodes rows first..last by encode(first, last)."""
    W, r = distributed.world_size(), distributed.rank()
    if count < W:  # nobody may come with nothing: how many columns nothing has, nobody knows
        return encode(0, count)
    return map_side(gather_rows, encode(r * count // W, (r + 1) * count // W))


def score_rows(
    model: nn.Module,
    dataset,
    text_side,
    *,
    transform: Callable | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    workers: int = 0,
    progress: str = "",
) -> Iterator[tuple[int, Tensor]]:
    """Scores of this rank's images against all texts, a batch of rows at a time.

    Args:    transform of an image, default OpenAI's at the model's size;  batch_size images;  workers
             loader processes;  progress a label to show it under, empty for none
    Returns: iterator of (number of the first image, scores (b, T) fp32)
    """
    device = next(model.parameters()).device
    transform = transform or data.preprocess(model.config.image_size)
    W, r = distributed.world_size(), distributed.rank()
    unit = "images" if W == 1 else "images of this rank"
    shown = Progress(progress if r == 0 else "", len(dataset) // W, unit)  # rank 0 has the floor
    for images, ids in data.eval_batches(dataset, transform, batch_size, r, W, workers):
        with towers(device, precision):
            side = model.encode_image(images.to(device, non_blocking=True))
        yield int(ids[0]), model.pair_logits(map_side(Tensor.float, side), text_side).float()
        shown.add(len(images))


def check_vocabulary(model: nn.Module, tokenizer) -> None:
    """TRAP: a tokenizer of another vocabulary runs without an error and scores like chance."""
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: "
            "name the vocabulary that the model was trained with"
        )


# Zero-shot classification --------------------------------------------------------------------------------


def encode_classes(
    model: nn.Module,
    tokenizer,
    classes: list,
    templates: tuple[str, ...],
    batch_size: int = 256,
    precision: str = "fp32",
):
    """Text side of classes: every name in every template, then model.ensemble_text.

    Radford et al. 2021, section 3.1.4; for Llip, Lavoie et al. 2024, appendix A.
    Args:    classes: a name, or a list of names (synonyms), each
    Returns: side of C rows, equal on every rank. Prompts are held for some classes at a time, not for all.
    """
    names = [[c] if isinstance(c, str) else list(c) for c in classes]
    check_vocabulary(model, tokenizer)
    for c, known in enumerate(names):
        if not known or not all(isinstance(name, str) and name.strip() for name in known):
            raise ValueError(f"class {c} has no name, or an empty one: {classes[c]!r}")
    if not templates:
        raise ValueError("no templates")
    for template in templates:
        if prompts.fill(template, "x") == template:
            raise ValueError(f"template {template!r} has no {{}} for the name of the class")
    device = next(model.parameters()).device
    step = max(1, batch_size // len(templates))  # classes at a time

    def encode(first: int, last: int):
        sides = []
        for start in range(first, last, step):
            part = names[start : min(start + step, last)]
            asked = [prompts.fill(t, name) for known in part for name in known for t in templates]
            tokens = tokenizer(asked, model.config.context_length)  # (prompts, L)
            group = [c for c, known in enumerate(part) for _ in range(len(known) * len(templates))]
            side = encode_text(model, tokens, batch_size, precision)
            sides.append(model.ensemble_text(side, torch.tensor(group, device=device)))
        return cat_sides(sides)

    return shared_out(len(names), encode)


def warn_of_twins(classes: list) -> None:
    """Says which classes have the same names: OpenAI's list for ImageNet has two such pairs of 1,000."""
    first = {}
    for c, names in enumerate(classes):
        twin = first.setdefault(str(names), c)
        if twin != c and distributed.rank() == 0:
            warn(f"classes {twin} and {c} are both named {names!r}: they tie, so class {c} is never right")


def classify(
    model: nn.Module,
    dataset,
    tokenizer,
    templates: tuple[str, ...] = prompts.PHOTO,
    classes: list | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    **options,
) -> tuple[Tensor, Tensor]:
    """Zero-shot answers for every image of a labelled data set, equal on every rank.

    Args:    classes: names to use for dataset.classes, in the same order; options of score_rows
    Returns: (N,) long, wrong classes that score at least as high as the right one;  (N,) long, the answer
    Raises:  ValueError if the number of classes differs.
    """
    classes = dataset.classes if classes is None else classes
    if len(classes) != len(dataset.classes):
        raise ValueError(f"{len(classes)} class names for data of {len(dataset.classes)} classes")
    warn_of_twins(classes)
    with evaluating(model) as device:
        side = encode_classes(model, tokenizer, classes, templates, batch_size, precision)
        target = torch.tensor(dataset.labels, device=device)  # (N,)
        found = [torch.zeros(0, 2, dtype=torch.long, device=device)]
        for first, scores in score_rows(
            model, dataset, side, batch_size=batch_size, precision=precision, **options
        ):
            place = places(scores, target[first : first + len(scores)])  # (b,)
            found.append(torch.stack([place, no_nan(scores).argmax(1)], 1))
        place, answer = gather_rows(torch.cat(found)).cpu().unbind(1)  # (N,)
    return place, answer


def zeroshot(model: nn.Module, dataset, tokenizer, templates=prompts.PHOTO, **options) -> dict:
    """Zero-shot accuracy, equal on every rank; arguments as classify.

    Returns: "top1", "top5", "mean_per_class" in [0, 1]; the same under "chance" (answering blindly);
             "images", "classes"; for data of several domains "domains", the top-1 of each.
    """
    place, _ = classify(model, dataset, tokenizer, templates, **options)
    return summary(place, dataset)


def summary(place: Tensor, dataset) -> dict:
    """What zeroshot returns, from the place of every image's class (N,)."""
    C, target = len(dataset.classes), torch.tensor(dataset.labels)
    chance = {"top1": 1 / C, "top5": min(5, C) / C, "mean_per_class": 1 / C}
    result = accuracy(place, target) | {"chance": chance, "images": len(target), "classes": C}
    if getattr(dataset, "domains", None) is not None:
        domain = torch.tensor(dataset.domains)
        result["domains"] = {
            name: (place[domain == d] < 1).double().mean().item()
            for d, name in enumerate(dataset.domain_names)
            if (domain == d).any()
        }
    return result


# Retrieval --------------------------------------------------------------------------------------------------


def retrieval(
    model: nn.Module,
    dataset,
    tokenizer,
    ks: tuple[int, ...] = KS,
    batch_size: int = 256,
    precision: str = "fp32",
    **options,
) -> dict:
    """Retrieval both ways between images and their captions, equal on every rank.

    Karpathy's protocol as in CLIP_benchmark: no template, all captions of all images are candidates.
    Captions of equal words are scored once and are separate candidates that tie, which counts against us;
    data that know which captions are true of which images (relevance(), the scenes) get Relevance as well.
    Args:    dataset with captions, any number for an image;  options of score_rows
    Returns: "i2t@k", "t2i@k", perhaps the figures of Relevance; the same under "chance";
             "images", "captions", "distinct_captions"
    """
    check_vocabulary(model, tokenizer)
    captions = list(dataset.captions)
    counts = torch.tensor([len(texts) for texts in captions])  # (N_img,)
    owner = torch.arange(len(captions)).repeat_interleave(counts)  # (N_txt,)
    tokens = tokenizer([t for texts in captions for t in texts], model.config.context_length)
    tokens, column = tokens.unique(dim=0, return_inverse=True)  # (T, L), (N_txt,)
    with evaluating(model) as device:
        recall = Recall(len(captions), owner, column, ks, device)
        figures = [recall]
        if hasattr(dataset, "relevance"):
            relevant = torch.as_tensor(dataset.relevance())  # (N_img, N_txt)
            numbers = torch.arange(len(column))
            first = numbers.new_zeros(len(tokens)).scatter_reduce(
                0, column, numbers, "amin", include_self=False
            )  # (T,) the first of equal texts
            figures.append(Relevance(relevant[:, first], device))
        side = shared_out(len(tokens), lambda a, b: encode_text(model, tokens[a:b], batch_size, precision))
        for first, scores in score_rows(
            model, dataset, side, batch_size=batch_size, precision=precision, **options
        ):
            for figure in figures:
                figure.add(first, scores)
        result = {k: v for figure in figures for k, v in figure.metrics().items()}
    result["chance"] = {k: v for figure in figures for k, v in figure.chance().items()}
    if len(figures) == 2:
        result["ceiling"] = figures[1].ceiling()
    counts = {"images": len(captions), "captions": len(column), "distinct_captions": len(tokens)}
    return result | counts


# Open world -------------------------------------------------------------------------------------------------


def open_world(
    model: nn.Module, protocol, tokenizer, templates=prompts.PHOTO, transform=None, **options
) -> dict:
    """Accuracy on every part of an openworld.Protocol, each among its own class names.

    REF: images are resized bilinearly, as in the loaders of CLIPood and AlignCLIP; CLIP's is bicubic.
    Args:    options of score_rows
    Returns: top-1 in [0, 1] of "val" and of "target", or "base", "new" and their harmonic mean "H"; the
             same under "chance" (answering blindly); "images", those of the tests
    """
    transform = transform or data.preprocess(model.config.image_size, "bilinear")
    val = protocol.val
    parts = {} if val is None or not len(val) else {"val": (val, val.classes)}
    result, chance = {}, {}
    for name, (dataset, classes) in (parts | protocol.tests).items():
        place, _ = classify(model, dataset, tokenizer, templates, classes, transform=transform, **options)
        result[name], chance[name] = (place < 1).double().mean().item(), 1 / len(classes)
    if "new" in result:
        for figures in (result, chance):
            figures["H"] = openworld.harmonic(figures["base"], figures["new"])
    images = sum(len(dataset) for dataset, _ in protocol.tests.values())
    return result | {"chance": chance, "images": images}


# Command line: one function, and perhaps one of arguments, for each subcommand ------------------------------


def results_table(results: dict[str, dict]) -> str:
    """{"retrieval": result, "zeroshot": result} as one table, in percent, chance beside each figure."""
    rows = []
    for task, result in results.items():
        chance, ceiling = result["chance"], result.get("ceiling", {})
        for name in chance:
            row = {"task": task, "figure": name, "%": 100 * result[name], "chance": 100 * chance[name]}
            rows.append(row | ({"at most": 100 * ceiling[name]} if name in ceiling else {}))
        for name, value in result.get("domains", {}).items():
            row = {"task": task, "figure": f"top1 {name}", "%": 100 * value}
            rows.append(row | {"chance": 100 * chance["top1"]})
    return format_table(rows, digits=2)


def read_templates(given: list[str]) -> tuple[str, ...]:
    """--templates: a name out of prompts.TEMPLATES, templates themselves, or a file of them.

    A file holds one per line, or a JSON list.
    """
    if len(given) == 1 and given[0] in prompts.TEMPLATES:
        return prompts.TEMPLATES[given[0]]
    if all("{" in template for template in given):
        return tuple(given)
    if len(given) > 1 or not Path(given[0]).is_file():
        raise ValueError(
            f"templates {' '.join(given)!r}: neither one of {', '.join(prompts.TEMPLATES)}, "
            "nor texts with {}, nor a file"
        )
    return tuple(read_names(given[0]))


def read_names(path: str) -> list:
    """A list from a file: one per line, or JSON: a list, or {folder: name or [synonyms]}."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        names = json.loads(text) if path.endswith(".json") else text.splitlines()
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(names, list | dict) or not names:
        raise ValueError(f"{path}: expected a list or a mapping that is not empty")
    return names if isinstance(names, dict) else [n for n in names if n not in ("", [])]


def read_classes(path: str, folders: list[str]) -> list:
    """--classnames: names for the classes of the data, in their order or by folder."""
    names = read_names(path)
    if isinstance(names, dict):
        missing = [folder for folder in folders if folder not in names]
        if missing:
            raise ValueError(f"{path}: no name for {len(missing)} classes, the first is {missing[0]!r}")
        return [names[folder] for folder in folders]
    if len(names) != len(folders):
        raise ValueError(f"{path}: {len(names)} names, but the data have {len(folders)} classes")
    return names


# What every evaluation program shares: flags, the model, the data set ---------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Flags of a program that evaluates a model."""

    model: str  # a run directory of train.py, a checkpoint, or a name
    vocab: str = ""  # vocabulary (default: the run's own, else OpenAI's)
    batch_size: int = 256  # images, or texts, at a time on each rank
    workers: int = 0  # loader processes on each rank
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    precision: str = "fp32"  # of the towers, fp32 or bf16; pairs are scored in fp32
    out: str = ""  # write results.json and pictures to this folder
    # what a checkpoint from elsewhere may not contain (pretrained.py)
    quick_gelu: bool | None = None  # the activation
    vision_heads: int | None = None  # attention heads of the image tower
    text_heads: int | None = None  # attention heads of the text tower
    mixture_heads: int | None = None  # heads of Llip's pooling
    temperature: float | None = None  # of Llip's pooling
    pooling: str | None = None  # of several tokens: register, average or learned


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Flags of a program that reads a data set."""

    data: str  # scenes (embedded), a folder, a list, or tar shards
    split: str = ""  # of data with splits (default: test)
    image_root: str = ""  # folder of the images of a list (default: the list's own)
    allow_outside: bool = False  # read images that a list names outside of that folder
    limit: int | None = None  # only so many images, evenly spaced (scenes: how many to draw, 1024)


def load_options(flags) -> dict:
    """Arguments of pretrained.load that the flags give."""
    return {name: getattr(flags, name) for name in LOAD_OPTIONS}


def where_of(flags) -> dict:
    """Arguments of data.open_dataset about the files that may be read."""
    return {"image_root": flags.image_root or None, "allow_outside": flags.allow_outside}


def run_config(source: str) -> dict:
    """config.json of a run of train.py, given its folder or its checkpoint; {} for any other model."""
    path = Path(source).expanduser()
    if not path.is_dir() and not path.name.startswith("checkpoint."):
        return {}
    path = (path if path.is_dir() else path.parent) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); restore it, or copy the checkpoint alone") from None
    return config if isinstance(config, dict) and "method" in config else {}


def labels_run(config: dict) -> bool:
    """Whether a run was fine-tuned on classes."""
    name = config.get("method")
    if not METHODS:  # until the list of methods exists
        return name in (
            "finetune",
            "labelsmooth",
            "clipood",
            "alignclip",
            "flyp",
            "coop",
            "cocoop",
            "maple",
            "tes",
        )
    return name in METHODS and METHODS[name].module.TASK == "labels"


def open_model(source: str, vocab: str = "", *, towers: bool = False, **load_options) -> tuple:
    """The dual encoder of a checkpoint, on the CPU, and its tokenizer.

    For a fine-tuned run whose answer is not CLIP's own (prompts, TeS, average pooling), this is the dual
    encoder of its method with all that it learned.
    Args:    source: a run directory of train.py, a checkpoint, or a name;  vocab: a vocabulary, empty for
             the run's own, else OpenAI's;  towers: the caller uses the towers themselves;
             load_options: arguments of pretrained.load
    Raises:  ValueError in one line, also for towers=True where the towers alone are not the method.
    """
    model = pretrained.load(source, **load_options)
    tokenizer = pretrained.tokenizer_for(source, vocab)
    config, task = run_config(source), saved_task(source)
    name, pooling = config.get("method", "its method"), config.get("image_pooling", "cls")
    if not task.get("learned") and pooling == "cls":
        return model, tokenizer
    reason = f"{source}: {name} learned more than the weights of a CLIP"
    if not task.get("learned"):
        reason = f"{source}: {name} was trained with --image-pooling {pooling}"
    if towers:
        raise ValueError(f"{reason}, so its towers alone are not what it learned: choose another run")
    if name not in METHODS or "classes" not in task:
        raise ValueError(f"{reason} and this checkpoint cannot be rebuilt; its figures are in results.json")
    return rebuild(model, tokenizer, METHODS[name].module, config, task), tokenizer


def saved_task(source: str) -> dict:
    """The "task" entry of a run's checkpoint, tensors included; {} for any other model."""
    if not Path(source).expanduser().exists():
        return {}  # a name to download
    checkpoint = archive.read(pretrained.locate(source))
    task = checkpoint.content.get("task") if isinstance(checkpoint.content, dict) else None
    if not isinstance(task, dict):
        return {}
    learned = task.get("learned")
    return task | {"learned": checkpoint.tensors(learned) if isinstance(learned, dict) else {}}


def rebuild(clip: nn.Module, tokenizer, module, config: dict, task: dict) -> nn.Module:
    """The dual encoder of a fine-tuned run: its method around its CLIP, with what it learned."""
    names = {field.name for field in fields(module.Settings)}
    settings = module.Settings(**{name: value for name, value in config.items() if name in names})
    with evaluating(clip):
        text = encode_classes(clip, tokenizer, task["classes"], tuple(task["templates"]))  # (C, E)
    method = module.build(settings, clip, Classes(task["classes"], tuple(task["templates"]), tokenizer, text))
    method.load_learned(task["learned"])
    return method.dual_encoder().eval()


def open_data(flags, model: nn.Module, kind: str):
    """--data as a data set that has `kind`: "labels", "captions", or "image" for any."""
    if flags.data == "scenes":
        drawn = scenes.Objects if kind == "labels" else scenes.Scenes
        size = model.config.image_size
        return drawn(flags.split or "test", flags.limit or 1024, image_size=size)
    dataset = data.open_dataset(flags.data, flags.split or None, default_split="test", **where_of(flags))
    if not hasattr(dataset, kind):
        raise ValueError(f"{flags.data} has no {kind}, which this evaluation needs")
    if flags.limit:
        N, n = len(dataset), min(flags.limit, len(dataset))
        dataset = data.Subset(dataset, [k * N // n for k in range(n)])  # folders are sorted by class
    return dataset


def start(flags, one_process: bool = False) -> torch.device:
    """Device of an evaluation program, after its flags are checked and its output folder is made."""
    for name in ("batch_size", "limit"):
        if (value := getattr(flags, name, None)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    device = distributed.setup(flags.device)
    if one_process and distributed.world_size() > 1:
        raise ValueError("this program runs in one process: start it without torchrun")
    if flags.out:
        output_folder(flags.out)
    return device


def write_results(flags, content: dict) -> None:
    """Writes results.json to the folder --out, if there is one."""
    if flags.out:
        path = Path(flags.out) / "results.json"
        write_json(path, content)
        print(f"written to {path}")


def options_of(args) -> dict:
    names = ("batch_size", "precision", "workers")
    return {name: getattr(args, name) for name in names} | {"progress": args.task}


def finish(args, result: dict, **more) -> None:
    """Prints the table; writes results.json. Only rank 0 calls it."""
    about = {"task": args.task, "model": args.model, "data": args.data, "split": args.split}
    print(results_table({args.task: result}))
    print("  ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in result.items() if isinstance(v, int)))
    write_results(args, about | result | more)


def open_on(args, device: torch.device) -> tuple:
    """The model of --model on its device, and its tokenizer."""
    model, tokenizer = open_model(args.model, args.vocab or "", **load_options(args))
    return model.to(device), tokenizer


def zeroshot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--templates",
        nargs="+",
        metavar="TEXT",
        help=f"{', '.join(prompts.TEMPLATES)}, texts with {{}}, or a file of them (default: photo, "
        "for scenes their own)",
    )
    parser.add_argument(
        "--classnames",
        metavar="FILE",
        help="names of the classes: one per line in order, or JSON: a list, or {folder: name or [synonyms]}",
    )


def zeroshot_command(args, device: torch.device) -> None:
    """Accuracy, per class and per domain; a confusion matrix."""
    model, tokenizer = open_on(args, device)
    dataset = open_data(args, model, "labels")
    own = scenes.TEMPLATES if args.data == "scenes" else prompts.PHOTO
    templates = read_templates(args.templates) if args.templates else own
    classes = read_classes(args.classnames, dataset.classes) if args.classnames else dataset.classes
    place, answer = classify(model, dataset, tokenizer, templates, classes, **options_of(args))
    if distributed.rank():
        return
    C, target = len(classes), torch.tensor(dataset.labels)
    shown = [name if isinstance(name, str) else name[0] for name in classes]
    confusion = torch.bincount(target * C + answer, minlength=C * C).view(C, C)  # true, answered
    counts = confusion.sum(1).tolist()
    right = torch.bincount(target[place == 0], minlength=C).tolist()
    per_class = [{"class": name, "images": n, "right": k} for name, n, k in zip(shown, counts, right)]
    finish(args, summary(place, dataset), templates=list(templates), per_class=per_class)
    if args.out and C <= 100:
        rows = [f"{name} ({n})" for name, n in zip(shown, counts)]
        picture = Path(args.out) / "confusion.png"
        plots.matrix(picture, confusion.numpy(), rows, shown, "images of a class (row) by answer (column)")
        print(f"drawn in {picture}")


def retrieval_command(args, device: torch.device) -> None:
    """Recall of images and captions."""
    model, tokenizer = open_on(args, device)
    dataset = open_data(args, model, "captions")
    result = retrieval(model, dataset, tokenizer, **options_of(args))
    if distributed.rank() == 0:
        finish(args, result)


def open_world_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--more", nargs="+", default=[], metavar="RUN", help="further models: other seeds, domains")
    add("--task", dest="open_task", choices=openworld.TASKS, help="default: a run's own")
    add("--target-domain", nargs="+", metavar="NAME", help="default: a run's own, else each in turn")
    add("--whole-target", action="store_true", help="domain-shift: not only DomainBed's 20 %% of it")
    add("--templates", nargs="+", metavar="TEXT", help="as for zeroshot (default: the data's own)")


def training_of(source: str) -> dict:
    """What a run of train.py was fine-tuned on: its configuration, {} for any other model."""
    path = Path(source) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("method") in ("coop", "cocoop", "maple", "tes"):
        raise ValueError(
            f"{source}: what {config['method']} learned lies beside CLIP's weights and would not be asked;"
            " its figures are in its results.json"
        )
    return config if labels_run(config) else {}


def asked_of(args, source: str, config: dict) -> tuple[str, list[str]]:
    """Task and target domains for a model.

    Raises: ValueError for another question than a fine-tuned run was trained for: it has seen the answers.
    """
    if not config:
        task, where = args.open_task or "domain-shift", where_of(args)
        return task, args.target_domain or openworld.domains_of(args.data, task, **where)
    task, target = config["open_task"], config["target_domain"]
    if args.open_task not in (None, task):
        raise ValueError(f"{source} was fine-tuned for {task}, it cannot be asked {args.open_task}")
    if args.target_domain and args.target_domain != [target]:
        there = f"with {target or 'no domain'} left out"
        raise ValueError(f"{source} was fine-tuned {there}, so {args.target_domain} is no test")
    return task, [target]


def open_world_command(args, device: torch.device) -> None:
    """Base, new and harmonic mean for each domain; mean and deviation over the models of one method."""
    if args.split or args.limit:
        raise ValueError("--split and --limit: the task says what is asked, leave them out")
    records = []
    for source in [args.model, *args.more]:
        args.model, config = source, training_of(source)
        task, targets = asked_of(args, source, config)
        model, tokenizer = open_on(args, device)
        about = {"model": source, "task": task, "method": config.get("method", "zero-shot")}
        about["seed"] = config.get("seed", source)
        given = args.templates or list(filter(None, [config.get("template")]))
        templates = read_templates(given) if given else openworld.templates(args.data)
        whole = args.whole_target or config.get("whole_target", False)
        for target in targets:
            protocol = openworld.protocol(
                args.data, task, target, whole=whole, **where_of(args), image_size=model.config.image_size
            )
            found = open_world(model, protocol, tokenizer, templates, **options_of(args))
            records.append(about | {"domain": target} | found)
            chance = about | {"method": "chance", "domain": target} | found["chance"]
            records.append(chance)
    if distributed.rank():
        return
    rows = openworld.summarise(records)
    print(openworld.table(rows))
    write_results(args, {"task": args.task, "data": args.data, "rows": rows, "records": records})


def map_command(args, device: torch.device) -> None:
    """Do attention and similarity maps show the object? Scores on masks, and a contact sheet."""
    if distributed.world_size() > 1:
        raise ValueError("map runs in one process: start it without torchrun")

    def opened(source: str) -> tuple:
        args.model = source
        model, tokenizer = open_on(args, device)
        check_vocabulary(model, tokenizer)
        return model, tokenizer

    maps.command(args, opened)


def rate(run: Callable, device: torch.device, seconds: float = 1.0) -> float:
    """Calls a second: one call to warm up, then as many as fit into the time, at least three."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()  # kernels are only queued when a call returns
        return time.perf_counter()

    run()
    start, calls = clock(), 0
    while calls < 3 or clock() - start < seconds:
        run()
        calls += 1
    return calls / (clock() - start)


def speed(model: nn.Module, dataset, batch_size: int, precision: str, workers: int = 0) -> dict:
    """What this checkpoint does in a second here, on one process.

    Returns: {"images read": decoded and resized, "images": encoded, "texts": of full length, encoded,
             "pairs": one batch of images scored against as many texts}
    """
    transform = data.preprocess(model.config.image_size)
    batches = data.eval_batches(dataset, transform, min(batch_size, len(dataset)), workers=workers)
    start = time.perf_counter()
    pixels, _ = next(batches)
    found = {"images read": len(pixels) / (time.perf_counter() - start)}
    batches.close()
    c = model.config
    tokens = torch.randint(1, c.vocab_size - 1, (len(pixels), c.context_length))
    tokens[:, -1] = c.vocab_size - 1
    with evaluating(model) as device:
        pixels, tokens = pixels.to(device), tokens.to(device)

        def encode(which: Callable, x: Tensor):
            with towers(device, precision):
                return map_side(Tensor.float, which(x))

        sides = encode(model.encode_image, pixels), encode(model.encode_text, tokens)
        found["images"] = len(pixels) * rate(lambda: encode(model.encode_image, pixels), device)
        found["texts"] = len(pixels) * rate(lambda: encode(model.encode_text, tokens), device)
        found["pairs"] = len(pixels) ** 2 * rate(lambda: model.pair_logits(*sides), device)
    return found


def speed_command(args, device: torch.device) -> None:
    """Images, texts and pairs a second."""
    if distributed.world_size() > 1:
        raise ValueError("speed runs in one process: start it without torchrun")
    model, _ = open_on(args, device)
    dataset = open_data(args, model, "image")
    found = speed(model, dataset, args.batch_size, args.precision, args.workers)
    print(format_table([{"what": k, "per second": number(v)} for k, v in found.items()]))
    batch, threads = min(args.batch_size, len(dataset)), torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} threads"
    print(f"{device} ({name}), batches of {batch}, {args.precision}")
    about = {"task": args.task, "model": args.model, "batch_size": batch, "threads": threads}
    about |= {"precision": args.precision, "device": str(device)}
    write_results(args, about | {"per_second": found})


COMMANDS = {  # name: (what it does, its own arguments or None, function of (args, device))
    "zeroshot": ("classify images by the names of the classes", zeroshot_arguments, zeroshot_command),
    "retrieval": ("find captions by image and images by caption", None, retrieval_command),
    "open-world": (
        "classify images of domains and classes that fine-tuning has not seen",
        open_world_arguments,
        open_world_command,
    ),
    "map": ("score heat maps on the masks of scenes", maps.arguments, map_command),
    "speed": ("images, texts and pairs a second of a checkpoint", None, speed_command),
}


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """What every subcommand takes."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="RUN_OR_CHECKPOINT",
        help="a run directory of train.py, a checkpoint, or a name",
    )
    add("--data", required=True, metavar="PATH", help="scenes (embedded), a folder, a list, or tar shards")
    add("--split", help="of data that have splits (default: test)")
    add("--image-root", metavar="DIR", help="where the images of a list are (default: beside it)")
    add("--allow-outside", action="store_true", help="read what a list names outside of there")
    add(
        "--limit", type=int, metavar="N", help="only N images, evenly spaced (scenes: how many to draw, 1024)"
    )
    add("--vocab", metavar="PATH", help="vocabulary (default: the run's own, else OpenAI's)")
    add("--batch-size", type=int, default=256, help="images, or texts, at a time on each rank")
    add("--workers", type=int, default=0, help="loader processes on each rank")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the towers; pairs are scored in fp32",
    )
    add("--out", metavar="DIR", help="write results.json and pictures here")
    told = parser.add_argument_group("what a checkpoint of someone else may not tell (pretrained.py)")
    told.add_argument("--quick-gelu", action=argparse.BooleanOptionalAction, help="the activation")
    for name in LOAD_OPTIONS[1:4]:
        told.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    told.add_argument("--temperature", type=float, metavar="TAU", help="Llip's")
    told.add_argument("--pooling", choices=("register", "average", "learned"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    from evals import linear_probe as probes  # here and not above: it builds on this file

    commands = COMMANDS | probes.COMMANDS
    subparsers = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, (about, arguments, _) in commands.items():
        sub = subparsers.add_parser(name, help=about, description=about, allow_abbrev=False)
        common_arguments(sub)
        if arguments:
            arguments(sub)
    args = parser.parse_args(argv)
    try:
        commands[args.task][2](args, start(args))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        print(
            f"error: out of GPU memory at --batch-size {args.batch_size}: try a smaller one", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    status = main()
    if distributed.world_size() > 1:
        distributed.shutdown()
        sys.stdout.flush()
        os._exit(status)  # TRAP: torch's gloo can hang in its destructors
    sys.exit(status)
