"""Files that are not on this machine: on the Hugging Face hub, in buckets (s3, gs), behind http(s); listed and read.

Bytes are fetched in ranges of 8 MB, several at a time, and each range is retried after failures (retry.py). A file that
is not the one that was listed is a DamagedInputError: files of the hub are pinned to a commit, the others by ETag and
size. Tokens and keys come from the environment and never enter a plan or a message. Whole files on this node's disk:
download_cache.py. obstore was tried for http(s), too, and left out, because it refuses servers that send no ranges.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast
from urllib.parse import unquote, urlsplit

from pipeline.errors import DamagedInputError, UserError
from pipeline.listing import globs
from pipeline.remote import http as remote_http
from pipeline.remote import hub_datasets
from pipeline.remote.range_reader import RangeFile
from pipeline.remote.remote_file import RemoteFile, RemoteTree, redact_url
from pipeline.remote.retry import Interrupted, RetryState
from pipeline.storage.object_store import bucket_errors, bucket_store, parse_url

if TYPE_CHECKING:
    from obstore import GetOptions

SCHEMES = ("hf", "s3", "gs", "http", "https")
_RANGE_BYTES = 8 << 20  # large, because the hub limits the number of requests
_RANGES_AT_A_TIME = 8  # of one file: 64 MB in memory
_SMALL_RANGES_AT_A_TIME = 16
_NEAR_BYTES = 64 << 10  # ranges with a smaller gap are fetched as one
_CHUNK_BYTES = 1 << 20


def is_remote(source: str) -> bool:
    """Whether this module can list the source, by its scheme."""
    return source.partition("://")[0] in SCHEMES and "://" in source


# ---- listing ---------------------------------------------------------------------------------------------------------


def list_files(source: str) -> tuple[str | None, list[RemoteFile]]:
    """The source pinned to a commit (None where nothing pins it) and the files that it names, sorted by name.

    hf, s3 and gs sources may be a file, a folder or a glob (globs.py); an http(s) address is one file.

    Raises:
        UserError: the place cannot be reached or refuses the request, or a web server has no such file. A name that
            nothing matches is an empty list elsewhere.
    """
    tree = list_tree(source)
    named = [file for path, file in tree.files.items() if tree.is_file or globs.matches(path, tree.pattern)]
    return tree.pinned, sorted(named, key=lambda file: file.name)


def list_tree(source: str) -> RemoteTree:
    """All files below the folder that the source begins with, whether its pattern names them or not; see list_files."""
    if source.startswith("hf://"):
        return hub_datasets.list_tree(source)
    if source.startswith(("s3://", "gs://")):
        return _list_bucket(source)
    where = redact_url(source)
    name = unquote(urlsplit(source).path.rpartition("/")[2])
    if not name:
        raise UserError(f"{where} names no file; only single files can be read over http(s)")
    size_bytes, version = remote_http.head(source, where)
    return RemoteTree.of_one(RemoteFile(url=source, name=name, size_bytes=size_bytes, version=version))


def _list_bucket(source: str) -> RemoteTree:
    import obstore

    scheme, bucket, pattern = parse_url(source)
    store, _ = bucket_store(source)
    pattern = pattern.strip("/")
    fixed = globs.fixed_part(pattern)

    def remote_file(entry: Any, folder: str) -> RemoteFile:
        key = entry["path"]
        version = f"etag:{entry['e_tag']}" if entry["e_tag"] else ""
        name = key.removeprefix(f"{folder}/") if folder else key
        return RemoteFile(url=f"{scheme}://{bucket}/{key}", name=name, size_bytes=entry["size"], version=version)

    with bucket_errors(source):
        if fixed and fixed == pattern:
            with contextlib.suppress(FileNotFoundError):
                return RemoteTree.of_one(remote_file(obstore.head(store, fixed), fixed.rpartition("/")[0]))
        pages = list(obstore.list(store, fixed or None, chunk_size=1000))
    files = [remote_file(entry, fixed) for page in pages for entry in page if entry["path"] != fixed]
    folders = {parent for file in files for parent in _folders_above(file.name)}
    return RemoteTree(
        pattern=pattern.removeprefix(fixed).strip("/"),
        files={file.name: file for file in files if file.size_bytes or file.name not in folders},
    )


def _folders_above(name: str) -> Iterator[str]:
    """Consoles mark a folder by an empty object of its name."""
    while name := name.rpartition("/")[0]:
        yield name


# ---- bytes -----------------------------------------------------------------------------------------------------------


def stream(file: RemoteFile, start: int = 0, origin: Origin | None = None) -> Generator[bytes, None, None]:
    """The bytes of a file from ``start`` to its end, in order, fetched in several ranges at a time.

    Raises:
        DamagedInputError: the file is gone, or changed since it was listed.
        UserError: the place cannot be reached, or refuses the request.
    """
    origin = origin or _origin_of(file)
    if start >= file.size_bytes:
        return
    if not origin.has_ranges():
        yield from _chunks(file, origin, start, file.size_bytes, threading.Event())
        return
    waiting = collections.deque(_divide(start, file.size_bytes))
    running: collections.deque[Future[bytes]] = collections.deque()
    with _pool(min(_RANGES_AT_A_TIME, len(waiting))) as (pool, stopped):
        while waiting or running:
            while waiting and len(running) < _RANGES_AT_A_TIME:
                running.append(pool.submit(_fetch, file, origin, waiting.popleft(), stopped))
            yield running.popleft().result()


def read_ranges(file: RemoteFile, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of every range [start, stop), many at a time; raises as ``stream`` does."""
    for start, stop in ranges:
        if not 0 <= start <= stop <= file.size_bytes:
            raise DamagedInputError(f"{file.where} has {file.size_bytes:,} bytes; bytes {start}-{stop} are not in it")
    parts = _fetch_all(file, _origin_of(file), ranges)
    return [_cut(parts, start, stop) for start, stop in ranges]


