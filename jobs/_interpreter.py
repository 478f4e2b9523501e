"""Whether this Python can run the jobs, in one sentence where it cannot. Any Python 3 reads this file."""

import os
import sys

_OURS = ("jobs", "model", "pipeline")
_OLDEST = (3, 11)


def require_version() -> None:
    """End the process where Python is too old for the files that are imported next."""
    if sys.version_info[:2] < _OLDEST:
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"error: {sys.executable} is Python {version}, but 3.11 or newer is needed; {cure()}")


def missing_package(error: ModuleNotFoundError) -> str:
    """The sentence about a package that is not installed here.

    Raises:
        ModuleNotFoundError: the same error, where the module is one of this project.
    """
    name = (error.name or "").partition(".")[0]
    if not name or name in _OURS:
        raise error
    return f"error: {sys.executable} has no package {name}, which the jobs need; {cure()}"


def cure() -> str:
    """What to do, the end of a sentence."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    activate = os.path.join(root, ".venv", "bin", "activate")
    if os.path.exists(activate):
        below = os.path.relpath(activate)
        return f"run `. {activate if below.startswith(os.pardir) else below}` first, once in a terminal"
    return f"run `make setup` in {root}, then `. {activate}`, once in a terminal"
