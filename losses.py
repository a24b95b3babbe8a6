"""The losses: pure functions of logits, probabilities or unit features; fp32 inside; no state, no ranks.

CLIP, SigLIP and Llip differ in how logits[i, j] arises, not in the loss; so each loss exists once. Under
several processes a rank holds some rows and all columns: offset is the column of its first row's pair.

    info_nce                Radford et al. 2021 (arXiv:2103.00020), Fig. 3
    siglip                  Zhai et al. 2023 (arXiv:2303.15343), Alg. 1
    margin_metric_logits    CLIPood, Shu et al. 2023 (arXiv:2302.00864), margin metric softmax
    smoothing_targets       AlignCLIP, Han et al. 2025 (doi 10.1007/s10994-025-06742-z), section 3.3
    attention_alignment     AlignCLIP, eq. 6
    similarity_alignment    AlignCLIP, last-layer term of the released code
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision to fp32; fp32 and fp64 (gradient checks) stay as they are."""
    return x if x.dtype == torch.float64 else x.float()


def info_nce(logits: Tensor, logits_t: Tensor | None = None, offset: int = 0) -> Tensor:
    """Contrastive cross-entropy, the mean of both directions.

    Radford et al. 2021, Fig. 3:  L = (CE(S, I) + CE(S^T, I)) / 2
    Args:    logits (B, G) local images against all texts;  logits_t (B, G) local texts against all
             images, logits.t() if not given;  offset: column of row 0's pair
    Returns: () mean nats over the local rows. Equal features give ln G at any scale; a random CLIP
             starts above ln G, since its scale is 1/0.07 and not 0.
    Cost:    no products beside the logits' own; keeps 8 B G bytes, the log-probabilities both ways.
    Raises:  ValueError if the pairs' columns are not there, or a block comes without logits_t.
    """
    if logits_t is None:
        if logits.shape[0] != logits.shape[1]:
            raise ValueError(f"a block of logits {tuple(logits.shape)} needs logits_t as well")
        logits_t = logits.t()
    pair = _pair_columns(logits, offset)
    rows, columns = at_least_fp32(logits), at_least_fp32(logits_t)
    return (F.cross_entropy(rows, pair) + F.cross_entropy(columns, pair)) / 2


def siglip(logits: Tensor, offset: int = 0) -> Tensor:
    """Pairwise sigmoid loss: every pair is a binary question of its own.

    Zhai et al. 2023, Alg. 1:  L = -(1/B) sum_i sum_j log sigmoid(y_ij logits_ij),  y = 2 I - 1
    REF: the in-text equation has the bias' sign flipped, and Llip's eq. 3 lacks the minus; Alg. 1 and
    both official codes are as here.
    Args:    logits (B, G) local images against all texts;  offset: column of row 0's pair
    Returns: () nats, summed over columns and averaged over the local rows. At bias -10 and cosine 0 it
             is softplus(10) + (G - 1) softplus(-10).
    Cost:    no products; keeps the logits in fp32, 4 B G bytes, which fp32 logits are already.
    """
    _pair_columns(logits, offset)
    return siglip_sum(logits, offset) / len(logits)


def siglip_sum(logits: Tensor, offset: int = 0) -> Tensor:
    """siglip's sum over any block of logits (I, J), not divided by anything.

    Args: offset: column of row 0's pair; pairs whose column lies outside of the block are not in it
    """
    s = at_least_fp32(logits)
    # sum_j softplus(s_ij) counts the pair as a negative; softplus(-s) - softplus(s) = -s repairs it
    return F.softplus(s).sum() - s.diagonal(offset).sum()


def _pair_columns(logits: Tensor, offset: int) -> Tensor:
    rows, columns = logits.shape
    if offset < 0 or offset + rows > columns:
        raise ValueError(f"{rows} rows from column {offset} do not fit into {columns} columns")
    return torch.arange(offset, offset + rows, device=logits.device)  # (B,)


def margin_metric_logits(
    image: Tensor, text: Tensor, labels: Tensor, scale: float | Tensor, margin: float = 0.3
) -> Tensor:
    """Logits with a class-adaptive margin: near classes get a small one, far classes a large one.

    CLIPood, Shu et al. 2023, margin metric softmax (engine.py@bc0d874):
        scale * (image - margin * text_y) @ text^T
    Under softmax it is the same to add scale * margin * (1 - text_y . text_c) to every other class c.
    Args:    image (B, E), text (C, E) unit norm;  labels (B,);  scale: exp(logit_scale);  margin lambda
    Returns: (B, C). For training only: predictions use plain cosines.
    Cost:    2 B C E FLOPs, as without a margin.
    """
    return scale * (image - margin * text[labels]) @ text.t()  # (B, C)


