"""Prompt learning: official numbers, prompts of real words, hooks on a plain CLIP, and the protocol."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from baselines.cocoop import CoCoOp
from baselines.coop import CoOp, PromptLearner
from baselines.maple import MaPLe
from llip import Llip
from model import CLIP, Config

CONFIG = Config(32, 16, 8, 32, 3, 2, 64, 16, 40, 24, 3, 2, 48)
START, END, STOP = 38, 39, 5
NAMES = [[11], [12, 13, 14], [15, 16], [17, 11]]
WORDS = [21, 22, 23]
METHODS = {
    "coop": lambda clip, tokens: CoOp(clip, tokens, 3),
    "csc": lambda clip, tokens: CoOp(clip, tokens, 3, class_specific=True),
    "middle": lambda clip, tokens: CoOp(clip, tokens, 3, position="middle"),
    "cocoop": lambda clip, tokens: CoCoOp(clip, tokens, 3),
    "maple": lambda clip, tokens: MaPLe(clip, tokens, 3, depth=3),
}


def rows(texts, length=16):
    """Texts of ids to token rows: start, text, end, zeros."""
    texts = [[START, *text, END] for text in texts]
    return torch.tensor([text + [0] * (length - len(text)) for text in texts])


@pytest.fixture
def clip():
    torch.manual_seed(0)
    clip = CLIP(CONFIG)
    with torch.no_grad():  # at CLIP's initial scale, prompts hardly change the text features
        clip.token_embedding.weight.mul_(20)
        clip.positional_embedding.mul_(20)
    return clip


@pytest.fixture
def tokens():
    return rows([[*name, STOP] for name in NAMES])


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(2)
    return torch.randn(5, 3, 16, 16, generator=g), torch.tensor([0, 3, 1, 2, 3])


def randomize(model):
    """Prompts and heads of a size that shows in the logits."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return model


