"""All losses, as pure functions of logits, probabilities or unit features. They compute in fp32 or fp64.

CLIP, SigLIP and Llip compute logits[i, j] in different ways and share these losses. With several processes
each rank has the rows of its own images and all columns; `offset` is the column that matches its first row.

    info_nce                Radford et al. 2021 (arXiv:2103.00020), Fig. 3
    siglip                  Zhai et al. 2023 (arXiv:2303.15343), Alg. 1
    margin_metric_logits    CLIPood, Shu et al. 2023 (arXiv:2302.00864), margin metric softmax
    smoothing_targets       AlignCLIP, Han et al. 2025 (doi 10.1007/s10994-025-06742-z), section 3.3
    attention_alignment     AlignCLIP, eq. 6
    similarity_alignment    AlignCLIP, last-layer term of the released code
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Converts half precision to fp32; fp32 and fp64 (for gradient checks) are not converted."""
    return x if x.dtype == torch.float64 else x.float()


def info_nce(logits: Tensor, logits_t: Tensor | None = None, offset: int = 0) -> Tensor:
    """Contrastive cross-entropy: the mean of the image-to-text and the text-to-image direction.

    Radford et al. 2021, Fig. 3:  L = (CE(S, I) + CE(S^T, I)) / 2
    Args:    logits (B, G): local images, all texts;  offset: column of row 0's pair
             logits_t (B, G): local texts, all images; default logits.t()
    Returns: () nats, mean over the local rows. Equal features give ln G at every scale; a random CLIP starts
             above ln G because its scale is 1/0.07
    Raises:  ValueError if a pair lies outside the columns, or logits are not square and logits_t is missing
    Cost:    no matrix products; autograd keeps the log-probabilities of both directions, 8 B G bytes
    """
    if logits_t is None:
        if logits.shape[0] != logits.shape[1]:
            raise ValueError(f"logits of shape {tuple(logits.shape)} are not square: logits_t is needed too")
        logits_t = logits.t()
    pair = _pair_columns(logits, offset)
    rows, columns = at_least_fp32(logits), at_least_fp32(logits_t)
    return (F.cross_entropy(rows, pair) + F.cross_entropy(columns, pair)) / 2


def siglip(logits: Tensor, offset: int = 0) -> Tensor:
    """Sigmoid loss: a binary classification of every image-text pair.

    Zhai et al. 2023, Alg. 1:  L = -(1/B) sum_i sum_j log sigmoid(y_ij logits_ij),  y = 2 I - 1
    REF: Alg. 1 and both official codes agree with this. The equation in SigLIP's text has the opposite sign
    of the bias, and eq. 3 of Llip has no leading minus.
    Args:    logits (B, G): local images, all texts;  offset: column of row 0's pair
    Returns: () nats, summed over columns, mean over the local rows. With bias -10 and all cosines 0 the loss
             is softplus(10) + (G - 1) softplus(-10)
    Raises:  ValueError if a pair lies outside the columns
    Cost:    no matrix products; autograd keeps the logits in fp32, 4 B G bytes
    """
    _pair_columns(logits, offset)
    return siglip_sum(logits, offset) / len(logits)


def siglip_sum(logits: Tensor, offset: int = 0) -> Tensor:
    """The sum in siglip over a block of logits (I, J), before the division by B; offset may be outside."""
    s = at_least_fp32(logits)
    # softplus(s) treats every entry as a negative; for a positive, add softplus(-s) - softplus(s) = -s
    return F.softplus(s).sum() - s.diagonal(offset).sum()


def _pair_columns(logits: Tensor, offset: int) -> Tensor:
    rows, columns = logits.shape
    if offset < 0 or offset + rows > columns:
        raise ValueError(f"{rows} rows from column {offset} do not fit into {columns} columns")
    return torch.arange(offset, offset + rows, device=logits.device)  # (B,)


def margin_metric_logits(
    image: Tensor, text: Tensor, labels: Tensor, scale: float | Tensor, margin: float = 0.3
) -> Tensor:
    """Logits with an adaptive margin: small for classes similar to the label, large for other classes.

    CLIPood, Shu et al. 2023, margin metric softmax (engine.py@bc0d874):
        scale * (image - margin * text_y) @ text^T
    Its softmax equals that of the plain logits with scale * margin * (1 - text_y . text_c) added to class c.
    Args:    image (B, E), text (C, E) unit norm;  labels y (B,);  scale: exp(logit_scale);  margin: lambda
    Returns: (B, C) logits for training; predictions use plain cosines.   Cost: 2 B C E FLOPs
    """
    return scale * (image - margin * text[labels]) @ text.t()  # (B, C)


