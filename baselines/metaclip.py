"""MetaCLIP curation: match captions with metadata entries, then balance frequent and rare entries.

Xu et al. 2024 (arXiv:2309.16671), section 3 and Algorithm 1. Llip and its baselines train on data selected in
this way. Two passes over the captions suffice, and memory grows with the metadata only:

    1. count   counts[e] = number of captions that contain entry e as a sub-string
    2. sample  keep a caption with probability 1 - prod_e (1 - min(1, t / counts[e]))

An entry with at most t captions (the tail) keeps all of them, a more frequent one (the head) at least t in
expectation. A caption without any entry is dropped. The paper takes t = 20k for 1.6B pairs.

    python -m baselines.metaclip captions.tsv --entries entries.txt --t 20 --out kept.tsv
"""

import csv
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from readers.lists import table_layout, whole_row
from util.files import open_file, output_folder, read_text, replacing, write_json
from util.flags import parse
from util.program import leave, program
from util.report import Progress
from util.text import printable

SPACING = str.maketrans({c: f" {c} " for c in ",.;:?!`"} | dict.fromkeys("\t\n\r", " "))


@dataclass(frozen=True)
class Flags:
    data: str  # .csv or .tsv with a header, .jsonl, otherwise one caption per line
    t: float  # captions: an entry with at most t captions belongs to the tail
    out: str  # file of the kept records; OUT.json gets the figures and the counts of all entries
    entries: str = ""  # metadata: one entry per line, a JSON list, or the OUT.json of an earlier run
    build_entries: int = 0  # or: the words and word pairs seen so often in DATA (the paper: 100)
    column: str = "caption"  # column or JSON key of the caption (or the key + "s" of a list of captions)
    seed: int = 0  # of the draws; the same seed keeps the same records


def match(text: str, entries: Iterable[str]) -> list[int]:
    """Indices of the entries that occur in the caption, ascending.

    Xu et al. 2024, section 3.2; no equation; code metaclip1/substr_matching.py@f47f784. Case matters. Entries
    such as "U.S." never match, because the caption's punctuation gets spaces around it.
    """
    text = f" {text.translate(SPACING)} "
    return [i for i, entry in enumerate(entries) if f" {entry} " in text]


def compiled(entries: Iterable[str]) -> Callable[[str], list[int]]:
    """SPEED: a function that equals `match` and passes once over a caption, for any number of entries.

    " a b " is in " text " exactly when a and b are neighbours in text.split(" "), so that a dictionary of
    token n-grams is the same test.
    """
    ids, beginnings = {}, set()  # beginnings: all that longer entries start with
    for i, entry in enumerate(entries):
        ids.setdefault(entry, []).append(i)
        beginnings.update(entry[: space.start()] for space in re.finditer(" ", entry))

    def match_compiled(text: str) -> list[int]:
        # TRAP: split() without an argument would lose the empty tokens between two spaces
        tokens, found = text.translate(SPACING).split(" "), set()
        for i, run in enumerate(tokens):
            found.update(ids.get(run, ()))
            while run in beginnings and (i := i + 1) < len(tokens):
                run = f"{run} {tokens[i]}"
                found.update(ids.get(run, ()))
        return sorted(found)

    return match_compiled


def read_entries(path: str | Path) -> list[str]:
    """Entries of a file without repetitions: lines, a JSON list, or the OUT.json of an earlier run."""
    try:
        text = read_text(path)
        content = json.loads(text) if Path(path).suffix == ".json" else text.replace("\r\n", "\n").split("\n")
        if isinstance(content, dict) and isinstance(content.get("counts"), dict):
            content = content["counts"]
        entries = [entry for entry in dict.fromkeys(content) if entry != ""]
        if not entries or any(not isinstance(entry, str) for entry in entries):
            raise ValueError("no strings in it")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected entries, one per line, or a JSON list: {error}") from error
    return entries


def build_entries(texts: Iterable[str], min_count: int = 100, min_pmi: float = 8.0) -> list[str]:
    """Metadata from texts: frequent words, word pairs with a high PMI, and the numbers 0 to 99.

    Xu et al. 2024, Table 1 (words seen 100 times, pairs with PMI 30, base not stated) and Appendix A.7. Here
    PMI = log2(n_ab * N / (n_a * n_b)) bits, and a pair must also occur min_count times.
    Returns: words by falling count, pairs by falling PMI, numbers; no entry twice.
    """
    words, pairs = Counter(), Counter()
    for text in texts:
        tokens = text.translate(SPACING).split(" ")
        words.update(tokens)
        pairs.update(zip(tokens, tokens[1:]))
    words = Counter({word: n for word, n in words.items() if re.search(r"[^\W_]", word)})
    total, pmi = words.total(), {}
    for (a, b), n in pairs.items():
        if n >= min_count and words[a] and words[b]:
            pmi[f"{a} {b}"] = math.log2(n * total / (words[a] * words[b]))
    frequent = sorted((-n, word) for word, n in words.items() if n >= min_count)
    strong = sorted((-bits, pair) for pair, bits in pmi.items() if bits >= min_pmi)
    return list(dict.fromkeys([entry for _, entry in frequent + strong] + [str(i) for i in range(100)]))


