"""Gradients over several processes, in chunks or not, against one process on the whole batch.

A gather without gradient has the same loss, so loss curves do not show it. The tests compute in fp64, so that
differences come from the algorithm and not from rounding.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import warnings
import weakref
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import losses
from llip import Llip, PooledTokens
from model import CLIP, Config
from scale import costs, distributed
from scale.gradcache import contrastive_loss, training_step
from util.program import program

SIZES = Config(16, 16, 8, 16, 2, 2, 32, 8, 50, 16, 1, 2, 32)
MODELS = {
    "clip infonce": lambda: CLIP(SIZES),
    "clip siglip": lambda: CLIP(SIZES, scale=10.0, bias=-3.0),
    "llip siglip": lambda: Llip(SIZES, 4, 2, temperature=2.0, bias=-3.0),
    "llip infonce": lambda: Llip(SIZES, 4, 2, temperature=2.0, bias=-3.0),
    "pooled siglip": lambda: PooledTokens(SIZES, 3, "learned", heads=2, bias=-3.0),
}
PAIRS = 8


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def batch():
    g = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, 3, 16, 16, generator=g, dtype=torch.float64)
    tokens = torch.randint(1, 48, (PAIRS, 8), generator=g)
    tokens[:, 0], tokens[:, 5] = 48, 49
    return images, tokens


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def whole_batch(name):
    model = build(name)
    loss = training_step(model, *batch(), name.split()[1])
    return loss, gradients(model)


def bytes_of(name, images, tokens):
    """Bytes that this rank receives in one step: collectives are wrapped, DDP's buckets seen by a hook."""
    found, real, world = Counter(), (dist.all_gather, dist.all_to_all_single), dist.get_world_size()

    def all_gather(parts, x, **how):
        found["others' rows"] += (world - 1) * x.nbytes
        return real[0](parts, x, **how)

    def all_to_all_single(received, x, **how):
        found["others' rows"] += (world - 1) * received.nbytes // world
        return real[1](received, x, **how)

    def all_reduce(group, bucket):  # a rank's part comes in once to be summed, and once as the sum
        found["gradients"] += 2 * (world - 1) * bucket.buffer().nbytes // world
        return allreduce_hook(group, bucket)

    model = DistributedDataParallel(build(name))
    model.register_comm_hook(None, all_reduce)
    try:
        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all_single
        training_step(model, images, tokens, name.split()[1])
    finally:
        dist.all_gather, dist.all_to_all_single = real
    return dict(found)


class Travelling:
    """Wraps a running collective and calls say() when the caller waits for it."""

    def __init__(self, work, say):
        self.work, self.say = work, say

    def wait(self):
        self.say()
        return self.work.wait()


def order_of_a_step(images, tokens):
    """The order of events in a step: start and end of collectives, forward and backward of the images."""
    said, real = [], (dist.all_gather, dist.all_to_all_single)

    def spied(call, name):
        def run(*args, **how):
            said.append(f"{name} begin")
            return Travelling(call(*args, **how), lambda: said.append(f"{name} awaited"))

        return run

    model = build("clip siglip")
    encode = model.encode_image
    model.encode_image = lambda x: (said.append("images"), encode(x))[1]
    model.visual.conv1.weight.register_hook(lambda grad: said.append("images' gradients"))
    try:
        dist.all_gather, dist.all_to_all_single = spied(real[0], "texts"), spied(real[1], "back")
        training_step(DistributedDataParallel(model), images, tokens, "siglip")
    finally:
        dist.all_gather, dist.all_to_all_single = real
    return said


def left_of_steps(images, tokens):
    """The number of gathers made, and of those still alive without garbage collection."""
    made, real = [], distributed.Gathering

    class Counted(real):
        def __init__(self, x):
            super().__init__(x)
            made.append(weakref.ref(self))

    model = DistributedDataParallel(build("llip siglip"))
    gc.disable()
    try:
        distributed.Gathering = Counted
        for chunks in (1, 2):
            training_step(model, images, tokens, "siglip", chunks)
        return len(made), sum(gather() is not None for gather in made)
    finally:
        distributed.Gathering = real
        gc.enable()


