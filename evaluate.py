"""Zero-shot classification and image-text retrieval of any dual encoder, as functions and as a program.

    python evaluate.py zeroshot  --model runs/llip --data scenes
    python evaluate.py zeroshot  --model ViT-B-16.pt --data imagenet/val --templates imagenet80
    python evaluate.py zeroshot  --model ViT-B-16.pt --more runs/alignclip --suite datasets
    python evaluate.py retrieval --model runs/llip --data dataset_coco.json --precision bf16
    torchrun --nproc_per_node 8 evaluate.py retrieval --model ViT-B-16.pt --data dataset_coco.json

Other evaluations are programs in evals/, each with --help:

    python -m evals.open_world     domains and classes that fine-tuning has not seen
    python -m evals.maps           attention and similarity maps, scored on the masks of scenes
    python -m evals.surgery        similarity maps of one image and some texts, as a picture
    python -m evals.mixtures       what the mixture tokens of a Llip do: weights, maps, names, removal
    python -m evals.linear_probe   logistic regression on image features
    python -m evals.spectrum       singular values of the covariance of image features
    python -m evals.typographic    images with a wrong class name written over them

Texts are encoded first, and every rank holds their features. Images are then encoded and scored against all
texts by model.pair_logits, batch by batch, so memory does not grow with the number of pairs. Ranks share the
texts and the images, and all return the same result. "Features" are the result of an encoder: one tensor for
CLIP, a tuple of tensors for Llip. Metrics are in util/metrics.py.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

import data
import pretrained
from baselines import methods
from pretrained import check_vocabulary
from readers import scenes
from readers import templates as prompts
from readers.benchmarks import is_coded, unnamed
from readers.folders import folders_in
from scale import distributed, llip_tiles
from scale.distributed import map_features
from util import plots
from util.evaluation import DataFlags, ModelFlags, each_model, options_of, start, where_of, write_results
from util.flags import Parser, parse
from util.metrics import KS, Recall, Relevance, accuracy, certainty, constant_answer, no_nan, places
from util.program import leave, program
from util.report import Progress, format_table, results_table
from util.run import read_config
from util.text import warn


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Eval mode without gradients; gives the model's device, and restores the mode at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def towers(device: torch.device, precision: str):
    """Autocast for the towers only: features become fp32 again, and pairs are scored in fp32."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision {precision!r}: choose fp32 or bf16")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def encode_text(model: nn.Module, tokens: Tensor, batch_size: int = 256, precision: str = "fp32"):
    """Text features of all rows of tokens (N, L), in batches of texts of similar length.

    SPEED: no token attends to a later one, so each batch is cut to its longest text. The end token, which has
    the highest id, gives the features. Captions of COCO have 13 tokens of 77.
    """
    device, end = next(model.parameters()).device, tokens.argmax(-1)  # (N,)
    order, parts = end.argsort(), []
    for rows in order.split(batch_size):
        with towers(device, precision):
            features = model.encode_text(tokens[rows, : int(end[rows].max()) + 1].to(device))
        parts.append(map_features(Tensor.float, features))
    back = order.argsort().to(device)
    return map_features(lambda *tensors: torch.cat(tensors)[back], *parts)


