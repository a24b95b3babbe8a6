"""clipood.py: the official loss, training loop and moving average, and what must not change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clipood
import pretrained
from clipood import BetaMovingAverage, FineTune, main, wise_ft
from llip import Llip, PooledTokens
from model import CLIP, Config

CONFIG = Config(16, 16, 4, 32, 4, 2, 64, 12, 40, 16, 2, 2, 32)


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


# ------------------------------------------------------------------------------------- the objective


def test_starts_as_zero_shot_clip(clip, text, batch):
    method = FineTune(clip, text, margin=0.3)
    logits = clip.pair_logits(clip.encode_image(batch[0]), text)
    torch.testing.assert_close(method.predict(batch[0]) * clip.logit_scale.exp(), logits)


def test_plain_and_smoothed_losses_are_pytorchs(clip, text, batch):
    images, labels = batch
    logits = clip.pair_logits(clip.encode_image(images), text)
    loss, logs = FineTune(clip, text)(images, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    torch.testing.assert_close(logs["accuracy"], (logits.argmax(1) == labels).float().mean())
    loss, _ = FineTune(clip, text, smoothing="uniform", epsilon=0.9)(images, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_margin_loss_equals_its_additive_form(clip, text, batch):
    """exp(t) * lambda * (1 - T_y . T_c) added to every logit: zero for the label's own."""
    images, labels = batch
    loss, _ = FineTune(clip, text, margin=0.3).loss(images, labels)
    cosines = F.normalize(clip.encode_image(images), dim=-1) @ text.t()
    margin = 0.3 * (1 - text[labels] @ text.t())
    additive = F.cross_entropy(clip.logit_scale.exp() * (cosines + margin), labels)
    torch.testing.assert_close(loss, additive)
    assert loss > FineTune(clip, text).loss(images, labels)[0]


def test_margin_changes_training_and_not_predictions(clip, text, batch):
    plain, margin = FineTune(clip, text), FineTune(clip, text, margin=0.3)
    assert torch.equal(plain.predict(batch[0]), margin.predict(batch[0]))


def test_margin_loss_and_gradient_are_the_official_ones(golden_arrays):
    g = golden_arrays("clipood_mms.npz")
    for tag in ("lam0.3_temp100", "lam0.1_temp100", "lam0.0_temp100", "lam0.3_temp10"):
        margin, scale = (float(x) for x in tag[3:].split("_temp"))
        clip = CLIP(Config(24, 8, 4, 8, 1, 2, 8, 8, 16, 8, 1, 2, 8), scale=scale)
        method = FineTune(clip, g["in.text_features"], margin=margin)
        features = g["in.features"].clone().requires_grad_()
        loss, logs = method.classification(clipood.unit(features), g["in.labels"])
        loss.backward()
        torch.testing.assert_close(loss, g[f"out.{tag}.loss"], rtol=1e-4, atol=2e-5)
        expected = g[f"out.{tag}.grad_features"]
        torch.testing.assert_close(features.grad, expected, rtol=1e-4, atol=3e-5)
        percent = 100 * logs["accuracy"]
        torch.testing.assert_close(percent, g[f"out.{tag}.train_acc_percent"], rtol=0, atol=1e-4)


def test_twenty_steps_of_the_official_loop(golden_arrays):
    """engine.train as released, weights kept in fp32: losses, weights and the moving average."""
    g = golden_arrays("clipood_train_fp32.npz")

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.l1, self.ln, self.l2 = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 10)

        def forward(self, x):
            return self.l2(torch.tanh(self.ln(self.l1(x))))

    clip = CLIP(Config(10, 8, 4, 8, 1, 2, 8, 8, 16, 8, 1, 2, 8), scale=30.0)
    method = FineTune(clip, g["in.text_features"], margin=0.3)
    clip.visual = Toy()
    clip.visual.load_state_dict({k[2:]: v for k, v in g.items() if k.startswith("w.")})
    optimizer = torch.optim.AdamW(clip.visual.parameters(), lr=0.005, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    moving = BetaMovingAverage(clip.visual, 20, beta=0.5)
    for step, (x, y) in enumerate(zip(g["in.x"], g["in.y"])):
        optimizer.zero_grad()
        loss, _ = method.loss(x, y)
        loss.backward()
        optimizer.step()
        schedule.step()
        moving.update(clip.visual)
        torch.testing.assert_close(loss, g["out.loss"][step], rtol=1e-3, atol=1e-4)
        assert schedule.get_last_lr()[0] == pytest.approx(g["out.lr"][step].item(), rel=1e-6, abs=1e-9)
        for name, value in clip.visual.state_dict().items():
            recorded = g["out.raw." + name]  # every step, or steps 1, 5, 10, 15 and 20
            at = step if len(recorded) == 20 else {0: 0, 4: 1, 9: 2, 14: 3, 19: 4}.get(step)
            if at is not None:
                torch.testing.assert_close(value, recorded[at], rtol=1e-3, atol=2e-5)
        average = moving.average.state_dict()
        for name, value in average.items():
            expected = g["out.bma." + name][step]
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-5)
    weights = torch.tensor([moving.weight(t) for t in range(1, 21)], dtype=torch.float64)
    official = g["out.bma_weight"]
    torch.testing.assert_close(weights / weights.sum(), official / official.sum())


