"""The repository itself: imports between layers, sizes, packages, and the commands of README and docs/."""

import ast
import contextlib
import functools
import graphlib
import importlib
import io
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOT_FILES = set(
    "attention tokenizer model losses llip clipood alignclip pretrained data tasks train evaluate".split()
)
FOLDERS = "baselines readers weights evals util scale lab".split()
# a module imports from lower layers, or from its own layer without circles
LAYERS = [
    "attention losses util.files util.text util.program weights.download tokenizer",
    "model",
    "llip",
    "scale",
    "util readers weights",
    "pretrained data",
    "clipood",
    "alignclip baselines",
    "evaluate",
    "evals",
    "tasks",
    "train",
    "lab",
]
LAYER = {name: number for number, names in enumerate(LAYERS, 1) for name in names.split()}
CORE = ROOT_FILES - {"pretrained", "tasks"}
PACKAGES = {"torch", "numpy", "pillow", "ftfy", "regex", "pytest"}
# lab/ compares with these if they are installed, and nothing else imports them
PEERS = {"transformers", "open_clip", "torchvision"}


def python_files(folder: str) -> list[Path]:
    return sorted(ROOT.glob(f"{folder}/*.py" if folder else "*.py"))


CODE = [path for folder in ["", *FOLDERS] for path in python_files(folder)]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in CODE}


def lines(paths) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


