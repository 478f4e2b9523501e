"""Seekable files that are no files of a disk: one over ranges of bytes and streams, and what such files share."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator

_LEAST_BYTES = 64 << 10  # of a request
_IN_ORDER_BYTES = 1 << 20  # of the request before a stream is opened


class ReadOnlyFile(io.BufferedIOBase):
    """A seekable file of a known size, with a position; a subclass says what ``read`` gives."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}: before the start of the file")
        self._position = base + offset
        return self._position

    def bytes_ahead(self, size: int | None) -> int:
        """How many bytes ``read(size)`` gives: no more than are left."""
        left = max(0, self._size_bytes - self._position)
        return left if size is None or size < 0 else min(size, left)


class RangeFile(ReadOnlyFile):
    """Fetches what is read and little more; after two requests that continue where the last one ended, opens a stream.

    ``read(n)`` returns n bytes unless the file ends. For one thread at a time.
    """

    def __init__(
        self,
        size_bytes: int,
        fetch: Callable[[int, int], bytes],
        stream: Callable[[int], Generator[bytes, None, None]],
    ) -> None:
        super().__init__(size_bytes)
        self._fetch = fetch
        self._open_stream = stream
        self._stream: Generator[bytes, None, None] | None = None
        self._block = b""
        self._block_start = -1
        self._reads_in_order = 0

    def read(self, size: int | None = -1, /) -> bytes:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        blocks = []
        left = self.bytes_ahead(size)
        while left:
            offset = self._position - self._block_start
            if not 0 <= offset < len(self._block):
                self._block, self._block_start, offset = self._next_block(left), self._position, 0
            blocks.append(memoryview(self._block)[offset : offset + left])
            self._position += len(blocks[-1])
            left -= len(blocks[-1])
        return b"".join(blocks)

    def close(self) -> None:
        self._close_stream()
        self._block = b""
        super().close()

    def _next_block(self, num_bytes: int) -> bytes:
        """Bytes from the position on, at least one."""
        goes_on = self._position == self._block_start + len(self._block)
        if goes_on and self._stream is not None:
            return next(self._stream)
        self._close_stream()
        self._reads_in_order = self._reads_in_order + 1 if goes_on else 0
        if self._reads_in_order >= 2:
            self._stream = self._open_stream(self._position)
            return next(self._stream)
        least_bytes = _IN_ORDER_BYTES if goes_on else _LEAST_BYTES
        return self._fetch(self._position, min(self._position + max(num_bytes, least_bytes), self._size_bytes))

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
