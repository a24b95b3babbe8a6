"""Batches: an endless stream for training that resumes exactly, and ordered ones for evaluation.

Batch t is a pure function of t. The order of an epoch is drawn from (seed, epoch), a crop from (seed, epoch,
sample), and a caption from (seed, sample) and the number of the epoch. The global batch of step t is the same
for any number of ranks and workers, and a resumed run needs to know only t. open_dataset reads any format
(readers/datasets.py); preprocess is OpenAI's transform (readers/images.py).
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

# ruff: noqa: F401  (other files use these names as data.preprocess, data.Pairs ...)
from readers.benchmarks import base_new_classes, domainbed_split
from readers.datasets import Labelled, Pairs, Subset, open_dataset
from readers.images import IMAGE_ERRORS, MEAN, STD, Preprocess, RandomCrop, normalise, preprocess
from readers.shards import Shards
from util.files import write_image
from util.flags import parse
from util.plots import sheet
from util.program import leave, program
from util.text import warn

TOKEN_CACHE = 2**20  # captions whose tokens a process remembers


class Batch(NamedTuple):
    images: Tensor  # (b, 3, S, S)
    tokens: Tensor  # (b, L)
    ids: Tensor  # (b,) samples: dataset.name(ids[k]) is the file of row k


class LabelledBatch(NamedTuple):
    images: Tensor  # (b, 3, S, S)
    labels: Tensor  # (b,)
    ids: Tensor  # (b,)


class Stream(NamedTuple):
    """Which part of an endless stream is wanted; the batches do not depend on the number of workers."""

    seed: int = 0
    start_step: int = 0
    rank: int = 0
    world: int = 1  # ranks
    workers: int = 0  # processes that read images


class Packet(NamedTuple):
    """What a worker sends: a batch and the broken images that it replaced, or why there is no batch."""

    batch: tuple | None
    broken: list
    error: str = ""


def generator(*key) -> random.Random:
    """A random stream for every key. The text is hashed, so the streams of similar keys are unrelated."""
    return random.Random(" ".join(map(str, key)))


def in_memory(dataset, size: int) -> bool:
    """Whether the data set keeps all its pictures in memory at this size."""
    pixels = getattr(dataset, "pixels", None)
    return pixels is not None and pixels.shape[1:3] == (size, size)


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


class Source:
    """source[t] is the Packet of step t. For a DataLoader it is a data set whose items are batches.

    Each of the three sources below defines batch(step, broken).
    Args: transform Preprocess or RandomCrop;  strict: a broken image is an error and is not replaced
    """

    def __init__(self, dataset, transform, seed: int = 0, strict: bool = False):
        self.dataset, self.transform, self.seed, self.strict = dataset, transform, seed, strict

    def __getitem__(self, step: int) -> Packet:
        broken = []
        try:
            return Packet(self.batch(step, broken), broken)
        except (ValueError, OSError) as error:
            # as a value: an exception from a worker would bring a page of traceback along
            return Packet(None, broken, str(error))

    def images(self, ids: list, keys: list, broken: list) -> tuple[Tensor, list]:
        """Images of samples; the crop of ids[k] depends on keys[k] alone.

        Returns: (b, 3, S, S), and the numbers of the samples that are in it
        """
        size = self.transform.image_size
        if isinstance(self.transform, Preprocess) and in_memory(self.dataset, size):
            return normalise(self.dataset.pixels[ids]), ids  # SPEED: nothing to decode or resize
        pixels, used = np.empty((len(ids), size, size, 3), np.uint8), list(ids)
        for row, (index, key) in enumerate(zip(ids, keys)):
            pixels[row], used[row] = self.sample(index, key, broken)
        return normalise(pixels), used

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
        self.tokens, self.batch_size, self.stream = tokens, batch_size, stream
        self.steps_per_epoch, self.epoch, self.order = len(dataset) // batch_size, None, None

    def epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            own = getattr(self.dataset, "epoch_order", None)  # shards keep samples of an archive together
            self.order = own(rng) if own else rng.permutation(len(self.dataset))
            self.epoch = epoch
        return self.order

    def caption(self, index: int, epoch: int) -> str:
        """One caption per epoch; n epochs show all n of an image, each image's in another order."""
        texts = self.dataset.captions[index]
        n = len(texts)
        if n == 1:
            return texts[0]
        return texts[generator(self.seed, "caption", index).sample(range(n), n)[epoch % n]]

    def batch(self, step: int, broken: list) -> Batch:
        epoch, k = divmod(step, self.steps_per_epoch)  # an epoch leaves out its last, incomplete batch
        b = self.batch_size // self.stream.world
        start = k * self.batch_size + self.stream.rank * b
        ids = self.epoch_order(epoch)[start : start + b].tolist()
        images, ids = self.images(ids, [(epoch, i) for i in ids], broken)
        texts = [self.caption(i, epoch) for i in ids]
        return Batch(images, self.tokens(texts), torch.tensor(ids))


