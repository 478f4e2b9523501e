"""--depth against values worked out by hand from the rules as nanochat states them; a value that is given wins."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.command_line import resolve
from pipeline.config.settings import to_dict
from pipeline.config.size_rules import fill_in, heads_of_width, width_of_depth
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError


def pretrain(*flags: str) -> PretrainConfig:
    return resolve(PretrainConfig, "pretrain", flags, program="jobs/pretrain.py")


# Parameters of the blocks' matrices: layers x (4 width^2 + 3 width x feed-forward); of the output: ids x width.
N_4 = 4 * (4 * 256**2 + 3 * 256 * 704) + 4_096 * 256  # 4,259,840
N_12 = 12 * (4 * 768**2 + 3 * 768 * 2_048) + 50_257 * 768  # 123,532,032
N_12_OF_4096_IDS = 12 * (4 * 768**2 + 3 * 768 * 2_048) + 4_096 * 768  # 88,080,384
N_24 = 24 * (4 * 1_536**2 + 3 * 1_536 * 4_096) + 50_257 * 1_536  # 756,672,000


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        # the reference point: the recipe but for its heads and its tokens; 12 x 123,532,032 / 524,288 = 2,827.4
        (
            ["--depth", "12"],
            {
                **{"num_layers": 12, "d_model": 768, "num_heads": 6, "d_ff": 2_048, "tokens_per_step": 524_288},
                **{"train_steps": 2_827, "batch_size": 32, "lr": 18e-4, "weight_decay": 0.1},
            },
        ),
        # 6.1253^0.383 = 2.002, so twice the batch; 12 x 756,672,000 / 1,048,576 = 8,659.4; four times the activations
        (
            ["--depth", "24"],
            {
                **{"num_layers": 24, "d_model": 1_536, "num_heads": 12, "d_ff": 4_096, "tokens_per_step": 1_048_576},
                **{"train_steps": 8_659, "batch_size": 8, "lr": 18e-4 * 2**0.5},
                "weight_decay": 0.1 * 2**0.5 * N_12 / N_24,  # 0.02309
            },
        ),
        # 0.048363^0.383 = 0.31345 of 524,288 is 164,337, nearest to 2^17; 12 x 4,259,840 / 131,072 = 390 exactly
        (
            ["--depth", "4", "--vocab_size", "4096"],
            {
                **{"num_layers": 4, "d_model": 256, "num_heads": 2, "d_ff": 704, "tokens_per_step": 131_072},
                **{"train_steps": 390, "batch_size": 32, "lr": 9e-4},
                "weight_decay": 0.1 * 0.5 * N_12_OF_4096_IDS / N_4,  # 1.0338
            },
        ),
        # the reference point moves with the tokens a parameter: only the steps change; 84,001,781,760 / 524,288
        (
            ["--depth", "12", "--tokens_per_parameter", "680"],
            {"train_steps": 160_220, "tokens_per_step": 524_288, "lr": 18e-4, "weight_decay": 0.1},
        ),
        # windows of 1,000 tokens: 524.288 of them, so 524; on 600 workers one each
        (["--depth", "12", "--context_length", "1000"], {"tokens_per_step": 524_000, "train_steps": 2_828}),
        (
            ["--depth", "12", "--num_workers", "2:600"],
            {"tokens_per_step": 600 * 1_024, "batch_size": 1, "lr": 18e-4 * (600 / 512) ** 0.5},
        ),
    ],
)
def test_depth_fills_in(flags: list[str], expected: dict[str, Any]) -> None:
    config = pretrain(*flags)
    for name, value in expected.items():
        assert getattr(config, name) == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize(
    ("depth", "width", "heads"), [(1, 128, 1), (2, 128, 1), (3, 256, 2), (12, 768, 6), (25, 1664, 13)]
)
def test_an_odd_depth_is_as_wide_as_the_next(depth: int, width: int, heads: int) -> None:
    assert (width_of_depth(depth), heads_of_width(width)) == (width, heads)


@pytest.mark.parametrize(("width", "heads"), [(192, 2), (100, 1), (130, 5), (320, 4), (2, 1)])
def test_heads_narrower_than_128_where_these_do_not_divide(width: int, heads: int) -> None:
    assert heads_of_width(width) == heads
    assert width % heads == 0 and width // heads % 2 == 0 and width // heads <= 128


GIVEN = {
    **{"num_heads": 4, "d_model": 512, "d_ff": 1_000, "tokens_per_step": 65_536, "train_steps": 77, "batch_size": 3},
    **{"lr": 0.5, "weight_decay": 0.25},
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("way", ["flag", "preset"])
def test_what_is_given_wins(name: str, way: str, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"pretrain: {{depth: 6, {name}: {GIVEN[name]}}}")
    flags = ["--config", str(preset)] if way == "preset" else ["--depth", "6", f"--{name}", str(GIVEN[name])]
    assert getattr(pretrain(*flags), name) == GIVEN[name] != getattr(pretrain("--depth", "6"), name)


def test_what_follows_from_a_given_value_follows_from_it() -> None:
    """A quarter of the batch means half the rate, half the decay and four times the steps."""
    config = pretrain("--depth", "12", "--tokens_per_step", "131072")
    assert (config.lr, config.weight_decay) == (pytest.approx(9e-4), pytest.approx(0.05))
    assert config.train_steps == 12 * N_12 // 131_072 == 11_309
    assert pretrain("--depth", "12", "--d_model", "512").num_heads == 4
    assert pretrain("--depth", "12", "--grad_accum_steps", "8").batch_size == 16


def test_none_takes_back_what_a_preset_gives(tmp_path: Path) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text("pretrain: {num_layers: 12, lr: 1e-3, batch_size: 5}")
    config = pretrain(
        *("--config", str(path), "--depth", "24", "--num_layers", "None", "--lr", "None", "--batch_size=None")
    )
    assert config == pretrain("--depth", "24")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--depth", "0"], "depth is 0; it must be positive"),
        (["--depth", "12", "--tokens_per_parameter", "0"], "tokens_per_parameter is 0.0; it must be positive"),
        (["--vocab_size", "-1"], "vocab_size is -1; it must be positive"),
        (["--depth", "24", "--num_layers", "12"], "depth 24 and num_layers 12 contradict each other; leave num_layers"),
        (["--depth", "12", "--num_heads", "5"], "d_model 768 is not divisible by num_heads 5"),
        (["--depth", "12", "--d_model", "0"], "d_model is 0; it must be a positive whole number"),
        (["--depth", "12", "--context_length", "0"], "context_length is 0; it must be positive"),
        (["--depth", "12", "--num_workers", "0"], "num_workers is 0; it must be positive"),
        (["--depth", "12", "--tokens_per_step", "0"], "tokens_per_step is 0; it must be positive"),
        (["--depth", "12", "--grad_accum_steps", "-1"], "grad_accum_steps is -1; it must be positive"),
        (["--tokens_per_second", "0"], "tokens_per_second is 0.0; it must be positive"),
    ],
)
def test_mistakes_are_one_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        pretrain(*flags)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_is_filled_in_once() -> None:
    """What is recorded of a run is what it had: nothing follows anew where one setting is replaced."""
    config = pretrain("--depth", "6")
    assert PretrainConfig(**to_dict(config)) == config
    longer = dataclasses.replace(config, train_steps=10 * config.train_steps, tokens_per_step=1024 * 512)
    assert (longer.lr, longer.weight_decay, longer.d_model) == (config.lr, config.weight_decay, config.d_model)
    assert fill_in(vars(config), num_workers=4) == {}


@pytest.mark.parametrize("depth", range(1, 65))
def test_every_depth_gives_a_run_that_fits_its_workers(depth: int) -> None:
    for num_workers in (1, 3, 8):
        config = PretrainConfig(depth=depth, num_workers=num_workers)  # checks shape, batch and schedule
        assert config.num_layers == depth and config.d_model % 128 == config.d_ff % 64 == 0
        windows = math.ceil(config.windows_per_step / num_workers)
        activations = config.micro_batch * depth * config.d_model
        assert 1 <= config.micro_batch <= windows and (activations <= 32 * 12 * 768 or config.micro_batch == 1)


def test_data_of_another_vocabulary_are_refused() -> None:
    pretrain().check_vocab_size(4_096)
    pretrain("--depth", "4", "--vocab_size", "4096").check_vocab_size(4_096)
    sentence = "the data have 4,096 token ids, but the settings count on 50257; give --vocab_size 4096"
    with pytest.raises(UserError, match=sentence):
        pretrain("--depth", "4").check_vocab_size(4_096)
