"""FineWeb's own rules (Penedo and others 2024, section 3.6): lists, menus and repeated lines go."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.filters.words import TERMINAL, Bounds, repeated, share

BOUNDS: dict[str, float | None] = {
    "min_lines_with_terminal_mark": 0.12,
    "max_short_lines": 0.67,
    "short_line_length": 30,
    "max_repeated_line_characters": 0.01,
    "max_line_ends_per_word": 0.3,
}


def measured(text: str, bounds: Bounds) -> Iterator[tuple[str, float]]:
    """What each rule measures of a text with at least one word, one after the other, as far as it is asked for."""
    lines = [line for line in text.split("\n") if line.strip()]
    yield "min_lines_with_terminal_mark", share(sum(line.endswith(TERMINAL) for line in lines), len(lines))
    longest = bounds["short_line_length"] or 0
    yield "max_short_lines", share(sum(len(line) <= longest for line in lines), len(lines))
    yield "max_repeated_line_characters", share(repeated(lines)[1], len(text.replace("\n", "")))
    yield "max_line_ends_per_word", share(text.count("\n"), len(text.split()))
