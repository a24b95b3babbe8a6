"""CLIP written out by hand: a vision transformer, a text transformer, and the two of them as CLIP.

Radford et al. 2021 (arXiv:2103.00020), sections 2.4-2.5; Dosovitskiy et al. 2021 (arXiv:2010.11929).
Parameters and submodules carry the names of OpenAI's state dict, so weights load without a map.
This file never learns the name of a method: Llip and the fine-tuning methods wrap it from outside.

Every dual encoder offers   encode_image(images) -> image side     encode_text(tokens) -> text side
                            pair_logits(image_side, text_side)     ensemble_text(text_side, group)
For CLIP a side is a tensor, for Llip a tuple of tensors.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import MultiheadAttention
from attention import flops as attention_flops


@dataclass(frozen=True)
class Config:
    """The sizes of a dual encoder. Heads and the activation are not in the shapes of a checkpoint."""

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
    activation: str = "quick_gelu"  # or "gelu": TRAP: the wrong one loads without a murmur

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def _clip(embed, size, patch, vision, text, vision_mlp=None, activation="quick_gelu") -> Config:
    """Config from (width, layers, heads) of either tower; the MLP is 4 times as wide unless given."""
    return Config(
        embed, size, patch, *vision, vision_mlp or 4 * vision[0], 77, 49408, *text, 4 * text[0], activation
    )


# Heads: width // 64 in OpenAI's files, but 80 wide in ViT-H and 104 wide in bigG (open_clip model_configs).
CONFIGS = {
    # a laptop learns it in two minutes; the vocabulary is learned from the captions, vocab_size is replaced
    "tiny": Config(64, 32, 8, 64, 3, 4, 256, 32, 1024, 64, 2, 4, 256),
    # Flickr8k and the like on a CPU
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
    """x * sigmoid(1.702 x), OpenAI's approximation of GELU. Differs by 0.02 at most: silently wrong."""

    def forward(self, x: Tensor) -> Tensor:
        # SPEED: the same number by one fused kernel: half the time, and one tensor less for autograd to keep
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

    def forward(
        self,
        x: Tensor,
        kind: str = "qkv",
        mask: Tensor | str | None = None,
        need_weights: bool = False,
        keep_tokens: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y = self.attn(self.ln_1(x), kind, mask, need_weights)
        y, attn = y if need_weights else (y, None)
        x = x + y
        if keep_tokens:  # the tokens that are used after the last block; its MLP acts on each token alone
            x = keep_tokens(x)
        x = x + self.mlp(self.ln_2(x))  # (B, L, D)
        return (x, attn) if need_weights else x


class Transformer(nn.Module):
    """A stack of blocks; grad_checkpointing recomputes each block in the backward pass.

    SPEED: forward(x, mask, keep_tokens) is keep_tokens(forward(x, mask)) without the last MLP of the
    other tokens: a twentieth less in a tower of twelve blocks.
    """

    def __init__(self, width: int, layers: int, heads: int, mlp: int, activation: str):
        super().__init__()
        self.width, self.grad_checkpointing = width, False
        self.resblocks = nn.ModuleList(Block(width, heads, mlp, activation) for _ in range(layers))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | str | None = None,
        keep_tokens: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        for block in self.resblocks:
            last = keep_tokens if block is self.resblocks[-1] else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, "qkv", mask, False, last, use_reentrant=False)
            else:
                x = block(x, mask=mask, keep_tokens=last)
        return x  # (B, L, D), or the tokens that keep_tokens selected


def resize_positions(
    positions: Tensor, extra: int, size: tuple[int, int], mode: str = "bicubic", antialias: bool = True
) -> Tensor:
    """Interpolates the patch rows of a position embedding to another grid; the parameter is not touched.

    No equation. Codes differ: open_clip bicubic with antialias (the default here), Hugging Face without,
    OpenAI's own ViT-L/14@336 and CLIP Surgery bilinear; 4 to 23 % apart on a smooth grid.
    Args:    positions (extra + P, D), P a square;  extra: rows that belong to no patch, kept as they are
             size: (rows, columns) of the new grid
    Returns: (extra + rows * columns, D); the given tensor itself when the grid does not change.
    """
    side = math.isqrt(len(positions) - extra)
    if size == (side, side):
        return positions
    grid = positions[extra:].float().t().reshape(1, -1, side, side)  # (1, D, side, side)
    grid = F.interpolate(grid, size, mode=mode, align_corners=False, antialias=antialias)
    grid = grid.flatten(2)[0].t().to(positions.dtype)  # (rows * columns, D)
    return torch.cat([positions[:extra], grid])  # (extra + rows * columns, D)


