"""Do a model's maps show the object? Every attention structure and method, measured on drawn masks.

    python -m evals.maps --model runs/clip --more runs/alignclip --data scenes --out maps

The embedded scenes have exact masks (readers/scenes.py). Each thing is searched by its name, and
util.metrics.map_figures compares the map with the thing's mask. There are three kinds of map:

    a structure   similarity of patch and name, where the second path of CLIP Surgery mixes its tokens by
                  qkv, vvv, qqv, kkv or dv and all else is equal: AlignCLIP, Fig. 8
    a method      the same similarity from the features of plain CLIP, maskclip, sclip, gem or clearclip;
                  surgery is vvv, and alignclip is dv
    attention     cls is the class token's attention over the patches in the last block (AlignCLIP, Fig. 1 and
                  4), cls-early its mean over the blocks that AlignCLIP aligns. All things are foreground.
                  An Llip has caption (surgery.llip_caption_map) and cls, the mean of its mixture tokens

Baselines without a model: uniform; centre, a cone; mask, the true mask averaged over the patches of a model.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import evaluate
from alignclip import default_blocks
from attention import KINDS
from evals import surgery
from model import DualEncoder
from readers import scenes
from readers.templates import fill
from util.evaluation import DataFlags, ModelFlags, load_options, options_of, start, write_results
from util.files import write_image
from util.flags import parse
from util.metrics import map_figures, mean_map_figures
from util.plots import sheet
from util.program import leave, program
from util.report import Progress, format_table, grouped_means, plus_minus
from util.run import read_config

# a method and the structure that equals it
SAME = {"surgery": "vvv", "alignclip": "dv"}
TITLES = {kind: f"{kind} ({method})" for method, kind in SAME.items()}
METHODS = ("plain", *surgery.METHODS)
ATTENTION, LLIP = ("cls", "cls-early"), ("caption", "cls")
BASELINES = ("uniform", "centre", "mask")
MAX_ROWS = 24  # pictures on one sheet
FIGURES = ("lift", "pointing", "area", "iou", "best_iou", "best_threshold")
# flags of a run that do not make it another kind of model
RUNNING = {"seed", "out", "init", "commit", "resume", "device", "threads", "workers", "compile"}
RUNNING |= {"grad_checkpointing", "log_every", "eval_every", "save_every"}


def raw_maps(model: DualEncoder, images: Tensor, name: str, text: Tensor) -> Tensor:
    """One kind of map, on the grid of patches.

    Args:    images (B, 3, S, S);  name: one of KINDS, METHODS, ATTENTION or LLIP
             text: class features (C, E), or for caption the ids of the prompts (C, templates, L)
    Returns: (B, rows, columns, C); of attention that ignores the text, (B, rows, columns, 1)
    """
    visual = model.visual
    if name == "caption":
        maps = surgery.llip_caption_map(model, images, text.flatten(0, 1))
        return maps.unflatten(-1, text.shape[:2]).mean(-1)  # (B, rows, columns, C)
    if name in ATTENTION:
        early = default_blocks(len(visual.transformer.resblocks))[1] if name == "cls-early" else 0
        return surgery.llip_token_maps(model, images, early).mean(-1, keepdim=True)
    if name == "plain":
        tokens = visual.head(visual.transformer(visual.embed(images)))  # (B, 1 + P, E)
    else:
        tokens = surgery.dense_features(visual, images, **{"kind" if name in KINDS else "method": name})
    return surgery.similarity_map(tokens, text)


def baseline(name: str, masks: Tensor, patch: int) -> Tensor:
    """A map (N, S, S) without a model: uniform, centre, or the masks (N, S, S) averaged over patches."""
    N, S, _ = masks.shape
    if name == "uniform":
        return torch.ones(N, S, S)
    if name == "mask":
        return enlarge(F.avg_pool2d(masks[:, None].float(), patch)[:, 0], S)
    place = (torch.arange(S) + 0.5) / S - 0.5
    cone = 1 - (place[:, None] ** 2 + place**2).sqrt() * math.sqrt(2)  # (S, S)
    return cone.clamp(min=0).expand(N, S, S)


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Maps on a grid (N, rows, columns) to (N, size, size), bilinear: Li et al. 2023, eq. 1."""
    return F.interpolate(maps[:, None], (size, size), mode="bilinear")[:, 0]


