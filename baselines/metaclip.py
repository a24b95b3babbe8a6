"""MetaCLIP curation: match captions against metadata entries, then balance head against tail.

Xu et al. 2024 (arXiv:2309.16671), Section 3 and Algorithm 1. Llip and its baselines train on what
this selects; only text is looked at, never an image. Two streaming passes, so memory grows with the
metadata and not with the corpus:

    1. count   counts[e] = number of captions that contain entry e as a sub-string
    2. sample  keep a caption with probability 1 - prod_e (1 - min(1, t / counts[e]))

An entry with at most t captions (the tail) keeps all of them; of a head entry at least t stay in
expectation. A caption without any entry is dropped.

    python metaclip.py captions.tsv --entries entries.txt --t 20 --out kept.tsv

Not here: MetaCLIP 2's rule for scripts without spaces, and WordNet and Wikipedia themselves.
"""

import argparse
import codecs
import contextlib
import csv
import errno
import gzip
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from util.files import output_folder, write_image

PUNCTUATION = ",.;:?!`"
MAX_LINE = 1 << 20  # bytes; a longer line is unreadable, so that one line cannot fill the memory
_SPACING = [(c, f" {c} ") for c in PUNCTUATION] + [(c, " ") for c in "\t\n\r"]
_has_letter_or_digit = re.compile(r"[^\W_]").search


# Matching


def spaced(text: str) -> str:
    """The caption with spaces around , . ; : ? ! ` and a space for tab and line ends."""
    for char, replacement in _SPACING:
        if char in text:  # SPEED: half the time of replacing blindly
            text = text.replace(char, replacement)
    return text


def match(text: str, entries: Iterable[str]) -> list[int]:
    """Indices of the entries that occur in the caption: the definition, one entry after the other.

    Xu et al. 2024, Section 3.2; no equation, official code metaclip1/substr_matching.py@f47f784.
    Case-sensitive. Entries such as "U.S." never match: the caption's punctuation stands apart.
    Returns: ascending indices.
    """
    text = f" {spaced(text)} "
    return [i for i, entry in enumerate(entries) if f" {entry} " in text]


class Matcher:
    """`match` in one pass over the caption, however many entries there are.

    " a b " is in " text " exactly when a, b are neighbours in text.split(" "), empty strings from
    double spaces included; so a dictionary of token n-grams is the same test, not a likeness of it.
    Each start extends only while what it has read is the beginning of a longer entry.

    Args:    entries, strings; equal ones all match.   Raises: ValueError if there are none.
    """

    def __init__(self, entries: Iterable[str]):
        self.entries = list(entries)
        if not self.entries:
            raise ValueError("the list of entries is empty: nothing could ever match")
        self.ids: dict[str, tuple[int, ...]] = {}
        self.beginnings: set[str] = set()
        for i, entry in enumerate(self.entries):
            self.ids[entry] = self.ids.get(entry, ()) + (i,)
            cut = entry.find(" ")
            while cut >= 0:
                self.beginnings.add(entry[:cut])
                cut = entry.find(" ", cut + 1)

    def match(self, text: str) -> list[int]:
        """Ascending indices of the entries in the caption; equal to match(text, entries)."""
        ids, beginnings = self.ids, self.beginnings
        tokens = spaced(text).split(" ")  # TRAP: not split(), which would lose the empty tokens
        found: set[int] = set()
        for i, run in enumerate(tokens):
            if run in ids:
                found.update(ids[run])
            while run in beginnings and (i := i + 1) < len(tokens):
                run = f"{run} {tokens[i]}"
                if run in ids:
                    found.update(ids[run])
        return sorted(found)

    def unmatchable(self) -> int:
        """Number of entries that no caption can contain: a token of theirs holds punctuation."""
        split = re.compile(f"[{PUNCTUATION}\t\n\r]").search
        parts = (entry.split(" ") for entry in self.entries)
        return sum(any(split(p) and p not in PUNCTUATION for p in entry) for entry in parts)


