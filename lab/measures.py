"""Functions that measure what a claim is about. Each takes (lab, seed) and returns a table.

A table is {row: {figure: value}}; of timings each value is a list, one value for each round. A function may
also return a pair: the table, and what is drawn. lab.model(arm, seed) is a trained model and its tokenizer,
lab.figure(arm, seed, name) a figure of its results, lab.timings(section) the rows of lab/bench.py. Accuracies
are in per cent. Functions called draw_... take (path, [what is drawn, for each seed]).

    python -m lab.measures similarity --model ViT-B-16 --classes names.txt    for any CLIP and names
"""

import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from lab.beds import LIFTS, aligned_maps, class_texts, lifts, things
from losses import smoothing_targets
from model import CONFIGS, tower_flops
from readers import scene_captions as words
from readers import scenes
from readers.templates import read_names
from scale import llip_tiles
from util import plots
from util.evaluation import ModelFlags, each_model, options_of, start, write_results
from util.files import write_image
from util.flags import Parser, parse
from util.metrics import Recall
from util.program import leave, program
from util.report import format_table

PHOTOS, SHOWN = ("photo",), range(6)  # pictures drawn of each claim about maps
STEP = "step over CLIPood's"
WAYS = {"image to text": "i2t", "text to image": "t2i"}


# Premises --------------------------------------------------------------------------------------------------


def premise_lifts(lab, seed: int) -> dict:
    """Lifts, before fine-tuning, of the attention that is aligned and of the guidance; zero-shot accuracy."""
    rows = {}
    for arm in filter(lambda arm: lab.runs(arm, seed), ("bed", "bed 12")):
        net, tokenizer = lab.model(arm, seed)
        found = lifts(*aligned_maps(net, class_texts(net, tokenizer), things(lab, seed)))
        rows[arm] = found | {"zero-shot": lab.figure(arm, seed, "kinds top-1")}
    return rows


def premise_aspects(lab, seed: int) -> dict:
    """How many facts the captions of a picture tell, over the facts that one of them tells."""
    pictures = ([told for _, told in some] for some in scenes.Scenes("train", 256, seed).written)
    ratios = [len(frozenset().union(*some)) / statistics.fmean(map(len, some)) for some in pictures]
    return {"all captions": {"facts over one caption's": statistics.fmean(ratios)}}


def smoothing_share(lab, seed: int) -> dict:
    """What semantic smoothing moves off a label, mean over the classes; and whether names keep groups."""
    text, scale = class_texts(*lab.model("bed", seed)), lab.flags("sls", seed)["smoothing_scale"]
    own = smoothing_targets(text, scale=scale, form="mixture").diagonal()
    rows = {"semantic": {"% of a target off its label": 100 * (1 - own.mean().item())}}
    return rows | {"text": {"nearer within, %": nearer_within(text)}}


def nearer_within(text: Tensor) -> float:
    """How often a cosine within a group of kinds is above one across groups, in per cent; chance is 50."""
    group = torch.arange(len(scenes.KINDS)) // 4
    same = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool)
    cosines = (text @ text.t()).cpu()  # (C, C)
    within, across = cosines[same], cosines[group[:, None] != group]
    return 100 * (within[:, None] > across[None]).double().mean().item()


# Fine-tuning -----------------------------------------------------------------------------------------------


def structures(lab, seed: int) -> tuple[dict, dict]:
    """Lift and pointing game of the similarity map under each attention structure of the CLIP."""
    net, tokenizer = lab.model("bed", seed)
    names = [*attention.KINDS, "centre"]
    scores, kept = maps.measure(net, tokenizer, things(lab, seed), names, show=SHOWN)
    rows = {n: {"lift": scores[n]["lift"], "pointing, %": 100 * scores[n]["pointing"]} for n in names}
    kept = {i: values.tolist() for i, values in kept.items()}
    return rows, dict(seed=seed, size=lab.image_size, names=names, maps=kept)


