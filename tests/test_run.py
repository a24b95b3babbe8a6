"""util/run.py: a checkpoint is whole, or the damage is noticed, whatever happens between two operations."""

import errno
import fcntl
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from reliability import outputs

import pretrained
from model import CLIP, Config
from util import files, plots
from util.run import Run, read_checkpoint


def open_run(out, resume="auto"):
    return Run(str(out), resume, "llip")


def state(step):
    return {"step": step, "state_dict": {"w": torch.full((50,), float(step))}, "config": {"a": "b"}}


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_the_previous_checkpoint_is_kept(tmp_path, capsys):
    run = open_run(tmp_path)
    for step in (1, 2, 3):
        run.save(state(step))
    assert read_checkpoint(run.checkpoint)["step"] == 3
    assert torch.load(run.previous, weights_only=True)["step"] == 2
    assert run.load()["step"] == 3 and not capsys.readouterr().out


def test_no_flip_goes_unseen(tmp_path):
    """Every 31st bit of the file, one at a time: refused, or what is read is what was written."""
    run = open_run(tmp_path)
    run.save(state(1))
    path, whole = run.checkpoint, run.checkpoint.read_bytes()
    silent = 0
    for place in range(0, len(whole) * 8, 31):
        flip(path, place // 8, place % 8)
        try:
            found = read_checkpoint(path)
            assert found.keys() == state(1).keys() and found["step"] == 1
            assert torch.equal(found["state_dict"]["w"], state(1)["state_dict"]["w"])
            silent += 1
        except ValueError as error:
            assert "is damaged" in str(error) and "\n" not in str(error)
        path.write_bytes(whole)
    assert silent < len(whole) * 8 / 31  # padding and dates may flip, weights may not
    # TRAP: torch alone reads a flipped weight; were that to change, the checksum could go
    flip(path, whole.index(torch.ones(50).numpy().tobytes()) + 17)
    assert torch.load(path, weights_only=True)["state_dict"]["w"].sum() != 50


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_previous(tmp_path, capsys, how):
    run = open_run(tmp_path)
    for step in (1, 2):
        run.save(state(step))
    whole = run.checkpoint.read_bytes()
    at = whole.index(torch.full((50,), 2.0).numpy().tobytes()) + 21
    if how == "missing":
        run.checkpoint.unlink()
    elif how == "flipped":
        flip(run.checkpoint, at)
    else:
        run.checkpoint.write_bytes(whole[: at if how == "cut" else 0])
    assert run.load()["step"] == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "checkpoint.previous.pt is used" in said
    assert ("is missing" if how == "missing" else "is damaged") in said
    # TRAP: the whole one must survive the next save, even if that is interrupted
    run.save(state(3))
    assert read_checkpoint(run.checkpoint)["step"] == 3
    assert read_checkpoint(run.previous)["step"] == 1
    assert (tmp_path / "checkpoint.damaged.pt").exists() == (how != "missing")


def test_both_damaged_is_one_clear_error(tmp_path):
    run = open_run(tmp_path)
    for step in (1, 2):
        run.save(state(step))
    for path in (run.checkpoint, run.previous):
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError) as error:
        run.load()
    assert str(error.value).count("is damaged") == 2 and "--out" in str(error.value)


def test_a_directory_with_only_the_previous_is_a_run(tmp_path):
    run = open_run(tmp_path)
    run.save(state(1))
    os.replace(run.checkpoint, run.previous)
    with pytest.raises(ValueError, match="holds a run"):
        open_run(tmp_path, resume="")


def test_evaluation_names_a_damaged_checkpoint(tmp_path):
    model = CLIP(Config(16, 16, 8, 32, 1, 1, 64, 8, 600, 32, 1, 1, 64))
    pretrained.save(model, tmp_path / "checkpoint.pt")
    data = (tmp_path / "checkpoint.pt").read_bytes()
    at = data.index(model.visual.conv1.weight.detach().numpy().tobytes())
    flip(tmp_path / "checkpoint.pt", at + 20)
    with pytest.raises(ValueError, match="damaged") as error:
        pretrained.load(tmp_path)
    assert "checkpoint.pt" in str(error.value) and "\n" not in str(error.value)


# Every operation on files ---------------------------------------------------------------------------


