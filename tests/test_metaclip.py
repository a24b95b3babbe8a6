"""MetaCLIP curation: the matching rule, the balancing formula, hostile files, the command line."""

import csv
import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from baselines import metaclip
from baselines.metaclip import (
    Balancer,
    Corpus,
    Matcher,
    build_entries,
    count,
    curate,
    keep_probability,
    match,
)


@pytest.fixture(scope="module")
def recorded():
    path = Path(__file__).parent / "golden" / "metaclip_curation.json"
    return json.loads(path.read_text(encoding="utf-8"))


def pool(n=3000, seed=0):
    """Captions over forty words with Zipf frequencies, and their entries: ten head, thirty tail."""
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(40)]
    weights = [1 / (i + 1) ** 1.5 for i in range(40)]
    captions = [" ".join(rng.choices(words, weights, k=rng.randint(1, 5))) for _ in range(n)]
    return captions, words


def write_tsv(path, captions):
    path.write_text("url\tcaption\n" + "".join(f"u{i}\t{c}\n" for i, c in enumerate(captions)))
    return path


def run(capsys, *args):
    status = metaclip.main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# Matching


def test_golden_matches_counts_and_probabilities(recorded):
    captions, entries = recorded["captions"], recorded["metadata"]
    matcher = Matcher(entries)
    found = [matcher.match(c) for c in captions]
    assert found == [match(c, entries) for c in captions] == recorded["matched_entry_ids_v1"]
    counts = count(matcher, captions)
    assert counts == recorded["entry_count"]
    for t, reference in recorded["per_t"].items():
        got = [keep_probability(m, counts, int(t)) for m in found]
        assert np.allclose(got, reference["keep_probability_per_caption"], rtol=0, atol=1e-12)
        assert metaclip.t_to_p(counts, int(t)) == pytest.approx(reference["tail_portion_p"], abs=1e-15)
        assert metaclip.p_to_t(counts, reference["tail_portion_p"]) == reference["t_from_p"]


def definition(text, entries):
    """The rule spelled out once more, sharing nothing with the module."""
    wrapped = "".join(f" {c} " if c in ",.;:?!`" else c for c in text)
    wrapped = " " + wrapped.replace("\t", " ").replace("\n", " ").replace("\r", " ") + " "
    return [i for i, e in enumerate(entries) if wrapped.find(" " + e + " ") >= 0]


def test_matcher_equals_the_definition_on_hostile_strings():
    rng = random.Random(1)
    letters = ["a", "b", "A", " ", " ", " ", ",", "`", "\t", "\n", "\r", "-", "\u00a0", "\u2028", "é"]
    matches = 0
    for _ in range(300):
        entries = ["".join(rng.choices(letters, k=rng.randint(0, 5))) for _ in range(25)]
        matcher = Matcher(entries)
        for _ in range(10):
            text = "".join(rng.choices(letters, k=rng.randint(0, 14)))
            expected = definition(text, entries)
            assert matcher.match(text) == match(text, entries) == expected, (text, entries)
            matches += len(expected)
    assert matches > 3000  # the comparison is not between empty lists


@pytest.mark.parametrize(
    ("text", "entry", "matches"),
    [
        ("a cat.", "cat", True),
        ("a Cat", "cat", False),
        ("cats", "cat", False),
        ("hot-dog", "dog", False),
        ("in the U.S. today", "U.S.", False),  # the dots stand apart in the caption
        ("cat, dog", ",", True),
        ("new\r\nyork", "new york", False),  # two characters, two spaces
        ("new\tyork", "new york", True),
        ("ice  cream", "ice cream", False),
        ("ice  cream", "ice  cream", True),
        ("cat", " cat", False),
        ("a  cat", " cat", True),
        ("", "", True),
        ("a b a c", "a c", True),  # a failed long start must not hide a later one
        ("a b c d", "b c d", True),
    ],
)
def test_rules(text, entry, matches):
    entries = [entry, "a b c x y"]
    assert (0 in match(text, entries)) == (0 in Matcher(entries).match(text)) == matches


