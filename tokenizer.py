"""Byte-level BPE: text to token ids with OpenAI's merges, or with merges that are learned here.

Sennrich et al. 2016 (arXiv:1508.07909), Algorithm 1, on bytes as in GPT-2. The ids equal those of
openai/CLIP clip/simple_tokenizer.py and clip/clip.py (tokenize) @d05afc4 (MIT).

text -> clean -> split into words -> UTF-8 bytes -> merge neighbours, lowest rank first -> ids

Layout of the ids (OpenAI's: 49,408):
    0 .. 255      the bytes, printable ones first ("!" is 0, so padding decodes as "!!!")
    256 .. 511    the same bytes at the end of a word (written b</w>)
    512 ..        one per merge, in order of rank: id = 512 + rank
    the last two  <|startoftext|> and <|endoftext|>; the models need the end token to be the highest id
"""

import argparse
import contextlib
import hashlib
import heapq
import html
import importlib.util
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

from util.files import open_file, write_text
from util.program import leave, program
from weights import download

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = regex.escape(START) + "|" + regex.escape(END)
# TRAP: the text is lower-case, but IGNORECASE also lets "ſ" match the s of 's.
WORD = SPECIAL + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WORD_END = "</w>"
# Bytes in OpenAI's order: the printable characters of Latin-1, then the others. A file of merges writes the
# printable ones as they are and the others as characters from U+0100 on, so a space always separates.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]
ID_OF_BYTE = {b: i for i, b in enumerate(BYTES)}
CHARS = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
NAMES = CHARS + [c + WORD_END for c in CHARS]  # ids 0 .. 511 in a file of merges

OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
OPENAI_URL = "https://raw.githubusercontent.com/openai/CLIP/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/clip/"
OPENAI_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"  # of the .gz
OPENAI_MERGES = 49_152 - 256 - 2  # CLIP uses lines 1 .. 48894 of the file; this is their hash:
OPENAI_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
LIMIT = 2**24  # bytes of a file of merges that are read; 524,604 of OpenAI's are needed
HEADER = "#alignclip-bpe version 1, {} merges"
CACHED_WORDS, CACHED_LENGTH = 2**16, 40  # the cache keeps the first words it meets: common ones


def clean(text: str) -> str:
    """Normalise text exactly as OpenAI's tokenizer does: mojibake, HTML entities, spaces, case."""
    return regex.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()


def split(text: str) -> list[str]:
    """Cut cleaned text into words: letters, one digit, punctuation, endings like 's, special tokens."""
    return regex.findall(WORD, text, regex.IGNORECASE)


def strip_specials(text: str) -> str:
    """Remove the spelling of special tokens from a text that comes from a file.

    OpenAI's tokenizer turns a typed <|endoftext|> into the end token, also one that is written with HTML
    entities or full-width letters. A text without special tokens is returned unchanged, others cleaned.
    """
    # SPEED: plain ASCII without "&" and "|" cannot become a special token; most texts need no clean().
    if text.isascii() and "&" not in text and "|" not in text:
        return text
    # The space keeps "<|endof<|endoftext|>text|>" from closing up. TRAP: while, not if: encode()
    # cleans once more, and that may unescape "&amp;amp;amp;lt;" into the next "<".
    while regex.search(SPECIAL, cleaned := clean(text)):
        text = regex.sub(SPECIAL, " ", cleaned)
    return text


def find_openai() -> Path:
    """OpenAI's file: $ALIGNCLIP_VOCAB, ~/.cache/clip, the packages open_clip and clip, or a download."""
    if named := os.environ.get("ALIGNCLIP_VOCAB"):
        return Path(named)
    cached = download.CACHE.expanduser() / OPENAI_FILE
    specs = [importlib.util.find_spec(package) for package in ("open_clip", "clip")]  # imports neither
    folders = [folder for spec in specs if spec for folder in spec.submodule_search_locations or []]
    if found := [path for path in (cached, *(Path(f, OPENAI_FILE) for f in folders)) if path.is_file()]:
        return found[0]
    try:
        download.download(OPENAI_URL + OPENAI_FILE, cached, OPENAI_SHA256)
    except OSError as error:
        ways = f"give its path, set $ALIGNCLIP_VOCAB, copy it to {cached}, or pip install open_clip_torch"
        raise OSError(f"OpenAI's vocabulary was not found: {ways} (download failed: {error})") from error
    return cached


