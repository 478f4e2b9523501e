"""Data sets of the Hugging Face hub: which files a name stands for, where their bytes are, errors in one sentence.

A revision is resolved once and pinned to a commit, so that every worker reads the same bytes. The token comes from
HF_TOKEN and nowhere else, and never enters a plan; HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from pipeline.errors import DamagedInputError, UserError
from pipeline.remote import globs
from pipeline.remote.retry import RETRIED_STATUS, Interrupted, asked_wait_seconds, patiently

_PATTERN = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<glob>.+))?")
_CHECK = "check the network and HF_ENDPOINT, then run the same command again"


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a data set at one commit."""

    url: str
    """hf://datasets/OWNER/NAME@COMMIT/PATH, wherever HF_ENDPOINT leads."""
    path: str
    version: str
    """sha256:HEX of its content, or blob:HEX, git's hash, of a small file."""
    size_bytes: int


def list_files(source: str) -> tuple[str, list[HubFile]]:
    """``hf://datasets/OWNER/NAME[@REVISION][/GLOB]`` at the commit of today, and the files it names, sorted.

    GLOB may be a folder too (globs.py). A slash inside a revision is written %2F.
    """
    match = _parse(source)
    name, revision, pattern = match["name"], unquote(match["revision"] or "main"), match["glob"] or ""
    commit = patiently(source, lambda: _commit(source, name, revision))
    tree = patiently(source, lambda: _tree(source, name, commit, pattern))
    pinned = f"hf://datasets/{name}@{commit}"
    files = [
        HubFile(
            url=f"{pinned}/{entry.path}",
            path=entry.path,
            version=f"sha256:{entry.lfs.sha256}" if entry.lfs else f"blob:{entry.blob_id}",
            size_bytes=entry.size,
        )
        for entry in tree
        if globs.matches(entry.path, pattern)
    ]
    return f"{pinned}/{pattern}".rstrip("/"), sorted(files, key=lambda file: file.path)


def _commit(source: str, name: str, revision: str) -> str:
    from huggingface_hub import HfApi

    with hub_errors(source):
        return str(HfApi(endpoint=_endpoint(), token=_token()).dataset_info(name, revision=revision).sha)


def _tree(source: str, name: str, commit: str, pattern: str) -> list[Any]:
    """The files below the part of the pattern that is fixed: FineWeb whole has 25,000, a sample of it fifteen."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=_endpoint(), token=_token())
    folder = globs.fixed_part(pattern)
    with hub_errors(source):
        if folder and folder == pattern:  # a file or a folder
            paths = api.get_paths_info(name, [folder], revision=commit, repo_type="dataset")
            if paths and isinstance(paths[0], RepoFile):
                return paths
        try:
            tree = list(api.list_repo_tree(name, folder, recursive=True, revision=commit, repo_type="dataset"))
        except errors.EntryNotFoundError:
            return []
    return [entry for entry in tree if isinstance(entry, RepoFile)]


def address(url: str) -> tuple[str, dict[str, str]]:
    """Where ``hf://datasets/OWNER/NAME@COMMIT/PATH`` is fetched, and the headers, which may hold the token."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    match = _parse(url)
    location = hf_hub_url(
        match["name"], match["glob"], repo_type="dataset", revision=match["revision"], endpoint=_endpoint()
    )
    return location, build_hf_headers(token=_token())


def refusal(where: str, response: Any) -> UserError:
    """What a refused request for a file means, in one sentence."""
    from huggingface_hub.utils import hf_raise_for_status

    try:
        with hub_errors(where):
            hf_raise_for_status(response)
    except UserError as error:
        return error
    except Interrupted as interruption:
        return UserError(f"{where}: {interruption.reason}; {interruption.advice}")
    return UserError(f"{where}: the hub answered with an error ({response.status_code}); try again later")


def _parse(source: str) -> re.Match[str]:
    match = _PATTERN.fullmatch(source.rstrip("/"))
    if match is None:
        raise UserError(f"source {source} is not of the form hf://datasets/OWNER/NAME[@REVISION][/GLOB]")
    return match


def _token() -> str | bool:
    return os.environ.get("HF_TOKEN") or False  # False: do not look for one that somebody logged in with


def _endpoint() -> str | None:
    """Of this process; None for the public hub."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Whatever the hub client raises, as one sentence about ``what``; as Interrupted where it may pass."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{what}: access is gated; accept its terms on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: the hub has no such revision of this data set") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{what}: the hub has no such data set, or it is private and HF_TOKEN is not set") from error
    except errors.EntryNotFoundError as error:
        raise DamagedInputError(f"{what}: the hub has no such file") from error
    except errors.HfHubHTTPError as error:
        raise _status_error(what, error.response) from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise Interrupted(_unreachable(), advice=_CHECK) from error
    except errors.HFValidationError as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error


def _status_error(what: str, response: Any) -> Exception:
    status = response.status_code
    if status in RETRIED_STATUS:
        reason = f"the hub answered with an error ({status})"
        return Interrupted(reason, wait_seconds=asked_wait_seconds(response.headers))
    if status in (401, 403):
        return UserError(f"{what}: the hub refuses it ({status}); is HF_TOKEN right, and may it read this data set?")
    return UserError(f"{what}: the hub answered with an error ({status}); try again later")


def _unreachable() -> str:
    return f"the hub at {_endpoint() or 'https://huggingface.co'} cannot be reached"
