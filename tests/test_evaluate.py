"""Retrieval, ranking and classification: hand-written matrices, loops in float64, streams against whole
matrices, CLIP and Llip through the same lines, two ranks against one, and the command line."""

import itertools
import json
import math
import multiprocessing
import os
import traceback
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import evaluate
import pretrained
from baselines import coop
from clipood import Classes
from llip import Llip, PooledTokens
from model import CLIP, Config
from readers import scenes
from readers import templates as prompts
from scale import llip_tiles
from tokenizer import Tokenizer
from util import files, metrics, report, text

NAN, INF = math.nan, math.inf

# Whole matrices --------------------------------------------------------------------------------------


def loop_recall(scores, owner, ks):
    """Recall@k by definition, with a loop: the right answer must beat all but k - 1 others strictly."""
    images, texts = len(scores), len(scores[0])
    i2t, t2i = [], []
    for i in range(images):
        best = max(scores[i][j] for j in range(texts) if owner[j] == i)
        i2t.append(sum(scores[i][j] >= best for j in range(texts) if owner[j] != i))
    for j in range(texts):
        own = scores[owner[j]][j]
        t2i.append(sum(scores[i][j] >= own for i in range(images) if i != owner[j]))
    named = {"i2t": i2t, "t2i": t2i}
    return {f"{n}@{k}": sum(p < k for p in v) / len(v) for n, v in named.items() for k in ks}


def loop_precision(scores, relevant):
    """Average precision of one row; of equal scores the irrelevant come first."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], relevant[j]))
    hits, total = 0, 0.0
    for rank, j in enumerate(order, 1):
        hits += relevant[j]
        total += relevant[j] * hits / rank
    return total / hits


def random_case(seed, images=9, levels=6):
    """Scores with many ties, one to four captions an image."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 5, (images,), generator=g)
    owner = torch.arange(images).repeat_interleave(counts)
    return torch.randint(0, levels, (images, len(owner)), generator=g).double(), owner


def test_recall_equals_clip_benchmark(golden_arrays):
    g = golden_arrays("clip_benchmark_retrieval.npz")
    scores = g["in.text_emb"] @ g["in.image_emb"].t()
    torch.testing.assert_close(scores, g["out.scores"], rtol=0, atol=1e-6)
    got = metrics.recall_at_k(g["out.scores"].t(), g["in.text_to_image"], ks=(1, 2, 5, 10))
    for k in (1, 2, 5, 10):
        assert got[f"i2t@{k}"] == pytest.approx(g[f"out.text_retrieval_recall@{k}"].item(), abs=1e-6)
        assert got[f"t2i@{k}"] == pytest.approx(g[f"out.image_retrieval_recall@{k}"].item(), abs=1e-6)


def test_classification_equals_clip_benchmark(golden_arrays):
    g = golden_arrays("clip_benchmark_classification.npz")
    got = metrics.classification_metrics(g["in.logits"], g["in.target"])
    theirs = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}
    for ours, name in theirs.items():
        assert got[ours] == pytest.approx(g[f"out.{name}"].item(), abs=1e-6)
    ap = metrics.average_precision(g["in.logits"].t(), g["in.multilabel"].t() > 0)
    assert torch.allclose(ap.float(), g["out.average_precision_per_class"], atol=1e-6)
    assert ap.mean().item() == pytest.approx(g["out.mean_average_precision"].item(), abs=1e-6)


# two captions an image; in row 2 a stranger ties with the best own caption, in column 3 and 6 an image does
BY_HAND = torch.tensor(
    [
        [9.0, 1, 2, 5, 0, 0, 3, 0],  # own 0 and 1: 9 is the best of the row, place 0
        [1.0, 2, 3, 5, 4, 6, 0, 0],  # own 2 and 3: 5 is beaten by 6, place 1
        [0.0, 7, 7, 0, 7, 1, 0, 0],  # own 4 and 5: 7 ties with two, place 2
        [1.0, 1, 1, 1, 1, 1, 3, 1],  # own 6 and 7: 3, place 0
    ]
)


