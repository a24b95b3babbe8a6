"""Process groups under torchrun, a gather with gradients, and reductions over ranks.

Contrastive losses need the texts of all ranks. Published codes gather them in four ways (flags of open_clip),
with the same loss but different gradients g. With W ranks under DistributedDataParallel, compared with the
gradient g_full of one process on the whole batch (tests/test_distributed.py):

    local_loss   gather_with_grad    |g| / |g_full|    direction
    yes          yes                 1                 correct: this file; logits cost 1/W
    no           yes                 1                 correct
    no           no                  1/W               correct; Adam hides the factor, SGD and clipping do not
    yes          no                  0.52              WRONG (cosine 0.97 at W = 2)
"""

import contextlib
import os
import re
import socket
from collections.abc import Callable
from concurrent import futures
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from util.text import one_line

# seconds that a rank waits for the others, at the start and in every exchange
TIMEOUT = os.environ.get("ALIGNCLIP_TIMEOUT", "600")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(device: str = "auto") -> torch.device:
    """Joins the process group, with nccl or gloo, if torchrun or SLURM's srun started several processes.

    Args:    device: "auto", "cpu", "mps", "cuda" (the GPU with the number of the local rank) or "cuda:N"
    Returns: the device of this process   Raises: ValueError, one line
    """
    env = os.environ
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"device {device!r}: expected auto, cpu, cuda, cuda:N or mps")
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"])
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    several, mps = int(env.get("WORLD_SIZE", "1")) > 1, torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps and not several else "cpu"
    if device.startswith("cuda:") and several:
        raise ValueError(f"--device {device} would put every rank on one GPU: use --device cuda")
    if device == "mps" and (several or not mps):
        raise ValueError("--device mps: this computer has none, or several processes run: use --device cpu")
    if device.startswith("cuda"):
        number, GPUs = int(device[5:] or env.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        device = f"cuda:{number}"
        if number >= GPUs:
            raise ValueError(f"{device} does not exist: this process sees {GPUs} GPUs; use --device cpu")
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        # with gloo for CPU tensors, plain numbers are reduced without waiting for a GPU
        join("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device)


def join(backend: str) -> None:
    """Meets the other ranks.   Raises: ValueError for a variable of the launcher or a rank that is late."""
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    address, *numbers = (os.environ.get(name, "") for name in names)
    torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        limit = timedelta(seconds=float(TIMEOUT))
        port, rank, world = map(int, numbers)
        socket.getaddrinfo(address, port)
        own = dict(is_master=False) if torchrun else dict(world_size=world, is_master=rank == 0)
        with quiet():
            # TRAP: another program that answers at this port would be waited for without end
            store = futures.ThreadPoolExecutor(1).submit(dist.TCPStore, address, port, timeout=limit, **own)
            # TRAP: torchrun keeps one store of addresses over all restarts. A restarted rank that reads the
            # address of a killed rank fails or waits for ten minutes, so each attempt has its own prefix.
            attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            store = dist.PrefixStore(attempt, store.result(limit.total_seconds()))
            dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError, OSError, OverflowError, futures.TimeoutError) as error:
        reason = one_line(error) if str(error) else f"no answer in {TIMEOUT} s"
        where = ", ".join(f"{name} {value}" for name, value in zip(names, (address, *numbers)))
        raise ValueError(f"the ranks do not meet ({where}, ALIGNCLIP_TIMEOUT {TIMEOUT}): {reason}") from error


@contextlib.contextmanager
def quiet():
    """Hides stderr: libraries print pages about a connection that fails, and its error is one line."""
    with os.fdopen(os.dup(2), "w") as kept, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)


