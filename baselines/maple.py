"""MaPLe: prompts in J blocks of both towers; the image tower's are linear functions of the text tower's.

Khattak et al. 2023 (arXiv:2210.03117), section 3.2; code muzairkhattak/multimodal-prompt-learning@69bce21.
Before block j < J the n prompt tokens are set to

    P_j          in the text tower, directly after the start token;  P_0 is ctx
    F_j(P_j)     in the image tower, after all patches;              F_0 is proj

    REF: depth J counts the prompts at the input: J - 1 more replace them before blocks 1 ... J - 1.
    REF: for a J deeper than a tower, the official code keeps prompts that are never used; here J is checked.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from baselines import coop
from baselines.coop import PromptLearner
from clipood import Classes, unit
from model import CLIP


class MaPLe(PromptLearner):
    """Multi-modal prompt learning.

    Args:   depth: J, from 1 (prompts at the input only) to the number of blocks of the shorter tower
    Raises: ValueError, beyond those of PromptLearner, for another depth.
    Cost:   forward: as CoOp, with n tokens more in the image tower and J products 2 n D D' into its width D'.
            4 bytes of gradient for each of J (n D + D D' + D') numbers
    """

    def __init__(self, clip: CLIP, class_tokens: Tensor, context: int = 2, depth: int = 9, **start):
        super().__init__(clip, class_tokens, context, **start)
        c = clip.config
        if not 1 <= depth <= min(c.vision_layers, c.text_layers):
            blocks = f"{c.vision_layers} (image) and {c.text_layers} (text) blocks"
            raise ValueError(f"depth {depth}: the towers have {blocks}")
        D, deeper = c.text_width, range(depth - 1)
        self.proj = nn.Linear(D, c.vision_width)
        self.compound_prompts_text = nn.ParameterList(0.02 * torch.randn(context, D) for _ in deeper)
        self.compound_prompt_projections = nn.ModuleList(nn.Linear(D, c.vision_width) for _ in deeper)
        self.to(self.ctx.dtype)

    def encode_prompts(self, ctx: Tensor, tokens: Tensor) -> Tensor:
        clip, (x, end) = self.clip, self.prompts(ctx, tokens)
        # the deeper prompts replace P_0 together with its positions
        x = x + clip.positional_embedding[: x.shape[1]].to(x.dtype)  # (C, n + L, D)
        before, row = partial(replace, self.compound_prompts_text, 1), torch.arange(len(x), device=x.device)
        x = clip.transformer(x, "causal", lambda x: x[row, end], before)  # (C, D)
        return unit(clip.ln_final(x) @ clip.text_projection.to(x.dtype))  # (C, E)

    def image_features(self, images: Tensor) -> Tensor:
        visual = self.clip.visual
        x = visual.embed(images)  # (B, 1 + P, D')
        first = visual.ln_pre(self.proj(self.ctx)).to(x.dtype)  # (n, D') after ln_pre, without positions
        pairs = zip(self.compound_prompt_projections, self.compound_prompts_text)
        deeper = [project(p) for project, p in pairs]  # (n, D') each
        both = torch.cat([x, first.expand(len(x), -1, -1)], 1)  # (B, 1 + P + n, D')
        before = partial(replace, deeper, x.shape[1])
        x = visual.transformer(both, keep_tokens=lambda x: x[:, 0], before=before)  # (B, D')
        return unit(visual.head(x))  # (B, E)


def replace(prompts, place: int, block: int, x: Tensor) -> Tensor:
    """Before block j the tokens of x (B, L, D) from place on become prompts[j - 1] (n, D)."""
    if not 1 <= block <= len(prompts):
        return x
    new = prompts[block - 1].to(x.dtype).expand(len(x), -1, -1)  # (B, n, D)
    return torch.cat([x[:, :place], new, x[:, place + new.shape[1] :]], 1)  # (B, L, D)


@dataclass(frozen=True)
class Settings:
    context: int = 2  # learned vectors
    context_words: str = "a photo of a"  # words that they and the next words start as; empty: random
    prompt_depth: int = 0  # blocks with prompts; 0: 9, or all blocks of a shallower tower


DEFAULTS = coop.DEFAULTS | dict(lr=3.5e-3, batch_size=4, epochs=5.0)
TINY = coop.TINY | dict(context=2)
PRESETS = {"maple-cross-dataset": dict(lr=2.6e-3, epochs=2.0, prompt_depth=3)}
TASK = "labels"


def build(settings: Settings, clip: CLIP, classes: Classes) -> MaPLe:
    tokens, start = coop.prompts(settings, clip, classes)
    depth = settings.prompt_depth or min(9, clip.config.vision_layers, clip.config.text_layers)
    return MaPLe(clip, tokens, settings.context, depth, **start)
