"""Fine-tuning CLIP's image tower against frozen text: plain, label smoothing, CLIPood, WiSE-FT.

The text features of the classes are computed once and stay fixed. They are the classification head: step 0 is
zero-shot CLIP, and classes that were never trained on can be scored afterwards. Only the image tower learns.

    method       here                                                  source
    finetune     FineTune(clip, text)                                  cross-entropy on exp(t) * cos
    labelsmooth  FineTune(clip, text, smoothing="uniform")             Szegedy et al. 2016
    clipood      FineTune(clip, text, margin=0.3), BetaMovingAverage   Shu et al. 2023 (arXiv:2302.00864)
    wise_ft      wise_ft(zero_shot, fine_tuned, alpha)                 Wortsman et al. 2022 (arXiv:2109.01903)

LabelMethod and Classes are the protocol of all fine-tuning methods.

    REF: thuml/CLIPood@bc0d874 holds the weights in fp16 between steps, without a master copy. At its learning
    rate of 5e-6 many updates round away. Weights are fp32 here.
    REF: its "batch 36" is 12 images from each of 3 source domains; AlignCLIP's code takes 36 from each.
    REF: its weight decay also acts on norms and biases; here it acts on matrices only.

    python clipood.py wise-ft ZERO_SHOT FINE_TUNED --alpha 0.5 --out CHECKPOINT
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pretrained
from losses import at_least_fp32, margin_metric_logits, smoothing_targets, soft_cross_entropy
from model import CLIP, VisionTransformer
from util.flags import parse
from util.program import leave, program
from util.run import read_config
from weights import archive


def unit(x: Tensor) -> Tensor:
    """Unit length along the last axis, never in half precision: (..., E) -> (..., E)."""
    return F.normalize(at_least_fp32(x), dim=-1)


def full_precision(x: Tensor) -> torch.autocast:
    """Switches autocast off on x's device: only the towers run in bf16."""
    return torch.autocast(x.device.type, enabled=False)


def require_clip(clip: nn.Module, source: str = "this model") -> None:
    """Raises ValueError for Llip and PooledTokens: they have no single class token with one projection."""
    if not isinstance(clip, CLIP) or clip.visual.class_embedding.dim() != 1:
        raise ValueError(f"{source}: fine-tuning needs a CLIP, not a {type(clip).__name__}")


@dataclass(frozen=True)
class Classes:
    """The classes that a method is fine-tuned on."""

    names: list[str]
    templates: tuple[str, ...]  # of the frozen text features
    tokenizer: Callable  # texts, context_length -> (N, L)
    text: Tensor  # (C, E) unit norm: the names in the templates, by the CLIP that is fine-tuned

    def tokens(self, template: str, context_length: int) -> Tensor:
        """Token ids (C, L) of every name in one template."""
        texts = [template.replace("{}", name).replace("{c}", name) for name in self.names]
        return self.tokenizer(texts, context_length).to(self.text.device)


class LabelMethod(nn.Module):
    """A module around .clip: loss(images, labels) -> (loss, {name: tensor to log}), predict(images) -> (B, C)

    starts_as     what is true of the first step, for the line about the expected loss
    loss_terms    the sum that is logged as the loss, where it is more than one cross-entropy
    whole_batch   the loss is not a mean over images, so a batch cannot be cut into chunks
    one_process   a layer must see the whole batch, so there can be no other ranks
    new_classes   classes that were not trained on can be scored
    interpolation      of the published loaders' resizing, in training and evaluation
    prompts_per_class  P: an image is trained with each prompt of its class, and labels are P * class + prompt
    """

    starts_as, loss_terms = "training starts at zero-shot CLIP", ""
    whole_batch, one_process, new_classes, prompts_per_class = False, False, True, 1
    interpolation = "bilinear"  # REF: CLIPood and AlignCLIP have torchvision's default

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss: the call that DistributedDataParallel wraps."""
        return self.loss(images, labels)

    def first_loss(self, classes: int, batch_size: int) -> str:
        """The loss of a model that knows nothing, as text."""
        return f"ln {classes} = {math.log(classes):.2f} for a blind answer"

    def dual_encoder(self, clip: CLIP | None = None) -> nn.Module:
        """The dual encoder that answers, with clip (e.g. averaged weights) for its own and no prompts."""
        return self.clip if clip is None else clip

    def learned(self) -> dict[str, Tensor]:
        """What was learned apart from CLIP's weights, for the checkpoint; {} for most methods."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}

    def load_learned(self, state: dict[str, Tensor]) -> None:
        """Takes up learned().   Raises: ValueError if names or shapes are not those of this module."""
        require_same_shapes(state, self.learned(), "in the state", f"in this {type(self).__name__}")
        self.load_state_dict(self.state_dict() | state)


