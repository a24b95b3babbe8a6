"""The figures of evals/mixtures.py, from what its measure() returns: weights, names, removal, masks."""

import torch
from torch import Tensor

from evals import surgery
from evals.maps import enlarge
from readers import scenes

NAMES, SHUFFLES = 4, 200  # names of a token; random comparisons
TINY = torch.finfo(torch.float64).tiny


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

    Returns: rows. The lead is the mean cosine of true pairs less that of false ones, and % are of the lead.
             "true" and "false" are the drops of these pairs, "lead lost" their difference, "another" the lead
             lost without another token. "most needed": the largest drop is at the token of largest weight
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


def lift(maps: Tensor, areas: Tensor) -> Tensor:
    """Share of each map (rows, columns, n) on each area (t, S, S), over its share of the picture: (t, n)."""
    maps = enlarge(maps.permute(2, 0, 1), areas.shape[-1]).double()  # (n, S, S)
    share = torch.einsum("nij,tij->tn", maps / maps.sum((1, 2), keepdim=True), areas)
    return share / areas.mean((1, 2)).clamp(min=TINY)[:, None]


def kinds_in(dataset: scenes.Scenes, i: int) -> list[str]:
    return [scenes.KINDS[k] for k in dataset.facts["kind"][i].tolist() if k >= 0]


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
