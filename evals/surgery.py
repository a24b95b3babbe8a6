"""Where in the image is "a dog"? Dense features and heat maps of a trained CLIP, without training.

CLIP is trained on its class token alone, and its patch features point at the wrong places. Each method
here runs the same blocks with the same weights and changes how the last ones mix tokens:

    method      token mixing                          in which blocks       residual   MLP    CLS from
    surgery     softmax(V V^T / sqrt(K)) V            last six, two paths   kept       none   Q-K-V path
    alignclip   V                                     last six, two paths   kept       none   Q-K-V path
    gem         mean over S = V, K, Q of softmax      last six, two paths   kept       none   itself
                (t S' S'^T) V, S' = S made unit,
                clustered once, t from the tokens
    maskclip    V                                     last                  kept       kept   itself
    sclip       (softmax(QQ^T/sqrt(K))                last                  kept       kept   itself
                + softmax(KK^T/sqrt(K))) V
    clearclip   softmax(Q Q^T / sqrt(K)) V            last                  none       none   itself

surgery: CLIP Surgery, Li et al. 2023 (arXiv:2304.05653).  alignclip: the D-V branch of AlignCLIP, Han et
al. 2025 (doi 10.1007/s10994-025-06742-z).  gem: Bousselham et al. 2024 (arXiv:2312.00878).  maskclip: Zhou
et al. 2022 (arXiv:2112.01071).  sclip: Wang et al. 2024 (arXiv:2312.01597).  clearclip: Lan et al. 2024
(arXiv:2407.12442). Written from their formulas. Two paths: the Q-K-V path runs as ever, and a second
residual stream collects the other attention of the same blocks, read from the Q-K-V path:

    x <- x + Attn_qkv(LN1 x);  x <- x + MLP(LN2 x)          z <- z + Attn_other(LN1 x)

Llip has no patch features in the joint space; its maps are the attention of its mixture tokens.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from alignclip import default_blocks, two_paths
from attention import KINDS, attend
from model import DualEncoder, VisionTransformer
from util.files import write_image
from util.plots import INK, font, heat

TWO_PATHS = ("surgery", "alignclip", "gem")
METHODS = (*TWO_PATHS, "maskclip", "sclip", "clearclip")
TILE, MAX_TILES = 256, 400  # pixels of one picture's side; pictures on one sheet


def embed(visual: VisionTransformer, images: Tensor, method: str) -> Tensor:
    """Images to the first residual stream (B, 1 + P, D), positions interpolated as the method's code does.

    No equation. Only at another input size than the model's own do the methods differ: bilinear (surgery,
    alignclip), bicubic with antialias (gem), bicubic (maskclip), bicubic by a factor (sclip, clearclip).
    """
    side = math.isqrt(len(visual.positional_embedding) - 1)
    size = [pixels // visual.patch_size for pixels in images.shape[-2:]]  # rows, columns
    if method not in ("sclip", "clearclip") or size == [side, side]:
        bilinear = method in ("surgery", "alignclip")
        return visual.embed(images, "bilinear" if bilinear else "bicubic", method == "gem")
    # REF: a factor with 0.1 patches on top, against rounding down (as DINO has it). TRAP: size=(rows,
    # columns) gives other numbers, since the sampling points are spaced by the factor itself.
    positions = visual.positional_embedding[1:].t().view(1, -1, side, side)  # (1, D, side, side)
    factor = [(n + 0.1) / side for n in size]
    positions = F.interpolate(positions, scale_factor=factor, mode="bicubic")
    x = visual.conv1(images) + positions  # (B, D, rows, columns)
    cls = visual.class_embedding + visual.positional_embedding[0]  # (D,)
    x = torch.cat([cls.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)  # (B, 1 + P, D)
    return visual.ln_pre(x)


def gem_attention(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """GEM's self-self attention, averaged over queries, keys and values: (B, H, L, K).

    Bousselham et al. 2024, section 3;  softmax(t S S^T), S unit, t = |x| / sqrt(K) per image, with |x| the
    mean norm of its tokens x (B, L, D) after LayerNorm. Two units scaled by sqrt(|x|) give just that.
    """
    scale = x.norm(dim=-1).mean(1).sqrt().view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    y = torch.zeros_like(v)
    for s in (v, k, q):
        s = scale * F.normalize(s, dim=-1)
        s = scale * F.normalize(attend(s, None, s, "qqv"), dim=-1)  # one step towards clusters
        y = y + attend(s, None, v, "qqv")
    return y / 3


def last_block(visual: VisionTransformer, x: Tensor, method: str) -> Tensor:
    """The ordinary path, with the method's attention in the last block: (B, 1 + P, D)."""
    *stack, block = visual.transformer.resblocks
    for ordinary in stack:
        x = ordinary(x)
    if method == "maskclip":
        return block(x, "dv")
    if method == "clearclip":
        return block.attn(block.ln_1(x), "qqv")
    q, k, v = block.attn.project(block.ln_1(x), "qkv")
    # REF: SCLIP adds the two softmaxes, it does not average them: the rows sum to 2
    x = x + block.attn.merge(attend(q, k, v, "qqv") + attend(q, k, v, "kkv"))
    return x + block.mlp(block.ln_2(x))


