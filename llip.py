"""Llip: an image is encoded as M mixture tokens, and each caption picks its own mixture of them.

Lavoie et al. 2024, "Modeling Caption Diversity in Contrastive Vision-Language Pretraining"
(arXiv:2405.00740, PMLR 235), section 3; heads m, mixture tokens k, image i, caption j:

    h_i = ViT([M mixture tokens, patches])[:M]             one learned token and position per mixture token
    K_i[k] = h_i[k] W_K[k],  V_i[k] = h_i[k] W_V[k]        a matrix of its own for every mixture token
    Q_j = h_j W_Q,           t_j = h_j W_T                 h_j: the text feature before any projection
    Phi_ijk^m = softmax_k(Q_j^m . K_ik^m / tau)            eq. 1; tau fixed, no 1/sqrt(K)
    z_ij = concat_m(sum_k Phi_ijk^m V_ik^m) W_O            eq. 2
    logits_ij = exp(a) cos(z_ij, t_j) + b                  under losses.siglip, eq. 3

Written from the paper's equations. What the paper leaves open follows the released checkpoints' layout.
    REF: eq. 3 is printed without its minus sign and with -b; losses.siglip has the form that is meant.
    REF: the paper says a larger tau is sharper; with its own eq. 1 (and in the code) it is softer.
    REF: the released code starts a at ln(1/0.07), the paper at ln 10 as SigLIP does: ln 10 here.
Under several processes only queries and text features travel; an image's M keys and values never do.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import CLIP, Config, DualEncoder, VisionTransformer, group_mean, initialize, tower_flops
from scale import llip_tiles as tiles


def mixture_tokens(visual: VisionTransformer, images: Tensor, all_tokens: bool = False) -> Tensor:
    """(B, 3, S, S) -> (B, M, D): the mixture tokens of the last layer, or with all_tokens (B, M + P, D).

    One LayerNorm (ln_post) serves all of them.
    """
    used = None if all_tokens else visual.tokens
    return visual.ln_post(visual.transformer(visual.embed(images), keep_tokens=lambda x: x[:, :used]))


def project_each(x: Tensor, weight: Tensor) -> Tensor:
    """Every token through a matrix of its own: (B, M, D), (M, D, E) -> (B, M, E); or a shared (D, E)."""
    weight = weight.to(x.dtype)
    return x @ weight if weight.dim() == 2 else torch.einsum("bmd,mde->bme", x, weight)  # (B, M, E)


class Mixer(nn.Module):
    """Holds W_O under the released checkpoints' name pred.out_proj."""

    def __init__(self, width: int):
        super().__init__()
        self.out_proj = nn.Parameter(torch.randn(width, width) * width**-0.5)


