"""tasks.LabelTask under train.py's loop: defaults, learning, resume to the bit, ranks, chunks, mistakes."""

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_error, checkpoint, killed_after_saving, same
from PIL import Image
from small_models import save_run

import alignclip
import clipood
import evaluate
import pretrained
import train
from baselines.methods import METHODS, is_tiny
from evals import open_world as openworld
from evals import protocol as protocols
from llip import Llip
from model import CLIP
from readers import scenes
from tasks import LabelTask
from train import TrainConfig, configure, main
from util.run import Meter, check_same_run

ROOT = Path(__file__).resolve().parent.parent
TUNED, PROMPTED = tuple(METHODS)[3:8], ("coop", "cocoop", "maple", "tes")
QUICK = ["--device", "cpu", "--threads", "1", "--train-size", "60", "--batch-size", "6"]
QUICK += ["--target-domain", "sketch"]


@pytest.fixture(autouse=True)
def few_scenes_and_signals(monkeypatch):
    monkeypatch.setattr(protocols, "HELD_OUT", 32)
    protocols.scenes_protocol.cache_clear()
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    yield
    protocols.scenes_protocol.cache_clear()
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "clip", CLIP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bed")
    for d, domain in enumerate(("art", "photo", "sketch")):
        for c, name in enumerate(("cat", "dog", "elk")):
            (root / domain / name).mkdir(parents=True)
            for k in range(5):
                noise = np.random.default_rng((c, d, k)).integers(0, 99, (20, 20, 3))
                picture = np.uint8(noise + (70 * c, 60 * d, 30 * k))
                Image.fromarray(picture).save(root / domain / name / f"{k}.png")
    return root


def run(out, clip, method, *flags):
    command = ["--method", method, "--init", str(clip), "--out", str(out), *QUICK]
    return main([*command, *map(str, flags)])


def task_of(clip, method, **more):
    flags = dict(method=method, init=str(clip), device="cpu", target_domain="sketch", train_size=60)
    flags |= dict(batch_size=6) | more
    c, s = configure(**flags)
    task = LabelTask(c, s)
    task.begin(c)
    return task


def test_the_expected_loss_names_the_terms_of_the_logged_loss(clip, tmp_path, capsys):
    """AlignCLIP's loss is far above ln C; the named terms are those of metrics.jsonl and give the loss."""
    assert run(tmp_path / "run", clip, "alignclip", "--steps", 1, "--align-weight", 3) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("expected loss"))
    assert line.startswith("expected loss: ln 16 = 2.77 for a blind answer; ")
    assert "the logged loss is classification + 3 x (attention + similarity)" in line
    m = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert m["loss"] == pytest.approx(m["classification"] + 3 * (m["attention"] + m["similarity"]))
    assert "x (attention)" in task_of(clip, "alignclip", similarity="none").expected_loss()
    assert "the logged loss is" not in task_of(clip, "clipood").expected_loss()
    assert "0.4 x" in task_of(clip, "tes").expected_loss()


# What a run is -------------------------------------------------------------------------------------------


def test_defaults(clip, tmp_path):
    bare = tmp_path / "published.pt"
    torch.save(pretrained.load(clip).state_dict(), bare)  # a published checkpoint: weights alone
    common = (36, 0, 0.1, 0.999, 1e-8, 0.7)
    for method, values in {
        "finetune": ("none", 0.0, 0.0, 5e-6),
        "labelsmooth": ("uniform", 0.0, 0.0, 5e-6),
        "clipood": ("none", 0.3, 0.5, 5e-6),
        "alignclip": ("mixture", 0.3, 0.5, 5e-6),
    }.items():
        c, s = configure(method=method, init=str(bare))
        assert (s.smoothing, s.margin, s.bma_beta, c.lr) == values
        got = (c.batch_size, c.warmup, c.weight_decay, c.beta2, c.eps, c.crop_scale)
        assert got == common and c.steps == 5000
        small, same_settings = configure(method=method, init=str(clip))
        assert (small.lr, small.steps) == (5e-4, 300) and same_settings == s
    assert configure(method="flyp", init=str(bare))[0].lr == 1e-5
    # a name needs no download to be configured
    c, s = configure(method="finetune", init="ViT-B/16", margin=0.1, lr=1.0, warmup=7)
    assert (s.margin, c.lr, c.warmup, s.smoothing) == (0.1, 1.0, 7, "none")
    s = alignclip.Settings()
    authors = (s.epsilon, s.smoothing_scale, s.align_weight, s.branch, s.guidance_temperature)
    assert authors == (0.9, 35.0, 10.0, "dv", 1.0)