def smoothing_targets(
    text: Tensor, epsilon: float = 0.9, scale: float = 35.0, form: str = "mixture"
) -> Tensor:
    """Semantic label smoothing: the label's mass is shared with classes whose names mean the same.

    AlignCLIP section 3.3:  D = softmax_rows(scale * T T^T), row y of the result is the target of label y
        mixture    eps * onehot + (1 - eps) * D       rows sum to 1; eps = 1 means no smoothing
        released   eps on the label, D elsewhere      the authors' code; rows do not sum to 1
        uniform    eps * onehot + (1 - eps) / C       label smoothing, Szegedy et al. 2016
        none       onehot
    REF: engine.py@bb8c449 has the released form, under which eps = 1 still smooths; the rebuttal's
    Table 2 reads eps = 1 as "none", true for the mixture only, which is the default here.
    Args:    text (C, E) unit norm;  epsilon in [0, 1], the label's own share
    Returns: (C, C) targets.   Raises: ValueError for another form or epsilon.
    Cost:    2 C^2 E FLOPs (mixture, released) and 4 C^2 bytes, once before training.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon {epsilon} is not in [0, 1]")
    eye = torch.eye(len(text), device=text.device)
    if form == "none":
        return eye
    if form == "uniform":
        return epsilon * eye + (1 - epsilon) / len(text)
    semantic = at_least_fp32(scale * text @ text.t()).softmax(-1)  # (C, C)
    if form == "mixture":
        return epsilon * eye + (1 - epsilon) * semantic
    if form == "released":
        return torch.where(eye > 0, epsilon, semantic)
    raise ValueError(f"form {form!r}: expected mixture, released, uniform or none")


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against target distributions:  -(1/B) sum_b sum_c targets log softmax(logits).

    Args: logits, targets (B, C); targets need not sum to 1 (the released smoothing's do not).
    Returns: () nats, mean over images.   Cost: no products; keeps 4 B C bytes beside the targets.
    """
    return -(targets * at_least_fp32(logits).log_softmax(-1)).sum(-1).mean()


def attention_alignment(attention: Tensor, guidance: Tensor) -> Tensor:
    """Draws the class token's attention to the guidance:  KL(guidance || attention), mean over images.

    AlignCLIP eq. 6. REF: gradients flow into the guidance as well, as in the released code (no detach);
    pass guidance.detach() for a one-sided loss.
    Args: attention, guidance (B, P), rows sum to 1.
    Returns: () nats.   Cost: no products; keeps 8 B P bytes.
    """
    tiny = torch.finfo(torch.float32).tiny  # an attention of exactly 0 must not give log 0
    log_attention = at_least_fp32(attention).clamp_min(tiny).log()
    return F.kl_div(log_attention, at_least_fp32(guidance), reduction="batchmean")


def similarity_alignment(plain: Tensor, guide: Tensor, labels: Tensor | None = None) -> Tensor:
    """Draws the plain path's patch-text similarity maps to the guiding branch's.

    No equation; zhyhan/AlignCLIP engine.py@bb8c449:  (1/B) sum_b sum_c KL(softmax_P guide || softmax_P plain)
    REF: the released code gathers the label's map and then sums over all classes; labels=None is that,
    labels (B,) is what its comments describe.
    Args: plain, guide (B, P, C) raw cosines;  labels (B,) or None.   Returns: () nats, mean over images.
    Cost: no products; keeps 16 B P C bytes, with labels 16 B P.
    """
    if labels is not None:
        own = labels[:, None, None].expand(-1, plain.shape[1], 1)  # (B, P, 1)
        plain, guide = plain.gather(2, own), guide.gather(2, own)  # (B, P, 1)
    log_plain = at_least_fp32(plain).log_softmax(1)  # (B, P, C)
    log_guide = at_least_fp32(guide).log_softmax(1)  # (B, P, C)
    return F.kl_div(log_plain, log_guide, reduction="batchmean", log_target=True)


if __name__ == "__main__":  # closed forms that tell a right loss from a wrong one
    n = 8
    same = torch.full((n, n), 3.0)
    print(f"info_nce, equal logits   {info_nce(same):.4f}  = ln 8 = {math.log(n):.4f}")  # 2.0794
    zero = torch.full((n, n), -10.0)
    # softplus(10) + 7 softplus(-10) = 10.0004
    print(f"siglip, cosine 0, b=-10  {siglip(zero):.4f}")