# Imports


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, "a.b" for `from a import b` if that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(MODULES)) or {node.module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            assert isinstance(node.args[0], ast.Constant), f"{path}: an import whose name is computed"
            found.add(node.args[0].value)
    return found


def own_imports(module: str) -> set[str]:
    return {
        name for name in imported(MODULES[module]) if name.split(".")[0] in ROOT_FILES | {*FOLDERS, "tests"}
    }


def layer(module: str) -> int:
    return LAYER.get(module) or LAYER[module.split(".")[0]]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_from_its_own_layer_or_lower_ones(module):
    for other in own_imports(module):
        assert other in MODULES, f"{other} is not a file"
        assert layer(other) <= layer(module), f"{module} imports {other}, which is in a higher layer"


def test_imports_have_no_circle():
    order = graphlib.TopologicalSorter({module: own_imports(module) for module in MODULES}).static_order()
    assert set(MODULES) <= set(order)


def test_attention_losses_and_the_lowest_helpers_import_nothing():
    for module in ("attention", "losses", "util.files", "util.text"):
        assert own_imports(module) == set(), module
    assert own_imports("util.program") == {"util.text"}
    assert own_imports("weights.download") == {"util.files"}


def test_only_the_packages_of_requirements_are_imported():
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert requirements[0].startswith("torch==")
    assert {re.split("[=<>]", line)[0] for line in requirements} == PACKAGES
    known = {*sys.stdlib_module_names, *ROOT_FILES, *FOLDERS, "torch", "numpy", "PIL", "ftfy", "regex"}
    for module, path in MODULES.items():
        unknown = {name.split(".")[0] for name in imported(path)} - known
        assert unknown <= (PEERS if module.startswith("lab.") else set()), module


def test_importing_prints_and_loads_nothing():
    names = ", ".join(sorted(MODULES))
    code = f"import sys, {names}; print(sorted({PEERS} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


# what ports, notebooks and other projects rely on, and the programs
PUBLIC = """
attention.attend attention.MultiheadAttention attention.flops tokenizer.Tokenizer.from_openai
tokenizer.Tokenizer.learn tokenizer.Tokenizer.save tokenizer.Tokenizer.load tokenizer.Tokenizer.encode
tokenizer.Tokenizer.decode model.CONFIGS model.CLIP.encode_image model.CLIP.encode_text model.CLIP.pair_logits
model.CLIP.ensemble_text llip.Llip.mix llip.Llip.pair_logits llip.PooledTokens llip.warm_start_llip
losses.info_nce losses.siglip losses.margin_metric_logits losses.smoothing_targets losses.soft_cross_entropy
losses.attention_alignment losses.similarity_alignment alignclip.cls_attention alignclip.guidance
alignclip.AlignCLIP.loss alignclip.AlignCLIP.predict clipood.BetaMovingAverage.update clipood.wise_ft
evals.surgery.dense_features evals.surgery.similarity_map evals.surgery.feature_surgery baselines.coop.CoOp
baselines.cocoop.CoCoOp baselines.maple.MaPLe baselines.metaclip.match baselines.metaclip.keep_probability
pretrained.load pretrained.save readers.images.preprocess readers.images.open_image
readers.images.Preprocess.pixels readers.benchmarks.domainbed_split data.open_dataset evaluate.open_model
scale.llip_tiles.TiledLlip scale.llip_tiles.select scale.gradcache.training_step util.metrics.recall_at_k
util.metrics.classification_metrics train.main evaluate.main data.main tokenizer.main pretrained.main
clipood.main readers.scenes.main baselines.metaclip.main evals.open_world.main evals.surgery.main
evals.maps.main evals.linear_probe.main evals.spectrum.main evals.typographic.main evals.mixtures.main
lab.reproduce.main lab.compare.main lab.bench.main lab.gpu.main
""".split()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist(name):
    module = next(m for m in sorted(MODULES, key=len, reverse=True) if name.startswith(f"{m}."))
    functools.reduce(getattr, name.removeprefix(f"{module}.").split("."), importlib.import_module(module))


# Sizes


def test_twelve_files_in_the_root():
    assert {path.stem for path in python_files("")} == ROOT_FILES


def test_the_root_holds_nothing_else():
    done = subprocess.run(["git", "ls-files", "."], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    found = {name for name in done.stdout.splitlines() if "/" not in name and not name.startswith(".")}
    others = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml"}
    assert found == others | {f"{name}.py" for name in ROOT_FILES}


def test_line_budgets():
    sizes = {
        "reading core": (lines(ROOT / f"{name}.py" for name in CORE), 3100),
        "code outside tests and lab": (lines(p for p in CODE if p.parent.name != "lab"), 11_500),
        "lab": (lines(python_files("lab")), 2300),
    }
    assert not {what: size for what, size in sizes.items() if size[0] > size[1]}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_file_over_500_lines(module):
    assert lines([MODULES[module]]) <= 500


def test_every_folder_has_an_empty_init():
    for folder in [*FOLDERS, "tests/reliability"]:
        assert (ROOT / folder / "__init__.py").read_bytes() == b"", folder
        assert not list(ROOT.glob(f"{folder}/*/*.py")), f"{folder} has folders"
    assert {p.parent.name for p in ROOT.glob("[a-z]*/*.py")} <= {*FOLDERS, "tests", "runs"}


def test_only_four_tags_in_comments():
    for path in CODE:
        for tag in re.findall(r"# ([A-Z]{3,6}): ", path.read_text()):
            assert tag in ("PAPER", "REF", "TRAP", "SPEED"), (path, tag)


# Names of methods

# strings that are names of other things too, by a word of what they are compared with
OTHER_MEANINGS = {"siglip": "objective", "clip": "model_type"}
METHOD_NAMES = {
    name
    for module in ("baselines.methods", "evals.surgery")
    for name in importlib.import_module(module).METHODS
}


def compared_names(code: str) -> list[str]:
    """Expressions that compare with the name of a method: == != in, match, startswith, and {...}[name]."""
    tree, found = ast.parse(code), []
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    constants = {target.id: n.value for n in assigned for target in n.targets if isinstance(target, ast.Name)}

    def names(side) -> set[str]:
        """In a string, in a collection of strings, and in a constant of the file that is one of these."""
        side = constants.get(side.id, side) if isinstance(side, ast.Name) else side
        parts = [side, *getattr(side, "elts", [])]
        return METHOD_NAMES & {part.value for part in parts if isinstance(part, ast.Constant)}

    for node in ast.walk(tree):
        sides = []
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq | ast.In | ast.NotIn):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            sides = node.value.keys
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".startswith", ".endswith")):
            sides = node.args
        text = ast.unparse(node) if sides else ""
        meant = {name for side in sides for name in names(side)}
        if any(OTHER_MEANINGS.get(name, "\n") not in text for name in meant):
            found.append(text)
    return found


