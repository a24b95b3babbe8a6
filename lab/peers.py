"""What lab/bench.py compares with: the published form of Llip's objective, and other packages' CLIP.

open_clip and transformers are imported only when they are measured, and left out where they are missing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losses import siglip
from model import CONFIGS, Config
from util.text import one_line, warn
from weights.layouts import to_huggingface_files


def published_pair_loss(inputs: list[Tensor], tau: float, a: float, b: float) -> Tensor:
    """Llip's objective as published: attention, mix, output projection, normalise; the block checkpointed.

    Lavoie et al. 2024, eq. 1 to 3; their code checkpoints the block of all pairs of a rank.
    Args:    inputs: keys, values (B, H, M, K), queries (N, H, K), text (N, E), W_O (E, E);  logits a cos + b
    Returns: () the sigmoid loss.
    """

    def block(keys, values, queries, text, weight):
        phi = (torch.einsum("ihmk,jhk->ijhm", keys, queries) / tau).softmax(-1)
        y = torch.einsum("ijhm,ihmk->ijhk", phi, values)  # (B, N, H, K)
        z = F.normalize(y.flatten(2) @ weight, dim=-1)  # (B, N, E)
        return a * torch.einsum("ije,je->ij", z, F.normalize(text, dim=-1)) + b  # (B, N)

    return siglip(checkpoint(block, *inputs, use_reentrant=False))


def open_clip_model(c: Config) -> nn.Module:
    """open_clip's CLIP at the sizes of a configuration, random weights."""
    from open_clip.model import CLIP

    vision = dict(layers=c.vision_layers, width=c.vision_width, head_width=c.vision_width // c.vision_heads)
    vision |= dict(patch_size=c.patch_size, image_size=c.image_size)
    text = dict(context_length=c.context_length, vocab_size=c.vocab_size, heads=c.text_heads)
    text |= dict(layers=c.text_layers, width=c.text_width)
    return CLIP(c.embed_dim, vision, text, quick_gelu=c.activation == "quick_gelu")


def transformers_model(c: Config) -> nn.Module:
    """transformers' CLIPModel at the sizes of a configuration, random weights."""
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig.from_dict(to_huggingface_files(c, None)["config.json"]))


def peer_logits(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """(B, 3, S, S), (B, L) -> (B, B)"""
    if hasattr(model, "vision_model"):  # transformers
        return model(pixel_values=images, input_ids=tokens).logits_per_image
    image, text, scale = model(images, tokens)[:3]
    return scale * image @ text.t()


PEERS = {"open_clip": open_clip_model, "transformers": transformers_model}  # package: model of a Config


def installed() -> list[str]:
    """Names of the packages in PEERS that can build a model; a warning for the others."""
    found = []
    for name, build in PEERS.items():
        try:
            build(CONFIGS["tiny"])
            found.append(name)
        except (ImportError, RuntimeError) as error:
            warn(f"{name} is not measured: {one_line(error)}")
    return found
