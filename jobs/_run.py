"""What every job does around its one function: settings in, one sentence and exit code 1 for what a user can mend."""

from __future__ import annotations

import os
import signal
import sys

_IS_JOB = os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.dirname(os.path.abspath(__file__))  # else a test
if _IS_JOB and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the next imports ends in no traceback

import contextlib
import logging
import select
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from jobs._interpreter import missing_package, require_version

require_version()
from pipeline import exit_signals

if _IS_JOB:
    exit_signals.end_quietly_until_watched()  # the imports below take a fifth of a second

try:
    import yaml

    from pipeline.config.command_line import resolve
    from pipeline.config.settings import to_dict
    from pipeline.console import log_plainly, plain
    from pipeline.errors import RunStopped, UserError
    from pipeline.paths import shown
except ModuleNotFoundError as error:
    sys.exit(missing_package(error))

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
            print(f"{section}: starting", file=sys.stderr, flush=True)  # libraries and folders may take seconds
            action(config)

    guarded(job, resume=resume)


def _require_utf8() -> None:
    """UserError for arguments and a current folder that are not UTF-8, which no record and no MLflow could hold."""
    for text, what in [*((argument, "argument") for argument in sys.argv[1:]), (os.getcwd(), "current folder")]:
        if shown(text) != text and any("\ud800" <= sign <= "\udfff" for sign in text):
            raise UserError(f"the {what} {shown(text)} is not UTF-8 text; rename the file or folder and try again")


def guarded(job: Callable[[], None], *, resume: str) -> None:
    """Run ``job`` with progress lines on; end the process with one sentence where a user can mend the cause.

    Its exit code is 1 for a mistake, 130 after Ctrl-C, 143 after SIGTERM, and 141 where nobody reads its output.
    """
    log_plainly()
    logging.getLogger("pipeline").setLevel(logging.INFO)
    closing_line = f"interrupted; the same command {resume}"
    with exit_signals.watched(closing_line):
        try:
            _do_and_flush(job)
            _leave_ray()
        except RunStopped as stopped:
            _end_stopped(stopped)
        except BrokenPipeError:
            if not _is_unread():
                raise
            _drop_output()
            sys.exit(141)  # as the shell shows SIGPIPE
        except UserError as error:
            _end_if_interrupted(closing_line)
            sys.exit(f"error: {plain(str(error))}")
        except ModuleNotFoundError as error:
            sys.exit(missing_package(error))
        except KeyboardInterrupt:
            _end_if_interrupted(closing_line)
            print(closing_line, file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            _end_if_interrupted(closing_line)  # whatever code of others makes of it
            if isinstance(error, OSError) and "print(" in (traceback.extract_tb(error.__traceback__)[-1].line or ""):
                sys.exit(f"error: {_unwritable(error)}")
            raise


def _end_if_interrupted(closing_line: str) -> None:
    if (number := exit_signals.received()) is not None:
        exit_signals.end(number, closing_line)


def _end_stopped(stopped: RunStopped) -> NoReturn:
    sentence = plain(str(stopped))
    if stopped.at_once:
        exit_signals.end(stopped.signal_number, sentence)
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr)
    exit_signals.end_soon(stopped.signal_number)
    sys.exit(128 + stopped.signal_number)


def _do_and_flush(job: Callable[[], None]) -> None:
    try:
        job()
    except SystemExit:  # after --help
        _flush_output()
        raise
    _flush_output()


def _flush_output() -> None:
    """Write what is left now: an error at Python's own end could not be told from others."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(_unwritable(error)) from error


def _unwritable(error: OSError) -> str:
    _drop_output()
    return f"standard output cannot be written: {error.strerror}; send it to a place with room"


def _is_unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as behind `| head`."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_output() -> None:
    """Let Python's own end write the rest of standard output to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _leave_ray() -> None:
    """End a local Ray while signals still have an answer; at Python's own end they have a traceback."""
    if "ray" in sys.modules:
        from pipeline.cluster import ray_cluster

        ray_cluster.shut_down()


def would_fail(*checks: Callable[[], object]) -> Rows:
    """What --dry_run says of mistakes that the job would end with before it starts anything: a row for each check."""
    rows: Rows = []
    for check in checks:
        try:
            check()
        except UserError as error:
            rows.append(("would fail", plain(str(error))))
    return rows


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
