"""Open worlds: how well a model classifies images of domains and classes that fine-tuning has not seen.

    task           trained on                      evaluated on                              figures
    domain-shift   all domains but the target      the target                                target
    open-class     base classes, the first half    base and new test images, each half       base, new, H
                                                   among its own names
    in-the-wild    base classes of all domains     base and new images of the target,        base, new, H
                   but the target                  among all names
    all-classes    all classes                     the test images                           test

H = 2 base new / (base + new). With new classes auroc tells how well base and new images are told apart.
The protocol is that of CLIPood (Shu et al. 2023, section 5) and AlignCLIP (Han et al. 2025), which share
their loaders: thuml/CLIPood@bc0d874 converter_domainbed.py. protocol.py builds it.

    python -m evals.open_world --model runs/alignclip --data PACS
    python -m evals.open_world --model ViT-B-16.pt --data PACS --task in-the-wild --target-domain sketch
"""

import statistics
from dataclasses import dataclass
from typing import Literal

import torch

import data
import evaluate
from baselines.methods import fine_tuned
from evals.protocol import TASKS, Protocol, check_target, domains_of, protocol
from readers import templates as prompts
from scale import distributed
from util.evaluation import SeveralFlags, each_model, options_of, start, where_of, write_results
from util.flags import parse
from util.metrics import accuracy, auroc, constant_answer
from util.program import leave, program
from util.report import format_table
from util.text import say

# what config.json of a fine-tuned run says
WRITTEN = dict(open_task=str, target_domain=str, whole_target=bool, template=str, seed=int, shots=int)
FIGURES = ("val", "target", "test", "base", "new", "H", "auroc", "mean_per_class")


def evaluate_protocol(
    model, protocol: Protocol, tokenizer, templates=prompts.PHOTO, interpolation="bilinear", **options
) -> dict:
    """Accuracy on every part of a protocol, each among its own class names.

    REF: images are resized bilinearly, as in the loaders of CLIPood and AlignCLIP; CLIP's resize is bicubic,
    and so is that of CoOp, CoCoOp and MaPLe, whose runs are evaluated with it.
    Args:    options: of evaluate.score_rows
    Returns: top-1 in [0, 1] of "val" and of "target", "test", or "base", "new" and their harmonic mean "H";
             with new classes "auroc", how well an image's maximum softmax probability among the names of the
             base classes tells base images from new ones (Hendrycks and Gimpel 2017, arXiv:1610.02136);
             "constant", the same of the best constant answer, the most frequent class of each test; {} where
             it is no better than chance, and if it is, "mean_per_class": target, test or H from accuracies
             that weigh classes equally; "chance", the same of a random answer; "images", the number of test
             images; "standard_error" of a figure of one half on the smallest test, the largest that there is
    """
    tests, result, chance, constant, per_class, certain = protocol.tests, {}, {}, {}, {}, []
    options["transform"] = data.preprocess_of(model.config, interpolation=interpolation)
    options |= {"known": protocol.train.classes} if "new" in tests else {}
    for name, dataset in (({"val": protocol.val} if protocol.val else {}) | tests).items():
        place, _, *more = evaluate.classify(model, dataset, tokenizer, templates, **options)
        target = torch.tensor(dataset.labels)
        found = accuracy(place, target)
        result[name], chance[name] = found["top1"], 1 / len(dataset.classes)
        if name in tests:
            constant[name], per_class[name] = constant_answer(target), found["mean_per_class"]
            certain += more
    if "new" in tests:
        for figures in (result, chance, constant, per_class):
            figures["H"] = float(statistics.harmonic_mean([figures["base"], figures["new"]]))
        result["auroc"], chance["auroc"] = auroc(*certain), 0.5
    if unbalanced := any(share > chance[name] for name, share in constant.items()):
        last = [*per_class][-1]  # target, test or H
        result["mean_per_class"], chance["mean_per_class"] = per_class[last], chance[last]
    sizes = [len(dataset) for dataset in tests.values()]
    result |= {"chance": chance, "constant": constant if unbalanced else {}, "images": sum(sizes)}
    return result | {"standard_error": 0.5 / min(sizes) ** 0.5}


