"""Tensors from files of strangers, read without executing anything in them.

A checkpoint holds raw numbers and a pickle, and a pickle is a program that can call any function. This reader
interprets the opcodes of a pickle and calls nothing. A class or a function is only a name. Every value that
is not a tensor, a dict, a list or a plain value becomes an inert Stub.

    zip of torch.save, or TorchScript    <root>/data.pkl, and <root>/data/<key> for each storage
    safetensors                          length, JSON header, numbers
    index of sharded safetensors         JSON with the file of each tensor

Checkpoint.tensors reads the numbers. A tensor must lie within its storage and a storage within the file, and
storages may not share bytes. Time and memory are linear in the size of the file.
"""

import json
import math
import pickletools
import struct
import zipfile
import zlib
from collections import defaultdict, namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from util.files import open_file
from util.text import one_line, printable

OPERATIONS = 500_000  # of one pickle; Llip's G/14 with its optimizer has about 50,000
DIRECTORY_BYTES = 4 << 20  # of the directory of a zip, a safetensors header or an index; usual are 0.5 MB
ENTRIES, NAME, DIMENSIONS = 100_000, 300, 8  # values of a state dict, characters of a name, of a tensor
BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
BROKEN += (EOFError, OSError, struct.error, zipfile.BadZipFile)

# torch's storage, safetensors' name, dtype
TYPES = "Double F64 float64, Float F32 float32, Half F16 float16, BFloat16 BF16 bfloat16, Long I64 int64, "
TYPES += "Int I32 int32, Short I16 int16, Char I8 int8, Byte U8 uint8, Bool BOOL bool"
TYPES = [names.split() for names in TYPES.split(", ")]
STORAGES = {f"torch {storage}Storage": getattr(torch, dtype) for storage, _, dtype in TYPES}
SAFETENSORS = {name: getattr(torch, dtype) for _, name, dtype in TYPES}
Storage = namedtuple("Storage", "key dtype numel")


class Name(str):
    """The "module name" of a class or a function in a pickle; never imported."""


class Stub:
    """In the place of an object that was not made or a call that was not done."""

    def __init__(self, name: str):
        self.name, self.state = name, None


def short(value: object) -> str:
    """For messages. TRAP: the repr of a container in a hostile file can be larger than memory."""
    plain = isinstance(value, (str, int, float, bool, type(None)))
    return f"{value!a:.40}" if plain else f"a {getattr(value, 'name', type(value).__name__)!s:.40}"


@dataclass(frozen=True)
class Array:
    """A tensor that is still in the file; offset and stride count elements of its storage."""

    storage: Storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def __post_init__(self):
        if not len(self.shape) == len(self.stride) <= DIMENSIONS:
            raise ValueError(f"a tensor of {len(self.shape)} sizes and {len(self.stride)} strides")
        numbers = (self.storage.numel, self.offset, *self.shape, *self.stride)
        if any(type(n) is not int or not 0 <= n < 2**40 for n in numbers):
            raise ValueError("the sizes of a tensor are not numbers of elements")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        if 0 not in self.shape and last >= self.storage.numel:
            raise ValueError(f"a tensor ends at element {last}, its storage at {self.storage.numel}")


@dataclass
class Checkpoint:
    """The content of a file: plain values, dicts and lists, with an Array for every tensor."""

    path: Path
    kind: str  # "TorchScript archive", "torch.save file" or "safetensors"
    content: dict = field(default_factory=dict)
    spans: dict = field(default_factory=dict)  # storage key -> (file, first byte, bytes, crc or None)
    size: int = 0  # bytes of all its files

    def tensors(self, arrays: dict[str, Array]) -> dict[str, Tensor]:
        """Reads tensors in the file's precision; no two share memory.   Raises: ValueError if damaged."""
        if sum(math.prod(a.shape) * a.storage.dtype.itemsize for a in arrays.values()) > self.size:
            raise ValueError(f"{self.path}: its tensors are declared larger than the file")
        found, storages = {}, defaultdict(dict)
        for name, array in arrays.items():
            storages[array.storage][name] = array
        for storage, members in storages.items():
            span = self.spans.get(storage.key, (self.path, 0, 0, None))
            if not 0 < storage.numel * storage.dtype.itemsize <= span[2]:
                has = f"{storage.numel} elements of {storage.dtype}, but {span[2]} bytes"
                raise ValueError(f"{span[0]}: storage {storage.key!a:.40} has {has}")
            flat = torch.frombuffer(read_span(*span), dtype=storage.dtype, count=storage.numel)  # (numel,)
            for name, a in members.items():
                view = flat.as_strided(a.shape, a.stride, a.offset)
                # SPEED: the only tensor of a storage, and all of it, needs no copy
                alone = len(members) == 1 and view.is_contiguous() and view.numel() == storage.numel
                found[name] = view if alone else view.clone(memory_format=torch.contiguous_format)
        return {name: found[name] for name in arrays}


