"""Data sets of the Hugging Face hub: which files a name stands for, parquet footers, downloads, errors in one sentence.

A revision is resolved once and pinned to a commit, so that every worker reads the same bytes. The token comes from
HF_TOKEN and nowhere else, and never enters a plan; HF_ENDPOINT names another hub; HF_HOME says where the cache lies.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from pipeline.errors import UserError

_PATTERN = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<glob>.+))?")
_FOOTER_READERS = 16  # footers wait for the network, not for a processor


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A data set at one commit."""

    name: str
    """OWNER/NAME."""
    commit: str
    endpoint: str | None
    """Not given: the public hub."""


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a data set."""

    path: str
    blob: str
    """sha256 of its content, or git's hash of a small file."""
    size_bytes: int


def list_files(source: str) -> tuple[Repository, list[HubFile]]:
    """The files that ``hf://datasets/OWNER/NAME[@REVISION][/GLOB]`` names, sorted; GLOB may be a folder too.

    A slash inside a revision is written %2F.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    match = _parse(source)
    endpoint = os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint, token=_token())
    name, revision = match["name"], unquote(match["revision"] or "main")
    with _hub_errors(source):
        commit = api.dataset_info(name, revision=revision).sha
        tree = list(api.list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset"))
    pattern = match["glob"] or "*"
    files = [
        HubFile(path=entry.path, blob=entry.lfs.sha256 if entry.lfs else entry.blob_id, size_bytes=entry.size)
        for entry in tree
        if isinstance(entry, RepoFile)
        and (fnmatch.fnmatchcase(entry.path, pattern) or entry.path.startswith(pattern.rstrip("/") + "/"))
    ]
    repository = Repository(name=name, commit=str(commit), endpoint=endpoint)
    return repository, sorted(files, key=lambda file: file.path)


def pin(source: str, commit: str) -> str:
    """The same source at ``commit``."""
    match = _parse(source)
    return f"hf://datasets/{match['name']}@{commit}" + (f"/{match['glob']}" if match["glob"] else "")


def read_footers(repository: Repository, paths: Sequence[str]) -> list[Any]:
    """The parquet metadata of ``paths``, read by range requests, many at a time."""
    from huggingface_hub import HfFileSystem
    from pyarrow import parquet

    filesystem = HfFileSystem(endpoint=repository.endpoint, token=_token())

    def read(path: str) -> Any:
        location = f"datasets/{repository.name}@{repository.commit}/{path}"
        with _hub_errors(f"{repository.name}/{path}"), filesystem.open(location, "rb") as file:
            try:
                return parquet.read_metadata(file)
            except pa.ArrowException as error:
                raise UserError(f"{repository.name}/{path} is no readable parquet file: {error}") from error

    with ThreadPoolExecutor(_FOOTER_READERS) as pool:
        return list(pool.map(read, paths))


def download(repository: Repository, path: str) -> Path:
    """The file in this machine's cache, fetched unless it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with _hub_errors(f"{repository.name}/{path}"):
        local = hf_hub_download(
            repository.name,
            path,
            repo_type="dataset",
            revision=repository.commit,
            endpoint=repository.endpoint,
            token=_token(),
        )
    return Path(local)


def _parse(source: str) -> re.Match[str]:
    match = _PATTERN.fullmatch(source.rstrip("/"))
    if match is None:
        raise UserError(f"source {source} is not of the form hf://datasets/OWNER/NAME[@REVISION][/GLOB]")
    return match


def _token() -> str | bool:
    return os.environ.get("HF_TOKEN") or False  # False: do not look for one that somebody logged in with


@contextlib.contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Whatever the hub client raises, as one sentence about ``what``."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{what}: access is gated; accept its terms on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: the hub has no such revision of this data set") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{what}: the hub has no such data set, or it is private and HF_TOKEN is not set") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{what}: {_unreachable()}") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{what}: the hub has no such file") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise UserError(f"{what}: the hub answered with an error ({status}); try again later") from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(f"{what}: {_unreachable()}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{what}: {error}") from error


def _unreachable() -> str:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return (
        f"the hub at {endpoint} cannot be reached; check the network and HF_ENDPOINT, then run the same command again"
    )
