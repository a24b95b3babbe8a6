"""archive.py: the same tensors as torch reads; hostile files run nothing and take bounded time and memory."""

import code
import functools
import io
import json
import math
import os
import pickle
import resource
import runpy
import struct
import subprocess
import tarfile
import time
import timeit
import zipfile
from collections import OrderedDict

import pytest
import torch

import pretrained
from model import CLIP, Config
from weights import archive, layouts

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(3, dtype=torch.float16)}


def torch_zip(path, program: bytes, storages=(), method=zipfile.ZIP_STORED, folder="archive"):
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(f"{folder}/data.pkl", program)
        for key, data in enumerate(storages):
            file.writestr(f"{folder}/data/{key}", data)
    return path


def text(value: str) -> bytes:
    """A string in a pickle."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tensor_program(numel=4, offset=0, size=(4,), stride=(1,), kind="FloatStorage", key="0"):
    """The pickle of {"state_dict": {"w": a tensor with these numbers}}, as torch.save writes it."""

    def numbers(values):
        return b"(" + b"".join(b"I%d\n" % n for n in values) + b"t"

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cuda:0")
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I%d\ntQI%d\n" % (numel, offset)
    tensor += numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("state_dict") + b"}" + text("w") + tensor + b"ss."


def read_all(path):
    checkpoint = archive.read(path)
    return checkpoint.tensors(archive.flatten(checkpoint.content))


def test_tensors_share_no_memory_and_keep_no_more_than_their_own(tmp_path):
    """Only a tensor that is alone in its storage, and all of it, is not copied."""
    whole, part, turned = (
        torch.arange(6.0).view(2, 3),
        torch.arange(100.0)[:5],
        torch.arange(6.0).view(2, 3).t(),
    )
    torch.save({"a": whole, "b": whole.view(3, 2), "part": part, "turned": turned}, tmp_path / "x.pt")
    found = read_all(tmp_path / "x.pt")
    assert torch.equal(found["a"], whole) and torch.equal(found["turned"], turned)
    found["a"].zero_()
    assert torch.equal(found["b"], whole.view(3, 2))
    assert found["part"].untyped_storage().nbytes() == 20 and found["turned"].is_contiguous()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_reads(tmp_path, protocol):
    base = torch.arange(24.0).view(4, 6)
    state = {
        "view": base.t()[1:4, ::2],  # strides and an offset
        "same storage": base[1],
        "scalar": torch.tensor(2.5),
        "half": torch.randn(3, 2).half(),
        "bfloat": torch.randn(5).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.tensor([2**40, -1]),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    file = tmp_path / "x.bin"
    content = {"epoch": 3, "list": [1, (2.5, None)], "state_dict": state}
    torch.save(content, file, pickle_protocol=protocol)
    checkpoint = archive.read(file)
    assert checkpoint.kind == "torch.save file"
    assert checkpoint.content["epoch"] == 3 and checkpoint.content["list"] == [1, (2.5, None)]
    found = checkpoint.tensors(checkpoint.content["state_dict"])
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name
    found["same storage"].zero_()
    assert found["view"].sum() == state["view"].sum(), "tensors must not share memory"


def test_torchscript_as_torch_reads_it(tmp_path):
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2).half()
            self.register_buffer("size", torch.tensor(224))

        def forward(self, x):
            return x

    model = torch.nn.Sequential(Inner(), Inner())
    file = tmp_path / "model.tar.gz"
    torch.jit.save(torch.jit.trace(model, torch.zeros(1)), file)
    found = read_all(file)
    assert archive.read(file).kind == "TorchScript archive"
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())


def test_safetensors_as_numpy_and_torch_see_it(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "f": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "h": {"dtype": "F16", "shape": [2], "data_offsets": [16, 20]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [20, 22]},
    }
    text = json.dumps(header).encode()
    data = struct.pack("<4f", 1, 2, 3, 4) + struct.pack("<2e", 0.5, -2) + b"\x80\x3f"
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = read_all(tmp_path / "x")
    assert found["f"].tolist() == [[1, 2], [3, 4]] and found["h"].tolist() == [0.5, -2]
    assert found["b"].dtype == torch.bfloat16 and found["b"].item() == 1


def test_safetensors_round_trip(tmp_path):
    state = {"x": torch.randn(3, 5), "y": torch.tensor(1.5), "t": torch.randn(4, 2).t()}
    with open(tmp_path / "x", "wb") as file:
        layouts.write_safetensors(state, file)
    found = read_all(tmp_path / "x")
    assert all(torch.equal(found[k], v) for k, v in state.items())


# ---- hostile pickles


class Call:
    """Pickled as a call of function with these arguments."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