def background(lab, seed: int) -> tuple[dict, dict]:
    """Lifts of the aligned attention, of the guidance, and of other maps, before and after; with maps."""
    rows, shown, dataset = {}, {}, things(lab, seed)
    arms = {"before": "bed", "smoothing only": "sls", "released": "alignclip", "detached": "detached"}
    for row, arm in arms.items():
        net, tokenizer = lab.model(arm, seed)
        text = class_texts(net, tokenizer)
        found, masks = aligned_maps(net, text, dataset)
        scores, _ = maps.measure(net, tokenizer, dataset, ["cls", "plain"])
        rows[row] = lifts(found, masks)
        rows[row] |= {"block 3 lift": scores["cls"]["lift"], "similarity lift": scores["plain"]["lift"]}
        # 1/3 is the mean of a map, and 1 three times the mean
        relative = {name: m / m.mean((1, 2), keepdim=True) / 3 for name, m in found.items()}
        shown |= {f"{name}, {row}": m[: len(SHOWN)] for name, m in relative.items()}
    names = sorted(shown, key=lambda name: name.startswith("guidance"))
    kept = torch.stack([masks[: len(SHOWN)].float(), *(shown[name] for name in names)], -1)
    return rows, dict(seed=seed, size=lab.image_size, names=names, maps=dict(enumerate(kept.tolist())))


@torch.no_grad()
def depth(lab, seed: int) -> dict:
    """Target accuracy by the number of aligned blocks, and how sparse each block's attention is."""
    arms = {"none": "sls 12"} | {str(n): f"layers {n}" for n in (1, 3, 5, 8, 12)}
    arms |= {f"{n} detached": f"layers {n} detached" for n in (1, 5, 12)}
    rows = {row: {n: lab.figure(arm, seed, n) for n in ("target", *LIFTS)} for row, arm in arms.items()}
    for when, arm in (("", "bed 12"), (", 5 aligned", "layers 5"), (", 5 detached", "layers 5 detached")):
        net, _ = lab.model(arm, seed)
        x = torch.cat([x for x, _ in evaluate.image_batches(net, things(lab, seed))])
        _, _, weights = alignclip.two_paths(net.visual, net.visual.embed(x), "dv", 12, 12)
        for n, row in enumerate(weights, 1):
            p = alignclip.cls_attention([row])  # (N, P)
            entropy = -(p * p.clamp_min(1e-30).log()).sum(-1).mean().item()
            top = p.sort(-1, descending=True)[0][:, : max(1, round(p.shape[1] / 10))].sum(-1).mean().item()
            rows[f"block {n}{when}"] = {"entropy, nats": entropy, "share of the top tenth, %": 100 * top}
    return rows


def gradients(lab, seed: int, scale: float | None, weight: float, temperature: float) -> float:
    """|weight * gradient of L_att| / |gradient of the classification| before fine-tuning, on 96 pictures.

    Args: scale: exp(logit_scale); None: the CLIP's own
    """
    net, tokenizer = lab.model("bed", seed)
    text = class_texts(net, tokenizer)
    if scale:
        net.logit_scale.data.fill_(scale).log_()
    dataset = scenes.Objects("train", 96, seed, lab.image_size)
    images, _ = next(evaluate.image_batches(net, dataset))
    labels, terms = torch.tensor(dataset.labels, device=lab.device), []
    for on in (False, True):
        own = dict(weight=weight, attention=on, guidance_temperature=temperature)
        method = alignclip.AlignCLIP(net, text, similarity="none", **own)
        net.zero_grad()
        method.loss(images, labels)[0].backward()
        terms.append(torch.cat([p.grad.flatten() for p in net.visual.parameters() if p.grad is not None]))
    return ((terms[1] - terms[0]).norm() / terms[0].norm()).item()


def guidance_over_steps(lab, seed: int) -> tuple[dict, dict]:
    """Lifts before, during and after fine-tuning, accuracy in all tasks, and the weights' gradients."""
    rows, curves, claim = {}, {}, lab.claim("f1")
    for row, arm in claim.arms.items():
        if not lab.runs(arm, seed):
            continue
        seen = json.loads((lab.path(arm, seed) / "lifts.json").read_text())
        first, *_, last = seen.values()
        rows[row] = {name.replace("lift", "before"): first[name] for name in LIFTS}
        rows[row] |= {name.replace("lift", "gain"): last[name] - first[name] for name in LIFTS}
        # figures that a task does not have are None, and left out of the table
        rows[row] |= {name: lab.figure(arm, seed, name) for name in ("target", "new", "H", "AUROC")}
        curves[row] = {name: [(int(k), found[name]) for k, found in seen.items()] for name in LIFTS}
    for weight, temperature in ((10.0, 1.0), (1.0, 1.0), (1.0, 0.03)):
        for where, scale in (("scale 100", 100.0), ("the CLIP's scale", None)):
            ratio = gradients(lab, seed, scale, weight, temperature)
            row = f"w {weight:g} at T {temperature:g}, {where}"
            rows[row] = {"gradient of L_att over classification's": ratio}
    return rows, curves


