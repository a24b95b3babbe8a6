"""The 32 claims of the two rebuttals as data: what each says, on what it is tried, and what would show it.

A claim names arms (runs of train.py, by their flags) or a measurement (a function below), gives a table
{row: {figure: a value for each seed}}, and lists in Parts what the table must show. reproduce.py trains,
measures, judges and reports; nothing here trains.

    source  A: AlignCLIP's replies to its reviewers;  L: Llip's;  numbers of tables and figures as there
    arms    ARMS below, beside SETTINGS, which are the same for every arm of a group
    parts   More, Same, Below, Above, Equal: judged on paired seeds, see reproduce.py for the rule

How the settings were chosen is written beside them. Llip's claims are about zero-shot accuracy in the
paper; here they are judged by both figures that there are: CAPTIONS, the mean average precision of ranking
some 450 short captions for an unseen picture, and KINDS, the accuracy of naming a single thing among 16.
The scenes were made so that Llip's mechanism can show in the first (LOG.md): that Llip is above SigLIP in
it is a choice of ground as much as a finding; what the choice does not decide is the order of variants,
and the second figure.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

import alignclip
import attention
import data
import evaluate
import llip
import model as towers
from baselines.cocoop import CoCoOp
from baselines.coop import CoOp
from baselines.maple import MaPLe
from baselines.tes import TeS
from clipood import FineTune
from evals import features, maps, typographic
from evals import linear_probe as probes
from evals import spectrum as spectra
from lab import peers
from losses import siglip
from model import CLIP, CONFIGS
from readers import scenes
from scale import llip_tiles as tiles
from util import plots

# What must be seen -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class More:
    """Row `above` exceeds row `below` in a figure."""

    figure: str
    above: str
    below: str


@dataclass(frozen=True)
class Same:
    """Two rows differ by no more than `within`, in the figure's own unit: an equivalence."""

    figure: str
    a: str
    b: str
    within: float


@dataclass(frozen=True)
class Below:
    """A row's figure lies under a bound."""

    figure: str
    row: str
    bound: float


@dataclass(frozen=True)
class Above:
    """A row's figure lies over a bound."""

    figure: str
    row: str
    bound: float


@dataclass(frozen=True)
class Equal:
    """A row's figure is this number, to the digits that it was published with."""

    figure: str
    row: str
    value: float
    digits: int


@dataclass(frozen=True)
class Claim:
    """One claim.

    arms: {row: arm}, trained;  figures: {figure: (part of results.json, name)}, in per cent
    measure: instead of figures, function(lab, seed) -> {row: {figure: value}}, or that and more to draw
    exact: nothing in it is left to chance, one value is enough
    alone: a timing; measure(lab, repetition) is called in turn, with nothing beside it
    picture: bars, lines (rows are numbers) or none; or a function(path, table, [extra of each seed])
    pairs: {arms, figures, parts} that change with --data, a list of captions; others: on_pairs
    """

    id: str
    name: str
    says: str
    source: str
    paper: str
    parts: tuple
    arms: dict = field(default_factory=dict)
    figures: dict = field(default_factory=dict)
    measure: Callable | None = None
    exact: bool = False
    alone: bool = False
    picture: str | Callable = "bars"
    notes: str = ""
    ours: bool = False  # nobody has published numbers to compare with
    pairs: dict = field(default_factory=dict)


# Arms and settings -----------------------------------------------------------------------------------------

# Group "pairs": pre-training on scenes, `train.py --method llip` and its variants. What a scene is like was
# chosen before, by looking at single runs of seed 0 (LOG.md); seeds and test pictures here are others.
# Group "start": the CLIP that is fine-tuned. Group "labels": fine-tuning on single things. See CHOICES.
SETTINGS = {
    "quick": {  # under half an hour on two cores; an arm is far from converged
        "pairs": dict(steps=250, batch_size=64, train_size=4096),
        "start": dict(steps=1200, batch_size=48),
        "labels": dict(steps=150, train_size=1536, lr=1e-3),
    },
    "default": {  # the budget of train.py, overnight on two cores
        "pairs": dict(steps=1000),
        "start": dict(steps=4000, batch_size=48),
        "labels": dict(steps=300, lr=5e-4),
    },
    "cuda": {  # a model of twice the width at twice the resolution, longer
        "pairs": dict(model="small", steps=3000, batch_size=256, train_size=49152, lr=1e-3),
        "start": dict(model="small", steps=6000, batch_size=128, train_size=49152, lr=1e-3),
        "labels": dict(steps=300, lr=5e-4),
    },
    "data": {  # with --data: Flickr8k's size, 20 epochs at 48 pixels, as in LOG.md
        "pairs": dict(
            model="small", image_size=48, steps=950, batch_size=128, lr=1e-3, weight_decay=0.2, crop_scale=0.7
        ),
        "start": {},
        "labels": dict(steps=300),
    },
}

ASKED = "photo"  # the domain left out of fine-tuning, and asked
BIAS = 0.8  # of the pre-training: share of pictures whose background is the home of the (first) thing
GUIDE = dict(method="alignclip", guidance_temperature=0.1, align_weight=0.3)
START = dict(method="clip", train_data="broad", bias=BIAS)


SMOOTH = dict(smoothing="mixture", smoothing_scale=5.0)
FULL = GUIDE | SMOOTH


def fine_tuned(task: str = "domain-shift", **flags) -> dict:
    target = {} if task == "open-class" else {"target_domain": ASKED}
    return dict(start="start", train_data="scenes", open_task=task) | target | flags


CHOICES = """\
Chosen once, in single runs on seeds and pictures that no reported seed has (100, 101 and 2000); the runs are
not kept, but `--validation` puts any claim on such seeds:

- Llip's arms: scenes and values of train.py, as they were. What scenes are like was chosen before, on single
  runs of seed 0, so that Llip's mechanism can be seen (LOG.md tells where it cannot); pictures, weights and
  tests here are others. Both figures there are (see the top of claims.py) are judged.
- The CLIP to fine-tune: pre-trained on `broad` scenes (several things and single ones, every domain), since
  one of photos of several things knows next to nothing of single things in other domains: zero-shot 17 % of
  16 kinds after 1,200 steps of 48 pairs on scenes, 26 % on single things, 33 % on both.
- Its bias 0.8 (background is the thing's own home) gives it the habit that AlignCLIP speaks of.
- Fine-tuning: unbiased pictures, target photo, where plain fine-tuning has something to gain (36 to 51 %);
  under a bias of 0.8 it had less (36 to 41 %), and sketches are too easy for this CLIP (72 % before).
- AlignCLIP's weight and temperature: 0.3 and 0.1, the best of five pairs by accuracy on the left-out
  domain itself (an oracle, in DomainBed's words, that no other arm had; other pictures than those
  reported). Points of target accuracy over CLIPood on the two seeds: 0.3, 0.1: +0.4, -1.5; 1, 0.1: -1.0,
  -1.7; 1, 0.03: -2.4, -2.1; 1, 1 (the submission's weight): -1.7, -2.3; 10, 1 (the authors' last): -2.9,
  -3.5. None was above CLIPood on both.
- The scale of semantic smoothing: 5. With the authors' 35 it is no smoothing here: class texts of this CLIP
  are far apart (mean cosine 0.32), and 0.001 % of a target leaves its label; with 5 it is 4.3 % (seed 100),
  with uniform smoothing 9.4 %. Chosen by that share alone, but after 35 had been run on the seeds then
  reported (from 1000; A5: 0.07 +- 0.03 points below none, A12: 0.05 below), which is how it was noticed. So
  all claims are reported on new seeds, from 3000, with which nothing was run before. The parts of many claims
  were also set anew before (sharper, or by both figures), with the results of seeds 1000 to 1002 known.
- Same "within" 1 point of target accuracy or 2 of Llip's figures: a convention, below the deviation over the
  seeds of one arm (2.2 for CLIPood's target accuracy, 2.7 for Llip's mAP).
- One learning rate for every arm of a group, not searched; no arm was tuned on its own but AlignCLIP (above).
- Arms that are compared have the same steps, pictures and schedule. Parameters differ as the methods do: CLIP
  340 thousand, Llip with 8 tokens 410 (21 % more: W_K and W_V of each token), with 16 477, a learned
  query 406."""
