"""FLYP, "fine-tune like you pre-train": both towers under InfoNCE on (image, prompt of its class) pairs.

Goyal et al. 2023 (arXiv:2212.00638); code locuslab/FLYP@215d5bb.
"""

import torch
from torch import Tensor, nn

from clipood import full_precision, require_clip, unit
from losses import info_nce
from model import CLIP
from scale.distributed import gather, rank, transpose


class FLYP(nn.Module):
    """Fine-tune like you pre-train: both towers under InfoNCE on (image, its class' prompt) pairs.

    Goyal et al. 2023 (locuslab/FLYP@215d5bb). The logit scale learns too, and under several ranks
    every rank's prompts are the negatives, as in pre-training.
    REF: two images of one class in a batch are negatives of each other there, hence here: the loss of
    a batch with repeated classes cannot reach 0.
    Args: class_tokens (C, L): the tokenized prompt of each class.
    Cost: forward, T FLOPs of the text tower a prompt, cut to the longest class', U classes in the batch:
          B I + U T + 2 B G E. Ranks exchange 4 bytes of gradient a weight of both towers, and 4 E a text
    """

    def __init__(self, clip: CLIP, class_tokens: Tensor):
        super().__init__()
        require_clip(clip)
        self.clip = clip.requires_grad_(True)
        # SPEED: nothing looks ahead of the end token: columns that no class uses are cut off, 77 become some
        # 10. Once for all classes and not for each batch: under --compile shapes must not change
        used = int(class_tokens.argmax(-1).max()) + 1
        self.register_buffer("class_tokens", class_tokens[:, :used], persistent=False)  # (C, L')
        self.register_buffer("text", None, persistent=False)  # (C, E), see class_features
        self.register_buffer("text_weights", None, persistent=False)  # what text was computed from

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, S, S), labels (B,) -> loss (), and what to log."""
        image = unit(self.clip.encode_image(images))
        # SPEED: a class that occurs n times in the batch is encoded once; the gradient is the same
        classes, place = labels.unique(return_inverse=True)
        text = unit(self.clip.encode_text(self.class_tokens[classes]))[place]  # (B, E)
        with full_precision(image):
            logits = self.clip.scale_logits(image @ gather(text).t())  # (B, G)
            first = rank() * len(image)
            loss = info_nce(logits, transpose(logits), first)
        found = labels[logits[:, first : first + len(labels)].detach().argmax(-1)]  # (B,)
        return loss, {"accuracy": (found == labels).float().mean()}

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(images, labels)

    @torch.no_grad()
    def class_features(self) -> Tensor:
        """Text features (C, E) of the classes from the text tower as it is now, unit norm.

        They are kept until a weight changes, whoever changes it: the sums of all parameters tell.
        """
        named = self.clip.named_parameters()
        sums = torch.stack([p.sum() for name, p in named if not name.startswith("visual.")])
        if self.text is None or not torch.equal(sums, self.text_weights):
            parts = [unit(self.clip.encode_text(tokens)) for tokens in self.class_tokens.split(256)]
            self.text, self.text_weights = torch.cat(parts), sums
        return self.text

    def predict(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """Cosines (B, C) to the classes' prompts, encoded by the current text tower, or to text (C, E)."""
        image = unit(self.clip.encode_image(images))
        text = self.class_features() if text is None else unit(text)
        with full_precision(image):
            return image @ text.t()  # (B, C)