def things_of(dataset, ids: list[int], together: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Things, or all of a picture as one: (N,) row of the picture, (N,) kind, (N, S, S) bool mask."""
    masks = [torch.from_numpy(dataset.masks(i)) for i in ids]  # (things, S, S) each
    masks = [each.any(0, keepdim=True) if together else each for each in masks]
    rows = [row for row, each in enumerate(masks) for _ in each]
    kinds = [kind for i, each in zip(ids, masks) for kind in dataset.facts["kind"][i][: len(each)].tolist()]
    return torch.tensor(rows), torch.tensor(kinds), torch.cat(masks)


def names_as_text(model: DualEncoder, tokenizer) -> Tensor:
    """The kinds of thing in all templates: ids (C, templates, L) for Llip, else features (C, E)."""
    C, T, device = len(scenes.KINDS), len(scenes.TEMPLATES), model.logit_scale.device
    texts = [fill(template, kind) for kind in scenes.KINDS for template in scenes.TEMPLATES]
    tokens = tokenizer(texts, model.config.context_length).to(device)  # (C templates, L)
    if model.conditional:
        return tokens.view(C, T, -1)
    group = torch.arange(C, device=device).repeat_interleave(T)
    return model.ensemble_text(model.encode_text(tokens), group).float()  # (C, E)


def measure(
    model, tokenizer, dataset, names, show=(), batch_size=256, precision="fp32", workers=0, progress=""
) -> tuple[dict[str, dict], dict[int, Tensor]]:
    """Figures of maps on a data set, in batches; memory does not grow with the number of pictures.

    Args:    dataset scenes.Objects or scenes.Scenes;  names of raw_maps, and of BASELINES
             show: indices of pictures whose maps are returned
    Returns: {name: metrics.mean_map_figures}, {picture: mask and maps of its first thing (S, S, 1 + names)}
    """
    figures, kept = {name: [] for name in names}, {i: [] for i in show}
    shown, S = Progress(progress, len(dataset), "images"), dataset.image_size
    transform = data.preprocess(model.config.image_size)
    with evaluate.evaluating(model) as device:
        text = names_as_text(model, tokenizer)
        for images, ids in data.eval_batches(dataset, transform, batch_size, workers=workers):
            images, ids = images.to(device), ids.tolist()
            things = [things_of(dataset, ids, together) for together in (False, True)]
            for name in names:
                rows, kinds, masks = things[name in ATTENTION]
                if name in BASELINES:
                    maps = baseline(name, masks, model.visual.patch_size)
                else:
                    with evaluate.towers(device, precision):
                        grid = raw_maps(model, images, name, text).float().cpu()
                    own = kinds if grid.shape[-1] > 1 else torch.zeros_like(kinds)
                    maps = enlarge(grid[rows, :, :, own], S)  # (N, S, S)
                figures[name].append(map_figures(maps, masks))
                for i in kept.keys() & set(ids):
                    kept[i].append(maps[rows == ids.index(i)][0])
            shown.add(len(ids))
    kept = {i: torch.stack([torch.from_numpy(dataset.masks(i)[0]).float(), *kept[i]], -1) for i in kept}
    return {name: mean_map_figures(torch.cat(parts)) for name, parts in figures.items()}, kept


def kind_of(source: str) -> tuple[str, str]:
    """A model's name for the table, and the flags of its run (and of the run before) but for the seed."""
    config = read_config(source)
    if not config:
        return Path(source).name or source, source
    init = kind_of(config["init"])[1] if config.get("init") else ""
    fields = {key: value for key, value in config.items() if key not in RUNNING}
    return config["method"], json.dumps(fields | {"init": init}, sort_keys=True)


def table(rows: list[dict]) -> str:
    """Rows of grouped_means as a table: lift as a ratio, the others in percent."""
    shown = []
    for row in rows:
        cells = {key: row[key] for key in row if key not in FIGURES} | {
            "map": TITLES.get(row["map"], row["map"])
        }
        cells["lift"] = plus_minus(*row["lift"], 1, 3)
        cells |= {f"{figure}, %": plus_minus(*row[figure]) for figure in FIGURES[1:]}
        shown.append({key.replace("_", " "): cell for key, cell in cells.items()})
    return format_table(shown)


def draw_sheet(path: Path, dataset, kept: dict[int, Tensor], names: list[str], title: str) -> None:
    """Writes one picture: image, mask and maps in a row, for each picture in kept (measure returns it)."""
    pictures, labels = [], []
    for i, maps in kept.items():
        kinds = [scenes.KINDS[kind] for kind in dataset.facts["kind"][i].tolist() if kind >= 0]
        maps = surgery.stretch(maps[None, ..., : 1 + len(names)])[0]  # (S, S, 1 + names)
        pictures += surgery.with_maps(dataset.image(i), maps)
        labels += [f"{dataset.domain_names[dataset.domains[i]]}: {' and '.join(kinds)}"]
        labels += ["mask" if len(kinds) == 1 else f"mask, {kinds[0]}", *(TITLES.get(n, n) for n in names)]
    write_image(path, sheet(pictures, labels, 2 + len(names), surgery.TILE, title))


@dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags, DataFlags):
    more: tuple[str, ...] = ()  # further models: fine-tuned, other seeds
    structures: tuple[Literal[KINDS], ...] = ()  # attention structures (default: all, if no --methods)
    methods: tuple[Literal[METHODS], ...] = ()  # methods (default: all, if no --structures)
    several: bool = False  # one to four things in a picture, each searched by its name
    show: int = 8  # pictures on the sheet in --out