def require_same_shapes(one: dict, other: dict, place: str, other_place: str) -> None:
    """Raises ValueError that names the first tensor with different shapes in two state dicts, and both."""
    shapes = [{k: tuple(v.shape) for k, v in state.items()} for state in (one, other)]
    if differing := sorted(k for k, _ in shapes[0].items() ^ shapes[1].items()):
        first, second = (found.get(differing[0], "absent") for found in shapes)
        raise ValueError(f"{differing[0]}: {first} {place}, {second} {other_place}")


class AveragePooled(VisionTransformer):
    """Embeds an image as the mean over its patches after the projection, for --image-pooling average."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E)"""
        return self.head(self.transformer(self.embed(images)))[:, self.tokens :].mean(1)


class FineTune(LabelMethod):
    """Cross-entropy between an image's cosines to the class texts and its label.

    Args:   clip: every parameter but those of clip.visual is frozen, the logit scale exp(t) included
            text (C, E) unit-norm text features of the classes: the head, never trained
            smoothing, epsilon, scale: the target of each label, see losses.smoothing_targets
            margin: of losses.margin_metric_logits; CLIPood: 0.3, 0.1 under domain shift with new classes
            pooling: "cls", or "average" of the patches after projection (AlignCLIP rebuttal, Table 3)
    Raises: ValueError if clip is no CLIP, or text has another width or is not of unit norm.
    Cost:   forward, I FLOPs of the image tower an image: B (I + 2 C E). Ranks exchange only the gradient of
            the image tower, 4 bytes for each weight.
    """

    def __init__(
        self, clip: CLIP, text: Tensor, *, smoothing="none", epsilon=0.9, scale=35, margin=0.0, pooling="cls"
    ):
        super().__init__()
        require_clip(clip)
        if text.dim() != 2 or text.shape[1] != clip.config.embed_dim:
            raise ValueError(f"text {tuple(text.shape)}: expected (classes, {clip.config.embed_dim})")
        length = text.norm(dim=-1)
        if not torch.allclose(length, torch.ones_like(length), atol=1e-3):
            worst = length[(length - 1).abs().argmax()]
            raise ValueError(f"text features must have length 1, one has {worst:.4g}: normalise them")
        if pooling not in ("cls", "average"):
            raise ValueError(f"--image-pooling {pooling}: expected cls or average")
        self.clip = clip.requires_grad_(False)
        clip.visual.requires_grad_(True)
        self.margin, self.pooling = margin, pooling
        # gives the image tower its pooling
        self.dual_encoder()
        targets = smoothing_targets(text.detach(), epsilon, scale, smoothing)
        self.register_buffer("text", text.detach(), persistent=False)  # (C, E)
        self.register_buffer("targets", targets, persistent=False)  # (C, C)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E) unit norm."""
        return unit(self.clip.encode_image(images))

    def classification(self, image: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of unit features (B, E) under labels (B,), and the accuracy.

        REF: as in the official code this accuracy includes the margin, so it is below predict's.
        """
        with full_precision(image):
            scale = self.clip.logit_scale.exp()
            logits = margin_metric_logits(image, self.text, labels, scale, self.margin)  # (B, C)
            loss = soft_cross_entropy(logits, self.targets[labels])
        return loss, {"accuracy": (logits.argmax(-1) == labels).float().mean()}

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, S, S), labels (B,) -> loss (), and tensors without gradient to log."""
        return self.classification(self.features(images), labels)

    def predict(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """Cosines (B, C) to the classes trained on, or to other text features (C, E); without the margin."""
        image = self.features(images)
        with full_precision(image):
            return image @ unit(self.text if text is None else text).t()  # (B, C)

    def dual_encoder(self, clip: CLIP | None = None) -> nn.Module:
        clip = self.clip if clip is None else clip
        # AveragePooled adds no state
        clip.visual.__class__ = AveragePooled if self.pooling == "average" else VisionTransformer
        return clip


class BetaMovingAverage:
    """Average of the weights along training that favours both ends: zero-shot and fine-tuned.

    CLIPood's Beta moving average:  theta_BMA = sum_t a_t theta_t / sum_t a_t,  t = 0 ... T,
    a_t = density of Beta(beta, beta) at (t + 0.5) / (T + 1); its constant cancels. beta = 1 is the plain
    mean. beta = 0.5 gives the first and the last tenth of the steps 20 % of the weight each.
    REF: only parameters are averaged, buffers stay those of the start; the official code averages in fp16.
    Args: module: its present weights are step 0;  total_steps T;  beta: 0.5, in CLIPood's few-shot runs 0.1
    Use:  update(module) after every optimiser step; average is a module of the same structure and names.
    Raises: ValueError unless beta is positive and total_steps at least 1.
    """

    def __init__(self, module: nn.Module, total_steps: int, beta: float = 0.5):
        if beta <= 0 or total_steps < 1:
            raise ValueError(f"beta {beta} must be positive and total_steps {total_steps} at least 1")
        self.average = copy.deepcopy(module).requires_grad_(False)
        self.total_steps, self.beta, self.step = total_steps, beta, 0
        self.weight_sum = self.weight(0)

    def weight(self, step: int) -> float:
        """a_t of this step."""
        x = (step + 0.5) / (self.total_steps + 1)
        return (x * (1 - x)) ** (self.beta - 1)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the weights after one more step.   Raises: ValueError after total_steps updates."""
        if self.step == self.total_steps:
            raise ValueError(f"the moving average was made for {self.total_steps} steps, not more")
        self.step += 1
        self.weight_sum += self.weight(self.step)
        share = self.weight(self.step) / self.weight_sum
        # lerp and not a weighted sum: weights that never change keep their bits
        for mean, new in zip(self.average.parameters(), module.parameters(), strict=True):
            mean.lerp_(new.to(mean.dtype), share)

    def state_dict(self) -> dict:
        numbers = {k: getattr(self, k) for k in ("total_steps", "beta", "step", "weight_sum")}
        return {**numbers, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Takes up a saved average.   Raises: ValueError if it was made for other steps or beta."""
        saved, here = (state["total_steps"], state["beta"]), (self.total_steps, self.beta)
        if saved != here:
            raise ValueError(f"a moving average over (steps, beta) {saved} cannot continue as {here}")
        self.step, self.weight_sum = state["step"], state["weight_sum"]
        self.average.load_state_dict(state["average"])


def wise_ft(zero_shot: dict, fine_tuned: dict, alpha: float = 0.5) -> dict[str, Tensor]:
    """Robust fine-tuning by a straight line between two checkpoints.

    Wortsman et al. 2022:  (1 - alpha) theta_zero-shot + alpha theta_fine-tuned, for every entry.
    REF: mlfoundations/wise-ft@58b7a4b also interpolates a trained head. Here the head is the text features,
    which are the same at both ends when only the image tower was trained.
    Args:   two state dicts of one architecture;  alpha: 0 is exactly zero-shot, 1 exactly fine-tuned
    Raises: ValueError if names or shapes differ.
    """
    require_same_shapes(zero_shot, fine_tuned, "in the zero-shot weights", "in the fine-tuned ones")
    return {k: torch.lerp(v, fine_tuned[k].to(v), alpha) for k, v in zero_shot.items()}


@dataclass(frozen=True)
class Classification:
    """Flags of the classification loss, which AlignCLIP has too."""

    # classification loss
    margin: float = 0.3  # lambda of the margin metric softmax; finetune, labelsmooth: 0
    smoothing: str = "none"  # none, uniform, mixture or released; labelsmooth: uniform
    epsilon: float = 0.9  # the label's own share of a smoothed target
    smoothing_scale: float = 35.0  # of the text cosines that distribute the rest
    bma_beta: float = 0.5  # Beta moving average of the weights, which is the reported model; 0: off

    def arguments(self) -> dict:
        """The arguments of FineTune that are flags."""
        names = ("margin", "smoothing", "epsilon")
        return {name: getattr(self, name) for name in names} | {"scale": self.smoothing_scale}


@dataclass(frozen=True)
class Settings(Classification):
    # classification loss
    image_pooling: str = "cls"  # cls, or average of the patches


DEFAULTS = dict(lr=5e-6, steps=5000, batch_size=36, warmup=0, weight_decay=0.1, beta2=0.999, eps=1e-8)
DEFAULTS |= dict(crop_scale=0.7, train_size=2048)
TINY = dict(lr=5e-4, steps=300)
PRESETS, TASK = {}, "labels"
# of both papers' codes for new classes; 500 steps are an epoch
STEPS = {"ImageNet": 5000, "FGVCAircraft": 5000, "StanfordCars": 2500, "SUN397": 2500, "UCF101": 1000}
STEPS[""] = 500  # of all others
OPEN_CLASS = {("open-class", name): dict(steps=steps, bma_beta=0.1) for name, steps in STEPS.items()}
# thuml/CLIPood@bc0d874 main.py, scripts.sh, by (task, data set): changes to DEFAULTS
PUBLISHED = {key: flags | dict(shots=16) for key, flags in OPEN_CLASS.items()} | {
    ("domain-shift", "OfficeHome"): dict(lr=1e-5),
    ("domain-shift", "DomainNet"): dict(lr=1e-5, steps=10000, batch_size=60),
    ("in-the-wild", "OfficeHome"): dict(lr=3e-6, margin=0.1, bma_beta=0.1),
    ("in-the-wild", "DomainNet"): dict(lr=5e-6, steps=10000, batch_size=60, margin=0.1),
}


def build(settings: Settings, clip: CLIP, classes: Classes) -> FineTune:
    return FineTune(clip, classes.text, **settings.arguments(), pooling=settings.image_pooling)


@dataclass(frozen=True, kw_only=True)
class Flags:
    command: Literal["wise-ft"]  # the only command
    zero_shot: str  # checkpoint before fine-tuning
    fine_tuned: str  # checkpoint after it
    alpha: float = 0.5  # 0 is zero-shot, 1 fine-tuned
    out: str  # file to write


@program
def main(argv: list[str]) -> None:
    c = parse(Flags, argv, __doc__, positional=("command", "zero_shot", "fine_tuned"))
    if Path(c.out).exists():
        raise ValueError(f"{c.out} exists already: give another --out")
    if not 0 <= c.alpha <= 1:
        raise ValueError(f"--alpha {c.alpha}: must be in [0, 1], where 1 is the fine-tuned model")
    for source in (c.zero_shot, c.fine_tuned):
        task = archive.read(pretrained.locate(source)).content.get("task")
        if reason := pretrained.more_than_clip(task, read_config(source)):
            raise ValueError(f"{source}: {reason}, so a mixture of the weights would not be its model")
    model = pretrained.load(c.zero_shot)
    model.load_state_dict(wise_ft(model.state_dict(), pretrained.load(c.fine_tuned).state_dict(), c.alpha))
    print(f"written to {pretrained.save(model, c.out)}")


if __name__ == "__main__":
    leave(main())
