"""The trials of a sweep: a function of its settings and its seed alone, so that the same command has the same trials.

What differs is written --vary NAME=VALUE,VALUE,... or NAME=LOW..HIGH[:log]. Values stay the text of a flag, and go
through the parser of jobs/pretrain.py with the flags that all trials share.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_type_hints

from pipeline.config.command_line import as_flags, is_whole, parse_flags
from pipeline.config.settings import require
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.paths import resolve_output

PROGRAM = "jobs/sweep.py"
_OF_THE_SWEEP = {"output", "dry_run", "experiment", "tracking_uri", "registered_model"}
_NUMBER = r"[-+]?[\d.]+(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})(?P<log>:log)?")
_FIRST = ["--registered_model=none"]  # unless a later flag asks for it: every trial would register its best checkpoint
_MOST_DRAWS = 1000  # of a trial that no earlier one equals


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of a sweep."""

    name: str
    """Name of its run folder in the folder of the sweep."""
    varied: dict[str, str]
    """The settings that differ between trials, as the text of a flag."""
    config: PretrainConfig

    @property
    def label(self) -> str:
        """Its name and what is special about it."""
        return f"{self.name} ({', '.join(f'{name} {value}' for name, value in self.varied.items())})"


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Numbers between two bounds, both included."""

    low: float
    high: float
    is_log: bool
    is_whole: bool

    def draw(self, generator: random.Random) -> str:
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        if self.is_whole and not self.is_log:
            return str(generator.randint(int(low), int(high)))
        drawn = generator.uniform(low, high)
        value = math.exp(drawn) if self.is_log else drawn
        return str(round(value)) if self.is_whole else f"{value:.4g}"


_Choice = list[str] | _Range


def plan_trials(config: SweepConfig, shared: Sequence[str]) -> list[Trial]:
    """All trials, in the order in which they begin.

    Args:
        shared: the flags of jobs/pretrain.py that hold for every trial.

    Raises:
        UserError: a setting cannot be varied so, or the settings of a trial contradict each other.
    """
    choices = _read_choices(config)
    settings = _combinations(choices) if config.search == "grid" else _draws(choices, config)
    output = resolve_output(config.output)
    width = max(3, len(str(len(settings) - 1)))
    return [_trial(f"trial-{index:0{width}d}", varied, shared, str(output)) for index, varied in enumerate(settings)]


def _read_choices(config: SweepConfig) -> dict[str, _Choice]:
    names = [field.name for field in dataclasses.fields(PretrainConfig)]
    choices: dict[str, _Choice] = {}
    for text in config.vary:
        name, equals, values = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        require(bool(equals and values), f"--vary {text} has no values; write for instance lr=1e-3,3e-3")
        require(name in names, f"--vary {text}: jobs/pretrain.py has no setting {name}; its --help lists them")
        require(name not in _OF_THE_SWEEP, f"--vary {text}: {name} is the same for all trials of a sweep")
        require(name not in choices, f"--vary names {name} twice; give all its values at once")
        choices[name] = _read_choice(name, text, values.strip(), config.search)
    return choices


def _read_choice(name: str, text: str, values: str, search: str) -> _Choice:
    match = _RANGE.fullmatch(values)
    if match is None:
        listed = [value.strip() for value in values.split(",")]
        require(len(set(listed)) == len(listed), f"--vary {text} names a value twice")
        return listed
    require(search == "random", f"--vary {text}: a grid has no ranges; list the values, or give --search random")
    try:
        low, high = float(match["low"]), float(match["high"])
    except ValueError:
        raise UserError(f"--vary {text}: the bounds of a range are numbers, for instance lr=1e-4..1e-2:log") from None
    is_log = match["log"] is not None
    require(low < high, f"--vary {text}: the lower bound comes first and is below the upper one")
    require(not is_log or low > 0, f"--vary {text}: the bounds of a logarithmic range are positive")
    return _Range(low=low, high=high, is_log=is_log, is_whole=is_whole(PretrainConfig, name))


def _combinations(choices: dict[str, _Choice]) -> list[dict[str, str]]:
    lists = [choice for choice in choices.values() if isinstance(choice, list)]
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*lists)]


def _draws(choices: dict[str, _Choice], config: SweepConfig) -> list[dict[str, str]]:
    """Different settings, each drawn independently of those before."""
    assert config.num_trials is not None
    generator = random.Random(config.search_seed)
    found: list[dict[str, str]] = []
    for _ in range(config.num_trials):
        for _ in range(_MOST_DRAWS):
            drawn = {
                name: choice.draw(generator) if isinstance(choice, _Range) else generator.choice(choice)
                for name, choice in choices.items()
            }
            if drawn not in found:
                found.append(drawn)
                break
        else:
            raise UserError(
                f"--vary has hardly more than {len(found)} different combinations, fewer than num_trials "
                f"{config.num_trials}; lower it, or take --search grid"
            )
    return found


def _trial(name: str, varied: dict[str, str], shared: Sequence[str], output: str) -> Trial:
    hints = get_type_hints(PretrainConfig)
    flags = [
        flag
        for setting, value in varied.items()
        for flag in (
            as_flags({setting: value == "true"})
            if hints[setting] is bool and value in ("true", "false")
            else [f"--{setting}={value}"]
        )
    ]
    try:
        config = parse_flags(PretrainConfig, [*_FIRST, *shared, *flags, f"--output={output}/{name}"], PROGRAM)
    except UserError as error:
        raise UserError(f"{Trial(name=name, varied=varied, config=PretrainConfig()).label}: {error}") from error
    return Trial(name=name, varied=varied, config=config)