@pytest.mark.parametrize("module", sorted({*MODULES} - {"baselines.methods"}))
def test_no_code_compares_a_methods_name(module):
    assert not compared_names(MODULES[module].read_text())


@pytest.mark.parametrize(
    "code, found",
    [
        ("if c.method == 'llip': pass", 1),
        ("steps = 5 if 'coop' != method else 6", 1),
        ("two = method in ('surgery', 'gem') or method not in ['x', 'sclip']", 2),
        ("PROMPTS = ('coop', 'maple')\nif name in PROMPTS: pass", 1),
        ("match method:\n    case 'tes' | 'x': pass", 1),
        ("mode = {'gem': 'bicubic', 'surgery': 'bilinear'}[method]", 1),
        ("if name.startswith('alignclip'): pass", 1),
        ("objective = 'siglip' if kind == 'siglip' else 'infonce'", 1),
        # the loss of this name, the kind of model in a config.json, and no comparison
        ("if settings.objective == 'siglip' or config.get('model_type', 'clip') != 'clip': pass", 0),
        ("for name in ('clip', 'llip'): run(method=name, branch={'dv': 1}[kind])", 0),
        ("if method not in METHODS: raise ValueError('norm' in name)", 0),
    ],
)
def test_a_compared_name_would_be_found(code, found):
    assert len(compared_names(code)) == found


# Commands

README = (ROOT / "README.md").read_text()
# the log tells of the past
DOCS = [ROOT / "README.md", *(p for p in sorted(ROOT.glob("docs/*.md")) if p.name != "log.md")]


def commands() -> list[str]:
    """Every command line in README and docs/ that starts a program of this project."""
    found = set()
    for path in DOCS:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.split(r"\s#\s", line)[0].strip()
                if program_of(line):
                    found.add(line)
    return sorted(found)


def program_of(line: str) -> tuple[str, str] | None:
    """(module, its arguments) of a command line."""
    match = re.search(r"(?<!\S)(?:(\w+)\.py|\S*python3? -m (\w+\.\w+))(?=\s|$)(.*)", line)
    known = match and not line.startswith("#") and not (match[2] or "").startswith("torch.")
    return (match[1] or match[2], match[3]) if known else None


@cache
def help_of(module: str, *words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main([*words, "--help"])
    assert stop.value.code == 0
    return out.getvalue()


def test_the_help_of_evaluate_lists_every_evaluation():
    programs = {
        module
        for module in MODULES
        if module.startswith("evals.") and hasattr(importlib.import_module(module), "main")
    }
    assert set(re.findall(r"evals\.\w+", help_of("evaluate"))) == programs


@pytest.mark.parametrize("line", commands())
def test_commands_of_readme_and_docs_exist(line):
    """Programs, subcommands, flags, methods and presets are really there."""
    module, rest = program_of(line)
    assert module in MODULES
    words = rest.split()
    # the flags of train.py depend on the method, others on the subcommand
    choice = words[:1] if module in ("evaluate", "lab.measures") else []
    if module == "train":
        choice = re.findall(r"--(?:method|preset) [\w.-]+", rest)[:1]
        choice = choice[0].split() if choice else []
    text = help_of(module, *choice)
    for flag in re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", rest):
        assert re.search(rf"{flag}\b", text), f"{flag} is not a flag of {module} {' '.join(choice)}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_named_in_readme_and_docs_exist(path):
    names = set(re.findall(r"`((?:\w+/)*\w+\.py)`", path.read_text()))
    assert not {name for name in names if not (ROOT / name).is_file()}


def test_readmes_two_commands_are_whole_shell_lines():
    train, test = (
        next(line for line in README.splitlines() if all(word in line for word in words))
        for words in (("train.py", "--method llip"), ("pytest",))
    )
    for line in (train, test):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0
    assert re.search(r"&& \.venv/bin/python train\.py --method llip$", train)
    assert test.endswith("&& .venv/bin/python -m pytest")
    assert "grep -m1 'pytest' README.md" in (ROOT / ".ci" / "run").read_text()
