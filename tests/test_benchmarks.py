"""The data sets of both papers, recognised by their folders: names, order, templates, wrong copies."""

import json
from pathlib import Path

import pytest
from small_datasets import ALL, COOP, DOMAINS, PHOTO, WORDNET, make, picture, save_clip

import data
import evaluate
import train
from evals import protocol
from readers import templates


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("name", ALL)
def test_a_folder_is_enough(tmp_path, capsys, name):
    folder, classes, splits = make(tmp_path, name)
    dataset = data.open_dataset(folder)
    assert dataset.classes == classes
    assert dataset.splits == splits and len(dataset) >= len(classes)
    template = COOP[name][2] if name in COOP else PHOTO
    template = "a photo of a {}, a type of aircraft." if name == "FGVCAircraft" else template
    assert dataset.format.startswith(f"{name}, template {template!r}: ")
    assert templates.for_data(str(folder)) == (template,)
    for split, count in splits.items():
        part = data.open_dataset(folder, split)
        assert len(part) == count and sorted(set(part.labels)) == [0, 1, 2] and part.classes == classes
    if name in DOMAINS:
        wanted = DOMAINS[name][1].split(" ")
        assert dataset.domain_names == [domain.replace("_World", " World") for domain in wanted]
        assert dataset.domains == sorted(dataset.domains) and len(dataset) == 20 * len(wanted)
    assert data.main([str(folder), "--no-show"]) == 0
    printed = capsys.readouterr().out
    assert f"format    {name}, template {template!r}" in printed and classes[1] in printed


@pytest.mark.parametrize("name", ALL)
def test_the_page_shows_what_is_printed(tmp_path, capsys, name):
    """docs/data.md: the row of each data set ends with the format, and PACS is shown whole."""
    folder, _, _ = make(tmp_path, name)
    assert data.main([str(folder), "--no-show"]) == 0
    printed = capsys.readouterr().out
    form = next(line for line in printed.splitlines() if line.startswith("format "))[10:]
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
    assert row.endswith(f" | `{form.removeprefix(name + ', ')}` |")
    if name == "PACS":
        assert f"```\n{printed}```" in page


def test_splits_of_domainbed_and_coop(tmp_path):
    """The hold-out of a domain is DomainBed's; base classes are the first half, and rows keep their order."""
    folder, _, _ = make(tmp_path, "VLCS")
    dataset = data.open_dataset(folder)
    parts = protocol.protocol(folder, "domain-shift", "SUN09")
    _, held = data.domainbed_split(20, 2)
    target = [i for i, d in enumerate(dataset.domains) if d == 2]
    held_files = [dataset.name(target[k]) for k in held]
    assert [parts.tests["target"].name(i) for i in range(len(held))] == held_files
    folder, _, _ = make(tmp_path, "Food101")
    parts = protocol.protocol(folder, "open-class")
    assert parts.train.classes == ["big cat", "dog"] and len(parts.train) == 8
    assert parts.tests["new"].classes == ["elk"] and len(parts.tests["new"]) == 2


def test_domainnets_duplicates_are_left_out(tmp_path, capsys):
    folder, _, _ = make(tmp_path, "DomainNet")
    (folder / "domain_net_duplicates.txt").write_text("clipart/dog/1.jpg\nreal/elk/0.jpg\nreal/elk/99.jpg\n")
    dataset = data.open_dataset(folder)
    assert "2 images of domain_net_duplicates.txt are left out" in capsys.readouterr().out
    names = {dataset.name(i)[len(str(folder)) + 1 :] for i in range(len(dataset))}
    assert len(dataset) == 118 and not names & {"clipart/dog/1.jpg", "real/elk/0.jpg"}


def test_duplicates_of_a_folder_below_and_of_a_list(tmp_path, capsys):
    folder, _, _ = make(tmp_path, "DomainNet")
    (folder / "domain_net_duplicates.txt").write_text("clipart/dog/1.jpg\nreal/elk/0.jpg\n")
    assert len(data.open_dataset(tmp_path)) == 118
    rows = ["path,label,domain"]
    for name in DOMAINS["DomainNet"][1].split():
        rows += [f"{name}/{kind}/{k}.jpg,{kind},{name}" for kind in ("dog", "elk") for k in range(5)]
    (folder / "list.csv").write_text("\n".join([*rows, ""]))
    capsys.readouterr()
    assert len(data.open_dataset(folder / "list.csv")) == 60 - 2
    assert "2 images of domain_net_duplicates.txt are left out" in capsys.readouterr().out


def test_a_split_file_alone(tmp_path):
    folder, classes, _ = make(tmp_path, "EuroSAT")
    dataset = data.open_dataset(folder / "split_zhou_EuroSAT.json", "test")
    assert dataset.format.startswith("EuroSAT") and dataset.classes == classes and len(dataset) == 6
    # the first row of the file is of the last class: the file is read, not the folders
    assert dataset.labels == [2, 2, 1, 1, 0, 0]