class Llip(DualEncoder):
    """Llip over a CLIP configuration.

    Lavoie et al. 2024, section 3; parameter names of the released checkpoints.
    Args:   mixture_tokens M;  heads H of the pooling, E divisible by H
            temperature: tau of eq. 1, fixed. REF: the released configurations have 5 (B, H, G) and 1 (L);
            the paper's sweep on B/32 is flat from 1 to 8. A head's logits have variance K at the start, so
            tau = sqrt(K) is the usual attention scaling.
            norm: LayerNorm on keys, values and queries, as in the released H/14 and G/14
            all_tokens: patches serve as keys and values too (Fig. 7)
            shared: one W_K and one W_V for all tokens: far fewer parameters, and not what was published
            scale, bias: starts of exp(logit_scale) and logit_bias. PAPER: 10 and -10, as SigLIP; for
            small batches of N pairs -ln(N - 1) is the better start.
    Cost:   a pair costs 4 M E + 2 E^2 FLOPs as written above, mostly W_O; tiles.flops as computed.
            An image sends nothing, a caption 2 E numbers to each other rank. W_K and W_V are 2 M D E
            parameters: B/32 grows from 151 to 202 M at M = 64, 50 M of them here.
            PAPER: "without changing the model size" is not to be taken literally; shared=True has 152 M.
            REF: M = 1 fails in the official class. Here it is SigLIP with one more projection, since a
            softmax over one token is 1.
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
        shared: bool = False,
        scale: float = 10.0,
        bias: float = -10.0,
    ):
        if config.embed_dim % heads:
            raise ValueError(f"embedding {config.embed_dim} is not divisible by {heads} heads")
        super().__init__(config, VisionTransformer(config, mixture_tokens, project=False), scale, bias)
        D, E = config.vision_width, config.embed_dim
        self.heads, self.temperature, self.all_tokens = heads, float(temperature), all_tokens
        tokens = mixture_tokens + config.patches * all_tokens
        shape = (D, E) if shared else (tokens, D, E)
        self.k_proj = nn.Parameter(torch.randn(shape) * D**-0.5)
        self.v_proj = nn.Parameter(torch.randn(shape) * D**-0.5)
        self.q_proj = nn.Parameter(torch.randn(config.text_width, E) * config.text_width**-0.5)
        self.pred = Mixer(E)
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
        """Every image seen through every caption, eq. 2: z (B_img, B_txt, E), not normalised."""
        phi = self.mixing_weights(keys, queries)
        y = torch.einsum("ijhm,ihmk->ijhk", phi, values)  # (B_img, B_txt, H, K)
        return y.flatten(2) @ self.pred.out_proj  # (B_img, B_txt, E)

    def pair_cosines(self, keys: Tensor, values: Tensor, queries: Tensor, text: Tensor) -> Tensor:
        """cos(z_ij, t_j) of every pair, in one piece: (B_img, B_txt)."""
        z = F.normalize(self.mix(keys, values, queries), dim=-1)  # (B_img, B_txt, E)
        return torch.einsum("ije,je->ij", z, F.normalize(text, dim=-1))  # (B_img, B_txt)

    def pair_inputs(self, image_side: tuple, text_side: tuple) -> tuple:
        """What the cosines of pairs depend on, never in half precision."""
        inputs = (*image_side, *text_side, self.pred.out_proj)
        return tuple(x if x.dtype == torch.float64 else x.float() for x in inputs)

    def pair_logits(self, image_side: tuple, text_side: tuple) -> Tensor:
        """exp(logit_scale) * cos(z_ij, t_j) + logit_bias of every pair: (B_img, B_txt).

        SPEED: pair_cosines is the plain twin; tiles.cosines holds one tile of pairs at a time and no z.
        """
        inputs = self.pair_inputs(image_side, text_side)
        return self.scale_logits(tiles.cosines(*inputs, self.temperature))  # (B_img, B_txt)

    def pair_loss(self, image_side: tuple, text_side: tuple, loss: Callable) -> Tensor:
        """A loss that is a sum over pairs, its gradient taken tile by tile: ().

        Args: loss(logits (I, J), first row, first column) -> () for a tile. gradcache.py asks where it is.
        SPEED: pair_logits must compute the pairs again in the backward pass, or keep them; this need not.
        """
        scaling = [p for p in (self.logit_scale, self.logit_bias) if p is not None]
        return tiles.tiled_loss(
            self.pair_inputs(image_side, text_side),
            self.temperature,
            lambda cosines, row, column: loss(self.scale_logits(cosines), row, column),
            [p for p in scaling if p.requires_grad],
        )

    def ensemble_text(self, text_side: tuple, group: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts to classes: raw queries are averaged, and normalised text features.

        PAPER: appendix A, "we average the text predictions and the cross-attention queries".
        Args: queries (N, H, K), text (N, E), class of each prompt (N,).  Returns: (C, H, K), (C, E) unit.
        """
        queries, text = text_side
        text = group_mean(F.normalize(text, dim=-1), group)  # (C, E)
        return group_mean(queries, group), F.normalize(text, dim=-1)


