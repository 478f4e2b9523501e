"""FineWeb's own rules (Penedo and others 2024, section 3.6): lists, menus and repeated lines go."""

from __future__ import annotations

from pipeline.filters.words import TERMINAL, Bounds, above, below, repeated, share

BOUNDS: dict[str, float | None] = {
    "min_lines_with_terminal_mark": 0.12,
    "max_short_lines": 0.67,
    "short_line_length": 30,
    "max_repeated_line_characters": 0.01,
    "max_line_ends_per_word": 0.3,
}


def broken_rule(text: str, bounds: Bounds) -> str | None:
    """The first rule that a text with at least one word breaks; None: it keeps them all."""
    lines = [line for line in text.split("\n") if line.strip()]
    ended = share(sum(line.endswith(TERMINAL) for line in lines), len(lines))
    short = share(sum(len(line) <= (bounds["short_line_length"] or 0) for line in lines), len(lines))
    again = share(repeated(lines)[1], len(text.replace("\n", "")))
    checks = (
        ("min_lines_with_terminal_mark", below(ended, bounds["min_lines_with_terminal_mark"])),
        ("max_short_lines", above(short, bounds["max_short_lines"])),
        ("max_repeated_line_characters", above(again, bounds["max_repeated_line_characters"])),
        (
            "max_line_ends_per_word",
            above(share(text.count("\n"), len(text.split())), bounds["max_line_ends_per_word"]),
        ),
    )
    return next((name for name, is_broken in checks if is_broken), None)
