"""The dual encoder of prompt methods, and the flags of coop, cocoop and maple: start words, defaults."""

from dataclasses import replace

import pytest
import torch
from test_prompts import CONFIG, randomize

import evaluate
from baselines import cocoop, coop, maple
from clipood import Classes, unit
from model import CLIP
from readers.templates import PHOTO
from tokenizer import Tokenizer

MODULES = pytest.mark.parametrize("module", [coop, cocoop, maple])


@pytest.fixture(scope="module")
def tokenizer():
    """A vocabulary in which "a photo of a" is four tokens."""
    return Tokenizer.learn(["a photo of a dog.", "a photo of a cat.", "a photo of a red deer."] * 4, 560)


@pytest.fixture
def clip(tokenizer):
    torch.manual_seed(0)
    return CLIP(replace(CONFIG, vocab_size=tokenizer.vocab_size, context_length=24))


@pytest.fixture
def images():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def classes(clip, tokenizer):
    names = ["dog", "cat", "red deer"]
    tokens = tokenizer([f"a photo of a {name}." for name in names], 24)
    return Classes(names, PHOTO, tokenizer, unit(clip.encode_text(tokens)).detach())


def test_the_context_replaces_leading_words(tokenizer):
    ids = tokenizer.encode("a photo of a")
    assert len(ids) == 4
    assert coop.start_words("a photo of a", "", 4, tokenizer) == (ids, "{}.")
    assert coop.start_words("a photo of a", "", 2, tokenizer) == (ids[:2], "of a {}.")
    assert coop.start_words("", "", 4, tokenizer) == (None, "{}.")
    with pytest.raises(ValueError, match="--context 3, but --context-words 'a photo' has 2 words"):
        coop.start_words("a photo", "a photo of a", 3, tokenizer)


def test_default_words_that_are_split_are_shortened_or_dropped():
    """In a vocabulary of bytes "photo" is five tokens. This is an error only for words of the user."""
    letters = Tokenizer.learn(["a"], 514)
    words = "a photo of a"
    assert coop.start_words(words, words, 6, letters) == (letters.encode("a photo"), "of a {}.")
    assert coop.start_words(words, words, 1, letters) == (letters.encode("a"), "photo of a {}.")
    assert coop.start_words(words, words, 4, letters) == (None, "{}.")
    with pytest.raises(ValueError, match="the first 4 are 9 tokens"):
        coop.start_words(words, "", 4, letters)


@MODULES
def test_flags_reach_the_method(clip, classes, tokenizer, module):
    method = module.build(module.Settings(context_words="a photo of a", context=4), clip, classes)
    assert torch.equal(method.ctx, clip.token_embedding.weight[tokenizer.encode("a photo of a")])
    assert (
        method.template == "{}." and method.new_classes and method.starts_as == "the context starts as words"
    )
    method = module.build(module.Settings(context_words=""), clip, classes)
    assert method.starts_as == "the context starts at random"


def test_flags_of_one_method(clip, classes):
    method = maple.build(maple.Settings(), clip, classes)
    # all three blocks of these towers
    assert method.template == "of a {}." and len(method.compound_prompts_text) == 2
    assert len(maple.build(maple.Settings(prompt_depth=1), clip, classes).compound_prompts_text) == 0
    settings = coop.Settings(context=3, context_position="front", class_context=True)
    method = coop.build(settings, clip, classes)
    assert method.before == 0 and method.ctx.shape == (3, 3, 24)


@MODULES
def test_the_dual_encoder_answers_for_any_classes(clip, classes, tokenizer, module, images):
    """Classes of training, fewer, others, in any order: the scores are those of the learned prompts."""
    method = randomize(module.build(module.Settings(context=4), clip, classes)).eval()
    dual = method.dual_encoder()
    assert method.dual_encoder(clip) is clip and not dual.training
    assert not dual.takes_captions and not dual.conditional and dual.config is clip.config
    templates = dual.class_templates(PHOTO)
    assert templates == (method.template,)
    for names in (classes.names, ["cat", "dog"], ["toad", "photo of dog", "a"]):
        features = evaluate.encode_classes(dual, tokenizer, names, templates)
        tokens = tokenizer([method.template.replace("{}", name) for name in names], 24)
        assert torch.equal(features.long(), tokens)
        scores = dual.pair_logits(dual.encode_image(images), features)
        # at CLIP's logit scale, as in training: softmax gives the model's own probabilities
        torch.testing.assert_close(scores, clip.logit_scale.exp() * method.predict(images, tokens))
    with pytest.raises(ValueError, match="3 prompts for 2 classes: a learned prompt takes one"):
        evaluate.encode_classes(dual, tokenizer, [["cat", "kitten"], "dog"], PHOTO)


def test_class_contexts_answer_for_the_classes_of_training_only(clip, classes, tokenizer, images):
    method = randomize(coop.build(coop.Settings(context=4, class_context=True), clip, classes)).eval()
    dual = method.dual_encoder()
    features = evaluate.encode_classes(dual, tokenizer, classes.names, ("{}.",))
    expected = clip.scale_logits(method.predict(images))
    assert torch.equal(dual.pair_logits(images, features), expected) and not method.new_classes
    # the same names in another order, and fewer of them
    for names in (["cat", "dog", "red deer"], ["dog", "cat"]):
        features = evaluate.encode_classes(dual, tokenizer, names, ("{}.",))
        with pytest.raises(ValueError, match="can score the classes of training only"):
            dual.pair_logits(images, features)


def test_every_method_has_complete_defaults():
    values = {coop: (2e-3, 32, 50), cocoop: (2e-3, 1, 10), maple: (3.5e-3, 4, 5)}
    for module, expected in values.items():
        d, tiny = module.DEFAULTS, module.TINY
        assert (d["lr"], d["batch_size"], d["epochs"]) == expected and d["warmup"] == 0
        assert (d["optimizer"], d["weight_decay"], d["shots"], d["crop_scale"]) == ("sgd", 5e-4, 16, 0.08)
        assert tiny["optimizer"] == "adamw" and tiny["epochs"] == tiny["shots"] == 0
        assert tiny.get("context") == (2 if module is maple else 4)
    assert [coop.PRESETS[f"coop-{k}-shot"]["epochs"] for k in (1, 2, 4, 8, 16)] == [50, 100, 100, 200, 200]
