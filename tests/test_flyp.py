"""baselines/flyp.py: the loss is pre-training on prompts, on one process and on several."""

import math

import pytest
import torch
import torch.nn.functional as F

from baselines import flyp
from baselines.flyp import FLYP
from clipood import Classes, unit
from llip import Llip
from losses import info_nce
from model import CLIP, Config

CONFIG = Config(16, 16, 4, 32, 4, 2, 64, 12, 40, 16, 2, 2, 32)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP(CONFIG)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(2)
    return torch.randn(6, 3, 16, 16, generator=g), torch.tensor([0, 3, 1, 0, 4, 2])


def class_tokens(n=5):
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 38, (n, 12), generator=g)
    tokens[:, 0], tokens[:, 8], tokens[:, 9:] = 38, 39, 0  # start, end, padding
    return tokens


def test_is_pretraining_on_prompts(clip, batch):
    images, labels = batch
    tokens = class_tokens()
    method = FLYP(clip, tokens)
    loss, logs = method(images, labels)
    loss.backward()
    got = {k: p.grad.clone() for k, p in clip.named_parameters()}
    clip.zero_grad()
    expected = info_nce(clip.pair_logits(*clip(images, tokens[labels])))  # class 0 encoded twice
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in clip.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert got["logit_scale"] != 0 and 0 <= logs["accuracy"] <= 1


def test_cuts_the_columns_behind_the_longest_prompt(clip, batch):
    """SPEED: the loss, every gradient and the features are those of the padded prompts."""
    tokens = class_tokens()
    tokens[2, 5:] = torch.tensor([39, 0, 0, 0, 0, 0, 0])  # a shorter one keeps its padding
    cut = FLYP(clip, tokens)
    assert tokens.shape[1] == 12 and torch.equal(cut.class_tokens, tokens[:, :9])
    found = []
    for kept in (cut.class_tokens, tokens):
        cut.class_tokens = kept
        clip.zero_grad()
        loss, _ = cut.loss(*batch)
        loss.backward()
        grads = [p.grad.clone() for p in clip.parameters()]
        found.append([loss.detach(), cut.predict(batch[0]).detach(), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_counts_repeated_classes_as_negatives(clip):
    """Two equal prompts share the probability: their rows cannot fall below ln 2."""
    labels = torch.zeros(2, dtype=torch.long)
    loss, _ = FLYP(clip, class_tokens()).loss(torch.randn(2, 3, 16, 16), labels)
    assert loss >= math.log(2) / 2


def test_over_ranks_is_flyp_of_the_global_batch(clip, batch, monkeypatch):
    images, labels = batch
    method = FLYP(clip, class_tokens())
    whole, _ = method.loss(images, labels)
    image, text = clip(images, class_tokens()[labels])
    columns = clip.pair_logits(image, text).t()  # (texts, images)
    parts = []
    for r in range(3):
        mine = slice(2 * r, 2 * r + 2)
        monkeypatch.setattr(flyp, "rank", lambda r=r: r)
        monkeypatch.setattr(flyp, "gather", lambda _: unit(text))
        monkeypatch.setattr(flyp, "transpose", lambda _, mine=mine: columns[mine])
        parts.append(method.loss(images[mine], labels[mine])[0])
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_predictions_follow_the_text_tower(clip, batch):
    """No features are kept: after any change of a weight the scores are those of the present weights."""
    images, method = batch[0], FLYP(clip, class_tokens())
    for _ in range(2):
        image, text = clip.encode_image(images), clip.encode_text(class_tokens())
        expected = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).t()
        torch.testing.assert_close(method.predict(images), expected)
        with torch.no_grad():
            clip.ln_final.bias[3] += 1.0
    assert method.dual_encoder() is clip and method.learned() == {}
    assert method.first_loss(5, 6).startswith("ln 6 = 1.79 for a blind answer; images of one class")


def test_every_class_has_a_prompt_of_each_template(clip, batch):
    """Labels are rows of class_tokens; the classes are scored by the mean of their prompts."""

    def tokenizer(texts, length):
        return torch.tensor([[38, *(1 + ord(c) % 36 for c in text[:9]), 39] for text in texts])

    names, templates = ["ant", "bee", "cat"], ("{} abcdef", "xy {} abc")
    classes = Classes(names, templates, tokenizer, torch.eye(3))
    method = flyp.build(flyp.Settings(), clip, classes)
    texts = [template.replace("{}", name) for name in names for template in templates]
    assert method.prompts_per_class == 2 and torch.equal(method.class_tokens, tokenizer(texts, 12))
    images, labels = batch
    loss, _ = method.loss(images, labels)
    torch.testing.assert_close(loss, info_nce(clip.pair_logits(*clip(images, tokenizer(texts, 12)[labels]))))
    text = clip.ensemble_text(clip.encode_text(tokenizer(texts, 12)), torch.tensor([0, 0, 1, 1, 2, 2]))
    torch.testing.assert_close(method.predict(images), unit(clip.encode_image(images)) @ text.t())
    # the other prompt of the class is a right answer
    with torch.no_grad():
        clip.text_projection.zero_()
    assert method.loss(images[:2], torch.tensor([0, 1]))[1]["accuracy"] == 1
    assert method.loss(images[:2], torch.tensor([0, 2]))[1]["accuracy"] == 0.5


def test_works_in_fp64(clip, batch):
    loss, _ = FLYP(clip.double(), class_tokens()).loss(batch[0].double(), batch[1])
    assert loss.dtype == torch.float64


def test_llip_is_refused():
    with pytest.raises(ValueError, match="needs a CLIP, not a Llip"):
        FLYP(Llip(CONFIG, 3, 2), class_tokens())
