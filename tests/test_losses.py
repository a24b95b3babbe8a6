"""losses.py: official recordings, double loops in fp64, gradient checks, and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import (
    attention_alignment,
    info_nce,
    margin_metric_logits,
    siglip,
    siglip_sum,
    similarity_alignment,
    smoothing_targets,
    soft_cross_entropy,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


def leaf(x):
    return x.clone().requires_grad_()


def info_nce_loop(s):
    n, total = len(s), 0
    for i in range(n):
        rows = sum(torch.exp(s[i, j]) for j in range(n))
        columns = sum(torch.exp(s[j, i]) for j in range(n))
        total = total - torch.log(torch.exp(s[i, i]) / rows) - torch.log(torch.exp(s[i, i]) / columns)
    return total / (2 * n)


def siglip_loop(s):
    total = 0
    for i in range(len(s)):
        for j in range(len(s)):
            total = total - torch.log(1 / (1 + torch.exp(-s[i, j] if i == j else s[i, j])))
    return total / len(s)


@pytest.mark.parametrize("loss, loop", [(info_nce, info_nce_loop), (siglip, siglip_loop)])
def test_equals_a_double_loop(loss, loop):
    a, b = leaf(random(6, 6)), leaf(random(6, 6))
    x, y = loss(a), loop(b)
    torch.testing.assert_close(x, y)
    x.backward(), y.backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("loss", [info_nce, siglip])
def test_gradcheck(loss):
    assert torch.autograd.gradcheck(loss, leaf(random(4, 4)))


def test_gradcheck_of_the_fine_tuning_losses():
    a, g = leaf(random(3, 5).softmax(-1)), leaf(random(3, 5, seed=1).softmax(-1))
    assert torch.autograd.gradcheck(attention_alignment, (a, g))
    p, q, y = leaf(random(2, 4, 3)), leaf(random(2, 4, 3, seed=1)), torch.tensor([2, 0])
    assert torch.autograd.gradcheck(similarity_alignment, (p, q))
    assert torch.autograd.gradcheck(lambda a, b: similarity_alignment(a, b, y), (p, q))
    text = unit(3, 8)
    targets = smoothing_targets(text)[torch.tensor([0, 2])]
    assert torch.autograd.gradcheck(lambda z: soft_cross_entropy(z, targets), leaf(random(2, 3)))
    for form in ("mixture", "released", "uniform", "none"):
        assert smoothing_targets(text, form=form).dtype == torch.float64


@pytest.mark.parametrize("name", ["openclip_losses_a.npz", "openclip_losses_b.npz"])
@pytest.mark.parametrize("case", ["clip", "clip_with_bias", "siglip", "siglip_nobias", "siglip_chunk"])
def test_official_values_and_gradients(golden_arrays, name, case):
    g = golden_arrays(name)
    x = {k: leaf(g["in." + k]) for k in ("image_features", "text_features", "logit_scale", "logit_bias")}
    logits = x["logit_scale"] * x["image_features"] @ x["text_features"].t()
    if case in ("clip_with_bias", "siglip", "siglip_chunk"):
        logits = logits + x["logit_bias"]
    if case == "siglip_chunk":  # blocks of three columns
        blocks = [siglip_sum(logits[:, j : j + 3], -j) for j in range(0, len(logits), 3)]
        loss = sum(blocks) / len(logits)
    else:
        loss = (info_nce if case.startswith("clip") else siglip)(logits)
    loss.backward()
    torch.testing.assert_close(loss, g[f"out.{case}.loss"], rtol=1e-5, atol=1e-5)
    for key in (k for k in g if k.startswith(f"out.{case}.grad.")):
        torch.testing.assert_close(x[key.split(".grad.")[1]].grad, g[key], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_equal_features_give_ln_n_at_any_scale(n):
    for scale in (1.0, 100.0):
        assert info_nce(torch.full((n, n), scale)) == pytest.approx(math.log(n), rel=1e-6)


def test_orthonormal_pairs():
    n, s = 8, 3.0
    assert info_nce(s * torch.eye(n)) == pytest.approx(math.log(1 + (n - 1) * math.exp(-s)), rel=1e-6)


def test_siglip_at_its_start():
    n, softplus = 8, lambda x: math.log1p(math.exp(x))
    expected = softplus(10) + (n - 1) * softplus(-10)
    assert siglip(torch.full((n, n), -10.0)) == pytest.approx(expected, rel=1e-6)


def test_siglip_far_from_zero_is_finite():
    logits = 100 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert math.isfinite(siglip(logits)) and math.isfinite(info_nce(logits))
    half = logits.bfloat16()
    assert siglip(half).dtype == info_nce(half).dtype == torch.float32  # fp32 inside


@pytest.mark.parametrize("cuts", [(0, 2, 6), (0, 1, 3, 6)])
def test_blocks_of_rows_add_up(cuts):
    """Local rows, global columns: the mean of block losses, weighted by rows, is the batch loss."""
    s = random(6, 6)
    for loss in (info_nce, siglip):
        total = 0
        for a, b in zip(cuts, cuts[1:]):
            other = (s.t()[a:b],) if loss is info_nce else ()
            total = total + (b - a) / 6 * loss(s[a:b], *other, offset=a)
        torch.testing.assert_close(total, loss(s))


def test_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="not square: logits_t is needed"):
        info_nce(random(2, 6))
    with pytest.raises(ValueError, match="2 rows from column 5 do not fit into 6 columns"):
        siglip(random(2, 6), offset=5)


def test_margin_is_added_to_the_other_classes():
    """Subtracting the label's text feature equals adding margin * (1 - cos) to the other classes."""
    image, text, y = unit(5, 8), unit(4, 8, seed=1), torch.tensor([0, 3, 1, 1, 2])
    cosine = image @ text.t()
    added = 30.0 * (cosine + 0.3 * (1 - text[y] @ text.t()))
    a = F.cross_entropy(margin_metric_logits(image, text, y, 30.0, 0.3), y)
    torch.testing.assert_close(a, F.cross_entropy(added, y))
    torch.testing.assert_close(margin_metric_logits(image, text, y, 30.0, 0.0), 30.0 * cosine)


