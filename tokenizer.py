"""Byte-level BPE, by hand: text to token ids with OpenAI's merges, or with merges learned here.

Sennrich et al. 2016 (arXiv:1508.07909), Algorithm 1, on bytes as in GPT-2;  the exact ids of
openai/CLIP clip/simple_tokenizer.py and clip/clip.py (tokenize) @d05afc4 (MIT).

text -> clean -> split into words -> UTF-8 bytes -> merge neighbours, lowest rank first -> ids

Layout of the ids (OpenAI's: 49,408):
    0 .. 255      the bytes, printable ones first ("!" is 0: padding decodes as "!!!")
    256 .. 511    the same bytes at the end of a word (written b</w>)
    512 ..        one per merge, in order of rank: id = 512 + rank
    the last two  <|startoftext|> and <|endoftext|>; the end is the highest id, as models rely on

OpenAI's file of merges is not part of this repository; `Tokenizer.from_openai` says how it is found.
Not here: other tokenizers' normalisation (Hugging Face's skips ftfy: other ids for a curly quote).
"""

import argparse
import hashlib
import heapq
import html
import http.client
import importlib.util
import os
import sys
import urllib.request
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = regex.escape(START) + "|" + regex.escape(END)
# TRAP: IGNORECASE although the text is lower-case by now: it also lets "ſ" match the s of 's.
WORD = SPECIAL + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WORD_END = "</w>"
# Bytes in OpenAI's order: those that Latin-1 prints, then the rest. A file of merges writes the
# first as themselves and the rest as the characters from U+0100 on, so that a space only separates.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]
ID_OF_BYTE = {b: i for i, b in enumerate(BYTES)}
CHARS = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
NAMES = CHARS + [c + WORD_END for c in CHARS]  # how a file of merges writes ids 0 .. 511

OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
OPENAI_URL = (
    "https://raw.githubusercontent.com/openai/CLIP/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/clip/"
    + OPENAI_FILE
)
OPENAI_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"  # of the .gz
OPENAI_MERGES = 49_152 - 256 - 2  # lines 1 .. 48894 of the file are used, and only they are judged:
OPENAI_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
READ_LIMIT = 2**20  # bytes of OpenAI's file, packed and unpacked, that are read; 524,604 are needed
LOAD_LIMIT = 2**24  # bytes of a file written by Tokenizer.save
HEADER = "#alignclip-bpe version 1, {} merges"
CACHED_WORDS, CACHED_LENGTH = 2**16, 40  # the cache keeps the first words it meets: common ones


def clean(text: str) -> str:
    """Normalise text exactly as OpenAI's tokenizer does: mojibake, HTML entities, spaces, case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


def split(text: str) -> list[str]:
    """Cut cleaned text into words: letters, one digit, punctuation, 's and its like, specials."""
    return regex.findall(WORD, text, regex.IGNORECASE)


def strip_specials(text: str) -> str:
    """Take the spelling of special tokens out of a text that comes from a file.

    OpenAI's tokenizer turns a typed <|endoftext|> into the end token, where the text tower stops
    reading. After this function encode() meets none, also none hidden behind HTML entities or
    full-width letters: it is clean(text) that is searched. A text without specials is unchanged.
    Returns: the text; if something was taken out, cleaned, with a space in its place.
    """
    # SPEED: plain ASCII without "&" and "|" cannot become a special; spares clean() for most texts.
    if text.isascii() and "&" not in text and "|" not in text:
        return text
    # The space keeps "<|endof<|endoftext|>text|>" from closing up. TRAP: while, not if: encode()
    # cleans once more, and that may unescape "&amp;amp;amp;lt;" into the next "<".
    while regex.search(SPECIAL, cleaned := clean(text)):
        text = regex.sub(SPECIAL, " ", cleaned)
    return text


def cached_openai() -> Path:
    """Where a download of OpenAI's file is kept, in the folder that OpenAI's own code uses."""
    return Path(os.path.expanduser("~/.cache/clip"), OPENAI_FILE)


def find_openai() -> Path | None:
    """Where OpenAI's file is on this machine: $ALIGNCLIP_VOCAB, ~/.cache/clip, a package, or None."""
    if named := os.environ.get("ALIGNCLIP_VOCAB"):
        return Path(named)
    candidates = [cached_openai()]
    for package in ("open_clip", "clip"):  # both ship it; find_spec looks without importing
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        candidates += [Path(folder, OPENAI_FILE) for folder in folders or []]
    return next((path for path in candidates if path.is_file()), None)