def gradients(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


# The official numbers -------------------------------------------------------------------------------------


def golden_clip(g, config):
    clip = CLIP(config)
    state = {k[2:]: v for k, v in g.items() if k.startswith("w.")}
    embedding = torch.zeros(config.vocab_size, config.text_width)
    embedding[g["token_rows.ids"]] = g["token_rows.values"]
    clip.load_state_dict({**state, "token_embedding.weight": embedding})
    return clip


def official(g):
    """CLIP and the class tokens of coop.npz; its placeholder words are dropped from the prompts."""
    clip = golden_clip(g, Config(32, 32, 8, 128, 1, 2, 512, 77, 49408, 64, 2, 2, 256))
    whole = g["out.end4.tokenized_prompts"]
    tokens = torch.cat([whole[:, :1], whole[:, 5:], torch.zeros(5, 57, dtype=torch.long)], 1)
    return clip, tokens


def compare(model, g, prefix, gradient, **limits):
    logits = model(g["in.image"])
    loss = F.cross_entropy(logits, g["in.label"])
    loss.backward()
    torch.testing.assert_close(logits, g[f"out.{prefix}logits"], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(loss, g[f"out.{prefix}loss"], rtol=1e-4, atol=5e-5)
    for name, grad in gradients(model).items():
        if f"out.{prefix}grad_norm.{name}" in g:
            grad, name = grad.norm(), f"grad_norm.{name}"
        else:
            name = gradient + name
        torch.testing.assert_close(grad, g[f"out.{prefix}{name}"], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "variant, n, options",
    [
        ("end4", 4, {}),
        ("csc3", 3, {"class_specific": True}),
        ("middle5", 5, {"position": "middle"}),
        ("front4", 4, {"position": "front"}),
    ],
)
def test_coop_is_the_official_one(golden_arrays, variant, n, options):
    g = golden_arrays("coop.npz")
    model = CoOp(*official(g), n, **options)
    model.load_learned({"ctx": g[f"in.ctx.{variant}"]})
    ctx = model.ctx if model.ctx.dim() == 3 else model.ctx.expand(5, -1, -1)
    x, _ = model.prompts(ctx, model.class_tokens)
    seen = g[f"out.{variant}.prompts_first20"][:, : x.shape[1]]
    end = (g[f"out.{variant}.tokenized_prompts"] == 49407).nonzero()[:, 1]
    for ours, theirs, last in zip(x, seen, end):
        torch.testing.assert_close(ours[: last + 1], theirs[: last + 1], rtol=1e-4, atol=5e-6)
    compare(model, g, variant + ".", "grad_")


def test_cocoop_is_the_official_one(golden_arrays):
    weights, g = golden_arrays("coop.npz"), golden_arrays("cocoop.npz")
    model = CoCoOp(*official(weights), 4, chunk=7)
    state = {k[3:]: v for k, v in g.items() if k.startswith(("in.ctx", "in.meta_net"))}
    model.load_learned(state)
    compare(model, g, "", "grad.")


@pytest.mark.parametrize("variant, n, depth", [("j1", 2, 1), ("j3", 2, 3)])
def test_maple_is_the_official_one(golden_arrays, variant, n, depth):
    model, g, state = official_maple(golden_arrays, variant, n, depth)
    model.load_learned(state)
    compare(model, g, variant + ".", "grad.")


def test_maple_deeper_than_its_network_is_maple_as_deep_as_it(golden_arrays):
    """The official J = 6 over 4 blocks: two of its prompts get no gradient. Here this depth is an error."""
    variant = "j6_deeper_than_net"
    model, g, state = official_maple(golden_arrays, variant, 3, 4)
    model.load_learned({k: v for k, v in state.items() if k.split(".")[1:2] not in (["3"], ["4"])})
    compare(model, g, variant + ".", "grad.")
    for j in "34":
        assert not g[f"out.{variant}.grad.compound_prompts_text.{j}"].any()
    with pytest.raises(ValueError, match=r"depth 6: .* 4 \(image\) and 4 \(text\)"):
        official_maple(golden_arrays, variant, 3, 6)


def official_maple(golden_arrays, variant, n, depth):
    g = golden_arrays("maple.npz")
    clip = golden_clip(g, Config(32, 32, 8, 64, 4, 2, 256, 77, 49408, 64, 4, 2, 256))
    whole = golden_arrays("coop.npz")["out.init.tokenized_prompts"]  # a photo of a ... .
    rest = torch.cat([whole[:, :1], whole[:, 1 + n :], torch.zeros(5, 53, dtype=torch.long)], 1)
    prefix = f"in.{variant}."
    state = {k[len(prefix) :]: v for k, v in g.items() if k.startswith(prefix)}
    return MaPLe(clip, rest, n, depth), g, state


# Words in the place of the context ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "position, texts",
    [
        ("end", [[*WORDS, *name, STOP] for name in NAMES]),
        ("middle", [[WORDS[0], *name, *WORDS[1:], STOP] for name in NAMES]),
        ("front", [[*name, *WORDS, STOP] for name in NAMES]),
    ],
)
def test_a_context_of_words_is_zero_shot_clip(clip, tokens, batch, position, texts):
    expected = clip.pair_logits(clip.encode_image(batch[0]), clip.encode_text(rows(texts)))
    for class_specific in (False, True):
        model = CoOp(clip, tokens, 3, class_specific, position=position, words=WORDS)
        torch.testing.assert_close(model(batch[0]), expected)
        torch.testing.assert_close(model.predict(batch[0]) * clip.logit_scale.exp(), expected)


def test_every_class_has_its_own_context(clip, tokens, batch):
    model = CoOp(clip, tokens, 3, class_specific=True)
    assert model.ctx.shape == (4, 3, 24)
    contexts = [[21, 22, 23], [23, 22, 21], [24, 25, 26], [27, 28, 29]]
    with torch.no_grad():
        model.ctx.copy_(clip.token_embedding(torch.tensor(contexts)))
    texts = [[*ctx, *name, STOP] for ctx, name in zip(contexts, NAMES)]
    expected = clip.pair_logits(clip.encode_image(batch[0]), clip.encode_text(rows(texts)))
    torch.testing.assert_close(model(batch[0]), expected)


def test_padding_changes_nothing(clip, batch):
    short, long = (rows([[*name, STOP] for name in NAMES], length) for length in (9, 16))
    a, b = (randomize(CoOp(clip, t, 3, position="middle")) for t in (short, long))
    assert torch.equal(a(batch[0]), b(batch[0]))
    assert b.class_tokens.shape == (4, 6)  # SPEED: start, three words, full stop, end


# CoCoOp ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 20, 100])
def test_cocoop_is_coop_with_a_context_per_image(clip, tokens, batch, chunk):
    images, labels = batch
    model = randomize(CoCoOp(clip, tokens, 3, chunk=chunk))
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    found = gradients(model)
    model.zero_grad()

    single = []
    for image in images:  # as the official code: one image after another
        feature = F.normalize(clip.encode_image(image[None]), dim=-1)
        hidden = F.relu(feature @ model.meta_net.linear1.weight.t() + model.meta_net.linear1.bias)
        bias = hidden @ model.meta_net.linear2.weight.t() + model.meta_net.linear2.bias  # (1, D)
        coop = CoOp(clip, tokens, 3)
        del coop.ctx
        coop.ctx = model.ctx + bias
        single.append(coop(image[None]))
    torch.testing.assert_close(logits, torch.cat(single))
    F.cross_entropy(torch.cat(single), labels).backward()
    expected = gradients(model)
    assert (
        set(found)
        == set(expected)
        == {"ctx"} | {f"meta_net.linear{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
    )
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_cocoop_encodes_no_more_than_a_chunk_at_once(clip, tokens, batch):
    model, sizes = CoCoOp(clip, tokens, 3, chunk=7), []
    clip.ln_final.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    loss, _ = model.loss(*batch)
    assert sizes == [7, 7, 6]
    loss.backward()  # recomputes the chunks instead of keeping them
    assert sorted(sizes[3:]) == [6, 7, 7]


# MaPLe ----------------------------------------------------------------------------------------------------


def hooked_maple(clip, model, images, tokens):
    """The same numbers from a plain CLIP whose blocks are given other tokens by hooks."""
    n, clip = model.context, copy.deepcopy(clip)
    prompts = list(model.compound_prompts_text)
    deeper = [F(p) for F, p in zip(model.compound_prompt_projections, prompts)]

    def replace(block, new, place):
        def hook(module, args, kwargs):
            x = args[0]
            middle = new.expand(len(x), -1, -1)
            return (torch.cat([x[:, :place], middle, x[:, place:][:, n:]], 1), *args[1:]), kwargs

        block.register_forward_pre_hook(hook, with_kwargs=True)

    last = 1 + CONFIG.patches
    first = clip.visual.ln_pre(model.proj(model.ctx))
    for j, new in enumerate([first, *deeper]):
        replace(clip.visual.transformer.resblocks[j], new, last)
    for j, new in enumerate(prompts):
        replace(clip.transformer.resblocks[j + 1], new, 1)
    room = torch.zeros(len(tokens), n, dtype=torch.long)
    whole = torch.cat([tokens[:, :1], room, tokens[:, 1:-n]], 1)
    x = clip.token_embedding(whole)
    x = torch.cat([x[:, :1], model.ctx.expand(len(x), -1, -1), x[:, 1 + n :]], 1)
    text = clip.text_features_of(x, whole.argmax(-1)) @ clip.text_projection
    return clip.pair_logits(clip.encode_image(images), text)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_maple_is_clip_with_its_tokens_replaced(clip, tokens, batch, depth):
    images, labels = batch
    model = randomize(MaPLe(clip, tokens, 2, depth))
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    found = gradients(model)
    model.zero_grad()
    expected = hooked_maple(clip, model, images, tokens)
    torch.testing.assert_close(logits, expected)
    F.cross_entropy(expected, labels).backward()
    expected = gradients(model)
    assert set(found) == set(expected) == set(model.learned())
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_maple_starts_from_words(clip, tokens):
    """Two of the words are learned; the others stay before the class name."""
    rest = rows([[WORDS[2], *name, STOP] for name in NAMES])
    model = MaPLe(clip, rest, 2, 1, words=WORDS[:2])
    whole = rows([[*WORDS, *name, STOP] for name in NAMES])
    expected = F.normalize(clip.encode_text(whole), dim=-1)
    torch.testing.assert_close(model.text_features(model.class_tokens), expected)


def test_maple_refuses_depths_that_the_towers_do_not_have(clip, tokens):
    for depth in (0, 4):
        with pytest.raises(ValueError, match=f"depth {depth}: the towers have 3"):
            MaPLe(clip, tokens, 2, depth)


def test_maple_with_recomputed_blocks_is_the_same(clip, tokens, batch):
    model = randomize(MaPLe(clip, tokens, 2, 3))
    model.loss(*batch)[0].backward()
    expected = gradients(model)
    model.zero_grad()
    clip.set_grad_checkpointing()
    model.loss(*batch)[0].backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name])


