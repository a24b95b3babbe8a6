"""util/program.py: what a user sees of an error, and closed streams."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT

import data
import util.program
from util.program import STOPPING, program


def fails(error):
    """Status of a program whose main raises the error."""

    @program
    def main(argv):
        raise error

    return main([])


STORAGE = RuntimeError(
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
)
GLOO = "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"
CASES = [
    (MemoryError(), 2, "not enough memory"),
    (STORAGE, 2, "not enough memory"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory"), 2, "not enough memory"),
    (OSError(12, "Cannot allocate memory: out of memory", "a.pt"), 2, "a.pt"),
    (FileNotFoundError(2, "No such file", "no.json"), 2, "error: no.json: No such file; is the path right?"),
    (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
    (OverflowError("Python int too large to convert to C long"), 2, "too large"),
    (RuntimeError(GLOO), 1, "Timed out waiting 15000ms"),
    (torch.distributed.DistBackendError("NCCL communicator was aborted"), 1, "communicator was aborted"),
    (ValueError("first\nsecond"), 2, "first second"),
    (OSError("x\x1b[31m\x07red"), 2, "x?[31m?red"),
    (ValueError("a" * 5000), 2, "aaa"),
]


@pytest.mark.parametrize("error, status, words", CASES)
def test_an_error_is_one_short_line(capsys, error, status, words):
    assert fails(error) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert said[:-1].isprintable() and len(said) < 1100


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fails(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_what_libraries_print_never_reaches_a_file(tmp_path):
    """With closed streams the next file that is opened would be number 1 or 2."""
    code = f"""
import os
from util.program import program
@program
def main(argv):
    with open({str(tmp_path / "file")!r}, "w") as file:
        os.write(1, b"printed by C")
        os.write(2, b"a warning of C")
        file.write("content")
main([])"""
    command = f"{sys.executable} -c '{code.replace(chr(39), chr(34))}' <&- >&- 2>&-"
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, timeout=60)
    assert (tmp_path / "file").read_text() == "content"


def test_workers_that_are_left_open_end_silently(tmp_path):
    code = """
import data
from readers.scenes import Scenes
scenes, tokens = Scenes("train", 16), lambda texts, length: data.torch.zeros(len(texts), length)
batches = data.train_batches(scenes, tokens, data.preprocess(32), batch_size=8, workers=3)
next(batches)"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_terminal_that_lacks_a_character_gets_another_one(monkeypatch):
    @program
    def main(argv):
        print("loss \u2192 0")

    for encoding in ("ascii", "cp1252"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([]) == 0
        stream.flush()
        assert stream.buffer.getvalue().strip() == b"loss ? 0"


def test_workers_leave_every_stopping_signal_to_the_main_process():
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU} == set(STOPPING)
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        data.leave_signals(0)
        for number in STOPPING:
            os.kill(os.getpid(), number)
        os.write(write, json.dumps("alive").encode())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0 and json.loads(os.read(read, 20)) == "alive"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("world", ["", "2"])
def test_the_local_variables_of_a_rank_stay_after_an_error(monkeypatch, kind, world):
    """TRAP: the process group among them would otherwise be destroyed at once, which can hang."""
    monkeypatch.setattr(util.program, "KEPT", [])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    groups = []

    @program
    def main(argv):
        group = type("Group", (), {})()
        groups.append(weakref.ref(group))
        raise kind("stopped")

    assert main([]) in (2, 130)
    gc.collect()
    assert (groups[0]() is not None) == bool(world)
