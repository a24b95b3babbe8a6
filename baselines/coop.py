"""CoOp: CLIP's towers stay frozen, and learned vectors take the place of a prompt's words.

Zhou et al. 2022 (arXiv:2109.01134), section 3.2; code KaiyangZhou/CoOp@ff61507:

    t_c = [V]_1 ... [V]_n [CLASS]_c .           the prompt of class c; only the context V is learned
    loss = cross-entropy of exp(t) * cos(image, text(t_c))

class_tokens are the tokenized rest of each prompt, the full stop included. The context goes between the start
token and this rest:

    t = tokenizer.Tokenizer.from_openai()
    CoOp(clip, t(["dog.", "cat."]))                                       random start
    CoOp(clip, t(["dog.", "cat."]), 4, words=t.encode("a photo of a"))    starts as "a photo of a dog."

    REF: the official code runs in fp16 and spends the first epoch at lr 1e-5. Both belong to the loop, which
    trains in fp32 or bf16 and warms up only with --warmup.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipood
from clipood import Classes, LabelMethod, full_precision, require_clip, unit
from model import CLIP


class Prompted(nn.Module):
    """The dual encoder that answers for a method with learned prompts, and for TeS.

    CoCoOp's prompts depend on the image and MaPLe's image features on the prompts, so features cannot be
    computed apart. Both features are the inputs themselves: scores are computed from images and token ids.
    """

    conditional = takes_captions = False

    def __init__(self, method: LabelMethod):
        super().__init__()
        self.method, self.config, self.scale = method, method.clip.config, method.clip.scale_logits
        self.interpolation = method.interpolation
        self.train(method.training)

    def class_templates(self, templates: tuple[str, ...]) -> tuple[str, ...]:
        """The words between the learned context and the class name replace every template."""
        return (self.method.template,)

    def trained_classes(self) -> Tensor:
        """What encode_text and ensemble_text return for the classes of training: (C, context length)."""
        return self.encode_text(self.method.class_tokens)

    def encode_image(self, images: Tensor) -> Tensor:
        return images

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, L) -> (N, context length), padded with zeros."""
        return F.pad(tokens, (0, self.config.context_length - tokens.shape[1]))

    def ensemble_text(self, tokens: Tensor, group: Tensor) -> Tensor:
        """(C, L), unchanged.   Raises: ValueError for a class with several prompts."""
        if len(group) != (classes := int(group.max()) + 1):
            message = "a learned prompt takes one template and one name for each class"
            raise ValueError(f"{len(group)} prompts for {classes} classes: {message}")
        return tokens

    def pair_logits(self, images: Tensor, classes: Tensor) -> Tensor:
        """Logits (B, C). A method may know more about the classes of training, so these are recognised."""
        trained = self.trained_classes()  # (C, L), or (C, E) for TeS
        classes = classes.to(trained.dtype)
        same = classes.shape == trained.shape and torch.allclose(classes, trained, atol=1e-5)
        return self.scale(self.method.predict(images, None if same else classes))


