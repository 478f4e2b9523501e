"""Settings of jobs/sweep.py; those that its trials share are flags of jobs/pretrain.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.settings import require, require_plain, require_positive


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Many training runs with different settings, the trials of a sweep (jobs/sweep.py). Every flag of
    jobs/pretrain.py, and the section pretrain of the preset, is accepted too: these settings hold for all trials."""

    output: str = "sweeps/sweep"
    """Folder of the sweep, with one run folder for each trial; it may be s3://BUCKET/FOLDER or gs://BUCKET/FOLDER. A
    sweep whose folder is given again goes on."""
    vary: tuple[str, ...] = ()
    """Settings of jobs/pretrain.py that differ between trials, which must be given. Each is NAME=VALUE,VALUE,... or, in
    a random search, also NAME=LOW..HIGH, drawn evenly, or NAME=LOW..HIGH:log, drawn evenly in the logarithm."""
    search: Literal["grid", "random"] = "grid"
    """With grid, every combination of the values is a trial; with random, each trial draws a value of each setting."""
    num_trials: int | None = None
    """Number of trials of a random search; a grid has as many as there are combinations."""
    search_seed: int = 1
    """Random seed of the draws of a random search. The seed of each training is --seed."""
    early_stopping: Literal["none", "asha", "median"] = "none"
    """Rule that stops trials by their validation loss, after every validation. With asha, only the best part goes on
    after min_steps, then after reduction_factor times as many, and so on. With median, a trial stops whose best loss is
    worse than the median of the means of the others so far."""
    min_steps: int | None = None
    """Number of steps before which no trial is stopped early. If not given, a tenth of train_steps."""
    reduction_factor: float = 3.0
    """With asha, one trial out of this many goes on at each of its decisions."""
    trials_at_once: int | None = None
    """Number of trials that train at the same time. If not given, as many as the CPUs or GPUs of the cluster hold."""
    dry_run: bool = False
    """Print the trials and their settings, then stop."""

    def __post_init__(self) -> None:
        require_plain(self)
        require_positive(self, "num_trials", "min_steps", "trials_at_once")
        require(self.reduction_factor > 1, f"reduction_factor is {self.reduction_factor:g}; it must be greater than 1")
        require(bool(self.vary), "--vary is missing; say what differs between trials, for instance --vary lr=1e-3,3e-3")
        if self.search == "random":
            require(
                self.num_trials is not None, "--num_trials is missing; a random search has as many trials as it says"
            )
        else:
            require(
                self.num_trials is None,
                f"num_trials is {self.num_trials}, but a grid has as many trials as there are combinations of its "
                "values; leave it out, or give --search random",
            )