class Armed:
    def __setstate__(self, state):
        os.system(state["command"])


def hostile(marker) -> dict[str, bytes]:
    """name -> pickle; most of them make the file marker when pickle.loads reads them."""
    touch, python = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    dump, command = pickle.dumps, text(touch)
    return {
        "os.system": dump(Call(os.system, touch)),
        "builtins.eval": dump(Call(eval, python)),
        "builtins.exec": dump(Call(exec, python)),
        "builtins.open": dump(Call(open, str(marker), "w")),
        "subprocess, nested": dump([{"deep": (Call(subprocess.Popen, ["touch", str(marker)]),)}]),
        "runpy": dump(Call(runpy._run_code, python, {})),
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n("
        + text("os")
        + b"tR"
        + text("system")
        + b"tR("
        + command
        + b"tR.",
        "GLOBAL": b"cos\nsystem\n(" + command + b"tR.",
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + command + b"\x85R.",
        "STACK_GLOBAL out of the memo": b"\x80\x04"
        + text("system")
        + b"\x94"
        + text("os")
        + b"\x94h\x01h\x00\x93"
        + command
        + b"\x85R.",
        "a dotted name": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + command + b"\x85R.",
        "INST": b"(" + command + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + command + b"o.",
        "key of state_dict": dump({"state_dict": {Call(os.system, touch): 1}}),
        "value of state_dict": dump({"state_dict": {"w": Call(os.system, touch)}}),
        "in an OrderedDict": dump(OrderedDict(x=Call(os.system, touch))),
        "copyreg and __setstate__": b"ccopyreg\n_reconstructor\n(c"
        + __name__.encode()
        + b"\nArmed\ncbuiltins\nobject\nNtR}"
        + text("command")
        + command
        + b"sb.",
        "NEWOBJ and BUILD": b"\x80\x02c"
        + __name__.encode()
        + b"\nArmed\n)\x81}"
        + text("command")
        + command
        + b"sb.",
        "after the wanted value": b"cos\nsystem\n(" + command + b"tR0}" + text("state_dict") + b"}s.",
        "torch.storage bytes": dump(Call(torch.storage._load_from_bytes, dump(Call(os.system, touch)), *())),
        "rebuild of a call": b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\n(" + command + b"tR\x89}tR.",
        "__torch__ stub": b"\x80\x02c__torch__.os\nsystem\n)\x81" + command + b"b.",
        "__torch__ called": b"c__torch__\nos.system\n(" + command + b"tR.",
        "torch.load": dump(Call(torch.load, str(marker))),
        "EXT1": b"\x80\x02\x82\x01" + command + b"\x85R.",
        "PERSID": b"Pos.system\n.",
        "BINPERSID of a call": b"cos\nsystem\n(" + command + b"tRQ.",
        "posix, as os calls it": b"cposix\nsystem\n(" + command + b"tR.",
        "functools.partial": dump(Call(functools.partial(os.system, touch))),
        "map in a list": dump(Call(list, Call(map, os.system, [touch]))),
        "a call as an argument": dump(Call(print, Call(os.system, touch))),
        "copyreg.__newobj__ and eval": b"\x80\x02ccopyreg\n__newobj__\n0cbuiltins\neval\n("
        + text(python)
        + b"tR.",
        "timeit": dump(Call(timeit.timeit, python, "pass", time.perf_counter, 1)),
        "pickle in a pickle": dump(Call(pickle.loads, dump(Call(os.system, touch)))),
        "code.interact's exec": dump(Call(code.InteractiveInterpreter.runcode, None, python)),
    }


NOT_ARMED = (
    "code.interact's exec",
    "torch.storage bytes",
    "__torch__ stub",
    "__torch__ called",
    "torch.load",
    "EXT1",
    "PERSID",
)


@pytest.mark.parametrize("name", hostile("x"))
def test_hostile_pickles_do_nothing(tmp_path, name):
    """As the whole file, beside a TorchScript's parts, in the old format, and as our reader sees it."""
    marker = tmp_path / "marker"
    program = hostile(marker)[name]
    torch_zip(tmp_path / "a.pt", program)
    torch_zip(tmp_path / "b.pt", program)
    with zipfile.ZipFile(tmp_path / "b.pt", "a", zipfile.ZIP_STORED) as file:
        file.writestr("archive/constants.pkl", program)
    start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    (tmp_path / "c.pt").write_bytes(start + program + program + program)
    for file in ("a.pt", "b.pt", "c.pt"):
        with pytest.raises(ValueError) as error:
            pretrained.load(tmp_path / file)
        assert file in str(error.value) and "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", [n for n in hostile("x") if n not in NOT_ARMED])
