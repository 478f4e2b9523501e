"""Data sets of the Hugging Face hub: which files a name stands for, and where their bytes are.

A revision is resolved once and pinned to a commit, so that every worker reads the same bytes. The token never enters a
plan (hub_client.py).
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import UserError
from pipeline.listing import globs
from pipeline.remote.hub_client import (
    endpoint,
    final_hub_errors,
    hub_errors,
    is_unknown_revision,
    split_revision,
    token,
)
from pipeline.remote.remote_file import RemoteFile, RemoteTree
from pipeline.remote.retry import retry

_PATTERN = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<at>.+)|/(?P<glob>.+))?")
_KIND = "data set"


def list_tree(source: str) -> RemoteTree:
    """``hf://datasets/OWNER/NAME[@REVISION][/GLOB]`` at the commit that it has now: the files of the folder of GLOB.

    GLOB may also be a folder (globs.py). A revision may hold slashes (refs/convert/parquet, ~parquet, a branch), which
    may also be written %2F. Names are paths in the data set.
    """
    name, revision, pattern = _parse(source)
    try:
        commit = retry(source, lambda: _commit(source, name, revision))
    except UserError as error:
        if not is_unknown_revision(error) or not pattern:
            raise
        revision, pattern = _branch_with_slashes(source, name, f"{revision}/{pattern}", error)
        commit = retry(source, lambda: _commit(source, name, revision))
    entries, is_file = retry(source, lambda: _tree(source, name, commit, pattern))
    address = f"hf://datasets/{name}@{commit}"
    files = {
        entry.path: RemoteFile(
            url=f"{address}/{entry.path}",
            name=entry.path,
            version=f"sha256:{entry.lfs.sha256}" if entry.lfs else f"blob:{entry.blob_id}",
            size_bytes=entry.size,
        )
        for entry in entries
    }
    return RemoteTree(pattern=pattern, files=files, pinned=f"{address}/{pattern}".rstrip("/"), is_file=is_file)


def _branch_with_slashes(source: str, name: str, place: str, error: UserError) -> tuple[str, str]:
    """The longest branch or tag that ``place`` begins with, and what follows it; raises ``error`` where none does."""
    from huggingface_hub import HfApi

    def ask() -> list[str]:
        with hub_errors(source, kind=_KIND):
            refs = HfApi(endpoint=endpoint(), token=token()).list_repo_refs(name, repo_type="dataset")
        return [ref.name for ref in (*refs.branches, *refs.tags)]

    fitting = [ref for ref in retry(source, ask) if f"{place}/".startswith(f"{ref}/")]
    if not fitting:
        raise error
    revision = max(fitting, key=len)
    return revision, place.removeprefix(revision).strip("/")


def _commit(source: str, name: str, revision: str) -> str:
    from huggingface_hub import HfApi

    with hub_errors(source, kind=_KIND):
        return str(HfApi(endpoint=endpoint(), token=token()).dataset_info(name, revision=revision).sha)


def _tree(source: str, name: str, commit: str, pattern: str) -> tuple[list[Any], bool]:
    """The files below the part of the pattern without wildcards, and whether that is the name of one file.

    All of FineWeb has 25,000, a sample of it fifteen.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint(), token=token())
    folder = globs.fixed_part(pattern)
    with hub_errors(source, kind=_KIND):
        if folder and folder == pattern:  # a file or a folder
            paths = api.get_paths_info(name, [folder], revision=commit, repo_type="dataset")
            if paths and isinstance(paths[0], RepoFile):
                return paths, True
        try:
            tree = list(api.list_repo_tree(name, folder, recursive=True, revision=commit, repo_type="dataset"))
        except errors.EntryNotFoundError:
            return [], False
    return [entry for entry in tree if isinstance(entry, RepoFile)], False


def address(url: str) -> tuple[str, dict[str, str]]:
    """The http address of ``hf://datasets/OWNER/NAME@COMMIT/PATH``, and the headers, which may hold the token."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    name, commit, path = _parse(url)
    location = hf_hub_url(name, path, repo_type="dataset", revision=commit, endpoint=endpoint())
    return location, build_hf_headers(token=token())


def refusal(where: str, response: Any) -> UserError:
    """The error of a refused request for a file."""
    from huggingface_hub.utils import hf_raise_for_status

    try:
        with final_hub_errors(where, kind=_KIND):
            hf_raise_for_status(response)
    except UserError as error:
        return error
    return UserError(f"{where}: the hub answered with an error ({response.status_code}); try again later")


def _parse(source: str) -> tuple[str, str, str]:
    """OWNER/NAME, revision and what follows it."""
    match = _PATTERN.fullmatch(source.rstrip("/"))
    if match is None:
        raise UserError(f"source {source} is not of the form hf://datasets/OWNER/NAME[@REVISION][/GLOB]")
    if match["at"] is None:
        return match["name"], "main", match["glob"] or ""
    return match["name"], *split_revision(match["at"])
