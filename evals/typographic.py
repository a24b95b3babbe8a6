"""Typographic attack: how often a wrong class name, written on the image, becomes the answer.

    python -m evals.typographic --model runs/llip --more runs/clip --data PACS --out typographic

Lavoie et al. show one such image in their rebuttal, an apple with "iPod" on it. This program evaluates a data
set. A blank note in the same place shows the effect of covering a part of the image.
"""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import evaluate
from model import DualEncoder
from readers import templates as prompts
from util.evaluation import SeveralFlags, each_model, options_of, start, write_results
from util.flags import parse
from util.metrics import no_nan, places
from util.program import leave, program
from util.report import format_table

COLUMNS = {"top1": "top-1 %", "word": "answers the word %", "object_wins": "object wins %"}


def with_note(image: Image.Image, word: str, blank: bool = False) -> Image.Image:
    """The image with a white note and the word in black on it, or (blank) the note alone.

    The note is inside the centre crop. The word takes at most 0.9 of its width and 0.25 of its height.
    """
    image = image.convert("RGB").copy()
    draw, side = ImageDraw.Draw(image), min(image.size)
    for size in range(max(side // 4, 5), 4, -1):
        font = ImageFont.load_default(size)
        left, top, right, bottom = draw.textbbox((0, 0), word, font)
        if right - left <= 0.9 * side and bottom - top <= 0.25 * side:
            break
    pad = max(1, side // 64)
    x = (image.width - (right - left)) // 2
    y = (image.height + side) // 2 - (bottom - top) - 2 * pad - side // 16
    draw.rectangle([x - pad, y - pad, x + right - left + pad, y + bottom - top + pad], "white")
    if not blank:
        draw.text((x - left, y - top), word, "black", font)
    return image


class Noted(data.Subset):
    """Labelled data with a note on every image, with_note(image i, words[i], blank)."""

    def __init__(self, dataset, words: list[str], blank: bool = False):
        super().__init__(dataset)
        self.words, self.blank, self.pixels = words, blank, None  # pixels would be used instead of image()

    def image(self, i: int) -> Image.Image:
        return with_note(super().image(i), self.words[i], self.blank)


def wrong_labels(labels: list[int], classes: int, seed: int = 0) -> list[int]:
    """Another class for every image, uniformly drawn.   Raises: ValueError for one class."""
    if classes < 2:
        raise ValueError("one class: there is no wrong name to write on its images")
    steps = [1 + data.generator(seed, "word", i).randrange(classes - 1) for i in range(len(labels))]
    return [(y + step) % classes for y, step in zip(labels, steps)]


def note_figures(scores: dict, labels: Tensor, written: Tensor, cosine: bool = True) -> dict[str, dict]:
    """The effect of notes, for each kind of image.

    Args:    scores {"clean" | "blank" | "word": (N, C)};  labels (N,), written (N,) classes
    Returns: for each kind in [0, 1] "top1"; "word": the answer is the written class; "object_wins": the right
             class scores above the written one; "success": share of the images with the right answer when
             clean that now get the written class; if scores are cosines their means "cos_object", "cos_word"
    """
    right = places(scores["clean"], labels) == 0  # (N,)
    figures = {}
    for kind, rows in scores.items():
        place, answer = places(rows, labels), no_nan(rows).argmax(1)  # (N,) each
        own, other = (rows.gather(1, c[:, None])[:, 0] for c in (labels, written))  # (N,) each
        taken = (answer == written) & (place > 0)
        means = {"top1": place == 0, "word": taken, "object_wins": own > other, "success": taken[right]}
        means |= {"cos_object": own, "cos_word": other} if cosine else {}
        figures[kind] = {name: x.double().mean().item() if len(x) else 0.0 for name, x in means.items()}
    return figures


def typographic(model: DualEncoder, dataset, tokenizer, templates=prompts.PHOTO, seed=0, **options) -> dict:
    """note_figures of clean images, the same with a blank note, and with a wrong class name on the note."""
    written, scores = wrong_labels(dataset.labels, len(dataset.classes), seed), {}
    words = [dataset.classes[c] for c in written]
    kinds = {"clean": dataset, "blank": Noted(dataset, words, True), "word": Noted(dataset, words)}
    with evaluate.evaluating(model):
        sizes = evaluate.text_options(options)
        text = evaluate.encode_classes(model, tokenizer, dataset.classes, templates, **sizes)
        for kind, noted in kinds.items():
            label = f"{options['progress']}, {kind}" if options.get("progress") else ""
            batches = evaluate.score_rows(model, noted, text, **options | {"progress": label})
            rows = torch.cat([rows for _, rows in batches])  # (N, C)
            # learned prompts have no scale: their scores stay unchanged
            if model.takes_captions:
                rows = (rows - (model.logit_bias or 0.0)) / model.logit_scale.exp()
            scores[kind] = rows.cpu()
    labels, target = torch.tensor(dataset.labels), torch.tensor(written)
    return note_figures(scores, labels, target, model.takes_captions)


@dataclass(frozen=True, kw_only=True)
class Flags(SeveralFlags):
    templates: tuple[str, ...] = ()  # as for evaluate.py zeroshot (default: the data's own)
    seed: int = 0  # of the words that are written


@program
def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, __doc__)
    device, rows, results = start(flags, one_process=True), [], {}
    for source, model, tokenizer in each_model(flags, device, evaluate.open_model):
        dataset = evaluate.open_data(flags, model, "labels")
        templates = evaluate.templates_of(flags.templates, flags.data)
        options = options_of(flags, f"typographic {source}")
        results[source] = typographic(model, dataset, tokenizer, templates, flags.seed, **options)
        for kind, figures in results[source].items():
            row = {"model": source, "image": kind}
            row |= {head: 100 * figures[key] for key, head in COLUMNS.items()}
            row["attack success %"] = 100 * figures["success"] if kind == "word" else ""
            rows.append(row | {x.replace("_", " "): f"{v:.4f}" for x, v in figures.items() if "cos_" in x})
    print(format_table(rows, digits=2))
    C = len(dataset.classes)
    print(f"images {len(dataset):,}  classes {C}  chance {100 / C:.2f} %")
    content = {"task": "typographic", "data": flags.data, "models": [*results], "seed": flags.seed}
    write_results(flags, content | {"chance": 1 / C, "results": results})


if __name__ == "__main__":
    leave(main())
