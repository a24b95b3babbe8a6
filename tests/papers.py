"""Fills docs/papers.md with code from the source and with the numbers that programs print.

    python tests/papers.py

The page contains markers, and the block of code after a marker is written by this script:

    <!-- code FILE FUNCTION -->                      the function without its docstring
    <!-- code FILE FUNCTION: FIRST ... LAST -->      from the line with FIRST to the next one with LAST
    <!-- output FILE -->                             what `python FILE` prints
"""

import ast
import contextlib
import io
import re
import runpy
import sys
import textwrap
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "papers.md"
MARKER = re.compile(
    r"^<!-- (?P<what>code|output) (?P<file>[\w./]+)(?: (?P<function>[\w.]+))?(?:: (?P<lines>.+?))? -->\n"
    r"(?:\n\[`.+\n)?(?:\n```\w+\n(?P<block>(?:(?!```).*\n)*)```\n)?",
    re.M,
)


def code(file: str, function: str, lines: str | None = None) -> str:
    """The source of a function, given as name or Class.name, without its docstring."""
    source, node = (ROOT / file).read_text(), None
    for name in function.split("."):
        body = (node or ast.parse(source)).body
        node = next((n for n in body if getattr(n, "name", "") == name), None)
        if node is None:
            raise ValueError(f"{PAGE.name}: {file} has no {function}")
    found = source.splitlines()[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node):
        start, end = (n - node.lineno for n in (node.body[0].lineno, node.body[0].end_lineno))
        found = found[:start] + found[end + 1 :]
    if lines:
        first, last = lines.split(" ... ") if " ... " in lines else (lines, lines)
        start = next((i for i, line in enumerate(found) if first in line), None)
        end = next(
            (i for i, line in enumerate(found) if last in line and start is not None and i >= start), None
        )
        if end is None:
            raise ValueError(f"{PAGE.name}: {function} of {file} has no lines {lines!r}")
        found = found[start : end + 1]
    return textwrap.dedent("\n".join(found)) + "\n"


def output(file: str) -> str:
    """What the program prints."""
    printed = io.StringIO()
    sys.path.insert(0, str(ROOT))
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / file), run_name="__main__")
    return printed.getvalue()


def fill(page: str, with_output: bool = True) -> str:
    """The page with every generated block renewed; without output, the printed numbers stay as they are."""

    def block(match: re.Match) -> str:
        marker, file = match[0].splitlines()[0], match["file"]
        if match["what"] == "code":
            text = code(file, match["function"], match["lines"])
            return f"{marker}\n\n[`{file}`](../{file}), `{match['function']}`:\n\n```python\n{text}```\n"
        return f"{marker}\n\n```text\n{output(file)}```\n" if with_output else match[0]

    return MARKER.sub(block, page)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
