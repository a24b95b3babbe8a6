"""MetaCLIP curation: the matching rule, the balancing formula, reading and writing, the command line."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from baselines import metaclip
from baselines.metaclip import Corpus, build_entries, compiled, keep_probability, match, uniform


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


def counted(captions, entries):
    find, counts = compiled(entries), [0] * len(entries)
    for caption in captions:
        for i in find(caption):
            counts[i] += 1
    return counts


def write_tsv(path, captions):
    path.write_text("url\tcaption\n" + "".join(f"u{i}\t{c}\n" for i, c in enumerate(captions)))
    return path


def run(capsys, *args):
    status = metaclip.main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def captions_of(path):
    return [caption for _, caption in Corpus(str(path)).records()]


# Matching


def test_golden_matches_counts_and_probabilities(recorded):
    captions, entries = recorded["captions"], recorded["metadata"]
    find = compiled(entries)
    found = [find(c) for c in captions]
    assert found == [match(c, entries) for c in captions] == recorded["matched_entry_ids_v1"]
    counts = counted(captions, entries)
    assert counts == recorded["entry_count"]
    for t, reference in recorded["per_t"].items():
        got = [keep_probability(m, counts, int(t)) for m in found]
        assert np.allclose(got, reference["keep_probability_per_caption"], rtol=0, atol=1e-12)


def definition(text, entries):
    """The rule once more, written without the module's code."""
    wrapped = "".join(f" {c} " if c in ",.;:?!`" else c for c in text)
    wrapped = " " + wrapped.replace("\t", " ").replace("\n", " ").replace("\r", " ") + " "
    return [i for i, e in enumerate(entries) if wrapped.find(" " + e + " ") >= 0]


def test_compiled_entries_equal_the_definition_on_hostile_strings():
    rng = random.Random(1)
    letters = ["a", "b", "A", " ", " ", " ", ",", "`", "\t", "\n", "\r", "-", "\u00a0", "\u2028", "é"]
    matches = 0
    for _ in range(300):
        entries = ["".join(rng.choices(letters, k=rng.randint(0, 5))) for _ in range(25)]
        find = compiled(entries)
        for _ in range(10):
            text = "".join(rng.choices(letters, k=rng.randint(0, 14)))
            expected = definition(text, entries)
            assert find(text) == match(text, entries) == expected, (text, entries)
            matches += len(expected)
    assert matches > 3000  # the comparison is not between empty lists