def in_child(work):
    """Runs work() in a process of its own; returns how that ended."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except ValueError:
            os._exit(2)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def some_run(out, failing=None, count=0):
    """Three saves with their metrics. Before operation number `count` on a file: failing()."""
    left = [count]

    def wrap(real):
        def operation(*args, **more):
            left[0] -= 1
            if left[0] == 0:
                failing()
            return real(*args, **more)

        return operation

    if failing:
        for name in ("replace", "fsync", "open", "unlink", "write"):
            setattr(os, name, wrap(getattr(os, name)))
        torch.save = wrap(torch.save)
    run = open_run(out)
    saved = run.load()
    first = saved["step"] if saved else 0
    run.begin(first)
    for step in range(first + 1, 5):
        run.log(step=step, loss=float(step))
        run.save(state(step))
    return left[0]


def count_operations(out):
    return 10**6 - some_run_in_child(out, lambda: None, 10**6)


def some_run_in_child(out, failing, count):
    read, write = os.pipe()
    in_child(lambda: os.write(write, str(some_run(out, failing, count)).encode()))
    os.close(write)
    return int(os.read(read, 20))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def no_space():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failing, code", [(kill, -9), (no_space, 2)])
def test_whatever_stops_between_two_operations_the_run_goes_on(tmp_path, failing, code):
    """SIGKILL, or a full disk, before every single operation; then the same run to its end."""
    some_run(tmp_path / "whole")
    total = count_operations(tmp_path / "counted")
    assert total > 20
    ends = set()
    for count in range(1, total + 1):
        out = tmp_path / str(count)
        ends.add(in_child(lambda out=out, n=count: some_run(out, failing, n)))
        assert in_child(lambda out=out: some_run(out)) == 0, count
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            found, wanted = (read_checkpoint(d / name) for d in (out, tmp_path / "whole"))
            assert found["step"] == wanted["step"], count
        logs = [(d / "metrics.jsonl").read_text() for d in (out, tmp_path / "whole")]
        assert logs[0] == logs[1], count
        assert not list(out.glob("*-part")), count
    assert code in ends and ends <= {code, 0, 1}, ends


def test_a_folder_is_made_when_the_run_begins(tmp_path):
    """A run that cannot start leaves nothing, also of folders above its own."""
    run = open_run(tmp_path / "runs" / "new")
    assert not list(tmp_path.iterdir())
    run.begin(0)
    assert (tmp_path / "runs" / "new" / "lock").exists()
    with pytest.raises(OSError, match="cannot write in .*note: it is a file"):
        (tmp_path / "note").touch()
        open_run(tmp_path / "note" / "runs" / "new")


def test_a_line_that_a_full_disk_cut_is_left_out(tmp_path):
    run, first = open_run(tmp_path), {"step": 1, "loss": 0.5}
    run.log(**first)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    assert run.metrics() == [first]
    run.begin(1)
    run.log(step=2)
    assert run.metrics() == [first, {"step": 2}]


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "ETIMEDOUT"])
def test_a_disk_that_cannot_be_read_now_is_no_damage(tmp_path, monkeypatch, code):
    run = open_run(tmp_path)
    run.save(state(1))

    def failing(*_, **__):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(OSError, match="cannot be read now.*try again"):
        run.load()
    assert run.checkpoint.exists() and not (tmp_path / "checkpoint.damaged.pt").exists()


ODD = [
    "not json",
    "[1]",
    '{"loss": 1}',
    '"step"',
    '{"step": 1, "loss": "x"}',
    '{"step": 1, "zeroshot": {"a": 1}}',
]


@pytest.mark.parametrize("line", ODD)
def test_foreign_metrics_are_named(tmp_path, line):
    run = open_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl has a line that no run wrote"):
        run.metrics()


def test_curves_are_in_per_cent_with_lines_of_chance(tmp_path, monkeypatch):
    run, drawn = open_run(tmp_path), []
    result = {"top1": 0.5, "top5": 0.75, "chance": {"top1": 0.25, "top5": 0.5}}
    for step in (1, 2):
        run.log(step=step, loss=1.0)
        run.log(step=step, zeroshot=result | {"top1": step / 10})
    monkeypatch.setattr(plots, "lines", lambda path, panels, levels: drawn.append((panels, levels)))
    run.draw({"zeroshot": result})
    (panels, levels), title = drawn[0], "zeroshot, per cent (dotted: chance)"
    assert panels[title] == {"top1": [(1, 10.0), (2, 20.0)]} and levels == {title: {"top1": 25.0}}


def test_a_child_does_not_keep_the_lock(tmp_path):
    """TRAP: loader workers outlive a killed run for seconds; its successor must not wait for them."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        held = open_run(tmp_path)  # noqa: F841
        if os.fork() == 0:
            os.read(read, 1)  # the worker: lives on until told to go
            os._exit(0)
        kill()
    os.waitpid(pid, 0)
    open_run(tmp_path).handle.close()
    os.write(write, b"x")


def test_a_second_process_is_refused(tmp_path):
    held = open_run(tmp_path)
    assert in_child(lambda: open_run(tmp_path)) == 2
    held.handle.close()
    assert in_child(lambda: open_run(tmp_path)) == 0


