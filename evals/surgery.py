"""Where in the image is "a dog"? Dense features and heat maps of a trained CLIP, without training.

    python -m evals.surgery photo.jpg "a dog" "grass" --model ViT-B-16.pt --out maps.png

CLIP trains only its class token, so its patch features match texts about other places. Each method runs the
same blocks with the same weights and changes how the last blocks mix tokens. The code is written from the
formulas of the papers:

    surgery     softmax(V V^T / sqrt(K)) V           Li et al. 2023 (arXiv:2304.05653), CLIP Surgery
    alignclip   V                                    Han et al. 2025 (doi 10.1007/s10994-025-06742-z)
    gem         gem_attention, below                 Bousselham et al. 2024 (arXiv:2312.00878)
    maskclip    V                                    Zhou et al. 2022 (arXiv:2112.01071)
    sclip       (softmax(Q Q^T / sqrt(K))            Wang et al. 2024 (arXiv:2312.01597)
                + softmax(K K^T / sqrt(K))) V
    clearclip   softmax(Q Q^T / sqrt(K)) V           Lan et al. 2024 (arXiv:2407.12442), no residual, no MLP

The last three change the last block. The first three have two paths in the last six blocks: CLIP's own path x
is unchanged, and a second residual stream z (alignclip.two_paths) sums the other attention without any MLP:

    x <- x + Attn_qkv(LN1 x);  x <- x + MLP(LN2 x)          z <- z + Attn_other(LN1 x)

Llip's patch features are not in the space of the texts. Its maps show the attention of its mixture tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

import data
import evaluate
from alignclip import default_blocks, two_paths
from attention import KINDS, attend
from model import Block, DualEncoder, VisionTransformer
from readers.images import IMAGE_ERRORS, decoding, open_image
from util.evaluation import LoadFlags, load_options
from util.files import write_image
from util.flags import parse
from util.plots import heat, sheet
from util.program import leave, program

TILE, MAX_SIZE = 256, 2048  # pixels: a picture's longer side, and what memory suffices for


@dataclass(frozen=True)
class Recipe:
    """A method: what it does with the positions of an image of another size, and how its last blocks mix."""

    embed: Callable  # (visual, images) -> the first residual stream (B, 1 + P, D)
    branch: str | Callable | None = None  # attention of the second path, for alignclip.two_paths
    last: Callable | None = None  # without a second path: (block, x) -> (B, 1 + P, D), for the last block
    own_class: bool = False  # the class token is that of the second path


def embed_by_factor(visual: VisionTransformer, images: Tensor) -> Tensor:
    """visual.embed, with positions that are resized by a factor."""
    side = math.isqrt(len(visual.positional_embedding) - 1)
    size = [pixels // visual.patch_size for pixels in images.shape[-2:]]  # rows, columns
    if size == [side, side]:
        return visual.embed(images)
    # REF: 0.1 patches more, so that the size is not rounded down (as in DINO). TRAP: size=(rows, columns)
    # gives other numbers, because the factor sets the distance of the samples
    positions = visual.positional_embedding[1:].t().view(1, -1, side, side)  # (1, D, side, side)
    factor = [(n + 0.1) / side for n in size]
    positions = F.interpolate(positions, scale_factor=factor, mode="bicubic")
    x = visual.conv1(images) + positions  # (B, D, rows, columns)
    cls = visual.class_embedding + visual.positional_embedding[0]  # (D,)
    x = torch.cat([cls.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)  # (B, 1 + P, D)
    return visual.ln_pre(x)


def gem_attention(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """GEM's self-self attention: the mean over S = Q, K, V of softmax(t S' S'^T) V.   (B, H, L, K)

    Bousselham et al. 2024, section 3. S' is S at unit length after one step of softmax(t S S^T) S, which
    moves similar tokens together. t = |x| / sqrt(K), where |x| is the mean norm of the tokens x (B, L, D).
    """
    # two unit vectors scaled by sqrt(|x|) have the inner product |x| S' S'^T
    scale = x.norm(dim=-1).mean(1).sqrt().view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    y = torch.zeros_like(v)
    for s in (v, k, q):
        s = scale * F.normalize(s, dim=-1)
        s = scale * F.normalize(attend(s, None, s, "qqv"), dim=-1)
        y = y + attend(s, None, v, "qqv")
    return y / 3


def sclip_block(block: Block, x: Tensor) -> Tensor:
    """Q-Q and K-K attention in a block: (B, 1 + P, D)."""
    q, k, v = block.attn.project(block.ln_1(x), "qkv")
    # REF: SCLIP adds the two softmaxes and does not average them: the rows sum to 2
    x = x + block.attn.merge(attend(q, k, v, "qqv") + attend(q, k, v, "kkv"))
    return x + block.mlp(block.ln_2(x))


# REF: each official code resizes the positions in another way
bilinear = partial(VisionTransformer.embed, mode="bilinear", antialias=False)
bicubic = partial(VisionTransformer.embed, antialias=False)
METHODS = {
    "surgery": Recipe(bilinear, branch="vvv"),
    "alignclip": Recipe(bilinear, branch="dv"),
    # REF: CLIP Surgery takes the class token from the Q-K-V path, GEM from the second path
    "gem": Recipe(VisionTransformer.embed, branch=gem_attention, own_class=True),
    "maskclip": Recipe(bicubic, last=lambda block, x: block(x, "dv")),
    "sclip": Recipe(embed_by_factor, last=sclip_block),
    "clearclip": Recipe(embed_by_factor, last=lambda block, x: block.attn(block.ln_1(x), "qqv")),
}


def dense_features(visual, images: Tensor, method="surgery", blocks: int | None = None) -> Tensor:
    """Every token of the image in the space of images and texts. The papers are named above.

    Args:    images (B, 3, height, width), any size of at least one patch
             method: one of METHODS, or of attention.KINDS for the second path of surgery (AlignCLIP, Fig. 8)
             blocks with two paths. Default: alignclip.default_blocks, which is 6 of 24 or 12, 2 of 3
    Returns: (B, 1 + P, E), class token first, not normalised, differentiable. Patches are row by row.
    Raises:  ValueError for an unknown method, too many blocks, and Llip.
    """
    depth = len(visual.transformer.resblocks)
    blocks = depth - default_blocks(depth)[0] if blocks is None else blocks
    if method not in (*METHODS, *KINDS):
        raise ValueError(f"method {method!r}: expected one of {', '.join((*METHODS, *KINDS))}")
    recipe = METHODS.get(method) or Recipe(bilinear, branch=method)
    if not 1 <= blocks <= depth:
        raise ValueError(f"{blocks} blocks with two paths: the tower has 1 to {depth}")
    if visual.tokens != 1 or visual.proj is None:
        raise ValueError(f"a tower of {visual.tokens} mixture tokens has no projection: use llip_caption_map")
    x = recipe.embed(visual, images)
    if recipe.last:
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        return visual.head(recipe.last(visual.transformer.resblocks[-1], x))
    x, z, _ = two_paths(visual, x, recipe.branch, depth - blocks, 0)
    return visual.head(z if recipe.own_class else torch.cat([x[:, :1], z[:, 1:]], 1))


def stretch(maps: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
    """Every map (B, rows, columns, C) to the range [0, 1], then bilinear to size (None keeps the grid).

    Li et al. 2023, eq. 1. TRAP: the order matters, because interpolation changes the extremes. A map with the
    same value everywhere becomes 0, not 0 / 0.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    if size is not None:
        maps = F.interpolate(maps.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)
    return maps  # (B, height, width, C)


