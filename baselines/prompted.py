"""The dual encoder that answers for a method with learned prompts: CoOp, CoCoOp and MaPLe.

CoCoOp's prompts depend on the image and MaPLe's image features on the prompts, so features cannot be computed
apart. Here both features are the inputs themselves: scores are computed from images and token ids.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipood import LabelMethod


class Prompted(nn.Module):
    """Around a method with .clip, .class_tokens, .template and predict(images, class_tokens or None)."""

    conditional = takes_captions = False

    def __init__(self, method: LabelMethod):
        super().__init__()
        self.method, self.config = method, method.clip.config
        self.train(method.training)

    def class_templates(self, templates: tuple[str, ...]) -> tuple[str, ...]:
        """The words between the learned context and the class name replace every template."""
        return (self.method.template,)

    def trained_classes(self) -> Tensor:
        """What encode_text and ensemble_text return for the classes of training: (C, context length)."""
        return self.encode_text(self.method.class_tokens)

    def encode_image(self, images: Tensor) -> Tensor:
        return images

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, L) -> (N, context length), padded with zeros."""
        return F.pad(tokens, (0, self.config.context_length - tokens.shape[1]))

    def ensemble_text(self, tokens: Tensor, group: Tensor) -> Tensor:
        """(C, L), unchanged.   Raises: ValueError for a class with several prompts."""
        classes = int(group.max()) + 1
        if len(group) != classes:
            message = "a learned prompt takes one template and one name for each class"
            raise ValueError(f"{len(group)} prompts for {classes} classes: {message}")
        return tokens

    def pair_logits(self, images: Tensor, classes: Tensor) -> Tensor:
        """Scores (B, C). A method may know more about the classes of training, so these are recognised."""
        trained = self.trained_classes()  # (C, L), or (C, E) for TeS
        classes = classes.to(trained.dtype)
        same = classes.shape == trained.shape and torch.allclose(classes, trained, atol=1e-5)
        return self.method.predict(images, None if same else classes)
