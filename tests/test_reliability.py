"""A little of what tests/reliability.py does; `pytest -m slow tests/test_reliability.py` does more."""

from pathlib import Path

import fuzz
import pytest
import reliability


def held(rows):
    found = list(rows)
    assert found and not [f for r in found for f in r["failures"]], found


@pytest.mark.parametrize("method, workers, world", [("llip", 0, 2), ("alignclip", 2, 1)])
def test_kills(method, workers, world):
    held(reliability.kill_rows(2, (method,), (workers,), (world,)))


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_mutated_files(name):
    held(reliability.fuzz_rows(100, [name]))


def test_the_fuzzer_notices(monkeypatch):
    """A reader that crashes, hangs or answers with a page is a failure."""

    def crash(path):
        if len(path.read_bytes()) != len(fuzz.CSV):
            raise KeyError("crash")

    entry = (".csv", [fuzz.CSV], crash, (ValueError,), [])
    monkeypatch.setitem(fuzz.FORMATS, "CSV", entry)
    assert any("KeyError" in f for f in fuzz.fuzz("CSV", 20)["failures"])


def test_wrong_commands():
    held(reliability.command_rows(every=1, apart=1))


def test_a_run_changes_its_ranks():
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as place:
        reliability.other_world(Path(place), "llip", 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("part", reliability.PARTS)
def test_the_quick_form(part):
    held(reliability.long_rows([part], quick=True))
