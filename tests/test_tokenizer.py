"""tokenizer.py against OpenAI's recorded ids, a naive BPE, and hostile strings and files.

OpenAI's vocabulary is not in this repository: the tests that need it use the one beside the
checkout or an installed copy, and skip without. All others learn their merges from a few captions.
"""

import gzip
import importlib.util
import json
import pickle
import random
import re
import sys
import tracemalloc
import urllib.error
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED

import tokenizer
from tokenizer import END, SPECIAL, START, Tokenizer, byte_ids, clean, split, strip_specials

CAPTIONS = [
    "A photo of a cat on a red sofa.",
    "a photo of two cats; they're asleep",
    "The dog's ball, thrown 12 times!",
    "a drawing of a dog in the wild",
    "Photograph: a lighthouse at sunset",
    "Ein Café in Zürich, 猫咖啡",
]
SMALL = json.loads((ROOT / "tests" / "golden" / "tokenizer_small.json").read_text())["cases"]


FIND_SPEC = importlib.util.find_spec


@pytest.fixture(scope="module")
def learned():
    return Tokenizer.learn(CAPTIONS, 600)


@pytest.fixture(scope="module")
def openai_path():
    name = f"data/tokenizer_prompts/{tokenizer.OPENAI_FILE}"
    if SHARED and (SHARED / name).is_file():
        return SHARED / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer.download, "download", no_network)
        try:
            return tokenizer.find_openai()
        except OSError:
            pytest.skip("OpenAI's vocabulary is not on this machine")


def no_network(*args, **options):
    raise urllib.error.URLError("no route to host")


@pytest.fixture(scope="module")
def openai(openai_path):
    return Tokenizer.from_openai(openai_path)


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """No vocabulary anywhere, and the network is down."""
    monkeypatch.delenv("ALIGNCLIP_VOCAB", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("urllib.request.OpenerDirector.open", no_network)
    return tmp_path / ".cache" / "clip" / tokenizer.OPENAI_FILE


@pytest.mark.parametrize("case", SMALL, ids=lambda case: ascii(case["text"][:20]))
def test_ids_are_openais(openai, case):
    assert openai.encode(case["text"]) == case["ids"]
    assert openai.decode(case["ids"]) == case["decode"]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: ascii(case["text"][:20]))
def test_words_are_openais(learned, case):
    """Decoding shows cleaning and splitting, whatever the merges: no vocabulary needed."""
    assert learned.decode(learned.encode(case["text"])) == case["decode"]


def test_all_recorded_strings(openai, golden):
    recorded = json.loads(golden("tokenizer_strings.json").read_text())
    padded = np.load(golden("tokenizer_padded.npz"))
    assert [openai.encode(text) for text in recorded["strings"]] == recorded["ids"]
    for length in (77, 16):
        rows = openai(recorded["strings"], context_length=length)
        assert rows.dtype == torch.long
        assert np.array_equal(rows.numpy(), padded[f"out.tokenize_{length}_truncate"])
    for text, too_long in zip(recorded["strings"], padded["out.tokenize_raises_without_truncate"]):
        if too_long:
            with pytest.raises(ValueError, match="context 77"):
                openai(text, strict=True)
    assert (openai.start, openai.end, openai.vocab_size) == (49406, 49407, 49408)


def test_recorded_prompts(openai, shared):
    lines = (shared / "data/tokenizer_prompts/tokenizer_golden.jsonl").read_text().splitlines()
    for case in map(json.loads, lines):
        assert [openai.start, *openai.encode(case["text"]), openai.end] == case["ids"]


def test_llip_differs_only_in_the_names_of_the_specials(openai, golden):
    recorded = json.loads(golden("tokenizer_llip.json").read_text())
    differ = [
        text for text, row in zip(recorded["strings"], recorded["tokens"]) if openai(text)[0].tolist() != row
    ]
    names = re.compile(r"<\|(start|end)oftext\|>|<(start|end)_of_text>", re.IGNORECASE)
    assert len(differ) == 11
    assert all(names.search(text) for text in differ)


def test_padding_is_zero_and_zero_is_an_exclamation_mark(openai, learned):
    for t in (openai, learned):
        assert t("")[0].tolist() == [t.start, t.end] + [0] * 75
        assert t.decode([0, 0, 256]) == "!!! "
    assert openai("a photo of a cat")[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]


def test_cleaning():
    assert clean("\u3000 Two\r\n\tWORDS \n") == "two words"
    assert clean("&amp;amp;amp;amp;") == "&"  # ftfy unescapes all levels,
    assert clean("<b> &amp;lt;") == "<b> <"  # but none beside a "<": there it is exactly two
    assert clean("<b> &amp;amp;lt;") == "<b> &lt;"


