"""evals/open_world.py and protocol.py: exact splits, label spaces, no leaks, hand-made answers and tables."""

import io
import json
import os
import pickle
import random
import tarfile
from collections import defaultdict
from pathlib import Path
from statistics import harmonic_mean

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import save_run
from torch import nn

import data
import evaluate
from evals import open_world as openworld
from evals import protocol as protocols
from evals.open_world import protocol, summarise
from lab.reproduce import run_training
from model import CLIP, Config
from readers import benchmarks, scenes
from readers import templates as prompts
from readers.datasets import Images

DOMAINS, CLASSES = ("art", "photo", "sketch"), ("cat", "dog", "elk", "fox", "hen")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(protocols, "HELD_OUT", 96)
    protocols.scenes_protocol.cache_clear()
    yield
    protocols.scenes_protocol.cache_clear()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("clip"), CLIP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DomainBed's layout: 3 domains of 5 classes of 5 to 7 pictures."""
    root = tmp_path_factory.mktemp("bed")
    for d, domain in enumerate(DOMAINS):
        for c, name in enumerate(CLASSES):
            (root / domain / name).mkdir(parents=True)
            for k in range(5 + d):
                picture = Image.new("RGB", (16, 16), (50 * c, 40 * k, 80 * d))
                picture.save(root / domain / name / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def coop(tmp_path_factory):
    """A CoOp split of 5 classes: 4, 2 and 3 pictures of each."""
    root, content = tmp_path_factory.mktemp("pets"), {}
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        content[split] = []
        for c, name in enumerate(CLASSES):
            for k in range(n):
                Image.new("RGB", (16, 16), (50 * c, 40 * k, 0)).save(root / f"{split}{c}{k}.png")
                content[split].append([f"{split}{c}{k}.png", c, name])
    (root / "split_zhou_OxfordPets.json").write_text(json.dumps(content))
    return root / "split_zhou_OxfordPets.json"


def names(dataset):
    return {dataset.name(i) for i in range(len(dataset))}


def in_memory(sizes, base=10):
    """Domains of given sizes; 20 classes, of which the first ten take turns in the first `base` images."""
    labels = [k % 10 if k < base else 10 + k % 10 for n in sizes for k in range(n)]
    domains = [d for d, n in enumerate(sizes) for _ in range(n)]
    domain_names = [f"d{d}" for d in range(len(sizes))]
    classes = [f"c{c:02}" for c in range(20)]
    files = [f"{d}-{k}" for d, n in enumerate(sizes) for k in range(n)]
    contents = dict(labels=labels, classes=classes, domains=domains, domain_names=domain_names)
    return Images("root", files, **contents)


def test_splits_are_domainbeds(golden):
    """Each recorded split, as the target's hold-out, as a source's rest, and as a base part in the wild."""
    seen = set()
    for ref in json.loads(golden("domainbed_splits.json").read_text())["splits"]:
        if ref["seed_args"][0] != 0 or ref["holdout_fraction"] != 0.2:
            continue
        n, (_, env, *part) = ref["n"], ref["seed_args"]
        if part and part != ["base"]:
            continue
        sizes = [5] * 6
        sizes[env] = n + (3 if part else 0)
        first = sum(sizes[:env])
        dataset = in_memory(sizes, base=n if part else 10**9)
        task = "in-the-wild" if part else "domain-shift"
        other = protocols.domain_protocol(dataset, task, f"d{(env + 1) % 6}", False)
        held = [i - first for i in other.val.indices if 0 <= i - first < sizes[env]]
        rest = [i - first for i in other.train.indices if 0 <= i - first < sizes[env]]
        assert held == ref["holdout_keys"] and rest[:40] == ref["rest_keys_head"][: len(rest)]
        assert sorted(held + rest) == list(range(n))
        if not part:
            own = protocols.domain_protocol(dataset, task, f"d{env}", False)
            asked = own.tests["target"]
            assert [i - first for i in asked.indices] == ref["holdout_keys"]
            whole = protocols.domain_protocol(dataset, task, f"d{env}", True).tests["target"]
            assert len(whole) == n
        seen.add((env, *part))
    assert (0,) in seen and (2, "base") in seen


def test_domain_shift_leaves_the_target_out(folder):
    p = protocol(folder, "domain-shift", "photo")
    assert {p.train.domain_names[d] for d in p.train.domains} == {"art", "sketch"}
    assert p.train.classes == list(CLASSES) and list(p.tests) == ["target"]
    asked = p.tests["target"]
    classes = asked.classes
    assert classes == list(CLASSES) and len(asked) == 6  # a fifth of 30
    assert len(p.train) == 20 + 28 and len(p.val) == 5 + 7
    assert all("photo" in name for name in names(asked))
    assert len(protocol(folder, "domain-shift", "photo", whole=True).tests["target"]) == 30


def test_open_class_has_two_label_spaces(folder, coop):
    for source in (folder, coop):
        p = protocol(source, "open-class")
        assert p.train.classes == ["cat", "dog", "elk"]  # ceil(5 / 2)
        assert {name: part.classes for name, part in p.tests.items()} == {
            "base": ["cat", "dog", "elk"],
            "new": ["fox", "hen"],
        }
        new = p.tests["new"]
        assert new.classes == ["fox", "hen"] and set(new.labels) == {0, 1}
    assert len(p.train) == 12 and len(p.val) == 6 and len(new) == 6
    assert protocol(folder, "open-class").val is None  # two parts are all that DomainBed's split has


def test_all_classes_are_trained_on_and_evaluated(folder, coop):
    for source, images in ((coop, 15), (folder, 18)):
        p = protocol(source, "all-classes")
        assert list(p.tests) == ["test"] and p.train.classes == p.tests["test"].classes == list(CLASSES)
        assert set(p.train.labels) == set(p.tests["test"].labels) == set(range(5))
        assert len(p.tests["test"]) == images and (p.val is None) == (source == folder)
    assert protocol("scenes", "all-classes", scene=dict(size=64)).tests["test"].classes == list(scenes.KINDS)
    with pytest.raises(ValueError, match="all-classes has no target domain, 'art' was given: leave it out"):
        protocol(folder, "all-classes", "art")


def test_in_the_wild_asks_all_names(folder):
    p = protocol(folder, "in-the-wild", "sketch")
    assert p.train.classes == ["cat", "dog"] == p.val.classes  # floor(5 / 2)
    for name, wanted in (("base", {0, 1}), ("new", {2, 3, 4})):
        asked = p.tests[name]
        classes = asked.classes
        assert classes == list(CLASSES) and set(asked.labels) == wanted
        assert len(asked) == 7 * len(wanted)  # the whole target
        assert all("sketch" in n for n in names(asked))


@pytest.mark.parametrize("task", protocols.TASKS)
def test_nothing_asked_is_trained_on(folder, coop, task):
    target = "" if task in protocols.NO_TARGET else "sketch"
    for source in [folder, "scenes"] + ([coop] if task in protocols.NO_TARGET else []):
        p = protocol(source, task, target, scene=dict(size=400))
        trained = names(p.train) | (names(p.val) if p.val else set())
        for asked in p.tests.values():
            classes = asked.classes
            assert len(asked) and not trained & names(asked)
            assert set(asked.labels) <= set(range(len(classes)))
        used = {p.train.domain_names[d] for d in getattr(p.train, "domains", [])}
        assert "sketch" not in used or task in protocols.NO_TARGET
        if task in protocols.NEW_CLASSES:
            asked = p.tests["new"]
            classes = asked.classes
            assert not {classes[y] for y in asked.labels} & set(p.train.classes)
        if source == "scenes":
            for asked in p.tests.values():
                drawn = {x.tobytes() for x in p.train.pixels} & {x.tobytes() for x in asked.pixels}
                assert not drawn


def test_scenes_serve_all_tasks():
    shift = protocol("scenes", "domain-shift", "cartoon", scene=dict(size=64), seed=1)
    assert shift.train.classes == list(scenes.KINDS) and shift.train.seed == 1
    assert shift.tests["target"].domain_names == ["cartoon"]
    wild = protocol("scenes", "in-the-wild", "cartoon", scene=dict(size=64))
    assert wild.train.classes == list(scenes.BASE)
    for name, kinds in (("base", scenes.BASE), ("new", scenes.NEW)):
        asked = wild.tests[name]
        classes = asked.classes
        assert classes == list(scenes.KINDS) and {classes[y] for y in asked.labels} == set(kinds)
    classes = protocol("scenes", "open-class", scene=dict(size=64))
    assert classes.tests["new"].classes == list(scenes.NEW)
    assert classes.train.domain_names == list(scenes.DOMAINS)
    biased = protocol("scenes", "domain-shift", "cartoon", scene=dict(size=64, bias=1.0))
    assert biased.train.bias == biased.val.bias == 1.0 and biased.tests["target"].bias == 0.0
    same = protocol("scenes", "domain-shift", "cartoon", scene=dict(size=64), seed=2).tests["target"]
    assert np.array_equal(same.pixels, shift.tests["target"].pixels)  # every seed, one question


def test_shots(coop, folder):
    p = protocol(coop, "open-class", shots=2, seed=3)
    assert sorted(p.train.labels) == [0, 0, 1, 1, 2, 2] and p.train.classes == ["cat", "dog", "elk"]
    assert names(p.train) == names(protocol(coop, "open-class", shots=2, seed=3).train)
    assert names(p.train) != names(protocol(coop, "open-class", shots=2, seed=4).train)
    assert len(protocol(coop, "open-class", shots=99).train) == 12
    assert protocol(folder, "domain-shift", "art", shots=3).train.domains


class Datum:
    """As Dassl's, which CoOp pickles."""

    def __init__(self, impath="", label=0, domain=0, classname=""):
        self._impath, self._label, self._domain, self._classname = impath, label, domain, classname


def few_as_in_dassl(items: list[Datum], shots: int) -> list[Datum]:
    """With Python's global random numbers, as the published code draws."""
    tracker, chosen = defaultdict(list), []
    for item in items:
        tracker[item._label].append(item)
    for some in tracker.values():
        chosen.extend(random.sample(some, shots) if len(some) >= shots else some)
    return chosen


def split_file(root: Path) -> tuple[Path, dict]:
    """A CoOp split whose classes appear in another order than their numbers, and the Datum of each row."""
    content, order = {}, (3, 0, 4, 1, 2)
    for split, n in (("train", 8), ("val", 6), ("test", 2)):
        rows = [
            (f"{split}/{c}-{k}.png", c, CLASSES[c]) for c in order for k in range(max(1, n - 3 * (c == 4)))
        ]
        content[split] = rows[::2] + rows[1::2]
        (root / split).mkdir()
        for file, _, _ in rows:
            Image.new("RGB", (8, 8)).save(root / file)
    (root / "split_zhou_OxfordPets.json").write_text(json.dumps(content))
    data = {split: [Datum(f"/home/me/{f}", y, 0, c) for f, y, c in rows] for split, rows in content.items()}
    return root / "split_zhou_OxfordPets.json", data


@pytest.mark.parametrize("shots, seed", [(1, 1), (2, 0), (6, 2), (8, 3)])
def test_shots_are_coops_own_draw(tmp_path, shots, seed):
    """Drawn from all classes before the base classes are taken; classes with too few images keep all."""
    path, items = split_file(tmp_path)
    before = random.getstate()
    try:
        random.seed(seed)
        train = few_as_in_dassl(items["train"], shots)
        val = few_as_in_dassl(items["val"], min(shots, 4))
    finally:
        random.setstate(before)
    for task, base in (("all-classes", CLASSES), ("open-class", CLASSES[:3])):
        found = protocol(path, task, shots=shots, seed=seed)
        for part, wanted in ((found.train, train), (found.val, val)):
            files = [Path(part.name(i)).relative_to(tmp_path).as_posix() for i in range(len(part))]
            assert files == [x._impath.removeprefix("/home/me/") for x in wanted if x._classname in base]
        assert sum(map(len, found.tests.values())) == 9
    assert random.getstate() == before


def test_an_evaluated_val_is_not_cut(tmp_path):
    """ImageNet has no test: its val is evaluated."""
    path, _ = split_file(tmp_path)
    content = json.loads(path.read_text())
    del content["test"]
    path.write_text(json.dumps(content))
    found = protocol(path, "all-classes", shots=1)
    assert len(found.train) == 5 and len(found.tests["test"]) == 27 and found.val is None


@pytest.mark.parametrize("version", [2, pickle.HIGHEST_PROTOCOL])
def test_shots_of_coops_cache_are_used(tmp_path, version, capsys):
    path, items = split_file(tmp_path)
    kept = tmp_path / "split_fewshot" / "shot_2-seed_5.pkl"
    kept.parent.mkdir()
    chosen = {"train": items["train"][5:12], "val": items["val"][:3]}
    of_windows = Datum("C:\\me\\" + chosen["val"][2]._impath.removeprefix("/home/me/").replace("/", "\\"))
    kept.write_bytes(pickle.dumps(chosen | {"val": [*chosen["val"][:2], of_windows]}, version))
    for source in (path, tmp_path):
        found = protocol(source, "all-classes", shots=2, seed=5)
        for split, part in (("train", found.train), ("val", found.val)):
            files = [Path(part.name(i)).relative_to(tmp_path).as_posix() for i in range(len(part))]
            assert files == [x._impath.removeprefix("/home/me/") for x in chosen[split]]
    assert f"the few shots are those of {kept}" in capsys.readouterr().out
    other = protocol(path, "all-classes", shots=2, seed=6)
    assert len(other.train) == 10 and len(other.val) == 10
    assert len(protocol(path, "all-classes").train) == 37


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_a_cache_that_is_no_list_of_shots_is_refused(tmp_path, monkeypatch):
    path, items = split_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "split_fewshot" / "shot_1-seed_0.pkl"
    kept.parent.mkdir()
    wrong_split = {"train": items["test"][:1]}
    for content, message in (
        ({"train": [Attack()]}, "not few shots of CoOp"),
        ({"train": [Datum(Attack())]}, "no paths of training images"),
        ({"train": [Datum(7)]}, "no paths of training images"),
        ({"train": []}, "no paths of training images"),
        ({"val": items["val"]}, "'train'"),
        ([Datum("a.png")], "not few shots of CoOp"),
        (wrong_split, f"{wrong_split['train'][0]._impath} is not in this split: delete it to draw anew"),
    ):
        kept.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError) as error:
            protocol(path, "all-classes", shots=1)
        assert str(error.value).startswith(str(kept)) and message in str(error.value), content
        assert "\n" not in str(error.value)
    monkeypatch.setattr(benchmarks, "FEW_SHOTS_BYTES", 100)
    kept.write_bytes(pickle.dumps({"train": items["train"]}))
    with pytest.raises(ValueError, match="more than 0 MB"):
        protocol(path, "all-classes", shots=1)
    assert not (tmp_path / "attacked").exists()


