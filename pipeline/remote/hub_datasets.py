"""Data sets of the Hugging Face hub: which files a name stands for, and where their bytes are.

A revision is resolved once and pinned to a commit, so that every worker reads the same bytes. The token never enters a
plan (hub_client.py).
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

from pipeline.errors import UserError
from pipeline.remote import globs
from pipeline.remote.hub_client import endpoint, final_hub_errors, hub_errors, token
from pipeline.remote.remote_file import RemoteFile
from pipeline.remote.retry import retry

_PATTERN = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<glob>.+))?")
_KIND = "data set"


def list_files(source: str) -> tuple[str, list[RemoteFile]]:
    """``hf://datasets/OWNER/NAME[@REVISION][/GLOB]`` at the commit that it has now, and its files, sorted by name.

    GLOB may also be a folder (globs.py). A slash inside a revision is written %2F.
    """
    match = _parse(source)
    name, revision, pattern = match["name"], unquote(match["revision"] or "main"), match["glob"] or ""
    commit = retry(source, lambda: _commit(source, name, revision))
    tree = retry(source, lambda: _tree(source, name, commit, pattern))
    pinned = f"hf://datasets/{name}@{commit}"
    files = [
        RemoteFile(
            url=f"{pinned}/{entry.path}",
            name=entry.path,
            version=f"sha256:{entry.lfs.sha256}" if entry.lfs else f"blob:{entry.blob_id}",
            size_bytes=entry.size,
        )
        for entry in tree
        if globs.matches(entry.path, pattern)
    ]
    return f"{pinned}/{pattern}".rstrip("/"), sorted(files, key=lambda file: file.name)


def _commit(source: str, name: str, revision: str) -> str:
    from huggingface_hub import HfApi

    with hub_errors(source, kind=_KIND):
        return str(HfApi(endpoint=endpoint(), token=token()).dataset_info(name, revision=revision).sha)


def _tree(source: str, name: str, commit: str, pattern: str) -> list[Any]:
    """The files below the part of the pattern without wildcards: all of FineWeb has 25,000, a sample of it fifteen."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint(), token=token())
    folder = globs.fixed_part(pattern)
    with hub_errors(source, kind=_KIND):
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
    """The http address of ``hf://datasets/OWNER/NAME@COMMIT/PATH``, and the headers, which may hold the token."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    match = _parse(url)
    location = hf_hub_url(
        match["name"], match["glob"], repo_type="dataset", revision=match["revision"], endpoint=endpoint()
    )
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


def _parse(source: str) -> re.Match[str]:
    match = _PATTERN.fullmatch(source.rstrip("/"))
    if match is None:
        raise UserError(f"source {source} is not of the form hf://datasets/OWNER/NAME[@REVISION][/GLOB]")
    return match