class PooledTokens(CLIP):
    """The ladder between SigLIP and Llip: M tokens, pooled without looking at the caption.

    Lavoie et al. 2024, Fig. 3. Token k has a projection of its own, visual.proj[k] (D, E).
        register   token 0 only; the other tokens just take part in the towers' attention
        average    the mean over the tokens
        learned    cross-attention over the tokens with one learned query that all images share
    Cost: an image: model.tower_flops of M tokens, where average projects all of them, 2 M D E FLOPs, and
    register one, 2 D E; learned 2 M D E + 4 M E + 2 E^2 more. A pair: 2 E, as CLIP's.
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
        self.pooling, self.mixture_tokens = pooling, mixture_tokens
        super().__init__(config, scale, bias)
        D, E = config.vision_width, config.embed_dim
        self.heads, self.temperature = heads, float(temperature)
        if pooling == "learned":
            self.k_proj = nn.Parameter(torch.randn(mixture_tokens, D, E) * D**-0.5)
            self.query = nn.Parameter(torch.randn(E))
            self.pred = Mixer(E)

    def build_visual(self, config: Config) -> nn.Module:
        visual = VisionTransformer(config, self.mixture_tokens, project=False)
        shape = (self.mixture_tokens, config.vision_width, config.embed_dim)
        visual.proj = nn.Parameter(torch.empty(shape))
        return visual

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E), not normalised."""
        x = mixture_tokens(self.visual, images)  # (B, M, D)
        if self.pooling == "register":
            # SPEED: one product. The other projections get the gradient 0, not None: DDP would fail
            return x[:, 0] @ self.visual.proj[0].to(x.dtype)  # (B, E)
        values = project_each(x, self.visual.proj)  # (B, M, E)
        if self.pooling == "average":
            return values.mean(1)  # (B, E)
        keys = project_each(x, self.k_proj).unflatten(-1, (self.heads, -1))  # (B, M, H, K)
        query = self.query.view(self.heads, -1).to(keys.dtype)  # (H, K)
        phi = (torch.einsum("bmhk,hk->bmh", keys, query) / self.temperature).softmax(1)  # (B, M, H)
        y = torch.einsum("bmh,bmhk->bhk", phi, values.unflatten(-1, (self.heads, -1)))  # (B, H, K)
        return y.flatten(1) @ self.pred.out_proj.to(y.dtype)  # (B, E)


