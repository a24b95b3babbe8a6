"""Prompt learning: CLIP's towers stay frozen, and vectors in the place of a prompt's words are learned.

    CoOp     Zhou et al. 2022 (arXiv:2109.01134), section 3.2    t_c = [V]_1 ... [V]_n [CLASS]_c .
    CoCoOp   Zhou et al. 2022 (arXiv:2203.05557), section 3.2    the same, V_m + MetaNet(image)
    MaPLe    Khattak et al. 2023 (arXiv:2210.03117), section 3.2 prompts in J blocks of both towers

All minimise cross-entropy on exp(t) * cos. Parameters carry the names of the official codes,
KaiyangZhou/CoOp@ff61507 and muzairkhattak/multimodal-prompt-learning@69bce21, at top level.
A method is a module with loss(images, labels) -> (loss, logs) and predict(images) -> (B, C), as in
clipood.py; here predict also takes the tokens of other classes, which the learned prompts then score.

class_tokens are the tokenized rest of each prompt, the full stop included; the context comes between the
start token and it. With t = a tokenizer:
    CoOp(clip, t(["dog.", "cat."]))                                  random start
    CoCoOp(clip, t(["dog.", "cat."]), words=t.encode("a photo of a"))  starts as "a photo of a dog."
    MaPLe(clip, t(["of a dog.", "of a cat."]), words=t.encode("a photo"))  likewise, two of its words learned

    REF: CoOp's middle and front move the words of the class; the full stop stays last.
    REF: MaPLe's depth J counts the prompts at the input: J - 1 more replace them before blocks 1 ... J - 1.
    Deeper than a tower, the official code keeps prompts that nothing reads; here that is an error.
    REF: MaPLe replaces as many of the words "a photo of a" as the context is long; the others stay words.
    REF: the official codes run in fp16; fp32 here, and autocast belongs to the loop.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipood import full_precision, require_clip, unit
from model import CLIP, Transformer

# How many of n context vectors stand before the class name.
POSITIONS = {"end": lambda n: n, "middle": lambda n: n // 2, "front": lambda n: 0}


class PromptLearner(nn.Module):
    """What the three share: a frozen CLIP, the context, the protocol; as it stands, CoOp at "end".

    Args:   clip: every parameter is frozen;  class_tokens (C, L), see above
            context: n, the number of learned vectors, at the place of as many words
            words: ids of n words whose embeddings are the start; None: N(0, 0.02)
            rows: leading dimensions of the context, (C,) for one context per class
    Raises: ValueError if clip is no CLIP, or a class (named by its index) has no room beside the context.
    """

    def __init__(
        self,
        clip: CLIP,
        class_tokens: Tensor,
        context: int,
        words: list[int] | None = None,
        rows: tuple[int, ...] = (),
    ):
        super().__init__()
        require_clip(clip)
        if context < 1:
            raise ValueError(f"context {context}: at least 1 vector has to be learned")
        if words is not None and len(words) != context:
            raise ValueError(f"{len(words)} words for a context of {context}: give as many")
        self.clip, self.context = clip.requires_grad_(False), context
        table = clip.token_embedding.weight
        start = torch.empty(*rows, context, table.shape[1])  # (..., n, D)
        if words is None:
            nn.init.normal_(start, std=0.02)
        else:
            start.copy_(table[torch.as_tensor(words)].detach())
        self.ctx = nn.Parameter(start)
        # not persistent: learned prompts serve any classes, as long as these tokens are not among them
        self.register_buffer("class_tokens", self.fit(class_tokens), persistent=False)  # (C, L)
        self.register_buffer("text", None, persistent=False)  # (C, E), see class_features
        self.register_buffer("text_key", None, persistent=False)  # what text was computed from

    def fit(self, class_tokens: Tensor) -> Tensor:
        """Checks that the context has room, and cuts columns that no class uses: (C, L) -> (C, L')."""
        if class_tokens.dim() != 2:
            raise ValueError(f"class_tokens {tuple(class_tokens.shape)}: expected (classes, length)")
        limit = min(class_tokens.shape[1], self.clip.config.context_length)
        used = class_tokens.argmax(-1) + 1  # (C,) tokens up to the end token, the highest id
        if (used + self.context > limit).any():
            i = int((used + self.context > limit).nonzero()[0, 0])
            raise ValueError(
                f"class {i}: {int(used[i])} tokens and a context of {self.context} do not fit into "
                f"{limit}: shorten the name or the context"
            )
        # SPEED: no token attends to a later one, so the padding changes nothing: 77 tokens become some
        # 12, and a step of CoOp or CoCoOp takes a fifth of the time
        return class_tokens[:, : int(used.max())]

    def prompts(self, ctx: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Context (C, n, D) and tokens (C, L) to embeddings (C, n + L, D) and end tokens' places (C,)."""
        x = self.clip.token_embedding(tokens)  # (C, L, D)
        x = torch.cat([x[:, :1], ctx, x[:, 1:]], 1)  # (C, n + L, D)
        return x, tokens.argmax(-1) + self.context

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens (C, L) -> (C, E) unit norm."""
        return self.encode_prompts(self.ctx.expand(len(tokens), -1, -1), tokens)

    def encode_prompts(self, ctx: Tensor, tokens: Tensor) -> Tensor:
        """Context (C, n, D) and tokens (C, L) through the text tower: (C, E) unit norm."""
        x = self.clip.text_features_of(*self.prompts(ctx, tokens))  # (C, D)
        return unit(x @ self.clip.text_projection.to(x.dtype))  # (C, E)

    def class_features(self, tokens: Tensor) -> Tensor:
        """text_features, kept until a prompt, a weight of the text tower or the classes change.

        TRAP: only where no gradient is wanted: kept features would cut the prompts off from the loss.
        """
        if torch.is_grad_enabled():
            return self.text_features(tokens)
        key = [tokens.flatten().float()]
        for name, p in self.named_parameters():
            if not name.startswith("clip.visual."):  # prompts exactly; sums tell of other weights
                key.append(p.sum().view(1) if name.startswith("clip.") else p.flatten())
        key = torch.cat(key)
        if self.text is None or not torch.equal(key, self.text_key):
            self.text, self.text_key = self.text_features(tokens), key
        return self.text

    @torch.no_grad()  # SPEED: the image tower has no prompt, so nothing is kept for a backward pass
    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E) unit norm."""
        return unit(self.clip.encode_image(images))

    def cosines(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S) against classes (C, L): (B, C)."""
        image, text = self.image_features(images), self.class_features(tokens)
        with full_precision(image):
            return image @ text.t()  # (B, C)

    def forward(self, images: Tensor, labels: Tensor | None = None):
        """Logits exp(t) * cos (B, C); with labels the loss, the call that DistributedDataParallel wraps."""
        if labels is not None:
            return self.loss(images, labels)
        return self.clip.scale_logits(self.cosines(images, self.class_tokens))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, S, S), labels (B,) -> loss (), and what to log, as tensors without gradient."""
        logits = self(images)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}

    @torch.no_grad()
    def predict(self, images: Tensor, class_tokens: Tensor | None = None) -> Tensor:
        """Cosines (B, C) to the classes trained on, or to any others' class_tokens (C, L)."""
        tokens = self.class_tokens if class_tokens is None else self.fit(class_tokens)
        return self.cosines(images, tokens)

    def prompt_state(self) -> dict[str, Tensor]:
        """What was learned, without CLIP: the checkpoint of a prompt learner."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}

    def load_prompt_state(self, state: dict[str, Tensor]) -> None:
        """Takes up prompt_state().   Raises: ValueError if names or shapes are not those of this module."""
        here, found = ({k: tuple(v.shape) for k, v in s.items()} for s in (self.prompt_state(), state))
        if here != found:
            name = min(k for k, _ in here.items() ^ found.items())
            raise ValueError(
                f"prompt {name}: {found.get(name, 'absent')} in the state, "
                f"{here.get(name, 'absent')} in this {type(self).__name__}"
            )
        self.load_state_dict({**self.state_dict(), **state})


class CoOp(PromptLearner):
    """Context optimisation: one context for all classes, or one per class.

    CoOp section 3.2. With class_specific and C classes ctx is (C, n, D), otherwise (n, D).
    Official runs: n = 16, SGD 0.002, momentum 0.9, weight decay 5e-4, cosine, batch 32, 50 to 200 epochs.
    Args:   position of the context: "end" puts the class name behind it, "middle" into it, "front" before
            it; for the last two the last token before the end token must be the full stop
    Raises: ValueError, beside those of PromptLearner, for another position; predict, for other classes
            than those trained on with class_specific.
    Cost:   forward, T FLOPs of the text tower on n + L tokens: B I + C T + 2 B C E. 4 n D bytes of gradient
    """

    def __init__(
        self,
        clip: CLIP,
        class_tokens: Tensor,
        context: int = 16,
        class_specific: bool = False,
        *,
        position: str = "end",
        words: list[int] | None = None,
    ):
        if position not in POSITIONS:
            raise ValueError(f"position {position!r}: expected {', '.join(POSITIONS)}")
        rows = (len(class_tokens),) if class_specific else ()
        super().__init__(clip, class_tokens, context, words, rows)
        self.before = POSITIONS[position](context)

    def prompts(self, ctx: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As PromptLearner's, with the context before, around or behind the class name."""
        place = torch.arange(tokens.shape[1], device=tokens.device)  # (L,)
        end = tokens.argmax(-1)  # (C,)
        # sorted by what each is: 0 start, 1 context, 2 class name, 3 context, 4 full stop and the rest
        words = torch.where(place < end[:, None] - 1, 2, 4).masked_fill(place == 0, 0)  # (C, L)
        vectors = words.new_full((len(words), self.context), 3)  # (C, n)
        vectors[:, : self.before] = 1
        order = torch.cat([vectors, words], 1).argsort(dim=1, stable=True)  # (C, n + L)
        x = torch.cat([ctx, self.clip.token_embedding(tokens)], 1)  # (C, n + L, D)
        return x.gather(1, order[..., None].expand_as(x)), end + self.context

    def predict(self, images: Tensor, class_tokens: Tensor | None = None) -> Tensor:
        """Cosines (B, C) to the classes trained on, or to any others' class_tokens (C, L)."""
        if class_tokens is not None and self.ctx.dim() == 3:
            raise ValueError("class-specific contexts belong to the classes trained on, to no others")
        return super().predict(images, class_tokens)


class CoCoOp(PromptLearner):
    """Conditional context optimisation: every image moves the context by a vector of its own.

    CoCoOp section 3.2:  V_m(x) = V_m + MetaNet(f(x)),  f(x) the unit image feature and MetaNet
    Linear(E, E / 16)-ReLU-Linear(E / 16, D).
    Official runs: words "a photo of a", SGD 0.002, batch 1, 10 epochs, else as CoOp.
    PAPER: B images make B * C prompts, for which the paper trains with batch 1.
    SPEED: all pairs of a batch run together, in chunks, where the official code takes one image after
    another: fewer and larger kernels for a GPU; one CPU core gains nothing.
    Args: chunk: prompts encoded at once; a batch with more is recomputed in the backward pass, so that
          memory is that of one chunk, for a second forward pass
    Cost: forward, h = E / 16: B I + B C T + 2 B h (E + D), B times CoOp's texts. 4 bytes of gradient for each
          of the context's n D numbers and MetaNet's h (E + D) + h + D
    """

    def __init__(
        self,
        clip: CLIP,
        class_tokens: Tensor,
        context: int = 4,
        *,
        words: list[int] | None = None,
        chunk: int = 256,
    ):
        super().__init__(clip, class_tokens, context, words)
        if chunk < 1:
            raise ValueError(f"chunk {chunk}: at least 1 prompt is encoded at once")
        self.chunk = chunk
        E, D = clip.config.embed_dim, clip.config.text_width
        hidden = max(E // 16, 1)
        layers = [("linear1", nn.Linear(E, hidden)), ("relu", nn.ReLU()), ("linear2", nn.Linear(hidden, D))]
        self.meta_net = nn.Sequential(OrderedDict(layers))

    def cosines(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S) against classes (C, L): (B, C)."""
        image = self.image_features(images)  # (B, E)
        ctx = self.ctx + self.meta_net(image).unsqueeze(1)  # (B, n, D)
        pairs = torch.arange(len(images) * len(tokens), device=image.device).split(self.chunk)

        def run(pair: Tensor) -> Tensor:
            i, c = pair // len(tokens), pair % len(tokens)
            text = self.encode_prompts(ctx[i], tokens[c])  # (pairs, E)
            return (image[i] * text).sum(-1)  # (pairs,)

        if len(pairs) > 1 and torch.is_grad_enabled():
            cosines = [checkpoint(run, pair, use_reentrant=False) for pair in pairs]
        else:
            cosines = [run(pair) for pair in pairs]
        return torch.cat(cosines).view(len(images), len(tokens))  # (B, C)


class MaPLe(PromptLearner):
    """Multi-modal prompts: learned text tokens in J blocks, and image tokens that are linear in them.

    MaPLe section 3.2. Before block j < J the n prompt tokens are set to P_j in the text tower, right behind
    the start token, and to F_j(P_j) in the image tower, at the very end; P_0 is ctx and F_0 is proj.
    Official runs: n = 2, words "a photo" with "of a dog.", depth 9, SGD 0.0035, batch 4, 5 epochs.
    Args:   depth: J, from 1 (prompts at the input only) to the number of blocks of the shorter tower
    Raises: ValueError, beside those of PromptLearner, for another depth.
    Cost:   forward: as CoOp, with n tokens more in the image tower and J products 2 n D D' into its width D'.
            4 bytes of gradient for each of J (n D + D D' + D') numbers
    """

    def __init__(
        self,
        clip: CLIP,
        class_tokens: Tensor,
        context: int = 2,
        depth: int = 9,
        *,
        words: list[int] | None = None,
    ):
        super().__init__(clip, class_tokens, context, words)
        c = clip.config
        if not 1 <= depth <= min(c.vision_layers, c.text_layers):
            raise ValueError(
                f"depth {depth}: the towers have {c.vision_layers} (image) and {c.text_layers} (text) blocks"
            )
        D, deeper = c.text_width, range(depth - 1)
        self.proj = nn.Linear(D, c.vision_width)
        self.compound_prompts_text = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(context, D)) for _ in deeper
        )
        self.compound_prompt_projections = nn.ModuleList(nn.Linear(D, c.vision_width) for _ in deeper)

    def encode_prompts(self, ctx: Tensor, tokens: Tensor) -> Tensor:
        """Context (C, n, D) and tokens (C, L) through the text tower: (C, E) unit norm."""
        clip, (x, end) = self.clip, self.prompts(ctx, tokens)
        # P_1 ... replace P_0 with its positions
        x = x + clip.positional_embedding[: x.shape[1]].to(x.dtype)  # (C, n + L, D)
        deeper, row = list(self.compound_prompts_text), torch.arange(len(x), device=x.device)
        x = run_blocks(clip.transformer, x, deeper, 1, lambda x: x[row, end], "causal")  # (C, D)
        return unit(clip.ln_final(x) @ clip.text_projection.to(x.dtype))  # (C, E)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E) unit norm."""
        visual = self.clip.visual
        x = visual.embed(images)  # (B, 1 + P, D)
        first = visual.ln_pre(self.proj(self.ctx)).to(x.dtype)  # (n, D) behind ln_pre, no position
        pairs = zip(self.compound_prompt_projections, self.compound_prompts_text)
        deeper = [project(p) for project, p in pairs]  # (n, D) each
        place = x.shape[1]
        x = torch.cat([x, first.expand(len(x), -1, -1)], 1)  # (B, 1 + P + n, D)
        x = run_blocks(visual.transformer, x, deeper, place, lambda x: x[:, 0])  # (B, D)
        return unit(visual.head(x))  # (B, E)


def run_blocks(
    transformer: Transformer,
    x: Tensor,
    prompts: list[Tensor],
    place: int,
    keep_tokens: Callable[[Tensor], Tensor],
    mask: Tensor | str | None = None,
) -> Tensor:
    """All blocks over x (B, L, D), tokens from place on set to prompts[j - 1] (n, D) before block j.

    As model.Transformer; keep_tokens selects the tokens that are used after the last block.
    """
    for j, block in enumerate(transformer.resblocks):
        if 1 <= j <= len(prompts):
            new = prompts[j - 1].to(x.dtype).expand(len(x), -1, -1)  # (B, n, D)
            x = torch.cat([x[:, :place], new, x[:, place + new.shape[1] :]], 1)  # (B, L, D)
        last = keep_tokens if block is transformer.resblocks[-1] else None
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, "qkv", mask, False, last, use_reentrant=False)
        else:
            x = block(x, mask=mask, keep_tokens=last)
    return x  # the tokens that keep_tokens selected