def dense_features(
    visual: VisionTransformer,
    images: Tensor,
    method: str = "surgery",
    blocks: int | None = None,
    kind: str | None = None,
) -> Tensor:
    """Every token of the image in the joint space of images and texts.

    The papers named above; the model is only read. Differentiable; wrap it in torch.no_grad() for maps.
    Args:    images (B, 3, height, width), any size of at least one patch;  method, one of METHODS
             blocks with two paths. Default: the last six, as CLIP Surgery whatever the depth, but at most
             two thirds of the stack: 6 of 24, 12 or 8 blocks, 2 of 3.
             kind: with surgery, another second attention than its vvv, one of attention.KINDS: what
             AlignCLIP's Fig. 8 compares, everything else being equal. dv is alignclip.
    Returns: (B, 1 + P, E), class token first, not normalised. Patches run along the rows.
    Raises:  ValueError for an unknown method or kind, too many blocks, images below one patch, and
             Llip's tower.
    Cost:    FLOPs beside the blocks and 2 L D E for the head, L = 1 + P:  surgery, alignclip, gem in each
             block of two paths 2 L D^2 for another merge, and 4 L^2 D, 0, 24 L^2 D for its attention;  in
             the last block sclip 4 L^2 D, maskclip - 4 L D^2 - 4 L^2 D, clearclip - 2 L D^2 - 4 L D F (no
             MLP, of width F).  4 L E bytes an image come out
    """
    depth = len(visual.transformer.resblocks)
    blocks = depth - default_blocks(depth)[0] if blocks is None else blocks
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if kind is not None and (method != "surgery" or kind not in KINDS):
        raise ValueError(
            f"kind {kind!r} of method {method!r}: surgery takes one of {', '.join(KINDS)}, the others none"
        )
    if not 1 <= blocks <= depth:
        raise ValueError(f"{blocks} blocks with two paths: the tower has 1 to {depth}")
    if visual.tokens != 1 or visual.proj is None:
        raise ValueError(
            f"{visual.tokens} mixture tokens without a shared projection: patches have no place in "
            "the joint space; use llip_token_maps or llip_caption_map"
        )
    if min(images.shape[-2:]) < visual.patch_size:
        height, width = images.shape[-2:]
        raise ValueError(f"images of {width}x{height} are smaller than a patch, {visual.patch_size}")
    x = embed(visual, images, method)
    if method in TWO_PATHS:
        branch = kind or {"surgery": "vvv", "alignclip": "dv", "gem": gem_attention}[method]
        x, z, _ = two_paths(visual, x, branch, depth - blocks, 0)
        # REF: CLIP Surgery's class token is the Q-K-V path's, GEM keeps its own
        return visual.head(z if method == "gem" else torch.cat([x[:, :1], z[:, 1:]], 1))
    return visual.head(last_block(visual, x, method))