# Metadata


def read_entries(path: str | Path) -> list[str]:
    """Entries of a file without repetitions: lines, or JSON: a list or a run's OUT.counts.json.

    Raises: ValueError if the file is not UTF-8, holds something else than strings, or is empty.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        is_json = Path(path).suffix == ".json"
        entries = list(json.loads(text)) if is_json else text.replace("\r\n", "\n").split("\n")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a list of entries in UTF-8: {error}") from error
    if any(not isinstance(entry, str) for entry in entries):
        raise ValueError(f"{path}: every entry must be a string")
    entries = [entry for entry in dict.fromkeys(entries) if entry]
    if not entries:
        raise ValueError(f"{path}: no entries: one per line, or a JSON list of strings")
    return entries


def build_entries(
    texts: Iterable[str], min_count: int = 100, min_pmi: float = 8.0, limit: int = 5_000_000
) -> list[str]:
    """Metadata from a text corpus: frequent words, word pairs of high PMI, and the numbers 0..99.

    Xu et al. 2024, Table 1 (Wikipedia: words seen 100 times, pairs of PMI 30, base unstated).
    Here PMI = log2(n_ab * N / (n_a * n_b)) in bits, so at most log2(N / min_count), and a pair too
    must be seen min_count times. Words are what `spaced` leaves between spaces; bare punctuation
    is dropped. Captions are a worse source than a reference text (Appendix A.7).
    Args:    texts, read once;  limit, words or pairs held: past it the rarest are forgotten
    Returns: words by falling count, pairs by falling PMI, numbers; no entry twice.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    words: Counter = Counter()
    pairs: Counter = Counter()
    for text in texts:
        tokens = spaced(text).split(" ")
        words.update(tokens)
        pairs.update(zip(tokens, tokens[1:]))
        for counter in (words, pairs):
            _forget_rare(counter, limit)
    words = Counter({w: n for w, n in words.items() if _has_letter_or_digit(w)})
    total = words.total()
    pmi = {
        f"{a} {b}": math.log2(n * total / (words[a] * words[b]))
        for (a, b), n in pairs.items()
        if n >= min_count and words[a] and words[b]
    }
    frequent = sorted((-n, w) for w, n in words.items() if n >= min_count)
    strong = sorted((-bits, pair) for pair, bits in pmi.items() if bits >= min_pmi)
    numbers = [str(i) for i in range(100)]
    return list(dict.fromkeys([entry for _, entry in frequent + strong] + numbers))


