"""docs/papers.md: code equal to the source, numbers that the programs print, links that lead somewhere."""

import re

import papers
import pytest

PAGE = papers.PAGE.read_text()
# every term that a reader of the two papers may search for
TERMS = "AAL, A_c, Algorithm 1, BMA, D-V, G, L_sim, MMS, Phi, SLS, Siamese, attention misalignment"
TERMS += ", category misalignment, mixture token, tau, theta"


def test_the_code_on_the_page_is_that_of_the_source():
    filled = papers.fill(PAGE, with_output=False)
    assert filled == PAGE, "docs/papers.md differs from the source: run  python tests/papers.py"


@pytest.mark.parametrize("file", ["llip.py", "alignclip.py"])
def test_the_worked_example_prints_the_numbers_of_the_page(file):
    (shown,) = [
        m["block"] for m in papers.MARKER.finditer(PAGE) if (m["what"], m["file"]) == ("output", file)
    ]
    printed, number = papers.output(file), r"-?\d+\.\d+"
    words = [re.sub(number, "#", text).split() for text in (shown, printed)]
    assert words[0] == words[1], "run  python tests/papers.py"
    values = [[float(x) for x in re.findall(number, text)] for text in (shown, printed)]
    assert values[0] == pytest.approx(values[1], abs=0.0015, rel=1e-3)


def test_every_equation_of_both_papers_has_an_entry():
    for heading in ("Llip", "AlignCLIP"):
        assert re.search(rf"^## {heading}\b", PAGE, flags=re.M)
    for name in (
        "equation 1",
        "equation 2",
        "equation 3",
        "Zero-shot rule",
        "equation 4",
        "equation 6",
        "L_sim",
    ):
        assert re.search(rf"^### .*{name}", PAGE, flags=re.M), name
    assert PAGE.count("<!-- code") >= 20


def test_search_terms_lead_to_an_entry():
    glossary = PAGE[PAGE.index("\n## Search terms") :]
    for term in TERMS.split(", "):
        assert re.search(rf"^\| [^|]*(?<!\w){re.escape(term)}(?!\w)[^|]*\|.*\]\(#", glossary, flags=re.M), (
            term
        )


def test_formulas_survive_every_markdown_viewer():
    """A viewer may read the Markdown inside of $$: no escapes, no emphasis, and empty lines around."""
    formulas = re.findall(r"^\$\$\n(.*?)\n\$\$$", PAGE, flags=re.M | re.S)
    assert len(formulas) >= 12 and PAGE.count("$$") == 2 * len(formulas)
    assert PAGE.count("\n\n$$\n") == PAGE.count("\n$$\n\n") == len(formulas)
    for formula in formulas:
        assert not re.search(r"\\[^a-zA-Z]|[^\w]_|\*|<|\n\n", formula), formula
        for opening, closing in (("{", "}"), (r"\left(", r"\right)")):
            assert formula.count(opening) == formula.count(closing), formula
