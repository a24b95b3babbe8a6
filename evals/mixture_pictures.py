"""Pictures of evals/mixtures.py: weights by caption, names of tokens, maps on images, removal of tokens."""

from collections import Counter
from pathlib import Path
from textwrap import shorten

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

import data
from evals import surgery
from readers import scenes
from util.files import write_image
from util.plots import GRID, INK, MAX_WIDTH, bars, heat, sheet, write

GREY, HIGH, GAP = "#888888", 17, 9  # height of a row of weights, and the gap between heads and between topics


def kinds_in(dataset: scenes.Scenes, i: int) -> list[str]:
    return [scenes.KINDS[k] for k in dataset.facts["kind"][i].tolist() if k >= 0]


def weights(path: Path, phi: Tensor, rows: dict[str, list[int]], texts: list[str], tokens: list[int]) -> None:
    """Writes mean weights (T, H, M): a row for each caption in `rows`, columns for the tokens."""
    uniform, phi = 1 / phi.shape[2], phi[:, :, tokens].numpy()
    _, H, M = phi.shape
    shown = [j for some in rows.values() for j in some]
    high = max(float(phi[shown].max()), uniform)
    short = {j: shorten(texts[j], 44, placeholder="...") for j in shown}
    left = 30 + 8 * max(map(len, rows)) + 6 * max(map(len, short.values()))
    wide = int(np.clip((MAX_WIDTH - left - 20) // H - GAP, M, 26 * M)) // M  # of a cell
    top, head = 64, wide * M + GAP
    bottom = top + HIGH * len(shown) + GAP * len(rows)
    image = Image.new("RGB", (max(left + H * head + 12, 640), bottom + 42), "white")
    draw = ImageDraw.Draw(image)
    write(draw, (10, 8), "Mean weight of each token (columns) for each caption (rows)", 15)
    for h in range(H):
        x = left + h * head
        write(draw, (x + wide * M / 2, top - 24), f"head {h}", 13, "mm")
        for n, token in enumerate(tokens if wide >= 14 else []):
            write(draw, (x + (n + 0.5) * wide, top - 8), str(token), 10, "mm", GREY)
        if h:
            draw.line([(x - GAP / 2 - 1, top), (x - GAP / 2 - 1, bottom - GAP)], fill=GREY)
    y = top
    for topic, some in rows.items():
        write(draw, (10, y + HIGH * len(some) / 2), topic, 14, "lm")
        for j in some:
            write(draw, (left - 8, y + HIGH / 2), short[j], 12, "rm")
            for h, n in np.ndindex(H, M):
                x, fill = left + h * head + n * wide, tuple(heat(phi[j, h, n] / high).tolist())
                draw.rectangle([x, y, x + wide - 1 - (wide > 6), y + HIGH - 2], fill=fill)
            y += HIGH
        y += GAP
    image.paste(Image.fromarray(heat(np.linspace(0, 1, 240)[None].repeat(12, 0))), (left, bottom + 4))
    for value in (0, uniform, high):
        x = left + 239 * value / high
        draw.line([(x, bottom + 16), (x, bottom + 21)], fill=INK)
        write(draw, (x, bottom + 23), f"{value:.3g}", 11, "ma")
    write(draw, (left + 256, bottom + 3), f"{uniform:.3g} is the uniform weight", 12)
    write_image(path, image)


def names(path: Path, rows: list[dict], tokens: list[int]) -> None:
    """Writes the captions that use each token most, below a bar for the largest mean weight; a row a head."""
    bars, texts = [], []
    for row in (row for row in rows if row["token"] in tokens):
        bars.append(Image.new("RGB", (surgery.TILE, 16), GRID))
        colour = tuple(heat(np.float64(row["weight"])).tolist())
        bars[-1].paste(colour, (0, 0, round(surgery.TILE * row["weight"]), 16))
        place = f"head {row['head']}, token {row['token']}: {row['weight']:.2f}"
        texts.append("; ".join([place, *row["captions"]]))
    title = "The captions with the largest mean weight of each token, shown by the bar"
    write_image(path, sheet(bars, texts, len(tokens), surgery.TILE, title))


def picture(dataset, i: int) -> tuple[Image.Image, str]:
    """An image as the model sees it, but larger, and its name."""
    if isinstance(dataset, scenes.Scenes):
        large = scenes.draw(dataset.facts, np.array([i]), surgery.TILE)[0]
        return Image.fromarray(large), " ".join(kinds_in(dataset, i))
    return Image.fromarray(data.preprocess(surgery.TILE).pixels(dataset.image(i))), dataset.name(i)


def token_rows(dataset, found: dict, show: list[int], tokens: list[int]) -> list[tuple]:
    """The mean map of each token over all images, then its maps of some images."""
    blank, labels = Image.new("RGB", (surgery.TILE, surgery.TILE), "white"), [f"token {k}" for k in tokens]
    rows = [(blank, found["maps"].mean(0)[..., tokens], [f"mean of {len(dataset)} images", *labels])]
    for i in show:
        image, name = picture(dataset, i)
        own = [found["labels"][i][k] for k in tokens] if "labels" in found else labels
        rows.append((image, found["maps"][i][..., tokens], [name, *own]))
    return rows


def caption_rows(dataset, found: dict, captions, show: list[int]) -> list[tuple]:
    """Caption maps of some images; in scenes up to three things and one caption of each other topic."""
    rows, most, by_pair = [], {"things": 3, "captions": 6}, found.get("by_pair", {})
    for i in show:
        image, name = picture(dataset, i)
        labels, chosen, count = [name], [], Counter()
        for p, (owner, j, true) in enumerate(captions.pairs().tolist()):
            topic = captions.topics[j]
            if owner == i and true and count[topic] < most.get(topic, 1):
                value, right, thing = by_pair.get(p, ("", True, ""))
                number = f" {value:.1f}" if thing else ""
                labels.append(captions.texts[j] + number + ("" if right else f" WRONG: {thing}"))
                chosen.append(p)
                count[topic] += 1
        maps_of = surgery.mixed_maps(found["maps"][i, None], found["used"][chosen][None])[0]
        rows.append((image, maps_of, labels))
    return rows


def examples(dataset, found: dict, captions, count: int) -> list[int]:
    """Scenes of several things with the best and the worst caption maps, or evenly spaced images."""
    if "by_pair" not in found:
        return sorted({k * len(dataset) // count for k in range(count)})
    scores, image = {}, captions.pairs()[:, 0].tolist()
    for p, (value, right, _) in found["by_pair"].items():
        if len(kinds_in(dataset, image[p])) > 1:
            scores.setdefault(image[p], []).append((right, value))
    order = sorted(scores, key=lambda i: np.mean(scores[i], 0).tolist())
    best = order[::-1][: -(-count // 2)]
    return best + [i for i in order[: count // 2] if i not in best]


def draw(out: Path, dataset, captions, found: dict, tables: dict, show: list[int]) -> None:
    """Writes all pictures to a folder. At most 16 tokens are drawn: those with the largest weights."""
    means = found["by_caption"][..., : found["maps"].shape[-1]]
    order = means.mean((0, 1)).argsort(descending=True).tolist()
    few = sorted(order[:8])
    weights(out / "weights.png", means, captions.rows, captions.texts, sorted(order[:16]))
    names(out / "names.png", tables["names"], few)
    note = "; a number is the share of the map on a thing over its share of the picture" * ("labels" in found)
    title = f"What each token attends to in the last block{note}"
    surgery.map_sheet(out / "tokens.png", token_rows(dataset, found, show, few), title)
    title = f"The maps of the tokens, mixed by the weights of a caption{note}"
    surgery.map_sheet(out / "captions.png", caption_rows(dataset, found, captions, show), title)
    columns = {"true, %": "score lost by true captions without the token that they use most"}
    columns |= {"false, %": "score lost by false captions without that token"}
    columns |= {"lead lost, %": "lead of true captions lost", "another, %": "lead lost without another token"}
    rows = [row for row in tables["ablation"] if "lead" in row]
    parts = {row["topic"]: {text: (row[k], 0.0) for k, text in columns.items()} for row in rows}
    if parts:
        bars(out / "ablation.png", parts, "A token is removed before the softmax: changes in % of the lead")
    print(f"pictures in {out}")
