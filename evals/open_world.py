"""Open worlds: images and classes that fine-tuning has not seen, and how a model does on them.

    task           trained on                      asked about                               figures
    domain-shift   every domain but the target     the target                                target
    open-class     base classes, the first half    base and new test images, each half       base, new, H
                                                   among its own names
    in-the-wild    base classes of every domain    base and new images of the target,        base, new, H
                   but the target                  among all names

H = 2 base new / (base + new). CLIPood (Shu et al. 2023, section 5) and AlignCLIP (Han et al. 2025), which
use the same loaders, thuml/CLIPood@bc0d874 converter_domainbed.py. Data are DomainBed folders, CoOp's
splits, any list of images with labels, and the embedded scenes, which serve all three tasks.

    REF: under domain shift only DomainBed's 20 % hold-out of the target is asked; whole=True asks all of it.
    REF: in the wild the base classes are the first floor(C/2) and the target is asked whole; open-class
    takes ceil(C/2). Folders under open-class are not in the papers: all domains, asked on their hold-outs.
"""

import functools
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import data
from readers import scenes
from readers import templates as prompts
from util.report import format_table

TASKS = ("domain-shift", "open-class", "in-the-wild")
FIGURES = ("val", "target", "base", "new", "H")
HELD_OUT = 960  # scenes to validate on, and for each test


@dataclass(frozen=True)
class Protocol:
    """What is trained on and what is asked afterwards; data sets with labels, perhaps with domains.

    train, val: train.classes is the label space; val is None if the data have no third part
    tests: {"target" | "base" | "new": (data set, the class names that compete)}
    """

    train: object
    val: object | None
    tests: dict


def harmonic(base: float, new: float) -> float:
    """Harmonic mean of two accuracies, 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


# The three tasks on every kind of data -------------------------------------------------------------------


def protocol(
    source: str | Path,
    task: str,
    target: str = "",
    *,
    whole: bool = False,
    shots: int = 0,
    seed: int = 0,
    image_root: str | None = None,
    allow_outside: bool = False,
    image_size: int = 32,
    size: int = 2048,
    bias: float = 0.0,
    test_seed: int = 0,
) -> Protocol:
    """The protocol of a task on a data set.

    Args:    source "scenes", or what data.open_dataset reads, with labels;  task one of TASKS;  target the
             domain left out, none for open-class;  whole ask all of the target under domain shift;
             shots train on so many images per class, drawn by seed, 0 for all
             image_size, size, bias: of scenes, their pixels, training images, scenes.Objects' bias
             test_seed: of scenes, which pictures are asked
    Raises:  ValueError naming the known domains for an unknown target; for data without labels, domains
             or images, or with too few classes.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: there are {', '.join(TASKS)}")
    if str(source) == "scenes":
        check_target("scenes", task, target, scenes.DOMAINS)
        found = scenes_protocol(task, target, image_size, size, seed, bias, test_seed)
    else:
        where = dict(image_root=image_root, allow_outside=allow_outside)
        dataset = open_labelled(source, None, where)
        check_target(source, task, target, dataset.domain_names or ())
        if dataset.domains is None and "train" in dataset.splits:
            found = split_protocol(source, dataset.splits, where)
        else:
            found = domain_protocol(dataset, task, target, whole)
    parts = {"train": found.train, **{name: asked for name, (asked, _) in found.tests.items()}}
    if empty := [name for name, part in parts.items() if not len(part)]:
        raise ValueError(f"{source}: no {empty[0]} images for {task} {target}".rstrip())
    if len(found.train.classes) < 2:
        names = ", ".join(found.train.classes)
        raise ValueError(f"{source}: one class to train on ({names}), nothing to tell it from")
    return Protocol(few(found.train, shots, seed), found.val, found.tests) if shots else found


def check_target(source, task: str, target: str, names) -> None:
    """Raises: ValueError if the task and the domains do not fit."""
    known = ", ".join(names)
    if task == "open-class":
        if target:
            raise ValueError(f"open-class has no target domain, {target!r} was given: leave it out")
    elif len(names) < 2:
        raise ValueError(f"{source}: {task} needs two domains or more, there are {len(names)}")
    elif not target:
        raise ValueError(f"{source}: {task} needs a target domain, one of: {known}")
    elif target not in names:
        raise ValueError(f"{source}: no domain {target!r}; there are: {known}")


