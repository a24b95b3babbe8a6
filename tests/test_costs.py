"""The costs in docstrings: FLOPs as torch counts them, trained parameters, and bytes that autograd keeps."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import losses
from alignclip import AlignCLIP
from attention import flops as attention_flops
from baselines.cocoop import CoCoOp
from baselines.coop import CoOp
from baselines.flyp import FLYP
from baselines.maple import MaPLe
from baselines.tes import TeS
from clipood import FineTune
from evals import surgery
from lab import bench
from llip import Llip, PooledTokens
from model import CLIP, CONFIGS, Config, tower_flops
from scale.gradcache import parts_of

CONFIG = Config(32, 16, 4, 24, 4, 2, 40, 20, 50, 16, 3, 2, 56)
C, B, E, P = 5, 6, CONFIG.embed_dim, CONFIG.patches
WIDE, D, F_ = CONFIG.vision_width, CONFIG.text_width, CONFIG.vision_mlp
IMAGE = tower_flops(CONFIG)["image"]
LABELS = torch.tensor([0, 1, 1, 3, 4, 4])


def counted(run) -> int:
    """FLOPs of run(). The counter does not see the fused attention kernel of the CPU, so it is disabled."""
    kernel, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with torch.no_grad(), kernel, counter:
        run()
    return counter.get_total_flops()


def text_flops(length: int) -> int:
    """FLOPs of the text tower for `length` tokens."""
    return tower_flops(replace(CONFIG, context_length=length))["text"]


def trained(method) -> int:
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
    assert trained(method) == sum(p.numel() for p in clip.visual.parameters())
    method = TeS(clip, unit_text())
    assert counted(lambda: method.loss(*batch)) == B * (IMAGE + 2 * C * WIDE + 2 * WIDE**2 + 4 * C * E)
    heads = C * (WIDE + 1) + WIDE**2 + 3 * WIDE + E * (WIDE + 1)
    assert trained(method) == sum(p.numel() for p in clip.visual.parameters()) - WIDE * E + heads


def test_flyp_encodes_the_classes_of_the_batch(clip, batch, tokens):
    """Each class is encoded once, without padding."""
    method, U = FLYP(clip, tokens), len(LABELS.unique())
    cost = counted(lambda: method.loss(*batch))
    assert cost == B * IMAGE + U * text_flops(7) + 2 * B * B * E
    assert trained(method) == sum(p.numel() for p in clip.parameters())


def test_coop_and_cocoop(clip, batch, tokens):
    method, n = CoOp(clip, tokens, 3), 3
    assert counted(lambda: method(batch[0])) == B * IMAGE + C * text_flops(n + 7) + 2 * B * C * E
    assert trained(method) == n * D
    method, h = CoCoOp(clip, tokens, n), E // 16
    assert counted(lambda: method(batch[0])) == B * IMAGE + B * C * text_flops(n + 7) + 2 * B * h * (E + D)
    assert trained(method) == n * D + h * (E + D) + h + D


@pytest.mark.parametrize("depth", [1, 3])
def test_maple(clip, batch, tokens, depth):
    method, n = MaPLe(clip, tokens, 2, depth), 2
    image = tower_flops(CONFIG, tokens=1 + n, used=1)["image"]
    both = B * image + C * text_flops(n + 7) + 2 * B * C * E
    assert counted(lambda: method(batch[0])) == both + depth * 2 * n * D * WIDE
    assert trained(method) == depth * (n * D + D * WIDE + WIDE)


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
    blocks = {"blocks": two} if surgery.METHODS[method].branch else {}
    found = []
    cost = counted(lambda: found.append(surgery.dense_features(clip.visual, batch[0], method, **blocks)))
    assert cost == B * (plain + more[method])
    assert found[0].nbytes == B * 4 * L * E


def test_alignclips_docstring_on_the_papers_tower():
    c = CONFIGS["ViT-B-16"]
    step = partial(bench.finetune_case, name="ViT-B-16", batch=1, device="cpu", update=False)
    arms = ("clipood", {}), ("alignclip", {}), ("alignclip", {"branch": "vvv"})
    plain, dv, vvv = (counted(torch.enable_grad()(step(kind, **flags))) for kind, flags in arms)
    last = 3 * c.patches * 4 * c.vision_width * c.vision_mlp  # both passes
    found = [100 * x / plain for x in (dv - plain, vvv - plain, last)]
    assert found == pytest.approx([10.7, 12.9, 5.6], abs=0.05)
    assert "10.7 % more" in AlignCLIP.__doc__ and "12.9 % with vvv" in AlignCLIP.__doc__
    assert "5.6 % are the last MLP on the patches" in AlignCLIP.__doc__


def test_losses_that_multiply(batch):
    text, image = unit_text(), F.normalize(torch.randn(B, E), dim=-1)
    margin = counted(lambda: losses.margin_metric_logits(image, text, LABELS, 10.0))
    assert margin == 2 * B * C * E
    assert counted(lambda: losses.smoothing_targets(text)) == 2 * C**2 * E
    assert losses.smoothing_targets(text).nbytes == 4 * C**2


@pytest.mark.parametrize("pooling", ["register", "average", "learned"])
def test_pooled_tokens(batch, pooling):
    M = 3
    model, each = PooledTokens(CONFIG, M, pooling, heads=2), 2 * WIDE * E
    more = {"register": (1 - M) * each, "average": 0, "learned": M * each + 4 * M * E + 2 * E**2}
    image = tower_flops(CONFIG, M)["image"] + more[pooling]
    assert counted(lambda: model.encode_image(batch[0])) == B * image


def kept(function, *inputs) -> int:
    """Bytes that autograd keeps until the backward pass, without the inputs."""
    ignored, storages = {x.untyped_storage().data_ptr() for x in inputs}, {}

    def pack(x):
        storage = x.untyped_storage()
        # keeping x prevents another tensor from getting the same address
        if storage.data_ptr() not in ignored:
            storages[storage.data_ptr()] = x, storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        function(*inputs)
    return sum(size for _, size in storages.values())


def leaf(*shape, dtype=torch.float32):
    return torch.rand(*shape, dtype=dtype).requires_grad_()


G = 30
KEPT = {
    "info_nce": (losses.info_nce, [leaf(B, G), leaf(B, G)], 8 * B * G),
    "siglip": (losses.siglip, [leaf(B, G)], 0),
    "siglip in bf16": (losses.siglip, [leaf(B, G, dtype=torch.bfloat16)], 4 * B * G),
    "soft": (losses.soft_cross_entropy, [leaf(B, C), torch.rand(B, C)], 4 * B * C),
    "attention": (losses.attention_alignment, [leaf(B, P), leaf(B, P)], 8 * B * P),
    "maps": (losses.similarity_alignment, [leaf(B, P, C), leaf(B, P, C)], 16 * B * P * C),
    "map": (losses.similarity_alignment, [leaf(B, P, C), leaf(B, P, C), LABELS], 16 * B * P),
}


@pytest.mark.parametrize("name", KEPT)
def test_bytes_that_a_loss_keeps(name):
    function, inputs, expected = KEPT[name]
    labels_and_scalars = 8 * B + 16
    assert expected <= kept(function, *inputs) <= expected + labels_and_scalars


def test_features_that_gradcache_keeps(clip, batch, tokens):
    """GradCache keeps 3 times 4 bytes per number: 24 B E for CLIP, 24 B E (M + 1) for Llip."""
    M = 3
    for model, numbers in [(clip, 2 * B * E), (Llip(CONFIG, M, 2), 2 * B * E * (M + 1))]:
        sides = model(batch[0], tokens[LABELS])
        assert sum(x.numel() for side in sides for x in parts_of(side)) == numbers