def test_only_the_image_tower_learns(clip, text, batch):
    names = set(clip.state_dict())
    method = FineTune(clip, text, margin=0.3)
    method.loss(*batch)[0].backward()
    for name, parameter in clip.named_parameters():
        trained = name.startswith("visual.")
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None) == trained, name
    assert set(clip.state_dict()) == names  # the checkpoint is a plain CLIP's
    assert set(method.state_dict()) == {"clip." + name for name in names}


def test_new_classes_can_be_scored(clip, text, batch):
    others = torch.randn(9, 16)
    scores = FineTune(clip, text).predict(batch[0], others)
    expected = F.cosine_similarity(clip.encode_image(batch[0])[:, None], others[None], dim=-1)
    torch.testing.assert_close(scores, expected)


def test_average_pooling_is_the_mean_of_projected_patches(clip, text, batch):
    visual, images = clip.visual, batch[0]
    tokens = visual.head(visual.transformer(visual.embed(images)))
    method = FineTune(clip, text, pooling="average")
    expected = F.normalize(tokens[:, 1:].mean(1), dim=-1) @ text.t()
    torch.testing.assert_close(method.predict(images), expected)
    assert not torch.allclose(method.predict(images), FineTune(clip, text).predict(images))


@pytest.mark.parametrize("under", [torch.bfloat16, torch.float16])
def test_losses_stay_in_full_precision_under_autocast(clip, text, batch, under):
    method, image = FineTune(clip, text, margin=0.3), clipood.unit(torch.randn(6, 16))
    expected, _ = method.classification(image, batch[1])
    with torch.autocast("cpu", dtype=under):
        assert torch.equal(method.classification(image, batch[1])[0], expected)
        assert method.predict(batch[0]).dtype == torch.float32


def test_user_mistakes(clip, text):
    for wrong, words in ((text * 2, "length 1"), (text[:, :8], r"\(classes, 16\)"), (text[0], "16")):
        with pytest.raises(ValueError, match=words):
            FineTune(clip, wrong)
    with pytest.raises(ValueError, match="pooling"):
        FineTune(clip, text, pooling="max")
    for other in (nn.Linear(2, 2), PooledTokens(CONFIG, 3), Llip(CONFIG, 3, 2)):
        with pytest.raises(ValueError, match=f"needs a CLIP, not a {type(other).__name__}"):
            FineTune(other, text)


@pytest.mark.parametrize("options", [{}, {"smoothing": "uniform"}, {"margin": 0.3}])
def test_learns_eight_images_by_heart(clip, text, options):
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    method = FineTune(clip, text, **options)
    optimizer = torch.optim.AdamW(clip.visual.parameters(), 2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        method.loss(images, labels)[0].backward()
        optimizer.step()
    assert (method.predict(images).argmax(-1) == labels).all()


# -------------------------------------------------------------------------------- averages of weights


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_streaming_average_equals_the_closed_form(beta):
    torch.manual_seed(0)
    module, total = nn.Linear(4, 3).double(), 30
    path = [copy.deepcopy(module.state_dict())]
    moving = BetaMovingAverage(module, total, beta)
    for _ in range(total):
        with torch.no_grad():
            for p in module.parameters():
                p += torch.randn_like(p)
        moving.update(module)
        path.append(copy.deepcopy(module.state_dict()))
    t = (torch.arange(total + 1, dtype=torch.float64) + 0.5) / (total + 1)
    density = torch.distributions.Beta(*torch.tensor([beta, beta], dtype=torch.float64))
    weights = density.log_prob(t).exp()
    for name, mean in moving.average.state_dict().items():
        stacked = torch.stack([state[name] for state in path])
        expected = torch.tensordot(weights / weights.sum(), stacked, 1)
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 0.1, 1.0])
def test_moving_average_is_the_official_one(golden_arrays, beta):
    g = golden_arrays("clipood_bma.npz")
    path = {k: g["in.theta." + k] for k in "ab"}
    module = nn.ParameterDict({k: nn.Parameter(v[0].clone()) for k, v in path.items()})
    moving = BetaMovingAverage(module, 20, beta)
    weights = torch.tensor([moving.weight(t) for t in range(21)], dtype=torch.float64)
    official = g[f"out.beta{beta}.weights"]
    torch.testing.assert_close(weights / weights.sum(), official / official.sum())
    for t in range(1, 21):
        for k, v in path.items():
            module[k].data.copy_(v[t])
        moving.update(module)
        for k in path:
            expected = g[f"out.beta{beta}.avg_{k}"][t]
            torch.testing.assert_close(moving.average[k].data, expected, rtol=1e-5, atol=5e-6)


