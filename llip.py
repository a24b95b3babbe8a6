"""Llip: an image is encoded as M mixture tokens, and each caption mixes them in its own way.

Lavoie et al. 2024, "Modeling Caption Diversity in Contrastive Vision-Language Pretraining"
(arXiv:2405.00740, PMLR 235), section 3. Image i, caption j; m counts heads and k counts mixture tokens:

    h_i = ViT([M mixture tokens, patches])[:M]             one learned token and position per mixture token
    K_i[k] = h_i[k] W_K[k],  V_i[k] = h_i[k] W_V[k]        every mixture token has its own two matrices
    Q_j = h_j W_Q,           t_j = h_j W_T                 h_j: the text feature before any projection
    Phi_ijk^m = softmax_k(Q_j^m . K_ik^m / tau)            eq. 1; tau is fixed, and no 1/sqrt(head width)
    z_ij = concat_m(sum_k Phi_ijk^m V_ik^m) W_O            eq. 2
    logits_ij = exp(a) cos(z_ij, t_j) + b                  under losses.siglip, eq. 3

Training and evaluation call Llip.mixing_weights, mix and pair_logits. For large batches scale/llip_tiles.py
computes the same logits without storing z. The layout is that of the released checkpoints.
    REF: eq. 3 is printed without its minus sign and with -b; losses.siglip has the intended form.
    REF: the paper says that a larger tau is sharper; under its own eq. 1, and in the code, it is softer.
    REF: the released code starts a at ln(1/0.07), the paper at ln 10 as SigLIP does: ln 10 here.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import siglip
from model import CLIP, Config, DualEncoder, VisionTransformer, group_mean, initialize, tower_flops

PLAIN_BYTES = 256 << 20  # the plain form holds at most so many bytes of pairs where no gradient is needed


def mixture_tokens(visual: VisionTransformer, images: Tensor, all_tokens: bool = False) -> Tensor:
    """The mixture tokens after ln_post: (B, 3, S, S) -> (B, M, D), or (B, M + P, D) with all_tokens."""
    used = None if all_tokens else visual.tokens
    return visual.ln_post(visual.transformer(visual.embed(images), keep_tokens=lambda x: x[:, :used]))


def project_each(x: Tensor, weight: Tensor) -> Tensor:
    """Every token through its own matrix: (B, M, D), (M, D, E) -> (B, M, E)."""
    return torch.einsum("bmd,mde->bme", x, weight.to(x.dtype))


class Llip(DualEncoder):
    """CLIP whose image embedding depends on the caption (Lavoie et al. 2024, section 3; equations above).

    mixture_tokens  M, the number of learned tokens in front of the patches
    heads           H, the heads of the pooling. Raises: ValueError if H does not divide the embedding E
    temperature     tau of eq. 1, fixed. The released models use 5 (B, H, G) and 1 (L); on B/32 all from 1 to
                    8 work equally well. sqrt(head width) is ordinary attention scaling.
    norm            LayerNorm over E on keys, values and queries, before the heads (released H/14 and G/14)
    all_tokens      the patches are keys and values too, each with its own W_K and W_V (Fig. 7)
    scale, bias     starts of exp(logit_scale) and logit_bias. PAPER: 10 and -10, as SigLIP
    Cost: a pair takes 4 M E + 2 E^2 FLOPs, mostly W_O. A caption sends 2 E numbers to each other rank. W_K
    and W_V have 2 M D E parameters: B/32 grows from 151 to 202 million at M = 64.
    PAPER: "without changing the model size" would need one W_K and W_V for all tokens (152 million).
    REF: the official class fails for M = 1. Here M = 1 is SigLIP with one more projection.
    """

    conditional = True

    def __init__(
        self,
        config: Config,
        mixture_tokens: int,
        heads: int,
        temperature: float = 5.0,
        norm: bool = False,
        all_tokens: bool = False,
        scale: float = 10.0,
        bias: float = -10.0,
    ):
        if config.embed_dim % heads:
            raise ValueError(f"embedding {config.embed_dim} is not divisible by {heads} heads")
        super().__init__(config, VisionTransformer(config, mixture_tokens, project=False), scale, bias)
        D, E = config.vision_width, config.embed_dim
        self.heads, self.temperature, self.all_tokens = heads, float(temperature), all_tokens
        tokens = mixture_tokens + config.patches * all_tokens
        self.k_proj = nn.Parameter(torch.randn(tokens, D, E) * D**-0.5)
        self.v_proj = nn.Parameter(torch.randn(tokens, D, E) * D**-0.5)
        self.q_proj = nn.Parameter(torch.randn(config.text_width, E) * config.text_width**-0.5)
        self.pred = nn.ParameterDict({"out_proj": torch.randn(E, E) * E**-0.5})  # W_O
        self.K_norm, self.V_norm, self.Q_norm = (nn.LayerNorm(E) if norm else nn.Identity() for _ in range(3))
        initialize(self)

    def split(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., H, K)"""
        return x.unflatten(-1, (self.heads, -1))

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> keys and values, each (B, H, M, K)."""
        x = mixture_tokens(self.visual, images, self.all_tokens)  # (B, M, D)
        keys = self.K_norm(project_each(x, self.k_proj))  # (B, M, E)
        values = self.V_norm(project_each(x, self.v_proj))  # (B, M, E)
        return self.split(keys).transpose(1, 2), self.split(values).transpose(1, 2)  # (B, H, M, K)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) -> queries (B, H, K) and text features (B, E), not normalised."""
        x = self.text_features(tokens)  # (B, D)
        queries = self.split(self.Q_norm(x @ self.q_proj.to(x.dtype)))  # (B, H, K)
        return queries, x @ self.text_projection.to(x.dtype)  # (B, E)

    def mixing_weights(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Phi, eq. 1: (B_img, H, M, K), (B_txt, H, K) -> (B_img, B_txt, H, M); sums to 1 over M."""
        scores = torch.einsum("ihmk,jhk->ijhm", keys, queries)  # (B_img, B_txt, H, M)
        return (scores / self.temperature).softmax(-1)

    def mix(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """z, eq. 2: every image seen through every caption, (B_img, B_txt, E), not normalised."""
        phi = self.mixing_weights(keys, queries)
        y = torch.einsum("ijhm,ihmk->ijhk", phi, values)  # (B_img, B_txt, H, K)
        return y.flatten(2) @ self.pred.out_proj  # (B_img, B_txt, E)

    def pair_logits(self, image_side: tuple, text_side: tuple) -> Tensor:
        """Logits of all pairs, eq. 3: (B_img, B_txt). Without a gradient, z stays below PLAIN_BYTES."""
        (keys, values), (queries, text) = image_side, text_side
        texts = len(text)
        if not torch.is_grad_enabled():
            texts = max(1, PLAIN_BYTES // plain_bytes(self, len(keys), 1))
        parts = []
        for q, t in zip(queries.split(texts), text.split(texts)):
            z = F.normalize(self.mix(keys, values, q), dim=-1)  # (B_img, b, E)
            parts.append(torch.einsum("ije,je->ij", z, F.normalize(t, dim=-1)))  # (B_img, b)
        return self.scale_logits(parts[0] if len(parts) == 1 else torch.cat(parts, 1))  # (B_img, B_txt)

    def ensemble_text(self, text_side: tuple, group: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts to classes: the mean of the queries, and of the normalised text features.

        PAPER: appendix A, "we average the text predictions and the cross-attention queries".
        Args: queries (N, H, K), text (N, E), class of each prompt (N,).  Returns: (C, H, K), (C, E) unit.
        """
        queries, text = text_side
        text = group_mean(F.normalize(text, dim=-1), group)  # (C, E)
        return group_mean(queries, group), F.normalize(text, dim=-1)


def plain_bytes(model: Llip, images: int, texts: int) -> int:
    """Bytes of the plain form: scores and weights (H M each), y, y with joined heads, z, unit z (E each)."""
    return 4 * images * texts * (2 * model.heads * len(model.k_proj) + 4 * model.config.embed_dim)


class PooledTokens(CLIP):
    """The ladder between SigLIP and Llip: M tokens, pooled without the caption.

    Lavoie et al. 2024, Fig. 3. Token k has its own projection, visual.proj[k] (D, E).
        register   token 0 only; the other tokens only take part in the attention of the tower
        average    the mean over the tokens
        learned    cross-attention, one learned query for all images; visual.proj makes the values
    Cost: FLOPs of an image, after the tower of M tokens: register 2 D E, average 2 M D E, learned
    4 M D E + 4 M E + 2 E^2. A pair takes 2 E, as CLIP's.   Raises: ValueError for another pooling.
    """

    def __init__(
        self,
        config: Config,
        mixture_tokens: int,
        pooling: str = "average",
        heads: int = 8,
        temperature: float = 5.0,
        scale: float = 10.0,
        bias: float | None = -10.0,
    ):
        if pooling not in ("register", "average", "learned"):
            raise ValueError(f"pooling {pooling!r}: expected register, average or learned")
        D, E = config.vision_width, config.embed_dim
        visual = VisionTransformer(config, mixture_tokens, project=False)
        visual.proj = nn.Parameter(torch.empty(mixture_tokens, D, E))
        super().__init__(config, scale, bias, visual)
        self.pooling, self.heads, self.temperature = pooling, heads, float(temperature)
        if pooling == "learned":
            self.k_proj = nn.Parameter(torch.randn(mixture_tokens, D, E) * D**-0.5)
            self.query = nn.Parameter(torch.randn(E))
            self.pred = nn.ParameterDict({"out_proj": torch.randn(E, E) * E**-0.5})  # W_O

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E), not normalised."""
        x = mixture_tokens(self.visual, images)  # (B, M, D)
        if self.pooling == "register":
            # SPEED: one product. The other projections get the gradient 0 and not None: DDP would fail
            return x[:, 0] @ self.visual.proj[0].to(x.dtype)  # (B, E)
        values = project_each(x, self.visual.proj)  # (B, M, E)
        if self.pooling == "average":
            return values.mean(1)  # (B, E)
        keys = project_each(x, self.k_proj).unflatten(-1, (self.heads, -1))  # (B, M, H, K)
        query = self.query.view(self.heads, -1).to(keys.dtype)  # (H, K)
        phi = (torch.einsum("bmhk,hk->bmh", keys, query) / self.temperature).softmax(1)  # (B, M, H)
        y = torch.einsum("bmh,bmhk->bhk", phi, values.unflatten(-1, (self.heads, -1)))  # (B, H, K)
        return y.flatten(1) @ self.pred.out_proj.to(y.dtype)  # (B, E)


@torch.no_grad()
def warm_start_llip(
    clip: CLIP, mixture_tokens: int, heads: int, temperature=5.0, norm=False, scale=None, bias=-10, noise=0.1
) -> Llip:
    """A Llip that starts from the towers of a CLIP, with every mixture token near the class token.

    No equation: the paper trains from scratch. Every mixture token starts as the class token with its
    position, v_proj[k] as visual.proj, W_O as I, W_K and W_Q at random: z is near CLIP's image feature.
    TRAP: equal tokens would stay equal: noise, in standard deviations of the class token, separates them.
    Args: scale, bias: starts of exp(logit_scale), None for CLIP's value, and of logit_bias
    """
    if type(clip) is not CLIP:
        raise ValueError(f"a warm start takes a CLIP, not a {type(clip).__name__}")
    with torch.device("meta"):
        model = Llip(clip.config, mixture_tokens, heads, temperature, norm)
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor.float().cpu().clone() for name, tensor in clip.state_dict().items()}
    first, proj = state["visual.class_embedding"], state.pop("visual.proj")  # (D,), (D, E)
    positions = state["visual.positional_embedding"]  # (1 + P, D)
    jitter = torch.randn(mixture_tokens, len(first), generator=generator) * noise * first.std()
    state["visual.class_embedding"] = first + jitter  # (M, D)
    copies = positions[:1].expand(mixture_tokens, -1)
    state["visual.positional_embedding"] = torch.cat([copies, positions[1:]])  # (M + P, D)
    state["v_proj"] = proj.repeat(mixture_tokens, 1, 1)  # (M, D, E)
    for name in ("k_proj", "q_proj"):
        shape = model.get_parameter(name).shape
        state[name] = torch.randn(shape, generator=generator) * shape[-2] ** -0.5
    state["pred.out_proj"] = torch.eye(proj.shape[1])
    for name in ("K_norm", "V_norm", "Q_norm") if norm else ():
        state |= {f"{name}.weight": torch.ones(proj.shape[1]), f"{name}.bias": torch.zeros(proj.shape[1])}
    if scale is not None:
        state["logit_scale"] = torch.tensor(math.log(scale))
    state["logit_bias"] = torch.tensor(float(bias))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().to(clip.logit_scale.device).train(clip.training)


def flops(config: Config, tokens: int, prompts: int = 0, all_tokens: bool = False) -> dict[str, int]:
    """FLOPs of Llip for one image, one text, and one image against the given number of prompts.

    Two per multiply-add. "pairs": scores, mix and W_O of the plain form; llip_tiles.flops has the tiled one.
    """
    c, used = config, tokens + config.patches * all_tokens
    tower = tower_flops(c, tokens, used)
    return {
        # tower_flops counts one projection per token; k_proj and v_proj are two
        "image": tower["image"] + 2 * used * c.vision_width * c.embed_dim,
        "text": tower["text"] + 2 * c.text_width * c.embed_dim,
        "pairs": prompts * (4 * used * c.embed_dim + 2 * c.embed_dim**2),
    }


@dataclass(frozen=True)
class Settings:
    # Llip
    mixture_tokens: int = 8  # mixture tokens M
    mixture_heads: int = 4  # heads of the pooling
    temperature: float = 5.0  # tau of eq. 1; larger is softer
    mixture_norm: bool = False  # LayerNorm on keys, values and queries
    all_tokens: bool = False  # patches are keys and values too
    pooling: str = "text"  # text; or without the text, the ladder of Fig. 3: register average learned
    pairs: str = "auto"  # how pairs are computed: plain (eq. 1 to 3), tiled, or auto by memory
    # loss
    objective: str = "siglip"  # infonce or siglip
    logit_scale: float = 0.0  # start of exp(logit_scale); 0: 1/0.07 for infonce, 10 for siglip
    logit_bias: float = math.nan  # start of the bias; nan: -ln(batch - 1), at least -10


def start_of_scale(objective: str, given: float) -> float:
    """exp(logit_scale) at the start: the given one, or that of the objective's paper."""
    return given or (10.0 if objective == "siglip" else 1 / 0.07)


