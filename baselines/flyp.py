"""FLYP, "fine-tune like you pre-train": both towers under InfoNCE on (image, prompt of its class) pairs.

Goyal et al. 2023 (arXiv:2212.00638); code locuslab/FLYP@215d5bb. The logit scale is trained too. Under
several ranks the prompts of every rank are the negatives, as in pre-training.

    REF: two images of one class in a batch are negatives of each other there, and therefore here. The loss of
    a batch with repeated classes cannot reach 0.
    REF: its lists pair every image with each template. Batches are drawn from these pairs, and an epoch is
    as long as the list.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import clipood
from clipood import Classes, LabelMethod, full_precision, require_clip, unit
from losses import info_nce
from model import CLIP
from scale.distributed import gather, rank, transpose


class FLYP(LabelMethod):
    """Pre-training's loss on the images and prompts of labelled data.

    Args:   class_tokens (C P, L): the P tokenized prompts of each class, those of class 0 first
    Raises: ValueError if clip is no CLIP.
    Cost:   forward, T FLOPs of the text tower a prompt, cut to the longest class', U classes in the batch:
            B I + U T + 2 B G E. Ranks exchange 4 bytes of gradient a weight of both towers, and 4 E a text
    """

    whole_batch = True

    def __init__(self, clip: CLIP, class_tokens: Tensor, prompts_per_class: int = 1):
        super().__init__()
        require_clip(clip)
        self.clip, self.prompts_per_class = clip.requires_grad_(True), prompts_per_class
        # SPEED: no token attends to a later one, so columns that no class uses are cut off; not for each
        # batch, since --compile needs constant shapes
        used = int(class_tokens.argmax(-1).max()) + 1
        self.register_buffer("class_tokens", class_tokens[:, :used], persistent=False)  # (C P, L')

    def first_loss(self, classes: int, batch_size: int) -> str:
        return f"{super().first_loss(batch_size, batch_size)}; images of one class keep it above 0"

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """labels: rows of class_tokens. The logged accuracy is among the classes of this rank's prompts."""
        image = unit(self.clip.encode_image(images))
        # SPEED: a prompt that occurs n times in the batch is encoded once; the gradient is the same
        rows, place = labels.unique(return_inverse=True)
        text = unit(self.clip.encode_text(self.class_tokens[rows]))[place]  # (B, E)
        with full_precision(image):
            logits = self.clip.scale_logits(image @ gather(text).t())  # (B, G)
            first = rank() * len(image)
            loss = info_nce(logits, transpose(logits), first)
        answer = labels[logits[:, first : first + len(labels)].detach().argmax(-1)]  # (B,)
        right = answer // self.prompts_per_class == labels // self.prompts_per_class
        return loss, {"accuracy": right.float().mean()}

    def predict(self, images: Tensor) -> Tensor:
        """Cosines (B, C) to the mean prompts of the classes, encoded by the text tower as it is now."""
        image = unit(self.clip.encode_image(images))
        text = unit(self.clip.encode_text(self.class_tokens))  # (C P, E)
        text = unit(text.unflatten(0, (-1, self.prompts_per_class)).mean(1))  # (C, E)
        with full_precision(image):
            return image @ text.t()  # (B, C)


@dataclass(frozen=True)
class Settings:
    bma_beta: float = 0.0  # Beta moving average of the weights, which is then the reported model; 0: off


DEFAULTS, TINY = clipood.DEFAULTS | dict(lr=1e-5), clipood.TINY
PRESETS = {  # the official runs
    "flyp-imagenet": dict(lr=1e-5, weight_decay=0.1, batch_size=512, epochs=10.0),
    "flyp-iwildcam": dict(lr=1e-5, weight_decay=0.2, batch_size=256, epochs=20.0),
}
TASK = "labels"


def build(settings: Settings, clip: CLIP, classes: Classes) -> FLYP:
    tokens = [classes.tokens(template, clip.config.context_length) for template in classes.templates]
    return FLYP(clip, torch.stack(tokens, 1).flatten(0, 1), len(tokens))