def smoothing_targets(text: Tensor, epsilon: float = 0.9, scale: float = 35, form: str = "mixture") -> Tensor:
    """Semantic label smoothing: classes with similar names receive a part of the label's probability.

    AlignCLIP section 3.3, with D = softmax_rows(scale * T T^T):
        mixture    eps * onehot + (1 - eps) * D       rows sum to 1; eps = 1 is no smoothing
        released   eps for the label, D elsewhere     the authors' code; rows do not sum to 1
        uniform    eps * onehot + (1 - eps) / C       label smoothing, Szegedy et al. 2016
        none       onehot
    REF: in engine.py@bb8c449 ("released") eps = 1 still smooths. The rebuttal's Table 2 calls eps = 1
    "none", which is true for the mixture only; the mixture is inferred from this.
    Args:    text T (C, E) unit norm;  epsilon in [0, 1].   Raises: ValueError for another form or epsilon
    Returns: (C, C), row y is the target of label y.   Cost: 2 C^2 E FLOPs and 4 C^2 bytes, once
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon {epsilon} is not in [0, 1]")
    text = at_least_fp32(text)
    onehot = torch.eye(len(text), dtype=text.dtype, device=text.device)
    if form == "none":
        return onehot
    if form == "uniform":
        return epsilon * onehot + (1 - epsilon) / len(text)
    semantic = (scale * text @ text.t()).softmax(-1)  # (C, C)
    if form == "mixture":
        return epsilon * onehot + (1 - epsilon) * semantic
    if form == "released":
        return torch.where(onehot > 0, epsilon, semantic)
    raise ValueError(f"form {form!r}: expected mixture, released, uniform or none")


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with target distributions:  -(1/B) sum_b sum_c targets log softmax(logits).

    Args:    logits, targets (B, C); the rows of targets need not sum to 1
    Returns: () nats, mean over images.   Cost: no matrix products; autograd keeps 4 B C bytes and the targets
    """
    return -(targets * at_least_fp32(logits).log_softmax(-1)).sum(-1).mean()


def attention_alignment(attention: Tensor, guidance: Tensor) -> Tensor:
    """Attention alignment loss of AlignCLIP, eq. 6:  KL(guidance || attention), mean over images.

    REF: as in the released code, the guidance receives a gradient too; pass guidance.detach() to prevent it.
    Args:    attention, guidance (B, P), rows sum to 1
    Returns: () nats.   Cost: no matrix products; autograd keeps 8 B P bytes
    """
    # an attention of exactly 0 would give log 0
    log_attention = at_least_fp32(attention).clamp_min(torch.finfo(torch.float32).tiny).log()
    return F.kl_div(log_attention, at_least_fp32(guidance), reduction="batchmean")


def similarity_alignment(plain: Tensor, guide: Tensor, labels: Tensor | None = None) -> Tensor:
    """Aligns the patch-text similarity maps of the plain path with those of the second branch.

    No equation; zhyhan/AlignCLIP engine.py@bb8c449:  (1/B) sum_b sum_c KL(softmax_P guide || softmax_P plain)
    REF: the comments of the released code describe the label's map only (labels given), but the code sums
    over all classes (labels=None).
    Args:    plain, guide (B, P, C) raw cosines;  labels (B,) or None
    Returns: () nats, mean over images.   Cost: no matrix products; autograd keeps 16 B P C bytes, or 16 B P
    """
    if labels is not None:
        own = labels[:, None, None].expand(-1, plain.shape[1], 1)  # (B, P, 1)
        plain, guide = plain.gather(2, own), guide.gather(2, own)  # (B, P, 1)
    log_plain = at_least_fp32(plain).log_softmax(1)  # (B, P, C)
    log_guide = at_least_fp32(guide).log_softmax(1)  # (B, P, C)
    return F.kl_div(log_plain, log_guide, reduction="batchmean", log_target=True)


if __name__ == "__main__":  # two losses whose values are known exactly
    same, zero = torch.full((8, 8), 3.0), torch.full((8, 8), -10.0)
    print(f"info_nce, equal logits   {info_nce(same):.4f}  = ln 8")  # 2.0794
    print(f"siglip, cosine 0, b=-10  {siglip(zero):.4f}")  # softplus(10) + 7 softplus(-10) = 10.0004
