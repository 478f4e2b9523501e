"""The one exception that users meet: something they can mend, said in one sentence."""


class UserError(Exception):
    """A mistake in the input, the settings or the machine that the user can mend.

    The message is one sentence: what is wrong, where, and what to do. Jobs print it without a traceback and exit
    with code 1 (see ``jobs/_run.py``). It survives the way through Ray workers because it has one argument only.
    """


class DamagedInputError(UserError):
    """An input that cannot be read: damaged, truncated, not what it is said to be. ``--skip_bad_files`` goes on."""
