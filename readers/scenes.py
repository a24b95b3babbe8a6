"""The embedded data set: drawn scenes with captions, labels, domains and masks; no files.

What it is for: Llip's premise is that one picture has many true captions,
each about one aspect; AlignCLIP's tables need domains, held-out classes, backgrounds that
correlate with the class, and masks. Here all of that is known exactly.

    Scenes    pictures of 1 to 4 things with captions      pre-training, retrieval
    Objects   pictures of one thing with a label           zero-shot, fine-tuning, open world
    Broad     both of them with captions, in every domain  pre-training what is to be fine-tuned

Every fact is a pure function of (seed, split, index): a counter-based hash, no generator with
state, and integer arithmetic only, so captions are equal on every machine and pixels under every
Pillow that draws polygons alike, in any order of access. Which split a picture may be in is
decided by a hash of its facts, so that no two splits share a picture, whatever their seeds.

It is a toy and says so: results on it show mechanisms, never the numbers of the papers.
"""

import argparse
import functools
import sys
import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SPLITS = {"train": 0, "val": 1, "test": 2}
DOMAINS = ("photo", "sketch", "cartoon", "painting")
PHOTO, SKETCH, CARTOON, PAINTING = range(4)
BACKGROUNDS = ("grass", "water", "sand", "snow", "bricks", "night")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
PATTERNS = ("plain", "striped", "spotted")
PLACES = ("top left", "top right", "bottom left", "bottom right")
ASPECTS = ("object", "things", "place", "background", "count", "size", "pattern", "relation", "group")
GROUPS = {
    "land animal": ("dog", "wolf", "cat", "rabbit"),
    "sea animal": ("fish", "shark", "whale", "crab"),
    "vehicle": ("car", "truck", "bus", "tractor"),
    "fruit": ("pear", "cherry", "lemon", "banana"),
}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)
GROUP_OF = tuple(g for g, kinds in enumerate(GROUPS.values()) for _ in kinds)
# Siblings have different homes, so the background is a short cut exactly where shapes are alike.
HOME = {
    "grass": ("dog", "tractor", "pear"),
    "water": ("fish", "banana"),
    "sand": ("rabbit", "crab", "truck"),
    "snow": ("wolf", "whale"),
    "bricks": ("cat", "car", "lemon"),
    "night": ("shark", "bus", "cherry"),
}
HOME_OF = tuple(next(b for b, bg in enumerate(BACKGROUNDS) if k in HOME[bg]) for k in KINDS)
OBJECT_FACTS = ("kind", "colour", "pattern", "side", "top", "left")  # (N, things) each
# Two kinds of every group are held out when classes are split into base and new.
BASE = tuple(kind for n, kind in enumerate(KINDS) if n % 4 < 2)
NEW = tuple(kind for n, kind in enumerate(KINDS) if n % 4 >= 2)
TEMPLATES = (
    "a {}",
    "a picture of a {}",
    "there is a {}",
    "a photo of a {}",
    "a sketch of a {}",
    "a cartoon of a {}",
    "a painting of a {}",
)


