"""Small random models of every kind, saved as run directories."""

import json

import torch

import pretrained
from llip import Llip, PooledTokens
from model import CLIP, Config
from readers import scenes
from tokenizer import Tokenizer

TEXTS = [t.format(k) for k in scenes.KINDS for t in scenes.TEMPLATES]
TOKENIZER = Tokenizer.learn(TEXTS, 600)
CONFIG = Config(16, 16, 8, 16, 1, 2, 32, 16, TOKENIZER.vocab_size, 16, 1, 2, 32)
MODELS = {
    "clip": CLIP,
    "siglip": lambda c: CLIP(c, 10.0, -5.0),
    "llip": lambda c: Llip(c, 3, 2, scale=5.0, bias=-2.0),
    "pooled": lambda c: PooledTokens(c, 3, "learned", heads=2),
}


# towers of two blocks, which fine-tuning needs
DEEPER = Config(16, 16, 8, 32, 2, 2, 64, 16, TOKENIZER.vocab_size, 32, 1, 2, 64)


def save_run(path, make, config=DEEPER):
    """Writes a random model and its vocabulary, which covers the scenes, as a run directory."""
    torch.manual_seed(0)
    pretrained.save(make(config), path / "checkpoint.pt")
    TOKENIZER.save(path / "tokenizer.json")
    return path


def save_all(root):
    """Writes a run directory for each model; {name: path}."""
    return {name: save_run(root / name, make, CONFIG) for name, make in MODELS.items()}


def evaluate_all(main, runs, out):
    """Runs a program of evals/ on 20 scenes and every model of save_all.   Returns: its results.json."""
    paths = [str(runs[name]) for name in MODELS]
    flags = ["--more", *paths[1:], "--data", "scenes", "--limit", "20", "--device", "cpu", "--out", str(out)]
    assert main(["--model", paths[0], *flags]) == 0
    return json.loads((out / "results.json").read_text())


def draw_few(monkeypatch, most=80):
    """Drawn data sets have at most so many pictures, and stay types."""
    for name in ("Scenes", "Objects"):
        drawn = getattr(scenes, name)

        def few(self, split="train", size=most, *args, drawn=drawn, **more):
            drawn.__init__(self, split, min(size, most), *args, **more)

        monkeypatch.setattr(scenes, name, type(name, (drawn,), {"__init__": few}))
