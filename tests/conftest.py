"""Shared by all tests: the root on sys.path, few threads, and where the golden vectors are.

tests/golden/ holds small recordings of the official implementations; a folder ../shared beside the
checkout, when there is one, holds more of them and real data, and the tests then use those too.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: parallel runs must not thrash
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from util.run import Run  # noqa: E402

torch.set_num_threads(1)
SHARED = ROOT.parent / "shared" if (ROOT.parent / "shared" / "golden").is_dir() else None


class Recorded(dict):
    """The arrays of one golden file; READ collects the names that tests look up."""

    READ: set[tuple[str, str]] = set()

    def __init__(self, name, arrays):
        super().__init__(arrays)
        self.name = name

    def __getitem__(self, key):
        self.READ.add((self.name, key))
        return super().__getitem__(key)


def pytest_sessionfinish():
    """GOLDEN_READS=FILE writes the names of the arrays that tests read, for tests/test_golden_manifest.py."""
    if path := os.environ.get("GOLDEN_READS"):
        Path(path).write_text(json.dumps(sorted(Recorded.READ)))


def golden_path(name):
    """Path of a golden file, here or beside the checkout; the test is skipped if it is in neither."""
    for folder in (ROOT / "tests" / "golden", SHARED / "golden" if SHARED else None):
        if folder and (folder / name).exists():
            return folder / name
    pytest.skip(f"golden file {name} is only beside the development checkout (../shared/golden)")


def load_golden(name):
    """An .npz as a dict of tensors; float16 is only a storage format, its values are used as float32."""
    arrays = np.load(golden_path(name))
    tensors = {
        key: torch.from_numpy(np.array(value, dtype=np.float32 if value.dtype == np.float16 else value.dtype))
        for key, value in arrays.items()
        if value.dtype.kind in "fiub"
    }
    return Recorded(name, tensors)


def checkpoint(out):
    """What a run left, read as any user can: nothing in it can execute."""
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@contextlib.contextmanager
def killed_after_saving(monkeypatch):
    """Within it a run saves its first checkpoint and then ends, as if somebody had killed it."""
    save = Run.save

    def save_and_die(self, state):
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save_and_die)
        yield


def assert_one_error(capsys, message):
    """The program printed one line, an error with these words."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.fixture
def golden():
    return golden_path


@pytest.fixture
def golden_arrays():
    return load_golden


@pytest.fixture
def shared():
    """The folder ../shared, or the test is skipped."""
    if SHARED is None:
        pytest.skip("real data lie only beside the development checkout (../shared)")
    return SHARED


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory):
    """Run directories of small random models, {"clip" | "siglip" | "llip" | "pooled": path}."""
    from small_models import save_all

    return save_all(tmp_path_factory.mktemp("small"))