class VisionTransformer(nn.Module):
    """ViT of CLIP: class token(s) before the patches, ln_pre, blocks, ln_post, projection.

    tokens = 1 is CLIP's class token, class_embedding (D,). Several are Llip's mixture tokens,
    class_embedding (tokens, D), each with a position of its own. proj (D, E), or None without projection.
    """

    def __init__(self, config: Config, tokens: int | None = None, project: bool = True):
        super().__init__()
        c, D = config, config.vision_width
        self.image_size, self.patch_size, self.tokens = c.image_size, c.patch_size, tokens or 1
        self.conv1 = nn.Conv2d(3, D, c.patch_size, stride=c.patch_size, bias=False)
        shape = (D,) if tokens is None else (tokens, D)
        self.class_embedding = nn.Parameter(torch.empty(shape))
        self.positional_embedding = nn.Parameter(torch.empty(self.tokens + c.patches, D))
        self.ln_pre = nn.LayerNorm(D)
        self.transformer = Transformer(D, c.vision_layers, c.vision_heads, c.vision_mlp, c.activation)
        self.ln_post = nn.LayerNorm(D)
        self.proj = nn.Parameter(torch.empty(D, c.embed_dim)) if project else None

    def embed(self, images: Tensor, mode: str = "bicubic", antialias: bool = True) -> Tensor:
        """Images (B, 3, height, width) to the first residual stream (B, tokens + P, D), ln_pre included.

        Any height and width of at least one patch: positions are interpolated for another grid.
        """
        x = self.conv1(images)  # (B, D, rows, columns)
        size = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)  # (B, P, D)
        first = self.class_embedding.to(x.dtype).expand(len(x), self.tokens, -1)  # (B, tokens, D)
        positions = resize_positions(self.positional_embedding, self.tokens, size, mode, antialias)
        x = torch.cat([first, x], 1) + positions.to(x.dtype)  # (B, tokens + P, D)
        return self.ln_pre(x)

    def head(self, x: Tensor) -> Tensor:
        """ln_post and projection of any tokens: (..., D) -> (..., E)."""
        x = self.ln_post(x)
        return x if self.proj is None else x @ self.proj.to(x.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E), the class token's projection."""
        return self.head(self.transformer(self.embed(images), keep_tokens=lambda x: x[:, 0]))


class DualEncoder(nn.Module):
    """What CLIP, SigLIP and Llip share: the text tower, the scale, and the call that DDP wraps.

    conditional      whether an image's embedding depends on the caption (Llip)
    takes_captions   whether any text can be scored; learned prompts score names of classes only

    The text tower's parts are attributes of the model itself and not of a submodule: OpenAI's names.
    logit_scale is the log of the inverse temperature; logit_bias exists only where bias is not None.
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
        """Token ids (B, L) to the end token's feature (B, D) after ln_final, before any projection.

        The end token has the highest id of the vocabulary, and the first one found counts.
        Raises: ValueError for more tokens than the context; fewer are the cheaper way to the same number.
        """
        if tokens.shape[-1] > self.config.context_length:
            raise ValueError(
                f"texts of {tokens.shape[-1]} tokens, but the context is {self.config.context_length}"
            )
        return self.text_features_of(self.token_embedding(tokens), tokens.argmax(-1))

    def text_features_of(self, x: Tensor, end: Tensor) -> Tensor:
        """Token embeddings (B, L, D) and the place of each end token (B,) to features (B, D)."""
        x = x + self.positional_embedding[: x.shape[1]].to(x.dtype)
        row = torch.arange(len(x), device=x.device)
        x = self.transformer(x, "causal", lambda x: x[row, end])  # (B, D) no looking ahead
        return self.ln_final(x)

    def forward(self, images: Tensor, tokens: Tensor, after_text: Callable | None = None) -> tuple:
        """Both sides of a batch; DistributedDataParallel wraps this call.

        after_text(text features) replaces the text features; it may start work that runs while images
        are encoded.
        """
        text = self.encode_text(tokens)
        text = after_text(text) if after_text else text
        return self.encode_image(images), text

    def class_templates(self, templates: tuple[str, ...]) -> tuple[str, ...]:
        """The prompt templates to evaluate with; learned prompts replace the given ones."""
        return templates

    def scale_logits(self, cosines: Tensor) -> Tensor:
        """exp(logit_scale) * cosines (+ logit_bias)."""
        logits = self.logit_scale.exp() * cosines
        return logits if self.logit_bias is None else logits + self.logit_bias

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute every block in the backward pass: one third more FLOPs, 1/layers of the memory."""
        self.visual.transformer.grad_checkpointing = enabled
        self.transformer.grad_checkpointing = enabled


