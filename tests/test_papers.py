"""docs/papers.md: code equal to the source, numbers that the programs print, links that lead somewhere."""

import re

import papers
import pytest

PAGE = papers.PAGE.read_text()
# every term that a reader of the two papers may search for
TERMS = """AAL, A_c, Algorithm 1, AS, BMA, CLIP Surgery, CLIPood, D-V, G, GFLOPs, InfoNCE, K-K, L_sim, MMS,
Phi, Q-Q, SLS, Siamese, SigLIP, T_y, V-V-V, W_O, alpha, attention misalignment, category misalignment,
class similarity matrix, detach, epsilon, ladder, lambda, learned average, mixture token, patch tokens,
prompt ensemble, register, retrieval, similarity map, spectrum, tau, temperature, theta, visual token, w"""
# headings of "###" that are no equation
NO_EQUATION = r"A finding|Worked example|The line that decides|.*, figures? \d.*: "


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


def entries() -> dict[str, str]:
    """The text under every heading of an equation."""
    parts = re.split(r"^### (.+)\n", PAGE[: PAGE.index("\n## Details")], flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2]))
    return {heading: text for heading, text in sections.items() if not re.match(NO_EQUATION, heading)}


def test_every_equation_of_both_papers_has_an_entry():
    wanted = (
        "equation 1, equation 2, equation 3, equation 4, equation 6, L_sim, A_c, Guidance, D-V, Zero-shot"
    )
    wanted += (
        ", label smoothing, Algorithm 1, margin metric, Beta moving average, figure 3, figure 5, figure 7"
    )
    for name in [*wanted.split(", "), "figure 8", "Keys, values and queries", "InfoNCE"]:
        assert any(name in heading for heading in entries()), name


@pytest.mark.parametrize("heading", entries())
def test_an_entry_has_sentences_equation_code_shapes_and_the_released_code(heading):
    text = entries()[heading]
    prose, formula, rest = text.split("$$\n", 2)
    assert len(re.findall(r"\.(?=\s)", prose)) == 3, f"{heading}: three sentences first"
    assert formula.strip() and rest.startswith("\n<!-- code"), f"{heading}: code follows the equation"
    assert re.search(r"^```\n\nShapes: ", rest, flags=re.M), f"{heading}: shapes follow the code"
    assert re.search(r"\n\nReleased code\b", rest), heading


def test_the_contents_name_functions_that_exist_and_reach_every_entry():
    contents = PAGE[: PAGE.index("\n## Llip")]
    for heading in entries():
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        assert f"(#{anchor})" in contents, heading
    for row in re.findall(r"^\|.*\]\(#.*\| (`.*`) \|$", contents, flags=re.M):
        for name in re.findall(r"`([\w.]+)`", row):
            assert re.search(rf", `{name}(\.\w+)?`:$", PAGE, flags=re.M), f"the page shows no code of {name}"


def test_search_terms_lead_to_an_entry():
    glossary = PAGE[PAGE.index("\n## Search terms") :]
    for term in re.split(r",\s", TERMS):
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