def start_of_bias(given: float, batch_size: int) -> float:
    """logit_bias at the start. PAPER: SigLIP's -10 is the log-odds of one pair among 22,000."""
    return max(-10.0, -math.log(max(batch_size - 1, 1))) if math.isnan(given) else given


def paper(model: str, lr: float, **changes) -> dict:
    """Flags of the paper's runs (facebookresearch/Llip@d5649c3): 12.8 billion samples in all."""
    run = dict(model=model, lr=lr, batch_size=32768, steps=390625, warmup=2000, beta2=0.95, eps=1e-6)
    run |= dict(weight_decay=0.2, precision="bf16", compile=True, workers=8, log_every=100, save_every=1000)
    return run | changes


_BIG = dict(mixture_norm=True, grad_checkpointing=True, compile=False)
DEFAULTS, TINY = {}, {}
# Lavoie et al. 2024, Table 1: MetaCLIP's 2.5 billion pairs on 128 V100 (B) or A100 (L). Zero-shot ImageNet
# top-1 at the end: 70.4, 75.3, 80.9, 82.7, 83.5. REF: 75.3 is with 64 tokens, the released B/16 has 32
PRESETS = {
    "llip-B-32": paper("ViT-B-32", 5e-4, mixture_tokens=64, mixture_heads=8),
    "llip-B-16": paper("ViT-B-16", 5e-4, mixture_tokens=32, mixture_heads=8),
    "llip-L-14": paper("ViT-L-14", 4e-4, mixture_tokens=32, mixture_heads=8, temperature=1.0),
    "llip-H-14": paper("ViT-H-14", 4e-4, mixture_tokens=64, mixture_heads=8, **_BIG),
    "llip-G-14": paper("ViT-bigG-14", 4e-4, mixture_tokens=64, mixture_heads=8, **_BIG),
}
TASK = "pairs"


