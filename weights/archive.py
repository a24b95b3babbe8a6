"""Tensors out of strangers' files, without running anything that is in them.

A checkpoint is raw numbers beside a pickle, and a pickle is a program: unpickling it can call any
function. Here the pickle is only read. read_pickle interprets its opcodes and has no way to call
anything: a class or a function is a name, and whatever is not a tensor, a dict, a list or a plain value
becomes an inert Stub. So OpenAI's TorchScript archives, old files with numpy scalars or argparse
namespaces in them, and hostile files are all read in the same way.

    zip of torch.save, or TorchScript    <root>/data.pkl, <root>/data/<key>: one member for each storage
    torch.save before 1.6                five pickles, then the storages
    safetensors                          length, JSON header, numbers

Numbers stay in the file until Checkpoint.tensors asks for some, and nothing is believed: a tensor must
lie within its storage, a storage within the file, no two storages may share bytes, and memory is bounded
by the size of the file.
"""

import json
import math
import mmap
import os
import pickletools
import struct
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

OPERATIONS = 2_000_000  # of one pickle; Llip's G/14 with its optimizer has some 50,000
DIRECTORY_BYTES = 16 << 20  # of a zip's directory or a safetensors header; a real one has under 1 MB
ENTRIES, DEPTH = 100_000, 32  # tensors in a file, dots in a name
BROKEN = (  # what reading raises for a file that no program writes
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    EOFError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before 1.6

STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Name(str):
    """'module name' of a class or a function that a pickle asks for; never imported."""


class Stub:
    """Stands for an object that was not made or a call that was not done."""

    def __init__(self, name: str):
        self.name, self.state = name, None


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Array:
    """A tensor that is still in the file; offset and stride in elements of its storage."""

    storage: Storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def __post_init__(self):
        numbers = (self.storage.numel, self.offset, *self.shape, *self.stride)
        if any(type(n) is not int or not 0 <= n < 2**40 for n in numbers):
            raise ValueError("a tensor's sizes are not numbers of elements")
        if len(self.shape) != len(self.stride) or len(self.shape) > 8:
            raise ValueError(f"a tensor of {len(self.shape)} sizes and {len(self.stride)} strides")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        if 0 not in self.shape and last >= self.storage.numel:
            raise ValueError(f"a tensor ends at {last}, its storage at {self.storage.numel}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize


@dataclass
class Checkpoint:
    """What a file holds: content is plain values, dicts and lists, with an Array for every tensor."""

    path: Path
    kind: str  # "TorchScript archive", "torch.save file" or "safetensors"
    content: object = None
    spans: dict = field(default_factory=dict)  # storage key -> (first byte, bytes, crc or None)

    def tensors(self, arrays: dict[str, Array]) -> dict[str, Tensor]:
        """Reads the given arrays, each with memory of its own and in the file's precision.

        Raises: ValueError for a storage that is not there, is short, or fails its checksum, and for
                arrays that together are larger than the file (views that repeat elements).
        """
        if sum(a.nbytes for a in arrays.values()) > self.path.stat().st_size:
            raise ValueError(f"{self.path}: its tensors are declared larger than the file")
        by_storage, found = defaultdict(list), {}
        for name, array in arrays.items():
            by_storage[array.storage].append((name, array))
        with open(self.path, "rb") as file:
            for storage, wanted in by_storage.items():
                flat = self.read_storage(file, storage)
                for name, a in wanted:
                    view = flat.as_strided(a.shape, a.stride, a.offset)
                    found[name] = view.clone(memory_format=torch.contiguous_format)
        return {name: found[name] for name in arrays}

    def read_storage(self, file, storage: Storage) -> Tensor:
        """One storage as a flat tensor (numel,)."""
        start, length, crc = self.spans.get(storage.key, (0, -1, None))
        if not 0 < storage.numel * storage.dtype.itemsize <= length:
            raise ValueError(
                f"{self.path}: storage {storage.key!a:.40} should have {storage.numel} elements of "
                f"{storage.dtype}, the file has {max(length, 0)} bytes of it"
            )
        data = bytearray(length)
        file.seek(start)
        if file.readinto(data) != length or crc not in (None, zlib.crc32(data)):
            raise ValueError(f"{self.path}: damaged (storage {storage.key!a:.40}): download it again")
        return torch.frombuffer(data, dtype=storage.dtype, count=storage.numel)


def read(path: str | Path) -> Checkpoint:
    """Opens a checkpoint; its format is found by its first bytes, never by its name.

    Raises: ValueError with one line for whatever is wrong with it, OSError if it cannot be opened.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(16)
        try:
            if head.startswith(b"PK\x03\x04"):
                checkpoint = read_zip(path, file, size)
            elif head.startswith(LEGACY):
                checkpoint = read_legacy(path, file)
            elif head[8:9] == b"{":
                checkpoint = read_safetensors(path, file, size)
            elif head.startswith(b"version https://"):
                raise ValueError("a Git LFS pointer, not the weights: run git lfs pull")
            else:
                raise ValueError(f"not a checkpoint: it begins with {head!r} ({size} bytes)")
            check_spans(checkpoint.spans, size)
        except BROKEN as error:
            raise ValueError(f"{path}: {describe_error(error)}") from error
    return checkpoint


def describe_error(error: Exception) -> str:
    """One short line: our own messages as they are, others with their type."""
    if type(error) is ValueError and len(str(error)) < 200:
        return str(error)
    said = " ".join(str(error).split())
    return f"not readable, damaged or hostile ({type(error).__name__}: {said:.120})"


def check_spans(spans: dict, size: int) -> None:
    """Every storage within the file, and no byte in two of them."""
    end = 0
    for key, (start, length, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if length < 0 or start < end or start + length > size:
            raise ValueError(
                f"storage {key!a:.40} at bytes {start} to {start + length} overlaps another one or the "
                f"file's end at {size}: a truncated download, or hostile"
            )
        end = start + length


def read_zip(path: Path, file, size: int) -> Checkpoint:
    """torch.save's format since 1.6, and TorchScript: a zip whose members are stored as they are."""
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")  # zip64 record 56, its locator 20, end record 22
    if tail[76:80] != b"PK\x05\x06":
        raise ValueError("no zip directory at its end: a truncated download, or something appended")
    directory = struct.unpack("<I", tail[88:92])[0]
    if tail[56:60] == b"PK\x06\x07":
        directory = struct.unpack("<Q", tail[40:48])[0]
    if directory > DIRECTORY_BYTES:
        raise ValueError(f"a zip directory of {directory} bytes, at most {DIRECTORY_BYTES} are read")
    members = {}
    for info in zipfile.ZipFile(file).infolist():
        if info.filename in members:
            raise ValueError(f"two members of the zip are called {info.filename!a:.60}")
        members[info.filename] = info
    root = min((m[: -len("data.pkl")] for m in members if m.endswith("/data.pkl")), default=None)
    if root is None or root.count("/") != 1:
        raise ValueError("a zip without data.pkl in one folder: not written by torch.save")
    script = root + "constants.pkl" in members
    spans = {}
    for name, info in members.items():
        folder, _, key = name.rpartition("/")
        if name in (root + "data.pkl", root + "byteorder") or folder == root + "data":
            spans[name] = member_span(file, info)
    if root + "byteorder" in spans and span_bytes(file, *spans.pop(root + "byteorder")) != b"little":
        raise ValueError("written on a big-endian machine: not supported")
    program = span_bytes(file, *spans[root + "data.pkl"])
    content = read_pickle(BytesIO(program), lambda key: root + "data/" + key)
    return Checkpoint(path, "TorchScript archive" if script else "torch.save file", content, spans)


def member_span(file, info: zipfile.ZipInfo) -> tuple[int, int, int]:
    """Where the bytes of an uncompressed member lie: behind its own header, whose length varies."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"member {info.filename!a:.60} is compressed or encrypted; torch never does")
    if info.file_size != info.compress_size:
        raise ValueError(f"member {info.filename!a:.60} declares {info.file_size} and other bytes")
    file.seek(info.header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise ValueError(f"member {info.filename!a:.60} is not where the zip's directory says")
    return info.header_offset + 30 + name + extra, info.file_size, info.CRC


def span_bytes(file, start: int, length: int, crc: int) -> bytes:
    file.seek(start)
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError("a member is declared larger than the file")
    data = file.read(length)
    if len(data) != length or zlib.crc32(data) != crc:
        raise ValueError("a checksum is wrong: damaged, download it again")
    return data


def read_legacy(path: Path, file) -> Checkpoint:
    """torch.save before 1.6: magic number, version, machine, object, storage keys; then the storages."""
    storages: dict[str, Storage] = {}
    spans = {}
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:  # its read() never over-allocates
        for _ in range(2):
            read_pickle(data)
        if not read_pickle(data).get("little_endian"):
            raise ValueError("written on a big-endian machine: not supported")
        content = read_pickle(data, str, storages)
        for key in read_pickle(data):
            if type(key) is not str:  # TRAP: hashing nested tuples can take for ever
                raise ValueError("a storage key that is not a name")
            itemsize = storages[key].dtype.itemsize
            start = data.tell() + 8
            spans[key] = (start, struct.unpack("<q", data.read(8))[0] * itemsize, None)
            if spans[key][1] < 0 or start + spans[key][1] > len(data):
                raise ValueError(f"storage {key!a:.40} ends behind the file: a truncated download")
            data.seek(start + spans[key][1])
    return Checkpoint(path, "torch.save file", content, spans)


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
        if dtype not in SAFETENSORS:
            raise ValueError(f"tensor {name!a:.60} has dtype {dtype!a:.20}: not supported")
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            raise ValueError(f"tensor {name!a:.60} at bytes {begin!a:.20} to {end!a:.20}")
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        storage = Storage(name, SAFETENSORS[dtype], math.prod(shape))
        content[name] = Array(storage, tuple(shape), tuple(stride))
        if content[name].nbytes != end - begin:
            raise ValueError(f"tensor {name!a:.60}: {end - begin} bytes for shape {tuple(shape)}")
        spans[name] = (8 + length + begin, end - begin, None)
    return Checkpoint(path, "safetensors", content, spans)


def unique(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return found


# Opcodes whose argument is the value itself; pickletools decodes it.
VALUES = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": lambda: Stub("set")}
FIXED = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "NEWOBJ_EX": 3,
    "SETITEM": 2,
    "APPEND": 1,
    "BUILD": 1,
    "STACK_GLOBAL": 2,
    "BINPERSID": 1,
}
MARKED = {"TUPLE", "LIST", "DICT", "FROZENSET", "SETITEMS", "APPENDS", "ADDITEMS", "OBJ", "INST"}


def read_pickle(file, locate=str, storages: dict | None = None) -> object:
    """The value that a pickle describes, found without calling anything it names.

    Args:    file with read, readline and tell; left behind the pickle's end
             locate: name of a storage from its key in the pickle;  storages: filled with those met
    Raises:  ValueError and others for a pickle that no pickler writes.
    """
    stack, marks, memo = [], [], {}
    for count, (code, arg, _) in enumerate(pickletools.genops(file)):
        op = code.name
        if count > OPERATIONS:
            raise ValueError(f"a pickle of more than {OPERATIONS} operations")
        if op in VALUES:
            stack.append(arg)
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in EMPTY:
            stack.append(EMPTY[op]())
        elif op in FIXED or op in MARKED:
            at = marks.pop() if op in MARKED else len(stack) - FIXED[op]
            if at < 0:
                raise ValueError("a pickle takes more than it has put")
            items = stack[at:]
            del stack[at:]
            if op == "BINPERSID":
                items = [persistent(items[0], locate, {} if storages is None else storages)]
                stack += items
            else:
                combine(op, arg, items, stack)
        elif op == "GLOBAL":
            stack.append(Name(arg))
        elif op == "MARK":
            marks.append(len(stack))
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op == "DUP":
            stack.append(stack[-1])
        elif op in ("POP", "POP_MARK"):
            del stack[marks.pop() if op == "POP_MARK" else -1 :]
        elif op == "STOP":
            return stack.pop()
        elif op not in ("PROTO", "FRAME"):
            raise ValueError(f"pickle opcode {op}: not one that torch writes")
    raise ValueError("a pickle without an end")


def combine(op: str, arg, items: list, stack: list) -> None:
    """Opcodes that make one value out of several, or put several into the value on the stack."""
    if op.startswith("TUPLE"):
        stack.append(tuple(items))
    elif op == "LIST":
        stack.append(items)
    elif op == "DICT":
        stack.append(put({}, items))
    elif op in ("SETITEM", "SETITEMS"):
        put(stack[-1], items)
    elif op in ("APPEND", "APPENDS"):
        if isinstance(stack[-1], list):
            stack[-1].extend(items)
    elif op == "BUILD":
        if isinstance(stack[-1], Stub):
            stack[-1].state = items[0]
    elif op == "STACK_GLOBAL":
        if not all(type(item) is str for item in items):
            raise ValueError("a pickle asks for a class by something that is not a name")
        stack.append(Name(" ".join(items)))
    elif op == "INST":
        stack.append(called(Name(arg), items))
    elif op == "OBJ":
        stack.append(called(items[0], items[1:]))
    elif op in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
        stack.append(called(*items[:2]))
    elif op == "FROZENSET":
        stack.append(Stub("frozenset"))  # ADDITEMS: nothing that is wanted lies in a set


def put(target: object, items: list) -> object:
    """Keys and values by turns into a dict; others take nothing. Only plain keys: hashing can be hostile."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2]):
            if type(key) in (str, int):
                target[key] = value
    return target


def called(function: object, arguments: tuple | list) -> object:
    """What a recorded call stands for. Nothing is called: three names are known, all others are a Stub."""
    if type(function) is not Name:
        return Stub("?")
    if function in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"):
        storage, offset, shape, stride = arguments[:4]
        if type(storage) is not Storage:
            raise ValueError("a tensor without a storage")
        return Array(storage, tuple(shape), tuple(stride), offset)
    if function == "torch._utils _rebuild_parameter":
        return arguments[0]
    if function == "collections OrderedDict":
        pairs = arguments[0] if arguments else []
        return put({}, [value for pair in pairs for value in pair[:2]])
    return Stub(function[:200])


def persistent(record: tuple, locate, storages: dict) -> Storage:
    """('storage', type, key, device, elements) -> Storage. Where it was computed is of no interest."""
    tag, kind, key, _, numel = record[:5]
    if tag != "storage" or type(kind) is not Name or type(key) is not str:
        raise ValueError("a persistent id that is no storage")
    if kind not in STORAGES:
        raise ValueError(f"storage type {kind!a:.60}: not supported")
    return storages.setdefault(key, Storage(locate(key), STORAGES[kind], numel))


def flatten(content: object) -> dict[str, Array]:
    """Nested dicts and objects to dotted names: {"visual": {"proj": Array}} -> {"visual.proj": Array}.

    Raises: ValueError beyond ENTRIES values or DEPTH levels, as a structure that contains itself has.
    """
    found, todo, steps = {}, [("", content)], 0
    while todo:
        name, value = todo.pop()
        steps += 1
        if steps > ENTRIES or name.count(".") > DEPTH:
            raise ValueError(f"more than {ENTRIES} values or {DEPTH} levels in one state dict")
        value = value.state if isinstance(value, Stub) else value
        if isinstance(value, Array):
            found[name] = value
        elif isinstance(value, dict):
            items = [(k, v) for k, v in value.items() if isinstance(v, (Array, Stub, dict))]
            todo += [(f"{name}.{key}" if name else str(key), v) for key, v in reversed(items)]
    return found


def write_safetensors(tensors: dict[str, Tensor], file) -> None:
    """Writes fp32 tensors into an open binary file, in the safetensors format."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8 bytes
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
