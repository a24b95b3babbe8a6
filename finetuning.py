"""Fine-tuning a CLIP on labelled images: model, data, step and evaluation of five methods.

    method       module                                  smoothing  margin  average of weights
    finetune     clipood.FineTune                        none       0       -
    labelsmooth  clipood.FineTune                        uniform    0       -
    clipood      clipood.FineTune                        none       0.3     Beta(0.5, 0.5)
    alignclip    alignclip.AlignCLIP                     mixture    0.3     Beta(0.5, 0.5)
    flyp         clipood.FLYP, both towers               -          -       -

LabelTask is to these what pairs.PairTask is to pre-training: all that train.py's loop knows of them. What is
trained on and asked afterwards is the protocol of openworld.py. The batch holds as many images of each source
domain; crops of 0.7 to 1 of the area, flipped, and bilinear, as in the authors' loaders.

Every value of the table can be set by its flag, whatever the method. The rest, where it is not given:

    flag          CLIP as published          one of ours, narrower than 384   source of the first
    lr            5e-6 (flyp 1e-5)           5e-4                             CLIPood, AlignCLIP, FLYP
    steps         5000                       300                              10 epochs of 500
    batch size    36                         36                               CLIPood: 12 of each of 3 sources
    crop scale    0.7 (scenes: no crops)     0.7 (scenes: no crops)
    AdamW         decay 0.1, betas 0.9 0.999, eps 1e-8; cosine to 0 without warm-up

    REF: AlignCLIP's code draws 36 of each source: --batch-size 108. Office-Home: lr 1e-5; in the wild 3e-6,
    margin and beta 0.1. DomainNet: lr 1e-5, 10,000 steps, --batch-size 60; in the wild lr 5e-6, margin 0.1.
    REF: there, norms, biases and embeddings decay too; here only matrices do (train.parameter_groups).
"""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import archive
import data
import distributed
import evaluate
import openworld
import pretrained
import prompts
from alignclip import AlignCLIP
from clipood import FLYP, BetaMovingAverage, FineTune, require_clip
from model import CLIP
from pairs import pair_tokenizer

PUBLISHED = dict(
    lr=5e-6, steps=5000, batch_size=36, warmup=0, weight_decay=0.1, beta2=0.999, eps=1e-8,
    crop_scale=0.7, train_size=2048,
)  # fmt: skip
SMALL = dict(lr=5e-4, steps=300)
METHODS = {
    "finetune": dict(smoothing="none", margin=0.0, bma_beta=0.0),
    "labelsmooth": dict(smoothing="uniform", margin=0.0, bma_beta=0.0),
    "clipood": dict(smoothing="none", margin=0.3, bma_beta=0.5),
    "alignclip": dict(smoothing="mixture", margin=0.3, bma_beta=0.5),
    "flyp": dict(lr=1e-5, bma_beta=0.0),
}


def is_small(init: str) -> bool:
    """Whether a checkpoint is one of ours and narrower than any published CLIP; reads no tensor."""
    if not Path(init).exists():
        return False  # a name to download
    _, description = pretrained.weights(archive.read(pretrained.locate(init)))
    config = (description or {}).get("config")
    width = config.get("vision_width") if isinstance(config, dict) else None
    return isinstance(width, int) and width < 384