class PromptLearner(LabelMethod):
    """A frozen CLIP with a learned context: what CoOp, CoCoOp and MaPLe share.

    Args:   clip: every parameter is frozen;  class_tokens (C, L), see above
            context: n, the number of learned vectors
            words: ids of n tokens whose embeddings are the start; None: N(0, 0.02)
            template: the rest of each prompt with {} for the name, for classes that are scored later
            rows: leading dimensions of the context, (C,) for one context per class
    Raises: ValueError if clip is no CLIP, or a class (given by its index) leaves no room for the context.
    """

    interpolation = "bicubic"  # REF: of the configurations of CoOp, CoCoOp and MaPLe

    def __init__(self, clip: CLIP, class_tokens: Tensor, context: int, words=None, template="{}.", rows=()):
        super().__init__()
        require_clip(clip)
        if context < 1:
            raise ValueError(f"context {context}: at least 1 vector must be learned")
        if words is not None and len(words) != context:
            raise ValueError(f"{len(words)} words for a context of {context}: the numbers must agree")
        self.clip, self.template = clip.requires_grad_(False), template
        self.context, self.before = context, context  # vectors in all, and before the class name
        self.starts_as = f"the context starts {'at random' if words is None else 'as words'}"
        table = clip.token_embedding.weight
        start = torch.empty(*rows, context, table.shape[1], dtype=table.dtype)  # (..., n, D)
        if words is None:
            nn.init.normal_(start, std=0.02)
        else:
            start.copy_(table[torch.as_tensor(words)].detach())
        self.ctx = nn.Parameter(start)
        # not in the state dict: learned prompts can score any classes
        self.register_buffer("class_tokens", self.trim(class_tokens), persistent=False)  # (C, L)
        self.register_buffer("text", None, persistent=False)  # (C, E), see class_features
        self.register_buffer("text_key", None, persistent=False)  # what text was computed from

    def trim(self, class_tokens: Tensor) -> Tensor:
        """Checks that the context has room, and cuts columns that no class uses: (C, L) -> (C, L')."""
        if class_tokens.dim() != 2:
            raise ValueError(f"class_tokens {tuple(class_tokens.shape)}: expected (classes, length)")
        limit = min(class_tokens.shape[1], self.clip.config.context_length)
        used = class_tokens.argmax(-1) + 1  # (C,) tokens up to the end token, which has the highest id
        if (longest := int(used.max())) + self.context > limit:
            both = f"class {int(used.argmax())}: {longest} tokens and a context of {self.context}"
            raise ValueError(f"{both} do not fit into {limit}: shorten the name or the context")
        # SPEED: no token attends to a later one, so padding changes nothing. A step takes a fifth of the time
        return class_tokens[:, :longest]

    def prompts(self, ctx: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Context (C, n, D) and tokens (C, L) to embeddings (C, n + L, D) and end positions (C,)."""
        place, end = torch.arange(tokens.shape[1], device=tokens.device), tokens.argmax(-1)  # (L,), (C,)
        # sort keys: 0 start token, 1 context, 2 class name, 3 context, 4 full stop and everything after it
        words = torch.where(place < end[:, None] - 1, 2, 4).masked_fill(place == 0, 0)  # (C, L)
        vectors = words.new_full((len(words), self.context), 3)  # (C, n)
        vectors[:, : self.before] = 1
        order = torch.cat([vectors, words], 1).argsort(dim=1, stable=True)  # (C, n + L)
        x = torch.cat([ctx, self.clip.token_embedding(tokens)], 1)  # (C, n + L, D)
        return x.gather(1, order[..., None].expand_as(x)), end + self.context

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens (C, L) -> (C, E) unit norm."""
        return self.encode_prompts(self.ctx.expand(len(tokens), -1, -1), tokens)

    def encode_prompts(self, ctx: Tensor, tokens: Tensor) -> Tensor:
        """Context (C, n, D) and tokens (C, L) through the text tower: (C, E) unit norm."""
        x = self.clip.text_features_of(*self.prompts(ctx, tokens))  # (C, D)
        return unit(x @ self.clip.text_projection.to(x.dtype))  # (C, E)

    def class_features(self, tokens: Tensor) -> Tensor:
        """text_features, kept until a prompt, a weight of the text tower or the classes change.

        TRAP: with gradients they are computed anew; kept features would cut the prompts off from the loss.
        """
        if torch.is_grad_enabled():
            return self.text_features(tokens)
        key = [tokens.flatten().float()]
        for name, p in self.named_parameters():
            # prompts are compared number by number, the text tower's weights by their sums
            if not name.startswith("clip.visual."):
                key.append(p.sum().view(1) if name.startswith("clip.") else p.flatten())
        key = torch.cat(key)
        if self.text is None or not torch.equal(key, self.text_key):
            self.text, self.text_key = self.text_features(tokens), key
        return self.text

    @torch.no_grad()  # SPEED: the image tower has no prompt, so nothing is kept for the backward pass
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
        logits = self(images)
        return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(-1) == labels).float().mean()}

    @torch.no_grad()
    def predict(self, images: Tensor, class_tokens: Tensor | None = None) -> Tensor:
        """Cosines (B, C) to the classes of training, or to the classes of other class_tokens (C, L).

        Raises: ValueError for other classes with one context per class.
        """
        if class_tokens is not None and not self.new_classes:
            raise ValueError("class-specific contexts can score the classes of training only")
        return self.cosines(images, self.class_tokens if class_tokens is None else self.trim(class_tokens))

    def dual_encoder(self, clip: CLIP | None = None) -> nn.Module:
        return Prompted(self) if clip is None else clip


