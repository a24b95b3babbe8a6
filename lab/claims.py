"""The 32 claims of the two rebuttals as data: what each says, the arms that test it, and what must be seen.

a1 ... a16 are AlignCLIP's (replies to reviewers 1, 2, 3), l1 ... l16 Llip's (paper; replies to MT7j, Vo7f,
wQuf), p1 and p2 are premises of claims. In TEXT each begins with "ID NAME: sentence". The lines below are a
key and its value; deeper lines continue the value.

    paper     source and published numbers
    arms      "row: arm, row: arm"; an arm alone is a row with its own name
    figures   columns of the table, a name in GROUPS; default: labels or llip, by the arms
    seen      the judged parts, "figure: row > other, row > other; figure: ...". The relation is >, < or =,
              other is a row or a number, and "within 2" is the margin of =. "both" is each of LLIP_FIGURES
    with      a premise; a function of lab/measures.py that makes the table (or draw_..., that draws it);
              "once" (nothing is random) or "timing" (rounds of lab/bench.py)
    notes     what a reader of the table must know
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lab import measures

# Settings and arms -----------------------------------------------------------------------------------------

# 20 epochs of a set of Flickr8k's size
FLICKR8K = dict(model="small", image_size=48, steps=950, batch_size=128, lr=1e-3, weight_decay=0.2)
# "pairs": pre-training. "start": the CLIP that is fine-tuned, one for each seed. "labels": fine-tuning.
SETTINGS = {
    "quick": {  # under half an hour on two cores; an arm is far from converged
        "pairs": dict(steps=250, batch_size=64, train_size=4096),
        "start": dict(steps=1200, batch_size=48),
        "labels": dict(steps=150, train_size=1536, lr=1e-3),
    },
    "default": {  # overnight on two cores
        "pairs": dict(steps=1000),
        "start": dict(steps=4000, batch_size=48),
        "labels": dict(steps=300, lr=5e-4),
    },
    "data": {"pairs": FLICKR8K | dict(crop_scale=0.7), "start": {}, "labels": dict(steps=300)},  # with --data
}
CHOICES = """\
All choices were made once, on seeds that are not reported (100, 101, 2000); `--validation` uses such seeds.

- Scenes are designed so that Llip's mechanism can show in captions mAP. Llip beats SigLIP there by design;
  the order of the variants and kinds top-1 are open.
- Fine-tuning leaves out photos, where plain fine-tuning gains most. AlignCLIP's weight 0.3 and temperature
  0.1 are the best of five pairs on that domain itself (the others lose 1 to 3 points to CLIPood).