def test_published_settings_follow_the_task_and_the_data(clip, tmp_path, capsys):
    """thuml/CLIPood and zhyhan/AlignCLIP; explicit flags win, and a tiny CLIP has its own values."""

    def found(method, data, task, **more):
        flags = dict(method=method, init="ViT-B/16", train_data=data, open_task=task) | more
        c, s = configure(**flags)
        return c.lr, c.steps, c.batch_size, s.margin, s.bma_beta

    assert found("clipood", "data/office_home", "domain-shift") == (1e-5, 5000, 36, 0.3, 0.5)
    assert "published settings for OfficeHome, domain-shift: --lr 1e-05" in capsys.readouterr().out
    # only what takes effect is printed, and a folder above the data does not select anything
    found("clipood", "DomainNet", "domain-shift", lr=1.0, steps=5)
    assert capsys.readouterr().out == "published settings for DomainNet, domain-shift: --batch-size 60\n"
    assert found("clipood", "OfficeHome/PACS", "domain-shift") == (5e-6, 5000, 36, 0.3, 0.5)
    assert found("clipood", "data/PACS", "domain-shift") == (5e-6, 5000, 36, 0.3, 0.5)
    assert capsys.readouterr().out == ""
    assert found("clipood", "OfficeHome", "in-the-wild") == (3e-6, 5000, 36, 0.1, 0.1)
    assert found("clipood", "split_zhou_SUN397.json", "open-class") == (5e-6, 2500, 36, 0.3, 0.1)
    for method in ("finetune", "labelsmooth"):  # CLIPood's steps and rates, without its margin and average
        assert found(method, "split_zhou_SUN397.json", "open-class") == (5e-6, 2500, 36, 0.0, 0.0)
        assert found(method, "OfficeHome", "in-the-wild") == (3e-6, 5000, 36, 0.0, 0.0)
    assert found("alignclip", "domain_net", "domain-shift") == (1e-5, 10000, 180, 0.1, 0.5)
    assert found("alignclip", "VLCS", "domain-shift")[2] == 108
    assert found("alignclip", "VLCS", "domain-shift", batch_size=9)[2] == 9
    assert found("clipood", "data/office_home", "domain-shift", init=str(clip))[0] == 5e-4


def test_flags_reach_the_method(clip):
    more = dict(branch="vvv", align_layers=2, align_weight=3.0, guidance_temperature=0.1)
    more |= dict(similarity="all", detach=True, align_attention=False, margin=0.2)
    model = task_of(clip, "alignclip", **more, smoothing="released", epsilon=0.8).model
    assert (model.branch, model.layers, model.weight) == ("vvv", 2, 3.0)
    assert (model.guidance_temperature, model.similarity, model.detach) == (0.1, "all", True)
    assert model.attention is False and model.margin == 0.2
    assert model.targets[3, 3] == pytest.approx(0.8)
    assert model.targets.sum(1).max() > 1.01 or model.targets.sum(1).min() < 0.99  # released
    smooth = task_of(clip, "labelsmooth").model
    assert smooth.targets[0, 1] == pytest.approx(0.1 / 16) and smooth.margin == 0.0


def test_text_is_the_head_and_the_start_is_zero_shot(clip):
    task = task_of(clip, "clipood", open_task="in-the-wild")
    assert task.model.text.shape == (len(scenes.BASE), 16)
    rows = task.evaluate(task.model)
    assert rows["zero-shot"] == rows["fine-tuned"] == rows["averaged"]
    figures = {"val", "base", "new", "H", "auroc", "mean_per_class"}
    assert set(rows["averaged"]) == figures | {"chance", "constant", "images", "standard_error"}
    assert set(rows["averaged"]["chance"]) == figures
    one = task_of(clip, "finetune", template="a drawing of one {}").model.text
    assert not torch.allclose(one, task_of(clip, "finetune").model.text)


