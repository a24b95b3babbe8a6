"""Fine-tuning CLIP towards a set of classes: plain, label smoothing, CLIPood, WiSE-FT.

The classes' text features are computed once and stay; they are the classification head, so step 0 is
zero-shot CLIP and classes never trained on can be scored afterwards. Only the image tower learns.

    method       in this file                                          source
    finetune     FineTune(clip, text)                                  cross-entropy on exp(t) * cos
    labelsmooth  FineTune(clip, text, smoothing="uniform")             Szegedy et al. 2016
    clipood      FineTune(clip, text, margin=0.3), BetaMovingAverage   Shu et al. 2023 (arXiv:2302.00864)
    wise_ft      wise_ft(zero_shot, fine_tuned, alpha)                 Wortsman et al. 2022 (arXiv:2109.01903)

A fine-tuning method is a module with loss(images, labels) -> (loss, logs) and predict(images) -> (B, C);
forward is loss, which is the call that DistributedDataParallel wraps. method.clip stays a plain CLIP and
its state dict is the checkpoint. train() and eval() make no difference: there is no dropout.

    REF: thuml/CLIPood@bc0d874 holds the weights in fp16 between steps without a master copy: at its
    learning rate of 5e-6 many updates round away. Weights are fp32 here; autocast belongs to the loop.
    REF: its "batch 36" is 12 images from each of 3 source domains; AlignCLIP's code takes 36 from each.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import at_least_fp32, margin_metric_logits, smoothing_targets, soft_cross_entropy
from model import CLIP


def unit(x: Tensor) -> Tensor:
    """Normalises the last axis to unit length, in fp32 or fp64: (..., E) -> (..., E)."""
    return F.normalize(at_least_fp32(x), dim=-1)


def full_precision(x: Tensor) -> torch.autocast:
    """Switches autocast off for x's device: bf16 is for the towers, cosines and losses are fp32."""
    return torch.autocast(x.device.type, enabled=False)


def require_clip(clip: nn.Module) -> None:
    """Raises ValueError for Llip and PooledTokens: they have no single class token with one projection."""
    if not isinstance(clip, CLIP) or clip.visual.class_embedding.dim() != 1:
        raise ValueError(f"fine-tuning needs a CLIP, not a {type(clip).__name__}")


@dataclass(frozen=True)
class Classes:
    """The classes that a method is fine-tuned on."""

    names: list[str]
    templates: tuple[str, ...]  # of the frozen text features; the first one also for methods with one prompt
    tokenizer: Callable  # texts, context_length -> (N, L)
    text: Tensor  # (C, E) unit norm: the names in the templates, by the CLIP that is fine-tuned

    def tokens(self, template: str, context_length: int) -> Tensor:
        """Token ids (C, L) of every name in one template."""
        texts = [template.replace("{}", name) for name in self.names]
        return self.tokenizer(texts, context_length).to(self.text.device)


class LabelMethod(nn.Module):
    """The protocol of fine-tuning methods: a module around .clip with loss and predict.

    loss(images, labels) -> (loss (), {name: tensor to log});  predict(images) -> (B, C)
    starts_as     what is true of the first step, for the line about the loss to expect
    loss_terms    what the logged loss adds up, if it is more than one cross-entropy
    whole_batch   the loss is no mean over images, so a batch cannot be cut into chunks
    one_process   a layer must see the whole batch, so there can be no other ranks
    new_classes   classes that were not trained on can be scored
    """

    starts_as, loss_terms = "training starts at zero-shot CLIP", ""
    whole_batch, one_process, new_classes = False, False, True

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss: the call that DistributedDataParallel wraps."""
        return self.loss(images, labels)

    def dual_encoder(self, clip: CLIP | None = None) -> nn.Module:
        """The dual encoder that answers for this method, with `clip` (say, averaged weights) for its own."""
        return self.clip if clip is None else clip

    def learned(self) -> dict[str, Tensor]:
        """All that was learned except CLIP's weights, for the checkpoint: {} for most methods."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}

    def load_learned(self, state: dict[str, Tensor]) -> None:
        """Takes up learned().   Raises: ValueError if names or shapes are not those of this module."""
        own, saved = ({k: tuple(v.shape) for k, v in s.items()} for s in (self.learned(), state))
        if own != saved:
            name = min(k for k, _ in own.items() ^ saved.items())
            found, expected = saved.get(name, "absent"), own.get(name, "absent")
            raise ValueError(f"{name}: {found} in the state, {expected} in this {type(self).__name__}")
        self.load_state_dict(self.state_dict() | state)


