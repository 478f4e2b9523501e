"""The exceptions that users meet: something they can mend, said in one sentence, and a run that was stopped."""


class UserError(Exception):
    """A mistake in the input, the settings or the machine that the user can mend.

    The message is one sentence: what is wrong, where, and what to do. Jobs print it without a traceback and exit
    with code 1 (see ``jobs/_run.py``). It survives the way through Ray workers because it has one argument only.
    """


class DamagedInputError(UserError):
    """An input that cannot be read: damaged, truncated, not what it is said to be. ``--skip_bad_files`` goes on."""


class RunStopped(Exception):  # noqa: N818  # nothing went wrong
    """A run that ended early because it was asked to. What is done is saved; the same command goes on from there.

    Jobs print it without a traceback and exit as a shell shows a signal: 143 for SIGTERM, 130 for Ctrl-C.
    """

    signal_number = 15
    """What asked for it."""
    at_once = False
    """Whether nothing is waited for: work of which nothing can be saved may still be running."""


PROGRAM_ERRORS = (ValueError, TypeError, AssertionError, ArithmeticError, LookupError, AttributeError)
"""Raised by a value that the program does not expect, and again at the same step however often a run starts."""
