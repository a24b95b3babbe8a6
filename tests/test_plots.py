"""plots.py: what a look at a picture relies on, read back from its pixels."""

import numpy as np
import pytest
from PIL import Image

from util import plots


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), int)


def area(picture, colour):
    """Rows and columns of the pixels of one colour."""
    return np.nonzero((picture == np.array(colour)).all(-1))


def square(picture, k) -> bool:
    """Is the whole 11 x 10 square of the k-th label in the picture?"""
    rows, columns = area(picture, plots.colour(k))
    return any((picture[y : y + 10, x : x + 11] == plots.colour(k)).all() for y, x in zip(rows, columns))


def test_every_line_is_named_below(tmp_path):
    for count in (1, 4, 7):
        series = {f"seed {k}": [(1, k), (2, k + 1), (3, k)] for k in range(count)}
        plots.lines(tmp_path / "a.png", {"one": series, "two": {"short": [(1, 1)]}})
        picture = pixels(tmp_path / "a.png")
        assert all(square(picture, k) for k in range(count))
        assert (picture[-3:] == 255).all()  # nothing is cut off


def test_a_level_is_a_dotted_line_in_the_colour_of_its_label(tmp_path):
    """It may lie outside of the values, and a label without one has none."""
    series = {"a": [(0, 60.0), (1, 80.0)], "b": [(0, 70.0), (1, 90.0)]}
    rows = []
    for name, levels in (("with", {"one": {"b": 10.0}}), ("without", None)):
        plots.lines(tmp_path / f"{name}.png", {"one": series}, levels=levels)
        picture = pixels(tmp_path / f"{name}.png")[:300, :480]
        counts = (picture == np.array(plots.colour(1))).all(-1).sum(1)
        rows.append((counts > 150).any())
    assert rows == [True, False]


def test_bars_stand_on_zero_or_hang_from_it(tmp_path):
    plots.bars(tmp_path / "a.png", {"g": {"loss": (-1.0, 0.1), "gain": (2.0, 0.1)}})
    picture = pixels(tmp_path / "a.png")[:300]
    below, above = (area(picture, plots.colour(k))[0] for k in (0, 1))
    assert above.max() <= below.min() + 1
    assert np.ptp(above) == pytest.approx(2 * np.ptp(below), abs=2)


@pytest.mark.parametrize("values", [(88.8, 3.0), (0.5, 0.5), (1.0, 0.0), (-1.0, 0.2)])
def test_the_number_of_the_highest_bar_is_inside_the_frame(tmp_path, values):
    plots.bars(tmp_path / "a.png", {"g": {"a": values, "b": (values[0] / 2, 0.0)}})
    assert (pixels(tmp_path / "a.png")[41:44, 62:100] == 255).all()


def test_eleven_bars_have_eleven_colours(tmp_path):
    assert len({plots.colour(k) for k in range(24)}) == 24
    plots.bars(tmp_path / "a.png", {"g": {f"arm {k}": (1.0 + k, 0.1) for k in range(11)}}, "title")
    picture = pixels(tmp_path / "a.png")
    assert all(square(picture, k) for k in range(11))


def test_a_matrix_and_nothing_to_show(tmp_path):
    plots.matrix(tmp_path / "a.png", np.eye(3), list("abc"), list("abc"), "cosines")
    assert len(np.unique(pixels(tmp_path / "a.png").reshape(-1, 3), axis=0)) > 3
    plots.lines(tmp_path / "b.png", {"training loss": {"loss": []}})
    plots.bars(tmp_path / "c.png", {"g": {"a": (0.0, 0.0)}})


def test_a_sheet_is_narrow_and_shows_every_picture_and_text():
    colours = [(200, 10 * k, 0) for k in range(20)]
    tiles = [Image.new("RGB", (10, 5 + k), rgb) for k, rgb in enumerate(colours)]
    for columns in (1, 7, 20, 10**6):
        page = plots.sheet(tiles, [f"text {k} " * 20 for k in range(20)], columns, title="title")
        assert page.width <= plots.MAX_WIDTH
        shown = {tuple(rgb) for rgb in np.asarray(page).reshape(-1, 3).tolist()}
        assert set(colours) <= shown
    row = plots.sheet(tiles[:2], ["a", "b"], 2, 60)
    assert row.size == (2 * 66, 2 + 36 + 21)  # pictures of 60 x 30 and 60 x 36, and a line of text
    array = np.zeros((4, 4, 3), np.uint8)
    plots.sheet([array], ["\u72ac \U0001f415"], 1)
    plots.sheet([], [], 3)
