"""What rules do to a sample of documents, on one page that needs no other file: counts, examples, histograms.

A document is an example by the hash of its text, not by when it came, so the page depends on the documents alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import xxhash

from pipeline.filters import languages
from pipeline.filters.personal_data import masked
from pipeline.filters.rules import GROUPS, LANGUAGE, LANGUAGE_SCORE, Rules, bounds_of
from pipeline.filters.words import above, below

KEPT = ""
NOTHING_LEFT = "nothing left"
_TEMPLATE = Path(__file__).with_name("report.html")
_EXAMPLES = {KEPT: 8}
_EXAMPLES_OF_A_RULE = 3
_EXAMPLE_CHARACTERS = 600
_BINS = 40
_WIDTH, _HEIGHT = 300, 80  # of a histogram, in its own units


class Example(NamedTuple):
    """The beginning of a document."""

    order: int
    """Hash of the whole text."""
    text: str
    characters: int
    """Of the whole text."""


@dataclasses.dataclass
class Sample:
    """What the rules did to some documents."""

    rules: Rules
    documents: int = 0
    characters: int = 0
    decisions: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rule with its group in front, or KEPT -> documents."""
    lost: Counter[str] = dataclasses.field(default_factory=Counter)
    """The same in characters; those of lines that C4's rules take out of documents that stay are not counted."""
    values: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)
    """Group and rule -> what was measured of every document that came to it."""
    examples: dict[str, list[Example]] = dataclasses.field(default_factory=dict)

    def add(self, texts: Iterable[str]) -> None:
        """Look at documents, which are not blank."""
        for text in texts:
            decision = self._decide(masked(text) if self.rules.mask_personal_data else text)
            self.documents += 1
            self.characters += len(text)
            self.decisions[decision] += 1
            self.lost[decision] += len(text)
            order = xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace"))
            example = Example(order, _readable(text[:_EXAMPLE_CHARACTERS]), len(text))
            most = _EXAMPLES.get(decision, _EXAMPLES_OF_A_RULE)
            self.examples[decision] = sorted([*self.examples.get(decision, []), example])[:most]

    def _decide(self, text: str) -> str:
        for group, before, after, broken in self.rules.steps(text):
            if group == LANGUAGE:
                self.values.setdefault((group, LANGUAGE_SCORE), []).append(languages.likeliest(before)[1])
            if group in GROUPS:
                for rule, value in GROUPS[group].measured(before, bounds_of(self.rules, group)):
                    self.values.setdefault((group, rule), []).append(value)
            if broken:
                return f"{group}: {broken}"
            text = after
        return KEPT if text.strip() else NOTHING_LEFT


class Histogram(NamedTuple):
    """How a rule's values are spread, with bars as (x, y, height) in a picture of 300 x 80."""

    name: str
    bound: str
    beyond: float
    """Share of the documents beyond the bound."""
    low: str
    high: str
    bars: list[tuple[float, float, float]]
    bound_x: float | None
    """Where the bound is drawn; None where it is switched off."""


def render(sample: Sample, *, source: str, counted: Mapping[str, int]) -> str:
    """The page as HTML. ``counted``: reason -> documents left out of the whole source, as the manifest has it."""
    reasons = sorted(set(sample.decisions) - {KEPT}, key=lambda reason: (-sample.decisions[reason], reason))
    own = {reason for reason in counted if ": " in reason or reason == NOTHING_LEFT}
    rows = [
        (
            reason,
            sample.decisions[reason],
            sample.decisions[reason] / max(1, sample.documents),
            sample.lost[reason] / max(1, sample.characters),
            counted.get(reason),
        )
        for reason in [*reasons, *sorted(own - set(reasons))]
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        source=source,
        sample=sample,
        kept=sample.decisions[KEPT],
        kept_examples=sample.examples.get(KEPT, []),
        rows=rows,
        dropped=[(reason, sample.examples[reason]) for reason in reasons],
        histograms=_histograms(sample),
        settings=_settings(sample.rules),
        width=_WIDTH,
        height=_HEIGHT,
        bar=_WIDTH / _BINS,
    )


def _settings(rules: Rules) -> list[str]:
    masking = ["mask_personal_data"] if rules.mask_personal_data else []
    chosen = [f"languages {' '.join(rules.languages)}, language_score {rules.language_score:g}"]
    return [*(chosen if rules.languages else []), *rules.groups, *rules.bounds, *rules.own, *masking]


def _histograms(sample: Sample) -> list[tuple[str, list[Histogram]]]:
    """Group -> histograms of its rules, in the order of the settings."""
    found = []
    if scores := sample.values.get((LANGUAGE, LANGUAGE_SCORE)):
        found.append((LANGUAGE, [histogram(LANGUAGE_SCORE, scores, sample.rules.language_score)]))
    for group in sample.rules.groups:
        bounds = bounds_of(sample.rules, group)
        own = [
            histogram(rule, values, bounds[rule]) for (place, rule), values in sample.values.items() if place == group
        ]
        found.append((group, own))
    return found


def histogram(rule: str, values: Sequence[float], bound: float | None) -> Histogram:
    """A rule's values in 40 bars; the hundredth at either end is in the outermost bars, so that few do not hide all."""
    array: Any = np.array(values, np.float64)
    low, high = np.quantile(array, [0.01, 0.99]).tolist()
    if bound is not None:
        low, high = min(low, bound), max(high, bound)
    high = high if high > low else low + 1
    counts = np.histogram(np.clip(array, low, high), _BINS, (low, high))[0]
    heights = (np.sqrt(counts / max(1, counts.max())) * _HEIGHT).tolist()  # a root shows bars of one document, too
    is_beyond = above if rule.startswith("max_") else below
    return Histogram(
        name=rule,
        bound="off" if bound is None else _number(bound),
        beyond=sum(is_beyond(value, bound) for value in values) / len(values),
        low=_number(low),
        high=_number(high),
        bars=[
            (round(place * _WIDTH / _BINS, 2), round(_HEIGHT - height, 2), round(height, 2))
            for place, height in enumerate(heights)
            if height
        ],
        bound_x=None if bound is None else round((bound - low) / (high - low) * _WIDTH, 2),
    )


def _number(value: float) -> str:
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}".rstrip("0").rstrip(".")


def _readable(text: str) -> str:
    return "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in text)