def test_a_failing_write_says_what_is_kept_and_what_to_do(tmp_path, monkeypatch):
    run = open_run(tmp_path)
    run.save(state(1))
    monkeypatch.setattr(os, "fsync", lambda _: no_space())
    with pytest.raises(ValueError) as error:
        run.save(state(2))
    said = str(error.value)
    assert "No space left" in said and f"whole: {run.checkpoint}" in said and "--resume" in said
    monkeypatch.undo()
    assert read_checkpoint(run.checkpoint)["step"] == 1 and not list(tmp_path.glob("*-part"))
    monkeypatch.setattr(os, "open", lambda *_: no_space())
    with pytest.raises(ValueError, match="No space left.*Make room"):
        run.log(step=2)


def test_a_disk_that_fills_inside_torch_save_is_named(tmp_path):
    """The kernel's own error, which torch covers with a message about positions in a zip."""
    run = open_run(tmp_path)
    run.save(state(1))

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        big = state(2) | {"state_dict": {"w": torch.zeros(100_000), "v": torch.zeros(9)}}
        with pytest.raises(ValueError, match="File too large.*whole"):
            run.save(big)
        with pytest.raises(OSError, match="File too large"):
            files.write_bytes(tmp_path / "x.pt", bytes(30_000))

    assert in_child(work) == 0
    assert read_checkpoint(run.checkpoint)["step"] == 1


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run"):
        with pytest.raises(OSError, match="cannot write in .*file: it is a file") as error:
            open_run(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_directory_that_is_read_only(tmp_path):
    """Known before the data are read and the model is made, and leaves nothing."""
    tmp_path.chmod(0o555)

    def work():
        outputs.obey_modes()
        with pytest.raises(OSError, match="cannot write in .*Permission denied"):
            open_run(tmp_path)

    assert in_child(work) == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.previous.pt"])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path, name):
    """TRAP: not allowed to, or no memory just then: the last checkpoint must not be put aside for that."""
    run = open_run(tmp_path)
    for step in (1, 2):
        run.save(state(step))
    (tmp_path / name).chmod(0)
    if name == "checkpoint.previous.pt":
        run.checkpoint.unlink()

    def work():
        outputs.obey_modes()
        with pytest.raises(OSError, match=f"Permission denied.*{name}"):
            open_run(tmp_path).load()

    run.handle.close()
    assert in_child(work) == 0
    assert not (tmp_path / "checkpoint.damaged.pt").exists()
    (tmp_path / name).chmod(0o644)
    assert open_run(tmp_path).load()["step"] == (2 if name == "checkpoint.pt" else 1)


def test_no_memory_for_a_checkpoint_is_not_damage(tmp_path):
    run = open_run(tmp_path)
    run.save(state(1))
    run.save(state(2) | {"state_dict": {"w": torch.zeros(1 << 26)}})
    run.handle.close()

    def work():
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + (1 << 27),) * 2)
        with pytest.raises(OSError, match="checkpoint.pt cannot be read: there is not enough memory"):
            open_run(tmp_path).load()

    assert in_child(work) == 0
    assert not (tmp_path / "checkpoint.damaged.pt").exists()
    assert open_run(tmp_path).load()["step"] == 2


def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    open_run(tmp_path).save(state(1))
    assert "cannot be locked on this disk" in capsys.readouterr().err


def test_files_are_named_where_they_cannot_be_written(tmp_path):
    """A folder in the place of the file; the last line of it all is what is kept and what to do."""
    run = open_run(tmp_path)
    run.save(state(1))
    for name in ("metrics.jsonl", "results.json", "curves.png"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name}.*is whole.*--resume auto") as error, run.writing():
            if name == "metrics.jsonl":
                run.log(step=1)
            elif name == "results.json":
                files.write_json(tmp_path / name, {})
            else:
                plots.lines(tmp_path / name, {"loss": {"loss": [(0, 1.0), (1, 0.5)]}})
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*-part"))


def test_a_picture_is_whole_or_what_it_was(tmp_path):
    plots.lines(tmp_path / "curves.png", {"loss": {"loss": [(0, 1.0), (1, 0.5)]}})
    before = (tmp_path / "curves.png").read_bytes()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="cannot write .*curves.png: File too large"):
            plots.lines(tmp_path / "curves.png", {"loss": {"loss": [(0, 9.0), (1, 0.5)]}})

    assert in_child(work) == 0
    assert (tmp_path / "curves.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    with pytest.raises(ValueError, match="unknown file extension"):
        files.write_image(tmp_path / "x.unknown", Image.new("RGB", (8, 8)))
