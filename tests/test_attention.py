"""attention.py: the fused kernel against the formula, every structure, and FLOPs against torch's counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attention import KINDS, MultiheadAttention, attend, flops


def qkv(L=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, L, 4, generator=g, dtype=torch.float64) for _ in range(3))


def causal(L):
    return torch.ones(L, L, dtype=torch.bool).tril()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [None, "bool", "float", "causal"])
def test_kernel_equals_formula(kind, masked):
    q, k, v = qkv()
    mask = None if masked is None else causal(7)
    if masked == "causal":
        mask = masked
    if masked == "float":
        mask = torch.zeros(7, 7, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    fused = attend(q, k, v, kind, mask)
    y, weights = attend(q, k, v, kind, mask, need_weights=True)
    torch.testing.assert_close(fused, y)
    torch.testing.assert_close(weights @ v, y)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    if masked:
        assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("kind, a, b", [("qkv", 0, 1), ("vvv", 2, 2), ("qqv", 0, 0), ("kkv", 1, 1)])
def test_each_kind_is_its_formula(kind, a, b):
    x = list(qkv())
    expected = torch.zeros_like(x[2])
    for n in range(2):
        for h in range(3):
            scores = x[a][n, h] @ x[b][n, h].t() / 4**0.5
            expected[n, h] = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True) @ x[2][n, h]
    torch.testing.assert_close(attend(*x, kind), expected)


def test_dv_is_identity_mask_attention_bit_for_bit():
    q, k, v = (x.float() for x in qkv())
    mask = torch.full((7, 7), float("-inf")).fill_diagonal_(0.0)
    weights = (q @ k.transpose(-2, -1) + mask).softmax(-1)
    assert torch.equal(weights @ v, attend(None, None, v, "dv"))
    y, eye = attend(None, None, v, "dv", need_weights=True)
    assert torch.equal(eye @ v, y) and torch.equal(y, v)


def test_unknown_kind():
    with pytest.raises(ValueError, match="'vv'.*qkv, vvv, qqv, kkv, dv"):
        attend(*qkv(), "vv")
    with pytest.raises(ValueError, match="'casual': expected a tensor or causal"):
        attend(*qkv(), mask="casual")


def test_equals_torch_multihead_attention():
    """The same parameter names and the same numbers, weights included."""
    torch.manual_seed(0)
    layer, reference = MultiheadAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 24)
    expected, weights = reference(x, x, x, average_attn_weights=False)
    y, attn = layer(x, need_weights=True)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attn, weights, atol=1e-6, rtol=1e-5)
    blocked = ~causal(9)
    expected = reference(x, x, x, attn_mask=blocked, need_weights=False)[0]
    torch.testing.assert_close(layer(x, mask=~blocked), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_share_the_weights(kind):
    """A kind computes only the projections that it uses; they are slices of one in_proj_weight."""
    torch.manual_seed(0)
    layer = MultiheadAttention(24, 3).double()
    nn.init.normal_(layer.in_proj_bias)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = layer.project(x, "qkv")
    torch.testing.assert_close(layer(x, kind), layer.merge(attend(q, k, v, kind)))
    layer(x, kind).sum().backward()
    used = {"qkv": "qkv", "vvv": "v", "qqv": "qv", "kkv": "kv", "dv": "v"}[kind]
    for name, grad in zip("qkv", layer.in_proj_weight.grad.chunk(3)):
        assert bool(grad.abs().sum() > 0) == (name in used)


def test_width_must_divide():
    with pytest.raises(ValueError, match="width 10 is not divisible by 3"):
        MultiheadAttention(10, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_equal_torchs_counter(kind):
    L, D, H = 11, 32, 4
    layer, x = MultiheadAttention(D, H), torch.randn(1, L, 32)
    with FlopCounterMode(display=False) as counter:
        layer(x, kind, need_weights=True)
    count = counter.get_total_flops()
    if kind == "dv":
        assert count == flops(kind, L, D, H) == 2 * 2 * L * D * D
    assert count == flops(kind, L, D, H)
    assert flops(kind, L, D, H, projections=False) == (0 if kind == "dv" else 4 * L * L * D)


def test_the_rebuttals_numbers():
    """ViT-B/16: 0.46478 GFLOPs is D-V with its projections; V-V-V costs 1.26 times that, not 1549 times."""
    assert flops("dv", 197, 768, 12) == 464_781_312
    assert flops("vvv", 197, 768, 12) / flops("dv", 197, 768, 12) == pytest.approx(1.2565, abs=1e-4)
