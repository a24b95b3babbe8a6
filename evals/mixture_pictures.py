"""Pictures of evals/mixtures.py: weights by caption, names of tokens, maps on images, removal of tokens."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

import data
from evals import surgery
from evals.mixture_figures import kinds_in
from readers import scenes
from util.files import write_image
from util.plots import GRID, INK, MAX_WIDTH, bars, heat, sheet, write

GREY, HIGH, GAP = "#888888", 17, 9  # height of a row of weights, and the gap between heads and between topics


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def weights(path: Path, phi: Tensor, rows: dict[str, list[int]], texts: list[str], tokens: list[int]) -> None:
    """Writes mean weights (T, H, M): a row for each caption in `rows`, columns for the tokens."""
    uniform, phi = 1 / phi.shape[2], phi[:, :, tokens].numpy()
    _, H, M = phi.shape
    shown = [j for some in rows.values() for j in some]
    high = max(float(phi[shown].max()), uniform)
    left = 30 + 8 * max(map(len, rows)) + 6 * max(len(shorten(texts[j], 44)) for j in shown)
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
            write(draw, (left - 8, y + HIGH / 2), shorten(texts[j], 44), 12, "rm")
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
    """Writes a table of the captions that use each token most, with a bar for the largest mean weight."""
    left, top, high, heads = 70, 60, 96, 1 + max(row["head"] for row in rows)
    wide = min(190, (MAX_WIDTH - left - 10) // len(tokens))
    image = Image.new("RGB", (max(left + wide * len(tokens) + 10, 620), top + high * heads + 10), "white")
    draw = ImageDraw.Draw(image)
    write(draw, (10, 8), "The captions with the largest mean weight of each token, shown by the bar", 15)
    for n, token in enumerate(tokens):
        write(draw, (left + (n + 0.5) * wide, top - 12), f"token {token}", 14, "mm")
    for row in (row for row in rows if row["token"] in tokens):
        x, y = left + wide * tokens.index(row["token"]), top + high * row["head"]
        if row["token"] == tokens[0]:
            write(draw, (10, y + high / 2), f"head {row['head']}", 14, "lm")
        draw.rectangle([x, y, x + wide - 5, y + high - 5], outline=GRID)
        fill = tuple(heat(np.float64(row["weight"])).tolist())
        draw.rectangle([x, y, x + (wide - 5) * row["weight"], y + 8], fill=fill)
        write(draw, (x + wide - 9, y + 11), f"{row['weight']:.2f}", 11, "ra", GREY)
        for line, text in enumerate(row["captions"]):
            write(draw, (x + 5, y + 22 + 17 * line), shorten(text, wide // 6 - 1), 12)
    write_image(path, image)


def maps(path: Path, rows: list[tuple], title: str) -> None:
    """Writes images with maps over them: (image, maps (rows, columns, n), 1 + n labels) for each row."""
    columns, pictures, texts = max(len(labels) for _, _, labels in rows), [], []
    for image, some, labels in rows:
        missing = columns - len(labels)
        pictures += surgery.with_maps(image, surgery.stretch(some[None])[0])
        pictures += [Image.new("RGB", pictures[-1].size, "white")] * missing
        texts += [*labels, *[""] * missing]
    write_image(path, sheet(pictures, texts, columns, surgery.TILE, title))


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
    rows, pairs, most = [], captions.pairs().tolist(), {"things": 3, "captions": 6}
    for i in show:
        own = [(p, j) for p, (image, j, true) in enumerate(pairs) if image == i and true]
        topics, chosen = [captions.topics[j] for _, j in own], []
        image, name = picture(dataset, i)
        labels = [name]
        for n, (p, j) in enumerate(own):
            if topics[:n].count(topics[n]) < most.get(topics[n], 1):
                value, right, thing = found.get("by_pair", {}).get(p, ("", True, ""))
                number = f" {value:.1f}" if thing else ""
                labels.append(captions.texts[j] + number + ("" if right else f" WRONG: {thing}"))
                chosen.append(p)
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
    maps(out / "tokens.png", token_rows(dataset, found, show, few), title)
    title = f"The maps of the tokens, mixed by the weights of a caption{note}"
    maps(out / "captions.png", caption_rows(dataset, found, captions, show), title)
    columns = {"score lost by true captions without the token that they use most": "true, %"}
    columns |= {"score lost by false captions without that token": "false, %"}
    columns |= {"lead of true captions lost": "lead lost, %", "lead lost without another token": "another, %"}
    parts = {
        r["topic"]: {k: (r[v], 0.0) for k, v in columns.items()} for r in tables["ablation"] if "lead" in r
    }
    if parts:
        bars(out / "ablation.png", parts, "A token is removed before the softmax: changes in % of the lead")
    print(f"pictures in {out}")