def test_the_hostile_pickles_are_armed(tmp_path, name):
    """The test above could not fail if these did nothing in pickle's hands either."""
    marker = tmp_path / "marker"
    try:
        pickle.Unpickler(io.BytesIO(hostile(marker)[name])).load()
    except Exception:  # the harm is done by then
        pass
    for _ in range(200 * ("subprocess" in name)):
        if marker.exists():
            break
        time.sleep(0.01)
    assert marker.exists()


def test_weights_beside_something_hostile_are_read(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"state_dict": STATE, "args": Call(os.system, f"touch {marker}")}, tmp_path / "x")
    checkpoint = archive.read(tmp_path / "x")
    assert checkpoint.content["args"].name.endswith(" system")
    assert torch.equal(checkpoint.tensors(checkpoint.content["state_dict"])["a.weight"], STATE["a.weight"])
    assert not marker.exists()


def test_harmless_things_that_weights_only_refuses(tmp_path):
    import argparse
    import pathlib

    import numpy as np

    extra = {
        "best": np.float64(0.5),
        "args": argparse.Namespace(lr=1e-3),
        "path": pathlib.PurePosixPath("/x"),
        "random": np.random.get_state(),
    }
    torch.save({"state_dict": STATE} | extra, tmp_path / "x")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x", weights_only=True)
    checkpoint = archive.read(tmp_path / "x")
    assert checkpoint.tensors(checkpoint.content["state_dict"]).keys() == STATE.keys()


