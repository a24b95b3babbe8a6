"""Batches: an endless, exactly resumable stream for training, and ordered ones for evaluation.

One idea carries the file: batch t is a pure function of t. The order of an epoch is drawn from
(seed, epoch), a crop from (seed, epoch, sample), a caption from (seed, sample) and the epoch's
number. So the global batch of step t does not depend on how many ranks and workers make it, and to
resume, t is all there is to know. open_dataset reads any format (readers.py, shards.py), preprocess
is OpenAI's transform (images.py).
"""

import argparse
import atexit
import itertools
import multiprocessing
import random
import signal
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader

# ruff: noqa: F401  (data.preprocess, data.Pairs ... are the names that others use)
from readers.images import IMAGE_ERRORS, MEAN, STD, Preprocess, RandomCrop, normalise, preprocess, random_crop
from readers.lists import Labelled, Pairs, Subset, base_new_classes, domainbed_split, open_dataset
from readers.shards import Shards
from util.files import write_image
from util.text import warn

TOKEN_CACHE = 2**20  # captions whose tokens a process remembers


class Batch(NamedTuple):
    images: Tensor  # (b, 3, S, S)
    tokens: Tensor  # (b, L)
    ids: Tensor  # (b,) samples: dataset.name(ids[k]) says which file row k is


class LabelledBatch(NamedTuple):
    images: Tensor  # (b, 3, S, S)
    labels: Tensor  # (b,)
    ids: Tensor  # (b,)


class Packet(NamedTuple):
    """What a worker sends: a batch and the broken images met on the way, or why there is none."""

    batch: tuple | None
    broken: list
    error: str = ""


def generator(*key) -> random.Random:
    """A random stream for every key; a text is hashed whole, so near keys are unrelated."""
    return random.Random(" ".join(map(str, key)))


def fits(dataset, size: int) -> bool:
    """Whether the data set holds all its pictures in memory at this size."""
    held = getattr(dataset, "pixels", None)
    return held is not None and held.shape[1:3] == (size, size)


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


# Batch t as a function of t ----------------------------------------------------------------------


class Source:
    """source[t] is the Packet of step t: to DataLoader, a data set whose items are batches.

    What batch(step, broken) is made of, the three kinds of source below say.
    Args: transform Preprocess or RandomCrop;  strict: a broken image is an error, not replaced
    """

    def __init__(self, dataset, transform, seed: int = 0, strict: bool = False):
        self.dataset, self.transform, self.seed, self.strict = dataset, transform, seed, strict

    def __getitem__(self, step: int) -> Packet:
        broken = []
        try:
            return Packet(self.batch(step, broken), broken)
        except (ValueError, OSError) as error:
            # as a value: an exception from a worker arrives wrapped in a page of traceback
            return Packet(None, broken, str(error))

    def images(self, ids: list, keys: list, broken: list) -> tuple:
        """Images of samples; the crop of ids[k] depends on keys[k] alone.

        Returns: (b, 3, S, S), and the numbers of the samples that are really in it
        """
        size = self.transform.image_size
        if isinstance(self.transform, Preprocess) and fits(self.dataset, size):
            return normalise(self.dataset.pixels[ids]), ids  # SPEED: nothing to decode or resize
        pixels, used = np.empty((len(ids), size, size, 3), np.uint8), list(ids)
        for row, (index, key) in enumerate(zip(ids, keys)):
            pixels[row], used[row] = self.sample(index, key, broken)
        return normalise(pixels), used

    def sample(self, index: int, key: tuple, broken: list) -> tuple:
        """((S, S, 3) uint8, index); a broken image gives way to another, drawn from its number."""
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

    def __init__(self, dataset, transform, tokens, batch_size, seed, rank, world):
        super().__init__(dataset, transform, seed)
        if batch_size % world:
            raise ValueError(f"global batch {batch_size} is not divisible by {world} ranks")
        if len(dataset) < batch_size:
            raise ValueError(f"{len(dataset)} images are fewer than one batch of {batch_size}")
        self.tokens, self.batch_size, self.rank, self.world = tokens, batch_size, rank, world
        self.steps_per_epoch, self.epoch, self.order = len(dataset) // batch_size, None, None

    def epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            own = getattr(self.dataset, "epoch_order", None)  # shards keep near what lies near
            self.order = own(rng) if own else rng.permutation(len(self.dataset))
            self.epoch = epoch
        return self.order

    def caption(self, index: int, epoch: int) -> str:
        """One caption per epoch; n epochs show all n of an image, in an order of its own."""
        texts = self.dataset.captions[index]
        n = len(texts)
        if n == 1:
            return texts[0]
        return texts[generator(self.seed, "caption", index).sample(range(n), n)[epoch % n]]

    def batch(self, step: int, broken: list) -> Batch:
        epoch, k = divmod(step, self.steps_per_epoch)  # the ragged tail of an epoch is dropped
        b = self.batch_size // self.world
        start = k * self.batch_size + self.rank * b
        ids = self.epoch_order(epoch)[start : start + b].tolist()
        images, ids = self.images(ids, [(epoch, i) for i in ids], broken)
        texts = [self.caption(i, epoch) for i in ids]
        return Batch(images, self.tokens(texts), torch.tensor(ids))


