"""model.py: exact sizes, OpenAI's names, and every number against a second implementation or a recording."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from losses import info_nce
from model import CLIP, CONFIGS, Config, QuickGELU, group_mean, resize_positions, tower_flops

SMALL = Config(32, 32, 8, 64, 2, 1, 256, 20, 200, 128, 1, 2, 512)  # as in tests/golden/clip_train_step.npz

# Radford et al. 2021 (B, L: OpenAI's files) and open_clip's table for H and bigG
PARAMETERS = {
    "ViT-S-16": 62_257_537,
    "ViT-B-32": 151_277_313,
    "ViT-B-16": 149_620_737,
    "ViT-L-14": 427_616_513,
    "ViT-L-14-336": 427_944_193,
    "ViT-H-14": 986_109_441,
    "ViT-bigG-14": 2_539_567_105,
}


def tokens_for(config, n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, config.vocab_size - 2, (n, config.context_length), generator=g)
    tokens[:, 0] = config.vocab_size - 2
    for i in range(n):
        tokens[i, 4 + i] = config.vocab_size - 1
        tokens[i, 5 + i :] = 0
    return tokens


@pytest.mark.parametrize("name", PARAMETERS)
def test_exact_parameter_counts(name):
    with torch.device("meta"):
        model = CLIP(CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_heads_are_not_width_over_64_everywhere():
    widths = {n: c.vision_width // c.vision_heads for n, c in CONFIGS.items()}
    assert widths["ViT-H-14"] == 80 and widths["ViT-bigG-14"] == 104 and widths["ViT-L-14"] == 64


@pytest.mark.parametrize("name", ["tiny", "ViT-B-32", "ViT-B-16"])
def test_flops_equal_torchs_counter(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        model = CLIP(config)
        for side, count in tower_flops(config).items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                if side == "image":
                    model.encode_image(torch.empty(1, 3, config.image_size, config.image_size))
                else:
                    model.encode_text(torch.zeros(1, config.context_length, dtype=torch.long))
            assert counter.get_total_flops() == count


def test_tower_flops_of_the_recordings():
    """The recordings count the last MLP for every token."""
    image, text = (tower_flops(CONFIGS["ViT-B-16"])["image"], tower_flops(CONFIGS["ViT-B-32"])["text"])
    assert image + 196 * 4 * 768 * 3072 == 35_126_906_880
    assert text + 76 * 4 * 512 * 2048 == 5_959_540_736


@pytest.mark.parametrize("checkpointing", [False, True])
def test_keeping_tokens_before_the_last_mlp_changes_nothing(checkpointing):
    """SPEED: the values and gradients equal those of keep_tokens(forward(x))."""
    torch.manual_seed(0)
    tower = CLIP(SMALL).double().transformer
    x = torch.randn(3, 7, tower.width, dtype=torch.double, requires_grad=True)
    row, end = torch.arange(3), torch.tensor([6, 2, 4])
    tower.grad_checkpointing = checkpointing
    for keep_tokens in (lambda x: x[:, 0], lambda x: x[:, :3], lambda x: x[row, end]):
        results = []
        for y in (tower(x, "causal", keep_tokens), keep_tokens(tower(x, "causal"))):
            weights = torch.linspace(-1, 1, y.numel(), dtype=torch.double).view_as(y)
            results.append((y, *torch.autograd.grad((y * weights).sum(), (x, *tower.parameters()))))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def golden_model(g):
    model = CLIP(SMALL)
    model.load_state_dict({k[2:]: v for k, v in g.items() if k.startswith("w.")})
    return model


def test_official_training_step(golden_arrays):
    """Logits, loss and the recorded gradients of openai/CLIP on random weights."""
    g = golden_arrays("clip_train_step.npz")
    model = golden_model(g)
    logits = model.pair_logits(model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"]))
    loss = info_nce(logits)
    loss.backward()
    torch.testing.assert_close(logits, g["out.logits_per_image"], rtol=1e-4, atol=3e-4)
    torch.testing.assert_close(loss, g["out.loss"], rtol=1e-5, atol=4e-5)
    names = dict(model.named_parameters())
    recorded = [k for k in g if k.startswith("out.grad.")]
    assert len(recorded) > 5
    for key in recorded:
        expected = g[key]
        atol = 1e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(names[key[9:]].grad, expected, rtol=1e-3, atol=max(atol, 6e-5))
    norms = torch.stack([names[name].grad.norm() for name in sorted(names)])
    torch.testing.assert_close(norms, g["out.grad_norms"], rtol=1e-4, atol=2e-4)


def broken_gelu(model):
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
        block.mlp.gelu = nn.GELU()


def broken_eps(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def broken_mask(model):
    run = model.transformer.forward
    model.transformer.forward = lambda x, mask=None, keep_tokens=None: run(x, None, keep_tokens)


def broken_end(model):
    features = model.text_features_of
    model.text_features_of = lambda x, end: features(x, torch.full_like(end, x.shape[1] - 1))


@pytest.mark.parametrize("mutate", [broken_gelu, broken_eps, broken_mask, broken_end])
def test_parity_sees_mutants(golden_arrays, mutate):
    """A comparison of probabilities does not find these errors; a comparison of features must."""
    g = golden_arrays("clip_train_step.npz")
    model, mutant = golden_model(g), golden_model(g)
    mutate(mutant)
    with torch.no_grad():
        worst = max(
            float((getattr(model, f)(g[i]) - getattr(mutant, f)(g[i])).abs().max())
            for f, i in (("encode_image", "in.image"), ("encode_text", "in.tokens"))
        )
        logits = mutant.pair_logits(mutant.encode_image(g["in.image"]), mutant.encode_text(g["in.tokens"]))
    assert worst > 1e-4
    assert not torch.allclose(logits, g["out.logits_per_image"], rtol=1e-4, atol=3e-4)


def test_quick_gelu():
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))


def test_text_after_the_end_token_changes_nothing():
    """The mask is causal, and the features are those of the first end token."""
    model, tokens = CLIP(SMALL), tokens_for(SMALL)
    changed = tokens.clone()
    for i in range(3):
        changed[i, 5 + i :] = 7
    changed[0, 10] = SMALL.vocab_size - 1  # a second end token
    assert torch.equal(model.encode_text(tokens), model.encode_text(changed))
    shorter = model.encode_text(tokens[:, :12])
    torch.testing.assert_close(shorter, model.encode_text(tokens))
    with pytest.raises(ValueError, match="21 tokens.*20"):
        model.encode_text(torch.zeros(1, 21, dtype=torch.long))


def test_pair_logits_and_bias():
    model = CLIP(SMALL, scale=10.0, bias=-3.0)
    image, text = torch.randn(4, 32), torch.randn(5, 32)
    cosine = F.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(model.pair_logits(image, text), 10 * cosine - 3)
    assert CLIP(SMALL).logit_bias is None and "logit_bias" not in CLIP(SMALL).state_dict()
    assert CLIP(SMALL).logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_ensemble_text(golden_arrays):
    g = golden_arrays("clip_benchmark_classifier.npz")
    prompts, model = g["in.prompt_embeddings"], CLIP(SMALL)
    side = model.ensemble_text(prompts, torch.arange(len(prompts)) // 3)
    torch.testing.assert_close(side.t(), g["out.classifier"], rtol=1e-4, atol=3e-6)
    uneven = model.ensemble_text(prompts[:3], torch.tensor([1, 0, 1]))
    torch.testing.assert_close(uneven[0], F.normalize(prompts[1], dim=-1))
    with pytest.raises(ValueError, match="class 1 has no prompt"):
        group_mean(prompts[:2], torch.tensor([0, 2]))


def test_fp64_at_another_resolution():
    model, image = CLIP(SMALL).double(), torch.rand(1, 3, 40, 40, dtype=torch.float64)
    precise = resize_positions(model.visual.positional_embedding, 1, (5, 5))
    rounded = resize_positions(model.visual.positional_embedding.float(), 1, (5, 5))
    assert 0 < (precise - rounded).abs().max() < 1e-6
    assert model.encode_image(image).dtype == torch.float64


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (16, 32), (40, 24)])
def test_other_resolutions_leave_the_parameter_alone(size):
    model = CLIP(SMALL)
    before = model.visual.positional_embedding.clone()
    out = model.visual.embed(torch.randn(2, 3, *size))
    assert out.shape == (2, 1 + size[0] // 8 * (size[1] // 8), 64)
    assert torch.equal(model.visual.positional_embedding, before)
    out.sum().backward()
    assert model.visual.positional_embedding.grad.abs().sum() > 0


def test_resize_positions():
    grid = torch.arange(16.0).view(16, 1).repeat(1, 2)
    positions = torch.cat([torch.full((3, 2), 99.0), grid])
    assert resize_positions(positions, 3, (4, 4)) is positions
    for mode, antialias in (("bicubic", True), ("bilinear", False)):
        out = resize_positions(positions, 3, (8, 2), mode, antialias)
        assert torch.equal(out[:3], positions[:3]) and out.shape == (19, 2)
        reference = F.interpolate(
            grid.t().view(1, 2, 4, 4), (8, 2), mode=mode, align_corners=False, antialias=antialias
        )
        torch.testing.assert_close(out[3:], reference.flatten(2)[0].t())


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = CLIP(SMALL)
        model.set_grad_checkpointing(enabled)
        g = torch.Generator().manual_seed(1)
        sides = model(torch.randn(3, 3, 32, 32, generator=g), tokens_for(SMALL))
        info_nce(model.pair_logits(*sides)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_initialization_statistics():
    torch.manual_seed(0)
    c = Config(64, 64, 8, 128, 2, 2, 512, 32, 4000, 96, 3, 2, 384)
    model = CLIP(c)
    block = model.transformer.resblocks[0]
    for parameter, std in [
        (model.token_embedding.weight, 0.02),
        (model.positional_embedding, 0.01),
        (block.attn.in_proj_weight, 96**-0.5),
        (block.attn.out_proj.weight, (2 * 3 * 96) ** -0.5),
        (block.mlp.c_fc.weight, (2 * 96) ** -0.5),
        (block.mlp.c_proj.weight, (2 * 3 * 96) ** -0.5),
        (model.visual.positional_embedding, 128**-0.5),
        (model.visual.proj, 128**-0.5),
        (model.text_projection, 96**-0.5),
        (model.visual.transformer.resblocks[0].attn.in_proj_weight, (2 / (4 * 128)) ** 0.5),
    ]:
        assert parameter.std().item() == pytest.approx(std, rel=0.05)
    assert all(torch.isfinite(p).all() for p in model.parameters())