def test_both_ends_of_training_weigh_most():
    """beta 0.5, 5,000 steps: 0.64 % for the start, 20.3 % for each tenth at the ends."""
    moving = BetaMovingAverage(nn.Linear(1, 1), 5000)
    weights = torch.tensor([moving.weight(t) for t in range(5001)], dtype=torch.float64)
    share = weights / weights.sum()
    assert float(share[0]) == pytest.approx(0.0064, abs=5e-5)
    assert float(share[:500].sum()) == pytest.approx(0.203, abs=1e-3)
    assert float(share[-500:].sum()) == pytest.approx(0.203, abs=1e-3)
    assert float(share[2500]) == pytest.approx(1.3e-4, abs=5e-6)


def test_weights_that_never_change_stay_bit_for_bit(clip, text):
    method = FineTune(clip, text)
    moving = BetaMovingAverage(clip, 50, beta=0.5)
    for _ in range(50):
        with torch.no_grad():
            clip.visual.proj += torch.randn_like(clip.visual.proj)
        moving.update(method.clip)
    for (name, mean), now in zip(moving.average.named_parameters(), clip.parameters()):
        assert torch.equal(mean, now) == (name != "visual.proj"), name


def test_average_is_a_module_of_its_own(clip, text, batch):
    method = FineTune(clip, text)
    moving = BetaMovingAverage(method, 10)
    before = moving.average.predict(batch[0])
    with torch.no_grad():
        clip.visual.proj.mul_(-1)
    assert torch.equal(moving.average.predict(batch[0]), before)
    assert list(moving.average.state_dict()) == list(method.state_dict())
    assert not any(p.requires_grad for p in moving.average.parameters())


def test_average_resumes_exactly():
    torch.manual_seed(0)
    steps = [nn.Linear(3, 2) for _ in range(7)]
    whole = BetaMovingAverage(steps[0], 6)
    half = BetaMovingAverage(steps[0], 6)
    for module in steps[1:]:
        whole.update(module)
    for module in steps[1:4]:
        half.update(module)
    resumed = BetaMovingAverage(nn.Linear(3, 2), 6)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    for module in steps[4:]:
        resumed.update(module)
    for a, b in zip(whole.average.parameters(), resumed.average.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="6 steps"):
        resumed.update(steps[0])
    for other in (BetaMovingAverage(steps[0], 7), BetaMovingAverage(steps[0], 6, beta=0.1)):
        with pytest.raises(ValueError, match="cannot continue"):
            other.load_state_dict(half.state_dict())
    with pytest.raises(ValueError, match="beta"):
        BetaMovingAverage(steps[0], 6, beta=0.0)


def test_wise_ft_ends_and_middle(clip):
    torch.manual_seed(5)
    start, end = clip.state_dict(), CLIP(CONFIG).state_dict()
    for alpha, expected in ((0.0, start), (1.0, end)):
        for name, value in wise_ft(start, end, alpha).items():
            assert torch.equal(value, expected[name]), name
    for name, value in wise_ft(start, end, 0.25).items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * end[name])


def test_wise_ft_writes_a_model_between_two(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.pt", "b.pt", "c.pt")]
    for seed, path in enumerate(paths[:2]):
        torch.manual_seed(seed)
        pretrained.save(CLIP(CONFIG), path)
    flags = ["wise-ft", *map(str, paths[:2]), "--alpha", "0.25", "--out", str(paths[2])]
    assert main(flags) == 0
    start, end, mixed = (pretrained.load(path).state_dict() for path in paths)
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * end[name])
    assert main(flags) == 2 and f"{paths[2]} exists already" in capsys.readouterr().err


def test_wise_ft_refuses_a_run_that_learned_more_than_a_clip(tmp_path, capsys):
    pretrained.save(CLIP(CONFIG), tmp_path / "a.pt")
    prompts = torch.load(tmp_path / "a.pt") | {"task": {"learned": {"ctx": torch.zeros(1)}}}
    torch.save(prompts, tmp_path / "b.pt")
    for order in ("ab", "ba"):
        flags = [str(tmp_path / f"{name}.pt") for name in order]
        assert main(["wise-ft", *flags, "--out", str(tmp_path / "c.pt")]) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'b.pt'}: its method learned more than the weights of a CLIP" in said
    assert not (tmp_path / "c.pt").exists()


@pytest.mark.parametrize("alpha", ["3", "-0.1", "nan"])
def test_wise_ft_refuses_weights_outside_the_two_models(tmp_path, capsys, alpha):
    pretrained.save(CLIP(CONFIG), tmp_path / "a.pt")
    flags = ["wise-ft", str(tmp_path / "a.pt"), str(tmp_path / "a.pt"), "--out", str(tmp_path / "c.pt")]
    assert main([*flags, "--alpha", alpha]) == 2 and not (tmp_path / "c.pt").exists()
    assert f"--alpha {float(alpha)}: must be in [0, 1]" in capsys.readouterr().err


def test_wise_ft_refuses_other_architectures(clip):
    state = clip.state_dict()
    fewer = {k: v for k, v in state.items() if k != "visual.proj"}
    with pytest.raises(ValueError, match="visual.proj.*absent"):
        wise_ft(state, fewer)
    with pytest.raises(ValueError, match=r"visual.proj.*\(32, 16\).*\(32, 8\)"):
        wise_ft(state, {**state, "visual.proj": torch.zeros(32, 8)})
