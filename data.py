"""Batches: an endless stream for training that resumes exactly, and ordered ones for evaluation.

Batch t is a pure function of t. The order of an epoch is drawn from (seed, epoch), a crop from (seed, epoch,
sample), and a caption from (seed, sample) and the number of the epoch. The global batch of step t is the same
for any number of ranks and workers, and a resumed run needs to know only t.
"""

import atexit
import itertools
import multiprocessing
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

# ruff: noqa: F401  (other files use these names as data.preprocess, data.Images ...)
from readers.benchmarks import base_new_classes, domainbed_split
from readers.datasets import Images, Subset, evenly_spread, open_dataset
from readers.images import IMAGE_ERRORS, MEAN, STD, Preprocess, RandomCrop, normalise, preprocess
from readers.shards import Shards
from util.evaluation import WhereFlags, where_of
from util.files import write_image
from util.flags import parse
from util.plots import sheet
from util.program import STOPPING, leave, program
from util.text import printable, warn

TOKEN_CACHE = 2**20  # captions whose tokens a process remembers


class Batch(NamedTuple):
    images: Tensor  # (b, 3, S, S)
    tokens: Tensor  # (b, L)
    ids: Tensor  # (b,) samples: dataset.name(ids[k]) is the file of row k


class LabelledBatch(NamedTuple):
    images: Tensor  # (b, 3, S, S)
    labels: Tensor  # (b,)
    ids: Tensor  # (b,)
    draws: Tensor  # (b,) random numbers, which choose a prompt of each image


class Stream(NamedTuple):
    """Which part of an endless stream is wanted; the batches do not depend on the number of workers."""

    seed: int = 0
    start_step: int = 0
    rank: int = 0
    world: int = 1  # ranks
    workers: int = 0  # processes that read images


def generator(*key) -> random.Random:
    """A random stream for every key. The text is hashed, so the streams of similar keys are unrelated."""
    return random.Random(" ".join(map(str, key)))


class Tokens:
    """Captions -> (b, L) long; a process tokenises each caption once."""

    def __init__(self, tokenizer: Callable, context_length: int):
        self.tokenizer, self.context_length, self.cache = tokenizer, context_length, {}

    def __call__(self, texts: list) -> Tensor:
        missing = [t for t in dict.fromkeys(texts) if t not in self.cache]
        if missing:
            rows = self.tokenizer(missing, self.context_length).to(torch.int32).numpy()  # (m, L)
            if len(self.cache) + len(missing) > TOKEN_CACHE:
                self.cache = {t: self.cache[t] for t in texts if t in self.cache}
            self.cache.update(zip(missing, rows))
        return torch.from_numpy(np.stack([self.cache[t] for t in texts])).long()  # (b, L)


def preprocess_of(config, **changes) -> Preprocess:
    """The transform of a model's images: OpenAI's, with what its checkpoint states and with the changes."""
    return Preprocess(config.image_size, **config.preprocessing | changes)


class Source:
    """source[t] is (the batch of step t, the broken images that it replaced, why there is no batch).

    Each of the three sources below defines batch(step, broken). A DataLoader takes it for a data set.
    Args: transform Preprocess or RandomCrop;  strict: a broken image is an error and is not replaced
    """

    def __init__(self, dataset, transform, seed: int = 0, strict: bool = False):
        self.dataset, self.transform, self.seed, self.strict = dataset, transform, seed, strict

    def __getitem__(self, step: int) -> tuple[tuple | None, list, str]:
        broken = []
        try:
            return self.batch(step, broken), broken, ""
        except (ValueError, OSError) as error:
            # as a value: an exception from a worker would bring a page of traceback along
            return None, broken, str(error)

    def images(self, ids: list, keys: list, broken: list) -> tuple[Tensor, list]:
        """(b, 3, S, S) and the samples that are in it; the crop of ids[k] depends on keys[k] alone."""
        size, mean, std = self.transform.image_size, self.transform.mean, self.transform.std
        in_memory = getattr(self.dataset, "pixels", None) if isinstance(self.transform, Preprocess) else None
        if in_memory is not None and in_memory.shape[1:3] == (size, size):
            return normalise(in_memory[ids], mean, std), ids  # SPEED: nothing to decode or resize
        pixels, used = np.empty((len(ids), size, size, 3), np.uint8), list(ids)
        for row, (index, key) in enumerate(zip(ids, keys)):
            pixels[row], used[row] = self.sample(index, key, broken)
        return normalise(pixels, mean, std), used

    def sample(self, index: int, key: tuple, broken: list) -> tuple[np.ndarray, int]:
        """((S, S, 3) uint8, index). A broken image is replaced by another one, drawn from its number."""
        for _ in range(10):
            try:
                rng = generator(self.seed, "crop", *key)
                return self.transform.pixels(self.dataset.image(index), rng), index
            except IMAGE_ERRORS as error:
                broken.append(f"{self.dataset.name(index)}: {error}")
            if self.strict:
                raise ValueError(f"cannot read {broken[-1]}")
            index = generator(self.seed, "instead of", index).randrange(len(self.dataset))
        raise ValueError(f"ten images in a row cannot be read, the last is {broken[-1]}")


