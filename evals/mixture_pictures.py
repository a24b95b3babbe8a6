"""Pictures of evals/mixtures.py: weights by caption, names of tokens, maps on images, removal of tokens."""

from collections import Counter
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import data
from evals import surgery
from readers import scenes
from util.files import write_image
from util.plots import GRID, bars, heat, matrix, sheet


def kinds_in(dataset: scenes.Scenes, i: int) -> list[str]:
    return [scenes.KINDS[k] for k in dataset.facts["kind"][i].tolist() if k >= 0]


def weights(path: Path, phi: Tensor, rows: dict[str, list[int]], texts: list[str], tokens: list[int]) -> None:
    """Writes mean weights (T, H, M): a row for each caption in `rows`, columns for the heads and tokens."""
    uniform, phi = 1 / phi.shape[2], F.pad(phi[:, :, tokens], (0, 1), value=torch.nan)  # (T, H, M + 1)
    names, lines = [], []
    for topic, some in rows.items():
        short = [shorten(texts[j], 44, placeholder="...") for j in some]
        names += [f"{topic}: {text}" if topic else text for text in short] + [""]
        lines += [*phi[some].flatten(1), torch.full((phi[0].numel(),), torch.nan)]
    columns = [name for h in range(phi.shape[1]) for name in [*(f"head {h}, token {k}" for k in tokens), ""]]
    values = torch.stack(lines)[:-1, :-1].numpy()
    colours = f"dark blue {np.nanmin(values):.2g}, yellow {np.nanmax(values):.2g}; {uniform:.3g} is uniform"
    title = f"Mean weight of each token for each caption: {colours}"
    matrix(path, values, names[:-1], columns[:-1], title)


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
    return Image.fromarray(data.preprocess(surgery.TILE).pixels(dataset.image(i))), Path(dataset.name(i)).name


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
    """Writes all pictures to a folder. Of many tokens those with the largest weights are drawn."""
    means = found["by_caption"][..., : found["maps"].shape[-1]]
    most = min(16, 144 // means.shape[1])  # tokens that fit into the width of weights.png
    order = means.mean((0, 1)).argsort(descending=True).tolist()
    few = sorted(order[:8])
    weights(out / "weights.png", means, captions.rows, captions.texts, sorted(order[:most]))
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