def test_shards_with_labels_have_base_and_new_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for k in range(40):
            Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / "a.png")
            (tmp_path / "a.cls").write_text(str(k % 4))
            for suffix in ("png", "cls"):
                archive.add(tmp_path / f"a.{suffix}", f"{k}.{suffix}")
    found = protocol(tmp_path / "a.tar", "open-class")
    assert found.train.classes == ["0", "1"] and found.tests["new"].classes == ["2", "3"]
    assert len(found.train) + len(found.tests["base"]) == 20 and found.train.image(0).size == (8, 8)


def test_mistakes_are_named(folder, coop, tmp_path):
    def said(*args, **more):
        with pytest.raises(ValueError) as error:
            protocol(*args, **more)
        assert "\n" not in str(error.value)
        return str(error.value)

    for source, known in ((folder, "art, photo, sketch"), ("scenes", ", ".join(scenes.DOMAINS))):
        message = said(source, "domain-shift", "Sketch")
        assert "no domain 'Sketch'" in message and known in message and str(source) in message
        assert known in said(source, "in-the-wild")
    assert "leave it out" in said(folder, "open-class", "art")
    message = said(coop, "domain-shift", "art")
    assert (
        "needs two domains or more, there are 0; --open-task all-classes or open-class needs none" in message
    )
    content = json.loads(coop.read_text())
    content["test"][4][0] = "gone.png"
    broken = coop.parent / "broken.json"
    broken.write_text(json.dumps(content))
    message = said(broken, "open-class")
    assert "1 of its 45 images are missing" in message and "gone.png" in message
    for domain in ("a", "b"):
        (tmp_path / domain / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / domain / "cat" / "0.png")
    assert "needs two classes or more" in said(tmp_path, "domain-shift", "a", whole=True)
    (tmp_path / "b" / "dog").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "dog" / "0.png")
    assert "there is no class 'dog' in the domain 'a'" in said(tmp_path, "domain-shift", "a")
    (tmp_path / "list.csv").write_text("filepath,title\na/cat/0.png,a cat\n")
    assert "has no labels, which are needed" in said(tmp_path / "list.csv", "open-class")


