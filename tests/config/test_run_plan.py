"""What --dry_run says of a run, in figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.command_line import resolve
from pipeline.config.run_plan import describe_run, opening
from pipeline.config.training import PretrainConfig

ROOT = Path(__file__).resolve().parent.parent.parent


def rows(*flags: str, vocab_size: int | None = None, train_tokens: int | None = None) -> dict[str, str]:
    config = resolve(PretrainConfig, "pretrain", flags, program="jobs/pretrain.py")
    return dict(describe_run(config, vocab_size=vocab_size, train_tokens=train_tokens, data_error="there are none"))


def test_the_recipe() -> None:
    """854,438,400 FLOPs: tests/model/test_config.py. 41.94e9 tokens / 472,000 / 3,600 = 24.684 hours of one GPU."""
    plan = rows("--price_per_hour", "2.69", vocab_size=50_257, train_tokens=9_948_000_000)
    assert plan == {
        "parameters": "123,551,232, of which 84,953,856 are not in the embedding",
        "shape": "12 layers of width 768, 12 heads of 64, SwiGLU 2,048, 50,257 token ids",
        "FLOPs": "854,438,400 per token, as MFU counts them, and 3.58e+19 in all",
        "tokens": "41,943,040,000, in 80,000 steps of 524,288",
        # 80,000 x 512 windows of 9,948,000,000 / 1,025
        "data": "4.22 passes over the 9,948,000,000 tokens of data/gpt2.5",
        "speed": "472,000 tokens/s per worker, an unmeasured estimate for one H100; --tokens_per_second takes a "
        "measured figure",
        "time": "6.17 hours on 4 workers, without evaluations, checkpoints and starts",
        "cost": "$66.40 for 24.68 worker hours at $2.69",
    }


def test_a_measured_speed_on_an_elastic_number_of_workers() -> None:
    """1,024 x 36,000 tokens at 1,024 a second are ten hours of one worker."""
    flags = ["--train_steps", "36000", "--tokens_per_step", "1024", "--context_length", "128", "--device", "cpu"]
    plan = rows(*flags, "--num_workers", "1:4", "--tokens_per_second", "1024", "--price_per_hour", "0.5")
    assert plan["speed"] == "1,024 tokens/s per worker, as given"
    assert (
        plan["time"] == "10.00 hours on 1 worker, 2.50 hours on 4 workers, without evaluations, checkpoints and starts"
    )
    assert plan["cost"] == "$5.00 for 10.00 worker hours at $0.50"


def test_nothing_is_invented() -> None:
    assert rows()["cost"].startswith("unknown: no price was given; --price_per_hour takes")
    assert rows()["data"] == "passes are not counted: there are none"
    on_cpu = rows("--device", "cpu", "--price_per_hour", "2.69")
    assert on_cpu["time"].startswith("unknown: there is no estimate for a CPU; --tokens_per_second takes")
    assert on_cpu["cost"] == "unknown, as the time is" and "speed" not in on_cpu


def test_the_estimate_is_of_flops() -> None:
    """Depth 24 has 6 x 756,672,000 + 12 x 24 x 1,536 x 1,024 FLOPs a token, 5.844 times those of the recipe."""
    assert rows("--depth", "24")["FLOPs"].startswith("4,993,016,832 per token")
    assert rows("--depth", "24")["speed"].startswith("80,772 tokens/s")


def test_an_untied_output_matrix_is_not_in_the_embedding() -> None:
    plan = rows("--no_tie_embeddings")
    assert plan["parameters"] == "162,148,608, of which 123,551,232 are not in the embedding"
    assert rows("--vocab_size", "4096")["shape"].endswith("4,096 token ids, as long as there are no data")


def test_too_little_data() -> None:
    assert rows(vocab_size=300, train_tokens=1_000)["data"] == "1,000 tokens, fewer than one window of 1,024"


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_has_one(preset: Path) -> None:
    plan = rows("--config", str(preset))
    assert plan.keys() >= {"parameters", "FLOPs", "tokens", "data", "time", "cost"}


def test_the_opening_line_counts_passes_and_warns_of_too_many() -> None:
    flags = ["--config", str(ROOT / "configs/small.yaml"), "--train_steps", "1000"]
    config = resolve(PretrainConfig, "pretrain", flags, program="jobs/pretrain.py")
    line, warning = opening(config, vocab_size=4096, train_tokens=4_096_000)
    parameters = 4096 * 256 + 4 * (4 * 256 * 256 + 3 * 256 * 704 + 2 * 256) + 256
    assert line == (
        f"training {parameters:,} parameters for 1,000 steps of 4,096 tokens: 4,096,000 tokens, 1.00 passes over the "
        "4,096,000 of data/small"
    )
    assert warning is None
    _, warning = opening(config, vocab_size=4096, train_tokens=10_240)
    assert warning and warning.startswith("the text is read 400 times; ") and "--train_steps" in warning
