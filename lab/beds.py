"""The CLIPs that AlignCLIP is tested on, and what its attention and guidance do while it is fine-tuned.

AlignCLIP presumes a class token that attends to the background, and a second branch that points at the thing.
The rebuttal explains the first: captions tell of the background as often as of the thing. A "bed" is a CLIP
trained on pictures of one thing with five captions, of which `share` tell of the background only. `bias` of
the backgrounds are the home of the thing. Arms of lab/claims.py choose both; seeds from 100 chose them.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import alignclip
import data
import evaluate
import tasks
from clipood import unit
from evals import maps
from model import CONFIGS
from readers import scenes
from readers.scene_captions import BACKGROUNDS, GROUND_WORDS
from util.files import output_folder, write_image, write_json, write_text
from util.metrics import map_figures

LIFTS = ("attention lift", "guidance lift")
PLACES = ("scenery", "a scene", "a place", "things")
TEMPERATURE = 0.03  # of the guidance that is measured, whatever an arm trains with
STEPS = (0, 5, 10, 20, 40, 80, 120, 160, 200)  # steps of fine-tuning after which lifts are measured


# as many blocks as ViT-B/16 has
CONFIGS["deep"] = replace(CONFIGS["tiny"], vision_layers=12)


def write_bed(path: Path, things: scenes.Objects, share: int) -> None:
    """Writes pictures of one thing and a list with five captions of each; `share` do not name the thing."""
    output_folder(path.parent)
    rows = ["filepath,title"]
    for i, texts in enumerate(things.captions):
        write_image(path.parent / f"{i}.png", things.image(i))
        where = GROUND_WORDS[BACKGROUNDS[things.facts["background"][i]]]
        own = [texts[(i + k) % len(texts)] for k in range(5 - share)]
        rows += [f"{i}.png,{text}" for text in [*(f"{what} {where}" for what in PLACES[:share]), *own]]
    write_text(path, "\n".join(rows) + "\n")


def write_pairs(path: Path, sources: list[str]) -> None:
    """Writes one list of the pictures and captions of several data sets."""
    rows = []
    for source in filter(None, sources):
        dataset = data.open_dataset(source, default_split="train", kind="captions")
        names = (str(Path(dataset.name(i)).absolute()) for i in range(len(dataset)))
        rows += [json.dumps({"image": n, "captions": texts}) for n, texts in zip(names, dataset.captions)]
    output_folder(path.parent)
    write_text(path, "\n".join(rows) + "\n")


def things(lab, seed: int, split="test", size=640, domains=scenes.DOMAINS) -> scenes.Objects:
    """Pictures of one thing each on any background, with masks."""
    return scenes.Objects(split, size, seed, lab.image_size, domains)


def class_texts(net, tokenizer) -> Tensor:
    """Unit text features of the 16 kinds: (C, E)."""
    with evaluate.evaluating(net):
        return evaluate.encode_classes(net, tokenizer, list(scenes.KINDS), scenes.TEMPLATES)


@torch.no_grad()
def aligned_maps(net, text: Tensor, dataset, temperature=TEMPERATURE) -> tuple[dict[str, Tensor], Tensor]:
    """The attention that AlignCLIP aligns, and its guidance: maps (N, S, S); and the masks."""
    found, masks = {"attention": [], "guidance": []}, []
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


def lifts(found: dict[str, Tensor], masks: Tensor) -> dict[str, float]:
    """Mean lift of both maps: the share on the thing over the thing's share of the picture; chance is 1."""
    return {f"{name} lift": map_figures(m, masks)[:, 0].mean().item() for name, m in found.items()}


class Watched(tasks.LabelTask):
    """Fine-tuning on drawn things that writes the CLIP's lifts after STEPS, and the last, to lifts.json."""

    def begin(self, c) -> None:
        super().begin(c)
        self.pictures = scenes.Objects("val", 320, c.seed, self.config.image_size)
        self.text, self.path = class_texts(self.clip, self.tokenizer), Path(c.out) / "lifts.json"

    def batches(self, start: int) -> data.Batches:
        self.done = start
        self.found = json.loads(self.path.read_text()) if start and self.path.exists() else {}
        self.look()
        return super().batches(start)

    def after_step(self) -> None:
        super().after_step()
        self.done += 1
        self.look()

    def look(self) -> None:
        if self.done in (*STEPS, self.c.steps):
            with evaluate.evaluating(self.clip):
                self.found[str(self.done)] = lifts(*aligned_maps(self.clip, self.text, self.pictures))
            write_json(self.path, self.found)
