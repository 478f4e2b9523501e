"""The Hugging Face hub as all modules here reach it: endpoint, token, and errors in one sentence.

HF_ENDPOINT names another hub than the public one. The token comes from HF_TOKEN and nowhere else, and is never shown.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import DamagedInputError, UserError
from pipeline.remote.retry import RETRIED_STATUS, Interrupted, retry_after_seconds

_FILE = re.compile(
    r"hf://(?P<datasets>datasets/)?(?!datasets/)(?P<name>[^/@]+/[^/@]+)(?:@(?P<at>[^/]+/.+)|/(?P<path>.+))"
)
_REFERENCE = re.compile(r"(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+)(?:/(?P<path>.*))?", re.DOTALL)
_CHECK = "check the network and HF_ENDPOINT, then run the same command again"


def token() -> str | bool:
    """The token to send; False, and not None, so that none is sent with which somebody logged in on this machine."""
    return os.environ.get("HF_TOKEN") or False


def endpoint() -> str | None:
    """The address of the hub; None for the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def request_settings(revision: str | None) -> dict[str, Any]:
    """What a function of huggingface_hub needs to fetch a revision, by default main; a slash in it is written %2F."""
    return {"revision": unquote(revision or "main"), "endpoint": endpoint(), "token": token()}


def fetch_file(address: str) -> Path:
    """The file ``hf://[datasets/]OWNER/NAME[@REVISION]/PATH`` in the hub's cache of this machine (HF_HOME).

    Raises:
        UserError: no such model or data set, revision or file, no access, or neither network nor an earlier copy.
    """
    match = _FILE.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is not of the form hf://OWNER/NAME[@REVISION]/PATH or hf://datasets/OWNER/NAME/...")
    from huggingface_hub import hf_hub_download

    kind = "dataset" if match["datasets"] else "model"
    revision, path = split_revision(match["at"]) if match["at"] else (None, match["path"])
    with final_hub_errors(address, kind="data set" if match["datasets"] else "model"):
        return Path(hf_hub_download(match["name"], path, repo_type=kind, **request_settings(revision)))


def split_revision(text: str) -> tuple[str, str]:
    """A revision, and the path behind it, of REVISION[/PATH].

    A revision ends at the first slash, except in refs/convert/NAME and refs/pr/NUMBER; ~NAME stands for
    refs/convert/NAME, as in huggingface_hub's file system; other slashes of a revision are written %2F.
    """
    match = _REFERENCE.fullmatch(text)
    assert match is not None
    revision = unquote(match["revision"])
    return f"refs/convert/{revision[1:]}" if revision.startswith("~") else revision, match["path"] or ""


def is_unknown_revision(error: UserError) -> bool:
    """Whether the hub knows the name, and not the revision."""
    from huggingface_hub import errors

    return isinstance(error.__cause__, errors.RevisionNotFoundError)


@contextlib.contextmanager
def final_hub_errors(what: str, *, kind: str, action: str | None = None) -> Iterator[None]:
    """Like ``hub_errors``, without a bar, for a request that is not sent again: what might pass is a UserError, too."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        with hub_errors(what, kind=kind, action=action):
            yield
    except Interrupted as interruption:
        raise UserError(f"{what}: {interruption.reason}; {interruption.advice}") from interruption


@contextlib.contextmanager
def hub_errors(what: str, *, kind: str, action: str | None = None) -> Iterator[None]:
    """Turn what the hub client raises into one sentence about ``what``, which names a ``kind`` ("data set").

    action: what is asked of it, "read this ..." unless given.

    Raises:
        DamagedInputError: the hub has no such file.
        UserError: the hub refuses the request.
        Interrupted: the hub cannot be reached, or fails for now, so that the request can be sent again.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{what}: access is gated; accept its terms on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: the hub has no such revision of this {kind}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{what}: the hub has no such {kind}, or it is private and HF_TOKEN is not set") from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable() from error
    except errors.EntryNotFoundError as error:
        raise DamagedInputError(f"{what}: the hub has no such file") from error
    except errors.HfHubHTTPError as error:
        raise _status_error(what, error.response, action or f"read this {kind}") from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise _unreachable() from error
    except errors.HFValidationError as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error


def _status_error(what: str, response: Any, action: str) -> Exception:
    status = response.status_code
    if status in RETRIED_STATUS:
        reason = f"the hub answered with an error ({status})"
        return Interrupted(reason, wait_seconds=retry_after_seconds(response.headers))
    if status in (401, 403):
        return UserError(f"{what}: the hub refuses it ({status}); is HF_TOKEN right, and may it {action}?")
    return UserError(f"{what}: the hub answered with an error ({status}); try again later")


def _unreachable() -> Interrupted:
    return Interrupted(f"the hub at {endpoint() or 'https://huggingface.co'} cannot be reached", advice=_CHECK)
