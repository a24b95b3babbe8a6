"""Functions that measure what a claim is about. Each takes (lab, seed) and returns a table.

A table is {row: {figure: value}}; of timings each value is a list, one value for each round. A function may
also return a pair: the table, and what is drawn. lab.model(arm, seed) is a trained model and its tokenizer,
lab.figure(arm, seed, name) a figure of its results, lab.timings(section) the rows of lab/bench.py. Accuracies
are in per cent. Functions called draw_... take (path, [what is drawn, for each seed]).
"""

import math
import statistics
from functools import partial

import numpy as np
import torch
from torch import Tensor

import alignclip
import attention
import data
import evaluate
import llip
from baselines.tes import TeS
from clipood import FineTune, unit
from evals import linear_probe as probes
from evals import maps, typographic
from evals import spectrum as spectra
from losses import smoothing_targets
from model import CONFIGS, tower_flops
from readers import scenes
from scale import llip_tiles
from util import plots
from util.metrics import map_figures

PHOTOS, SHOWN = ("photo",), range(6)  # pictures drawn of each claim about maps
STEP = "step over CLIPood's"


def things(lab, seed: int, split="test", size=640, domains=scenes.DOMAINS) -> scenes.Objects:
    """Pictures of one thing each, with masks."""
    return scenes.Objects(split, size, seed, lab.image_size, domains)


def class_texts(net, tokenizer) -> Tensor:
    """Unit text features of the 16 kinds: (C, E)."""
    with evaluate.evaluating(net):
        return evaluate.encode_classes(net, tokenizer, list(scenes.KINDS), scenes.TEMPLATES)


# Premises --------------------------------------------------------------------------------------------------


@torch.no_grad()
def aligned_maps(net, tokenizer, dataset, temperature: float) -> tuple[dict[str, Tensor], Tensor]:
    """The attention that AlignCLIP aligns, and its guidance: maps (N, S, S); and the masks."""
    text, found, masks = class_texts(net, tokenizer), {"attention": [], "guidance": []}, []
    blocks = alignclip.default_blocks(len(net.visual.transformer.resblocks))
    for images, ids in data.eval_batches(dataset, data.preprocess_of(net.config), 256):
        masks.append(maps.masks_of(dataset, ids.tolist()))  # (B, S, S)
        labels = torch.tensor(dataset.labels)[ids].to(text.device)
        x = net.visual.embed(images.to(text.device))
        _, branch, rows = alignclip.two_paths(net.visual, x, "dv", *blocks)
        similarity = unit(net.visual.head(branch[:, 1:])) @ text.t()  # (B, P, C)
        guidance = alignclip.guidance(similarity, labels, temperature)
        for name, patches in (("attention", alignclip.cls_attention(rows)), ("guidance", guidance)):
            grid = patches.cpu().unflatten(1, [math.isqrt(patches.shape[1])] * 2)  # (B, rows, columns)
            found[name].append(maps.enlarge(grid, dataset.image_size))
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(masks)


def alignment_lifts(lab, seed: int) -> dict:
    """Lift, before fine-tuning, of the attention that is aligned and of the guidance it is aligned with.

    A map's lift is its share on the thing over the thing's share of the picture; chance is 1.
    """
    temperature = lab.flags("alignclip", seed)["guidance_temperature"]
    found, masks = aligned_maps(*lab.model("start", seed), things(lab, seed), temperature)
    return {name: {"lift": map_figures(m, masks)[:, 0].mean().item()} for name, m in found.items()}


def smoothing_share(lab, seed: int) -> dict:
    """What semantic smoothing moves off a label, mean over the classes."""
    text, scale = class_texts(*lab.model("start", seed)), lab.flags("sls", seed)["smoothing_scale"]
    own = smoothing_targets(text, scale=scale, form="mixture").diagonal()
    return {"semantic": {"% of a target off its label": 100 * (1 - own.mean().item())}}


