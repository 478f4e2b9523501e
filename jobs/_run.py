"""What every job does around its one function: settings in, one sentence and exit code 1 for what a user can mend."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import yaml

from pipeline.config.command_line import resolve
from pipeline.config.settings import to_dict
from pipeline.console import log_plainly, plain
from pipeline.errors import RunStopped, UserError
from pipeline.paths import shown

ConfigT = TypeVar("ConfigT")


Rows = list[tuple[str, str]]


def run(
    config_class: type[ConfigT],
    action: Callable[[ConfigT], None],
    *,
    section: str,
    resume: str,
    describe: Callable[[ConfigT], Rows] | None = None,
) -> None:
    """Resolve the settings from sys.argv and call ``action``; with --dry_run print them instead.

    Args:
        resume: what the same command does after an interruption, the end of a sentence.
        describe: what --dry_run prints besides the settings, as comments, so that the whole stays a preset.
    """

    def job() -> None:
        _require_utf8()
        config = resolve(config_class, section, sys.argv[1:], program=f"jobs/{section}.py")
        if getattr(config, "dry_run", False):
            rows = describe(config) if describe else []
            print(yaml.safe_dump({section: to_dict(config)}, sort_keys=False), end="")
            print("".join(f"# {line}\n" for line in _lines(rows)), end="")
        else:
            action(config)

    guarded(job, resume=resume)


def _require_utf8() -> None:
    """UserError for arguments and a current folder that are not UTF-8, which no record and no MLflow could hold."""
    for text, what in [*((argument, "argument") for argument in sys.argv[1:]), (os.getcwd(), "current folder")]:
        if shown(text) != text and any("\ud800" <= sign <= "\udfff" for sign in text):
            raise UserError(f"the {what} {shown(text)} is not UTF-8 text; rename the file or folder and try again")


def guarded(job: Callable[[], None], *, resume: str) -> None:
    """Run ``job`` with progress lines on; end the process with one sentence where a user can mend the cause."""
    log_plainly()
    logging.getLogger("pipeline").setLevel(logging.INFO)
    try:
        job()
    except UserError as error:
        sys.exit(f"error: {plain(str(error))}")
    except RunStopped as stopped:
        print(plain(str(stopped)), file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the same command {resume}")


def ignored_row(ignored: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The row of a table on files of the source that are not read; none where all are."""
    parts = [f"{entry['files']:,} {entry['reason']} (such as {entry['example']})" for entry in ignored]
    return [("not read", ", ".join(parts))] if parts else []


def print_table(title: str, rows: Rows) -> None:
    """Names and values in two columns."""
    print(f"\n{title}")
    for line in _lines(rows):
        print(f"  {line}")


def _lines(rows: Rows) -> list[str]:
    """Names and values in two columns, a line each."""
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {value}" for name, value in rows]
