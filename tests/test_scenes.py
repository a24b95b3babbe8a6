"""The embedded data set: a pure function of (seed, split, index) whose captions and masks are true."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from readers import scene_captions, scenes
from readers.scenes import COLOURS, DOMAINS, GROUPS, KINDS, PLACES, Objects, Scenes, draw
from tasks import pair_data
from train import configure

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
GROUND = {
    "on grass": "grass",
    "in water": "water",
    "on sand": "sand",
    "in snow": "snow",
    "on bricks": "bricks",
    "at night": "night",
}
LEFT, RIGHT, ABOVE, BELOW = ("left", "right", "above", "below")
SPOKEN = {
    "to the left of": LEFT,
    "left of": LEFT,
    "to the right of": RIGHT,
    "right of": RIGHT,
    "above": ABOVE,
    "over": ABOVE,
    "below": BELOW,
    "under": BELOW,
}


def picture_facts(data, i):
    """What is in picture i as plain words, from the table of facts and not from the claims."""
    f, things = data.facts, []
    for n in range(4):
        if f["kind"][i, n] < 0:
            continue
        kind = KINDS[f["kind"][i, n]]
        y, x = divmod(int(f["place"][i, n]), 2)
        words = {kind, COLOURS[f["colour"][i, n]]}
        words |= {group for group, kinds in GROUPS.items() if kind in kinds}
        things.append((words, ("top", "bottom")[y] + " " + ("left", "right")[x], y, x))
    return things, scenes.BACKGROUNDS[f["background"][i]], DOMAINS[f["domain"][i]]


def thing_words(text):
    """ "a large red dog at the top left" -> ({"large", "red", "dog"}, "top left")"""
    place = next((p for p in PLACES if p in text), None)
    text = re.split(r" (?:at|in|on) the ", text)[0]
    head = re.fullmatch(r"an? (.+)", text)
    assert head, text
    assert text.startswith("an ") == (head[1][0] in "aeiou"), text
    words = head[1].replace("land animal", "land_animal").replace("sea animal", "sea_animal")
    return {word.replace("_", " ") for word in words.split()}, place


def matches(text, thing):
    words, place = thing_words(text)
    return words <= thing[0] and place in (None, thing[1])


def is_true(text, facts):
    """An independent reading of a caption against the facts of a picture."""
    things, background, domain = facts
    style = re.match(rf"a ({'|'.join(DOMAINS)}) of ", text)
    if style and style[1] != domain:
        return False
    text = re.sub(rf"^(there is |there are |a picture of |a ({'|'.join(DOMAINS)}) of )", "", text)
    if count := re.fullmatch(r"(one|two|three|four) (?:thing|object)s?", text):
        return NUMBERS[count[1]] == len(things)
    if ground := re.fullmatch(r"a background of (\w+)", text):
        return ground[1] == background
    for phrase, ground in GROUND.items():
        if text.endswith(" " + phrase):
            if ground != background:
                return False
            text = text[: -len(phrase) - 1]
    if text in ("a scene", "things"):
        return True
    parts = re.split(rf" ({'|'.join(sorted(SPOKEN, key=len, reverse=True))}|and) (?=an? )", text)
    if len(parts) == 1:
        return any(matches(text, thing) for thing in things)
    if "," in text:
        several = re.split(r", | and ", text)
        return all(any(matches(part, thing) for thing in things) for part in several)
    first, joint, second = parts
    for a in things:
        for b in things:
            side = {LEFT: a[3] < b[3], RIGHT: a[3] > b[3], ABOVE: a[2] < b[2], BELOW: a[2] > b[2]}
            both = a is not b and matches(first, a) and matches(second, b)
            if both and (joint == "and" or side[SPOKEN[joint]]):
                return True
    return False


def test_pixels_and_captions_depend_on_seed_split_and_index_only():
    small, large = Scenes("train", 20, seed=3), Scenes("train", 150, seed=3)
    assert np.array_equal(small.pixels, large.pixels[:20])
    assert small.captions == large.captions[:20]
    fresh = Scenes("train", 20, seed=3)
    for i in (17, 2, 11):  # one at a time, in any order
        assert np.array_equal(np.asarray(fresh.image(i)), small.pixels[i])
    assert not np.array_equal(Scenes("train", 20, seed=4).pixels, small.pixels)
    assert Scenes("train", 20, seed=4).captions != small.captions
    a, b = Objects("val", 40, seed=3), Objects("val", 90, seed=3)
    assert np.array_equal(a.pixels, b.pixels[:40]) and a.labels == b.labels[:40]


def test_another_process_draws_the_same_bytes():
    code = (
        "from readers import scenes; import hashlib; d = scenes.Scenes('test', 40, seed=5);"
        "print(hashlib.sha256(d.pixels.tobytes() + repr(d.captions).encode()).hexdigest())"
    )
    data = Scenes("test", 40, seed=5)
    here = hashlib.sha256(data.pixels.tobytes() + repr(data.captions).encode()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_chance_is_the_same_on_every_machine():
    """The first number of SplitMix64 from 1234567 (Rosetta Code), and captions once recorded."""
    h = np.uint64(1234567)
    assert int(scenes.mix(np.array([h]))[0]) == 6457827717110365317
    texts = repr(Scenes("train", 100, seed=1).captions)
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "e6c6bad836e117e3"


@pytest.mark.parametrize("form", scene_captions.FORMS)
def test_every_caption_is_true(form):
    data = Scenes("train", 300, captions=form)
    for i, texts in enumerate(data.captions):
        facts = picture_facts(data, i)
        assert len(texts) >= 5
        for text in texts:
            assert is_true(text, facts), (text, facts)


@pytest.mark.parametrize("form", scene_captions.FORMS)
def test_relevance_is_what_an_independent_reader_finds(form):
    data = Scenes("test", 40, captions=form)
    facts = [picture_facts(data, i) for i in range(len(data))]
    texts = [text for written in data.captions for text in written]
    read = np.array([[is_true(text, fact) for text in texts] for fact in facts])
    relevance = data.relevance()
    assert relevance.shape == (40, len(texts))
    assert np.array_equal(relevance, read)
    assert relevance.any(0).all() and (0.02 if form != "full" else 0.01) < relevance.mean() < 0.5


def test_relations_are_true_exactly_where_the_corners_say():
    data = Scenes("test", 500)
    for i, picture in enumerate(data.pictures):
        corner = {k: divmod(p, 2) for k, p in zip(data.facts["kind"][i], data.facts["place"][i]) if k >= 0}
        true = {claim for claim in scene_captions.truths(picture) if claim[0] in scene_captions.RELATIONS}
        expected = set()
        for a, (y, x) in corner.items():
            for b, (v, u) in corner.items():
                sides = {"left": x < u, "right": x > u, "above": y < v, "below": y > v}
                expected |= {(how, KINDS[a], KINDS[b]) for how, holds in sides.items() if holds}
        assert true == expected


def test_full_captions_identify_their_picture_and_aspects_do_not():
    unique = {
        form: (Scenes("test", 300, captions=form).relevance().sum(0) == 1).mean()
        for form in ("full", "aspects")
    }
    assert unique["full"] > 0.9 and unique["aspects"] < 0.2, unique


def test_captions_of_a_picture_differ_and_wording_varies():
    data = Scenes("train", 400, captions="mixed")
    assert np.mean([len(set(texts)) for texts in data.captions]) > 7
    distinct = {text for texts in data.captions for text in texts}
    assert len(distinct) > 0.3 * 400 * 8
    words = {word for text in distinct for word in text.split()}
    names = {*COLOURS, *KINDS, "sketch", "photo", "cartoon", "painting", "animal", "vehicle"}
    assert names <= words and len(words) < 100
    assert max(len(text.split()) for text in distinct) <= 28


def test_no_picture_is_in_two_splits():
    """With so few pictures possible, splits drawn without the rule share dozens."""
    seen = {}
    for n, split in enumerate(scenes.SPLITS):
        data = Objects(split, 4000, seed=n, kinds=("dog",))
        names = ("colour", "side", "top", "left")
        table = np.stack([data.facts[name][:, 0] for name in names], 1)
        table = np.column_stack([table, data.facts["background"]])
        seen[split] = {tuple(row) for row in table.tolist()}
    assert all(len(rows) > 500 for rows in seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]


@pytest.mark.parametrize("build", [Scenes, Objects])
@pytest.mark.parametrize("domain", DOMAINS)
def test_masks_are_where_the_pixels_are(build, domain):
    """Drawing the same picture without its things changes the pixels of the mask and few others."""
    data = build("train", 60, domains=(domain,))
    empty = {**data.facts, "kind": np.full_like(data.facts["kind"], -1)}
    bare = draw(empty, np.arange(60), 32).astype(int)
    change = np.abs(data.pixels.astype(int) - bare).max(-1)  # (60, 32, 32)
    masks = np.stack([data.masks(i).any(0) for i in range(60)])
    assert 0.05 < masks.mean() < 0.6
    assert (change[masks] > 12).mean() > 0.9
    outside = (change[~masks] > 90).mean()  # shadows and half-covered edges change less
    assert outside < 0.06, outside


def test_masks_of_a_scene_are_one_per_thing_and_apart():
    data = Scenes("val", 50)
    for i in range(50):
        masks = data.masks(i)
        assert len(masks) == (data.facts["kind"][i] >= 0).sum()
        assert masks.any((1, 2)).all() and masks.sum(0).max() == 1
        for mask, place in zip(masks, data.facts["place"][i]):
            y, x = (axis.mean() for axis in np.nonzero(mask))
            assert divmod(int(place), 2) == (y >= 16, x >= 16)


@pytest.mark.parametrize("kind_of_data", [Objects, Scenes])
@pytest.mark.parametrize("bias", [0.0, 0.5, 1.0])
def test_bias_is_the_share_of_backgrounds_that_are_at_home(kind_of_data, bias):
    def at_home(split):
        data = kind_of_data(split, 4800, bias=bias)
        home = np.array(scenes.HOME_OF)[data.facts["kind"][:, 0]]
        return (data.facts["background"] == home).mean()

    assert abs(at_home("train") - (bias + (1 - bias) / 6)) < 0.025
    assert abs(at_home("test") - 1 / 6) < 0.025
    siblings = np.array(scenes.HOME_OF).reshape(4, 4)
    assert all(len(set(row)) == 4 for row in siblings.tolist())


def test_labels_and_domains_are_balanced_and_named():
    data = Objects("train", 16 * 4 * 3)
    pairs = np.stack([data.labels, data.domains], 1)
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 64 and (counts == 3).all()
    assert data.classes == list(KINDS) and data.domain_names == list(DOMAINS)
    few = Objects("test", 90, kinds=scenes.NEW, domains=("sketch", "photo"))
    assert few.classes == list(scenes.NEW) and set(few.labels) == set(range(8))
    assert few.domain_names == ["sketch", "photo"] and set(few.domains) == {0, 1}
    assert [KINDS[k] for k in few.facts["kind"][:, 0]] == [few.classes[y] for y in few.labels]
    assert [DOMAINS[d] for d in few.facts["domain"]] == [few.domain_names[d] for d in few.domains]


def test_base_and_new_hold_two_kinds_of_every_group():
    assert sorted(scenes.BASE + scenes.NEW) == sorted(KINDS)
    for kinds in GROUPS.values():
        assert len(set(kinds) & set(scenes.BASE)) == 2
    assert not any(kind[0] in "aeiou" for kind in KINDS)  # "a photo of a {}"
    assert all(template.count("{}") == 1 for template in scenes.TEMPLATES)


def test_domains_render_the_same_facts_differently():
    data = Scenes("train", 40, domains=("photo",))
    drawn = {
        name: draw({**data.facts, "domain": np.full(40, n)}, np.arange(40), 32).astype(float)
        for n, name in enumerate(DOMAINS)
    }
    colours = {name: len(np.unique(x.reshape(-1, 3), axis=0)) for name, x in drawn.items()}
    assert colours["photo"] > 3 * colours["cartoon"]
    assert drawn["sketch"].mean() > 200 > drawn["photo"].mean()
    for a in DOMAINS:
        for b in DOMAINS:
            assert a == b or np.abs(drawn[a] - drawn[b]).mean() > 5, (a, b)


def test_a_larger_picture_is_the_same_picture():
    small, large = Scenes("train", 30), Scenes("train", 30, image_size=64)
    assert large.pixels.shape == (30, 64, 64, 3) and large.captions == small.captions
    flat = np.flatnonzero(small.facts["domain"] == 2)  # no noise
    reduced = large.pixels.reshape(30, 32, 2, 32, 2, 3).mean((2, 4))
    masks = np.stack([large.masks(i).any(0) for i in range(30)]).reshape(30, 32, 2, 32, 2).mean((2, 4))
    near = np.stack([small.masks(i).any(0) for i in range(30)])
    assert np.abs(masks - near).mean() < 0.05
    inside = np.abs(reduced - small.pixels)[flat][near[flat]]
    assert inside.mean() < 30, inside.mean()


def test_kinds_are_told_apart_by_shape():
    """No two kinds have nearly the same tones: intersection over union of silhouettes and tones."""
    drawn = [scenes.master(kind) for kind in KINDS]
    for a in range(16):
        for b in range(a):
            same = (drawn[a] == drawn[b]) & (drawn[a] > 0)
            assert same.sum() < 0.75 * ((drawn[a] > 0) | (drawn[b] > 0)).sum(), (KINDS[a], KINDS[b])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Scenes("dev"), "unknown split 'dev'"),
        (lambda: Scenes(domains=("oil",)), "unknown domain 'oil'"),
        (lambda: Objects(kinds=("unicorn",)), "unknown kind 'unicorn'"),
        (lambda: Objects(bias=1.5), "bias 1.5"),
        (lambda: Scenes(bias=-0.1), "bias -0.1"),
        (lambda: Scenes(image_size=31), "image_size 31"),
        (lambda: Scenes(size=0), "size 0"),
        (lambda: Scenes(kinds=KINDS[:3]), "3 kinds are too few"),
        (lambda: Scenes(captions="long"), "unknown captions 'long'"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_indices_out_of_range_fail():
    data = Scenes(size=4)
    assert np.array_equal(np.asarray(data.image(-1)), data.pixels[3])
    for read in (data.image, data.masks, data.name):
        with pytest.raises(IndexError):
            read(4)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert scenes.main(["--count", "9", "--domain", "sketch", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed and "words:" in printed
    data = Scenes(size=9, domains=("sketch",))
    first = np.asarray(Image.open(out).crop((0, 2, 8 * 32, 2 + 4 * 32)))[2::4, 2::4]  # 4 pixels for one
    assert np.array_equal(first[:, :32], data.pixels[0])
    assert np.array_equal(first[:, 32:, 0] == 255, data.masks(0).any(0))
    assert scenes.main(["--objects", "--count", "9", "--out", str(out)]) == 0
    assert "there is a dog" in capsys.readouterr().out
    assert scenes.main(["--split", "dev", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: unknown split")
    with pytest.raises(SystemExit):
        scenes.main(["--nonsense"])


def test_broad_is_half_scenes_and_half_single_things_with_true_names():
    broad = scenes.Broad("train", 40, seed=3, bias=1.0)
    several, single = broad.parts
    assert len(broad) == len(broad.captions) == len(broad.pixels) == 40
    assert (len(several), len(single)) == (20, 20)
    np.testing.assert_array_equal(np.asarray(broad.image(25)), single.pixels[5])
    np.testing.assert_array_equal(broad.pixels[7], np.asarray(several.image(7)))
    assert broad.name(25) == single.name(5) and broad.name(-1) == single.name(19)
    for i, label in enumerate(single.labels):
        assert all(single.classes[label] in text for text in broad.captions[20 + i])
    assert {d for part in broad.parts for d in part.domains} == {0, 1, 2, 3}
    with pytest.raises(IndexError):
        broad.image(40)


def test_a_run_trains_on_the_captions_that_it_names():
    """ "both" is eight captions about one aspect and five about several things; the default is the first."""
    train = {form: pair_data(configure(train_size=20, captions=form)[0])[0] for form in ("mixed", "both")}
    full = Scenes("train", 20, captions="full").captions
    for i in range(20):
        assert train["both"].captions[i][:8] == train["mixed"].captions[i]
        # the wording of a caption depends on its place, so only the number of the long ones is compared
        assert len(train["both"].captions[i]) == 8 + len(full[i]) == 13
    assert configure()[0].captions == "mixed"
