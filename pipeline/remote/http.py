"""Byte ranges of one file over HTTP, for the hub and for plain http(s) addresses.

A file that changed since it was planned is recognised by its ETag (or else Last-Modified) and its size. The client is
huggingface_hub's, which has one pool of connections and settings for proxies and certificates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import DamagedInputError, UserError
from pipeline.remote.retry import RETRIED_STATUS, TRANSFER_TRIES, Interrupted, retry, retry_after_seconds

CHANGED = "changed since the plan was made; plan it anew, into another output folder"
_SILENCE_SECONDS = 60.0  # without a byte, until a connection is closed
_HEAD_BYTES = 512
_EXPIRED = frozenset({400, 401, 403, 404, 410})  # answers of a signed address that has expired


@dataclass(kw_only=True, repr=False)  # url and headers may hold secrets
class WebFile:
    """A file at an HTTP address; several threads may read it at once."""

    url: str
    where: str
    """Name of the file in messages."""
    size_bytes: int
    version: str = ""
    """As of ``version_of``; compared with the server's where both are known."""
    headers: Mapping[str, str] = field(default_factory=dict)
    refusal: Callable[[str, Any], UserError] | None = None
    """Makes the error of an answer that is neither the file nor a reason to retry."""
    known_ranges: bool | None = None
    """Whether the server sends parts of a file; None: ask it."""
    _redirected: str | None = field(default=None, init=False)
    """The next ranges go there directly, because the hub limits the number of requests."""

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop), or the first of them, by one request, which a server without ranges answers from byte 0.

        Raises:
            Interrupted: a retry may bring the rest.
            DamagedInputError: the file is gone, or has changed.
            UserError: the server refuses the request.
        """
        with self._get(start, stop) as response:
            skip = 0 if response.status_code == 206 else start
            left = stop - start
            for chunk in response.iter_raw():
                wanted = chunk[skip : skip + left]
                skip = max(0, skip - len(chunk))
                if wanted:
                    yield wanted
                    left -= len(wanted)
                if not left:
                    return

    def has_ranges(self) -> bool:
        """Whether the server sends parts of the file; the first call asks it."""
        if self.known_ranges is None:
            self.known_ranges = retry(self.where, self._ask_for_ranges, tries=TRANSFER_TRIES)
        return self.known_ranges

    def _ask_for_ranges(self) -> bool:
        with self._get(0, 1) as response:
            return _is_part(response)

    @contextlib.contextmanager
    def _get(self, start: int, stop: int) -> Iterator[Any]:
        """An answer with the range, or with the whole file."""
        redirected = self._redirected
        headers = {} if redirected else self.headers  # the token is for the first address only
        headers = {**headers, "Range": f"bytes={start}-{stop - 1}"}
        with get(redirected or self.url, headers) as response:
            if redirected and response.status_code in _EXPIRED:
                self._redirected = None
                raise Interrupted(f"a signed address was refused ({response.status_code})", wait_seconds=0)
            self._check(response, start)
            if response.history and _origin(str(response.url)) != _origin(self.url):
                self._redirected = str(response.url)
            yield response

    def _check(self, response: Any, start: int) -> None:
        if response.status_code in (412, 416):
            raise DamagedInputError(f"{self.where} has {CHANGED}")
        if response.status_code not in (200, 206):
            response.read()
            raise (self.refusal or _refusal)(self.where, response)
        version, size_bytes = version_of(response.headers), total_bytes(response)
        if version and self.version and version != self.version:
            raise DamagedInputError(f"{self.where} has {CHANGED}")
        if size_bytes is not None and size_bytes != self.size_bytes:
            sizes = f"it has {size_bytes:,} bytes and had {self.size_bytes:,}"
            raise DamagedInputError(f"{self.where} has {CHANGED} ({sizes})")
        content_range = response.headers.get("Content-Range", "")
        if response.status_code == 206 and not content_range.startswith(f"bytes {start}-"):
            raise Interrupted("the server sent another part of the file than it was asked for")


@contextlib.contextmanager
def get(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """An answer whose body is still to be read; a passing failure, also while it is read, raises Interrupted."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    headers = {**headers, "Accept-Encoding": "identity"}  # lengths and ranges must be those of the file itself
    try:
        with get_session().stream(
            "GET", url, headers=headers, timeout=_SILENCE_SECONDS, follow_redirects=True
        ) as response:
            if response.status_code in RETRIED_STATUS:
                raise Interrupted(
                    f"the server answered with an error ({response.status_code})",
                    wait_seconds=retry_after_seconds(response.headers),
                )
            yield response
    except (HTTPError, ConnectionError) as error:  # their text may hold the address, and a secret in it
        raise Interrupted(
            f"the server at {_origin(url)} cannot be reached, or breaks off ({type(error).__name__})",
            advice="check the network, then run the same command again",
        ) from error


def head(url: str, where: str) -> tuple[int, str]:
    """Size and version of the file at an address, by a GET of its first byte, since signed addresses allow no HEAD.

    Raises:
        UserError: the server refuses the request, cannot be reached, or does not state the length of the file.
    """

    def attempt() -> tuple[int, str]:
        with get(url, {"Range": "bytes=0-0"}) as response:
            if response.status_code not in (200, 206, 416):
                response.read()
                raise _refusal(where, response)
            _is_part(response)
            _require_no_page(url, where, response.headers.get("Content-Type", ""))
            size_bytes, version = total_bytes(response), version_of(response.headers)
        if size_bytes is None:
            raise UserError(
                f"{where}: the server does not say how long the file is (no Content-Length), so nobody could tell "
                "whether all of it arrived; download it and name the local file as source"
            )
        return size_bytes, version

    return retry(where, attempt)


def _require_no_page(url: str, where: str, content_type: str) -> None:
    """Raise UserError where a login page, or a page that lists a folder, is sent in place of the file."""
    if not content_type.lower().startswith("text/html"):
        return
    with get(url, {"Range": f"bytes=0-{_HEAD_BYTES - 1}"}) as response:
        head = next(response.iter_raw(_HEAD_BYTES), b"").lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"<"):  # some servers say that of any text
        raise UserError(
            f"{where}: the server sent a web page (HTML), such as a login page, not the file; fetch it by hand and "
            "name the local file as source, or give an address that needs no login"
        )


def version_of(headers: Mapping[str, str]) -> str:
    """The version of a file by the headers of an answer: etag:..., or else modified:..., or else empty."""
    if etag := headers.get("ETag"):
        return f"etag:{etag}"
    modified = headers.get("Last-Modified")
    return f"modified:{modified}" if modified else ""


def total_bytes(response: Any) -> int | None:
    """Bytes of the whole file by the headers of an answer; None where they do not say."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
    else:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(length) if length.isdigit() else None


def _is_part(response: Any) -> bool:
    """Whether the server sent one byte only, which is read, so that the connection can be used again."""
    if response.status_code == 206:
        for _ in response.iter_raw():  # read() would undo a Content-Encoding, and fail at one byte of zstd
            pass
    return bool(response.status_code == 206)


def _refusal(where: str, response: Any) -> UserError:
    status = response.status_code
    if status in (404, 410):
        return DamagedInputError(f"{where} is missing; the server has no such file ({status})")
    if status in (401, 403):
        return UserError(f"{where}: the server refuses it ({status}); it needs a login, or the address has expired")
    return UserError(f"{where}: the server answered with an error ({status}); try again later")


def _origin(url: str) -> str:
    """The address of a server, without user, password and query."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"
