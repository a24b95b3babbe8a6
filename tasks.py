"""Pre-training on image-caption pairs: model, data, step and evaluation of clip, siglip and llip.

A task is what train.py's loop needs to know of a method: .model, .train, .tokenizer, batches(start_step),
step(model, batch, device), evaluate(model), chance(). c is the run's TrainConfig. .model is what is trained,
.clip the dual encoder in it: the same thing here, but not where a method wraps a CLIP (finetuning.py).
"""

import contextlib
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

import data
import evaluate
import llip
import pretrained
from model import CLIP, CONFIGS, Config
from readers import scenes
from readers import templates as prompts
from scale import distributed
from scale.gradcache import training_step
from tokenizer import Tokenizer


def build_model(c, config: Config) -> nn.Module:
    """The dual encoder of c.method over config, from scratch or from c.init."""
    scale = c.logit_scale or (10.0 if c.objective == "siglip" else 1 / 0.07)
    # PAPER: SigLIP starts at -10, the log-odds of one pair among 22,000; -ln(N - 1) is that for N pairs
    bias = max(-10.0, -math.log(max(c.batch_size - 1, 1))) if math.isnan(c.logit_bias) else c.logit_bias
    mixing = dict(temperature=c.temperature, norm=c.mixture_norm)
    sizes = (config, c.mixture_tokens, c.mixture_heads)
    if c.init and (c.pooling != "text" or c.all_tokens or c.text_tokens):
        raise ValueError("--pooling, --all-tokens and --text-tokens train from scratch: no --init")
    if not c.init:
        if c.pooling != "text":
            ladder = dict(temperature=c.temperature, scale=scale, bias=bias)
            return llip.PooledTokens(*sizes[:2], c.pooling, c.mixture_heads, **ladder)
        if c.text_tokens:
            return llip.LatentTextLlip(*sizes, c.text_tokens, scale=scale, bias=bias, **mixing)
        if c.method == "llip":
            return llip.Llip(*sizes, all_tokens=c.all_tokens, scale=scale, bias=bias, **mixing)
        return CLIP(config, scale=scale, bias=bias if c.objective == "siglip" else None)
    model = pretrained.load(c.init)
    if c.method != "llip" and type(model) is not CLIP:
        raise ValueError(f"--method {c.method}, but {c.init} is a {type(model).__name__}")
    if c.image_size not in (0, model.config.image_size):
        size = model.config.image_size
        raise ValueError(f"--image-size {c.image_size}, but {c.init} has {size}: leave it out")
    if c.method == "llip" and not isinstance(model, llip.Llip):
        return llip.warm_start_llip(
            model, c.mixture_tokens, c.mixture_heads, scale=scale, bias=bias, **mixing
        )
    if type(model) is CLIP and (model.logit_bias is None) == (c.objective == "siglip"):
        model.logit_bias = nn.Parameter(torch.tensor(bias)) if c.objective == "siglip" else None
    return model