def test_equal_entries_all_match_and_unmatchable_ones_are_counted():
    assert Matcher(["cat", "dog", "cat"]).match("cat cat") == [0, 2]
    assert Matcher(["cat", "U.S.", ",", "a\tb", "ice cream", "what ?"]).unmatchable() == 2


# Metadata


def test_build_entries_words_pairs_numbers():
    texts = ["ice cream , please"] * 20 + ["the ice", "the cream"] * 5 + ["the the", "- & -"] * 40
    entries = build_entries(texts, min_count=20, min_pmi=1.5)
    assert entries[:4] == ["the", "cream", "ice", "please"]
    assert entries[4:6] == ["ice cream", "0"]  # "cream please" is never adjacent: a comma between
    assert entries[-1] == "99" and len(entries) == len(set(entries)) == 105
    # 20 * N / (25 * 25) with N = 60 + 20 + 80 words; the bar drops the pair, not the words
    bits = np.log2(20 * 160 / (25 * 25))
    assert "ice cream" in build_entries(texts, 20, bits - 1e-9)
    assert "ice cream" not in build_entries(texts, 20, bits + 1e-9)


def test_build_entries_forgets_the_rarest_first():
    texts = [f"once{i} frequent" for i in range(500)]
    small = build_entries(texts, min_count=2, min_pmi=0, limit=50)
    assert small == build_entries(texts, min_count=2, min_pmi=0) == ["frequent", *map(str, range(100))]
    counter = Counter({i: 1 + i % 10 for i in range(100)})
    metaclip._forget_rare(counter, 60)
    assert len(counter) == 30 and min(counter.values()) == 8
    metaclip._forget_rare(counter, 60)
    assert len(counter) == 30


def test_entries_file(tmp_path):
    path = tmp_path / "entries.txt"
    path.write_bytes("\ufeffcat\r\nNew York\n\ncat\ncafé\x0bx\n".encode())
    assert metaclip.read_entries(path) == ["cat", "New York", "café\x0bx"]
    listed = tmp_path / "metadata.json"
    listed.write_text(json.dumps(["b", "a", "b"]))
    assert metaclip.read_entries(listed) == ["b", "a"]
    for content in ("[1, 2]", "3", "{", "[]"):
        listed.write_text(content)
        with pytest.raises(ValueError, match="metadata.json"):
            metaclip.read_entries(listed)


# Balancing


def test_keep_probability_closed_form_against_monte_carlo():
    counts, t, matches = [100, 40, 25, 10], 10, [0, 1, 2]
    p = keep_probability(matches, counts, t)
    assert p == pytest.approx(1 - 0.9 * 0.75 * 0.6)
    draws = np.random.default_rng(0).random((100_000, 3)) < [t / counts[e] for e in matches]
    assert abs(draws.any(1).mean() - p) < 4 * (p * (1 - p) / 100_000) ** 0.5
    assert keep_probability([], counts, t) == 0
    assert keep_probability([0, 3], counts, t) == 1  # a tail entry always keeps
    assert keep_probability([0], [0], t) == 1  # counted on another pool: unseen is tail
    assert keep_probability([0, 1], counts, t) < t / 100 + t / 40  # not the demo's sum


def test_tail_never_dropped_and_head_keeps_t_in_expectation():
    captions, entries = pool()
    matcher = Matcher(entries)
    found = [matcher.match(c) for c in captions]
    counts, t = count(matcher, captions), 60
    expected, kept = np.zeros(40), np.zeros(40)
    balancer = Balancer(dict(zip(entries, counts)), t)
    for i, ids in enumerate(found):
        expected[ids] += keep_probability(ids, counts, t)
        kept[ids] += balancer.keep(captions[i], i)
    counts = np.array(counts)
    tail, head = counts <= t, counts > t
    assert tail.sum() > 5 and head.sum() > 5
    assert (kept[tail] == counts[tail]).all() and np.allclose(expected[tail], counts[tail])
    assert (expected[head] >= t).all() and (expected[head] < counts[head]).all()
    assert kept[head].sum() / kept.sum() < counts[head].sum() / counts.sum()
    assert abs(kept.sum() - expected.sum()) < 0.05 * expected.sum()