class PairSource(Source):
    """A rank's rows of global batch t of an image-caption data set."""

    def __init__(self, dataset, transform, tokens, batch_size, stream):
        super().__init__(dataset, transform, stream.seed)
        if batch_size % stream.world:
            raise ValueError(f"global batch {batch_size} is not divisible by {stream.world} ranks")
        if len(dataset) < batch_size:
            raise ValueError(f"{len(dataset)} images are fewer than one batch of {batch_size}")
        self.tokens, self.batch_size, self.stream, self.epoch = tokens, batch_size, stream, None

    def epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            own = getattr(self.dataset, "epoch_order", None)  # shards keep samples of an archive together
            self.epoch, self.order = epoch, own(rng) if own else rng.permutation(len(self.dataset))
        return self.order

    def caption(self, index: int, epoch: int) -> str:
        """One caption per epoch; n epochs show all n of an image, each image's in another order."""
        texts = self.dataset.captions[index]
        return generator(self.seed, "caption", index).sample(texts, len(texts))[epoch % len(texts)]

    def batch(self, step: int, broken: list) -> Batch:
        # an epoch leaves out its last, incomplete batch
        epoch, k = divmod(step, len(self.dataset) // self.batch_size)
        b = self.batch_size // self.stream.world
        start = k * self.batch_size + self.stream.rank * b
        ids = self.epoch_order(epoch)[start : start + b].tolist()
        images, ids = self.images(ids, [(epoch, i) for i in ids], broken)
        return Batch(images, self.tokens([self.caption(i, epoch) for i in ids]), torch.tensor(ids))


class DomainSource(Source):
    """A rank's rows of a batch with equally many images of each domain, drawn with replacement."""

    def __init__(self, dataset, pools, transform, batch_size, stream):
        super().__init__(dataset, transform, stream.seed)
        b, rest = divmod(len(pools) * batch_size, stream.world)
        if rest:
            batch = f"batch of {len(pools)} x {batch_size} images"
            raise ValueError(f"{batch} is not divisible by {stream.world} ranks")
        self.pools, self.batch_size = pools, batch_size
        self.rows = range(stream.rank * b, (stream.rank + 1) * b)

    def batch(self, step: int, broken: list) -> LabelledBatch:
        ids = []
        for domain, pool in enumerate(self.pools):
            ids += generator(self.seed, "draw", step, domain).choices(pool, k=self.batch_size)
        images, ids = self.images([ids[k] for k in self.rows], [(step, k) for k in self.rows], broken)
        labels = torch.tensor([self.dataset.labels[i] for i in ids])
        draws = [generator(self.seed, "prompt", step, k).getrandbits(31) for k in self.rows]
        return LabelledBatch(images, labels, torch.tensor(ids), torch.tensor(draws))


class EvalSource(Source):
    """All images of a rank's part of the data set, in order, once."""

    def __init__(self, dataset, transform, batch_size, rank, world):
        super().__init__(dataset, transform, strict=True)
        first, last = (r * len(dataset) // world for r in (rank, rank + 1))
        self.batches = [list(range(k, min(k + batch_size, last))) for k in range(first, last, batch_size)]

    def batch(self, step: int, broken: list) -> tuple[Tensor, Tensor]:
        images, ids = self.images(self.batches[step], [()] * len(self.batches[step]), broken)
        return images, torch.tensor(ids)


@atexit.register
def end_workers() -> None:
    """TRAP: Python ends its children with SIGTERM, which our workers ignore, and would then wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def leave_signals(worker: int) -> None:
    """TRAP: torchrun signals the whole process group; a worker that ends first would stop the training."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """Iterator over a Source, in worker processes or in this one; the numbers are the same.

    .broken, .broken_count  images replaced because they could not be read: the first ten, and how many
    Raises: ValueError when more than ten images, and more than 1 % of those seen so far, are broken.
    """

    def __init__(self, source: Source, steps, workers: int = 0):
        self.source, self.seen, self.broken_count, self.broken = source, 0, 0, []
        # TRAP: without a generator, DataLoader draws from torch's global one and changes what a run draws
        options = dict(generator=torch.Generator(), pin_memory=torch.cuda.is_available())
        options |= dict(sampler=steps, num_workers=workers, worker_init_fn=leave_signals)
        self.packets = iter(DataLoader(source, batch_size=None, **options))

    def __iter__(self):
        return self

    def __next__(self) -> tuple:
        batch, broken, error = next(self.packets)
        for name in broken:
            self.broken_count += 1
            if self.broken_count <= 10:
                self.broken.append(name)
                if not error:
                    warn(f"another image replaces {name}")
        self.seen += len(batch[0]) if batch else 0
        if not error and self.broken_count > max(10, self.seen / 100):
            count = f"{self.broken_count} of {self.seen} images cannot be read, more than 1 %"
            error = f"{count}; the first is {self.broken[0]}"
        if error:
            self.packets = iter(())  # ends the workers now; the garbage collector may take seconds
            raise ValueError(error)
        return batch


def train_batches(dataset, tokenizer, transform, *, batch_size: int, context_length=77, **stream) -> Batches:
    """Endless batches of image-caption pairs.

    Args:    dataset with .image and .captions, and .pixels if it is in memory;
             transform RandomCrop(S) or preprocess(S);  batch_size over all ranks;  stream see Stream
    Returns: iterator of Batch, b = batch_size / world: rows rank * b to (rank + 1) * b of the global batch
    Raises:  ValueError: fewer images than a batch, or ranks do not divide it; also see Batches.
    """
    stream, tokens = Stream(**stream), Tokens(tokenizer, context_length)
    source = PairSource(dataset, transform, tokens, batch_size, stream)
    return Batches(source, itertools.count(stream.start_step), stream.workers)


def domain_batches(dataset, transform, *, batch_size: int, **stream) -> Batches:
    """Endless batches for fine-tuning: batch_size images of each domain, with replacement as in DomainBed.

    Args:    dataset labelled, e.g. a Subset of the source domains; without domains it counts as one;
             transform and stream as for train_batches
    Returns: iterator of LabelledBatch, b = domains * batch_size / world
    Raises:  ValueError: ranks do not divide the batch; also see Batches.
    """
    domains = getattr(dataset, "domains", None) or [0] * len(dataset)
    pools = [[i for i, d in enumerate(domains) if d == domain] for domain in sorted(set(domains))]
    stream = Stream(**stream)
    source = DomainSource(dataset, pools, transform, batch_size, stream)
    return Batches(source, itertools.count(stream.start_step), stream.workers)


def eval_batches(dataset, transform, batch_size: int, rank=0, world=1, workers=0) -> Batches:
    """Every image once, in order. Each rank gets one part, and the parts in rank order are the whole.

    Ranks may have different numbers of batches: communicate after the loop and not in it.
    Args:    transform preprocess(S);  batch_size of this rank
    Returns: iterator of (images (b, 3, S, S), ids (b,)); the last batch may be smaller
    Raises:  ValueError for the first image that cannot be read: a score without it would not be comparable.
    """
    source = EvalSource(dataset, transform, batch_size, rank, world)
    return Batches(source, range(len(source.batches)), workers)


def describe(dataset) -> str:
    """The size, captions, classes, domains and splits of a data set, in a few lines."""

    def spread(values):
        return f"min {min(values)}  mean {sum(values) / len(values):.2f}  max {max(values)}"

    lines = {"format": getattr(dataset, "format", type(dataset).__name__), "images": len(dataset)}
    if hasattr(dataset, "captions"):
        captions = list(dataset.captions)
        words = [len(text.split()) for texts in captions for text in texts]
        lines["captions"] = f"{len(words)}, per image: {spread([len(texts) for texts in captions])}"
        lines["words"] = f"per caption: {spread(words)}"
    if hasattr(dataset, "labels"):
        sizes = np.bincount(dataset.labels, None, len(dataset.classes)).tolist()
        lines["classes"] = f"{len(sizes)}, images per class: {spread(sizes)}"
        lines[""] = ", ".join(dataset.classes[:12]) + " ..." * (len(sizes) > 12)
    if getattr(dataset, "domains", None) is not None:
        sizes = np.bincount(dataset.domains, None, len(dataset.domain_names))
        lines["domains"] = ", ".join(f"{n} {c}" for n, c in zip(dataset.domain_names, sizes))
    if getattr(dataset, "splits", None):
        lines["splits"] = ", ".join(f"{n} {c}" for n, c in sorted(dataset.splits.items()))
    return "\n".join(f"{name:9} {printable(value)}" for name, value in lines.items())


def contact_sheet(dataset, size: int = 128, count: int = 50) -> Image.Image:
    """Some images as the training transform gives them, each above its first caption or its class."""
    ids = sorted(generator("sheet").sample(range(len(dataset)), min(count, len(dataset))))
    source, broken, pairs = Source(dataset, RandomCrop(size)), [], hasattr(dataset, "captions")
    pictures, ids = zip(*(source.sample(i, (0, i), broken) for i in ids))
    for name in broken:
        warn(f"another image replaces {name}")
    texts = [dataset.captions[i][0] if pairs else dataset.classes[dataset.labels[i]] for i in ids]
    return sheet(pictures, texts, 10, size)


@dataclass(frozen=True, kw_only=True)
class Flags(WhereFlags):
    path: str  # folder, list, 'shards/{00..10}.tar', or scenes
    show: bool = True  # draw a contact sheet
    split: str = ""  # only this split
    out: str = "sheet.png"  # where to write the contact sheet


@program
def main(argv: list[str]) -> None:
    """Describes a data set and draws some of it."""
    c = parse(Flags, argv, main.__doc__, ("path",))
    dataset = open_dataset(c.path, c.split or None, **where_of(c))
    print(describe(dataset))
    if c.show:
        write_image(c.out, contact_sheet(dataset))
        print(f"{'sheet':9} {c.out}")


if __name__ == "__main__":
    leave(main())