# Fine-tuning -----------------------------------------------------------------------------------------------


def structures(lab, seed: int, arm: str = "start") -> tuple[dict, dict]:
    """Lift and pointing game of the similarity map under each attention structure of the CLIP."""
    net, tokenizer = lab.model(arm, seed)
    names = [*attention.KINDS, "centre"]
    scores, kept = maps.measure(net, tokenizer, things(lab, seed), names, show=SHOWN)
    rows = {n: {"lift": scores[n]["lift"], "pointing, %": 100 * scores[n]["pointing"]} for n in names}
    return rows, drawn(lab, seed, names, [kept])


def background(lab, seed: int) -> tuple[dict, dict]:
    """Lift of the patches' similarity to the name, and of the class token's attention, before and after."""
    rows, shown, arms = {}, [], ("start", "clipood", "alignclip")
    names = {"plain": "similarity", "cls": "attention", "cls-early": "early attention"}
    for arm in arms:
        net, tokenizer = lab.model(arm, seed)
        scores, kept = maps.measure(net, tokenizer, things(lab, seed), [*names], show=SHOWN)
        rows[arm] = {f"{text} lift": scores[name]["lift"] for name, text in names.items()}
        shown.append({i: kept[i][..., :3] for i in kept})  # mask, similarity, attention
    titles = [f"{arm}: {text}" for arm in arms for text in ("similarity", "attention")]
    return rows, drawn(lab, seed, titles, shown)


def drawn(lab, seed: int, names: list[str], kept: list[dict]) -> dict:
    """Maps of some pictures under several models, and what is needed to draw them: JSON values only."""
    joined = {i: torch.cat([kept[0][i][..., :1], *(m[i][..., 1:] for m in kept)], -1) for i in kept[0]}
    lists = {i: values.tolist() for i, values in joined.items()}
    return dict(seed=seed, size=lab.image_size, names=names, maps=lists)


def hierarchy(lab, seed: int) -> tuple[dict, list]:
    """Whether kinds of one group are closer in text, and whether wrong answers stay in the right group.

    "nearer within" compares each cosine within a group with each across groups; chance is 50. Of 15 wrong
    kinds 3 are in the group, so that chance is 20.
    """
    group = torch.arange(len(scenes.KINDS)) // 4
    same = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool)
    text = class_texts(*lab.model("start", seed))
    cosines = (text @ text.t()).cpu()  # (C, C)
    within, across = cosines[same], cosines[group[:, None] != group]
    nearer = (within[:, None] > across[None]).double().mean().item()
    rows, dataset = {"text": {"nearer within, %": 100 * nearer}}, things(lab, seed, size=960, domains=PHOTOS)
    target = torch.tensor(dataset.labels)
    for arm in ("clipood", "uniform", "sls"):
        net, tokenizer = lab.model(arm, seed)
        _, answer = evaluate.classify(net, dataset, tokenizer, scenes.TEMPLATES)
        stays = (group[answer] == group[target])[answer != target].double().mean().item()
        rows[arm] = {"wrong answers in the group, %": 100 * stays}
    return rows, cosines.tolist()


@torch.no_grad()
def inference(lab, seed: int) -> dict:
    """Size of the finished models, and an image's embedding with and without a second branch beside it."""
    rows, images = {}, torch.rand(8, 3, lab.image_size, lab.image_size, device=lab.device)
    for arm in ("clipood", "alignclip"):
        net, _ = lab.model(arm, seed)
        plain, change = net.encode_image(images), 0.0
        for branch in ("dv", "vvv"):
            x, _, _ = alignclip.two_paths(net.visual, net.visual.embed(images), branch, 1, 1)
            beside = net.visual.head(x[:, 0])
            change = max(change, (beside - plain).abs().max().item() / plain.abs().max().item())
        count = float(sum(p.numel() for p in net.parameters()))
        rows[arm] = {"parameters": count, "tensors": float(len(net.state_dict()))}
        rows[arm]["change with a branch"] = change
    names = ("parameters", "tensors")
    return rows | {"difference": {name: rows["alignclip"][name] - rows["clipood"][name] for name in names}}


