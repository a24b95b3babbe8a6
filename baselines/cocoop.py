"""CoCoOp: CoOp whose context depends on the image.

Zhou et al. 2022 (arXiv:2203.05557), section 3.2; code KaiyangZhou/CoOp@ff61507:

    V_m(x) = V_m + MetaNet(f(x))    f(x): unit image feature; MetaNet: Linear(E, E/16)-ReLU-Linear(E/16, D)

PAPER: B images make B * C prompts, so the paper trains with batch 1.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from baselines import coop
from baselines.coop import PromptLearner
from clipood import Classes
from model import CLIP


class CoCoOp(PromptLearner):
    """Conditional context optimisation: MetaNet adds one vector per image to all context vectors.

    Args: chunk: prompts encoded at once; a batch with more is recomputed in the backward pass, so that
          memory is that of one chunk, at the price of a second forward pass.  The rest as in PromptLearner
    Cost: forward, h = E / 16: B I + B C T + 2 B h (E + D), B times CoOp's texts. 4 bytes of gradient for each
          of the context's n D numbers and MetaNet's h (E + D) + h + D
    """

    def __init__(self, clip: CLIP, class_tokens: Tensor, context: int = 4, *, chunk: int = 256, **start):
        super().__init__(clip, class_tokens, context, **start)
        if chunk < 1:
            raise ValueError(f"chunk {chunk}: at least 1 prompt must be encoded at once")
        self.chunk = chunk
        E, D = clip.config.embed_dim, clip.config.text_width
        hidden = max(E // 16, 1)
        layers = [("linear1", nn.Linear(E, hidden)), ("relu", nn.ReLU()), ("linear2", nn.Linear(hidden, D))]
        self.meta_net = nn.Sequential(OrderedDict(layers)).to(self.ctx.dtype)

    def cosines(self, images: Tensor, tokens: Tensor) -> Tensor:
        # SPEED: the pairs of a batch run together, in chunks; the official code takes one image after another
        image = self.image_features(images)  # (B, E)
        ctx = self.ctx + self.meta_net(image).unsqueeze(1)  # (B, n, D)
        pairs = torch.arange(len(images) * len(tokens), device=image.device).split(self.chunk)

        def run(pair: Tensor) -> Tensor:
            i, c = pair // len(tokens), pair % len(tokens)
            text = self.encode_prompts(ctx[i], tokens[c])  # (pairs, E)
            return (image[i] * text).sum(-1)  # (pairs,)

        again = len(pairs) > 1 and torch.is_grad_enabled()
        cosines = [checkpoint(run, p, use_reentrant=False) if again else run(p) for p in pairs]
        return torch.cat(cosines).view(len(images), len(tokens))  # (B, C)


@dataclass(frozen=True)
class Settings:
    context: int = 4  # learned vectors
    context_words: str = "a photo of a"  # words that they start as, one token each; empty: random


DEFAULTS = coop.DEFAULTS | dict(batch_size=1, epochs=10.0)
TINY, PRESETS, TASK = coop.TINY, {}, "labels"


def build(settings: Settings, clip: CLIP, classes: Classes) -> CoCoOp:
    tokens, start = coop.prompts(settings, clip, classes)
    return CoCoOp(clip, tokens, settings.context, **start)