# The protocol ---------------------------------------------------------------------------------------------


@pytest.fixture(params=METHODS)
def model(request, clip, tokens):
    torch.manual_seed(4)
    return METHODS[request.param](clip, tokens)


def test_only_prompts_learn(model, batch):
    expected = {
        CoOp: {"ctx"},
        CoCoOp: {"ctx", *(f"meta_net.linear{i}.{n}" for i in (1, 2) for n in ("weight", "bias"))},
        MaPLe: {"ctx", "proj.weight", "proj.bias", *(f"compound_prompts_text.{j}" for j in (0, 1))}
        | {f"compound_prompt_projections.{j}.{n}" for j in (0, 1) for n in ("weight", "bias")},
    }[type(model)]
    assert {k for k, p in model.named_parameters() if p.requires_grad} == expected
    assert set(model.learned()) == expected
    model.loss(*batch)[0].backward()
    assert set(gradients(model)) == expected  # DistributedDataParallel needs a gradient for each


def test_loss_is_the_cross_entropy_of_forward(model, batch):
    images, labels = batch
    logits = model(images)
    assert logits.shape == (5, 4)
    loss, logs = model(images, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    torch.testing.assert_close(logs["accuracy"], (logits.argmax(1) == labels).float().mean())
    assert not logs["accuracy"].requires_grad
    assert torch.equal(model.eval().predict(images), model.train().predict(images))


@pytest.mark.parametrize("name", METHODS)
def test_learns_eight_images_of_two_classes(clip, tokens, name):
    """Two classes: a shared context cannot move four texts of a random tower freely."""
    g = torch.Generator().manual_seed(5)
    labels = torch.arange(8) % 2
    images = torch.randn(2, 3, 16, 16, generator=g)[labels]
    images = images + 0.1 * torch.randn(8, 3, 16, 16, generator=g)
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(100))  # where trained CLIPs end; it is not learned here
    torch.manual_seed(4)
    model = METHODS[name](clip, tokens[:2])
    assert model.loss(images, labels)[0] > 0.2
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    for _ in range(40):
        loss, _ = model.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.loss(images, labels)[0] < 0.05
    assert (model.predict(images).argmax(-1) == labels).all()