# ---- hostile and damaged containers


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        read_all(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert any(word in message for word in words), message


NUMBERS = struct.pack("<4f", 1, 2, 3, 4)


def test_the_handwritten_tensor_is_read(tmp_path):
    found = read_all(torch_zip(tmp_path / "x", tensor_program(), [NUMBERS]))
    assert found["state_dict.w"].tolist() == [1, 2, 3, 4]
    found = read_all(torch_zip(tmp_path / "x", tensor_program(4, 1, (2,), (2,)), [NUMBERS]))
    assert found["state_dict.w"].tolist() == [2, 4]


@pytest.mark.parametrize(
    "numbers",
    [
        dict(size=(5,)),
        dict(offset=1),
        dict(stride=(2,)),
        dict(offset=-1),
        dict(size=(-4,)),
        dict(stride=(-1,)),
        dict(numel=5, size=(5,)),
        dict(numel=2**62, size=(2**62,)),
        dict(size=(2, 2), stride=(1,)),
        dict(size=(1,) * 9, stride=(1,) * 9),
        dict(size=(10**6,), stride=(0,)),  # one element repeated: memory out of nothing
        dict(size=(0,), numel=0),
        dict(kind="QInt8Storage"),
        dict(key="1"),
        dict(key="../../etc/passwd"),
    ],
)
def test_tensors_outside_their_storage(tmp_path, numbers):
    refused(torch_zip(tmp_path / "x", tensor_program(**numbers), [NUMBERS]), "tensor", "storage")


def test_zip_containers(tmp_path):
    x, program = tmp_path / "x", tensor_program()
    refused(torch_zip(x, program, [NUMBERS], zipfile.ZIP_DEFLATED), "compressed")
    good = torch_zip(x, program, [NUMBERS]).read_bytes()
    x.write_bytes(good[:-30])
    refused(x, "truncated")
    x.write_bytes(good + b"more")
    refused(x, "appended")
    x.write_bytes(good.replace(NUMBERS, NUMBERS[::-1], 1))
    refused(x, "damaged")
    torch_zip(x, program, [NUMBERS], folder="a/b")
    refused(x, "data.pkl")


def test_two_members_of_one_name(tmp_path):
    x = torch_zip(tmp_path / "x", tensor_program(), [NUMBERS])
    with pytest.warns(UserWarning), zipfile.ZipFile(x, "a", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data/0", NUMBERS)
    refused(x, "appears twice")


def test_members_that_share_bytes(tmp_path):
    """A zip bomb without compression: many names for the same bytes."""
    x = torch_zip(tmp_path / "x", tensor_program(), [NUMBERS, NUMBERS])
    data = x.read_bytes()
    entries = [i for i in range(len(data)) if data[i : i + 4] == b"PK\1\2"]
    first, second = (slice(entries[i] + 42, entries[i] + 46) for i in (1, 2))
    data = bytearray(data)
    data[second] = data[first]
    x.write_bytes(data)
    refused(x, "overlap", "File name in directory")
    data = bytearray(torch_zip(x, tensor_program(), [NUMBERS]).read_bytes())
    entries = [i for i in range(len(data)) if data[i : i + 4] == b"PK\1\2"]
    for at in (20, 24):  # sizes in the directory, larger than the file
        data[entries[1] + at : entries[1] + at + 4] = struct.pack("<I", 2**31)
    x.write_bytes(data)
    refused(x, "file's end", "overlap", "Overlapped")


def test_a_large_directory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "DIRECTORY_BYTES", 100)
    refused(torch_zip(tmp_path / "x", tensor_program(), [NUMBERS]), "directory of")


def test_a_big_endian_file(tmp_path):
    x = torch_zip(tmp_path / "x", tensor_program(), [NUMBERS])
    with zipfile.ZipFile(x, "a", zipfile.ZIP_STORED) as file:
        file.writestr("archive/byteorder", "big")
    refused(x, "big-endian")


def test_pickles_that_exhaust(tmp_path, monkeypatch):
    """Time and memory bombs: each ends at once with one line."""
    began = time.monotonic()
    # 100 tuples, each of the one before and itself, kept in the memo: b"hd" is the last of them
    laugh = b"N\x85q\x000" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(100))
    bombs = {
        "hash of nested tuples": laugh + b"}hdNs.",
        "memo of 4 billion": b"Nr\xff\xff\xff\xff.",
        "string of 2**62": b"\x8d" + struct.pack("<Q", 2**62) + b"x.",
        "bytearray of 2**62": b"\x96" + struct.pack("<Q", 2**62) + b"x.",
        "stack underflow": b"0000.",
        "nothing marked": b"t.",
        "self in self": b"}q\0" + text("state_dict") + b"h\0s.",
        "a long number": b"L" + b"9" * 100_000 + b"L\n.",
        "deep": b"(" * 100_000 + b"t" * 100_000 + b".",
        "no end": b"N",
    }
    for name, program in bombs.items():
        with pytest.raises(ValueError) as error:
            pretrained.load(torch_zip(tmp_path / "x", program))
        assert len(str(error.value)) < 400, name
    monkeypatch.setattr(archive, "OPERATIONS", 1000)
    refused(torch_zip(tmp_path / "x", b"]" * 2000 + b"."), "operations")
    assert time.monotonic() - began < 30, "the hash of the nested tuples alone would take 2**100 steps"


LONG_LIST = b"]q\1(" + b")" * 20_000 + b"e0"
LONG_TUPLE = b"(" + b"K\1" * 20_000 + b"tq\1" + b"0"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n%s" + text("cpu") + b"%stQ"
QUADRATIC = {
    "OrderedDict of one long list": LONG_LIST
    + b"ccollections\nOrderedDict\nq\0"
    + b"h\0h\1\x85R0" * 50_000
    + b".",
    "tensors of very many dimensions": LONG_TUPLE
    + STORAGE % (text("0"), b"K\4")
    + b"q\2ctorch._utils\n_rebuild_tensor_v2\nq\0"
    + b"h\0(h\2K\0h\1h\1tR0" * 20_000
    + b".",
    "a long number as a key": b"\x8b"
    + struct.pack("<i", 1_000_000)
    + b"\x7f" * 1_000_000
    + b"q\0}("
    + b"h\0N" * 150_000
    + b"u.",
    "a long text as a key": text("x" * 1_000_000) + b"q\0}(" + b"h\0N" * 150_000 + b"u.",
    "calls with one long tuple": LONG_TUPLE
    + b"ctorch._utils\n_rebuild_parameter\nq\0"
    + b"h\0h\1R0" * 50_000
    + b".",
    "long names joined": text("x" * 1_000_000) + b"q\0" + b"h\0h\0\x93" * 50_000 + b"00.",
    "a long key of many storages": text("x" * 1_000_000)
    + b"q\0"
    + b"".join(STORAGE % (b"h\0", b"M" + struct.pack("<H", n)) for n in range(20_000))
    + b".",
    "one storage of many sizes": b"".join(
        STORAGE % (text("0"), b"M" + struct.pack("<H", n)) for n in range(1, 20_000)
    )
    + b".",
    "many storages": b"".join(STORAGE % (text(str(n)), b"K\1") + b"0" for n in range(100_000)) + b"N.",
    "a dict scanned many times": b"}q\1("
    + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(50_000))
    + b"u0}("
    + b"".join(b"J" + struct.pack("<i", n) + b"h\1" for n in range(50_000))
    + b"u.",
}


