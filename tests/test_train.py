"""train.py: schedule, groups, resume to the bit, kills, errors, and that every method learns."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_one_error, checkpoint, killed_after_saving, same
from PIL import Image

import llip
import pretrained
import tasks
import train
from baselines.methods import METHODS, presets
from model import CLIP, CONFIGS
from readers import datasets
from scale import costs
from train import TrainConfig, configure, learning_rate, main, parameter_groups
from util.run import StopSignal, find
from util.text import duration

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--train-size", "48", "--batch-size", "8", "--threads", "1", "--warmup", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick_evaluation(monkeypatch):
    """The loop is tested here; evaluate.py has its own tests."""
    monkeypatch.setattr(tasks.PairTask, "evaluate", lambda self, model: {})


@pytest.fixture(autouse=True)
def keep_signals():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)


def run(out, *flags):
    return main([*QUICK, "--out", str(out), *map(str, flags)])


def test_learning_rate():
    c = TrainConfig(lr=2.0, warmup=4, steps=12)
    assert [learning_rate(s, c) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(4, c) == 2.0 and learning_rate(8, c) == pytest.approx(1.0)
    assert learning_rate(12, c) == pytest.approx(0.0)


def test_the_fused_update_is_adamw_written_out():
    """SPEED: three steps against Loshchilov and Hutter 2019, Algorithm 2, with PyTorch's decoupled decay."""
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, 3, generator=g, dtype=torch.double))
    groups = [{"params": [p], "weight_decay": 0.3}]
    c = TrainConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3)
    optimizer = train.build_optimizer(c, groups, torch.device("cpu"))
    assert optimizer.defaults["fused"]
    x, m, v = p.detach().clone(), 0.0, 0.0
    for t in range(1, 4):
        grad = torch.randn(5, 3, generator=g, dtype=torch.double)
        p.grad = grad.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
        x = x - 0.1 * 0.3 * x - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        torch.testing.assert_close(p.detach(), x)


def test_every_parameter_has_one_group_and_scalars_do_not_decay():
    with torch.device("meta"):
        model = llip.build(llip.Settings(), CONFIGS["tiny"], 96)
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    names = {id(p): n for n, p in model.named_parameters()}
    in_plain = {names[id(p)] for p in plain["params"]}
    in_decayed = {names[id(p)] for p in decayed["params"]}
    assert in_plain.isdisjoint(in_decayed) and in_plain | in_decayed == set(names.values())
    assert {"logit_scale", "logit_bias", "ln_final.weight", "visual.ln_pre.bias"} <= in_plain
    assert {"k_proj", "visual.positional_embedding", "token_embedding.weight"} <= in_decayed
    assert not any("ln_" in n or n.endswith("bias") for n in in_decayed)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(tmp_path, monkeypatch, workers):
    """Six steps equal three, a kill, and three more: weights, optimizer and metrics to the bit."""
    flags = ["--steps", 6, "--save-every", 3, "--log-every", 2, "--workers", workers]
    assert run(tmp_path / "whole", *flags) == 0
    with killed_after_saving(monkeypatch):
        assert run(tmp_path / "killed", *flags) == 130
    assert checkpoint(tmp_path / "killed")["step"] == 3
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "loss": 0.0}\n')  # logged after the checkpoint, before the kill
    assert run(tmp_path / "killed", *flags, "--resume", "auto") == 0
    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    for key in ("state_dict", "optimizer", "step", "samples", "meter"):
        assert same(whole[key], resumed[key]), key
    lines = [(tmp_path / d / "metrics.jsonl").read_text() for d in ("whole", "killed")]
    assert lines[0] == lines[1] and '"step": 6' in lines[0]


def test_chunks_do_not_change_the_run(tmp_path):
    for name, flags in (("one", []), ("four", ["--accumulate", 4])):
        assert run(tmp_path / name, "--steps", 3, "--log-every", 1, *flags) == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "four")
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # Adam's first steps amplify rounding