def test_batches_hold_as_many_of_each_source_domain(folder, clip):
    task = task_of(clip, "clipood", train_data=str(folder), target_domain="photo")
    batches, plain = (
        task.batches(0),
        task_of(clip, "clipood", train_data=str(folder), target_domain="photo", crop_scale=1.0).batches(0),
    )
    for _ in range(5):
        batch, still = next(batches), next(plain)
        domains = [task.train.domain_names[task.train.domains[i]] for i in batch.ids.tolist()]
        assert domains == 3 * ["art"] + 3 * ["sketch"]
        assert not any("photo" in task.train.name(i) for i in batch.ids.tolist())
        assert torch.equal(batch.ids, still.ids) and not torch.equal(batch.images, still.images)
    classes = dict(open_task="open-class", target_domain="")
    wild = task_of(clip, "finetune", train_data=str(folder), **classes)
    assert {wild.train.classes[y] for y in next(wild.batches(0)).labels.tolist()} <= {"cat", "dog"}


LOADERS = {
    "clipood": "bilinear",
    "alignclip": "bilinear",
    "coop": "bicubic",
    "cocoop": "bicubic",
    "maple": "bicubic",
}


@pytest.mark.parametrize("method", LOADERS)
def test_pictures_are_resized_as_by_the_published_loaders(tmp_path, clip, folder, method, monkeypatch):
    """In training, in its evaluations, and when the run is evaluated later."""
    expected, used = evaluate.data.preprocess(16, LOADERS[method]), []
    task = task_of(clip, method, train_data=str(folder), crop_scale=1.0)
    batch = next(task.batches(0))
    assert torch.equal(batch.images, torch.stack([expected(task.train.image(i)) for i in batch.ids.tolist()]))
    classify = evaluate.classify
    monkeypatch.setattr(
        evaluate, "classify", lambda *a, **more: used.append(more["transform"]) or classify(*a, **more)
    )
    flags = ["--train-data", folder, "--steps", 1]
    assert run(tmp_path / "run", clip, method, *flags) == 0
    in_training = len(used)
    assert openworld.main(["--model", str(tmp_path / "run"), "--data", str(folder), "--device", "cpu"]) == 0
    assert len(used) > in_training > 2 and set(used) == {expected}


