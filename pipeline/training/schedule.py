"""Whether a resumed run keeps to the schedule of its learning rate.

The steps done must have had the rates that the settings of the resume give them: then the run is one that these
settings could have made from its start. Rates are compared as shares of --lr, which may be changed on purpose.
"""

from __future__ import annotations

from dataclasses import fields, replace

from pipeline.checkpoints.metadata import CheckpointInfo
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.storage.folders import Folder
from pipeline.training.optimizer import learning_rate

SETTINGS = (
    *("schedule", "train_steps", "warmup_fraction", "warmup_steps"),
    *("decay_fraction", "decay_from", "min_lr_fraction"),
)


def check_schedule(path: Folder | str, info: CheckpointInfo, config: PretrainConfig) -> None:
    """Check that the steps which checkpoint ``path`` has done lie on the schedule of ``config``.

    Without steps left to do nothing is checked. A setting that an older version did not know had its default.

    Raises:
        UserError: they do not; it says what to give instead.
    """
    if info.step >= config.train_steps:
        return
    defaults = {field.name: field.default for field in fields(PretrainConfig)}
    saved = {name: info.config.get(name, defaults[name]) for name in SETTINGS}
    before, now = (replace(config, **settings, lr=1.0, profile_steps=None, phase=()) for settings in (saved, {}))
    step = last_difference(before, now, info.step)
    if step is None:
        return
    changed = [name for name in SETTINGS if getattr(before, name) != getattr(now, name)]
    raise UserError(
        f"checkpoint {path} was trained with {_listed(before, changed)}, now it is {_listed(now, changed)}; that bends "
        f"the learning rate: in step {step + 1} of the {info.step} done it was {learning_rate(before, step):.4g} of "
        f"--lr, and would have been {learning_rate(now, step):.4g}; {_advice(before, now, info.step)}, or start "
        f"another run from its weights with --checkpoint and a new --output"
    )


def last_difference(before: PretrainConfig, now: PretrainConfig, num_steps: int) -> int | None:
    """The last of the steps 0 to num_steps - 1 whose rate differs; None where all are the same bits."""
    if all(getattr(before, name) == getattr(now, name) for name in SETTINGS):
        return None
    steps = reversed(range(num_steps))
    return next((step for step in steps if learning_rate(before, step) != learning_rate(now, step)), None)


def _advice(before: PretrainConfig, now: PretrainConfig, done: int) -> str:
    """What to give instead, the smallest change first."""
    warmup = before.num_warmup_steps
    if warmup <= (now.first_decay_step if now.schedule == "wsd" else now.train_steps):
        same_start = replace(now, warmup_fraction=None, warmup_steps=warmup)
        if last_difference(before, same_start, done) is None:
            instead = "" if now.warmup_fraction is None else " in place of --warmup_fraction"
            return f"give --warmup_steps {warmup}{instead}"
    if before.schedule == now.schedule == "wsd":
        start = min(before.first_decay_step, now.first_decay_step)
        if start < done:
            return f"go on from a checkpoint of step {start} or before, with --branch_from, --step and a new --output"
    keep = [name for name in SETTINGS if getattr(before, name) != getattr(now, name)]
    flags = " ".join(f"--{name} {getattr(before, name)}" for name in keep)
    return f"give {flags} as before"


def _listed(config: PretrainConfig, names: list[str]) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)
