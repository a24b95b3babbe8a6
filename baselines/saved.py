"""A fine-tuned run of train.py whose model is not the CLIP in its checkpoint, which pretrained.load returns.

Such a run also learned prompts or heads (CoOp, CoCoOp, MaPLe, TeS), or embeds images by average pooling.
"""

from pathlib import Path

from torch import Tensor, nn

import pretrained
from baselines.methods import METHODS
from clipood import Classes
from util.run import read_config
from weights import archive


def read(source: str, towers: bool) -> tuple[dict, dict]:
    """config.json of such a run and the entry "task" of its checkpoint; two empty dicts for other models.

    Raises: ValueError if the run cannot be rebuilt, or towers: the caller uses the two towers alone.
    """
    if not Path(source).expanduser().exists():
        return {}, {}  # a name to download
    checkpoint, config = archive.read(pretrained.locate(source)), read_config(source)
    config = config if fine_tuned(config) else {}
    task = checkpoint.content.get("task")
    task = task if isinstance(task, dict) else {}
    learned = task.get("learned")
    task = task | {"learned": checkpoint.tensors(learned) if isinstance(learned, dict) else {}}
    if not (reason := pretrained.more_than_clip(task, config)):
        return {}, {}
    if towers:
        raise ValueError(f"{source}: {reason}, so its towers alone are not its model: choose another run")
    texts = [task.get(name) for name in ("classes", "templates")]
    listed = all(isinstance(x, list) and x and all(isinstance(text, str) for text in x) for x in texts)
    if not config or not listed:
        raise ValueError(
            f"{source}: {reason}, and cannot be rebuilt from this checkpoint: see its results.json"
        )
    return config, task


def rebuild(source: str, config: dict, task: dict, clip: nn.Module, tokenizer, text: Tensor) -> nn.Module:
    """The run's dual encoder around its CLIP; text (C, E) are the features of its classes.

    Raises: ValueError for flags of another type, and learned tensors of other shapes.
    """
    method = METHODS[config["method"]]
    flags = {name: config[name] for name in method.flags() & config.keys()}
    for name, value in flags.items():
        kind = type(getattr(method.settings(), name))
        if type(value) is not kind and (type(value), kind) != (int, float):
            problem = f"config.json has {name} {value!r}, expected {kind.__name__}"
            raise ValueError(f"{source}: {problem}: restore the file")
    classes = Classes(task["classes"], tuple(task["templates"]), tokenizer, text)
    built = method.module.build(method.settings(**flags), clip, classes)
    built.load_learned(task["learned"])
    return built.eval().dual_encoder().eval()


def fine_tuned(config: dict) -> bool:
    """Whether a run was fine-tuned on labelled images."""
    name = config.get("method")
    return name in METHODS and METHODS[name].module.TASK == "labels"
