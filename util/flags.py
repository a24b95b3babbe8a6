"""A command line from dataclasses: one line of a dataclass is one flag, its default, its type and its help.

@dataclass(frozen=True)
class Flags:
    # where the data are                      a comment on a line of its own starts a group
    data: str  # a folder or a list           a field without a default is required
    batch_size: int = 32  # images            --batch-size; the comment is the help
    gelu: bool | None = None  # activation    --gelu / --no-gelu, None where neither is given
    texts: tuple[str, ...] = ()  # prompts    --texts A B C
    kind: Literal["a", "b"] = "a"  # kind     --kind a or --kind b
"""

import argparse
import inspect
import re
import sys
import typing
from dataclasses import MISSING, Field, fields


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line. Unknown flags fail, and so do abbreviations."""

    def __init__(self, description: str = "", **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **options)

    def error(self, message: str):
        print(f"error: {''.join(filter(str.isprintable, message))} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def documented(cls: type) -> list[tuple[str, Field, str]]:
    """(group, field, help) of every field, in the order of the source; inherited fields come first."""
    by_name, found = {f.name: f for f in fields(cls)}, []
    for part in reversed(cls.__mro__[:-1]):
        group = ""
        for line in inspect.getsource(part).splitlines():
            heading = re.fullmatch(r"    # (.+)", line)
            field = re.match(r"    (\w+): .*?  # (.*)", line)
            if heading:
                group = heading[1]
            elif field and field[1] in by_name:
                found.append((group, by_name.pop(field[1]), field[2]))
    assert not by_name, f"fields without a comment: {sorted(by_name)}"
    return found


def add_flags(parser: argparse.ArgumentParser, cls: type, positional: tuple = (), **defaults) -> None:
    """Adds the flags of a dataclass; positional ones are given by their place, defaults replace its own."""
    types, groups = typing.get_type_hints(cls), {"": parser}
    for heading, field, text in documented(cls):
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        default = defaults.get(field.name, field.default)
        shown = "" if default in (MISSING, None, (), "") else f" [{default}]"
        # with argument_default=SUPPRESS a parser returns only the flags that a command line sets itself
        options, kind = dict(default=parser.argument_default or default), types[field.name]
        options["help"] = text.replace("%", "%%") + shown
        # tuple[str, ...] and float | None are of the type of one value
        several, parts = typing.get_origin(kind) is tuple, typing.get_args(kind)
        if parts and typing.get_origin(kind) is not typing.Literal:
            kind = next(t for t in parts if t is not type(None))
        if several:
            options["nargs"] = "+"
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= dict(type=kind, metavar=kind.__name__.upper())
        name, needed = flag_of(field.name), default is MISSING
        if field.name in positional:
            name, options["metavar"] = field.name, field.name.upper()
            options |= {} if needed else dict(nargs="*" if several else "?")
        elif needed:
            options["required"] = True
        groups[heading].add_argument(name, **options)


def parse(cls: type, argv: list[str], description: str = "", positional: tuple[str, ...] = ()):
    """An instance of the dataclass from a command line."""
    parser = Parser(description)
    add_flags(parser, cls, positional)
    values = vars(parser.parse_intermixed_args(argv))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")
