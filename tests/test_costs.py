"""What the docstrings say a method costs: FLOPs as torch counts them, and numbers that learn."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import surgery
from alignclip import AlignCLIP
from attention import flops as attention_flops
from clipood import FLYP, FineTune
from model import CLIP, CONFIGS, Config, tower_flops
from prompt_learning import CoCoOp, CoOp, MaPLe
from tes import TeS

CONFIG = Config(32, 16, 4, 24, 4, 2, 40, 20, 50, 16, 3, 2, 56)
C, B, E, P = 5, 6, CONFIG.embed_dim, CONFIG.patches
WIDE, D, F_ = CONFIG.vision_width, CONFIG.text_width, CONFIG.vision_mlp
IMAGE = tower_flops(CONFIG)["image"]
LABELS = torch.tensor([0, 1, 1, 3, 4, 4])


def counted(run) -> int:
    """The fused kernel of the CPU is not counted, plain products are."""
    kernel, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with torch.no_grad(), kernel, counter:
        run()
    return counter.get_total_flops()


def text_flops(length: int) -> int:
    """The text tower on so many tokens."""
    return tower_flops(replace(CONFIG, context_length=length))["text"]


def learned(method) -> int:
    return sum(p.numel() for p in method.parameters() if p.requires_grad)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP(CONFIG)


@pytest.fixture
def batch():
    return torch.rand(B, 3, 16, 16), LABELS


@pytest.fixture
def tokens():
    """Prompts of 7 tokens in rows of 12."""
    ids = torch.randint(1, 48, (C, 7))
    ids[:, 0], ids[:, 6] = 48, 49
    return F.pad(ids, (0, 5))


def unit_text():
    return F.normalize(torch.randn(C, E), dim=-1)


def test_finetune_and_tes(clip, batch):
    method = FineTune(clip, unit_text(), margin=0.3)
    assert counted(lambda: method.loss(*batch)) == B * (IMAGE + 2 * C * E)
    assert learned(method) == sum(p.numel() for p in clip.visual.parameters())
    method = TeS(clip, unit_text())
    assert counted(lambda: method.loss(*batch)) == B * (
        IMAGE + 2 * C * WIDE + 2 * WIDE**2 + 4 * C * E
    )
    heads = C * (WIDE + 1) + WIDE**2 + 3 * WIDE + E * (WIDE + 1)
    assert learned(method) == sum(p.numel() for p in clip.visual.parameters()) - WIDE * E + heads


def test_flyp_encodes_the_classes_of_the_batch(clip, batch, tokens):
    method, U = FLYP(clip, tokens), len(LABELS.unique())
    cost = counted(lambda: method.loss(*batch))
    assert cost == B * IMAGE + U * text_flops(12) + 2 * B * B * E
    assert learned(method) == sum(p.numel() for p in clip.parameters())


def test_coop_and_cocoop(clip, batch, tokens):
    method, n = CoOp(clip, tokens, 3), 3
    assert counted(lambda: method(batch[0])) == B * IMAGE + C * text_flops(n + 7) + 2 * B * C * E
    assert learned(method) == n * D
    method, h = CoCoOp(clip, tokens, n), E // 16
    assert counted(lambda: method(batch[0])) == B * IMAGE + B * C * text_flops(
        n + 7
    ) + 2 * B * h * (E + D)
    assert learned(method) == n * D + h * (E + D) + h + D


@pytest.mark.parametrize("depth", [1, 3])
def test_maple(clip, batch, tokens, depth):
    method, n = MaPLe(clip, tokens, 2, depth), 2
    image = tower_flops(CONFIG, tokens=1 + n, used=1)["image"]
    both = B * image + C * text_flops(n + 7) + 2 * B * C * E
    assert counted(lambda: method(batch[0])) == both + depth * 2 * n * D * WIDE
    assert learned(method) == depth * (n * D + D * WIDE + WIDE)


@pytest.mark.parametrize("method", surgery.METHODS)
def test_dense_features(clip, batch, method):
    L, depth, two = 1 + P, CONFIG.vision_layers, 2
    mix, square = 4 * L * L * WIDE, 2 * L * WIDE**2
    plain = depth * (attention_flops("qkv", L, WIDE, 2) + L * 4 * WIDE * F_)
    plain += 2 * P * WIDE * 3 * CONFIG.patch_size**2 + 2 * L * WIDE * E
    more = {
        "surgery": two * (square + mix),
        "alignclip": two * square,
        "gem": two * (square + 6 * mix),
        "sclip": mix,
        "maskclip": -2 * square - mix,
        "clearclip": -square - 4 * L * WIDE * F_,
    }
    blocks = {"blocks": two} if method in surgery.TWO_PATHS else {}
    found = []
    cost = counted(
        lambda: found.append(surgery.dense_features(clip.visual, batch[0], method, **blocks))
    )
    assert cost == B * (plain + more[method])
    assert found[0].nbytes == B * 4 * L * E


def test_alignclips_docstring_on_the_papers_tower():
    c = CONFIGS["ViT-B-16"]
    plain, dv, vvv = (
        bench.counted_flops(partial(bench.finetune_case, kind, "ViT-B-16", 1, update=False))
        for kind in ("", "dv", "vvv")
    )
    last = 3 * c.patches * 4 * c.vision_width * c.vision_mlp  # both passes
    found = [100 * x / plain for x in (dv - plain, vvv - plain, last)]
    assert found == pytest.approx([10.7, 12.9, 5.6], abs=0.05)
    assert "10.7 % more" in AlignCLIP.__doc__ and "12.9 % with vvv" in AlignCLIP.__doc__
    assert "5.6 are" in AlignCLIP.__doc__