def test_scores_classes_never_trained_on(clip, tokens, batch):
    for name in ("coop", "middle", "cocoop", "maple"):
        model = randomize(METHODS[name](clip, tokens))
        new = rows([[30, 31, STOP], [32, 12, 13, 14, 15, STOP]])
        expected = METHODS[name](clip, new)
        expected.load_learned(model.learned())
        own = model.predict(batch[0])
        torch.testing.assert_close(model.predict(batch[0], new), expected.predict(batch[0]))
        assert torch.equal(model.predict(batch[0]), own)
    model = METHODS["csc"](clip, tokens)
    with pytest.raises(ValueError, match="class-specific"):
        model.predict(batch[0], new)


def test_class_features_are_kept_until_something_changes(clip, tokens, batch):
    calls = []
    for name in ("coop", "csc", "maple"):
        model = randomize(METHODS[name](clip, tokens))
        clip.ln_final.register_forward_hook(lambda *args: calls.append(1))
        first = model.predict(batch[0])
        calls.clear()
        assert torch.equal(model.predict(batch[0]), first) and not calls
        with torch.no_grad():
            assert torch.equal(model(batch[0]), clip.scale_logits(first)) and not calls
            model.ctx.copy_(
                model.ctx.flip(-2)
            )  # the sum stays the same, so sums alone would not show the change
        second = model.predict(batch[0])
        assert calls and (second - first).abs().max() > 1e-3
        with torch.no_grad():
            clip.text_projection.add_(torch.randn_like(clip.text_projection))
        assert (model.predict(batch[0]) - second).abs().max() > 1e-3
        # TRAP: with gradients they are computed anew, even directly after a prediction
        assert model(batch[0]).requires_grad