def worker(rank, world, folder):
    """Saves losses and gradients of every model under DDP, in one chunk and with one pair per chunk."""
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("error", FutureWarning)  # no deprecated collective
        store = f"file://{folder}/store{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        images, tokens = (x.chunk(world)[rank] for x in batch())
        results = {}
        for name in MODELS:
            for chunks in (1, PAIRS // world):
                model = DistributedDataParallel(build(name))
                for _ in range(2):  # DDP reports an unfinished reduction in the second step
                    model.zero_grad()
                    loss = training_step(model, images, tokens, name.split()[1], chunks)
                results[f"{name} {chunks}"] = float(loss), gradients(model.module)
            results[f"bytes {name}"] = bytes_of(name, images, tokens)
        results["order"] = order_of_a_step(images, tokens)
        results["left"] = left_of_steps(images, tokens)
        results["mean"] = distributed.mean({"rank": rank, "one": 1.0})
        results["broadcast"] = distributed.broadcast(f"from {rank}")
        results["rows"] = distributed.gather_rows(torch.full((rank + 1, 2), float(rank)))
        torch.save(results, f"{folder}/{world}-{rank}")
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's destructor can hang


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{world: [results of rank 0, 1, ...]}"""
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for world in (2, 4):
        context = multiprocessing.get_context("spawn")
        jobs = [context.Process(target=worker, args=(r, world, str(folder))) for r in range(world)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(120)
            job.kill()
        assert [job.exitcode for job in jobs] == [0] * world
        found[world] = [torch.load(folder / f"{world}-{r}") for r in range(world)]
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_one_process(ranks, name, world):
    loss, reference = whole_batch(name)
    for chunks in (1, PAIRS // world):
        results = [r[f"{name} {chunks}"] for r in ranks[world]]
        assert sum(r[0] for r in results) / world == pytest.approx(float(loss), rel=1e-9)
        for _, grads in results:
            assert grads.keys() == reference.keys()
            for key, expected in reference.items():
                torch.testing.assert_close(grads[key], expected, rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_equal_one_chunk(name):
    loss, reference = whole_batch(name)
    for chunks in (2, 4, 8):
        model = build(name)
        chunked = training_step(model, *batch(), name.split()[1], chunks)
        torch.testing.assert_close(chunked, loss)
        for key, grad in gradients(model).items():
            torch.testing.assert_close(grad, reference[key], rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_and_chunks_together(name):
    """--grad-checkpointing with --accumulate gives the same gradient."""
    loss, reference = whole_batch(name)
    model = build(name)
    model.set_grad_checkpointing()
    torch.testing.assert_close(training_step(model, *batch(), name.split()[1], chunks=4), loss)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, reference[key], rtol=1e-7, atol=1e-10, msg=key)


def test_averaging_chunk_losses_is_another_gradient():
    """The mean of the losses of chunks has a different gradient, which is why GradCache exists."""
    images, tokens = batch()
    model = build("clip infonce")
    for x, t in zip(images.chunk(4), tokens.chunk(4)):
        (contrastive_loss(model, *model(x, t), "infonce") / 4).backward()
    naive = torch.cat([g.flatten() for g in gradients(model).values()])
    exact = torch.cat([g.flatten() for g in whole_batch("clip infonce")[1].values()])
    assert torch.cosine_similarity(naive, exact, dim=0) < 0.98


def test_gather_without_gradient_is_another_gradient(ranks):
    """This error leaves the loss unchanged, but the gradient of the tower is wrong."""
    name = "clip infonce"
    model, (images, tokens) = build(name), batch()
    image_side, text_side = model(images, tokens)
    half = PAIRS // 2
    total = 0
    for r in range(2):  # what two ranks compute if the texts of the other rank are constants
        own = slice(r * half, (r + 1) * half)
        texts = [t if i == r else t.detach() for i, t in enumerate(text_side.chunk(2))]
        logits = model.pair_logits(image_side[own], torch.cat(texts))
        images_ = [x if i == r else x.detach() for i, x in enumerate(image_side.chunk(2))]
        logits_t = model.pair_logits(torch.cat(images_), text_side[own]).t()
        total = total + losses.info_nce(logits, logits_t, r * half) / 2
    total.backward()
    wrong = gradients(model)["visual.proj"]
    right = ranks[2][0][f"{name} 1"][1]["visual.proj"]
    assert (wrong - right).norm() > 0.05 * right.norm()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", [n for n in MODELS if "latent" not in n])
def test_dry_run_counts_the_bytes_that_travel(ranks, name, world):
    """The estimate of --dry-run equals the bytes that the collectives of a step received."""
    objective = name.split()[1]
    expected = costs.wire_bytes(build(name), objective, PAIRS, world)
    assert ("logits" in expected) == (objective == "infonce")
    twice = {k: 2 * v for k, v in expected.items()}  # fp64 here
    for r in ranks[world]:
        counted = r[f"bytes {name}"]
        assert counted["gradients"] == twice["gradients"]
        assert counted["others' rows"] == twice["texts"] + twice.get("logits", 0)


def test_texts_travel_while_images_are_encoded(ranks):
    """SPEED: the gradients of texts are sent during the backward pass of the images."""
    for r in ranks[2]:
        there = ["texts begin", "images", "texts awaited"]
        assert r["order"] == [*there, "back begin", "images' gradients", "back awaited"]


def test_a_step_leaves_no_gather_behind(ranks):
    """A reference cycle would keep the texts of all ranks until the garbage collector runs."""
    for world in (2, 4):
        assert [r["left"] for r in ranks[world]] == [(4, 0)] * world


def test_reductions(ranks):
    for world, results in ranks.items():
        for r in results:
            assert r["mean"] == {"rank": (world - 1) / 2, "one": 1.0}
            assert r["broadcast"] == "from 0"
            expected = torch.cat([torch.full((i + 1, 2), float(i)) for i in range(world)])
            assert torch.equal(r["rows"], expected)


def test_one_process_needs_no_group():
    x = torch.ones(3, 2)
    assert distributed.gather((x, x))[1] is x and distributed.world_size() == 1
    assert distributed.mean({"a": 2}) == {"a": 2} and distributed.gather_rows(x) is x


def test_bad_chunks():
    with pytest.raises(ValueError, match="8 is not divisible by 3"):
        training_step(build("clip infonce"), *batch(), "infonce", chunks=3)
    with pytest.raises(ValueError, match="objective 'sigmoid'"):
        training_step(build("clip infonce"), *batch(), "sigmoid")


def test_setup_refuses_missing_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="0 GPUs"):
        distributed.setup("cuda")


class Protocol(torch.nn.Module):
    """A dual encoder with only the methods of the protocol."""

    def __init__(self):
        super().__init__()
        self.image = torch.nn.Parameter(torch.eye(4, 3))
        self.text = torch.nn.Parameter(torch.ones(5, 3) + torch.eye(5, 3))

    def encode_image(self, images):
        return images @ self.image

    def encode_text(self, tokens):
        return tokens @ self.text

    def forward(self, images, tokens):
        return self.encode_image(images), self.encode_text(tokens)

    def pair_logits(self, image_side, text_side):
        return image_side @ text_side.t()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("objective", ["siglip", "infonce"])
def test_a_step_uses_only_the_protocols_methods(objective, chunks):
    torch.manual_seed(0)
    images, tokens, model = torch.randn(4, 4), torch.randn(4, 5), Protocol()
    loss = getattr(losses, {"siglip": "siglip", "infonce": "info_nce"}[objective])
    expected = loss(model.pair_logits(*model(images, tokens)))
    grads = torch.autograd.grad(expected, list(model.parameters()))
    found = training_step(model, images, tokens, objective, chunks)
    torch.testing.assert_close(found, expected)
    for p, g in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, g)


def test_a_restart_ignores_old_addresses(monkeypatch):
    """TRAP in rendezvous: after a restart, rank 0 waits for the new rank 1 and ignores the old address."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    for name, value in (env | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)

    def rank(number, attempt):
        if (pid := os.fork()) == 0:
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
            os.environ.update(TORCHELASTIC_RESTART_COUNT=str(attempt))
            signal.alarm(60)  # instead of ten minutes
            try:
                distributed.setup("cpu")
                os._exit(0 if distributed.mean({"rank": number}) == {"rank": 0.5} else 1)
            except BaseException:
                os._exit(2)
        return pid

    for attempt in (0, 1):
        pids = [rank(0, attempt)]
        time.sleep(0.5)  # time to read what the first attempt left in the store
        pids.append(rank(1, attempt))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [0, 0], f"attempt {attempt}"


def ranks_apart(work, *environments):
    """Runs work() as a program in one fork for each environment.   Returns: [(status, stderr)]"""

    @program
    def main(argv):
        work()

    found = []
    for environment in environments:
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            os.dup2(write, 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
            os.environ.update(environment)
            signal.alarm(60)
            os._exit(main([]))
        os.close(write)
        found.append((pid, read))
    said = []
    for pid, read in found:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.append((status, os.read(read, 9999).decode()))
        os.close(read)
    return said


def environment(rank, port, address="127.0.0.1", world=2):
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in (values | {"MASTER_ADDR": address}).items()}


@pytest.fixture
def busy():
    """The port of another program, which accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("case", ["alone", "no rank 0", "two of rank 0", "port in use", "address", "rank"])
def test_ranks_that_do_not_meet_say_so_in_one_line(monkeypatch, busy, case):
    monkeypatch.setattr(distributed, "TIMEOUT", "2")
    port = free_port()
    ranks = {
        "alone": [environment(0, port)],
        "no rank 0": [environment(1, port)],
        "two of rank 0": [environment(0, port), environment(0, port)],
        "port in use": [environment(0, busy), environment(1, busy)],
        "address": [
            environment(0, port, "no-such-host.invalid"),
            environment(1, port, "no-such-host.invalid"),
        ],
        "rank": [environment(2, port), environment(-1, port)],
    }[case]
    began = time.monotonic()
    for rank, (status, said) in zip(ranks, ranks_apart(lambda: distributed.setup("cpu"), *ranks)):
        assert status == 2 and said.count("\n") == 1, said
        assert f"MASTER_ADDR {rank['MASTER_ADDR']}, MASTER_PORT {rank['MASTER_PORT']}" in said
        assert said.startswith("error: " if rank["RANK"] == "0" else f"error on rank {rank['RANK']}: ")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("seconds", ["ten", "inf", "nan"])
def test_a_wrong_timeout_is_one_line(monkeypatch, seconds):
    monkeypatch.setattr(distributed, "TIMEOUT", seconds)
    ((status, said),) = ranks_apart(lambda: distributed.setup("cpu"), environment(0, free_port()))
    assert status == 2 and said.count("\n") == 1 and f"ALIGNCLIP_TIMEOUT {seconds}" in said, said


def test_a_stopped_rank_is_one_line_for_the_others(monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", "2")

    def work():
        distributed.setup("cpu")
        if distributed.rank() == 1:
            if os.fork():
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3)  # the child ends its stopped parent
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
        distributed.mean({"x": 1.0})

    port = free_port()
    (status, said), (killed, _) = ranks_apart(work, environment(0, port), environment(1, port))
    assert status == 1 and said.count("\n") == 1 and "lost or stopped (Timed out waiting" in said, said
    assert killed == -signal.SIGKILL


@pytest.mark.parametrize("other, refused", [({"lr": 1, "workers": 4}, False), ({"lr": 2}, True)])
def test_ranks_compare_their_flags(monkeypatch, other, refused):
    monkeypatch.setattr(distributed, "TIMEOUT", "20")

    def work():
        distributed.setup("cpu")
        distributed.check_same(other if distributed.rank() else {"lr": 1, "workers": 0})

    port = free_port()
    for status, said in ranks_apart(work, environment(0, port), environment(1, port)):
        assert (status, said.count("\n")) == ((2, 1) if refused else (0, 0)), said
        assert ("the ranks were started with different flags" in said) == refused


def test_auto_is_mps_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert distributed.setup("auto").type == ("mps" if there else "cpu")
    with pytest.raises(ValueError, match="--device mps: this computer has none.*--device cpu"):
        distributed.setup("mps")
