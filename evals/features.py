"""Features of a frozen image tower, computed once and kept in a folder."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import evaluate
import pretrained
from llip import mixture_tokens
from util.evaluation import DataFlags, ModelFlags
from util.files import replacing
from util.report import Progress
from util.text import one_line, warn


@dataclass(frozen=True, kw_only=True)
class FeatureFlags(DataFlags, ModelFlags):
    cache: str = "runs/features"  # folder where features are kept for the next call


def encode(model: nn.Module, dataset, batch_size=256, precision="fp32", workers=0, progress="") -> Tensor:
    """The output of ln_post for the class or mixture tokens of every image: (N, M, D) fp32 on the CPU."""
    transform = data.preprocess(model.config.image_size)
    shown, rows = Progress(progress, len(dataset), "images"), []
    with evaluate.evaluating(model) as device:
        for images, _ in data.eval_batches(dataset, transform, batch_size, workers=workers):
            with evaluate.towers(device, precision):
                tokens = mixture_tokens(model.visual, images.to(device, non_blocking=True))
            rows.append(tokens.float().cpu())  # (b, M, D)
            shown.add(len(images))
    return torch.cat(rows)


def cache_key(source: str, model: nn.Module, dataset, precision: str) -> str:
    """A name for the features of these images, weights and precision.

    Images count by name, size and time of change; drawn scenes, which are no files, by their first and last.
    """
    h = hashlib.sha256()
    with open(pretrained.locate(source), "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    h.update(json.dumps([pretrained.describe(model), precision], sort_keys=True, default=str).encode())
    for name in map(dataset.name, range(len(dataset))):
        stat = os.stat(name) if os.path.isfile(name) else None
        h.update(f"\0{name}\0{stat and (stat.st_size, stat.st_mtime_ns)}".encode())
    for i in (0, len(dataset) - 1):
        h.update(dataset.image(i).convert("RGB").tobytes())
    return h.hexdigest()[:32]


def features(source: str, model: nn.Module, dataset, folder: str | Path, **options) -> Tensor:
    """The result of encode(model, dataset, **options), read from the folder if an earlier call wrote it."""
    path = Path(folder) / f"{cache_key(source, model, dataset, options.get('precision', 'fp32'))}.pt"
    if path.is_file():
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file raises many types
            raise ValueError(f"{path} cannot be read: delete it, and it is computed again") from error
    tokens = encode(model, dataset, **options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(tokens, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        warn(f"{path} cannot be written ({one_line(error)}): the next call computes the features again")
    return tokens


def reduced(tokens: Tensor) -> dict[str, Tensor]:
    """One feature an image: (N, M, D) -> "mean" (N, D), "concatenation" (N, M D); "class token" if M = 1."""
    if tokens.shape[1] == 1:
        return {"class token": tokens[:, 0]}
    return {"mean": tokens.mean(1), "concatenation": tokens.flatten(1)}
