"""MPS has no float64: no training step, evaluation or resumed run may create one on the device.

The CPU plays the device. What comes from Tensor.cpu() or NumPy is marked as being on the host.
"""

import pytest
import small_models
import torch
from conftest import checkpoint
from test_label_task import clip, folder  # noqa: F401  (fixtures)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import tasks
import train
from evals import linear_probe, maps, mixtures, typographic
from readers import scenes


class Host(torch.Tensor):
    """A tensor that is not on the device."""


class Device(TorchFunctionMode):
    """A device without float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found, given = func(*args, **(kwargs or {})), tree_leaves((args, kwargs))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        if isinstance(found, torch.Tensor) and not tensors and "device" not in (kwargs or {}):
            return found.as_subclass(Host)  # made from numbers or an array
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                if not any(isinstance(t, Host) for t in tensors):
                    raise TypeError(f"{func}: the device has no float64")
        return found


@pytest.fixture
def device(monkeypatch):
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: real(self).as_subclass(Host))
    for name in ("step", "evaluate", "load"):
        for task in (tasks.PairTask, tasks.LabelTask):
            method = getattr(task, name)

            def guarded(*args, method=method):
                with Device():
                    return method(*args)

            monkeypatch.setattr(task, name, guarded)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("clip", "llip", "tes")]


def test_the_device_refuses_float64(device):
    x = torch.ones(2)
    with Device(), pytest.raises(TypeError, match="no float64"):
        x.double()
    with Device():
        assert x.cpu().double().mean() == 1


@pytest.mark.parametrize(
    "method", ["clipood", *(pytest.param(m, marks=pytest.mark.slow) for m in ("clip", "llip", "tes"))]
)
def test_training_evaluation_and_resume(device, tmp_path, request, method):
    flags = f"--method {method} --threads 1 --device cpu --steps 2 --save-every 1 --log-every 1 --warmup 1"
    flags += f" --train-size 48 --out {tmp_path / 'run'}"
    if method in ("clipood", "tes"):
        flags += f" --batch-size 6 --target-domain cartoon --init {request.getfixturevalue('clip')}"
    else:
        flags += " --batch-size 8"
    assert train.main(flags.split()) == 0
    for name in ("checkpoint.pt", "results.json"):
        (tmp_path / "run" / name).unlink()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_maps_mixtures_and_notes(device, monkeypatch):
    """The functions of evals/ that meet the device; what goes to it is no longer on the host."""
    real = torch.Tensor.to
    strip = lambda self, *where, **how: real(self.as_subclass(torch.Tensor), *where, **how)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", strip)
    plain, llip = (small_models.MODELS[name](small_models.CONFIG).eval() for name in ("clip", "llip"))
    tokenizer, size = small_models.TOKENIZER, small_models.CONFIG.image_size
    things, drawn = scenes.Objects("test", 4, image_size=size), scenes.Scenes("test", 4, image_size=size)
    with Device():
        for model, names in ((plain, (*maps.NAMES, "centre")), (llip, maps.LLIP)):
            maps.measure(model, tokenizer, things, names)
            typographic.typographic(model, things, tokenizer)
            linear_probe.encode(model, things)
        captions = mixtures.scene_captions(drawn)
        mixtures.measure(llip, tokenizer, drawn, captions, mixtures.Flags(model=""))
