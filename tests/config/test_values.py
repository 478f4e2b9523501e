"""Values that no setting can have, for every field of every job: one sentence before anything starts, no traceback."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from pipeline.config.command_line import parse_flags
from pipeline.config.data import DemoConfig, ImportShardsConfig, TokenizeConfig, TrainTokenizerConfig
from pipeline.config.inference import EvaluateConfig, ExportConfig, GenerateConfig, ServeConfig
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError

NEEDED: dict[type[Any], dict[str, Any]] = {
    PretrainConfig: {},
    DemoConfig: {},
    TokenizeConfig: {},
    TrainTokenizerConfig: {},
    ImportShardsConfig: {"train": "a.bin", "val": "b.bin"},
    EvaluateConfig: {},
    GenerateConfig: {},
    ExportConfig: {},
    ServeConfig: {},
    SweepConfig: {"vary": ("lr=1,2",)},
}
"""Every config, with the values that it cannot be made without."""
MAY_BE = {  # what has a meaning although it is odd
    (PretrainConfig, "grad_clip", "inf"),
    (PretrainConfig, "sample_prompt", ""),
    *((config, "column_separator", "") for config in (TokenizeConfig, TrainTokenizerConfig)),
    (GenerateConfig, "prompt", ""),
}


def fields_of(*kinds: type[Any]) -> list[Any]:
    """(config, name of a field) of all fields whose type has one of these in it."""
    found = []
    for config in NEEDED:
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            hint = hints[field.name]
            parts = {hint, *(() if get_origin(hint) is tuple else get_args(hint))}
            if parts & set(kinds):
                found.append(pytest.param(config, field.name, id=f"{config.__name__}-{field.name}"))
    return found


def make(config: type[Any], name: str, value: Any) -> Any:
    return config(**{**NEEDED[config], name: value})


def is_refused(config: type[Any], name: str, value: Any) -> bool:
    """Whether the value is answered with a UserError that names the field; any other error fails the test."""
    try:
        make(config, name, value)
    except UserError as error:
        assert name.replace("_", "") in str(error).replace("_", "").replace(" ", ""), str(error)
        return True
    return False


@pytest.mark.parametrize(("config", "name"), fields_of(float))
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_is_finite(config: type[Any], name: str, value: str) -> None:
    assert is_refused(config, name, float(value)) or (config, name, value) in MAY_BE


@pytest.mark.parametrize(("config", "name"), fields_of(int))
@pytest.mark.parametrize("value", [2**64, -(2**64)])
def test_a_whole_number_is_one_that_can_be_counted_to(config: type[Any], name: str, value: int) -> None:
    assert is_refused(config, name, value)


@pytest.mark.parametrize(("config", "name"), fields_of(str))
@pytest.mark.parametrize("value", ["", "a\0b"])
def test_a_text_is_not_empty(config: type[Any], name: str, value: str) -> None:
    free = {"sample_prompt", "prompt", "column_separator", "document_separator", "text_column", "train", "val"}
    if value and name in free:
        make(config, name, value)
        return
    assert is_refused(config, name, value) or (config, name, value) in MAY_BE


@pytest.mark.parametrize(("config", "name"), fields_of(int, float))
@pytest.mark.parametrize("value", [0, -1])
def test_nothing_and_less_are_taken_or_refused_by_name(config: type[Any], name: str, value: int) -> None:
    """What they mean, the tests of each field say; here no other error than a sentence may come."""
    hint = get_type_hints(config)[name]
    number = float(value) if float in {hint, *get_args(hint)} else value
    is_refused(config, name, number)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--grad_clip=-1"], "grad_clip is -1.0; it must be positive, or 0, with which gradients are never scaled"),
        (["--grad_clip=nan"], "grad_clip is nan"),
        (["--beta1=1.0"], r"beta1 is 1.0; it must lie in \[0, 1\)"),
        (["--beta2=1"], r"beta2 is 1.0; it must lie in \[0, 1\)"),
        (["--beta2=-0.1"], r"beta2 is -0.1; it must lie in \[0, 1\)"),
        (["--eps=0"], "eps is 0.0; it must be positive"),
        (["--lr=-1e-3"], "lr is -0.001; it must not be negative"),
        (["--lr=nan"], "lr is nan; it must be a finite number"),
        (["--lr=1e400"], "lr is inf; it must be a finite number"),
        (["--weight_decay=-1"], "weight_decay is -1.0; it must not be negative"),
        (["--seed=-1"], "seed is -1; it must lie between 0 and 9223372036854775807"),
        ([f"--seed={2**63}"], "seed is 9223372036854775808; it must lie between 0 and"),
        (["--max_failures=-2"], "max_failures is -2; it must not be below -1"),
        (["--resize_seconds=inf"], "resize_seconds is inf; it must be a finite number"),
        (["--muon_coefficients", "nan", "1", "1"], "muon_coefficients is nan; it must be a finite number"),
        (["--output="], "output is empty; give a value, or leave it out"),
        (["--checkpoint="], "checkpoint is empty; give a value, or leave it out"),
        (["--experiment", " "], "experiment is empty; give a value, or leave it out"),
    ],
)
def test_training(flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_flags(PretrainConfig, flags, "pretrain")


def test_clipping_may_be_off_and_seeds_may_be_large() -> None:
    assert parse_flags(PretrainConfig, ["--grad_clip=0"], "pretrain").grad_clip == 0
    assert math.isinf(parse_flags(PretrainConfig, ["--grad_clip=inf"], "pretrain").grad_clip)
    assert parse_flags(PretrainConfig, [f"--seed={2**63 - 1}"], "pretrain").seed == 2**63 - 1
    assert parse_flags(PretrainConfig, ["--sample_prompt="], "pretrain").sample_prompt == ""
    assert parse_flags(PretrainConfig, ["--lr=0"], "pretrain").lr == 0


@pytest.mark.parametrize(("seed", "samples", "fits"), [(2**63 - 3, 3, True), (2**63 - 2, 3, False), (-5, 1, True)])
def test_the_seeds_of_all_texts_fit(seed: int, samples: int, fits: bool) -> None:
    if fits:
        assert GenerateConfig(seed=seed, num_samples=samples).seed == seed
    else:
        with pytest.raises(
            UserError, match=rf"seed is {seed}; it must lie between -9223372036854775808 and {2**63 - 3}"
        ):
            GenerateConfig(seed=seed, num_samples=samples)
