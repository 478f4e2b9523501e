"""What a user sees while text becomes tokens: a bar on a terminal, else a log line every few seconds."""

from __future__ import annotations

import logging
import sys
import time

_LOG_SECONDS = 5.0

logger = logging.getLogger(__name__)


class ItemProgress:
    """Work items: share of the source read, text and tokens made of it, speed."""

    def __init__(self, title: str, total_bytes: int, num_items: int) -> None:
        from tqdm import tqdm

        self._title, self._total_bytes, self._num_items = title, total_bytes, num_items
        self._items = self._read_bytes = self._text_bytes = self._tokens = 0
        self._start = self._logged = time.perf_counter()
        self._bar = tqdm(
            total=total_bytes,
            desc=title,
            unit="B",
            unit_scale=True,
            bar_format="{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]",
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def add(self, size_bytes: int, text_bytes: int, tokens: int) -> None:
        self._items += 1
        self._read_bytes += size_bytes
        self._text_bytes += text_bytes
        self._tokens += tokens
        self._bar.set_postfix_str(self._speed(), refresh=False)
        self._bar.update(size_bytes)
        now = time.perf_counter()
        if self._bar.disable and (now - self._logged >= _LOG_SECONDS or self._items == self._num_items):
            self._logged = now
            share = self._read_bytes / max(1, self._total_bytes)
            logger.info(
                "%s: item %d of %d (%.0f %%), %s", self._title, self._items, self._num_items, 100 * share, self._speed()
            )

    def close(self) -> None:
        self._bar.close()

    def _speed(self) -> str:
        megabytes = self._text_bytes / 1e6
        rate = megabytes / max(1e-9, time.perf_counter() - self._start)
        tokens = f", {self._tokens / 1e6:,.1f} M tokens" if self._tokens else ""
        return f"{megabytes:,.1f} MB of text{tokens}, {rate:,.1f} MB/s"


class MergeProgress:
    """Merges learned of those wanted."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc="merge", unit=" merges", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)
        self._logged = time.perf_counter()

    def __call__(self, done: int, wanted: int) -> None:
        self._bar.total = wanted
        self._bar.update(done - self._bar.n)
        now = time.perf_counter()
        if self._bar.disable and (now - self._logged >= _LOG_SECONDS or done == wanted):
            self._logged = now
            logger.info("merge: %d of %d (%.0f %%)", done, wanted, 100 * done / wanted)

    def close(self) -> None:
        self._bar.close()
