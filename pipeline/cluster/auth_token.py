"""The token that a local Ray asks of everyone who calls it.

Ray would write ~/.ray/auth_token itself, with the permissions of the umask: often every user of the machine could read
it.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


def ensure_private_token() -> None:
    """Make ~/.ray/auth_token for this user alone, before Ray starts in token mode.

    Where the file cannot be written, or others could read it, this process and its children get a token of their own
    through RAY_AUTH_TOKEN. Does nothing if the environment names a token already.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _create(path)
        shared = path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        if not shared and path.read_text().strip():
            return
    except OSError as error:
        logger.debug("%s cannot be used: %s", path, error)
    else:
        if shared:
            logger.warning(
                "other users can read %s, so this run uses a token of its own; `make cluster-files` makes a new one",
                path,
            )
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _create(path: Path) -> None:
    """Write a new token, readable by its owner only, unless the file exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
