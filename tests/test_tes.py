"""baselines/tes.py: the official loss and gradients, an oracle, and the method's protocol."""

import math

import pytest
import torch
import torch.nn.functional as F

from baselines import tes
from baselines.tes import TeS, tes_loss
from clipood import Classes
from llip import Llip
from losses import smoothing_targets, soft_cross_entropy
from model import CLIP, Config

CONFIG = Config(16, 16, 4, 32, 2, 2, 64, 12, 40, 16, 2, 2, 32)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP(CONFIG)


@pytest.fixture
def text():
    return F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(2)
    images, labels = torch.randn(8, 3, 16, 16, generator=g), torch.arange(8) % 4
    images[torch.arange(8), labels % 3] += 2.0 * (1 + labels // 3)[:, None, None]
    return images, labels


def test_loss_and_gradients_are_the_official_ones(golden_arrays):
    g = golden_arrays("tes_loss.npz")
    logits, projected = (g[k].requires_grad_() for k in ("in.x", "in.x_proj"))
    loss = tes_loss(logits, projected, g["in.text_features"], g["in.target"])
    loss.backward()
    torch.testing.assert_close(loss, g["out.loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.grad, g["out.grad_x"], rtol=1e-4, atol=5e-7)
    torch.testing.assert_close(projected.grad, g["out.grad_x_proj"], rtol=1e-4, atol=2e-5)


def sample(seed=3):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=g, dtype=torch.float64)
    projected = F.normalize(torch.randn(5, 6, generator=g, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(4, 6, generator=g, dtype=torch.float64), dim=-1)
    return logits, projected, text, torch.tensor([0, 3, 1, 1, 2])


def test_loss_is_its_double_sum():
    logits, projected, text, labels = sample()
    tau, v, t = 0.5, 0.3, 0.7
    total = 0.0
    for o, h, y in zip(logits, projected, labels.tolist()):
        s = [float(h @ T) / tau for T in text]
        norm = math.log(sum(math.exp(x) for x in s))
        names = [math.exp(x - norm) for x in s]
        own = [x - math.log(sum(math.exp(float(z)) for z in o)) for x in o.tolist()]
        for c in range(4):
            total -= (v * names[c] + (1 - v) * (c == y)) * own[c]
        total -= t * (s[y] - norm)
    found = tes_loss(logits, projected, text, labels, tau, v, t)
    assert float(found) == pytest.approx(total / 5, rel=1e-9)


def test_gradcheck():
    logits, projected, text, labels = sample()
    # the target has no gradient on purpose: with lambda_v = 0 the rest must be exact in both arguments
    arguments = logits.requires_grad_(), projected.requires_grad_()
    assert torch.autograd.gradcheck(lambda o, h: tes_loss(o, h, text, labels, 0.5, 0.0), arguments)


def test_the_target_is_a_constant():
    """TRAP: the projection learns from its own term only, whatever lambda_v is."""
    grads = []
    for v in (0.0, 0.9):
        logits, projected, text, labels = sample()
        projected.requires_grad_()
        tes_loss(logits, projected, text, labels, 0.5, v).backward()
        grads.append(projected.grad)
    assert torch.equal(*grads)


def test_zero_weights_are_cross_entropy():
    logits, projected, text, labels = sample()
    loss = tes_loss(logits, projected, text, labels, lambda_v=0.0, lambda_t=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


def test_where_every_image_is_its_name_the_target_is_slss():
    """h = T_y: the instance's target becomes row y of the mixture, with scale 1 / tau."""
    logits, _, text, labels = sample()
    targets = smoothing_targets(text, epsilon=0.8, scale=1 / 0.5)
    found = tes_loss(logits, text[labels], text, labels, 0.5, lambda_v=0.2, lambda_t=0.0)
    torch.testing.assert_close(found.float(), soft_cross_entropy(logits, targets[labels]).float())


def test_method_is_the_loss_of_its_two_heads(clip, text, batch):
    images, labels = batch
    method = TeS(clip, text, tau=0.1, lambda_v=0.3, lambda_t=0.5)
    x = []
    clip.visual.ln_post.register_forward_hook(lambda module, args, out: x.append(out))
    loss, logs = method(images, labels)
    projected = F.normalize(method.projection(x[0]), dim=-1)
    expected = tes_loss(method.classifier(x[0]), projected, text, labels, 0.1, 0.3, 0.5)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(method.predict(images), method.classifier(x[0]))
    found = (method.classifier(x[0]).argmax(-1) == labels).float().mean()
    torch.testing.assert_close(logs["accuracy"], found)
    assert x[0].shape == (8, 32)  # the class token before CLIP's projection
    clip_feature = clip.encode_image(images)
    torch.testing.assert_close(clip_feature, x[0] @ clip.visual.proj)


def test_only_the_image_tower_and_the_heads_learn(clip, text, batch):
    method = TeS(clip, text)
    method.loss(*batch)[0].backward()
    learned = {k for k, p in method.named_parameters() if p.requires_grad}
    assert learned == {k for k, p in method.named_parameters() if p.grad is not None}
    heads = {k for k in learned if not k.startswith("clip.")}
    assert heads == {k for k, _ in method.named_parameters() if not k.startswith("clip.")}
    assert learned - heads == {"clip.visual." + k for k, _ in clip.visual.named_parameters() if k != "proj"}


def test_learns_eight_images_in_both_heads(clip, text, batch):
    torch.manual_seed(3)
    images, labels = batch
    # lambda_v 0: with a softened target the loss ends at the target's entropy, not at 0
    method = TeS(clip, text, tau=0.1, lambda_v=0.0)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 3e-3)
    for _ in range(40):
        loss, logs = method.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert logs["accuracy"] == logs["projection_accuracy"] == 1
    assert (method.eval().predict(images).argmax(-1) == labels).all()


def test_other_classes_are_scored_by_the_projection(clip, text, batch):
    method = TeS(clip, text).eval()
    other = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    scores = method.predict(batch[0], other)
    x = method.features(batch[0])
    expected = F.cosine_similarity(method.projection(x)[:, None], other[None], dim=-1)
    torch.testing.assert_close(scores, expected)


def test_bf16_towers_and_fp32_loss(clip, text, batch):
    method = TeS(clip, text)
    expected = method.loss(*batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(*batch)[0]
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.1)


def test_works_in_fp64(clip, text, batch):
    loss, _ = TeS(clip.double(), text.double()).loss(batch[0].double(), batch[1])
    loss.backward()
    assert loss.dtype == torch.float64


def test_mistakes_are_named(clip, text):
    with pytest.raises(ValueError, match=r"text features \(16,\): expected \(classes, width\)"):
        TeS(clip, text[0])
    with pytest.raises(ValueError, match="needs a CLIP, not a Llip"):
        TeS(Llip(CONFIG, 4, 2), text)


def test_flags_reach_the_method(clip, text):
    classes = Classes(["a", "b", "c", "d"], ("{}",), None, text)
    method = tes.build(tes.Settings(tes_temperature=0.1, tes_share=0.3, tes_weight=0.5), clip, classes)
    assert (method.tau, method.lambda_v, method.lambda_t) == (0.1, 0.3, 0.5)
    assert method.loss_terms == "the classifier's + 0.5 x the projection's cross-entropy"
    assert method.whole_batch and method.one_process


def test_the_dual_encoder_answers_for_any_classes(clip, text, batch):
    """The classifier for the classes of training, known by their text features; the projection for others."""
    method = TeS(clip, text).eval()
    dual = method.dual_encoder()
    assert method.dual_encoder(clip) is clip and dual.takes_captions and not dual.conditional
    assert dual.class_templates(("a {}",)) == ("a {}",) and dual.config is clip.config
    tokens = torch.randint(1, 39, (6, 12))
    assert torch.equal(dual.encode_text(tokens), clip.encode_text(tokens))
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    other = dual.ensemble_text(dual.encode_text(tokens), group)
    assert torch.equal(other, clip.ensemble_text(clip.encode_text(tokens), group))
    images = dual.encode_image(batch[0])
    assert torch.equal(dual.pair_logits(images, text), method.predict(batch[0]))
    for features in (other, text[:3], text.flip(0)):
        assert torch.equal(dual.pair_logits(images, features), method.predict(batch[0], features))


def test_what_was_learned_holds_the_buffers_of_batchnorm(clip, text, batch):
    method = TeS(clip, text)
    method.loss(*batch)
    state = method.learned()
    assert "projection.1.running_mean" in state and not any(k.startswith("clip.") for k in state)
    other = TeS(clip, text)
    other.load_learned(state)
    assert torch.equal(other.eval().predict(batch[0], text[:2]), method.eval().predict(batch[0], text[:2]))
    with pytest.raises(ValueError, match=r"classifier.bias: \(4,\) in the state, \(3,\) in this TeS"):
        TeS(clip, text[:3]).load_learned(state)