def names_for(flags: Flags, source: str, conditional: bool) -> list[str]:
    """The maps of a model, without repeats.   Raises: ValueError if an Llip is to have a CLIP's."""
    names = [*flags.structures, *flags.methods]
    if conditional and names:
        raise ValueError(f"{source} is an Llip with the maps {', '.join(LLIP)}: no --structures or --methods")
    names = names or [*KINDS, *METHODS]
    return list(LLIP) if conditional else [*dict.fromkeys(SAME.get(n, n) for n in names), *ATTENTION]


@program
def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, __doc__)
    if flags.data != "scenes":
        raise ValueError(f"--data {flags.data}: maps are measured on masks, which only scenes have")
    if not 0 <= flags.show <= MAX_ROWS:
        raise ValueError(f"--show {flags.show}: a sheet holds 0 to {MAX_ROWS} pictures")
    device = start(flags, one_process=True)
    drawn = scenes.Scenes if flags.several else scenes.Objects
    # pictures are written last, so that no figure is lost if one of them fails
    records, pictures, first = [], {}, {}
    for number, source in enumerate([flags.model, *flags.more]):
        model, tokenizer = surgery.open_for_maps(source, flags.vocab, **load_options(flags))
        names = names_for(flags, source, model.conditional)
        dataset = drawn(flags.split or "test", flags.limit or 1024, image_size=model.config.image_size)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        show = sorted(order[: flags.show]) if flags.out else []
        options = options_of(flags, source) | {"show": show}
        sought = names if number else [*names, *BASELINES]
        scores, kept = measure(model.to(device), tokenizer, dataset, sought, **options)
        label, kind = kind_of(source)
        for name, figures in scores.items():
            about = {"model": label, "first_run": first.setdefault(kind, source)}
            about = {"model": "no model", "first_run": ""} if name in BASELINES else about
            records.append(about | {"map": name, "source": source} | figures)
        if show:
            title = f"{label}, {source}, {dataset.image_size} pixels; each map from dark blue to yellow"
            pictures[Path(flags.out) / f"maps-{number + 1}.png"] = (dataset, kept, names, title)
    rows = grouped_means(records, ("model", "first_run", "map"), FIGURES)
    print(table(rows))
    print("chance: lift 1, pointing the area; the foreground of attention is all things together")
    content = {"task": "map", "data": flags.data, "split": flags.split, "several": flags.several}
    content |= {"rows": rows, "records": records, "pictures": [path.name for path in pictures]}
    write_results(flags, content)
    for path, parts in pictures.items():
        draw_sheet(path, *parts)
        print(f"drawn in {path}")


if __name__ == "__main__":
    leave(main())