def summarise(records: list[dict]) -> list[dict]:
    """Mean and standard deviation over runs, by task, method and domain, and over all domains.

    REF: H of domain "average" is that of the averages, as in the tables of CoCoOp and MaPLe.
    Args:    records: "task", "method", "domain", "seed" and figures in [0, 1], one record for each run
    Returns: rows of the same keys, "runs", and figure: (mean, deviation) for each figure that all records
             have; n - 1, None for one run. Rows of domain "average" take the seeds with all domains.
    """

    def groups(*keys: str) -> dict[tuple, list[dict]]:
        found = {}
        for r in records:
            found.setdefault(tuple(r[key] for key in keys), []).append(r)
        return found

    def figures(some: list[dict]) -> dict[str, list[float]]:
        return {name: [r[name] for r in some] for name in FIGURES if all(name in r for r in some)}

    domains = {task: {r["domain"] for r in some} for (task,), some in groups("task").items()}
    for (task, method, _), some in groups("task", "method", "seed").items():
        if len(domains[task]) > 1 and {r["domain"] for r in some} == domains[task]:
            means = {name: statistics.fmean(values) for name, values in figures(some).items()}
            if "H" in means:
                means["H"] = statistics.harmonic_mean([means["base"], means["new"]])
            records = [*records, {"task": task, "method": method, "domain": "average", **means}]
    rows = []
    for (task, method, domain), some in groups("task", "method", "domain").items():
        rows.append({"task": task, "method": method, "domain": domain, "runs": len(some)})
        for name, values in figures(some).items():
            rows[-1][name] = (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
    return rows


def table(rows: list[dict]) -> str:
    """The rows of summarise in percent, one table for each task."""
    texts = {}
    for row in rows:
        about = {"method": row["method"], "domain": row["domain"] or "all", "runs": row["runs"]}
        for name in (name for name in FIGURES if name in row):
            mean, deviation = row[name]
            spread = "" if deviation is None else f" +- {100 * deviation:.1f}"
            about[name] = f"{100 * mean:.1f}{spread}"
        texts.setdefault(row["task"], []).append(about)
    return "\n\n".join(f"{task}, %\n{format_table(texts[task])}" for task in TASKS if task in texts)


@dataclass(frozen=True, kw_only=True)
class Flags(SeveralFlags):
    # what is evaluated
    task: Literal[TASKS] | None = None  # default: a run's own, else domain-shift
    target_domain: tuple[str, ...] = ()  # default: a run's own, else each domain in turn
    whole_target: bool = False  # domain-shift: all of the target, not only DomainBed's 20 %
    templates: tuple[str, ...] = ()  # as for evaluate.py zeroshot (default: those of the data)


def task_of(flags: Flags, source: str, config: dict) -> tuple[str, list[str]]:
    """Task and target domains for a model; config: of a fine-tuned run, else {}.

    Raises: ValueError if a fine-tuned run has seen the test domain or classes, or a domain does not exist.
    """
    task, targets = flags.task or "domain-shift", list(flags.target_domain)
    if config:
        for name, kind in WRITTEN.items():
            if not isinstance(config.get(name, kind()), kind):
                problem = f"config.json has {name} {config[name]!r}, expected {kind.__name__}"
                raise ValueError(f"{source}: {problem}: restore the file")
        own, target = config.get("open_task"), config.get("target_domain")
        if flags.task not in (None, own):
            raise ValueError(f"{source} was fine-tuned for {own} and cannot be evaluated on {flags.task}")
        if targets not in ([], [target]):
            left_out = f"with {target or 'no domain'} left out"
            raise ValueError(f"{source} was fine-tuned {left_out}, so {targets} is no test")
        return own, [target]
    names = domains_of(flags.data, task, **where_of(flags))
    for target in targets:
        check_target(flags.data, task, target, names)
    return task, targets or names


@program
def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, __doc__)
    if flags.split or flags.limit:
        raise ValueError("--split and --limit: the task determines the images, leave them out")
    device, runs, records, counts = start(flags), [], [], []
    for source in (flags.model, *flags.more):
        config = fine_tuned(source)
        runs.append((config, *task_of(flags, source, config)))
    opened = each_model(flags, device, evaluate.open_model)
    for (config, task, targets), (source, model, tokenizer) in zip(runs, opened):
        about = {"model": source, "task": task, "method": config.get("method", "zero-shot")}
        about["seed"] = config.get("seed", source)
        words = flags.templates or list(filter(None, [config.get("template")]))
        prompt = evaluate.templates_of(words, flags.data)
        of_data = where_of(flags) | {"scene": {"image_size": model.config.image_size}}
        of_data["whole"] = flags.whole_target or config.get("whole_target", False)
        of_data |= {name: config.get(name, 0) for name in ("shots", "seed")}  # they decide val
        options = options_of(flags, "open-world")
        options["interpolation"] = getattr(model, "interpolation", "bilinear")
        for target in targets:
            parts = protocol(flags.data, task, target, **of_data)
            result = evaluate_protocol(model, parts, tokenizer, prompt, **options)
            records.append(about | {"domain": target} | result)
            error = 100 * result["standard_error"]
            counts.append(f"{target or 'all'} {result['images']:,} (at most {error:.1f})")
            for name in ("chance", "constant"):
                records += [about | {"method": name, "domain": target} | result[name]] if result[name] else []
    if distributed.rank() == 0:
        rows = summarise(records)
        print(table(rows))
        say("test images, and the standard error of one run in %:", ", ".join(dict.fromkeys(counts)))
        write_results(flags, {"task": "open-world", "data": flags.data, "rows": rows, "records": records})
    distributed.shutdown()


if __name__ == "__main__":
    leave(main())
