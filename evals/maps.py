"""Do a model's maps show the object? Every attention structure and method, measured on drawn masks.

    python evaluate.py map --model runs/clip --more runs/alignclip --data scenes --out maps

A thing is sought by its name in pictures whose mask is known exactly (scenes.py), and every map is scored
by surgery.map_scores: its mass on the thing over the thing's area, the pointing game, intersection over
union. Three kinds of map:

    a structure   similarity of patch and name where the second path of CLIP Surgery mixes its tokens by
                  qkv, vvv, qqv, kkv or dv, everything else being equal: AlignCLIP, Fig. 8
    a method      the same similarity from the features of plain CLIP, maskclip, sclip, gem or clearclip;
                  surgery is vvv, and alignclip is dv
    attention     cls is the class token's over the patches in the last block (AlignCLIP, Fig. 1 and 4),
                  cls-early its mean over the first blocks, those that AlignCLIP aligns. No text decides,
                  so the foreground is all things. Of an Llip, caption is surgery.llip_caption_map and cls
                  the mean of its mixture tokens; its patches have no similarity to a text

Beside them stands what needs no model: uniform is chance; centre a cone, because large things are seldom
at the margin; mask the true mask averaged over each patch of the first model, the best that its grid can do.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alignclip
import data
from attention import KINDS
from evals import surgery
from model import VisionTransformer
from readers import scenes
from readers import templates as prompts
from util.files import write_image, write_json
from util.report import Progress, format_table

SAME = {"surgery": "vvv", "alignclip": "dv"}  # a method and a structure that are one
METHODS = ("plain", *surgery.METHODS)
ATTENTION, LLIP = ("cls", "cls-early"), ("caption", "cls")
BASELINES = ("uniform", "centre", "mask")
MAX_ROWS = 24  # pictures on one sheet
FIGURES = ("lift", "pointing", "area", "iou", "best_iou", "best_threshold")
# fields of a run's configuration that do not make it another kind of model
RUNNING = (
    "seed",
    "out",
    "init",
    "resume",
    "device",
    "threads",
    "workers",
    "compile",
    "grad_checkpointing",
    "log_every",
    "eval_every",
    "save_every",
)


def map_names(structures: list[str], methods: list[str]) -> list[str]:
    """Structures and methods without repeats, then the attention maps."""
    return [*dict.fromkeys(SAME.get(name, name) for name in [*structures, *methods]), *ATTENTION]


def early_attention(model: nn.Module, images: Tensor) -> Tensor:
    """The class token's attention over the patches, mean of the first blocks: (B, rows, columns, 1).

    A of AlignCLIP's eq. 6 over the blocks that alignclip.AlignCLIP aligns by default.
    """
    visual, (height, width) = model.visual, images.shape[-2:]
    depth = len(visual.transformer.resblocks)
    layers = alignclip.default_blocks(depth)[1]
    _, _, rows = alignclip.two_paths(visual, visual.embed(images), "dv", depth, layers)  # no second path
    maps = alignclip.cls_attention(rows)[..., None]  # (B, P, 1)
    return surgery.as_grid(maps, (height // visual.patch_size, width // visual.patch_size))


def raw_maps(model: nn.Module, images: Tensor, name: str, text: Tensor) -> Tensor:
    """One kind of map, on the grid of patches.

    Args:    images (B, 3, S, S);  name: one of KINDS, METHODS, ATTENTION or LLIP
             text: what the class names became: (C, E), or for caption their ids (C, templates, L)
    Returns: (B, rows, columns, C); of attention that no text decides, (B, rows, columns, 1)
    """
    visual = model.visual
    if name == "caption":
        maps = surgery.llip_caption_map(model, images, text.flatten(0, 1))
        return maps.unflatten(-1, text.shape[:2]).mean(-1)  # (B, rows, columns, C)
    if name == "cls":
        return surgery.llip_token_maps(model, images).mean(-1, keepdim=True)
    if name == "cls-early":
        return early_attention(model, images)
    if name == "plain":
        tokens = visual.head(visual.transformer(visual.embed(images)))  # (B, 1 + P, E)
    elif name in KINDS:
        tokens = surgery.dense_features(visual, images, kind=name)
    else:
        tokens = surgery.dense_features(visual, images, name)
    return surgery.similarity_map(tokens, text)


def baseline(name: str, masks: Tensor, patch: int) -> Tensor:
    """A map (N, S, S) that no model made: uniform, centre, or the masks (N, S, S) on a grid of patches."""
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
    """What is sought in pictures: each thing by its name, or all of a picture together.

    Returns: (N,) row of the picture, (N,) kind of the thing (the first), a number in scenes.KINDS, and
             (N, S, S) bool its mask.
    """
    rows, kinds, masks = [], [], []
    for row, i in enumerate(ids):
        found = torch.from_numpy(dataset.masks(i))  # (things, S, S)
        if together:
            found = found.any(0, keepdim=True)
        rows += [row] * len(found)
        kinds += dataset.facts["kind"][i][: len(found)].tolist()
        masks.append(found)
    return torch.tensor(rows), torch.tensor(kinds), torch.cat(masks)


def names_as_text(model: nn.Module, tokenizer, device: torch.device) -> Tensor:
    """All kinds of thing in all templates: ids (C, templates, L) for Llip, else features (C, E)."""
    texts = [prompts.fill(t, kind) for kind in scenes.KINDS for t in scenes.TEMPLATES]
    tokens = tokenizer(texts, model.config.context_length).to(device)  # (C templates, L)
    C, T = len(scenes.KINDS), len(scenes.TEMPLATES)
    if hasattr(model, "mixing_weights"):
        return tokens.view(C, T, -1)  # (C, templates, L)
    group = torch.arange(C, device=device).repeat_interleave(T)  # (C templates,)
    return model.ensemble_text(model.encode_text(tokens), group).float()  # (C, E)


@torch.no_grad()
def measure(
    model: nn.Module,
    tokenizer,
    dataset,
    names: list[str],
    *,
    batch_size: int = 256,
    precision: str = "fp32",
    workers: int = 0,
    show: tuple[int, ...] = (),
    progress: str = "",
) -> tuple[dict[str, dict], dict[int, Tensor]]:
    """Scores of maps on the pictures of a data set, in batches; memory does not grow with their number.

    Args:    dataset scenes.Objects or scenes.Scenes;  names of raw_maps, and of BASELINES
             show: pictures whose maps are kept to be looked at
    Returns: {name: surgery.mean_scores}, and {picture: its first thing's mask and maps (S, S, 1 + names)}
    """
    device, S = next(model.parameters()).device, dataset.image_size
    text = names_as_text(model, tokenizer, device)
    found, kept = {name: [] for name in names}, {i: [] for i in show}
    shown = Progress(progress, len(dataset), "images")
    transform = data.preprocess(model.config.image_size)
    for images, ids in data.eval_batches(dataset, transform, batch_size, workers=workers):
        images, ids = images.to(device), ids.tolist()
        sought = [things_of(dataset, ids, together) for together in (False, True)]
        for name in names:
            rows, kinds, masks = sought[name in ATTENTION]
            if name in BASELINES:
                maps = baseline(name, masks, model.visual.patch_size)
            else:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    grid = raw_maps(model, images, name, text).float().cpu()
                own = kinds if grid.shape[-1] > 1 else torch.zeros_like(kinds)
                maps = enlarge(grid[rows, :, :, own], S)  # (N, S, S)
            found[name].append(surgery.image_scores(maps, masks))
            for row, i in enumerate(ids):
                if i in kept:
                    kept[i].append(maps[rows == row][0])
        shown.add(len(ids))
    scores = {
        name: surgery.mean_scores({key: torch.cat([p[key] for p in parts]) for key in parts[0]})
        for name, parts in found.items()
    }
    masks = {i: torch.from_numpy(dataset.masks(i)[0]).float() for i in show}
    return scores, {i: torch.stack([masks[i], *maps], -1) for i, maps in kept.items()}


# Several models: kinds and seeds ----------------------------------------------------------------------------


def kind_of(source: str) -> tuple[str, str]:
    """A short name of the kind of model, and what tells it from others; runs of other seeds are one kind.

    A run that started from another run is of the same kind as one that started from the same kind.
    """
    path = Path(source) / "config.json"
    if not path.is_file():
        return Path(source).name or source, source
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        label = config["method"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the configuration of a run of train.py") from None
    fields = {key: value for key, value in config.items() if key not in RUNNING}
    fields["init"] = kind_of(config["init"])[1] if config.get("init") else ""
    return label, json.dumps(fields, sort_keys=True)


def summarise(records: list[dict]) -> list[dict]:
    """Mean and standard deviation (n - 1; None for one run) of every figure over the runs of a kind.

    Args:    records: "label", "kind", "source", "map" and figures, one for each model and map
    Returns: rows "model", "map", "runs", figures as (mean, deviation). Kinds that would be called the same
             carry the path of their first run as well.
    """
    first = {}
    for r in records:
        first.setdefault((r["label"], r["kind"]), r["source"])
    labels = [label for label, _ in first]
    groups = {}
    for r in records:
        name = r["label"]
        if labels.count(name) > 1:
            name = f"{name} ({first[name, r['kind']]})"
        groups.setdefault((name, r["map"]), []).append(r)
    rows = []
    for (model, name), some in groups.items():
        row = {"model": model, "map": name, "runs": len(some)}
        for figure in FIGURES:
            values = [r[figure] for r in some]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            row[figure] = (statistics.fmean(values), deviation)
        rows.append(row)
    return rows


def title(name: str) -> str:
    """A map's name with its method's beside it: vvv (surgery)."""
    method = next((m for m, kind in SAME.items() if kind == name), None)
    return f"{name} ({method})" if method else name


def table(rows: list[dict]) -> str:
    """summarise's rows: lift as a ratio, the others in percent."""
    shown = []
    for row in rows:
        cells = {"model": row["model"], "map": title(row["map"]), "runs": row["runs"]}
        for figure in FIGURES:
            mean, deviation = row[figure]
            scale, digits = (1, 3) if figure == "lift" else (100, 1)
            spread = f" +- {scale * deviation:.{digits}f}" if deviation is not None else ""
            spread = spread if figure != "area" else ""  # the masks are the same for every model
            head = figure.replace("_", " ") + ("" if figure == "lift" else ", %")
            cells[head] = f"{scale * mean:.{digits}f}{spread}"
        shown.append(cells)
    return format_table(shown)


# The subcommand of evaluate.py ------------------------------------------------------------------------------


def arguments(parser) -> None:
    add = parser.add_argument
    add("--more", nargs="+", default=[], metavar="RUN", help="further models: fine-tuned, other seeds")
    add("--structures", nargs="*", choices=KINDS, metavar="KIND", help=f"default: {' '.join(KINDS)}")
    add("--methods", nargs="*", choices=METHODS, metavar="NAME", help=f"default: {' '.join(METHODS)}")
    add("--several", action="store_true", help="one to four things in a picture, each sought by name")
    add("--show", type=int, default=8, metavar="N", help="pictures on the sheet in --out (8)")


def names_for(args, source: str, model: nn.Module) -> list[str]:
    """Which maps a model is asked for.   Raises: ValueError if it has none, or not those."""
    visual = getattr(model, "visual", None)
    if not (isinstance(visual, VisionTransformer) and hasattr(model, "encode_text")):
        raise ValueError(f"{source}: maps need a model of images and texts")
    if hasattr(model, "mixing_weights"):
        if args.structures or args.methods:
            raise ValueError(
                f"{source} is an Llip, whose patches have no similarity to a text: leave out "
                f"--structures and --methods, its maps are {' and '.join(LLIP)}"
            )
        return list(LLIP)
    if visual.tokens > 1:
        raise ValueError(f"{source}: pools {visual.tokens} tokens without a text: no map per text")
    asked = args.structures is not None or args.methods is not None
    return map_names((args.structures or []) if asked else KINDS, (args.methods or []) if asked else METHODS)


def draw_sheet(path: Path, dataset, kept: dict[int, Tensor], names: list[str], about: str) -> None:
    """One picture: image, mask and maps side by side, a row for each picture that was kept."""
    rows = []
    for i, maps in kept.items():
        kinds = [scenes.KINDS[kind] for kind in dataset.facts["kind"][i].tolist() if kind >= 0]
        label = f"{dataset.domain_names[dataset.domains[i]]}: {' and '.join(kinds)}"
        maps = surgery.stretch(maps[None, ..., : 1 + len(names)])[0]  # (S, S, 1 + names)
        rows.append((label, dataset.image(i), maps))
    sought = "mask" if all(len(dataset.masks(i)) == 1 for i in kept) else "mask of the first"
    write_image(path, surgery.sheet(rows, [sought, *map(title, names)], about))


def command(args, open_model: Callable) -> None:
    """Scores of every map of every model; open_model(source) -> (model, its tokenizer)."""
    if args.data != "scenes":
        raise ValueError(f"--data {args.data}: maps are measured on masks, which only scenes have")
    if not 0 <= args.show <= MAX_ROWS:
        raise ValueError(f"--show {args.show}: a sheet holds 0 to {MAX_ROWS} pictures")
    drawn = scenes.Scenes if args.several else scenes.Objects
    records, pictures = [], {}  # pictures are drawn last: one that fails costs no figures
    for number, source in enumerate([args.model, *args.more]):
        model, tokenizer = open_model(source)
        names = names_for(args, source, model)
        dataset = drawn(args.split or "test", args.limit or 1024, image_size=model.config.image_size)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        shown = tuple(sorted(order[: args.show].tolist())) if args.out else ()
        extra = () if number else BASELINES
        scores, kept = measure(
            model,
            tokenizer,
            dataset,
            [*names, *extra],
            batch_size=args.batch_size,
            precision=args.precision,
            workers=args.workers,
            show=shown,
            progress=source,
        )
        label, kind = kind_of(source)
        for name, figures in scores.items():
            about = {"source": source, "label": label, "kind": kind}
            if name in BASELINES:
                about |= {"label": "no model", "kind": "no model"}
            records.append(about | {"map": name} | figures)
        if shown:
            path = Path(args.out) / f"maps-{number + 1}.png"
            about = f"{label}, {source}, {dataset.image_size} pixels"
            pictures[path] = (dataset, kept, names, about)
    rows = summarise(records)
    print(table(rows))
    print("chance: lift 1, pointing the area; the foreground of attention is all things together")
    if args.out:
        content = {"task": args.task, "data": args.data, "split": args.split, "several": args.several}
        told = [{key: r[key] for key in r if key != "kind"} for r in records]
        path = Path(args.out) / "results.json"
        shown = [picture.name for picture in pictures]
        write_json(path, content | {"rows": rows, "records": told, "pictures": shown})
        for picture, parts in pictures.items():
            draw_sheet(picture, *parts)
        print(f"written to {', '.join([str(path), *shown])}")