def read_openai(path: Path) -> list[str]:
    """The 48,894 lines of merges that CLIP uses, from the .gz or the plain text, verified."""
    with open_file(path) as file:
        data = file.read(LIMIT)
    if data.startswith(b"\x1f\x8b"):
        with contextlib.suppress(zlib.error):
            data = zlib.decompressobj(wbits=31).decompress(data, LIMIT)
    lines = data.replace(b"\r\n", b"\n").split(b"\n")[1 : OPENAI_MERGES + 1]
    if hashlib.sha256(b"\n".join(lines)).hexdigest() != OPENAI_MERGES_SHA256:
        raise ValueError(f"{path}: not OpenAI's {OPENAI_FILE}, or damaged (wrong sha256): replace it")
    return b"\n".join(lines).decode("utf-8").split("\n")


def parse_merges(lines: list[str], path: Path) -> list[tuple[int, int]]:
    """Lines "left right" to pairs of ids; each part must be a byte or the result of an earlier line."""
    ids = {name: i for i, name in enumerate(NAMES)}
    merges = []
    for number, line in enumerate(lines, start=2):
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right in ids:
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not a new merge of two known pieces")
        merges.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    return merges


def byte_ids(word: str) -> list[int]:
    """The ids of a word's UTF-8 bytes; the last id marks the end of the word."""
    ids = [ID_OF_BYTE[b] for b in word.encode("utf-8")]
    return ids[:-1] + [ids[-1] + 256]