def as_grid(x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Patches back to rows and columns: (B, P, C) -> (B, rows, columns, C). Default: a square."""
    side = math.isqrt(x.shape[1])
    rows, columns = grid or (side, side)
    if rows * columns != x.shape[1]:
        wanted = f"grid {rows}x{columns}" if grid else "a square: give grid=(rows, columns)"
        raise ValueError(f"{x.shape[1]} patches are not {wanted}")
    return x.unflatten(1, (rows, columns))  # (B, rows, columns, C)


def stretch(maps: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
    """Every map (B, rows, columns, C) to the range [0, 1], then bilinear to size (None keeps the grid).

    Li et al. 2023, eq. 1. TRAP: in this order; after interpolation the extremes would be others. A map that
    is the same everywhere says nothing and becomes 0, not 0 / 0.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    if size is not None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        maps = F.interpolate(maps.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)
    return maps  # (B, height, width, C)


def similarity_map(
    tokens: Tensor,
    text: Tensor,
    size: int | tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """How similar each place of the image is to each text, stretched to [0, 1] per map.

    Li et al. 2023, eq. 1;  M = resize(minmax(cos(F_p, T_c))). Also the maps of AlignCLIP, Fig. 1(b).
    Args:    tokens (B, 1 + P, E) from dense_features, the class token is dropped;  text (C, E)
             size in pixels: None for one value per patch, an int, or (height, width)
             grid: (rows, columns) of the patches if the image was not square
    Returns: (B, S, S, C), or (B, rows, columns, C), or (B, height, width, C).
    """
    cosines = F.normalize(tokens[:, 1:], dim=-1) @ F.normalize(text, dim=-1).t()  # (B, P, C)
    return stretch(as_grid(cosines, grid), size)


def feature_surgery(
    tokens: Tensor, text: Tensor, redundant: Tensor | None = None, scale: float = 2.0
) -> Tensor:
    """Similarity of tokens and texts, less what all texts share.

    Li et al. 2023, section 3.3. S_pc = w_c F_p.T_c - mean_c'(w_c' F_p.T_c'), w = p / mean(p),
    p = softmax_c(scale F_cls.T_c); the products of single channels never need to be kept.
    REF: in the released code the scale is a constant 2, and only one image at a time works.
    Args:    tokens (B, L, E), class token first;  text (C, E)
             redundant (1, E) or (C, E): subtract this text instead, S = F.(T - T_redundant); the paper's
             choice for a single text is the text "".
    Returns: (B, L, C), of any sign.
    """
    tokens, text = F.normalize(tokens, dim=-1), F.normalize(text, dim=-1)
    if redundant is not None:
        return tokens @ (text - F.normalize(redundant, dim=-1)).t()  # (B, L, C)
    similarity = tokens @ text.t()  # (B, L, C)
    p = (scale * similarity[:, :1]).softmax(-1)  # (B, 1, C)
    similarity = similarity * p / p.mean(-1, keepdim=True)
    return similarity - similarity.mean(-1, keepdim=True)


def llip_token_maps(model: DualEncoder, images: Tensor) -> Tensor:
    """What each mixture token looks at: its attention over the patches in the last block, mean of the heads.

    No equation in the Llip paper. The last block is where a token reads what it becomes; deeper mixing
    (rollout) is not undone. Attention to other mixture tokens is left out, and the rest scaled to sum 1.
    Returns: (B, rows, columns, M), each map sums to 1. For a CLIP, M = 1: the class token's attention.
    """
    visual = model.visual
    M, patch = visual.tokens, visual.patch_size
    *stack, last = visual.transformer.resblocks
    x = visual.embed(images)
    for block in stack:
        x = block(x)
    _, attn = last.attn(last.ln_1(x), need_weights=True)  # (B, H, M + P, M + P)
    maps = attn.mean(1)[:, :M, M:].transpose(1, 2)  # (B, P, M)
    height, width = images.shape[-2:]
    return as_grid(maps / maps.sum(1, keepdim=True), (height // patch, width // patch))


def llip_caption_map(model: DualEncoder, images: Tensor, tokens: Tensor) -> Tensor:
    """What an image shows when it is seen through a caption: token maps mixed by the caption's weights.

    map_ij = sum_k mean_heads(Phi_ijk) map_ik, with Phi of Lavoie et al. 2024, eq. 1, and the maps of
    llip_token_maps. With all_tokens a patch is a key itself, and its weight goes to its own place.
    Args:    model, an Llip;  images (B, 3, height, width);  tokens (C, L) ids of the captions
    Returns: (B, rows, columns, C), each map sums to 1; stretch() makes a heat map of it.
    Cost:    two passes of the image tower.
    """
    maps = llip_token_maps(model, images)  # (B, rows, columns, M)
    M, patches = model.visual.tokens, maps.shape[1] * maps.shape[2]
    if model.all_tokens and patches != model.config.patches:
        raise ValueError(
            f"{patches} patches, but an Llip with all_tokens has projections for "
            f"{model.config.patches}: use images of {model.config.image_size} pixels"
        )
    keys, _ = model.encode_image(images)
    queries, _ = model.encode_text(tokens)
    phi = model.mixing_weights(keys, queries).mean(2).transpose(1, 2)  # (B, M, C), or (B, M + P, C)
    seen = torch.einsum("bijm,bmc->bijc", maps, phi[:, :M])  # (B, rows, columns, C)
    return seen + phi[:, M:].view_as(seen) if model.all_tokens else seen


def image_scores(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """What map_scores averages, for each image whose mask is not empty: so data can come in batches.

    Args:    maps (N, H, W) >= 0, of any scale per map;  masks (N, H, W), nonzero on the foreground
    Returns: "lift", "pointing", "area" (N',), and "ious" (N', 101) at thresholds 0, 0.01 .. 1, in float64
    Raises:  ValueError if shapes differ, or a map is negative or not finite.
    """
    if maps.shape != masks.shape or maps.dim() != 3:
        raise ValueError(f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)}: want (N, H, W)")
    maps, masks = maps.flatten(1).double(), masks.flatten(1) != 0  # (N, H W)
    if not torch.isfinite(maps).all() or (maps < 0).any():
        raise ValueError("maps have values that are negative or not finite")
    kept = masks.any(1)
    maps, masks = maps[kept], masks[kept].double()
    area = masks.mean(1)  # (N',)
    # an empty map is as good as a uniform one
    mass = torch.where(maps.sum(1, keepdim=True) > 0, maps, 1.0)  # (N', H W)
    lift = (mass * masks).sum(1) / mass.sum(1) / area
    top = (maps == maps.amax(1, keepdim=True)).double()
    pointing = (top * masks).sum(1) / top.sum(1)
    levels = stretch(maps[:, :, None, None])[:, :, 0, 0]  # (N', H W) in [0, 1]
    thresholds = torch.arange(101, dtype=torch.float64) / 100
    # SPEED: sorted into 101 steps and summed from the top, not compared with 101 thresholds
    step = torch.bucketize(levels, thresholds, right=True)  # (N', H W) in 1 .. 101

    def reach(weights):  # sum of the weights where a level reaches each threshold
        count = weights.new_zeros(len(weights), 102).scatter_add_(1, step, weights)
        return count.flip(1).cumsum(1).flip(1)[:, 1:]  # (N', 101)

    found, both = reach(torch.ones_like(masks)), reach(masks)
    ious = both / (found + masks.sum(1, keepdim=True) - both)  # (N', 101)
    return {"lift": lift, "pointing": pointing, "area": area, "ious": ious}


def map_scores(maps: Tensor, masks: Tensor) -> dict[str, float]:
    """Do the maps show the object? Maps against masks of the foreground.

    Args:    as image_scores
    Returns: mean_scores
    Raises:  ValueError as image_scores and mean_scores.
    """
    return mean_scores(image_scores(maps, masks))


def mean_scores(scores: dict[str, Tensor]) -> dict[str, float]:
    """Means of image_scores over the images.

    Returns: lift         share of the map's mass on the foreground / share of the area; 1 is chance
             pointing     is the highest place on the foreground? Ties count in part. Chance: area
             area         the foreground's share of the image
             iou          intersection over union, map >= half of its range
             best_iou     the same at best_threshold, one threshold for all images, of 0, 0.01 .. 1
             images       how many
    Raises:  ValueError if there are none.
    """
    ious = scores["ious"].mean(0)  # (101,)
    if not len(scores["area"]):
        raise ValueError("no mask has a foreground")
    best = int(ious.argmax())
    return {
        **{name: float(scores[name].mean()) for name in ("lift", "pointing", "area")},
        "iou": float(ious[50]),
        "best_iou": float(ious[best]),
        "best_threshold": best / 100,
        "images": len(scores["area"]),
    }


def inputs(arguments: list[str], out: str = "") -> tuple[list[Path], list[str]]:
    """Splits the command line's words: images first (or one folder of them), then texts.

    Words after the first are images as long as they end like one, so that a text may be called like a folder.
    Args:   out: the picture that will be written: in a folder of images it is no image
    Raises: ValueError if an image is missing or is out, a folder has none, or there is no text.
    """
    from readers.images import IMAGE_SUFFIXES

    first = Path(arguments[0])
    names = [first]
    for word in arguments[1:]:
        if not word.lower().endswith(IMAGE_SUFFIXES):
            break
        names.append(Path(word))
    texts = arguments[len(names) :]
    for name in names:
        if not name.exists():
            raise ValueError(f"{name}: no such image or folder; images come first, then the texts")
    if not texts:
        raise ValueError(f'no text after {names[-1]}: say what to look for, as in "a dog"')
    if any(name.resolve() == Path(out).resolve() for name in names if not name.is_dir()):
        raise ValueError(f"--out {out} is one of the images and would overwrite it: name another")
    if first.is_dir():
        images = sorted(p for p in first.iterdir() if p.name.lower().endswith(IMAGE_SUFFIXES))
        images = [p for p in images if p.resolve() != Path(out).resolve()]
        if not images:
            raise ValueError(f"{first}: no image in this folder ({', '.join(IMAGE_SUFFIXES)})")
        names[:1] = images
    if len(names) * (len(texts) + 1) > MAX_TILES:
        raise ValueError(
            f"{len(names)} images x {len(texts)} texts do not fit on one sheet of {MAX_TILES} "
            "pictures: name fewer"
        )
    return names, texts


def read_image(path: Path) -> Image.Image:
    """The whole picture as RGB: any mode, the first frame. Raises: ValueError naming the file."""
    from readers.images import IMAGE_ERRORS, open_image

    try:
        with open_image(str(path)) as image:
            return image.convert("RGB")
    except IMAGE_ERRORS as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


def heat_maps(
    model: DualEncoder, image: Tensor, tokens: Tensor, method: str, blank: Tensor | None = None
) -> Tensor:
    """One map per text, stretched to [0, 1]: image (3, S, S), ids (C, L) -> (rows, columns, C).

    An Llip has its own kind of map. blank (1, L), the ids of "": what all texts share is subtracted.
    """
    if hasattr(model, "mixing_weights"):
        return stretch(llip_caption_map(model, image[None], tokens))[0]
    text = model.encode_text(tokens)
    features = dense_features(model.visual, image[None], method)
    if blank is None:
        return similarity_map(features, text)[0]
    redundant = model.encode_text(blank) if len(text) == 1 else None
    return stretch(as_grid(feature_surgery(features, text, redundant)[:, 1:]))[0]


def overlay(image: Image.Image, heat_map: Tensor) -> Image.Image:
    """A map (rows, columns) in [0, 1] in the legend's colours, darker where the image is dark."""
    heat_map = heat_map[None, None].float().cpu()
    heat_map = F.interpolate(heat_map, image.size[::-1], mode="bilinear")[0, 0]  # (height, width)
    shade = 0.5 + np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 510
    return Image.fromarray((heat(heat_map.numpy()) * shade).astype(np.uint8))


def shorten(text: str, width: int, size: int) -> str:
    """The text on one line of at most width pixels."""
    text = " ".join(text.split())[:200]
    if font(size).getlength(text) <= width:
        return text
    while font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def sheet(rows: list[tuple[str, Image.Image, Tensor]], texts: list[str], about: str) -> Image.Image:
    """One picture: a row per image with the image, its map for each text, and a legend below.

    Args: rows of (name, image, maps (rows, columns, C) in [0, 1]);  about: a line beside the legend
    """
    gap, title, side = 12, 24, TILE + 12
    width = max(gap + side * (1 + len(texts)), 2 * side + gap)
    heights = [min(TILE, max(1, round(TILE * im.height / im.width))) for _, im, _ in rows]
    height = 2 * gap + title + sum(h + title + gap for h in heights) + 30
    page = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(page), gap
    for column, text in enumerate(["image", *texts]):
        draw.text((gap + column * side, y), shorten(text, TILE, 15), fill=INK, font=font(15))
    y += title
    for (name, image, maps), height in zip(rows, heights):
        scale = min(TILE / image.width, height / image.height)
        size = [max(1, round(scale * pixels)) for pixels in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        tiles = [image, *(overlay(image, one) for one in maps.unbind(-1))]
        for column, tile in enumerate(tiles):
            page.paste(tile, (gap + column * side, y))
        draw.text((gap, y + height + 2), shorten(name, TILE, 12), fill="#666666", font=font(12))
        y += height + title + gap
    bar = heat(np.linspace(0, 1, TILE))[None].repeat(12, 0)  # (12, TILE, 3)
    page.paste(Image.fromarray(bar), (gap, y))
    for x, label, anchor in ((0, "least", "la"), (TILE, "most, of each map", "ra")):
        draw.text((gap + x, y + 14), label, fill=INK, font=font(12), anchor=anchor)
    about = shorten(about, width - side - 2 * gap, 13)
    draw.text((gap + side, y), about, fill=INK, font=font(13))
    return page


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description="Where in the image is it? One heat map per text, beside the image.", allow_abbrev=False
    )
    add = result.add_argument
    add("words", nargs="+", metavar="IMAGE_OR_TEXT", help="images or one folder, then texts")
    add("--model", required=True, metavar="PATH", help="checkpoint or run directory")
    add("--out", required=True, metavar="PNG", help="the picture to write")
    add("--method", choices=METHODS, default="surgery", help="for Llip there is one kind only")
    add("--size", type=int, metavar="PIXELS", help="images are resized to a square; default: model's")
    add("--subtract-shared", action="store_true", help="feature surgery: less what all texts share")
    add("--vocab", metavar="PATH", help="vocabulary; default: tokenizer.json beside the model, or OpenAI's")
    add("--quick-gelu", action=argparse.BooleanOptionalAction, help="if the checkpoint cannot tell")
    return result


def load_model(args: argparse.Namespace):
    """The model and its tokenizer. Raises: ValueError if it has not both towers, or they do not fit."""
    import pretrained

    model = pretrained.load(args.model, quick_gelu=args.quick_gelu)
    visual = getattr(model, "visual", None)
    if not (isinstance(visual, VisionTransformer) and hasattr(model, "encode_text")):
        raise ValueError(f"{args.model}: maps need a model of images and texts")
    if visual.tokens > 1 and not hasattr(model, "mixing_weights"):
        raise ValueError(f"{args.model}: pools {visual.tokens} tokens without a text: no map per text")
    tokenizer = pretrained.tokenizer_for(args.model, args.vocab)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{args.model} has {model.config.vocab_size} token embeddings, the vocabulary "
            f"{tokenizer.vocab_size} tokens: give its own with --vocab"
        )
    return model, tokenizer


def show(args: argparse.Namespace) -> str:
    """Does what the command line says; returns a line about it."""
    from readers.images import normalise

    names, texts = inputs(args.words, args.out)
    if not Path(args.out).parent.is_dir() or not args.out.lower().endswith(".png"):
        raise ValueError(f"--out {args.out}: wants a name that ends in .png, in a folder that exists")
    model, tokenizer = load_model(args)
    patch, size = model.visual.patch_size, args.size or model.config.image_size
    if size < patch or size % patch:
        nearest = max(1, round(size / patch)) * patch
        raise ValueError(f"--size {size} is not a multiple of the patch, {patch}: take {nearest}")
    method = "Llip, tokens mixed by the text" if hasattr(model, "mixing_weights") else args.method
    tokens = tokenizer(texts, model.config.context_length)  # (C, L)
    blank = tokenizer([""], model.config.context_length) if args.subtract_shared else None
    rows = []
    for n, name in enumerate(names, 1):
        image = read_image(name)
        # REF: CLIP Surgery resizes to a square and crops nothing: the map covers the whole picture
        square = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        with torch.no_grad():
            maps = heat_maps(model, normalise(square), tokens, args.method, blank)
        image.thumbnail((2 * TILE, 2 * TILE))  # what the sheet needs of it
        rows.append((name.name, image, maps))
        if sys.stderr.isatty():
            print(f"\r{n}/{len(names)} images", end="\n" * (n == len(names)), file=sys.stderr)
    page = sheet(rows, texts, f"{method}, {Path(args.model).name}, {size} pixels")
    write_image(args.out, page)
    return f"{args.out}: {len(names)} images x {len(texts)} texts, {method}"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    try:
        print(show(args))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