DEPTHS = (1, 2, 3)  # of three blocks; AlignCLIP's own is one, half of what is before the branch
EPSILONS = (1.0, 0.9, 0.8, 0.7, 0.6)
ARMS = {
    "clip": dict(method="clip"),
    "siglip": dict(method="siglip"),
    "llip": dict(method="llip"),
    "llip infonce": dict(method="llip", objective="infonce"),
    **{name: dict(method="llip", pooling=name) for name in ("register", "average", "learned")},
    **{f"llip M={m}": dict(method="llip", mixture_tokens=m) for m in (1, 4, 16)},
    **{f"llip M={m} patches": dict(method="llip", mixture_tokens=m, all_tokens=True) for m in (1, 8)},
    **{f"llip tau={t}": dict(method="llip", temperature=t) for t in (0.5, 2.5, 4.0, 8.0)},
    "llip text tokens": dict(method="llip", text_tokens=4),
    "clip wide": dict(method="clip", model="small", image_size=32),
    "siglip few": dict(method="siglip", train_size=1024),
    "llip few": dict(method="llip", train_size=1024),
    # fine-tuning; one CLIP for each seed
    "start": START,
    "finetune": fine_tuned(method="finetune"),
    "finetune average": fine_tuned(method="finetune", image_pooling="average"),
    "clipood": fine_tuned(method="clipood"),
    "uniform": fine_tuned(method="clipood", smoothing="uniform"),
    "uniform less": fine_tuned(method="clipood", smoothing="uniform", epsilon=0.954),
    "sls": fine_tuned(method="clipood", **SMOOTH),
    "aal": fine_tuned(**GUIDE, smoothing="none"),
    "alignclip": fine_tuned(**FULL),
    **{kind: fine_tuned(**FULL, branch=kind) for kind in ("vvv", "kkv", "qqv")},
    **{f"layers {n}": fine_tuned(**FULL, align_layers=n) for n in DEPTHS[1:]},
    **{f"epsilon {e}": fine_tuned(**FULL, epsilon=e) for e in EPSILONS if e != 0.9},
    "tes": fine_tuned(method="tes"),
    "tes longer": fine_tuned(method="tes", times=4),
    "plain sls": fine_tuned(method="finetune", **SMOOTH),
    "plain sls longer": fine_tuned(method="finetune", **SMOOTH, times=4),
    **{name: fine_tuned(method=name) for name in ("coop", "cocoop", "maple")},
    **{
        f"{task} {name}": fine_tuned(task, **flags)
        for task, short in (("in-the-wild", "wild"), ("open-class", "open"))
        for name, flags in (
            ("clipood", dict(method="clipood")),
            ("sls", dict(method="clipood", **SMOOTH)),
            ("aal", GUIDE | dict(smoothing="none")),
            ("alignclip", FULL),
        )
        if short == "wild" or name in ("clipood", "alignclip")
    },
}


def same_as(names: dict) -> dict:
    """{row: arm} with rows called as their arms."""
    return {name: name for name in names}


CAPTIONS = {"captions mAP": ("aspects", "i2t_map")}
KINDS = {"kinds top-1": ("zeroshot", "top1")}
LLIP_FIGURES = CAPTIONS | KINDS


def by_both(*parts) -> tuple:
    """The parts by each of Llip's two figures."""
    return tuple(replace(part, figure=figure) for figure in LLIP_FIGURES for part in parts)


TARGET = {"target": ("reported", "target"), "val": ("reported", "val")}
OPEN = {"base": ("reported", "base"), "new": ("reported", "new"), "H": ("reported", "H")}
RECALL = {
    f"{name} R@{k}": ("retrieval", f"{way}@{k}")
    for way, name in (("i2t", "image to text"), ("t2i", "text to image"))
    for k in (1, 5, 10)
}
THREE = same_as(("clip", "siglip", "llip"))
OVER_BOTH = tuple(
    More(f"{way} R@1", "llip", other)
    for way in ("image to text", "text to image")
    for other in ("siglip", "clip")
)

# Measurements of trained models ----------------------------------------------------------------------------


def photos(split: str, size: int, seed: int, lab) -> scenes.Objects:
    return scenes.Objects(split, size, seed, lab.image_size, ("photo",))


def linear_probe(lab, seed: int) -> dict:
    """Top-1 of both probes on each image tower's output, in per cent: CLIP's (L-BFGS) and AdamW's."""
    rows = {}
    sets = {n: photos(n, k, seed, lab) for n, k in (("train", 1536), ("val", 512), ("test", 960))}
    labels = {name: torch.tensor(d.labels) for name, d in sets.items()}
    for arm in (*THREE, "average"):
        net, _ = lab.model(arm, seed)
        tokens = {name: features.encode(net, d) for name, d in sets.items()}
        for kind in features.reduced(tokens["train"]):
            parts = {n: (features.reduced(x)[kind], labels[n]) for n, x in tokens.items()}
            found = {
                f"top-1, {solver}": 100 * probes.probe(solver, parts, len(scenes.KINDS), **how)["top1"]
                for solver, how in (("l-bfgs", {}), ("adamw", {"seed": seed}))
            }
            width = float(parts["train"][0].shape[1])
            rows[arm if kind == "class token" else f"{arm} {kind}"] = found | {"width": width}
    return rows