def test_torchrun_equals_one_process(tmp_path):
    """The real launcher, two processes, gloo: the losses of the same global batch."""
    flags = [*QUICK, "--method", "llip", "--steps", "4", "--log-every", "1", "--train-size", "32"]
    script = (
        "import sys, os; sys.argv[0] = 'train.py'; import train;"
        " train.tasks.PairTask.evaluate = lambda self, model: {};"
        " code = train.main(); sys.stdout.flush(); os._exit(code)"
    )
    (tmp_path / "go.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    for n in (1, 2):
        command = [*launcher, str(n), "--master_port", str(29500 + os.getpid() % 2000 + n)]
        command += [str(tmp_path / "go.py"), *flags, "--out", str(tmp_path / str(n))]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "FutureWarning" not in done.stderr  # a deprecated collective or flag
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "12"
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and len(logs[0]) == 4
    one, two = (checkpoint(tmp_path / n)["state_dict"] for n in "12")
    # as a whole: where a gradient is zero by symmetry (key biases) Adam turns rounding into steps
    a, b = (torch.cat([v.flatten() for v in state.values()]) for state in (one, two))
    assert (a - b).norm() < 1e-3 * a.norm()


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *QUICK, "--steps", "100000", "--log-every", "5"]
    command += ["--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    busy = subprocess.run([*command, "--resume", "auto"], env=env, capture_output=True, text=True)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    stopped = re.search(r"stopped at step (\d+); .*--resume", err)
    assert stopped and checkpoint(tmp_path / "run")["step"] == int(stopped[1])
    assert busy.returncode == 2 and "in use by another process" in busy.stderr  # two runs, one directory


@pytest.mark.parametrize("method", ["clip", "siglip", "llip"])
def test_overfits_eight_pairs(tmp_path, method, capsys):
    assert run(tmp_path / method, "--method", method, "--overfit", 8) == 0
    assert "can learn these pairs by heart" in capsys.readouterr().out


def test_checkpoint_rebuilds_the_model(tmp_path):
    assert run(tmp_path / "run", "--steps", 2) == 0
    saved, model = checkpoint(tmp_path / "run"), pretrained.load(tmp_path / "run")
    assert same(saved["state_dict"], dict(model.state_dict()))
    assert model.temperature == 5.0 and model.heads == 4
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "tokenizer.json",
        "results.json",
        "curves.png",
    }
    assert run(tmp_path / "more", "--steps", 2, "--init", tmp_path / "run", "--lr", 1e-9) == 0
    for key, value in checkpoint(tmp_path / "more")["state_dict"].items():
        torch.testing.assert_close(value, saved["state_dict"][key], atol=1e-6, rtol=1e-5, msg=key)


def test_nonfinite_loss_stops_before_saving(tmp_path, monkeypatch, capsys):
    step, count = tasks.PairTask.step, [0]

    def broken(*args, **more):
        count[0] += 1
        loss, logs = step(*args, **more)
        return (loss * math.nan if count[0] == 3 else loss), logs

    monkeypatch.setattr(tasks.PairTask, "step", broken)
    assert run(tmp_path / "run", "--steps", 6, "--save-every", 2, "--log-every", 4) == 2
    error = capsys.readouterr().err
    assert "not finite in steps 1..4" in error and "--lr" in error and error.count("\n") == 1
    assert f"the last checkpoint is whole: {tmp_path / 'run' / 'checkpoint.pt'}" in error
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    assert run(tmp_path / "run", "--steps", 2) == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(train, "check_same_run", lambda old, new: None)
    monkeypatch.setattr("baselines.methods.check_same_run", lambda old, new: None)
    assert run(tmp_path / "run", "--steps", 4, "--resume", "auto") == 2
    assert "No space left" in (error := capsys.readouterr().err) and "last checkpoint is whole" in error
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*-part"))