def hierarchy(lab, seed: int) -> tuple[dict, list]:
    """Whether kinds of a group are closer in text, and how many wrong answers are in it (chance: 3 of 15)."""
    text, group = class_texts(*lab.model("bed", seed)), torch.arange(len(scenes.KINDS)) // 4
    rows, dataset = {"text": {"nearer within, %": nearer_within(text)}}, things(lab, seed, domains=PHOTOS)
    target = torch.tensor(dataset.labels)
    for row, arm in {"before": "bed", "clipood": "clipood", "uniform": "uniform", "semantic": "sls"}.items():
        net, tokenizer = lab.model(arm, seed)
        _, answer = evaluate.classify(net, dataset, tokenizer, scenes.TEMPLATES)
        stays = (group[answer] == group[target])[answer != target].double().mean().item()
        rows[row] = {"wrong answers in the group, %": 100 * stays}
    return rows, (text @ text.t()).cpu().tolist()


@torch.no_grad()
def inference(lab, seed: int) -> dict:
    """Size of the finished models, and an image's embedding with and without a second branch beside it."""
    rows, images = {}, torch.rand(8, 3, lab.image_size, lab.image_size, device=lab.device)
    for arm in ("clipood", "alignclip"):
        net, _ = lab.model(arm, seed)
        blocks = alignclip.default_blocks(len(net.visual.transformer.resblocks))
        x, plain = net.visual.embed(images), net.encode_image(images)
        beside = [alignclip.two_paths(net.visual, x, branch, *blocks)[0] for branch in ("dv", "vvv")]
        change = max((net.visual.head(x[:, 0]) - plain).abs().max().item() for x in beside)
        rows[arm] = {"parameters": float(sum(p.numel() for p in net.parameters()))}
        rows[arm]["change with a branch"] = change / plain.abs().max().item()
    return rows


def sls_and_tes(lab, seed: int) -> dict:
    """Target accuracy of SLS and TeS at the same steps and at four times as many, and parameters added."""
    rows, kinds = {}, {"sls": ("plain sls", partial(FineTune, smoothing="mixture")), "tes": ("tes", TeS)}
    for name, (arm, build) in kinds.items():
        net, tokenizer = lab.model("bed", seed)
        text, before = class_texts(net, tokenizer), sum(p.numel() for p in net.parameters())
        method = build(net, text)
        rows[name] = {"parameters added": float(sum(p.numel() for p in method.parameters()) - before)}
        rows[name]["target"] = lab.figure(arm, seed, "target")
        rows[name]["target, 4 times the steps"] = lab.figure(f"{arm} longer", seed, "target")
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


def tuning_cost(section: str, lab, seed: int) -> dict:
    """A training step over CLIPood's, parameters that learn and memory; for prompts inference over CLIP's."""
    rows = {}
    for row in lab.timings(section):
        names = ("thousand parameters that learn", "peak MiB", "images/s")
        found = {name: [row[name]] for name in names if name in row}
        found["inference over CLIP's" if "images/s" in row else STEP] = row["ratios"]
        rows[row["arm"]] = rows.get(row["arm"], {}) | found
    return rows


step_cost, prompt_cost = partial(tuning_cost, "alignclip"), partial(tuning_cost, "prompts")


def llip_cost(lab, seed: int) -> dict:
    """A training step and an inference of Llip over CLIP's: times, and FLOPs at the published sizes."""
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
    found = {"training": (3 * (own["image"] + own["text"]) + tiles) / clip}
    found["inference"] = inference_flops(c, 32) / inference_flops(c)
    rounds = len(rows["Llip"]["step over CLIP's"])
    rows["Llip"] |= {f"FLOPs of {what} over CLIP's": [ratio] * rounds for what, ratio in found.items()}
    return rows


def inference_flops(c, tokens: int = 0, prompts: int = 1000) -> int:
    """FLOPs of an image against encoded prompts, by Llip with these mixture tokens or (0) by CLIP."""
    if not tokens:
        return tower_flops(c)["image"] + 2 * prompts * c.embed_dim
    counts = llip.flops(c, tokens, prompts)
    return counts["image"] + counts["pairs"]


