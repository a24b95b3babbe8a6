"""Fine-tuning a CLIP on labelled images: model, data, step and evaluation of nine methods.

    method       module                                  smoothing  margin  average of weights
    finetune     clipood.FineTune                        none       0       -
    labelsmooth  clipood.FineTune                        uniform    0       -
    clipood      clipood.FineTune                        none       0.3     Beta(0.5, 0.5)
    alignclip    alignclip.AlignCLIP                     mixture    0.3     Beta(0.5, 0.5)
    flyp         flyp.FLYP,    both towers               -          -       -
    coop         coop.CoOp, prompts only      -          -       -
    cocoop       cocoop.CoCoOp, prompts only    -          -       -
    maple        maple.MaPLe, prompts only     -          -       -
    tes          tes.TeS, the image tower and two heads  -          -       -

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

    prompts: SGD; coop 0.002, batch 32, 50 epochs; cocoop 0.002, 1, 10; maple 0.0035, 4, 5; decay 5e-4;
    16 shots; crops of 0.08. tes: Nesterov 0.00316, batch 256, 100 epochs, decay 1e-5. All
    four draw from all domains alike, as their codes do; for ours they have AdamW and the second column. What
    they learned beside CLIP's weights is under "task" in the checkpoint, while state_dict stays a plain CLIP:
    new classes are asked through the prompts (TeS: its projection), and the figures are the run's own.

    REF: CoOp and its heirs spend the first epoch at lr 1e-5; here there is no warm-up but --warmup.
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

import data
import evaluate
import pretrained
from alignclip import AlignCLIP
from baselines.cocoop import CoCoOp
from baselines.coop import CoOp, start_words
from baselines.flyp import FLYP
from baselines.maple import MaPLe
from baselines.tes import TeS
from clipood import BetaMovingAverage, FineTune, average_of_patches, require_clip
from evals import open_world as openworld
from evals import protocol as protocols
from model import CLIP
from readers import templates as prompts
from scale import distributed
from tasks import pair_tokenizer
from weights import archive

PUBLISHED = dict(
    lr=5e-6,
    steps=5000,
    batch_size=36,
    warmup=0,
    weight_decay=0.1,
    beta2=0.999,
    eps=1e-8,
    crop_scale=0.7,
    train_size=2048,
)
SMALL = dict(lr=5e-4, steps=300)
PROMPTS = dict(optimizer="sgd", weight_decay=5e-4, shots=16, crop_scale=0.08, bma_beta=0.0)
WORDS = "a photo of a"
NESTEROV = dict(optimizer="nesterov", weight_decay=1e-5, bma_beta=0.0)
# beside SMALL, for the last four
OURS = dict(epochs=0.0, batch_size=36, optimizer="adamw", shots=0)
METHODS = {
    "finetune": dict(smoothing="none", margin=0.0, bma_beta=0.0),
    "labelsmooth": dict(smoothing="uniform", margin=0.0, bma_beta=0.0),
    "clipood": dict(smoothing="none", margin=0.3, bma_beta=0.5),
    "alignclip": dict(smoothing="mixture", margin=0.3, bma_beta=0.5),
    "flyp": dict(lr=1e-5, bma_beta=0.0),
    "coop": PROMPTS | dict(lr=2e-3, batch_size=32, epochs=50.0, context=16),
    "cocoop": PROMPTS | dict(lr=2e-3, batch_size=1, epochs=10.0, context=4, context_words=WORDS),
    "maple": PROMPTS | dict(lr=3.5e-3, batch_size=4, epochs=5.0, context=2, context_words=WORDS),
    "tes": NESTEROV | dict(lr=3.16e-3, batch_size=256, epochs=100.0),
}
BESIDE = {  # what these learn lies beside CLIP; their values for a small one
    "coop": OURS | dict(lr=5e-3, context=4),
    "cocoop": OURS | dict(lr=5e-3),
    "maple": OURS | dict(lr=5e-3),
    "tes": OURS,
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
    values = PUBLISHED | METHODS[c.method]
    if is_small(c.init):
        values |= SMALL | BESIDE.get(c.method, {})
    if "steps" in given or c.overfit:
        values["epochs"] = 0.0
    c = replace(c, **{k: v for k, v in values.items() if k not in given})
    if c.open_task not in protocols.TASKS:
        raise ValueError(f"open_task {c.open_task!r}: there are {', '.join(protocols.TASKS)}")
    if c.image_pooling not in ("cls", "average"):
        raise ValueError(f"--image-pooling {c.image_pooling}: cls or average")
    for name in ("shots", "align_layers", "margin", "align_weight", "bma_beta"):
        if not 0 <= getattr(c, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: must not be negative")
    if not 0 < c.guidance_temperature < math.inf:
        raise ValueError(f"--guidance-temperature {c.guidance_temperature}: must be positive")
    if c.method == "flyp" and c.accumulate > 1:
        raise ValueError("--accumulate: FLYP's loss is over pairs of the whole batch, not a mean")
    if c.method == "tes" and c.accumulate > 1:
        raise ValueError("--accumulate: TeS has a BatchNorm, which must see the whole batch")
    if c.method in BESIDE and c.bma_beta:
        raise ValueError(f"--bma-beta averages CLIP's weights, which is not what {c.method} reports")
    if c.class_context and (c.method != "coop" or c.open_task != "domain-shift"):
        raise ValueError(
            "--class-context is CoOp's, and no other classes can be asked: --open-task domain-shift"
        )
    if c.image_pooling != "cls" and c.method not in ("finetune", "labelsmooth", "clipood"):
        raise ValueError(f"--image-pooling {c.image_pooling}: {c.method} has the class token only")
    if c.dry_run:
        raise ValueError(f"--dry-run counts what pre-training costs, not --method {c.method}")
    return c


def build_method(
    c, clip: CLIP, text: Tensor, class_tokens: Tensor, words: list[int] | None = None, rest: str = ""
) -> nn.Module:
    """The module of c.method around clip.

    Args: text (C, E) unit norm and class_tokens (C, L) of its classes;  words and rest of start_words
    """
    if c.method == "flyp":
        return FLYP(clip, class_tokens)
    if c.method == "coop":
        start = dict(position=c.context_position, words=words, template=rest)
        return CoOp(clip, class_tokens, c.context, c.class_context, **start)
    if c.method == "cocoop":
        return CoCoOp(clip, class_tokens, c.context, words=words, template=rest)
    if c.method == "maple":
        # PAPER: depth 9 of 12 blocks; all of a shallower tower
        depth = c.prompt_depth or min(9, clip.config.vision_layers, clip.config.text_layers)
        return MaPLe(clip, class_tokens, c.context, depth, words=words, template=rest)
    if c.method == "tes":
        shares = dict(lambda_v=c.tes_share, lambda_t=c.tes_weight)
        return TeS(clip, text, tau=c.tes_temperature, **shares)
    head = dict(smoothing=c.smoothing, epsilon=c.epsilon, scale=c.smoothing_scale, margin=c.margin)
    if c.method != "alignclip":
        return FineTune(clip, text, pooling=c.image_pooling, **head)
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


class AveragePooled(nn.Module):
    """A CLIP whose image feature is the mean of its patches, as the dual encoder that evaluate.py asks."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip, self.config = clip, clip.config
        self.encode_text, self.ensemble_text = clip.encode_text, clip.ensemble_text
        self.pair_logits, self.class_templates = clip.pair_logits, clip.class_templates
        self.train(clip.training)

    def encode_image(self, images: Tensor) -> Tensor:
        return average_of_patches(self.clip.visual, images)  # (B, E)


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
        self.protocol = protocols.protocol(
            c.train_data,
            c.open_task,
            c.target_domain,
            whole=c.whole_target,
            shots=c.shots,
            seed=c.seed,
            image_root=c.image_root or None,
            allow_outside=c.allow_outside,
            image_size=self.config.image_size,
            size=c.train_size,
            bias=c.bias,
            test_seed=c.test_seed,
        )
        self.train = self.protocol.train
        if c.overfit or c.method in BESIDE:
            self.train = first_images(self.train, c.overfit or len(self.train))
        self.domains = len(set(getattr(self.train, "domains", None) or [0]))
        if c.batch_size % self.domains:
            fits = max(c.batch_size // self.domains, 1) * self.domains
            raise ValueError(
                f"batch {c.batch_size} is not divisible by {self.domains} source domains: try {fits}"
            )
        self.templates = protocols.templates(c.train_data)
        if c.template:
            self.templates = evaluate.read_templates([c.template])
        classes, length = self.train.classes, self.config.context_length
        with evaluate.evaluating(clip) as device:
            text = evaluate.encode_classes(clip, self.tokenizer, classes, self.templates)  # (C, E)
        words, rest, self.asked_with = None, "", self.templates
        if c.method in ("coop", "cocoop", "maple"):
            default = METHODS[c.method].get("context_words", "")
            words, rest = start_words(c.context_words, default, c.context, self.tokenizer)
            self.asked_with = (rest,)
        tokens = [prompts.fill(self.asked_with[0], name) for name in classes]
        tokens = self.tokenizer(tokens, length).to(device)  # (C, L)
        self.model = build_method(c, clip, text, tokens, words, rest)
        if c.method == "tes" and distributed.world_size() > 1:
            raise ValueError("TeS has a BatchNorm, which must see the whole batch: one process")
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
        if self.c.method in BESIDE:
            more["learned"] = self.model.learned()
        model = pretrained.describe(reported)
        return {"state_dict": reported.state_dict(), "model": model, "task": more}

    def load(self, saved: dict) -> None:
        """Takes up a checkpoint's state()."""
        more = saved["task"]
        self.clip.load_state_dict(more.get("clip", saved["state_dict"]))
        self.sums = dict(more["sums"])
        if self.c.method in BESIDE:
            self.model.load_learned(more["learned"])
        if self.average is not None:
            self.average.load_state_dict(more["average"])

    def chance(self) -> str:
        if self.c.method == "flyp":
            n = self.c.batch_size
            return f"ln {n} = {math.log(n):.2f}; images of one class in a batch keep it above 0"
        C, more = len(self.train.classes), []
        if self.c.method not in BESIDE:
            more.append("training starts at zero-shot CLIP")
        if terms := self.terms():
            more.append(f"the loss is {terms}")
        return "; ".join([f"ln {C} = {math.log(C):.2f} for a blind answer", *more])

    def terms(self) -> str:
        """What the logged loss adds up beside one cross-entropy, for which chance is told; "" if nothing."""
        c = self.c
        if c.method == "tes":
            return f"the classifier's + {c.tes_weight:g} x the projection's cross-entropy"
        on = ["attention"] * c.align_attention + ["similarity"] * (c.similarity != "none")
        if c.method != "alignclip" or not on:
            return ""
        each = " + ".join(on)
        each = f"({each})" if len(on) > 1 else each
        return f"classification + {c.align_weight:g} x {each}, all in metrics.jsonl, chance is of the first"

    def evaluate(self, model: nn.Module) -> dict[str, dict]:
        """Where it started, where it is, and the average, which is then the model to report."""
        if self.zero_shot is None:
            device = next(model.parameters()).device
            self.zero_shot = self.score(self.pooled(pretrained.load(self.c.init).to(device)))
        rows = {"zero-shot": self.zero_shot, "fine-tuned": self.score(self.asked(), self.asked_with)}
        if self.average is not None:
            rows["averaged"] = self.score(self.pooled(self.average.average))
        return rows

    def pooled(self, clip: CLIP) -> nn.Module:
        return AveragePooled(clip) if self.c.image_pooling == "average" else clip

    def asked(self) -> nn.Module:
        """The dual encoder whose answers are this method's."""
        if self.c.method not in BESIDE:
            return self.pooled(self.clip)
        return self.model.dual_encoder()

    def score(self, model: nn.Module, templates: tuple[str, ...] = ()) -> dict:
        templates = templates or self.templates
        return openworld.evaluate_protocol(model, self.protocol, self.tokenizer, templates)

    def fits(self, loss: float) -> bool:
        """Whether --overfit succeeded: smoothed targets keep the loss above 0, so answers are asked."""
        place, _ = evaluate.classify(self.asked(), self.train, self.tokenizer, self.asked_with)
        return bool((place == 0).all())
