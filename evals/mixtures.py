"""What do the mixture tokens of a Llip do? Weights, maps, names and the removal of each token.

    python -m evals.mixtures --model runs/llip --out OUT                           the embedded scenes
    python -m evals.mixtures --model runs/llip --data captions.jsonl --out OUT
    python -m evals.mixtures --model runs/llip --image photo.jpg --text "a red dog" "on grass" --out OUT

Phi_ijk^m is the weight of token k in head m for image i and caption j (Lavoie et al. 2024, eq. 1). The paper
does not look inside the tokens, so it has no equation for these figures. docs/evaluation.md has the columns.

    weights.png    mean of Phi over the images. Its variance has three parts, as in a two-way analysis of
                   variance: across captions, across images, and jointly (the part that needs both)
    tokens.png     surgery.llip_token_maps: the patches that each token attends to in the last block
    captions.png   surgery.mixed_maps: the same maps, mixed by the weights of a caption
    "names"        the captions that use each token most. Coherence is the share of common words of two such
                   captions; "permuted" is the same after the captions are dealt to the weights at random
    ablation.png   drop of the cosine when one token is removed before the softmax, relative to the lead. A
                   sigmoid loss gives zero no meaning. With --image all texts are true: there is no lead
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import data
import evaluate
from evals import surgery
from evals.maps import enlarge
from llip import PLAIN_BYTES, Llip, plain_bytes
from readers import scene_captions as words
from readers import scenes
from readers.datasets import Images
from readers.templates import PHOTO, fill
from util.evaluation import DataFlags, ModelFlags, load_options, start, write_results
from util.flags import parse
from util.plots import bars, matrix
from util.program import leave, program
from util.report import format_table

MAX_TEXTS = 512  # captions of a data set
NAMES, SHUFFLES = 4, 200  # names of a token; random comparisons
TINY = torch.finfo(torch.float64).tiny


class Photos(Images):
    """Image files that are shown upright."""

    def image(self, i: int) -> Image.Image:
        return surgery.read_image(self.files[i], self.max_pixels)


@dataclass
class Captions:
    texts: list[str]
    topics: list[str]  # of each caption
    things: list[str]  # the thing that each caption names, or ""
    rows: dict[str, list[int]]  # captions in weights.png, by topic
    own: list[list[int]]  # captions that are true of each image

    def pairs(self) -> Tensor:
        """(P, 3): image, caption, and 1 if it is true, 0 if it is only true of the next image."""
        found = []
        for i, true in enumerate(self.own):
            false = set(self.own[(i + 1) % len(self.own)]) - set(true)
            found += [(i, j, int(j in true)) for j in [*true, *sorted(false)]]
        return torch.tensor(found)


def scene_captions(dataset: scenes.Scenes) -> Captions:
    """Every caption about one aspect of a scene, in the words of the training captions."""
    named, kinds = words.named, scenes.KINDS
    found = [("things", named(*p), ("thing", *p, None)) for p in product(kinds, words.COLOURS)]
    found += [("groups", named(group), ("thing", group, None, None)) for group in words.GROUPS]
    for kind, place in product(kinds, words.PLACES):
        found.append(("positions", named(kind, None, place), ("thing", kind, None, place)))
    found += [("places", f"things {text}", ("background", b)) for b, text in words.GROUND_WORDS.items()]
    found += [("counts", f"{n} thing{'s' * (k > 0)}", ("count", k + 1)) for k, n in enumerate(words.NUMBERS)]
    topics, texts, claims = map(list, zip(*found))
    things = [claim[1] if claim[1] in kinds else "" for claim in claims]
    truths = map(words.truths, dataset.pictures)
    own = [[j for j, claim in enumerate(claims) if claim in true] for true in truths]
    by_topic = {topic: [j for j, t in enumerate(topics) if t == topic] for topic in dict.fromkeys(topics)}
    # one word changes within a topic of weights.png: all things in red, cars in all colours
    rows = {"things": by_topic["things"][:: len(words.COLOURS)]}
    rows |= {"colours": [j for j in by_topic["things"] if things[j] == "car"], **(by_topic | rows)}
    rows["positions"] = [j for j in by_topic["positions"] if things[j] in ("dog", "car")]
    return Captions(texts, topics, things, rows, own)


def plain_captions(own: list[list[str]]) -> Captions:
    """The distinct captions of the images, at most MAX_TEXTS, evenly spaced."""
    texts = list(dict.fromkeys(text for some in own for text in some))
    T = min(len(texts), MAX_TEXTS)
    texts = [texts[k * len(texts) // T] for k in range(T)]
    number = {text: j for j, text in enumerate(texts)}
    numbers = [[number[text] for text in dict.fromkeys(some) if text in number] for some in own]
    return Captions(texts, ["captions"] * T, [""] * T, {"": list(range(0, T, -(-T // 40)))}, numbers)


def open_inputs(flags, model: Llip) -> tuple:
    """The images, and their captions."""
    if bool(flags.image) != bool(flags.text) or (flags.image and flags.data):
        raise ValueError("give --data, or --image together with --text")
    if flags.image:
        photos = Photos("", flags.image, max_pixels=flags.max_pixels)
        return photos, plain_captions([flags.text] * len(flags.image))
    dataset = evaluate.open_data(replace(flags, data=flags.data or "scenes"), model, "image")
    if isinstance(dataset, scenes.Scenes):
        return dataset, scene_captions(dataset)
    if hasattr(dataset, "captions"):
        return dataset, plain_captions(dataset.captions)
    if not hasattr(dataset, "labels"):
        raise ValueError(f"{flags.data} has neither captions nor labels: give --image and --text")
    return dataset, plain_captions([[fill(PHOTO[0], dataset.classes[label])] for label in dataset.labels])


def measure(model: Llip, tokenizer, dataset, captions: Captions, flags) -> dict[str, Tensor]:
    """One pass over the images.

    Returns: of all images and captions by_caption (T, H, M), by_image (N, H, M), the means of Phi; squares
             (H, M); entropy and largest (H,). maps (N, rows, columns, M) of the tokens. Of the pairs: used
             (P, M), mean of the heads; cosines (P, 1 + M), intact and without each token, plus a constant.
             With all_tokens the patches are further columns of Phi.
    """
    kept, sums = {"by_image": [], "maps": [], "used": [], "cosines": []}, {}
    image, caption, _ = captions.pairs().unbind(1)
    tokens = tokenizer(captions.texts, model.config.context_length)
    size = min(flags.batch_size, max(1, PLAIN_BYTES // plain_bytes(model, 1, len(tokens))))
    options = dict(batch_size=size, workers=flags.workers, progress="images")
    with evaluate.evaluating(model) as device:
        text = evaluate.encode_text(model, tokens, flags.batch_size, flags.precision)
        for images, ids in evaluate.image_batches(model, dataset, **options):
            with evaluate.towers(device, flags.precision):
                maps, *sides = surgery.llip_token_maps(model, images), *model.encode_image(images)
            keys, values = (side.float() for side in sides)  # (b, H, M, K) each
            # MPS has no float64
            phi = model.mixing_weights(keys, text[0]).cpu().double()  # (b, T, H, M)
            parts = {"by_caption": phi.sum(0), "squares": (phi**2).mean(1).sum(0)}
            parts["entropy"] = -(phi * phi.clamp(min=TINY).log()).sum(-1).mean(1).sum(0)
            parts["largest"] = phi.amax(-1).mean(1).sum(0)
            every = torch.arange(keys.shape[2], device=device)  # M, or M + P with all_tokens
            rest = torch.stack([every[every != k] for k in range(model.visual.tokens)])  # (M, M - 1)
            sums = {name: sums.get(name, 0) + part / len(dataset) for name, part in parts.items()}
            kept["by_image"].append(phi.mean(1))
            kept["maps"].append(maps.float().cpu())
            for row, i in enumerate(ids.tolist()):
                some = caption[image == i]
                own_text = tuple(part[some] for part in text)
                logits = model.pair_logits((keys[row, None], values[row, None]), own_text)  # (1, some)
                if len(every) > 1:
                    # row k without mixture token k: (M, H, M - 1, K) each
                    others = tuple(side[row][:, rest].transpose(0, 1) for side in (keys, values))
                    logits = torch.cat([logits, model.pair_logits(others, own_text)])  # (1 + M, some)
                kept["cosines"].append((logits / model.logit_scale.exp()).t().cpu().double())
                kept["used"].append(phi[row, some].mean(1).float())
    return sums | {name: torch.cat(parts) for name, parts in kept.items()}


def weights(found: dict) -> list[dict]:
    """A row for each head: entropy in nats, the largest weight, and the shares of variance."""
    captions, images = found["by_caption"], found["by_image"]  # (T, H, M), (N, H, M)
    parts = [x.var(0, correction=0).sum(-1) for x in (captions, images)]  # (H,) each
    total = (found["squares"] - images.mean(0) ** 2).sum(-1).clamp(min=TINY)  # (H,)
    parts.append((total - sum(parts)).clamp(min=0))
    columns = {"entropy": found["entropy"], "largest weight": found["largest"]}
    columns |= {f"across {what}": part / total for what, part in zip(("captions", "images", "both"), parts)}
    uniform = {"uniform": 1 / captions.shape[-1]}
    return [{"head": h} | uniform | {k: v[h].item() for k, v in columns.items()} for h in range(len(total))]


def names(means: Tensor, texts: list[str]) -> tuple[list[dict], dict]:
    """The captions with the largest weight of each token (T, H, M), and how many words they share."""
    M, T = means.shape[-1], len(texts)
    top = means.flatten(1).topk(min(NAMES, T), dim=0)  # (n, H M) values and indices
    rows = []
    for cell, (some, value) in enumerate(zip(top.indices.t().tolist(), top.values[0].tolist())):
        row = {"head": cell // M, "token": cell % M, "weight": value}
        rows.append(row | {"captions": [texts[j] for j in some]})
    if T < 2:
        return rows, {}
    words = [set(text.split()) for text in texts]
    alike = torch.tensor([[len(a & b) / max(len(a | b), 1) for a in words] for b in words])  # (T, T)
    first, second = top.indices[torch.combinations(torch.arange(len(top.indices)))].unbind(1)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(T), *(torch.randperm(T, generator=generator) for _ in range(SHUFFLES))]
    own, *dealt = [alike[order[first], order[second]].mean().item() for order in orders]
    p = (1 + sum(value >= own for value in dealt)) / (1 + SHUFFLES)
    return rows, {"coherence": own, "permuted": sum(dealt) / SHUFFLES, "p": p}


def ablation(found: dict, captions) -> list[dict]:
    """Mean drop of the cosine without the token of a pair's largest weight, and without another, by topic.

    The lead is the mean cosine of true pairs less that of false ones, and % are of the lead.
    """
    drops = found["cosines"][:, :1] - found["cosines"][:, 1:]  # (P, M)
    M, rows = drops.shape[1], []
    if M < 2:
        return rows
    _, caption, true = captions.pairs().unbind(1)
    weight, used = found["used"][:, :M].max(1)  # (P,) each
    used = used[:, None]  # (P, 1)
    own = drops.gather(1, used)[:, 0]  # (P,)
    other, hit = (drops.sum(1) - own) / (M - 1), (drops.argmax(1) == used[:, 0]).double()
    topics = [captions.topics[j] for j in caption.tolist()]
    distinct = list(dict.fromkeys(topics))
    for topic in [*["all"] * (len(distinct) > 1), *distinct]:
        some = torch.tensor([topic in ("all", t) for t in topics])
        yes, no = some & (true == 1), some & (true == 0)
        row = {"topic": topic, "pairs": int(yes.sum()), "drop": own[yes].mean().item()}
        row |= {"weight": weight[yes].mean().item(), "most needed": hit[yes].mean().item(), "chance": 1 / M}
        lead = (found["cosines"][yes, 0].mean() - found["cosines"][no, 0].mean()).item() if no.any() else 0
        # after no training the lead is noise, and shares of it say nothing
        if lead > 0.01:
            parts = torch.stack([own[yes].mean(), own[no].mean(), other[yes].mean() - other[no].mean()])
            on, off, another = (100 * parts / lead).tolist()
            row |= {"lead": lead, "true, %": on, "false, %": off}
            row |= {"lead lost, %": on - off, "another, %": another}
        rows.append(row)
    return rows


def kinds_in(dataset: scenes.Scenes, i: int) -> list[str]:
    return [scenes.KINDS[k] for k in dataset.facts["kind"][i].tolist() if k >= 0]


def lift(maps: Tensor, areas: Tensor) -> Tensor:
    """Share of each map (rows, columns, n) on each area (t, S, S), over its share of the picture: (t, n)."""
    maps = enlarge(maps.permute(2, 0, 1), areas.shape[-1]).double()  # (n, S, S)
    share = torch.einsum("nij,tij->tn", maps / maps.sum((1, 2), keepdim=True), areas)
    return share / areas.mean((1, 2)).clamp(min=TINY)[:, None]


def on_masks(found: dict, dataset: scenes.Scenes, captions) -> tuple[list[list[str]], dict, dict]:
    """Lift of token maps and of caption maps on the things of scenes.

    Returns: for each image and token the area with the largest lift, as "car 1.4";  for pairs whose caption
             names a thing {pair: (lift, is it the largest of all things, that thing)};  tables of means,
             where "right thing" counts scenes of several things, and "another pair" lends its weights
    """
    labels, by_pair, tokens, maps_of = [], {}, [], {"caption": [], "another pair": []}
    image, caption, true = captions.pairs().unbind(1)
    shuffled = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))
    for i in range(len(dataset)):
        masks, kinds = torch.from_numpy(dataset.masks(i)).double(), kinds_in(dataset, i)
        lifts = lift(found["maps"][i], torch.cat([masks, 1 - masks.amax(0, keepdim=True)]))  # (things + 1, M)
        areas, best = [*kinds, "background"], lifts.max(0)
        labels.append([f"{areas[k]} {x:.1f}" for x, k in zip(best.values.tolist(), best.indices.tolist())])
        tokens.append(torch.stack([lifts[:-1].mean(0), lifts[-1]]))
        pairs = ((image == i) & (true == 1)).nonzero()[:, 0].tolist()
        pairs = [p for p in pairs if captions.things[caption[p]]]
        for name, used in (("caption", pairs), ("another pair", shuffled[pairs].tolist())):
            maps = surgery.mixed_maps(found["maps"][i, None], found["used"][used][None])[0]
            for p, own in zip(pairs, lift(maps, masks).t()):  # (things,)
                thing, top = kinds.index(captions.things[caption[p]]), int(own.argmax())
                chances = (thing == top, 1 / len(kinds)) if len(kinds) > 1 else (torch.nan, torch.nan)
                maps_of[name].append((own[thing].item(), *chances))
                if name == "caption":
                    by_pair[p] = (own[thing].item(), thing == top, f"{kinds[top]} {own[top]:.1f}")
    means = {name: torch.tensor(rows).nanmean(0).tolist() for name, rows in maps_of.items()}
    rows = [{"weights of": n} | dict(zip(("lift", "right thing", "chance"), row)) for n, row in means.items()]
    things, ground = torch.stack(tokens).mean(0).tolist()
    by_token = [{"token": k, "things": a, "background": b} for k, (a, b) in enumerate(zip(things, ground))]
    return labels, by_pair, {"caption maps": rows, "token maps": by_token}


def draw_weights(path: Path, phi: Tensor, captions: Captions, tokens: list[int]) -> None:
    """Writes mean weights (T, H, M): a row for each of captions.rows, columns for the heads and tokens."""
    uniform, phi = 1 / phi.shape[2], F.pad(phi[:, :, tokens], (0, 1), value=torch.nan)  # (T, H, M + 1)
    names, lines = [], []
    for topic, some in captions.rows.items():
        short = [shorten(captions.texts[j], 44, placeholder="...") for j in some]
        names += [f"{topic}: {text}" if topic else text for text in short] + [""]
        lines += [*phi[some].flatten(1), torch.full((phi[0].numel(),), torch.nan)]
    columns = [name for h in range(phi.shape[1]) for name in [*(f"head {h}, token {k}" for k in tokens), ""]]
    values = torch.stack(lines)[:-1, :-1].numpy()
    colours = f"dark blue {np.nanmin(values):.2g}, yellow {np.nanmax(values):.2g}; {uniform:.3g} is uniform"
    title = f"Mean weight of each token for each caption: {colours}"
    matrix(path, values, names[:-1], columns[:-1], title)


def picture(dataset, i: int) -> tuple[Image.Image, str]:
    """An image as the model sees it, but larger, and its name."""
    if isinstance(dataset, scenes.Scenes):
        large = scenes.draw(dataset.facts, np.array([i]), surgery.TILE)[0]
        return Image.fromarray(large), " ".join(kinds_in(dataset, i))
    return Image.fromarray(data.preprocess(surgery.TILE).pixels(dataset.image(i))), Path(dataset.name(i)).name


def token_rows(dataset, found: dict, show: list[int], tokens: list[int]) -> list[tuple]:
    """The mean map of each token over all images, then its maps of some images."""
    blank, labels = Image.new("RGB", (surgery.TILE, surgery.TILE), "white"), [f"token {k}" for k in tokens]
    rows = [(blank, found["maps"].mean(0)[..., tokens], [f"mean of {len(dataset)} images", *labels])]
    for i in show:
        image, name = picture(dataset, i)
        own = [found["labels"][i][k] for k in tokens] if "labels" in found else labels
        rows.append((image, found["maps"][i][..., tokens], [name, *own]))
    return rows


def caption_rows(dataset, found: dict, captions, show: list[int]) -> list[tuple]:
    """Caption maps of some images; in scenes up to three things and one caption of each other topic."""
    rows, most, by_pair = [], {"things": 3, "captions": 6}, found.get("by_pair", {})
    for i in show:
        image, name = picture(dataset, i)
        labels, chosen, count = [name], [], Counter()
        for p, (owner, j, true) in enumerate(captions.pairs().tolist()):
            topic = captions.topics[j]
            if owner == i and true and count[topic] < most.get(topic, 1):
                value, right, thing = by_pair.get(p, ("", True, ""))
                number = f" {value:.1f}" if thing else ""
                labels.append(captions.texts[j] + number + ("" if right else f" WRONG: {thing}"))
                chosen.append(p)
                count[topic] += 1
        maps_of = surgery.mixed_maps(found["maps"][i, None], found["used"][chosen][None])[0]
        rows.append((image, maps_of, labels))
    return rows


def examples(dataset, found: dict, captions) -> list[int]:
    """Two scenes of several things with the best caption maps and two with the worst, or four images."""
    if "by_pair" not in found:
        return sorted({k * len(dataset) // 4 for k in range(4)})
    scores, image = {}, captions.pairs()[:, 0].tolist()
    for p, (value, right, _) in found["by_pair"].items():
        if len(kinds_in(dataset, image[p])) > 1:
            scores.setdefault(image[p], []).append((right, value))
    order = sorted(scores, key=lambda i: np.mean(scores[i], 0).tolist())
    return list(dict.fromkeys([*order[:-3:-1], *order[:2]]))


def draw(out: Path, dataset, captions: Captions, found: dict, tables: dict) -> None:
    """Writes all pictures to a folder. Of many tokens those with the largest weights are drawn."""
    means = found["by_caption"][..., : found["maps"].shape[-1]]
    most = min(16, 144 // means.shape[1])  # tokens that fit into the width of weights.png
    order = means.mean((0, 1)).argsort(descending=True).tolist()
    few, show = sorted(order[:8]), examples(dataset, found, captions)
    draw_weights(out / "weights.png", means, captions, sorted(order[:most]))
    note = "; a number is the share of the map on a thing over its share of the picture" * ("labels" in found)
    title = f"What each token attends to in the last block{note}"
    surgery.map_sheet(out / "tokens.png", token_rows(dataset, found, show, few), title)
    title = f"The maps of the tokens, mixed by the weights of a caption{note}"
    surgery.map_sheet(out / "captions.png", caption_rows(dataset, found, captions, show), title)
    rows = [row for row in tables["ablation"] if "lead" in row]
    if parts := {row["topic"]: {k: (row[k], 0.0) for k in row if "%" in k} for row in rows}:
        bars(out / "ablation.png", parts, "A token is removed before the softmax: changes in % of the lead")
    print(f"pictures in {out}")


@dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags, DataFlags):
    data: str = ""  # images with captions or labels (default: scenes)
    limit: int | None = 1024  # images
    image: tuple[str, ...] = ()  # image files, in place of --data
    text: tuple[str, ...] = ()  # captions of these images


@program
def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, __doc__)
    device = start(flags, one_process=True)
    model, tokenizer = surgery.open_for_maps(flags.model, flags.vocab, **load_options(flags))
    if not model.conditional:
        raise ValueError(f"{flags.model} is a CLIP without mixture tokens: this program needs a Llip")
    dataset, captions = open_inputs(flags, model)
    found = measure(model.to(device), tokenizer, dataset, captions, flags)
    means = found["by_caption"][..., : model.visual.tokens]  # (T, H, M)
    tops, coherence = names(means, captions.texts)
    tables = {"weights": weights(found), "ablation": ablation(found, captions)}
    if isinstance(dataset, scenes.Scenes):
        found["labels"], found["by_pair"], more = on_masks(found, dataset, captions)
        tables |= more
    # the 32 cells with the largest mean weights, all of a small Llip
    shown = sorted(tops, key=lambda row: -row["weight"])[:32]
    shown = [row | {"captions": "; ".join(row["captions"])} for row in shown]
    for name, rows in (tables | {"names": shown}).items():
        print(f"{name}\n{format_table(rows)}\n" if rows else f"{name}: none\n")
    content = {"task": "mixtures", "model": flags.model, "data": flags.data, "images": len(dataset)}
    content |= tables | {"names": tops, "coherence": coherence, "captions": captions.texts}
    content |= {"topics": captions.topics, "mean_weights": means.round(decimals=4).tolist()}
    write_results(flags, content)
    if flags.out:
        draw(Path(flags.out), dataset, captions, found, tables)


if __name__ == "__main__":
    leave(main())