def test_h_of_the_average_is_the_harmonic_mean():
    def average(base: float, new: float) -> float:
        run = {"task": "in-the-wild", "method": "coop", "seed": 0, "base": base, "new": new, "H": 0.9}
        return summarise([run | {"domain": domain} for domain in "ab"])[-1]["H"][0]

    assert average(1.0, 0.5) == pytest.approx(2 / 3)
    assert average(0.0, 0.0) == 0.0 and average(0.8, 0.0) == 0.0
    assert average(0.8269, 0.6322) == pytest.approx(0.7166, abs=1e-4)  # CoOp's average of 11 sets


class Colours(nn.Module):
    """A dual encoder that reads the class off the red channel: 40 times its number."""

    def __init__(self):
        super().__init__()
        self.config = Config(image_size=8, vocab_size=10, context_length=4)
        self.weight = nn.Parameter(torch.ones(()))

    def encode_image(self, images):
        red = images[:, 0].mean((1, 2)) * data.STD[0] + data.MEAN[0]
        return torch.eye(6)[(red * 255 / 40).round().long()]

    def encode_text(self, tokens):
        return torch.eye(6)[tokens[:, 0]]

    def pair_logits(self, image_side, text_side):
        return image_side @ text_side.t()

    def ensemble_text(self, text_side, group):
        return text_side

    def class_templates(self, templates):
        return templates