@pytest.mark.parametrize("name", QUADRATIC)
@pytest.mark.parametrize("script", [False, True])
def test_time_and_memory_are_linear(tmp_path, name, script):
    """Small files of up to 2 MB that once took quadratic time or memory, in a process with 300 MB."""
    path = torch_zip(tmp_path / "x", QUADRATIC[name], [NUMBERS])
    if script:  # the contents of a TorchScript archive are flattened
        with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as file:
            file.writestr("archive/constants.pkl", b"N.")
    began = time.process_time()
    if (pid := os.fork()) == 0:
        pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + (300 << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        try:
            pretrained.load(path)
        except ValueError as error:
            os._exit("MemoryError" in str(error) or "\n" in str(error))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert time.process_time() - began < 10


def test_safetensors_of_very_many_dimensions(tmp_path):
    began = time.process_time()
    refused(safetensors(tmp_path / "x", {"a": entry(0, 4, [1] * 500_000)}), "500000 dimensions")
    assert time.process_time() - began < 5


def test_a_view_of_a_storage_is_refused(tmp_path):
    """torch before 0.4 wrote them; their offset was once ignored."""
    program = STORAGE % (text("0"), b"K\4")
    view = b"(" + text("v") + b"K\2K\2t"
    program = program.replace(b"K\4tQ", b"K\4" + view + b"tQ")
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + program + b"K\0K\2\x85K\1\x85\x89)tR"
    refused(torch_zip(tmp_path / "x", b"}" + text("w") + tensor + b"s.", [NUMBERS]), "view of another")


def test_a_storage_that_is_declared_twice(tmp_path):
    program = b"(" + STORAGE % (text("0"), b"K\4") + STORAGE % (text("0"), b"K\2") + b"t."
    refused(torch_zip(tmp_path / "x", program, [NUMBERS]), "declared twice")


def test_a_module_that_contains_itself():
    loop = archive.Stub("x")
    loop.state = {"a": loop, "b": loop}
    with pytest.raises(ValueError, match="a name too long"):
        archive.flatten(loop)


@pytest.mark.parametrize("cut", [1, 40, 2000])
def test_truncated_files(tmp_path, cut):
    file = tmp_path / "x"
    torch.save(STATE, file)
    file.write_bytes(file.read_bytes()[:-cut])
    refused(file, "truncated")


def safetensors(path, header, data=b"\0" * 16, length=None):
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)
    return path


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_the_good_header_is_read(tmp_path):
    assert read_all(safetensors(tmp_path / "x", {"a": entry()}))["a"].shape == (4,)


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(), "b": entry()},
        {"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))},
        {"a": entry(-8, 8)},
        {"a": entry(8, 24)},
        {"a": entry(16, 0)},
        {"a": entry(0, 12)},
        {"a": entry(shape=(2, 3))},
        {"a": entry(shape=(-2, -2))},
        {"a": entry(shape=(2.0, 2))},
        {"a": entry(shape=(True, 4))},
        {"a": entry(shape=(2**40, 2**40))},
        {"a": entry(dtype="F8")},
        {"a": entry(dtype=["F32"])},
        {"a": {"dtype": "F32"}},
        {"a": entry() | {"data_offsets": "04"}},
        {"a": 3},
        b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]}, "a": 1}',
        b"{" * 200_000,
        b'{"a":' + b"[" * 200_000,
        b"{not json}",
    ],
)
def test_hostile_safetensors(tmp_path, header):
    refused(safetensors(tmp_path / "x", header), "")