def sizes(lab, seed: int) -> dict:
    """The inference of a smaller Llip over that of a larger CLIP: FLOPs of an image and 1,000 prompts."""
    rows, figure = {}, "inference, FLOPs over the larger CLIP's"
    for small, large, tokens in (("ViT-L-14", "ViT-H-14", 32), ("ViT-H-14", "ViT-bigG-14", 64)):
        ratio = inference_flops(CONFIGS[small], tokens) / inference_flops(CONFIGS[large])
        names = (name.removeprefix("ViT-").replace("-", "/").replace("big", "") for name in (small, large))
        rows["Llip {} and CLIP {}".format(*names)] = {figure: ratio}
    return rows


def prompt_count(lab, seed: int) -> dict:
    """One image against 10 to 10,000 prompts, over the time for 10; and what is kept of a prompt."""
    net = llip.Llip(CONFIGS["tiny"], 8, 4)
    kept = [sum(part.numel() for part in net.encode_text(torch.full((1, n), 7))) for n in (5, 25)]
    more = {"numbers kept of 25 words less 5": [float(kept[1] - kept[0])]}
    rows = [row for row in lab.timings("llip") if row["arm"].endswith(" prompts")]
    return {row["arm"].split()[0]: {"time over that of 10": row["ratios"]} | more for row in rows}


# Pre-training ----------------------------------------------------------------------------------------------


def linear_probe(lab, seed: int) -> dict:
    """Top-1 of CLIP's linear probe (L-BFGS) on the image tower's output."""
    rows, sizes = {}, {"train": 1536, "val": 512, "test": 960}
    sets = {name: things(lab, seed, name, size, PHOTOS) for name, size in sizes.items()}
    for arm in ("clip", "siglip", "llip", "average"):
        net, _ = lab.model(arm, seed)
        inputs = {name: probes.reduced(probes.encode(net, d)) for name, d in sets.items()}
        for kind in inputs["train"]:
            parts = {n: (x[kind], torch.tensor(sets[n].labels)) for n, x in inputs.items()}
            top1 = probes.probe("l-bfgs", parts, len(scenes.KINDS))["top1"]
            row = {"width": float(parts["train"][0].shape[1]), "top-1": 100 * top1}
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

    "attack success": right answers that a written word turns, less those that a blank note turns.
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
    gains = torch.cat([((seen[n] - seen[1 - n]) * unit(texts[n][1])).sum(-1) for n in (0, 1)])  # (2 N,)
    closer = (gains > 0).double().mean().item()
    return {"own caption closer, %": 100 * closer, "cosine gained": gains.double().mean().item()}


def no_leak(lab, seed: int) -> dict:
    """Answers before and after the labels are permuted."""
    net, tokenizer = lab.model("llip", seed)
    dataset = things(lab, seed, size=480, domains=PHOTOS)
    _, answers = evaluate.classify(net, dataset, tokenizer, scenes.TEMPLATES)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    dataset.labels = [dataset.labels[i] for i in order.tolist()]
    _, again = evaluate.classify(net, dataset, tokenizer, scenes.TEMPLATES)
    return {"llip": {"answers that change, %": 100 * (answers != again).double().mean().item()}}


@torch.no_grad()
def retrieval_forms(lab, seed: int) -> dict:
    """R@1 both ways for captions about several things, scored as a whole and as the sum of their parts."""
    rows, dataset = {}, scenes.Scenes("test", 500, seed, lab.image_size, PHOTOS)
    written = [parts_of_caption(claims) for some in dataset.written for _, claims in some]
    texts = sorted({part for parts in written for part in parts})
    used = torch.tensor([[text in parts for parts in written] for text in texts]).float()  # (T, N_txt)
    owner = torch.arange(len(dataset)).repeat_interleave(len(dataset.captions[0]))
    for row, arm in lab.claim("f2").arms.items():
        net, tokenizer = lab.model(arm, seed)
        rows[row] = {f"{way} R@1": lab.figure(arm, seed, f"{way} R@1") for way in WAYS}
        with evaluate.evaluating(net) as device:
            text = evaluate.encode_text(net, tokenizer(texts, net.config.context_length).to(device))
            metric = Recall(len(dataset), owner, torch.arange(len(owner)), (1,), device)
            for first, scores in evaluate.score_rows(net, dataset, text):
                metric.add(first, scores @ used.to(device))
        found = metric.metrics()
        rows[f"{row} in parts"] = {f"{way} R@1": 100 * found[f"{key}@1"] for way, key in WAYS.items()}
    return rows