def test_flyp_pairs_every_image_with_each_template(clip, folder, monkeypatch):
    task = task_of(clip, "flyp", train_data=str(folder), epochs=3.0, batch_size=8)
    assert task.samples() == len(task.train) == 24 and task.model.prompts_per_class == 1
    monkeypatch.setattr(evaluate, "templates_of", lambda *_: ("a {}", "the {}", "one {}"))
    task = task_of(clip, "flyp", train_data=str(folder), epochs=3.0, batch_size=8)
    assert task.samples() == 3 * 24
    pairs, seen = [], set()
    monkeypatch.setattr(
        task.model, "loss", lambda x, y: pairs.append(y) or (x.sum() + task.clip.logit_scale, {})
    )
    for step, batch in zip(range(40), task.batches(0)):
        task.step(task.model, batch, torch.device("cpu"))
        assert torch.equal(pairs[-1] // 3, batch.labels)
        seen |= set(zip(batch.ids.tolist(), (pairs[-1] % 3).tolist()))
        if step == 30:
            resumed = next(task.batches(30))
            assert all(torch.equal(a, b) for a, b in zip(resumed, batch))
    assert len(seen) > 0.95 * 3 * 24
    other = task_of(clip, "clipood", train_data=str(folder))
    batch = next(other.batches(0))
    monkeypatch.setattr(
        other.model, "loss", lambda x, y: pairs.append(y) or (other.clip.visual.proj.sum(), {})
    )
    other.step(other.model, batch, torch.device("cpu"))
    assert torch.equal(pairs[-1], batch.labels)  # the others see classes


def test_average_pooling_trains_and_asks_the_mean_of_the_patches(clip):
    task = task_of(clip, "finetune", image_pooling="average")
    batch = next(task.batches(0))
    visual = task.clip.visual
    tokens = visual.head(visual.transformer(visual.embed(batch.images)))  # (B, 1 + P, E)
    mean = clipood.unit(tokens[:, 1:].mean(1))  # (B, E)
    torch.testing.assert_close(task.model.predict(batch.images), mean @ task.model.text.t())
    dual = task.model.dual_encoder()
    torch.testing.assert_close(clipood.unit(dual.encode_image(batch.images)), mean)
    rows = task.evaluate(task.model)
    assert rows["fine-tuned"] == rows["zero-shot"]
    with pytest.raises(ValueError, match="alignclip has no flag --image-pooling; it belongs to finetune"):
        task_of(clip, "alignclip", image_pooling="average")


@pytest.mark.parametrize("method", (*TUNED, *PROMPTED))
def test_every_method_trains_on_all_classes_of_one_data_set(tmp_path, clip, method, capsys):
    for k, split in enumerate(("Training", "Test")):
        for c, name in enumerate(("bird", "cat", "dog", "fish")):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(3 - k):
                Image.new("RGB", (20, 20), (50 * c, 90 * k, 40 * n)).save(
                    tmp_path / split / name / f"{n}.png"
                )
    flags = ["--train-data", tmp_path, "--open-task", "all-classes", "--target-domain", "", "--steps", 1]
    assert run(tmp_path / "run", clip, method, *flags) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(r["images"] == 8 and r["chance"] == {"test": 0.25} for r in results.values())
    assert checkpoint(tmp_path / "run")["task"]["classes"] == ["bird", "cat", "dog", "fish"]
    capsys.readouterr()
    data = ["--model", str(tmp_path / "run"), "--data", str(tmp_path), "--device", "cpu"]
    assert openworld.main(data) == 0
    assert f"| {method} " in capsys.readouterr().out


# Learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TUNED)
def test_three_steps_improve_and_only_the_image_tower_learns(clip, method):
    task = task_of(clip, method)
    batch, before = next(task.batches(0)), {n: p.clone() for n, p in task.clip.named_parameters()}
    optimizer = torch.optim.AdamW(train.parameter_groups(task.model, 0.0), lr=2e-3)
    losses, meter = [], Meter()
    for _ in range(4):
        optimizer.zero_grad()
        loss, logs = task.step(task.model, batch, torch.device("cpu"))
        losses.append(float(loss))
        meter.add(**logs)
        optimizer.step()
        task.after_step()
    assert losses[-1] < losses[0] - 0.05
    changed = {n for n, p in task.clip.named_parameters() if not torch.equal(p, before[n])}
    if method == "flyp":
        assert {n for n in before if n not in changed} <= {"positional_embedding"}
    else:
        assert changed == {n for n in before if n.startswith("visual.")}
    logs = meter.means()
    assert 0 <= logs["accuracy"] <= 1
    if method == "alignclip":
        parts = logs["classification"] + 10 * (logs["attention"] + logs["similarity"])
        assert parts == pytest.approx(sum(losses) / 4, rel=1e-4)


@pytest.mark.parametrize("method", TUNED)
def test_overfits_six_images(tmp_path, clip, folder, method, capsys):
    flags = ["--overfit", 6, "--lr", 3e-3, "--steps", 60, "--train-data", folder]
    assert run(tmp_path / method, clip, method, *flags) == 0
    assert "can learn these images by heart" in capsys.readouterr().out


def test_overfit_can_fail(tmp_path, clip, capsys):
    assert run(tmp_path / "x", clip, "finetune", "--overfit", 6, "--steps", 1, "--lr", 1e-9) == 0
    assert "something is wrong" in capsys.readouterr().out


# Checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["finetune", "clipood", "alignclip", "flyp"])
def test_resume_is_exact(tmp_path, clip, method, monkeypatch):
    """Six steps equal three, a kill, and three more: both models, optimizer, average and metrics."""
    flags = ["--steps", 6, "--save-every", 3, "--log-every", 2, "--lr", 1e-3]
    assert run(tmp_path / "whole", clip, method, *flags) == 0
    with killed_after_saving(monkeypatch):
        assert run(tmp_path / "killed", clip, method, *flags) == 130
    assert checkpoint(tmp_path / "killed")["step"] == 3
    assert run(tmp_path / "killed", clip, method, *flags, "--resume", "auto") == 0
    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    for key in ("state_dict", "task", "optimizer", "step", "samples", "meter"):
        assert same(whole[key], resumed[key]), key
    files = [
        (tmp_path / d / f).read_text() for d in ("whole", "killed") for f in ("metrics.jsonl", "results.json")
    ]
    assert files[:2] == files[2:] and '"accuracy"' in files[0]
    if method in ("clipood", "alignclip"):
        assert whole["task"]["average"]["step"] == 6
        assert not same(whole["task"]["clip"], whole["state_dict"])


def test_a_run_loads_as_the_reported_clip(tmp_path, clip):
    """state_dict is a plain CLIP's: the Beta average of steps 0 to 3, recomputed here from all of them."""
    flags = ["--lr", 1e-3, "--log-every", 1]
    assert run(tmp_path / "run", clip, "alignclip", "--steps", 3, *flags) == 0
    model, start = pretrained.load(tmp_path / "run"), pretrained.load(clip)
    assert type(model) is CLIP and model.state_dict().keys() == start.state_dict().keys()
    task = task_of(clip, "alignclip", steps=3, lr=1e-3)
    weights, states = [((t + 0.5) / 4 * (1 - (t + 0.5) / 4)) ** -0.5 for t in range(4)], []
    groups = train.parameter_groups(task.model, 0.1)
    optimizer = train.build_optimizer(task.c, groups, torch.device("cpu"))
    for step, batch in zip(range(4), task.batches(0)):
        states.append({n: p.detach().clone() for n, p in task.clip.named_parameters()})
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, task.c)
        optimizer.zero_grad()
        task.step(task.model, batch, torch.device("cpu"))
        optimizer.step()
    for name, p in model.named_parameters():
        mean = sum(w * s[name] for w, s in zip(weights, states)) / sum(weights)
        torch.testing.assert_close(p, mean, rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(model.token_embedding.weight, start.token_embedding.weight)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    again = openworld.evaluate_protocol(model, task.protocol, task.tokenizer, task.templates)
    assert results["averaged"] == again and set(results) == {"zero-shot", "fine-tuned", "averaged"}


def test_chunks_do_not_change_the_run(tmp_path, clip):
    for name, chunks in (("one", 1), ("three", 3)):
        flags = ["--steps", 2, "--accumulate", chunks, "--lr", 1e-3, "--eps", 1e-3]
        assert run(tmp_path / name, clip, "alignclip", *flags) == 0
    one, three = (checkpoint(tmp_path / n)["task"]["clip"] for n in ("one", "three"))
    for key in one:
        torch.testing.assert_close(one[key], three[key], rtol=1e-3, atol=2e-5, msg=key)


RANKS = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import torch, train
from baselines.methods import parse
torch.set_num_threads(1)
for method, chunks in (("alignclip", "3"), ("flyp", "1")):
    flags = ["--method", method, "--accumulate", chunks, "--out", sys.argv[1] + method, *sys.argv[2:]]
    train.train(*train.configure(**parse(train.CONFIG, flags, "")))
train.distributed.shutdown()
os._exit(0)
"""


def test_ranks_and_chunks_are_one_process(tmp_path, clip, folder):
    """Weights after three steps: AlignCLIP by 2 ranks x 3 chunks, FLYP by 2 ranks that gather their texts."""
    (tmp_path / "go.py").write_text(RANKS)
    flags = ["--init", str(clip), "--train-data", str(folder), "--steps", "3", "--lr", "1e-3"]
    flags += ["--log-every", "1", "--eps", "1e-4", *QUICK]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(29500 + os.getpid() % 2000), str(tmp_path / "go.py")]
    command += [str(ROOT), str(tmp_path / "two-"), *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for method in ("alignclip", "flyp"):
        folders = [tmp_path / f"{n}-{method}" for n in ("one", "two")]
        assert main(["--method", method, *flags, "--out", str(folders[0])]) == 0
        one, two = (checkpoint(out)["state_dict"] for out in folders)
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=5e-5, msg=key)
        lines = [(out / "metrics.jsonl").read_text().splitlines()[:3] for out in folders]
        for a, b in zip(*(map(json.loads, some) for some in lines)):
            if method == "flyp":
                del a["accuracy"], b["accuracy"]  # FLYP's is among the prompts of a rank
            assert a == pytest.approx(b, rel=1e-3)


def test_a_run_from_before_a_flag_existed_goes_on():
    new = {"lr": 1.0, "margin": 0.3, "method": "clip"}
    check_same_run({"lr": 1.0, "method": "clip"}, new)
    with pytest.raises(ValueError, match=r"lr 2.0 -> 1.0"):
        check_same_run({"lr": 2.0, "method": "clip"}, new)


# Prompts and TeS: what is learned lies beside CLIP ------------------------------------------------------


def test_defaults_of_prompts_and_tes(clip, tmp_path):
    bare = tmp_path / "published.pt"
    torch.save(pretrained.load(clip).state_dict(), bare)
    for method, values in {
        "coop": (16, "", 2e-3, 32, 50.0, "sgd", 5e-4, 16),
        "cocoop": (4, "a photo of a", 2e-3, 1, 10.0, "sgd", 5e-4, 16),
        "maple": (2, "a photo of a", 3.5e-3, 4, 5.0, "sgd", 5e-4, 16),
        "tes": (0, "", 3.16e-3, 256, 100.0, "nesterov", 1e-5, 0),
    }.items():
        c, s = configure(method=method, init=str(bare))
        found = getattr(s, "context", 0), getattr(s, "context_words", ""), c.lr, c.batch_size, c.epochs
        assert (*found, c.optimizer, c.weight_decay, c.shots) == values
        c, _ = configure(method=method, init=str(clip))
        assert (c.steps, c.epochs, c.optimizer, c.shots) == (300, 0.0, "adamw", 0)
        c, _ = configure(method=method, init=str(bare), steps=7)
        assert (c.steps, c.epochs) == (7, 0.0)  # explicit steps replace the paper's epochs
    optimizers = [
        train.build_optimizer(TrainConfig(optimizer=o), [{"params": [torch.ones(1)]}], "cpu")
        for o in ("sgd", "nesterov")
    ]
    assert [o.defaults["nesterov"] for o in optimizers] == [False, True]
    assert all(o.defaults["momentum"] == 0.9 for o in optimizers)


@pytest.mark.parametrize("method", PROMPTED)
def test_three_steps_improve_and_only_what_is_learned_changes(clip, method):
    task = task_of(clip, method)
    batch, before = next(task.batches(0)), {n: p.clone() for n, p in task.clip.named_parameters()}
    groups = train.parameter_groups(task.model, 0.0)
    trained = {id(p) for group in groups for p in group["params"]}
    own = {n: p for n, p in task.model.named_parameters() if not n.startswith("clip.")}
    learned = {id(p) for p in own.values()}
    assert trained >= learned and (trained == learned) == (method != "tes")
    start = {n: p.clone() for n, p in own.items()}
    optimizer, losses, meter = torch.optim.AdamW(groups, lr=2e-3), [], Meter()
    for _ in range(4):
        optimizer.zero_grad()
        loss, logs = task.step(task.model, batch, torch.device("cpu"))
        losses.append(float(loss))
        meter.add(**logs)
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    still = {n for n, p in own.items() if torch.equal(p, start[n])}
    assert all(n.startswith("meta_net.linear") for n in still)  # its one hidden unit can be dead here
    changed = {n for n, p in task.clip.named_parameters() if not torch.equal(p, before[n])}
    towers = {n for n in before if n.startswith("visual.") and n != "visual.proj"}
    assert changed == (towers if method == "tes" else set())
    assert 0 <= meter.means()["accuracy"] <= 1


def test_prompts_start_where_the_flags_say(clip):
    words = task_of(clip, "cocoop", context_words="a picture of a")
    ids = words.tokenizer.encode("a picture of a")
    assert torch.equal(words.model.ctx, words.clip.token_embedding.weight[ids])
    maple = task_of(clip, "maple").model
    assert len(maple.ctx) == 2 and len(maple.compound_prompts_text) == 0  # a text tower of one block
    task = task_of(clip, "maple")
    assert task.model.dual_encoder().class_templates(()) == ("of a {}.",)
    whole = task.tokenizer(["a photo of a dog."], 16)[0]
    rest = task.model.class_tokens[0]  # the first two words are the context's
    assert rest[1:6].tolist() == whole[3:8].tolist()
    own = task_of(clip, "coop", class_context=True, context=3).model
    assert own.ctx.shape == (16, 3, 32) and task_of(clip, "coop").model.ctx.shape == (4, 32)
    assert task_of(clip, "coop", context_position="front").model.before == 0
    tes = task_of(clip, "tes", tes_temperature=0.1, tes_share=0.3, tes_weight=0.5).model
    assert (tes.tau, tes.lambda_v, tes.lambda_t) == (0.1, 0.3, 0.5)


@pytest.mark.parametrize("method", PROMPTED)
def test_new_classes_are_asked_through_what_was_learned(clip, method):
    """The protocol's figures equal predict's, class by class; the plain CLIP's are others."""
    task = task_of(clip, method, open_task="open-class", target_domain="")
    torch.manual_seed(1)
    for name, p in task.model.named_parameters():
        if not name.startswith("clip."):
            p.data.add_(torch.randn_like(p))
    task.model.eval()
    result = task.evaluate(task.model)["fine-tuned"]
    transform = evaluate.data.preprocess(16, "bilinear" if method == "tes" else "bicubic")
    for part in ("base", "new"):
        dataset = task.protocol.tests[part]
        classes = dataset.classes
        images = torch.stack([transform(dataset.image(i)) for i in range(len(dataset))])
        known = None
        if part == "new" and method == "tes":
            known = evaluate.encode_classes(task.clip, task.tokenizer, classes, task.templates)
        elif part == "new":
            template = task.model.dual_encoder().class_templates(())[0]
            texts = [template.format(name) for name in classes]
            known = task.tokenizer(texts, 16)
        with torch.no_grad():
            answer = task.model.predict(images, known).argmax(1)
        right = (answer == torch.tensor(dataset.labels)).double().mean().item()
        assert result[part] == pytest.approx(right)
    assert result["H"] == pytest.approx(statistics.harmonic_mean([result["base"], result["new"]]))
    assert not task.model.training


@pytest.mark.parametrize("method", PROMPTED)
def test_what_was_learned_is_resumed_and_clip_is_plain(tmp_path, clip, method, monkeypatch, capsys):
    flags = ["--steps", 4, "--save-every", 2, "--log-every", 1, "--train-size", 48]
    assert run(tmp_path / "whole", clip, method, *flags) == 0
    with killed_after_saving(monkeypatch):
        assert run(tmp_path / "killed", clip, method, *flags) == 130
    assert run(tmp_path / "killed", clip, method, *flags, "--resume", "auto") == 0
    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    for key in ("state_dict", "task", "optimizer", "step"):
        assert same(whole[key], resumed[key]), key
    assert whole["task"]["learned"] and resumed["step"] == 4
    files = [(tmp_path / d / "results.json").read_text() for d in ("whole", "killed")]
    assert files[0] == files[1]
    plain, start = pretrained.load(tmp_path / "whole"), pretrained.load(clip)
    assert type(plain) is CLIP
    capsys.readouterr()
    with pytest.raises(ValueError, match=f"{method} learned more than the weights of a CLIP"):
        evaluate.open_model(str(tmp_path / "whole"), towers=True)
    rebuilt, _ = evaluate.open_model(str(tmp_path / "whole"))
    assert same(rebuilt.method.learned(), whole["task"]["learned"])
    if method != "tes":
        assert same(dict(plain.state_dict()), dict(start.state_dict()))


@pytest.mark.parametrize("method", PROMPTED)
def test_prompts_overfit_a_tiny_batch(tmp_path, clip, folder, method, capsys):
    steps = {"tes": 40}.get(method, 120)
    flags = ["--overfit", 6, "--lr", 2e-2 if method != "tes" else 3e-3, "--steps", steps]
    assert run(tmp_path / method, clip, method, *flags, "--train-data", folder) == 0
    assert "can learn these images by heart" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--method", "coop", "--class-context", "--open-task", "in-the-wild"],
            "this coop cannot score new classes",
        ),
        (["--method", "maple", "--class-context"], "no flag --class-context; it belongs to coop"),
        (["--method", "coop", "--context-words", "a photo"], "--context 4, but --context-words"),
        (["--method", "coop", "--context", "15"], "class 0: "),
        (["--method", "coop", "--context-position", "back"], "position 'back'"),
        (["--method", "maple", "--prompt-depth", "2"], "depth 2: the towers have 2 (image) and 1"),
        (["--method", "coop", "--bma-beta", "0.5"], "coop has no flag --bma-beta"),
        (["--method", "tes", "--accumulate", "2"], "--accumulate 2: the loss of tes needs the whole batch"),
        (["--method", "tes", "--optimizer", "lion"], "--optimizer lion: expected one of adamw, sgd"),
        (["--context", "99999999999999999999"], "--context 99999999999999999999: must be in [1, 1,024]"),
    ],
)
def test_mistakes_with_prompts_get_one_line(tmp_path, clip, capsys, flags, message):
    assert run(tmp_path / "run", clip, "coop", "--steps", 2, *flags) == 2
    assert_one_error(capsys, message)


# Mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--init", ""], "--method clipood starts from a CLIP: name a checkpoint or a run with --init"),
        (["--init", "nowhere.pt"], "nowhere.pt: no such file"),
        (["--target-domain", "Sketch"], "no domain 'Sketch'; there are: photo, sketch, cartoon, p"),
        (["--target-domain", ""], "domain-shift needs a --target-domain, one of: photo, sketch"),
        (["--open-task", "shift"], "--open-task shift: expected one of domain-shift, open-class"),
        (["--batch-size", "7"], "--batch-size 7 is not divisible by 3 source domains: try 6"),
        (["--dry-run"], "--dry-run computes the cost of pre-training, not of --method clipood"),
        (["--vocab", "learn"], "a checkpoint keeps the vocabulary"),
        (["--image-size", "20"], "images of 20 pixels are not whole patches of 8"),
        (["--margin", "-1"], "--margin -1.0: must be in [0, 1,000,000.0]"),
        (
            ["--method", "alignclip", "--guidance-temperature", "0"],
            "--guidance-temperature 0.0: must be in [1e-30, 1e+30]",
        ),
        (["--smoothing", "semantic"], "form 'semantic': expected mixture"),
        (["--epsilon", "2", "--smoothing", "uniform"], "--epsilon 2.0: must be in [0, 1]"),
        (["--method", "alignclip", "--branch", "vv"], "branch 'vv': expected one of dv"),
        (["--method", "alignclip", "--similarity", "both"], "similarity 'both'"),
        (["--method", "alignclip", "--align-layers", "9"], "the image tower has 2 blocks"),
        (["--method", "flyp", "--accumulate", "2"], "--accumulate 2: the loss of flyp needs the whole batch"),
        (["--template", "a photo"], "templates 'a photo'"),
        (["--train-data", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_get_one_line(tmp_path, clip, capsys, flags, message):
    assert run(tmp_path / "run", clip, "clipood", "--steps", 2, *flags) == 2
    assert_one_error(capsys, message)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_llip_and_one_class_are_refused(tmp_path, clip, capsys):
    wrong = save_run(tmp_path / "llip", lambda config: Llip(config, 2, 2))
    assert run(tmp_path / "a", wrong, "clipood") == 2
    assert f"error: {wrong}: fine-tuning needs a CLIP, not a Llip" in capsys.readouterr().err
    for domain in ("photo", "sketch"):
        (tmp_path / "data" / domain / "cat").mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / domain / "cat" / f"{k}.png")
    assert run(tmp_path / "b", clip, "clipood", "--train-data", tmp_path / "data") == 2
    assert "needs two classes or more, there is only cat" in capsys.readouterr().err


def test_broken_loss_is_not_saved(tmp_path, clip, monkeypatch, capsys):
    loss = clipood.FineTune.loss
    broken = lambda self, x, y: (loss(self, x, y)[0] * float("nan"), {})  # noqa: E731
    monkeypatch.setattr(clipood.FineTune, "loss", broken)
    assert run(tmp_path / "run", clip, "clipood", "--steps", 4, "--log-every", 2) == 2
    assert "not finite in steps 1..2" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert is_tiny(str(clip))
