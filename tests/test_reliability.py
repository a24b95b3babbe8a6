"""A sample of tests/reliability/run.py; `pytest -m slow tests/test_reliability.py` runs more."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from reliability import fuzz, outputs, streams
from reliability import run as reliability

from baselines.methods import METHODS


def held(jobs):
    found = [reliability.attempt(job) for job in jobs]
    assert found and not [f for r in found for f in r["failures"]], found


@pytest.mark.parametrize("method, workers, world", [("llip", 0, 2), ("alignclip", 2, 1)])
def test_kills(method, workers, world):
    held(reliability.kill_jobs(2, (method,), (workers,), (world,)))


def test_torchrun_goes_on_when_the_rank_that_writes_is_killed_inside_a_save(tmp_path):
    reliability.lost_rank(tmp_path, 0, "between the two renames of a save")


def test_a_run_changes_its_ranks(tmp_path):
    reliability.other_world(tmp_path, "llip", 1, 2)


def test_a_full_disk_costs_nothing(tmp_path):
    reliability.no_room(tmp_path, ("metrics.jsonl", "results.json", "curves.png"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return outputs.make_place(tmp_path)


def test_folders_that_cannot_be_written(tmp_path, place, monkeypatch):
    monkeypatch.setattr(outputs, "PLACES", ("locked", "file/new"))
    found = outputs.unwritable(tmp_path, place, leave_out=("lab.reproduce",))
    assert found["tried"] > 30 and not found["failures"]


def test_files_that_cannot_be_written_at_the_end(tmp_path, place):
    found = outputs.in_the_way(tmp_path, place, leave_out=("lab.compare",))
    assert found["tried"] > 9 and not found["failures"]


def test_ctrl_c(tmp_path, place):
    found = outputs.interrupted(tmp_path, place)
    assert found["tried"] > 10 and not found["failures"]


def test_streams_signals_and_odd_values(tmp_path):
    (tmp_path / "s").mkdir()
    assert streams.signals(tmp_path / "s", ("SIGXCPU",)) == 1
    assert streams.streams(tmp_path, (">&-",)) == 1


def test_odd_values(tmp_path):
    assert streams.nonsense(tmp_path, ("llip",), every=25) > 5


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_mutated_files(name):
    held(reliability.fuzz_jobs(100, [name]))


def test_the_fuzzer_notices(monkeypatch):
    """A reader that crashes is a failure."""

    def crash(path):
        if len(path.read_bytes()) != len(fuzz.CSV):
            raise KeyError("crash")

    entry = (".csv", [fuzz.CSV], crash, (ValueError,), [])
    monkeypatch.setitem(fuzz.FORMATS, "CSV", entry)
    assert any("KeyError" in f for f in fuzz.fuzz("CSV", 20)["failures"])


def test_every_job_of_the_table_exists(capsys):
    # one job more if a test before this one imported lab.latent_text, which adds its method to the list
    jobs = 66 + len(METHODS)
    assert reliability.main(["--list"]) == 0 and f"{jobs} jobs" in capsys.readouterr().out


def test_wrong_commands():
    held(reliability.command_jobs(every=1, apart=1))


def test_a_job_that_fails_or_dies_is_a_row(monkeypatch):
    def work(place):
        raise AssertionError("not equal")

    jobs = [
        reliability.Job("fails", 1, 1, work),
        reliability.Job("dies", 1, 1, lambda place: os.kill(os.getpid(), signal.SIGKILL)),
        reliability.Job("a fault", 1, 1, lambda place: {}["key"]),
        reliability.Job("holds", 1, 1, lambda place: (7, "fine")),
    ]
    rows = reliability.side_by_side(jobs, 2, lambda *a: None)
    assert [r["what"] for r in rows] == ["fails", "dies", "a fault", "holds"]
    assert [bool(r["failures"]) for r in rows] == [True, True, True, False]
    assert rows[0]["failures"] == ["not equal"] and rows[3]["tried"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_its_own_ctrl_c_leaves_nothing(number):
    """Ctrl-C during kills and torchrun ends every process that has the mark in its environment."""
    mark = f"RELIABILITY_MARK={os.getpid()}-{number}"
    place = Path(tempfile.mkdtemp())
    env = {**os.environ, "TMPDIR": str(place)} | dict([mark.split("=")])
    command = [sys.executable, reliability.__file__, "--only", "ranks", "kills", "--jobs", "2"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    def alive():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                found += [path] * (mark.encode() in path.read_bytes())
            except OSError:  # the process has ended
                pass
        return found

    until = time.monotonic() + 60
    while len(alive()) < 8 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(alive()) >= 8
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert not alive()
    place.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("part", reliability.PARTS)
def test_the_quick_form(part):
    held(reliability.PARTS[part](quick=True))
