"""Mutated files: every reader must end soon, in bounded memory, with a result or with one expected error.

A format has some valid files, a reader, and tokens with a meaning in it. A mutation flips bits, cuts, repeats
or swaps parts, or writes a token or an extreme number. Input i of a format depends on (format, i) only, so
that a failure can be repeated. One child process reads all inputs of a format. The kernel limits its memory,
and an alarm ends a reader that takes too long.
"""

import copy
import io
import json
import os
import pickletools
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pretrained  # noqa: E402
from baselines.metaclip import Corpus, read_entries  # noqa: E402
from model import CLIP, Config  # noqa: E402
from readers import datasets, images, shards  # noqa: E402
from reliability.pictures import file_of  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from weights import layouts  # noqa: E402

SECONDS, MEMORY = 60, 1 << 30  # per input; bytes beyond what the process has at its start
# Events of Python's audit hooks that no reader may cause with any file
NEVER = "os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty pty.spawn subprocess.Popen os.chmod "
NEVER = {*NEVER.split(), "socket.connect", "pickle.find_class", "os.kill"}
EXTREME = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]
NASTY = [
    b"\0",
    b"\n",
    b"\r\n",
    b'"',
    b",",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\u0000",
    b"\\ud800",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"..",
    b"/",
    b"../../etc/passwd",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"{}",
    b"9" * 400,
    "😀\u202e\u2028".encode(),
    b"<|endoftext|>",
]


def mutate(good: bytes, rng: random.Random, tokens=()) -> bytes:
    """Makes one to eight small changes."""
    data = bytearray(good)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.choice([1, 2, 4, 64, 1 << 20])]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 200)] * rng.choice([1, 2, 50])
        elif kind == 4:
            form = rng.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"])
            number = struct.pack(form, rng.choice(EXTREME) % 256 ** struct.calcsize(form))
            data[at : at + len(number)] = number
        elif kind == 5:
            data[at:at] = rng.choice([*NASTY, *tokens])
        elif kind == 6:
            token = rng.choice([*NASTY, *tokens])
            data[at : at + len(token)] = token
        else:
            other = rng.randrange(len(data) + 1)
            size = rng.randrange(1, 100)
            data[at : at + size], data[other : other + size] = (
                data[other : other + size],
                data[at : at + size],
            )
    return bytes(data)


# TRAP: a wrong checksum would stop the reader early, so most mutants get a correct one


def repair_png(data: bytes) -> bytes:
    at, out = 8, bytearray(data[:8])
    while at + 12 <= len(data):
        size = min(int.from_bytes(data[at : at + 4], "big"), len(data) - at - 12)
        out += data[at : at + 8 + size]
        out += zlib.crc32(data[at + 4 : at + 8 + size]).to_bytes(4, "big")
        at += 12 + size
    return bytes(out) + data[at:]


def repair_tar(data: bytes) -> bytes:
    blocks = [bytearray(data[at : at + 512]) for at in range(0, len(data), 512)]
    for block in blocks:
        if b"ustar" in block[257:265] and len(block) == 512:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def mutate_zip(good: bytes, rng: random.Random, tokens) -> bytes:
    """Changes the pickle or the numbers inside a valid zip file."""
    with zipfile.ZipFile(io.BytesIO(good)) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    name = next(n for n in members if n.endswith("data.pkl"))
    name = name if rng.random() < 0.9 else rng.choice(sorted(members))
    members[name] = mutate(members[name], rng, tokens)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        for name, content in members.items():
            new.writestr(name, content)
    return file.getvalue()


# TRAP: parsers reject most changed bytes; these mutants are well-formed, but their contents are wrong


def mutate_png(good: bytes, rng: random.Random, tokens) -> bytes:
    """Changes numbers of the header, or scan lines, which are compressed again."""
    data = bytearray(good)
    if rng.random() < 0.5:
        at = 16 + rng.randrange(13)  # width, height, depth, kind, compression, filter, interlace
        data[at] = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
        return repair_png(bytes(data))
    at = good.index(b"IDAT")
    size = int.from_bytes(good[at - 4 : at], "big")
    lines = zlib.compress(mutate(zlib.decompress(good[at + 4 : at + 4 + size]), rng))
    data[at - 4 : at + 4 + size] = len(lines).to_bytes(4, "big") + b"IDAT" + lines
    return repair_png(bytes(data))


