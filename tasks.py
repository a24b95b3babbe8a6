"""What the loop of train.py trains: pairs of images and captions, or images with labels.

Task declares everything that the loop uses. PairTask pre-trains clip, siglip and llip. LabelTask fine-tunes
a CLIP on classes and evaluates it with the protocol of evals/open_world.py. Its batches hold equally many
images of each source domain. c is a run's TrainConfig, s the Settings of its method.
"""

import contextlib
import functools
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import losses
import pretrained
from baselines.methods import METHODS
from clipood import BetaMovingAverage, Classes, require_clip
from evals import open_world, protocol
from model import CONFIGS
from readers import scenes, templates
from readers.benchmarks import unnamed
from scale import distributed, llip_tiles
from scale.gradcache import float_features, training_step
from scale.llip_tiles import TiledLlip
from tokenizer import Tokenizer
from util.evaluation import where_of
from util.run import fingerprint


class Task:
    """What the loop of train.py needs of a task. Subclasses define everything that is not here.

    unit, train, tokenizer   "pairs" or "images"; the training data; saved beside the checkpoint
    model, clip, config      the module that is trained; the dual encoder in it, perhaps the same; its sizes
    batches(start)           batches from step `start` on, without end
    step(model, batch, device) -> (loss, logs)   forward and backward of all chunks; detached tensors to log
    evaluate(model)          results by name, each with its figures and "chance"
    datasets()               {flag of train.py: data set}, which a resumed run compares
    state(), load(saved)     the task's part of a checkpoint: enough to rebuild the model, and to continue
    expected_loss()          the loss to expect at the start, as text
    overfit_ok(loss)         whether --overfit succeeded
    """

    unit = "pairs"
    autocast = contextlib.nullcontext  # for the precision of the towers; the loop sets it

    def __init__(self, c, s):
        self.c, self.s = c, s

    def samples(self) -> int:
        """The length of an epoch."""
        return len(self.train)

    @functools.cached_property
    def fingerprints(self) -> dict[str, dict]:
        """What identifies the data of datasets()."""
        return {flag: fingerprint(part) for flag, part in self.datasets().items() if part is not None}

    def loading(self, start: int, transform: data.Preprocess, flip: bool = False) -> dict:
        """Arguments of batches. Scenes are random already, and --overfit must see the same images again."""
        if not (self.c.overfit or hasattr(self.train, "pixels") or self.c.crop_scale == 1):
            own = {name: getattr(transform, name) for name in ("interpolation", "mean", "std")}
            transform = data.RandomCrop(transform.image_size, (self.c.crop_scale, 1.0), flip, **own)
        place = dict(start_step=start, rank=distributed.rank(), world=distributed.world_size())
        return place | dict(transform=transform, seed=self.c.seed, workers=self.c.workers)

    def begin(self, c) -> None:
        """Called before the first step and before load, when the number of steps is known."""
        self.c = c

    def after_step(self) -> None:
        """Called after the optimizer's step."""


# Pre-training on pairs ------------------------------------------------------------------------------------