class CLIP(DualEncoder):
    """CLIP; with a bias, the same towers under SigLIP's sigmoid loss.

    Radford et al. 2021, Fig. 3:  logits = exp(t) * cos(image, text)
    Args: scale: start of exp(logit_scale), 1/0.07 as Radford et al.;  bias: start of logit_bias or None
    """

    def __init__(self, config: Config, scale: float = 1 / 0.07, bias: float | None = None):
        super().__init__(config, self.build_visual(config), scale, bias)
        initialize(self)

    def build_visual(self, config: Config) -> nn.Module:
        return VisionTransformer(config)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, E), not normalised."""
        x = self.text_features(tokens)
        return x @ self.text_projection.to(x.dtype)  # (B, E)

    def pair_logits(self, image_side: Tensor, text_side: Tensor) -> Tensor:
        """exp(logit_scale) * cos (+ logit_bias) of every pair: (B_img, E), (B_txt, E) -> (B_img, B_txt)."""
        image, text = F.normalize(image_side, dim=-1), F.normalize(text_side, dim=-1)
        return self.scale_logits(image @ text.t())  # (B_img, B_txt)

    def ensemble_text(self, text_side: Tensor, group: Tensor) -> Tensor:
        """Prompts to classes: (N, E) and the class of each prompt (N,) -> (C, E) unit norm.

        Radford et al. 2021, section 3.1.4: normalise, average over the class's prompts, normalise.
        """
        return F.normalize(group_mean(F.normalize(text_side, dim=-1), group), dim=-1)


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """Mean of the rows of x (N, ...) that share a group (N,) in 0..C-1: (C, ...).

    Raises: ValueError if a group between 0 and the largest has no row.
    """
    count = torch.bincount(group)  # (C,)
    if (count == 0).any():
        raise ValueError(f"class {int((count == 0).nonzero()[0, 0])} has no prompt")
    total = x.new_zeros(len(count), *x.shape[1:]).index_add(0, group, x)  # (C, ...)
    return total / count.view(-1, *[1] * (x.dim() - 1))


@torch.no_grad()
def initialize(model: DualEncoder) -> None:
    """Random start of every parameter, in one place.

    | parameter                              | distribution                       | source                 |
    | token_embedding                        | N(0, 0.02)                         | OpenAI clip/model.py   |
    | positional_embedding (text)            | N(0, 0.01)                         | OpenAI                 |
    | text blocks: in_proj, out_proj         | N(0, D^-1/2), N(0, (2 L D)^-1/2)   | OpenAI; L = layers     |
    | text blocks: c_fc, c_proj              | N(0, (2 D)^-1/2), N(0, (2 L D)^-1/2)| OpenAI                |
    | class and image position embeddings    | N(0, D^-1/2)                       | OpenAI                 |
    | projections (any (..., D, E))          | N(0, D^-1/2)                       | OpenAI; Llip           |
    | image blocks, conv1, every LayerNorm   | PyTorch's defaults                 | OpenAI                 |
    """
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
    """FLOPs of one forward pass of one image and one text (two per multiply-add; LayerNorm, softmax no).

    Equals torch's FlopCounterMode. tokens: class or mixture tokens;  used: image tokens that leave the tower,
    these unless given; only they go through the last block's MLP, and the head projects them.
    """
    c, used = config, used or tokens

    def tower(length, layers, width, heads, mlp, used):
        attention, each = attention_flops("qkv", length, width, heads), 2 * 2 * width * mlp
        mlps = (layers - 1) * length + used  # tokens through one
        return layers * attention + mlps * each + 2 * used * width * c.embed_dim

    patchify = 2 * c.patches * 3 * c.patch_size**2 * c.vision_width
    vision = (c.vision_layers, c.vision_width, c.vision_heads, c.vision_mlp)
    text = (c.text_layers, c.text_width, c.text_heads, c.text_mlp)
    return {
        "image": patchify + tower(tokens + c.patches, *vision, used),
        "text": tower(c.context_length, *text, 1),
    }