class Names:
    vocab_size = 10

    def __call__(self, texts, context_length):
        return torch.tensor([[CLASSES.index(text.split()[-1]), 9] for text in texts])


class Painted:
    """Pictures whose colour is the answer that Colours will give."""

    def __init__(self, answers, labels, classes):
        pixels = np.zeros((len(answers), 8, 8, 3), np.uint8)
        pixels[..., 0] = 40 * np.array(answers)[:, None, None]
        self.pixels, self.labels, self.classes = pixels, labels, list(classes)

    def __len__(self):
        return len(self.labels)


def test_hand_made_answers():
    """5 names compete in the wild; among its own two names a half cannot be mistaken for the other."""
    base = Painted([0, 1, 1, 4], [0, 0, 1, 1], CLASSES)  # 2 of 4 right
    new = Painted([2, 0, 3, 4, 4], [2, 2, 3, 4, 4], CLASSES)  # 4 of 5, one taken for a base class
    train = Painted([0, 1], [0, 1], CLASSES[:2])
    wild = protocols.Protocol(train, train, {"base": base, "new": new})
    found = openworld.evaluate_protocol(Colours(), wild, Names(), ("{}",))
    assert found["val"] == 1.0 and found["base"] == 0.5 and found["new"] == 0.8
    assert found["H"] == pytest.approx(0.8 / 1.3) and found["images"] == 9
    # the most frequent class has 2 of 4 and 2 of 5 images; the classes' accuracies are 1/2, 1/2 and 1/2, 1, 1
    assert found["constant"] == pytest.approx({"base": 0.5, "new": 0.4, "H": harmonic_mean([0.5, 0.4])})
    assert found["mean_per_class"] == pytest.approx(harmonic_mean([0.5, 5 / 6]))
    # certain are the answers cat and dog: 3 of 4 base images, and 1 of 5 new ones; the others tie
    assert found["auroc"] == pytest.approx((3 * 4 + (3 + 4) / 2) / 20)
    chance = dict.fromkeys(("base", "new", "H", "mean_per_class"), 0.2)
    assert found["chance"] == pytest.approx({"val": 0.5, "auroc": 0.5} | chance)
    new = Painted([2, 0, 2], [0, 1, 0], CLASSES[2:4])
    asked = protocols.Protocol(train, None, {"base": train, "new": new})
    found = openworld.evaluate_protocol(Colours(), asked, Names(), ("{}",))
    # among their own names the new images are named; the two names of training decide the score
    assert found["new"] == pytest.approx(2 / 3) and found["auroc"] == pytest.approx((2 * 2 + 2 / 2) / 6)
    assert found["constant"]["H"] == pytest.approx(harmonic_mean([1 / 2, 2 / 3]))
    wrong = protocols.Protocol(train, None, {"base": Painted([1, 0], [0, 1], CLASSES), "new": new})
    none = openworld.evaluate_protocol(Colours(), wrong, Names(), ("{}",))["H"]
    assert none == 0 and isinstance(none, float)  # a table takes an int for a count of images
    own = Painted([1, 0, 1], [0, 0, 1], CLASSES[:2])
    alone = protocols.Protocol(train, None, {"target": own})
    found = openworld.evaluate_protocol(Colours(), alone, Names(), ("{}",))
    assert found["target"] == pytest.approx(2 / 3) and not {"val", "H", "auroc"} & found.keys()
    assert found["constant"] == {"target": 2 / 3} and found["mean_per_class"] == pytest.approx(3 / 4)
    balanced = protocols.Protocol(train, None, {"target": train})
    found = openworld.evaluate_protocol(Colours(), balanced, Names(), ("{}",))
    assert found["constant"] == {} and "mean_per_class" not in found