def sls_and_tes(lab, seed: int) -> dict:
    """Target accuracy of SLS and TeS at the same steps and at four times as many, and parameters added."""
    rows, kinds = {}, {"sls": ("plain sls", partial(FineTune, smoothing="mixture")), "tes": ("tes", TeS)}
    for name, (arm, build) in kinds.items():
        net, tokenizer = lab.model("start", seed)
        text, before = class_texts(net, tokenizer), sum(p.numel() for p in net.parameters())
        method = build(net, text)
        rows[name] = {
            "target": lab.figure(arm, seed, "target"),
            "target, 4 times the steps": lab.figure(f"{arm} longer", seed, "target"),
            "parameters added": float(sum(p.numel() for p in method.parameters()) - before),
        }
    return rows


def formula(lab, seed: int) -> dict:
    """The rebuttal's formulas and exact counts (2 a multiply-add): ViT-B/16, one layer, one image."""
    N, D, H = 197, 768, 12
    K, count = D // H, attention.flops
    dv, vvv = H * N * K, H * 2 * N * (K * D + K * D)
    flops = {"rebuttal's V-V-V": vvv, "rebuttal's D-V": dv, "D-V with 2 a multiply-add": 2 * dv}
    flops |= {f"exact {kind}": count(kind, N, D, H) for kind in ("qkv", "vvv", "dv")}
    flops["exact vvv without projections"] = count("vvv", N, D, H, projections=False)
    ratios = {"printed ratio": 0.46478 / 0.0003, "ratio of the formulas": vvv / dv}
    ratios["exact ratio"] = flops["exact vvv"] / flops["exact dv"]
    rows = {name: {"GFLOP": count / 1e9} for name, count in flops.items()}
    return rows | {name: {"times": ratio} for name, ratio in ratios.items()}


# Timings, all of them taken by lab/bench.py -----------------------------------------------------------------


def step_cost(lab, seed: int) -> dict:
    """A training step of AlignCLIP over one of CLIPood as published."""
    return {row["arm"]: {STEP: row["ratios"]} for row in lab.timings("alignclip")}


def prompt_cost(lab, seed: int) -> dict:
    """A training step of the prompt methods over CLIPood's, the parameters that learn, and the memory."""
    rows = {row["arm"]: {STEP: row["ratios"]} for row in lab.timings("prompts")}
    for row in lab.timings("prompts"):
        rows[row["arm"]] |= {name: [row[name]] for name in ("thousand parameters that learn", "peak MiB")}
    return rows


def llip_cost(lab, seed: int) -> dict:
    """A training step and an inference of Llip over CLIP's, and FLOPs of a step of 32,768 pairs of L/14."""
    rows, names = {"CLIP": {}, "Llip": {}}, {"clip": "CLIP", "siglip": "CLIP", "llip": "Llip"}
    for row in lab.timings("llip"):
        if name := names.get(row["arm"]):
            figure = "inference over CLIP's" if row["what"].startswith("inference") else "step over CLIP's"
            rows[name][figure] = row["ratios"]
    c, pairs = CONFIGS["ViT-L-14"], 32768
    own, plain = llip.flops(c, 32, pairs), tower_flops(c)
    clip = 3 * (plain["image"] + plain["text"] + 2 * pairs * c.embed_dim)
    # one image's share of a step of 8 ranks
    tiles = llip_tiles.flops(4096, pairs, 32, 8, c.embed_dim, train=True) / 4096
    ratio = (3 * (own["image"] + own["text"]) + tiles) / clip
    rounds = len(rows["Llip"]["step over CLIP's"])
    rows["Llip"] |= {"FLOPs over CLIP's": [ratio] * rounds, "plain form": [3 * sum(own.values()) / clip]}
    return rows


