"""Data sets of the papers: each trains a step and is evaluated in its tasks; what it costs to list them."""

import json
import tracemalloc

import pytest
from small_datasets import ALL, COOP, DOMAINS, IMAGENET, make, save_clip

import data
import evaluate
import train
from evals import open_world
from readers import templates

TASKS = {name: ("domain-shift", "in-the-wild", "open-class", "all-classes") for name in DOMAINS}
TASKS |= {name: ("open-class", "all-classes") for name in ("FGVCAircraft", "ImageNet", *COOP)}
HALVES = ("base", "new", "H")
FIGURES = {"domain-shift": ("target",), "all-classes": ("test",), "open-class": HALVES, "in-the-wild": HALVES}
VARIANTS = {"ImageNetV2", *IMAGENET} - {"ImageNet"}
DEFAULT = ("PACS", "OxfordPets", "ImageNetR")
EACH = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def tuned(folder, task, clip, out, target="") -> str:
    """A run that was fine-tuned for one step, with two images of each domain."""
    domains = set(data.open_dataset(folder).domain_names or ["all"]) - {target}
    flags = ["--train-data", str(folder), "--open-task", task, "--out", str(out), "--method", "finetune"]
    flags += ["--target-domain", target] if target else []
    flags += ["--init", clip, "--steps", "1", "--batch-size", str(2 * len(domains))]
    assert train.main([*flags, "--device", "cpu", "--threads", "1"]) == 0
    return str(out)


@pytest.mark.parametrize("name", EACH)
def test_each_set_trains_and_is_evaluated_in_its_tasks(tmp_path, clip, name):
    folder, classes, splits = make(tmp_path, name)
    models = {"zero": clip}
    for task in TASKS.get(name, ()):
        target = data.open_dataset(folder).domain_names[1] if task in ("domain-shift", "in-the-wild") else ""
        models[task] = tuned(folder, task, clip, tmp_path / task, target)
        flags = ["--data", str(folder), "--out", str(tmp_path / "o"), "--device", "cpu", "--task", task]
        flags += ["--target-domain", target] if target else []
        assert open_world.main(["--model", clip, "--more", models[task], *flags]) == 0
        records = json.loads((tmp_path / "o" / "results.json").read_text())["records"]
        by_method = {record["method"]: record for record in records}
        for method in ("zero-shot", "finetune", "chance"):
            assert all(0 <= by_method[method][figure] <= 1 for figure in FIGURES[task])
    if name in VARIANTS:
        # they have test images only, for models fine-tuned on ImageNet
        imagenet, _, _ = make(tmp_path / "other", "ImageNet")
        models["all-classes"] = tuned(imagenet, "all-classes", clip, tmp_path / "run")
    for model in models.values():
        if model != models.get("open-class"):
            flags = ["--model", model, "--data", str(folder), "--device", "cpu", "--out", str(tmp_path / "z")]
            assert evaluate.main(["zeroshot", *flags]) == 0
            result = json.loads((tmp_path / "z" / "results.json").read_text())
            assert [row["class"] for row in result["per_class"]] == classes
            assert result["templates"] == list(templates.for_data(str(folder)))
            assert result["images"] == (
                splits.get("test") or splits.get("val") or len(data.open_dataset(folder))
            )


@pytest.mark.slow
def test_listing_takes_few_bytes_for_each_file(tmp_path):
    """DomainNet's 586,575 images take 30 MB: names are kept in blocks, and labels are small numbers."""
    for domain in ("clipart", "real"):
        for kind, count in {"axe": 1100, "bat": 900, "cat": 1000, "dog": 1000}.items():
            (tmp_path / domain / kind).mkdir(parents=True)
            for k in range(count):
                (tmp_path / domain / kind / f"{domain}_{kind}_{k:06d}.jpg").touch()
    data.open_dataset(tmp_path)
    tracemalloc.start()
    dataset = data.open_dataset(tmp_path)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == len(dataset.labels) == 8000
    # a name has 22 letters, a label and a domain take 8 bytes each; one folder is read at a time
    assert size / 8000 < 50 and peak / 8000 < 150
    # rows are blocks of 1,000 images
    names = {0: "clipart/axe/clipart_axe_000000.jpg", 999: "clipart/axe/clipart_axe_000999.jpg"}
    names |= {1000: "clipart/axe/clipart_axe_001000.jpg", 1099: "clipart/axe/clipart_axe_001099.jpg"}
    names |= {1100: "clipart/bat/clipart_bat_000000.jpg", 7999: "real/dog/real_dog_000999.jpg"}
    assert {i: dataset.files[i] for i in names} == names and dataset.files[-1] == names[7999]
    with pytest.raises(IndexError):
        dataset.files[8000]
