"""What a GPU computes, against the CPU, with tiny models. ALIGNCLIP_DEVICE=cpu runs the tests without one."""

import json
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import checkpoint
from test_compile import SIZES, pairs
from torch.nn.parallel import DistributedDataParallel

import train
from baselines.methods import parse
from lab import bench
from llip import Llip
from model import CLIP
from scale.gradcache import training_step
from scale.llip_tiles import TiledLlip

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("ALIGNCLIP_DEVICE", "cuda")
FLAGS = (
    "--batch-size 16 --train-size 64 --warmup 2 --lr 1e-4 --log-every 1 --precision fp32 --threads 1 --seed 3"
)


def losses_of(out, *flags):
    """The losses of a run's steps."""
    assert train.main([*FLAGS.split(), "--out", str(out), *flags]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


def gradients(model, device, chunks=1, autocast=torch.no_grad, objective="siglip"):
    """The loss and all gradients of one step, on the CPU."""
    model = model.to(device)
    model.zero_grad(set_to_none=True)
    batch = [x.to(device) for x in pairs()]
    more = {} if autocast is torch.no_grad else {"autocast": autocast}
    loss = training_step(model, *batch, objective, chunks, **more)
    return [loss.cpu(), *(p.grad.cpu().clone() for p in model.parameters() if p.grad is not None)]


def distance(a, b):
    """The largest relative distance of corresponding tensors; one below 1e-3 of the whole counts as noise."""
    floor = 1e-3 * max(y.norm() for y in b)
    return max(((x - y).norm() / y.norm().clamp_min(floor)).item() for x, y in zip(a, b, strict=True))


MODELS = {"clip": CLIP, "llip": lambda c: Llip(c, 3, 2), "tiled": lambda c: TiledLlip(c, 3, 2)}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param](SIZES)


@pytest.mark.parametrize("method", ["llip", "clip", "siglip"])
def test_training_is_that_of_the_cpu(tmp_path, method):
    cpu = losses_of(tmp_path / "cpu", "--method", method, "--device", "cpu", "--steps", "4")
    gpu = losses_of(tmp_path / "gpu", "--method", method, "--device", DEVICE, "--steps", "4")
    torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)


def test_a_run_continues(tmp_path):
    whole = losses_of(tmp_path / "whole", "--device", DEVICE, "--steps", "4", "--save-every", "2")
    stopped = tmp_path / "stopped"
    losses_of(stopped, "--device", DEVICE, "--steps", "4", "--save-every", "2")
    os.replace(stopped / "checkpoint.previous.pt", stopped / "checkpoint.pt")
    assert checkpoint(stopped)["step"] == 2
    assert train.main(["--resume", str(stopped), "--device", DEVICE, "--log-every", "1"]) == 0
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    again = torch.tensor([row["loss"] for row in rows if "loss" in row])
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_cpu(model):
    expected = gradients(model, "cpu")
    assert distance(gradients(model, DEVICE), expected) < 1e-4


def test_chunks_have_the_gradient_of_the_whole_batch(model):
    assert distance(gradients(model, DEVICE, chunks=3), gradients(model, DEVICE)) < 1e-4


def test_bf16_is_near_fp32(model):
    """Eight bits of mantissa: 1 % of a loss, 10 % of a gradient's norm."""
    exact = gradients(model, DEVICE)
    half = gradients(model, DEVICE, autocast=lambda: torch.autocast(DEVICE, torch.bfloat16))
    assert torch.isfinite(half[0]) and abs(half[0] - exact[0]) < 0.01 * exact[0]
    assert distance([torch.cat([g.flatten() for g in half])], [torch.cat([g.flatten() for g in exact])]) < 0.1


def test_a_compiled_model_has_the_same_gradients(model):
    torch._dynamo.reset()
    exact = gradients(model, DEVICE)
    batch = [x.to(DEVICE) for x in pairs()]
    model.zero_grad(set_to_none=True)
    backend = "inductor" if DEVICE == "cuda" else "eager"
    loss = training_step(torch.compile(model, backend=backend), *batch, "siglip")
    compiled = [loss.cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]
    assert distance(compiled, exact) < 1e-3


def test_the_optimizer_steps_as_on_the_cpu():
    c, _ = train.configure(**parse(train.CONFIG, ["--lr", "1e-2"], ""))
    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = CLIP(SIZES)
        gradients(model, "cpu", objective="infonce")
        grads = [p.grad for p in model.parameters()]
        model = model.to(device)
        for p, g in zip(model.parameters(), grads):
            p.grad = None if g is None else g.to(device)
        train.build_optimizer(c, train.parameter_groups(model, 0.1), torch.device(device)).step()
        found.append([p.detach().cpu() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["siglip", "infonce"])
def test_the_collectives_of_the_backend(tmp_path, model, objective):
    """One rank under DDP: nccl beside gloo on a GPU."""
    exact = gradients(model, DEVICE, objective=objective)
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model.zero_grad(set_to_none=True)
        wrapped = DistributedDataParallel(model, device_ids=[0] if DEVICE == "cuda" else None)
        batch = [x.to(DEVICE) for x in pairs()]
        loss = training_step(wrapped, *batch, objective, chunks=3)
        found = [loss.cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]
    finally:
        dist.destroy_process_group()
    assert distance(found, exact) < 1e-4


@pytest.mark.parametrize("kind", ["clipood", "alignclip", "coop", "cocoop", "maple"])
def test_what_is_timed_of_a_method_is_on_the_gpu(kind):
    """A method makes its prompts on the CPU, so that what it builds must be moved."""
    words = {"coop": dict(context=4), "cocoop": dict(context_words=""), "maple": dict(context_words="")}
    flags = words.get(kind, {})
    case = partial(bench.finetune_case, kind, "tiny", 4, torch.device(DEVICE), **flags)
    case()()
    assert case(answers=True)().device.type == DEVICE