def average_of_patches(visual: nn.Module, images: Tensor) -> Tensor:
    """The other pooling, (B, 3, S, S) -> (B, E): the mean over the patches after the projection."""
    tokens = visual.head(visual.transformer(visual.embed(images)))  # (B, 1 + P, E)
    return tokens[:, visual.tokens :].mean(1)  # (B, E)


class FineTune(LabelMethod):
    """Cross-entropy between an image's cosines to the class texts and its label; margin 0.3 is CLIPood.

    CLIPood's margin metric softmax:  L = -log softmax_y(exp(t) * (f_c + margin * (1 - T_y . T_c))),  f_c the
    cosine to class c; losses.margin_metric_logits has the other, shorter form of the same number.
    Args:   clip: every parameter but those of clip.visual is frozen, the logit scale exp(t) included
            text (C, E) unit-norm text features of the classes: the head, never trained
            smoothing, epsilon, scale: the target of each label, see losses.smoothing_targets
            margin: lambda; CLIPood has 0.3, and 0.1 under domain shift and new classes together
            pooling: "cls", or "average" of the patches after projection (AlignCLIP rebuttal, Table 3)
    Raises: ValueError if clip is no CLIP, or text has another width or is not of unit norm.
    Cost:   forward, I FLOPs of the image tower an image: B (I + 2 C E). 4 bytes of gradient for each of the
            image tower's weights are all that ranks exchange
    """

    def __init__(
        self,
        clip: CLIP,
        text: Tensor,
        *,
        smoothing: str = "none",
        epsilon: float = 0.9,
        scale: float = 35.0,
        margin: float = 0.0,
        pooling: str = "cls",
    ):
        super().__init__()
        require_clip(clip)
        if text.dim() != 2 or text.shape[1] != clip.config.embed_dim:
            width = clip.config.embed_dim
            raise ValueError(f"text features {tuple(text.shape)}: expected (classes, {width})")
        length = text.norm(dim=-1)
        if not torch.allclose(length, torch.ones_like(length), atol=1e-3):
            worst = length[(length - 1).abs().argmax()]
            raise ValueError(f"text features must have length 1, one has {worst:.4g}: normalise them")
        if pooling not in ("cls", "average"):
            raise ValueError(f"pooling {pooling!r}: expected cls or average")
        self.clip = clip.requires_grad_(False)
        clip.visual.requires_grad_(True)
        self.margin, self.pooling = margin, pooling
        targets = smoothing_targets(text.detach(), epsilon, scale, smoothing)
        self.register_buffer("text", text.detach(), persistent=False)  # (C, E)
        self.register_buffer("targets", targets, persistent=False)  # (C, C)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E) unit norm."""
        if self.pooling == "cls":
            return unit(self.clip.encode_image(images))
        return unit(average_of_patches(self.clip.visual, images))

    def classification(self, image: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of unit features (B, E) under labels (B,), and the accuracy.

        REF: as in the official code the accuracy is that of the margin's logits, below predict's.
        """
        with full_precision(image):
            scale = self.clip.logit_scale.exp()
            logits = margin_metric_logits(image, self.text, labels, scale, self.margin)  # (B, C)
            loss = soft_cross_entropy(logits, self.targets[labels])
        return loss, {"accuracy": (logits.argmax(-1) == labels).float().mean()}

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, S, S), labels (B,) -> loss (), and what to log, as tensors without gradient."""
        return self.classification(self.features(images), labels)

    def predict(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """Cosines (B, C) to the classes trained on, or to any others' text features (C, E); no margin."""
        image = self.features(images)
        with full_precision(image):
            return image @ unit(self.text if text is None else text).t()  # (B, C)


class BetaMovingAverage:
    """Average of the weights along training that favours both ends: zero-shot and fine-tuned.

    CLIPood's Beta moving average:  theta_BMA = sum_t a_t theta_t / sum_t a_t,  t = 0 ... T,
    a_t = density of Beta(beta, beta) at (t + 0.5) / (T + 1); its constant cancels. beta = 1 is the plain
    mean, beta = 0.5 weighs the first and the last tenth of the steps 20 % each.
    REF: parameters only, buffers stay those of the start; the official code averages in fp16.
    Args: module: its present weights are step 0;  total_steps T;  beta 0.5, CLIPood's few-shot runs 0.1
    Use:  update(module) after every optimiser step; average is a module of the same structure and names.
    """

    def __init__(self, module: nn.Module, total_steps: int, beta: float = 0.5):
        if beta <= 0 or total_steps < 1:
            raise ValueError(f"beta {beta} must be positive and total_steps {total_steps} at least 1")
        self.average = copy.deepcopy(module).requires_grad_(False)
        self.total_steps, self.beta, self.step = total_steps, beta, 0
        self.weight_sum = self.weight(0)

    def weight(self, step: int) -> float:
        """The density of Beta(beta, beta) at this step, without its constant."""
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
        # lerp and not a weighted sum: weights that never change stay bit for bit what they are
        for mean, new in zip(self.average.parameters(), module.parameters(), strict=True):
            mean.lerp_(new.to(mean.dtype), share)

    def state_dict(self) -> dict:
        """All that resuming needs: plain numbers and the averaged weights."""
        numbers = {k: getattr(self, k) for k in ("total_steps", "beta", "step", "weight_sum")}
        return {**numbers, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Takes up a saved average.   Raises: ValueError if it was made for other steps or beta."""
        saved, here = (state["total_steps"], state["beta"]), (self.total_steps, self.beta)
        if saved != here:
            raise ValueError(f"a moving average over (steps, beta) {saved} cannot go on as {here}")
        self.step, self.weight_sum = state["step"], state["weight_sum"]
        self.average.load_state_dict(state["average"])


def wise_ft(
    zero_shot: dict[str, Tensor], fine_tuned: dict[str, Tensor], alpha: float = 0.5
) -> dict[str, Tensor]:
    """Robust fine-tuning by a straight line between two checkpoints.

    Wortsman et al. 2022:  (1 - alpha) theta_zero-shot + alpha theta_fine-tuned, for every entry.
    REF: mlfoundations/wise-ft@58b7a4b also interpolates a trained head; text features, the head here,
    are the same at both ends when only the image tower was trained.
    Args:   two state dicts of one architecture;  alpha 0 is zero-shot and 1 fine-tuned, both exactly
    Raises: ValueError if names or shapes differ.
    """
    shapes = [{k: tuple(v.shape) for k, v in state.items()} for state in (zero_shot, fine_tuned)]
    if shapes[0] != shapes[1]:
        name = sorted(k for k, _ in shapes[0].items() ^ shapes[1].items())[0]
        raise ValueError(
            f"{name}: {shapes[0].get(name, 'absent')} in the zero-shot weights, "
            f"{shapes[1].get(name, 'absent')} in the fine-tuned ones"
        )
    return {k: torch.lerp(v, fine_tuned[k].to(v), alpha) for k, v in zero_shot.items()}


DEFAULTS = dict(
    lr=5e-6, steps=5000, batch_size=36, warmup=0, weight_decay=0.1, beta2=0.999, eps=1e-8, crop_scale=0.7
)
DEFAULTS |= dict(train_size=2048)  # scenes to draw
TINY = dict(lr=5e-4, steps=300)
