"""The tiled form of Llip: the cosines of all pairs without the image features z of any pair.

The plain form (llip.Llip.pair_logits) stores E numbers for a pair, and W_O is 80 to 92 % of its cost. Here
u_j = W_O t_j is computed once per caption, with t_j unit, and A = W_O W_O^T once per batch. The same cosine
is then a ratio of two forms in one vector x of the pair:

    cos(z_ij, t_j) = <x, l> / sqrt(x^T S x)

    tile form  x                            l                         S                        for
    "value"    y_ij = sum_k Phi_k V_k (E)   u_j                       A             (E, E)     many tokens
    "gram"     Phi_ij              (H M)    <V_ik^m, u_j^m>  (H M)    G_i = V A V^T (HM, HM)   few tokens

A pair costs 4 M E + 2 E^2 FLOPs in the first form and 4 M E + 2 (H M)^2 in the second. The
second form also costs 2 M E^2 + 2 H M^2 E per image for G_i (V is block-diagonal over heads). A training step
takes three times the first term and twice the others. tile_form chooses the cheaper form.

Pairs are computed in tiles of some images and some captions that fit a cache.
Precision: fp32 or fp64, never autocast. x^T S x rounds by eps (sum of |terms| / |z|^2), the plain form by its
root; for random features the two differ in the sixth digit. |z| is clamped at 1e-12 as in F.normalize.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llip import PLAIN_BYTES, Llip, plain_bytes
from losses import at_least_fp32

TILE_BYTES = 16 << 20  # memory of a tile: half of the last cache of a CPU
GPU_TILES = 64  # times as much on a GPU, where few large kernels are faster
TILE_TEXTS = 256  # most captions in a tile; times 16 on a GPU


def tile_form(texts: int, tokens: int, heads: int, width: int) -> str:
    """The form that takes fewer FLOPs for these pairs in a training step."""
    return min("value", "gram", key=lambda form: flops(1, max(1, texts), tokens, heads, width, True, form))


def flops(images: int, texts: int, tokens: int, heads: int, width: int, train: bool, which: str = "") -> int:
    """FLOPs of AllCosines, or with train of TiledLoss, as torch's FlopCounterMode counts them."""
    which = which or tile_form(texts, tokens, heads, width)
    wide = heads * tokens if which == "gram" else width
    linear = 2 * 2 * tokens * width  # scores and, over values, either mixture or <V, u>
    # G_i, shared by an image's captions
    setup = 2 * images * (tokens * width**2 + heads * tokens**2 * width) * (which == "gram")
    once = 2 * texts * width**2 + 2 * width**3  # u, A
    passes = 3 if train else 1
    pairs = images * texts * (passes * linear + (2 if train else 1) * 2 * wide**2)
    return pairs + passes * (setup + once)