def test_recall_by_hand_with_ties():
    owner = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    got = metrics.recall_at_k(BY_HAND, owner, ks=(1, 2, 3))
    assert [got[f"i2t@{k}"] for k in (1, 2, 3)] == [2 / 4, 3 / 4, 1]
    # captions 0..7: places 0; 3 (1 ties with image 3, below 2 and 7); 1; 1 (tie); 0; 2 (1 ties); 1 (tie); 0
    assert [got[f"t2i@{k}"] for k in (1, 2, 3)] == [3 / 8, 6 / 8, 7 / 8]
    assert got == loop_recall(BY_HAND.tolist(), owner.tolist(), (1, 2, 3))


@pytest.mark.parametrize("seed", range(5))
def test_recall_equals_the_loop_in_any_order_of_captions(seed):
    scores, owner = random_case(seed)
    shuffle = torch.randperm(len(owner), generator=torch.Generator().manual_seed(seed))
    scores, owner = scores[:, shuffle], owner[shuffle]
    expected = loop_recall(scores.tolist(), owner.tolist(), (1, 3, 5))
    assert metrics.recall_at_k(scores, owner, (1, 3, 5)) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, NAN, INF, -INF])
def test_constant_scores_find_nothing(value):
    scores, owner = torch.full((6, 12), value), torch.arange(6).repeat_interleave(2)
    assert set(metrics.recall_at_k(scores, owner, (1, 5)).values()) == {0.0}
    stream = metrics.Recall(6, owner, torch.arange(12), (1, 5), "cpu")
    stream.add(0, scores)
    assert set(stream.metrics().values()) == {0.0}
    # a classifier's tie goes to the lower class, as argmax: a constant one finds class 0 and no other
    top = metrics.classification_metrics(scores, torch.arange(6))
    assert top["top1"] == top["mean_per_class"] == pytest.approx(1 / 6)


def test_one_nan_is_the_lowest_score_and_no_hit():
    scores = torch.eye(6)
    scores[2, 2] = NAN
    got = metrics.recall_at_k(scores, torch.arange(6), (1,))
    assert got == {"i2t@1": pytest.approx(5 / 6), "t2i@1": pytest.approx(5 / 6)}


def test_an_image_without_a_caption_is_a_miss():
    got = metrics.recall_at_k(torch.eye(3)[:, :2], torch.tensor([0, 1]), (1, 5))
    assert got == {"i2t@1": 2 / 3, "i2t@5": 2 / 3, "t2i@1": 1, "t2i@5": 1}


def test_recall_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="4 texts"):
        metrics.recall_at_k(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="one of 2 images for each"):
        metrics.recall_at_k(torch.zeros(2, 2), torch.tensor([0, 2]))


def test_classification_by_hand_with_ties():
    logits = torch.tensor(
        [
            [3.0, 1, 2, 0, 0, 0, 0],  # class 0, first
            [2.0, 2, 1, 0, 0, 0, 0],  # class 1, ties with 0, which comes first: second
            [9.0, 8, 7, 6, 5, 4, 3],  # class 4, fifth
            [9.0, 8, 7, 6, 4, 4, 3],  # class 5, ties with 4: sixth
            [0.0, 5, 0, 0, 0, 0, 0],  # class 1, first; classes 2, 3, 5, 6 have no image
        ]
    )
    got = metrics.classification_metrics(logits, torch.tensor([0, 1, 4, 5, 1]))
    assert got == {"top1": 2 / 5, "top5": 4 / 5, "mean_per_class": pytest.approx((1 + 1 / 2 + 0 + 0) / 4)}


def test_classification_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one of 3 classes"):
        metrics.classification_metrics(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="each of 2 > 0 images"):
        metrics.classification_metrics(torch.zeros(2, 3), torch.tensor([0]))


def test_chance_is_the_mean_over_all_orders():
    orders = list(itertools.permutations(range(6)))
    for right in (1, 2, 5):
        for k in (1, 3, 6, 10):
            hits = sum(min(order[:right]) < k for order in orders) / len(orders)
            assert metrics.chance_of_hit(right, 6, k) == pytest.approx(hits)
        relevant = [j < right for j in range(6)]
        blind = sum(loop_precision(order, relevant) for order in orders) / len(orders)
        got = metrics.chance_of_precision(torch.tensor([right]), 6)
        assert got.item() == pytest.approx(blind)
    assert metrics.chance_of_precision(torch.tensor([1]), 1).item() == 1


# Streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
@pytest.mark.parametrize("seed", range(3))
def test_recall_stream_equals_whole_matrix(seed, batch):
    scores, owner = random_case(seed)
    g = torch.Generator().manual_seed(seed)
    column = torch.randint(0, len(owner) // 2, (len(owner),), generator=g)  # captions of equal words
    column = column.unique(return_inverse=True)[1]
    scores = scores[:, : int(column.max()) + 1]
    scores[1, 0] = NAN
    stream = metrics.Recall(len(scores), owner, column, (1, 2, 5, 20), "cpu")
    for first in range(0, len(scores), batch):
        stream.add(first, scores[first : first + batch])
    whole = metrics.recall_at_k(scores[:, column], owner, (1, 2, 5, 20))
    assert stream.metrics() == pytest.approx(whole)
    assert set(stream.chance()) == set(whole)


@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("images", [7, 25])
def test_relevance_stream_equals_the_loop(images, batch):
    g = torch.Generator().manual_seed(images)
    scores = torch.randint(0, 5, (images, 8), generator=g).double()
    relevant = torch.rand(images, 8, generator=g) < 0.3
    relevant[torch.arange(images), torch.arange(images) % 8] = True
    stream = metrics.Relevance(relevant, "cpu")
    for first in range(0, images, batch):
        stream.add(first, scores[first : first + batch])
    s, r, k = scores.tolist(), relevant.tolist(), min(10, images)
    first, ten = [], []
    for row, true in zip(s, r):
        first.append(true[max(range(8), key=lambda j: (row[j], not true[j]))])
    for j in range(8):
        order = sorted(range(images), key=lambda i: (-s[i][j], r[i][j]))
        ten.append(sum(r[i][j] for i in order[:k]) / k)
    got = stream.metrics()
    expected = sum(map(loop_precision, s, r)) / images
    assert got["i2t_map"] == pytest.approx(expected)
    assert got["i2t_p@1"] == pytest.approx(sum(first) / images)
    assert got[f"t2i_p@{k}"] == pytest.approx(sum(ten) / 8)
    assert set(stream.chance()) == set(got)
    perfect = metrics.Relevance(relevant, "cpu")
    perfect.add(0, relevant.double())
    best = perfect.metrics()
    assert best["i2t_map"] == best["i2t_p@1"] == 1
    assert best[f"t2i_p@{k}"] == pytest.approx(perfect.ceiling()[f"t2i_p@{k}"])


# Models ----------------------------------------------------------------------------------------------

WORDS = ["a red dog", "a blue cat on the grass", "two birds", "a dog", "a photo of a big red bus"]
TOKENIZER = Tokenizer.learn(WORDS, 530)
SIZES = Config(16, 16, 8, 16, 2, 2, 32, 24, TOKENIZER.vocab_size, 16, 2, 2, 32)
MODELS = {
    "clip": lambda: CLIP(SIZES),
    "llip": lambda: Llip(SIZES, 4, 2, temperature=2.0),
    "pooled": lambda: PooledTokens(SIZES, 3, "learned", heads=2),
}


def build(name):
    torch.manual_seed(3)
    return MODELS[name]().eval()


class Pictures:
    """Random pictures with captions, labels and domains; every third caption is the same."""

    def __init__(self, count=11):
        g = torch.Generator().manual_seed(0)
        self.arrays = torch.randint(0, 256, (count, 20, 16, 3), generator=g, dtype=torch.uint8).numpy()
        self.classes, self.domain_names = ["dog", "cat", "bird"], ["day", "night"]
        self.labels = [i % 3 for i in range(count)]
        self.domains = [i % 2 for i in range(count)]
        texts = iter(WORDS[3] if n % 3 == 0 else f"{WORDS[n % 5]} {n}" for n in range(100))
        self.captions = [[next(texts) for _ in range(1 + i % 3)] for i in range(count)]

    def __len__(self):
        return len(self.arrays)

    def image(self, i):
        return Image.fromarray(self.arrays[i])

    def name(self, i):
        return f"picture {i}"


class TruePictures(Pictures):
    def relevance(self):
        flat = [t for texts in self.captions for t in texts]
        return torch.tensor(
            [[len(t) % 4 == i % 4 or t in own for t in flat] for i, own in enumerate(self.captions)]
        )


def images_of(dataset):
    transform = evaluate.data.preprocess(SIZES.image_size)
    return torch.stack([transform(dataset.image(i)) for i in range(len(dataset))])


@pytest.mark.parametrize("name", MODELS)
def test_text_sides_keep_their_order_and_lose_nothing_to_trimming(name):
    model, tokens = build(name), TOKENIZER([*WORDS, "", WORDS[2] + "<|endoftext|> and more"], 24)
    with torch.no_grad():
        whole = model.encode_text(tokens)
        parts = evaluate.encode_text(model, tokens, batch_size=2)
    evaluate.map_features(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5), parts, whole)