def spectrum(lab, seed: int) -> tuple[dict, dict]:
    """Effective rank of the covariance of the image tower's output, and its log singular values."""
    rows, curves = {}, {}
    dataset = scenes.Scenes("test", 1024, seed, lab.image_size, ("photo",))
    for arm in ("clip", "siglip", "learned", "llip"):
        tokens = features.encode(lab.model(arm, seed)[0], dataset)
        row, logs = spectra.spectrum_row(arm, tokens)
        half = logs[len(logs) // 2]
        rows[arm] = {"ln s at D/2 less the first": (half if half is not None else -99.0) - logs[0]}
        rows[arm]["effective rank"] = row["effective rank"]
        curves[arm] = [None if v is None else v - logs[0] for v in logs]
    return rows, curves


def two_captions(lab, seed: int) -> dict:
    """Two true captions of a picture: is the image seen through one closer to it than through the other?

    And the typographic attack: of the pictures named rightly, those that a written word turns, less those
    that a blank note turns to the same word anyway.
    """
    rows, dataset = ({}, scenes.Scenes("test", 400, seed, lab.image_size, ("photo",), captions="aspects"))
    for arm in THREE:
        net, tokenizer = lab.model(arm, seed)
        found = {}  # one vector for every caption has nothing to gain
        if isinstance(net, llip.Llip):
            found = own_caption(net, tokenizer, dataset)
        typed = typographic.typographic(
            net, photos("test", 480, seed, lab), tokenizer, scenes.TEMPLATES, seed
        )[0]
        more = typed["word"]["success"] - typed["blank"]["success"]
        rows[arm] = found | {"attack success": 100 * more, "clean": 100 * typed["clean"]["top1"]}
    return rows


@torch.no_grad()
def own_caption(net: llip.Llip, tokenizer, dataset) -> dict[str, float]:
    """cos(z_i(a), t_a) against cos(z_i(b), t_a) for the first two captions a, b of every picture i."""
    transform = data.preprocess(net.config.image_size)
    device = net.logit_scale.device
    images = torch.stack([transform(dataset.image(i)) for i in range(len(dataset))])
    keys, values = net.encode_image(images.to(device))
    sides = []
    for n in (0, 1):
        tokens = tokenizer([c[n] for c in dataset.captions], net.config.context_length)
        sides.append(net.encode_text(tokens.to(device)))
    gains = []
    for n in (0, 1):
        (own_q, text), (other_q, _) = sides[n], sides[1 - n]
        text = text / text.norm(dim=-1, keepdim=True)
        cosine = []
        for queries in (own_q, other_q):
            one = zip(keys.split(1), values.split(1), queries.split(1))
            z = torch.cat([net.mix(*parts)[:, 0] for parts in one])  # (N, E), each through its own
            cosine.append((z / z.norm(dim=-1, keepdim=True) * text).sum(-1))
        gains.append(cosine[0] - cosine[1])
    gains = torch.cat(gains)
    return {
        "own caption closer": 100 * (gains > 0).double().mean().item(),
        "cosine gained": gains.double().mean().item(),
    }


def no_leak(lab, seed: int) -> dict:
    """Zero-shot answers before and after the labels are permuted, and scores among fewer classes."""
    net, tokenizer = lab.model("llip", seed)
    dataset = photos("test", 480, seed, lab)
    _, answers = evaluate.classify(net, dataset, tokenizer, scenes.TEMPLATES)
    shuffled = photos("test", 480, seed, lab)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    shuffled.labels = [dataset.labels[i] for i in order.tolist()]
    place, again = evaluate.classify(net, shuffled, tokenizer, scenes.TEMPLATES)
    with evaluate.evaluating(net):
        scores = []
        for names in (dataset.classes, dataset.classes[:8]):
            side = evaluate.encode_classes(net, tokenizer, names, scenes.TEMPLATES)
            scores.append(torch.cat([s for _, s in evaluate.score_rows(net, dataset, side)]))
    change = (scores[0][:, :8] - scores[1]).abs().max().item()
    return {
        "llip": {
            "answers that change, %": 100 * (answers != again).double().mean().item(),
            "largest change of a score among fewer classes": round(change, 4),
            "top-1 under permuted labels, %": 100 * (place == 0).double().mean().item(),
        }
    }


def sizes(lab, seed: int) -> dict:
    """Captions mAP of a smaller Llip and a larger CLIP, and what an image costs with few and many texts."""
    rows = {}
    for arm in ("llip", "clip wide"):
        net, _ = lab.model(arm, seed)
        rows[arm] = {name: lab.figure(arm, seed, *where) for name, where in LLIP_FIGURES.items()}
        for texts in (16, 450):
            if arm == "llip":
                cost = llip.flops(net.config, net.visual.tokens, texts)
                cost = cost["image"] + cost["pairs"]
            else:
                cost = towers.tower_flops(net.config)["image"] + texts * 2 * net.config.embed_dim
            rows[arm][f"MFLOP, {texts} texts"] = cost / 1e6
    return rows


PICTURES = 6  # shown of each claim about maps


def sought(lab, seed: int) -> scenes.Objects:
    """Single things with masks, of every domain."""
    return scenes.Objects("test", 640, seed, lab.image_size)


def structures(lab, seed: int) -> tuple[dict, dict]:
    """Lift and pointing of the similarity map under each attention structure, on masks; CLIP untouched."""
    net, tokenizer = lab.model("start", seed)
    names = [*attention.KINDS, "centre"]
    scores, kept = maps.measure(net, tokenizer, sought(lab, seed), names, show=range(PICTURES))
    rows = {n: {"lift": scores[n]["lift"], "pointing, %": 100 * scores[n]["pointing"]} for n in names}
    return rows, to_draw(lab, seed, names, [kept])


def to_draw(lab, seed: int, names: list[str], kept: list[dict]) -> dict:
    """The maps of some pictures, of one model after the other, and what is needed to draw them again."""
    maps = {i: torch.cat([m[i][..., 1:] for m in kept], -1) for i in kept[0]}
    maps = {i: torch.cat([kept[0][i][..., :1], m], -1).tolist() for i, m in maps.items()}
    return {"seed": seed, "size": lab.image_size, "names": names, "maps": maps}


BACKGROUND = ("start", "clipood", "alignclip")


def background(lab, seed: int) -> tuple[dict, dict]:
    """Lift of the patches' similarity to the name (the authors' map) and of the class token's attention."""
    rows, shown, dataset = {}, [], sought(lab, seed)
    names = {"plain": "similarity", "cls": "attention", "cls-early": "early attention"}
    for arm in BACKGROUND:
        net, tokenizer = lab.model(arm, seed)
        scores, kept = maps.measure(net, tokenizer, dataset, [*names], show=range(PICTURES))
        rows[arm] = {f"{text} lift": scores[name]["lift"] for name, text in names.items()}
        shown.append({i: kept[i][..., :3] for i in kept})  # mask, similarity, attention
    titles = [f"{arm}: {text}" for arm in BACKGROUND for text in ("similarity", "attention")]
    return rows, to_draw(lab, seed, titles, shown)


def hierarchy(lab, seed: int) -> tuple[dict, list]:
    """Are kinds of one super-class nearer in text, and do wrong answers stay in the super-class?

    nearer: share of (pair within, pair across) with the higher cosine within, 50 by chance
    stays: wrong answers on the target within the right super-class; of 15 wrong kinds 3 are, 20 by chance
    """
    group = torch.tensor(scenes.GROUP_OF)
    same = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool)
    across = group[:, None] != group
    net, tokenizer = lab.model("start", seed)
    with evaluate.evaluating(net):
        text = evaluate.encode_classes(net, tokenizer, list(scenes.KINDS), scenes.TEMPLATES)
    cosines = (text @ text.t()).cpu()  # (C, C)
    nearer = (cosines[same][:, None] > cosines[across][None]).double().mean().item()
    rows = {"text": {"nearer within, %": 100 * nearer}}
    dataset = scenes.Objects("test", 960, seed, lab.image_size, (ASKED,))
    target = torch.tensor(dataset.labels)
    for arm in ("clipood", "uniform", "sls"):
        tuned, tokenizer = lab.model(arm, seed)
        _, answer = evaluate.classify(tuned, dataset, tokenizer, scenes.TEMPLATES)
        wrong = answer != target
        stays = (group[answer] == group[target])[wrong].double().mean().item()
        rows[arm] = {"wrong answers that stay in the group, %": 100 * stays}
    return rows, cosines.tolist()