def replace(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Put one new id for every occurrence of the pair, from left to right."""
    result = []
    for i in ids:
        if result and (result[-1], i) == pair:
            result[-1] = new
        else:
            result.append(i)
    return result


def learn_merges(words: Counter, limit: int) -> list[tuple[int, int]]:
    """Merge the most frequent pair, `limit` times at most, lower ids first (Sennrich et al., Algorithm 1)."""
    spelled, times = [byte_ids(word) for word in words], list(words.values())
    counts, places = Counter(), defaultdict(set)  # of a pair: occurrences; words that may hold it

    def count(index: int, sign: int) -> None:
        for pair in zip(spelled[index], spelled[index][1:]):
            counts[pair] += sign * times[index]
            places[pair].add(index)

    for index in range(len(spelled)):
        count(index, +1)
    merges = []
    while len(merges) < limit and (most := max(counts.values(), default=0)) > 0:
        pair = min(pair for pair, occurrences in counts.items() if occurrences == most)
        # SPEED: only the words that hold the pair are counted again
        for index in places.pop(pair):
            count(index, -1)
            spelled[index] = replace(spelled[index], pair, 512 + len(merges))
            count(index, +1)
        merges.append(pair)
    return merges


class Tokenizer:
    """Text to ids and back; .start and .end are the special tokens, .merges is {(left, right): new id}."""

    def __init__(self, merges: list[tuple[int, int]]):
        self.merges = {pair: 512 + rank for rank, pair in enumerate(merges)}
        self.pieces = [bytes([b]) for b in BYTES]  # the bytes of each id
        self.pieces += [piece + WORD_END.encode() for piece in self.pieces]
        for left, right in merges:
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self.start, self.end = len(self.pieces), len(self.pieces) + 1
        self.pieces += [START.encode(), END.encode()]
        self.vocab_size = len(self.pieces)
        self.cache = {START: [self.start], END: [self.end]}  # word -> ids

    @classmethod
    def from_openai(cls, path: str | Path | None = None) -> "Tokenizer":
        """CLIP's vocabulary of 49,408, from the .gz or the plain text; None uses find_openai."""
        path = path or find_openai()
        return cls(parse_merges(read_openai(path), path))

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn at most vocab_size - 514 merges from captions, cleaned and split as by OpenAI."""
        if vocab_size < 514:
            raise ValueError(f"vocab_size {vocab_size} is below 514: 512 bytes and two specials")
        texts = [texts] if isinstance(texts, str) else texts
        words = Counter(word for text in texts for word in split(clean(text)))
        del words[START], words[END]
        return cls(learn_merges(words, vocab_size - 514))

    def spelled(self) -> tuple[list[str], list[str]]:
        """The merges, each as "left right", and the name of each id, both spelled as in OpenAI's file."""
        names, lines = list(NAMES), []
        for left, right in self.merges:
            lines.append(f"{names[left]} {names[right]}")
            names.append(names[left] + names[right])
        return lines, [*names, START, END]

    def save(self, path: str | Path) -> None:
        """Write the merges as OpenAI's file does: one "left right" per line below a header."""
        write_text(path, "\n".join([HEADER.format(len(self.merges)), *self.spelled()[0], ""]))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a file of save().   Raises: ValueError, one line."""
        with open_file(path) as file:
            text = file.read(LIMIT).decode("utf-8", errors="replace")
        lines = text.replace("\r\n", "\n").split("\n")
        header = HEADER.format(len(lines) - 2)
        if lines[0] != header or lines[-1]:  # the newline at the end shows that the last line is whole
            raise ValueError(f"{path}: not a saved tokenizer, or cut short: begins with {lines[0]!r:.60}")
        return cls(parse_merges(lines[1:-1], path))

    def bpe(self, word: str, steps: list | None = None) -> list[int]:
        """The ids of one word: merge the pair of lowest rank, from left to right; steps gets the merges."""
        # SPEED: a queue of pairs and a linked list of ids, for captions with a word of 100,000 letters
        ids = [*byte_ids(word), None]  # None: the end of the list, or removed by a merge
        before, after = list(range(-1, len(ids) - 1)), [*range(1, len(ids)), 0]

        def merged(i: int) -> int | None:
            return self.merges.get((ids[i], ids[after[i]]))

        queue = sorted((merged(i), i) for i in range(len(ids)) if merged(i))
        while queue:
            new, i = heapq.heappop(queue)
            if merged(i) != new:
                continue  # an earlier merge has taken one of the two ids
            j = after[i]
            if steps is not None:
                steps.append((ids[i], ids[j], new))
            ids[i], ids[j] = new, None
            after[i], before[after[j]] = after[j], i
            for k in (before[i], i):
                if merged(k):
                    heapq.heappush(queue, (merged(k), k))
        return [i for i in ids if i is not None]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end. Special tokens typed in it become specials."""
        ids = []
        for word in split(clean(text)):
            if (word_ids := self.cache.get(word)) is None:
                word_ids = self.bpe(word)
                if len(self.cache) < CACHED_WORDS and len(word) <= CACHED_LENGTH:
                    self.cache[word] = word_ids
            ids += word_ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text of some ids, with a space after every word as OpenAI's."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"id {wrong[0]} is outside the vocabulary of {self.vocab_size}")
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace").replace(WORD_END, " ")

    def __call__(self, texts: str | list[str], context_length: int = 77, strict: bool = False) -> Tensor:
        """Rows of ids for the text tower (B, L): start, text, end, zeros.

        REF: OpenAI's default raises an error for a text that is too long, as strict=True does here. The
        default here is OpenAI's truncate=True: the text is cut and the last id is the end token.
        """
        if context_length < 2:
            raise ValueError(f"context_length {context_length} has no room for start and end (2)")
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise ValueError(f"text {len(rows)} is {text!r}: {type(text).__name__}, not str")
            ids = self.encode(text)
            if strict and len(ids) + 2 > context_length:
                raise ValueError(f"{len(ids) + 2} tokens exceed context {context_length}: {text[:60]!r}")
            row = [self.start, *ids[: context_length - 2], self.end]
            rows.append(row + [0] * (context_length - len(row)))
        return torch.tensor(rows, dtype=torch.long).view(len(rows), context_length)  # (B, L)


def is_saved(path: str | Path) -> bool:
    """Whether a file starts as those of Tokenizer.save do."""
    with open_file(path) as file:
        return file.read(14) == HEADER[:14].encode()


def open_vocabulary(path: str | Path | None) -> Tokenizer:
    """A file of Tokenizer.save, OpenAI's file, or with None OpenAI's file wherever it is found."""
    return Tokenizer.load(path) if path and is_saved(path) else Tokenizer.from_openai(path)


@program
def main(argv: list[str]) -> None:
    """Print every step from a text to its row. OpenAI's ids of "a photo" are 320 and 1125."""
    parser = argparse.ArgumentParser(description="Shows how a text becomes tokens.", allow_abbrev=False)
    parser.add_argument("text", nargs="?", default="a photo of a cat")
    parser.add_argument("--vocab", metavar="PATH", help="OpenAI's file, or a file of Tokenizer.save")
    flags = parser.parse_args(argv)
    tokenizer, text = open_vocabulary(flags.vocab), flags.text
    name = [repr(piece.decode("utf-8", errors="backslashreplace")) for piece in tokenizer.pieces]
    cleaned = clean(text)
    print(f"vocabulary  {tokenizer.vocab_size} = 512 bytes + {len(tokenizer.merges)} merges + 2")
    print(f"text        {text!r}\ncleaned     {cleaned!r}\nwords       {split(cleaned)}")
    for word in split(cleaned):
        steps = []
        ids = tokenizer.cache[word] if word in (START, END) else tokenizer.bpe(word, steps)
        print(f"\n{word!r}  bytes {word.encode().hex(' ')}")
        for left, right, new in dict.fromkeys(steps):
            print(f"  rank {new - 512:>5}  {name[left]} + {name[right]} -> {name[new]}")
        print(f"  ids {ids}")
    row = tokenizer(text)[0].tolist()
    print(f"\nrow of {len(row)}: {row}\ndecoded: {tokenizer.decode(tokenizer.encode(text))!r}")


if __name__ == "__main__":
    leave(main())