def download_openai() -> Path:
    """Fetch OpenAI's file (1.4 MB, verified before anyone can see it) into the user's cache."""
    target = cached_openai()
    try:
        with urllib.request.urlopen(OPENAI_URL, timeout=30) as response:
            data = response.read(2 * READ_LIMIT)  # bounded, whatever the server sends
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"OpenAI's vocabulary {OPENAI_FILE} was not found: give its path, set $ALIGNCLIP_VOCAB, "
            f"copy it to {target}, or pip install open_clip_torch, which ships it "
            f"(download of {OPENAI_URL} failed: {error!s:.200})"
        ) from error
    if hashlib.sha256(data).hexdigest() != OPENAI_SHA256:
        raise OSError(f"{OPENAI_URL}: {len(data)} bytes came with a wrong sha256; try again")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, data)
    return target


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that nobody, not another rank either, ever sees a part of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:  # a full disk does not say which file it was
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def read_openai(path: Path) -> list[str]:
    """The 48,894 lines of merges that CLIP uses, from the .gz or the plain text, verified."""
    with open(path, "rb") as file:
        data = file.read(READ_LIMIT)
    if data.startswith(b"\x1f\x8b"):
        try:
            data = zlib.decompressobj(wbits=31).decompress(data, READ_LIMIT)
        except zlib.error as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); replace it") from error
    lines = data.replace(b"\r\n", b"\n").split(b"\n")[1 : OPENAI_MERGES + 1]
    if hashlib.sha256(b"\n".join(lines)).hexdigest() != OPENAI_MERGES_SHA256:
        raise ValueError(
            f"{path}: not OpenAI's {OPENAI_FILE} (lines 1 to {OPENAI_MERGES} have a wrong sha256); "
            "replace it or name another file"
        )
    return b"\n".join(lines).decode("utf-8").split("\n")


def parse_merges(lines: list[str], path: Path) -> list[tuple[int, int]]:
    """Lines "left right" to pairs of ids; each part must be a byte or the result of a line above."""
    ids = {name: i for i, name in enumerate(NAMES)}
    merges = []
    for number, line in enumerate(lines, start=1):
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right in ids:
            raise ValueError(
                f"{path}, line {number + 1}: {line[:60]!r} is not a new merge of two known pieces"
            )
        merges.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    return merges


def byte_ids(word: str) -> list[int]:
    """The ids of a word's UTF-8 bytes; the last one says that the word ends here."""
    ids = [ID_OF_BYTE[b] for b in word.encode("utf-8")]
    return ids[:-1] + [ids[-1] + 256]


def learn_merges(words: Counter, limit: int) -> list[tuple[int, int]]:
    """Merge the most frequent pair of neighbours, again and again.

    Sennrich et al. 2016, Algorithm 1. Only words that hold the merged pair are counted again, and a
    heap gives the next pair: entries whose count is out of date are skipped when they come up.
    Args:    words, how often each word occurs;  limit, merges at most
    Returns: pairs of ids in order of rank; of equally frequent pairs, the lower ids go first.
    """
    spelled, times = [byte_ids(word) for word in words], list(words.values())
    counts, places = Counter(), defaultdict(set)  # of a pair: occurrences; words that may hold it

    def count(index: int, sign: int) -> None:
        for pair in zip(spelled[index], spelled[index][1:]):
            counts[pair] += sign * times[index]
            places[pair].add(index)
            changed.add(pair)

    changed, merges = set(), []
    for index in range(len(spelled)):
        count(index, +1)
    queue = [(-counts[pair], pair) for pair in changed]
    heapq.heapify(queue)
    while queue and len(merges) < limit:
        occurrences, pair = heapq.heappop(queue)
        if -occurrences != counts[pair]:
            continue
        changed = set()
        for index in places.pop(pair):
            count(index, -1)
            spelled[index] = replace(spelled[index], pair, 512 + len(merges))
            count(index, +1)
        merges.append(pair)
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(queue, (-counts[other], other))
    return merges