def read_span(path: Path, start: int, length: int, crc: int | None) -> bytearray:
    data = bytearray(length)
    with open_file(path) as file:
        file.seek(start)
        if file.readinto(data) != length or crc not in (None, zlib.crc32(data)):
            raise ValueError(f"{path}: damaged, a checksum is wrong: download it again")
    return data


def read(path: str | Path, index: bool = True) -> Checkpoint:
    """Opens a checkpoint, or an index, by its first bytes.   Raises: ValueError, one line; OSError."""
    path = Path(path)
    size = path.stat().st_size
    with open_file(path) as file:
        head = file.read(16)
        try:
            if head.startswith(b"PK\x03\x04"):
                found = read_zip(path, file, size)
            elif head[8:9] == b"{":
                found = read_safetensors(path, file, size)
            elif head.startswith(b"{") and index:
                return read_index(path, size)
            elif head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF"):
                raise ValueError("torch.save's format before 1.6: load it with torch and save it again")
            elif head.startswith(b"version https://"):
                raise ValueError("a Git LFS pointer, not the weights: run git lfs pull")
            else:
                raise ValueError(f"not a checkpoint: it begins with {head!r} ({size} bytes)")
            check_spans(found.spans, size)
        except BROKEN as error:
            text = printable(one_line(error)).removeprefix(f"{path}: ")
            if type(error) is not ValueError:
                text = f"not readable, damaged or hostile ({type(error).__name__}: {text:.120})"
            raise ValueError(f"{path}: {text}") from error
    found.size, found.content = size, found.content if isinstance(found.content, dict) else {}
    return found


def check_spans(spans: dict, size: int) -> None:
    """Every storage lies within the file, and no byte belongs to two of them."""
    end = 0
    for key, (_, start, length, _) in sorted(spans.items(), key=lambda item: item[1][1:3]):
        if length < 0 or start < end or start + length > size:
            raise ValueError(f"storage {key!a:.40} overlaps another or the file's end: truncated, or hostile")
        end = start + length


def read_zip(path: Path, file, size: int) -> Checkpoint:
    """torch.save since 1.6, and TorchScript: a zip whose members are not compressed."""
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")  # zip64 record 56, its locator 20, end record 22
    if tail[76:80] != b"PK\x05\x06":
        raise ValueError("no zip directory at its end: a truncated download, or something was appended")
    directory = struct.unpack("<I", tail[88:92])[0]
    if tail[56:60] == b"PK\x06\x07":
        directory = struct.unpack("<Q", tail[40:48])[0]
    if directory > DIRECTORY_BYTES:
        raise ValueError(f"a zip directory of {directory} bytes, at most {DIRECTORY_BYTES} are read")
    members = unique([(info.filename, info) for info in zipfile.ZipFile(file).infolist()])
    root = min((m[: -len("data.pkl")] for m in members if m.endswith("/data.pkl")), default=None)
    if root is None or root.count("/") != 1:
        raise ValueError("a zip without data.pkl in one folder: not written by torch.save")
    spans = {}
    for name, info in members.items():
        if name in (root + "data.pkl", root + "byteorder") or name.rpartition("/")[0] == root + "data":
            if info.compress_type or info.flag_bits & 1 or info.file_size != info.compress_size:
                raise ValueError(f"member {name!a:.60} is compressed or encrypted; torch never does that")
            file.seek(info.header_offset)
            # the bytes follow a local header, which varies in length
            header = 30 + sum(struct.unpack("<26xHH", file.read(30)))
            spans[name] = path, info.header_offset + header, info.file_size, info.CRC
    check_spans(spans, size)
    if root + "byteorder" in spans and read_span(*spans.pop(root + "byteorder")) != b"little":
        raise ValueError("written on a big-endian machine: not supported")
    content = read_pickle(read_span(*spans[root + "data.pkl"]), root + "data/")
    script = root + "constants.pkl" in members
    content = flatten(content) if script else content
    return Checkpoint(path, "TorchScript archive" if script else "torch.save file", content, spans)


