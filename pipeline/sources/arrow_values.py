"""The bytes of Arrow arrays of large strings or large binaries, without a copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def offsets_of(array: Any) -> npt.NDArray[np.int64]:
    """(n + 1,) value i is bytes [offsets[i], offsets[i + 1]) of the array's data buffer."""
    return np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]


def values_of(array: Any) -> Iterator[memoryview]:
    """The bytes of every value, in order."""
    data = memoryview(array.buffers()[2] or b"")
    return (data[begin:end] for begin, end in itertools.pairwise(offsets_of(array).tolist()))


def array_of(content: Any, start: int, stop: int, arrow_type: pa.DataType) -> pa.Array:
    """An array of one value, bytes [start, stop) of ``content``."""
    offsets = pa.py_buffer(np.array([start, stop], np.int64))
    return pa.Array.from_buffers(arrow_type, 1, [None, offsets, pa.py_buffer(content)])
