"""Latent tokens on the text side of Llip: an experiment of this project."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llip import Llip
from model import Config


class LatentTextLlip(Llip):
    """Ours, published nowhere: T learned tokens follow a caption, and each asks the image for itself.

    "Was there any attempt to introduce K latent tokens on the text side?", a reviewer of Llip asked; "an
    interesting follow-up" was the answer. The simplest design with Llip's own parts: the tokens stand after
    the end token, so that by the causal mask they see the words and nobody sees them; each gives a query
    and a text feature, and a pair's cosine is the mean over the T of them:
        logits_ij = exp(a) mean_t cos(z_ijt, t_jt) + b
    Args: text_tokens T;  the others as Llip.   Cost: the pairs of Llip T times, the text tower's tokens + T.
    """

    def __init__(
        self,
        config: Config,
        mixture_tokens: int,
        heads: int,
        text_tokens: int = 4,
        temperature: float = 5.0,
        norm: bool = False,
        scale: float = 10.0,
        bias: float = -10.0,
    ):
        super().__init__(config, mixture_tokens, heads, temperature, norm, scale=scale, bias=bias)
        self.text_tokens = nn.Parameter(torch.randn(text_tokens, config.text_width) * 0.02)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) to the features of the latent tokens (B, T, D), before any projection."""
        (B, L), T = tokens.shape, len(self.text_tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[:L]
        x = F.pad(x, (0, 0, 0, T))  # (B, L + T, D)
        row = torch.arange(B, device=x.device)[:, None]
        place = tokens.argmax(-1)[:, None] + 1 + torch.arange(T, device=x.device)  # (B, T)
        # no position is added: each latent token is a vector of its own, wherever the caption ends
        x = x.index_put((row, place), self.text_tokens.to(x.dtype).expand(B, -1, -1))
        return self.ln_final(self.transformer(x, "causal", lambda x: x[row, place]))  # (B, T, D)

    def pair_logits(self, image_side: tuple, text_side: tuple) -> Tensor:
        """Keys, values (B, H, M, K) and queries (B, T, H, K), text (B, T, E) -> (B_img, B_txt)."""
        flat = tuple(part.flatten(0, 1) for part in text_side)  # (B_txt T, ...)
        logits = super().pair_logits(image_side, flat)  # (B_img, B_txt T)
        return logits.unflatten(1, (-1, len(self.text_tokens))).mean(-1)  # (B_img, B_txt)
