"""llip_tiles.py: the tiled form against the equations of llip.py, in value, gradient and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import losses
from llip import Llip
from model import Config
from scale import llip_tiles as tiles
from scale.llip_tiles import TiledLlip

E = 16
SIZES = Config(E, 16, 8, 24, 1, 2, 48, 8, 50, 20, 1, 2, 40)


def build(M=3, H=2, dtype=torch.float64, **more):
    torch.manual_seed(0)
    return TiledLlip(SIZES, M, H, **{"temperature": 2.0, "bias": -2.0, **more}).to(dtype)


def sides(M, H, images=5, texts=7, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    K = E // H
    shapes = [(images, H, M, K), (images, H, M, K), (texts, H, K), (texts, E)]
    found = [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]
    return found[:2], found[2:]


def plain_logits(model, image_side, text_side):
    return Llip.pair_logits(model, image_side, text_side)


def value_and_gradients(model, image_side, text_side, function):
    leaves = [*image_side, *text_side, model.pred.out_proj, model.logit_scale, model.logit_bias]
    loss = function(model, image_side, text_side)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def plain(model, image_side, text_side):
    return losses.siglip_sum(plain_logits(model, image_side, text_side))


def computed_again(model, image_side, text_side):
    return losses.siglip_sum(model.pair_logits(image_side, text_side))


def tile_by_tile(model, image_side, text_side):
    def part(logits, row, column):
        return losses.siglip_sum(logits, row - column)

    return model.pair_loss(image_side, text_side, part)


FAST = [computed_again, tile_by_tile]
# tokens and heads on either side of the break-even, one of each, and more tokens than the embedding is wide
SHAPES = [(3, 2), (1, 2), (3, 1), (1, 1), (2, 8), (40, 2)]


@pytest.mark.parametrize("which", ["value", "gram"])
@pytest.mark.parametrize("M, H", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_the_plain_form(monkeypatch, M, H, dtype, tolerance, which):
    monkeypatch.setattr(tiles, "tile_form", lambda *a: which)
    monkeypatch.setattr(tiles, "TILE_BYTES", 4_000)
    model, (image_side, text_side) = build(M, H, dtype), sides(M, H, dtype=dtype)
    assert tiles.tile_shape(image_side[0], 7) != (5, 7)  # more tiles than one
    wanted = value_and_gradients(model, image_side, text_side, plain)
    for function in FAST:
        for a, b in zip(value_and_gradients(model, image_side, text_side, function), wanted):
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3), function


@pytest.mark.parametrize("which", ["value", "gram"])
def test_gradcheck(monkeypatch, which):
    """TRAP: x^T S x may be clamped; the derivative is that of the clamped number."""
    monkeypatch.setattr(tiles, "tile_form", lambda *a: which)
    model, (image_side, text_side) = build(2, 2), sides(2, 2, 3, 3)

    def cosines(*inputs):
        return tiles.AllCosines.apply(2.0, *inputs)

    inputs = (*image_side, *text_side, model.pred.out_proj)
    assert torch.autograd.gradcheck(cosines, inputs, fast_mode=True)


@pytest.mark.parametrize("which", ["value", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-15, 0.0])
def test_features_of_almost_no_length(monkeypatch, which, dtype, size):
    """|z| is clamped at 1e-12, in F.normalize and here: nothing becomes inf or NaN, equal to the end."""
    monkeypatch.setattr(tiles, "tile_form", lambda *a: which)
    model, ((keys, values), text_side) = build(3, 2, dtype), sides(3, 2, dtype=dtype)
    image_side = keys, (values.detach() * size).requires_grad_()
    wanted = value_and_gradients(model, image_side, text_side, plain)
    for function in FAST:
        for a, b in zip(value_and_gradients(model, image_side, text_side, function), wanted):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max() + 1e-3))


@pytest.mark.parametrize("left", [1e-1, 1e-2])
def test_values_that_cancel(monkeypatch, left):
    """TRAP: the square of a length rounds by 1 / left^2, the length itself by 1 / left."""
    for which in ("value", "gram"):
        monkeypatch.setattr(tiles, "tile_form", lambda *a, which=which: which)
        model, ((keys, values), text_side) = build(2, 2, torch.float32), sides(2, 2)
        keys, queries, text = (x.detach().float() for x in (keys * 0, *text_side))
        half = values.detach().float()[:, :, :1]
        opposite = torch.cat([half, left * torch.randn_like(half) - half], 2)  # equal weights
        k, v, q, t = (x.double() for x in (keys, opposite, queries, text))
        exact = (plain_logits(build(2, 2, scale=1.0, bias=0.0), (k, v), (q, t))).detach()
        got = tiles.AllCosines.apply(2.0, keys, opposite, queries, text, model.pred.out_proj.detach())
        assert (got - exact).abs().max() < 4 * torch.finfo(torch.float32).eps / left**2


@pytest.mark.parametrize("more", [{"all_tokens": True}, {"norm": True}])
def test_variants_of_the_tower(more):
    model = build(**more)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 48, (6, 8), generator=g)
    ids[:, 6] = 49
    images = torch.randn(4, 3, 16, 16, generator=g, dtype=torch.float64)

    def gradients(function):
        model.zero_grad()
        loss = function(model, *model(images, ids))
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    wanted = gradients(plain)
    for function in FAST:
        for a, b in zip(gradients(function), wanted):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_half_precision_is_made_full():
    """bf16 sides, and an autocast around: products would have three digits."""
    model, (image_side, text_side) = build(dtype=torch.float32), sides(3, 2, dtype=torch.float32)
    image_side, text_side = (
        [x.detach().bfloat16().requires_grad_() for x in side] for side in (image_side, text_side)
    )
    full = [[x.float() for x in side] for side in (image_side, text_side)]
    wanted = plain_logits(model, *full)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.pair_logits(image_side, text_side)
        loss = tile_by_tile(model, image_side, text_side)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(loss, losses.siglip_sum(wanted))
    loss.backward()
    assert image_side[0].grad.dtype == torch.bfloat16


def test_frozen_scale_and_inputs_without_gradient():
    model, (image_side, text_side) = build(), sides(3, 2)
    wanted = value_and_gradients(model, image_side, text_side, plain)
    model.logit_scale.requires_grad_(False)
    image_side = [x.detach() for x in image_side]
    tile_by_tile(model, image_side, text_side).backward()
    assert model.logit_scale.grad is None
    torch.testing.assert_close(text_side[0].grad, wanted[3])
    torch.testing.assert_close(model.logit_bias.grad, wanted[7])
    with torch.no_grad():
        loss = tile_by_tile(model, image_side, text_side)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted[0])


def test_the_gradient_of_a_tiled_loss_is_given_once():
    """TRAP: it is scaled in place, so a second time it would be another number."""
    loss = tile_by_tile(build(), *sides(3, 2))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_the_cheaper_form_is_taken():
    assert tiles.tile_form(256, 32, 8, 512) == "gram"  # 256 < 512
    assert tiles.tile_form(256, 64, 8, 512) == "value"  # as wide, and G_i on top
    assert tiles.tile_form(8, 32, 8, 512) == "value"  # too few captions to pay for G_i


def counted(which, images, texts, M, H, train):
    def run():
        with torch.device("meta"):
            model = build(M, H, torch.float32)
            image_side, text_side = (
                [torch.empty(x.shape, requires_grad=train) for x in side]
                for side in sides(M, H, images, texts)
            )
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            if train:
                tile_by_tile(model, image_side, text_side).backward()
            else:
                model.pair_logits(image_side, text_side)
        return counter.get_total_flops()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "tile_form", lambda *a: which)
        return run()


@pytest.mark.parametrize("which", ["value", "gram"])
@pytest.mark.parametrize("train", [False, True])
def test_flops_equal_torchs_counter(which, train):
    """What the docstring says a pair, an image, a caption and a batch cost."""
    for I, J, M, H in [(3, 5, 3, 2), (4, 2, 5, 4)]:
        assert counted(which, I, J, M, H, train) == tiles.flops(I, J, M, H, E, train, which)


def held_for_backward(function):
    """Bytes that autograd holds after the forward pass, inputs left out."""
    model, (image_side, text_side) = build(), sides(3, 2, 32, 64)
    inputs = {x.untyped_storage().data_ptr() for x in (*image_side, *text_side, *model.parameters())}
    held = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in inputs:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(model, image_side, text_side)
    return sum(held.values())


def test_memory_does_not_grow_with_pairs_times_embedding():
    pairs = 32 * 64 * 8  # bytes of one number for every pair
    assert held_for_backward(plain) > 40 * pairs  # more than 3 E = 48 numbers
    assert held_for_backward(computed_again) < 8 * pairs  # logits and cosines


@pytest.mark.parametrize("function", FAST)
def test_a_tile_is_all_there_is(monkeypatch, function):
    """No tensor of a pass is larger than its inputs, the logits, or the tile's budget."""
    budget, largest = 40_000, [0]
    monkeypatch.setattr(tiles, "TILE_BYTES", budget)
    tile = tiles.tile_cosines

    def watched(keys, values, queries, u, S, by_gram):
        cos = tile(keys, values, queries, u, S, by_gram)
        width = max(keys.shape[1] * keys.shape[2], len(u))
        largest[0] = max(largest[0], cos.numel() * width * 4)
        return cos

    monkeypatch.setattr(tiles, "tile_cosines", watched)
    model, (image_side, text_side) = build(), sides(3, 2, 30, 50)
    function(model, image_side, text_side).backward()
    assert 0 < largest[0] <= budget / 4