def test_draws_are_uniform_and_depend_on_seed_epoch_and_key_only():
    draws = np.array([metaclip.uniform(3, 0, key) for key in range(20_000)])
    assert 0 <= draws.min() and draws.max() < 1
    assert np.abs(np.histogram(draws, 10)[0] - 2000).max() < 200
    again = [metaclip.uniform(3, 0, key) for key in reversed(range(20_000))]
    assert draws.tolist() == again[::-1]
    for other in ((4, 0), (3, 1)):
        shifted = [metaclip.uniform(*other, key) for key in range(20_000)]
        assert abs(np.corrcoef(draws, shifted)[0, 1]) < 0.03
    assert metaclip.uniform(0, 0, 0) == 0.08234954794796834  # printf 0/0/0 | b2sum -l 64


def test_online_epochs_differ_and_the_mean_is_the_probability():
    balancer = Balancer({"dog": 100, "cat": 10}, t=20)
    kept = [balancer.keep("a dog", 7, epoch) for epoch in range(4000)]
    assert abs(np.mean(kept) - 0.2) < 0.03
    assert all(balancer.keep("a cat and a dog", 7, epoch) for epoch in range(50))
    assert not any(balancer.keep("a bird", 7, epoch) for epoch in range(50))


def test_tail_share_and_threshold_are_inverse():
    counts = [0, 1, 2, 3, 4, 10, 80]
    assert metaclip.t_to_p(counts, 10) == 0.1 and metaclip.p_to_t(counts, 0.1) == 4
    assert metaclip.p_to_t(counts, 0.101) == 10 and metaclip.p_to_t(counts, 1.0) == 80
    assert metaclip.p_to_t(counts, 1e-9) == 1  # not 0: entries without a match have no mass
    for bad in (lambda: metaclip.p_to_t(counts, 0), lambda: metaclip.p_to_t([0, 0], 0.5)):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(ValueError, match="got 0"):
        Balancer({"a": 1}, 0)
    with pytest.raises(ValueError, match="empty"):
        Matcher([])


# Files


def test_streaming_equals_in_memory(tmp_path):
    captions, entries = pool()
    entries = entries + ["word0 word1", "absent", "word.1"]
    corpus = Corpus(write_tsv(tmp_path / "c.tsv", captions))
    counts = count(Matcher(entries), captions)
    t = counts[12]  # an entry with exactly t captions is tail
    summary = curate(corpus, entries, tmp_path / "kept.tsv", t=t, seed=5)
    balancer = Balancer(dict(zip(entries, counts)), t, seed=5)
    kept = [i for i, c in enumerate(captions) if balancer.keep(c, i)]
    expected = "url\tcaption\n" + "".join(f"u{i}\t{captions[i]}\n" for i in kept)
    assert (tmp_path / "kept.tsv").read_text() == expected
    assert json.loads((tmp_path / "kept.tsv.counts.json").read_text()) == dict(zip(entries, counts))
    assert 0 < len(kept) == summary["kept"] < len(captions) == summary["matched"]
    assert summary["entries_without_match"] == 2 and summary["entries_unmatchable"] == 1
    assert summary["head_share_after"] < summary["head_share_before"]
    assert summary["entries_in_head"] == sum(n > t for n in counts)