def inference(lab, seed: int) -> dict:
    """AlignCLIP's finished model against CLIPood's: size, and the embedding as training's two paths give it.

    change: of the class token's embedding between encode_image and the plain path beside a second branch
    """
    rows, work = {}, {}
    images = torch.rand(8, 3, lab.image_size, lab.image_size).to(lab.device)
    for arm in ("clipood", "alignclip"):
        net, _ = lab.model(arm, seed)
        work[arm] = torch.no_grad()(partial(net.encode_image, images))
        with evaluate.evaluating(net):
            plain, change = net.encode_image(images), 0.0
            for branch in ("dv", "vvv"):
                x, _, _ = alignclip.two_paths(net.visual, net.visual.embed(images), branch, 1, 1)
                beside = net.visual.head(x[:, 0])
                change = max(change, (beside - plain).abs().max().item() / plain.abs().max().item())
        rows[arm] = {
            "parameters": float(sum(p.numel() for p in net.parameters())),
            "relative change beside a branch": change,
            "tensors of the checkpoint": float(len(net.state_dict())),
        }
    rows["difference"] = {
        name: rows["alignclip"][name] - rows["clipood"][name]
        for name in ("parameters", "tensors of the checkpoint")
    }
    for arm, spent in timed(work, seed).items():
        rows[arm]["ms an inference of 8"] = 1000 * spent
    return rows


def accuracy_and_parameters(lab, seed: int) -> dict:
    """Target accuracy of SLS and TeS at the same steps and at four times as many, parameters, a step."""
    rows = {}
    for name, arm in (("sls", "plain sls"), ("tes", "tes")):
        net, tokenizer = lab.model("start", seed)
        with evaluate.evaluating(net):
            text = evaluate.encode_classes(net, tokenizer, list(scenes.KINDS), scenes.TEMPLATES)
        before = sum(p.numel() for p in net.parameters())
        method = TeS(net, text) if name == "tes" else FineTune(net, text, smoothing="mixture")
        method.to(lab.device)
        method.train()
        images = torch.rand(36, 3, lab.image_size, lab.image_size).to(lab.device)
        labels = torch.arange(36, device=lab.device) % len(text)
        rows[name] = {
            "target": 100 * lab.reported(arm, seed)["target"],
            "target, 4 times the steps": 100 * lab.reported(f"{arm} longer", seed)["target"],
            "parameters added": float(sum(p.numel() for p in method.parameters()) - before),
            "ms a step": 1000 * step_seconds(method, images, labels, 5),
        }
    return rows


def step_seconds(method, images: Tensor, labels: Tensor, times: int = 1) -> float:
    """CPU (or GPU) seconds of one forward and backward pass; the least of `times`."""
    return min(seconds(lambda: train_once(method, images, labels)) for _ in range(times))


def train_once(method, images: Tensor, labels: Tensor) -> None:
    method.zero_grad(set_to_none=True)
    method.loss(images, labels)[0].backward()


def seconds(work: Callable) -> float:
    """CPU seconds of this process, or seconds of the GPU where there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    work()
    return time.process_time() - began


# Timings: random weights, arms in turn, ratios within a round ----------------------------------------------


def timed(arms: dict[str, Callable], repetition: int) -> dict[str, float]:
    """Seconds of each piece of work: the least of two after one that is not timed, in an order that turns."""
    for work in arms.values():
        work()
    names, found = list(arms), {}
    first = repetition % len(names)
    for name in names[first:] + names[:first]:
        found[name] = min(seconds(arms[name]) for _ in range(2))
    return {name: found[name] for name in names}


def once(build: Callable) -> Callable:
    """Keeps what the first call made: a round of timings should not build models again."""
    kept = []

    def get(*args):
        if not kept:
            torch.manual_seed(0)
            kept.append(build(*args))
        return kept[0]

    return get


def depth_cut(name: str, part: int, classes: int = 7) -> towers.Config:
    """A published tower with 1/part of its blocks: ratios of blocks stay, and minutes become seconds."""
    c = CONFIGS[name]
    return replace(
        c,
        vision_layers=max(1, c.vision_layers // part),
        text_layers=max(1, c.text_layers // part),
        vocab_size=512,
    )


def unit_rows(n: int, width: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, width), dim=-1)


@once
def step_methods(device):
    clip = CLIP(replace(CONFIGS["ViT-B-16"], text_layers=1, vocab_size=512)).to(device)
    text = unit_rows(7, clip.config.embed_dim).to(device)
    batch = (torch.randn(1, 3, 224, 224, device=device), torch.tensor([3], device=device))
    whole = CLIP(clip.config).to(device)
    whole.encode_image = partial(peers.published_tower, whole.visual)
    return batch, {
        "CLIPood": FineTune(whole, text, margin=0.3),
        "CLIPood, last MLP of the class token alone": FineTune(clip, text, margin=0.3),
        "D-V": alignclip.AlignCLIP(clip, text),
        "V-V-V": alignclip.AlignCLIP(clip, text, branch="vvv"),
    }


def step_cost(lab, repetition: int) -> dict:
    """Forward and backward of ViT-B/16, one image, one thread; seconds over those of CLIPood."""
    batch, methods = step_methods(lab.device)
    work = {name: partial(train_once, method, *batch) for name, method in methods.items()}
    spent = timed(work, repetition)
    return {name: {"step over CLIPood's": spent[name] / spent["CLIPood"]} for name in methods}


@once
def prompt_methods(device):
    clip = depth_cut("ViT-S-16", 3)
    tokens = torch.zeros(7, 16, dtype=torch.long)
    tokens[:, 0], tokens[:, 1:8], tokens[:, 8] = 510, torch.randint(1, 500, (7, 7)), 511
    tokens, text = tokens.to(device), unit_rows(7, clip.embed_dim).to(device)
    clip = replace(clip, context_length=32)
    batch = (torch.randn(8, 3, 224, 224, device=device), torch.arange(8, device=device) % 7)
    return batch, {
        "CLIPood": FineTune(CLIP(clip).to(device), text, margin=0.3),
        "AlignCLIP": alignclip.AlignCLIP(CLIP(clip).to(device), text),
        "CoOp": CoOp(CLIP(clip).to(device), tokens, 4),
        "CoCoOp": CoCoOp(CLIP(clip).to(device), tokens, 4),
        "MaPLe": MaPLe(CLIP(clip).to(device), tokens, 2, min(4, clip.vision_layers)),
    }


def prompt_cost(lab, repetition: int) -> dict:
    """A step over CLIPood's, what learns and what is kept; ViT-S/16 of 4 blocks, 8 images, 7 classes."""
    batch, methods = prompt_methods(lab.device)
    work = {name: partial(train_once, method, *batch) for name, method in methods.items()}
    spent = timed(work, repetition)
    return {
        name: {
            "step over CLIPood's": spent[name] / spent["CLIPood"],
            "thousand parameters that learn": learning(method) / 1e3,
            "MB kept for the backward pass": kept_bytes(method, *batch) / 1e6,
        }
        for name, method in methods.items()
    }


def learning(method) -> int:
    return sum(p.numel() for p in method.parameters() if p.requires_grad)