def similarity_map(tokens: Tensor, text: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
    """Similarity of each place of a square image to each text, stretched to [0, 1] in each map.

    Li et al. 2023, eq. 1;  M = resize(minmax(cos(F_p, T_c))). AlignCLIP's Fig. 1(b) shows the same maps.
    Args:    tokens (B, 1 + P, E) from dense_features, the class token is dropped;  text (C, E)
             size in pixels: None for one value per patch, an int, or (height, width)
    Returns: (B, rows, columns, C), or (B, height, width, C).   Raises: ValueError unless they are a square.
    """
    cosines = F.normalize(tokens[:, 1:], dim=-1) @ F.normalize(text, dim=-1).t()  # (B, P, C)
    patches, side = cosines.shape[1], math.isqrt(cosines.shape[1])
    if side * side != patches:
        raise ValueError(f"{patches} patches are not a square")
    return stretch(cosines.unflatten(1, (side, side)), size)


def feature_surgery(tokens: Tensor, text: Tensor, redundant: Tensor | None = None, scale=2.0) -> Tensor:
    """Similarity of tokens and texts, without the part that all texts share.

    Li et al. 2023, section 3.3.  S_pc = w_c F_p.T_c - mean_c'(w_c' F_p.T_c'),  w = p / mean(p),
    p = softmax_c(scale F_cls.T_c). REF: the released code fixes scale = 2 and fails for several images.
    Args:    tokens (B, L, E), class token first;  text (C, E)
             redundant (1, E) or (C, E): S = F.(T - T_redundant) instead; for a single text the paper takes ""
    Returns: (B, L, C), of any sign.
    """
    tokens, text = F.normalize(tokens, dim=-1), F.normalize(text, dim=-1)
    if redundant is not None:
        return tokens @ (text - F.normalize(redundant, dim=-1)).t()  # (B, L, C)
    similarity = tokens @ text.t()  # (B, L, C)
    p = (scale * similarity[:, :1]).softmax(-1)  # (B, 1, C)
    similarity = similarity * p / p.mean(-1, keepdim=True)
    return similarity - similarity.mean(-1, keepdim=True)


def llip_token_maps(model: DualEncoder, images: Tensor, first: int = 0) -> Tensor:
    """Attention of each mixture token over the patches, mean of the heads, in the last block.

    No equation in the Llip paper. Mixing in earlier blocks (attention rollout) is not undone.
    Args:    first: mean over so many of the first blocks, in place of the last block
    Returns: (B, rows, columns, M), each map sums to 1. In a CLIP the only token is the class token.
    """
    visual, grid = model.visual, [pixels // model.visual.patch_size for pixels in images.shape[-2:]]
    M, stack, maps = visual.tokens, visual.transformer.resblocks, []
    x = visual.embed(images)
    for block in [] if first else stack[:-1]:
        x = block(x)
    for block in stack[:first] if first else stack[-1:]:
        attn, x = block.attn(block.ln_1(x), need_weights=True)[1], block(x)  # (B, H, L, L), (B, L, D)
        rows = attn.mean(1)[:, :M, M:].transpose(1, 2)  # (B, P, M)
        maps.append(rows / rows.sum(1, keepdim=True))
    return (sum(maps) / len(maps)).unflatten(1, grid)  # (B, rows, columns, M)


def llip_caption_map(model: DualEncoder, images: Tensor, tokens: Tensor) -> Tensor:
    """Token maps of an Llip, mixed by the weights of a caption.

    map_ij = sum_k mean_heads(Phi_ijk) map_ik, with Phi of Lavoie et al. 2024, eq. 1, and map_ik from
    llip_token_maps. With all_tokens each patch is a key too, and its weight is added at its own place.
    Args:    model, an Llip;  images (B, 3, height, width);  tokens (C, L) ids of the captions
    Returns: (B, rows, columns, C), each map sums to 1; stretch() makes a heat map of it.
    """
    maps = llip_token_maps(model, images)  # (B, rows, columns, M)
    patches = maps.shape[1] * maps.shape[2]
    if model.all_tokens and patches != model.config.patches:
        size, own = model.config.image_size, model.config.patches
        raise ValueError(f"{patches} patches, but all_tokens needs {own}: use images of {size} pixels")
    keys, _ = model.encode_image(images)
    queries, _ = model.encode_text(tokens)
    return mixed_maps(maps, model.mixing_weights(keys, queries).mean(2))


def mixed_maps(maps: Tensor, phi: Tensor) -> Tensor:
    """Token maps (B, rows, columns, M) mixed by weights (B, C, M or M + P): (B, rows, columns, C)."""
    M, phi = maps.shape[-1], phi.transpose(1, 2)  # (B, M, C), or (B, M + P, C)
    seen = torch.einsum("bijm,bmc->bijc", maps, phi[:, :M])  # (B, rows, columns, C)
    return seen + phi[:, M:].view_as(seen) if phi.shape[1] > M else seen


@dataclass(frozen=True, kw_only=True)
class Flags(LoadFlags):
    image: str  # a picture
    texts: tuple[str, ...]  # what to look for, as "a dog"
    model: str  # a run directory of train.py, a checkpoint, or a name
    out: str  # the picture to write, a .png
    method: Literal[tuple(METHODS)] = "surgery"  # of a CLIP; for an Llip there is one kind of map
    size: int | None = None  # images are resized to a square of so many pixels (default: the model's)
    max_pixels: int | None = None  # of the image (default: 96 million, 24 for some formats: docs/data.md)
    vocab: str = ""  # vocabulary (default: the run's own, else OpenAI's)


def open_for_maps(source: str, vocab: str = "", **load_options) -> tuple:
    """Model and tokenizer.   Raises: ValueError for a model without maps, and for another vocabulary."""
    model, tokenizer = evaluate.open_model(source, vocab, towers=True, **load_options)
    evaluate.check_vocabulary(model, tokenizer)
    if model.visual.tokens > 1 and not model.conditional:
        raise ValueError(f"{source} pools {model.visual.tokens} tokens without a text: no map per text")
    return model, tokenizer


def read_image(path: str, max_pixels: int | None = None) -> Image.Image:
    """The picture as RGB, its first frame, upright.   Raises: ValueError naming the file."""
    try:
        with open_image(path, max_pixels) as image, decoding():
            return ImageOps.exif_transpose(image).convert("RGB")
    except IMAGE_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: not a readable image ({reason})") from None


def map_sheet(path: str | Path, rows: list[tuple], title: str) -> None:
    """Writes images with maps over them: (image, maps (rows, columns, C), 1 + C labels) for each row.

    The longer side of an image becomes TILE pixels. Each map has its own range, and is darker in dark places.
    """
    columns, pictures, texts = max(len(labels) for _, _, labels in rows), [], []
    for image, maps, labels in rows:
        size = [max(1, round(TILE * side / max(image.size))) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        shade = 0.5 + np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 510
        pictures.append(image)
        for one in maps.float().cpu().unbind(-1):
            one = stretch(one[None, ..., None], size[::-1])[0, ..., 0]  # (height, width)
            pictures.append(Image.fromarray((heat(one.numpy()) * shade).astype(np.uint8)))
        missing = columns - len(labels)
        pictures += [Image.new("RGB", size, "white")] * missing
        texts += [*labels, *[""] * missing]
    title += "; in each map: dark blue least, yellow most"
    write_image(path, sheet(pictures, texts, columns, TILE, title))


@program
def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, __doc__, positional=("image", "texts"))
    out = Path(flags.out)
    if out.suffix.lower() != ".png" or out.resolve() == Path(flags.image).resolve():
        raise ValueError(f"--out {out}: give another name, which ends in .png")
    image = read_image(flags.image, flags.max_pixels)
    model, tokenizer = open_for_maps(flags.model, flags.vocab, **load_options(flags))
    patch, size = model.visual.patch_size, model.config.image_size if flags.size is None else flags.size
    if not patch <= size <= MAX_SIZE or size % patch:
        fitting = max(1, min(round(size / patch), MAX_SIZE // patch)) * patch
        raise ValueError(f"--size {size}: not 1 to {MAX_SIZE} and a multiple of the patch, take {fitting}")
    method = "Llip, tokens mixed by the text" if model.conditional else flags.method
    tokens = tokenizer(flags.texts, model.config.context_length)  # (C, L)
    # REF: CLIP Surgery resizes to a square and crops nothing: the map covers the whole picture
    square = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    with torch.no_grad():
        own = data.preprocess_of(model.config)
        x = data.normalise(square[None], own.mean, own.std)  # (1, 3, S, S)
        if model.conditional:
            maps = stretch(llip_caption_map(model, x, tokens))  # (1, rows, columns, C)
        else:
            maps = similarity_map(dense_features(model.visual, x, flags.method), model.encode_text(tokens))
    labels = [Path(flags.image).name, *flags.texts]
    map_sheet(out, [(image, maps[0], labels)], f"{method}, {Path(flags.model).name}, {size} pixels")
    print(f"{out}: {len(flags.texts)} texts, {method}")


if __name__ == "__main__":
    leave(main())
