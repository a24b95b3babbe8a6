"""Lines, bars, matrices and contact sheets, drawn with Pillow alone."""

import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from util.files import write_image
from util.text import number

# Okabe and Ito's palette, which readers with any colour vision can distinguish
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
INK, GRID = "#222222", "#dddddd"
MAX_WIDTH = 1600


def write(draw, where: tuple[float, float], text: str, size: int = 12, anchor: str = "la", fill=INK) -> None:
    # Pillow's font lacks all other characters
    text = text.encode("latin-1", "replace").decode("latin-1")
    draw.text(where, text, fill, ImageFont.load_default(size), anchor)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within low..high: ticks(0, 0.83) -> [0.0, 0.2, 0.4, 0.6, 0.8]."""
    if not 0 < (span := high - low) < math.inf:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= count)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def colour(k: int) -> tuple[int, int, int]:
    """The k-th colour; from the ninth on, the colours repeat in lighter shades."""
    row, k = divmod(k, len(COLOURS))
    return tuple(round(255 - 0.6**row * (255 - part)) for part in ImageColor.getrgb(COLOURS[k]))


def legend(draw, x: float, y: float, label: str, k: int) -> None:
    draw.rectangle([x, y + 3, x + 10, y + 12], fill=colour(k))
    write(draw, (x + 16, y), label)


class Canvas:
    """A panel with axes. x() and y() turn data coordinates into pixels. Without xlim, x has no numbers."""

    def __init__(self, draw, box, xlim, ylim, title, xlabel=""):
        self.left, self.top, self.right, self.bottom = box
        self.xlim, self.ylim = xlim, ylim
        write(draw, (self.left, self.top - 22), title, 14)
        for t in ticks(*ylim):
            draw.line([(self.left, self.y(t)), (self.right, self.y(t))], fill=GRID)
            write(draw, (self.left - 6, self.y(t)), number(t), 11, "rm")
        for t in ticks(*xlim) if xlim else []:
            write(draw, (self.x(t), self.bottom + 5), number(t), 11, "mt")
        write(draw, ((self.left + self.right) / 2, self.bottom + 20), xlabel, 12, "mt")
        draw.rectangle(box, outline=INK)

    def x(self, value: float) -> float:
        return float(np.interp(value, self.xlim, (self.left, self.right)))

    def y(self, value: float) -> float:
        return float(np.interp(value, self.ylim, (self.bottom, self.top)))


def limits(values: list[float]) -> tuple[float, float]:
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    pad = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - pad, high + pad


def lines(path: str | Path, panels: dict[str, dict[str, list]], xlabel: str = "step", levels=None) -> None:
    """Writes line charts {title: {label: [(x, y), ...]}}, with dotted levels {title: {label: y}}."""
    width, height, margin = 420, 260, 60
    legend_rows = (max(map(len, panels.values())) + 1) // 2
    image = Image.new("RGB", ((width + margin) * len(panels) + 30, height + 85 + 15 * legend_rows), "white")
    draw = ImageDraw.Draw(image)
    for n, (title, series) in enumerate(panels.items()):
        xs, ys = zip(*([p for line in series.values() for p in line] or [(0, 0)]))
        left, xlim = margin + n * (width + margin), (min(xs), max(xs) or 1)
        dotted = (levels or {}).get(title, {})
        ylim = limits([*ys, *dotted.values()])
        panel = Canvas(draw, (left, 40, left + width, 40 + height), xlim, ylim, title, xlabel)
        for k, (label, line) in enumerate(series.items()):
            line = [(panel.x(x), panel.y(y)) for x, y in line if math.isfinite(y)]
            if len(line) > 1:
                draw.line(line, fill=colour(k), width=2, joint="curve")
            for x, y in line if len(line) < 30 else line[-1:]:
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour(k))
            for x in range(left, left + width, 8) if label in dotted else ():
                draw.line([(x, panel.y(dotted[label])), (x + 3, panel.y(dotted[label]))], fill=colour(k))
            legend(draw, left + 4 + (k % 2) * width // 2, 76 + height + 15 * (k // 2), label, k)
    write_image(path, image)


def bars(path: str | Path, groups: dict[str, dict[str, tuple[float, float]]], title: str = "") -> None:
    """Writes grouped bars from zero: {group: {label: (mean, spread)}}. A whisker shows mean +- spread."""
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    each, gap, height = 34, 30, 260
    slot = max(max(len(g) * each, 7 * len(name)) for name, g in groups.items()) + gap
    width = slot * len(groups) + gap
    wide = max(width, 8 * max(map(len, labels)) + 30, 8 * len(title))
    image = Image.new("RGB", (wide + 80, height + 90 + 18 * len(labels)), "white")
    draw = ImageDraw.Draw(image)
    low, high = limits([v for g in groups.values() for m, s in g.values() for v in (m + s, m - s, 0)])
    # room for the number above the highest whisker, and none below zero without a bar there
    high += 0.06 * (high - low)
    ylim, start = (0 if low > -0.06 * high else low, high), 60 + gap
    panel = Canvas(draw, (60, 40, 60 + width, 40 + height), None, ylim, title)
    for name, group in groups.items():
        left = start + (slot - gap - len(group) * each) / 2
        for label, (mean, spread) in group.items():
            top, bottom = sorted((panel.y(mean), panel.y(0)))
            draw.rectangle([left, top, left + each - 6, bottom], fill=colour(labels.index(label)))
            x, highest = left + (each - 6) / 2, panel.y(mean + spread)
            draw.line([(x, panel.y(mean - spread)), (x, highest)], fill=INK, width=2)
            write(draw, (x, min(top, highest) - 4), number(mean), 10, "mb")
            left += each
        write(draw, (start + (slot - gap) / 2, 44 + height), name, 12, "ma")
        start += slot
    for k, label in enumerate(labels):
        legend(draw, 64, 70 + height + 18 * k, label, k)
    write_image(path, image)


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] (...) to colours (..., 3) uint8: dark blue, teal, yellow, ever lighter."""
    stops = np.array([[13, 8, 60], [33, 82, 140], [32, 145, 140], [94, 201, 98], [253, 231, 37]], float)
    channels = [np.interp(np.nan_to_num(values), np.linspace(0, 1, len(stops)), part) for part in stops.T]
    return np.stack(channels, -1).round().astype(np.uint8)