VALUES = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    "",
    " ",
    "..",
    "/etc/passwd",
    "a.png",
    "\0",
    "\ud800",
    "a\nb",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    {"": None},
    ["a.png"] * 3,
]


def mutate_json(good: bytes, rng: random.Random, tokens) -> bytes:
    """Replaces, removes or repeats values; JSON lines are changed one by one."""
    try:
        tree = {"": json.loads(good)}
    except ValueError:
        lines = good.strip().split(b"\n")
        return b"\n".join(mutate_json(line, rng, tokens) for line in lines)
    for _ in range(rng.choice([1, 1, 2, 4])):
        places, todo = [], [tree]
        for node in todo:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            todo += [node[key] for key in keys if isinstance(node[key], dict | list)]
        node, key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0 and node is not tree:
            del node[key]
        elif kind == 1 and isinstance(node, list):
            node.insert(key, node[key])
        else:
            node[key] = copy.deepcopy(rng.choice([*VALUES, rng.choice(places)[1]]))
        if not tree:
            break
    return json.dumps(tree.get("")).encode()


def mutate_lines(good: bytes, rng: random.Random, tokens) -> bytes:
    """Swaps, removes or repeats lines, or joins words of two lines."""
    lines = good.split(b"\n")
    for _ in range(rng.choice([1, 1, 2, 4])):
        a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.randrange(4)
        if kind == 0:
            lines[a], lines[b] = lines[b], lines[a]
        elif kind == 1:
            lines[a] = lines[b]
        elif kind == 2:
            lines[a] = b" ".join([*lines[a].split(b" ")[:1], *lines[b].split(b" ")[:1]])
        else:
            del lines[a : a + rng.choice([1, 1, 5])]
            lines = lines or [b""]
    return b"\n".join(lines)


NAMES = "os system, builtins eval, builtins exec, builtins open, subprocess Popen, posix system, torch load, "
NAMES += "torch._utils _rebuild_tensor_v2, torch FloatStorage, collections OrderedDict, builtins getattr, "
NAMES += "torch._utils _rebuild_parameter, copyreg _reconstructor, runpy run_path"
NAMES = [name.replace(" ", "\n") for name in NAMES.split(", ")]
TEXTS = "os system eval storage cpu 0 state_dict w __class__ touch-x /etc/passwd".split()


def argument(op, rng: random.Random) -> bytes:
    """An opcode with an argument that fits, mostly."""
    word, number = rng.choice(TEXTS).encode(), rng.choice([0, 1, 2, 3, 9, 255, 2**31, 2**63 - 1])
    plain = {"uint1": "<B", "uint2": "<H", "int4": "<i", "uint4": "<I", "uint8": "<Q", "float8": ">d"}
    if op.arg is None or rng.random() < 0.01:
        return b""
    if op.name in ("GLOBAL", "INST"):
        return rng.choice(NAMES).encode() + b"\n"
    if op.arg.name in plain:
        return struct.pack(plain[op.arg.name], rng.choice([number, rng.randrange(4)]) % 100)
    if op.arg.name.endswith(("1", "4", "8")):  # bytes after their length
        size = {"1": "<B", "4": "<I", "8": "<Q"}[op.arg.name[-1]]
        return struct.pack(size, len(word) if rng.random() < 0.97 else 200) + word
    if op.arg.name.startswith(("string", "unicode")):
        return b"'" * (op.name == "STRING") + word + b"'" * (op.name == "STRING") + b"\n"
    return b"%d\n" % (number % 100)