def test_all_formats_give_the_same_captions(tmp_path):
    captions = ["a cat, and", 'say "hi" now', "", "é 東京", " two  spaces "]
    (tmp_path / "c.txt").write_text("".join(c + "\r\n" for c in captions), newline="")
    with open(tmp_path / "c.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "caption"], *([i, c] for i, c in enumerate(captions))])
    write_tsv(tmp_path / "c.tsv", captions)
    lines = [json.dumps({"caption": c}) for c in captions]
    (tmp_path / "c.jsonl").write_text("\ufeff" + "\n".join(lines))  # no newline at the end
    for kind in ("txt", "csv", "tsv", "jsonl"):
        data = (tmp_path / f"c.{kind}").read_bytes()
        (tmp_path / f"z.{kind}.GZ").write_bytes(gzip.compress(data))
        for name in (f"c.{kind}", f"z.{kind}.GZ"):
            corpus = Corpus(tmp_path / name)
            assert [(i, text) for i, _, text in corpus.scan()] == list(enumerate(captions)), name
            whole = corpus.header + b"".join(raw for _, raw, _ in corpus.scan())
            assert whole == data.removeprefix(b"\xef\xbb\xbf")


def test_json_lines_of_several_captions_are_one_pair_each(tmp_path):
    """As data.py reads and writes them; every text counts, and no entry matches across two."""
    path = tmp_path / "c.jsonl"
    records = [
        {"image": "0.png", "captions": ["a red dog", "house at night", "a dog"]},
        {"image": "1.png", "caption": "one cat"},
        {"image": "2.png", "captions": ["grass"]},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    matcher = Matcher(["dog", "house", "dog house", "cat", "grass", "night a"])
    texts = [text for _, _, text in Corpus(path).scan()]
    assert [matcher.match(text) for text in texts] == [[0, 1], [3], [4]]
    assert all(word.isalnum() or " " in word for word in build_entries(texts, 1, 0.0))
    summary = curate(Corpus(path), ["dog", "cat"], tmp_path / "kept.jsonl", t=5)
    assert summary["pairs"] == 3 and summary["unreadable_lines"] == 0
    kept = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == records[:2]
    for wrong in ([], [3], {"a": 1}):
        path.write_text(json.dumps({"captions": wrong}) + "\n")
        with pytest.raises(ValueError, match="no text under 'caption'"):
            list(Corpus(path).scan())


@pytest.mark.parametrize("kind", ["txt", "tsv", "csv", "jsonl"])
def test_a_blank_line_is_an_empty_caption(tmp_path, kind):
    path = tmp_path / f"c.{kind}"
    header = {"tsv": "url\tcaption\n", "csv": "url,caption\n"}.get(kind, "")
    path.write_text(header + "\n  \n")
    assert [text.strip() for _, _, text in Corpus(path).scan()] == ["", ""]


def test_csv_record_over_several_lines_stays_whole(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('caption,id\n"a cat\nand a ""dog""",1\nbird,2\n')
    records = [(i, raw, text) for i, raw, text in Corpus(path).scan()]
    assert records[0] == (0, b'"a cat\nand a ""dog""",1\n', 'a cat\nand a "dog"')
    assert records[1] == (1, b"bird,2\n", "bird")


def hostile(kind):
    """Two thousand good lines and nine that cannot be read, each at a known line."""
    good = {"tsv": b"u\tcat\n", "jsonl": b'{"caption": "cat"}\n', "txt": b"cat\n"}[kind]
    lines = [good] * 2000
    bad = {
        "txt": [b"c\0at\n", b"\xff\xfe cat\n", b"cat " * 300_000 + b"\n"],
        "tsv": [
            b"u\tc\0at\n",
            b"u\tcaf\xe9\n",
            b"one cell\n",
            b"\xe9\tcat\n",
            b"u\t" + b"x" * (1 << 20) + b"\n",
        ],
        "jsonl": [
            b"{\n",
            b"[1]\n",
            b'{"caption": 3}\n',
            b'{"caption": "\\ud800"}\n',
            b"[" * 9999 + b"\n",
            b'{"caption": ' + b"1" * 5000 + b"}\n",
            b"\xff\n",
        ],
    }[kind]
    where = [100 * (i + 1) for i in range(len(bad))]
    for line, content in zip(where, bad):
        lines[line - 1] = content
    header = b"url\tcaption\n" if kind == "tsv" else b""
    return header + b"".join(lines), [w + bool(header) for w in where]


@pytest.mark.parametrize("kind", ["txt", "tsv", "jsonl"])
def test_unreadable_lines_are_named_counted_and_skipped(tmp_path, capsys, kind):
    content, where = hostile(kind)
    path = tmp_path / f"c.{kind}"
    path.write_bytes(content)
    (tmp_path / "e.txt").write_text("cat\n")
    out = tmp_path / "kept"
    status, table, err = run(capsys, path, "--entries", tmp_path / "e.txt", "--t", 5000, "--out", out)
    assert status == 0
    for line in where:
        assert f"skipped line {line}: " in err
    assert err.count("skipped line") == len(where)
    summary = json.loads((tmp_path / "kept.json").read_text())
    assert summary["unreadable_lines"] == len(where) and summary["pairs"] == 2000
    assert summary["kept"] == 2000 - len(where)
    assert max(map(len, out.read_bytes().split(b"\n"))) < 100


def test_a_long_but_readable_line_is_matched(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("x " * 500_000 + "cat\n" + "dog")
    assert [Matcher(["cat", "x x x x y"]).match(c) for _, _, c in Corpus(path).scan()] == [[0], []]


def test_past_one_percent_is_an_error(tmp_path, capsys):
    path = tmp_path / "c.txt"
    path.write_bytes(b"cat\n" * 198 + b"\xff\n" * 2)
    (tmp_path / "e.txt").write_text("cat\n")
    args = (path, "--entries", tmp_path / "e.txt", "--t", 5, "--out", tmp_path / "k.txt")
    assert run(capsys, *args)[0] == 0
    path.write_bytes(b"cat\n" * 197 + b"\xff\n" * 3)
    status, _, err = run(capsys, *args)
    assert status == 2 and "3 of the first 200 lines" in err and "line 198" in err
    path.write_bytes(b"\xff\n" * 10**6)  # found early, not after the whole file
    with pytest.raises(ValueError, match="101 of the first 101 lines"):
        list(Corpus(path).scan())


def test_csv_quote_that_never_closes_is_counted_by_lines(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("caption,id\n" + "cat,1\n" * 100 + '"open\n' + "cat,1\n" * 40_000)
    with pytest.raises(ValueError, match="of the first .* lines are unreadable"):
        list(Corpus(path).scan())


# The command line


def arguments(tmp_path, **more):
    captions, entries = pool(500)
    write_tsv(tmp_path / "c.tsv", captions)
    (tmp_path / "e.txt").write_text("\n".join(entries))
    options = {"entries": tmp_path / "e.txt", "t": 20, "out": tmp_path / "kept.tsv"} | more
    flags = ((f"--{k.replace('_', '-')}", v) for k, v in options.items() if v is not None)
    return [tmp_path / "c.tsv", *(x for flag in flags for x in flag)]


def test_command_line_end_to_end_and_determinism(tmp_path, capsys):
    status, table, err = run(capsys, *arguments(tmp_path))
    assert status == 0 and "captions" in err and "/s" in err
    for name in ("pairs", "matched", "kept", "entries_without_match", "entries_in_head"):
        assert name in table
    first = (tmp_path / "kept.tsv").read_bytes()
    image = Image.open(tmp_path / "kept.tsv.png")
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(192, 57, 43), (34, 87, 165)} <= colours  # both curves are there
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "c.tsv",
        "e.txt",
        "kept.tsv",
        "kept.tsv.counts.json",
        "kept.tsv.json",
        "kept.tsv.png",
    ]
    assert run(capsys, *arguments(tmp_path))[1] == table
    assert (tmp_path / "kept.tsv").read_bytes() == first
    run(capsys, *arguments(tmp_path, seed=1))
    assert (tmp_path / "kept.tsv").read_bytes() != first
    run(capsys, *arguments(tmp_path, out=tmp_path / "k.tsv.gz"))
    packed = (tmp_path / "k.tsv.gz").read_bytes()
    assert gzip.decompress(packed) == first
    assert packed[3:8] == bytes(5)  # neither a name nor a time: equal runs, equal bytes


def test_tail_share_and_built_entries(tmp_path, capsys):
    status, _, _ = run(capsys, *arguments(tmp_path, t=None, tail_share=0.2))
    summary = json.loads((tmp_path / "kept.tsv.json").read_text())
    counts = list(json.loads((tmp_path / "kept.tsv.counts.json").read_text()).values())
    assert status == 0 and summary["t"] == metaclip.p_to_t(counts, 0.2)
    assert run(capsys, *arguments(tmp_path, entries=None, build_entries=3))[0] == 0
    built = json.loads((tmp_path / "kept.tsv.counts.json").read_text())
    assert "word0" in built and "99" in built and built["99"] == 0
    counted = tmp_path / "kept.tsv.counts.json"  # a run's counts serve as the next one's entries
    assert run(capsys, *arguments(tmp_path, entries=counted, out=tmp_path / "again.tsv"))[0] == 0
    assert (tmp_path / "again.tsv").read_bytes() == (tmp_path / "kept.tsv").read_bytes()


def test_user_mistakes_are_one_line_and_exit_two(tmp_path, capsys):
    args = arguments(tmp_path)
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "other.txt").write_text("zebra\n")
    mistakes = [
        ({"entries": tmp_path / "none.txt"}, "no entries"),
        ({"entries": tmp_path / "missing.txt"}, "missing.txt"),
        ({"entries": tmp_path / "other.txt"}, "no entry of 1 in any of 500"),
        ({"column": "text"}, "has no column 'text'"),
        ({"out": tmp_path / "c.tsv"}, "corpus itself"),
        ({"out": tmp_path / "no" / "kept.tsv"}, "folder"),
        ({"t": -1}, "got -1"),
        ({"t": "nan"}, "got nan"),
        ({"t": None, "tail_share": 6}, "got 6"),
    ]
    before = (tmp_path / "c.tsv").read_bytes()
    for change, words in mistakes:
        status, out, err = run(capsys, *arguments(tmp_path, **change))
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and not out and len(errors) == 1 and words in errors[0], (change, err)
    for content, words in ((b"", "no captions"), (b"url\tcaption\n", "no captions")):
        (tmp_path / "c.tsv").write_bytes(content)
        status, out, err = run(capsys, *args)
        assert status == 2 and words in err
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress(before)[:-100])
    status, out, err = run(capsys, tmp_path / "c.tsv.gz", *args[1:])
    assert status == 2 and "damaged" in err
    assert not [p for p in tmp_path.iterdir() if "kept" in p.name]
    with pytest.raises(SystemExit):
        metaclip.main([*map(str, args), "--unknown"])


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError("disk full")])
def test_interruption_leaves_the_old_output_and_no_half_one(tmp_path, capsys, monkeypatch, reason):
    (tmp_path / "kept.tsv").write_text("old")
    calls, true_uniform = [], metaclip.uniform

    def stop(*args):
        calls.append(args)
        if len(calls) == 300:
            raise reason
        return true_uniform(*args)

    args = arguments(tmp_path)
    monkeypatch.setattr(metaclip, "uniform", stop)
    status, _, err = run(capsys, *args)
    assert status == (130 if reason is KeyboardInterrupt else 2)
    assert err.strip().splitlines()[-1].startswith(("interrupted", "error: disk full"))
    assert (tmp_path / "kept.tsv").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.tsv", "e.txt", "kept.tsv"]


def test_a_corpus_that_changes_between_the_passes_is_an_error(tmp_path, monkeypatch):
    path = write_tsv(tmp_path / "c.tsv", ["a cat"] * 10)
    true_count = metaclip.count

    def count_then_append(matcher, texts):
        counts = true_count(matcher, texts)
        write_tsv(path, ["a cat"] * 11)
        return counts

    monkeypatch.setattr(metaclip, "count", count_then_append)
    with pytest.raises(ValueError, match="had 10 pairs, now 11"):
        curate(Corpus(path), ["cat"], tmp_path / "kept.tsv", t=5)
    assert not (tmp_path / "kept.tsv").exists()


def test_picture_of_one_entry_and_of_nothing_kept():
    assert metaclip.picture([3], [0], 0.5).size == (960, 420)
    assert metaclip.picture([0, 0], [0, 0], 1).size == (960, 420)