def test_smoothing_forms():
    # text features of class names are similar to each other; random unit vectors would not be smoothed
    text, eps = F.normalize(unit(1, 8) + 0.3 * unit(5, 8, seed=1), dim=-1).float(), 0.8
    D = torch.stack([torch.exp(35 * text @ t) / torch.exp(35 * text @ t).sum() for t in text])
    eye = torch.eye(5)
    make = lambda form, e=eps: smoothing_targets(text, e, form=form)  # noqa: E731
    torch.testing.assert_close(make("mixture"), eps * eye + (1 - eps) * D)
    torch.testing.assert_close(make("released"), eps * eye + (1 - eye) * D)
    torch.testing.assert_close(make("uniform"), eps * eye + (1 - eps) / 5)
    assert torch.equal(make("none"), eye) and torch.equal(make("mixture", 1.0), eye)
    torch.testing.assert_close(make("mixture").sum(-1), torch.ones(5))
    # eps = 1 still smooths in the released form
    assert not torch.allclose(make("released", 1.0), eye)
    with pytest.raises(ValueError, match="epsilon 1.5"):
        make("mixture", 1.5)
    with pytest.raises(ValueError, match="form 'soft'"):
        make("soft")


def test_alignment_is_zero_only_where_equal():
    a, b = random(3, 5).softmax(-1), random(3, 5, seed=1).softmax(-1)
    assert attention_alignment(a, a) == pytest.approx(0, abs=1e-12)
    expected = sum(float(q * (q / p).log()) for p, q in zip(a.flatten(), b.flatten())) / 3
    assert attention_alignment(a, b) == pytest.approx(expected) and expected > 0
    one_hot = torch.eye(5)[:3]
    assert math.isfinite(attention_alignment(one_hot, b.float()))  # an attention of exactly 0


def test_similarity_of_one_class_is_the_labels_map():
    p, q, y = random(2, 4, 3), random(2, 4, 3, seed=1), torch.tensor([2, 0])
    rows = torch.arange(2)
    own = similarity_alignment(p[rows, :, y][..., None], q[rows, :, y][..., None])
    torch.testing.assert_close(similarity_alignment(p, q, y), own)
    every = sum(similarity_alignment(p, q, torch.full((2,), c)) for c in range(3))
    torch.testing.assert_close(similarity_alignment(p, q), every)