def _forget_rare(counter: Counter, limit: int) -> None:
    """Removes the rarest keys, one count after the other, until at most half the limit is left."""
    floor = 0
    while len(counter) > (limit // 2 if floor else limit):
        floor += 1
        for key in [key for key, n in counter.items() if n <= floor]:
            del counter[key]


# Balancing


def count(matcher: Matcher, texts: Iterable[str]) -> list[int]:
    """Number of captions that contain each entry; a caption counts once however often it does."""
    counts = [0] * len(matcher.entries)
    for text in texts:
        for i in matcher.match(text):
            counts[i] += 1
    return counts


def keep_probability(matches: Iterable[int], counts: list[int], t: float) -> float:
    """Probability that at least one matched entry draws the caption.

    Xu et al. 2024, Algorithm 1;  1 - prod_e (1 - p_e),  p_e = min(1, t / counts[e])
    Args:    matches, entries of the caption;  counts, captions per entry;  t, captions
    Returns: probability; 0 without a match.
    """
    # REF: the demo's min(1, sum_e p_e) keeps more than Algorithm 1 does; we follow Algorithm 1
    return 1.0 - math.prod(1.0 - t / max(counts[e], t) for e in matches)


def _check(t: float | None, tail_share: float = 0.06) -> None:
    if t is not None and not t > 0:
        raise ValueError(f"t must be above 0 captions, got {t}")
    if not 0 < tail_share <= 1:
        raise ValueError(f"the tail share must lie in (0, 1], got {tail_share}")


def t_to_p(counts: list[int], t: float) -> float:
    """Share of all matches that belongs to entries with fewer than t captions: the tail's mass."""
    counts = np.asarray(counts)
    return float(counts[counts < t].sum() / max(counts.sum(), 1))


def p_to_t(counts: list[int], p: float) -> int:
    """The threshold t at which the tail's mass reaches p: how t moves to a pool of another size.

    Xu et al. 2024: t = 20k on 1.6B pairs and 170k on 10.7B both leave 6 % in the tail. No equation;
    official code metaclip/curation/curate.py@f47f784.
    Raises: ValueError if p is not in (0, 1] or nothing matched.
    """
    _check(None, p)
    ascending = np.sort(np.asarray(counts, dtype=np.int64))
    mass = np.cumsum(ascending)
    if not len(mass) or not mass[-1]:
        raise ValueError("no entry has a match, so there is no tail")
    return int(ascending[np.searchsorted(mass / mass[-1], p)])


def uniform(seed: int, epoch: int, key: int | str) -> float:
    """A number in [0, 1) that depends on these three alone: not on order, worker or resuming."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


class Balancer:
    """Balancing inside a loader: every epoch draws anew, so the head is seen whole over time.

    Xu et al. 2024 report 66.1 online against 65.5 offline (B/32, zero-shot ImageNet).
    Args:    counts, captions per entry (the OUT.counts.json of a run);  t, captions;  seed
    """

    def __init__(self, counts: dict[str, int], t: float, seed: int = 0):
        _check(t)
        self.matcher, self.counts = Matcher(counts), list(counts.values())
        self.t, self.seed = t, seed

    def keep(self, text: str, key: int | str, epoch: int = 0) -> bool:
        """Whether the caption with this key (its index) is seen; epoch 0 is what `curate` keeps."""
        chance = keep_probability(self.matcher.match(text), self.counts, self.t)
        return uniform(self.seed, epoch, key) < chance


# Files


class Corpus:
    """Captions of a file, streamed: .tsv and .csv with a header, .jsonl, else one a line; also .gz.

    A JSON line may hold several, "captions": [...]: it is kept or dropped whole, by the entries of all.

    Unreadable lines are counted, the first twenty named in `skipped`, and past 1 % of all an error.
    A CSV quote may span lines; in TSV a quote is a character like any other.
    """

    def __init__(self, path: str | Path, column: str = "caption"):
        self.path, self.column = Path(path), column
        name = self.path.name.lower()
        self.packed, self.kind = name.endswith(".gz"), Path(name.removesuffix(".gz")).suffix
        self._reset()

    def _reset(self) -> None:
        self.header, self.place, self.skipped = b"", 0, []
        self.records = self.lines = self.unreadable = 0

    def scan(self, label: str | None = None) -> Iterator[tuple[int, bytes, str]]:
        """Yields (index, the record's bytes, caption); an unreadable record uses up its index.

        Args:    label, shows progress under this name on stderr; None is silent
        Raises: ValueError if there is no caption, the column is missing, or over 1 % is unreadable.
        """
        self._reset()
        with open(self.path, "rb") as handle:
            report = _progress(label, os.path.getsize(self.path))
            rows = _rows(gzip.open(handle) if self.packed else handle, self.kind)
            try:
                for raw, cells in rows:
                    self.lines += (count := max(raw.count(b"\n"), 1))
                    if self.kind in (".tsv", ".csv") and not self.header:
                        self._read_header(raw, cells)
                        continue
                    self.records += 1
                    if (caption := self._caption(raw, cells, count)) is not None:
                        yield self.records - 1, raw, caption
                    if self.records % 1000 == 0:
                        report(self.records, handle.tell())
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{self.path}: damaged after line {self.lines}: {error}") from None
            report(self.records, handle.tell(), done=True)
        self._check_unreadable(self.lines)
        if not self.records:
            raise ValueError(f"{self.path}: no captions in it")

    def _read_header(self, raw: bytes, cells: list[str] | None) -> None:
        if self.column not in (cells or []):
            names = ascii(", ".join(cells or []))[:200]
            raise ValueError(
                f"{self.path}: its header ({names}) has no column {self.column!r}; give --column"
            )
        self.header, self.place = raw, cells.index(self.column)

    def _caption(self, raw: bytes, cells: list[str] | None, count: int) -> str | None:
        """The record's caption; None, counted and named, if it cannot be read."""
        try:
            if len(raw) >= MAX_LINE or b"\0" in raw:
                raise ValueError("a NUL byte" if b"\0" in raw else f"over {MAX_LINE} bytes")
            raw.decode("utf-8")
            if not raw.strip():
                return ""  # a blank line is a caption without a word, in every format
            if self.kind == ".jsonl":
                cells = [self._texts(json.loads(cells[0]))]
            if not cells or self.place >= len(cells) or not isinstance(cells[self.place], str):
                raise ValueError(f"no text under {self.column!r}")
            cells[self.place].encode()  # "\\ud800" is valid JSON and not text
            return cells[self.place]
        except (ValueError, RecursionError) as error:  # decoding and JSON errors are ValueErrors
            self.unreadable += count
            if len(self.skipped) < 20:
                self.skipped.append(f"line {self.lines - count + 1}: {error}")
            self._check_unreadable(max(self.lines, 10_000))
            return None

    def _texts(self, record) -> str | None:
        """The caption of a JSON record; of several, "captions": [...], all: the record is one pair.

        A separator that no entry holds stands between them, so that nothing matches across two.
        """
        if not isinstance(record, dict):
            return None
        found = record.get(self.column, record.get(f"{self.column}s"))
        if isinstance(found, list) and found and all(isinstance(text, str) for text in found):
            return " \x1e ".join(found)
        return found

    def _check_unreadable(self, lines: int) -> None:
        if self.unreadable > 0.01 * lines:
            raise ValueError(
                f"{self.path}: {self.unreadable} of the first {self.lines} lines are unreadable, "
                f"over 1 %: {'; '.join(self.skipped[:3])}"
            )


def _lines(stream) -> Iterator[bytes]:
    """Lines of a binary stream; of an over-long one the first MAX_LINE bytes; no BOM."""
    while line := stream.readline(MAX_LINE):
        rest = line
        while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE)
        yield line.removeprefix(codecs.BOM_UTF8)


def _rows(stream, kind: str) -> Iterator[tuple[bytes, list[str] | None]]:
    """(bytes, cells) of each record; bad bytes become surrogates, cells are None if csv fails."""
    taken: list[bytes] = []

    def texts():
        for line in _lines(stream):
            taken.append(line)
            yield line.decode("utf-8", "surrogateescape")

    split = {".csv": csv.reader, ".tsv": lambda lines: (x.rstrip("\r\n").split("\t") for x in lines)}
    rows = split.get(kind, lambda lines: ([x.rstrip("\r\n")] for x in lines))(texts())
    while True:
        taken.clear()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error:
            cells = None
        yield b"".join(taken), cells


def _progress(label: str | None, size: int):
    """A function (records, bytes read, done) that shows share, rate, ETA; silent without label."""
    start = shown = time.monotonic()
    tty = sys.stderr.isatty()

    def report(records: int, position: int, done: bool = False) -> None:
        nonlocal shown
        now = time.monotonic()
        if label is None or (now - shown < (0.5 if tty else 10.0) and not done):
            return
        shown, spent = now, max(now - start, 1e-9)
        left = "done in" if done else "ETA"
        seconds = spent if done else spent * (size / max(position, 1) - 1)
        line = f"{label} {position / max(size, 1):4.0%}  {records:,} captions  "
        line += f"{records / spent:,.0f}/s  {left} {seconds:.0f} s"
        end = "" if tty and not done else "\n"
        print(("\r\x1b[K" if tty else "") + line, end=end, file=sys.stderr, flush=True)

    return report


@contextlib.contextmanager
def _atomic(path: Path):
    """A binary file that gets its name when complete, and is gone if anything stops it."""
    part = path.with_name(path.name + ".part")
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(part, "wb"))
            if path.suffix == ".gz":  # no time and no name inside: equal runs give equal bytes
                file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
            yield file
        os.replace(part, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # do not say which file it was
            raise OSError(f"cannot write {path}: {error.strerror}") from error
        raise
    finally:
        part.unlink(missing_ok=True)


# The job


def _sample(corpus: Corpus, matcher: Matcher, counts, t, seed, file, label) -> tuple[dict, list]:
    """Writes what is kept to an open file; returns its figures and the kept captions per entry."""
    after = [0] * len(counts)
    matched = kept = 0
    expected = 0.0
    file.write(corpus.header)
    for index, raw, text in corpus.scan(label):
        found = matcher.match(text)
        chance = keep_probability(found, counts, t)
        matched, expected = matched + bool(found), expected + chance
        if uniform(seed, 0, index) < chance:
            file.write(raw)
            kept += 1
            for i in found:
                after[i] += 1
    head = np.asarray(counts) > t
    summary = {
        "pairs": corpus.records,
        "unreadable_lines": corpus.unreadable,
        "matched": matched,
        "matches_per_matched": sum(counts) / max(matched, 1),
        "kept": kept,
        "kept_expected": expected,
        "t": t,
        "tail_share": t_to_p(counts, t),
        "entries": len(counts),
        "entries_unmatchable": matcher.unmatchable(),
        "entries_without_match": counts.count(0),
        "entries_in_head": int(head.sum()),
        "head_share_before": float(head @ counts / sum(counts)),
        "head_share_after": float(head @ after / max(sum(after), 1)),
        "seed": seed,
    }
    return summary, after


def check_out(corpus: Corpus, out: Path) -> None:
    """Raises: ValueError, OSError before hours of counting, if nothing could be written in the end."""
    if not out.parent.is_dir() or (out.exists() and out.samefile(corpus.path)):
        raise ValueError(f"{out}: its folder does not exist, or it is the corpus itself")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: --out names the file of the kept records")
    output_folder(out.parent)


def curate(
    corpus: Corpus,
    entries: list[str],
    out: str | Path,
    t: float | None = None,
    tail_share: float = 0.06,
    seed: int = 0,
    verbose: bool = False,
) -> dict:
    """Writes the balanced records to `out`; beside it OUT.json, OUT.counts.json and OUT.png.

    Args:    t, captions: threshold between tail and head; None takes it from tail_share (p_to_t)
    Returns: the figures of OUT.json.   Raises: ValueError if nothing matches or names collide.
    """
    out = Path(out)
    _check(t, tail_share)
    check_out(corpus, out)
    matcher = Matcher(entries)
    counts = count(matcher, (text for _, _, text in corpus.scan("count " if verbose else None)))
    pairs = corpus.records
    if not any(counts):
        raise ValueError(f"{corpus.path}: no entry of {len(counts)} in any of {pairs} captions")
    t = p_to_t(counts, tail_share) if t is None else t
    with _atomic(out) as file:  # outermost: the records appear when all figures are written
        label = "sample" if verbose else None
        summary, after = _sample(corpus, matcher, counts, t, seed, file, label)
        if corpus.records != pairs:
            raise ValueError(f"{corpus.path}: had {pairs} pairs, now {corpus.records}: it changed")
        report = summary | {"corpus": str(corpus.path), "skipped": corpus.skipped}
        for suffix, table in ((".json", report), (".counts.json", dict(zip(entries, counts)))):
            with _atomic(out.with_name(out.name + suffix)) as side:
                side.write(json.dumps(table, indent=1).encode())
    write_image(out.with_name(out.name + ".png"), picture(counts, after, t))  # nothing hangs on it
    return summary


def picture(before: list[int], after: list[int], t: float) -> Image.Image:
    """Counts by rank (left) and cumulative share of matches (right), before and after balancing.

    As the paper's curve of cumulative counts, from head to tail; ranks and counts are logarithmic.
    """
    image = Image.new("RGB", (960, 420), "white")
    draw = ImageDraw.Draw(image)
    width, height, bottom = 380, 320, 370
    decades = math.ceil(math.log10(max(len(before), 2)))
    powers = math.ceil(math.log10(max(max(before), t, 2)))
    titles = {70: "captions per entry, by rank", 550: "share of matches in the first entries"}
    ticks = {70: [f"1e{d}" for d in range(powers + 1)], 550: ["0", "1/4", "1/2", "3/4", "1"]}
    for left, title in titles.items():
        draw.text((left, 20), f"{title} (red: before, blue: after)", fill="black")
        for d in range(decades + 1):
            x = left + width * d / decades
            draw.line((x, bottom - height, x, bottom), fill="#dddddd")
            draw.text((x - 8, bottom + 6), f"1e{d}", fill="black")
        for d, label in enumerate(ticks[left]):
            y = bottom - height * d / (len(ticks[left]) - 1)
            draw.line((left, y, left + width, y), fill="#dddddd")
            draw.text((left - 30, y - 6), label, fill="black")
    y = bottom - height * max(math.log10(t), 0) / powers
    draw.line((70, y, 70 + width, y), fill="#888888")
    draw.text((70 + width - 60, y - 14), f"t = {t:g}", fill="#555555")
    for counts, colour in ((before, "#c0392b"), (after, "#2257a5")):
        ranked = -np.sort(-np.asarray(counts))
        rank = np.unique(np.logspace(0, math.log10(len(ranked)), 400).astype(int))
        rank = rank[rank <= max(np.count_nonzero(ranked), 1)]
        level = np.log10(np.maximum(ranked, 1)) / powers
        share = ranked.cumsum() / max(ranked.sum(), 1)
        for left, heights in ((70, level), (550, share)):
            points = (left + np.log10(rank) / decades * width, bottom - height * heights[rank - 1])
            draw.line(list(zip(*(p.tolist() for p in points))), fill=colour, width=2)
    return image


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="MetaCLIP curation: match captions, balance them.", allow_abbrev=False
    )
    add = parser.add_argument
    add("corpus", help=".tsv or .csv with header, .jsonl, else one caption a line; .gz too")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--entries", help="metadata: one entry a line, a JSON list, or OUT.counts.json")
    built = "build it from the corpus: words and pairs seen N times (the paper: 100, on Wikipedia)"
    source.add_argument("--build-entries", type=int, metavar="N", help=built)
    add("--out", required=True, help="kept records; beside it OUT.json, OUT.counts.json, OUT.png")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--t", type=float, help="an entry with up to t captions is tail")
    share = "or: the tail's share of all matches, from which t follows (default 0.06)"
    level.add_argument("--tail-share", type=float, default=0.06, help=share)
    add("--column", default="caption", help="column or JSON key of the caption (or key + s: a list)")
    add("--seed", type=int, default=0, help="of the draws; equal seeds keep equal captions")
    args = parser.parse_args(argv)
    try:
        corpus = Corpus(args.corpus, args.column)
        check_out(corpus, Path(args.out))
        if args.entries:
            entries = read_entries(args.entries)
        else:
            texts = (text for _, _, text in corpus.scan("build "))
            entries = build_entries(texts, args.build_entries)
        summary = curate(corpus, entries, args.out, args.t, args.tail_share, args.seed, True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: no {args.out}; a new run gives what this one would have", file=sys.stderr)
        return 130
    for line in corpus.skipped:
        print(f"skipped {line}", file=sys.stderr)
    for name, value in summary.items():
        print(f"{name:22}{value:>16,.4f}" if value % 1 else f"{name:22}{int(value):>16,}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop tidies up too
    sys.exit(main())
