"""CLIP: a vision transformer, a text transformer, and the dual encoder that contains both.

Radford et al. 2021 (arXiv:2103.00020), sections 2.4-2.5; Dosovitskiy et al. 2021 (arXiv:2010.11929).
Parameters and submodules have the names of OpenAI's state dict, so its weights load without renaming.
This file does not depend on any method: Llip subclasses DualEncoder, fine-tuning methods wrap a CLIP.

Every dual encoder has   encode_image(images) -> image features    encode_text(tokens) -> text features
                         pair_logits(image_side, text_side)        ensemble_text(text_side, group)
image_side and text_side are these features: one tensor each for CLIP, a tuple of tensors each for Llip.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Mask, MultiheadAttention
from attention import flops as attention_flops
from losses import at_least_fp32

KeepTokens = Callable[[Tensor], Tensor] | None  # selects tokens: (B, L, D) -> (B, L', D) or (B, D)


@dataclass(frozen=True)
class Config:
    """The sizes of a dual encoder. The shapes in a checkpoint show neither the heads nor the activation."""

    embed_dim: int = 512  # joint embedding E
    image_size: int = 224  # pixels, square
    patch_size: int = 32  # pixels
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_mlp: int = 3072  # hidden width of the MLP
    context_length: int = 77  # tokens, start and end included
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_mlp: int = 2048
    activation: str = "quick_gelu"  # or "gelu". TRAP: a checkpoint loads with either one
    # arguments of readers.images.Preprocess that differ from OpenAI's. TRAP: another mean costs accuracy
    preprocessing: dict = field(default_factory=dict)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def _clip(embed, size, patch, vision, text, vision_mlp=None) -> Config:
    """Builds a Config from (width, layers, heads) of each tower; an MLP is 4 times as wide by default."""
    return Config(embed, size, patch, *vision, vision_mlp or 4 * vision[0], 77, 49408, *text, 4 * text[0])


# A head is 64 wide in OpenAI's models, 80 in ViT-H and 104 in ViT-bigG (open_clip model_configs).
CONFIGS = {
    # trains on a laptop in two minutes; the size of the tokenizer learned from the captions replaces 1024
    "tiny": Config(64, 32, 8, 64, 3, 4, 256, 32, 1024, 64, 2, 4, 256),
    # for data sets as large as Flickr8k, on a CPU
    "small": Config(128, 64, 8, 128, 3, 4, 512, 32, 4096, 128, 2, 4, 512),
    "ViT-S-16": _clip(384, 224, 16, (384, 12, 6), (384, 12, 6)),
    "ViT-B-32": _clip(512, 224, 32, (768, 12, 12), (512, 12, 8)),
    "ViT-B-16": _clip(512, 224, 16, (768, 12, 12), (512, 12, 8)),
    "ViT-L-14": _clip(768, 224, 14, (1024, 24, 16), (768, 12, 12)),
    "ViT-L-14-336": _clip(768, 336, 14, (1024, 24, 16), (768, 12, 12)),
    "ViT-H-14": _clip(1024, 224, 14, (1280, 32, 16), (1024, 24, 16)),
    "ViT-bigG-14": _clip(1280, 224, 14, (1664, 48, 16), (1280, 32, 20), vision_mlp=8192),
}


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI's approximation of GELU; the two differ by at most 0.02."""

    def forward(self, x: Tensor) -> Tensor:
        # SPEED: silu is one fused kernel: half the time, and autograd keeps one tensor less
        return F.silu(1.702 * x) * (1 / 1.702)