@pytest.mark.parametrize(
    ("text", "entry", "matches"),
    [
        ("a cat.", "cat", True),
        ("a Cat", "cat", False),
        ("cats", "cat", False),
        ("hot-dog", "dog", False),
        ("in the U.S. today", "U.S.", False),  # the caption's dots get spaces around them
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
    assert (0 in match(text, entries)) == (0 in compiled(entries)(text)) == matches


def test_equal_entries_all_match():
    assert compiled(["cat", "dog", "cat"])("cat cat") == [0, 2]


# Metadata


def test_build_entries_words_pairs_numbers():
    texts = ["ice cream , please"] * 20 + ["the ice", "the cream"] * 5 + ["the the", "- & -"] * 40
    entries = build_entries(texts, min_count=20, min_pmi=1.5)
    assert entries[:4] == ["the", "cream", "ice", "please"]
    assert entries[4:6] == ["ice cream", "0"]  # "cream please" is never adjacent: a comma between
    assert entries[-1] == "99" and len(entries) == len(set(entries)) == 105
    # 20 * N / (25 * 25) with N = 60 + 20 + 80 words; a higher minimum drops the pair, not the words
    bits = np.log2(20 * 160 / (25 * 25))
    assert "ice cream" in build_entries(texts, 20, bits - 1e-9)
    assert "ice cream" not in build_entries(texts, 20, bits + 1e-9)


def test_entries_file(tmp_path):
    path = tmp_path / "entries.txt"
    path.write_bytes("\ufeffcat\r\nNew York\n\ncat\ncafé\x0bx\n".encode())
    assert metaclip.read_entries(path) == ["cat", "New York", "café\x0bx"]
    listed = tmp_path / "metadata.json"
    for content, entries in (
        (["b", "a", "b"], ["b", "a"]),
        ({"b": 3, "counts": 1}, ["b", "counts"]),  # entries with their counts, as older versions wrote them
        ({"kept": 1, "counts": {"b": 3, "a": 0}}, ["b", "a"]),
    ):
        listed.write_text(json.dumps(content))
        assert metaclip.read_entries(listed) == entries
    for content in ("[1, 2]", "3", "{", "[]", "[" * 9999):
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
    assert keep_probability([0, 3], counts, t) == 1  # a tail entry keeps all of its captions
    assert keep_probability([0], [0], t) == 1  # counted on another pool: an unseen entry is tail
    assert keep_probability([0, 1], counts, t) < t / 100 + t / 40  # not the demo's sum


def test_tail_never_dropped_and_head_keeps_t_in_expectation():
    captions, entries = pool()
    find, counts, t = compiled(entries), counted(captions, entries), 60
    expected, kept = np.zeros(40), np.zeros(40)
    for i, caption in enumerate(captions):
        probability = keep_probability(find(caption), counts, t)
        expected[find(caption)] += probability
        kept[find(caption)] += uniform(0, i) < probability
    counts = np.array(counts)
    tail, head = counts <= t, counts > t
    assert tail.sum() > 5 and head.sum() > 5
    assert (kept[tail] == counts[tail]).all() and np.allclose(expected[tail], counts[tail])
    assert (expected[head] >= t).all() and (expected[head] < counts[head]).all()
    assert kept[head].sum() / kept.sum() < counts[head].sum() / counts.sum()
    assert abs(kept.sum() - expected.sum()) < 0.05 * expected.sum()


def test_draws_are_uniform_and_depend_on_seed_and_index_only():
    draws = np.array([uniform(3, index) for index in range(20_000)])
    assert 0 <= draws.min() and draws.max() < 1
    assert np.abs(np.histogram(draws, 10)[0] - 2000).max() < 200
    assert draws.tolist() == [uniform(3, index) for index in reversed(range(20_000))][::-1]
    shifted = [uniform(4, index) for index in range(20_000)]
    assert abs(np.corrcoef(draws, shifted)[0, 1]) < 0.03
    assert uniform(0, 0) == 0.08234954794796834  # printf 0/0/0 | b2sum -l 64


# Files


def test_all_formats_give_the_same_captions(tmp_path):
    captions = ["a cat, and", 'say "hi" now', "", "é 東京", " two  spaces ", '"cat" is quoted']
    (tmp_path / "c.txt").write_text("".join(c + "\r\n" for c in captions), newline="")
    with open(tmp_path / "c.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "caption"], *([i, c] for i, c in enumerate(captions))])
    write_tsv(tmp_path / "c.tsv", captions)
    lines = [json.dumps({"caption": c}) for c in captions]
    (tmp_path / "c.jsonl").write_text("\ufeff" + "\n".join(lines))  # no newline at the end
    for kind in ("txt", "csv", "tsv", "jsonl"):
        assert captions_of(tmp_path / f"c.{kind}") == captions, kind


def test_json_lines_of_several_captions_are_one_record_each(tmp_path, capsys):
    """Every text counts, and no entry matches across two of them."""
    path = tmp_path / "c.jsonl"
    records = [
        {"image": "0.png", "captions": ["a red dog", "house at night", "a dog"]},
        {"image": "1.png", "caption": "one cat"},
        {"image": "2.png", "captions": ["grass"]},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    find = compiled(["dog", "house", "dog house", "cat", "grass", "night a"])
    assert [find(text) for text in captions_of(path)] == [[0, 1], [3], [4]]
    assert all(word.isalnum() or " " in word for word in build_entries(captions_of(path), 1, 0.0))
    (tmp_path / "e.txt").write_text("dog\ncat")
    out = tmp_path / "kept.jsonl"
    assert run(capsys, path, "--entries", tmp_path / "e.txt", "--t", 5, "--out", out)[0] == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == records[:2]


CAPTIONS = [
    '"Best dog ever',
    "a cat",
    '5" red nail',
    '"the dog" of it',
    'a "cat", and a dog',
    '"cat"',
    "one, two; three | cat",
    "cat\nand dog",
    "tab\tdog",
    'all: "a\tb",\n"c"\rcat',
    "é 東京 dog\u2028cat",
    "  cat  ",
    "no animal",
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "plain.tsv", "tabs.csv", "flickr.csv"])
def test_the_list_readers_read_the_kept_rows_back(tmp_path, capsys, kind):
    """Whatever the captions contain; run on its own result, the program keeps the same."""
    for i in range(len(CAPTIONS)):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    path, captions = tmp_path / f"data.{kind}", CAPTIONS
    rows = [[f"{i}.png", caption, "train"] for i, caption in enumerate(captions)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        if kind == "jsonl":
            file.writelines(json.dumps({"image": a, "caption": b, "split": c}) + "\n" for a, b, c in rows)
        elif kind == "plain.tsv":  # quotes are plain characters
            captions = [" ".join(caption.split()) for caption in captions]
            file.write("filepath\tcaption\n" + "".join(f"{i}.png\t{c}\n" for i, c in enumerate(captions)))
        elif kind == "flickr.csv":
            csv.writer(file).writerows([row[:2] for row in rows])
        else:
            table = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            table.writerows([["image", "caption", "split"], *rows])
    (tmp_path / "e.txt").write_text("cat\ndog\nred")
    for out in (tmp_path / f"kept.{kind}", tmp_path / f"again.{kind}"):
        assert run(capsys, path, "--entries", tmp_path / "e.txt", "--t", 99, "--out", out)[0] == 0
        dataset, path = data.open_dataset(out), out
        expected = {
            f"{i}.png": [c.strip()] for i, c in enumerate(captions) if match(c, ["cat", "dog", "red"])
        }
        assert len(expected) > 6
        assert {Path(dataset.name(i)).name: dataset.captions[i] for i in range(len(dataset))} == expected


def test_quotes_of_a_tsv_beside_real_images(tmp_path, capsys, shared):
    case = shared / "cases" / "15-metaclip"
    if not case.is_dir():
        pytest.skip("this case is only beside the development checkout")
    (tmp_path / "e.txt").write_text("dog\ncat\nof")
    out = tmp_path / "kept.tsv"
    assert run(capsys, case / "quote.tsv", "--entries", tmp_path / "e.txt", "--t", 9, "--out", out)[0] == 0
    dataset = data.open_dataset(out, image_root=case)
    assert dataset.captions == [['"Best dog ever'], ["a cat"], ['"the dog" of it'], ["cat"]]


@pytest.mark.parametrize("kind", ["txt", "tsv", "csv", "jsonl"])
def test_a_blank_line_is_an_empty_caption(tmp_path, kind):
    path = tmp_path / f"c.{kind}"
    header = {"tsv": "url\tcaption\n", "csv": "url,caption\n"}.get(kind, "")
    path.write_text(header + "\n  \n")
    assert [text.strip() for text in captions_of(path)] == ["", ""]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.txt", b"cat\n\xff\xfe cat\n", "utf-8"),
        ("c.tsv", b"u\tcaption\nu\tcaf\xe9\n", "utf-8"),
        ("c.jsonl", b'{"caption": "cat"}\n{\n', "after record 1"),
        ("c.jsonl", b"[1]\n", "after record 0"),
        ("c.jsonl", b'{"caption": 3}\n', "after record 0"),
        ("c.jsonl", b'{"captions": [3]}\n', "after record 0"),
        ("c.jsonl", b"[" * 9999 + b"\n", "after record 0"),
        ("c.csv", b'caption,id\ncat,1\n"open\n' + b"cat,1\n" * 40_000, "field larger than field limit"),
        ("c.tsv.gz", b"\x1f\x8b\x08\x00", "decompress"),
    ],
)
def test_a_record_that_cannot_be_read_is_one_line(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    (tmp_path / "e.txt").write_text("cat\n")
    out = tmp_path / "kept"
    status, _, err = run(capsys, path, "--entries", tmp_path / "e.txt", "--t", 5000, "--out", out)
    assert status == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not out.exists()


# The command line


def arguments(tmp_path, **more):
    captions, entries = pool(500)
    write_tsv(tmp_path / "c.tsv", captions)
    (tmp_path / "e.txt").write_text("\n".join(entries))
    options = {"entries": tmp_path / "e.txt", "t": 20, "out": tmp_path / "kept.tsv"} | more
    flags = ((f"--{k.replace('_', '-')}", v) for k, v in options.items() if v is not None)
    return [tmp_path / "c.tsv", *(x for flag in flags for x in flag)]


def test_command_line_end_to_end_and_determinism(tmp_path, capsys):
    status, table, err = run(capsys, *arguments(tmp_path, seed=5))
    assert status == 0 and "captions" in err and "/s" in err and "in the head" in table
    captions, entries = pool(500)
    find, counts = compiled(entries), counted(captions, entries)
    kept = [i for i, c in enumerate(captions) if uniform(5, i) < keep_probability(find(c), counts, 20)]
    assert 0 < len(kept) < 500
    first = (tmp_path / "kept.tsv").read_bytes()
    assert first.decode() == "url\tcaption\n" + "".join(f"u{i}\t{captions[i]}\n" for i in kept)
    content = json.loads((tmp_path / "kept.tsv.json").read_text())
    assert content["counts"] == dict(zip(entries, counts)) and content["kept"] == len(kept)
    assert content["in the head"] == sum(n > 20 for n in counts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.tsv", "e.txt", "kept.tsv", "kept.tsv.json"]
    assert run(capsys, *arguments(tmp_path, seed=5, out=tmp_path / "again"))[1] == table
    assert (tmp_path / "again").read_bytes() == first
    run(capsys, *arguments(tmp_path, seed=1, out=tmp_path / "other"))
    assert (tmp_path / "other").read_bytes() != first


def test_built_entries(tmp_path, capsys):
    assert run(capsys, *arguments(tmp_path, entries=None, build_entries=3))[0] == 0
    built = json.loads((tmp_path / "kept.tsv.json").read_text())["counts"]
    assert "word0" in built and built["99"] == 0
    counted = tmp_path / "kept.tsv.json"  # its entries serve the next run
    assert run(capsys, *arguments(tmp_path, entries=counted, out=tmp_path / "again.tsv"))[0] == 0
    assert (tmp_path / "again.tsv").read_bytes() == (tmp_path / "kept.tsv").read_bytes()


def test_an_existing_file_stays_as_it_is(tmp_path, capsys):
    out, side = tmp_path / "kept.tsv", tmp_path / "kept.tsv.json"

    def refused():
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        status, _, err = run(capsys, *arguments(tmp_path))
        assert status == 2 and "kept.tsv" in err and err.count("\n") == 1
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    arguments(tmp_path)
    out.write_text("a diary")
    refused()
    out.rename(side)
    refused()
    side.unlink()
    side.symlink_to(tmp_path / "nowhere")
    status, _, err = run(capsys, *arguments(tmp_path))
    assert status == 2 and "kept.tsv.json exists" in err
    corpus = (tmp_path / "c.tsv").read_bytes()
    assert run(capsys, *arguments(tmp_path, out=tmp_path / "c.tsv"))[0] == 2
    assert (tmp_path / "c.tsv").read_bytes() == corpus


def test_user_mistakes_are_one_line_and_exit_two(tmp_path, capsys):
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "other.txt").write_text("zebra\n")
    mistakes = [
        ({"entries": tmp_path / "none.txt"}, "none.txt: expected entries"),
        ({"entries": tmp_path / "missing.txt"}, "missing.txt"),
        ({"entries": tmp_path / "other.txt"}, "no entry of 1 occurs in any of 500"),
        ({"entries": None}, "either --entries"),
        ({"build_entries": 3}, "either --entries"),
        ({"entries": None, "build_entries": -1}, "either --entries"),
        ({"column": "text"}, "no 'text' in ['url', 'caption']"),
        ({"out": tmp_path / "e.txt" / "kept.tsv"}, "cannot write in"),
        ({"out": tmp_path}, "exists"),
        ({"t": -1}, "above 0"),
        ({"t": "nan"}, "above 0"),
    ]
    for change, words in mistakes:
        status, out, err = run(capsys, *arguments(tmp_path, **change))
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and not out and len(errors) == 1 and words in errors[0], (change, err)
    args = arguments(tmp_path)
    for content, words in ((b"", "no 'caption' in []"), (b"url\tcaption\n", "in any of 0 captions")):
        (tmp_path / "c.tsv").write_bytes(content)
        status, out, err = run(capsys, *args)
        assert status == 2 and words in err, err
    assert not [p for p in tmp_path.iterdir() if "kept" in p.name]
    with pytest.raises(SystemExit):
        metaclip.main([*map(str, args), "--unknown"])


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError("disk full")])
def test_interruption_leaves_no_half_output(tmp_path, capsys, monkeypatch, reason):
    args = arguments(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 300:
            raise reason
        return uniform(*args)

    monkeypatch.setattr(metaclip, "uniform", stop)
    status, _, err = run(capsys, *args)
    assert status == (130 if reason is KeyboardInterrupt else 2)
    assert err.strip().splitlines()[-1].startswith(("stopped", "error: "))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