def test_tables_over_seeds_and_domains():
    records = []
    for seed, domain, base, new in (
        (0, "a", 0.8, 0.4),
        (0, "b", 0.6, 0.2),
        (1, "a", 0.9, 0.5),
        (1, "b", 0.7, 0.1),
        (2, "a", 1.0, 0.6),
    ):
        about = {"task": "in-the-wild", "method": "clipood", "domain": domain, "seed": seed}
        records.append(about | {"base": base, "new": new, "H": harmonic_mean([base, new])})
    rows = {row["domain"]: row for row in summarise(records)}
    assert rows["a"]["base"] == pytest.approx((0.9, 0.1)) and rows["a"]["runs"] == 3
    assert rows["average"]["runs"] == 2  # seed 2 has not seen domain b
    assert rows["average"]["base"][0] == pytest.approx(0.75)
    mean = (harmonic_mean([0.7, 0.3]) + harmonic_mean([0.8, 0.3])) / 2
    assert rows["average"]["H"][0] == pytest.approx(mean)
    text = openworld.table(list(rows.values()))
    assert "90.0 +- 10.0" in text and "average" in text and "in-the-wild, %" in text
    one = summarise(records[:1])[0]
    assert one["base"] == (0.8, None) and "+-" not in openworld.table([one])


def test_templates_of_papers():
    assert prompts.for_data("x/split_zhou_OxfordPets.json") == ("a photo of a {}, a type of pet.",)
    assert prompts.for_data("x/split_zhou_Caltech101.json") == prompts.PHOTO
    assert evaluate.templates_of((), "PACS") == prompts.PHOTO
    assert evaluate.templates_of((), "scenes") == scenes.TEMPLATES
    assert evaluate.templates_of(("a {}",), "scenes") == ("a {}",)