def keep_probability(matches: Iterable[int], counts: list[int], t: float) -> float:
    """Probability that at least one matched entry draws the caption; 0 without a match.

    Xu et al. 2024, Algorithm 1;  1 - prod_e (1 - p_e),  p_e = min(1, t / counts[e])
    Args: matches: entries of the caption;  counts: captions per entry;  t: captions
    """
    # REF: the official demo uses min(1, sum_e p_e), which keeps more; this is Algorithm 1
    return 1.0 - math.prod(1.0 - t / max(counts[e], t) for e in matches)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on the seed and the record's index only."""
    digest = hashlib.blake2b(f"{seed}/0/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


class Corpus:
    """The records of a file with captions. Tables are read and written as readers/lists.py reads them."""

    def __init__(self, path: str, column: str = "caption"):
        self.path, self.column, self.columns, self.dialect = path, column, [], {}
        if path.lower().endswith((".csv", ".tsv")):
            first = next(self.lines(), "").strip("\r\n")
            self.dialect["delimiter"], self.columns, self.headless = table_layout(first, None)
            if column not in self.columns:
                raise ValueError(f"{path}: no {column!r} in {printable(self.columns)[:200]}; give --column")
            if self.dialect["delimiter"] == "\t":
                # in many tab-separated files, quotes are plain characters
                try:
                    sum(1 for _ in csv.reader(self.lines(), strict=True, **self.dialect))
                except csv.Error:
                    self.dialect["quoting"] = csv.QUOTE_NONE

    def lines(self) -> Iterator[str]:
        with open_file(self.path, "r", encoding="utf-8-sig", newline="") as file:
            try:
                yield from file
            except UnicodeDecodeError as error:
                problem = f"{self.path} is not text in UTF-8 ({error})"
                raise OSError(f"{problem}: decompress or convert it") from None

    def records(self, label: str = "", total: int = 0) -> Iterator[tuple[list[str] | str, str]]:
        """Yields each record and its caption. A record is a list of cells in a table, otherwise a line.

        Raises: ValueError that names the record which cannot be read.
        """
        progress, rows = Progress(label, total, "captions"), self.lines()
        if self.columns:
            separator = self.dialect["delimiter"]
            rows = (whole_row(row, self.columns, separator) for row in csv.reader(rows, **self.dialect))
        try:
            if self.columns and not self.headless:
                next(rows)
            for record in rows:
                yield record, self.caption(record)
                progress.add(1)
        except (ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
            where = f"{self.path}: cannot read on after record {progress.done}"
            raise ValueError(f"{where}: {error!r:.200}") from None

    def caption(self, record: list[str] | str) -> str:
        if self.columns:
            return record[self.columns.index(self.column)]
        if not self.path.lower().endswith(".jsonl") or not record.strip():
            return record.rstrip("\r\n")
        content = json.loads(record)
        texts = content.get(self.column, content.get(f"{self.column}s"))
        # one record; no entry contains this separator, so that none matches across two captions
        return texts if isinstance(texts, str) else " \x1e ".join(texts)

    def writer(self, file) -> Callable[[list[str] | str], object]:
        """Writes the header of a table to a binary file.   Returns: a function that writes a record."""
        if not self.columns:
            return lambda line: file.write(line.encode())
        # TRAP: csv quotes a carriage return only where its line end has one
        lines = SimpleNamespace(write=lambda text: file.write(text.removesuffix("\r\n").encode() + b"\n"))
        table = csv.writer(lines, delimiter=self.dialect["delimiter"])
        if not self.headless:
            table.writerow(self.columns)
        return table.writerow


def curate(corpus: Corpus, entries: list[str], c: Flags) -> dict:
    """Counts and samples; writes OUT and OUT.json.   Returns: the figures."""
    find, counts, total, kept = compiled(entries), [0] * len(entries), 0, 0
    for _, caption in corpus.records("count"):
        total += 1
        for i in find(caption):
            counts[i] += 1
    if not any(counts):
        raise ValueError(f"{c.data}: no entry of {len(entries)} occurs in any of {total} captions")
    with replacing(c.out) as file:
        write = corpus.writer(file)
        for index, (record, caption) in enumerate(corpus.records("sample", total)):
            if uniform(c.seed, index) < keep_probability(find(caption), counts, c.t):
                write(record)
                kept += 1
    figures = {"captions": total, "kept": kept, "entries": len(entries)}
    figures |= {"in the head": sum(n > c.t for n in counts), "without a caption": counts.count(0)}
    write_json(f"{c.out}.json", figures | {"flags": vars(c), "counts": dict(zip(entries, counts))})
    return figures


@program
def main(argv: list[str]) -> None:
    c = parse(Flags, argv, __doc__, positional=("data",))
    if bool(c.entries) == bool(c.build_entries) or c.build_entries < 0 or not c.t > 0:
        raise ValueError("give --t above 0, and either --entries FILE or --build-entries N with N above 0")
    output_folder(Path(c.out).parent)
    if existing := [path for path in (c.out, f"{c.out}.json") if os.path.lexists(path)]:
        raise ValueError(f"{existing[0]} exists: delete it, or choose another --out")
    corpus = Corpus(c.data, c.column)
    texts = (caption for _, caption in corpus.records("build"))
    entries = read_entries(c.entries) if c.entries else build_entries(texts, c.build_entries)
    for name, figure in curate(corpus, entries, c).items():
        print(f"{name:20}{figure:>16,}")


if __name__ == "__main__":
    leave(main())
