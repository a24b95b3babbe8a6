"""docs/first_hour.ipynb: a valid notebook without outputs, and its cells run without Jupyter."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = json.loads((DOCS / "first_hour.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_of_format_4():
    """The required fields of nbformat 4.5; a cell has other fields if it is code."""
    assert set(NOTEBOOK) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    for cell in NOTEBOOK["cells"]:
        fields = {"cell_type", "id", "metadata", "source"}
        fields |= {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == fields and cell["cell_type"] in ("code", "markdown"), cell
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(isinstance(line, str) for line in cell["source"])
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)


def test_it_stores_no_outputs():
    """Stored outputs would hold old numbers and names of folders."""
    for cell in NOTEBOOK["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


def test_every_code_cell_compiles_and_imports_what_it_uses():
    known = set(dir(__builtins__)) | set(dir(__import__("builtins")))
    for text in CODE:
        compile(text, "cell", "exec")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
            elif isinstance(node, ast.FunctionDef):
                known |= {node.name, *(a.arg for a in [*node.args.args, node.args.vararg] if a)}
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert used <= known, f"a cell uses {used - known} before any cell defines it"


@pytest.mark.slow
def test_the_cells_run_without_jupyter_and_run_again(tmp_path):
    """In docs/, where Jupyter starts a kernel; the second time it continues the runs of the first."""
    sizes = {"FIRST_HOUR_RUNS": str(tmp_path), "FIRST_HOUR_STEPS": "3", "FIRST_HOUR_LIMIT": "32"}
    (tmp_path / "cells.py").write_text("\n".join(CODE))
    shown = []
    for _ in range(2):
        command = [sys.executable, str(tmp_path / "cells.py")]
        done = subprocess.run(command, cwd=DOCS, env=os.environ | sizes, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        shown.append(done.stdout)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    pictures = "llip/curves mixtures/weights mixtures/names map scene thing map-before map-after"
    assert {f"{name}.png" for name in pictures.split()} <= written
    assert "accuracy on cartoons" in shown[0] and "largest weight in each head" in shown[0]
    assert "step" in shown[0] and (tmp_path / "alignclip" / "checkpoint.pt").exists()
    # cosines of an image's features under six captions, 1 on the diagonal
    rows = re.findall(r"^a red tractor +1\.00((?: +-?\d\.\d\d){5})$", shown[0], flags=re.M)
    assert len(rows) == 1