def shared_out(count: int, encode: Callable):
    """Features of `count` rows, where encode(first, last) computes a rank's share of them."""
    W, r = distributed.world_size(), distributed.rank()
    # a rank without rows could not know the number of columns, so every rank encodes all rows
    if count < W:
        return encode(0, count)
    return map_features(distributed.gather_rows, encode(r * count // W, (r + 1) * count // W))


def image_batches(model, dataset, *, batch_size=256, transform=None, workers=0, progress="") -> Iterator:
    """This rank's images (b, 3, S, S) on the model's device, and their numbers (b,).

    Args: transform: default the model's;  progress: a label, empty for no line
    """
    device, transform = next(model.parameters()).device, transform or data.preprocess_of(model.config)
    W, r = distributed.world_size(), distributed.rank()
    shown = Progress("" if r else progress, len(dataset) // W, "images" if W == 1 else "images of this rank")
    for images, ids in data.eval_batches(dataset, transform, batch_size, r, W, workers):
        yield images.to(device, non_blocking=True), ids
        shown.add(len(images))


def score_rows(model, dataset, *text, batch_size=256, precision="fp32", **options) -> Iterator:
    """Scores of this rank's images against all texts, one batch of images at a time.

    Args:    text: features of T texts, and perhaps of other sets of texts;  options: of image_batches
    Returns: iterator of (number of the first image, scores (b, T) fp32, those of the other sets)
    """
    # SPEED: many pairs of an Llip are scored in tiles, by a copy that shares the weights
    texts = max(len(some[0] if isinstance(some, tuple) else some) for some in text)
    pairs = llip_tiles.select(copy.copy(model), "auto", batch_size, texts)
    for images, ids in image_batches(model, dataset, batch_size=batch_size, **options):
        with towers(images.device, precision):
            features = map_features(Tensor.float, model.encode_image(images))
        yield int(ids[0]), *(pairs.pair_logits(features, some).float() for some in text)


def text_options(options: dict) -> dict:
    """The options of score_rows that encode_text and encode_classes also take."""
    return {name: options[name] for name in ("batch_size", "precision") if name in options}


def encode_classes(model, tokenizer, classes, templates: tuple[str, ...], batch_size=256, precision="fp32"):
    """Text features of classes: every name in every template, combined by model.ensemble_text.

    Radford et al. 2021, section 3.1.4; for Llip, Lavoie et al. 2024, appendix A.
    Args:    classes: each a name, or a list of names (synonyms)
    Returns: features of C rows, equal on every rank
    """
    check_vocabulary(model, tokenizer)
    names = [[c] if isinstance(c, str) else list(c) for c in classes]
    for c, synonyms in enumerate(names):
        if not synonyms or not all(isinstance(name, str) and name.strip() for name in synonyms):
            raise ValueError(f"class {c} has no name, or an empty one: {classes[c]!r}")
    templates = model.class_templates(templates)
    if wrong := [template for template in templates or [""] if prompts.fill(template, "x") == template]:
        raise ValueError(f"template {wrong[0]!r} has no {{}} for the name of the class")
    device = next(model.parameters()).device
    step = max(1, batch_size // len(templates))  # classes at a time

    def encode(first: int, last: int):
        parts = []
        for k in range(first, last, step):
            some = names[k : min(k + step, last)]
            texts = [prompts.fill(t, name) for synonyms in some for name in synonyms for t in templates]
            tokens = tokenizer(texts, model.config.context_length)  # (prompts, L)
            group = [c for c, synonyms in enumerate(some) for _ in range(len(synonyms) * len(templates))]
            features = encode_text(model, tokens, batch_size, precision)
            parts.append(model.ensemble_text(features, torch.tensor(group, device=device)))
        return map_features(lambda *tensors: torch.cat(tensors), *parts)

    return shared_out(len(names), encode)


def classify(
    model, dataset, tokenizer, templates=prompts.PHOTO, classes=None, known=None, **options
) -> tuple:
    """Zero-shot classification of every image of a labelled data set, equal on every rank.

    Args:    classes: names that replace dataset.classes, in the same order;  options: of score_rows;
             known: names of the classes of training
    Returns: (N,) long, the rank of the right class, 0 first;  (N,) long, the class with the highest score;
             with known also (N,), the metrics.certainty that the image is of one of them
    Raises:  ValueError if the number of classes differs.
    """
    classes = dataset.classes if classes is None else classes
    if len(classes) != len(dataset.classes):
        raise ValueError(f"{len(classes)} class names for data of {len(dataset.classes)} classes")
    # names that were given may be digits, as those of MNIST
    if classes is dataset.classes and (problem := unnamed(classes)) and distributed.rank() == 0:
        warn(problem)
    numbers = {}
    for c, names in enumerate(classes):
        twin = numbers.setdefault(str(names), c)
        # OpenAI's list for ImageNet has two such pairs
        if twin != c and distributed.rank() == 0:
            warn(f"classes {twin} and {c} are both named {names!r}: they tie, so class {c} is never right")
    with evaluating(model) as device:
        sets = [classes, known] if known and known != classes else [classes]
        text = [encode_classes(model, tokenizer, some, templates, **text_options(options)) for some in sets]
        target = torch.tensor(dataset.labels, device=device)  # (N,)
        rows, certain = [torch.zeros(0, 2, dtype=torch.long, device=device)], [torch.zeros(0, device=device)]
        for first, scores, *more in score_rows(model, dataset, *text, **options):
            place = places(scores, target[first : first + len(scores)])  # (b,)
            rows.append(torch.stack([place, no_nan(scores).argmax(1)], 1))
            certain.append(certainty((more or [scores])[0]))
        found = distributed.gather_rows(torch.cat(rows)).cpu().unbind(1)  # (N,) each
        return (*found, distributed.gather_rows(torch.cat(certain)).cpu()) if known else found


def zeroshot(model: nn.Module, dataset, tokenizer, templates=prompts.PHOTO, **options) -> dict:
    """Zero-shot accuracy, equal on every rank; arguments as classify.

    Returns: "top1", "top5", "mean_per_class" in [0, 1]; "chance", the same of a random answer; "images",
             "classes"; with domains "domains", the top-1 of each; "constant", what the best
             constant answer reaches, for the figures where that is above chance
    """
    return summary(classify(model, dataset, tokenizer, templates, **options)[0], dataset)


def summary(place: Tensor, dataset) -> dict:
    """The result of zeroshot, from the rank of every image's class (N,)."""
    C, target = len(dataset.classes), torch.tensor(dataset.labels)
    chance = {"top1": 1 / C, "top5": min(5, C) / C, "mean_per_class": 1 / C}
    result = accuracy(place, target) | {"chance": chance, "images": len(target), "classes": C}
    constant = {"top1": constant_answer(target)}  # 1 / C if all classes have equally many images
    if getattr(dataset, "domains", None) is not None:
        domain, hits = torch.tensor(dataset.domains), (place < 1).double()
        of_name = {name: domain == d for d, name in enumerate(dataset.domain_names) if (domain == d).any()}
        result["domains"] = {name: hits[own].mean().item() for name, own in of_name.items()}
        constant |= {f"top1 {name}": constant_answer(target[own]) for name, own in of_name.items()}
    return result | {"constant": {name: share for name, share in constant.items() if share > 1 / C}}


def retrieval(model: nn.Module, dataset, tokenizer, ks: tuple[int, ...] = KS, **options) -> dict:
    """Retrieval in both directions between images and their captions, equal on every rank.

    Karpathy's protocol as in CLIP_benchmark: no template, and all captions of all images are candidates.
    Equal captions are scored once and stay separate candidates that tie.
    Args:    dataset: any number of captions for an image; its relevance(), if there is one, tells which
             captions are true of which images, (N_img, N_txt) bool;  options: of score_rows
    Returns: "i2t@k", "t2i@k", the metrics of Relevance; "chance", the same of a random order; "ceiling";
             "images", "captions", "distinct_captions"
    """
    if not model.takes_captions:
        raise ValueError("retrieval needs captions, but learned prompts take class names only: use zeroshot")
    check_vocabulary(model, tokenizer)
    captions = list(dataset.captions)
    counts = torch.tensor([len(texts) for texts in captions])  # (N_img,)
    owner = torch.arange(len(captions)).repeat_interleave(counts)  # (N_txt,)
    tokens = tokenizer([t for texts in captions for t in texts], model.config.context_length)
    tokens, column = tokens.unique(dim=0, return_inverse=True)  # (T, L), (N_txt,)
    with evaluating(model) as device:
        metrics = [Recall(len(captions), owner, column, ks, device)]
        if hasattr(dataset, "relevance"):
            first = torch.full((len(tokens),), len(column))  # (T,) the first of equal captions
            first = first.scatter_reduce(0, column, torch.arange(len(column)), "amin")
            metrics.append(Relevance(torch.as_tensor(dataset.relevance())[:, first], device))
        text = shared_out(len(tokens), lambda a, b: encode_text(model, tokens[a:b], **text_options(options)))
        for first, scores in score_rows(model, dataset, text, **options):
            for metric in metrics:
                metric.add(first, scores)
        result = {k: v for metric in metrics for k, v in metric.metrics().items()}
    result["chance"] = {k: v for metric in metrics for k, v in metric.chance().items()}
    if len(metrics) == 2:
        result["ceiling"] = metrics[1].ceiling()
    return result | {"images": len(captions), "captions": len(column), "distinct_captions": len(tokens)}


def open_model(source: str, vocab: str = "", *, towers: bool = False, **load_options) -> tuple:
    """The dual encoder of a checkpoint, on the CPU, and its tokenizer.

    A fine-tuned run whose model is more than a CLIP (prompts, TeS, average pooling) is rebuilt by its method.
    Args:    source: a run directory, a checkpoint, or a name;  vocab (default: the run's own, else OpenAI's);
             towers: the caller uses the towers themselves, not the scores;  load_options: of pretrained.load
    Raises:  ValueError, one line; with towers=True also for a model that is more than its towers.
    """
    model = pretrained.load(source, **load_options)
    tokenizer = pretrained.tokenizer_for(source, vocab, 49408 if towers else model.config.vocab_size)
    if not towers:
        check_vocabulary(model, tokenizer)
    config, task = methods.read_saved(source, towers)
    if not config:
        return model, tokenizer
    with evaluating(model):
        text = encode_classes(model, tokenizer, task["classes"], tuple(task["templates"]))
    return methods.rebuild(source, config, task, model, tokenizer, text), tokenizer


def open_data(flags, model: nn.Module, kind: str):
    """The data set of --data, which must have `kind`: "labels", "captions", or "image" for any."""
    if flags.data == "scenes":
        drawn = scenes.Objects if kind == "labels" else scenes.Scenes
        return drawn(flags.split or "test", flags.limit or 1024, image_size=model.config.image_size)
    where = where_of(flags) | {"kind": kind, "default_split": "test"}
    dataset = data.open_dataset(flags.data, flags.split or None, **where)
    return data.evenly_spread(dataset, flags.limit) if flags.limit else dataset


def templates_of(words, source: str | Path) -> tuple[str, ...]:
    """The prompt templates of --templates, or else those of a data set."""
    own = scenes.TEMPLATES if str(source) == "scenes" else prompts.for_data(source)
    return prompts.read_templates(list(words)) if words else own


@dataclass(frozen=True, kw_only=True)
class RetrievalFlags(DataFlags, ModelFlags):
    """Finds the captions of an image, and the image of a caption."""


@dataclass(frozen=True, kw_only=True)
class ZeroshotFlags(DataFlags, ModelFlags):
    """Classifies images by the names of the classes."""

    data: str = ""
    # many data sets
    suite: str = ""  # instead of --data: a folder of data sets, for one table of all of them
    more: tuple[str, ...] = ()  # further models, with --suite
    # classes and prompts
    templates: tuple[str, ...] = ()  # a name in readers/templates.py, texts with {}, or a file of them
    classnames: str = ""  # file of class names: one per line in order, or JSON (list or {folder: names})


def report(task: str, flags, result: dict, **more) -> None:
    """Prints the table and writes results.json."""
    print(results_table({task: result}))
    about = {"task": task, "model": flags.model, "data": flags.data, "split": flags.split or None}
    write_results(flags, about | result | more)


def retrieval_command(flags: RetrievalFlags, models: Iterator) -> None:
    _, model, tokenizer = next(models)
    dataset = open_data(flags, model, "captions")
    result = retrieval(model, dataset, tokenizer, **options_of(flags, "retrieval"))
    if distributed.rank() == 0:
        report("retrieval", flags, result)


def zeroshot_command(flags: ZeroshotFlags, models: Iterator) -> None:
    if bool(flags.data) == bool(flags.suite) or (flags.classnames if flags.suite else flags.more):
        raise ValueError("--suite replaces --data and --classnames, and --more goes with it: see --help")
    if flags.suite:
        return suite_command(flags, models)
    _, model, tokenizer = next(models)
    dataset = open_data(flags, model, "labels")
    templates = templates_of(flags.templates, flags.data)
    folders = getattr(dataset, "folders", dataset.classes)
    classes = prompts.read_classes(flags.classnames, folders) if flags.classnames else dataset.classes
    place, answer = classify(model, dataset, tokenizer, templates, classes, **options_of(flags, "zeroshot"))
    if distributed.rank():
        return
    C, target = len(classes), torch.tensor(dataset.labels)
    names = [name if isinstance(name, str) else name[0] for name in classes]
    confusion = torch.bincount(target * C + answer, minlength=C * C).view(C, C)  # (true, answered)
    counts = confusion.sum(1).tolist()
    right = torch.bincount(target[place == 0], minlength=C).tolist()
    per_class = [{"class": name, "images": n, "right": k} for name, n, k in zip(names, counts, right)]
    report("zeroshot", flags, summary(place, dataset), templates=list(templates), per_class=per_class)
    if flags.out and C <= 100:
        rows, path = [f"{name} ({n})" for name, n in zip(names, counts)], Path(flags.out) / "confusion.png"
        plots.matrix(path, confusion.numpy(), rows, names, "images of a class (row) by answer (column)")
        print(f"drawn in {path}")


def open_suite(flags: ZeroshotFlags) -> tuple[dict, list[str]]:
    """{name: (path, data set)} of the folders and lists in --suite; a line about each that is left out."""
    root, sets, left_out = Path(flags.suite).absolute(), {}, []
    lists = sorted(p.name for p in root.iterdir() if p.suffix in (".csv", ".tsv", ".json", ".jsonl"))
    itself = prompts.recognise(root, domains=set(folders := folders_in(root)), coded=is_coded(folders))
    for path in [root] if itself else [root / name for name in (*folders, *lists)]:
        try:
            dataset = open_data(replace(flags, data=str(path), limit=None), None, "labels")
            # the reader writes "NAME, template ..." for a data set that it recognises
            name, recognised, _ = getattr(dataset, "format", "").partition(", template ")
            name = name if recognised else path.stem
            # the classes of MNIST are digits
            if name != "MNIST" and (problem := unnamed(dataset.classes)):
                raise ValueError(problem)
            sets[f"{name} in {path.name}" if name in sets else name] = path, dataset
        except (ValueError, OSError) as error:
            left_out.append(f"{path.name}: {error}")
    return sets, left_out


def suite_table(results: dict[str, dict]) -> list[dict]:
    """Rows in percent of {name of a data set: {model: result of zeroshot}}, and averages of top-1.

    Averages are over the data sets that every model has; the second is that of ImageNet's shifts.
    """
    rows, models = [], {model for own in results.values() for model in own}
    for name, own in results.items():
        some = next(iter(own.values()))
        for figure in ("top1", "mean_per_class")[: 1 + ("top1" in some["constant"])]:
            row = {"data set": name, "images": some["images"], "classes": some["classes"], "figure": figure}
            row["chance"] = 100 * some["chance"][figure]
            row["constant"] = 100 * some["constant"].get(figure, some["chance"][figure])
            rows.append(row | {model: 100 * result[figure] for model, result in own.items()})
    whole = {name: own for name, own in results.items() if len(own) == len(models)}
    shifts = [name for name in whole if "ImageNet" in whole and re.fullmatch("ImageNet(A|R|V2|Sketch)", name)]
    for names, what in ((whole, "data sets"), (shifts, "shifts of ImageNet")):
        means = {m: 100 * fmean(whole[name][m]["top1"] for name in names) for m in models if names}
        rows += [{"data set": f"average of {len(names)} {what}", "figure": "top1"} | means] if names else []
    return rows


def suite_command(flags: ZeroshotFlags, models: Iterator) -> None:
    """Every data set of --suite with every model, as one table; what fails is left out of it."""
    options, (sets, left_out), results = options_of(flags), open_suite(flags), {}
    for source, model, tokenizer in models:
        trained = str(read_config(source).get("train_data", ""))
        for name, (path, dataset) in sets.items():
            if trained and Path(trained).resolve() == path.resolve() and distributed.rank() == 0:
                warn(f"{source} was trained on images of {name}, and may have seen those of its evaluation")
            templates, options["progress"] = templates_of(flags.templates, path), f"{source} {name}"
            some = data.evenly_spread(dataset, flags.limit or len(dataset))
            try:
                place, _ = classify(model, some, tokenizer, templates, **options)
                result = summary(place, some) | {"templates": list(templates)}
                results.setdefault(name, {})[source] = result
            except (ValueError, OSError) as error:
                # TRAP: another rank may be waiting for what this one would have sent
                if distributed.world_size() > 1:
                    raise
                left_out.append(f"{name} by {source}: {error}")
    if distributed.rank() == 0:
        absent = [known.name for known in prompts.BENCHMARKS if known.name not in sets]
        rows, path, bars = suite_table(results), Path(flags.out) / "suite.png", {}
        print(format_table(rows, digits=2))
        print(f"not in {flags.suite}: {', '.join(absent) or 'none'}")
        for line in left_out:
            warn(f"left out: {line}")
        about = {"task": "suite", "suite": flags.suite, "results": results, "rows": rows}
        write_results(flags, about | {"absent": absent, "left_out": left_out})
        for name, own in results.items():
            bars[name] = {m: (100 * r["top1"], 50 / r["images"] ** 0.5) for m, r in own.items()}
        if flags.out and bars:
            plots.bars(path, bars, "top-1 in %, with the largest standard error")
            print(f"drawn in {path}")
    if left_out or not sets:
        raise ValueError(f"{flags.suite}: {len(sets)} data sets are read, {len(left_out)} results missing")


COMMANDS = {"zeroshot": (ZeroshotFlags, zeroshot_command), "retrieval": (RetrievalFlags, retrieval_command)}


@program
def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS, help="the flags of each: evaluate.py COMMAND --help")
    cls, command = COMMANDS[parser.parse_args(argv[:1]).command]
    flags = parse(cls, argv[1:], cls.__doc__)
    command(flags, each_model(flags, start(flags), open_model))
    distributed.shutdown()


if __name__ == "__main__":
    leave(main())
