"""TeS, text supervision for fine-tuning: an image's own similarity to the class names softens its target.

Wang et al. 2023, "Improved Visual Fine-tuning with Natural Language Supervision" (ICCV 2023); Apache-2.0 code
idstcv/TeS@43bf264, TeS_loss.py. The image tower ends in two heads: a classifier o, and a projection h of unit
norm into the space of the frozen text features T:

    s    = h T^T / tau                                  similarity of this image to the class names
    q    = lambda_v softmax(s) + (1 - lambda_v) onehot  the target, without gradient
    loss = CE(o, q) + lambda_t CE(s, y)                 the second term trains the projection

AlignCLIP's semantic label smoothing (losses.smoothing_targets) has no second head; its targets depend on the
class only. TeS can express that this dog looks like a wolf, smoothing only that dogs resemble wolves.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import clipood
from baselines.coop import Prompted
from clipood import Classes, LabelMethod, full_precision, require_clip, unit
from losses import at_least_fp32, soft_cross_entropy
from model import CLIP


def tes_loss(
    logits: Tensor, projected: Tensor, text: Tensor, labels: Tensor, tau=0.03, lambda_v=0.2, lambda_t=0.4
) -> Tensor:
    """Cross-entropy under targets softened per image, plus the loss of the projection: the formulas above.

    Args:    logits (B, C) of the classifier;  projected (B, E), text (C, E) unit norm;  labels (B,)
             tau: temperature;  lambda_v: the names' share of the target;  lambda_t: weight of the second term
    Returns: () nats, mean over images. lambda_v = lambda_t = 0 is plain cross-entropy.
    """
    semantic = at_least_fp32(projected) @ at_least_fp32(text).t() / tau  # (B, C)
    onehot = F.one_hot(labels, len(text)).to(semantic.dtype)  # (B, C)
    # TRAP: the target is a constant; with a gradient the projection would learn to suit the classifier
    target = lambda_v * semantic.detach().softmax(-1) + (1 - lambda_v) * onehot  # (B, C)
    return soft_cross_entropy(logits, target) + lambda_t * F.cross_entropy(semantic, labels)


class TextSupervised(Prompted):
    """TeS as a dual encoder: the classifier for the classes of training, the projection for other texts."""

    takes_captions = True

    def __init__(self, method: "TeS"):
        super().__init__(method)
        clip = method.clip
        self.encode_text, self.ensemble_text = clip.encode_text, clip.ensemble_text
        self.class_templates = clip.class_templates
        self.scale = nn.Identity()  # the classifier's own scale

    def trained_classes(self) -> Tensor:
        return self.method.text  # (C, E)


class TeS(LabelMethod):
    """Fine-tuning of CLIP's image tower with a new classifier, supervised by the class names.

    REF: the official backbones never saw text (ResNet-50 by MoCo-v2). Here both heads start at ln_post,
    where CLIP's own projection does; that projection is not used, and frozen.
    Args:   clip: every parameter but the image tower's is frozen
            text (C, E) text features of the classes, from this CLIP or any other
            the rest as in tes_loss
    Raises: ValueError if clip is no CLIP or text is not (C, E).
    Cost:   forward: B (I + 2 C D + 2 D^2 + 4 C E). 4 bytes of gradient for each weight of the
            image tower but its D E projection, and of the heads' C (D + 1) + D^2 + 3 D + E (D + 1)
    """

    starts_as = "both heads start at random"
    whole_batch = one_process = True

    def __init__(self, clip: CLIP, text: Tensor, *, tau=0.03, lambda_v=0.2, lambda_t=0.4):
        super().__init__()
        require_clip(clip)
        if text.dim() != 2:
            raise ValueError(f"text features {tuple(text.shape)}: expected (classes, width)")
        self.clip = clip.requires_grad_(False)
        clip.visual.requires_grad_(True)
        # DistributedDataParallel refuses parameters without gradients
        clip.visual.proj.requires_grad_(False)
        self.tau, self.lambda_v, self.lambda_t = tau, lambda_v, lambda_t
        self.loss_terms = f"the classifier's + {lambda_t:g} x the projection's cross-entropy"
        width = clip.config.vision_width
        self.classifier = nn.Linear(width, len(text))
        hidden = nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()
        self.projection = nn.Sequential(*hidden, nn.Linear(width, text.shape[1]))
        self.to(clip.logit_scale.dtype)
        self.register_buffer("text", unit(text.detach()), persistent=False)  # (C, E)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D), the class token after ln_post."""
        visual = self.clip.visual
        return visual.ln_post(visual.transformer(visual.embed(images), keep_tokens=lambda x: x[:, 0]))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, S, S), labels (B,) -> loss (), and the accuracies of both heads."""
        x = self.features(images)  # (B, D)
        logits, projected = self.classifier(x), unit(self.projection(x))  # (B, C), (B, E)
        with full_precision(x):
            loss = tes_loss(logits, projected, self.text, labels, self.tau, self.lambda_v, self.lambda_t)
            named = projected.detach() @ self.text.t()  # (B, C)
        answers = {"accuracy": logits, "projection_accuracy": named}
        return loss, {k: (v.argmax(-1) == labels).float().mean() for k, v in answers.items()}

    def predict(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """Logits (B, C) of the classifier; for the text (C', E) of other classes, cosines of the projection.

        PAPER: only the classifier is evaluated. It has no answer for new classes; the projection has one.
        """
        x = self.features(images)  # (B, D)
        if text is None:
            return self.classifier(x)  # (B, C)
        projected = unit(self.projection(x))  # (B, E)
        with full_precision(x):
            return projected @ unit(text).t()  # (B, C')

    def dual_encoder(self, clip: CLIP | None = None) -> nn.Module:
        return TextSupervised(self) if clip is None else clip


@dataclass(frozen=True)
class Settings:
    tes_temperature: float = 0.03  # tau, of the names' distribution
    tes_share: float = 0.2  # lambda_v, the names' share of the target
    tes_weight: float = 0.4  # lambda_t, of the projection's own loss


OPTIMIZER = dict(optimizer="nesterov", lr=3.16e-3, weight_decay=1e-5)
DEFAULTS = clipood.DEFAULTS | OPTIMIZER | dict(batch_size=256, epochs=100.0)
TINY = clipood.TINY | dict(optimizer="adamw", batch_size=36, epochs=0.0, shots=0)
PRESETS, TASK = {"tes-cifar100": dict(tes_share=0.1, tes_weight=0.3)}, "labels"


def build(s: Settings, clip: CLIP, classes: Classes) -> TeS:
    return TeS(clip, classes.text, tau=s.tes_temperature, lambda_v=s.tes_share, lambda_t=s.tes_weight)
