"""A file of the hub, of a bucket or of a web server, as it was listed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit


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


def redact_url(url: str) -> str:
    """A URL for a message, without commit, user, password and query."""
    if not url.startswith(("http://", "https://")):
        return re.sub("@[0-9a-f]{40}(?=/|$)", "", url, count=1)
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
