"""Llip's cosines of all pairs without the features of any pair: SPEED's side of llip.py.

The plain form (llip.Llip.pair_cosines) mixes, projects by W_O, normalises and takes an inner product: E
numbers and E^2 multiply-adds for every pair, 80 to 92 % of its cost in W_O. Here, with u_j = W_O t_j once
per caption, t_j unit, and A = W_O W_O^T once per batch, the same number is a ratio of two forms in one
vector x of the pair:

    cos(z_ij, t_j) = <x, l> / sqrt(x^T S x)

    form     x                            l                         S                        for
    "value"  y_ij = sum_k Phi_k V_k (E)   u_j                       A             (E, E)     many tokens
    "gram"   Phi_ij              (H M)    <V_ik^m, u_j^m>  (H M)    G_i = V A V^T (HM, HM)   few tokens

So z is never formed. A pair costs 4 M E + 2 E^2 FLOPs in the first form and 4 M E + 2 (H M)^2 in the second,
which pays an image 2 M E^2 + 2 H M^2 E besides for G_i (V block-diagonal over heads); a training step takes
three times the first term and twice the others. The second wins where H M < E, tokens < head width, if there
are captions enough to share G_i: `form` decides, `python bench.py llip` measures the break-even.

Pairs are taken in tiles of some images and some captions, small enough for a cache, and forgotten:
    cosines     any loss on top; the backward pass computes every tile again
    tiled_loss  a loss that is a sum over pairs (losses.siglip_sum): the gradient of a tile is known as
                soon as the tile is: nothing is computed again, and not even all logits are held
Precision: fp32 (or fp64), never autocast. x^T S x rounds by eps (sum of |terms| / |z|^2), the plain form by
its root; for random features the two differ in the sixth digit. |z| is clamped at 1e-12 as F.normalize does.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = 16 << 20  # what the pairs of a tile may take: half of a CPU's last cache
GPU_TILES = 64  # times as much on a GPU, which wants few and large kernels
TILE_TEXTS = 256  # captions in a tile, at most; times 16 on a GPU


def form(texts: int, tokens: int, heads: int, width: int) -> str:
    """Which of the two forms takes fewer multiply-adds for these pairs, as a training step counts them."""
    wide = heads * tokens
    setup = tokens * width**2 + heads * tokens**2 * width  # G_i, shared by an image's captions
    return "gram" if wide**2 + 1.5 * setup / max(1, texts) < width**2 else "value"


def flops(images: int, texts: int, tokens: int, heads: int, width: int, train: bool, which: str = "") -> int:
    """FLOPs of cosines (or with train of tiled_loss, both passes), two per multiply-add.

    As torch's FlopCounterMode counts them: matrix products only.  which: a form, else the one taken
    """
    which = which or form(texts, tokens, heads, width)
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

    SPEED: by hand for S x alone: the forward pass's product serves the backward pass, where autograd would
    multiply by S again: 2 F^2 multiply-adds a pair for both passes and not 3. S must be symmetric.
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

    Args:    inputs keys, values (B, H, M, K), queries (N, H, K), text (N, E), W_O (E, E)
             train: visit must call backward on the cosines it is given
    Returns: the gradients of the inputs if train.
    """

    def leaf(x: Tensor) -> Tensor:  # a graph for each tile, and .grad where tiles meet
        return x.detach().requires_grad_(train)

    keys, values, queries, text, weight = inputs
    _, H, M, _ = keys.shape
    rows, columns = tile_shape(keys, len(queries))
    by_gram = form(len(queries), M, H, len(weight)) == "gram"
    grads = [torch.empty_like(x) for x in (keys, values)] if train else None
    device = "cuda" if keys.is_cuda else "cpu"  # TRAP: autocast knows no meta device
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
    """cos(z_ij, t_j) of every pair; the plain twin is llip.Llip.pair_cosines.

    Args:    keys, values (B, H, M, K), queries (N, H, K), text (N, E), weight W_O (E, E), of one dtype
    Returns: (B, N). Memory beside it: one tile. The backward pass computes every tile once more.
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
            raise RuntimeError("the gradient of a tiled loss can be taken once: it is given away")
        grads, ctx.grads = ctx.grads, None
        # SPEED: in place, or the largest tensors of a step, keys' and values' gradients, were there twice
        return None, None, None, *(g.mul_(grad) for g in grads)


def tiled_loss(inputs: tuple, temperature: float, loss: Callable, parameters: list) -> Tensor:
    """Sum over tiles of loss(cosines (I, J), first row, first column), its gradient taken tile by tile.

    Args:    inputs as cosines';  parameters: what loss uses besides, all of them needing a gradient
    Returns: () with a graph of one node: the forward pass has done the work of both.
    """
    if torch.is_grad_enabled():
        return _TiledLoss.apply(loss, temperature, len(parameters), *inputs, *parameters)
    parts = []
    sweep(inputs, temperature, lambda *tile: parts.append(loss(*tile)))
    return sum(parts)