def random_pickle(good: bytes, rng: random.Random, tokens) -> bytes:
    """A checkpoint around a pickle of random opcodes: calls of every function that NAMES lists, and more."""
    likely = [op for op in pickletools.opcodes if op.name in LIKELY]
    program = b"\x80\x02"
    for _ in range(rng.choice([3, 10, 40, 200])):
        op = rng.choice(likely if rng.random() < 0.7 else pickletools.opcodes)
        program += b"" if op.name == "STOP" else op.code.encode("latin-1") + argument(op, rng)
        if rng.random() < 0.1:  # a call
            program += b"c" + rng.choice(NAMES).encode() + b"\n(X\7\0\0\0touch-xtR"
    program += b"."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        new.writestr("a/data.pkl", program)
        new.writestr("a/data/0", bytes(64))
        if rng.random() < 0.3:
            new.writestr("a/constants.pkl", b"N.")
    return file.getvalue()


LIKELY = "GLOBAL REDUCE BINPERSID TUPLE TUPLE1 TUPLE2 MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE SETITEM NONE "
LIKELY += (
    "BINUNICODE SHORT_BINUNICODE BININT1 BINPUT BINGET MEMOIZE BUILD NEWOBJ STACK_GLOBAL DICT LIST APPENDS"
)
LIKELY = {*LIKELY.split(), "SETITEMS", "NEWTRUE"}
# format: (mutation that knows the format, share of the inputs that get it)
DEEPER = {
    "checkpoint (zip)": (mutate_zip, 0.8),
    "random pickles": (random_pickle, 1),
    "PNG": (mutate_png, 0.5),
    "JSONL": (mutate_json, 0.5),
    "JSON": (mutate_json, 0.5),
    "split file": (mutate_json, 0.5),
    "metadata": (mutate_json, 0.5),
    "vocabulary": (mutate_lines, 0.5),
    "CSV": (mutate_lines, 0.2),
    "TSV": (mutate_lines, 0.2),
    "captions": (mutate_lines, 0.2),
}


def mutant(name: str, number: int) -> bytes:
    """Input `number` of a format."""
    rng = random.Random(f"{name} {number}")
    good, tokens = rng.choice(FORMATS[name][1]), FORMATS[name][4]
    deeper, share = DEEPER.get(name, (None, 0))
    if rng.random() < share:
        return deeper(good, rng, tokens)
    data = mutate(good, rng, tokens)
    repair = {"PNG": repair_png, "tar shard": repair_tar}.get(name)
    return repair(data) if repair and rng.random() < 0.8 else data


# The formats: valid files and their readers


