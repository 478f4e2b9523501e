"""What --data and --phase say: the folders of shards, and the weights by which their tokens are mixed, by step.

One folder stands as it is. Of several, each is FOLDER:WEIGHT, divided at the last colon behind which a number stands. A
phase is the step from which its weights hold, and its folders; a folder that it does not name is not read in it.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from pipeline.config.settings import require

MOST_PARTS = 10_000
"""Weights are whole numbers of parts, so many at most: the data order keeps a table of as many steps."""

_WEIGHTED = re.compile(
    r"(?P<folder>.+):(?P<weight>[-+]?(\d{1,15}(\.\d{0,15})?|\.\d{1,15})([eE][-+]?\d{1,2})?)", re.DOTALL
)
_Weights = dict[str, Fraction]


class Phase(NamedTuple):
    """Steps of a run with the same weights."""

    first_step: int
    """The first step, counted from 0."""
    parts: tuple[int, ...]
    """Weight of each folder in whole numbers without a common divisor; 0 for one that is not read."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The folders of a run in the order in which they are named first, and its phases."""

    folders: tuple[str, ...]
    phases: tuple[Phase, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the folders are called in metrics: the last part of each, with - for signs that MLflow does not take."""
        return tuple(_name(folder) for folder in self.folders)

    @property
    def weights(self) -> tuple[float, ...]:
        """Shares of the folders in the tokens of the first phase; they sum up to 1."""
        return _shares(self.phases[0])

    def shares(self, num_steps: int) -> tuple[float, ...]:
        """Shares of the folders in the tokens of the first ``num_steps`` steps."""
        ends = [*(phase.first_step for phase in self.phases[1:]), num_steps]
        steps = [max(0, min(end, num_steps) - phase.first_step) for phase, end in zip(self.phases, ends, strict=True)]
        return tuple(
            sum(share * count for share, count in zip(shares, steps, strict=True)) / num_steps
            for shares in zip(*map(_shares, self.phases), strict=True)
        )


def read_mixture(data: str | Sequence[str], phase: Sequence[str]) -> Mixture:
    """The mixture that these settings of PretrainConfig say; UserError where they make no sense."""
    if isinstance(data, str) and not phase:
        return Mixture(folders=(data,), phases=(Phase(0, (1,)),))
    texts = [data] if isinstance(data, str) else list(data)
    weights = {0: _read_weights("data", texts), **_read_phases(phase)}
    folders = tuple(dict.fromkeys(itertools.chain.from_iterable(weights.values())))
    phases = tuple(Phase(step, _parts(found, folders)) for step, found in weights.items())
    if len(folders) == 1:
        return Mixture(folders=folders, phases=phases[:1])
    mixture = Mixture(folders=folders, phases=phases)
    for (one, name), (other, other_name) in itertools.combinations(zip(folders, mixture.names, strict=True), 2):
        require(
            name != other_name,
            f"data folders {one} and {other} would both be called {name} in the metrics; give one of them another name",
        )
    return mixture


def check_phases(mixture: Mixture, train_steps: int) -> None:
    """UserError where a phase begins behind the last step."""
    last = mixture.phases[-1].first_step
    require(
        last < train_steps,
        f"phase {last} begins after the last step, train_steps {train_steps}; leave it out, or raise train_steps",
    )


def with_folders(
    data: str | tuple[str, ...], phase: tuple[str, ...], change: Callable[[str], str]
) -> tuple[str | tuple[str, ...], tuple[str, ...]]:
    """The same settings with every folder changed."""

    def changed(text: str) -> str:
        match = _WEIGHTED.fullmatch(text)
        return f"{change(match['folder'])}:{match['weight']}" if match else change(text)

    phases = tuple(text if text.isdecimal() else changed(text) for text in phase)
    if isinstance(data, str):
        return (changed(data) if phase else change(data)), phases
    return tuple(map(changed, data)), phases


def _read_phases(phase: Sequence[str]) -> dict[int, _Weights]:
    """First step -> weights."""
    found: dict[int, list[str]] = {}
    last = 0
    for text in phase:
        if text.isdecimal():
            require(
                int(text) > last,
                f"phase {text} does not begin after {f'phase {last}' if last else 'the first step'}; phases come in "
                "the order of their steps, from step 1 on",
            )
            last = int(text)
            found[last] = []
        else:
            require(
                bool(found),
                f"phase begins with {text}; first comes the number of steps after which it begins, as in "
                "--phase 6000 data/web:0.2 data/books:0.8",
            )
            found[last].append(text)
    return {step: _read_weights(f"phase {step}", texts) for step, texts in found.items()}


def _read_weights(what: str, texts: Sequence[str]) -> _Weights:
    require(bool(texts), f"{what} names no folder; give each as FOLDER:WEIGHT, for instance data/web:0.7")
    weights: _Weights = {}
    for text in texts:
        require(bool(text.strip()) and "\0" not in text, f"{what} names the folder {text!r}; give the name of one")
        match = _WEIGHTED.fullmatch(text)
        folder = _plain(match["folder"] if match else text)
        require(
            match is not None or len(texts) == 1,
            f"{what} names {len(texts)} folders, and {folder} has no weight; give each as FOLDER:WEIGHT, for instance "
            f"{folder}:0.3",
        )
        weight = Fraction(match["weight"]) if match else Fraction(1)
        require(
            weight > 0,
            f"{what} gives {folder} the weight {match and match['weight']}; it must be positive, and a folder that is "
            "not to be read is left out",
        )
        require(folder not in weights, f"{what} names the folder {folder} twice; give it once, with one weight")
        weights[folder] = weight
    total = sum(weights.values())
    parts = [weight / total for weight in weights.values()]
    require(
        math.lcm(*(part.denominator for part in parts)) <= MOST_PARTS,
        f"{what} has weights that are no multiples of 1/{MOST_PARTS:,} of their sum; round them, for instance to "
        + " ".join(f"{folder}:{rounded}" for folder, rounded in zip(weights, _rounded(parts), strict=True)),
    )
    return weights


def _rounded(shares: Sequence[Fraction]) -> list[str]:
    """Shares of 1 in at most four digits, which sum up to 1: the largest takes what is left."""
    parts = [max(1, round(share * MOST_PARTS)) for share in shares]
    parts[parts.index(max(parts))] += MOST_PARTS - sum(parts)
    return [f"{part / MOST_PARTS:g}" for part in parts]


def _parts(weights: _Weights, folders: Sequence[str]) -> tuple[int, ...]:
    scale = math.lcm(*(weight.denominator for weight in weights.values()))
    parts = [int(weights.get(folder, Fraction(0)) * scale) for folder in folders]
    return tuple(part // math.gcd(*parts) for part in parts)


def _shares(phase: Phase) -> tuple[float, ...]:
    return tuple(part / sum(phase.parts) for part in phase.parts)


def _plain(folder: str) -> str:
    """The folder without the spellings that mean the same: A/, ./A and A//B."""
    return folder.rstrip("/") if "://" in folder else os.path.normpath(folder)


def _name(folder: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", _plain(folder).rpartition("/")[2])
