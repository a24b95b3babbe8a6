"""alignclip.py: the official losses, one set of weights for two paths, and inference that is plain CLIP."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from alignclip import BRANCHES, AlignCLIP, cls_attention, guidance, two_paths
from attention import attend, flops
from clipood import FineTune, unit
from evals.surgery import dense_features
from losses import attention_alignment, similarity_alignment, smoothing_targets, soft_cross_entropy
from model import CLIP, Config

CONFIG = Config(16, 16, 4, 32, 4, 2, 64, 12, 40, 16, 2, 2, 32)  # 4 blocks, 16 patches


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP(CONFIG)


@pytest.fixture
def text():
    return F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(2)
    return torch.randn(6, 3, 16, 16, generator=g), torch.tensor([0, 3, 1, 0, 4, 2])


def gradients(clip, loss):
    clip.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in clip.visual.named_parameters() if p.grad is not None}


def plain_twin(visual, images, kind, first_dual_block, layers):
    """Both paths without sharing anything: attention called twice, weights taken whole."""
    x, z, weights = visual.embed(images), None, []
    for i, block in enumerate(visual.transformer.resblocks):
        if i == first_dual_block:
            z = x
        if i >= first_dual_block:
            z = z + block.attn(block.ln_1(x), kind)
        attn, x = block.attn(block.ln_1(x), need_weights=True)[1], block(x)
        if i < layers:
            weights.append(attn.mean(1))
    return x, z, weights


# ------------------------------------------------------------------------------- the two distributions


def test_cls_attention_by_hand():
    layers = [torch.tensor([[[0.6, 0.3, 0.1]]]), torch.tensor([[[0.0, 0.2, 0.8]]])]
    torch.testing.assert_close(cls_attention(layers), torch.tensor([[0.475, 0.525]]))


def test_cls_attention_reads_the_class_tokens_row_only():
    maps = [torch.rand(2, 10, 10).softmax(-1) for _ in range(3)]
    whole = cls_attention(maps)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2))
    assert torch.equal(whole, cls_attention([m[:, :1] for m in maps]))


def test_guidance_is_the_labels_map():
    maps, labels = torch.randn(3, 9, 4), torch.tensor([2, 0, 3])
    for temperature in (1.0, 0.1):
        g = guidance(maps, labels, temperature)
        torch.testing.assert_close(g.sum(-1), torch.ones(3))
        for b, y in enumerate(labels):
            torch.testing.assert_close(g[b], (maps[b, :, y] / temperature).softmax(0))


def test_guidance_is_nearly_uniform_at_temperature_one():
    """Cosines of 196 patches that differ by 0.03: KL to uniform 0.0005 nats, 2.9 at 0.01."""
    maps = 0.03 * torch.randn(500, 196, 1, generator=torch.Generator().manual_seed(0))
    even, label = torch.full((500, 196), 1 / 196), torch.zeros(500, dtype=torch.long)
    for temperature, nats in ((1.0, 0.00045), (0.1, 0.045), (0.01, 2.88)):
        kl = attention_alignment(even, guidance(maps, label, temperature))
        assert float(kl) == pytest.approx(nats, rel=0.05)


def test_alignment_vanishes_only_where_attention_equals_guidance():
    attn = torch.rand(4, 9).softmax(-1)
    assert abs(attention_alignment(attn, attn).item()) < 1e-6
    assert attention_alignment(attn, attn.flip(-1)).item() > 1e-3


# ------------------------------------------------------------------------------------- official values


def test_alignment_losses_are_the_official_ones(golden_arrays):
    g = golden_arrays("alignclip_aal.npz")
    rows, guide = g["in.cls_attention_rows"], g["in.similarity_fs"]
    rows.requires_grad_(), guide.requires_grad_()
    loss = attention_alignment(cls_attention(list(rows[:5, :, None])), guidance(guide, g["in.labels"]))
    loss.backward()
    torch.testing.assert_close(loss, g["out.attention.loss"], rtol=1e-4, atol=1e-6)
    expected = g["out.attention.grad_cls_rows"]
    torch.testing.assert_close(rows.grad, expected, rtol=1e-4, atol=4e-6)
    expected = g["out.attention.grad_similarity_fs"]  # the target is not detached
    torch.testing.assert_close(guide.grad, expected, rtol=1e-4, atol=7e-8)
    plain, guide = (g[k].clone().detach().requires_grad_() for k in ("in.similarity_f", "in.similarity_fs"))
    loss = similarity_alignment(plain, guide)  # all classes
    loss.backward()
    torch.testing.assert_close(loss, g["out.similarity.loss"], rtol=1e-4, atol=3e-6)
    expected = g["out.similarity.grad_similarity_f"]
    torch.testing.assert_close(plain.grad, expected, rtol=1e-4, atol=3e-8)
    expected = g["out.similarity.grad_similarity_fs"]
    torch.testing.assert_close(guide.grad, expected, rtol=1e-4, atol=7e-8)


def method_of(embed, scale, text, **options):
    return AlignCLIP(CLIP(Config(embed, 8, 4, 8, 2, 2, 8, 8, 16, 8, 1, 2, 8), scale), text, **options)


def test_released_smoothing_targets(golden_arrays):
    g = golden_arrays("alignclip_sls.npz")
    text, D = g["out.text_features"], g["out.distribution"]
    torch.testing.assert_close(unit(g["in.text_features_raw"]), text, rtol=1e-4, atol=2e-6)
    method = method_of(24, 100.0, text, smoothing="released", epsilon=0.5)
    off = ~torch.eye(len(D), dtype=torch.bool)
    torch.testing.assert_close(method.targets[off], D[off], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(method.targets.diagonal(), torch.full((len(D),), 0.5))
    for epsilon in (0.9, 1.0, 0.5):
        logits = g["in.logits"].clone().requires_grad_()
        targets = smoothing_targets(text, epsilon, form="released")[g["in.labels"]]
        loss = soft_cross_entropy(logits, targets)
        loss.backward()
        torch.testing.assert_close(loss, g[f"out.eps{epsilon}.loss"], rtol=1e-4, atol=5e-6)
        expected = g[f"out.eps{epsilon}.grad_logits"]
        torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=3e-7)


@pytest.mark.parametrize("weight", [10, 1])
def test_one_step_of_the_official_loop(golden_arrays, weight):
    """engine.train from token features on: every loss, and the gradient of their sum."""
    g = golden_arrays("alignclip_total.npz")
    text = F.normalize(g["in.text_features_raw"], dim=-1)
    method = method_of(12, 100.0, text, smoothing="released", similarity="all", weight=weight)
    leaves = [g[k].clone().requires_grad_() for k in ("in.f", "in.f_s", "in.cls_attention_rows")]
    (f, f_s, rows), labels = leaves, g["in.labels"]
    image = unit(f)
    classification, _ = method.classification(image[:, 0], labels)
    parts = method.alignment(image[:, 1:], unit(f_s[:, 1:]), list(rows[:5, :, None]), labels)
    total = classification + weight * (parts["attention"] + parts["similarity"])
    total.backward()
    got = {
        "cls_loss": classification,
        "attention_align_loss": parts["attention"],
        "similarity_align_loss": parts["similarity"],
        "total_loss": total,
        "grad_f": f.grad,
        "grad_f_s": f_s.grad,
        "grad_cls_rows": rows.grad,
    }
    for name, value in got.items():
        expected = g[f"out.w{weight}.{name}"]
        atol = {"cls_loss": 2e-4, "total_loss": 2e-4, "grad_f_s": 3e-7}.get(name, 4e-5)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("kind, recorded", [("dv", "tokens_dv6"), ("vvv", "tokens_vv6")])
def test_branch_is_the_one_of_clip_surgery(golden_arrays, kind, recorded):
    """CLIP Surgery's modified tower with six dual blocks of eight; its mask_clip line is D-V."""
    weights, g = golden_arrays("dense_clip_weights.npz"), golden_arrays("surgery.npz")
    visual = CLIP(Config(32, 40, 8, 64, 8, 4, 256, 77, 64, 64, 2, 2, 256)).visual
    prefix = "w.visual."
    visual.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})
    with torch.no_grad():
        x, z, _ = two_paths(visual, visual.embed(g["in.image"]), kind, first_dual_block=2, layers=0)
        expected = g["out." + recorded]
        torch.testing.assert_close(visual.head(z[:, 1:]), expected[:, 1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(visual.head(x[:, 0]), expected[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(visual.head(x), g["out.tokens_original"], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ two paths


@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("first_dual_block, layers", [(2, 2), (0, 4), (3, 1)])
def test_shared_values_equal_two_plain_passes(clip, batch, kind, first_dual_block, layers):
    images, visual = batch[0], clip.visual
    x, z, rows = two_paths(visual, visual.embed(images), kind, first_dual_block, layers)
    x1, z1, weights = plain_twin(visual, images, kind, first_dual_block, layers)
    torch.testing.assert_close(x, x1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z, z1, rtol=1e-5, atol=1e-5)
    assert len(rows) == len(weights) == layers
    for row, whole in zip(rows, weights):
        torch.testing.assert_close(row, whole[:, :1], rtol=1e-5, atol=1e-6)

    def scalar(z, weights):
        return (visual.head(z) ** 2).sum() + cls_attention(weights).log().sum()

    got, expected = gradients(clip, scalar(z, rows)), gradients(clip, scalar(z1, weights))
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-3, msg=name)


def test_dv_branch_in_closed_form(clip, batch):
    """z = x + sum_l W_o (W_v LN1(x) + b_v) + b_o: a fixed linear map of each token, in float64."""
    visual, D = clip.visual.double(), 32
    images, streams = batch[0].double(), []
    x = visual.embed(images)
    for block in visual.transformer.resblocks:
        streams.append(x)
        x = block(x)
    expected = streams[2]
    for block, x in list(zip(visual.transformer.resblocks, streams))[2:]:
        attn = block.attn
        fused = attn.out_proj.weight @ attn.in_proj_weight[2 * D :]  # (D, D)
        shift = attn.out_proj.weight @ attn.in_proj_bias[2 * D :] + attn.out_proj.bias
        expected = expected + block.ln_1(x) @ fused.t() + shift
    z = two_paths(visual, visual.embed(images), "dv", 2, 1)[1]
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)


def test_dv_branch_is_attention_under_an_identity_mask(clip, batch):
    visual, images = clip.visual, batch[0]
    x, z, _ = two_paths(visual, visual.embed(images), "dv", 3, 1)
    block, before = visual.transformer.resblocks[3], visual.embed(images)
    for earlier in visual.transformer.resblocks[:3]:
        before = earlier(before)
    q, k, v = block.attn.project(block.ln_1(before), "qkv")
    mask = torch.full((17, 17), float("-inf")).fill_diagonal_(0.0)
    y, attn = attend(q, k, v, "qkv", mask, need_weights=True)
    assert torch.equal(y, v) and torch.equal(attn[0, 0], torch.eye(17))
    torch.testing.assert_close(z, before + block.attn.merge(y), rtol=1e-6, atol=1e-6)


def test_recomputing_blocks_changes_nothing(clip, text, batch):
    method = AlignCLIP(clip, text)
    loss, _ = method(*batch)
    expected = gradients(clip, loss)
    clip.set_grad_checkpointing(True)
    passes = []
    clip.visual.transformer.resblocks[2].ln_1.register_forward_hook(lambda *_: passes.append(1))
    again, _ = method(*batch)
    assert torch.equal(loss, again)
    for name, grad in gradients(clip, again).items():
        torch.testing.assert_close(grad, expected[name], msg=name)
    assert len(passes) == 2  # once more in the backward pass


def test_gradient_of_the_attention_alignment_path():
    """From pixels, and from the first queries and keys, through both branches to KL(G || A), float64."""
    torch.manual_seed(0)
    visual = CLIP(Config(4, 6, 2, 4, 2, 2, 8, 8, 16, 8, 1, 2, 8)).visual.double()
    images = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    names = F.normalize(torch.randn(3, 4, dtype=torch.float64), dim=-1)
    labels, weight = torch.tensor([1]), visual.transformer.resblocks[0].attn.in_proj_weight

    def loss(images, _):
        _, z, rows = two_paths(visual, visual.embed(images), "dv", 1, 2)
        maps = F.normalize(visual.head(z[:, 1:]), dim=-1) @ names.t()
        g, a = guidance(maps, labels, 0.1), cls_attention(rows)
        kl = (g * (g.log() - a.log())).sum()
        torch.testing.assert_close(attention_alignment(a, g).double(), kl, rtol=1e-4, atol=1e-5)
        return kl

    assert torch.autograd.gradcheck(loss, (images, weight), atol=1e-6)


# ------------------------------------------------------------------------------------------ the method


@pytest.mark.parametrize("similarity", ["label", "all"])
@pytest.mark.parametrize("name", ["class_embedding", "transformer.resblocks.0.attn.in_proj_bias"])
def test_gradcheck_of_the_loss(clip, text, batch, name, similarity):
    """The gradient of the whole loss equals finite differences, in fp64."""
    method = AlignCLIP(clip.double(), text.double(), similarity=similarity)
    images, labels = batch[0].double(), batch[1]
    parameter = clip.visual.get_parameter(name).detach().clone().requires_grad_()

    def loss(x):
        return functional_call(method, {f"clip.visual.{name}": x}, (images, labels))[0]

    assert loss(parameter).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, parameter)


def test_loss_is_the_sum_of_its_parts(clip, text, batch):
    """The whole objective from the plain twin and the formulas of losses.py."""
    (images, labels), visual = batch, clip.visual
    method = AlignCLIP(clip, text, guidance_temperature=0.1, weight=3.0)
    loss, logs = method(images, labels)
    x, z, weights = plain_twin(visual, images, "dv", method.first_dual_block, method.layers)
    image, guide = unit(visual.head(x)), unit(visual.head(z))
    maps, guides = image[:, 1:] @ text.t(), guide[:, 1:] @ text.t()
    expected = {
        "classification": FineTune(clip, text, margin=0.3, smoothing="mixture").loss(*batch)[0],
        "attention": attention_alignment(cls_attention(weights), guidance(guides, labels, 0.1)),
        "similarity": similarity_alignment(maps, guides, labels),
    }
    for name, value in expected.items():
        torch.testing.assert_close(logs[name], value, rtol=1e-4, atol=1e-6)
        assert not logs[name].requires_grad
    total = expected["classification"] + 3 * (expected["attention"] + expected["similarity"])
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-6)
    got, reference = gradients(clip, loss), gradients(clip, total)
    for name, grad in reference.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_similarity_of_all_classes_is_another_loss(clip, text, batch):
    """REF of the released code: all C maps are summed, not the label's alone."""
    value = {s: AlignCLIP(clip, text, similarity=s)(*batch)[1] for s in ("label", "all")}
    x, z, _ = two_paths(clip.visual, clip.visual.embed(batch[0]), "dv", 1, 0)
    maps, guides = (unit(clip.visual.head(t[:, 1:])) @ text.t() for t in (x, z))
    expected = similarity_alignment(maps, guides)
    torch.testing.assert_close(value["all"]["similarity"], expected, rtol=1e-4, atol=1e-6)
    assert 2 < float(value["all"]["similarity"] / value["label"]["similarity"]) < 10
    torch.testing.assert_close(value["all"]["attention"], value["label"]["attention"])
    assert "similarity" not in AlignCLIP(clip, text, similarity="none")(*batch)[1]
    assert "attention" not in AlignCLIP(clip, text, attention=False)(*batch)[1]


def test_without_alignment_it_is_clipood(clip, text, batch):
    off = AlignCLIP(clip, text, attention=False, similarity="none", smoothing="none")
    clipood = FineTune(clip, text, margin=0.3)
    assert torch.equal(off(*batch)[0], clipood(*batch)[0])


@pytest.mark.parametrize("branch", BRANCHES)
def test_inference_is_plain_clip(clip, text, batch, branch):
    names = {k: v.shape for k, v in clip.state_dict().items()}
    features = clip.encode_image(batch[0])
    method = AlignCLIP(clip, text, branch=branch)
    assert torch.equal(clip.encode_image(batch[0]), features)
    assert torch.equal(method.predict(batch[0]), FineTune(clip, text).predict(batch[0]))
    method(*batch)[0].backward()  # nor does a training pass leave anything behind
    assert torch.equal(clip.encode_image(batch[0]), features)
    assert {k: v.shape for k, v in clip.state_dict().items()} == names
    assert {k: v.shape for k, v in method.state_dict().items()} == {
        "clip." + k: shape for k, shape in names.items()
    }
    plain = clip.visual.transformer(clip.visual.embed(batch[0]))
    assert torch.equal(two_paths(clip.visual, clip.visual.embed(batch[0]), branch, 2, 4)[0], plain)


def test_every_trained_weight_exists_before_the_first_step(clip, text, batch):
    """CLIP Surgery converts its blocks lazily, behind the optimiser's back."""
    method = AlignCLIP(clip, text)
    before = {k: id(p) for k, p in method.named_parameters() if p.requires_grad}
    method(*batch)[0].backward()
    after = {k: id(p) for k, p in method.named_parameters() if p.grad is not None}
    assert before == after and all(k.startswith("clip.visual.") for k in before)


def test_options_have_an_effect(clip, text, batch):
    changes = (
        {"guidance_temperature": 0.05},
        {"weight": 1.0},
        {"branch": "vvv"},
        {"branch": "qqv"},
        {"branch": "kkv"},
        {"first_dual_block": 2},
        {"layers": 2},
        {"margin": 0.1},
        {"epsilon": 0.5},
        {"scale": 5.0},
        {"similarity": "all"},
        {"similarity": "none"},
        {"attention": False},
        {"smoothing": "released"},
        {"smoothing": "uniform"},
        {"smoothing": "none"},
    )
    # scale 2: these five texts are far apart, at 35 no class would share its mass with another
    base, _ = AlignCLIP(clip, text, scale=2.0)(*batch)
    for change in changes:
        loss, _ = AlignCLIP(clip, text, **{"scale": 2.0, **change})(*batch)
        assert abs(loss.item() - base.item()) > 1e-6, change


def test_detach_stops_the_branchs_gradient_and_nothing_else(clip, text, batch):
    loss, _ = AlignCLIP(clip, text)(*batch)
    full = gradients(clip, loss)
    detached, _ = AlignCLIP(clip, text, detach=True)(*batch)
    assert torch.equal(loss, detached)
    stopped = gradients(clip, detached)
    assert any(not torch.allclose(full[k], stopped[k], rtol=1e-3) for k in full)


def test_alignment_reaches_the_attention_of_the_first_layers(clip, text, batch):
    """With a detached guide AAL moves queries and keys of the aligned blocks, and no later block."""
    method = AlignCLIP(clip, text, layers=2, similarity="none", detach=True, guidance_temperature=0.1)
    _, z, rows = two_paths(clip.visual, clip.visual.embed(batch[0]), "dv", 2, 2)
    guide = unit(clip.visual.head(z[:, 1:]))
    loss = method.alignment(guide, guide, rows, batch[1])["attention"]
    grads = gradients(clip, loss)
    for i in range(4):
        name = f"transformer.resblocks.{i}.attn.in_proj_weight"
        if i < 2:
            queries_keys = grads[name][:64]
            assert queries_keys.abs().max() > 1e-7, name
        else:
            assert name not in grads


def test_cost_of_the_branch_in_flops(clip, text, batch):
    """dv adds one output projection per dual block to CLIPood, vvv two token mixings more.

    And the patches of the last block, whose MLP CLIPood applies to the class token alone.
    """
    images, labels = batch

    def cost(method):
        # the fused kernel of the CPU is not counted, plain products are
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            method.loss(images, labels)
        return counter.get_total_flops()

    plain, (B, L, D, E) = cost(FineTune(clip, text, margin=0.3)), (6, 17, 32, 16)
    rows = 2 * 2 * L * D  # one aligned block, the class token's query only
    heads = 2 * 2 * (L - 1) * D * E  # the patches of both paths
    maps = 2 * 2 * (L - 1) * E
    last = (L - 1) * 2 * 2 * D * clip.config.vision_mlp
    dv = B * (3 * 2 * L * D * D + rows + heads + maps + last)  # three dual blocks of four
    assert cost(AlignCLIP(clip, text)) - plain == dv
    assert cost(AlignCLIP(clip, text, attention=False)) - plain == dv - B * rows
    mixing = 3 * B * flops("vvv", L, D, 2, projections=False)
    assert cost(AlignCLIP(clip, text, branch="vvv")) - plain == dv + mixing
    assert cost(AlignCLIP(clip, text, attention=False, similarity="none")) == plain


def test_defaults_are_the_papers_for_twelve_blocks(text):
    config = Config(16, 8, 4, 8, 12, 2, 8, 8, 16, 8, 1, 2, 8)
    method = AlignCLIP(CLIP(config), text)
    assert (method.first_dual_block, method.layers, method.weight) == (6, 5, 10.0)


@pytest.mark.parametrize("depth, first", [(1, 0), (3, 1), (4, 1), (12, 6), (24, 18)])
def test_maps_show_the_branch_that_was_trained(text, depth, first):
    """The default branch is the last six blocks in a deep tower too, the one that surgery.py draws."""
    torch.manual_seed(0)
    clip = CLIP(Config(16, 8, 4, 8, depth, 2, 8, 8, 16, 8, 1, 2, 8))
    method, images = AlignCLIP(clip, text), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        _, z, _ = two_paths(clip.visual, clip.visual.embed(images), "dv", method.first_dual_block, 0)
        drawn = dense_features(clip.visual, images, "alignclip")
        torch.testing.assert_close(clip.visual.head(z)[:, 1:], drawn[:, 1:])
    assert method.first_dual_block == first


def test_user_mistakes(clip, text):
    wrong = (
        ({"branch": "qkv"}, "branch"),
        ({"similarity": "mean"}, "similarity"),
        ({"first_dual_block": 4}, "4 blocks"),
        ({"layers": 5}, "4 blocks"),
        ({"layers": 0}, "4 blocks"),
        ({"smoothing": "soft"}, "form"),
    )
    for options, words in wrong:
        with pytest.raises(ValueError, match=words):
            AlignCLIP(clip, text, **options)


def test_autocast_keeps_losses_in_full_precision(clip, text, batch):
    method = AlignCLIP(clip, text)
    image, guide = unit(torch.randn(6, 16, 16)), unit(torch.randn(6, 16, 16))
    rows = [torch.rand(6, 1, 17).softmax(-1)]
    expected, before = method.alignment(image, guide, rows, batch[1]), method.loss(*batch)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, (loss, after) = method.alignment(image, guide, rows, batch[1]), method(*batch)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert loss.dtype == torch.float32
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0.1, atol=1e-3)


def test_learns_eight_images_by_heart(clip, text):
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    method = AlignCLIP(clip, text)
    optimizer = torch.optim.AdamW(clip.visual.parameters(), 2e-3)
    first = method(images, labels)[1]
    for _ in range(40):
        optimizer.zero_grad()
        loss, logs = method(images, labels)
        loss.backward()
        optimizer.step()
    assert (method.predict(images).argmax(-1) == labels).all()
    assert logs["attention"] < first["attention"] and logs["similarity"] < first["similarity"]