class LatentTextLlip(Llip):
    """Ours, published nowhere: T learned tokens follow a caption, and each asks the image for itself.

    "Was there any attempt to introduce K latent tokens on the text side?", a reviewer of Llip asked; "an
    interesting follow-up" was the answer. The simplest design with Llip's own parts: the tokens stand after
    the end token, so that by the causal mask they see the words and nobody sees them; each gives a query
    and a text feature, and a pair's cosine is the mean over the T of them:
        logits_ij = exp(a) mean_t cos(z_ijt, t_jt) + b
    Args: text_tokens T;  the others as Llip.   Cost: the pairs of Llip T times, the text tower's tokens + T.
    """

    def __init__(
        self,
        config: Config,
        mixture_tokens: int,
        heads: int,
        text_tokens: int = 4,
        temperature: float = 5.0,
        norm: bool = False,
        scale: float = 10.0,
        bias: float = -10.0,
    ):
        super().__init__(config, mixture_tokens, heads, temperature, norm, scale=scale, bias=bias)
        self.text_tokens = nn.Parameter(torch.randn(text_tokens, config.text_width) * 0.02)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) to the features of the latent tokens (B, T, D), before any projection."""
        (B, L), T = tokens.shape, len(self.text_tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[:L]
        x = F.pad(x, (0, 0, 0, T))  # (B, L + T, D)
        row = torch.arange(B, device=x.device)[:, None]
        place = tokens.argmax(-1)[:, None] + 1 + torch.arange(T, device=x.device)  # (B, T)
        # no position is added: each latent token is a vector of its own, wherever the caption ends
        x = x.index_put((row, place), self.text_tokens.to(x.dtype).expand(B, -1, -1))
        return self.ln_final(self.transformer(x, "causal", lambda x: x[row, place]))  # (B, T, D)

    pair_loss = None  # TRAP: a mean over T is no sum over Llip's own pairs

    def pair_logits(self, image_side: tuple, text_side: tuple) -> Tensor:
        """Keys, values (B, H, M, K) and queries (B, T, H, K), text (B, T, E) -> (B_img, B_txt)."""
        flat = tuple(part.flatten(0, 1) for part in text_side)  # (B_txt T, ...)
        logits = super().pair_logits(image_side, flat)  # (B_img, B_txt T)
        return logits.unflatten(1, (-1, len(self.text_tokens))).mean(-1)  # (B_img, B_txt)


@torch.no_grad()
def warm_start_llip(
    clip: CLIP,
    mixture_tokens: int,
    heads: int,
    temperature: float = 5.0,
    norm: bool = False,
    scale: float | None = None,
    bias: float = -10.0,
    noise: float = 0.1,
    seed: int = 0,
) -> Llip:
    """A Llip that begins where a CLIP is: its towers, and tokens that all begin as its class token.

    No equation: Llip was trained from scratch. Every mixture token starts as the class token with its
    position, every v_proj[k] as visual.proj, W_O as the identity, W_K and W_Q at random. So z is a mean
    of M near copies of CLIP's image feature, whatever the caption; with one token and without norm it
    is CLIP's feature.
    TRAP: equal tokens stay equal: noise, in standard deviations of the class token, sets them apart.
    M class tokens also draw M times the attention of one, so z is near CLIP's feature, not equal to it.
    Args: scale, bias: starts of exp(logit_scale), None for CLIP's own, and of logit_bias
    """
    if type(clip) is not CLIP:
        raise ValueError(f"a warm start takes a CLIP, not a {type(clip).__name__}")
    with torch.device("meta"):
        model = Llip(clip.config, mixture_tokens, heads, temperature, norm)
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.float().cpu().clone() for name, tensor in clip.state_dict().items()}
    first, proj = state["visual.class_embedding"], state.pop("visual.proj")  # (D,), (D, E)
    positions = state["visual.positional_embedding"]  # (1 + P, D)
    jitter = torch.randn(mixture_tokens, len(first), generator=generator) * noise * first.std()
    state["visual.class_embedding"] = first + jitter  # (M, D)
    copies = positions[:1].expand(mixture_tokens, -1)
    state["visual.positional_embedding"] = torch.cat([copies, positions[1:]])  # (M + P, D)
    state["v_proj"] = proj.repeat(mixture_tokens, 1, 1)  # (M, D, E)
    for name in ("k_proj", "q_proj"):
        like = model.get_parameter(name)
        state[name] = torch.randn(like.shape, generator=generator) * like.shape[-2] ** -0.5
    state["pred.out_proj"] = torch.eye(proj.shape[1])
    for name in ("K_norm", "V_norm", "Q_norm") if norm else ():
        state |= {f"{name}.weight": torch.ones(len(proj[0])), f"{name}.bias": torch.zeros(len(proj[0]))}
    if scale is not None:
        state["logit_scale"] = torch.tensor(math.log(scale))
    state["logit_bias"] = torch.tensor(float(bias))
    model.load_state_dict(state, assign=True)
    return model.to(clip.logit_scale.device).train(clip.training)


def flops(config: Config, tokens: int, prompts: int = 0, all_tokens: bool = False) -> dict[str, int]:
    """FLOPs of Llip for one image, one text, and one image against the given number of prompts.

    Two per multiply-add, as model.tower_flops. "pairs" is 4 M E + 2 E^2 per prompt: scores, mix and W_O, the
    plain form; tiles.flops counts what pair_logits and pair_loss do.
    """
    c = config
    used = tokens + c.patches * all_tokens
    tower = tower_flops(c, tokens, used)
    heads = 2 * used * c.vision_width * c.embed_dim  # counted there, replaced by k_proj, v_proj
    return {
        "image": tower["image"] - heads + 2 * 2 * used * c.vision_width * c.embed_dim,
        "text": tower["text"] + 2 * c.text_width * c.embed_dim,
        "pairs": prompts * (4 * used * c.embed_dim + 2 * c.embed_dim**2),
    }


if __name__ == "__main__":  # what a caption changes: the weights of four tokens, two heads
    torch.manual_seed(0)
    model = Llip(Config(8, 16, 8, 32, 1, 2, 64, 8, 50, 16, 1, 2, 32), 4, 2, temperature=1.0)
    keys, values = model.encode_image(torch.randn(1, 3, 16, 16))
    queries, _ = model.encode_text(torch.tensor([[48, 5, 49, 0], [48, 6, 49, 0]]))
    print("weights of four mixture tokens under one image, first head; a row for each of two captions:")
    print(model.mixing_weights(keys, queries)[0, :, 0].detach())  # two different rows
