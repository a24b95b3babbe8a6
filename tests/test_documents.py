"""README, docs/ and the notebook: every link to a file, a picture or a heading leads somewhere."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from lab import bench

ROOT = Path(__file__).resolve().parent.parent
MARKDOWN = [ROOT / "README.md", ROOT / "tests" / "golden" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS = [*MARKDOWN, *sorted(ROOT.glob("docs/*.ipynb"))]
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@cache
def prose(path: Path) -> str:
    """The text of a document outside of code."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)


def links(path: Path) -> list[str]:
    """Targets without those on the web."""
    targets = (a or b for a, b in LINK.findall(prose(path)))
    return [target for target in targets if not re.match(r"https?:|mailto:", target)]


def anchors(path: Path) -> list[str]:
    """The anchors of the headings, as GitHub forms them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_or_a_heading(path):
    for target in links(path):
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert other.exists(), f"{path.name} links to {target}"
        assert ROOT in other.resolve().parents, f"{target} leads out of the project"
        if anchor:
            assert anchors(other).count(anchor) == 1, f"{path.name} links to {target}, no heading or several"


def test_every_document_and_picture_is_linked():
    """From README, or from a document that README links."""
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        seen.add(path)
        if path in DOCUMENTS:
            found = {(path.parent / t.partition("#")[0]).resolve() for t in links(path) if t[0] != "#"}
            todo += sorted(found - seen)
    wanted = {*DOCUMENTS, *ROOT.glob("docs/*.png")}
    assert not {path.name for path in wanted - seen}


def test_pictures_are_small():
    """A clone should stay small: all pictures together below 600 kB."""
    assert sum(path.stat().st_size for path in ROOT.glob("docs/*.png")) < 600_000


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_formulas_and_code_are_closed(path):
    text = path.read_text()
    assert len(re.findall(r"^```", text, flags=re.M)) % 2 == 0
    assert text.count("$$") % 2 == 0
    # GitHub reads $...$ as a formula: a shell variable in prose must be code
    outside = re.sub(
        r"^\$\$\n.*?^\$\$\n",
        "",
        re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S),
        flags=re.M | re.S,
    )
    assert "$" not in outside


def test_speed_shows_sections_that_the_benchmark_has():
    text = (ROOT / "docs" / "speed.md").read_text()
    table = text[text.index("| section |") :].split("\n\n")[0]
    sections = re.findall(r"^\| (\w+) \|", table, flags=re.M)
    assert len(sections) > 4 and set(sections) <= {"section", *bench.SECTIONS}


def test_readme_compares_with_the_figures_of_evaluation():
    found = re.search(
        r"CLIP and SigLIP reach (\S+) and (\S+) for `i2t_map`, but (\S+) and (\S+) for `i2t@1`",
        (ROOT / "README.md").read_text(),
    )
    rows = [line.split("|") for line in (ROOT / "docs" / "evaluation.md").read_text().splitlines()]
    mean = [row for row in rows if row[1:2] == [" captions of an image, mAP "]][0]
    first = [row for row in rows if "image to text R@1" in "".join(row[1:2])][0]
    # columns: figure, chance, CLIP, SigLIP
    columns = [cell.replace("*", "").split()[0] for row in (mean, first) for cell in row[3:5]]
    assert list(found.groups()) == columns


def test_readme_has_the_summary_of_the_evidence():
    """The sentence that lab/evidence.py writes as the third paragraph of docs/evidence.md."""
    paragraphs = EVIDENCE.split("\n\n")
    [sentence] = [text for text in paragraphs[:4] if re.match(r"Of \d+ claims ", text)]
    assert sentence in " ".join((ROOT / "README.md").read_text().split())


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_verdicts_in_papers_md_are_those_of_the_evidence():
    verdicts = {row[0]: row[2] for row in map(cells, EVIDENCE.splitlines()) if len(row) == 5}
    text = " ".join((ROOT / "docs" / "papers.md").read_text().split())
    shown = re.findall(r"\*\*([a-z ]+)\*\*(?: as released)? \(([AL]\d+)\b", text)
    assert len(shown) == 7 and all(verdicts[claim] == verdict for verdict, claim in shown)


def test_the_finding_in_papers_md_has_the_numbers_of_f1():
    """Each row of the first table: lifts before, gains, and accuracy, rounded."""
    table = {row[0]: row[1:] for row in map(cells, EVIDENCE.split("## F1 ")[1].split("## ")[0].splitlines())}
    paper = (ROOT / "docs" / "papers.md").read_text().split("### A finding: the guidance")[1]
    rows = [row for row in map(cells, paper.splitlines()) if row[0].startswith(("three", "twelve"))]
    prefixes = {"three": "", "three, half the rate": "slow ", "twelve": "deep "}
    assert len(rows) == 9
    for blocks, kind, *shown in rows:
        columns = table[prefixes[blocks] + kind]
        for cell, n in zip(shown, (0, 2, 1, 3, 4), strict=True):
            there = [float(number) for number in columns[n].split(" +- ")]
            here, digits = [float(number) for number in cell.split(" ± ")], len(cell.split(".")[-1])
            # the evidence has errors of two digits
            near = [0.51 * 10**-digits, 0.51 * 10**-digits + 0.05 * there[1]]
            assert all(abs(a - b) < c for a, b, c in zip(here, there, near, strict=True)), (kind, cell)