def defaults(c, given: set[str]):
    """The run's TrainConfig with this file's values for everything that was not given.

    Raises: ValueError without --init, and for values that cannot be.
    """
    if not c.init:
        raise ValueError(
            f"--method {c.method} starts from a CLIP: give --init, a checkpoint, a run of train.py or a"
            " name as ViT-B/16"
        )
    values = PUBLISHED | METHODS[c.method] | (SMALL if is_small(c.init) else {})
    c = replace(c, **{k: v for k, v in values.items() if k not in given})
    if c.open_task not in openworld.TASKS:
        raise ValueError(f"open_task {c.open_task!r}: there are {', '.join(openworld.TASKS)}")
    for name in ("shots", "align_layers", "margin", "align_weight", "bma_beta"):
        if not 0 <= getattr(c, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: must not be negative")
    if not 0 < c.guidance_temperature < math.inf:
        raise ValueError(f"--guidance-temperature {c.guidance_temperature}: must be positive")
    if c.method == "flyp" and c.accumulate > 1:
        raise ValueError("--accumulate: FLYP's loss is over pairs of the whole batch, not a mean")
    if c.dry_run:
        raise ValueError(f"--dry-run counts what pre-training costs, not --method {c.method}")
    return c


def build_method(c, clip: CLIP, text: Tensor, class_tokens: Tensor) -> nn.Module:
    """The module of c.method around clip; text (C, E) unit norm and class_tokens (C, L) of its classes."""
    if c.method == "flyp":
        return FLYP(clip, class_tokens)
    head = dict(
        smoothing=c.smoothing, epsilon=c.epsilon, scale=c.smoothing_scale, margin=c.margin
    )  # fmt: skip
    if c.method != "alignclip":
        return FineTune(clip, text, **head)
    return AlignCLIP(
        clip,
        text,
        branch=c.branch,
        layers=c.align_layers or None,
        weight=c.align_weight,
        guidance_temperature=c.guidance_temperature,
        attention=c.align_attention,
        similarity=c.similarity,
        detach=c.detach,
        **head,
    )


def first_images(dataset, n: int):
    """n images evenly spread over a data set (folders are sorted by class), as one domain."""
    n = min(n, len(dataset))
    part = data.Subset(dataset, [k * len(dataset) // n for k in range(n)])
    part.domains = None
    return part


class LabelTask:
    """Fine-tuning on classes: what the loop trains, on what, and how it is judged."""

    unit = "images"

    def __init__(self, c):
        self.c, self.average, self.zero_shot, self.sums = c, None, None, {}
        if c.vocab == "learn":
            raise ValueError("--vocab learn: a checkpoint keeps the vocabulary it was trained with")
        self.tokenizer = pair_tokenizer(c, ())
        # classes may be encoded by all ranks together, which NCCL does on GPUs only
        clip = pretrained.load(c.init).to(distributed.setup(c.device))
        try:
            require_clip(clip)
        except ValueError as error:
            raise ValueError(f"{c.init}: {error}") from None
        self.clip, self.config = clip, clip.config
        if c.image_size not in (0, self.config.image_size):
            raise ValueError(f"--image-size {c.image_size}: {c.init} has {self.config.image_size}")
        self.protocol = openworld.protocol(
            c.train_data, c.open_task, c.target_domain, whole=c.whole_target, shots=c.shots,
            seed=c.seed, image_root=c.image_root or None, image_size=self.config.image_size,
            size=c.train_size, bias=c.bias,
        )  # fmt: skip
        self.train = self.protocol.train
        if c.overfit:
            self.train = first_images(self.train, c.overfit)
        self.domains = len(set(getattr(self.train, "domains", None) or [0]))
        if c.batch_size % self.domains:
            fits = max(c.batch_size // self.domains, 1) * self.domains
            raise ValueError(
                f"batch {c.batch_size} is not divisible by {self.domains} source domains: try {fits}"
            )
        self.templates = openworld.templates(c.train_data)
        if c.template:
            self.templates = evaluate.read_templates([c.template])
        classes, length = self.train.classes, self.config.context_length
        with evaluate.evaluating(clip) as device:
            text = evaluate.encode_classes(clip, self.tokenizer, classes, self.templates)  # (C, E)
        tokens = self.tokenizer([prompts.fill(self.templates[0], n) for n in classes], length)
        self.model = build_method(c, clip, text, tokens.to(device))
        self.autocast = contextlib.nullcontext

    def begin(self, c) -> None:
        """Before the first step or loading: the number of steps is known, weights are those of --init."""
        self.c = c
        if c.bma_beta:
            self.average = BetaMovingAverage(self.clip, c.steps, c.bma_beta)

    def batches(self, start: int):
        scenes_or_few = self.c.overfit or hasattr(self.train, "pixels")  # random enough, or too few
        crop = data.RandomCrop(self.config.image_size, (self.c.crop_scale, 1.0), True, "bilinear")
        return data.domain_batches(
            self.train,
            image_size=self.config.image_size,
            batch_size=self.c.batch_size // self.domains,
            seed=self.c.seed,
            start_step=start,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=self.c.workers,
            augment=False if scenes_or_few or self.c.crop_scale == 1 else crop,
        )

    def step(self, model: nn.Module, batch, device: torch.device) -> Tensor:
        """Forward and backward. Losses are means over images, so the mean over chunks is exact."""
        chunks = self.c.accumulate
        images, labels = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels))
        parts, total = list(zip(images.chunk(chunks), labels.chunk(chunks))), 0.0
        for k, (x, y) in enumerate(parts, 1):
            together = k == len(parts) or not isinstance(model, DistributedDataParallel)
            with contextlib.nullcontext() if together else model.no_sync():
                with self.autocast():
                    loss, logs = model(x, y)
                (loss / chunks).backward()
            total = total + loss.detach() / chunks
            for name, value in logs.items():
                self.sums[name] = self.sums.get(name, 0.0) + value / chunks
        return total

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update(self.clip)

    def logged(self, steps: int) -> dict[str, float]:
        """The loss' parts and the accuracy, means over the steps since the last call."""
        means = {name: float(value) / steps for name, value in self.sums.items()}
        self.sums = {}
        return means

    def state(self) -> dict:
        """The reported CLIP under "state_dict", so that a run loads as it; what going on needs apart."""
        reported = self.clip if self.average is None else self.average.average
        more = {"sums": {k: float(v) for k, v in self.sums.items()}}
        if self.average is not None:
            more |= {"clip": self.clip.state_dict(), "average": self.average.state_dict()}
        model = pretrained.describe(reported)
        return {"state_dict": reported.state_dict(), "model": model, "task": more}

    def load(self, saved: dict) -> None:
        """Takes up a checkpoint's state()."""
        more = saved["task"]
        self.clip.load_state_dict(more.get("clip", saved["state_dict"]))
        self.sums = dict(more["sums"])
        if self.average is not None:
            self.average.load_state_dict(more["average"])

    def chance(self) -> str:
        if self.c.method == "flyp":
            n = self.c.batch_size
            return f"ln {n} = {math.log(n):.2f}; images of one class in a batch keep it above 0"
        C = len(self.train.classes)
        return f"ln {C} = {math.log(C):.2f} for a blind answer; training starts at zero-shot CLIP"

    def evaluate(self, model: nn.Module) -> dict[str, dict]:
        """Where it started, where it is, and the average, which is then the model to report."""
        if self.zero_shot is None:
            device = next(model.parameters()).device
            self.zero_shot = self.score(pretrained.load(self.c.init).to(device))
        rows = {"zero-shot": self.zero_shot, "fine-tuned": self.score(self.clip)}
        if self.average is not None:
            rows["averaged"] = self.score(self.average.average)
        return rows

    def score(self, clip: CLIP) -> dict:
        return evaluate.open_world(clip, self.protocol, self.tokenizer, self.templates)

    def fits(self, loss: float) -> bool:
        """Whether --overfit succeeded: smoothed targets keep the loss above 0, so answers are asked."""
        place, _ = evaluate.classify(self.clip, self.train, self.tokenizer, self.templates)
        return bool((place == 0).all())