def test_ignorecase_matters_for_the_long_s():
    assert split("it'ſ") == ["it", "'ſ"]


def naive_merge(ids, pair, new):
    result, i = [], 0
    while i < len(ids):
        hit = tuple(ids[i : i + 2]) == pair
        result.append(new if hit else ids[i])
        i += 2 if hit else 1
    return result


def naive_learn(texts, vocab_size):
    """Sennrich et al. 2016, Algorithm 1 as printed: every pair counted anew for every merge."""
    words = [byte_ids(word) for text in texts for word in split(clean(text))]
    merges = []
    while len(merges) < vocab_size - 514:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [naive_merge(word, best, 512 + len(merges)) for word in words]
        merges.append(best)
    return merges, words


def naive_bpe(merges, word):
    ids = byte_ids(word)
    while True:
        known = [merges[pair] for pair in zip(ids, ids[1:]) if pair in merges]
        if not known:
            return ids
        new = min(known)
        ids = naive_merge(ids, next(pair for pair in merges if merges[pair] == new), new)


def random_texts(seed, alphabet, texts=5, words=8, letters=12):
    rng = random.Random(seed)
    return [
        " ".join(
            "".join(rng.choices(alphabet, k=rng.randint(1, letters))) for _ in range(rng.randint(1, words))
        )
        for _ in range(texts)
    ]


def test_worked_example_of_wikipedia():
    """aaabdaaabac: Z = aa (4 times), Y = ab (2, lower ids than Za), X = ZY, and XdXac is left."""
    learned = Tokenizer.learn(["aaabdaaabac"], 514 + 3)
    a, b, c, d = (ord(letter) - ord("!") for letter in "abcd")
    z, y, x = 512, 513, 514
    assert learned.merges == {(a, a): z, (a, b): y, (z, y): x}
    assert learned.encode("aaabdaaabac") == [x, d, x, a, 256 + c]
    assert (learned.start, learned.end, learned.vocab_size) == (515, 516, 517)


@pytest.mark.parametrize("alphabet", ["a", "ab", "abc", "ab!", "aé猫1", "abcdefgh"])
@pytest.mark.parametrize("seed", range(8))
def test_learning_equals_counting_everything_again(alphabet, seed, tmp_path):
    texts = random_texts(seed, alphabet)
    size = 514 + 5 * seed
    merges, words = naive_learn(texts, size)
    learned = Tokenizer.learn(texts, size)
    assert list(learned.merges) == merges
    assert list(learned.merges.values()) == list(range(512, 512 + len(merges)))
    # and encoding repeats what learning did to each word
    assert [i for text in texts for i in learned.encode(text)] == [i for w in words for i in w]
    learned.save(tmp_path / "t.txt")  # would refuse two merges of one spelling
    assert list(Tokenizer.load(tmp_path / "t.txt").merges) == merges


def test_learning_equals_counting_everything_again_on_captions(learned):
    assert list(learned.merges) == naive_learn(CAPTIONS, 600)[0]


@pytest.mark.parametrize("alphabet", ["a", "ab", "abc", "aothe"])
def test_merging_by_queue_equals_searching_every_time(alphabet):
    learned = Tokenizer.learn(random_texts(0, alphabet, texts=30), 514 + 40)
    for word in " ".join(random_texts(1, alphabet, texts=20, letters=40)).split():
        steps = []
        assert learned.bpe(word, steps) == naive_bpe(learned.merges, word)
        ranks = [new for _, _, new in steps]
        assert ranks == sorted(ranks)
        assert all(learned.merges[left, right] == new for left, right, new in steps)
        assert len(steps) == len(byte_ids(word)) - len(learned.bpe(word))


def test_openais_merges_by_queue_equal_searching_every_time(openai):
    for word in ["lighthouses", "antidisestablishmentarianism", "aaaaaaaaaaaaaaa", "café", "!!!!!"]:
        assert openai.bpe(word) == naive_bpe(openai.merges, word)


def test_a_word_of_200_000_letters(learned, monkeypatch):
    """The queue gives out a pair at most once per start and per new neighbour: linear in the letters."""
    word = "".join(random.Random(0).choices(["photo", "cat", "dog", "x"], k=100_000))[:200_000]
    pops = []
    pop = tokenizer.heapq.heappop
    monkeypatch.setattr(tokenizer.heapq, "heappop", lambda queue: pops.append(0) or pop(queue))
    ids = learned.bpe(word)
    assert b"".join(learned.pieces[i] for i in ids) == word.encode() + b"</w>"
    assert len(ids) < 150_000
    assert len(pops) < 3 * len(word)
    assert learned.bpe(word[:1000]) == naive_bpe(learned.merges, word[:1000])


