"""The contrastive training step on any number of ranks and in any number of chunks, with one exact gradient.

Each rank computes its rows of the loss against the columns of all ranks (Radford et al. 2021,
arXiv:2103.00020, section 2.5). The plain step for one process and one chunk is in tasks.py.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import losses
from model import DualEncoder
from scale import distributed
from scale.llip_tiles import TiledLlip


def parts_of(features) -> tuple[Tensor, ...]:
    """Features as a tuple of tensors: Llip's are one already."""
    return features if isinstance(features, tuple) else (features,)


def float_features(features):
    """At least fp32 from here on: normalisation, logits and losses are never computed in half precision."""
    return distributed.map_features(losses.at_least_fp32, features)


def contrastive_loss(model: nn.Module, image_side, text_side, objective: str) -> Tensor:
    """This rank's rows of the global loss: local images against the texts of all ranks.

    Only text is sent, and for InfoNCE the other half of the logits. The mean over ranks is the global loss.
    """
    # TRAP: torch.compile returns a module of another class, which would miss the faster form below
    model = getattr(model, "_orig_mod", model)
    rows, texts = len(parts_of(image_side)[0]), distributed.gather(text_side)
    offset = distributed.rank() * rows
    if objective == "siglip" and isinstance(model, TiledLlip):
        # SPEED: the gradient of each tile is taken at once
        total = model.pair_loss(
            image_side, texts, lambda logits, row, column: losses.siglip_sum(logits, offset + row - column)
        )
        return total / rows
    logits = model.pair_logits(image_side, texts)  # (B, G)
    if objective == "siglip":
        return losses.siglip(logits, offset)
    return losses.info_nce(logits, distributed.transpose(logits), offset)


def training_step(
    model: nn.Module, images: Tensor, tokens: Tensor, objective: str, chunks: int = 1, autocast=nullcontext
) -> Tensor:
    """Forward and backward of one step; gradients are left in .grad, where DDP averages them over ranks.

    chunks > 1 is GradCache (Gao et al. 2021, arXiv:2101.06983), exact in every gradient. The mean of the
    chunks' losses would drop the negatives between chunks (cosine 0.86 to this gradient).
    Args:    images (B, 3, S, S), tokens (B, L) of this rank, the same B on every rank
             model: a dual encoder, or DistributedDataParallel around one;  objective "infonce" | "siglip"
             autocast: context manager for the precision of the towers
    Returns: () this rank's loss, detached.
    Cost:    chunks > 1 adds one forward pass of the towers, and holds all features three times (by chunk,
             joined, gradients): 24 B E bytes for CLIP, 24 B E (M + 1) for Llip.
    Raises:  ValueError if B is not divisible by chunks, or the objective is unknown.
    """
    if objective not in ("infonce", "siglip"):
        raise ValueError(f"objective {objective!r}: expected infonce or siglip")
    if len(images) % chunks:
        raise ValueError(f"batch {len(images)} is not divisible by {chunks} chunks")
    wrapped = isinstance(model, DistributedDataParallel)
    inner = model.module if wrapped else model

    def encode(through, x, t, *after_text):
        with autocast():
            image_side, text_side = through(x, t, *after_text)
        return float_features(image_side), text_side if after_text else float_features(text_side)

    if chunks == 1:
        # SPEED: texts are sent while images are encoded, and their gradients during the images' backward pass
        after_text = [lambda features: distributed.start_gather(float_features(features))]
        after_text *= distributed.world_size() > 1 and isinstance(inner, DualEncoder)
        loss = contrastive_loss(inner, *encode(model, images, tokens, *after_text), objective)
        loss.backward()
        return loss.detach()

    # 1. all features, without a graph
    parts = list(zip(images.chunk(chunks), tokens.chunk(chunks)))
    with torch.no_grad():
        encoded = [[parts_of(features) for features in encode(inner, *part)] for part in parts]
    full = [tuple(torch.cat(xs).requires_grad_() for xs in zip(*side)) for side in zip(*encoded)]
    del encoded

    # 2. the loss of all pairs, its gradient at the features and at the parameters after them, as logit_scale
    image_side, text_side = (features if len(features) > 1 else features[0] for features in full)
    loss = contrastive_loss(inner, image_side, text_side, objective)
    leaves, parameters = [*full[0], *full[1]], [p for p in inner.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, leaves + parameters, allow_unused=True)

    # 3. each chunk again, with a graph: its part of that gradient goes through the tower
    for n, part in enumerate(parts):
        last = n == chunks - 1
        with model.no_sync() if wrapped and not last else nullcontext():
            features = [x for side in encode(model, *part) for x in parts_of(side)]
            own = [g.chunk(chunks)[n] for g in grads[: len(leaves)]]
            surrogate = sum((x * g).sum() for x, g in zip(features, own))
            if last:
                # TRAP: the parameters after the features must take part in the backward pass that DDP reduces
                after = zip(parameters, grads[len(leaves) :])
                surrogate = surrogate + sum((p * g).sum() for p, g in after if g is not None)
            surrogate.backward()
    return loss.detach()
