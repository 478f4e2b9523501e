"""Compressed files as streams of the bytes inside: gzip, zstd, bz2 and xz, also of several members one after another.

Zeros behind a member are padding, as tapes and block devices leave it. Anything else behind it must be another member:
nothing is passed over. Python's modules for gzip, bz2 and xz take what follows a bad member for garbage and end there.
"""

from __future__ import annotations

import bz2
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import pyarrow as pa

from pipeline.listing.selection import compression_of

_CHUNK_BYTES = 1 << 18  # of the compressed file per read
_ZSTD_HEADER_BYTES = 18
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ARROW_WINDOW_BYTES = 1 << 27  # Arrow refuses larger zstd windows
_MAX_WINDOW_LOG = 31  # 2 GB, as zstd --long=31 writes


def unpacked(file: Any, name: str) -> Any:
    """The byte stream of a file, decompressed if its name says so; OSError where it is damaged or truncated.

    ``file`` is at its start. A zstd file takes the memory of its window, which is up to 2 GB.
    """
    compression = compression_of(name)
    if compression is None:
        return file
    if compression == "zstd" and not _has_long_window(file):
        return pa.input_stream(file, compression="zstd")
    new, error_type = _zstd() if compression == "zstd" else _PLAIN[compression]
    return io.BufferedReader(_Members(file, new, error_type), _CHUNK_BYTES)


class _Decompressor(Protocol):
    """As bz2.BZ2Decompressor."""

    @property
    def eof(self) -> bool:
        """Whether the member has ended."""

    @property
    def needs_input(self) -> bool:
        """Whether more can come only of more compressed bytes."""

    @property
    def unused_data(self) -> bytes:
        """What came behind the member."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """At most so many bytes."""


class _GzipDecompressor:
    """zlib's decompressor with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _zstd() -> tuple[Callable[[], _Decompressor], type[Exception]]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    options = {int(zstd.DecompressionParameter.window_log_max): _MAX_WINDOW_LOG}
    return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError


_PLAIN: dict[str, tuple[Callable[[], _Decompressor], type[Exception]]] = {
    "gzip": (_GzipDecompressor, zlib.error),
    "bz2": (bz2.BZ2Decompressor, OSError),
    "xz": (lzma.LZMADecompressor, lzma.LZMAError),
}


class _Members(io.RawIOBase):
    """The content of all members of a compressed file."""

    def __init__(self, file: Any, new: Callable[[], _Decompressor], error_type: type[Exception]) -> None:
        super().__init__()
        self._file, self._new, self._error_type = file, new, error_type
        self._member: _Decompressor | None = None
        self._rest = b""  # of the file, behind a member

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        room = len(buffer)
        while True:
            if self._member is None and not self._begin_member():
                return 0
            assert self._member is not None
            content = self._more(self._member, room)
            if self._member.eof:
                self._rest, self._member = self._member.unused_data, None
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _begin_member(self) -> bool:
        """Whether there is one more member; zeros before it are passed over."""
        while not (rest := self._rest.lstrip(b"\0")):
            if not (rest := self._read()):
                return False
            self._rest = rest
        self._rest, self._member = rest, self._new()
        return True

    def _more(self, member: _Decompressor, room: int) -> bytes:
        data, self._rest = self._rest, b""
        if not data and member.needs_input:
            data = self._read()
        try:
            content = member.decompress(data, room)
        except self._error_type as error:
            raise OSError(str(error)) from error
        if not (data or content or member.eof):
            raise OSError("the compressed data end before they are complete")
        return content

    def _read(self) -> bytes:
        return bytes(self._file.read(_CHUNK_BYTES))


def _has_long_window(file: Any) -> bool:
    """Whether the first zstd frame needs a larger window than Arrow allows (RFC 8878, 3.1.1.1).

    ``file`` stays at its start.
    """
    head = bytes(file.read(_ZSTD_HEADER_BYTES)).ljust(_ZSTD_HEADER_BYTES, b"\0")
    file.seek(0)
    if not head.startswith(_ZSTD_MAGIC):
        return False
    descriptor = head[4]
    if not descriptor & 0x20:
        exponent, mantissa = head[5] >> 3, head[5] & 7
        return (1 << (10 + exponent)) * (8 + mantissa) // 8 > _ARROW_WINDOW_BYTES
    id_bytes = (0, 1, 2, 4)[descriptor & 3]  # a single segment: the window is the content
    size_bytes = (1, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(head[5 + id_bytes : 5 + id_bytes + size_bytes], "little") > _ARROW_WINDOW_BYTES
