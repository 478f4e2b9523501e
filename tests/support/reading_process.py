"""A process that reads a source and prints what it found and the memory it took, as JSON (test_reading_memory.py)."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

from pipeline.remote.remote_file import RemoteFile
from pipeline.sources.column_chunks import fetch_column_chunks
from pipeline.sources.plan import make_plan
from pipeline.sources.readers import read_item
from pipeline.sources.sources import find
from pipeline.sources.work_items import open_slice


def memory_mb(name: str) -> float:
    """VmHWM is the highest resident memory of this process alone, since it began."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) / 1000


def main(source: str, mode: str, item_bytes: str) -> None:
    """``mode``: whether the items are read from the file or fetched first."""
    (layout,) = find(source).layouts("text")
    items = make_plan([layout], text_column="text", item_bytes=int(item_bytes))
    before_mb = memory_mb("VmRSS")
    start = time.perf_counter()
    documents = text_bytes = largest_array = 0
    for item in items:
        table = None
        if mode == "fetched":
            size_bytes = Path(item.slices[0].path).stat().st_size
            file = RemoteFile(url="s3://bucket/name", name="name", size_bytes=size_bytes, version="")
            local = item.slices[0]
            item = dataclasses.replace(item, slices=(dataclasses.replace(local, path="", file=file),))  # noqa: PLW2901
            table = fetch_column_chunks(item, lambda file_slice, local=local: open_slice(local))  # type: ignore[misc]
        for array in read_item(item, Counter(), table):
            documents += len(array)
            offsets = array.buffers()[1]
            first, last = (memoryview(offsets).cast("q")[array.offset + i] for i in (0, len(array)))
            text_bytes += last - first
            if len(array) > 1:
                largest_array = max(largest_array, last - first)
    print(  # noqa: T201
        json.dumps(
            {
                "documents": documents,
                "text_bytes": text_bytes,
                "largest_array": largest_array,
                "before_mb": round(before_mb),
                "peak_mb": round(memory_mb("VmHWM")),
                "seconds": round(time.perf_counter() - start, 2),
                "items": len(items),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
