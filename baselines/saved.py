"""A fine-tuned run of train.py: its flags, what it learned, and the model that answers.

That is not the CLIP in its checkpoint, which pretrained.load returns, if the run also learned prompts or
heads (CoOp, CoCoOp, MaPLe, TeS), or embeds images by average pooling.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import pretrained
from baselines.methods import METHODS
from clipood import Classes
from util.run import read_config
from weights import archive


@dataclass(frozen=True)
class Saved:
    """config: config.json of a fine-tuned run, {} for other models;  task: the entry of its checkpoint"""

    source: str
    config: dict
    task: dict

    def own_model(self) -> str:
        """Why the CLIP in the checkpoint is not the run's own model; empty if it is."""
        return pretrained.more_than_clip(self.task, self.config)

    def check(self, towers: bool) -> None:
        """Raises: ValueError if the run cannot be rebuilt, or the caller uses the two towers alone."""
        reason = f"{self.source}: {self.own_model()}"
        if towers:
            raise ValueError(f"{reason}, so its towers alone are not its model: choose another run")
        texts = [self.task.get(name) for name in ("classes", "templates")]
        listed = all(isinstance(x, list) and x and all(isinstance(text, str) for text in x) for x in texts)
        if not self.config or not listed:
            raise ValueError(f"{reason}, and cannot be rebuilt from this checkpoint: see its results.json")

    def rebuild(self, clip: nn.Module, tokenizer, text: Tensor) -> nn.Module:
        """The run's dual encoder around its CLIP; text (C, E) are the features of its classes.

        Raises: ValueError for flags of another type, and learned tensors of other shapes.
        """
        method = METHODS[self.config["method"]]
        flags = {name: self.config[name] for name in method.flags() & self.config.keys()}
        for name, value in flags.items():
            kind = type(getattr(method.settings(), name))
            if type(value) is not kind and (type(value), kind) != (int, float):
                problem = f"config.json has {name} {value!r}, expected {kind.__name__}"
                raise ValueError(f"{self.source}: {problem}: restore the file")
        classes = Classes(self.task["classes"], tuple(self.task["templates"]), tokenizer, text)
        built = method.module.build(method.settings(**flags), clip, classes)
        built.load_learned(self.task["learned"])
        return built.eval().dual_encoder().eval()


def read(source: str) -> Saved:
    """What a fine-tuned run saved beside its CLIP; nothing for any other model or a name to download."""
    if not Path(source).expanduser().exists():
        return Saved(source, {}, {})
    checkpoint, config = archive.read(pretrained.locate(source)), read_config(source)
    task = checkpoint.content.get("task")
    task = task if isinstance(task, dict) else {}
    learned = task.get("learned")
    learned = checkpoint.tensors(learned) if isinstance(learned, dict) else {}
    return Saved(source, config if fine_tuned(config) else {}, task | {"learned": learned})


def fine_tuned(config: dict) -> bool:
    """Whether a run was fine-tuned on labelled images."""
    name = config.get("method")
    return name in METHODS and METHODS[name].module.TASK == "labels"