class DomainSource(Source):
    """A rank's rows of a batch with equally many images of each domain, drawn with replacement."""

    def __init__(self, dataset, pools, transform, batch_size, stream):
        super().__init__(dataset, transform, stream.seed)
        b, rest = divmod(len(pools) * batch_size, stream.world)
        if rest:
            sizes = f"{len(pools)} domains x {batch_size} images"
            raise ValueError(f"{sizes} are not divisible by {stream.world} ranks")
        self.pools, self.batch_size = pools, batch_size
        self.rows = range(stream.rank * b, (stream.rank + 1) * b)

    def batch(self, step: int, broken: list) -> LabelledBatch:
        ids = []
        for domain, pool in enumerate(self.pools):
            rng = generator(self.seed, "draw", step, domain)
            ids += rng.choices(pool, k=self.batch_size)
        ids, keys = [ids[k] for k in self.rows], [(step, k) for k in self.rows]
        images, ids = self.images(ids, keys, broken)
        labels = [self.dataset.labels[i] for i in ids]
        return LabelledBatch(images, torch.tensor(labels), torch.tensor(ids))


class EvalSource(Source):
    """All images of a rank's part of the data set, in order, once."""

    def __init__(self, dataset, transform, batch_size, rank, world):
        super().__init__(dataset, transform, strict=True)
        self.batch_size = batch_size
        self.first, self.last = (r * len(dataset) // world for r in (rank, rank + 1))

    def __len__(self):
        return -(-(self.last - self.first) // self.batch_size)

    def batch(self, step: int, broken: list) -> tuple[Tensor, Tensor]:
        start = self.first + step * self.batch_size
        ids = list(range(start, min(start + self.batch_size, self.last)))
        images, ids = self.images(ids, [()] * len(ids), broken)
        return images, torch.tensor(ids)


@atexit.register
def end_workers() -> None:
    """TRAP: Python ends its children with SIGTERM, which our workers ignore, and would then wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def leave_signals(worker: int) -> None:
    """TRAP: torchrun signals the whole process group; a worker that ends first would stop the training."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """Iterator over a Source, in worker processes or in this one; the numbers are the same.

    .broken, .broken_count  images replaced because they could not be read: the first ten, and how many
    Raises: ValueError when more than ten images, and more than 1 % of those seen so far, are broken.
    """

    def __init__(self, source: Source, steps, workers: int = 0):
        self.source, self.seen, self.broken_count, self.broken = source, 0, 0, []
        if workers:
            # TRAP: without a generator, DataLoader draws from torch's global one, and a run with workers
            # would differ from one without
            options = dict(generator=torch.Generator(), pin_memory=torch.cuda.is_available())
            # DataLoader gives each worker one torch thread, and keeps the order of the steps
            options |= dict(num_workers=workers, worker_init_fn=leave_signals)
            loader = DataLoader(source, batch_size=None, sampler=steps, **options)
            self.packets = iter(loader)
        else:
            self.packets = map(source.__getitem__, iter(steps))

    def __len__(self):
        return len(self.source)

    def __iter__(self):
        return self

    def close(self) -> None:
        """Ends the workers now; the garbage collector may take seconds."""
        self.packets = iter(())

    def __next__(self) -> tuple:
        packet = next(self.packets)
        for name in packet.broken:
            self.broken_count += 1
            if self.broken_count <= 10:
                self.broken.append(name)
                if not packet.error:
                    warn(f"another image replaces {name}")
        if packet.error:
            self.close()
            raise ValueError(packet.error)
        self.seen += len(packet.batch[0])
        if self.broken_count > max(10, self.seen / 100):
            self.close()
            raise ValueError(
                f"{self.broken_count} of {self.seen} images cannot be read, more than 1 %;"
                f" the first is {self.broken[0]}"
            )
        return packet.batch


def train_batches(
    dataset, tokenizer, *, image_size: int, batch_size: int, context_length: int = 77, augment=True, **stream
) -> Batches:
    """Endless batches of image-caption pairs.

    Args:    dataset with .image and .captions, and .pixels if it is in memory;  image_size S pixels;
             batch_size over all ranks;  augment a RandomCrop; True: RandomCrop(S); False: preprocess(S);
             stream see Stream
    Returns: iterator of Batch(images (b, 3, S, S), tokens (b, L), ids (b,)), b = batch_size / world: rows
             rank * b to (rank + 1) * b of the global batch
    Raises:  ValueError: fewer images than a batch, or ranks do not divide it; also see Batches.
    """
    if not isinstance(augment, RandomCrop):
        augment = RandomCrop(image_size) if augment else Preprocess(image_size)
    stream, tokens = Stream(**stream), Tokens(tokenizer, context_length)
    source = PairSource(dataset, augment, tokens, batch_size, stream)
    return Batches(source, itertools.count(stream.start_step), stream.workers)


def domain_batches(
    dataset, *, image_size: int, batch_size: int, augment: RandomCrop | bool = True, **stream
) -> Batches:
    """Endless batches for fine-tuning: batch_size images of each domain, one domain after another.

    REF: CLIPood and AlignCLIP crop 0.7 to 1 of the area, flip, and resize bilinearly, as augment=True does.
    Images are drawn with replacement, as in DomainBed.
    Args:    dataset labelled, e.g. a Subset of the source domains; without domains it counts as one;
             stream see Stream
    Returns: iterator of LabelledBatch(images (b, 3, S, S), labels (b,), ids (b,)),
             b = domains * batch_size / world
    """
    domains = getattr(dataset, "domains", None) or [0] * len(dataset)
    pools = {domain: [] for domain in sorted(set(domains))}
    for index, domain in enumerate(domains):
        pools[domain].append(index)
    if not isinstance(augment, RandomCrop):
        crop = RandomCrop(image_size, (0.7, 1.0), True, "bilinear")
        augment = crop if augment else Preprocess(image_size, "bilinear")
    stream = Stream(**stream)
    source = DomainSource(dataset, list(pools.values()), augment, batch_size, stream)
    return Batches(source, itertools.count(stream.start_step), stream.workers)


def eval_batches(
    dataset, transform: Preprocess, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Batches:
    """Every image once, in order. Each rank gets one part, and the parts in rank order are the whole.

    Args:    transform preprocess(S);  batch_size of this rank. Ranks may have different numbers of batches:
             communicate after the loop and not in it
    Returns: iterator of (images (b, 3, S, S), ids (b,)) with a len; the last batch may be smaller
    Raises:  ValueError for the first image that cannot be read: a score without it would not be comparable.
    """
    source = EvalSource(dataset, transform, batch_size, rank, world)
    return Batches(source, range(len(source)), workers)


def describe(dataset) -> str:
    """The size, captions, classes, domains and splits of a data set, in a few lines."""

    def spread(values):
        return f"min {min(values)}  mean {sum(values) / len(values):.2f}  max {max(values)}"

    lines = [("format", getattr(dataset, "format", type(dataset).__name__)), ("images", len(dataset))]
    if hasattr(dataset, "captions"):
        captions = list(dataset.captions)
        per_image, words = [len(c) for c in captions], [len(t.split()) for c in captions for t in c]
        lines.append(("captions", f"{len(words)}, per image: {spread(per_image)}"))
        lines.append(("words", f"per caption: {spread(words)}"))
    if hasattr(dataset, "labels"):
        sizes = np.bincount(dataset.labels, None, len(dataset.classes)).tolist()
        lines.append(("classes", f"{len(sizes)}, images per class: {spread(sizes)}"))
        lines.append(("", ", ".join(dataset.classes[:12]) + " ..." * (len(sizes) > 12)))
    if getattr(dataset, "domains", None) is not None:
        sizes = np.bincount(dataset.domains, None, len(dataset.domain_names))
        lines.append(("domains", ", ".join(f"{n} {c}" for n, c in zip(dataset.domain_names, sizes))))
    if getattr(dataset, "splits", None):
        lines.append(("splits", ", ".join(f"{n} {c}" for n, c in sorted(dataset.splits.items()))))
    return "\n".join(f"{name:9} {value}" for name, value in lines)


def contact_sheet(dataset, size: int, count: int = 50) -> Image.Image:
    """Some images as the training transform gives them, each above its first caption or its class."""
    ids = sorted(generator("sheet").sample(range(len(dataset)), min(count, len(dataset))))
    source, broken, pairs = Source(dataset, RandomCrop(size)), [], hasattr(dataset, "captions")
    pictures, ids = zip(*(source.sample(i, (0, i), broken) for i in ids))
    for name in broken:
        warn(f"another image replaces {name}")
    texts = [dataset.captions[i][0] if pairs else dataset.classes[dataset.labels[i]] for i in ids]
    return sheet(pictures, texts, 10, size)


@dataclass(frozen=True)
class Flags:
    path: str  # folder, list, 'shards/{00..10}.tar', or scenes
    show: bool = True  # draw a contact sheet
    split: str = ""  # only this split
    out: str = "sheet.png"  # where to write the contact sheet
    size: int = 128  # pixels of a picture on the sheet
    image_root: str = ""  # folder that names in a list are relative to
    image_key: str = ""  # column of a list that has the image
    caption_key: str = ""  # column of a list that has the caption
    label_key: str = ""  # column of a list that has the label
    allow_outside: bool = False  # read names that leave the image root


@program
def main(argv: list[str]) -> None:
    """Describes a data set and draws some of it."""
    c = parse(Flags, argv, main.__doc__, ("path",))
    if c.size < 1:
        raise ValueError(f"--size {c.size} must be at least 1")
    names = ("image_root", "image_key", "caption_key", "label_key", "allow_outside")
    options = {name: getattr(c, name) for name in names if getattr(c, name)}
    dataset = open_dataset(c.path, c.split or None, **options)
    print(describe(dataset))
    if c.show:
        write_image(c.out, contact_sheet(dataset, c.size))
        print(f"{'sheet':9} {c.out}")


if __name__ == "__main__":
    leave(main())