def test_unit_text_is_enough():
    """The length of a text feature changes nothing, as with F.normalize."""
    model, (image_side, (queries, text)) = build(), sides(3, 2)
    torch.testing.assert_close(
        model.pair_logits(image_side, (queries, 5 * text)),
        model.pair_logits(image_side, (queries, F.normalize(text, dim=-1))),
    )


def test_auto_takes_the_tiled_form_only_where_the_plain_one_is_large(monkeypatch):
    model = Llip(SIZES, 3, 2)
    assert type(tiles.select(model, "auto", 8, 8)) is Llip
    assert type(tiles.select(model, "tiled", 8, 8)) is TiledLlip
    assert type(tiles.select(model, "auto", 8, 8)) is Llip
    large = tiles.PLAIN_BYTES // tiles.plain_bytes(model, 1, 1) + 1
    assert type(tiles.select(model, "auto", 1, large)) is TiledLlip
    assert type(tiles.select(model, "plain", 1, large)) is Llip
    with pytest.raises(ValueError, match="expected auto, plain or tiled"):
        tiles.select(model, "fast", 1, 1)


def test_without_a_gradient_the_plain_form_takes_captions_in_chunks(monkeypatch):
    model, (image_side, text_side) = Llip(SIZES, 3, 2).double(), sides(3, 2)
    wanted = model.pair_logits(image_side, text_side).detach()
    monkeypatch.setattr("llip.PLAIN_BYTES", 2 * tiles.plain_bytes(model, 5, 1))
    seen, mix = [], model.mix
    monkeypatch.setattr(model, "mix", lambda k, v, q: seen.append(len(q)) or mix(k, v, q))
    with torch.no_grad():
        torch.testing.assert_close(model.pair_logits(image_side, text_side), wanted)
    assert seen == [2, 2, 2, 1]