- The scale of semantic smoothing is 5: at the published 35 only 0.001 % of a target leaves its label here.
- Margins of "=" are conventions: 1 point of target accuracy (deviation over seeds 2.2), 2 of Llip's figures
  (2.7). Arms of a group share steps, pictures, schedule and learning rate; only AlignCLIP was tuned."""

SMOOTH = dict(smoothing="mixture", smoothing_scale=5.0)
ALIGN = dict(method="alignclip", guidance_temperature=0.1, align_weight=0.3)
FULL = ALIGN | SMOOTH


def fine_tuned(**flags) -> dict:
    """Flags of an arm that fine-tunes the arm "start" and leaves out photos."""
    return dict(start="start", train_data="scenes", target_domain="photo") | flags


ARMS = {
    **{name: dict(method=name) for name in ("clip", "siglip", "llip")},
    "llip infonce": dict(method="llip", objective="infonce"),
    **{name: dict(method="llip", pooling=name) for name in ("register", "average", "learned")},
    **{f"llip M={m}": dict(method="llip", mixture_tokens=m) for m in (1, 4, 16)},
    **{f"llip M={m} patches": dict(method="llip", mixture_tokens=m, all_tokens=True) for m in (1, 8)},
    **{f"llip tau={t}": dict(method="llip", temperature=t) for t in (0.5, 2.5, 4.0, 8.0)},
    "llip text tokens": dict(method="latent", text_tokens=4),
    "clip wide": dict(method="clip", model="small", image_size=32),
    **{f"{name} few": dict(method=name, train_size=1024) for name in ("siglip", "llip")},
    "start": dict(method="clip", train_data="broad", bias=0.8),
    "finetune": fine_tuned(method="finetune"),
    "finetune average": fine_tuned(method="finetune", image_pooling="average"),
    "clipood": fine_tuned(method="clipood"),
    "uniform": fine_tuned(method="clipood", smoothing="uniform"),
    "uniform less": fine_tuned(method="clipood", smoothing="uniform", epsilon=0.954),
    "sls": fine_tuned(method="clipood", **SMOOTH),
    "aal": fine_tuned(**ALIGN, smoothing="none"),
    "alignclip": fine_tuned(**FULL),
    **{kind: fine_tuned(**FULL, branch=kind) for kind in ("vvv", "kkv", "qqv")},
    **{f"layers {n}": fine_tuned(**FULL, align_layers=n) for n in (2, 3)},
    **{f"epsilon {e}": fine_tuned(**FULL, epsilon=e) for e in (1.0, 0.8, 0.7, 0.6)},
    **{name: fine_tuned(method=name) for name in ("coop", "cocoop", "maple", "tes")},
    "tes longer": fine_tuned(method="tes", times=4),
    "plain sls": fine_tuned(method="finetune", **SMOOTH),
    "plain sls longer": fine_tuned(method="finetune", **SMOOTH, times=4),
}
ARMS |= {f"wild {a}": ARMS[a] | dict(open_task="in-the-wild") for a in ("clipood", "sls", "aal", "alignclip")}
open_class = dict(open_task="open-class", target_domain="")
ARMS |= {f"open {a}": ARMS[a] | open_class for a in ("clipood", "alignclip")}

# Figures, parts and claims ---------------------------------------------------------------------------------

# figure: part of results.json ("reported": the averaged model where there is one), and names in it
FIGURES = {name: ("reported", name) for name in ("target", "val", "base", "new", "H")}
FIGURES |= {"accuracy": ("reported", "target", "H"), "P@10": ("aspects", "t2i_p@10")}
# the mean average precision of 450 captions ranked for an unseen picture; a single thing named among 16 kinds
FIGURES |= {"captions mAP": ("aspects", "i2t_map"), "kinds top-1": ("zeroshot", "top1")}
WAYS = {"image to text": "i2t", "text to image": "t2i"}
FIGURES |= {f"{way} R@{k}": ("retrieval", f"{key}@{k}") for way, key in WAYS.items() for k in (1, 5, 10)}
LLIP_FIGURES = ("captions mAP", "kinds top-1")
RECALL = tuple(name for name in FIGURES if " R@" in name)
GROUPS = {"labels": ("target", "val"), "llip": LLIP_FIGURES, "open": ("base", "new", "H")}
GROUPS |= {"accuracy": ("accuracy",), "retrieval": ("captions mAP", "P@10", *RECALL)}


class Part(NamedTuple):
    """One comparison that is judged: a row's figure against another row (a name) or a number."""

    figure: str
    row: str
    relation: str  # ">", "<" or "="
    other: str | float
    margin: float = 0.0  # of "="

    def __str__(self) -> str:
        other = self.other if isinstance(self.other, str) else f"{self.other:g}"
        margin = f" within {self.margin:g}" if self.margin else ""
        return f"{self.figure}: {self.row} {self.relation} {other}{margin}"


@dataclass(frozen=True)
class Claim:
    """A claim, or the premise of one: what must be true so that the claim can be tested."""

    id: str
    name: str
    says: str
    parts: tuple[Part, ...]
    arms: dict[str, str] = field(default_factory=dict)  # row: arm
    figures: tuple[str, ...] = ()
    measure: Callable | None = None  # (lab, seed) -> {row: {figure: value}}, or that and what is drawn
    kind: str = "seeds"  # once: one value is enough;  timing: a value is a list, one for each round
    picture: Callable | None = None  # of (path, [what is drawn, for each seed]); None: bars of the figures
    premise: "Claim | None" = None
    paper: str = ""
    notes: str = ""