@pytest.mark.parametrize("name", MODELS)
def test_classes_in_chunks_equal_all_prompts_at_once(name):
    model, classes = build(name), ["dog", ["cat", "kitten", "tom"], "bird", ["bus"]]
    templates = ("a photo of a {}.", "a {c}")
    names = ["dog"], classes[1], ["bird"], ["bus"]
    group = [c for c in range(4) for _ in names[c] for _ in templates]
    asked = [t.replace("{}", n).replace("{c}", n) for known in names for n in known for t in templates]
    with torch.no_grad():
        side = model.encode_text(TOKENIZER(asked, 24))
        whole = model.ensemble_text(side, torch.tensor(group))
        for batch in (1, 4, 64):
            got = evaluate.encode_classes(model, TOKENIZER, classes, templates, batch)
            evaluate.map_features(
                lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5), got, whole
            )


@pytest.mark.parametrize("batch", [3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_zeroshot_and_retrieval_equal_the_whole_matrix(name, batch):
    model, dataset = build(name), TruePictures()
    owner = [i for i, texts in enumerate(dataset.captions) for _ in texts]
    flat = [t for texts in dataset.captions for t in texts]
    with torch.no_grad():
        image_side = model.encode_image(images_of(dataset))
        # equal captions must tie exactly, so the whole matrix is made of the distinct ones too
        distinct = sorted(set(flat))
        scores = model.pair_logits(image_side, model.encode_text(TOKENIZER(distinct, 24)))
        prompts_side = model.encode_text(TOKENIZER([f"a {c}" for c in dataset.classes], 24))
        logits = model.pair_logits(image_side, model.ensemble_text(prompts_side, torch.arange(3)))
    full = scores[:, [distinct.index(t) for t in flat]]
    got = evaluate.retrieval(model, dataset, TOKENIZER, batch_size=batch)
    whole = metrics.recall_at_k(full, torch.tensor(owner))
    assert {k: got[k] for k in whole} == pytest.approx(whole)
    relevant = torch.stack([dataset.relevance()[:, flat.index(t)] for t in distinct], 1)
    assert got["i2t_map"] == pytest.approx(metrics.average_precision(scores, relevant).mean().item())
    counted = (got["images"], got["captions"], got["distinct_captions"])
    assert counted == (11, len(flat), len(distinct)) and len(distinct) < len(flat)
    assert set(got["chance"]) == set(whole) | {"i2t_map", "i2t_p@1", "t2i_p@10"}

    got = evaluate.zeroshot(model, dataset, TOKENIZER, ("a {}",), batch_size=batch)
    expected = metrics.classification_metrics(logits, torch.tensor(dataset.labels))
    assert {k: got[k] for k in expected} == pytest.approx(expected)
    assert got["chance"] == {"top1": 1 / 3, "top5": 1, "mean_per_class": 1 / 3}
    assert (got["domains"]["day"] * 6 + got["domains"]["night"] * 5) / 11 == pytest.approx(got["top1"])


def test_whole_matrix_is_never_held_and_the_mode_is_restored(monkeypatch):
    model, seen = build("llip").train(), []
    score = Llip.pair_logits

    def counted(self, image_side, text_side):
        assert not self.training and not torch.is_grad_enabled()
        seen.append(len(image_side[0]))
        return score(self, image_side, text_side)

    monkeypatch.setattr(Llip, "pair_logits", counted)
    evaluate.retrieval(model, Pictures(), TOKENIZER, batch_size=4)
    assert seen == [4, 4, 3]
    assert model.training and model.visual.training


def test_many_pairs_of_llip_are_scored_in_tiles(monkeypatch):
    model, dataset = build("llip"), Pictures()
    with torch.no_grad():
        text = model.encode_text(TOKENIZER(WORDS, 24))
        plain = torch.cat([scores for _, scores in evaluate.score_rows(model, dataset, text)])
        monkeypatch.setattr(llip_tiles, "PLAIN_BYTES", 0)
        monkeypatch.setattr(Llip, "mix", None)
        tiled = torch.cat([scores for _, scores in evaluate.score_rows(model, dataset, text)])
    torch.testing.assert_close(tiled, plain, rtol=1e-5, atol=1e-5)
    assert type(model) is Llip


def test_a_model_that_knows_is_right():
    """Pixels name the class: images of class c are all of brightness c, and the towers read just that."""

    class Knows(CLIP):
        def encode_image(self, images):
            return torch.eye(3)[(images.mean((1, 2, 3)) * 2 + 1).round().clamp(0, 2).long()]

        def encode_text(self, tokens):
            word = torch.stack([(tokens == TOKENIZER.encode(w)[0]).any(1) for w in ("x", "y", "z")], 1)
            return word.float() + 1e-3

    dataset = Pictures()
    for i, label in enumerate(dataset.labels):
        dataset.arrays[i] = (60, 120, 180)[label]
    dataset.classes = ["x", "y", "z"]
    got = evaluate.zeroshot(Knows(SIZES), dataset, TOKENIZER, ("{}", "the {}"))
    assert got["top1"] == got["mean_per_class"] == 1 and got["domains"] == {"day": 1, "night": 1}
    wrong = evaluate.zeroshot(Knows(SIZES), dataset, TOKENIZER, ("{}",), classes=["y", "z", "x"])
    assert wrong["top1"] == 0


def test_bf16_towers_give_fp32_scores_near_the_others():
    model, dataset = build("clip"), Pictures()
    with torch.no_grad():
        side = evaluate.encode_classes(model, TOKENIZER, dataset.classes, ("a {}",))
        rows = [
            torch.cat([s for _, s in evaluate.score_rows(model, dataset, side, precision=p)])
            for p in ("fp32", "bf16")
        ]
    assert rows[1].dtype == torch.float32 and not torch.equal(*rows)
    assert (rows[0] - rows[1]).abs().max() < 0.3  # logits are up to 14
    with pytest.raises(ValueError, match="'fp16': choose fp32 or bf16"):
        evaluate.zeroshot(model, dataset, TOKENIZER, precision="fp16")


def test_refusals_say_what_is_wrong(capsys):
    model, dataset = build("clip"), Pictures()
    with pytest.raises(ValueError, match="2 class names for data of 3 classes"):
        evaluate.zeroshot(model, dataset, TOKENIZER, classes=["a", "b"])
    with pytest.raises(ValueError, match="'a photo' has no {}"):
        evaluate.zeroshot(model, dataset, TOKENIZER, ["a photo"])
    with pytest.raises(ValueError, match="class 1 has no name"):
        evaluate.zeroshot(model, dataset, TOKENIZER, classes=["a", [], "c"])
    other = CLIP(replace(SIZES, vocab_size=600))
    for task in (evaluate.zeroshot, evaluate.retrieval):
        with pytest.raises(ValueError, match=f"{TOKENIZER.vocab_size} tokens, the model 600"):
            task(other, dataset, TOKENIZER)
    evaluate.zeroshot(model, dataset, TOKENIZER, classes=["crane", "maillot", "crane"])
    assert "classes 0 and 2 are both named 'crane'" in capsys.readouterr().err


# Two ranks ---------------------------------------------------------------------------------------------


def everything(batch_size):
    """What two ranks and one process compute: shares of 5 and 6 pictures, of none and one; one class."""
    results = []
    for name in ("clip", "llip"):
        for count in (11, 1):
            common = build(name), TruePictures(count), TOKENIZER
            results.append(evaluate.retrieval(*common, batch_size=batch_size))
            results.append(evaluate.zeroshot(*common, ("a {}", "the {}"), batch_size=batch_size))
            _, _, certain = evaluate.classify(*common, known=["dog", "red cat"], batch_size=batch_size)
            results.append({"by certainty": certain.argsort().tolist()})
        labelled = Pictures()
        labelled.classes, labelled.labels = ["dog"], [0] * 11
        results.append(evaluate.zeroshot(build(name), labelled, TOKENIZER))
    return results


def worker(rank, world, folder):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        (folder / f"{rank}.json").write_text(json.dumps(everything(3)))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's destructor can hang


def test_two_ranks_equal_one_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in workers:
        process.start()
    alone = everything(4)
    for process in workers:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        for got, expected in zip(json.loads((tmp_path / f"{rank}.json").read_text()), alone, strict=True):
            for key, value in expected.items():
                assert got[key] == pytest.approx(value), key


# Tables, files, progress -----------------------------------------------------------------------------------


def test_table_is_markdown_with_numbers_to_the_right():
    rows = [{"arm": "clip", "top1": 0.5, "images": 7}, {"arm": "llip", "top1": 0.25, "note": "x"}]
    assert report.format_table(rows) == (
        "| arm  |  top1 | images | note |\n"
        "| ---- | ----: | -----: | ---- |\n"
        "| clip | 0.500 |      7 |      |\n"
        "| llip | 0.250 |        | x    |"
    )
    written = [{"n": "1,024", "gain": "-0.31 +- 0.02", "cosine": "1e-05", "area": "12 px"}]
    ruled = report.format_table(written + [{"cosine": "0.3"}]).splitlines()[1]
    assert ruled == "| ----: | ------------: | -----: | ----- |"
    result = {"top1": 0.5, "chance": {"top1": 0.125}, "domains": {"sketch": 0.25}}
    table = report.results_table({"zeroshot": result})
    assert "| zeroshot | top1        | 50.00 |  12.50 |" in table
    assert "| zeroshot | top1 sketch | 25.00 |  12.50 |" in table


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_duration_and_progress(capsys, monkeypatch):
    assert [text.duration(s) for s in (8.44, 185, 7625)] == ["8.4 s", "3:05 min", "2:07 h"]
    clock = iter([0.0, 1.0, 12.0, 13.0, 20.0])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(clock))
    progress = report.Progress("scoring", 40, "images")
    for _ in range(4):
        progress.add(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "scoring  20 of 40 images  1.7/s  ETA 12.0 s",
        "scoring  40 of 40 images  2.0/s  done in 20.0 s",
    ]


# Command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["clip", "llip"])
def run(request, tmp_path_factory):
    """A run directory with random weights, as train.py leaves one."""
    folder = tmp_path_factory.mktemp(request.param)
    captions = [t for texts in scenes.Scenes("train", 64).captions for t in texts]
    tokenizer = Tokenizer.learn(captions, 560)
    tokenizer.save(folder / "tokenizer.json")
    config = replace(SIZES, vocab_size=tokenizer.vocab_size, image_size=32, context_length=48)
    torch.manual_seed(0)
    model = CLIP(config) if request.param == "clip" else Llip(config, 4, 2)
    pretrained.save(model, folder / "checkpoint.pt")
    return folder


def test_command_line_on_scenes(run, tmp_path, capsys):
    common = ["--model", str(run), "--data", "scenes", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert evaluate.main(["zeroshot", *common, "--limit", "64", "--templates", "a {}", "the {}"]) == 0
    shown, result = capsys.readouterr(), json.loads((tmp_path / "out" / "results.json").read_text())
    assert "| zeroshot | top1 " in shown.out and "64 of 64 images" in shown.err
    assert result["classes"] == 16 and result["images"] == 64 and result["chance"]["top1"] == 1 / 16
    assert sum(row["right"] for row in result["per_class"]) == round(result["top1"] * 64)
    assert Image.open(tmp_path / "out" / "confusion.png").width > 300
    assert f"drawn in {tmp_path / 'out' / 'confusion.png'}" in shown.out

    assert evaluate.main(["retrieval", *common, "--limit", "20", "--batch-size", "8"]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["task"] == "retrieval" and result["images"] == 20
    assert 0 <= result["t2i@1"] <= result["t2i@5"] <= result["t2i@10"] <= 1
    assert result["chance"]["t2i@5"] == pytest.approx(5 / 20) and "i2t_map" in result["ceiling"] | result


def test_command_line_on_a_folder_of_classes(run, tmp_path, capsys):
    for n, name in enumerate(("n01", "n02")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (40, 36), (80 * n, 50 * k, 99)).save(tmp_path / "set" / name / f"{k}.png")
    names = tmp_path / "names.json"
    common = ["zeroshot", "--model", str(run / "checkpoint.pt"), "--data", str(tmp_path / "set")]
    common += ["--device", "cpu"]
    names.write_text('{"n02": ["cat", "kitten"], "n01": "dog", "n03": "unused"}')
    assert evaluate.main([*common, "--classnames", str(names), "--templates", "imagenet7"]) == 0
    assert "images 6  classes 2" in capsys.readouterr().out
    for content, complaint in (
        ('{"n01": "dog"}', "no name for 1 classes, the first is 'n02'"),
        ('["dog", "cat", "cow"]', "3 names, but the data have 2 classes"),
        ("[]", "expected a list or a mapping"),
        ("{", "not JSON"),
    ):
        names.write_text(content)
        assert evaluate.main([*common, "--classnames", str(names)]) == 2
        err = capsys.readouterr().err
        assert complaint in err and str(names) in err and err.count("\n") == 1


def test_a_list_with_own_columns_serves_both_evaluations(run, tmp_path, capsys):
    lines = ["picture,english,species"]
    for k in range(4):
        Image.new("RGB", (40, 36), (60 * k, 99, 99)).save(tmp_path / f"{k}.png")
        lines.append(f"{k}.png,text {k},{'dog' if k % 2 else 'cat'}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    flags = ["--model", str(run), "--data", str(tmp_path / "list.csv"), "--device", "cpu"]
    flags += ["--image-key", "picture", "--caption-key", "english", "--label-key", "species"]
    for command, counts in (("zeroshot", "classes 2"), ("retrieval", "captions 4  distinct captions 4")):
        assert evaluate.main([command, *flags]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f"{command}: images 4  {counts}  standard error at most 25.0"  # sqrt(0.5 * 0.5 / 4)


def test_command_line_errors_are_one_line_and_status_2(run, tmp_path, capsys):
    common = ["--model", str(run), "--device", "cpu"]
    other = tmp_path / "vocab"
    TOKENIZER.save(other)
    for argv, complaint in (
        (["retrieval", "--model", str(tmp_path / "no.pt"), "--data", "scenes"], "no.pt"),
        (["retrieval", *common, "--data", str(tmp_path / "no.csv")], "no.csv"),
        (["retrieval", *common, "--data", "scenes", "--vocab", str(other)], "tokens, the model"),
        (["retrieval", *common, "--data", "scenes", "--batch-size", "0"], "--batch-size 0"),
        (["retrieval", *common, "--data", "scenes", "--split", "tset"], "tset"),
        (["zeroshot", *common, "--data", "scenes", "--templates", "photos"], "'photos'"),
    ):
        assert evaluate.main(argv) == 2, argv
        err = capsys.readouterr().err
        assert err.startswith("error: ") and complaint in err and err.count("\n") == 1, err
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["retrieval", *common, "--data", "scenes", "--bacth-size", "3"])
    assert stop.value.code == 2
    for name in ("dog", "cat"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (40, 36)).save(tmp_path / "set" / name / "0.png")
    assert evaluate.main(["retrieval", *common, "--data", str(tmp_path / "set")]) == 2
    assert "has no captions, which are needed here" in capsys.readouterr().err


def test_templates_by_name_as_text_and_from_a_file(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a {}\n\nthe {}.\n")
    assert prompts.read_templates(["imagenet80"]) == prompts.IMAGENET80
    assert prompts.read_templates(["a {}", "two {c}"]) == ("a {}", "two {c}")
    assert prompts.read_templates([str(path)]) == ("a {}", "the {}.")
    assert len(set(prompts.IMAGENET80)) == 80 and set(prompts.IMAGENET7) <= set(prompts.IMAGENET80)
    assert all(prompts.fill(t, "cat").count("cat") == 1 for t in prompts.IMAGENET80)


def test_imagenet80_is_openai_s_list(shared):
    path = shared / "data" / "tokenizer_prompts" / "imagenet_templates_openai80.json"
    assert list(prompts.IMAGENET80) == json.loads(path.read_text())


# Fine-tuned runs --------------------------------------------------------------------------------------------


@pytest.fixture
def coop_run(tmp_path):
    """A run directory of CoOp with random learned contexts, and the method."""
    names, templates = ["dog", "cat", "bird"], ("a photo of a {}.",)
    torch.manual_seed(0)
    clip = CLIP(SIZES).eval()
    text = torch.nn.functional.normalize(torch.randn(3, SIZES.embed_dim), dim=-1)
    settings = dict(context=2, context_words="")
    method = coop.build(coop.Settings(**settings), clip, Classes(names, templates, TOKENIZER, text)).eval()
    method.ctx.data.normal_()
    folder = tmp_path / "run"
    pretrained.save(clip, folder / "checkpoint.pt")
    TOKENIZER.save(folder / "tokenizer.json")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["task"] = {"classes": names, "templates": list(templates), "learned": method.learned()}
    torch.save(state, folder / "checkpoint.pt")
    files.write_json(folder / "config.json", {"method": "coop", "lr": 0.1, **settings})
    return folder, method


@pytest.mark.parametrize("source", ["", "checkpoint.pt"])
def test_a_prompt_run_is_evaluated_with_what_it_learned(coop_run, source):
    folder, method = coop_run
    dataset = Pictures()
    model, tokenizer = evaluate.open_model(str(folder / source))
    got = evaluate.classify(model, dataset, tokenizer)
    expected = evaluate.classify(method.dual_encoder(), dataset, TOKENIZER)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    with torch.no_grad():
        answers = method.predict(images_of(dataset)).argmax(1)
    assert torch.equal(got[1], answers) and not model.training
    with pytest.raises(ValueError, match="retrieval needs captions, but learned prompts take class names"):
        evaluate.retrieval(model, dataset, tokenizer)


def test_a_prompt_run_is_never_evaluated_as_plain_clip(coop_run, capsys):
    folder, _ = coop_run
    with pytest.raises(ValueError, match="coop learned more than the weights of a CLIP, so its towers alone"):
        evaluate.open_model(str(folder), towers=True)
    (folder / "copy").mkdir()
    (folder / "checkpoint.pt").rename(folder / "copy" / "checkpoint.pt")
    TOKENIZER.save(folder / "copy" / "tokenizer.json")
    flags = ["--model", str(folder / "copy"), "--data", "scenes", "--device", "cpu"]
    assert evaluate.main(["zeroshot", *flags]) == 2
    error = capsys.readouterr().err
    assert "cannot be rebuilt from this checkpoint" in error and error.count("\n") == 1
    (folder / "copy" / "config.json").write_text("{")
    assert evaluate.main(["zeroshot", *flags]) == 2
    assert "config.json: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file, name, value, problem",
    [
        ("task", "classes", "dog", "cannot be rebuilt"),
        ("task", "classes", ["dog", 2], "cannot be rebuilt"),
        ("task", "templates", [], "cannot be rebuilt"),
        ("task", "templates", [None], "cannot be rebuilt"),
        ("config", "context", "2", "config.json has context '2', expected int"),
        ("config", "context_words", ["a"], "config.json has context_words"),
        ("config", "class_context", 1, "config.json has class_context 1, expected bool"),
        ("config", "method", ["coop"], "cannot be rebuilt"),
    ],
)
def test_a_run_of_a_stranger_is_checked(coop_run, file, name, value, problem):
    folder, _ = coop_run
    if file == "config":
        config = json.loads((folder / "config.json").read_text())
        files.write_json(folder / "config.json", config | {name: value})
    else:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        state["task"][name] = value
        torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match=problem):
        evaluate.open_model(str(folder))


def test_average_pooling_is_rebuilt(tmp_path):
    names = ["dog", "cat", "bird"]
    torch.manual_seed(0)
    clip = CLIP(SIZES).eval()
    pretrained.save(clip, tmp_path / "checkpoint.pt")
    TOKENIZER.save(tmp_path / "tokenizer.json")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["task"] = {"classes": names, "templates": ["a {}"], "learned": {}}
    torch.save(state, tmp_path / "checkpoint.pt")
    files.write_json(tmp_path / "config.json", {"method": "finetune", "image_pooling": "average"})
    model, _ = evaluate.open_model(str(tmp_path))
    images = images_of(Pictures())
    with torch.no_grad():
        patches = clip.visual.head(clip.visual.transformer(clip.visual.embed(images)))[:, 1:]  # (B, P, E)
        torch.testing.assert_close(model.encode_image(images), patches.mean(1))
    with pytest.raises(ValueError, match="--image-pooling average, so its towers alone are not its model"):
        evaluate.open_model(str(tmp_path), towers=True)
