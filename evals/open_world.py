"""Open worlds: how well a model classifies images of domains and classes that fine-tuning has not seen.

    task           trained on                      evaluated on                              figures
    domain-shift   all domains but the target      the target                                target
    open-class     base classes, the first half    base and new test images, each half       base, new, H
                                                   among its own names
    in-the-wild    base classes of all domains     base and new images of the target,        base, new, H
                   but the target                  among all names
    all-classes    all classes                     the test images                           test

H = 2 base new / (base + new). The protocol is that of CLIPood (Shu et al. 2023, section 5) and AlignCLIP (Han
et al. 2025), which share their loaders: thuml/CLIPood@bc0d874 converter_domainbed.py. protocol.py builds it.

    python -m evals.open_world --model runs/alignclip --data PACS
    python -m evals.open_world --model ViT-B-16.pt --data PACS --task in-the-wild --target-domain sketch
"""

import statistics
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import data
import evaluate
from baselines.saved import fine_tuned
from evals.protocol import TASKS, Protocol, check_target, domains_of, protocol, templates_of
from readers import templates as prompts
from scale import distributed
from util.evaluation import DataFlags, ModelFlags, load_options, options_of, start, where_of, write_results
from util.flags import parse
from util.program import leave, program
from util.report import format_table, plus_minus
from util.run import read_config

FIGURES = ("val", "target", "test", "base", "new", "H")


def harmonic(base: float, new: float) -> float:
    """Harmonic mean of two accuracies, 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def evaluate_protocol(
    model: nn.Module, protocol: Protocol, tokenizer, templates=prompts.PHOTO, **options
) -> dict:
    """Accuracy on every part of a protocol, each among its own class names.

    REF: images are resized bilinearly, as in the loaders of CLIPood and AlignCLIP; CLIP's resize is bicubic.
    Args:    options: of evaluate.score_rows
    Returns: top-1 in [0, 1] of "val" and of "target", "test", or "base", "new" and their harmonic mean "H";
             "chance", the same of a random answer; "images", the number of test images
    """
    val, result, chance = protocol.val, {}, {}
    options["transform"] = data.preprocess_of(model.config, interpolation="bilinear")
    parts = {} if val is None or not len(val) else {"val": val}
    for name, dataset in (parts | protocol.tests).items():
        place, _ = evaluate.classify(model, dataset, tokenizer, templates, **options)
        result[name], chance[name] = (place < 1).double().mean().item(), 1 / len(dataset.classes)
    if "new" in result:
        for figures in (result, chance):
            figures["H"] = harmonic(figures["base"], figures["new"])
    images = sum(map(len, protocol.tests.values()))
    return result | {"chance": chance, "images": images}


def summarise(records: list[dict]) -> list[dict]:
    """Mean and standard deviation over runs, by task, method and domain, and over all domains.

    REF: H of domain "average" is that of the averages, as in the tables of CoCoOp and MaPLe.
    Args:    records: "task", "method", "domain", "seed" and figures in [0, 1], one record for each run
    Returns: rows of the same keys, "runs", and figure: (mean, deviation) for each figure that all records
             have; n - 1, None for one run. Rows of domain "average" take the seeds with all domains.
    """
    domains = {task: {r["domain"] for r in records if r["task"] == task} for task in TASKS}
    runs = {}  # (task, method, seed) -> its records
    for r in records:
        runs.setdefault((r["task"], r["method"], r["seed"]), []).append(r)
    for (task, method, _), some in runs.items():
        if len(domains[task]) > 1 and {r["domain"] for r in some} == domains[task]:
            means = {f: statistics.fmean(r[f] for r in some) for f in FIGURES if all(f in r for r in some)}
            if "H" in means:
                means["H"] = harmonic(means["base"], means["new"])
            records = [*records, {"task": task, "method": method, "domain": "average", **means}]
    groups, rows = {}, []  # (task, method, domain) -> its records
    for r in records:
        groups.setdefault((r["task"], r["method"], r["domain"]), []).append(r)
    for (task, method, domain), some in groups.items():
        rows.append({"task": task, "method": method, "domain": domain, "runs": len(some)})
        for figure in (figure for figure in FIGURES if all(figure in r for r in some)):
            numbers = [r[figure] for r in some]
            deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
            rows[-1][figure] = (statistics.fmean(numbers), deviation)
    return rows


def table(rows: list[dict]) -> str:
    """The rows of summarise in percent, one table for each task."""
    texts = []
    for task in TASKS:
        shown = []
        for row in (r for r in rows if r["task"] == task):
            about = {"method": row["method"], "domain": row["domain"] or "all", "runs": row["runs"]}
            shown.append(about | {name: plus_minus(*row[name]) for name in FIGURES if name in row})
        if shown:
            texts.append(f"{task}, %\n{format_table(shown)}")
    return "\n\n".join(texts)


@dataclass(frozen=True, kw_only=True)
class Flags(DataFlags, ModelFlags):
    # what is evaluated
    more: tuple[str, ...] = ()  # further models: other seeds, other domains
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


def open_run(flags: Flags, source: str) -> tuple:
    """(record fields, targets, templates, whole, model on the CPU, tokenizer) of a model."""
    config = read_config(source)
    config = config if fine_tuned(config) else {}
    task, targets = task_of(flags, source, config)
    model, tokenizer = evaluate.open_model(source, flags.vocab, **load_options(flags))
    evaluate.check_vocabulary(model, tokenizer)
    about = {"model": source, "task": task, "method": config.get("method", "zero-shot")}
    prompt = templates_of(flags.templates or list(filter(None, [config.get("template")])), flags.data)
    whole = flags.whole_target or config.get("whole_target", False)
    return about | {"seed": config.get("seed", source)}, targets, prompt, whole, model, tokenizer


def evaluate_run(flags: Flags, device: torch.device, about, targets, prompt, whole, model, tokenizer) -> list:
    """The records of a model, and those of chance, for every target."""
    records, options = [], options_of(flags, "open-world")
    of_data = where_of(flags) | {"whole": whole, "scene": {"image_size": model.config.image_size}}
    for target in targets:
        parts = protocol(flags.data, about["task"], target, **of_data)
        result = evaluate_protocol(model.to(device), parts, tokenizer, prompt, **options)
        records.append(about | {"domain": target} | result)
        records.append(about | {"method": "chance", "domain": target} | result["chance"])
    model.to("cpu")
    return records


@program
def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, __doc__)
    if flags.split or flags.limit:
        raise ValueError("--split and --limit: the task determines the images, leave them out")
    device = start(flags)
    opened = [open_run(flags, source) for source in (flags.model, *flags.more)]
    records = [record for run in opened for record in evaluate_run(flags, device, *run)]
    if distributed.rank() == 0:
        rows = summarise(records)
        print(table(rows))
        write_results(flags, {"task": "open-world", "data": flags.data, "rows": rows, "records": records})
    distributed.shutdown()


if __name__ == "__main__":
    leave(main())