def parts_of(text: str, rows=()) -> tuple[Part, ...]:
    """Parts from a line "seen" of TEXT; `other` is a number if it looks like one and is none of `rows`."""
    found = []
    for group in text.split("; "):
        figure, _, comparisons = group.partition(": ")
        for item in comparisons.split(", "):
            relation = next(sign for sign in "><=" if f" {sign} " in item)
            row, _, other = item.partition(f" {relation} ")
            other, _, margin = other.partition(" within ")
            if other not in rows and other.replace(".", "", 1).isdigit():
                other = float(other)
            names = LLIP_FIGURES if figure == "both" else (figure,)
            found += [Part(name, row, relation, other, float(margin or 0)) for name in names]
    return tuple(found)


def claim_of(lines: list[str], premises: dict[str, Claim]) -> Claim:
    """A claim from its lines of TEXT."""
    head, says = lines[0].split(": ", 1)
    text = dict(line.split(maxsplit=1) for line in lines[1:])
    pairs = [item.rpartition(": ") for item in text.get("arms", "").split(", ") if item]
    arms = {row or arm: arm for row, _, arm in pairs}
    values = {key: text[key] for key in ("paper", "notes") if key in text}
    for word in text.get("with", "").split(", "):
        if word in ("once", "timing"):
            values["kind"] = word
        elif word in premises:
            values["premise"] = premises[word]
        elif word:
            values["picture" if word.startswith("draw_") else "measure"] = getattr(measures, word)
    if "measure" not in values:
        values["figures"] = GROUPS[text.get("figures", "labels" if starts(arms) else "llip")]
    return Claim(*head.split(), says, parts_of(text["seen"], arms), arms, **values)


def starts(arms: dict[str, str]) -> bool:
    """Whether some of the arms fine-tune."""
    return any("start" in ARMS[arm] for arm in arms.values())