FILES = {
    "classnames.txt": "n01440764 tench\nn01443537 gold fish, Carassius\nn01498041 sting_ray\nn01514859 hen\n",
    "LOC_synset_mapping.txt": "n01443537 gold fish, Carassius\nn01498041 sting ray\nn01514859 hen\n",
    "synset_words.txt": "n01443537 gold fish, Carassius auratus\nn01498041 sting_ray\nn01514859 hen\n",
    "classnames.json": json.dumps({"n01443537": "gold_fish", "n01498041": "sting ray", "n01514859": "hen"}),
    "imagenet_class_index.json": json.dumps(
        {"0": ["n01443537", "gold_fish"], "1": ["n01498041", "sting_ray"], "2": ["n01514859", "hen"]}
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_class_names(tmp_path, file):
    for wnid in WORDNET:
        picture(tmp_path / "pictures" / "val" / wnid / "1.png")
    assert data.open_dataset(tmp_path / "pictures").classes == list(WORDNET)
    (tmp_path / file).write_text(FILES[file])
    for path in ("pictures", "pictures/val"):
        assert data.open_dataset(tmp_path / path).classes == ["gold fish", "sting ray", "hen"]
    if file == "classnames.txt":
        # without ids the names are in the order of the folders
        (tmp_path / file).write_text("first\nsecond\nthird, or last\n")
        assert data.open_dataset(tmp_path / "pictures").classes == ["first", "second", "third, or last"]
    (tmp_path / file).write_text("[]" if file.endswith("json") else "\n\n")
    with pytest.raises(ValueError, match=file):
        data.open_dataset(tmp_path / "pictures")


def test_numbered_folders(tmp_path):
    """102 folders from 1 on and 102 names are in the same order; of more names a number is the place."""
    for k in (1, 2, 10):
        picture(tmp_path / "flowers" / str(k) / "1.png")
    names = tmp_path / "flowers" / "classnames.txt"
    names.write_text("rose\ntulip\nlily of the valley\n")
    assert data.open_dataset(tmp_path / "flowers").classes == ["rose", "tulip", "lily of the valley"]
    names.write_text("".join(f"flower {k}\n" for k in range(12)))
    assert data.open_dataset(tmp_path / "flowers").classes == ["flower 1", "flower 2", "flower 10"]


def test_names_are_those_nearest_to_the_images(tmp_path):
    """Also if the path is a folder above them; the format says which file they are of."""
    folder, classes, _ = make(tmp_path, "ImageNetA")
    (tmp_path / "classnames.txt").write_text("".join(f"{wnid} far\n" for wnid in WORDNET))
    for path, file in {folder: "../classnames.txt", folder.parent: "classnames.txt"}.items():
        dataset = data.open_dataset(path)
        assert dataset.classes == classes and dataset.format.endswith(f"class/*, names of {file}")
        # one folder of class folders is no domain
        assert dataset.domain_names is None


def test_imagenets_own_names_need_no_file(tmp_path, clip):
    folder, classes, _ = make(tmp_path, "ImageNetA")
    (tmp_path / "imagenet-adversarial" / "classnames.txt").unlink()
    dataset = data.open_dataset(folder)
    assert dataset.classes == ["goldfish", "stingray", "hen"] and dataset.folders == list(WORDNET)
    assert dataset.format.endswith("names of clip-ImageNet")
    assert len(templates.SUITE["ImageNet"]["classes"]) == 1000
    # --classnames refers to the ids, although the classes have names
    (tmp_path / "mine.txt").write_text("".join(f"{wnid} my {name}\n" for wnid, name in WORDNET.items()))
    flags = ["--classnames", str(tmp_path / "mine.txt"), "--out", str(tmp_path / "z"), "--device", "cpu"]
    assert evaluate.main(["zeroshot", "--model", clip, "--data", str(folder), *flags]) == 0
    rows = json.loads((tmp_path / "z" / "results.json").read_text())["per_class"]
    assert [row["class"] for row in rows] == ["my goldfish", "my stingray", "my hen"]


def test_numbers_are_classes_of_imagenet_in_its_v2_only(tmp_path):
    for place in ("imagenet/flowers", "imagenet/ImageNet_V2"):
        for k in (1, 2, 10):
            picture(tmp_path / place / str(k) / "1.png")
    assert data.open_dataset(tmp_path / "imagenet/flowers").classes == ["1", "2", "10"]
    names = data.open_dataset(tmp_path / "imagenet/ImageNet_V2").classes
    assert names == ["goldfish", "great white shark", "brambling"]


def test_a_list_of_ids_gets_names_too(tmp_path):
    for k in range(3):
        picture(tmp_path / f"{k}.png")
    wnids = list(WORDNET)
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{k}.png,{wnids[2 - k]}\n" for k in range(3)))
    (tmp_path / "b.jsonl").write_text(
        "".join(f'{{"image": "{k}.png", "label": {9 + k}}}\n' for k in range(3))
    )
    assert data.open_dataset(tmp_path / "a.csv").classes == wnids
    (tmp_path / "classnames.json").write_text(json.dumps({w: [n, "twin"] for w, n in WORDNET.items()}))
    dataset = data.open_dataset(tmp_path / "a.csv")
    assert dataset.classes == list(WORDNET.values()) and dataset.labels == [2, 1, 0]
    assert dataset.format == "table, separated by ',', names of classnames.json"
    (tmp_path / "classnames.json").write_text(json.dumps(["x", "y", "z_z"]))
    assert data.open_dataset(tmp_path / "b.jsonl").classes == ["x", "y", "z z"]


def test_classes_without_names(tmp_path, clip, capsys):
    for kind in ("n01443537", "n01498041"):
        for k in range(4):
            for split in ("train", "test"):
                picture(tmp_path / "own" / split / kind / f"{k}.png", k)
    assert evaluate.main(["zeroshot", "--model", clip, "--data", str(tmp_path / "own")]) == 0
    problem = "classes named n01443537, n01498041 ... mean nothing to a text encoder: put classnames.txt"
    assert f"warning: {problem}" in capsys.readouterr().err
    flags = ["--train-data", str(tmp_path / "own"), "--open-task", "all-classes", "--method", "finetune"]
    flags += ["--init", clip, "--out", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]
    assert train.main(flags) == 2
    assert problem in capsys.readouterr().err
    (tmp_path / "own" / "classnames.txt").write_text("n01443537 goldfish\nn01498041 stingray\n")
    assert train.main([*flags, "--batch-size", "2", "--threads", "1"]) == 0


def test_digits_may_be_names(tmp_path, clip, capsys):
    for k in range(10):
        picture(tmp_path / "mnist" / str(k) / "1.png", k)
    flags = ["zeroshot", "--model", clip, "--data", str(tmp_path / "mnist"), "--device", "cpu"]
    assert evaluate.main([*flags, "--classnames", "clip-MNIST"]) == 0
    assert "mean nothing" not in capsys.readouterr().err
    assert evaluate.main(flags) == 0
    assert "mean nothing" in capsys.readouterr().err


def lose_the_class(folder):
    for image in (folder / "photo" / "dog").iterdir():
        image.unlink()


# data set, split or None, what is wrong with it, and what is said: the problem and the remedy
WRONG = [
    (
        "PACS",
        None,
        lose_the_class,
        "kfold: there is no class 'dog' in the domain 'photo'; unpack it again, or",
    ),
    (
        "UCF101",
        "test",
        lambda folder: (folder / "UCF-101-midframes" / "x_folder" / "test0.jpg").unlink(),
        "1 of its 6 images are missing, .*x_folder/test0.jpg; --image-root .* or unpack them again",
    ),
    (
        "FGVCAircraft",
        None,
        lambda folder: (folder / "variants.txt").write_text("707-320\nF/A-18\n"),
        "images_variant_train.txt: variants.txt lacks 'Cessna 172'; unpack both again",
    ),
    ("FGVCAircraft", None, lambda folder: (folder / "variants.txt").unlink(), "variants.txt"),
    (
        "EuroSAT",
        None,
        lambda folder: (folder / "split_zhou_Food101.json").write_text("{}"),
        "eurosat: split_zhou_EuroSAT.json and split_zhou_Food101.json are there; give one of the files",
    ),
    (
        "ImageNetA",
        None,
        lambda folder: (folder.parent / "classnames.txt").write_text("n01443537 goldfish\nn01498041 ray\n"),
        "classnames.txt: no name for 1 classes, the first is 'n01514859'; add it",
    ),
]


@pytest.mark.parametrize("name, split, spoil, message", WRONG)
def test_wrong_copies_are_one_line(tmp_path, name, split, spoil, message):
    folder, _, _ = make(tmp_path, name)
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message):
        data.open_dataset(folder, split)


def test_names_and_templates_of_the_suite():
    assert templates.read_templates(["clip-MNIST"]) == ('a photo of the number: "{}".',)
    assert templates.read_classes("clip-CIFAR10", list("0123456789"))[:2] == ["airplane", "automobile"]
    with pytest.raises(ValueError, match="clip-CIFAR10: 10 names, but the data have 2 classes"):
        templates.read_classes("clip-CIFAR10", ["a", "b"])
    # Llip's suite of 22 without CUB and MIT-States
    suite = "ImageNet Food101 CIFAR10 CIFAR100 SUN397 StanfordCars FGVCAircraft OxfordPets Caltech101"
    suite += " Flowers102 MNIST STL10 GTSRB DescribableTextures EuroSAT RESISC45 PatchCamelyon"
    suite += " Country211 KITTI UCF101"
    assert {*suite.split()} <= {*templates.SUITE}
    for name in suite.split():
        facts = templates.SUITE[name]
        assert len(facts["classes"]) >= 2 and all("{}" in text for text in facts["templates"]), name
    assert "MIT License" in templates.SUITE["source"]
