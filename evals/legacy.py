"""Commands of evaluate.py that become programs of this folder; this file goes when they have."""

import argparse

import evaluate
from evals import linear_probe, maps
from scale import distributed
from util.evaluation import DataFlags, ModelFlags, load_options, start
from util.flags import Parser, add_flags

COMMANDS = ("map", *linear_probe.COMMANDS)


def open_on(args, device) -> tuple:
    model, tokenizer = evaluate.open_model(args.model, args.vocab, **load_options(args))
    return model.to(device), tokenizer


def map_command(args, device) -> None:
    if distributed.world_size() > 1:
        raise ValueError("map runs in one process: start it without torchrun")

    def opened(source: str) -> tuple:
        args.model = source
        model, tokenizer = open_on(args, device)
        evaluate.check_vocabulary(model, tokenizer)
        return model, tokenizer

    maps.command(args, opened)


def main(argv: list[str]) -> None:
    evaluate.open_on = open_on
    parser: argparse.ArgumentParser = Parser(__doc__)
    commands = {"map": ("maps", maps.arguments, map_command)} | linear_probe.COMMANDS
    subparsers = parser.add_subparsers(dest="task")
    for name, (about, arguments, _) in commands.items():
        sub = subparsers.add_parser(name, help=about, description=about)
        add_flags(sub, ModelFlags)
        add_flags(sub, DataFlags)
        arguments(sub)
    args = parser.parse_args(argv)
    commands[args.task][2](args, start(args))
