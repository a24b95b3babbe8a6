"""The three open-world tasks on every kind of labelled data: what to train on and what to evaluate on.

The tasks are in the table at the top of open_world.py. Data are DomainBed folders, CoOp's splits, any list of
images with labels, and the embedded scenes.

    REF: under domain shift only the hold-out of DomainBed, 20 % of the target, is evaluated; whole=True takes
    all of it. In the wild the whole target is evaluated.
    REF: in the wild the base classes are the first floor(C/2) classes, for open-class the first ceil(C/2).
    Folders with domains under open-class and all-classes are not in the papers: here all domains train, and
    their hold-outs are evaluated.
"""

import functools
import random
from dataclasses import dataclass, replace
from pathlib import Path

import data
from readers import scenes
from readers.benchmarks import read_few_shots
from util.text import printable, say

TASKS = ("domain-shift", "open-class", "in-the-wild", "all-classes")
NEW_CLASSES = ("open-class", "in-the-wild")  # tasks that evaluate classes without training images
NO_TARGET = ("open-class", "all-classes")  # tasks that train on all domains
HELD_OUT = 960  # scenes for validation, and for each test


@dataclass(frozen=True)
class Protocol:
    """Labelled data sets, perhaps with domains, to train on and to evaluate on, each among its classes."""

    train: object
    val: object | None  # None if the data have no third part
    tests: dict  # {"target" | "test" | "base" | "new": data set}


def protocol(source, task: str, target="", *, whole=False, shots=0, seed=0, scene=None, **where) -> Protocol:
    """The protocol of a task on a data set.

    Args:    source: "scenes", or labelled data for data.open_dataset;  task: one of TASKS;  target: the
             domain left out, empty for NO_TARGET;  whole: evaluate all of the target under domain shift;
             shots: training images of each class, drawn by seed, 0 for all;  scene: of scenes_protocol;
             where: of data.open_dataset
    Raises:  ValueError for an unknown target, and for data without labels, domains or images.
    """
    if str(source) == "scenes":
        check_target("scenes", task, target, scenes.DOMAINS)
        result = scenes_protocol(task, target, seed, **(scene or {}))
    else:
        dataset = data.open_dataset(source, kind="labels", **where)
        check_target(source, task, target, dataset.domain_names or ())
        if dataset.domains is None and "train" in dataset.splits:
            result, shots = split_protocol(source, task, dataset.splits, where, shots, seed), 0
        else:
            result = domain_protocol(dataset, task, target, whole)
    if empty := [name for name, part in {"train": result.train, **result.tests}.items() if not len(part)]:
        raise ValueError(f"{source}: no {empty[0]} images for {task} {target}".rstrip())
    if len(result.train.classes) < 2:
        names = ", ".join(result.train.classes)
        raise ValueError(f"{source}: training needs two classes or more, there is only {names}")
    return replace(result, train=few(result.train, shots, random.Random(seed))) if shots else result


def check_target(source, task: str, target: str, names) -> None:
    """Raises: ValueError if the task and the domains do not fit."""
    listed = ", ".join(names)
    if task in NO_TARGET:
        if target:
            raise ValueError(f"{task} has no target domain, {target!r} was given: leave it out")
    elif len(names) < 2:
        problem = f"{task} needs two domains or more, there are {len(names)}"
        raise ValueError(f"{source}: {problem}; --open-task all-classes or open-class needs none")
    elif not target:
        raise ValueError(f"{source}: {task} needs a --target-domain, one of: {listed}")
    elif target not in names:
        raise ValueError(f"{source}: no domain {target!r}; there are: {listed}")


@functools.lru_cache(maxsize=4)
def scenes_protocol(task, target, seed, image_size=32, size=2048, bias=0.0, test_seed=0) -> Protocol:
    """`size` embedded scenes to train on; the test images are the same for every seed and have no bias."""
    domains = tuple(name for name in scenes.DOMAINS if name != target)
    kinds = scenes.BASE if task in NEW_CLASSES else scenes.KINDS
    test = "test", HELD_OUT, test_seed, image_size
    if task == "open-class":
        halves_of = {"base": scenes.BASE, "new": scenes.NEW}
        tests = {name: scenes.Objects(*test, domains, half) for name, half in halves_of.items()}
    elif task == "all-classes":
        tests = {"test": scenes.Objects(*test, domains)}
    else:
        tests = {"target": scenes.Objects(*test, (target,), scenes.KINDS)}
    if task == "in-the-wild":
        tests = halves(tests["target"], range(HELD_OUT), map(scenes.KINDS.index, scenes.BASE))
    train = scenes.Objects("train", size, seed, image_size, domains, kinds, bias)
    return Protocol(train, scenes.Objects("val", HELD_OUT, seed, image_size, domains, kinds, bias), tests)