def test_learning_does_not_depend_on_the_order_of_the_captions():
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert Tokenizer.learn(shuffled, 580).merges == Tokenizer.learn(iter(CAPTIONS), 580).merges


def test_learning_stops_when_every_word_is_one_piece():
    learned = Tokenizer.learn(["tea tea"], 5000)
    assert learned.vocab_size == 516
    assert learned.encode("tea") == [513]


def test_learning_takes_no_pieces_from_specials_and_one_text_is_a_corpus():
    assert Tokenizer.learn([f"{START} {END}"], 600).vocab_size == 514
    assert Tokenizer.learn("tea", 600).merges == Tokenizer.learn(["tea"], 600).merges


def test_learning_refuses_a_vocabulary_without_its_bytes():
    with pytest.raises(ValueError, match="513.*514"):
        Tokenizer.learn(CAPTIONS, 513)


def test_round_trip(learned):
    for text in CAPTIONS + ["中文字 emoji 😀 naïve", "tabs\tand\nlines", "x" * 500]:
        words = split(clean(text))
        assert learned.decode(learned.encode(text)) == "".join(word + " " for word in words)


def test_truncation_keeps_the_end_token(learned):
    ids = learned.encode(CAPTIONS[0])
    fits = len(ids) + 2
    for length in (2, 5, fits - 1, fits, fits + 3):
        row = learned(CAPTIONS[0], context_length=length)[0].tolist()
        expected = [learned.start, *ids[: length - 2], learned.end]
        assert row == expected + [0] * (length - len(expected))
        assert row[row.index(max(row))] == learned.end


def test_strict_names_the_text_and_both_lengths(learned):
    length = len(learned.encode(CAPTIONS[0])) + 2
    learned(CAPTIONS[0], context_length=length, strict=True)
    message = rf"{length} tokens exceed context {length - 1}: 'A photo of a cat"
    with pytest.raises(ValueError, match=message):
        learned(["a", CAPTIONS[0]], context_length=length - 1, strict=True)


def test_one_text_many_texts_and_none(learned):
    assert torch.equal(learned(CAPTIONS)[1:2], learned(CAPTIONS[1]))
    assert torch.equal(learned(tuple(CAPTIONS)), learned(CAPTIONS))
    assert learned([]).shape == (0, 77)
    assert learned([]).dtype == torch.long


@pytest.mark.parametrize("wrong", [None, float("nan"), b"a dog", 3])
def test_a_caption_that_is_no_text_is_named(learned, wrong):
    with pytest.raises(ValueError, match="text 1 is .*not str"):
        learned(["a", wrong])


def test_numbers_that_make_no_sense(learned):
    with pytest.raises(ValueError, match="context_length 1"):
        learned("a", context_length=1)
    for wrong in (-1, learned.vocab_size):
        with pytest.raises(ValueError, match=f"id {wrong} .*{learned.vocab_size}"):
            learned.decode([0, wrong])


def test_decode_takes_a_row_and_survives_broken_utf8(learned):
    row = learned("a cat")[0]
    assert learned.decode(row[:5]).startswith(START + "a ")
    assert learned.decode([byte_ids("é")[0]]) == "\ufffd"


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch):
    fresh = Tokenizer.learn(CAPTIONS, 600)
    before = [fresh.encode(text) for text in CAPTIONS]
    assert [fresh.encode(text) for text in CAPTIONS] == before
    fresh.encode("x" * (tokenizer.CACHED_LENGTH + 1))
    assert max(map(len, fresh.cache)) <= tokenizer.CACHED_LENGTH
    monkeypatch.setattr(tokenizer, "CACHED_WORDS", 5)
    small = Tokenizer.learn(CAPTIONS, 600)
    assert [small.encode(text) for text in CAPTIONS] == before
    assert len(small.cache) == 5


def test_typed_specials_become_specials_as_in_openais(learned):
    assert learned.encode("<|startoftext|><|EndOfText|>") == [learned.start, learned.end]
    assert learned.encode("&lt;|endoftext|&gt;") == [learned.end]
    assert learned.end == learned.vocab_size - 1
    assert learned.start == learned.vocab_size - 2
    assert learned.end not in learned.encode("!<|endoftext|>")  # punctuation takes "!<|" together


