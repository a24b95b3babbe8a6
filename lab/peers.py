"""What bench.py measures against: the published form of Llip's objective, and the packages others use.

Nothing here is needed to train or evaluate. open_clip and transformers are imported only when asked for;
without them bench.py says so in one line and goes on.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losses import siglip
from model import Config


def published_pair_loss(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    text: Tensor,
    weight: Tensor,
    temperature: float,
    scale: float,
    bias: float,
) -> Tensor:
    """Llip's objective as published: attention, mix, output projection, normalise; the block checkpointed.

    Lavoie et al. 2024, eq. 1 to 3, restated from the paper; their code checkpoints a rank's block of pairs.
    Args:    keys, values (B, H, M, K), queries (N, H, K), text (N, E), weight W_O (E, E)
    Returns: () the sigmoid loss.
    """

    def block(keys, values, queries, text, weight):
        phi = (torch.einsum("ihmk,jhk->ijhm", keys, queries) / temperature).softmax(-1)
        y = torch.einsum("ijhm,ihmk->ijhk", phi, values)  # (B, N, H, K)
        z = F.normalize(y.flatten(2) @ weight, dim=-1)  # (B, N, E)
        return scale * torch.einsum("ije,je->ij", z, F.normalize(text, dim=-1)) + bias  # (B, N)

    logits = checkpoint(block, keys, values, queries, text, weight, use_reentrant=False)
    return siglip(logits)


def published_tower(visual: nn.Module, images: Tensor) -> Tensor:
    """CLIP's image tower as everybody writes it: (B, 3, S, S) -> (B, E), every token through the last MLP.

    model.VisionTransformer gives the same number without that of the patches, which nobody reads.
    """
    return visual.head(visual.transformer(visual.embed(images)))[:, 0]  # (B, E)


def import_open_clip():
    """open_clip, also where torchvision was built for another torch (a CPU-only one, say)."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # "operator torchvision::nms does not exist": its binary cannot be loaded
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
    import open_clip

    return open_clip


def open_clip_model(c: Config) -> nn.Module:
    """open_clip's CLIP at the sizes of a configuration, random weights."""
    clip = import_open_clip().model
    vision = clip.CLIPVisionCfg(
        layers=c.vision_layers,
        width=c.vision_width,
        head_width=c.vision_width // c.vision_heads,
        patch_size=c.patch_size,
        image_size=c.image_size,
    )
    text = clip.CLIPTextCfg(
        context_length=c.context_length,
        vocab_size=c.vocab_size,
        width=c.text_width,
        heads=c.text_heads,
        layers=c.text_layers,
    )
    return clip.CLIP(c.embed_dim, vision, text, quick_gelu=c.activation == "quick_gelu")


def transformers_model(c: Config) -> nn.Module:
    """transformers' CLIPModel at the sizes of a configuration, random weights."""
    from transformers import CLIPConfig, CLIPModel

    def tower(which: str, width: int, mlp: int, layers: int, heads: int, **more) -> dict:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        return dict(zip(names, (width, mlp, layers, heads)), hidden_act=c.activation, **more)

    return CLIPModel(
        CLIPConfig(
            projection_dim=c.embed_dim,
            vision_config=tower(
                "vision",
                c.vision_width,
                c.vision_mlp,
                c.vision_layers,
                c.vision_heads,
                image_size=c.image_size,
                patch_size=c.patch_size,
            ),
            text_config=tower(
                "text",
                c.text_width,
                c.text_mlp,
                c.text_layers,
                c.text_heads,
                vocab_size=c.vocab_size,
                max_position_embeddings=c.context_length,
                bos_token_id=c.vocab_size - 2,
                eos_token_id=c.vocab_size - 1,
                pad_token_id=0,
            ),
        )
    )


def open_clip_logits(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    image, text, scale = model(images, tokens)[:3]
    return scale * image @ text.t()  # (B, B)


def transformers_logits(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    return model(pixel_values=images, input_ids=tokens).logits_per_image  # (B, B)


def clip_peers() -> tuple[dict[str, tuple[Callable, Callable]], list[str]]:
    """{name: (model of a Config, logits of (model, images, tokens))} of what is there, and what is not."""
    candidates = {
        "open_clip": (import_open_clip, open_clip_model, open_clip_logits),
        "transformers": (lambda: __import__("transformers"), transformers_model, transformers_logits),
    }
    found, missing = {}, []
    for name, (load, build, logits) in candidates.items():
        try:
            load()
            found[name] = build, logits
        except (ImportError, RuntimeError) as error:
            missing.append(f"{name} is not measured: {str(error).splitlines()[0]}")
    return found, missing


def torchvision_crop() -> Callable | None:
    """open_clip's training crop, by torchvision: size -> callable(PIL image); None without it."""
    try:
        import_open_clip()
        from torchvision.transforms import InterpolationMode, RandomResizedCrop
    except (ImportError, RuntimeError):
        return None
    return lambda size: RandomResizedCrop(size, (0.9, 1.0), interpolation=InterpolationMode.BICUBIC)