class Block(nn.Module):
    """Pre-norm residual block:  x += attn(ln_1(x));  x += mlp(ln_2(x))."""

    def __init__(self, width: int, heads: int, mlp: int, activation: str):
        super().__init__()
        self.attn = MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        gelu = {"quick_gelu": QuickGELU, "gelu": nn.GELU}[activation]()
        layers = [("c_fc", nn.Linear(width, mlp)), ("gelu", gelu), ("c_proj", nn.Linear(mlp, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, kind="qkv", mask: Mask = None, keep_tokens: KeepTokens = None) -> Tensor:
        """(B, L, D) -> (B, L, D), or the selected tokens."""
        x = x + self.attn(self.ln_1(x), kind, mask)  # (B, L, D)
        # SPEED: the MLP treats every token separately, so it only needs the tokens that are used later
        if keep_tokens:
            x = keep_tokens(x)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. With grad_checkpointing each block is recomputed in the backward pass.

    SPEED: forward(x, mask, keep_tokens) equals keep_tokens(forward(x, mask)) but omits the last MLP for the
    other tokens, which is 5 % of the FLOPs of a tower of twelve blocks.
    """

    def __init__(self, width: int, layers: int, heads: int, mlp: int, activation: str):
        super().__init__()
        self.width, self.grad_checkpointing = width, False
        self.resblocks = nn.ModuleList(Block(width, heads, mlp, activation) for _ in range(layers))

    def forward(self, x: Tensor, mask: Mask = None, keep_tokens: KeepTokens = None, before=None) -> Tensor:
        """before(block number, x) -> x changes the input of a block."""
        for number, block in enumerate(self.resblocks):
            x = before(number, x) if before else x
            last = keep_tokens if block is self.resblocks[-1] else None
            x = self.run(block, x, "qkv", mask, last)
        return x  # (B, L, D), or the selected tokens

    def run(self, function: Callable, *arguments):
        """function(*arguments); with grad_checkpointing autograd keeps the arguments only and repeats it."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


def resize_positions(positions: Tensor, extra: int, size: tuple, mode="bicubic", antialias=True) -> Tensor:
    """Interpolates the patch positions of a position embedding to another grid of patches.

    No equation. open_clip (model.py, resize_pos_embed) uses bicubic interpolation with antialias, the default
    here; Hugging Face bicubic without; OpenAI's ViT-L/14@336 and CLIP Surgery bilinear. They differ by 4 to
    23 % on a smooth grid.
    Args:    positions (extra + P, D), P square;  extra: first rows, copied;  size: (rows, columns)
    Returns: (extra + rows * columns, D); `positions` itself if the grid has this size already
    """
    side = math.isqrt(len(positions) - extra)
    if size == (side, side):
        return positions
    grid = at_least_fp32(positions[extra:]).t().reshape(1, -1, side, side)  # (1, D, side, side)
    grid = F.interpolate(grid, size, mode=mode, align_corners=False, antialias=antialias)
    grid = grid.flatten(2)[0].t().to(positions.dtype)  # (rows * columns, D)
    return torch.cat([positions[:extra], grid])  # (extra + rows * columns, D)


class VisionTransformer(nn.Module):
    """The ViT of CLIP: class token, patches row by row, ln_pre, blocks, ln_post, projection.

    Args: tokens: None for one class token with class_embedding (D,); M for Llip's mixture tokens, which have
          class_embedding (M, D) and one position each;  project: False leaves out the projection proj (D, E)
    """

    def __init__(self, config: Config, tokens: int | None = None, project: bool = True):
        super().__init__()
        c, D = config, config.vision_width
        self.image_size, self.patch_size, self.tokens = c.image_size, c.patch_size, tokens or 1
        self.conv1 = nn.Conv2d(3, D, c.patch_size, stride=c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty((D,) if tokens is None else (tokens, D)))
        self.positional_embedding = nn.Parameter(torch.empty(self.tokens + c.patches, D))
        self.ln_pre = nn.LayerNorm(D)
        self.transformer = Transformer(D, c.vision_layers, c.vision_heads, c.vision_mlp, c.activation)
        self.ln_post = nn.LayerNorm(D)
        self.proj = nn.Parameter(torch.empty(D, c.embed_dim)) if project else None

    def embed(self, images: Tensor, mode: str = "bicubic", antialias: bool = True) -> Tensor:
        """The input of the first block: images of any size (B, 3, height, width) -> (B, tokens + P, D)."""
        x = self.conv1(images)  # (B, D, rows, columns)
        size, x = x.shape[-2:], x.flatten(2).transpose(1, 2)  # (B, P, D)
        first = self.class_embedding.to(x.dtype).expand(len(x), self.tokens, -1)  # (B, tokens, D)
        positions = resize_positions(self.positional_embedding, self.tokens, size, mode, antialias)
        x = torch.cat([first, x], 1) + positions.to(x.dtype)  # (B, tokens + P, D)
        return self.ln_pre(x)

    def head(self, x: Tensor) -> Tensor:
        """Applies ln_post and the projection to tokens: (..., D) -> (..., E)."""
        x = self.ln_post(x)
        return x if self.proj is None else x @ self.proj.to(x.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """The projected class token: (B, 3, S, S) -> (B, E)."""
        return self.head(self.transformer(self.embed(images), keep_tokens=lambda x: x[:, 0]))


class DualEncoder(nn.Module):
    """The shared part of CLIP, SigLIP and Llip: text tower, logit scale, and the forward pass.

    conditional      True if the image embedding depends on the caption (Llip)
    takes_captions   True if every text can be scored; learned prompts only score class names

    The parts of the text tower are attributes of this module because OpenAI's parameter names require it.
    Args: scale: initial exp(logit_scale);  bias: initial logit_bias, or None for a model without logit_bias
    """

    conditional, takes_captions = False, True

    def __init__(self, config: Config, visual: nn.Module, scale: float, bias: float | None):
        super().__init__()
        c, D = config, config.text_width
        self.config, self.visual = config, visual
        self.transformer = Transformer(D, c.text_layers, c.text_heads, c.text_mlp, c.activation)
        self.token_embedding = nn.Embedding(c.vocab_size, D)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, D))
        self.ln_final = nn.LayerNorm(D)
        self.text_projection = nn.Parameter(torch.empty(D, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def text_features(self, tokens: Tensor) -> Tensor:
        """Features of the end token, the first with the highest id, after ln_final: (B, L) -> (B, D)."""
        L, context = tokens.shape[-1], self.config.context_length
        if L > context:
            raise ValueError(f"texts of {L} tokens, but the context is {context}")
        return self.text_features_of(self.token_embedding(tokens), tokens.argmax(-1))

    def text_features_of(self, x: Tensor, end: Tensor) -> Tensor:
        """As text_features, from token embeddings (B, L, D) and the index of each end token (B,)."""
        x = x + self.positional_embedding[: x.shape[1]].to(x.dtype)
        row = torch.arange(len(x), device=x.device)
        x = self.transformer(x, "causal", lambda x: x[row, end])  # (B, D)
        return self.ln_final(x)

    def forward(self, images: Tensor, tokens: Tensor, after_text: Callable | None = None) -> tuple:
        """Image and text features. after_text is applied to the text features before images are encoded."""
        text = self.encode_text(tokens)
        text = after_text(text) if after_text else text
        return self.encode_image(images), text

    def class_templates(self, templates: tuple[str, ...]) -> tuple[str, ...]:
        """The prompt templates for evaluation. A model with learned prompts returns its own."""
        return templates

    def scale_logits(self, cosines: Tensor) -> Tensor:
        """exp(logit_scale) * cosines (+ logit_bias)."""
        logits = self.logit_scale.exp() * cosines
        return logits if self.logit_bias is None else logits + self.logit_bias

    def set_image_size(self, size: int) -> None:
        """Interpolates the position embeddings for images of `size` pixels.   Raises: ValueError."""
        if size % self.visual.patch_size:
            raise ValueError(f"images of {size} pixels are not whole patches of {self.visual.patch_size}")
        grid = (size // self.visual.patch_size,) * 2
        positions = resize_positions(self.visual.positional_embedding.detach(), self.visual.tokens, grid)
        self.visual.positional_embedding = nn.Parameter(positions)
        self.visual.image_size, self.config = size, replace(self.config, image_size=size)

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recomputes every block in the backward pass: 1/3 more FLOPs, memory of one block per tower."""
        self.visual.transformer.grad_checkpointing = self.transformer.grad_checkpointing = enabled


class CLIP(DualEncoder):
    """CLIP (Radford et al. 2021, Fig. 3), or with a bias SigLIP. `visual` replaces the usual image tower."""

    def __init__(self, config: Config, scale: float = 1 / 0.07, bias: float | None = None, visual=None):
        super().__init__(config, visual or VisionTransformer(config), scale, bias)
        initialize(self)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, E), not normalised."""
        x = self.text_features(tokens)
        return x @ self.text_projection.to(x.dtype)  # (B, E)

    def pair_logits(self, image_side: Tensor, text_side: Tensor) -> Tensor:
        """exp(logit_scale) * cos (+ logit_bias) of all pairs: (B_img, E), (B_txt, E) -> (B_img, B_txt)."""
        image, text = F.normalize(image_side, dim=-1), F.normalize(text_side, dim=-1)
        return self.scale_logits(image @ text.t())  # (B_img, B_txt)

    def ensemble_text(self, text_side: Tensor, group: Tensor) -> Tensor:
        """Averages the prompts of each class: (N, E) and the class of each prompt (N,) -> (C, E) unit norm.

        Radford et al. 2021, section 3.1.4: normalise, average over the prompts of a class, normalise.
        Raises: ValueError for a class without a prompt.
        """
        return F.normalize(group_mean(F.normalize(text_side, dim=-1), group), dim=-1)


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """Averages the rows of x (N, ...) that have the same group (N,), a number in 0..C-1: (C, ...)."""
    count = torch.bincount(group)  # (C,)
    if (count == 0).any():
        raise ValueError(f"class {int((count == 0).nonzero()[0, 0])} has no prompt")
    total = x.new_zeros(len(count), *x.shape[1:]).index_add(0, group, x)  # (C, ...)
    return total / count.view(-1, *[1] * (x.dim() - 1))


@torch.no_grad()
def initialize(model: DualEncoder) -> None:
    """As in OpenAI's clip/model.py: conv1, the image blocks and every LayerNorm keep PyTorch's defaults."""
    nn.init.normal_(model.token_embedding.weight, std=0.02)
    nn.init.normal_(model.positional_embedding, std=0.01)
    width, layers = model.transformer.width, len(model.transformer.resblocks)
    for block in model.transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)
    visual = model.visual
    for embedding in (visual.class_embedding, visual.positional_embedding):
        nn.init.normal_(embedding, std=embedding.shape[-1] ** -0.5)
    for projection in (model.text_projection, visual.proj):
        if projection is not None:
            nn.init.normal_(projection, std=projection.shape[-2] ** -0.5)


def tower_flops(config: Config, tokens: int = 1, used: int | None = None) -> dict[str, int]:
    """FLOPs of a forward pass of one image and of one text, counted as in attention.flops.

    Args: tokens: class or mixture tokens;  used: image tokens that leave the tower, default `tokens`. Only
          these go through the last MLP and the projection.
    """
    c, used = config, used or tokens

    def tower(length, used, layers, width, heads, mlp):
        attention = layers * attention_flops("qkv", length, width, heads)
        mlps = ((layers - 1) * length + used) * 2 * 2 * width * mlp
        return attention + mlps + 2 * used * width * c.embed_dim

    patchify = 2 * c.patches * 3 * c.patch_size**2 * c.vision_width
    image = tower(tokens + c.patches, used, c.vision_layers, c.vision_width, c.vision_heads, c.vision_mlp)
    text = tower(c.context_length, 1, c.text_layers, c.text_width, c.text_heads, c.text_mlp)
    return {"image": patchify + image, "text": text}