def parts_of_caption(claims: frozenset) -> list[str]:
    """What a caption about several things says, in short captions about one aspect each; no relations."""
    texts = [f"a scene {words.GROUND_WORDS[value]}" for kind, value, *_ in claims if kind == "background"]
    for _, noun, colour, place in (claim for claim in claims if claim[0] == "thing"):
        texts += [words.named(noun, colour)] + [words.named(noun, None, place)] * bool(place)
    return texts


# Pictures --------------------------------------------------------------------------------------------------


def draw_spectrum(path, extras: list) -> None:
    """Mean over the seeds of the log singular values, relative to the first."""
    ranks = {arm: enumerate(zip(*(extra[arm] for extra in extras))) for arm in extras[0]}
    curves = {
        arm: [(k, statistics.fmean(v)) for k, v in each if None not in v] for arm, each in ranks.items()
    }
    plots.lines(path, {"ln of singular values, less the first": curves}, xlabel="rank")


def draw_steps(path, extras: list) -> None:
    """Mean over the seeds of both lifts by step, for the arms that differ in the gradient of the guidance."""
    panels = {}
    for tower, prefix in (("three blocks", ""), ("twelve blocks", "deep ")):
        for name in LIFTS:
            panel = panels.setdefault(f"{name}, {tower}", {})
            for row in (f"{prefix}{kind}" for kind in ("smoothing only", "released", "detached")):
                points = zip(*(extra[row][name] for extra in extras if row in extra))
                panel[row] = [(some[0][0], statistics.fmean(y for _, y in some)) for some in points]
    plots.lines(path, panels, levels={name: {"chance": 1.0} for name in panels})


def draw_maps(path, extras: list) -> None:
    """Pictures of the first seed, masks and maps; a map's value 0 is dark blue, 1 and more yellow."""
    names, pictures, texts = extras[0]["names"], [], []
    dataset = scenes.Objects("test", 640, extras[0]["seed"], extras[0]["size"])
    for i, values in extras[0]["maps"].items():
        pictures += [dataset.image(int(i)), *map(plots.heat, np.moveaxis(np.array(values), -1, 0))]
        texts += [scenes.KINDS[dataset.facts["kind"][int(i), 0]], "mask", *names]
    title = "dark blue: the lowest value, or no weight; yellow: the highest, or three times the mean"
    write_image(path, plots.sheet(pictures, texts, 2 + len(names), 90, title))


def draw_matrix(path, extras: list) -> None:
    """Cosines of the class texts, mean over the seeds."""
    plots.matrix(path, np.mean(extras, axis=0), [*scenes.KINDS], [*scenes.KINDS], "cosines of class texts")


# Names of one's own -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SimilarityFlags(ModelFlags):
    """Cosines of class texts, and their softmax over each row at scale 35 (AlignCLIP, reviewer 3, Fig. 6)."""

    classes: str  # file of class names: one per line, or JSON
    templates: tuple[str, ...] = ()  # a name in readers/templates.py, texts with {}, or a file of them


@program
def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("command", choices=["similarity"], help="flags: lab.measures similarity --help")
    parser.parse_args(argv[:1])
    flags = parse(SimilarityFlags, argv[1:], SimilarityFlags.__doc__)
    _, net, tokenizer = next(each_model(flags, start(flags, one_process=True), evaluate.open_model))
    names = read_names(flags.classes)
    names = list(names.values() if isinstance(names, dict) else names)
    templates, options = evaluate.templates_of(flags.templates, ""), evaluate.text_options(options_of(flags))
    with evaluate.evaluating(net):
        text = evaluate.encode_classes(net, tokenizer, names, templates, **options)
    text = text[-1] if net.conditional else text  # (C, E)
    shown = [name if isinstance(name, str) else name[0] for name in names]
    found = {"cosines": text @ text.t(), "softmax": smoothing_targets(text, epsilon=0.0)}
    for what, values in found.items():
        found[what] = values.tolist()
        rows = [{what: name} | dict(zip(shown, row)) for name, row in zip(shown, found[what])]
        print(format_table(rows), end="\n\n")
        if flags.out:
            plots.matrix(Path(flags.out) / f"{what}.png", np.array(found[what]), shown, shown, what)
    write_results(flags, {"task": "similarity", "model": flags.model, "classes": shown} | found)


if __name__ == "__main__":
    leave(main())
