"""What --help prints: the flags of a job in groups, a sentence for each, the default, and examples.

tyro, which parses the flags, shows a flat class as one group, in the line breaks of its source, and has no room for
examples; so the page is laid out here, by argparse's formatter, from the same fields.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.config.help_groups import EXAMPLES, GROUPS, POSITIONALS

_PLACEHOLDERS = {int: "INT", float: "FLOAT", str: "TEXT"}
_NAME_COLUMNS = 28


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether -h or --help is among the arguments."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def format_help(config_class: type[Any], section: str, program: str) -> str:
    """The page of one job, as wide as the terminal.

    Args:
        section: name of the job: of its section in a preset, and of its row in help_groups.py.
        program: what the user runs, for instance jobs/pretrain.py.
    """
    positional = POSITIONALS.get(section)
    usage = f"python {program} [{positional.upper()}]" if positional else f"python {program}"
    parser = argparse.ArgumentParser(
        usage=f"{usage} [--config FILE] [FLAGS]",
        description=textwrap.fill(_words(inspect.getdoc(config_class) or ""), _columns()),
        epilog="examples:\n" + "\n".join(f"  python {program} {arguments}" for arguments in EXAMPLES[section]),
        formatter_class=_Formatter,
        add_help=False,
    )
    if positional:
        given_as = f"The value of --{positional}; without its flag it comes first."
        parser.add_argument_group("argument").add_argument(positional, metavar=positional.upper(), help=given_as)
    first = parser.add_argument_group("settings")
    first.add_argument("-h", "--help", action="store_true", help="Print this page, then stop.")
    first.add_argument(
        "--config",
        metavar="FILE",
        help=f"YAML preset (configs/*.yaml); its section {section} is read, and flags override it.",
    )
    texts, hints = help_texts(config_class), get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for title, names in group_names(section, list(fields)).items():
        group = first if title == "settings" else parser.add_argument_group(title)
        for name in names:
            _add(group, fields[name], hints[name], texts.get(name, ""))
    return parser.format_help()


def group_names(section: str, names: list[str]) -> dict[str, list[str]]:
    """The names of a job's fields by group, in the order of the class; what no group has, under other."""
    title_of = {name: title for title, members in GROUPS[section].items() for name in members.split()}
    titles = [*GROUPS[section], "other"]
    found = {title: [name for name in names if title_of.get(name, "other") == title] for title in titles}
    return {title: members for title, members in found.items() if members}


def help_texts(config_class: type[Any]) -> dict[str, str]:
    """The sentences in the string below each field, of the class itself or of those that it inherits from."""
    texts: dict[str, str] = {}
    for each in reversed([base for base in config_class.__mro__ if dataclasses.is_dataclass(base)]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(field.target)] = _words(ast.literal_eval(below.value))
    return texts


def placeholder(hint: Any) -> str:
    """What stands for the value of a flag: INT, FLOAT|fan_in, {adamw,muon}, TEXT [TEXT ...]."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return f"{{{','.join(choices)}}}"
    if get_origin(hint) is tuple:
        parts = [placeholder(part) for part in get_args(hint) if part is not Ellipsis]
        return f"{parts[0]} [{parts[0]} ...]" if Ellipsis in get_args(hint) else " ".join(parts)
    if hint in _PLACEHOLDERS:
        return _PLACEHOLDERS[hint]
    if {int, str} <= set(get_args(hint)):  # num_workers 2:8
        return "INT|INT:INT"
    if str in get_args(hint):  # data, one folder or several
        return "TEXT [TEXT ...]" if tuple[str, ...] in get_args(hint) else "TEXT"
    parts = [placeholder(part) for part in get_args(hint) if part is not type(None)]
    return "|".join(part.strip("{}") for part in parts) if len(parts) > 1 else parts[0]


def _add(group: Any, field: dataclasses.Field[Any], hint: Any, text: str) -> None:
    """One flag, in the form that tyro takes it."""
    text = f"{text}{_default(field)}".replace("%", "%%")
    if hint is bool:
        group.add_argument(f"--{field.name}", f"--no_{field.name}", action="store_true", help=text)
    else:
        group.add_argument(f"--{field.name}", metavar=placeholder(hint), help=text)


def _default(field: dataclasses.Field[Any]) -> str:
    """(default: ...), or nothing where the text says what happens without the flag."""
    default = field.default
    if default in (None, (), "") or default is dataclasses.MISSING:
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f" (default: {shown!r})" if shown != shown.strip() else f" (default: {shown})"


def _words(text: str) -> str:
    return " ".join(text.split())


def _columns() -> int:
    return _Formatter("")._width


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse's, with room for names of flags, and the lines of the examples as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_NAME_COLUMNS)
