"""TeS, text supervision for fine-tuning: an image's own similarity to the class names softens its target.

Wang et al. 2023, "Improved Visual Fine-tuning with Natural Language Supervision" (ICCV 2023); Apache-2.0
code idstcv/TeS@43bf264, TeS_loss.py. The image tower ends in two heads, a classifier o and a projection
h of unit norm into the space of frozen text features T:

    s    = h T^T / tau                                  what the names say about this image
    q    = lambda_v softmax(s) + (1 - lambda_v) onehot  the target, without gradient
    L    = CE(o, q) + lambda_t CE(s, y)                 the second term teaches the projection

Beside AlignCLIP's semantic label smoothing (SLS, losses.smoothing_targets), which it resembles:

            target                               parameters      depends on
    TeS     one distribution for every image     a second head   the image, hence on training
    SLS     row y of one fixed (C, C) matrix     none            the names of the classes alone

TeS can say "this dog looks like a wolf", SLS only "dogs are like wolves". Both targets sum to 1 (SLS as
a mixture; as released its rows do not).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from clipood import full_precision, require_clip, unit
from losses import at_least_fp32, soft_cross_entropy
from model import CLIP


def tes_loss(
    logits: Tensor,
    projected: Tensor,
    text: Tensor,
    labels: Tensor,
    tau: float = 0.03,
    lambda_v: float = 0.2,
    lambda_t: float = 0.4,
) -> Tensor:
    """Cross-entropy under targets softened per image, plus the projection head's own.

    The formulas above; idstcv/TeS@43bf264 TeS_loss.py.
    Args:    logits (B, C) of the classifier;  projected (B, E), text (C, E) unit norm;  labels (B,)
             tau: temperature;  lambda_v: the names' share of the target;  lambda_t: second term's weight
             (official: 0.2 and 0.4, on CIFAR-100 0.1 and 0.3)
    Returns: () nats, mean over images. lambda_v = lambda_t = 0 is plain cross-entropy.
    """
    semantic = at_least_fp32(projected) @ at_least_fp32(text).t() / tau  # (B, C)
    onehot = F.one_hot(labels, len(text)).to(semantic.dtype)  # (B, C)
    # TRAP: the target is a constant; with a gradient the projection would learn to please the classifier
    target = lambda_v * semantic.detach().softmax(-1) + (1 - lambda_v) * onehot  # (B, C)
    return soft_cross_entropy(logits, target) + lambda_t * F.cross_entropy(semantic, labels)


class TeS(nn.Module):
    """Fine-tuning of CLIP's image tower with a new classifier, supervised by class names.

    Wang et al. 2023. loss(images, labels) -> (loss, logs) and predict(images) -> (B, C) as in clipood.py;
    train() and eval() do differ: the projection head holds a BatchNorm.
    REF: official backbones never saw text (ResNet-50 by MoCo-v2). Here both heads begin where CLIP's own
    projection does, at ln_post; that projection is not used, and frozen.
    Official runs: SGD with Nesterov, lr 0.00316, weight decay 1e-5, batch 256, 100 epochs, cosine.
    Args:   clip: every parameter but the image tower's is frozen
            text (C, E) unit-norm text features of the classes, from this CLIP or any other
            hidden: width of the projection head, the tower's by default;  the rest as in tes_loss
    Raises: ValueError if clip is no CLIP or text is not (C, E).
    Cost:   forward, hidden = D: B (I + 2 C D + 2 D^2 + 4 C E). 4 bytes of gradient for each weight of the
            image tower but its D E projection, and of the heads' C (D + 1) + D^2 + 3 D + E (D + 1)
    """

    def __init__(
        self,
        clip: CLIP,
        text: Tensor,
        *,
        hidden: int | None = None,
        tau: float = 0.03,
        lambda_v: float = 0.2,
        lambda_t: float = 0.4,
    ):
        super().__init__()
        require_clip(clip)
        if text.dim() != 2:
            raise ValueError(f"text features {tuple(text.shape)}: expected (classes, width)")
        self.clip = clip.requires_grad_(False)
        clip.visual.requires_grad_(True)
        clip.visual.proj.requires_grad_(False)  # DDP stops at parameters that get no gradient
        self.tau, self.lambda_v, self.lambda_t = tau, lambda_v, lambda_t
        width = clip.config.vision_width
        hidden = hidden or width
        self.classifier = nn.Linear(width, len(text))
        self.projection = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, text.shape[1])
        )
        self.register_buffer("text", unit(text.detach()), persistent=False)  # (C, E)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D), the class token after ln_post."""
        visual = self.clip.visual
        x = visual.transformer(visual.embed(images), keep_tokens=lambda x: x[:, 0])
        return visual.ln_post(x)  # (B, D)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, S, S), labels (B,) -> loss (), and both heads' accuracies."""
        x = self.features(images)  # (B, D)
        logits, projected = self.classifier(x), unit(self.projection(x))  # (B, C), (B, E)
        weights = self.tau, self.lambda_v, self.lambda_t
        with full_precision(x):
            loss = tes_loss(logits, projected, self.text, labels, *weights)
            named = projected.detach() @ self.text.t()  # (B, C)
        found = {"accuracy": logits, "projection_accuracy": named}
        return loss, {k: (v.argmax(-1) == labels).float().mean() for k, v in found.items()}

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(images, labels)

    def predict(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """Logits (B, C) of the classifier; for other classes' text (C', E) cosines of the projection.

        The second is not in the paper: a classifier knows no new class, the projection may.
        """
        x = self.features(images)  # (B, D)
        if text is None:
            return self.classifier(x)  # (B, C)
        projected = unit(self.projection(x))  # (B, E)
        with full_precision(x):
            return projected @ unit(text).t()  # (B, C')