def test_a_damaged_checkpoint_is_named(tmp_path, capsys):
    assert run(tmp_path / "run", "--steps", 2) == 0
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert run(tmp_path / "run", "--steps", 2, "--resume", "auto") == 2
    assert str(path) in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "clap"], "--method clap: there are llip, clip, siglip"),
        (["--model", "ViT-B"], "--model ViT-B: expected one of tiny"),
        (["--preset", "llip"], "--preset llip: there are llip-B-32"),
        (["--precision", "fp16"], "--precision fp16: expected one of auto, fp32, bf16"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--lr", "nan"], "--lr nan: must be in"),
        (["--accumulate", "3"], "batch 8 is not divisible by 1 ranks x 3 chunks"),
        (["--batch-size", "64"], "48 images are fewer than one batch of 64"),
        (["--train-data", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--init", "nowhere.pt"], "nowhere.pt: no such file"),
        (["--mixture-heads", "5"], "64 is not divisible by 5 heads"),
        (["--method", "clip", "--margin", "0.9"], "no flag --margin; it belongs to finetune, label"),
        (["--method", "clip", "--target-domain", "x"], "no flag --target-domain; it belongs to finetune"),
        (["--preset", "alignclip-released"], "--method alignclip starts from a CLIP"),
        (["--preset", "llip-L-14", "--method", "clip"], "is a run of --method llip, not of clip"),
        (["--learning-rate", "1"], "there is no flag --learning-rate"),
        (["--comp"], "there is no flag --comp"),
        (["--epochs", "inf"], "--epochs inf: must be in"),
        (["--logit-bias", "1000"], "--logit-bias 1000.0: must be in"),
        (["llip"], "llip: not a flag"),
        (["--pairs", "some"], "--pairs some: expected one of auto, plain, tiled"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999: must be in [0, "),
        (["--workers", "1000000000"], "--workers 1000000000: must be in [0, 1,024]"),
        (["--model", "\x1b[31m"], "--model ?[31m: expected one of"),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, flags, message):
    assert run(tmp_path / "run", *flags) == 2
    assert_one_error(capsys, message)
    assert not list(tmp_path.iterdir())  # a folder with nothing but a lock would look like a run


def test_a_refused_run_deletes_nothing(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("mine")
    assert run(tmp_path / "run", "--train-data", "nowhere.csv") == 2
    assert (tmp_path / "run" / "config.json").read_text() == "mine"


def test_a_value_of_another_type_fails_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--lr", "fast"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--lr" in error and error.count("\n") == 1


def test_a_run_is_not_overwritten(tmp_path, monkeypatch, capsys):
    assert run(tmp_path / "run", "--steps", 2) == 0
    assert run(tmp_path / "run", "--steps", 2) == 2
    assert "holds a run" in capsys.readouterr().err
    assert run(tmp_path / "run", "--steps", 2, "--resume", "auto", "--lr", 5e-4) == 2
    assert "lr 0.0015 -> 0.0005" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert find("", "", "llip") == Path("runs/llip")
    for name in ("llip", "llip-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint.pt").touch()
    assert find("", "", "llip") == Path("runs/llip-3")
    assert find("", "auto", "llip") == Path("runs/llip-2")


@pytest.mark.parametrize("method", METHODS)
def test_the_help_shows_the_flags_of_one_method(method, capsys):
    with pytest.raises(SystemExit):
        main(["--method", method, "--help"])
    text = capsys.readouterr().out
    others = {flag for m in METHODS.values() for flag in m.flags()} - METHODS[method].flags()
    shown = set(re.findall(r"^  --(?:no-)?([a-z0-9-]+)", text, flags=re.M))
    assert {flag.replace("_", "-") for flag in METHODS[method].flags()} <= shown
    assert not shown & {flag.replace("_", "-") for flag in others} and len(shown) < 70


def test_presets_and_explicit_flags():
    c, s = configure(preset="llip-L-14", lr=1.0)
    assert (c.model, s.mixture_tokens, s.temperature, c.lr) == ("ViT-L-14", 32, 1.0, 1.0)
    assert c.steps * c.batch_size == pytest.approx(12.8e9, rel=1e-4)
    for name, (method, _) in presets().items():
        c, s = configure(
            preset=name, **({} if METHODS[method].module.TASK == "pairs" else {"init": "ViT-B/16"})
        )
        assert c.method == method
    assert configure(preset="siglip-B-32")[1].objective == "siglip"
    c, s = configure(preset="alignclip-detached", init="ViT-B/16")
    assert s.detach and (c.method, c.lr) == ("alignclip", 5e-6)


def test_a_run_continues_from_its_directory_alone(tmp_path, capsys):
    """--resume RUN selects method and flags; flags given beside it must agree or be free to change."""
    assert run(tmp_path / "run", "--method", "siglip", "--steps", 2, "--lr", 5e-4) == 0
    again = ["--resume", str(tmp_path / "run")]
    assert main([*again, "--log-every", "7"]) == 0
    assert "siglip" not in capsys.readouterr().err
    assert main([*again, "--lr", "0.1"]) == 2
    assert "lr 0.0005 -> 0.1" in capsys.readouterr().err
    assert main([*again, "--steps", "4"]) == 2
    assert "steps 2 -> 4" in capsys.readouterr().err
    assert main([*again, "--method", "llip"]) == 2
    assert "method 'siglip' -> 'llip'" in capsys.readouterr().err


def test_the_equations_shown_are_the_code_that_trains(tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("equation 2")

    monkeypatch.setattr(llip.Llip, "mix", broken)
    with pytest.raises(ZeroDivisionError, match="equation 2"):
        run(tmp_path / "run", "--steps", 1)


@pytest.mark.parametrize("method", ["llip", "clip", "siglip"])
def test_the_plain_step_equals_the_general_one(tmp_path, method):
    """encode, pair_logits, loss, backward against scale.gradcache.training_step, tiles included."""
    losses = []
    for name, flags in (("plain", []), ("chunks", ["--accumulate", 2]), ("tiled", ["--pairs", "tiled"])):
        if name == "tiled" and method != "llip":
            continue
        assert run(tmp_path / name, "--method", method, "--steps", 3, "--log-every", 1, *flags) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    for other in losses[1:]:
        assert other[0] == pytest.approx(losses[0][0], rel=1e-6)
        assert other == pytest.approx(losses[0], rel=1e-3)


# counted from facebookresearch/Llip@d5649c3 on the meta device
COUNTS = {
    "llip-B-32": "201,836,802",
    "llip-B-16": "174,965,250",
    "llip-L-14": "478",
    "llip-H-14": "1,154,835,458",
    "llip-G-14": "2,813",
    "clip-B-32": "151,277,313",
}


@pytest.mark.parametrize("preset", COUNTS)
def test_dry_run_prints_the_papers_parameter_counts(preset, capsys):
    assert main(["--preset", preset, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "GiB" not in out and "MB" not in out  # one unit in all of the report
    assert f"all {COUNTS[preset]}" in out and "390,625 steps of 32,768 pairs" in out
    cores, rate = re.search(r"decoding +(\d+) cores for ([\d,.]+) images/s", out).groups()
    flops = float(re.search(r"FLOPs/step +([\d.e+]+)", out)[1])
    assert float(rate.replace(",", "")) == pytest.approx(0.4 * 989e12 * 32768 / flops, rel=5e-3)
    assert int(cores) == math.ceil(float(rate.replace(",", "")) / costs.DECODED)


def test_activation_estimate_is_close_to_what_autograd_keeps():
    """Counted by hooks on the real graph of both towers, in fp32."""
    from model import CLIP, Config

    config = Config(32, 64, 8, 64, 3, 4, 256, 24, 100, 64, 3, 4, 256)
    model = CLIP(config)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(n, checkpointing):
        model.set_grad_checkpointing(checkpointing)
        held = {}

        def pack(x):
            if x.untyped_storage().data_ptr() not in parameters:
                held[x.untyped_storage().data_ptr()] = x  # alive: addresses stay unique
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.randn(n, 3, 64, 64), torch.zeros(n, 24, dtype=torch.long))
        return sum(x.untyped_storage().nbytes() for x in held.values())

    measured = (kept(12, False) - kept(4, False)) / 8
    assert costs.activation_bytes(model, False, False) == pytest.approx(measured, rel=0.05)
    recomputed = (kept(12, True) - kept(4, True)) / 8
    assert recomputed < 0.3 * measured and costs.activation_bytes(model, False, True) < 0.5 * measured


def test_time_is_not_in_the_metrics(tmp_path):
    assert run(tmp_path / "run", "--steps", 2, "--log-every", 1) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(line) == {"step", "loss", "lr", "scale"}


def test_schedule_and_clamp_reach_the_optimizer(tmp_path):
    assert run(tmp_path / "run", "--steps", 4) == 0
    c = TrainConfig(steps=4, warmup=2)
    groups = checkpoint(tmp_path / "run")["optimizer"]["param_groups"]
    assert {g["lr"] for g in groups} == {learning_rate(3, c)}
    assert run(tmp_path / "hot", "--steps", 1, "--logit-scale", 500) == 0
    assert checkpoint(tmp_path / "hot")["state_dict"]["logit_scale"] <= math.log(100)


def test_clip_norm_bounds_the_gradient(tmp_path, monkeypatch):
    seen = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, n: seen.append(n) or clip(list(p), n))
    assert run(tmp_path / "run", "--steps", 2, "--clip-norm", 0.5) == 0
    assert seen == [0.5, 0.5]


def test_epochs_are_the_datas(tmp_path):
    assert run(tmp_path / "run", "--epochs", 2, "--batch-size", 32) == 0  # 48 images: a batch each
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_bf16_towers(tmp_path):
    assert run(tmp_path / "run", "--steps", 2, "--precision", "bf16", "--accumulate", 2) == 0
    state = checkpoint(tmp_path / "run")["state_dict"]
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in state.values())


def test_a_signal_is_seen_at_a_step_that_saves_anyway(tmp_path, monkeypatch):
    step, count = tasks.PairTask.step, [0]

    def signalled(*args, **more):
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **more)

    monkeypatch.setattr(tasks.PairTask, "step", signalled)
    assert run(tmp_path / "run", "--steps", 30, "--save-every", 1) == 130
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_ctrl_c_after_a_run_is_not_swallowed(tmp_path):
    """openworld.py trains many runs in one process; between two of them Ctrl-C must end it too."""
    before = [signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert run(tmp_path / "run", "--steps", 2) == 0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)


def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    step, count = tasks.PairTask.step, [0]

    def broken(self, model, *args):
        loss, count[0] = step(self, model, *args), count[0] + 1
        if count[0] == 4:
            next(model.parameters()).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(tasks.PairTask, "step", broken)
    assert run(tmp_path / "run", "--steps", 8, "--save-every", 2) == 2
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["state_dict"].values())


def test_resume_of_nothing_is_an_error(tmp_path, capsys):
    assert run(tmp_path / "run", "--steps", 2, "--resume", tmp_path / "nowhere") == 2
    assert "no checkpoint to continue from" in capsys.readouterr().err


def test_a_finished_run_says_so_and_keeps_its_results(tmp_path, monkeypatch, capsys):
    asked, found = [], {"zeroshot": {"top1": 0.5, "chance": {"top1": 0.25}}}
    monkeypatch.setattr(tasks.PairTask, "evaluate", lambda self, model: asked.append(1) or found)
    flags = ["--steps", 3, "--warmup", 0, "--lr", 0.1]
    assert run(tmp_path / "run", *flags) == 0 and len(asked) == 1
    first = capsys.readouterr().out
    assert "trained in" in first
    results = tmp_path / "run" / "results.json"
    before, times = results.read_text(), results.stat().st_mtime_ns
    assert run(tmp_path / "run", *flags, "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert "all 3 steps are done" in said and "| zeroshot | top1   | 50.00 |" in said
    assert "resuming" not in said and "trained in" not in said and "evaluated in" not in said
    assert len(asked) == 1 and results.stat().st_mtime_ns == times
    damaged = ("half", "[1]", '{"zeroshot": 3}', '{"zeroshot": {"top1": "a", "chance": {"top1": 0.1}}}')
    for content in (None, *damaged):
        results.unlink()
        if content:
            results.write_text(content)
        assert run(tmp_path / "run", *flags, "--resume", str(tmp_path / "run")) == 0
        said = capsys.readouterr().out
        assert "all 3 steps are done" in said and "trained in" not in said
        assert results.read_text() == before
        # the scale moved by 0.1 a step; what chance is has not
        lines = [[x for x in text.splitlines() if "expected loss" in x] for text in (first, said)]
        assert lines[0] == lines[1] != []
    assert len(asked) == 6
    assert run(tmp_path / "run", "--steps", 4, *flags[2:], "--resume", "auto") == 2
    assert "steps 3 -> 4" in capsys.readouterr().err


def test_a_folder_with_files_of_others_is_refused_and_unchanged(tmp_path, capsys):
    for name in ("metrics.jsonl", "config.json", "results.json", "curves.png", "lock"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine, and longer than any mark that a program leaves")
        (folder / "notes.part").write_text("mine too")
        assert run(folder, "--steps", 2) == 2
        assert "choose another --out" in capsys.readouterr().err
        assert sorted(p.name for p in folder.iterdir()) == sorted([name, "notes.part"])
        assert (folder / name).read_text().startswith("mine")


def test_nothing_is_written_through_a_link(tmp_path, capsys):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("lock", "metrics.jsonl"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).symlink_to(victim)
        assert run(folder, "--steps", 2) == 2
        assert victim.read_text() == "precious"


def test_init_must_fit_the_method(tmp_path, capsys):
    assert run(tmp_path / "llip", "--steps", 1) == 0
    assert run(tmp_path / "clip", "--steps", 1, "--method", "clip", "--init", tmp_path / "llip") == 2
    assert "starts from a CLIP, not from a Llip" in capsys.readouterr().err
    more = ["--init", tmp_path / "llip", "--objective", "infonce"]
    assert run(tmp_path / "again", "--steps", 1, *more) == 0
    pretrained.load(tmp_path / "again")


def test_variants_of_llip_are_built_and_come_back(tmp_path):
    """The ladder without text, and patches as keys: --method llip and a flag."""
    for name, flags in {"PooledTokens": dict(pooling="learned"), "Llip": dict(all_tokens=True)}.items():
        _, s = configure(method="llip", **flags)
        model = llip.build(s, replace(CONFIGS["tiny"], vocab_size=50), 96)
        assert type(model).__name__ == name
        pretrained.save(model, tmp_path / f"{name}.pt")
        found = pretrained.load(tmp_path / f"{name}.pt")
        assert pretrained.describe(found) == pretrained.describe(model)
    with pytest.raises(ValueError, match="--method clip has no flag --pooling; it belongs to llip"):
        configure(method="clip", pooling="average")
    with pytest.raises(ValueError, match="--all-tokens: only with --pooling text"):
        llip.build(llip.Settings(pooling="average", all_tokens=True), CONFIGS["tiny"], 96)
    with pytest.raises(ValueError, match="leave out --init"):
        llip.build(llip.Settings(all_tokens=True), CLIP(CONFIGS["tiny"]), 96)


def test_test_seed_changes_the_evaluation_and_not_the_training_data():
    both = [tasks.pair_data(configure(train_size=4, test_seed=seed)[0]) for seed in (0, 7)]
    assert both[0][0].captions == both[1][0].captions
    for name in ("retrieval", "aspects", "zeroshot"):
        assert [tests[name].seed for _, tests in both] == [0, 7]


def captions_file(folder, words, size=8):
    rows = ["image,caption"]
    for k, word in enumerate(words):
        Image.new("RGB", (size, size), (20 * k, 100, 50)).save(folder / f"{k}.png")
        rows.append(f"{k}.png,a {word} thing")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.csv"


def test_data_for_validation_and_zero_shot_have_their_own_folders(tmp_path):
    """A list with captions and labels serves both; every list may have its images elsewhere."""
    for name in "tvz":
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{k}.png")
    (tmp_path / "t.csv").write_text("file,text,label\n0.png,a dog,dog\n1.png,a cat,cat\n")
    flags = {f"{flag}_data": str(tmp_path / "t.csv") for flag in ("train", "val")}
    flags |= dict(method="clip", image_root=str(tmp_path / "t"))
    train, tests = tasks.pair_data(configure(**flags, val_image_root=str(tmp_path / "v"))[0])
    assert train.name(0) == str(tmp_path / "t" / "0.png")
    assert tests["retrieval"].name(0) == str(tmp_path / "v" / "0.png")
    assert tests["zeroshot"] is tests["retrieval"]
    flags |= dict(zeroshot_data=flags["val_data"], zeroshot_image_root=str(tmp_path / "z"))
    _, tests = tasks.pair_data(configure(**flags)[0])
    assert tests["retrieval"].name(0) == str(tmp_path / "t" / "0.png")
    objects = tests["zeroshot"]
    assert objects.name(1) == str(tmp_path / "z" / "1.png") and objects.classes == ["cat", "dog"]
    (tmp_path / "z.csv").write_text("file,text\n0.png,a dog\n")
    with pytest.raises(ValueError, match="z.csv has no labels, which are needed here"):
        tasks.pair_data(configure(**flags | {"zeroshot_data": str(tmp_path / "z.csv")})[0])


def test_a_resumed_run_keeps_its_vocabulary_and_its_data(tmp_path, capsys):
    """Changed training data would change batch t, and captions learned again would change every token."""
    words = "red green blue pink grey black white brown".split()
    path = captions_file(tmp_path, words)
    flags = ["--train-data", path, "--batch-size", 4, "--method", "clip"]
    assert run(tmp_path / "run", *flags, "--steps", 2) == 0
    vocabulary = (tmp_path / "run" / "tokenizer.json").read_bytes()
    changes = {
        "8 rows became 9": lambda: captions_file(tmp_path, [*words, "purple"]),
        "images, captions, labels or order": lambda: captions_file(tmp_path, words[::-1]),
    }
    lines = [f"{k}.png,a {words[k]} thing" for k in range(7, -1, -1)]
    changes["labels or order;"] = lambda: path.write_text("\n".join(["image,caption", *lines]))
    for message, change in changes.items():
        change()
        assert run(tmp_path / "run", *flags, "--steps", 2, "--resume", "auto") == 2
        error = capsys.readouterr().err
        assert message in error and "--data-changed continues" in error and error.count("\n") == 1
    assert run(tmp_path / "run", *flags, "--steps", 2, "--resume", "auto", "--data-changed") == 0
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == vocabulary


def test_a_resumed_run_finds_its_data_in_another_place(tmp_path, capsys):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        captions_file(tmp_path / name, "red green blue pink".split())
    flags = ["--batch-size", 4, "--method", "clip", "--steps", 2]
    assert run(tmp_path / "run", *flags, "--train-data", tmp_path / "here" / "pairs.csv") == 0
    # every flag is the run's own, also those that may change
    assert main(["--resume", str(tmp_path / "run")]) == 0 and "moved" not in capsys.readouterr().out
    again = ["--resume", str(tmp_path / "run"), "--train-data", str(tmp_path / "there" / "pairs.csv")]
    assert main(again) == 0
    moved = f"--train-data moved: {tmp_path}/here/pairs.csv -> {tmp_path}/there/pairs.csv"
    assert moved in capsys.readouterr().out
    captions_file(tmp_path / "there", "red green blue pink".split(), size=99)
    assert main(again) == 2
    assert "images, captions, labels or order" in capsys.readouterr().err


def test_a_failing_evaluation_loses_no_step(tmp_path, monkeypatch, capsys):
    """The checkpoint is saved before the evaluation, and the resumed run evaluates again."""

    def broken(self, model):
        raise ValueError("cannot read x.png")

    monkeypatch.setattr(tasks.PairTask, "evaluate", broken)
    assert run(tmp_path / "run", "--steps", 2) == 2
    assert "cannot read x.png" in capsys.readouterr().err and checkpoint(tmp_path / "run")["step"] == 2
    found = {"zeroshot": {"top1": 0.5, "chance": {"top1": 0.25}}}
    monkeypatch.setattr(tasks.PairTask, "evaluate", lambda self, model: found)
    assert run(tmp_path / "run", "--steps", 2, "--resume", "auto") == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == found
    assert "zeroshot" in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]


SLOW = [pytest.param(stream, marks=pytest.mark.slow) for stream in ("closed", "pipe")]


@pytest.mark.parametrize("stream", ["full", *SLOW])
def test_a_run_goes_on_when_its_output_is_gone(tmp_path, stream):
    flags = " ".join([*QUICK, "--steps", "3", "--log-every", "1", "--out", str(tmp_path / "run")])
    code = "import tasks, train; tasks.PairTask.evaluate = lambda *a: {}; train.leave(train.main())"
    program = f"{sys.executable} -c '{code}' {flags}"
    command = {"closed": f"{program} >&-", "full": f"{program} >/dev/full", "pipe": f"{program} | head -1"}[
        stream
    ]
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and checkpoint(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU"])
def test_other_signals_save_too(tmp_path, monkeypatch, name):
    step = tasks.PairTask.step

    def signalled(*args):
        os.kill(os.getpid(), getattr(signal, name))
        return step(*args)

    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # nohup ignores SIGHUP
    monkeypatch.setattr(tasks.PairTask, "step", signalled)
    try:
        assert run(tmp_path / "run", "--steps", 30) == 130
    finally:
        signal.signal(getattr(signal, name), before)
    assert checkpoint(tmp_path / "run")["step"] == 1


def test_a_checkpoint_that_lacks_something_is_one_line(tmp_path, capsys):
    assert run(tmp_path / "run", "--steps", 2) == 0
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    for key in ("optimizer", "meter", "data"):
        torch.save({k: v for k, v in saved.items() if k != key}, path)
        assert run(tmp_path / "run", "--steps", 2, "--resume", "auto") == 2
        error = capsys.readouterr().err
        assert f"does not fit this run ('{key}')" in error and error.count("\n") == 1


@pytest.mark.parametrize("clock", ["does not move", "goes back"])
def test_the_loop_does_not_need_a_clock(tmp_path, monkeypatch, capsys, clock):
    times = itertools.repeat(100.0) if clock == "does not move" else itertools.count(1e6, -3600.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    monkeypatch.setattr(time, "time", lambda: next(times))
    assert run(tmp_path / "run", "--steps", 3, "--log-every", 1, "--val-data", "scenes") == 0
    said = capsys.readouterr().out
    assert duration(-5.0) == "0.0 s"
    assert "step      3/3" in said and not re.search(r"(ETA|trained in|evaluated in) -", said)


def test_a_run_says_when_its_warm_up_is_too_long_and_when_nothing_is_evaluated(tmp_path, capsys):
    assert run(tmp_path / "run", "--steps", 2, "--warmup", 3) == 0
    said = capsys.readouterr().out
    assert "the warm-up of 3 steps is longer than the run" in said and "no validation data" in said
    assert run(tmp_path / "other", "--steps", 2, "--warmup", 2) == 0
    assert "warm-up" not in capsys.readouterr().out


def test_a_signal_gives_the_other_signals_back(monkeypatch):
    """TRAP: after a stop, Ctrl-C in the same process must act at once."""
    started_with = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background ignores it
    stop = StopSignal()
    assert signal.getsignal(signal.SIGINT) == stop.handle
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed() and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    signal.signal(signal.SIGINT, started_with)


def test_a_signal_while_an_image_is_decoded_saves_and_ends(tmp_path, monkeypatch):
    lines, opened, count = ["image,caption"], datasets.open_image, itertools.count(1)
    for k in range(8):
        Image.new("RGB", (40, 40), (30 * k, 0, 0)).save(tmp_path / f"{k}.png")
        lines.append(f"{k}.png,picture number {k}")
    (tmp_path / "list.csv").write_text("\n".join(lines))

    def open_image(*args):
        if next(count) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return opened(*args)

    monkeypatch.setattr(datasets, "open_image", open_image)
    out = tmp_path / "run"
    flags = (
        f"--method clip --train-data {tmp_path}/list.csv --batch-size 8 --steps 500 --threads 1 --out {out}"
    )
    assert main(flags.split()) == 130
    assert 0 < checkpoint(out)["step"] < 10
