"""A file of the hub, of a bucket or of a web server, as it was listed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.redaction import redact


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file as it was listed; plain values."""

    url: str
    """hf://datasets/OWNER/NAME@COMMIT/PATH, s3://BUCKET/KEY, gs://BUCKET/KEY, http(s)://..."""
    name: str
    """Path in the data set of the hub; elsewhere relative to the part of the source without wildcards."""
    size_bytes: int
    version: str
    """sha256:HEX or blob:HEX (git's hash) on the hub, etag:... or modified:... elsewhere; empty if nothing is known."""

    @property
    def where(self) -> str:
        """Name of the file in messages, without commit and secrets."""
        return redact_url(self.url)


@dataclass(frozen=True, kw_only=True)
class RemoteTree:
    """What lies below the folder that a source begins with."""

    pattern: str
    """Which of the files are meant (globs.py), relative to the same folder as their names; empty for all."""
    files: Mapping[str, RemoteFile]
    """By name."""
    pinned: str | None = None
    """The source at a commit of the hub; None elsewhere."""
    is_file: bool = False
    """Whether the source names one file in full."""

    @classmethod
    def of_one(cls, file: RemoteFile, pinned: str | None = None) -> RemoteTree:
        """The file that a source names in full."""
        return cls(pattern="", files={file.name: file}, pinned=pinned, is_file=True)


def stored_url(url: str) -> str:
    """A URL as it may lie on a disk: of the web without user, password and query, where signatures are."""
    return redact_url(url) if _is_web(url) else url


def redact_url(url: str) -> str:
    """A URL for a message, without commit, user, password and query."""
    if not _is_web(url):
        return redact(re.sub("@[0-9a-f]{40}(?=/|$)", "", url, count=1))
    return re.split("[?#]", redact(re.sub(r"\s", "%20", url)), maxsplit=1)[0]


def _is_web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))
