"""Latent tokens on the text side of Llip, an experiment of this project (claim l15 of lab/reproduce.py).

A reviewer of Llip asked whether the authors had tried K latent tokens on the text side; they called it an
interesting follow-up. Importing this file adds the method "latent" to baselines/methods.py.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.methods import METHODS, Method
from llip import Llip, start_of_bias, start_of_scale
from model import Config


class LatentTextLlip(Llip):
    """Llip in which T learned tokens follow a caption, and each gives a query and a text feature.

    No publication. The tokens come after the end token, so that under the causal mask they attend to the
    words and no word attends to them:  logits_ij = exp(a) mean_t cos(z_ijt, t_jt) + b
    Args: text_tokens T;  the others as Llip.   Cost: T times Llip's pairs; the text tower has T more tokens.
    """

    def __init__(self, config: Config, mixture_tokens: int, heads: int, text_tokens: int = 4, **options):
        super().__init__(config, mixture_tokens, heads, **options)
        self.text_tokens = nn.Parameter(torch.randn(text_tokens, config.text_width) * 0.02)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) to the features of the latent tokens (B, T, D), before any projection."""
        (B, L), T = tokens.shape, len(self.text_tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[:L]
        x = F.pad(x, (0, 0, 0, T))  # (B, L + T, D)
        row = torch.arange(B, device=x.device)[:, None]
        place = tokens.argmax(-1)[:, None] + 1 + torch.arange(T, device=x.device)  # (B, T)
        # they have no positions: each latent token has its own vector, wherever the caption ends
        x = x.index_put((row, place), self.text_tokens.to(x.dtype).expand(B, -1, -1))
        return self.ln_final(self.transformer(x, "causal", lambda x: x[row, place]))  # (B, T, D)

    def pair_logits(self, image_side: tuple, text_side: tuple) -> Tensor:
        """Keys, values (B, H, M, K) and queries (B, T, H, K), text (B, T, E) -> (B_img, B_txt)."""
        flat = tuple(part.flatten(0, 1) for part in text_side)  # (B_txt T, ...)
        logits = super().pair_logits(image_side, flat)  # (B_img, B_txt T)
        return logits.unflatten(1, (-1, len(self.text_tokens))).mean(-1)  # (B_img, B_txt)


@dataclass(frozen=True)
class Settings:
    """Flags of latent."""

    # latent text tokens
    text_tokens: int = 4  # latent tokens of a caption
    mixture_tokens: int = 8  # mixture tokens M
    mixture_heads: int = 4  # heads of the pooling
    temperature: float = 5.0  # tau of eq. 1; larger is softer
    objective: str = "siglip"  # infonce or siglip
    logit_scale: float = 0.0  # start of exp(logit_scale); 0: 1/0.07 for infonce, 10 for siglip
    logit_bias: float = float("nan")  # start of the bias; nan: -ln(batch - 1), at least -10


DEFAULTS, TINY, PRESETS, TASK = {}, {}, {}, "pairs"


def build(settings: Settings, start: Config | nn.Module, batch_size: int) -> LatentTextLlip:
    """The model from random weights.   Raises: ValueError for a start from a checkpoint."""
    if not isinstance(start, Config):
        raise ValueError("--method latent trains from scratch: leave out --init")
    s, scale = settings, start_of_scale(settings.objective, settings.logit_scale)
    numbers = dict(temperature=s.temperature, scale=scale, bias=start_of_bias(s.logit_bias, batch_size))
    return LatentTextLlip(start, s.mixture_tokens, s.mixture_heads, s.text_tokens, **numbers)


METHODS["latent"] = Method(sys.modules[__name__])