def read_safetensors(path: Path, file, size: int) -> Checkpoint:
    """The safetensors format: u64 length, JSON {name: dtype, shape, data_offsets}, numbers."""
    file.seek(0)
    length = struct.unpack("<Q", file.read(8))[0]
    if length > min(DIRECTORY_BYTES, size - 8):
        raise ValueError(f"a safetensors header of {length} bytes in a file of {size}")
    content, spans = {}, {}
    for name, entry in json.loads(file.read(length), object_pairs_hook=unique).items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in SAFETENSORS or len(shape) > DIMENSIONS:
            raise ValueError(f"tensor {name!a:.60}: {dtype!a:.20} of {len(shape)} dimensions: not supported")
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        storage = Storage(name, SAFETENSORS[dtype], math.prod(shape))
        nbytes = storage.numel * storage.dtype.itemsize
        content[name] = Array(storage, tuple(shape), stride)
        if (type(begin), type(end)) != (int, int) or begin < 0 or nbytes != end - begin:
            raise ValueError(f"tensor {name!a:.60}: bytes {begin!a:.20} to {end!a:.20} for shape {shape}")
        spans[name] = (path, 8 + length + begin, end - begin, None)
    return Checkpoint(path, "safetensors", content, spans)


def read_index(path: Path, size: int) -> Checkpoint:
    """Sharded safetensors: an index {"weight_map": {name: file}} and the files in its folder."""
    if size > DIRECTORY_BYTES:
        raise ValueError(f"an index of {size} bytes, at most {DIRECTORY_BYTES} are read")
    places = json.loads(read_span(path, 0, size, None), object_pairs_hook=unique)["weight_map"]
    found = Checkpoint(path, "safetensors", {})
    for name in sorted(set(places.values())):
        # TRAP: the name comes from a stranger and could lead out of the folder
        if Path(name).name != name:
            raise ValueError(f"shard {name!a:.60} is not the name of a file in its folder")
        shard = read(path.with_name(name), index=False)
        if shard.kind != "safetensors" or found.content.keys() & shard.content.keys():
            raise ValueError(f"shard {name!a:.60} is no safetensors file, or repeats a tensor")
        found.content |= shard.content
        found.spans |= shard.spans
        found.size += shard.size
    if found.content.keys() != places.keys():
        raise ValueError("the shards do not hold the tensors that the index names")
    return found


def unique(pairs: list) -> dict:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name appears twice")
    return found


