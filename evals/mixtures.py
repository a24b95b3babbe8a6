"""What do the mixture tokens of a Llip do? Weights, maps, names and the removal of each token.

    python -m evals.mixtures --model runs/llip --out OUT                           the embedded scenes
    python -m evals.mixtures --model runs/llip --data captions.jsonl --out OUT
    python -m evals.mixtures --model runs/llip --image photo.jpg --text "a red dog" "on grass" --out OUT

Phi_ijk^m is the weight of token k in head m for image i and caption j (Lavoie et al. 2024, eq. 1). The paper
does not look inside the tokens, so it has no equation for these figures.

    weights.png    mean of Phi over the images. Its variance has three parts, as in a two-way analysis of
                   variance: across captions, across images, and jointly (the part that needs both)
    tokens.png     surgery.llip_token_maps: the patches that each token attends to in the last block
    captions.png   surgery.mixed_maps: the same maps, mixed by the weights of a caption
    names.png      the captions that use each token most. Coherence is the share of common words of two such
                   captions; "permuted" is the same after the captions are dealt to the weights at random
    ablation.png   drop of the cosine when one token is removed before the softmax, relative to the lead: the
                   cosine of true pairs less that of false ones. A sigmoid loss gives zero no meaning

With --image every text counts as true of every image, so there is no lead.
Scenes have masks. The lift of a map is its share on a thing over the thing's share of the picture.
The figures are computed in evals/mixture_figures.py and drawn in evals/mixture_pictures.py.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import data
import evaluate
from evals import mixture_figures as figures
from evals import mixture_pictures, surgery
from llip import PLAIN_BYTES, Llip, plain_bytes
from readers import scene_captions as words
from readers import scenes
from readers.templates import PHOTO, fill
from util.evaluation import DataFlags, ModelFlags, load_options, start, write_results
from util.flags import parse
from util.program import leave, program
from util.report import Progress, format_table

MAX_TEXTS, MAX_SHOWN = 512, 24  # captions of a data set; images on a sheet


class Photos:
    """A data set of image files."""

    def __init__(self, paths: tuple[str, ...]):
        self.paths = [Path(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> Image.Image:
        return surgery.read_image(self.paths[i])

    def name(self, i: int) -> str:
        return self.paths[i].name


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
    own = [[j for j, c in enumerate(claims) if c in words.truths(scene)] for scene in dataset.pictures]
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
        return Photos(flags.image), plain_captions([flags.text] * len(flags.image))
    flags = replace(flags, data=flags.data or "scenes")
    dataset = evaluate.open_data(flags, model, "captions" if flags.data == "scenes" else "image")
    if flags.data == "scenes":
        return dataset, scene_captions(dataset)
    if hasattr(dataset, "captions"):
        return dataset, plain_captions(dataset.captions)
    if not hasattr(dataset, "labels"):
        raise ValueError(f"{flags.data} has neither captions nor labels: give --image and --text")
    return dataset, plain_captions([[fill(PHOTO[0], dataset.classes[label])] for label in dataset.labels])


def without_each(model: Llip, keys: Tensor, values: Tensor, text: tuple) -> Tensor:
    """Logits of one image's captions when one token is removed before the softmax.

    Args:    keys and values (H, M, K), or M + P with all_tokens;  text features of T captions
    Returns: (M, T), row k without mixture token k
    """
    every = torch.arange(keys.shape[1], device=keys.device)
    rest = torch.stack([every[every != k] for k in range(model.visual.tokens)])  # (M, M - 1)
    keys, values = (x[:, rest].transpose(0, 1) for x in (keys, values))  # (M, H, M - 1, K)
    return model.pair_logits((keys, values), text)


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
    shown, transform = Progress("images", len(dataset), "images"), data.preprocess_of(model.config)
    with evaluate.evaluating(model) as device:
        text = evaluate.encode_text(model, tokens, flags.batch_size, flags.precision)
        for images, ids in data.eval_batches(dataset, transform, size, workers=flags.workers):
            with evaluate.towers(device, flags.precision):
                images = images.to(device)
                maps, *sides = surgery.llip_token_maps(model, images), *model.encode_image(images)
            keys, values = (side.float() for side in sides)  # (b, H, M, K) each
            phi = model.mixing_weights(keys, text[0]).double()  # (b, T, H, M)
            parts = {"by_caption": phi.sum(0), "squares": (phi**2).mean(1).sum(0)}
            parts["entropy"] = -(phi * phi.clamp(min=figures.TINY).log()).sum(-1).mean(1).sum(0)
            parts["largest"] = phi.amax(-1).mean(1).sum(0)
            sums = {name: sums.get(name, 0) + part.cpu() / len(dataset) for name, part in parts.items()}
            kept["by_image"].append(phi.mean(1).cpu())
            kept["maps"].append(maps.float().cpu())
            for row, i in enumerate(ids.tolist()):
                some = caption[image == i].to(device)
                own_text = tuple(part[some] for part in text)
                logits = model.pair_logits((keys[row, None], values[row, None]), own_text)  # (1, some)
                if keys.shape[2] > 1:
                    logits = torch.cat([logits, without_each(model, keys[row], values[row], own_text)])
                kept["cosines"].append((logits / model.logit_scale.exp()).t().double().cpu())
                kept["used"].append(phi[row, some].mean(1).float().cpu())
            shown.add(len(ids))
    return sums | {name: torch.cat(parts) for name, parts in kept.items()}


@dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags, DataFlags):
    data: str = ""  # images with captions or labels (default: scenes)
    limit: int | None = 1024  # images
    image: tuple[str, ...] = ()  # image files, in place of --data
    text: tuple[str, ...] = ()  # captions of these images
    show: int = 4  # images on the sheets of maps


@program
def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, __doc__)
    if not 1 <= flags.show <= MAX_SHOWN:
        raise ValueError(f"--show {flags.show}: a sheet holds 1 to {MAX_SHOWN} images")
    device = start(flags, one_process=True)
    model, tokenizer = surgery.open_for_maps(flags.model, flags.vocab, **load_options(flags))
    if not model.conditional:
        raise ValueError(f"{flags.model} is a CLIP without mixture tokens: this program needs a Llip")
    dataset, captions = open_inputs(flags, model)
    found = measure(model.to(device), tokenizer, dataset, captions, flags)
    means = found["by_caption"][..., : model.visual.tokens]  # (T, H, M)
    names, coherence = figures.names(means, captions.texts)
    tables = {"weights": figures.weights(found), "ablation": figures.ablation(found, captions)}
    if isinstance(dataset, scenes.Scenes):
        found["labels"], found["by_pair"], more = figures.on_masks(found, dataset, captions)
        tables |= more
    for name, rows in tables.items():
        print(f"{name}\n{format_table(rows)}\n" if rows else f"{name}: none\n")
    content = {"task": "mixtures", "model": flags.model, "data": flags.data, "images": len(dataset)}
    content |= tables | {"names": names, "coherence": coherence, "captions": captions.texts}
    content |= {"topics": captions.topics, "mean_weights": means.round(decimals=4).tolist()}
    write_results(flags, content)
    if flags.out:
        show = mixture_pictures.examples(dataset, found, captions, flags.show)
        mixture_pictures.draw(Path(flags.out), dataset, captions, found, tables | {"names": names}, show)


if __name__ == "__main__":
    leave(main())
