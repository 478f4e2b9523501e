"""Documents as the kernels take them: an address, and where each begins and stops; from lists and Arrow arrays.

Nothing is copied but the offsets, and a list of str once, by Arrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import UserError

Texts: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray


class TextBuffer(NamedTuple):
    """Document i is bytes starts[i]:stops[i] of the memory at address; stops ascend. There is at least one."""

    address: int
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    owner: Any  # keeps the memory alive

    @property
    def num_bytes(self) -> int:
        """Of the documents together."""
        return int((self.stops - self.starts).sum())


def text_buffers(texts: Texts) -> Iterator[TextBuffer]:
    """The memory of texts, Arrow chunk by Arrow chunk; a null is an empty text. UserError on what is not text."""
    array = texts if isinstance(texts, pa.Array | pa.ChunkedArray) else _arrow_texts(texts)
    for chunk in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
        if len(chunk):
            yield _arrow_buffer(chunk)


def refuse_nulls(texts: Texts) -> None:
    """UserError if one of the texts is null."""
    is_arrow = isinstance(texts, pa.Array | pa.ChunkedArray)
    num_nulls = texts.null_count if is_arrow else sum(text is None for text in texts)  # type: ignore[union-attr]
    if not num_nulls:
        return
    is_null = (not valid.as_py() for valid in texts.is_valid()) if is_arrow else (text is None for text in texts)  # type: ignore[union-attr]
    first = next(row for row, null in enumerate(is_null) if null)
    raise UserError(f"{num_nulls} of {len(texts)} texts are null, the first in row {first}; drop or fill them before")


def bytes_buffer(data: bytes) -> TextBuffer:
    """Bytes as one document."""
    array = np.frombuffer(data, np.uint8)
    return TextBuffer(array.ctypes.data, np.zeros(1, np.int64), np.array([array.size], np.int64), array)


def shares(buffers: Iterable[TextBuffer], num_shares: int) -> list[list[TextBuffer]]:
    """The documents in order, cut into at most num_shares runs of about as many bytes; none is empty."""
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


def _arrow_texts(texts: Sequence[str]) -> pa.Array:
    if isinstance(texts, str):
        raise UserError("one str was given where a list of texts is needed; put it into a list")
    texts = list(texts)
    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError:  # a lone surrogate in one of them
        return pa.array([None if text is None else utf8(text) for text in texts], pa.large_binary())
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(f"the texts are not all str ({error}); give a list of str or an Arrow string array") from error


def _arrow_buffer(array: pa.Array) -> TextBuffer:
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if pa.types.is_string(array.type):
        width: Any = np.int32
    elif pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type):
        width = np.int64
    else:
        raise UserError(f"the texts are an Arrow array of {array.type}; give one of string or large_string")
    _, offsets_buffer, data = array.buffers()
    window = slice(array.offset, array.offset + len(array) + 1)
    offsets = np.frombuffer(memoryview(offsets_buffer), width)[window].astype(np.int64)
    if offsets[0] < 0 or (np.diff(offsets) < 0).any() or offsets[-1] > (data.size if data else 0):
        raise UserError("the Arrow array of texts is corrupt, its offsets leave its data; write the file again")
    starts, stops = offsets[:-1], offsets[1:]
    if array.null_count:  # a null may have bytes, which mean nothing
        starts = np.where(array.is_valid().to_numpy(zero_copy_only=False), starts, stops)
    return TextBuffer(data.address if data else 0, starts, stops, array)