def prompt_count(lab, seed: int) -> dict:
    """One image against 10 to 10,000 prompts, over the time for 10; and what is kept of a prompt."""
    net, kept = llip.Llip(CONFIGS["tiny"], 8, 4), []
    for words in (5, 25):
        kept.append(sum(part.numel() for part in net.encode_text(torch.full((1, words), 7))))
    more = {"numbers kept of 25 words less 5": [float(kept[1] - kept[0])]}
    rows = [row for row in lab.timings("llip") if row["arm"].endswith(" prompts")]
    return {row["arm"].split()[0]: {"time over that of 10": row["ratios"]} | more for row in rows}


# Pre-training ----------------------------------------------------------------------------------------------


def linear_probe(lab, seed: int) -> dict:
    """Top-1 of both probes on the image tower's output: CLIP's (L-BFGS) and AdamW's."""
    rows, sizes = {}, {"train": 1536, "val": 512, "test": 960}
    sets = {name: things(lab, seed, name, size, PHOTOS) for name, size in sizes.items()}
    for arm in ("clip", "siglip", "llip", "average"):
        net, _ = lab.model(arm, seed)
        inputs = {name: probes.reduced(probes.encode(net, d)) for name, d in sets.items()}
        for kind in inputs["train"]:
            parts = {n: (x[kind], torch.tensor(sets[n].labels)) for n, x in inputs.items()}
            row = {"width": float(parts["train"][0].shape[1])}
            for solver, more in (("l-bfgs", {}), ("adamw", {"seed": seed})):
                found = probes.probe(solver, parts, len(scenes.KINDS), **more)
                row[f"top-1, {solver}"] = 100 * found["top1"]
            rows[arm if kind == "class token" else f"{arm} {kind}"] = row
    return rows