def mix(*parts) -> np.ndarray:
    """Hash integers to 64 bits; arrays broadcast.

    SplitMix64's finaliser (Steele et al. 2014) applied once per part. NumPy promises the stream
    of a bit generator, not of its distributions, and a generator has a state; this has neither.
    """
    h = np.zeros(1, np.uint64)
    for part in parts:
        h = (h ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def pick(n, *parts) -> np.ndarray:
    """Choose from range(n) by hash, uniformly up to n / 2^31; n may be an array."""
    return ((mix(*parts) >> np.uint64(33)) % np.asarray(n).astype(np.uint64)).astype(np.int64)


MAIN, SHADE, LIGHT, DARK, WHITE, LEAF, INK, LINE = range(8)  # tones; INK pattern, LINE outline
TONES = {"m": MAIN, "s": SHADE, "l": LIGHT, "d": DARK, "w": WHITE, "g": LEAF}
# "TONE o x0 y0 x1 y1" ellipse, "TONE r x0 y0 x1 y1" rectangle, "TONE p x y x y ..." polygon
LEGS = "s r 5 14 7 22; m r 3 14 5 22; s r 13 14 15 22; m r 15 14 17 22"
WHEELS = "d o 3 14 10 21; l o 5 16 8 19; d o 14 14 21 21; l o 16 16 19 19"
STEM = "d p 11 7 12 1 14 1 13 7; g o 13 1 21 6"
SHAPES = {
    "dog": f"{LEGS}; m p 2 12 0 4 2 3 6 11; m o 2 9 18 18; m o 12 2 21 12; l o 17 6 24 12;"
    "d o 22 6 24 9; s o 11 2 16 13; d o 17 4 19 7",
    "wolf": f"{LEGS}; s p 5 10 0 13 0 22 3 19 7 14; m o 2 9 18 18; w o 11 11 18 18;"
    "m p 12 6 12 0 15 3 17 0 19 4 24 10 18 13 12 13; w p 18 9 24 10 18 13; d r 22 8 24 11;"
    "d o 17 5 19 7",
    "cat": f"{LEGS}; m p 3 14 0 11 0 2 4 0 5 2 2 4 3 10 6 12; m o 2 10 18 18;"
    "m p 12 8 12 1 16 4 20 4 24 1 24 8; m o 12 3 24 14; w o 14 6 17 9; w o 19 6 22 9;"
    "d r 15 6 16 9; d r 20 6 21 9; d p 16 10 20 10 18 12",
    "rabbit": "w o 0 14 6 20; m o 2 10 18 22; s o 3 13 11 22; m r 12 19 20 22; m o 12 0 16 11;"
    "m o 17 0 21 11; l o 13 2 15 9; l o 18 2 20 9; m o 11 7 22 16; d o 17 9 19 12; w o 20 12 23 15",
    "fish": "s p 8 12 0 4 2 12 0 20; s p 10 6 13 2 18 6; s p 11 18 13 22 17 18; m o 4 5 24 19;"
    "w o 17 8 22 13; d o 19 9 21 12; s p 11 9 14 12 11 15",
    "shark": "m p 0 3 5 10 10 8 12 1 16 8 22 10 24 13 20 16 10 17 5 14 0 19 2 11;"
    "w p 8 16 13 14 24 13 20 16 10 17; s p 11 16 8 22 15 16; d p 17 13 24 12 23 14;"
    "d o 19 9 21 11",
    "whale": "m p 0 2 4 4 8 2 6 8 9 12 5 16 2 9; m o 4 7 24 22; w p 6 17 24 17 20 22 11 22;"
    "d o 19 12 21 15; w p 15 7 16 3 13 2 14 0 17 2 20 0 21 2 18 3 17 7; s p 11 16 13 21 16 17",
    "crab": "s p 4 16 1 22 3 22 7 17; s p 8 17 6 23 8 23 10 18; s p 16 17 18 23 16 23 14 18;"
    "s p 20 16 23 22 21 22 17 17; m p 6 13 1 9 3 8 8 11; m p 18 13 23 9 21 8 16 11;"
    "m p 0 10 0 3 3 6 5 2 7 6 5 10; m p 24 10 24 3 21 6 19 2 17 6 19 10; m o 4 9 20 20;"
    "w o 7 6 11 11; w o 13 6 17 11; d o 8 7 10 10; d o 14 7 16 10",
    "car": "m p 5 11 8 5 16 5 20 11; w p 7 10 9 6 12 6 12 10; w p 13 10 13 6 15 6 18 10;"
    f"m p 0 17 0 12 3 10 20 10 24 13 24 17; {WHEELS}",
    "truck": f"m r 0 2 14 17; s p 15 17 15 6 20 6 24 11 24 17; w p 17 11 17 8 20 8 22 11; {WHEELS}",
    "bus": "m r 0 3 24 17; w r 2 5 6 10; w r 8 5 12 10; w r 14 5 18 10; w r 20 5 24 10;"
    f"s r 0 12 24 14; {WHEELS}",
    "tractor": "s p 2 2 13 2 13 4 2 4; m r 3 3 5 12; m r 11 3 13 12; w r 5 4 11 10;"
    "m r 2 9 23 17; d r 18 3 20 9; d o 0 9 13 22; l o 4 13 9 18; d o 16 14 24 22; l o 19 17 21 19",
    "pear": f"{STEM}; m o 8 4 17 15; m o 4 10 21 24; l o 7 13 10 18",
    "cherry": "d p 12 2 14 2 8 14 6 14; d p 12 2 14 2 19 13 17 13; g o 13 0 23 6; m o 1 11 12 23;"
    "m o 13 10 24 22; l o 3 13 6 17; l o 15 12 18 16",
    "lemon": "m o 3 6 21 21; m p 0 14 5 9 5 18; m p 24 13 19 9 19 18; l o 7 9 12 13; g o 10 2 19 7",
    "banana": "m p 3 3 6 2 8 9 13 14 23 15 24 18 17 22 9 20 4 14; s p 4 12 9 18 17 20 24 17 17 22"
    " 9 20 4 14; d p 2 2 3 0 6 0 6 3 3 4; d p 22 15 24 15 24 18",
}
# Sizes and positions are in 64ths of a picture, in steps of 8: a patch of 4 pixels at 32. All things
# face right and most are large: a second size or direction is a second set of patches to learn.
STEP = 8
MASTER = 240  # pixels a side that a kind is drawn at before it is reduced


@functools.lru_cache(None)
def master(kind: str) -> np.ndarray:
    """Draw a kind once, large: (240, 240) uint8, 0 nothing, else tone + 1."""
    canvas = Image.new("L", (MASTER, MASTER))
    draw = ImageDraw.Draw(canvas)
    for shape in SHAPES[kind].split(";"):
        tone, form, *numbers = shape.split()
        points = [int(v) * MASTER // 24 for v in numbers]
        call = {"o": draw.ellipse, "r": draw.rectangle, "p": draw.polygon}[form]
        call(points, fill=TONES[tone] + 1)
    return np.asarray(canvas)


def outline(tones: np.ndarray, radius: int) -> np.ndarray:
    """Mark where a drawing ends within `radius` pixels, or its tone changes within half of it."""
    padded = np.pad(tones, radius)
    edge = np.zeros(tones.shape, bool)
    for dy in (-2, -1, 0, 1, 2):
        for dx in (-2, -1, 0, 1, 2):
            for reach, of in ((radius, padded > 0), (radius // 2, padded)):
                y, x = radius + dy * reach // 2, radius + dx * reach // 2
                edge |= of[y : y + MASTER, x : x + MASTER] != of[radius:-radius, radius:-radius]
    return edge & (tones > 0)


@functools.lru_cache(None)
def sprites(side: int, image_size: int) -> np.ndarray:
    """Reduce every kind to `side` pixels: (2 outlined, 16 kinds, side, side, 8 tones).

    Values are coverages in [0, 255], uint8. Reducing once and pasting often is what makes drawing
    fast, and it antialiases for nothing.
    """
    bank = np.zeros((2, len(KINDS), side, side, 8), np.uint8)
    radius = max(2, MASTER * image_size // (48 * side))
    for k, kind in enumerate(KINDS):
        plain = master(kind)
        lined = np.where(outline(plain, radius), LINE + 1, plain)
        for outlined, tones in enumerate((plain, lined)):
            for tone in range(8):
                layer = Image.fromarray(((tones == tone + 1) * 255).astype(np.uint8))
                bank[outlined, k, :, :, tone] = layer.resize((side, side), Image.Resampling.BOX)
    return bank


@functools.lru_cache(None)
def ink(side: int, image_size: int) -> np.ndarray:
    """Where each pattern puts ink: (3 patterns, side, side) bool; period an eighth of a picture."""
    y, x = (2 * np.mgrid[:side, :side] + 1) * 256 // image_size % 64  # 64ths of a period
    stripes = x >= 32
    spots = (x - 32) ** 2 + (y - 32) ** 2 < 17**2
    return np.stack([np.zeros_like(stripes), stripes, spots])


RGB = np.array([[214, 40, 40], [245, 135, 20], [250, 215, 40], [40, 150, 60], [45, 90, 215], [145, 50, 175]])
PAPER = np.array([246, 242, 230])
# Ground and marks of each background. Paler than the things: a background that shouts is all that a
# short training learns.
GROUND = np.array(
    [[150, 190, 120], [150, 200, 226], [230, 214, 172], [238, 243, 248], [204, 156, 138], [52, 56, 92]]
)
MARKS = np.array(
    [[122, 166, 94], [190, 222, 238], [206, 184, 138], [214, 224, 236], [224, 206, 194], [210, 206, 166]]
)


def palette(colour: np.ndarray, domain: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Colours of the eight tones of each object: (n, 8, 3) int64 in [0, 255]."""
    jitter = pick(31, key[:, None], 50, np.arange(3)) - 15
    rgb = np.clip(RGB[colour] + jitter * np.isin(domain, (PHOTO, PAINTING))[:, None], 0, 255)
    dark, white, leaf, line = (
        np.broadcast_to(c, rgb.shape) for c in ([34, 32, 40], [248, 248, 244], [84, 150, 70], [30])
    )
    tones = [rgb, rgb * 5 // 8, (rgb + 255) // 2, dark, white, leaf, (rgb + 5 * 250) // 6, line]
    tones = np.stack(tones, 1)  # (n, 8, 3)
    pencil = (tones + 5 * PAPER) // 6
    pencil[:, [INK, LINE]] = rgb[:, None] * 3 // 4
    pencil[:, DARK] = 90
    return np.where((domain == SKETCH)[:, None, None], pencil, tones)


@functools.lru_cache(None)
def grounds(image_size: int) -> np.ndarray:
    """Every background in every domain, large enough to cut from: (4, 6, 3S, 3S, 3) uint8."""
    y, x = np.mgrid[: 3 * image_size, : 3 * image_size] * 32 // image_size

    def chance(salt, percent, dy=1, dx=1):
        return pick(100, salt, y // dy, x // dx) < percent

    marked = np.stack(
        [
            chance(1, 30, dy=4),  # blades
            (y + np.array([0, 1, 1, 0])[x // 3 % 4]) % 6 < 1,  # waves
            chance(3, 16),  # grains
            chance(4, 14, dy=2, dx=2),  # flakes
            (y % 5 == 0) | ((x + 4 * (y // 5 % 2)) % 8 == 0),  # mortar
            chance(6, 3),  # stars
        ]
    )[..., None]  # (6, 3S, 3S, 1)
    ground, marks = GROUND[:, None, None], MARKS[:, None, None]
    photo = np.where(marked, marks, ground)
    cartoon = np.where(marked, (marks + ground) // 2, ground)
    pale, pencil = (ground + 15 * PAPER) // 16, (3 * (marks + ground) // 8 + PAPER) // 2
    sketch = np.where(marked, pencil, pale)
    blotch = (pick(25, 7, y // 2, x // 2) - 12)[..., None]
    drawn = np.stack([photo + blotch // 2, sketch, cartoon, photo + blotch])  # as DOMAINS
    return np.clip(drawn, 0, 255).astype(np.uint8)


def draw(facts: dict, rows: np.ndarray, size: int) -> np.ndarray:
    """Draw the pictures with the given rows of facts: (N, S, S, 3) uint8."""
    key, domain, ground = (facts[name][rows] for name in ("key", "domain", "background"))
    drop = max(1, size // 32)  # how far a shadow falls, pixels
    wide = size + drop
    canvas = np.empty((len(rows), wide, wide, 3), np.int32)
    tiles = grounds(size)
    for n, (y, x) in enumerate(pick(2 * size - drop, key[:, None], 40, np.arange(2))):
        canvas[n] = tiles[domain[n], ground[n], y : y + wide, x : x + wide]

    picture, slot = np.nonzero(facts["kind"][rows] >= 0)
    of = {name: facts[name][rows][picture, slot] for name in OBJECT_FACTS}
    side, top, left = (of[name] * size // 64 for name in ("side", "top", "left"))
    tones = palette(of["colour"], domain[picture], mix(key[picture], slot)).astype(np.float32)
    for s in np.unique(side).tolist():
        at = np.flatnonzero(side == s)
        n, style = picture[at][:, None, None], domain[picture[at]]
        outlined = np.isin(style, (SKETCH, CARTOON)).astype(int)
        cover = sprites(s, size)[outlined, of["kind"][at]].astype(np.float32)
        cover[..., INK] = cover[..., MAIN] * ink(s, size)[of["pattern"][at]]
        cover[..., MAIN] -= cover[..., INK]  # (n, s, s, 8)
        # Sums of products of bytes stay below 2^24: float32 is exact in any order of summation.
        paint = (cover.reshape(len(at), s * s, 8) @ tones[at]).astype(np.int32)
        paint = paint.reshape(len(at), s, s, 3)
        alpha = cover.sum(-1).astype(np.int32)[..., None]  # (n, s, s, 1)
        y, x = np.mgrid[:s, :s]
        solid = (1 - outlined)[:, None, None, None]  # lit from the upper left, with a shadow
        light = 256 + solid * (34 - 34 * (x + y) // s)[..., None]
        y, x = y + top[at][:, None, None], x + left[at][:, None, None]
        shade = canvas[n, y + drop, x + drop] * (255 - solid * alpha * 2 // 5) // 255
        canvas[n, y + drop, x + drop] = shade
        canvas[n, y, x] = (canvas[n, y, x] * (255 - alpha) + paint * light // 256) // 255
    canvas = canvas[:, :size, :size]
    finish(canvas, domain, key)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def finish(canvas: np.ndarray, domain: np.ndarray, key: np.ndarray) -> None:
    """Give photos light and grain and paintings strokes, in place."""
    size = canvas.shape[1]
    y, x = np.mgrid[:size, :size]
    at = np.flatnonzero(domain == PHOTO)
    grain = mix(key[at][:, None], np.arange(size * size // 4)).view(np.uint16) % 25  # 4 of a hash
    grain = grain.reshape(len(at), size, size).astype(np.int32) - 12
    slope = (pick(31, key[at][:, None], 41, np.arange(2)) - 15)[..., None, None]
    light = (slope[:, 0] * (2 * y - size) + slope[:, 1] * (2 * x - size)) // size
    canvas[at] += (grain + light.astype(np.int32))[..., None]

    at = np.flatnonzero(domain == PAINTING)
    stroke = (y * 16 // size) * 16 + x * 16 // size  # every sixteenth of a picture moves as one
    n, reach = at[:, None, None], max(1, size // 32)
    dy, dx = (reach * (pick(3, key[n], salt, stroke) - 1) for salt in (42, 43))
    moved = canvas[n, np.clip(y + dy, 0, size - 1), np.clip(x + dx, 0, size - 1)]
    tint = pick(41, key[at][:, None], 44, np.arange(3)) - 20
    canvas[at] = (canvas[at] + moved) // 2 + tint[:, None, None].astype(np.int32)


def decide(make, split: str, seed: int, index: np.ndarray) -> dict:
    """Facts of the pictures `index` of a split, drawn again until their hash belongs to the split.

    The hash covers what is in a picture but neither how it is rendered nor the seed: half of all
    possible pictures are for training, a quarter each for validation and test, for every seed.
    """
    stream = mix(seed, SPLITS[split], index)
    facts = make(mix(stream, 0), index)
    todo, attempt = np.arange(len(index)), 0
    while True:
        hashed = mix(facts["background"][todo])
        for name in OBJECT_FACTS:
            for column in facts[name][todo].T:
                hashed = mix(hashed, column)
        owner = np.array([0, 0, 1, 2])[(hashed % np.uint64(4)).astype(int)]
        todo = todo[owner != SPLITS[split]]
        if not len(todo):
            return facts
        attempt += 1
        for name, value in make(mix(stream[todo], attempt), index[todo]).items():
            facts[name][todo] = value


def shuffled(n: int, count: int, *parts) -> np.ndarray:
    """The first `count` of a random order of range(n), one order per row of parts: (N, count)."""
    keys = mix(parts[0][:, None], *parts[1:], np.arange(n))
    return np.argsort(keys, axis=1, kind="stable")[:, :count]


# What each caption of a picture is about, one of the words by chance. Most captions are about one thing
# or one place: many true captions per picture, each about something else, is Llip's premise.
FORMS = {
    "single": ASPECTS,
    "mixed": ("object",) * 4 + ("place", "place", "background", "count group"),
    "aspects": ("object", "place", "background", "count", "group"),
    "full": ("full",) * 5,
}
QUERIES = tuple(aspect for aspect in ASPECTS if aspect not in ("relation", "things"))
WHERE = ("at the {}", "in the {} corner", "on the {}", "in the {}")
GROUND_WORDS = ("on grass", "in water", "on sand", "in snow", "on bricks", "at night")
RELATIONS = (
    ("to the left of", "left of"),
    ("to the right of", "right of"),
    ("above", "over"),
    ("below", "under"),
)
SIZE_WORDS = (("small", "little"), ("large", "big"))
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
FRAMES = ("{}", "there is {}", "a picture of {}", "a {domain} of {}")


class Thing(NamedTuple):
    """The claim that a thing is there; indices, None where nothing is said."""

    noun: int  # a kind, or 16 + a group
    colour: int | None = None
    size: int | None = None
    pattern: int | None = None
    place: int | None = None


class Relation(NamedTuple):
    """The claim that kind a is left of, right of, above or below (0 to 3) kind b."""

    a: int
    how: int
    b: int


class Fact(NamedTuple):
    """A claim about the picture as a whole: its background, its domain or its count of things."""

    about: str
    value: int


def named(thing: Thing, dice: list[int]) -> str:
    """A thing in words: "a large striped red dog at the top left"."""
    words = [] if thing.size is None else [SIZE_WORDS[thing.size][dice[0] % 2]]
    words += [] if thing.pattern is None else [PATTERNS[thing.pattern]]
    words += [] if thing.colour is None else [COLOURS[thing.colour]]
    words += [(*KINDS, *GROUPS)[thing.noun]]
    text = ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
    if thing.place is None:
        return text
    return f"{text} {WHERE[dice[1] % 4].format(PLACES[thing.place])}"


def phrase(claim: tuple, dice: list[int]) -> str:
    """A claim in words, one of its wordings by the dice, without a frame."""
    if isinstance(claim, Thing):
        return named(claim, dice)
    if isinstance(claim, Relation):
        how = RELATIONS[claim.how][dice[2] % 2]
        return f"{named(Thing(claim.a), dice)} {how} {named(Thing(claim.b), dice)}"
    if claim.about == "count":
        plural = "s" * (claim.value > 1)
        return f"{NUMBERS[claim.value]} {('thing', 'object')[dice[0] % 2]}{plural}"
    where = GROUND_WORDS[claim.value]
    ground = f"a background of {BACKGROUNDS[claim.value]}"
    return (f"a scene {where}", ground, f"things {where}")[dice[0] % 3]


def write(aspect: str, nth: int, row: dict, order: list[int], dice: list[int], varied: bool) -> tuple:
    """The nth caption of a picture, about an aspect: (text, the claims it makes).

    Args: row: the facts of the picture;  order: its slots shuffled;  dice: 12 chance integers
    """
    aspect = aspect.split()[dice[3] % len(aspect.split())]
    here = [slot for slot in order if row["kind"][slot] >= 0]
    a, b = here[nth % len(here)], here[(nth + 1) % len(here)]
    if aspect == "relation" and a == b:
        aspect = "object"

    def thing(slot, *told):
        kind = row["kind"][slot]
        noun = len(KINDS) + GROUP_OF[kind] if "group" in told else kind
        return Thing(noun, **{name: row[name][slot] for name in told if name != "group"})

    more = ("size", "pattern", "place", "colour") if varied else ("place", "colour") * 2
    if aspect == "relation":
        claims = [relate(row, a, b, dice[4])]
    elif aspect == "count":
        claims = [Fact("count", len(here))]
    elif aspect == "background":
        claims = [Fact("background", row["background"])]
    elif aspect == "things":
        claims = [thing(slot) for slot in here]
    elif aspect == "full" and a != b:
        claims = [thing(a, "colour", more[dice[5] % 4]), thing(b, "colour", more[dice[6] % 4])]
    elif aspect == "full":
        claims = [thing(a, "colour", more[dice[5] % 3], more[(dice[5] + 1) % 3])]
    else:
        claims = [thing(a, "colour" if aspect == "object" else aspect)]
    text = phrase(claims[0], dice)
    if aspect == "things" and len(claims) > 1:
        *first, last = (phrase(claim, dice) for claim in claims)
        text = f"{', '.join(first)} and {last}"
    if aspect == "full":
        joint = "and"
        if a != b and dice[7] % 3 == 0 and claims[0].place is None:
            claims.append(relate(row, a, b, dice[4]))
            joint = RELATIONS[claims[-1].how][dice[2] % 2]
        if a != b:
            text = f"{text} {joint} {phrase(claims[1], dice[1:])}"
        if a == b or dice[8] % 2:
            claims.append(Fact("background", row["background"]))
            text = f"{text} {GROUND_WORDS[row['background']]}"
    frame = FRAMES[dice[9] % len(FRAMES)]
    if text.startswith(("things", "two", "three", "four")):
        frame = frame.replace("is", "are")
    if "domain" in frame:
        claims.append(Fact("domain", row["domain"]))
    return frame.format(text, domain=DOMAINS[row["domain"]]), tuple(claims)


def relate(row: dict, a: int, b: int, die: int) -> tuple:
    """A true relation between the things in slots a and b, beside or above by the die."""
    (y, x), (v, u) = divmod(row["place"][a], 2), divmod(row["place"][b], 2)
    beside = x != u and (y == v or die % 2)
    how = (0 if x < u else 1) if beside else (2 if y < v else 3)
    return Relation(row["kind"][a], how, row["kind"][b])


class Drawn:
    """What both data sets share: pictures, masks and domains out of a table of facts.

    Args:   split "train", "val" or "test";  size pictures;  seed;  image_size pixels, even, >= 16
            domains: names out of DOMAINS, in equal shares
    Raises: ValueError for an unknown split, domain or kind, or an image_size that cannot be drawn.
    """

    def __init__(self, split, size, seed, image_size, domains, kinds):
        for what, given, known in (
            ("split", [split], SPLITS),
            ("domain", domains, DOMAINS),
            ("kind", kinds, KINDS),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
        if image_size < 16 or image_size % 2:
            raise ValueError(f"image_size {image_size} must be even and at least 16")
        if size < 1:
            raise ValueError(f"size {size} must be at least 1")
        self.split, self.seed, self.image_size = split, seed, image_size
        self.domain_names = list(domains)
        self.kinds = np.array([KINDS.index(kind) for kind in kinds])
        self._domain = np.array([DOMAINS.index(name) for name in domains])
        self.facts = decide(self._make, split, seed, np.arange(size))

    def __len__(self) -> int:
        return len(self.facts["key"])

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """All pictures, (N, S, S, 3) uint8, drawn at first use and kept."""
        out = np.empty((len(self), self.image_size, self.image_size, 3), np.uint8)
        for start in range(0, len(self), 128):
            rows = np.arange(start, min(start + 128, len(self)))
            out[rows] = draw(self.facts, rows, self.image_size)
        return out

    def image(self, i: int) -> Image.Image:
        """Picture i, RGB."""
        row = range(len(self))[i]
        if "pixels" in self.__dict__:
            return Image.fromarray(self.pixels[row])
        return Image.fromarray(draw(self.facts, np.array([row]), self.image_size)[0])

    def name(self, i: int) -> str:
        return f"{type(self).__name__.lower()}-{self.split}-{self.seed}-{range(len(self))[i]}"

    @property
    def domains(self) -> list[int]:
        """Domain of each picture: an index into domain_names."""
        rank = {domain: n for n, domain in enumerate(self._domain.tolist())}
        return [rank[domain] for domain in self.facts["domain"].tolist()]

    def masks(self, i: int) -> np.ndarray:
        """Which pixels each thing of picture i covers by half or more: (things, S, S) bool."""
        of = {name: self.facts[name][i] for name in OBJECT_FACTS}
        count = int((of["kind"] >= 0).sum())
        out = np.zeros((count, self.image_size, self.image_size), bool)
        for n in range(count):
            s, top, left = (int(of[f][n]) * self.image_size // 64 for f in ("side", "top", "left"))
            cover = sprites(s, self.image_size)[0, of["kind"][n]].sum(-1, dtype=int)
            out[n, top : top + s, left : left + s] = cover >= 128
        return out

    def mask(self, i: int) -> np.ndarray:
        """The foreground of picture i: (S, S) bool."""
        return self.masks(i).any(0)


def unbiased_test(bias: float, split: str) -> float:
    """The bias of a split: none to test with.   Raises: ValueError outside [0, 1]."""
    if not 0 <= bias <= 1:
        raise ValueError(f"bias {bias} must be in [0, 1]")
    return bias if split != "test" else 0.0


def home_or_any(kind, bias: float, at_home: tuple, elsewhere: tuple) -> np.ndarray:
    """Backgrounds (N,) for things of these kinds (N,): at home in a share `bias`, else any of them.

    Args: at_home, elsewhere: keys of the two draws
    """
    home = pick(10**6, *at_home) < round(bias * 10**6)
    return np.where(home, np.array(HOME_OF)[kind], pick(len(BACKGROUNDS), *elsewhere))


class Objects(Drawn):
    """Labelled pictures of one thing: zero-shot, fine-tuning, open world.

    Labels are balanced and so are domains within labels. Two kinds of shift can be had:
    domains (train on some, test on others) and classes (kinds=BASE, kinds=NEW).
    Args: bias in [0, 1]: how often the background is the class's own (HOME) instead of a uniform
          choice, in train and val. The test split is drawn without bias, whatever is asked for.
          varied: striped and spotted things too
    """

    def __init__(
        self,
        split="train",
        size=2048,
        seed=0,
        image_size=32,
        domains=DOMAINS,
        kinds=KINDS,
        bias=0.0,
        varied=False,
    ):
        self.bias, self.varied = unbiased_test(bias, split), varied
        super().__init__(split, size, seed, image_size, domains, kinds)
        self.classes = list(kinds)
        rank = {kind: label for label, kind in enumerate(self.kinds.tolist())}
        self.labels = [rank[kind] for kind in self.facts["kind"][:, 0].tolist()]

    def _make(self, key, index):
        kind = self.kinds[index % len(self.kinds)]
        domain = self._domain[index // len(self.kinds) % len(self._domain)]
        background = home_or_any(kind, self.bias, (key, 10), (key, 11))
        side = 24 + STEP * pick(3, key, 14)
        facts = {
            "kind": kind,
            "colour": pick(len(COLOURS), key, 12),
            "pattern": np.maximum(pick(4, key, 13) - 1, 0) * self.varied,
            "side": side,
            "top": STEP * pick((64 - side) // STEP + 1, key, 16),
            "left": STEP * pick((64 - side) // STEP + 1, key, 17),
        }
        facts = {name: value[:, None] for name, value in facts.items()}  # (N, 1)
        return {**facts, "key": key, "domain": domain, "background": background}

    @functools.cached_property
    def captions(self) -> list[list[str]]:
        """What the thing is, in six captions a picture, all of which name its kind."""
        columns = (self.facts[name].tolist() for name in ("kind", "colour", "background", "domain"))
        texts = []
        for (kind,), (colour,), ground, domain in zip(*columns):
            thing, coloured = named(Thing(kind), [0]), named(Thing(kind, colour), [0])
            frames = [frame.format(thing, domain=DOMAINS[domain]) for frame in FRAMES]
            texts.append([*frames, coloured, f"{thing} {GROUND_WORDS[ground]}"])
        return texts


class Scenes(Drawn):
    """Pictures of one to four things, each in a corner of its own, with captions.

    All things of a picture are of different kinds, so "the dog" is never ambiguous.
    Args: captions: "mixed" (8, each about one aspect), "aspects" (one for each aspect of
          those), "single" (one for each of ASPECTS), "full" (5 about several things, nearly
          always true of one picture only); by default "mixed" to train on, "full" to test with.
          varied: sizes and patterns differ and are told of; harder, and no matter for the method
          bias in [0, 1]: how often the background is the home of the picture's first thing (HOME)
          instead of a uniform choice; never in the test split
    """

    def __init__(
        self,
        split="train",
        size=10000,
        seed=0,
        image_size=32,
        domains=DOMAINS,
        kinds=KINDS,
        captions=None,
        varied=False,
        bias=0.0,
    ):
        self.bias, self.varied = unbiased_test(bias, split), varied
        self.form = captions or ("mixed" if split == "train" else "full")
        if self.form not in FORMS:
            raise ValueError(f"unknown captions {captions!r}: choose from {', '.join(FORMS)}")
        if len(kinds) < 4:
            raise ValueError(f"{len(kinds)} kinds are too few: a scene holds up to 4 different ones")
        super().__init__(split, size, seed, image_size, domains, kinds)

    def _make(self, key, index):
        slots = np.arange(4)
        place = shuffled(4, 4, key, 20)
        absent = slots >= 1 + pick(4, key, 21)[:, None]
        keys = mix(key[:, None], 22, slots)
        large = np.minimum(pick(4, keys, 0), 1) if self.varied else 1  # three in four
        large = np.broadcast_to(large, keys.shape)
        side = np.where(large, 32, 24)
        facts = {
            "kind": self.kinds[shuffled(len(self.kinds), 4, key, 23)],
            "colour": pick(len(COLOURS), keys, 1),
            "pattern": np.maximum(pick(4, keys, 2) - 1, 0) * self.varied,
            "size": large,
            "place": place,
            "side": side,
            "top": place // 2 * 32 + STEP * pick((32 - side) // STEP + 1, keys, 4),
            "left": place % 2 * 32 + STEP * pick((32 - side) // STEP + 1, keys, 5),
        }
        facts = {name: np.where(absent, -1, value) for name, value in facts.items()}  # (N, 4)
        domain = self._domain[pick(len(self._domain), key, 24)]
        background = home_or_any(facts["kind"][:, 0], self.bias, (key, 26), (key, 25))
        return {**facts, "key": key, "domain": domain, "background": background}

    @functools.cached_property
    def claims(self) -> list[list[tuple]]:
        """What each caption says, as a tuple of claims that `holds` can check."""
        return [[claims for _, claims in written] for written in self._written]

    @functools.cached_property
    def captions(self) -> list[list[str]]:
        return [[text for text, _ in written] for written in self._written]

    @functools.cached_property
    def _written(self):
        known = {*ASPECTS, "full"} - (set() if self.varied else {"size", "pattern"})
        aspects = [a for a in FORMS[self.form] if known.issuperset(a.split())]
        chance = mix(self.facts["key"][:, None, None], 30, np.arange(len(aspects))[:, None], np.arange(12))
        chance = (chance >> np.uint64(33)).tolist()  # (N, captions, 12) of Python integers
        columns = {name: value.tolist() for name, value in self.facts.items()}
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        order = shuffled(4, 4, self.facts["key"], 31).tolist()
        return [
            [
                write(aspect, n, row, things, dice, self.varied)
                for n, (aspect, dice) in enumerate(zip(aspects, rolls))
            ]
            for row, things, rolls in zip(rows, order, chance)
        ]

    def holds(self, claim: tuple) -> np.ndarray:
        """Of which pictures a claim is true: (N,) bool."""
        kind = self.facts["kind"]
        if isinstance(claim, Fact):
            known = (kind >= 0).sum(1) if claim.about == "count" else self.facts[claim.about]
            return known == claim.value
        if isinstance(claim, Relation):
            (y, x), (v, u) = self._corner(claim.a), self._corner(claim.b)
            both = (y >= 0) & (v >= 0)
            return both & (x < u, x > u, y < v, y > v)[claim.how]
        match = kind == claim.noun
        if claim.noun >= len(KINDS):
            match = (np.array(GROUP_OF)[kind] == claim.noun - len(KINDS)) & (kind >= 0)
        for name, value in zip(Thing._fields[1:], claim[1:]):
            if value is not None:
                match = match & (self.facts[name] == value)
        return match.any(1)

    def _corner(self, kind: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the corner that a kind is in, -1 where it is absent."""
        place = np.where(self.facts["kind"] == kind, self.facts["place"], -1).max(1)
        return place // 2, np.where(place < 0, -1, place % 2)

    def relevance(self) -> np.ndarray:
        """Which captions are true of which pictures: (N pictures, all captions in order) bool."""
        flat = [claims for written in self.claims for claims in written]
        known = {claim: self.holds(claim) for claim in {c for claims in flat for c in claims}}
        return np.stack([np.all([known[c] for c in claims], 0) for claims in flat], 1)

    def queries(self, aspect: str) -> tuple[list[str], np.ndarray]:
        """Every statement about one aspect and of which pictures it is true: T texts, (N, T) bool.

        For ranking all of them for a picture, as in "which of the 96 coloured kinds are in it".
        """
        if aspect not in QUERIES:
            raise ValueError(f"unknown aspect {aspect!r}: choose from {', '.join(QUERIES)}")
        values = {"object": COLOURS, "size": SIZES, "pattern": PATTERNS, "place": PLACES}
        if aspect in values:
            name = "colour" if aspect == "object" else aspect
            count = range(len(values[aspect]))
            claims = [Thing(k, **{name: v}) for k in self.kinds.tolist() for v in count]
        elif aspect == "group":
            claims = [Thing(len(KINDS) + g) for g in range(len(GROUPS))]
        else:
            claims = [Fact(aspect, v) for v in (NUMBERS if aspect == "count" else range(len(BACKGROUNDS)))]
        texts = [phrase(claim, [0] * 12) for claim in claims]
        return texts, np.stack([self.holds(claim) for claim in claims], 1)


class Broad:
    """Pairs of all kinds, half Scenes and half Objects, in every domain: to pre-train a CLIP on that is to
    be fine-tuned, and so should know single things before.   Args: as Scenes;  bias: as both
    """

    def __init__(self, split="train", size=10000, seed=0, image_size=32, bias=0.0):
        several = Scenes(split, size - size // 2, seed, image_size, captions="mixed", bias=bias)
        self.parts = several, Objects(split, max(1, size // 2), seed, image_size, bias=bias)
        self.captions = [texts for part in self.parts for texts in part.captions]

    def __len__(self) -> int:
        return len(self.captions)

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        return np.concatenate([part.pixels for part in self.parts])

    def _find(self, i: int) -> tuple[Drawn, int]:
        row, first = range(len(self))[i], len(self.parts[0])
        return (self.parts[0], row) if row < first else (self.parts[1], row - first)

    def image(self, i: int) -> Image.Image:
        part, row = self._find(i)
        return part.image(row)

    def name(self, i: int) -> str:
        part, row = self._find(i)
        return part.name(row)


def contact_sheet(data: Drawn, count: int, zoom: int, columns: int = 8) -> Image.Image:
    """Pictures above, their masks below, each with a line of text."""
    size, count = data.image_size * zoom, min(count, len(data))
    rows = -(-count // columns)
    tall = 2 * size + 40
    sheet = Image.new("RGB", (columns * (size + 6), rows * tall), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(count):
        x, y = i % columns * (size + 6), i // columns * tall
        sheet.paste(data.image(i).resize((size, size), Image.Resampling.NEAREST), (x, y))
        mask = Image.fromarray((data.mask(i) * 255).astype(np.uint8))
        sheet.paste(mask.resize((size, size), Image.Resampling.NEAREST), (x, y + size + 2))
        text = data.domain_names[data.domains[i]] + ": "
        text += data.captions[i][0] if isinstance(data, Scenes) else data.classes[data.labels[i]]
        lines = textwrap.wrap(text, max(8, size // 6), max_lines=3, placeholder=" ...")
        pen.text((x + 2, y + 2 * size + 3), "\n".join(lines), fill="black", spacing=1)
    return sheet


def vocabulary(data: Scenes) -> list[str]:
    """Every word of the captions, sorted."""
    text = " ".join(text for texts in data.captions for text in texts)
    return sorted(set(text.replace(",", "").split()))


def main(argv: list[str] | None = None) -> int:
    """Write a contact sheet and print the captions and the words."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--show", action="store_true", help="write a contact sheet (the default)")
    parser.add_argument("--objects", action="store_true", help="labelled pictures of one thing")
    parser.add_argument("--split", default="train", help="train, val or test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40, help="pictures")
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--zoom", type=int, default=4, help="pixels on the sheet for one drawn")
    parser.add_argument("--domain", action="append", help=f"of {', '.join(DOMAINS)}; may be repeated")
    parser.add_argument("--bias", type=float, default=0.0, help="of --objects: background and class")
    parser.add_argument("--out", default="scenes.png")
    args = parser.parse_args(argv)
    common = (args.split, args.count, args.seed, args.image_size, args.domain or DOMAINS)
    try:
        data = Objects(*common, bias=args.bias) if args.objects else Scenes(*common)
        contact_sheet(data, args.count, args.zoom).save(args.out)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.objects:
        print(f"{len(data.classes)} classes: {', '.join(data.classes)}")
    else:
        for i in range(min(3, len(data))):
            print(data.name(i), *data.captions[i], sep="\n    ")
        words = vocabulary(data)
        print(f"{len(words)} words: {' '.join(words)}")
    print(f"wrote {args.out}: {len(data)} pictures with their masks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