class _Start(torch.autograd.Function):
    """Starts to send rows (B, ...) into buffers (W B, ...); its backward pass receives the gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, gathering: "Gathering") -> Tensor:
        ctx.gathering, ctx.rows = gathering, len(x)
        out = x.new_empty(world_size() * len(x), *x.shape[1:])
        gathering.sent = x.contiguous()  # must exist until it has been sent
        gathering.work = dist.all_gather(list(out.chunk(world_size())), gathering.sent, async_op=True)
        return out

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        ctx.gathering.work.wait()  # for what _Finish.backward started
        # a sum, because the loss of every rank depends on these rows; DDP takes the mean over ranks later
        return ctx.gathering.received.unflatten(0, (-1, ctx.rows)).sum(0), None


class _Finish(torch.autograd.Function):
    """Waits for the rows (W B, ...); its backward pass starts to send the gradients to their ranks."""

    @staticmethod
    def forward(ctx, out: Tensor, gathering: "Gathering") -> Tensor:
        gathering.work.wait()
        ctx.gathering = gathering
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        gathering = ctx.gathering
        gathering.sent = grad.contiguous()
        gathering.received = torch.empty_like(gathering.sent)  # from each rank, for the rows of this rank
        gathering.work = dist.all_to_all_single(gathering.received, gathering.sent, async_op=True)
        return grad, None


class Gathering:
    """A gather of rows (B, ...) that has started; finish() returns the rows of all ranks (W B, ...)."""

    def __init__(self, x: Tensor):
        self.rows = _Start.apply(x, self)

    def finish(self) -> Tensor:
        # TRAP: the graph refers to self. With self.rows the reference would be circular, and the texts of
        # every step would stay on the GPU until the garbage collector runs.
        rows, self.rows = self.rows, None
        return _Finish.apply(rows, self)


class _Transpose(torch.autograd.Function):
    """(B, W B) -> (B, W B) of the transposed matrix; its gradient is the same operation."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (-1, len(x))).permute(1, 2, 0).contiguous()  # (W, B, B), transposed blocks
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks)
        return received.transpose(0, 1).flatten(1)  # (B, W B)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Transpose.forward(ctx, grad)


def map_features(function: Callable, *features):
    """Applies a function of tensors to features: map_features(torch.Tensor.float, features)."""
    if isinstance(features[0], tuple):
        return tuple(function(*parts) for parts in zip(*features))
    return function(*features)


def start_gather(features):
    """SPEED: starts what gather(result) finishes. Rows, and later gradients, are sent during other work."""
    return features if world_size() == 1 else map_features(Gathering, features)


def gather(features):
    """Rows of all ranks, with gradient: (B, ...) -> (W B, ...), or a tuple of such tensors.

    Each rank receives W - 1 times its own bytes, and the same again for the gradients.
    Args: features: rows of this rank, equally many on every rank; or the result of start_gather
    """
    if world_size() == 1:
        return features
    return map_features(lambda x: (Gathering(x) if isinstance(x, Tensor) else x).finish(), features)


def transpose(logits: Tensor) -> Tensor:
    """Logits (local images, all texts) -> (local texts, all images), so that none is computed twice."""
    return logits.t() if world_size() == 1 else _Transpose.apply(logits)


def mean(values: dict[str, float]) -> dict[str, float]:
    """The mean of plain numbers over ranks. Every rank must call it with the same keys."""
    if world_size() == 1:
        return values
    x = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    dist.all_reduce(x)
    return dict(zip(values, (x / world_size()).tolist()))


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks, without gradient. Ranks may have different numbers of rows."""
    if world_size() == 1:
        return x
    parts = [None] * world_size()
    dist.all_gather_object(parts, x.cpu())
    return torch.cat(parts).to(x.device)


def broadcast(value):
    """Returns the plain value (str, int, ...) of rank 0 on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def check_same(flags: dict) -> None:
    """Raises: ValueError on every rank if their flags differ, except for where each of them runs."""
    text = str(flags | dict.fromkeys(("device", "threads", "workers")))
    if mean({"differs": broadcast(text) != text})["differs"]:
        raise ValueError("the ranks were started with different flags")


def shutdown() -> None:
    """Leaves the process group. TRAP: gloo can hang at the normal exit: end the process with os._exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
