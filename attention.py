"""Attention as CLIP uses it, and the structures that CLIP Surgery and AlignCLIP put in its place.

One set of projection weights serves them all; which structure mixes the tokens is an argument of the
call, so that "the D-V branch shares every weight with the Q-K-V branch" is one word in one line:

    kind    token mixing                        where it comes from
    qkv     softmax(Q K^T / sqrt(K)) V          Vaswani et al. 2017 (arXiv:1706.03762), eq. 1
    vvv     softmax(V V^T / sqrt(K)) V          CLIP Surgery, Li et al. 2023 (arXiv:2304.05653)
    qqv     softmax(Q Q^T / sqrt(K)) V          AlignCLIP, Fig. 8; ClearCLIP
    kkv     softmax(K K^T / sqrt(K)) V          AlignCLIP, Fig. 8
    dv      D V with D diagonal, D = I: y = V   AlignCLIP, Han et al. 2025 (doi 10.1007/s10994-025-06742-z)

Letters used for dimensions in the whole project:
    B pairs in this process   G pairs over all processes   L tokens in a sequence   P image patches
    D residual width   H heads   K width per head   E joint embedding   M mixture tokens (Llip)
    C classes   R rank's row offset
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("qkv", "vvv", "qqv", "kkv", "dv")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str = "qkv",
    mask: Tensor | str | None = None,
    need_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mixes the tokens of v by one of the five structures.

    Vaswani et al. 2017, eq. 1, with the pair (Q, K) replaced as the table above says.
    Args:    q, k, v (B, H, L, K); those that the kind does not use may be None
             mask (L, L), added to the scores (0 or -inf), or boolean, True where attending is allowed,
             or "causal": no looking ahead
    Returns: y (B, H, L, K), and the weights (B, H, L, L) if need_weights.
    Raises:  ValueError for an unknown kind or mask.
    Cost:    4 L^2 K FLOPs per head, 0 for dv; without weights no (L, L) array is kept.
    """
    if kind not in KINDS:
        raise ValueError(f"attention kind {kind!r}: expected one of {', '.join(KINDS)}")
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"mask {mask!r}: expected a tensor or causal")
    if kind == "dv":  # a mask changes nothing: the diagonal is always allowed
        eye = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device)
        return (v, eye.expand(*v.shape[:-1], -1)) if need_weights else v
    a, b = {"qkv": (q, k), "vvv": (v, v), "qqv": (q, q), "kkv": (k, k)}[kind]
    causal = isinstance(mask, str)
    if not need_weights:
        # SPEED: told that it is causal, the kernel skips what is ahead; flash attention takes no other mask
        given = None if causal else mask
        return F.scaled_dot_product_attention(a, b, v, attn_mask=given, is_causal=causal)
    if causal:
        mask = torch.ones(a.shape[-2], b.shape[-2], dtype=torch.bool, device=a.device).tril()
    scores = a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5  # (B, H, L, L)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask
    attn = scores.softmax(-1)
    return attn @ v, attn


def flops(kind: str, tokens: int, width: int, heads: int, projections: bool = True) -> int:
    """Counts the floating-point operations of one attention layer for one image.

    Two per multiply-add; biases, LayerNorm and softmax are not counted, as in torch's FlopCounterMode.
    Each projection costs 2 L D^2, each of the two token mixings 2 L^2 D, whatever the number of heads.
    PAPER: the AlignCLIP rebuttal's 0.46478 against 0.0003 GFLOPs compares the projections of V-V-V with
    the mixing of D-V. With projections on both sides it is 0.584003 against 0.464781 (ViT-B/16).
    Args: tokens L, width D, heads H;  projections: count the input and output projections too.
    """
    inputs = {"qkv": 3, "vvv": 1, "qqv": 2, "kkv": 2, "dv": 1}[kind]
    mixing = 0 if kind == "dv" else 2 * 2 * tokens**2 * (width // heads) * heads
    return mixing + (inputs + 1) * 2 * tokens * width**2 * projections


class MultiheadAttention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention (and of CLIP's files).

    Vaswani et al. 2017, section 3.2.2. Written out, so that the structure can be chosen at the call and
    seen: in_proj_weight (3D, D) stacks the query, key and value projections in this order.
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
        """PyTorch's own start for attention: Xavier-uniform inputs, nn.Linear's output, zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor, which: str) -> list[Tensor | None]:
        """The queries, keys and values of x (B, L, D) named in which, each (B, H, L, K); others None."""
        B, L, D = x.shape
        first, last = "qkv".index(which[0]), "qkv".index(which[-1]) + 1  # one slice of in_proj
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if last - first < 3:  # SPEED: a slice's gradient is a copy into zeros, so none of the whole
            weight, bias = weight[first * D : last * D], bias[first * D : last * D]
        y = F.linear(x, weight, bias)  # (B, L, n D)
        y = y.view(B, L, last - first, self.heads, D // self.heads)  # (B, L, n, H, K)
        found = dict(zip("qkv"[first:last], y.permute(2, 0, 3, 1, 4)))  # (n, B, H, L, K)
        return [found.get(name) for name in "qkv"]

    def merge(self, y: Tensor) -> Tensor:
        """Heads back to the residual width, and the output projection: (B, H, L, K) -> (B, L, D)."""
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, L, D)

    def forward(
        self, x: Tensor, kind: str = "qkv", mask: Tensor | str | None = None, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Self-attention over x (B, L, D): returns (B, L, D), and weights (B, H, L, L) if asked for.

        Only the projections that the kind needs are computed: one for vvv and dv, two for kkv.
        """
        # qqv needs q and v, the two outer thirds of in_proj: two products instead of one wasted third
        if kind == "qqv":
            q, k, v = self.project(x, "q")[0], None, self.project(x, "v")[2]
        else:
            q, k, v = self.project(x, {"qkv": "qkv", "kkv": "kv"}.get(kind, "v"))
        y = attend(q, k, v, kind, mask, need_weights)
        if need_weights:
            return self.merge(y[0]), y[1]
        return self.merge(y)


if __name__ == "__main__":  # one ViT-B/16 layer, 197 tokens: what each structure costs
    print("kind   GFLOPs   without projections")
    for name in KINDS:
        whole, mix = flops(name, 197, 768, 12), flops(name, 197, 768, 12, projections=False)
        print(f"{name:4} {whole / 1e9:9.6f} {mix / 1e9:12.6f}")
    # qkv   1.048784     0.119221
    # vvv   0.584003     0.119221
    # qqv   0.816393     0.119221
    # kkv   0.816393     0.119221
    # dv    0.464781     0.000000
