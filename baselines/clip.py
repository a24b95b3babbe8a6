"""CLIP and SigLIP as methods: the model of model.py under InfoNCE or under the sigmoid loss.

clip     Radford et al. 2021 (arXiv:2103.00020)    InfoNCE, exp(t) starts at 1 / 0.07, no bias
siglip   Zhai et al. 2023 (arXiv:2303.15343)       sigmoid, exp(t) starts at 10, a bias for every logit
"""

from dataclasses import dataclass

import torch
from torch import nn

from llip import paper, start_of_bias, start_of_scale
from model import CLIP, Config


@dataclass(frozen=True)
class Settings:
    # loss
    objective: str = "infonce"  # infonce or siglip
    logit_scale: float = 0.0  # start of exp(logit_scale); 0: 1/0.07 for infonce, 10 for siglip
    logit_bias: float = float("nan")  # start of the bias under siglip; nan: -ln(batch - 1), at least -10


DEFAULTS, TINY = {}, {}
# Lavoie et al. 2024, Table 1: Llip's baselines on its data; zero-shot ImageNet top-1 67.6 (MetaCLIP) and 67.3
PRESETS = {
    "clip-B-32": paper("ViT-B-32", 5e-4, method="clip", beta2=0.98),
    "siglip-B-32": paper("ViT-B-32", 5e-4, method="siglip"),
}
TASK = "pairs"


def build(settings: Settings, start: Config | nn.Module, batch_size: int) -> CLIP:
    """As llip.build.   Raises: ValueError if start is a loaded model and no CLIP."""
    scale = start_of_scale(settings.objective, settings.logit_scale)
    bias = start_of_bias(settings.logit_bias, batch_size) if settings.objective == "siglip" else None
    if isinstance(start, Config):
        return CLIP(start, scale=scale, bias=bias)
    if type(start) is not CLIP:
        raise ValueError(f"this method starts from a CLIP, not from a {type(start).__name__}")
    if (start.logit_bias is None) == (bias is not None):
        start.logit_bias = nn.Parameter(torch.tensor(bias)) if bias is not None else None
    return start