# Command lines -------------------------------------------------------------------------------------------


def test_command(tmp_path, clip, folder, capsys):
    common = ["--data", str(folder), "--device", "cpu"]
    out = ["--out", str(tmp_path / "zero")]
    assert openworld.main([*common, "--model", str(clip), "--task", "in-the-wild", *out]) == 0
    rows = json.loads((tmp_path / "zero" / "results.json").read_text())["rows"]
    wanted = [(m, d) for d in DOMAINS for m in ("zero-shot", "chance", "constant")]
    assert {(r["method"], r["domain"]) for r in rows} >= {*wanted, ("zero-shot", "average")}
    constant = next(r for r in rows if (r["method"], r["domain"]) == ("constant", "average"))
    assert constant["H"][0] == pytest.approx(harmonic_mean([1 / 2, 1 / 3]))  # 2 base and 3 new classes
    printed = capsys.readouterr().out
    assert "| auroc |" in printed and "| mean_per_class |" in printed
    # 25 to 35 images of the target: base classes and new ones are few, and their figures uncertain
    assert "| average |" in printed and "standard error of one run in %: art 25 (at most" in printed

    runs = []
    for seed in "01":
        runs.append(str(tmp_path / f"run{seed}"))
        flags = dict(method="clipood", init=str(clip), train_data=str(folder), target_domain="art", steps=2)
        flags |= dict(batch_size=4, seed=int(seed), device="cpu", out=runs[-1])
        run_training(flags, io.StringIO())
    own = json.loads((tmp_path / "run0" / "results.json").read_text())
    capsys.readouterr()
    both = [*common, "--model", runs[0], "--more", runs[1], "--out", str(tmp_path / "both")]
    assert openworld.main(both) == 0
    rows = json.loads((tmp_path / "both" / "results.json").read_text())
    row = next(r for r in rows["rows"] if r["method"] == "clipood")
    assert (row["task"], row["domain"], row["runs"]) == ("domain-shift", "art", 2)
    assert rows["records"][0]["target"] == own["averaged"]["target"]  # the model to report
    for flags, message in (
        (["--target-domain", "photo"], "with art left out, so ['photo'] is no test"),
        (["--task", "open-class"], "fine-tuned for domain-shift and cannot be evaluated on open-class"),
        (["--limit", "5"], "the task determines the images"),
    ):
        assert openworld.main([*common, "--model", runs[0], *flags]) == 2
        assert message in capsys.readouterr().err
    assert openworld.main([*common, "--model", str(clip), "--target-domain", "clipart"]) == 2
    assert "no domain 'clipart'; there are: art, photo, sketch" in capsys.readouterr().err