# Opcodes whose argument is the value itself; pickletools decodes it.
VALUES = [op for op in pickletools.opcodes if op.arg and not op.stack_before]
VALUES = {op.name for op in VALUES if op.stack_after not in ([], [pickletools.anyobject])}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": lambda: Stub("set")}
EMPTY |= {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
# Opcodes that take this number of values from the stack, or with -1 all values after a mark
TAKES = dict(TUPLE1=1, TUPLE2=2, TUPLE3=3, STACK_GLOBAL=2, BINPERSID=1, REDUCE=2, NEWOBJ=2, NEWOBJ_EX=3)
TAKES |= dict(SETITEM=2, APPEND=1, BUILD=1, POP=1, POP_MARK=-1)
TAKES |= dict.fromkeys(("TUPLE", "LIST", "DICT", "FROZENSET", "SETITEMS", "APPENDS", "ADDITEMS"), -1)


def read_pickle(program: bytearray, prefix: str) -> object:
    """The value that a pickle describes, found without calling anything.   Raises: one of BROKEN."""
    stack, marks, memo, storages = [], [], {}, {}
    for count, (code, arg, _) in enumerate(pickletools.genops(program)):
        op = code.name
        if count > OPERATIONS:
            raise ValueError(f"a pickle of more than {OPERATIONS} operations")
        if op in VALUES:
            stack.append(arg)
        elif op in EMPTY:
            stack.append(EMPTY[op]())
        elif op in TAKES:
            at = marks.pop() if TAKES[op] < 0 else len(stack) - TAKES[op]
            if at < 0:
                raise ValueError("a pickle takes more values than it has put")
            items = stack[at:]
            del stack[at:]
            if op == "BINPERSID":
                stack.append(persistent(items[0], prefix, storages))
            else:
                combine(op, items, stack)
        elif op == "GLOBAL":
            stack.append(Name(arg))
        elif op == "MARK":
            marks.append(len(stack))
        elif op in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op == "STOP":
            return stack.pop()
        elif op not in ("PROTO", "FRAME"):
            raise ValueError(f"pickle opcode {op}: not one that torch writes")
    raise ValueError("a pickle without an end")


def combine(op: str, items: list, stack: list) -> None:
    """Opcodes that make one value of several, or put several into the value on the stack."""
    if op.startswith("TUPLE"):
        stack.append(tuple(items))
    elif op in ("LIST", "DICT"):
        stack.append(items if op == "LIST" else put({}, items))
    elif op.startswith("SETITEM"):
        put(stack[-1], items)
    elif op.startswith("APPEND") and isinstance(stack[-1], list):
        stack[-1].extend(items)
    elif op == "BUILD" and isinstance(stack[-1], Stub):
        stack[-1].state = items[0]
    elif op == "STACK_GLOBAL":
        if not all(type(item) is str and len(item) <= NAME for item in items):
            raise ValueError("a pickle names a class by something that is not a name")
        stack.append(Name(" ".join(items)))
    elif op in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
        stack.append(called(*items[:2]))
    elif op == "FROZENSET":
        stack.append(Stub("frozenset"))  # ADDITEMS needs nothing: no tensor lies in a set


def put(target: object, items: list) -> object:
    """Alternating keys and values into a dict. Only plain keys, because hashing can be hostile."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2]):
            if type(key) is str or (type(key) is int and key.bit_length() < 64):  # longer ones hash slowly
                target[key] = value
    return target


def called(function: object, arguments: tuple | list) -> object:
    """The value of a recorded call. Nothing is called: five names are known, all others give a Stub."""
    if type(function) is not Name:
        return Stub("?")
    if function in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"):
        storage, offset, shape, stride, _, _, bits = [*arguments[:7], None, None, None][:7]
        if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
            raise ValueError("a tensor without a storage, a shape or strides")
        if bits:
            raise ValueError("a tensor with a negative or conjugate bit: save tensor.resolve_neg()")
        return Array(storage, shape, stride, offset)
    if function in ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"):
        return arguments[0]
    if function == "collections OrderedDict":
        pairs = arguments[0] if arguments and type(arguments[0]) is list else []
        found = put({}, [value for pair in pairs for value in pair[:2]])
        pairs.clear()  # TRAP: a hostile pickle calls this many times with one long list
        return found
    return Stub(function[:200])


def persistent(record: tuple, prefix: str, storages: dict) -> Storage:
    """('storage', type, key, device, elements, view) -> Storage. The device does not matter."""
    tag, kind, key, _, numel = record[:5]
    if (tag, type(kind), type(numel)) != ("storage", Name, int) or record[5:6] not in ((), (None,)):
        raise ValueError("a persistent id that is not a storage, or is a view of another one")
    if type(key) is not str or len(key) > NAME or kind not in STORAGES:
        raise ValueError(f"storage type {kind!a:.60}: not supported")
    storage = Storage(prefix + key, STORAGES[kind], numel)
    if storages.setdefault(key, storage) != storage:
        raise ValueError(f"storage {key!a:.40} is declared twice, with two types or sizes")
    return storages[key]


def flatten(content: object) -> dict[str, Array]:
    """Nested dicts and objects to dotted names: {"visual": {"proj": Array}} -> {"visual.proj": Array}."""
    found, todo, steps = {}, [("", content)], 0
    while todo:
        name, value = todo.pop()
        value = value.state if isinstance(value, Stub) else value
        steps += 1 + (len(value) if isinstance(value, dict) else 0)
        if steps > ENTRIES or len(name) > NAME:  # as in a structure that contains itself
            raise ValueError(f"a state dict of more than {ENTRIES} values, or a name too long")
        if isinstance(value, Array):
            found[name] = value
        elif isinstance(value, dict):
            items = [(k, v) for k, v in value.items() if isinstance(v, (Array, Stub, dict))]
            todo += [(f"{name}.{key}" if name else str(key), v) for key, v in reversed(items)]
    return found
