"""Documents in the form that kernels take: an address, and where each starts and stops; from lists and Arrow arrays.

Only offsets are copied, and the texts of a list of str, some MB at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import UserError

SLICE_CHARS = 1_000_000
SAMPLED_TEXTS = 64

Texts: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray


class TextBuffer(NamedTuple):
    """Document i is bytes starts[i]:stops[i] of the memory at address; stops ascend. There is at least one."""

    address: int
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    owner: Any  # keeps the memory alive

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents together."""
        return int((self.stops - self.starts).sum())


def text_buffers(texts: Texts) -> Iterator[TextBuffer]:
    """The memory of texts: one buffer for each chunk of an Arrow array, or for each slice of a list.

    A null in Arrow is an empty text. UserError for an Arrow array of another type; require_texts checks lists.
    """
    if isinstance(texts, pa.Array | pa.ChunkedArray):
        for chunk in texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]:
            if len(chunk):
                yield _arrow_buffer(chunk)
        return
    # Slices that fit into the processor's cache; each is encoded to UTF-8 just before it is used.
    first = texts[:SAMPLED_TEXTS]
    step = max(1, SLICE_CHARS * len(first) // max(guess_bytes(first), 1))
    for start in range(0, len(texts), step):
        yield _list_buffer(texts[start : start + step])


def require_texts(texts: Texts) -> None:
    """UserError if one of the texts is null, or if a list holds anything but str."""
    if isinstance(texts, str):
        raise UserError("one str was given where a list of texts is needed; put it into a list")
    if isinstance(texts, pa.Array | pa.ChunkedArray):
        rows = [row for row, valid in enumerate(texts.is_valid()) if not valid.as_py()] if texts.null_count else []
    else:
        kinds = set(map(type, texts))
        rows = [row for row, text in enumerate(texts) if text is None] if type(None) in kinds else []
        strange = sorted(kind.__name__ for kind in kinds - {type(None)} if not issubclass(kind, str))
        if strange:
            raise UserError(f"the texts are not all str, but {', '.join(strange)} too; give a list of str")
    if rows:
        raise UserError(
            f"{len(rows)} of {len(texts)} texts are null, the first in row {rows[0]}; drop or fill them before"
        )


def guess_bytes(texts: Texts) -> int:
    """About how many bytes the texts have: all of them in Arrow, their characters in a list."""
    return int(texts.nbytes) if isinstance(texts, pa.Array | pa.ChunkedArray) else sum(map(len, texts))


def bytes_buffer(data: bytes) -> TextBuffer:
    """Bytes as one document."""
    array = np.frombuffer(data, np.uint8)
    return TextBuffer(array.ctypes.data, np.zeros(1, np.int64), np.array([array.size], np.int64), array)


def shares(buffers: Iterable[TextBuffer], num_shares: int) -> list[list[TextBuffer]]:
    """The documents in order, divided into at most num_shares runs of about as many bytes; none is empty."""
    buffers = list(buffers)
    total = sum(buffer.num_bytes for buffer in buffers)
    result: list[list[TextBuffer]] = [[] for _ in range(num_shares)]
    before = 0
    for buffer in buffers:
        ends = before + np.cumsum(buffer.stops - buffer.starts)
        # A document goes to the share in which its last byte lies.
        share_of = np.minimum((ends - 1).clip(0) * num_shares // max(total, 1), num_shares - 1)
        edges = np.searchsorted(share_of, np.arange(num_shares + 1))
        for share in range(num_shares):
            window = slice(edges[share], edges[share + 1])
            if window.start < window.stop:
                result[share].append(
                    TextBuffer(buffer.address, buffer.starts[window], buffer.stops[window], buffer.owner)
                )
        before = int(ends[-1])
    return [share for share in result if share]


def utf8(text: str) -> bytes:
    """UTF-8 of a str; surrogates are joined where they are pairs and replaced by U+FFFD where not, as tiktoken does."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def _list_buffer(texts: Sequence[str]) -> TextBuffer:
    try:
        encoded = [text.encode() for text in texts]
    except UnicodeEncodeError:  # a lone surrogate in one of them
        encoded = list(map(utf8, texts))
    data = np.frombuffer(b"".join(encoded), np.uint8)
    stops = np.fromiter(map(len, encoded), np.int64, len(encoded)).cumsum()
    return TextBuffer(data.ctypes.data, np.concatenate([np.zeros(1, np.int64), stops[:-1]]), stops, data)


def _arrow_buffer(array: pa.Array) -> TextBuffer:
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if pa.types.is_string(array.type):
        width: Any = np.int32
    elif pa.types.is_large_string(array.type):
        width = np.int64
    else:
        raise UserError(f"the texts are an Arrow array of {array.type}; give one of string or large_string")
    _, offsets_buffer, data = array.buffers()
    window = slice(array.offset, array.offset + len(array) + 1)
    offsets = np.frombuffer(memoryview(offsets_buffer), width)[window].astype(np.int64)
    if offsets[0] < 0 or (np.diff(offsets) < 0).any() or offsets[-1] > (data.size if data else 0):
        raise UserError("the Arrow array of texts is corrupt, its offsets leave its data; write the file again")
    starts, stops = offsets[:-1], offsets[1:]
    if array.null_count:  # a null may have bytes, which do not count
        starts = np.where(array.is_valid().to_numpy(zero_copy_only=False), starts, stops)
    return TextBuffer(data.address if data else 0, starts, stops, array)