def test_few_shots_of_a_run_decide_its_val(tmp_path, clip, coop, capsys):
    flags = dict(method="finetune", init=str(clip), train_data=str(coop), open_task="open-class", steps=1)
    flags |= dict(shots=1, seed=2, batch_size=2, device="cpu", out=str(tmp_path / "run"))
    own = run_training(flags, io.StringIO())["fine-tuned"]
    command = ["--model", str(tmp_path / "run"), "--data", str(coop), "--out", str(tmp_path / "again")]
    sizes, classify = [], openworld.evaluate.classify
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            openworld.evaluate, "classify", lambda *a, **more: sizes.append(len(a[1])) or classify(*a, **more)
        )
        assert openworld.main([*command, "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "again" / "results.json").read_text())["records"][0]
    assert own.items() <= found.items() and sizes == [3, 9, 6]  # one image of val for each of 3 base classes


def test_a_list_may_lead_outside_of_its_folder_only_if_asked(tmp_path):
    pictures, lists = tmp_path / "pictures", tmp_path / "lists"
    pictures.mkdir(), lists.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(pictures / f"{name}.png")
    rows = [f"../pictures/{n}.png,{y},{d}" for n in "ab" for y in ("cat", "dog") for d in ("x", "y")]
    (lists / "all.csv").write_text("\n".join(["image,label,domain", *rows]))
    source = lists / "all.csv"
    with pytest.raises(ValueError, match="--allow-outside"):
        protocols.protocol(source, "domain-shift", "x")
    found = protocols.protocol(source, "domain-shift", "x", whole=True, allow_outside=True)
    assert len(found.tests["target"]) == 4