@functools.lru_cache(maxsize=4)
def scenes_protocol(task, target, image_size, size, seed, bias, test_seed) -> Protocol:
    """Embedded scenes; the test images are the same for every seed, and drawn without bias."""
    domains = tuple(name for name in scenes.DOMAINS if name != target)
    kinds = scenes.KINDS if task == "domain-shift" else scenes.BASE

    def asked(domains, kinds):
        return scenes.Objects("test", HELD_OUT, test_seed, image_size, domains, kinds)

    if task == "open-class":
        tests = {"base": asked(domains, scenes.BASE), "new": asked(domains, scenes.NEW)}
    else:
        tests = {"target": asked((target,), scenes.KINDS)}
        if task == "in-the-wild":
            base = [scenes.KINDS.index(kind) for kind in scenes.BASE]
            tests = halves(tests["target"], range(HELD_OUT), base)
    return Protocol(
        scenes.Objects("train", size, seed, image_size, domains, kinds, bias),
        scenes.Objects("val", HELD_OUT, seed, image_size, domains, kinds, bias),
        {name: (part, part.classes) for name, part in tests.items()},
    )


def halves(dataset, ids, base) -> dict:
    """Images of base classes and the others, both among all names."""
    base, labels = set(base), dataset.labels
    return {
        "base": data.Subset(dataset, [i for i in ids if labels[i] in base]),
        "new": data.Subset(dataset, [i for i in ids if labels[i] not in base]),
    }


def domain_protocol(dataset, task: str, target: str, whole: bool) -> Protocol:
    """DomainBed folders: 80 % of every source to train on, 20 % to validate, by its own split."""
    labels, names = dataset.labels, dataset.domain_names or ["all"]
    domains = dataset.domains or [0] * len(dataset)
    known, new, part = list(range(len(dataset.classes))), [], None
    if task != "domain-shift":
        known, new = data.base_new_classes(len(known), "up" if task == "open-class" else "down")
        part = "base"

    def split(env, classes, part):
        own, classes = domains_of_images[env], set(classes)
        own = [i for i in own if labels[i] in classes]
        return [[own[k] for k in ks] for ks in data.domainbed_split(len(own), env, part=part)]

    domains_of_images = [[i for i, d in enumerate(domains) if d == e] for e in range(len(names))]
    sources = [env for env, name in enumerate(names) if name != target]
    shares = [split(env, known, part) for env in sources]
    train, held = ([i for share in shares for i in share[k]] for k in (0, 1))
    train, held = (data.Subset(dataset, ids, known) for ids in (train, held))
    if task == "open-class":
        ids = [i for env in sources for i in split(env, new, "open")[1]]
        tests, held = {"base": held, "new": data.Subset(dataset, ids, new)}, None
    else:
        env = names.index(target)
        ids = domains_of_images[env] if whole else split(env, known, part)[1]
        tests = {"target": data.Subset(dataset, ids)}
        if task == "in-the-wild":
            tests = halves(dataset, domains_of_images[env], known)
    return Protocol(train, held, {name: (part, part.classes) for name, part in tests.items()})


def split_protocol(source, splits: dict, where: dict) -> Protocol:
    """Open classes on data with a split of their own, as CoOp's: base and new halves of its test images."""
    asked = "test" if "test" in splits else "val"
    parts = {name: open_labelled(source, name, where) for name in splits}
    base, new = data.base_new_classes(len(parts["train"].classes))
    if asked not in parts:
        raise ValueError(f"{source}: neither test nor val images; there are: {', '.join(splits)}")
    tests = {"base": data.Subset(parts[asked], None, base)}
    tests["new"] = data.Subset(parts[asked], None, new)
    val = parts["val"] if asked == "test" and "val" in parts else None
    return Protocol(
        data.Subset(parts["train"], None, base),
        val and data.Subset(val, None, base),
        {name: (part, part.classes) for name, part in tests.items()},
    )


