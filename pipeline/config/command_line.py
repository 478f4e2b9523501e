"""Settings from a YAML preset and from flags, into the dataclasses of config.py.

A preset (``configs/*.yaml``) has one section per job; its keys, the fields of the dataclass and the flags are the same
names. Every mistake is a UserError of one sentence; an unknown section, key or flag is answered with the nearest known
one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import yaml

from pipeline.config.help import asks_for_help, format_help
from pipeline.config.help_groups import POSITIONALS
from pipeline.errors import UserError

ConfigT = TypeVar("ConfigT")

_WHOLE = (int, int | None, int | Literal["auto"] | None)
_NO_NUMBER = re.compile(r"no type matching \{None\}\|(INT|FLOAT) could be instantiated from \[(.*)\]")
_NO_MATCH = re.compile(r"no type matching (?:\{None\}\|)?(\S+) could be instantiated from \[(.*)\]")
_SCIENTIFIC = re.compile(r"\d+(\.\d+)?[eE]\+?\d{1,2}")

SECTIONS = (
    "tokenize",
    "train_tokenizer",
    "import_shards",
    "pretrain",
    "finetune",
    "evaluate",
    "generate",
    "export",
    "serve",
    "sweep",
    "demo",
)


def resolve(config_class: type[ConfigT], section: str, arguments: Sequence[str], *, program: str) -> ConfigT:
    """Fill ``config_class`` from its defaults, then the preset's ``section`` (--config FILE), then the flags.

    What may come first without its flag (help_groups.py) gets it. A preset's values take the same way as flags, so both
    are checked by the same parser. Prints the help and exits with code 0 on --help; every mistake is a UserError of one
    sentence.
    """
    _help_if_asked(config_class, section, arguments, program)
    path, given = _split_config_flag(_with_named_first(section, list(arguments)))
    flags = _gathered(config_class, given)
    preset = load_preset(path, section, config_class) if path else {}
    if preset and not flags:
        try:
            return parse_flags(config_class, as_flags(preset), program)
        except UserError as error:
            raise UserError(f"{path}, section {section}: {error}") from error
    return parse_flags(config_class, [*as_flags(preset), *flags], program)


def resolve_with_rest(
    config_class: type[ConfigT], section: str, arguments: Sequence[str], *, rest: tuple[type[Any], str], program: str
) -> tuple[ConfigT, list[str]]:
    """Fill ``config_class`` as resolve does; what is not its own goes to another class, as flags for parse_flags.

    Args:
        rest: the other class and its section of the preset. Keys there that ``config_class`` has too are left out.

    Raises:
        UserError: a mistake, a name among them that neither class has.
    """
    _help_if_asked(config_class, section, arguments, program)
    path, flags = _split_config_flag(list(arguments))
    own, names = _names(config_class), _names(rest[0])
    preset = load_preset(path, section, config_class) if path else {}
    shared = load_preset(path, rest[1], rest[0]) if path else {}
    config, left = _parse_known(config_class, [*as_flags(preset), *flags], program)
    for flag in left:
        name = _name_of(flag)
        if flag.startswith("--") and name not in names and name.removeprefix("no_") not in names:
            raise _unknown(flag, [*own, *names, "config"], program)
    preset_flags = as_flags({name: value for name, value in shared.items() if name not in own})
    return config, [*preset_flags, *_gathered(rest[0], left)]


def _help_if_asked(config_class: type[Any], section: str, arguments: Sequence[str], program: str) -> None:
    if asks_for_help(arguments):
        sys.stdout.write(format_help(config_class, section, program))
        raise SystemExit(0)


def _with_named_first(section: str, arguments: list[str]) -> list[str]:
    """The arguments, the first with its flag where it may stand alone."""
    name = POSITIONALS.get(section)
    is_alone = name is not None and arguments and not arguments[0].startswith("-")
    return [f"--{name}", *arguments] if is_alone else arguments


def _split_config_flag(arguments: list[str]) -> tuple[Path | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="")
    known, rest = parser.parse_known_args(arguments)
    if known.config == "":
        raise UserError("--config needs the path of a YAML preset, for example configs/demo.yaml")
    return (Path(known.config) if known.config else None), rest


class _PresetLoader(yaml.SafeLoader):
    """YAML 1.1 without its numbers to the base of 60: num_workers 2:8 is a range, not 128."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [("tag:yaml.org,2002:str", re.compile(r"^\d+:\d+$")), *resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_preset(path: Path, section: str, config_class: type[Any]) -> dict[str, Any]:
    """One section of a YAML preset, its keys checked against the fields of ``config_class``."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_PresetLoader)
    except FileNotFoundError:
        raise UserError(f"there is no preset {path}; the project's own lie in configs/") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"preset {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not all(isinstance(value, dict) for value in document.values()):
        raise UserError(f"preset {path} must have one section per job ({', '.join(SECTIONS)}), each of keys and values")
    for name in document:
        if name not in SECTIONS:
            raise UserError(f"preset {path}: unknown section {name!r}{_nearest(name, SECTIONS)}")
    values: dict[str, Any] = document.get(section, {})
    names = _names(config_class)
    for name in values:
        if name not in names:
            raise UserError(f"preset {path}, section {section}: unknown key {name!r}{_nearest(str(name), names)}")
    hints = get_type_hints(config_class)
    own = {name: _on_or_off(value, hints[name]) for name, value in values.items()}
    return _of_other_sections(document, config_class) | own


def _of_other_sections(document: dict[str, dict[str, Any]], config_class: type[Any]) -> dict[str, list[str]]:
    """What a preset says elsewhere of fields whose metadata have a function that finds it."""
    found: dict[str, list[str]] = {}
    for field in dataclasses.fields(config_class):
        if "from_preset" in field.metadata and (values := field.metadata["from_preset"](document)):
            found[field.name] = values
    return found


def _on_or_off(value: Any, hint: Any) -> Any:
    """YAML 1.1 takes on and off for true and false; a setting that has these words gets them back."""
    return ("on" if value else "off") if isinstance(value, bool) and "on" in get_args(hint) else value


def as_flags(values: dict[str, Any]) -> list[str]:
    """The values as flags: --name value, --name or --no_name."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list | tuple | dict):
            flags += [f"--{name}", *_texts(value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _texts(values: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> list[str]:
    """The values of a list, and NAME:VALUE of each entry of a mapping; the name alone comes before a mapping in it."""
    if not isinstance(values, dict):
        return [text for value in values for text in (_texts(value) if isinstance(value, dict) else [str(value)])]
    return [
        text
        for name, value in values.items()
        for text in ([str(name), *_texts(value)] if isinstance(value, list | dict) else [f"{name}:{value}"])
    ]


def parse_flags(config_class: type[ConfigT], flags: Sequence[str], program: str) -> ConfigT:
    """Fill ``config_class`` from flags alone; of a flag that is there twice the last one counts."""
    config, unknown = _parse_known(config_class, list(flags), program)
    if unknown:
        raise _unknown(unknown[0], [*_names(config_class), "config"], program)
    return config


def _unknown(argument: str, known: Sequence[str], program: str) -> UserError:
    kind = "flag" if argument.startswith("-") else "argument"
    return UserError(
        f"unknown {kind} {argument}{_nearest(_name_of(argument), known)}; {program} --help lists the flags"
    )


def _name_of(flag: str) -> str:
    return flag.lstrip("-").split("=")[0].replace("-", "_")


def _names(config_class: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def _parse_known(config_class: type[ConfigT], flags: list[str], program: str) -> tuple[ConfigT, list[str]]:
    """The config, and the flags with their values that are none of its."""
    import tyro  # heavy for the workers, which never parse

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            config, unknown = tyro.cli(
                config_class,
                args=_with_plain_numbers(config_class, _with_separate_names(config_class, flags)),
                prog=program,
                return_unknown_args=True,
                use_underscores=True,
                add_help=False,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_first_sentence(messages.getvalue())}; {program} --help lists the flags") from None
    return config, unknown


def _gathered(config_class: type[Any], flags: Sequence[str]) -> list[str]:
    """The same flags, with the values of all occurrences behind one where the field is marked so in its metadata."""
    marked = {field.name for field in dataclasses.fields(config_class) if field.metadata.get("gathered")}
    others: list[str] = []
    values: dict[str, list[str]] = {}
    name = ""
    for flag in flags:
        if flag.startswith("--"):
            before, equals, after = flag.partition("=")
            name = _name_of(before)
            if name in marked:
                values.setdefault(name, []).extend([after] if equals else [])
                continue
        (values[name] if name in marked else others).append(flag)
    return [*others, *(part for name, texts in values.items() for part in (f"--{name}", *texts))]


def is_whole(config_class: type[Any], name: str) -> bool:
    """Whether the field ``name`` takes whole numbers."""
    return get_type_hints(config_class)[name] in _WHOLE


def _with_separate_names(config_class: type[Any], flags: list[str]) -> list[str]:
    """The same flags, with A,B as two values where the field is marked so in its metadata."""
    lists = {field.name for field in dataclasses.fields(config_class) if field.metadata.get("divided_at_commas")}
    separate, name = [], ""
    for flag in flags:
        before, equals, after = flag.partition("=")
        is_flag = flag.startswith("--")
        name = before[2:].replace("-", "_") if is_flag else name
        if name in lists and equals and is_flag:
            separate += [before, *after.split(",")]
        else:
            separate += flag.split(",") if name in lists and not is_flag else [flag]
    return separate


def _with_plain_numbers(config_class: type[Any], flags: list[str]) -> list[str]:
    """The same flags, with 2e9 written out where a whole number is expected."""
    hints = get_type_hints(config_class)
    whole = {name for name in _names(config_class) if hints[name] in _WHOLE}
    plain, name = [], ""
    for flag in flags:
        before, _, after = flag.rpartition("=")
        if flag.startswith("--"):
            name = (before or flag)[2:].replace("-", "_")
        is_scientific = name in whole and _SCIENTIFIC.fullmatch(after) and float(after).is_integer()
        plain.append(flag.removesuffix(after) + str(int(float(after))) if is_scientific else flag)
    return plain


def _first_sentence(box: str) -> str:
    """The words of the first paragraph in the parser's framed message; of an optional number, as of any other."""
    lines = [line.strip("│╭╮╰╯─ ").strip() for line in box.splitlines()]
    paragraph = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:]))
    sentence = " ".join(paragraph).rstrip(".") or "the flags cannot be parsed"
    sentence = _NO_NUMBER.sub(lambda match: f"could not convert string to {match[1].lower()}: {match[2]}", sentence)
    return _NO_MATCH.sub(lambda match: f"{match[2]} is not {re.sub('[{}]', '', match[1])}", sentence)


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if matches:
        return f", did you mean {matches[0]!r}?"
    return f" (known: {', '.join(known)})" if len(known) < 10 else ""