def sheet(pictures: list, texts: list[str], columns: int, tile: int = 128, title: str = "") -> Image.Image:
    """A contact sheet: pictures (Pillow or (H, W, 3) uint8), the longer side `tile`, each above its text."""
    gap, top = 6, 26 if title else 2
    columns = max(1, min(columns, len(pictures), MAX_WIDTH // 70))
    tile = min(tile, MAX_WIDTH // columns - gap)
    images = [fit(p if isinstance(p, Image.Image) else Image.fromarray(p), tile) for p in pictures]
    wrap = textwrap.TextWrapper(max(tile // 6, 4), max_lines=3, placeholder=" ...")
    lines = [wrap.wrap(text) for text in texts]
    high = max((image.height for image in images), default=tile) + 6 + 15 * max(map(len, lines), default=0)
    width = max(columns * (tile + gap), min(MAX_WIDTH, 8 * len(title)))
    page = Image.new("RGB", (width, top + -(-len(images) // columns) * high), "white")
    draw = ImageDraw.Draw(page)
    write(draw, (4, 4), title, 14)
    for k, (image, text) in enumerate(zip(images, lines)):
        x, y = k % columns * (tile + gap), top + k // columns * high
        page.paste(image, (x, y))
        write(draw, (x + 1, y + image.height), "\n".join(text), 11)
    return page


def fit(image: Image.Image, tile: int) -> Image.Image:
    """The image with its longer side scaled to `tile` pixels."""
    size = tuple(max(1, round(tile / max(image.size) * side)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if size > image.size else Image.Resampling.BICUBIC)


def matrix(path: str | Path, values: np.ndarray, rows: list, columns: list, title: str = "") -> None:
    """Writes a labelled matrix as coloured cells, with numbers in large cells; nan is a gap."""
    cell = int(np.clip(900 / max(values.shape), 8, 44))
    left = 20 + 7 * max(map(len, rows))
    top = 50 + 7 * max(map(len, columns))
    width = max(left + cell * len(columns) + 30, 9 * len(title))
    image = Image.new("RGB", (width, top + cell * len(rows) + 20), "white")
    draw = ImageDraw.Draw(image)
    write(draw, (10, 8), title, 14)
    low, high = np.nanmin(values), np.nanmax(values)
    colours = heat((values - low) / ((high - low) or 1))
    for i, row in enumerate(rows):
        write(draw, (left - 6, top + (i + 0.5) * cell), row, 12, "rm")
        for j in np.flatnonzero(~np.isnan(values[i])).tolist():
            x, y, value = left + j * cell, top + i * cell, values[i, j]
            draw.rectangle([x, y, x + cell - 2, y + cell - 2], fill=tuple(colours[i, j].tolist()))
            if cell >= 30:
                ink = "black" if colours[i, j].mean() > 110 else "white"
                write(draw, (x + cell / 2, y + cell / 2), number(value), 10, "mm", ink)
    # the names of the columns are drawn on strips and turned by 90 degrees
    for j, column in enumerate(columns):
        strip = Image.new("RGB", (top - 34, 16), "white")
        write(ImageDraw.Draw(strip), (0, 1), column)
        image.paste(strip.rotate(90, expand=True), (left + j * cell + (cell - 16) // 2, 30))
    write_image(path, image)