def open_file(file: RemoteFile) -> BinaryIO:
    """Open a seekable file, which fetches ahead while it is read in order. The caller closes it."""
    origin = _origin_of(file)

    def fetch(start: int, stop: int) -> bytes:
        return _cut(_fetch_all(file, origin, [(start, stop)]), start, stop)

    return cast(BinaryIO, RangeFile(file.size_bytes, fetch, lambda start: stream(file, start, origin)))


def _fetch_all(file: RemoteFile, origin: Origin, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """Fetch parts that cover the ranges: (start, content), sorted by start, without overlap."""
    spans = _spans(ranges)
    if not spans:
        return []
    if origin.has_ranges():
        parts = [part for span in spans for part in _divide(*span)]
    else:
        parts = [(spans[0][0], spans[-1][1])]  # one request, answered from the start of the file
    with _pool(min(_SMALL_RANGES_AT_A_TIME, len(parts))) as (pool, stopped):
        running = [pool.submit(_fetch, file, origin, part, stopped) for part in parts]
        done, _ = wait(running, return_when=FIRST_EXCEPTION)  # a refusal does not wait for retries
        if errors := [error for future in done if (error := future.exception())]:
            raise errors[0]
        return [(start, future.result()) for (start, _), future in zip(parts, running, strict=True)]


@contextlib.contextmanager
def _pool(num_threads: int) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads, and an event that ends their waits when the block is left."""
    stopped = threading.Event()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")
    try:
        yield pool, stopped
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _fetch(file: RemoteFile, origin: Origin, part: tuple[int, int], stopped: threading.Event) -> bytes:
    return b"".join(_chunks(file, origin, *part, stopped))


def _chunks(file: RemoteFile, origin: Origin, start: int, stop: int, stopped: threading.Event) -> Iterator[bytes]:
    """Bytes [start, stop); after an interruption the rest is requested."""
    state = RetryState(file.where, stopped=stopped)
    while start < stop:
        try:
            for chunk in origin.stream(start, stop):
                start += len(chunk)
                state.progress()
                yield chunk
            if start < stop:
                raise Interrupted("the server ends its answers before all has come")
        except Interrupted as interruption:
            state.wait(interruption)


def _spans(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order, with those united that touch or nearly do."""
    spans: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if spans and start <= spans[-1][1] + _NEAR_BYTES:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return spans


def _divide(start: int, stop: int) -> list[tuple[int, int]]:
    return [(first, min(first + _RANGE_BYTES, stop)) for first in range(start, stop, _RANGE_BYTES)]


def _cut(parts: Sequence[tuple[int, bytes]], start: int, stop: int) -> bytes:
    """[start, stop) out of sorted parts that cover it."""
    if start == stop:
        return b""
    found = []
    index = bisect.bisect_right(parts, start, key=lambda part: part[0]) - 1
    while start < stop:
        first, content = parts[index]
        found.append(memoryview(content)[start - first : stop - first])
        start += len(found[-1])
        index += 1
    return b"".join(found)


# ---- places ----------------------------------------------------------------------------------------------------------


def _origin_of(file: RemoteFile) -> Origin:
    """Access to the bytes of one file, for several threads at a time."""
    scheme = file.url.partition("://")[0]
    if scheme == "hf":  # pinned by its commit; the servers that it redirects to have ETags of their own
        location, headers = hub_datasets.address(file.url)
        return remote_http.WebFile(
            url=location,
            where=file.where,
            size_bytes=file.size_bytes,
            headers=headers,
            refusal=hub_datasets.refusal,
            known_ranges=True,
        )
    if scheme in ("s3", "gs"):
        return _BucketFile(file)
    return remote_http.WebFile(url=file.url, where=file.where, size_bytes=file.size_bytes, version=file.version)


class _BucketFile:
    """An object of a bucket; obstore itself retries requests that get no answer."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._store, self._key = bucket_store(file.url)

    def has_ranges(self) -> bool:
        return True

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        import obstore
        from obstore.exceptions import BaseError, PreconditionError

        file = self._file
        options: GetOptions = {"range": (start, stop)}
        if file.version.startswith("etag:"):
            options["if_match"] = file.version.removeprefix("etag:")
        try:
            with bucket_errors(file.url):
                try:
                    answer = obstore.get(self._store, self._key, options=options)
                except PreconditionError as error:
                    raise DamagedInputError(f"{file.where} has {remote_http.CHANGED}") from error
        except FileNotFoundError as error:
            raise DamagedInputError(f"{file.where} is missing; it was there when the plan was made") from error
        if answer.meta["size"] != file.size_bytes:
            raise DamagedInputError(f"{file.where} has {remote_http.CHANGED}")
        try:
            yield from answer.stream(_CHUNK_BYTES)
        except BaseError as error:
            raise Interrupted(f"the connection to {redact_url(file.url)} breaks off") from error


Origin: TypeAlias = remote_http.WebFile | _BucketFile