def shards(folder, places, **content):
    """Safetensors files, each of one tensor [4] with the name of the file's letter, and their index."""
    for name in content or ("a", "b"):
        safetensors(folder / f"{name}.safetensors", {name: entry()}, content.get(name, NUMBERS))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2))
    return index


def test_sharded_safetensors(tmp_path):
    places = {"a": "a.safetensors", "b": "b.safetensors"}
    found = read_all(shards(tmp_path, places, a=NUMBERS, b=NUMBERS[::-1]))
    assert found["a"].tolist() == [1, 2, 3, 4]
    assert found["b"].tolist() == list(struct.unpack("<4f", NUMBERS[::-1]))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-1])
    refused(tmp_path / "model.safetensors.index.json", "truncated")


@pytest.mark.parametrize(
    "places, word",
    [
        ({"a": "a.safetensors", "b": "../b.safetensors"}, "not the name of a file"),
        ({"a": "a.safetensors", "b": "/etc/passwd"}, "not the name of a file"),
        ({"a": "a.safetensors", "b": ".."}, "is a folder"),
        ({"a": "a.safetensors", "b": ""}, "Invalid name"),
        ({"a": "a.safetensors", "b": 3}, "not readable"),
        ({"a": "a.safetensors", "b": ["b.safetensors"]}, "not readable"),
        ({"a": "a.safetensors", "b": "c.safetensors"}, "not readable"),
        ({"a": "a.safetensors", "b": "model.safetensors.index.json"}, "not a checkpoint"),
        ({"a": "a.safetensors", "b": "a.safetensors"}, "do not hold"),
        ({"a": "a.safetensors"}, None),
        ({"a": "b.safetensors", "c": "b.safetensors"}, "do not hold"),
        ([], "not readable"),
    ],
)
def test_indices_that_lead_elsewhere(tmp_path, places, word):
    folder = tmp_path / "inner"
    folder.mkdir()
    safetensors(tmp_path / "b.safetensors", {"b": entry()})
    index = shards(folder, places)
    if word is None:
        assert read_all(index).keys() == {"a"}
    else:
        refused(index, word)


@pytest.mark.parametrize("length", [2**63, 10**9, 10_000])
def test_a_huge_header_is_not_read(tmp_path, length):
    refused(safetensors(tmp_path / "x", {"a": entry()}, length=length), "header of")


@pytest.mark.parametrize(
    "data, word",
    [
        (b"", "not a checkpoint"),
        (b"<html>404 not found</html>", "not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x80\x04N.", "not a checkpoint"),
        (b"PK\x05\x06" + bytes(18), "not a checkpoint"),
    ],
)
def test_other_files(tmp_path, data, word):
    (tmp_path / "x.pt").write_bytes(data)
    refused(tmp_path / "x.pt", word)