class PairTask(Task):
    """Pre-training on image-caption pairs."""

    def __init__(self, c, s, vocabulary: Path | None = None):
        super().__init__(c, s)
        self.train, self.tests = pair_data(c)
        self.tokenizer = pair_tokenizer(c, self.train.captions, vocabulary)
        start = replace(CONFIGS[c.model], vocab_size=self.tokenizer.vocab_size)
        start = load_start(c) if c.init else replace(start, image_size=c.image_size or start.image_size)
        self.model = METHODS[c.method].module.build(s, start, c.batch_size)
        freeze(self.model, c)
        self.clip, self.config = self.model, self.model.config
        pretrained.check_vocabulary(self.model, self.tokenizer)
        rows = c.batch_size // distributed.world_size()
        llip_tiles.select(self.model, getattr(s, "pairs", "auto"), rows, c.batch_size)
        alone = distributed.world_size() == 1 and c.accumulate == 1
        self.plain = alone and not isinstance(self.model, TiledLlip)

    def batches(self, start: int) -> data.Batches:
        how = self.loading(start, data.preprocess_of(self.config))
        how |= dict(batch_size=self.c.batch_size, context_length=self.config.context_length)
        return data.train_batches(self.train, self.tokenizer, **how)

    def step(self, model: nn.Module, batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, objective = batch.tokens, self.s.objective
        if not self.c.compile:
            # SPEED: the text tower reads the end token and no token attends to a later one
            tokens = tokens[:, : int(tokens.argmax(-1).max()) + 1]
        images, tokens = (x.to(device, non_blocking=True) for x in (batch.images, tokens))
        if not self.plain:
            loss = training_step(model, images, tokens, objective, self.c.accumulate, self.autocast)
            return loss, {}

        # the plain step; training_step computes the same on more ranks, in chunks, and in tiles
        with self.autocast():
            image, text = model(images, tokens)
        logits = self.model.pair_logits(float_features(image), float_features(text))  # (B, B)
        loss = losses.siglip(logits) if objective == "siglip" else losses.info_nce(logits)
        loss.backward()
        return loss.detach(), {}

    def after_step(self) -> None:
        """PAPER: the scale is kept from exceeding 100; Llip's code also keeps it above 1."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))

    def evaluate(self, model: nn.Module) -> dict[str, dict]:
        """retrieval: Recall@k; aspects (scenes only): which short captions are true; zeroshot: accuracy."""
        rows = {}
        for name, mark in (("retrieval", "@"), ("aspects", "_")):
            if name in self.tests:
                rows[name] = figures(evaluate.retrieval(model, self.tests[name], self.tokenizer), mark)
        if objects := self.tests.get("zeroshot"):
            prompts = scenes.TEMPLATES if isinstance(objects, scenes.Objects) else templates.PHOTO
            rows["zeroshot"] = evaluate.zeroshot(model, objects, self.tokenizer, prompts)
        return rows

    def datasets(self) -> dict:
        flags = {"val_data": "retrieval", "zeroshot_data": "zeroshot"}
        return {"train_data": self.train} | {flag: self.tests.get(name) for flag, name in flags.items()}

    def state(self) -> dict:
        return {"state_dict": self.model.state_dict(), "model": pretrained.describe(self.model)}

    def load(self, saved: dict) -> None:
        self.model.load_state_dict(saved["state_dict"])

    def expected_loss(self) -> str:
        n = self.c.batch_size
        if self.s.objective == "infonce":
            return f"ln {n} = {math.log(n):.2f}; a random CLIP starts a little above"
        b = self.model.logit_bias.item()
        start = math.log1p(math.exp(-b)) + (n - 1) * math.log1p(math.exp(b))
        return f"{start:.2f} at cosine 0: softplus({-b:.2f}) + {n - 1} softplus({b:.2f})"

    def overfit_ok(self, loss: float) -> bool:
        return loss < 0.05


def figures(result: dict, mark: str) -> dict:
    """A retrieval result with one kind of figures only: "@" Recall@k, "_" those of relevance."""
    kept = {k for k in result["chance"] if ("_" if "_" in k else "@") == mark}
    parts = {k: {n: v for n, v in result.get(k, {}).items() if n in kept} for k in ("chance", "ceiling")}
    others = {k: v for k, v in result.items() if k not in result["chance"] and k not in parts}
    return {k: result[k] for k in result["chance"] if k in kept} | parts | others


def pair_data(c) -> tuple:
    """The training data, and {"retrieval" | "aspects" | "zeroshot": test data} as far as there are any.

    Raises: ValueError for training data without captions.
    """
    where, tests = where_of(c) | {"kind": "captions"}, {}
    look = dict(image_size=c.image_size or CONFIGS[c.model].image_size)
    if c.train_data == "scenes":
        look["domains"] = ("photo",)
        train = scenes.Scenes("train", c.train_size, c.seed, bias=c.bias, captions=c.captions, **look)
        tests["retrieval"] = scenes.Scenes("test", 500, c.test_seed, **look)
        tests["aspects"] = scenes.Scenes("test", 500, c.test_seed, captions="aspects", **look)
    elif c.train_data == "broad":
        train = scenes.Broad("train", c.train_size, seed=c.seed, bias=c.bias, **look)
    else:
        train = data.open_dataset(c.train_data, default_split="train", **where)
        held_out = [split for split in ("test", "val") if split in getattr(train, "splits", {})]
        if held_out and not c.val_data and ".tar" not in c.train_data:
            tests["retrieval"] = data.open_dataset(c.train_data, held_out[0], **where)
    if c.val_data:
        own = where | {"image_root": c.val_image_root or where["image_root"]}
        tests["retrieval"] = data.open_dataset(c.val_data, default_split="test", **own)
    if c.zeroshot_data not in ("", "scenes"):
        where |= {"image_root": c.zeroshot_image_root or None, "kind": "labels"}
        tests["zeroshot"] = data.open_dataset(c.zeroshot_data, default_split="test", **where)
    elif c.zeroshot_data or c.train_data in ("scenes", "broad"):
        tests["zeroshot"] = scenes.Objects("test", 960, c.test_seed, **look)
    elif hasattr(tests.get("retrieval"), "labels"):
        tests["zeroshot"] = tests["retrieval"]
    if not c.overfit:
        return train, tests
    first = data.Subset(train, range(min(c.overfit, len(train))))
    first.captions = [[max(texts, key=len)] for texts in first.captions]  # can be told apart
    return first, {}


def pair_tokenizer(c, captions, vocabulary: Path | None = None) -> Tokenizer:
    """The tokenizer of a file, OpenAI's, the one beside --init, or one learned from the training captions.

    TRAP: a resumed run keeps its vocabulary; one learned again would give its trained embeddings other
    tokens.
    """
    if vocabulary is not None:
        return Tokenizer.load(vocabulary)
    if c.init:
        if distributed.rank() == 0:
            pretrained.locate(c.init)  # one download for all ranks
        distributed.broadcast(None)
        if not c.vocab:
            return pretrained.tokenizer_for(pretrained.locate(c.init))
    vocab = c.vocab or ("learn" if CONFIGS[c.model].vocab_size != 49408 else "openai")
    if vocab == "learn":
        return Tokenizer.learn((text for texts in captions for text in texts), CONFIGS[c.model].vocab_size)
    return Tokenizer.from_openai() if vocab == "openai" else pretrained.tokenizer_for("", vocab)


def load_start(c) -> nn.Module:
    """The model of --init, for images of --image-size.   Raises: ValueError if it cannot have this size."""
    model = pretrained.load(c.init)
    if c.image_size not in (0, model.config.image_size):
        if getattr(model, "all_tokens", False):
            raise ValueError(f"--image-size {c.image_size}: {c.init} has a separate matrix for every patch")
        model.set_image_size(c.image_size)
    return model


# the parameters of a tower; the pooling of Llip is in neither
TOWERS = {"": (), "image": ("visual.",)}
TOWERS["text"] = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def freeze(model: nn.Module, c) -> None:
    """Keeps a tower of --init as it is: LiT (Zhai et al. 2022, arXiv:2111.07991), which locks the images."""
    if c.freeze not in TOWERS or (c.freeze and not c.init):
        raise ValueError(f"--freeze {c.freeze}: image or text, the tower of --init that stays as it is")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(TOWERS[c.freeze]))


# Fine-tuning on classes -------------------------------------------------------------------------------------


class LabelTask(Task):
    """Fine-tuning a CLIP on labelled images."""

    unit = "images"

    def __init__(self, c, s, vocabulary: Path | None = None):
        super().__init__(c, s)
        self.average, self.zero_shot, self.beta = None, None, getattr(s, "bma_beta", 0.0)
        if c.vocab == "learn":
            raise ValueError("--vocab learn: a checkpoint keeps the vocabulary it was trained with")
        self.tokenizer = pair_tokenizer(c, (), vocabulary)
        # all ranks may encode classes together, which NCCL does on GPUs only
        clip = load_start(c).to(distributed.setup(c.device))
        require_clip(clip, c.init)
        self.clip, self.config = clip, clip.config
        scene = dict(image_size=self.config.image_size, size=c.train_size, bias=c.bias, test_seed=c.test_seed)
        parts = dict(whole=c.whole_target, shots=c.shots, seed=c.seed, scene=scene)
        self.protocol = protocol.protocol(c.train_data, c.open_task, c.target_domain, **parts, **where_of(c))
        self.train = self.protocol.train
        self.templates = evaluate.templates_of([c.template] if c.template else [], c.train_data)
        names = self.train.classes
        if problem := unnamed(names):
            raise ValueError(f"{c.train_data}: {problem}")
        with evaluate.evaluating(clip):
            text = evaluate.encode_classes(clip, self.tokenizer, names, self.templates)  # (C, E)
        classes = Classes(names, self.templates, self.tokenizer, text)
        self.model = METHODS[c.method].module.build(s, clip, classes)
        self.mixed = bool(self.model.learned())  # prompts and TeS draw from all domains alike
        if c.overfit or self.mixed:
            self.train = data.evenly_spread(self.train, c.overfit or len(self.train))
            self.train.domains = None  # they count as one
        self.domains = len(set(getattr(self.train, "domains", None) or [0]))
        self.check()

    def check(self) -> None:
        """Raises: ValueError for batches, chunks or ranks that the method or the data cannot have."""
        c, model = self.c, self.model
        if c.batch_size % self.domains:
            wrong = f"--batch-size {c.batch_size} is not divisible by {self.domains} source domains"
            raise ValueError(f"{wrong}: try {max(c.batch_size // self.domains, 1) * self.domains}")
        if model.whole_batch and c.accumulate > 1:
            raise ValueError(f"--accumulate {c.accumulate}: the loss of {c.method} needs the whole batch")
        if not model.new_classes and c.open_task in protocol.NEW_CLASSES:
            raise ValueError(f"--open-task {c.open_task}: this {c.method} cannot score new classes")
        if model.one_process and distributed.world_size() > 1:
            raise ValueError(f"{c.method} has a BatchNorm, which must see the whole batch: use one process")

    def samples(self) -> int:
        return len(self.train) * self.model.prompts_per_class

    def begin(self, c) -> None:
        self.c = c
        if self.beta:
            self.average = BetaMovingAverage(self.clip, c.steps, self.beta)

    def batches(self, start: int) -> data.Batches:
        transform = data.preprocess_of(self.config, interpolation=self.model.interpolation)
        how = self.loading(start, transform, flip=True)
        return data.domain_batches(self.train, batch_size=self.c.batch_size // self.domains, **how)

    def step(self, model: nn.Module, batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses are means over images, so the mean over chunks is exact."""
        chunks = self.c.accumulate
        labels = batch.labels * self.model.prompts_per_class + batch.draws % self.model.prompts_per_class
        images, labels = (x.to(device, non_blocking=True) for x in (batch.images, labels))
        parts, total, sums = list(zip(images.chunk(chunks), labels.chunk(chunks))), 0.0, {}
        for k, (x, y) in enumerate(parts, 1):
            synchronise = k == len(parts) or not isinstance(model, DistributedDataParallel)
            with contextlib.nullcontext() if synchronise else model.no_sync():
                with self.autocast():
                    loss, logs = model(x, y)
                (loss / chunks).backward()
            total = total + loss.detach() / chunks
            for name, value in logs.items():
                sums[name] = sums.get(name, 0.0) + value / chunks
        return total, sums

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update(self.clip)

    def evaluate(self, model: nn.Module) -> dict[str, dict]:
        """The start, the fine-tuned model, and its average, which is then the reported model."""
        if self.zero_shot is None:
            start = load_start(self.c).to(next(model.parameters()).device)
            self.zero_shot = self.score(start if self.mixed else self.model.dual_encoder(start))
        rows = {"zero-shot": self.zero_shot, "fine-tuned": self.score(self.model.dual_encoder())}
        if self.average is not None:
            rows["averaged"] = self.score(self.model.dual_encoder(self.average.average))
        return rows

    def score(self, model: nn.Module) -> dict:
        how = self.protocol, self.tokenizer, self.templates, self.model.interpolation
        return open_world.evaluate_protocol(model, *how)

    def datasets(self) -> dict:
        return {"train_data": self.protocol.train}

    def state(self) -> dict:
        """The reported CLIP is "state_dict", so that a run loads as a CLIP; "task" holds everything else."""
        reported = self.clip if self.average is None else self.average.average
        more = {"classes": list(self.protocol.train.classes), "templates": list(self.templates)}
        more["learned"] = self.model.learned()
        if self.average is not None:
            more |= {"clip": self.clip.state_dict(), "average": self.average.state_dict()}
        return {"state_dict": reported.state_dict(), "model": pretrained.describe(reported), "task": more}

    def load(self, saved: dict) -> None:
        more = saved["task"]
        self.clip.load_state_dict(more.get("clip", saved["state_dict"]))
        self.model.load_learned(more["learned"])
        if self.average is not None:
            self.average.load_state_dict(more["average"])

    def expected_loss(self) -> str:
        parts = [self.model.first_loss(len(self.train.classes), self.c.batch_size), self.model.starts_as]
        if self.model.loss_terms:
            parts.append(f"the logged loss is {self.model.loss_terms}, and this is its first term")
        return "; ".join(filter(None, parts))

    def overfit_ok(self, loss: float) -> bool:
        """Smoothed targets keep the loss above 0, so the predictions decide."""
        place, _ = evaluate.classify(self.model.dual_encoder(), self.train, self.tokenizer, self.templates)
        return bool((place == 0).all())


TASKS = {"pairs": PairTask, "labels": LabelTask}