TEXT = """
p1 alignment: the aligned blocks attend to the background, and the guidance points at the thing
  arms start
  seen lift: attention < 1, guidance > 1
  with alignment_lifts
p2 smoothing: semantic smoothing moves at least 1 % of a target off its label
  arms start
  seen % of a target off its label: semantic > 1
  with smoothing_share
a1 dv-flops: D-V costs 1549 times less than V-V-V.
  paper AlignCLIP, reviewer 1, W1: 0.46478 against 0.0003 GFLOPs, 1549 times
  seen GFLOP: rebuttal's V-V-V = 0.46478 within 0.000005, rebuttal's D-V = 0.0003 within 0.00005; times: exact
    ratio = 1549 within 0.5
  with formula, once
  notes 0.0003 counts two operations a multiply-add; with all digits 1549 is 1536. 0.46478 is the value and
    output projections, which D-V has too. With projections on both sides the ratio is 1.26.
a2 dv-vs-vvv: D-V guides as well as V-V-V.
  paper AlignCLIP, reviewer 1, Table 1: VLCS 85.1 against 84.9
  arms clipood, alignclip, vvv, kkv, qqv
  seen target: alignclip = vvv within 1, alignclip > clipood
  notes The four entries of the paper's D-V row average 84.98, not 85.1.
a3 step-cost: D-V adds little to a step of CLIPood, V-V-V more.
  paper AlignCLIP, reviewer 1, W2: 0.19, 0.21 and 0.25 s for a batch of 36, ratios 1.105 and 1.316
  seen step over CLIPood's: AlignCLIP dv < 1.105, AlignCLIP vvv > AlignCLIP dv
  with step_cost, timing
  notes CLIPood here is the published one, with the last MLP on all tokens.
a4 aal: Attention alignment helps.
  paper AlignCLIP, reviewer 1, W3 and Fig. 3: +1.0 on VLCS, +2.8 on Office-Home
  arms neither: clipood, attention alignment: aal, both: alignclip, smoothing: sls
  seen target: attention alignment > neither
  with alignment
  notes Attention alignment means both of its losses. In the paper's Fig. 3a it adds only 0.5 and 0.7.
a5 sls: Semantic label smoothing helps, and more than uniform smoothing.
  paper AlignCLIP, reviewer 1, Fig. 3d: over none +3.21, +2.29, +0.89, over uniform +2.48, +2.25, +0.73
  arms none: clipood, uniform: uniform less, semantic: sls, uniform with epsilon 0.9: uniform
  seen target: semantic > none, semantic > uniform
  with smoothing
  notes Both smoothings move the same mean share of a target off its label (epsilon 0.954 for uniform).
a6 both: Both together are best under domain and class shift.
  paper AlignCLIP, reviewer 1, W3 and Fig. 3a: 82.6 neither, 83.3 alignment, 83.5 smoothing, 84.0 both
  arms neither: wild clipood, attention alignment: wild aal, smoothing: wild sls, both: wild alignclip
  figures open
  seen H: both > neither, both > attention alignment, both > smoothing
  with alignment
a7 depth: Aligning the first part of the blocks is best, aligning all hurts.
  paper AlignCLIP, reviewer 2, Fig. 3c: five of 12 blocks are best; LabelMe 65.5 one, 68.7 five, 66.3 all
  arms 0: sls, 1: alignclip, 2: layers 2, 3: layers 3
  seen target: 1 > 0, 1 > 2, 1 > 3
  with alignment
  notes This tower has three blocks. The band of the paper's figure is random.uniform(0.5, 1) in its notebook.
a8 epsilon: Not sensitive to epsilon, and any smoothing is better than 1.
  paper AlignCLIP, reviewer 3, Table 2: 67.4, 68.3, 68.3, 67.9, 67.9 for 1 ... 0.6 (LabelMe)
  arms 1.0: epsilon 1.0, 0.9: alignclip, 0.8: epsilon 0.8, 0.7: epsilon 0.7, 0.6: epsilon 0.6
  seen target: 0.9 > 1.0, 0.8 > 1.0, 0.7 > 1.0, 0.6 > 1.0, 0.8 = 0.9 within 1, 0.7 = 0.9 within 1, 0.6 = 0.9
    within 1
  notes Epsilon 1 is no smoothing here. As released it still smooths: the targets do not sum to 1.
a9 pooling: The class token beats average pooling in plain fine-tuning.
  paper AlignCLIP, reviewer 3, Table 3: 83.7 against 82.0 (VLCS)
  arms class token: finetune, average: finetune average
  seen target: class token > average
a10 structures: V-V-V, Q-Q, K-K and the diagonal give good maps; Q-K does not.
  paper AlignCLIP, reviewer 1, W1 and Fig. 8: pictures
  arms start
  seen lift: vvv > qkv, qqv > qkv, kkv > qkv, dv > qkv, vvv > centre, qqv > centre, kkv > centre, dv > centre
  with structures, draw_maps
  notes Lift is the map's share on the thing over the thing's area; chance is 1. "centre" is a cone, no model.
a11 background: CLIP's attention prefers background; AlignCLIP moves it to the foreground.
  paper AlignCLIP, reviewer 2, W2 and Fig. 1, 4; how maps are made: reviewer 3, Q2: pictures
  arms start, clipood, alignclip
  seen similarity lift: start < 1, alignclip > start, alignclip > clipood; attention lift: start < 1,
    alignclip > clipood; early attention lift: alignclip > clipood
  with background, draw_maps, alignment
  notes The authors' maps are similarities of patches to the name. Early blocks are the aligned ones.
a12 hierarchy: Text similarity keeps the hierarchy, and smoothing by it keeps it in the predictions.
  paper AlignCLIP, reviewer 3, W2 and Fig. 6: class similarity matrix
  arms start, clipood, uniform, sls
  seen nearer within, %: text > 50; wrong answers in the group, %: sls > clipood, sls > uniform
  with hierarchy, draw_matrix
a13 inference: An image's embedding is not conditioned on text; same size and speed as CLIPood.
  paper AlignCLIP, reviewer 1, W2 and reviewer 3, Q1: 1.973 s for both
  arms clipood, alignclip
  seen parameters: difference = 0; tensors: difference = 0; change with a branch: alignclip = 0 within 0.00001
  with inference, once
  notes True by construction: the finished model is a plain CLIP, with CLIP's speed.
a14 sls-vs-tes: SLS is cheaper than TeS, and more effective under shift.
  paper AlignCLIP, reviewer 1, W1.3: no numbers
  arms start, plain sls, tes, plain sls longer, tes longer
  seen parameters added: tes > sls; target: sls > tes; target, 4 times the steps: sls > tes
  with sls_and_tes
  notes Both without margin and averaging. TeS has random heads, so both also run four times the steps.
a15 prompts: Prompt tuning takes less of a step than full fine-tuning; CoCoOp is slow.
  paper AlignCLIP, reviewer 1, W2.4: no numbers
  seen step over CLIPood's: CoOp < 1, MaPLe < 1, CoCoOp > CoOp, CoCoOp > 1
  with prompt_cost, timing
a16 open-world: AlignCLIP is above CLIPood under domain shift, open class, and both.
  paper AlignCLIP, reviewer 1, W1: best on almost all of 21 data sets
  arms target clipood: clipood, target alignclip: alignclip, open H clipood: open clipood, open H alignclip:
    open alignclip, wild H clipood: wild clipood, wild H alignclip: wild alignclip, target finetune: finetune,
    target coop: coop, target cocoop: cocoop, target maple: maple, target tes: tes
  figures accuracy
  seen accuracy: target alignclip > target clipood, open H alignclip > open H clipood, wild H alignclip > wild
    H clipood, target alignclip > target finetune
  with alignment
  notes Where both papers' figures are known (VLCS 85.1 and 85.0, Office-Home 86.9 and 87.0) they are equal.
l1 zero-shot: Llip is above SigLIP and CLIP, which are equal, on the same data and backbone.
  paper Llip, general comment and Table 1: B/32 70.4 against 67.3 and 67.6, L/14 80.9 against 79.4 and 79.2
  arms clip, siglip, llip
  seen both: llip > siglip, llip > clip; kinds top-1: siglip = clip within 2
l2 retrieval: Llip is above SigLIP and CLIP in retrieval, both ways.
  paper Llip, Table 2: COCO R@1, text to image 45.6, 42.0, 41.4, image to text 63.4, 59.7, 59.4 (B/16)
  arms clip, siglip, llip
  figures retrieval
  seen captions mAP: llip > siglip; P@10: llip > siglip; image to text R@1: llip > siglip, llip > clip; text
    to image R@1: llip > siglip, llip > clip
  notes P@10 is over images for a caption. R@k is over captions of two things, which training never shows.
l3 linear-probe: Mixture tokens carry more for a linear probe.
  paper Llip, reviewer MT7j, Table R2: 78.5 against 76.8 (B/32)
  arms clip, siglip, llip, average
  seen top-1, l-bfgs: llip mean > siglip, llip concatenation > siglip
  with linear_probe
  notes How M tokens become one feature is not stated. The concatenation is M times as wide; the averaging
    arm, whose tokens no text queried, shows what the width alone gives.
l4 tokens: More mixture tokens help.
  paper Llip, Fig. 6a: K = 1, 32, 64, 128: 67.3, 70.1, 70.4, 71.2
  arms 1: llip M=1, 4: llip M=4, 8: llip, 16: llip M=16
  seen both: 4 > 1, 8 > 4, 16 > 8
l5 patches: Patches as keys and values help slightly; learned tokens matter more.
  paper Llip, reviewer MT7j, Table R3: 1 token and patches 68.2; 32: 70.4 with, 70.1 without; 64: 70.7, 70.4
  arms 1 token: llip M=1, 1 and patches: llip M=1 patches, 8 tokens: llip, 8 and patches: llip M=8 patches
  seen both: 8 and patches > 8 tokens, 8 tokens > 1 and patches
  notes The paper's Fig. 7 plots about 69.7 where the reply's table has 70.4.
l6 ladder: Registers do nothing, averaging helps some, a learned query some more, the text's query most.
  paper Llip, Fig. 3: 67.3, 67.2, 68.6, 68.8, 70.4
  arms siglip, register, average, learned query: learned, text query (Llip): llip
  seen both: register = siglip within 2, average > register, learned query > average, text query (Llip) >
    learned query
l7 cost: Training and inference cost a little more than CLIP of the same size.
  paper Llip, reviewer wQuf, Table R1: 1.43 against 1.11 s a step, 0.011 against 0.009 s an image: 1.29, 1.22
  seen FLOPs over CLIP's: Llip < 1.29; step over CLIP's: Llip < 1.29; inference over CLIP's: Llip < 1.22
  with llip_cost, timing
  notes FLOPs are of L/14 with 32 tokens and 32,768 pairs in tiles. Inference is against 1,000 prompts.
l8 prompt-count: Inference grows slowly with the number of prompts, not with their length.
  paper Llip, reviewer wQuf, Table R2: 10.7, 10.9, 11.1, 11.8 ms for 10 to 10,000 prompts, ratio 1.10
  seen time over that of 10: 1000 < 1.037, 10000 < 1.103; numbers kept of 25 words less 5: 10 = 0
  with prompt_count, timing
  notes The bounds are the paper's ratios. A prompt is one query and one feature, however long it is.
l9 smaller-better: A smaller Llip beats a larger CLIP at lower cost.
  paper Llip, reviewer MT7j, Table R1: L/14 80.9 at 0.011 s against H/14 80.5 at 0.020 s
  arms llip, clip wide
  seen both: llip > clip wide; MFLOP, 16 texts: clip wide > llip; MFLOP, 450 texts: clip wide > llip
  with sizes
l10 no-leak: Zero-shot never uses the true label.
  paper Llip, reviewer MT7j: no numbers
  arms llip
  seen answers that change, %: llip = 0; largest change among fewer classes: llip = 0 within 0.0005
  with no_leak, once
  notes True by construction: a class is scored through its own text only.
l11 context: The image seen through a caption is closer to that caption; less typographic attack.
  paper Llip, reviewer Vo7f: one picture of an apple with an iPod note
  arms clip, siglip, llip
  seen own caption closer, %: llip > 50
  with two_captions
  notes The attack is shown and not judged: models that never saw a letter in training cannot read one.
l12 spectrum: A richer representation: the covariance spectrum decays more slowly.
  paper Llip, Fig. 5: Llip decays slowest, then a learned query, then SigLIP
  arms clip, siglip, llip, learned
  seen ln s at D/2 less the first: llip > learned, learned > siglip
  with spectrum, draw_spectrum
l13 objective: InfoNCE and SigLIP baselines are comparable.
  paper Llip, Table 8: 67.6 against 67.3 (B/32)
  arms clip, siglip, llip (sigmoid): llip, llip (InfoNCE): llip infonce
  seen both: clip = siglip within 2
l14 temperature: The optimum of the temperature is wide.
  paper Llip, Fig. 6b: tau 1, 5, 8, 10: 70.3, 70.4, 70.3, 69.5
  arms 0.5: llip tau=0.5, 2.5: llip tau=2.5, 4.0: llip tau=4.0, 5.0: llip, 8.0: llip tau=8.0
  seen both: 2.5 = 0.5 within 2, 2.5 = 4.0 within 2, 2.5 = 5.0 within 2
l15 text-tokens: Do latent tokens on the text side help?
  paper Llip, reviewer MT7j: an interesting follow-up. A question of this project
  arms llip, 4 text tokens: llip text tokens
  seen both: 4 text tokens > llip
  notes The model is lab/latent_text.py. Each pair costs four times as much.
l16 small-data: Does Llip keep its lead on little data?
  paper Llip, reviewer MT7j: left for future work. A question of this project
  arms siglip on 1024 pictures: siglip few, llip on 1024 pictures: llip few, siglip, llip
  seen both: llip on 1024 pictures > siglip on 1024 pictures
"""
NAMED = {}
for paragraph in TEXT.strip().replace("\n    ", " ").replace("\n  ", "\t").splitlines():
    one = claim_of(paragraph.split("\t"), NAMED)
    NAMED[one.name] = one
CLAIMS = tuple(claim for claim in NAMED.values() if claim.id[0] != "p")
BY_NAME = NAMED | {claim.id: claim for claim in NAMED.values()}
