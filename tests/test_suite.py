"""Zero-shot evaluation of every data set in a folder, and the best constant answer beside accuracy."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_error
from PIL import Image
from small_datasets import PHOTO, make, picture
from small_models import DEEPER, TOKENIZER

import evaluate
import pretrained
from baselines import coop
from clipood import Classes
from model import CLIP
from readers import templates
from util import files
from util.report import results_table

AVERAGES = ["average of 7 data sets", "average of 2 shifts of ImageNet"]


def save(folder, seed) -> str:
    """A run directory of a random CLIP."""
    folder.mkdir()
    torch.manual_seed(seed)
    model = CLIP(DEEPER)
    # at its usual size a random text tower says much the same of every class
    with torch.no_grad():
        model.positional_embedding.mul_(30)
        model.token_embedding.weight.mul_(30)
    pretrained.save(model, folder / "checkpoint.pt")
    TOKENIZER.save(folder / "tokenizer.json")
    return str(folder)


@pytest.fixture
def models(tmp_path):
    return [save(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture
def coop_run(tmp_path):
    """A run of CoOp whose contexts belong to the classes of its training."""
    source = save(tmp_path / "coop", 2)
    names, settings = ["big cat", "dog", "elk"], dict(context=2, context_words="", class_context=True)
    clip, text = pretrained.load(source), torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    method = coop.build(coop.Settings(**settings), clip, Classes(names, (PHOTO,), TOKENIZER, text))
    state = torch.load(tmp_path / "coop" / "checkpoint.pt", weights_only=True)
    state["task"] = {"classes": names, "templates": [PHOTO], "learned": method.learned()}
    torch.save(state, tmp_path / "coop" / "checkpoint.pt")
    files.write_json(tmp_path / "coop" / "config.json", {"method": "coop", **settings})
    return source


def run(*argv) -> int:
    return evaluate.main(["zeroshot", "--device", "cpu", *map(str, argv)])


def test_one_table_of_all_data_sets_and_models(tmp_path, models, capsys):
    """Every figure is that of an evaluation of the data set alone; averages and absent sets by hand."""
    root, out = tmp_path / "sets", tmp_path / "out"
    folders = {name: make(root, name)[0] for name in ("OxfordPets", "PACS", "ImageNet", "ImageNetR")}
    make(root, "ImageNetSketch")
    for digit in range(10):
        for k in range(1 + (digit == 3)):
            picture(root / "mnist" / "test" / str(digit) / f"{k}.png", 10 * digit + k)
            picture(root / "mnist" / "train" / str(digit) / f"{k}.png")
    for k in range(3):
        picture(root / f"{k}.png", 50 * k)
    (root / "flat.csv").write_text("image,label\n0.png,red dog\n1.png,cat\n2.png,cat\n")
    (root / "notes.txt").write_text("not a list")
    assert run("--suite", root, "--model", models[0], "--more", models[1], "--out", out) == 0
    printed, result = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    found = result["results"]
    names = "ImageNet ImageNetR ImageNetSketch PACS MNIST OxfordPets flat".split()
    assert sorted(found) == sorted(names) and result["left_out"] == []
    assert Image.open(out / "suite.png").width > 600

    folders |= {"ImageNetSketch": root / "imagenet-sketch", "flat": root / "flat.csv"}
    for name, folder in folders.items():
        for model in models:
            assert run("--data", folder, "--model", model, "--out", tmp_path / "one") == 0
            alone = json.loads((tmp_path / "one" / "results.json").read_text())
            own = found[name][model]
            # the folder above imagenet-r is read as one domain
            same = own.keys() - ({"domains", "constant"} if name == "ImageNetR" else set())
            assert {key: own[key] for key in same} == {key: alone[key] for key in same}
    flags = ["--classnames", "clip-MNIST", "--templates", "clip-MNIST", "--model", models[0]]
    assert run("--data", root / "mnist", *flags, "--out", tmp_path / "one") == 0
    alone = json.loads((tmp_path / "one" / "results.json").read_text())
    assert found["MNIST"][models[0]] == {key: alone[key] for key in found["MNIST"][models[0]]}
    assert found["MNIST"][models[0]]["images"] == 11
    assert found["OxfordPets"][models[0]]["templates"] == ["a photo of a {}, a type of pet."]

    tops = {model: {name: 100 * found[name][model]["top1"] for name in names} for model in models}
    assert len({*tops[models[0]].values(), *tops[models[1]].values()}) > 3
    *rows, mean, shifts = result["rows"]
    assert [mean["data set"], shifts["data set"]] == AVERAGES
    for model in models:
        assert mean[model] == pytest.approx(sum(tops[model].values()) / 7)
        assert shifts[model] == pytest.approx((tops[model]["ImageNetR"] + tops[model]["ImageNetSketch"]) / 2)
    row, per_class = (row for row in rows if row["data set"] == "MNIST")
    assert row["constant"] == pytest.approx(200 / 11) and row["chance"] == per_class["constant"] == 10
    assert per_class["figure"] == "mean_per_class"
    assert per_class[models[1]] == 100 * found["MNIST"][models[1]]["mean_per_class"]
    (row,) = (row for row in rows if row["data set"] == "PACS")
    assert row["constant"] == row["chance"] == 25 and row["images"] == 80 and row["figure"] == "top1"

    absent = [found.name for found in templates.BENCHMARKS if found.name not in names]
    assert len(absent) == 25 and result["absent"] == absent and "CUB200" in absent
    assert f"not in {root}: {', '.join(absent)}\n" in printed
    assert "| average of 7 data sets          |        |         | top1           | " in printed


def test_what_cannot_be_evaluated_is_left_out_and_the_status_is_2(tmp_path, models, coop_run, capsys):
    root, out = tmp_path / "sets", tmp_path / "out"
    make(root, "OxfordPets")
    for name in ("owl", "eel"):
        picture(root / "birds" / name / "1.png")
    for number in ("14", "15"):
        picture(root / "own" / number / "1.png")
    (root / "empty").mkdir()
    (root / "text.csv").write_text("image,caption\nbirds/owl/1.png,an owl\n")
    picture(root / "broken" / "eel" / "1.png")
    (root / "broken" / "owl").mkdir()
    (root / "broken" / "owl" / "1.png").write_bytes(b"not an image")
    flags = ["--suite", root, "--model", models[0], "--more", coop_run, "--out", out]
    assert run(*flags) == 2
    printed, result = capsys.readouterr(), json.loads((out / "results.json").read_text())
    assert set(result["results"]) == {"OxfordPets", "birds"}
    assert set(result["results"]["OxfordPets"]) == {models[0], coop_run}
    lines = [line for line in printed.err.splitlines() if line.startswith(("warning: ", "error: "))]
    for line, words in zip(
        lines,
        (
            "left out: empty: ",
            "left out: own: classes named 14, 15 ... mean nothing",
            "left out: text.csv: ",
            "left out: broken by ",
            f"left out: birds by {coop_run}: class-specific contexts can score the classes of training only",
            "left out: broken by ",
            "3 data sets are read, 6 results missing",
        ),
        strict=True,
    ):
        assert words in line
    # the average is over what both models have
    both = result["rows"][-1]
    assert both["data set"] == "average of 1 data sets"
    assert both[coop_run] == 100 * result["results"]["OxfordPets"][coop_run]["top1"]
    assert "was trained on" not in printed.err
    row = next(row for row in result["rows"] if row["data set"] == "birds")
    assert models[0] in row and coop_run not in row


def test_images_of_the_training_are_no_silent_test(tmp_path, models, capsys):
    folder, _, _ = make(tmp_path / "sets", "PACS")
    make(tmp_path / "sets", "OxfordPets")
    files.write_json(tmp_path / "first" / "config.json", {"method": "clip", "train_data": str(folder)})
    assert run("--suite", tmp_path / "sets", "--model", models[1], "--more", models[0]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and f"{models[0]} was trained on images of PACS" in warnings[0]


def test_the_same_data_set_twice_and_the_flags_of_all(tmp_path, models, capsys):
    root, out = tmp_path / "sets", tmp_path / "out"
    pets, _, _ = make(root, "OxfordPets")
    pets.rename(root / "other_pets")
    make(root, "OxfordPets")
    flags = ["--suite", root, "--model", models[0], "--out", out]
    assert run(*flags, "--split", "train", "--limit", "4", "--templates", "a {}", "the {}") == 0
    result = json.loads((out / "results.json").read_text())["results"]
    assert list(result) == ["OxfordPets", "OxfordPets in oxford_pets"]
    for own in result.values():
        assert own[models[0]]["images"] == 4 and own[models[0]]["templates"] == ["a {}", "the {}"]
    assert "average of 2 data sets" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["PACS", "OxfordPets"])
def test_a_suite_may_be_one_data_set(tmp_path, models, name):
    """Else each domain of PACS would be a data set, and the list of OxfordPets would lack its images."""
    make(tmp_path / "sets", name)
    folder = next((tmp_path / "sets").iterdir())
    assert run("--suite", folder, "--model", models[0], "--out", tmp_path / "out") == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(result["results"]) == [name] and result["left_out"] == []


def test_variants_of_imagenet_v2_are_not_one_data_set(tmp_path, models, capsys):
    for name in ("matched-frequency", "top-images"):
        for n in range(2):
            picture(tmp_path / "sets" / "imagenetv2" / f"imagenetv2-{name}-format-val" / str(n) / "a.png", n)
    assert run("--suite", tmp_path / "sets", "--model", models[0]) == 2
    names = "imagenetv2-matched-frequency-format-val, imagenetv2-top-images-format-val"
    assert f"imagenetv2: {names} are different test sets: give one" in capsys.readouterr().err
    flags = ["--suite", tmp_path / "sets" / "imagenetv2", "--model", models[0], "--out", tmp_path / "out"]
    assert run(*flags) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [*result["results"]] == ["ImageNetV2", "ImageNetV2 in imagenetv2-top-images-format-val"]


def test_shifts_are_averaged_only_beside_imagenet():
    def result(top1):
        return {"m": {"top1": top1, "images": 5, "classes": 2, "chance": {"top1": 0.5}, "constant": {}}}

    sets = {"ImageNetA": result(0.25), "ImageNetV2": result(0.5), "PACS": result(0.75)}
    assert [row["data set"] for row in evaluate.suite_table(sets)][3:] == ["average of 3 data sets"]
    rows = evaluate.suite_table(sets | {"ImageNet": result(1.0)})
    assert [(row["data set"], row["m"]) for row in rows[4:]] == [
        ("average of 4 data sets", 62.5),
        ("average of 2 shifts of ImageNet", 37.5),
    ]
    assert evaluate.suite_table({}) == []


def test_wrong_flags_and_folders_are_one_line(tmp_path, models, capsys):
    root = tmp_path / "sets"
    make(root, "OxfordPets")
    for flags, message in (
        ([], "--suite replaces --data"),
        (["--suite", root, "--data", root], "--suite replaces --data"),
        (["--data", root / "oxford_pets", "--more", models[1]], "--more goes with it"),
        (["--suite", root, "--classnames", "clip-OxfordPets"], "--suite replaces --data and --classnames"),
        (["--suite", root / "nothing"], "nothing"),
        (["--suite", root, "--templates", "words"], "'words'"),
        (["--suite", root, "--more", tmp_path / "none.pt"], "none.pt"),
    ):
        assert run("--model", models[0], *flags) == 2
        assert_one_error(capsys, message)
    (tmp_path / "bare").mkdir()
    assert run("--model", models[0], "--suite", tmp_path / "bare") == 2
    assert_one_error(capsys, "bare: 0 data sets are read")


def test_with_several_ranks_an_error_ends_the_program(tmp_path, models, monkeypatch, capsys):
    """Otherwise this rank would exchange features of the next data set, and the others those of this one."""
    make(tmp_path / "sets", "OxfordPets")

    def broken(*args, **options):
        monkeypatch.setattr(evaluate.distributed, "world_size", lambda: 2)
        raise ValueError("cannot read 3.png")

    monkeypatch.setattr(evaluate, "classify", broken)
    assert run("--model", models[0], "--suite", tmp_path / "sets") == 2
    assert_one_error(capsys, "cannot read 3.png")


def test_the_best_constant_answer_is_beside_accuracy(tmp_path, models, capsys):
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
