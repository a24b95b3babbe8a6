"""Flags that the evaluation programs inherit, and what they do before and after the work."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from scale import distributed
from util.files import output_folder, read_text, write_json


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    # what a checkpoint from elsewhere may not contain (pretrained.py)
    quick_gelu: bool | None = None  # the activation
    vision_heads: int | None = None  # attention heads of the image tower
    text_heads: int | None = None  # attention heads of the text tower
    mixture_heads: int | None = None  # heads of Llip's pooling
    temperature: float | None = None  # of Llip's pooling
    pooling: Literal["register", "average", "learned"] | None = None  # of several tokens


@dataclass(frozen=True, kw_only=True)
class ModelFlags(LoadFlags):
    model: str  # a run directory of train.py, a checkpoint, or a name
    vocab: str = ""  # vocabulary (default: the run's own, else OpenAI's)
    batch_size: int = 256  # images, or texts, at a time on each rank
    workers: int = 0  # loader processes on each rank
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    precision: Literal["fp32", "bf16"] = "fp32"  # of the towers; pairs are scored in fp32
    out: str = ""  # write results.json and pictures to this folder


@dataclass(frozen=True, kw_only=True)
class WhereFlags:
    # images, captions and labels of a list
    image_root: str = ""  # folder of the images of a list (default: the list's own, or one in it)
    allow_outside: bool = False  # read images that a list names, or links to, outside of that folder
    image_key: str = ""  # column of a list with the images (default: by the usual names)
    caption_key: str = ""  # column of a list with the captions (default: by the usual names)
    label_key: str = ""  # column of a list with the labels (default: by the usual names)
    caption_lines: Literal["yes", "no"] | None = None  # each line of a .txt is a caption (default: guessed)
    max_pixels: int | None = None  # of an image (default: 96 million, 24 for some formats: docs/data.md)


@dataclass(frozen=True, kw_only=True)
class DataFlags(WhereFlags):
    # the data
    data: str  # scenes (embedded), a folder, a list, or tar shards
    split: str = ""  # of data with splits (default: test)
    limit: int | None = None  # only so many images, evenly spaced (scenes: how many to draw, 1024)


@dataclass(frozen=True, kw_only=True)
class SeveralFlags(DataFlags, ModelFlags):
    more: tuple[str, ...] = ()  # further models


def start(flags, one_process: bool = False) -> torch.device:
    """Device of an evaluation program, after its flags are checked and its output folder is made."""
    for name in ("batch_size", "limit"):
        if (value := getattr(flags, name, None)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    device = distributed.setup(flags.device)
    if one_process and distributed.world_size() > 1:
        raise ValueError("this program runs in one process: start it without torchrun")
    distributed.check_same(vars(flags))
    if flags.out:
        path = output_folder(flags.out) / "results.json"
        try:
            # evaluations name their task, and train.py's runs do not
            ours = not path.is_file() or isinstance(json.loads(read_text(path))["task"], str)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            ours = False
        if not ours:
            raise ValueError(f"{path} was not written by an evaluation: choose another --out")
    return device


def each_model(flags, device: torch.device, open_model: Callable) -> Iterator[tuple]:
    """(source, model on the device, tokenizer) of --model and --more; all are opened before the first.

    Args: open_model(source, vocabulary, flags of pretrained.load) -> model, tokenizer
    """
    sources = [flags.model, *getattr(flags, "more", ())]
    opened = [open_model(source, flags.vocab, **load_options(flags)) for source in sources]
    for source in sources:
        model, tokenizer = opened.pop(0)
        yield source, model.to(device), tokenizer


def write_results(flags, content: dict) -> None:
    """Writes results.json to the folder --out, if there is one."""
    if flags.out:
        path = Path(flags.out) / "results.json"
        write_json(path, content)
        print(f"written to {path}")


def load_options(flags) -> dict:
    """The flags of pretrained.load."""
    return {field.name: getattr(flags, field.name) for field in fields(LoadFlags)}


def options_of(flags, progress: str = "") -> dict:
    """The flags of score_rows, and the label of its progress line."""
    names = ("batch_size", "precision", "workers")
    return {name: getattr(flags, name) for name in names} | {"progress": progress}


def where_of(flags) -> dict:
    """The flags of data.open_dataset about the images, captions and labels of a list."""
    return {field.name: getattr(flags, field.name) or None for field in fields(WhereFlags)}