def open_labelled(source, split: str | None, where: dict):
    """A data set with labels; where: image_root and allow_outside of data.open_dataset.

    Raises: ValueError if there are no labels, or a list names images that are not there.
    """
    dataset = data.open_dataset(source, split, **where)
    if not hasattr(dataset, "labels"):
        raise ValueError(f"{source}: no classes in it, which open-world tasks need")
    if not dataset.format.startswith("folders"):
        missing = [name for i in range(len(dataset)) if not os.path.isfile(name := dataset.name(i))]
        if missing:
            count = f"{len(missing)} of its {len(dataset)} images are not there"
            raise ValueError(f"{source}: {count}, the first is {missing[0]}")
    return dataset


def few(dataset, shots: int, seed: int):
    """So many images of each class. CoOp's idea, not its draw, which hangs on Python's global state."""
    ids = [[i for i, y in enumerate(dataset.labels) if y == c] for c in range(len(dataset.classes))]
    draw = data.generator(seed, "shots")
    chosen = [draw.sample(some, min(shots, len(some))) for some in ids]
    return data.Subset(dataset, [i for some in chosen for i in some])


def domains_of(source: str | Path, task: str, **where) -> list[str]:
    """The domains to leave out in turn; [""] where the task has no target."""
    if task == "open-class":
        return [""]
    if str(source) == "scenes":
        return list(scenes.DOMAINS)
    names = data.open_dataset(source, **where).domain_names
    check_target(source, task, (names or [""])[0], names or ())
    return list(names)


def templates(source: str | Path) -> tuple[str, ...]:
    """The prompt templates that go with a data set."""
    return scenes.TEMPLATES if str(source) == "scenes" else prompts.for_data(source)


# Tables over domains and seeds ---------------------------------------------------------------------------


def summarise(records: list[dict]) -> list[dict]:
    """Mean and standard deviation over runs, by task, method and domain, and over all domains.

    Args:    records: "task", "method", "domain", "seed" and figures in [0, 1], one record for each run
    Returns: rows "task", "method", "domain", "runs", and for each figure (mean, deviation with n - 1; None
             for one run). Rows of domain "average" hold the seeds that have all domains of the task.
             REF: its H is that of the averages, as CoCoOp's and MaPLe's tables have it.
    """
    asked = {task: {r["domain"] for r in records if r["task"] == task} for task in TASKS}
    runs = {}  # (task, method, seed) -> its records
    for r in records:
        runs.setdefault((r["task"], r["method"], r["seed"]), []).append(r)
    for (task, method, _), some in runs.items():
        if len(asked[task]) > 1 and {r["domain"] for r in some} == asked[task]:
            means = {f: statistics.fmean(r[f] for r in some) for f in FIGURES if all(f in r for r in some)}
            if "H" in means:
                means["H"] = harmonic(means["base"], means["new"])
            records = [*records, {"task": task, "method": method, "domain": "average", **means}]
    groups = {}
    for r in records:
        groups.setdefault((r["task"], r["method"], r["domain"]), []).append(r)
    rows = []
    for (task, method, domain), some in groups.items():
        row = {"task": task, "method": method, "domain": domain, "runs": len(some)}
        for figure in FIGURES:
            values = [r[figure] for r in some if figure in r]
            if len(values) == len(some):
                deviation = statistics.stdev(values) if len(values) > 1 else None
                row[figure] = (statistics.fmean(values), deviation)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """summarise's rows in percent, a table for each task."""
    texts = []
    for task in TASKS:
        shown = []
        for row in (r for r in rows if r["task"] == task):
            figures = {name: row[name] for name in FIGURES if name in row}
            row = {"method": row["method"], "domain": row["domain"] or "all", "runs": row["runs"]}
            for name, (mean, deviation) in figures.items():
                spread = "" if deviation is None else f" +- {100 * deviation:.1f}"
                row[name] = f"{100 * mean:.1f}{spread}"
            shown.append(row)
        if shown:
            texts.append(f"{task}, %\n{format_table(shown)}")
    return "\n\n".join(texts)