class PairTask:
    """Pre-training on image-caption pairs: what the loop trains, on what, and how it is judged."""

    unit = "pairs"

    def __init__(self, c):
        self.c = c
        self.train, self.val, self.aspects, self.objects, self.templates = pair_data(c)
        self.tokenizer = pair_tokenizer(c, self.train.captions)
        config = CONFIGS[c.model]
        if c.image_size:
            config = replace(config, image_size=c.image_size)
        self.model = build_model(c, replace(config, vocab_size=self.tokenizer.vocab_size))
        self.config = self.model.config
        if self.tokenizer.vocab_size != self.config.vocab_size:
            raise ValueError(
                f"{c.init} has {self.config.vocab_size} token embeddings, the tokenizer"
                f" {self.tokenizer.vocab_size} tokens: give its own with --vocab"
            )
        self.clip = self.model
        self.autocast = contextlib.nullcontext

    def begin(self, c) -> None:
        """Before the first step, and before a checkpoint is loaded: the number of steps is known."""
        self.c = c

    def state(self) -> dict:
        """What a checkpoint holds of the task: enough to rebuild the model, and to go on."""
        return {"state_dict": self.model.state_dict(), "model": pretrained.describe(self.model)}

    def load(self, saved: dict) -> None:
        self.model.load_state_dict(saved["state_dict"])

    def batches(self, start: int):
        augment = data.RandomCrop(self.config.image_size, (self.c.crop_scale, 1.0))
        if self.c.crop_scale == 1 or self.c.overfit or hasattr(self.train, "pixels"):
            augment = False  # scenes are random already
        return data.train_batches(
            self.train,
            self.tokenizer,
            image_size=self.config.image_size,
            batch_size=self.c.batch_size,
            context_length=self.config.context_length,
            seed=self.c.seed,
            start_step=start,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=self.c.workers,
            augment=augment,
        )

    def step(self, model: nn.Module, batch, device: torch.device) -> Tensor:
        tokens = batch.tokens
        if not self.c.compile:  # SPEED: nothing looks ahead of the end token: the rest is cut off
            tokens = tokens[:, : int(tokens.argmax(-1).max()) + 1]
        images, tokens = (x.to(device, non_blocking=True) for x in (batch.images, tokens))
        return training_step(
            model, images, tokens, self.c.objective, self.c.accumulate, autocast=self.autocast
        )

    def after_step(self) -> None:
        """PAPER: the scale is kept from exceeding 100; Llip's code keeps it above 1."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))

    def logged(self, steps: int) -> dict[str, float]:
        """More figures for the log than the loss: none."""
        return {}

    def fits(self, loss: float) -> bool:
        """Whether --overfit succeeded."""
        return loss < 0.05

    def chance(self) -> str:
        n = self.c.batch_size
        if self.c.objective == "infonce":
            return f"ln {n} = {math.log(n):.2f}; a random CLIP starts a little above"
        b = self.model.logit_bias.item()
        start = math.log1p(math.exp(-b)) + (n - 1) * math.log1p(math.exp(b))
        return f"{start:.2f} at cosine 0: softplus({-b:.2f}) + {n - 1} softplus({b:.2f})"

    def evaluate(self, model: nn.Module) -> dict[str, dict]:
        """retrieval: Recall@k; aspects (scenes only): which short captions are true; zeroshot: accuracy."""
        rows = {}
        if self.val is not None:
            result = evaluate.retrieval(model, self.val, self.tokenizer)
            rows["retrieval"] = figures(result, "@")
        if self.aspects is not None:
            result = evaluate.retrieval(model, self.aspects, self.tokenizer)
            rows["aspects"] = figures(result, "_")
        if self.objects is not None:
            rows["zeroshot"] = evaluate.zeroshot(model, self.objects, self.tokenizer, self.templates)
        return rows


def figures(result: dict, mark: str) -> dict:
    """A retrieval result with only the figures of a kind: "@" Recall@k, "_" those of relevance."""
    kept = {k for k in result["chance"] if ("_" if "_" in k else "@") == mark}
    parts = {k: {n: v for n, v in result.get(k, {}).items() if n in kept} for k in ("chance", "ceiling")}
    others = {k: v for k, v in result.items() if k not in result["chance"] and k not in parts}
    return {k: result[k] for k in result["chance"] if k in kept} | parts | others


def pair_data(c):
    """Training pairs; or None: retrieval set, scenes with one-aspect captions, labelled set; templates."""
    aspects, templates = None, prompts.PHOTO
    keys = dict(
        image_root=c.image_root or None,
        image_key=c.image_key or None,
        caption_key=c.caption_key or None,
        allow_outside=c.allow_outside,
    )
    size = c.image_size or CONFIGS[c.model].image_size
    if c.train_data == "scenes":
        look = dict(image_size=size, domains=("photo",))
        train = scenes.Scenes("train", c.train_size, seed=c.seed, bias=c.bias, **look)
        val = scenes.Scenes("test", 500, c.test_seed, **look)
        aspects = scenes.Scenes("test", 500, c.test_seed, captions="aspects", **look)
        objects = scenes.Objects("test", 960, c.test_seed, **look)
        templates = scenes.TEMPLATES
    elif c.train_data == "broad":
        train, val = scenes.Broad("train", c.train_size, c.seed, size, c.bias), None
        objects, templates = scenes.Objects("test", 960, c.test_seed, size), scenes.TEMPLATES
    else:
        train = data.open_dataset(c.train_data, default_split="train", **keys)
        val = objects = None
        if not hasattr(train, "captions"):
            raise ValueError(f"{c.train_data}: no captions in it; --method {c.method} learns from pairs")
    if c.val_data:
        val = data.open_dataset(c.val_data, default_split="test", **keys)
    elif val is None and c.train_data != "broad" and ".tar" not in c.train_data:
        held_out = [s for s in ("test", "val") if s in getattr(train, "splits", {})]
        val = data.open_dataset(c.train_data, held_out[0], **keys) if held_out else None
    if c.zeroshot_data == "scenes" and objects is None:
        objects, templates = scenes.Objects("test", 960, image_size=size), scenes.TEMPLATES
    elif c.zeroshot_data and c.zeroshot_data != "scenes":
        objects = data.open_dataset(c.zeroshot_data, default_split="test")
        templates = prompts.PHOTO
    if c.overfit:
        train, val, aspects, objects = FirstPairs(train, c.overfit), None, None, None
    return train, val, aspects, objects, templates


class FirstPairs:
    """The first n pairs with one caption each, the longest: enough to tell them apart by heart."""

    def __init__(self, dataset, n: int):
        self.dataset, self.n = dataset, min(n, len(dataset))
        self.captions = [[max(dataset.captions[i], key=len)] for i in range(self.n)]
        self.image, self.name = dataset.image, dataset.name
        if hasattr(dataset, "pixels"):
            self.pixels = dataset.pixels[: self.n]

    def __len__(self):
        return self.n


def pair_tokenizer(c, captions) -> Tokenizer:
    """A file's, OpenAI's, the one beside --init, or one learned from the training captions."""
    if c.init:
        if distributed.rank() == 0:
            pretrained.locate(c.init)  # a download, if it is one, happens once
        distributed.barrier()
        beside = pretrained.tokenizer_beside(pretrained.locate(c.init))
        if beside is not None and not c.vocab:
            return beside
    small = CONFIGS[c.model].vocab_size != 49408 and not c.init
    vocab = c.vocab or ("learn" if small else "openai")
    if vocab == "learn":
        texts = (text for some in captions for text in some)
        return Tokenizer.learn(texts, CONFIGS[c.model].vocab_size)
    return Tokenizer.from_openai() if vocab == "openai" else pretrained.tokenizer_for("", vocab)
