"""What every job does around its one function: settings in, one sentence and exit code 1 for what a user can mend."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import yaml

from pipeline.config.command_line import resolve
from pipeline.config.settings import to_dict
from pipeline.errors import RunStopped, UserError

ConfigT = TypeVar("ConfigT")


def run(config_class: type[ConfigT], action: Callable[[ConfigT], None], *, section: str, resume: str) -> None:
    """Resolve the settings from sys.argv and call ``action``; with --dry_run print them instead.

    resume: what the same command does after an interruption, the end of a sentence.
    """

    def job() -> None:
        config = resolve(config_class, section, sys.argv[1:], program=f"jobs/{section}.py")
        if getattr(config, "dry_run", False):
            print(yaml.safe_dump({section: to_dict(config)}, sort_keys=False), end="")
        else:
            action(config)

    guarded(job, resume=resume)


def guarded(job: Callable[[], None], *, resume: str) -> None:
    """Run ``job`` with progress lines on; end the process with one sentence where a user can mend the cause."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    try:
        job()
    except UserError as error:
        sys.exit(f"error: {error}")
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the same command {resume}")


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