def tile_shape(keys: Tensor, texts: int) -> tuple[int, int]:
    """Images and captions of a tile; keys (B, H, M, K)."""
    B, H, M, K = keys.shape
    floats = 4 * H * M + 4 * max(H * M, H * K)  # scores, Phi, x, l, S x and their gradients
    pairs = TILE_BYTES * (GPU_TILES if keys.is_cuda else 1) // (4 * floats)
    columns = max(1, min(texts, TILE_TEXTS * (16 if keys.is_cuda else 1), pairs))
    return max(1, min(B, pairs // columns)), columns


class Cosine(torch.autograd.Function):
    """<x, l> / sqrt(x^T S x) for every column: x (I, F, J), l (I or 1, F, J), S (I or 1, F, F) -> (I, J).

    SPEED: in this gradient the product S x of the forward pass serves the backward pass. Autograd would
    multiply by S again: 3 F^2 multiply-adds a pair in both passes instead of 2. S must be symmetric.
        d x = g / |z| (l - cos / |z| S x)      d S = -1/2 sum_j g cos / |z|^2 x_j x_j^T
    """

    @staticmethod
    def forward(ctx, x: Tensor, l: Tensor, S: Tensor) -> Tensor:
        Sx = S @ x  # (I, F, J)
        square = (x * Sx).sum(1)  # (I, J)
        inverse = square.clamp_min(1e-24).rsqrt()  # TRAP: rounding can leave a square below 0
        cos = (x * l).sum(1) * inverse  # (I, J)
        ctx.save_for_backward(x, l, Sx, inverse, cos, square > 1e-24)
        ctx.shared = len(S) == 1
        return cos

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, l, Sx, inverse, cos, free = ctx.saved_tensors
        up = (grad * inverse).unsqueeze(1)  # (I, 1, J)
        # 0 where |z| is clamped
        down = (grad * cos * inverse.square() * free).unsqueeze(1)  # (I, 1, J)
        dx = torch.addcmul(up * l, Sx, down, value=-1)  # (I, F, J)
        weighted = x * (-0.5 * down)  # (I, F, J)
        if ctx.shared:
            dS = torch.einsum("ifj,igj->fg", weighted, x).unsqueeze(0)  # (1, F, F)
        else:
            dS = weighted @ x.transpose(1, 2)  # (I, F, F)
        return dx, (up * x).sum_to_size(l.shape), dS


def gram(values: Tensor, A: Tensor) -> Tensor:
    """G_i = V_i A V_i^T, V_i (H M, E) block-diagonal: (I, H, M, K), (E, E) -> (I, H M, H M)."""
    _, H, M, K = values.shape
    half = torch.einsum("ihmk,hke->ihme", values, A.unflatten(0, (H, K)))  # (I, H, M, E)
    whole = torch.einsum("ihmgk,ignk->ihmgn", half.unflatten(-1, (H, K)), values)
    return whole.reshape(-1, H * M, H * M)  # (I, H M, H M)


def tile_cosines(keys, values, queries, u, S, by_gram: bool) -> Tensor:
    """One tile: keys, values (I, H, M, K), queries / tau (H, K, J), u (E, J), S (I or 1, F, F) -> (I, J)."""
    phi = torch.einsum("ihmk,hkj->ihmj", keys, queries).softmax(2)  # (I, H, M, J)
    if by_gram:
        l = torch.einsum("ihmk,hkj->ihmj", values, u.unflatten(0, (len(queries), -1)))
        return Cosine.apply(phi.flatten(1, 2), l.flatten(1, 2), S)
    y = torch.einsum("ihmk,ihmj->ihkj", values, phi)  # (I, H, K, J)
    return Cosine.apply(y.flatten(1, 2), u.unsqueeze(0), S)


def sweep(inputs: tuple, temperature: float, visit: Callable, train: bool = False) -> tuple | None:
    """Calls visit(cosines (I, J), rows, columns) for every tile, with the slices that the tile covers.

    With train, visit must call backward on the cosines, and the gradients of the inputs are returned.
    """

    def leaf(x: Tensor) -> Tensor:
        # every tile has its own graph; .grad collects the sum over tiles
        return x.detach().requires_grad_(train)

    keys, values, queries, text, weight = inputs
    _, H, M, _ = keys.shape
    rows, columns = tile_shape(keys, len(queries))
    by_gram = tile_form(len(queries), M, H, len(weight)) == "gram"
    grads = [torch.empty_like(x) for x in (keys, values)] if train else None
    # TRAP: autocast fails on the meta device
    device = "cuda" if keys.is_cuda else "cpu"
    with torch.set_grad_enabled(train), torch.autocast(device, enabled=False):
        text, weight = leaf(text), leaf(weight)
        u = F.normalize(text, dim=-1) @ weight.t()  # (N, E)
        product = weight @ weight.t()  # (E, E)
        A, q = leaf(product), queries.detach() / temperature
        q = [leaf(x.permute(1, 2, 0).contiguous()) for x in q.split(columns)]  # (H, K, J) each
        captions = list(zip(q, [leaf(x.t().contiguous()) for x in u.split(columns)]))  # and (E, J)
        for row in range(0, len(keys), rows):
            k, v = (leaf(x[row : row + rows]) for x in (keys, values))  # (I, H, M, K)
            G = gram(v, A) if by_gram else A.unsqueeze(0)  # (I or 1, F, F)
            S = leaf(G) if by_gram else G
            for n, caption in enumerate(captions):
                tile = slice(row, row + rows), slice(n * columns, (n + 1) * columns)
                visit(tile_cosines(k, v, *caption, S, by_gram), *tile)
            if train:
                if by_gram:
                    G.backward(S.grad)
                for whole, part in zip(grads, (k, v)):
                    whole[row : row + rows] = part.grad
        if not train:
            return None
        du = torch.cat([x.grad.t() for _, x in captions])  # (N, E)
        torch.autograd.backward([product, u], [A.grad, du])
        dq = torch.cat([x.grad.permute(2, 0, 1) for x, _ in captions]) / temperature  # (N, H, K)
    return *grads, dq, text.grad, weight.grad


class AllCosines(torch.autograd.Function):
    """cos(z_ij, t_j) of every pair; the plain form is llip.Llip.pair_logits.

    Args:    temperature, keys, values (B, H, M, K), queries (N, H, K), text (N, E), weight W_O (E, E)
    Returns: (B, N). Needs the memory of one tile more. The backward pass computes every tile again.
    """

    @staticmethod
    def forward(ctx, temperature: float, *inputs: Tensor) -> Tensor:
        ctx.temperature = temperature
        ctx.save_for_backward(*inputs)
        found = inputs[0].new_empty(len(inputs[0]), len(inputs[2]))  # (B, N)
        sweep(inputs, temperature, lambda cos, *tile: found[tile].copy_(cos))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        inputs, tau = ctx.saved_tensors, ctx.temperature
        return None, *sweep(inputs, tau, lambda cos, *tile: cos.backward(grad[tile]), train=True)


class TiledLoss(torch.autograd.Function):
    """Sum over tiles of loss(cosines (I, J), first row, first column), its gradient taken tile by tile.

    Args: loss, temperature, the five inputs of AllCosines, and parameters of the loss, which need a gradient.
    The forward pass has already computed the gradient, so that the graph has one node.
    """

    @staticmethod
    def forward(ctx, loss: Callable, temperature: float, *inputs: Tensor) -> Tensor:
        sides, parameters = inputs[:5], inputs[5:]
        total, sums = sides[0].new_zeros(()), [torch.zeros_like(p) for p in parameters]

        def visit(cos: Tensor, rows: slice, columns: slice) -> None:
            c = cos.detach().requires_grad_()
            part = loss(c, rows.start, columns.start)
            gradient, *found = torch.autograd.grad(part, (c, *parameters))
            total.add_(part.detach())
            for x, g in zip(sums, found):
                x.add_(g)
            cos.backward(gradient)

        ctx.grads = [*sweep(sides, temperature, visit, train=True), *sums]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        if ctx.grads is None:
            raise RuntimeError("the gradient of a tiled loss can be taken only once")
        grads, ctx.grads = ctx.grads, None
        # SPEED: in place, or the gradients of keys and values, the largest tensors of a step, exist twice
        return None, None, *(g.mul_(grad) for g in grads)


class TiledLlip(Llip):
    """Llip whose pairs are computed tile by tile. It adds no state, so a Llip can change its class."""

    def inputs(self, image_side: tuple, text_side: tuple) -> tuple:
        """Of AllCosines, never in half precision."""
        return tuple(at_least_fp32(x) for x in (*image_side, *text_side, self.pred.out_proj))

    def pair_logits(self, image_side: tuple, text_side: tuple) -> Tensor:
        """As Llip.pair_logits: (B_img, B_txt)."""
        return self.scale_logits(AllCosines.apply(self.temperature, *self.inputs(image_side, text_side)))

    def pair_loss(self, image_side: tuple, text_side: tuple, loss: Callable) -> Tensor:
        """Sum over tiles of loss(logits (I, J), first row, first column), its gradient taken tile by tile."""
        scaling = [p for p in (self.logit_scale, self.logit_bias) if p is not None and p.requires_grad]
        inputs = (self.temperature, *self.inputs(image_side, text_side), *scaling)
        return TiledLoss.apply(lambda cos, *tile: loss(self.scale_logits(cos), *tile), *inputs)


def select(model: nn.Module, pairs: str, rows: int, columns: int) -> nn.Module:
    """Gives a Llip the plain or the tiled form of its pairs; any other model is returned as it is.

    pairs: "plain", "tiled", or "auto": tiled if the plain form would hold more than PLAIN_BYTES for so many
    local images and texts of all ranks.   Raises: ValueError.
    """
    if pairs not in ("auto", "plain", "tiled"):
        raise ValueError(f"--pairs {pairs}: expected auto, plain or tiled")
    if type(model) in (Llip, TiledLlip):
        large = plain_bytes(model, rows, columns) > PLAIN_BYTES
        model.__class__ = TiledLlip if pairs == "tiled" or (pairs == "auto" and large) else Llip
    return model
