"""util/files.py: pipes, sockets and devices are refused by every reader, at once and behind links too."""

import os
import signal
import socket

import pytest
import torch

import data
import pretrained
from baselines.metaclip import Corpus, read_entries
from readers.templates import read_names
from tokenizer import Tokenizer, is_saved, open_vocabulary
from util import files, run
from weights import archive, layouts

READERS = {  # name of the file, and what reads it
    "list.csv": data.open_dataset,
    "list.jsonl": data.open_dataset,
    "list.json": data.open_dataset,
    "a.tar": data.open_dataset,
    "vocabulary": Tokenizer.load,
    "tokenizer.json": is_saved,
    "openai.txt.gz": open_vocabulary,
    "captions.txt": lambda path: list(Corpus(str(path)).records()),
    "captions.tsv": lambda path: Corpus(str(path)),
    "entries.json": read_entries,
    "classes.txt": lambda path: read_names(str(path)),
    "weights.pt": archive.read,
    "model.safetensors": pretrained.load,
    "checkpoint.pt": run.read_checkpoint,
    "metrics.jsonl": lambda path: run.Run.metrics(type("Here", (), {"path": path.parent})),
    "config.json": lambda path: layouts.settings_beside(path.with_name("pytorch_model.bin"), "Hugging Face"),
}


@pytest.fixture
def soon():
    """A reader that waits for a pipe would wait for ever."""

    def late(*_):
        raise TimeoutError("the reader waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(3)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "socket"])
@pytest.mark.parametrize("name", READERS)
def test_only_files_are_opened(tmp_path, monkeypatch, soon, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 characters
        socket.socket(socket.AF_UNIX).bind(name)
    with pytest.raises((ValueError, OSError)) as caught:
        READERS[name](path)
    assert not isinstance(caught.value, TimeoutError) and "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_results_behind_a_pipe_count_as_damaged(tmp_path, soon):
    os.mkfifo(tmp_path / "results.json")
    assert run.Run.results(type("Here", (), {"path": tmp_path})) is None


def test_files_of_a_run_are_not_written_through_links_and_pipes(tmp_path, soon):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "link").symlink_to("victim")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "."):
        with pytest.raises(OSError, match="cannot write"):
            files.open_own(tmp_path / name, os.O_WRONLY | os.O_APPEND)
    for name in ("link", "pipe"):  # replaced, not opened
        files.write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_file() and not (tmp_path / name).is_symlink()
    assert (tmp_path / "victim").read_text() == "kept"


def test_text_is_read_with_or_without_a_mark_of_byte_order(tmp_path):
    for mark in ("", "\ufeff"):
        (tmp_path / "x").write_text(f"{mark}é\r\nb", encoding="utf-8")
        assert files.read_text(tmp_path / "x") == "é\r\nb"
    torch.save({}, tmp_path / "y")
    with files.open_file(tmp_path / "y") as file:
        assert file.read(2) == b"PK"
