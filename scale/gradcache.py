"""The contrastive training step: any number of ranks, any number of chunks, one and the same gradient.

Radford et al. 2021 (arXiv:2103.00020), section 2.5, shards the loss over ranks; Gao et al. 2021
(arXiv:2101.06983), GradCache, splits a rank's batch into chunks. Both are exact here: each rank computes
its rows against every rank's columns, and the gather carries gradients (distributed.py).
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import losses
from model import DualEncoder
from scale import distributed


def sides_of(side) -> tuple[Tensor, ...]:
    return side if isinstance(side, tuple) else (side,)


def float_side(side):
    """fp32 from here on: normalisation, logits and losses are never computed in half precision."""
    full = tuple(losses.at_least_fp32(x) for x in sides_of(side))
    return full if isinstance(side, tuple) else full[0]


def contrastive_loss(model: nn.Module, image_side, text_side, objective: str) -> Tensor:
    """This rank's rows of the global loss: local images against every rank's texts.

    Only text travels (and for InfoNCE the logits' other half); the mean over ranks is the global loss.
    """
    rows, texts = len(sides_of(image_side)[0]), distributed.gather(text_side)
    offset = distributed.rank() * rows  # column of the first row's pair
    if objective == "siglip" and getattr(model, "pair_loss", None):
        # SPEED: tile by tile, where a model offers it because its pairs are costly

        def part(logits: Tensor, row: int, column: int) -> Tensor:
            return losses.siglip_sum(logits, offset + row - column)

        return model.pair_loss(image_side, texts, part) / rows
    logits = model.pair_logits(image_side, texts)  # (B, G)
    if objective == "siglip":
        return losses.siglip(logits, offset)
    return losses.info_nce(logits, distributed.transpose(logits), offset)


def training_step(
    model: nn.Module,
    images: Tensor,
    tokens: Tensor,
    objective: str,
    chunks: int = 1,
    autocast=contextlib.nullcontext,
) -> Tensor:
    """Forward and backward of one step; gradients are left in .grad, to be averaged over ranks by DDP.

    chunks > 1 is GradCache (Gao et al. 2021, arXiv:2101.06983), exact in every gradient:
        1. encode every chunk without a graph;  2. the loss of all pairs and its gradient with respect
        to the sides (and to the parameters behind them, as logit_scale);  3. encode each chunk again
        and push its part of that gradient through the tower.
    Averaging the losses of chunks instead would drop the negatives between them (cosine 0.86 to this).
    Args:    images (B, 3, S, S), tokens (B, L) of this rank, the same B on every rank
             model: a dual encoder, or DistributedDataParallel around one;  objective "infonce" | "siglip"
             autocast: context manager for the towers' precision
    Returns: () this rank's loss, detached.
    Cost:    chunks > 1 adds one forward pass of the towers, and holds both sides three times (by chunk,
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
        return float_side(image_side), text_side if after_text else float_side(text_side)

    if chunks == 1:
        # SPEED: texts travel while the images are encoded, their gradients while the images' go back
        after_text = [lambda side: distributed.start_gather(float_side(side))]
        after_text *= distributed.world_size() > 1 and isinstance(inner, DualEncoder)
        loss = contrastive_loss(inner, *encode(model, images, tokens, *after_text), objective)
        loss.backward()
        return loss.detach()

    parts = list(zip(images.chunk(chunks), tokens.chunk(chunks)))
    with torch.no_grad():
        encoded = [[sides_of(side) for side in encode(inner, *part)] for part in parts]
    full = [
        tuple(torch.cat(xs).requires_grad_() for xs in zip(*(sides[which] for sides in encoded)))
        for which in (0, 1)
    ]
    del encoded
    image_side, text_side = (side if len(side) > 1 else side[0] for side in full)
    loss = contrastive_loss(inner, image_side, text_side, objective)
    leaves, parameters = [*full[0], *full[1]], [p for p in inner.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, leaves + parameters, allow_unused=True)
    rows = len(images) // chunks
    for n, part in enumerate(parts):
        last = n == chunks - 1
        with model.no_sync() if wrapped and not last else contextlib.nullcontext():
            sides = [x for side in encode(model, *part) for x in sides_of(side)]
            own = [g[n * rows : (n + 1) * rows] for g in grads[: len(leaves)]]
            surrogate = sum((x * g).sum() for x, g in zip(sides, own))
            if last:  # TRAP: the parameters behind the sides must take part in the backward that DDP reduces
                behind = zip(parameters, grads[len(leaves) :])
                surrogate = surrogate + sum((p * g).sum() for p, g in behind if g is not None)
            surrogate.backward()
    return loss.detach()