def picture(form: str, mode="RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 31, 3), np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    return file_of(image, form, **options)


PLAIN_PPM = b"P3\n# a comment\n4 3\n255\n" + b" ".join(b"%d" % (7 * k) for k in range(36))


def read_picture(path: Path):
    """Reads an image as training and evaluation do."""
    for transform in (images.Preprocess(16).pixels, lambda x: images.RandomCrop(16).pixels(x, random)):
        with images.open_image(path.read_bytes()) as image:
            transform(image)


def tar_file() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (
            ("a.jpg", picture("JPEG")),
            ("a.txt", b"a cat"),
            ("b.png", picture("PNG")),
            ("b.json", b'{"captions": ["a dog", "an elk"]}'),
            ("c/d.webp", picture("WEBP")),
            ("c/d.txt", b"x"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def read_tar(path: Path):
    os.environ["XDG_CACHE_HOME"] = str(path.parent / "cache")
    found = shards.Shards(str(path))
    for i in range(len(found)):
        assert all(isinstance(text, str) and text for text in found.captions[i])
        found.name(i)
        try:
            images.Preprocess(16).pixels(found.image(i))
        except images.IMAGE_ERRORS:
            pass  # data.py replaces this image and names it


def read_listed(path: Path):
    """Reads a list and opens its images; none of them may be outside the folder of the list."""
    inside = os.path.realpath(path.parent)
    dataset = datasets.open_dataset(path)
    for i in range(min(len(dataset), 50)):
        assert os.path.realpath(dataset.name(i)).startswith(inside), dataset.name(i)
        try:
            dataset.image(i)
        except images.IMAGE_ERRORS:
            pass
    if hasattr(dataset, "captions"):
        assert all(isinstance(t, str) and t.strip() for texts in dataset.captions for t in texts)


CSV = b'filepath,title,split\na.png,a cat,train\nb.png,"a dog, ""big""",val\na.png,again,train\n'
TSV = b"image\tlabel\tdomain\na.png\tcat\tart\nb.png\tdog\tphoto\n"
FLICKR = b"a.png,a cat\nb.png,a dog, and more\n"
JSONL = b'{"image": "a.png", "captions": ["a cat", "one"]}\n{"image": "b.png", "captions": ["x"]}\n'
KARPATHY = json.dumps(
    {
        "images": [
            {"filename": n, "filepath": "", "split": "train", "sentences": [{"raw": "a cat"}]}
            for n in ("a.png", "b.png")
        ]
    }
).encode()
COCO = json.dumps(
    {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 1, "caption": "a dog"}],
    }
).encode()
ZHOU = json.dumps(
    {"train": [["a.png", 0, "cat"], ["b.png", 1, "dog"]], "val": [], "test": [["a.png", 0, "cat"]]}
).encode()
KEYS = [
    b'"images"',
    b'"train"',
    b'"captions"',
    b'"filename"',
    b'"sentences"',
    b'"id"',
    b"a.png",
    b"/etc/passwd",
    b"../a.png",
    b"link.png",
    b"folder/b.png",
]


def tokenizer_file() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        Tokenizer.learn(["a cat", "a dog and a cat", "the elks"] * 3, 540).save(Path(place) / "t")
        return (Path(place) / "t").read_bytes()


def read_vocabulary(path: Path):
    tokenizer = Tokenizer.load(path)
    assert tokenizer(["a cat and 😀"]).max() < tokenizer.vocab_size


def checkpoint_file(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        model = CLIP(Config(8, 8, 4, 8, 1, 1, 8, 8, 520, 8, 1, 1, 8))
        state, path = model.state_dict(), Path(place) / "x"
        if kind == "safetensors":
            with open(path, "wb") as file:
                layouts.write_safetensors(state, file)
        else:
            content = {"state_dict": state, "model": pretrained.describe(model)}
            torch.save(content, path)
        return path.read_bytes()


def read_weights(path: Path):
    foreign = dict(quick_gelu=True, vision_heads=1, text_heads=1) if path.suffix == ".st" else {}
    pretrained.load(path, **foreign)


PICKLE = [b"cos\nsystem\n", b"R", b"\x81", b"b", b"0", b"h\x01", b"(", b"t", b"}", b"u", b"Q", b"\x93"]
# name: (suffix, valid files, reader, expected errors, tokens)
FORMATS = {
    "JPEG": (
        ".jpg",
        [picture("JPEG"), picture("JPEG", progressive=True), picture("JPEG", "L")],
        read_picture,
        images.IMAGE_ERRORS,
        [b"\xff\xd8", b"\xff\xc2", b"\xff\xda", b"\xff\xd9"],
    ),
    "PNG": (
        ".png",
        [picture("PNG"), picture("PNG", "RGBA"), picture("PNG", "L")],
        read_picture,
        images.IMAGE_ERRORS,
        [b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL"],
    ),
    "WebP": (
        ".webp",
        [picture("WEBP"), picture("WEBP", lossless=True)],
        read_picture,
        images.IMAGE_ERRORS,
        [b"VP8 ", b"VP8L", b"VP8X", b"ANMF", b"ALPH"],
    ),
    "GIF": (
        ".gif",
        [picture("GIF", "P"), picture("GIF", "L", comment=b"x"), picture("GIF", "P", transparency=3)],
        read_picture,
        images.IMAGE_ERRORS,
        [b"!\xfe", b"!\xf9\4", b"!\xff\x0bNETSCAPE2.0", b",", b";"],
    ),
    "BMP": (
        ".bmp",
        [picture("BMP"), picture("BMP", "P"), picture("BMP", "1"), picture("DIB")],
        read_picture,
        images.IMAGE_ERRORS,
        [b"BM", b"\x28\0\0\0", b"\1\0\0\0", b"\3\0\0\0"],
    ),
    "PPM": (
        ".ppm",
        [picture("PPM"), picture("PPM", "L"), picture("PPM", "1"), picture("PPM", "I;16"), PLAIN_PPM],
        read_picture,
        images.IMAGE_ERRORS,
        [b"P1", b"P2", b"P3", b"P5", b"P6", b"Pf", b"PyP", b"#", b" 100 ", b" 65535 "],
    ),
    "TIFF": (
        ".tif",
        [
            *(picture("TIFF", compression=c) for c in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate")),
            *(picture("TIFF", mode) for mode in ("L", "I;16", "CMYK", "RGBA", "1", "P")),
            picture("TIFF", "1", compression="group4"),
            picture("TIFF", big_tiff=True),
        ],
        read_picture,
        images.IMAGE_ERRORS,
        [b"II*\0", b"MM\0*", b"II+\0", b"\x11\1", b"\x44\1", b"\x16\1", b"\5\0", b"\x07\0"],
    ),
    "JPEG 2000": (
        ".jp2",
        [
            picture("JPEG2000"),
            picture("JPEG2000", "RGBA", no_jp2=True),
            picture("JPEG2000", "L", tile_size=(8, 8)),
        ],
        read_picture,
        images.IMAGE_ERRORS,
        [
            b"\xff\x4f",
            b"\xff\x51",
            b"\xff\x52",
            b"\xff\x53",
            b"\xff\x90",
            b"\xff\x93",
            b"jp2c",
            b"ihdr",
            b"pclr",
        ],
    ),
    "AVIF": (
        ".avif",
        [picture("AVIF"), picture("AVIF", "RGBA")],
        read_picture,
        images.IMAGE_ERRORS,
        [b"meta", b"iloc", b"iinf", b"ipco", b"ispe", b"grid", b"auxC", b"moov"],
    ),
    "ICO": (
        ".ico",
        [picture("ICO", sizes=[(16, 16), (24, 24)]), picture("ICO", "RGBA", bitmap_format="bmp")],
        read_picture,
        images.IMAGE_ERRORS,
        [b"\0\0\1\0", b"\x89PNG", b"IHDR", b"\x28\0\0\0"],
    ),
    "TGA, PCX, SGI": (
        ".tga",
        [
            picture("TGA"),
            picture("TGA", compression="tga_rle"),
            picture("PCX"),
            picture("PCX", "P"),
            picture("SGI"),
        ],
        read_picture,
        images.IMAGE_ERRORS,
        [b"\x0a\5\1\x08", b"\1\xda\1\1", b"\0\0\x0a\0"],
    ),
    "MPO": (
        ".jpg",
        [picture("MPO"), picture("JPEG", "CMYK")],
        read_picture,
        images.IMAGE_ERRORS,
        [b"MPF\0", b"\xff\xd8", b"\xff\xe2", b"\xff\xda", b"\xff\xd9"],
    ),
    "random pickles": (".pt", [checkpoint_file("zip")], read_weights, (ValueError, OSError), []),
    "tar shard": (
        ".tar",
        [tar_file()],
        read_tar,
        (ValueError, OSError),
        [b"ustar\x0000", b"0000777\0", b"77777777777\0", b"\x80" + b"\xff" * 11, b"L", b"x", b"2"],
    ),
    "CSV": (".csv", [CSV, FLICKR], read_listed, (ValueError, OSError), KEYS),
    "TSV": (".tsv", [TSV], read_listed, (ValueError, OSError), KEYS),
    "JSONL": (".jsonl", [JSONL], read_listed, (ValueError, OSError), KEYS),
    "JSON": (
        ".json",
        [KARPATHY, COCO, b"[" + JSONL.replace(b"\n", b",", 1) + b"]"],
        read_listed,
        (ValueError, OSError),
        KEYS,
    ),
    "split file": (".json", [ZHOU], read_listed, (ValueError, OSError), KEYS),
    "vocabulary": (
        ".txt",
        [tokenizer_file()],
        read_vocabulary,
        (ValueError, OSError),
        [b"</w>", b" ", b"\n"],
    ),
    "safetensors": (
        ".st",
        [checkpoint_file("safetensors")],
        read_weights,
        (ValueError, OSError),
        [b'"F32"', b'"BF16"', b'"data_offsets"', b'"shape"', b"[0,0]"],
    ),
    "checkpoint (zip)": (".pt", [checkpoint_file("zip")], read_weights, (ValueError, OSError), PICKLE),
    "metadata": (
        ".json",
        [b'["a cat", "dog"]', b'{"a cat": 3, "dog": 1}'],
        read_entries,
        (ValueError, OSError),
        [],
    ),
    "captions": (
        ".tsv",
        [b"caption\turl\na cat\tx\n", b"caption\turl\na\tb\nc\td\n"],
        lambda path: list(Corpus(str(path)).records()),
        (ValueError, OSError),
        [],
    ),
}


class TooLong(BaseException):
    """The alarm raises this; readers must not catch it."""


def alarm(*_):
    raise TooLong


def folder_of_lists(place: Path) -> None:
    """Files that lists may name: images, one of them in a folder, and a link to a file outside."""
    (place / "folder").mkdir()
    for name in ("a.png", "b.png", "folder/b.png"):
        (place / name).write_bytes(picture("PNG"))
    (place.parent / "secret.png").write_bytes(picture("PNG"))
    (place / "link.png").symlink_to(place.parent / "secret.png")


def read_mutants(name: str, first: int, last: int, report, budget: float) -> None:
    """Reads inputs first..last of a format, for so many seconds; reports each failure, then the totals."""
    suffix, good, reader, errors, _ = FORMATS[name]
    signal.signal(signal.SIGALRM, alarm)
    read, refused, end = 0, 0, time.monotonic() + budget
    with tempfile.TemporaryDirectory() as outer:
        place = Path(outer) / "data"
        place.mkdir()
        folder_of_lists(place)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY,) * 2)
        sys.stderr = io.StringIO()
        forbidden = []
        sys.addaudithook(lambda event, _: forbidden.append(event) if event in NEVER else None)
        # the valid files must be readable
        for content in good:
            (place / f"x{suffix}").write_bytes(content)
            reader(place / f"x{suffix}")
        for i in range(first, last):
            path = place / f"x{suffix}"
            path.write_bytes(mutant(name, i))
            forbidden.clear()
            signal.alarm(SECONDS)
            try:
                reader(path)
                read += 1
            except errors as error:
                refused += 1
                text = str(error)
                if not text.isprintable() or len(text) > 1500:
                    report({"input": i, "what": f"message of {len(text)} characters: {text[:200]!r}"})
            except BaseException as error:
                report({"input": i, "what": f"{type(error).__name__}: {str(error)[:200]}"})
            finally:
                signal.alarm(0)
            if forbidden:
                report({"input": i, "what": f"the reader did {', '.join(forbidden)}"})
            if time.monotonic() > end:
                break
            sys.stderr.seek(0)
            sys.stderr.truncate()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report({"tried": read + refused, "read": read, "refused": refused, "peak_mb": round(peak)})


def fuzz(name: str, count: int, budget: float = 600) -> dict:
    """Reads `count` mutants of a format in a child process, or as many as it can in `budget` seconds.

    Returns: {"tried", "read", "refused", "peak_mb", "seconds", "failures": [...]}
    """
    began = time.monotonic()
    ends, lines = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.close(ends)
            with open(lines, "w", buffering=1) as out:
                read_mutants(name, 0, count, lambda x: out.write(json.dumps(x) + "\n"), budget)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{name}: {error!r}\n".encode())
            os._exit(1)
    os.close(lines)
    with open(ends) as said:
        found = [json.loads(line) for line in said]
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    failures = [f"input {f['input']}: {f['what']}" for f in found if "input" in f]
    total = found[-1] if found and "read" in found[-1] else {"read": 0, "refused": 0, "peak_mb": 0}
    if code:
        failures.append(f"the reader's process ended with {code}")
    seconds = time.monotonic() - began
    return {"tried": 0, **total, "seconds": seconds, "failures": failures}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:] or FORMATS:
        found = fuzz(name, int(sys.argv[1]))
        print(name, {k: v for k, v in found.items() if k != "failures"}, *found["failures"][:8], sep="\n  ")
