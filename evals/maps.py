"""Do a model's maps show the object? Every attention structure and method, measured on drawn masks.

    python -m evals.maps --model runs/clip --more runs/alignclip --data scenes --out maps

Each thing is searched by its name, and util.metrics.map_figures compares the map with the thing's mask:

    qkv vvv qqv kkv dv   similarity of patch and name, where the second path of CLIP Surgery mixes its tokens
                         in this way: AlignCLIP, Fig. 8. surgery is vvv, alignclip is dv
    plain gem maskclip sclip clearclip       the same similarity of other features
    cls, cls-early       the class token's attention over the patches in the last block (AlignCLIP, Fig. 1 and
                         4), and its mean over the blocks that AlignCLIP aligns
    caption, cls         of an Llip: surgery.llip_caption_map, and the mean of its mixture tokens
    centre               a cone in the middle of the picture, the baseline without a model
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
from alignclip import default_blocks
from attention import KINDS
from evals import surgery
from model import DualEncoder
from readers import scenes
from readers.templates import fill
from util.evaluation import SeveralFlags, each_model, options_of, start, write_results
from util.flags import parse
from util.metrics import MAP_FIGURES, map_figures
from util.program import leave, program
from util.report import format_table

ATTENTION, LLIP = ("cls", "cls-early"), ("caption", "cls")
NAMES = (*KINDS, "plain", "gem", "maskclip", "sclip", "clearclip", *ATTENTION)
SHOWN = 8  # pictures on a sheet


def raw_maps(model: DualEncoder, images: Tensor, name: str, text: Tensor) -> Tensor:
    """One kind of map, on the grid of patches: (B, rows, columns, C), or 1 where the text is ignored.

    Args: images (B, 3, S, S);  name: one of NAMES or LLIP;  text: what names_as_text returns
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
        tokens = surgery.dense_features(visual, images, name)
    return surgery.similarity_map(tokens, text)


def centre(size: int) -> Tensor:
    """1 in the middle of the picture, 0 in its corners, linear in the distance: (size, size)."""
    place = (torch.arange(size) + 0.5) / size - 0.5
    cone = 1 - (place[:, None] ** 2 + place**2).sqrt() * 2**0.5  # (S, S)
    return cone.clamp(min=0)


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Maps on a grid (N, rows, columns) to (N, size, size), bilinear: Li et al. 2023, eq. 1."""
    return F.interpolate(maps[:, None], (size, size), mode="bilinear")[:, 0]


def masks_of(dataset: scenes.Objects, ids: list[int]) -> Tensor:
    """The masks of the things in these pictures: (N, S, S) bool."""
    return torch.stack([torch.from_numpy(dataset.masks(i)[0]) for i in ids])


def names_as_text(model: DualEncoder, tokenizer) -> Tensor:
    """The kinds of thing in all templates: ids (C, templates, L) for Llip, else features (C, E)."""
    if not model.conditional:
        return evaluate.encode_classes(model, tokenizer, scenes.KINDS, scenes.TEMPLATES)  # (C, E)
    texts = [fill(template, kind) for kind in scenes.KINDS for template in scenes.TEMPLATES]
    tokens = tokenizer(texts, model.config.context_length).to(model.logit_scale.device)
    return tokens.unflatten(0, (len(scenes.KINDS), -1))  # (C, templates, L)


def measure(model, tokenizer, dataset, names, show=(), precision="fp32", **options) -> tuple[dict, dict]:
    """Figures of maps on a data set, in batches; memory does not grow with the number of pictures.

    Args:    dataset scenes.Objects;  names of raw_maps, and "centre"
             show: indices of pictures whose maps are returned;  options: of evaluate.image_batches
    Returns: {name: means of MAP_FIGURES}, {picture: its mask and maps (S, S, 1 + names)}
    """
    figures, kept, S = {name: [] for name in names}, {i: [] for i in show}, dataset.image_size
    with evaluate.evaluating(model) as device:
        text = names_as_text(model, tokenizer)
        for images, ids in evaluate.image_batches(model, dataset, **options):
            ids = ids.tolist()
            masks, rows = masks_of(dataset, ids), range(len(ids))  # (N, S, S)
            for name in names:
                if name == "centre":
                    maps = centre(S).expand_as(masks)
                else:
                    with evaluate.towers(device, precision):
                        grid = raw_maps(model, images, name, text).float().cpu()
                    kinds = dataset.facts["kind"][ids, 0].tolist() if grid.shape[-1] > 1 else 0
                    maps = enlarge(grid[rows, :, :, kinds], S)  # (N, S, S)
                figures[name].append(map_figures(maps, masks))
                for i in kept.keys() & set(ids):
                    kept[i].append(maps[ids.index(i)])
    kept = {i: torch.stack([masks_of(dataset, [i])[0].float(), *kept[i]], -1) for i in kept}
    means = {name: torch.cat(parts).mean(0).tolist() for name, parts in figures.items()}
    return {name: dict(zip(MAP_FIGURES, values)) for name, values in means.items()}, kept


def draw_sheet(path: Path, dataset, kept: dict[int, Tensor], names: list[str], title: str) -> None:
    """Writes one picture: image, mask and maps in a row, for each picture in kept (measure returns it)."""
    rows = []
    for i, maps in kept.items():
        what = f"{dataset.domain_names[dataset.domains[i]]}: {scenes.KINDS[dataset.facts['kind'][i, 0]]}"
        rows.append((dataset.image(i), maps[..., : 1 + len(names)], [what, "mask", *names]))
    surgery.map_sheet(path, rows, title)


@program
def main(argv: list[str]) -> None:
    flags = parse(SeveralFlags, argv, __doc__)
    if flags.data != "scenes":
        raise ValueError(f"--data {flags.data}: maps are measured on masks, which only scenes have")
    device = start(flags, one_process=True)
    # pictures are written last, so that no figure is lost if one of them fails
    rows, pictures = [], {}
    models = each_model(flags, device, surgery.open_for_maps)
    for number, (source, model, tokenizer) in enumerate(models):
        dataset = evaluate.open_data(flags, model, "labels")
        show = range(min(SHOWN, len(dataset))) if flags.out else ()
        names = LLIP if model.conditional else NAMES
        sought = names if number else (*names, "centre")
        scores, kept = measure(model, tokenizer, dataset, sought, show, **options_of(flags, source))
        for name, figures in scores.items():
            rows.append({"model": "no model" if name == "centre" else source, "map": name} | figures)
        if show:
            title = f"{source}, {dataset.image_size} pixels"
            pictures[Path(flags.out) / f"maps-{number + 1}.png"] = (dataset, kept, names, title)
    print(format_table(rows))
    print(f"images {len(dataset):,}  chance: lift 1, pointing the area")
    write_results(flags, {"task": "map", "data": flags.data, "split": flags.split, "rows": rows})
    for path, parts in pictures.items():
        draw_sheet(path, *parts)
        print(f"drawn in {path}")


if __name__ == "__main__":
    leave(main())