def replace(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Put one new id for every occurrence of the pair, from left to right."""
    result = []
    for i in ids:
        if result and (result[-1], i) == pair:
            result[-1] = new
        else:
            result.append(i)
    return result


class Tokenizer:
    """Text to ids and back; two specials on top of 512 bytes and the merges.

    Args:    merges, pairs of ids in order of rank: from from_openai, load or learn
    .vocab_size, .start and .end (ids of the specials);  .merges {(left id, right id): new id}
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.merges = {pair: 512 + rank for rank, pair in enumerate(merges)}
        self.pieces = [bytes([b]) for b in BYTES]  # what each id stands for
        self.pieces += [piece + WORD_END.encode() for piece in self.pieces]
        for left, right in merges:
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self.start, self.end = len(self.pieces), len(self.pieces) + 1
        self.pieces += [START.encode(), END.encode()]
        self.vocab_size = len(self.pieces)
        self.cache = {START: [self.start], END: [self.end]}  # word -> ids

    @classmethod
    def from_openai(cls, path: str | Path | None = None) -> "Tokenizer":
        """CLIP's own vocabulary of 49,408, as .gz or plain text, verified by sha256.

        Args:    path of the file; None looks in $ALIGNCLIP_VOCAB, ~/.cache/clip, the installed
                 packages open_clip and clip, and then downloads it into ~/.cache/clip.
        Raises:  OSError if it cannot be had (says how to get it), ValueError for a wrong file.
        """
        path = path or find_openai() or download_openai()
        return cls(parse_merges(read_openai(path), path))

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary from a corpus: same cleaning, same words, same layout as OpenAI's.

        Args:    texts, captions;  vocab_size >= 514 (512 bytes and two specials)
        Returns: a Tokenizer; its vocab_size is smaller if every word became one piece before.
        """
        if vocab_size < 514:
            raise ValueError(f"vocab_size {vocab_size} is below 514: 512 bytes and two specials")
        texts = [texts] if isinstance(texts, str) else texts
        words = Counter(word for text in texts for word in split(clean(text)))
        del words[START], words[END]  # a Counter does not mind if they are not there
        return cls(learn_merges(words, vocab_size - 514))

    def save(self, path: str | Path) -> None:
        """Write the merges as text, one "left right" per line below a header: OpenAI's own form."""
        names, lines = list(NAMES), [HEADER.format(len(self.merges))]
        for left, right in self.merges:
            lines.append(f"{names[left]} {names[right]}")
            names.append(names[left] + names[right])
        write_whole(Path(path), "\n".join([*lines, ""]).encode("utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read what save() wrote. Raises: ValueError naming the file and what is wrong with it."""
        with open(path, "rb") as file:
            data = file.read(LOAD_LIMIT + 1)
        if len(data) > LOAD_LIMIT:
            raise ValueError(f"{path}: larger than {LOAD_LIMIT} bytes: not a saved tokenizer")
        try:
            lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a saved tokenizer ({error})") from error
        header = HEADER.format(len(lines) - 2)
        if lines[0] != header or lines[-1]:  # the last newline shows that the last line is whole
            raise ValueError(
                f"{path}: starts with {lines[0][:60]!r}, expected {header!r} and a newline at the "
                "end: cut short, or not a saved tokenizer"
            )
        return cls(parse_merges(lines[1:-1], path))

    def bpe(self, word: str, steps: list | None = None) -> list[int]:
        """The ids of one word: merge the neighbours of lowest rank, leftmost first, until none is left.

        A queue of candidates instead of a search per merge: a word of a million letters takes
        seconds, not hours. Ids are merged in place, and `after` and `before` skip the holes.
        Args:    word from split();  steps, a list that receives each merge as (left, right, new)
        """
        ids = [*byte_ids(word), None]  # None ends the word; ids[-1] also stands before its start
        after, before = [*range(1, len(ids)), 0], list(range(-1, len(ids) - 1))
        queue = []

        def propose(i: int) -> None:
            new = self.merges.get((ids[i], ids[after[i]]))
            if new is not None:
                heapq.heappush(queue, (new, i))

        for i in range(len(ids) - 1):
            propose(i)
        while queue:
            new, i = heapq.heappop(queue)
            j = after[i]
            if self.merges.get((ids[i], ids[j])) != new:  # one of the two was merged meanwhile
                continue
            if steps is not None:
                steps.append((ids[i], ids[j], new))
            ids[i], ids[j] = new, None
            after[i], before[after[j]] = after[j], i
            propose(before[i])
            propose(i)
        return [i for i in ids if i is not None]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end. Special tokens typed in it become specials."""
        ids = []
        for word in split(clean(text)):
            known = self.cache.get(word)
            if known is None:
                known = self.bpe(word)
                if len(self.cache) < CACHED_WORDS and len(word) <= CACHED_LENGTH:
                    self.cache[word] = known
            ids += known
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, cleaned as it was, with a space after every word as OpenAI's."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"id {wrong[0]} is outside the vocabulary of {self.vocab_size}")
        text = b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")
        return text.replace(WORD_END, " ")

    def __call__(self, texts: str | list[str], context_length: int = 77, strict: bool = False) -> Tensor:
        """Rows of ids for the text tower: start, text, end, zeros.

        REF: OpenAI's raises when a text is too long; here that is strict=True, and the default is
        its truncate=True: cut, and the last id is the end token, where the feature is read.
        Args:    texts, B of them or one;  context_length L >= 2, in tokens
        Returns: (B, L) long.   Raises: ValueError if an item is no str, or, strict, if one is too long.
        """
        if context_length < 2:
            raise ValueError(f"context_length {context_length} has no room for start and end (2)")
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise ValueError(f"text {len(rows)} is {text!r}: {type(text).__name__}, not str")
            ids = self.encode(text)
            if strict and len(ids) + 2 > context_length:
                raise ValueError(
                    f"text {len(rows)}, {text[:60]!r}, has {len(ids) + 2} tokens with start and "
                    f"end, the context {context_length}: shorten it, or leave out strict"
                )
            row = [self.start, *ids[: context_length - 2], self.end]
            rows.append(row + [0] * (context_length - len(row)))
        return torch.tensor(rows, dtype=torch.long).view(len(rows), context_length)  # (B, L)


def is_saved(path: str | Path) -> bool:
    """Whether a file starts as those of Tokenizer.save do."""
    with open(path, "rb") as file:
        return file.read(14) == HEADER[:14].encode()


def explain(tokenizer: Tokenizer, text: str) -> None:
    """Print every step from the text to its padded row."""
    name = [repr(piece.decode("utf-8", errors="backslashreplace")) for piece in tokenizer.pieces]
    cleaned = clean(text)
    print(f"vocabulary  {tokenizer.vocab_size} = 512 bytes + {len(tokenizer.merges)} merges + 2")
    print(f"text        {text!r}\ncleaned     {cleaned!r}\nwords       {split(cleaned)}")
    for word in split(cleaned):
        steps = []
        ids = tokenizer.cache[word] if word in (START, END) else tokenizer.bpe(word, steps)
        print(f"\n{word!r}  bytes {word.encode().hex(' ')}")
        for left, right, new in steps:
            print(f"  rank {new - 512:>5}  {name[left]} + {name[right]} -> {name[new]}")
        print(f"  ids {ids}")
    row = tokenizer(text)[0].tolist()
    print(f"\nrow of {len(row)}: {row}\ndecoded: {tokenizer.decode(tokenizer.encode(text))!r}")


def main(argv: list[str] | None = None) -> int:
    """Command line. With OpenAI's merges "a photo of a cat" gives 320 1125 539 320 2368."""
    parser = argparse.ArgumentParser(
        description="Show how a text becomes tokens, step by step.", allow_abbrev=False
    )
    parser.add_argument("text", nargs="?", default="a photo of a cat")
    parser.add_argument("--vocab", metavar="PATH", help="OpenAI's file, or Tokenizer.save's")
    parser.add_argument("--learn", metavar="FILE", help="learn merges from captions, one per line")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="for --learn: 514 + merges")
    args = parser.parse_args(argv)
    if (args.learn is None) != (args.vocab_size is None) or (args.learn and args.vocab):
        parser.error("--learn FILE and --vocab-size N go together, and without --vocab")
    try:
        if args.learn is not None:
            with open(args.learn, encoding="utf-8") as lines:
                tokenizer = Tokenizer.learn(lines, args.vocab_size)
        elif args.vocab and is_saved(args.vocab):
            tokenizer = Tokenizer.load(args.vocab)
        else:
            tokenizer = Tokenizer.from_openai(args.vocab)
        explain(tokenizer, args.text)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
