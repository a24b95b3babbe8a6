"""The embedded data set: drawn scenes with captions, labels, domains and masks; no picture is stored.

It shows the mechanisms of the papers in minutes. Results on it say nothing about the papers' numbers.

    Scenes    pictures of 1 to 4 things with captions    pre-training, retrieval
    Objects   pictures of one thing with a label         zero-shot, fine-tuning, open world
    Broad     both of them with captions                 pre-training of a model that will be fine-tuned

Every fact is a function of (seed, split, index): a hash without state, and integer arithmetic. Captions are
therefore the same on every machine, and so are pixels wherever Pillow draws polygons alike. A hash of a
picture's facts decides to which split it belongs, so no two splits share a picture, whatever their seeds.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from readers import scene_captions as words
from readers.scene_captions import BACKGROUNDS, COLOURS, DOMAINS, FORMS, GROUPS, PLACES
from util.files import write_image
from util.flags import parse
from util.plots import sheet
from util.program import leave, program

# facts of each thing, (N, things): its kind, its colour, and its square in 64ths of a picture
THING_FACTS = ("kind", "colour", "side", "top", "left")
SPLITS = {"train": 0, "val": 1, "test": 2}
PHOTO, SKETCH, CARTOON, PAINTING = range(4)
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)
# In the order of KINDS. Kinds of a group look alike and have different homes: backgrounds can replace shapes.
HOMES = "grass snow bricks sand   water night snow sand   bricks sand night grass   grass night bricks water"
HOME_OF = tuple(map(BACKGROUNDS.index, HOMES.split()))
# Two kinds of every group are held out when classes are split into base and new.
BASE = tuple(kind for n, kind in enumerate(KINDS) if n % 4 < 2)
NEW = tuple(kind for n, kind in enumerate(KINDS) if n % 4 >= 2)
TEMPLATES = ("a {}", "a picture of a {}", "there is a {}", *(f"a {domain} of a {{}}" for domain in DOMAINS))


def mix(*parts) -> np.ndarray:
    """Hashes integers to 64 bits; arrays broadcast.

    The last step of SplitMix64 (Steele et al. 2014), once per part. It has no state, and unlike the numbers
    that NumPy draws from its generators it will never change.
    """
    h = np.zeros(1, np.uint64)
    for part in parts:
        h = (h ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def choose(n, *key) -> np.ndarray:
    """Numbers of range(n), selected by the hash of a key; n may be an array."""
    return ((mix(*key) >> np.uint64(33)) % np.asarray(n).astype(np.uint64)).astype(np.int64)


def shuffled(n: int, key: np.ndarray, salt: int) -> np.ndarray:
    """The first four numbers of a random order of range(n), one order for each key: (N, 4)."""
    return np.argsort(mix(key[:, None], salt, np.arange(n)), axis=1, kind="stable")[:, :4]


def home_or_any(kind, bias: float, home_key: tuple, other_key: tuple) -> np.ndarray:
    """Backgrounds (N,) for things of these kinds (N,): the home in a share `bias`, otherwise any of all."""
    home = choose(10**6, *home_key) < round(bias * 10**6)
    return np.where(home, np.array(HOME_OF)[kind], choose(len(BACKGROUNDS), *other_key))


def decide(make, split: str, seed: int, index: np.ndarray) -> dict:
    """Facts of the pictures `index` of a split, drawn again until their hash belongs to the split.

    The hash covers what is in a picture, but neither the domain nor the seed. For every seed, half of all
    possible pictures are for training and a quarter each for validation and test.
    """
    stream = mix(seed, SPLITS[split], index)
    facts = make(mix(stream, 0), index)
    todo, attempt = np.arange(len(index)), 0
    while len(todo):
        kind, colour, *where = (facts[name][todo] for name in THING_FACTS)
        hashed = mix(facts["background"][todo])
        # The third column is -1 for an absent thing; without it, pictures would change splits.
        for table in (kind, colour, np.minimum(kind, 0), *where):
            for column in table.T:
                hashed = mix(hashed, column)
        owner = np.array([0, 0, 1, 2])[(hashed % np.uint64(4)).astype(int)]
        todo, attempt = todo[owner != SPLITS[split]], attempt + 1
        for name, value in make(mix(stream[todo], attempt), index[todo]).items():
            facts[name][todo] = value
    return facts


TONES = "msldwg"  # of drawings.txt; the seventh tone is the outline
DARK, LINE = 3, 6
DRAWINGS = Path(__file__).with_name("drawings.txt").read_text().strip().split("\n\n")
SHAPES = dict(drawing.split(":") for drawing in DRAWINGS[1:])  # kind -> its shapes, separated by ";"
MASTER = 240  # pixels a side of the drawing of a kind that all its sizes are reduced from
RGB = np.array([[214, 40, 40], [245, 135, 20], [250, 215, 40], [40, 150, 60], [45, 90, 215], [145, 50, 175]])
PAPER = np.array([246, 242, 230])
# Backgrounds and their marks. Paler than the things: a short training would learn nothing else.
GROUND = [[150, 190, 120], [150, 200, 226], [230, 214, 172], [238, 243, 248], [204, 156, 138], [52, 56, 92]]
MARKS = [[122, 166, 94], [190, 222, 238], [206, 184, 138], [214, 224, 236], [224, 206, 194], [210, 206, 166]]


@functools.lru_cache(None)
def master(kind: str) -> np.ndarray:
    """The large drawing of a kind: (240, 240) uint8, 0 outside it, otherwise tone + 1."""
    canvas = Image.new("L", (MASTER, MASTER))
    pen = ImageDraw.Draw(canvas)
    for shape in SHAPES[kind].split(";"):
        tone, form, *numbers = shape.split()
        points = [int(v) * MASTER // 24 for v in numbers]
        {"o": pen.ellipse, "r": pen.rectangle, "p": pen.polygon}[form](points, fill=TONES.index(tone) + 1)
    return np.asarray(canvas)


def outline(tones: np.ndarray, radius: int) -> np.ndarray:
    """Where a drawing ends within `radius` pixels, or its tone changes within half of it."""
    padded = np.pad(tones, radius)
    edge = np.zeros(tones.shape, bool)
    for dy in (-2, -1, 0, 1, 2):
        for dx in (-2, -1, 0, 1, 2):
            for reach, area in ((radius, padded > 0), (radius // 2, padded)):
                y, x = radius + dy * reach // 2, radius + dx * reach // 2
                edge |= area[y : y + MASTER, x : x + MASTER] != area[radius:-radius, radius:-radius]
    return edge & (tones > 0)


@functools.lru_cache(None)
def sprites(side: int, image_size: int) -> np.ndarray:
    """Every kind, reduced to `side` pixels: (2 outlined, 16 kinds, side, side, 7 tones) uint8 coverage."""
    bank = np.zeros((2, len(KINDS), side, side, len(TONES) + 1), np.uint8)
    radius = max(2, MASTER * image_size // (48 * side))
    for k, kind in enumerate(KINDS):
        plain = master(kind)
        for outlined, tones in enumerate((plain, np.where(outline(plain, radius), LINE + 1, plain))):
            for tone in range(bank.shape[-1]):
                layer = Image.fromarray(((tones == tone + 1) * 255).astype(np.uint8))
                bank[outlined, k, :, :, tone] = layer.resize((side, side), Image.Resampling.BOX)
    return bank


def palette(colour: np.ndarray, domain: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Colours of the tones of each thing: (n, 7, 3) int64 in [0, 255]."""
    jitter = choose(31, key[:, None], 50, np.arange(3)) - 15
    rgb = np.clip(RGB[colour] + jitter * np.isin(domain, (PHOTO, PAINTING))[:, None], 0, 255)
    fixed = [np.broadcast_to(c, rgb.shape) for c in ([34, 32, 40], [248, 248, 244], [84, 150, 70], [30])]
    tones = np.stack([rgb, rgb * 5 // 8, (rgb + 255) // 2, *fixed], 1)  # (n, 7, 3)
    pencil = (tones + 5 * PAPER) // 6
    pencil[:, LINE] = rgb * 3 // 4
    pencil[:, DARK] = 90
    return np.where((domain == SKETCH)[:, None, None], pencil, tones)


@functools.lru_cache(None)
def grounds(image_size: int) -> np.ndarray:
    """Every background in every domain, large enough to cut pictures from: (4, 6, 3S, 3S, 3) uint8."""
    y, x = np.mgrid[: 3 * image_size, : 3 * image_size] * 32 // image_size

    def dots(salt, percent, dy=1, dx=1):
        return choose(100, salt, y // dy, x // dx) < percent

    waves = (y + np.array([0, 1, 1, 0])[x // 3 % 4]) % 6 < 1
    mortar = (y % 5 == 0) | ((x + 4 * (y // 5 % 2)) % 8 == 0)
    # the order of BACKGROUNDS: blades of grass, waves, grains of sand, flakes, mortar, stars
    marked = [dots(1, 30, dy=4), waves, dots(3, 16), dots(4, 14, dy=2, dx=2), mortar, dots(6, 3)]
    marked = np.stack(marked)[..., None]  # (6, 3S, 3S, 1)
    ground, marks = (np.array(c)[:, None, None] for c in (GROUND, MARKS))
    photo = np.where(marked, marks, ground)
    sketch = np.where(marked, (3 * (marks + ground) // 8 + PAPER) // 2, (ground + 15 * PAPER) // 16)
    cartoon = np.where(marked, (marks + ground) // 2, ground)
    blotch = (choose(25, 7, y // 2, x // 2) - 12)[..., None]
    drawn = np.stack([photo + blotch // 2, sketch, cartoon, photo + blotch])  # in the order of DOMAINS
    return np.clip(drawn, 0, 255).astype(np.uint8)


def draw(facts: dict, rows: np.ndarray, size: int) -> np.ndarray:
    """Draws the pictures with the given rows of facts: (N, S, S, 3) uint8."""
    key, domain, ground = (facts[name][rows] for name in ("key", "domain", "background"))
    drop = max(1, size // 32)  # pixels from a thing to its shadow
    wide = size + drop
    canvas = np.empty((len(rows), wide, wide, 3), np.int32)
    tiles = grounds(size)
    for n, (y, x) in enumerate(choose(2 * size - drop, key[:, None], 40, np.arange(2))):
        canvas[n] = tiles[domain[n], ground[n], y : y + wide, x : x + wide]

    picture, slot = np.nonzero(facts["kind"][rows] >= 0)
    kind, colour, *where = (facts[name][rows][picture, slot] for name in THING_FACTS)
    side, top, left = (value * size // 64 for value in where)
    tones = palette(colour, domain[picture], mix(key[picture], slot)).astype(np.float32)
    for s in np.unique(side).tolist():
        at = np.flatnonzero(side == s)
        n = picture[at][:, None, None]
        outlined = np.isin(domain[picture[at]], (SKETCH, CARTOON)).astype(int)
        cover = sprites(s, size)[outlined, kind[at]].astype(np.float32)  # (n, s, s, 7)
        # Sums of products of bytes stay below 2^24, so float32 is exact in any order of summation.
        paint = (cover.reshape(len(at), s * s, -1) @ tones[at]).astype(np.int32).reshape(len(at), s, s, 3)
        alpha = cover.sum(-1).astype(np.int32)[..., None]  # (n, s, s, 1)
        y, x = np.mgrid[:s, :s]
        solid = (1 - outlined)[:, None, None, None]  # lit from the upper left, with a shadow
        light = 256 + solid * (34 - 34 * (x + y) // s)[..., None]
        y, x = y + top[at][:, None, None], x + left[at][:, None, None]
        canvas[n, y + drop, x + drop] = canvas[n, y + drop, x + drop] * (255 - solid * alpha * 2 // 5) // 255
        canvas[n, y, x] = (canvas[n, y, x] * (255 - alpha) + paint * light // 256) // 255
    canvas = canvas[:, :size, :size]
    finish(canvas, domain, key)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def finish(canvas: np.ndarray, domain: np.ndarray, key: np.ndarray) -> None:
    """Gives photos light and grain and paintings strokes, in place."""
    size = canvas.shape[1]
    y, x = np.mgrid[:size, :size]
    at = np.flatnonzero(domain == PHOTO)
    grain = mix(key[at][:, None], np.arange(size * size // 4)).view(np.uint16) % 25  # four from a hash
    grain = grain.reshape(len(at), size, size).astype(np.int32) - 12
    slope = (choose(31, key[at][:, None], 41, np.arange(2)) - 15)[..., None, None]
    light = (slope[:, 0] * (2 * y - size) + slope[:, 1] * (2 * x - size)) // size
    canvas[at] += (grain + light.astype(np.int32))[..., None]

    at = np.flatnonzero(domain == PAINTING)
    stroke = (y * 16 // size) * 16 + x * 16 // size  # a sixteenth of a side moves as one
    n, reach = at[:, None, None], max(1, size // 32)
    dy, dx = (reach * (choose(3, key[n], salt, stroke) - 1) for salt in (42, 43))
    moved = canvas[n, np.clip(y + dy, 0, size - 1), np.clip(x + dx, 0, size - 1)]
    tint = choose(41, key[at][:, None], 44, np.arange(3)) - 20
    canvas[at] = (canvas[at] + moved) // 2 + tint[:, None, None].astype(np.int32)


class Drawn:
    """What Scenes and Objects share: pictures, masks and domains from a table of facts.

    Args:   split train, val or test;  size pictures;  image_size pixels, even, at least 16;  domains names;
            bias in [0, 1]: how often the background is the home of the first thing instead of any of all;
            it is 0 in the test split
    Raises: ValueError for an unknown name, or a number that is out of range.
    """

    def __init__(self, split, size, seed=0, image_size=32, domains=DOMAINS, kinds=KINDS, bias=0.0):
        wanted = (("split", [split], SPLITS), ("domain", domains, DOMAINS), ("kind", kinds, KINDS))
        for what, names, known in wanted:
            for name in set(names) - set(known):
                raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
        if size < 1 or image_size < 16 or image_size % 2 or not 0 <= bias <= 1:
            sizes = f"size {size} must be at least 1, image_size {image_size} even and at least 16"
            raise ValueError(f"{sizes}, bias {bias} in [0, 1]")
        self.split, self.seed, self.image_size = split, seed, image_size
        self.bias, self.domain_names = bias if split != "test" else 0.0, list(domains)
        self.kinds = np.array([KINDS.index(kind) for kind in kinds])
        self.domain_numbers = np.array([DOMAINS.index(name) for name in domains])
        self.facts = decide(self.make, split, seed, np.arange(size))
        self.domains = [self.domain_names.index(DOMAINS[d]) for d in self.facts["domain"].tolist()]

    def __len__(self) -> int:
        return len(self.facts["key"])

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """All pictures, (N, S, S, 3) uint8; drawn at the first use and kept."""
        rows = np.array_split(np.arange(len(self)), -(-len(self) // 128))
        return np.concatenate([draw(self.facts, some, self.image_size) for some in rows])

    def image(self, i: int) -> Image.Image:
        row = range(len(self))[i]
        if "pixels" in self.__dict__:
            return Image.fromarray(self.pixels[row])
        return Image.fromarray(draw(self.facts, np.array([row]), self.image_size)[0])

    def name(self, i: int) -> str:
        return f"{type(self).__name__.lower()}-{self.split}-{self.seed}-{range(len(self))[i]}"

    def masks(self, i: int) -> np.ndarray:
        """Which pixels each thing of picture i covers by half or more: (things, S, S) bool."""
        kinds, S = [k for k in self.facts["kind"][i].tolist() if k >= 0], self.image_size
        out = np.zeros((len(kinds), S, S), bool)
        for n, kind in enumerate(kinds):
            s, top, left = (int(self.facts[name][i, n]) * S // 64 for name in ("side", "top", "left"))
            out[n, top : top + s, left : left + s] = sprites(s, S)[0, kind].sum(-1, dtype=int) >= 128
        return out


class Objects(Drawn):
    """Labelled pictures of one thing; labels are balanced, and so are domains within a label."""

    def __init__(self, split="train", size=2048, *args, **options):
        super().__init__(split, size, *args, **options)
        self.classes = [KINDS[kind] for kind in self.kinds]
        self.labels = [self.classes.index(KINDS[kind]) for kind in self.facts["kind"][:, 0]]

    def make(self, key: np.ndarray, index: np.ndarray) -> dict:
        kind = self.kinds[index % len(self.kinds)]
        domain = self.domain_numbers[index // len(self.kinds) % len(self.domain_numbers)]
        # in steps of 8: a patch of 4 pixels at image size 32
        side = 24 + 8 * choose(3, key, 14)
        top, left = (8 * choose((64 - side) // 8 + 1, key, salt) for salt in (16, 17))
        columns = kind, choose(len(COLOURS), key, 12), side, top, left
        facts = {name: value[:, None] for name, value in zip(THING_FACTS, columns)}  # (N, 1)
        background = home_or_any(kind, self.bias, (key, 10), (key, 11))
        return {**facts, "key": key, "domain": domain, "background": background}

    @functools.cached_property
    def captions(self) -> list[list[str]]:
        """Six captions a picture; all of them name the kind."""
        columns = (self.facts[name].tolist() for name in ("kind", "colour", "background", "domain"))
        texts = []
        for (kind,), (colour,), ground, domain in zip(*columns):
            thing = words.named(KINDS[kind])
            frames = [frame.format(thing, domain=DOMAINS[domain]) for frame in words.FRAMES]
            where = f"{thing} {words.GROUND_WORDS[BACKGROUNDS[ground]]}"
            texts.append([*frames, words.named(KINDS[kind], COLOURS[colour]), where])
        return texts


class Scenes(Drawn):
    """Pictures of one to four things of different kinds, each in another corner, with captions.

    Args: as Drawn;  captions "mixed" (8 a picture, each about one aspect), "aspects" (one for each of those
          aspects), "full" (5 about several things) or "both" (mixed, then full); default "mixed" for training
          and "full" otherwise
    """

    def __init__(self, split="train", size=10000, *args, captions=None, **options):
        self.form = captions or ("mixed" if split == "train" else "full")
        if self.form not in FORMS:
            raise ValueError(f"unknown captions {captions!r}: choose from {', '.join(FORMS)}")
        super().__init__(split, size, *args, **options)

    def make(self, key: np.ndarray, index: np.ndarray) -> dict:
        if len(self.kinds) < 4:
            raise ValueError(f"{len(self.kinds)} kinds are too few: a scene holds up to 4 different ones")
        place, slots = shuffled(4, key, 20), np.arange(4)
        kind = self.kinds[shuffled(len(self.kinds), key, 23)]
        colour = choose(len(COLOURS), mix(key[:, None], 22, slots), 1)
        columns = kind, colour, np.full_like(place, 32), place // 2 * 32, place % 2 * 32, place
        absent = slots >= 1 + choose(4, key, 21)[:, None]
        names = (*THING_FACTS, "place")
        facts = {name: np.where(absent, -1, value) for name, value in zip(names, columns)}  # (N, 4)
        domain = self.domain_numbers[choose(len(self.domain_numbers), key, 24)]
        background = home_or_any(kind[:, 0], self.bias, (key, 26), (key, 25))
        return {**facts, "key": key, "domain": domain, "background": background}

    @functools.cached_property
    def pictures(self) -> list[words.Picture]:
        """The facts in words; the order of the things is the one in which captions mention them."""
        order, found = shuffled(4, self.facts["key"], 31), []
        names = ("kind", "colour", "place", "background", "domain")
        columns = (table.tolist() for table in (order, *(self.facts[name] for name in names)))
        for slots, kind, colour, place, ground, domain in zip(*columns):
            slots = [s for s in slots if kind[s] >= 0]
            things = [words.Thing(KINDS[kind[s]], COLOURS[colour[s]], PLACES[place[s]]) for s in slots]
            found.append(words.Picture(things, BACKGROUNDS[ground], DOMAINS[domain]))
        return found

    @functools.cached_property
    def written(self) -> list[list[tuple]]:
        """(text, claims) of every caption of every picture."""
        aspects = FORMS[self.form]
        key, nth = self.facts["key"][:, None, None], np.arange(len(aspects))[:, None]
        dice = (mix(key, 30, nth, np.arange(words.DICE)) >> np.uint64(33)).tolist()  # (N, captions, DICE)
        return [
            [words.write(aspect, n, picture, rolls[n]) for n, aspect in enumerate(aspects)]
            for picture, rolls in zip(self.pictures, dice)
        ]

    @functools.cached_property
    def captions(self) -> list[list[str]]:
        return [[text for text, _ in some] for some in self.written]

    def relevance(self) -> np.ndarray:
        """Which captions are true of which pictures: (N pictures, all captions in order) bool."""
        flat = [claims for some in self.written for _, claims in some]
        return np.array([[claims <= true for claims in flat] for true in map(words.truths, self.pictures)])


class Broad:
    """Half Scenes and half Objects, all with captions, to pre-train a CLIP that will be fine-tuned."""

    def __init__(self, split="train", size=10000, seed=0, image_size=32, bias=0.0):
        several = Scenes(split, size - size // 2, seed, image_size, captions="mixed", bias=bias)
        self.parts = several, Objects(split, max(1, size // 2), seed, image_size, bias=bias)
        self.captions = several.captions + self.parts[1].captions
        self.names = [part.name(row) for part in self.parts for row in range(len(part))]

    def __len__(self) -> int:
        return len(self.captions)

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        return np.concatenate([part.pixels for part in self.parts])

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i])

    def name(self, i: int) -> str:
        return self.names[i]


@dataclass(frozen=True)
class Flags:
    objects: bool = False  # labelled pictures of one thing
    split: str = "train"  # train, val or test
    count: int = 40  # pictures
    domain: tuple[str, ...] = DOMAINS  # only these domains
    out: str = "scenes.png"  # where to write the contact sheet


@program
def main(argv: list[str]) -> None:
    """Writes a contact sheet of pictures and their masks, and prints some captions and all words."""
    c = parse(Flags, argv, main.__doc__)
    data = (Objects if c.objects else Scenes)(c.split, c.count, domains=c.domain)
    masks = [np.repeat(data.masks(i).any(0)[..., None] * np.uint8(255), 3, -1) for i in range(len(data))]
    pictures = [np.concatenate(both, 1) for both in zip(data.pixels, masks)]
    texts = [f"{data.domain_names[d]}: {some[0]}" for d, some in zip(data.domains, data.captions)]
    write_image(c.out, sheet(pictures, texts, 6, 8 * data.image_size))
    print(f"wrote {c.out}")
    for i in range(min(3, len(data))):
        print(data.name(i), *data.captions[i], sep="\n    ")
    vocabulary = {word for texts in data.captions for text in texts for word in text.split()}
    print(f"{len(vocabulary)} words: {' '.join(sorted(vocabulary))}")


if __name__ == "__main__":
    leave(main())
