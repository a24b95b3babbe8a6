"""The tiled form of Llip: the cosines of all pairs without the image features z of any pair.

The plain form (llip.Llip.pair_logits) mixes, projects by W_O, normalises and takes an inner product. A pair
takes E stored numbers and E^2 multiply-adds, and W_O is 80 to 92 % of the cost. Here u_j = W_O t_j is
computed once per caption, with t_j unit, and A = W_O W_O^T once per batch. The same cosine is then a ratio of
two forms in one vector x of the pair:

    cos(z_ij, t_j) = <x, l> / sqrt(x^T S x)

    tile form  x                            l                         S                        for
    "value"    y_ij = sum_k Phi_k V_k (E)   u_j                       A             (E, E)     many tokens
    "gram"     Phi_ij              (H M)    <V_ik^m, u_j^m>  (H M)    G_i = V A V^T (HM, HM)   few tokens

z is never formed. A pair costs 4 M E + 2 E^2 FLOPs in the first form and 4 M E + 2 (H M)^2 in the second. The
second form also costs 2 M E^2 + 2 H M^2 E per image for G_i (V is block-diagonal over heads). A training step
takes three times the first term and twice the others. The second form is cheaper where H M < E and enough
captions share G_i: tile_form decides.

Pairs are computed in tiles of some images and some captions that fit a cache, and are then dropped:
    cosines     any loss on top; the backward pass computes every tile again
    tiled_loss  a loss that is a sum over pairs (losses.siglip_sum). The gradient of a tile is taken at once:
                nothing is computed twice, and not even all logits are stored
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
    """The form that takes fewer multiply-adds for these pairs in a training step."""
    wide = heads * tokens
    setup = tokens * width**2 + heads * tokens**2 * width  # G_i, shared by an image's captions
    return "gram" if wide**2 + 1.5 * setup / max(1, texts) < width**2 else "value"


def flops(images: int, texts: int, tokens: int, heads: int, width: int, train: bool, which: str = "") -> int:
    """FLOPs of cosines (or with train of tiled_loss, both passes), two per multiply-add.

    Only matrix products count, as in torch's FlopCounterMode.
    Args: which: a tile form; empty: the one that tile_form chooses
    """
    which = which or tile_form(texts, tokens, heads, width)
    wide = heads * tokens if which == "gram" else width
    linear = 2 * 2 * tokens * width  # scores and, over values, either mixture or <V, u>
    setup = 2 * images * (tokens * width**2 + heads * tokens**2 * width) * (which == "gram")
    once = 2 * texts * width**2 + 2 * width**3  # u, A
    passes = 3 if train else 1
    pairs = images * texts * (passes * linear + (2 if train else 1) * 2 * wide**2)
    return pairs + passes * (setup + once)


def tile_shape(keys: Tensor, texts: int) -> tuple[int, int]:
    """Images and captions of a tile; keys (B, H, M, K)."""
    B, H, M, K = keys.shape
    columns = max(1, min(texts, TILE_TEXTS * (16 if keys.is_cuda else 1)))
    floats = 4 * H * M + 4 * max(H * M, H * K)  # scores, Phi, x, l, S x and their gradients
    budget = TILE_BYTES * (GPU_TILES if keys.is_cuda else 1)
    rows = budget // (4 * floats * columns)
    if not rows:
        columns = max(1, budget // (4 * floats))
    return max(1, min(B, rows)), columns


class Cosine(torch.autograd.Function):
    """<x, l> / sqrt(x^T S x) for every column: x (I, F, J), l (I or 1, F, J), S (I or 1, F, F) -> (I, J).

    SPEED: the gradient is written by hand because the product S x of the forward pass serves the backward
    pass. Autograd would multiply by S again: 3 F^2 multiply-adds a pair in both passes instead of 2.
    S must be symmetric.
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
    """Calls visit(cosines (I, J), first row, first column) for every tile.

    Args:    inputs: keys, values (B, H, M, K), queries (N, H, K), text (N, E), W_O (E, E)
             train: visit must call backward on the cosines
    Returns: the gradients of the inputs if train, else None.
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
        captions = [
            (leaf(some.permute(1, 2, 0).contiguous()), leaf(their_u.t().contiguous()))
            for some, their_u in zip(q.split(columns), u.split(columns))
        ]  # (H, K, J), (E, J)
        for row in range(0, len(keys), rows):
            k, v = (leaf(x[row : row + rows]) for x in (keys, values))  # (I, H, M, K)
            G = gram(v, A) if by_gram else A.unsqueeze(0)  # (I or 1, F, F)
            S = leaf(G) if by_gram else G
            for n, caption in enumerate(captions):
                visit(tile_cosines(k, v, *caption, S, by_gram), row, n * columns)
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


class _Cosines(torch.autograd.Function):
    @staticmethod
    def forward(ctx, temperature: float, *inputs: Tensor) -> Tensor:
        ctx.temperature = temperature
        ctx.save_for_backward(*inputs)
        found = inputs[0].new_empty(len(inputs[0]), len(inputs[2]))  # (B, N)

        def visit(cos: Tensor, row: int, column: int) -> None:
            found[row : row + cos.shape[0], column : column + cos.shape[1]] = cos

        sweep(inputs, temperature, visit)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        def visit(cos: Tensor, row: int, column: int) -> None:
            cos.backward(grad[row : row + cos.shape[0], column : column + cos.shape[1]])

        return None, *sweep(ctx.saved_tensors, ctx.temperature, visit, train=True)


def cosines(
    keys: Tensor, values: Tensor, queries: Tensor, text: Tensor, weight: Tensor, temperature: float
) -> Tensor:
    """cos(z_ij, t_j) of every pair; the plain form is llip.Llip.pair_logits.

    Args:    keys, values (B, H, M, K), queries (N, H, K), text (N, E), weight W_O (E, E), of one dtype
    Returns: (B, N). Needs the memory of one tile more. The backward pass computes every tile again.
    """
    return _Cosines.apply(temperature, keys, values, queries, text, weight)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Callable, temperature: float, others: int, *inputs: Tensor) -> Tensor:
        sides, parameters = inputs[: len(inputs) - others], inputs[len(inputs) - others :]
        total, sums = sides[0].new_zeros(()), [torch.zeros_like(p) for p in parameters]

        def visit(cos: Tensor, row: int, column: int) -> None:
            c = cos.detach().requires_grad_()
            part = loss(c, row, column)
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
        return None, None, None, *(g.mul_(grad) for g in grads)


def tiled_loss(inputs: tuple, temperature: float, loss: Callable, parameters: list) -> Tensor:
    """Sum over tiles of loss(cosines (I, J), first row, first column), its gradient taken tile by tile.

    Args:    inputs as in cosines;  parameters: others that the loss uses, all of which need a gradient
    Returns: () with a graph of one node: the forward pass has already computed the gradient.
    """
    if torch.is_grad_enabled():
        return _TiledLoss.apply(loss, temperature, len(parameters), *inputs, *parameters)
    parts = []
    sweep(inputs, temperature, lambda *tile: parts.append(loss(*tile)))
    return sum(parts)


class TiledLlip(Llip):
    """Llip whose pairs are computed tile by tile. It adds no state, so a Llip can change its class."""

    def inputs(self, image_side: tuple, text_side: tuple) -> tuple:
        """What the cosines of pairs depend on, of one dtype and never in half precision."""
        return tuple(at_least_fp32(x) for x in (*image_side, *text_side, self.pred.out_proj))

    def pair_logits(self, image_side: tuple, text_side: tuple) -> Tensor:
        """As Llip.pair_logits: (B_img, B_txt)."""
        return self.scale_logits(cosines(*self.inputs(image_side, text_side), self.temperature))

    def pair_loss(self, image_side: tuple, text_side: tuple, loss: Callable) -> Tensor:
        """A loss that is a sum over pairs, its gradient taken tile by tile: ().

        Args: loss(logits (I, J), first row, first column) -> () for a tile.
        """
        scaling = [p for p in (self.logit_scale, self.logit_bias) if p is not None]
        return tiled_loss(
            self.inputs(image_side, text_side),
            self.temperature,
            lambda cosines, row, column: loss(self.scale_logits(cosines), row, column),
            [p for p in scaling if p.requires_grad],
        )


def select(model: nn.Module, pairs: str, rows: int, columns: int) -> nn.Module:
    """Gives a Llip the plain or the tiled form of its pairs; any other model is returned as it is.

    Args:   pairs: "plain", "tiled", or "auto": tiled where the plain form would hold more than PLAIN_BYTES
            rows, columns: local images, texts of all ranks
    Raises: ValueError for another value of pairs.
    """
    if pairs not in ("auto", "plain", "tiled"):
        raise ValueError(f"--pairs {pairs}: expected auto, plain or tiled")
    if type(model) in (Llip, TiledLlip):
        large = plain_bytes(model, rows, columns) > PLAIN_BYTES
        model.__class__ = TiledLlip if pairs == "tiled" or (pairs == "auto" and large) else Llip
    return model