def build(settings: Settings, start: Config | nn.Module, batch_size: int) -> DualEncoder:
    """The dual encoder that is trained.

    Args:   start: sizes, for random weights, or a loaded CLIP or Llip;  batch_size: pairs over all ranks
    Raises: ValueError for a variant that cannot start from a checkpoint, and for one that does not exist.
    """
    s = settings
    if s.pooling != "text" and s.all_tokens:
        raise ValueError("--all-tokens: only with --pooling text")
    numbers = dict(scale=start_of_scale(s.objective, s.logit_scale))
    numbers |= dict(bias=start_of_bias(s.logit_bias, batch_size), temperature=s.temperature)
    if isinstance(start, Config) and s.pooling != "text":
        return PooledTokens(start, s.mixture_tokens, s.pooling, s.mixture_heads, **numbers)
    numbers |= dict(heads=s.mixture_heads, norm=s.mixture_norm)
    if isinstance(start, Config):
        return Llip(start, s.mixture_tokens, all_tokens=s.all_tokens, **numbers)
    if s.pooling != "text" or s.all_tokens:
        raise ValueError("--pooling and --all-tokens train from scratch: leave out --init")
    return start if isinstance(start, Llip) else warm_start_llip(start, s.mixture_tokens, **numbers)


if __name__ == "__main__":
    # two images, two captions, three tokens, one head of width 2; docs/papers.md explains the numbers
    model = Llip(Config(2, 8, 8, 2, 1, 1, 2, 8, 50, 2, 1, 1, 2), 3, heads=1, temperature=1.0)
    model.pred.out_proj.data = torch.eye(2)
    text, queries = torch.eye(2), torch.eye(2)[:, None]  # of "a dog" and "on snow"
    keys = torch.tensor([[[2.0, 0], [0, 2], [0, 0]], [[1, 0], [0, 1], [0, 0]]])[:, None]  # (2, 1, 3, 2)
    values = torch.tensor([[[2.0, 0], [0, -1], [0, 0]], [[-1, 1], [0, 2], [0.5, 0]]])[:, None]
    phi, z = model.mixing_weights(keys, queries), model.mix(keys, values, queries)
    cosines = torch.einsum("ije,je->ij", F.normalize(z, dim=-1), text)
    logits = model.pair_logits((keys, values), (queries, text))
    print("image caption   Phi, eq. 1: three tokens        z, eq. 2     cos(z, t)   logit")
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row = [*phi[i, j, 0], *z[i, j], cosines[i, j], logits[i, j]]
        print(f"{i + 1:5} {j + 1:7}    " + "".join(f"{x:9.3f}" for x in row))
    print(f"loss, eq. 3: {siglip(logits):.3f}")
