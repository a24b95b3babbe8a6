"""The house itself: arrows between modules, README's commands, the six packages."""

import ast
import contextlib
import importlib
import io
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {p.stem for p in ROOT.glob("*.py")}
README = (ROOT / "README.md").read_text()


def imports(module: str, everywhere: bool = False) -> set[str]:
    """Modules of the project that a module imports at its top (or anywhere)."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & MODULES


def test_imports_have_no_cycle():
    @cache
    def depth(module):
        return 1 + max(map(depth, imports(module)), default=0)

    assert max(map(depth, MODULES)) < 20  # a cycle would not return


def test_the_lowest_level_imports_nothing():
    lowest = "attention tokenizer losses distributed scenes options report images tiles"
    for module in lowest.split():
        assert imports(module) == set(), module
    assert imports("plots") == {"report"}  # which writes files whole


def test_models_know_no_method_and_losses_no_model():
    assert imports("model", everywhere=True) == {"attention"}
    assert imports("losses", everywhere=True) == set()
    assert imports("llip", everywhere=True) == {"model", "tiles"}


def test_importing_prints_and_loads_nothing():
    others = "{'transformers', 'open_clip', 'torchvision'}"
    code = f"import sys; import train; print(sorted({others} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_six_packages_and_a_pinned_torch():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert lines[0].startswith("torch==")
    assert {re.split("[=<>]", line)[0] for line in lines} == {
        "torch",
        "numpy",
        "pillow",
        "ftfy",
        "regex",
        "pytest",
    }
    known = {*sys.stdlib_module_names, *MODULES, "torch", "numpy", "PIL", "ftfy", "regex"}
    for module in MODULES:
        for node in ast.parse((ROOT / f"{module}.py").read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= known, module


def commands() -> list[str]:
    """Every command line of README that starts one of our programs."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    lines = [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if re.search(r"\b\w+\.py\b", line)})


@cache
def help_of(script: str, *subcommand: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        importlib.import_module(script.removesuffix(".py")).main([*subcommand, "--help"])
    assert stop.value.code == 0
    return out.getvalue()


@pytest.mark.parametrize("line", commands())
def test_readmes_commands_exist(line):
    """Programs, subcommands, flags, methods and presets that README shows are really there."""
    script, rest = re.search(r"(\w+\.py)(.*)", line).groups()
    assert (ROOT / script).exists()
    word = rest.split()[0] if rest.split() else ""
    program = (script, word) if script == "evaluate.py" else (script,)
    text = help_of(*program)
    for flag in re.findall(r"(?<=\s)--[a-z][a-z-]*", rest):
        assert re.search(rf"{flag}\b", text), f"{flag} is not a flag of {' '.join(program)}"


def test_readmes_test_command_is_what_the_gate_runs():
    assert "grep -m1 'pytest' README.md" in (ROOT / ".ci" / "run").read_text()
    first = next(line for line in README.splitlines() if "pytest" in line)
    assert first.endswith(".venv/bin/python -m pytest") and "pip install" in first


def test_only_four_tags_in_comments():
    for path in ROOT.glob("*.py"):
        for tag in re.findall(r"# ([A-Z]{3,6}): ", path.read_text()):
            assert tag in ("PAPER", "REF", "TRAP", "SPEED"), (path.name, tag)