def halves(dataset, ids, base) -> dict:
    """Images of base classes and of the other classes, both among all names."""
    base, parts = set(base), {"base": [], "new": []}
    for i in ids:
        parts["base" if dataset.labels[i] in base else "new"].append(i)
    return {name: data.Subset(dataset, part) for name, part in parts.items()}


def domain_protocol(dataset, task: str, target: str, whole: bool) -> Protocol:
    """DomainBed folders: its own split gives 80 % of every source domain for training, the rest is val."""
    labels, names = dataset.labels, dataset.domain_names or ["all"]
    domains = dataset.domains or [0] * len(dataset)
    base, new, part = list(range(len(dataset.classes))), [], None
    if task in NEW_CLASSES:
        base, new = data.base_new_classes(len(base), "up" if task == "open-class" else "down")
        part = "base"
    images = [[i for i, d in enumerate(domains) if d == env] for env in range(len(names))]

    def split(env, classes, part):
        classes = set(classes)
        ids = [i for i in images[env] if labels[i] in classes]
        return [[ids[k] for k in ks] for ks in data.domainbed_split(len(ids), env, part=part)]

    sources = [env for env, name in enumerate(names) if name != target]
    shares = [split(env, base, part) for env in sources]
    train, held = (data.Subset(dataset, [i for share in shares for i in share[k]], base) for k in (0, 1))
    if task == "open-class":
        ids = [i for env in sources for i in split(env, new, "open")[1]]
        tests, held = {"base": held, "new": data.Subset(dataset, ids, new)}, None
    elif task == "all-classes":
        tests, held = {"test": held}, None
    else:
        env = names.index(target)
        ids = images[env] if whole else split(env, base, part)[1]
        tests = {"target": data.Subset(dataset, ids)}
        if task == "in-the-wild":
            tests = halves(dataset, images[env], base)
    return Protocol(train, held, tests)


def split_protocol(source, task: str, splits: dict, where: dict, shots: int, seed: int) -> Protocol:
    """Data with splits, such as CoOp's: all of the test images, or their base and new halves.

    REF: CoOp draws its few shots from all classes, before it takes the base classes; of val at most 4.
    """
    test = "test" if "test" in splits else "val"
    parts = {name: data.open_dataset(source, name, kind="labels", **where) for name in splits}
    counts, draw = {"train": shots, "val": min(shots, 4)} if shots else {}, random.Random(seed)
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    kept, lists = folder / "split_fewshot" / f"shot_{shots}-seed_{seed}.pkl", {}
    if shots and kept.is_file():
        lists = read_few_shots(kept)
        say(printable(f"the few shots are those of {kept}"))
    for name in (name for name in counts if name in parts and name != test):
        own = parts[name]
        parts[name] = listed(own, lists[name], kept) if name in lists else few(own, counts[name], draw)
    base, new = data.base_new_classes(len(parts["train"].classes))
    chosen = {"base": base, "new": new}
    if task == "all-classes":
        base, chosen = None, {"test": None}
    if test not in parts:
        raise ValueError(f"{source}: neither test nor val images; there are: {', '.join(splits)}")
    tests = {name: data.Subset(parts[test], None, classes) for name, classes in chosen.items()}
    val = data.Subset(parts["val"], None, base) if test == "test" and "val" in parts else None
    return Protocol(data.Subset(parts["train"], None, base), val, tests)


def few(dataset, shots: int, draw: random.Random):
    """At most `shots` images of each class, drawn as CoOp does after random.seed(--seed).

    No equation; KaiyangZhou/Dassl.pytorch@c61a1b5 generate_fewshot_dataset: classes in order of appearance, a
    class with too few images keeps all of them without a draw.
    """
    ids = {}
    for i, label in enumerate(dataset.labels):
        ids.setdefault(label, []).append(i)
    chosen = [draw.sample(some, shots) if len(some) >= shots else some for some in ids.values()]
    return data.Subset(dataset, [i for some in chosen for i in some])


def listed(dataset, files: list[str], where):
    """The images of a list, whose folders may be those of another machine.   Raises: ValueError."""
    number, found = {file: i for i, file in enumerate(dataset.files)}, []
    for file in files:
        names = file.replace("\\", "/").split("/")
        ends = ["/".join(names[k:]) for k in range(len(names))]
        if not (places := [number[end] for end in ends if end in number]):
            raise ValueError(f"{where}: {printable(file)} is not in this split: delete it to draw anew")
        found.append(places[0])
    return data.Subset(dataset, found)


def domains_of(source: str | Path, task: str, **where) -> list[str]:
    """The domains to leave out in turn; [""] if the task has no target."""
    if task in NO_TARGET:
        return [""]
    if str(source) == "scenes":
        return list(scenes.DOMAINS)
    names = data.open_dataset(source, kind="labels", **where).domain_names
    check_target(source, task, (names or [""])[0], names or ())
    return list(names)
