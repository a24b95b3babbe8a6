"""AlignCLIP: fine-tuning that aligns the class token's attention with where the label's text is found.

Han et al. 2025, "AlignCLIP: navigating the misalignments for robust vision-language generalization"
(Machine Learning 114:58, doi 10.1007/s10994-025-06742-z); CLIPood plus two ideas:

    z    = x^(6) + sum_{l=7..12} [W_o^l (D V^l) + b_o^l]    second branch, section 3.2: D-V attention over
           V^l = values of LN1(x^(l-1)), x the plain path   the same weights; D = I, no MLP
    S_s  = cos(head(z)_p, T_c),  S = cos(head(x)_p, T_c)    eq. 4: patch-text similarity, each branch
    G    = softmax_p(S_s[p, y])                             what the class token should attend to
    A    = mean_{l=1..5} of the class token's attention     what it does attend to
    L    = L_SLS + w (KL(G || A) + L_sim)                   eq. 6 is KL(G || A), "AAL"

L_SLS: margin softmax with semantic label smoothing (section 3.3); L_sim aligns S with S_s. The branch adds no
weights and exists only in training: the trained model is a plain CLIP whose image features use no text.

Sources: the abstract, the authors' replies to their reviewers (with the numbers of equations and figures) and
their training loop, zhyhan/AlignCLIP@bb8c449. Its vision tower was never published: the branch is inferred.
    REF: the branch is taken to be CLIP Surgery's (last six blocks, input from the plain path, residual kept,
    no MLP), because the shape of the loop's attention changes at block index 6.
    REF: the released weight is w = 10; the submission's code had 1.
    REF: as released, gradients flow into G and S_s too. The loss can then become small by flattening the
    guidance instead of moving the attention. detach=True makes the branch a fixed teacher.
    REF: the released L_sim gathers the label's map and then sums over all classes ("all"); its comments
    describe the label's map only ("label"), the default here.
    REF: the released code ignores --layer and fixes five layers and 196 patches; here both vary.
    REF: CLIP Surgery converts its blocks at the first forward, after the optimiser and the moving average
    took their copies. Here nothing is converted: the attention structure is an argument of the call.
    PAPER: G is nearly uniform at temperature 1, because cosines of patches differ by about 0.03. As released,
    the loss therefore mostly flattens the attention of the first blocks; 0.01 to 0.1 makes G pointed.
    PAPER: the rebuttal's "1549 times fewer GFLOPs" compares projections with mixing, see attention.flops.
    PAPER: the shaded band of Fig. 3c (aligned layers) is random.uniform(0.5, 1) in the authors' notebook.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import clipood
from attention import attend
from clipood import Classes, FineTune, full_precision, unit
from losses import attention_alignment, similarity_alignment, smoothing_targets
from model import CLIP, Block, VisionTransformer

BRANCHES = ("dv", "vvv", "qqv", "kkv")


def default_blocks(depth: int) -> tuple[int, int]:
    """Index of the second branch's first block, and the number of aligned blocks, for a tower of any depth.

    The branch has the last six blocks, but at most two thirds (rounded up). At least one block is aligned,
    and at most five of those before the branch.
    """
    first_dual_block = depth - min(6, depth - depth // 3)
    return first_dual_block, max(1, min(5, first_dual_block))


def cls_attention(weights: list[Tensor]) -> Tensor:
    """What the class token attends to among the patches, averaged over layers: A_c of eq. 6.

    The class token's weight on itself is dropped, the rest of each layer is normalised to sum 1.
    Args:    weights: for each layer, heads averaged, (B, L, L), or only the class token's row (B, 1, L)
    Returns: (B, P), rows sum to 1.
    """
    rows = torch.stack([layer[:, 0, 1:] for layer in weights])  # (layers, B, P)
    return F.normalize(rows, p=1, dim=-1).mean(0)  # (B, P)


def guidance(similarity: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """G of eq. 6, the label's map as a distribution over patches: softmax_p(S[p, y] / temperature).

    Args:    similarity (B, P, C) cosines of the second branch;  labels (B,);  temperature: 1 in the paper
    Returns: (B, P), rows sum to 1.
    """
    own = similarity[torch.arange(len(labels), device=labels.device), :, labels]  # (B, P)
    return (own / temperature).softmax(-1)


def dual_block(
    block: Block, x: Tensor, branch: str | Callable | None, need_row: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One block of the plain path, and what the second branch takes from it.

    Args:    x (B, L, D) plain path;  branch: a kind of attention.attend, a function (q, k, v, LN1 x) ->
             (B, H, L, K), or None before the branch starts
    Returns: the plain path after the block (B, L, D), the branch's attention output (B, L, D) or None,
             the class token's attention averaged over heads (B, 1, L) or None.
    Cost:    in addition to the block, one output projection for dv, 2 L D^2; vvv, qqv, kkv 4 L^2 D more.
    """
    attn = block.attn
    # SPEED: LN1, queries, keys and values are computed once for both paths
    normed = block.ln_1(x)  # (B, L, D)
    q, k, v = attn.project(normed, "qkv")  # (B, H, L, K) each
    y = row = None
    if branch:
        y = branch(q, k, v, normed) if callable(branch) else attend(q, k, v, branch)  # (B, H, L, K)
        y = attn.merge(y)  # (B, L, D)
    if need_row:
        # SPEED: only the class token's query; asking for all (L, L) weights would leave the fused kernel
        row = attend(q[:, :, :1], k, v, need_weights=True)[1].mean(1)  # (B, 1, L)
    x = x + attn.merge(attend(q, k, v))
    return x + block.mlp(block.ln_2(x)), y, row