def test_learned_goes_into_another_module_and_nothing_else_does(model, clip, tokens, batch):
    randomize(model)
    state = {k: v.clone() for k, v in model.learned().items()}
    expected = model.predict(batch[0])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    model.load_learned(state)
    assert torch.equal(model.predict(batch[0]), expected)
    with pytest.raises(ValueError, match="extra: .* in the state, absent in this"):
        model.load_learned({**state, "extra": torch.zeros(2)})
    with pytest.raises(ValueError, match="ctx: absent in the state"):
        model.load_learned({k: v for k, v in state.items() if k != "ctx"})
    with pytest.raises(ValueError, match=r"ctx: \(7,\) in the state, \("):
        model.load_learned({**state, "ctx": torch.zeros(7)})
    with pytest.raises(ValueError, match="clip.ln_final.weight"):
        model.load_learned({**state, "clip.ln_final.weight": torch.zeros(24)})


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_finite_differences_in_fp64(clip, tokens, batch, name):
    method = randomize(METHODS[name](clip.double(), tokens))
    images, labels = batch[0].double(), batch[1]
    loss, _ = method.loss(images, labels)
    loss.backward()
    assert loss.dtype == torch.float64
    step, losses = 1e-6, []
    parameters = [p for p in method.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions))
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions):
                p += sign * step * d
        losses.append(method.loss(images, labels)[0].detach())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope, rtol=1e-4, atol=1e-6)


def test_bf16_towers_and_fp32_cosines(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(*batch)
        logits = model(batch[0])
    assert loss.dtype == logits.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss, model.loss(*batch)[0], rtol=0, atol=0.1)


# Mistakes -------------------------------------------------------------------------------------------------


def test_a_name_too_long_for_the_context_is_named(clip, tokens, batch):
    longest = rows([[11, STOP], list(range(1, 12)), [12, STOP]])  # 13 tokens of 16
    assert CoOp(clip, longest, 3)(batch[0]).shape == (5, 3)
    with pytest.raises(ValueError, match="class 1: 13 tokens and a context of 4 do not fit into 16"):
        CoOp(clip, longest, 4)
    with pytest.raises(ValueError, match="class 1: .* 4 do not fit into 16"):
        CoCoOp(clip, tokens, 4).predict(batch[0], longest)
    with pytest.raises(ValueError, match="class 1: 13 tokens and a context of 4 do not fit into 16"):
        CoOp(clip, F.pad(longest, (0, 9)), 4)  # longer rows, but the tower has 16 positions


def test_mistakes_are_named(clip, tokens):
    with pytest.raises(ValueError, match="position 'back': expected end, middle, front"):
        CoOp(clip, tokens, 3, position="back")
    with pytest.raises(ValueError, match="2 words for a context of 3"):
        CoOp(clip, tokens, 3, words=WORDS[:2])
    with pytest.raises(ValueError, match="context 0"):
        CoOp(clip, tokens, 0)
    with pytest.raises(ValueError, match="chunk 0"):
        CoCoOp(clip, tokens, 3, chunk=0)
    with pytest.raises(ValueError, match=r"class_tokens \(16,\)"):
        CoOp(clip, tokens[0], 3)
    with pytest.raises(ValueError, match="needs a CLIP, not a Llip"):
        PromptLearner(Llip(CONFIG, 4, 2), tokens, 3)