def test_a_tar_as_torch_wrote_before_its_first_format(tmp_path):
    """torch.load would still unpickle from one; here it is no checkpoint."""
    marker, program = tmp_path / "marker", pickle.dumps(Call(os.system, f"touch {tmp_path}/marker"))
    with tarfile.open(tmp_path / "x.pt", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "../../tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(program)
            tar.addfile(info, io.BytesIO(program))
    refused(tmp_path / "x.pt", "not a checkpoint")
    assert not marker.exists()


def test_members_that_climb_are_never_written(tmp_path):
    x = torch_zip(tmp_path / "x", tensor_program(key="../../../evil"), [NUMBERS])
    with zipfile.ZipFile(x, "a", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data/../../../evil", NUMBERS)
        file.writestr("/etc/evil", NUMBERS)
    refused(x, "storage")
    torch_zip(x, tensor_program(), [NUMBERS])
    with zipfile.ZipFile(x, "a", zipfile.ZIP_STORED) as file:
        file.writestr("archive/../../evil", NUMBERS)
        file.writestr("/etc/evil", NUMBERS)
    assert read_all(x)["state_dict.w"].tolist() == [1, 2, 3, 4]  # they are names, not files
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = CLIP(Config(16, 16, 8, 32, 1, 1, 64, 8, 600, 32, 1, 1, 64))
    with torch.no_grad():
        model.visual.proj[0, 0] = value
    pretrained.save(model, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="visual.proj holds NaN or infinite"):
        pretrained.load(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_weights_of_another_kind_are_numbers_or_refused(tmp_path, dtype):
    model = CLIP(Config(16, 16, 8, 32, 1, 1, 64, 8, 600, 32, 1, 1, 64))
    pretrained.save(model, tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["state_dict"]["visual.proj"] = content["state_dict"]["visual.proj"].to(dtype)
    torch.save(content, tmp_path / "x.pt")
    try:
        loaded = pretrained.load(tmp_path / "x.pt")
        assert all(p.dtype == torch.float32 for p in loaded.parameters())
    except ValueError as error:
        assert "\n" not in str(error)


def test_memory_stays_small_whatever_a_file_declares(tmp_path):
    """Read in a process that may take 256 MB more than it has: sizes that a header declares are not taken."""
    big = 2**33
    files = [
        torch_zip(tmp_path / "a", tensor_program(big, 0, (big,)), [NUMBERS]),
        torch_zip(tmp_path / "b", b"\x8d" + struct.pack("<Q", big) + b"x."),
        safetensors(tmp_path / "c", {"a": entry(0, 4 * big, (big,))}),
        safetensors(tmp_path / "d", {"a": entry()}, length=big),
    ]
    bomb = tmp_path / "f"
    torch_zip(bomb, bytes(50_000_000), method=zipfile.ZIP_DEFLATED)  # 50 kB that unpack to 50 MB
    if (pid := os.fork()) == 0:
        pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + (256 << 20),) * 2)
        said = []
        for file in [*files, bomb]:
            try:
                read_all(file)
            except ValueError as error:
                said.append(str(error))
        os._exit(0 if len(said) == 5 and not any("MemoryError" in s for s in said) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_negative_and_conjugate_bits_are_refused(tmp_path):
    """torch keeps them beside the numbers; without them the sign of a weight is wrong."""
    torch.save({"w": torch.ones(3, dtype=torch.complex64).conj().imag}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "negative or conjugate bit")
    torch.save({"w": torch.ones(3)._neg_view()}, tmp_path / "y.pt")
    refused(tmp_path / "y.pt", "negative or conjugate bit")
    plain = torch.ones(3, dtype=torch.complex64).conj().imag.resolve_neg()
    torch.save({"w": plain}, tmp_path / "z.pt")
    assert torch.equal(read_all(tmp_path / "z.pt")["w"], plain)


def test_empty_tensors_of_absurd_sizes(tmp_path):
    size = (2**39, 2**39, 0)
    for file in (
        torch_zip(tmp_path / "a", tensor_program(4, 0, size, (0, 0, 0)), [NUMBERS]),
        torch_zip(tmp_path / "b", tensor_program(0, 0, size, (1, 1, 1)), [b""]),
        safetensors(tmp_path / "c", {"a": entry(0, 0, size)}, b""),
    ):
        with pytest.raises(ValueError) as error:
            pretrained.load(file)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_zip64_locator_that_leads_elsewhere(tmp_path):
    """The end of the file names a second directory, which only the locator points to."""
    data = torch_zip(tmp_path / "x", tensor_program(), [NUMBERS]).read_bytes()
    end = bytearray(data[-22:])
    for position in (0, len(data) - 22, len(data) - 78, 2**40):
        record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 3, 3, 2**20, position)
        locator = b"PK\6\7" + struct.pack("<IQI", 0, position, 1)
        (tmp_path / "x").write_bytes(data[:-22] + record + locator + end)
        refused(tmp_path / "x", "BadZipFile", "zip directory", "overlap", "not readable")


@pytest.mark.parametrize("where", ["a key", "a class", "a member", "a storage"])
def test_messages_repeat_little_of_a_foreign_name(tmp_path, where):
    name = "evil\x1b[2J" + "n" * 100_000
    program = {
        "a key": b"}" + text("state_dict") + b"}" + text(name) + tensor_program()[30:],
        "a class": b"\x80\x02(" + text("storage") + b"c" + name.encode() + b"\nx\n" + text("0") + b"NK\4tQ.",
        "a member": tensor_program(),
        "a storage": tensor_program(key=name),
    }[where]
    path = torch_zip(tmp_path / "x", program, [NUMBERS])
    if where == "a member":
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data/" + name[:60_000], NUMBERS)
    with pytest.raises(ValueError) as error:
        pretrained.load(path)
    assert len(str(error.value)) < 200 + len(str(path)) and str(error.value).isprintable()
