"""The words of the drawn scenes: what can be in a picture, its captions, and what each caption claims.

Llip's premise is that one picture has many true captions, each about another aspect. A caption here is a text
and the set of claims that it makes, so it is known exactly of which pictures it is true. Claims are tuples:

    ("thing", noun, colour, place)               the noun is a kind or a group; None: not mentioned
    ("left" "right" "above" or "below", a, b)    where kind a is, seen from kind b
    ("background" "domain" or "count", value)    about the picture as a whole
"""

from itertools import permutations, product
from typing import NamedTuple

DOMAINS = ("photo", "sketch", "cartoon", "painting")
BACKGROUNDS = ("grass", "water", "sand", "snow", "bricks", "night")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
PLACES = ("top left", "top right", "bottom left", "bottom right")
GROUPS = {
    "land animal": ("dog", "wolf", "cat", "rabbit"),
    "sea animal": ("fish", "shark", "whale", "crab"),
    "vehicle": ("car", "truck", "bus", "tractor"),
    "fruit": ("pear", "cherry", "lemon", "banana"),
}
GROUP_NAME = {kind: group for group, kinds in GROUPS.items() for kind in kinds}

# The aspects of a picture's captions; of several words in one string a hash selects one.
FORMS = {
    "mixed": ("object",) * 4 + ("place", "place", "background", "count group"),
    "aspects": ("object", "place", "background", "count", "group"),
    "full": ("full",) * 5,
}
FORMS["both"] = FORMS["mixed"] + FORMS["full"]
DICE = 10  # random integers that the wording of one caption uses
FRAMES = ("{}", "there is {}", "a picture of {}", "a {domain} of {}")
WHERE = ("at the {}", "in the {} corner", "on the {}", "in the {}")
GROUND_WORDS = {name: f"{word} {name}" for name, word in zip(BACKGROUNDS, "on in on in on at".split())}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
NUMBERS = ("one", "two", "three", "four")


class Thing(NamedTuple):
    kind: str
    colour: str
    place: str


class Picture(NamedTuple):
    things: list[Thing]  # in the order in which captions mention them
    background: str
    domain: str


def named(noun: str, colour: str | None = None, place: str | None = None, die: int = 0) -> str:
    """A thing in words: "a red dog at the top left"."""
    words = f"{colour} {noun}" if colour else noun
    text = ("an " if words[0] in "aeiou" else "a ") + words
    return f"{text} {WHERE[die % 4].format(place)}" if place else text


def relations(a: Thing, b: Thing) -> list[str]:
    """Where a is, seen from b: one or two of RELATIONS, the horizontal one first."""
    (y, x), (v, u) = (divmod(PLACES.index(thing.place), 2) for thing in (a, b))
    return [how for how, true in zip(RELATIONS, (x < u, x > u, y < v, y > v)) if true]


def write(aspect: str, nth: int, picture: Picture, dice: list[int]) -> tuple[str, frozenset]:
    """The nth caption of a picture, about an aspect: its text and its claims."""
    aspect = aspect.split()[dice[3] % len(aspect.split())]
    things, background = picture.things, picture.background
    thing, next_thing = (things[(nth + k) % len(things)] for k in (0, 1))
    if aspect == "full":
        text, claims = write_full(thing, next_thing, background, dice)
    elif aspect == "count":
        text = f"{NUMBERS[len(things) - 1]} {('thing', 'object')[dice[0] % 2]}{'s' * (len(things) > 1)}"
        claims = [("count", len(things))]
    elif aspect == "background":
        where = GROUND_WORDS[background]
        text = (f"a scene {where}", f"a background of {background}", f"things {where}")[dice[0] % 3]
        claims = [("background", background)]
    else:
        noun = GROUP_NAME[thing.kind] if aspect == "group" else thing.kind
        colour = thing.colour if aspect == "object" else None
        place = thing.place if aspect == "place" else None
        text, claims = named(noun, colour, place, dice[1]), [("thing", noun, colour, place)]
    frame = FRAMES[dice[9] % len(FRAMES)]
    if text.startswith(("things", "two", "three", "four")):
        frame = frame.replace("is", "are")
    if "domain" in frame:
        claims.append(("domain", picture.domain))
    return frame.format(text, domain=picture.domain), frozenset(claims)


def write_full(a: Thing, b: Thing, background: str, dice: list[int]) -> tuple[str, list]:
    """A caption about one or two things and often the background; nearly always true of one picture only.

    Args: b is a where the picture has one thing
    """
    alone = a == b
    first = a if alone or dice[5] % 2 == 0 else a._replace(place=None)
    second = b if dice[6] % 2 == 0 else b._replace(place=None)
    text, claims = named(*first, dice[1]), [("thing", *first)]
    if not alone:
        joint = "and"
        if dice[7] % 3 == 0 and first.place is None:
            found = relations(a, b)
            how = found[0] if dice[4] % 2 else found[-1]
            joint = RELATIONS[how][dice[2] % 2]
            claims.append((how, a.kind, b.kind))
        text = f"{text} {joint} {named(*second, dice[2])}"
        claims.append(("thing", *second))
    if alone or dice[8] % 2:
        text = f"{text} {GROUND_WORDS[background]}"
        claims.append(("background", background))
    return text, claims


def truths(picture: Picture) -> set[tuple]:
    """Every claim that is true of a picture."""
    true = {("background", picture.background), ("domain", picture.domain), ("count", len(picture.things))}
    for kind, colour, place in picture.things:
        true.update(product(["thing"], (kind, GROUP_NAME[kind]), (colour, None), (place, None)))
    for a, b in permutations(picture.things, 2):
        true.update((how, a.kind, b.kind) for how in relations(a, b))
    return true