@pytest.mark.parametrize(
    "text",
    [
        "a <|endoftext|> b",
        "<|STARTOFTEXT|>a",
        "<|endof<|endoftext|>text|>",
        "<|start<|endoftext|>oftext|>",
        "&lt;|endoftext|&gt;",
        "&amp;lt;|endoftext|&amp;gt;",
        "<&#124;endoftext&#x7c;>",
        "＜｜ｅｎｄｏｆｔｅｘｔ｜＞",
        "<|endof\x00text|>",
        # taking out the first gives a text that a second cleaning unescapes further
        "<|endoftext|> &amp;amp;amp;lt;|endoftext|&amp;amp;amp;gt;",
    ],
)
def test_strip_specials_leaves_none(learned, text):
    specials = {learned.start, learned.end}
    assert specials & set(learned.encode(text))
    assert not specials & set(learned.encode(strip_specials(text)))


def test_strip_specials_leaves_none_in_random_mixtures(learned):
    parts = "<| endof text |> <|endoftext|> <|STARTOFTEXT|> &lt; &gt; &amp; amp; lt; gt; ＜ ｜ ſ"
    parts = [*parts.split(), "&#124;", "start", "<", ">", "|", "é", "Ã©", "\x00", " ", "A"]
    specials, rng, hits = {learned.start, learned.end}, random.Random(0), 0
    for _ in range(1500):
        text = "".join(rng.choices(parts, k=rng.randint(1, 12)))
        hits += bool(specials & set(learned.encode(text)))
        assert not specials & set(learned.encode(strip_specials(text)))
    assert hits > 150


def test_strip_specials_changes_nothing_else():
    assert strip_specials("A <|endoftext|> B") == "a   b"
    for text in [*CAPTIONS, "<|endoftext", "a | b & c", "AT&amp;T", " Two  spaces "]:
        assert strip_specials(text) == text


def test_ascii_without_bar_and_ampersand_cannot_become_a_special():
    rng = random.Random(0)
    alphabet = [chr(i) for i in range(128) if chr(i) not in "&|"]
    for _ in range(2000):
        text = "".join(rng.choices([*alphabet, "<", ">", "endoftext", "startoftext"], k=12))
        assert not re.search(SPECIAL, clean(text))


def test_save_load_and_pickle(learned, tmp_path):
    path = tmp_path / "merges.txt"
    learned.save(path)
    assert path.read_text(encoding="utf-8").startswith("#alignclip-bpe version 1, 86 merges\n")
    for copy in (Tokenizer.load(path), Tokenizer.load(str(path)), pickle.loads(pickle.dumps(learned))):
        assert copy.merges == learned.merges
        assert copy.pieces == learned.pieces
        assert torch.equal(copy(CAPTIONS), learned(CAPTIONS))
    assert [p.name for p in tmp_path.iterdir()] == ["merges.txt"]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # a Windows checkout
    assert Tokenizer.load(path).merges == learned.merges


def test_save_and_load_without_merges(tmp_path):
    Tokenizer([]).save(tmp_path / "t")
    assert Tokenizer.load(tmp_path / "t").vocab_size == 514


HEAD = b"#alignclip-bpe version 1, 2 merges\n"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a saved tokenizer"),
        (b"\xff\xfe\x00", "not a saved tokenizer"),
        (b"a b\n" * 3, "not a saved tokenizer"),
        (HEAD.replace(b"1,", b"2,") + b"a b\nab c\n", "not a saved tokenizer.*version 2"),
        (HEAD + b"a b\n", "cut short.*2 merges"),
        (HEAD + b"a b\nab c", "cut short"),
        (HEAD + b"a b\nab c\nabc", "cut short"),
        (HEAD + b"a b\nabc d\n", "line 3.*'abc d'"),
        (HEAD + b"a b\na b\n", "line 3"),
        (HEAD + b"a b\nab\n", "line 3"),
        (HEAD + b"a b\nab c d\n", "line 3"),
        (HEAD + b"a b\n\n", "line 3"),
        (HEAD + b"a  b\nab c\n", "line 2"),
        (b"x" * (2**24 + 1), "not a saved tokenizer"),
    ],
)
def test_load_refuses_a_wrong_file_in_one_line(tmp_path, data, message):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_from_openai_reads_gzip_plain_text_and_the_used_part(openai, openai_path, tmp_path):
    plain = gzip.decompress(Path(openai_path).read_bytes())
    used = b"\n".join(plain.split(b"\n")[: tokenizer.OPENAI_MERGES + 1]) + b"\n"
    for data in (plain, used, gzip.compress(used), used.replace(b"\n", b"\r\n")):
        (tmp_path / "vocab").write_bytes(data)
        assert Tokenizer.from_openai(tmp_path / "vocab").merges == openai.merges
    for data in (used.replace(b"\nt h\n", b"\nh t\n"), used[:-100], plain[:-1][::-1]):
        (tmp_path / "vocab").write_bytes(data)
        with pytest.raises(ValueError, match="vocab: not OpenAI's"):
            Tokenizer.from_openai(tmp_path / "vocab")