def two_paths(
    visual: VisionTransformer, x: Tensor, branch: str | Callable, first_dual_block: int, layers: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The image tower with its second branch, before the head.

    Args:    x (B, 1 + P, D) from visual.embed;  layers: return the class token's attention of so many blocks
    Returns: x (B, 1 + P, D) plain path, z (B, 1 + P, D) or None if no block is left for the branch, and the
             attention rows, a list of (B, 1, 1 + P).
    """
    rows, z = [], None
    for i, block in enumerate(visual.transformer.resblocks):
        z = x if i == first_dual_block else z
        kind = branch if i >= first_dual_block else None
        x, y, row = visual.transformer.run(dual_block, block, x, kind, i < layers)
        if y is not None:
            z = z + y  # (B, 1 + P, D)
        if row is not None:
            rows.append(row)
    return x, z, rows


class AlignCLIP(FineTune):
    """L = L_SLS + weight * (KL(G || A) + L_sim), see above; predictions and parameters are those of CLIP.

    Args:   clip, text, margin, epsilon, scale, smoothing: as in clipood.FineTune
            branch: dv, vvv, qqv or kkv;  first_dual_block, layers: index of the branch's first block, and
            number of aligned blocks; None: default_blocks
            attention: AAL on or off;  similarity: L_sim over the "label"'s map, "all" maps or "none"
            guidance_temperature: of G;  detach: the branch gets no gradient
    Raises: ValueError for an unknown branch or similarity, or blocks that the tower does not have.
    Cost:   B/16, both passes: 10.7 % more FLOPs than CLIPood with dv, 12.9 % with vvv (paper, seconds per
            step: 10.5 % and 31.6 %). 5.6 % are the last MLP on the patches, which the published CLIPood
            computes too. Ranks exchange nothing more.
    """

    def __init__(
        self,
        clip: CLIP,
        text: Tensor,
        *,
        branch: str = "dv",
        first_dual_block: int | None = None,
        layers: int | None = None,
        weight: float = 10.0,
        smoothing: str = "mixture",
        epsilon: float = 0.9,
        scale: float = 35.0,
        margin: float = 0.3,
        guidance_temperature: float = 1.0,
        attention: bool = True,
        similarity: str = "label",
        detach: bool = False,
    ):
        super().__init__(clip, text, smoothing=smoothing, epsilon=epsilon, scale=scale, margin=margin)
        depth = len(clip.visual.transformer.resblocks)
        first_dual_block = default_blocks(depth)[0] if first_dual_block is None else first_dual_block
        layers = max(1, min(5, first_dual_block)) if layers is None else layers
        if branch not in BRANCHES:
            raise ValueError(f"branch {branch!r}: expected one of {', '.join(BRANCHES)}")
        if similarity not in ("label", "all", "none"):
            raise ValueError(f"similarity {similarity!r}: expected label, all or none")
        if not 0 <= first_dual_block < depth or not 1 <= layers <= depth:
            chosen = f"first_dual_block {first_dual_block}, layers {layers}"
            raise ValueError(f"{chosen}: the image tower has {depth} blocks")
        self.branch, self.first_dual_block, self.layers = branch, first_dual_block, layers
        self.attention, self.similarity, self.detach = attention, similarity, detach
        self.weight, self.guidance_temperature = weight, guidance_temperature
        on = ["attention"] * attention + ["similarity"] * (similarity != "none")
        self.loss_terms = f"classification + {weight:g} x ({' + '.join(on)})" if on else ""

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, S, S), labels (B,) -> loss (), and its parts without gradient to log."""
        if not self.attention and self.similarity == "none":
            return super().loss(images, labels)
        visual, layers = self.clip.visual, self.layers if self.attention else 0
        x, z, rows = two_paths(visual, visual.embed(images), self.branch, self.first_dual_block, layers)
        image = unit(visual.head(x if self.similarity != "none" else x[:, :1]))  # (B, 1 + P, E)
        guide = unit(visual.head(z[:, 1:]))  # (B, P, E)
        # REF: the margin moves only the class token's feature; the maps use unmoved features
        loss, logs = self.classification(image[:, 0], labels)
        logs["classification"] = loss.detach()
        for name, value in self.alignment(image[:, 1:], guide, rows, labels).items():
            loss, logs[name] = loss + self.weight * value, value.detach()
        return loss, logs

    def alignment(self, image: Tensor, guide: Tensor, rows: list, labels: Tensor) -> dict[str, Tensor]:
        """The alignment losses that are on, from unit patch features (B, P, E) of both paths."""
        if self.similarity == "all":
            names, own = self.text.t(), labels  # (E, C)
        else:
            # SPEED: one map instead of C; the sum over all maps of a single class is the label's map
            names, own = self.text[labels].unsqueeze(-1), torch.zeros_like(labels)  # (B, E, 1)
        losses = {}
        with full_precision(image):
            maps = guide @ names  # eq. 4: (B, P, C) or (B, P, 1)
            maps = maps.detach() if self.detach else maps
            if self.attention:
                target = guidance(maps, own, self.guidance_temperature)  # (B, P)
                losses["attention"] = attention_alignment(cls_attention(rows), target)
            if self.similarity != "none":
                losses["similarity"] = similarity_alignment(image @ names, maps)
        return losses


@dataclass(frozen=True)
class Settings(clipood.Classification):
    smoothing: str = "mixture"  # none, uniform, mixture or released
    # alignment
    align_attention: bool = True  # attention alignment (AAL)
    similarity: str = "label"  # align the label's map in the last layer, all maps, or none
    align_weight: float = 10.0  # of both alignment losses; the submission had 1
    align_layers: int = 0  # first blocks whose attention is aligned; 0: 5, or fewer in a shallow tower
    branch: str = "dv"  # second branch: dv vvv qqv or kkv
    guidance_temperature: float = 1.0  # 1 is nearly uniform, 0.01 pointed
    detach: bool = False  # no gradient into the second branch


DEFAULTS, TINY = clipood.DEFAULTS, clipood.TINY
# zhyhan/AlignCLIP@bb8c449, by (task, data set): changes to DEFAULTS. The batch is 36 of each source domain.
# REF: with open classes its scripts pass no number of shots: all images train; CLIPood takes 16 of each class
PUBLISHED = {("domain-shift", name): dict(batch_size=108) for name in ("PACS", "VLCS", "TerraIncognita")}
PUBLISHED |= clipood.OPEN_CLASS | {
    ("domain-shift", "OfficeHome"): dict(batch_size=108, lr=1e-5),
    ("domain-shift", "DomainNet"): dict(batch_size=180, lr=1e-5, steps=10000, margin=0.1),
    ("in-the-wild", "OfficeHome"): dict(batch_size=108, lr=3e-6, margin=0.1, bma_beta=0.1),
    ("in-the-wild", "DomainNet"): dict(batch_size=180, lr=5e-6, steps=10000),
}
PRESETS = {
    # the released training loop, line by line: both slips of its losses included
    "alignclip-released": dict(align_weight=10.0, similarity="all", smoothing="released"),
    # the code of the submission: the same losses with weight 1
    "alignclip-submission": dict(align_weight=1.0, similarity="all", smoothing="released"),
    "alignclip-detached": dict(detach=True),
}
TASK = "labels"


def build(settings: Settings, clip: CLIP, classes: Classes) -> AlignCLIP:
    s = settings
    branch = dict(branch=s.branch, layers=s.align_layers or None, guidance_temperature=s.guidance_temperature)
    terms = dict(attention=s.align_attention, similarity=s.similarity, weight=s.align_weight)
    return AlignCLIP(clip, classes.text, **s.arguments(), **branch, **terms, detach=s.detach)


if __name__ == "__main__":
    # a class token, three patches, and texts of "dog", "wolf" and "fish"; docs/papers.md explains the numbers
    text, label = unit(torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0]])), torch.tensor([0])
    v = torch.tensor([[[[1.0, 1.0], [2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]])  # (1, 1, 1 + P, K)
    attention = cls_attention(torch.tensor([[[[0.4, 0.1, 0.3, 0.2]]], [[[0.2, 0.2, 0.2, 0.4]]]]))
    rows = {"t, SLS": smoothing_targets(text)[label], "A_c": attention}
    for branch in ("dv", "vvv"):
        maps = unit(attend(None, None, v, branch)[:, 0, 1:]) @ text.t()  # (1, P, C)
        rows |= {f"S, {branch}": maps[..., 0], f"G, {branch}": guidance(maps, label)}
    for name, row in rows.items():
        aligned = f"   KL(G || A_c) = {attention_alignment(attention, row):.3f}" if name[0] == "G" else ""
        print(f"{name:8}" + "".join(f"{x:8.3f}" for x in row[0]) + aligned)
    torch.manual_seed(0)
    cosines, label = 0.2 + 0.03 * torch.randn(2000, 196, 1), torch.zeros(2000, dtype=torch.long)
    for t in (1.0, 0.1, 0.01):
        g = guidance(cosines, label, t)
        kl = attention_alignment(torch.full_like(g, 1 / 196), g)
        print(f"T = {t:<4}  largest G / mean {196 * g.amax(-1).mean():6.2f}   KL(G || uniform) {kl:.4f}")