def kept_bytes(method, images: Tensor, labels: Tensor) -> int:
    """Bytes of all tensors that autograd keeps between the passes, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = method.loss(images, labels)[0]
    assert loss.requires_grad  # alive until here: no storage was used twice
    return sum(kept.values())


@once
def llip_pair(device):
    config = depth_cut("ViT-L-14", 6)
    images = torch.randn(2, 3, 224, 224, device=device)
    tokens = torch.zeros(2, 64, dtype=torch.long, device=device)
    tokens[:, 0], tokens[:, 1:12], tokens[:, 12] = 510, 7, 511
    nets = {"CLIP": CLIP(config, bias=-10.0), "Llip": llip.Llip(config, 32, 8, temperature=1.0)}
    return (images, tokens), {name: net.to(device) for name, net in nets.items()}


def llip_cost(lab, repetition: int) -> dict:
    """A training step and an inference against 1,000 prompts, over CLIP's; L/14, 32 tokens, 4 blocks."""
    (images, tokens), nets = llip_pair(lab.device)
    sides = {name: prompt_side(net, 1000, lab.device) for name, net in nets.items()}

    def step(net):
        net.zero_grad(set_to_none=True)
        siglip(net.pair_logits(net.encode_image(images), net.encode_text(tokens))).backward()

    def answer(name):
        with torch.no_grad():
            nets[name].pair_logits(nets[name].encode_image(images[:1]), sides[name])

    train = timed({name: partial(step, net) for name, net in nets.items()}, repetition)
    infer = timed({name: partial(answer, name) for name in nets}, repetition)
    c, texts = CONFIGS["ViT-L-14"], 32768
    own, plain = llip.flops(c, 32, texts), towers.tower_flops(c)
    clip = 3 * (plain["image"] + plain["text"] + 2 * texts * c.embed_dim)
    here = tiles.flops(4096, texts, 32, 8, c.embed_dim, train=True) / 4096  # a rank's share of 8
    both = 3 * (own["image"] + own["text"])
    counts = {"CLIP": (clip, clip), "Llip": (both + here, both + 3 * own["pairs"])}
    return {
        name: {
            "step over CLIP's, 2 pairs": train[name] / train["CLIP"],
            "inference over CLIP's": infer[name] / infer["CLIP"],
            "FLOPs of a step over CLIP's, 32,768 pairs": counts[name][0] / clip,
            "the same, pairs in the plain form": counts[name][1] / clip,
        }
        for name in nets
    }


def prompt_side(net, prompts: int, device):
    """A text side of so many prompts, without a text tower having read them."""
    g = torch.Generator().manual_seed(0)
    text = torch.randn(prompts, net.config.embed_dim, generator=g).to(device)
    if isinstance(net, llip.Llip):
        return net.split(torch.randn(text.shape, generator=g).to(device)), text
    return text


PROMPTS = (10, 100, 1000, 10000)


@once
def large_llip(device):
    config = replace(CONFIGS["ViT-L-14"], text_layers=1, vocab_size=512)
    return llip.Llip(config, 32, 8, temperature=1.0).to(device).eval(), torch.randn(
        1, 3, 224, 224, device=device
    )


def prompts_cost(lab, repetition: int) -> dict:
    """One image of L/14 against 10 to 10,000 prompts, over the time for 10; texts encoded beforehand."""
    net, image = large_llip(lab.device)
    with torch.no_grad():
        side = net.encode_image(image)
        work = {"tower": lambda: net.encode_image(image)}
        for n in PROMPTS:
            work[n] = partial(net.pair_logits, side, prompt_side(net, n, lab.device))
        pairs = timed(work, repetition)
        tower = pairs.pop("tower")
        lengths = [sum(part.numel() for part in net.encode_text(ids(words, lab.device))) for words in (5, 60)]
    return {
        str(n): {
            "time over that of 10": (tower + pairs[n]) / (tower + pairs[10]),
            "numbers kept of a prompt of 60 words, less one of 5": float(lengths[1] - lengths[0]),
        }
        for n in PROMPTS
    }


def ids(words: int, device) -> Tensor:
    return torch.tensor([[510, *[7] * words, 511]], device=device)


def formula(lab, seed: int) -> dict:
    """The rebuttal's own formulas, and exact counts (2 a multiply-add): ViT-B/16, one layer, one image."""
    N, D, H = 197, 768, 12
    K, count = D // H, attention.flops
    dv, vvv = H * N * K, H * 2 * N * (K * D + K * D)
    whole = {kind: count(kind, N, D, H) for kind in ("qkv", "vvv", "dv")}
    mixing = {kind: count(kind, N, D, H, projections=False) for kind in ("vvv", "dv")}
    return {
        "rebuttal's formula, V-V-V": {"GFLOP": vvv / 1e9},
        "rebuttal's formula, D-V": {"GFLOP": dv / 1e9},
        "the same, 2 a multiply-add": {"GFLOP": 2 * dv / 1e9},
        "ratio of the printed numbers": {"times": 0.46478 / 0.0003},
        "ratio of the formulas": {"times": vvv / dv},
        "exact, Q-K-V": {"GFLOP": whole["qkv"] / 1e9},
        "exact, V-V-V": {"GFLOP": whole["vvv"] / 1e9},
        "exact, D-V": {"GFLOP": whole["dv"] / 1e9},
        "exact, V-V-V without projections": {"GFLOP": mixing["vvv"] / 1e9},
        "exact, D-V without projections": {"GFLOP": mixing["dv"] / 1e9},
        "exact ratio, V-V-V over D-V": {"times": whole["vvv"] / whole["dv"]},
    }


# Pictures beyond bars and lines ----------------------------------------------------------------------------


def draw_spectrum(path, table: dict, extras: list) -> None:
    """Mean over seeds of the log singular values, the first at 0."""
    curves = {}
    for arm in extras[0]:
        ranks = zip(*(extra[arm] for extra in extras))
        points = [(k, statistics.fmean(v)) for k, v in enumerate(ranks) if None not in v]
        curves[arm] = points
    plots.lines(path, {"ln of singular values, less the first": curves}, xlabel="rank")


def draw_maps(path, table: dict, extras: list) -> None:
    """Some pictures of the first seed with the masks of their things, and every map of them."""
    first = extras[0]
    dataset = scenes.Objects("test", 640, first["seed"], first["size"])
    kept = {int(i): torch.tensor(values) for i, values in first["maps"].items()}
    maps.draw_sheet(path, dataset, kept, first["names"], "each map stretched to its own range")


def draw_matrix(path, table: dict, extras: list) -> None:
    """Cosines of the names' texts, mean over seeds."""
    values = np.mean([np.array(extra) for extra in extras], axis=0)
    plots.matrix(path, values, list(scenes.KINDS), list(scenes.KINDS), "cosines of class texts")


# The list --------------------------------------------------------------------------------------------------

