"""Progress of planning and tokenizing on the console: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence

from pipeline.config.data import ReadingConfig
from pipeline.console import LOG_SECONDS, CountProgress, format_rate, format_seconds
from pipeline.sources.sources import Layout, Source
from pipeline.sources.work_items import Damage, WorkItem

logger = logging.getLogger(__name__)


def read_layouts(source: Source, config: ReadingConfig, damage: Damage | None) -> list[Layout]:
    """The layouts of all files, with a progress bar; footers of parquet files are read.

    damage: takes a note of every file that cannot be read; None: such a file is an error.
    """
    with CountProgress("plan", "files", len(source.inputs)) as progress:
        has_separator = config.document_separator is not None
        return list(source.layouts(config.text_column, progress.add, damage, has_separator=has_separator))


class ItemProgress:
    """Progress of work items: files and share of the source done, text and tokens, speed, remaining time."""

    def __init__(self, title: str, items: Sequence[WorkItem]) -> None:
        from tqdm import tqdm

        self._title, self._num_items = title, len(items)
        self._sizes = {item.index: item.size_bytes for item in items}
        self._files = {item.index: {file_slice.where for file_slice in item.slices} for item in items}
        self._items_of_file = Counter(path for paths in self._files.values() for path in paths)
        self._num_files = len(self._items_of_file)
        self._total_bytes = sum(self._sizes.values())
        self._items = self._read_bytes = self._text_bytes = self._tokens = 0
        self._start = self._logged = time.perf_counter()
        self._bar = tqdm(
            total=self._total_bytes,
            desc=title,
            unit="B",
            unit_scale=True,
            bar_format="{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]",
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def add(self, index: int, text_bytes: int, tokens: int, *, is_last: bool = True) -> None:
        """Count work item ``index``, or a part of it, as done."""
        self._text_bytes += text_bytes
        self._tokens += tokens
        size_bytes = 0
        if is_last:
            self._items += 1
            size_bytes = self._sizes[index]
            self._read_bytes += size_bytes
            for path in self._files[index]:
                self._items_of_file[path] -= 1
                if not self._items_of_file[path]:
                    del self._items_of_file[path]
        self._bar.set_postfix_str(self._speed(), refresh=False)
        self._bar.update(size_bytes)
        now = time.perf_counter()
        if self._bar.disable and (now - self._logged >= LOG_SECONDS or self._items == self._num_items):
            self._logged = now
            logger.info("%s: %s, %s", self._title, self._share(), self._speed())

    def close(self) -> None:
        self._bar.close()

    def _share(self) -> str:
        share = self._read_bytes / max(1, self._total_bytes)
        seconds = time.perf_counter() - self._start
        left = f", {format_seconds(seconds * (1 - share) / share)} left" if 0 < share < 1 else ""
        return f"item {self._items:,} of {self._num_items:,} ({share:.0%}{left})"

    def _speed(self) -> str:
        seconds = max(1e-9, time.perf_counter() - self._start)
        megabytes = self._text_bytes / 1e6
        files = f"{self._num_files - len(self._items_of_file):,} of {self._num_files:,} files"
        tokens = (
            f", {self._tokens / 1e6:,.1f} M tokens, {self._tokens / 1e6 / seconds:,.2f} M/s" if self._tokens else ""
        )
        if not self._text_bytes:
            return files
        return f"{files}, {megabytes:,.1f} MB of text, {format_rate(self._text_bytes / seconds)}{tokens}"