def test_a_gzip_bomb_does_not_unfold(tmp_path):
    (tmp_path / "vocab.gz").write_bytes(gzip.compress(bytes(2**27), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(ValueError, match="not OpenAI's"):
        Tokenizer.from_openai(tmp_path / "vocab.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


@pytest.mark.parametrize("data", [b"", b"a b\n" * 50000, b"\x1f\x8b\x08broken", b"\xff" * 99])
def test_from_openai_refuses_a_wrong_file_in_one_line(tmp_path, data):
    path = tmp_path / "vocab.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="vocab.gz") as error:
        Tokenizer.from_openai(path)
    assert "\n" not in str(error.value)


def test_search_order(bare_machine, monkeypatch, tmp_path):
    with pytest.raises(OSError):
        tokenizer.find_openai()
    monkeypatch.setattr("importlib.util.find_spec", FIND_SPEC)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    package = tmp_path / "packages" / "open_clip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / tokenizer.OPENAI_FILE).touch()
    monkeypatch.syspath_prepend(package.parent)
    assert tokenizer.find_openai() == package / tokenizer.OPENAI_FILE  # found, not imported
    bare_machine.parent.mkdir(parents=True, exist_ok=True)
    bare_machine.touch()
    assert tokenizer.find_openai() == bare_machine
    monkeypatch.setenv("ALIGNCLIP_VOCAB", "/somewhere/else.txt")
    assert tokenizer.find_openai() == Path("/somewhere/else.txt")


def test_offline_and_none_found_names_the_ways(bare_machine):
    with pytest.raises(OSError, match="no route to host") as error:
        Tokenizer.from_openai()
    for way in ("give its path", "$ALIGNCLIP_VOCAB", str(bare_machine), "open_clip_torch", "https:"):
        assert way in str(error.value)
    assert "\n" not in str(error.value)


class Answer(BytesIO):
    """A server's answer without headers."""

    status, headers = 200, {}


def test_a_wrong_download_is_not_kept(bare_machine, monkeypatch):
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *args, **options: Answer(b"<html>"))
    with pytest.raises(OSError, match="6 bytes with sha256"):
        Tokenizer.from_openai()
    assert not bare_machine.exists()


def test_download_is_verified_and_cached(bare_machine, monkeypatch, openai, openai_path):
    data = Path(openai_path).read_bytes()
    if data[:2] != b"\x1f\x8b" or len(data) != 1_356_917:
        pytest.skip("the copy on this machine is not the original .gz")
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *args, **options: Answer(data))
    assert Tokenizer.from_openai().merges == openai.merges
    assert [p.name for p in bare_machine.parent.iterdir()] == [bare_machine.name]
    monkeypatch.setattr("urllib.request.OpenerDirector.open", None)  # a second time needs no network
    assert Tokenizer.from_openai().vocab_size == 49408
    bare_machine.write_bytes(data[:1000])  # damaged since
    with pytest.raises(ValueError, match="not OpenAI's.*replace it"):
        Tokenizer.from_openai()


def test_command_line_shows_each_step(tmp_path, capsys, learned):
    learned.save(tmp_path / "saved.txt")
    assert tokenizer.main(["A cat&amp;dog", "--vocab", str(tmp_path / "saved.txt")]) == 0
    first = capsys.readouterr().out
    assert "'a cat&dog'" in first
    assert "bytes 63 61 74" in first
    assert "rank     1  'c' + 'a' -> 'ca'\n" in first
    assert f"ids {learned.encode('cat')}\n" in first
    assert str(learned("A cat&dog")[0].tolist()) in first


@pytest.mark.parametrize("option", [[], ["--vocab", "/no/such/file"], ["--vocab", __file__]])
def test_command_line_without_vocabulary_says_so_in_one_line(bare_machine, capsys, option):
    assert tokenizer.main(["a cat", *option]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_command_line_refuses_wrong_flags(capsys):
    with pytest.raises(SystemExit) as error:
        tokenizer.main(["a cat", "--nope"])
    assert error.value.code == 2