A, L = "AlignCLIP, reply to reviewer", "Llip, reply to reviewer"
CLAIMS = (
    Claim(
        "a1",
        "dv-flops",
        "D-V costs 1549 times less than V-V-V.",
        f"{A} 1, W1",
        "0.46478 against 0.0003 GFLOPs, 1549 times",
        (
            Equal("GFLOP", "rebuttal's formula, V-V-V", 0.46478, 5),
            Equal("GFLOP", "rebuttal's formula, D-V", 0.0003, 4),
            Equal("times", "exact ratio, V-V-V over D-V", 1549, 0),
        ),
        measure=formula,
        exact=True,
        picture="",
        notes="The formula for V-V-V reproduces to the digit. The one for D-V gives 0.00015: 0.0003 is that"
        " with two operations a multiply-add, and 1549 is a quotient of the rounded number (with all"
        " its digits 1536; with the formulas as written 3072). And 0.46478 is the value and output"
        " projections, which D-V pays as well, without any mixing of tokens: with projections on both"
        " sides the ratio is 1.26, in favour of D-V: the sign is right, the number is not.",
    ),
    Claim(
        "a2",
        "dv-vs-vvv",
        "D-V guides as well as V-V-V.",
        f"{A} 1, Table 1",
        "VLCS 85.1 against 84.9",
        (Same("target", "alignclip", "vvv", 1.0), More("target", "alignclip", "clipood")),
        arms={"clipood": "clipood", "alignclip": "alignclip", "vvv": "vvv", "kkv": "kkv", "qqv": "qqv"},
        figures=TARGET,
        notes="The second part keeps the first from being empty: where alignment does nothing, any two"
        " structures are level. The four entries of the paper's D-V row average 84.98; no rounding of"
        " them gives 85.1.",
    ),
    Claim(
        "a3",
        "step-cost",
        "D-V adds little to a step of CLIPood, V-V-V more.",
        f"{A} 1, W2",
        "0.19 / 0.21 / 0.25 s for a batch of 36: 1.105 and 1.316",
        (Below("step over CLIPood's", "D-V", 1.105), More("step over CLIPood's", "V-V-V", "D-V")),
        measure=step_cost,
        alone=True,
        notes="The seconds of the paper are a V100's, ours are CPU seconds of one thread and one image. That"
        " no parameter is added is A13's. CLIPood is the published one, all tokens through the last MLP;"
        " AlignCLIP needs them for L_sim, CLIPood as it is here does not.",
    ),
    Claim(
        "a4",
        "aal",
        "Attention alignment helps.",
        f"{A} 1, W3 and Fig. 3",
        "+1.0 on VLCS, +2.8 on Office-Home",
        (More("target", "attention alignment", "neither"),),
        arms={"neither": "clipood", "attention alignment": "aal", "both": "alignclip", "smoothing": "sls"},
        figures=TARGET,
        notes="The paper's +1.0 and +2.8 are of its Fig. 3b, whose off-state (84.1) is not that of Fig. 3a"
        " (86.7); in Fig. 3a alignment alone adds 0.5 and 0.7. Attention alignment means both of its"
        " losses.",
    ),
    Claim(
        "a5",
        "sls",
        "Semantic label smoothing helps, and more than uniform smoothing.",
        f"{A} 1, W3 and Fig. 3d",
        "over none +3.21 / +2.29 / +0.89 (LabelMe, SUN, VOC); over uniform +2.48 / +2.25 / +0.73",
        (More("target", "semantic", "none"), More("target", "semantic", "uniform")),
        arms={
            "none": "clipood",
            "uniform": "uniform less",
            "semantic": "sls",
            "uniform, epsilon 0.9": "uniform",
        },
        figures=TARGET,
        notes="Uniform smoothing moves as much of a target off its label as semantic smoothing does on"
        " average (epsilon 0.954); with the same epsilon it would move twice as much. The reply calls"
        " +3.21 / +2.29 / +0.89 a contrast with label smoothing; by the authors' notebook they are over"
        " no smoothing.",
    ),
    Claim(
        "a6",
        "both",
        "Both together are best under domain and class shift.",
        f"{A} 1, W3 and Fig. 3a",
        "82.6 none, 83.3 alignment, 83.5 smoothing, 84.0 both: +1.4",
        (
            More("H", "both", "neither"),
            More("H", "both", "attention alignment"),
            More("H", "both", "smoothing"),
        ),
        arms={
            "neither": "in-the-wild clipood",
            "attention alignment": "in-the-wild aal",
            "smoothing": "in-the-wild sls",
            "both": "in-the-wild alignclip",
        },
        figures=OPEN,
    ),
    Claim(
        "a7",
        "depth",
        "Aligning the first part of the blocks is best, aligning all hurts.",
        f"{A} 2 and Fig. 3c",
        "peak at the fifth of 12 blocks; LabelMe 65.5 first, 68.7 peak, 66.3 all",
        (More("target", "1", "0"), More("target", "1", "2"), More("target", "1", "3")),
        arms={"0": "sls"} | {str(n): f"layers {n}" if n > 1 else "alignclip" for n in DEPTHS},
        figures=TARGET,
        picture="lines",
        notes="Our tower has three blocks, so five of twelve is nearest to the first one. The shaded band of"
        " the paper's figure is random.uniform(0.5, 1) in the authors' notebook, and many of its points"
        " are no multiples of one image: a claim, not data.",
    ),
    Claim(
        "a8",
        "epsilon",
        "Not sensitive to epsilon, and any smoothing is better than 1.",
        f"{A} 3, Table 2",
        "LabelMe 67.4 68.3 68.3 67.9 67.9, VOC 88.8 89.9 89.8 89.7 89.5 for 1, .9, .8, .7, .6",
        (
            *(More("target", str(e), "1.0") for e in EPSILONS[1:]),
            *(Same("target", "0.9", str(e), 1.0) for e in EPSILONS[2:]),
        ),
        arms={str(e): f"epsilon {e}" if e != 0.9 else "alignclip" for e in EPSILONS},
        figures=TARGET,
        picture="lines",
        notes="Epsilon 1 is no smoothing here; in the authors' code it still smooths, since its targets do"
        " not sum to 1.",
    ),
    Claim(
        "a9",
        "pooling",
        "The class token beats average pooling in plain fine-tuning.",
        f"{A} 3, Table 3",
        "83.7 against 82.0 (VLCS)",
        (More("target", "class token", "average"),),
        arms={"class token": "finetune", "average": "finetune average"},
        figures=TARGET,
        notes="The CLIP was pre-trained with its class token, as in the paper.",
    ),
    Claim(
        "a10",
        "structures",
        "V-V-V, Q-Q, K-K and the diagonal give good maps; Q-K does not.",
        f"{A} 1, W1 and Fig. 8",
        "pictures",
        tuple(More("lift", kind, "qkv") for kind in ("vvv", "qqv", "kkv", "dv"))
        + tuple(More("lift", kind, "centre") for kind in ("vvv", "qqv", "kkv", "dv")),
        arms=same_as(("start",)),
        measure=structures,
        picture=draw_maps,
        notes="Lift: the map's share on the thing over the thing's share of the area, 1 by chance. The cone"
        " in the centre is no model: what large things in the middle give anyway, and a good map more."
        " Maps of 4 x 4 patches; LOG.md has finer ones.",
    ),
    Claim(
        "a11",
        "background",
        "CLIP's attention prefers the background; AlignCLIP moves it to the foreground.",
        f"{A} 2, W2 and Fig. 1, 4; how the maps are made: 3, Q2",
        "pictures",
        (
            Below("similarity lift", "start", 1.0),
            Below("attention lift", "start", 1.0),
            More("similarity lift", "alignclip", "start"),
            More("similarity lift", "alignclip", "clipood"),
            More("attention lift", "alignclip", "clipood"),
            More("early attention lift", "alignclip", "clipood"),
        ),
        arms=same_as(BACKGROUND),
        measure=background,
        picture=draw_maps,
        notes="The authors' maps are similarities of patches to the name (CLIP Surgery, eq. 1), the first"
        " column; the others are what the class token attends to, in the last and in the aligned"
        " blocks.",
    ),
    Claim(
        "a12",
        "hierarchy",
        "Text similarity keeps the hierarchy, and smoothing by it keeps it in the predictions.",
        f"{A} 3, W2 and Fig. 6",
        "class similarity matrix",
        (
            Above("nearer within, %", "text", 50.0),
            More("wrong answers that stay in the group, %", "sls", "clipood"),
            More("wrong answers that stay in the group, %", "sls", "uniform"),
        ),
        arms=same_as(("start", "clipood", "uniform", "sls")),
        measure=hierarchy,
        picture=draw_matrix,
        notes="16 kinds in 4 super-classes. Captions name a kind, and some a super-class; that is all our"
        " text tower can know of a hierarchy.",
    ),
    Claim(
        "a13",
        "inference",
        "An image's embedding is not conditioned on text; same size and speed as CLIPood.",
        f"{A} 1, W2 and 3, Q1",
        "1.973 s both",
        (
            Equal("parameters", "difference", 0, 0),
            Equal("tensors of the checkpoint", "difference", 0, 0),
            Equal("relative change beside a branch", "alignclip", 0, 5),
        ),
        arms=same_as(("clipood", "alignclip")),
        measure=inference,
        exact=True,
        picture="",
        notes="True by construction; this checks that the code does it. The finished model is a plain CLIP"
        " in both cases: the same code runs on the same shapes, so the difference in milliseconds,"
        " taken beside other work, is noise.",
    ),
    Claim(
        "a14",
        "sls-vs-tes",
        "SLS is cheaper than TeS, and more effective under shift.",
        f"{A} 1, W1.3",
        "none",
        (
            More("parameters added", "tes", "sls"),
            More("target", "sls", "tes"),
            More("target, 4 times the steps", "sls", "tes"),
        ),
        arms=same_as(("start", "plain sls", "tes", "plain sls longer", "tes longer")),
        measure=accuracy_and_parameters,
        notes="Plain fine-tuning with smoothed labels on both sides of the comparison, without CLIPood's"
        " margin and averages, which TeS has not either. Its two heads start from nothing where SLS"
        " starts from zero-shot, so both are also given four times the steps. Milliseconds are shown"
        " and not judged: they were taken beside other work.",
    ),
    Claim(
        "a15",
        "prompts",
        "Prompt tuning takes less of a step than full fine-tuning; CoCoOp is slow.",
        f"{A} 1, W2.4",
        "in words",
        (
            Below("step over CLIPood's", "CoOp", 1.0),
            Below("step over CLIPood's", "MaPLe", 1.0),
            More("step over CLIPood's", "CoCoOp", "CoOp"),
            Above("step over CLIPood's", "CoCoOp", 1.0),
        ),
        measure=prompt_cost,
        alone=True,
        notes="A step, not a training: how many steps each needs is another matter. The reply calls CoCoOp"
        " slow for its small batches; here all have 8 images. Their accuracy on our scenes is beside"
        " A16.",
    ),
    Claim(
        "a16",
        "open-world",
        "AlignCLIP is above CLIPood under domain shift, open class, and both.",
        f"{A} 1, W1",
        "best on almost all of 21 data sets",
        tuple(
            More("accuracy", f"{task} alignclip", f"{task} clipood")
            for task in ("target", "open H", "wild H")
        )
        + (More("accuracy", "target alignclip", "target finetune"),),
        arms={
            f"{row} {name}": f"{task}{name}"
            for row, task in (("target", ""), ("open H", "open-class "), ("wild H", "in-the-wild "))
            for name in ("clipood", "alignclip")
        }
        | {f"target {name}": name for name in ("finetune", "coop", "cocoop", "maple", "tes")},
        figures={"accuracy": ("reported", ("target", "H"))},
        notes="H is the harmonic mean of base and new classes. The paper's own table was not available to"
        " us; where both are known (VLCS 85.1 or 84.98 against 85.0, Office-Home 86.9 against 87.0)"
        " they are level.",
    ),
    Claim(
        "l1",
        "zero-shot",
        "Llip is above SigLIP and CLIP, which are level, on the same data and backbone.",
        "Llip, general comment and Table 1",
        "B/32 70.4 against 67.3 and 67.6; L/14 80.9 against 79.4 and 79.2",
        (
            More("kinds top-1", "llip", "siglip"),
            More("kinds top-1", "llip", "clip"),
            Same("kinds top-1", "siglip", "clip", 2.0),
            More("captions mAP", "llip", "siglip"),
            More("captions mAP", "llip", "clip"),
        ),
        arms=THREE,
        figures=LLIP_FIGURES,
        pairs=dict(
            figures={"top-1": ("zeroshot", "top1"), "top-5": ("zeroshot", "top5")},
            parts=(More("top-1", "llip", "siglip"), More("top-1", "llip", "clip")),
        ),
        notes="Two kinds of zero-shot: the name of a single thing among 16 (pictures unlike those trained"
        " on), and which of the short captions are true.",
    ),
    Claim(
        "l2",
        "retrieval",
        "And in retrieval, both ways.",
        "Llip, Table 2",
        "B/16 COCO R@1, text to image 45.6 against 42.0 and 41.4, image to text 63.4 against 59.7 and 59.4",
        (
            More("captions mAP", "llip", "siglip"),
            More("images of a caption, P@10", "llip", "siglip"),
            *OVER_BOTH,
        ),
        arms=THREE,
        figures=CAPTIONS | {"images of a caption, P@10": ("aspects", "t2i_p@10")} | RECALL,
        pairs=dict(figures=RECALL, parts=OVER_BOTH),
        notes="R@k is over captions of two things at once, such as no training caption has.",
    ),
    Claim(
        "l3",
        "linear-probe",
        "Mixture tokens carry more for a linear probe.",
        f"{L} MT7j, Table R2",
        "78.5 against 76.8 (B/32)",
        (More("top-1, l-bfgs", "llip mean", "siglip"), More("top-1, l-bfgs", "llip concatenation", "siglip")),
        arms=THREE | same_as(("average",)),
        measure=linear_probe,
        notes="The reply names CLIP's appendix A.3, which is L-BFGS; AdamW is CLIP_benchmark's. How M tokens"
        " become one feature is not stated; the concatenation is M times as wide, and so is that of the"
        " averaging arm, which no text ever asked: what it has is owed to the width. Two replies give"
        " +1.3 (Vo7f) and +1.7 (MT7j); the numbers give +1.7.",
    ),
    Claim(
        "l4",
        "tokens",
        "More mixture tokens help.",
        "Llip, Fig. 6a",
        "K = 1, 32, 64, 128: 67.3 70.1 70.4 71.2",
        by_both(More("", "4", "1"), More("", "8", "4"), More("", "16", "8")),
        arms={"1": "llip M=1", "4": "llip M=4", "8": "llip", "16": "llip M=16"},
        figures=LLIP_FIGURES,
        picture="lines",
    ),
    Claim(
        "l5",
        "patches",
        "Patches as keys and values help slightly; learned tokens matter more.",
        f"{L} MT7j, Table R3",
        "K = 1 + patches 68.2; 32: 70.4 with, 70.1 without; 64: 70.7, 70.4",
        by_both(More("", "8 tokens and patches", "8 tokens"), More("", "8 tokens", "1 token and patches")),
        arms={
            "1 token": "llip M=1",
            "1 token and patches": "llip M=1 patches",
            "8 tokens": "llip",
            "8 tokens and patches": "llip M=8 patches",
        },
        figures=LLIP_FIGURES,
        notes="The camera-ready's Fig. 7 plots about 69.7 where the reply's table has 70.4.",
    ),
    Claim(
        "l6",
        "ladder",
        "Registers do nothing, averaging some, a learned query some more, the text's query most.",
        "Llip, Fig. 3",
        "67.3 67.2 68.6 68.8 70.4",
        by_both(
            Same("", "register", "siglip", 2.0),
            More("", "average", "register"),
            More("", "learned query", "average"),
            More("", "text query (Llip)", "learned query"),
        ),
        arms={
            "siglip": "siglip",
            "register": "register",
            "average": "average",
            "learned query": "learned",
            "text query (Llip)": "llip",
        },
        figures=LLIP_FIGURES,
    ),
    Claim(
        "l7",
        "cost",
        "Training and inference cost a little more than CLIP of the same size.",
        f"{L} wQuf, Table R1",
        "1.43 against 1.11 s a step, 0.011 against 0.009 s an image: 1.29, 1.22",
        (
            Below("FLOPs of a step over CLIP's, 32,768 pairs", "Llip", 1.29),
            Below("step over CLIP's, 2 pairs", "Llip", 1.29),
            Below("inference over CLIP's", "Llip", 1.22),
        ),
        measure=llip_cost,
        alone=True,
        notes="CPU seconds of one thread, towers cut to a sixth of their blocks: what does not shrink with"
        " them (W_K, W_V, the pairs of an inference) weighs six times as much as it should, against"
        " Llip; in a step of 2 pairs the pairs weigh next to nothing, for it. FLOPs are those of"
        " tiles.py, which is what runs, beside the form as published.",
    ),
    Claim(
        "l8",
        "prompt-count",
        "Inference grows slowly with the number of prompts, not with their length.",
        f"{L} wQuf, Table R2",
        "10.7 10.9 11.1 11.8 ms for 10 to 10,000: 1.10",
        (
            Below("time over that of 10", "1000", 1.037),
            Below("time over that of 10", "10000", 1.103),
            Equal("numbers kept of a prompt of 60 words, less one of 5", "10", 0, 0),
        ),
        measure=prompts_cost,
        alone=True,
        picture="lines",
        notes="The bounds are the paper's own ratios. A prompt is one query and one feature, however long.",
    ),
    Claim(
        "l9",
        "smaller-better",
        "A smaller Llip beats a larger CLIP at lower cost.",
        f"{L} MT7j, Table R1",
        "L/14 80.9 at 0.011 s against H/14 80.5 at 0.020 s",
        (
            *by_both(More("", "llip", "clip wide")),
            More("MFLOP, 16 texts", "clip wide", "llip"),
            More("MFLOP, 450 texts", "clip wide", "llip"),
        ),
        arms={"llip": "llip", "clip wide": "clip wide"},
        measure=sizes,
        notes="The larger CLIP is twice as wide in both towers (and trained for as many steps at the same"
        " rate). Cost of an image and texts that were encoded before: the 16 names of a zero-shot task,"
        " and 450 captions; by construction.",
    ),
    Claim(
        "l10",
        "no-leak",
        "Zero-shot never uses the true label.",
        f"{L} MT7j",
        "none",
        (
            Equal("answers that change, %", "llip", 0, 6),
            Equal("largest change of a score among fewer classes", "llip", 0, 3),
        ),
        arms={"llip": "llip"},
        measure=no_leak,
        exact=True,
        picture="",
        notes="True by construction; this checks that the code does it. Permuting the labels leaves every"
        " answer; asking fewer classes leaves every score of those that stay: a class is scored through"
        " its own text and no other.",
    ),
    Claim(
        "l11",
        "context",
        "The image seen through a caption is closer to that caption; less typographic attack.",
        f"{L} Vo7f",
        "one picture of an apple with an iPod note",
        (Above("own caption closer", "llip", 50.0),),
        arms=THREE,
        measure=two_captions,
        notes="The second half of the sentence is shown and not judged: models that never saw a letter in"
        " training cannot be fooled by one.",
    ),
    Claim(
        "l12",
        "spectrum",
        "A richer representation: the covariance spectrum decays more slowly.",
        "Llip, Fig. 5",
        "curves: Llip slowest, then a learned query, then SigLIP",
        (
            More("ln s at D/2 less the first", "llip", "learned"),
            More("ln s at D/2 less the first", "learned", "siglip"),
        ),
        arms=THREE | {"learned": "learned"},
        measure=spectrum,
        picture=draw_spectrum,
        notes="The paper plots ln s: how far its middle lies below its start is judged. The effective rank,"
        " one number for the whole curve, is shown.",
    ),
    Claim(
        "l13",
        "objective",
        "InfoNCE and SigLIP baselines are comparable.",
        "Llip, Table 8",
        "67.6 against 67.3 (B/32)",
        by_both(Same("", "clip", "siglip", 2.0)),
        arms={"clip": "clip", "siglip": "siglip", "llip (sigmoid)": "llip", "llip, InfoNCE": "llip infonce"},
        figures=LLIP_FIGURES,
        notes="Llip under InfoNCE is an experiment of ours that nobody has published; it is shown, and not"
        " part of the claim.",
    ),
    Claim(
        "l14",
        "temperature",
        "A wide optimum of the temperature.",
        "Llip, Fig. 6b",
        "tau 1, 5, 8, 10: 70.3 70.4 70.3 69.5",
        by_both(*(Same("", "2.5", tau, 2.0) for tau in ("0.5", "4.0", "5.0"))),
        arms={f"{t}": f"llip tau={t}" for t in (0.5, 2.5, 4.0)} | {"5.0": "llip", "8.0": "llip tau=8.0"},
        figures=LLIP_FIGURES,
        picture="lines",
        notes="The same multiples of the square root of a head's width (8 there, 4 here): 1/8, 5/8, 1, 10/8,"
        " the second of them the paper's best; and twice the square root, which the paper has not.",
    ),
    Claim(
        "l15",
        "text-tokens",
        "Do latent tokens on the text side help?",
        f"{L} MT7j",
        "none: an interesting follow-up",
        by_both(More("", "4 text tokens", "llip")),
        arms={"llip": "llip", "4 text tokens": "llip text tokens"},
        figures=LLIP_FIGURES,
        ours=True,
        notes="An experiment of ours: llip.LatentTextLlip. Each pair costs four times as much.",
    ),
    Claim(
        "l16",
        "small-data",
        "Does Llip keep its lead on little data?",
        f"{L} MT7j",
        "none: left for future work",
        by_both(More("", "llip, 1,024 pictures", "siglip, 1,024 pictures")),
        arms={
            "siglip, 1,024 pictures": "siglip few",
            "llip, 1,024 pictures": "llip few",
            "siglip": "siglip",
            "llip": "llip",
        },
        figures=LLIP_FIGURES,
        ours=True,
        pairs=dict(arms=THREE, figures=RECALL, parts=OVER_BOTH),
        notes="A question of ours, as the paper has no number. With --data: a set of the size of Flickr8k.",
    ),
)
BY_NAME = {name: claim for claim in CLAIMS for name in (claim.id, claim.name)}


def on_pairs(claim: Claim) -> dict:
    """What changes of a claim with --data, a list of captions; {} if it cannot be asked there.

    Of the claims about pre-trained arms the same comparisons, by R@1 in both directions.
    """
    if claim.pairs or claim.measure or any("start" in ARMS[arm] for arm in claim.arms.values()):
        return claim.pairs
    parts = dict.fromkeys(replace(part, figure="") for part in claim.parts)
    ways = ("image to text R@1", "text to image R@1")
    return dict(figures=RECALL, parts=tuple(replace(p, figure=way) for way in ways for p in parts))


def on_domains(claim: Claim) -> bool:
    """Whether a claim can be asked with --data, a folder DOMAIN/CLASS, and --init, a CLIP to fine-tune."""
    return not claim.measure and all("start" in ARMS[arm] for arm in claim.arms.values())