class CoOp(PromptLearner):
    """Context optimisation (section 3.2): one context for all classes, or one per class.

    Args:   class_specific: ctx is (C, n, D) instead of (n, D), and no other classes can be scored
            position: the context comes before the class name ("end"), around it or after it ("middle",
            "front": the last token before the end token must then be the full stop, which stays last)
    Raises: ValueError, beyond those of PromptLearner, for an unknown position.
    Cost:   forward, T FLOPs of the text tower on n + L tokens: B I + C T + 2 B C E. 4 n D bytes of gradient
    """

    def __init__(
        self, clip: CLIP, class_tokens: Tensor, context=16, class_specific=False, *, position="end", **start
    ):
        before = {"end": context, "middle": context // 2, "front": 0}
        if position not in before:
            raise ValueError(f"position {position!r}: expected {', '.join(before)}")
        rows = (len(class_tokens),) if class_specific else ()
        super().__init__(clip, class_tokens, context, rows=rows, **start)
        self.before, self.new_classes = before[position], not class_specific


def start_words(words: str, default: str, context: int, tokenizer) -> tuple[list[int] | None, str]:
    """The ids that the context starts as (None: random), and the template of the rest of the prompt.

    REF: MaPLe's context takes the place of the first words of "a photo of a"; the others stay words.
    Default words are shortened until they are `context` tokens; if they never are, the start is random.
    Raises: ValueError if words other than the default are not `context` tokens.
    """
    parts = words.split()
    for n in range(min(context, len(parts)), 0, -1):
        ids = tokenizer.encode(" ".join(parts[:n]))
        if len(ids) == context:
            return ids, " ".join([*parts[n:], "{}."])
        if words != default:
            given = f"--context {context}, but --context-words {words!r} has {len(parts)} words"
            raise ValueError(f"{given}, and the first {n} are {len(ids)} tokens: they must agree")
    return None, "{}."


def prompts(settings, clip: CLIP, classes: Classes) -> tuple[Tensor, dict]:
    """Class tokens (C, L), and the words and template of a PromptLearner; settings of any of the three."""
    default = type(settings).context_words
    words, rest = start_words(settings.context_words, default, settings.context, classes.tokenizer)
    return classes.tokens(rest, clip.config.context_length), dict(words=words, template=rest)


@dataclass(frozen=True)
class Settings:
    context: int = 16  # learned vectors
    context_words: str = ""  # words that they start as, one token for each vector; empty: random
    context_position: str = "end"  # end, middle or front: before, around or after the class name
    class_context: bool = False  # one context per class


DEFAULTS = clipood.DEFAULTS | dict(optimizer="sgd", lr=2e-3, batch_size=32, epochs=50.0)
DEFAULTS |= dict(weight_decay=5e-4, shots=16, crop_scale=0.08)
TINY = clipood.TINY | dict(optimizer="adamw", lr=5e-3, batch_size=36, epochs=0.0, shots=0, context=4)
EPOCHS = {1: 50.0, 2: 100.0, 4: 100.0, 8: 200.0, 16: 200.0}  # of the scripts, by shots; 50 on ImageNet
PRESETS = {f"coop-{shots}-shot": dict(shots=shots, epochs=epochs) for shots, epochs in EPOCHS.items()}
# base-to-new runs of CoCoOp's paper, by (task, data set): changes to DEFAULTS
PUBLISHED = {("open-class", ""): dict(context=4, epochs=200.0), ("open-class", "ImageNet"): dict(context=4)}
TASK = "labels"


def build(settings: Settings, clip: CLIP, classes: Classes) -> CoOp:
    tokens, start = prompts(settings, clip, classes)
    start["position"] = settings.context_position
    return CoOp(clip, tokens, settings.context, settings.class_context, **start)
