"""The best constant answer beside accuracy, and the data sets of Llip's suite."""

from types import SimpleNamespace

import pytest
import torch
from small_datasets import picture

import evaluate
from readers import templates
from util.report import results_table


def test_the_best_constant_answer_is_beside_accuracy():
    """As on PACS, where sketches have many more elephants than persons."""
    target, domains = [0, 0, 0, 1, 2, 0, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]
    data = SimpleNamespace(labels=target, classes=["a", "b", "c"], domains=domains, domain_names=["p", "s"])
    always_a = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 1])
    result = evaluate.summary(always_a, data)
    assert result["constant"] == pytest.approx({"top1": 4 / 9, "top1 p": 3 / 5, "top1 s": 2 / 4})
    assert result["top1"] == result["constant"]["top1"] and result["mean_per_class"] == pytest.approx(1 / 3)
    table = results_table({"zeroshot": result}).splitlines()
    assert table[0] == "| task     | figure         |      % | chance | constant |"
    assert table[2] == "| zeroshot | top1           |  44.44 |  33.33 |    44.44 |"
    assert table[4] == "| zeroshot | mean_per_class |  33.33 |  33.33 |          |"
    assert table[6] == "| zeroshot | top1 s         |  25.00 |  33.33 |    50.00 |"
    even = SimpleNamespace(labels=[0, 1, 2], classes=data.classes, domains=[0, 0, 1], domain_names=["p", "s"])
    assert evaluate.summary(torch.zeros(3), even)["constant"] == {"top1 p": 0.5, "top1 s": 1}
    even.domains = None
    result = evaluate.summary(torch.zeros(3), even)
    assert result["constant"] == {} and "constant" not in results_table({"zeroshot": result})


def test_the_other_sets_of_llips_suite_are_found_by_the_name_of_the_folder(tmp_path):
    """With the names and templates of readers/zeroshot.json; there they have several."""
    llip = "CIFAR10 CIFAR100 CUB200 MNIST STL10 GTSRB RESISC45 PatchCamelyon Country211 KITTI MIT-States"
    known = {found.name: found for found in templates.BENCHMARKS}
    assert set(llip.split()) == {name for name, found in known.items() if found.mark.startswith("folder")}
    for name in set(llip.split()) - {"CUB200", "MIT-States"}:
        assert known[name].template == templates.CLIP[f"clip-{name}"][0]
    for folder, name in (("stl_10", "STL10"), ("CUB_200_2011", "CUB200"), ("pcam", "PatchCamelyon")):
        for kind in ("0", "1"):
            picture(tmp_path / folder / "test" / kind / "1.png")
        assert templates.recognise(tmp_path / folder).name == name
        assert templates.for_data(str(tmp_path / folder)) == (known[name].template,)
    assert (
        evaluate.data.open_dataset(tmp_path / "pcam").classes == templates.SUITE["PatchCamelyon"]["classes"]
    )
    assert evaluate.data.open_dataset(tmp_path / "CUB_200_2011").classes == ["0", "1"]
    assert templates.recognise(tmp_path / "cifar-10-batches") is None