def spectrum(lab, seed: int) -> tuple[dict, dict]:
    """Effective rank of the covariance of the image tower's output, and its log singular values."""
    rows, curves = {}, {}
    dataset = scenes.Scenes("test", 1024, seed, lab.image_size, PHOTOS)
    for arm in ("clip", "siglip", "learned", "llip"):
        row, logs = spectra.spectrum_row(arm, probes.encode(lab.model(arm, seed)[0], dataset))
        curves[arm] = [None if value is None else value - logs[0] for value in logs]
        half = curves[arm][len(logs) // 2]
        rows[arm] = {"ln s at D/2 less the first": -99.0 if half is None else half}
        rows[arm]["effective rank"] = row["effective rank"]
    return rows, curves


def two_captions(lab, seed: int) -> dict:
    """Own caption against another true caption of the same picture; and the typographic attack.

    "attack success" counts pictures named rightly whose answer a written word turns, less those that a blank
    note turns.
    """
    rows, dataset = {}, scenes.Scenes("test", 400, seed, lab.image_size, PHOTOS, captions="aspects")
    for arm in ("clip", "siglip", "llip"):
        net, tokenizer = lab.model(arm, seed)
        pictures = things(lab, seed, size=480, domains=PHOTOS)
        found = typographic.typographic(net, pictures, tokenizer, scenes.TEMPLATES, seed)
        success = found["word"]["success"] - found["blank"]["success"]
        rows[arm] = {"attack success": 100 * success, "clean": 100 * found["clean"]["top1"]}
        if net.conditional:
            rows[arm] |= own_caption(net, tokenizer, dataset)
    return rows


@torch.no_grad()
def own_caption(net: llip.Llip, tokenizer, dataset) -> dict[str, float]:
    """cos(z_i(a), t_a) less cos(z_i(b), t_a), for the first two captions a and b of every picture i."""
    transform, device = data.preprocess_of(net.config), net.logit_scale.device
    images = torch.stack([transform(dataset.image(i)) for i in range(len(dataset))])
    keys, values = net.encode_image(images.to(device))
    encode = partial(tokenizer, context_length=net.config.context_length)
    texts = [net.encode_text(encode([c[n] for c in dataset.captions]).to(device)) for n in (0, 1)]
    # picture i through caption n: (2, N, E)
    seen = []
    for queries, _ in texts:
        each = zip(keys.split(1), values.split(1), queries.split(1))
        seen.append(unit(torch.cat([net.mix(*parts)[:, 0] for parts in each])))
    gains = [((seen[n] - seen[1 - n]) * unit(texts[n][1])).sum(-1) for n in (0, 1)]
    gains = torch.cat(gains).double()  # (2 N,)
    closer = (gains > 0).double().mean().item()
    return {"own caption closer, %": 100 * closer, "cosine gained": gains.mean().item()}


def no_leak(lab, seed: int) -> dict:
    """Answers before and after the labels are permuted, and scores among fewer classes."""
    net, tokenizer = lab.model("llip", seed)
    dataset, shuffled = (
        things(lab, seed, size=480, domains=PHOTOS),
        things(lab, seed, size=480, domains=PHOTOS),
    )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    shuffled.labels = [dataset.labels[i] for i in order.tolist()]
    _, answers = evaluate.classify(net, dataset, tokenizer, scenes.TEMPLATES)
    place, again = evaluate.classify(net, shuffled, tokenizer, scenes.TEMPLATES)
    scores = []
    with evaluate.evaluating(net):
        for names in (dataset.classes, dataset.classes[:8]):
            text = evaluate.encode_classes(net, tokenizer, names, scenes.TEMPLATES)
            scores.append(torch.cat([s for _, s in evaluate.score_rows(net, dataset, text)]))
    change = (scores[0][:, :8] - scores[1]).abs().max().item()
    row = {"answers that change, %": 100 * (answers != again).double().mean().item()}
    row |= {"largest change among fewer classes": change}
    return {"llip": row | {"top-1 under permuted labels, %": 100 * (place == 0).double().mean().item()}}


def sizes(lab, seed: int) -> dict:
    """Figures of a smaller Llip and a larger CLIP, and the FLOPs of an image with few and with many texts."""
    rows = {}
    for arm in ("llip", "clip wide"):
        net, _ = lab.model(arm, seed)
        rows[arm] = {name: lab.figure(arm, seed, name) for name in ("captions mAP", "kinds top-1")}
        for texts in (16, 450):
            cost = tower_flops(net.config)["image"] + texts * 2 * net.config.embed_dim
            if net.conditional:
                counts = llip.flops(net.config, net.visual.tokens, texts)
                cost = counts["image"] + counts["pairs"]
            rows[arm][f"MFLOP, {texts} texts"] = cost / 1e6
    return rows


# Pictures --------------------------------------------------------------------------------------------------


def draw_spectrum(path, extras: list) -> None:
    """Mean over the seeds of the log singular values, relative to the first."""
    curves = {}
    for arm in extras[0]:
        ranks = zip(*(extra[arm] for extra in extras))
        curves[arm] = [(k, statistics.fmean(v)) for k, v in enumerate(ranks) if None not in v]
    plots.lines(path, {"ln of singular values, less the first": curves}, xlabel="rank")


def draw_maps(path, extras: list) -> None:
    """Some pictures of the first seed with the masks of their things, and all their maps."""
    first = extras[0]
    dataset = scenes.Objects("test", 640, first["seed"], first["size"])
    kept = {int(i): torch.tensor(values) for i, values in first["maps"].items()}
    maps.draw_sheet(path, dataset, kept, first["names"], "things and their maps")


def draw_matrix(path, extras: list) -> None:
    """Cosines of the class texts, mean over the seeds."""
    names = list(scenes.KINDS)
    plots.matrix(
        path, np.mean([np.array(extra) for extra in extras], axis=0), names, names, "cosines of class texts"
    )