class DomainSource(Source):
    """A rank's rows of a batch with as many images of each domain, drawn with replacement."""

    def __init__(self, dataset, pools, transform, batch_size, seed, rank, world):
        super().__init__(dataset, transform, seed)
        rows = len(pools) * batch_size
        if rows % world:
            raise ValueError(f"{len(pools)} domains x {batch_size} images are not divisible by {world} ranks")
        self.pools, self.batch_size = pools, batch_size
        self.share = range(rank * rows // world, (rank + 1) * rows // world)

    def batch(self, step: int, broken: list) -> LabelledBatch:
        ids = []
        for domain, pool in enumerate(self.pools):
            rng = generator(self.seed, "draw", step, domain)
            ids += rng.choices(pool, k=self.batch_size)
        ids, keys = [ids[k] for k in self.share], [(step, k) for k in self.share]
        images, ids = self.images(ids, keys, broken)
        labels = [self.dataset.labels[i] for i in ids]
        return LabelledBatch(images, torch.tensor(labels), torch.tensor(ids))


class EvalSource(Source):
    """All images of a rank's piece of the data set, in order, once."""

    def __init__(self, dataset, transform, batch_size, rank, world):
        super().__init__(dataset, transform, strict=True)
        self.batch_size = batch_size
        self.first, self.last = (r * len(dataset) // world for r in (rank, rank + 1))

    def __len__(self):
        return -(-(self.last - self.first) // self.batch_size)

    def batch(self, step: int, broken: list) -> tuple:
        start = self.first + step * self.batch_size
        ids = list(range(start, min(start + self.batch_size, self.last)))
        images, ids = self.images(ids, [()] * len(ids), broken)
        return images, torch.tensor(ids)


# Iterators ---------------------------------------------------------------------------------------


class StepsFrom:
    """start, start + 1, ... without end."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self):
        return itertools.count(self.start)


@atexit.register
def end_workers() -> None:
    """TRAP: Python ends its children with SIGTERM, which ours ignore, and then waits for them for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def leave_signals(worker: int) -> None:
    """TRAP: torchrun signals the whole process group; a worker that died first would take the loop along."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """Iterator over a Source, by worker processes or in this one; the numbers are the same.

    .broken, .broken_count  images replaced because they could not be read: the first ten, how many
    .steps_per_epoch        of pairs, else None
    Raises: ValueError when broken are more than 1 % of the images seen so far, and more than ten.
    """

    def __init__(self, source: Source, steps, workers: int = 0):
        self.source, self.seen, self.broken_count, self.broken = source, 0, 0, []
        self.steps_per_epoch = getattr(source, "steps_per_epoch", None)
        if workers:
            # each worker runs torch on one thread, DataLoader sees to that, and to the order
            loader = DataLoader(
                source,
                batch_size=None,
                sampler=steps,
                num_workers=workers,
                pin_memory=torch.cuda.is_available(),
                # TRAP: without its own generator it draws from torch's global one, and a run with
                # workers would then differ from one without
                generator=torch.Generator(),
                worker_init_fn=leave_signals,
            )
            self.packets = iter(loader)
        else:
            self.packets = map(source.__getitem__, iter(steps))

    def __len__(self):
        return len(self.source)

    def __iter__(self):
        return self

    def close(self):
        """Ends the workers now; left to the garbage collector they may take seconds."""
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
    dataset,
    tokenizer: Callable,
    *,
    image_size: int,
    batch_size: int,
    context_length: int = 77,
    seed: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    augment: RandomCrop | bool | None = None,
) -> Batches:
    """Endless batches of image-caption pairs, from start_step on.

    Args:    dataset with .image, .captions, and .pixels if it is in memory;  image_size S pixels;
             batch_size over all ranks;  augment a RandomCrop; True: RandomCrop(S);
             False: preprocess(S); None: False if the data set is in memory at this size, else True
    Returns: iterator of Batch(images (b, 3, S, S), tokens (b, L), ids (b,)), rows
             [rank * b, (rank + 1) * b) of the global batch, b = batch_size / world
    Raises:  ValueError: fewer images than a batch, ranks do not divide it; more under Batches.
    """
    if augment is None:
        augment = not fits(dataset, image_size)
    if not isinstance(augment, RandomCrop):
        augment = RandomCrop(image_size) if augment else Preprocess(image_size)
    tokens = Tokens(tokenizer, context_length)
    source = PairSource(dataset, augment, tokens, batch_size, seed, rank, world)
    return Batches(source, StepsFrom(start_step), workers)


def domain_batches(
    dataset,
    *,
    image_size: int,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    augment: RandomCrop | bool = True,
) -> Batches:
    """Endless batches for fine-tuning: batch_size images of each domain, one domain after another.

    REF: CLIPood and AlignCLIP crop 0.7 to 1 of the area, flip, and resize bilinearly; that is
    augment=True. Images are drawn with replacement, as DomainBed does.
    Args:    dataset labelled, e.g. a Subset of the source domains; without domains it counts as one
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
    source = DomainSource(dataset, list(pools.values()), augment, batch_size, seed, rank, world)
    return Batches(source, StepsFrom(start_step), workers)


def eval_batches(
    dataset, transform: Preprocess, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Batches:
    """Every image once, in order; a rank gets one piece, the pieces in rank order are the whole.

    Args:    transform preprocess(S);  batch_size of this rank. A rank may have a batch more than
             another: communicate after the loop, not in it
    Returns: iterator of (images (b, 3, S, S), ids (b,)) with a len; the last batch may be smaller
    Raises:  ValueError naming the first image that cannot be read: without it, it is another score.
    """
    source = EvalSource(dataset, transform, batch_size, rank, world)
    return Batches(source, range(len(source)), workers)


# python data.py PATH --show ----------------------------------------------------------------------


def describe(dataset) -> str:
    """What a data set is, in a few lines."""

    def spread(values):
        return f"min {min(values)}  mean {sum(values) / len(values):.2f}  max {max(values)}"

    def counts(numbers, names):
        return ", ".join(f"{n} {c}" for n, c in zip(names, np.bincount(numbers, None, len(names))))

    lines = [("format", getattr(dataset, "format", type(dataset).__name__))]
    lines.append(("images", len(dataset)))
    if hasattr(dataset, "captions"):
        captions = list(dataset.captions)
        per_image, words = map(len, captions), [len(t.split()) for c in captions for t in c]
        lines.append(("captions", f"{len(words)}, per image: {spread(list(per_image))}"))
        lines.append(("words", f"per caption: {spread(words)}"))
    if hasattr(dataset, "labels"):
        few, more = dataset.classes[:12], "" if len(dataset.classes) <= 12 else " ..."
        sizes = np.bincount(dataset.labels, None, len(dataset.classes)).tolist()
        lines.append(("classes", f"{len(sizes)}, images per class: {spread(sizes)}"))
        lines.append(("", ", ".join(few) + more))
    if getattr(dataset, "domains", None) is not None:
        lines.append(("domains", counts(dataset.domains, dataset.domain_names)))
    if getattr(dataset, "splits", None):
        lines.append(("splits", ", ".join(f"{n} {c}" for n, c in sorted(dataset.splits.items()))))
    return "\n".join(f"{name:9} {value}" for name, value in lines)


def contact_sheet(dataset, size: int, count: int = 50, columns: int = 10) -> Image.Image:
    """Images through the training transform and back from its numbers, each over its text."""
    ids = sorted(generator("sheet").sample(range(len(dataset)), min(count, len(dataset))))
    broken = []
    x, ids = Source(dataset, RandomCrop(size)).images(ids, [(0, i) for i in ids], broken)
    for name in broken:
        warn(f"another image replaces {name}")
    std, mean = (torch.tensor(c).view(3, 1, 1) for c in (STD, MEAN))
    pixels = (x * std + mean).mul(255).round().byte().permute(0, 2, 3, 1).numpy()  # (n, S, S, 3)
    width, height, font = size + 6, size + 44, ImageFont.load_default()
    sheet = Image.new("RGB", (columns * width, -(-len(ids) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, i in enumerate(ids):
        left, top = k % columns * width, k // columns * height
        sheet.paste(Image.fromarray(pixels[k]), (left, top))
        pairs = hasattr(dataset, "captions")
        text = dataset.captions[i][0] if pairs else dataset.classes[dataset.labels[i]]
        text = text.encode("latin-1", "replace").decode("latin-1")  # all that Pillow's font has
        lines = textwrap.wrap(text, max(size // 6, 4), max_lines=3, placeholder=" ...")
        draw.multiline_text((left + 1, top + size), "\n".join(lines), "black", font, spacing=1)
    return sheet


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Say what a data set is, and draw some of it.", allow_abbrev=False
    )
    parser.add_argument("path", help="folder, list, 'shards/{00..10}.tar', or scenes")
    parser.add_argument("--show", action="store_true", help="the default, and all there is")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--out", default="sheet.png", help="where to write the contact sheet")
    parser.add_argument("--size", type=int, default=128, help="pixels of a picture on the sheet")
    parser.add_argument("--image-root", help="folder that names in a list are relative to")
    for key in ("image", "caption", "label"):
        parser.add_argument(f"--{key}-key", help=f"column of a list that has the {key}")
    parser.add_argument("--allow-outside", action="store_true", help="read names that leave the image root")
    options = vars(parser.parse_args(argv))
    path, out, size, _ = (options.pop(k) for k in ("path", "out", "size", "show"))
    try:
        dataset = open_dataset(path, **options)
        print(describe(dataset))
        write_image(out, contact_sheet(dataset, size))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'sheet':9} {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
