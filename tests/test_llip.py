"""llip.py: official values and gradients, double loops, memory, and what the method promises."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llip
from clipood import unit
from llip import Llip, PooledTokens
from losses import info_nce, siglip
from model import CLIP, CONFIGS, Config
from scale import llip_tiles as tiles

SIZES = Config(16, 16, 8, 24, 2, 2, 48, 8, 50, 20, 1, 2, 40)


def tokens(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 48, (n, 8), generator=g)
    ids[:, 0], ids[:, 6] = 48, 49
    return ids


def images(n, seed=0):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(M=3, H=2, seed=0, **more):
    torch.manual_seed(seed)
    return Llip(SIZES, M, H, **{"temperature": 2.0, "bias": -2.0, **more}).double()


def golden_config(path):
    name = path.name.removesuffix(".npz")
    return {
        # embed, image, patch, vision (width, layers, heads, mlp), context, vocabulary, text (...)
        "llip_k4": Config(32, 32, 8, 64, 2, 2, 256, 16, 150, 64, 2, 2, 256),
        "llip_k8": Config(40, 24, 8, 64, 2, 4, 256, 12, 120, 48, 2, 3, 192),
        "llip_k4_alltokens": Config(32, 24, 8, 64, 2, 2, 256, 12, 120, 64, 1, 2, 256),
        "llip_k8_norm": Config(32, 32, 16, 64, 2, 2, 256, 12, 120, 48, 2, 2, 192),
        "llip_zeroshot": Config(32, 32, 8, 64, 2, 2, 256, 16, 150, 64, 2, 2, 256),
        "llip_baseline_avg": Config(32, 24, 8, 48, 2, 3, 192, 12, 120, 48, 1, 3, 192),
        "llip_baseline_register": Config(32, 24, 8, 48, 2, 3, 192, 12, 120, 48, 1, 3, 192),
    }[name]


def close(got, expected):
    atol = 2e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=atol)


def gradient_norms(model):
    """The norm of every gradient, in the alphabetical order of the names."""
    return torch.stack([p.grad.norm() for _, p in sorted(model.named_parameters())])


@pytest.mark.parametrize(
    "name, options",
    [
        ("llip_k4", {"mixture_tokens": 4}),
        ("llip_k8", {"mixture_tokens": 8}),
        ("llip_k4_alltokens", {"mixture_tokens": 4, "all_tokens": True}),
        ("llip_k8_norm", {"mixture_tokens": 8, "norm": True}),
    ],
)
def test_official_values_and_gradients(golden, golden_arrays, name, options):
    path = golden(name + ".npz")
    g = golden_arrays(name + ".npz")
    model = Llip(golden_config(path), heads=4, **options)
    model.load_state_dict({k[2:]: v for k, v in g.items() if k.startswith("w.")})
    image_side, text_side = model.encode_image(g["in.image"]), model.encode_text(g["in.tokens_all"])
    for key, got in zip(("K", "V", "Q", "zt"), (*image_side, *text_side)):
        close(got, g["out." + key])
    names = dict(model.named_parameters())
    for tau in (1, 5):
        model.temperature = float(tau)
        close(model.mix(*image_side, text_side[0]), g[f"out.pred_ws{tau}"])
        close(model.pair_logits(image_side, text_side), g[f"out.logits_ws{tau}"])
        model.zero_grad()
        loss = siglip(model.pair_logits(model.encode_image(g["in.image"]), model.encode_text(g["in.tokens"])))
        loss.backward()
        close(loss, g[f"out.loss_ws{tau}"])
        recorded = [k for k in g if k.startswith(f"out.grad_ws{tau}.")]
        assert recorded
        for key in recorded:
            close(names[key.split(".", 2)[2]].grad, g[key])
        close(gradient_norms(model), g[f"out.grad_norms_ws{tau}"])


@pytest.mark.parametrize("name, pooling", [("avg", "average"), ("register", "register")])
def test_official_baselines(golden, golden_arrays, name, pooling):
    name = f"llip_baseline_{name}.npz"
    g = golden_arrays(name)
    model = PooledTokens(golden_config(golden(name)), 4, pooling)
    model.load_state_dict({k[2:]: v for k, v in g.items() if k.startswith("w.")})
    names = dict(model.named_parameters())
    for loss_name, function in (("siglip", siglip), ("clip", info_nce)):
        model.zero_grad()
        sides = model(g["in.image"], g["in.tokens"])
        close(sides[0], g["out.encode_image"])
        close(unit(sides[0]), g["out.image_features"])
        close(unit(sides[1]), g["out.text_features"])
        loss = function(model.pair_logits(*sides))
        loss.backward()
        close(loss, g[f"out.{loss_name}.loss"])
        for key in (k for k in g if k.startswith(f"out.{loss_name}.grad.")):
            close(names[key.split(".grad.")[1]].grad, g[key])
        close(gradient_norms(model), g[f"out.{loss_name}.grad_norms"])
    tokens = llip.mixture_tokens(model.visual, g["in.image"])
    close(llip.project_each(tokens, model.visual.proj), g["out.visual"])


def test_a_register_is_one_projection_and_no_parameter_is_without_gradient():
    """DDP fails on a parameter without one, so the projections of the other tokens have zeros."""
    model = PooledTokens(SIZES, 3, "register").double()
    x = llip.mixture_tokens(model.visual, images(2))
    torch.testing.assert_close(model.encode_image(images(2)), (x @ model.visual.proj[0])[:, 0])
    siglip(model.pair_logits(*model(images(2), tokens(2)))).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None]
    used = grads["visual.proj"].abs().amax((1, 2))
    assert used[0] > 0 and not used[1:].any()


def test_official_zero_shot(golden, golden_arrays):
    g = golden_arrays("llip_zeroshot.npz")
    model = Llip(golden_config(golden("llip_zeroshot.npz")), 4, 4)
    model.load_state_dict({k[2:]: v for k, v in g.items() if k.startswith("w.")})
    classes = model.ensemble_text(model.encode_text(g["in.text_rows"]), g["in.row_class"])
    close(classes[0], g["out.Q"])
    close(classes[1], g["out.text_features"])


def test_equals_a_double_loop():
    """Equations 1 to 3, one image, caption and head at a time."""
    model = build()
    keys, values = model.encode_image(images(4))
    queries, text = model.encode_text(tokens(5))
    logits = model.pair_logits((keys, values), (queries, text))
    for i in range(4):
        for j in range(5):
            heads = []
            for m in range(2):
                scores = torch.stack([queries[j, m] @ keys[i, m, k] / 2.0 for k in range(3)])
                phi = torch.exp(scores) / torch.exp(scores).sum()
                heads.append(sum(phi[k] * values[i, m, k] for k in range(3)))
            z = torch.cat(heads) @ model.pred.out_proj
            cosine = z @ text[j] / (z.norm() * text[j].norm())
            torch.testing.assert_close(logits[i, j], 10 * cosine - 2)


def test_gradcheck_of_the_pooling():
    model = build()
    sides = *model.encode_image(images(2)), *model.encode_text(tokens(2))
    leaves = [x.detach().requires_grad_() for x in sides]
    loss = lambda k, v, q, t: siglip(model.pair_logits((k, v), (q, t)))  # noqa: E731
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("budget", [1, 5000, 20000])
def test_chunks_are_exact(monkeypatch, budget):
    def run():
        model = build()
        logits = model.pair_logits(model.encode_image(images(6)), model.encode_text(tokens(7)))
        logits.square().sum().backward()
        return logits, [p.grad for p in model.parameters()]

    whole = run()
    monkeypatch.setattr(tiles, "TILE_BYTES", budget)
    chunked = run()
    torch.testing.assert_close(chunked[0], whole[0])
    for a, b in zip(chunked[1], whole[1]):
        torch.testing.assert_close(a, b)


def test_the_caption_chooses():
    """The image side does not know the caption; the mixed feature does."""
    model = build()
    side = model.encode_image(images(2))
    queries, _ = model.encode_text(tokens(3))
    phi = model.mixing_weights(side[0], queries)
    torch.testing.assert_close(phi.sum(-1), torch.ones(2, 3, 2, dtype=torch.float64))
    z = model.mix(*side, queries)
    assert (z[:, 0] - z[:, 1]).abs().max() > 1e-3


def test_larger_temperature_is_softer():
    model = build()
    side, (queries, _) = model.encode_image(images(2)), model.encode_text(tokens(3))
    entropy = []
    for model.temperature in (0.5, 2.0, 50.0):
        phi = model.mixing_weights(side[0], queries)
        entropy.append(-(phi * phi.log()).sum(-1).mean().item())
    assert entropy == sorted(entropy)


def test_no_scaling_but_the_temperature():
    """TRAP for porters: no 1/sqrt(K) besides tau."""
    model = build()
    keys, _ = model.encode_image(images(1))
    queries, _ = model.encode_text(tokens(1))
    expected = (torch.einsum("hmk,hk->hm", keys[0], queries[0]) / 2.0).softmax(-1)
    torch.testing.assert_close(model.mixing_weights(keys, queries)[0, 0], expected)


def test_queries_come_from_the_feature_before_projection():
    model = build()
    model.text_projection.data.zero_()
    queries, text = model.encode_text(tokens(2))
    assert queries.abs().sum() > 0 and text.abs().sum() == 0


def test_one_mixture_token_is_a_plain_projection():
    model = build(M=1)
    keys, values = model.encode_image(images(3))
    queries, _ = model.encode_text(tokens(4))
    expected = values.transpose(1, 2).flatten(2) @ model.pred.out_proj  # (B, 1, E)
    torch.testing.assert_close(model.mix(keys, values, queries), expected.expand(-1, 4, -1))


def test_learned_pooling_is_llip_with_one_query_for_all():
    torch.manual_seed(0)
    model = PooledTokens(SIZES, 3, "learned", heads=2, temperature=2.0).double()
    twin = build()
    state = {k: v for k, v in model.state_dict().items() if k not in ("query", "visual.proj")}
    twin.load_state_dict(state | {"v_proj": model.visual.proj, "q_proj": twin.q_proj})
    z = twin.mix(*twin.encode_image(images(4)), model.query.view(1, 2, -1))[:, 0]
    torch.testing.assert_close(model.encode_image(images(4)), z)
    with pytest.raises(ValueError, match="pooling 'max'"):
        PooledTokens(SIZES, 3, "max")


def test_parameter_counts_of_the_paper():
    """Official code on the meta device: per-token projections are a quarter of Llip B/32's parameters."""
    counts = {}
    for name, M, more in [
        ("ViT-B-32", 32, {}),
        ("ViT-B-32", 64, {}),
        ("ViT-B-32", 128, {}),
        ("ViT-B-16", 32, {}),
        ("ViT-L-14", 32, {}),
        ("ViT-H-14", 64, {"norm": True}),
        ("ViT-bigG-14", 64, {"norm": True}),
    ]:
        with torch.device("meta"):
            model = Llip(CONFIGS[name], M, 8, **more)
        counts[f"{name} {M}"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert list(counts.values()) == [176.6, 201.8, 252.3, 175.0, 478.4, 1154.8, 2813.6]


def test_flops_equal_torchs_counter():
    """On the meta device: torch does not count the CPU's fused attention kernel."""
    expected = llip.flops(SIZES, 3, prompts=5, all_tokens=True)
    with torch.device("meta"), torch.no_grad():
        model = Llip(SIZES, 3, 2, all_tokens=True)
        image_side, text_side = model(torch.empty(1, 3, 16, 16), torch.zeros(5, 8, dtype=torch.long))
        for name, run in [
            ("image", lambda: model.encode_image(torch.empty(1, 3, 16, 16))),
            ("text", lambda: model.encode_text(torch.zeros(1, 8, dtype=torch.long))),
            ("pairs", lambda: model.mix(*image_side, text_side[0])),
        ]:
            with FlopCounterMode(display=False) as counter:
                run()
            assert counter.get_total_flops() == expected[name]


def test_flops_of_the_recordings(golden):
    recorded = json.loads(golden("flops.json").read_text())["llip ViT-B-16-quickgelu-siglip-ncls:32"]
    counted = llip.flops(CONFIGS["ViT-B-16"], 32, prompts=1000)
    patches = 196 * 4 * 768 * 3072  # there through the last MLP too
    total = recorded["encode_image_total (tower + K and V projections)"]
    assert counted["image"] + patches == total
    assert counted["pairs"] == recorded["cross_attention_per_image_for_T_texts"]["1000"]["total"]


def test_heads_must_divide():
    with pytest.raises(ValueError, match="16 is not divisible by 3 heads"):
        Llip(SIZES, 4, 3)


def some_clip(config=SIZES):
    torch.manual_seed(0)
    clip = CLIP(config).eval()
    with torch.no_grad():
        for parameter in clip.parameters():  # no zeros or ones that could be taken for each other
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return clip


def test_one_token_is_clip_exactly():
    clip = some_clip()
    model = llip.warm_start_llip(clip, 1, 2, noise=0.0).eval()
    pixels, ids = images(3).float(), tokens(3)
    with torch.no_grad():
        keys, values = model.encode_image(pixels)
        queries, text = model.encode_text(ids)
        z = model.mix(keys, values, queries)
        torch.testing.assert_close(text, clip.encode_text(ids))
        torch.testing.assert_close(z, clip.encode_image(pixels)[:, None].expand_as(z))
    assert model.logit_scale == clip.logit_scale and model.logit_bias == -10


@pytest.mark.parametrize("norm, near", [(False, 0.95), (True, 0.8)])  # LayerNorm takes the mean out
def test_several_tokens_are_near_clip(norm, near):
    clip = some_clip(replace(SIZES, embed_dim=24, image_size=48, vision_width=192, vision_mlp=384))
    model = llip.warm_start_llip(clip, 4, 3, norm=norm, scale=5.0, bias=-1.0)
    pixels, ids = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1)), tokens(3)
    with torch.no_grad():
        keys, values = model.encode_image(pixels)
        queries, _ = model.encode_text(ids)
        z = model.mix(keys, values, queries)
        cosine = torch.cosine_similarity(z, clip.encode_image(pixels)[:, None], dim=-1)
    assert cosine.min() > near, cosine
    assert torch.isclose(model.logit_scale.exp(), torch.tensor(5.0)) and model.logit_bias == -1
    assert (values.std(2) > 1e-4).all(), "equal tokens would stay equal for ever"
    again = llip.warm_start_llip(clip, 4, 3, norm=norm)
    assert torch.equal(again.q_proj, model.q_proj), "seeded"
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[k], v) for k, v in clip.state_dict().items()), "no shared memory"
    with pytest.raises(ValueError, match="takes a CLIP"):
        llip.warm_start_llip(model, 4, 3)
