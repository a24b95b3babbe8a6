"""A command line from a dataclass: one line of it is one flag, its default, its type and its help."""

import argparse
import inspect
import re
from dataclasses import fields


def parser(cls: type, description: str = "") -> argparse.ArgumentParser:
    """--kebab-case flags for every field of a dataclass; the comment beside a field is its help.

    A comment on a line of its own starts a group. Booleans are --x / --no-x. Unknown flags fail, and so
    do abbreviations.
    """
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    by_name, group = {f.name: f for f in fields(cls)}, result
    for line in inspect.getsource(cls).splitlines():
        heading = re.fullmatch(r"    # (.+)", line)
        found = re.match(r"    (\w+): .*?  # (.*)", line)
        if heading:
            group = result.add_argument_group(heading[1])
        elif found and found[1] in by_name:
            field, flag = by_name.pop(found[1]), "--" + found[1].replace("_", "-")
            help = f"{found[2]} [{field.default}]".replace("%", "%%")
            if field.type in (bool, "bool"):
                action = argparse.BooleanOptionalAction
                group.add_argument(flag, action=action, default=field.default, help=help)
            else:
                kind, name = type(field.default), type(field.default).__name__.upper()
                group.add_argument(flag, type=kind, default=field.default, metavar=name, help=help)
    assert not by_name, f"fields without a comment: {sorted(by_name)}"
    return result


def given(argv: list[str]) -> set[str]:
    """Names of the fields that a command line sets itself (and a preset must not override)."""
    names = (a.split("=")[0][2:].replace("-", "_") for a in argv if a.startswith("--"))
    return {n.removeprefix("no_") if n.startswith("no_") else n for n in names}
