"""Attention as in CLIP, and the attention structures of CLIP Surgery and AlignCLIP.

All structures use the same projection weights. The argument `kind` of the call selects the structure, so the
D-V branch of AlignCLIP shares every weight with the Q-K-V branch:

    kind    token mixing                        source
    qkv     softmax(Q K^T / sqrt(K)) V          Vaswani et al. 2017 (arXiv:1706.03762), eq. 1
    vvv     softmax(V V^T / sqrt(K)) V          CLIP Surgery, Li et al. 2023 (arXiv:2304.05653)
    qqv     softmax(Q Q^T / sqrt(K)) V          AlignCLIP, Fig. 8; ClearCLIP
    kkv     softmax(K K^T / sqrt(K)) V          AlignCLIP, Fig. 8
    dv      D V with D diagonal, D = I: y = V   AlignCLIP, Han et al. 2025 (doi 10.1007/s10994-025-06742-z)

Letters for dimensions, in the whole project:
    B pairs in this process   G pairs over all processes   L tokens in a sequence   P image patches
    D residual width   H heads   K width per head   E joint embedding   M mixture tokens (Llip)   C classes
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("qkv", "vvv", "qqv", "kkv", "dv")
Mask = Tensor | str | None  # as described in attend


def attend(
    q: Tensor, k: Tensor, v: Tensor, kind: str = "qkv", mask: Mask = None, need_weights: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixes the tokens of v with one of the five attention structures.

    Vaswani et al. 2017, eq. 1; the table above gives the two matrices that replace Q and K.
    Args:    q, k, v (B, H, L, K); a tensor that the kind does not use may be None
             mask: (L, L) float, added to the scores; or (L, L) bool, True where attention is allowed; or
             "causal", where a token attends to itself and to earlier tokens only
    Returns: y (B, H, L, K); with need_weights also the attention weights (B, H, L, L)
    Raises:  ValueError for an unknown kind or mask
    Cost:    4 L^2 K FLOPs per head, 0 for dv. Without need_weights no (L, L) array is stored.
    """
    if kind not in KINDS:
        raise ValueError(f"attention kind {kind!r}: expected one of {', '.join(KINDS)}")
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"mask {mask!r}: expected a tensor or causal")
    # a mask never forbids the diagonal, so it does not change dv
    if kind == "dv":
        eye = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device)
        return (v, eye.expand(*v.shape[:-1], -1)) if need_weights else v
    a, b = {"qkv": (q, k), "vvv": (v, v), "qqv": (q, q), "kkv": (k, k)}[kind]
    causal = isinstance(mask, str)
    if not need_weights:
        # SPEED: with is_causal the kernel skips later tokens; flash attention supports no other mask
        return F.scaled_dot_product_attention(a, b, v, attn_mask=None if causal else mask, is_causal=causal)
    if causal:
        mask = torch.ones(a.shape[-2], b.shape[-2], dtype=torch.bool, device=a.device).tril()
    scores = a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5  # (B, H, L, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    attn = scores.softmax(-1)
    return attn @ v, attn


def flops(kind: str, tokens: int, width: int, heads: int, projections: bool = True) -> int:
    """Counts the floating-point operations (FLOPs) of one attention layer for one image.

    A multiply-add counts as two. Biases, LayerNorm and softmax count as zero, as in torch's FlopCounterMode.
    A projection costs 2 L D^2. Each of the two products with an (L, L) matrix costs 2 L^2 D.
    PAPER: the AlignCLIP rebuttal compares 0.46478 with 0.0003 GFLOPs: the projections of V-V-V with the
    token mixing of D-V. With the projections of both it is 0.584003 and 0.464781 (ViT-B/16).
    Args:    tokens L, width D, heads H;  projections: whether to count the input and output projections
    Returns: FLOPs of one forward pass
    """
    inputs = {"qkv": 3, "vvv": 1, "qqv": 2, "kkv": 2, "dv": 1}[kind]
    mixing = 0 if kind == "dv" else 2 * 2 * tokens**2 * (width // heads) * heads
    return mixing + (inputs + 1) * 2 * tokens * width**2 * projections


class MultiheadAttention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention and of CLIP's checkpoints.

    Vaswani et al. 2017, section 3.2.2. in_proj_weight (3D, D) stacks the query, key and value projections in
    this order; head h has the channels h K to (h + 1) K - 1.   Raises: ValueError if H does not divide D.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self):
        """Initializes as nn.MultiheadAttention: Xavier-uniform in_proj, nn.Linear's out_proj, zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor, which: str) -> list[Tensor | None]:
        """Projects x (B, L, D) to [q, k, v], each (B, H, L, K), or None if `which` does not name it."""
        B, L, D = x.shape
        first, last = "qkv".index(which[0]), "qkv".index(which[-1]) + 1
        weight, bias = self.in_proj_weight, self.in_proj_bias
        # SPEED: the gradient of a slice is copied into zeros, so the whole weight is not sliced
        if last - first < 3:
            weight, bias = weight[first * D : last * D], bias[first * D : last * D]
        y = F.linear(x, weight, bias)  # (B, L, n D)
        y = y.view(B, L, last - first, self.heads, D // self.heads)  # (B, L, n, H, K)
        by_name = dict(zip("qkv"[first:last], y.permute(2, 0, 3, 1, 4)))  # n times (B, H, L, K)
        return [by_name.get(name) for name in "qkv"]

    def merge(self, y: Tensor) -> Tensor:
        """Joins the heads and applies the output projection: (B, H, L, K) -> (B, L, D)."""
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, L, D)

    def forward(
        self, x: Tensor, kind: str = "qkv", mask: Mask = None, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Self-attention: x (B, L, D) -> (B, L, D), and weights (B, H, L, L) with need_weights.

        Computes only the projections that the kind uses: one for vvv and dv, two for qqv and kkv.
        """
        # q and v are the outer thirds of in_proj: two products avoid computing k
        if kind == "qqv":
            q, k, v = self.project(x, "q")[0], None, self.project(x, "v")[2]
        else:
            q, k, v = self.project(x, {"qkv": "qkv", "kkv": "kv"}.get(kind, "v"))
        y = attend(q, k, v, kind, mask, need_weights)
        if need_weights:
            return self.merge(y[0]), y[1]
        return self.merge(y)


if __name__ == "__main__":  # the cost of each structure: one layer of ViT-B/16, 197 tokens
    print("kind   GFLOPs   without projections")
    for name in KINDS:
        whole, mix = flops(name, 197, 768, 12), flops(name, 197, 768, 12, projections=False)
        print(f"{name:4} {whole / 1e9:9.6f} {mix / 1e9:12.6f}")
    # 1.048784, 0.584003, 0.816393, 0.816393, 0.464781; without projections 0.119221 each, dv 0
