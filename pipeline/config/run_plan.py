"""What --dry_run says of a training run: parameters, FLOPs, tokens, passes over the data, hours, dollars."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.size_rules import RECIPE_VOCABULARY
from pipeline.config.training import PretrainConfig, worker_range

H100_FLOPS_PER_SECOND = 472_000 * 854_438_400
"""FLOPs a second of one H100, counted as for MFU: the estimate of docs/performance.md ("Estimate by part") for the
recipe, 472,000 tokens a second of 854,438,400 FLOPs each. An estimate: it has not been measured."""

USEFUL_PASSES = 16
"""Passes over the same text beyond which the loss hardly falls (Muennighoff et al., Scaling Data-Constrained Language
Models, 2023, figure 3)."""

Rows = list[tuple[str, str]]


def describe_run(
    config: PretrainConfig,
    *,
    vocab_size: int | None = None,
    train_tokens: int | Sequence[int] | None = None,
    data_error: str = "",
) -> Rows:
    """Names and sentences: what the run is and what it takes.

    Args:
        vocab_size: token ids of the data; not given: --vocab_size or the recipe's.
        train_tokens: tokens in the data's train set, of a mixture in that of each folder; not given: passes are not
            counted.
        data_error: why these two are not known, a sentence without a full stop.
    """
    vocabulary = vocab_size or config.vocab_size or RECIPE_VOCABULARY
    model = config.model_config(vocabulary)
    tokens = config.train_steps * config.tokens_per_step
    flops = model.flops_per_token()
    assumed = "" if vocab_size else ", as long as there are no data"
    without_embedding = model.num_parameters - vocabulary * model.d_model
    rows = [
        ("parameters", f"{model.num_parameters:,}, of which {without_embedding:,} are not in the embedding"),
        ("shape", f"{model.num_layers} layers of width {model.d_model:,}, {model.num_heads} heads of {model.head_dim}, "
         f"SwiGLU {model.d_ff:,}, {vocabulary:,} token ids{assumed}"),
        ("FLOPs", f"{flops:,} per token, as MFU counts them, and {tokens * flops:.3g} in all"),
        ("tokens", f"{tokens:,}, in {config.train_steps:,} steps of {config.tokens_per_step:,}"),
        *_data_rows(config, train_tokens, data_error),
    ]  # fmt: skip
    return [*rows, *_time_and_cost(config, tokens=tokens, flops_per_token=flops)]


def opening(config: PretrainConfig, *, vocab_size: int, train_tokens: int | Sequence[int]) -> tuple[str, str | None]:
    """What a run is, in one line, and a warning where it reads little text again and again.

    Args:
        vocab_size: token ids of the data.
        train_tokens: tokens in the data's train set, of a mixture in that of each folder.
    """
    parameters = config.model_config(vocab_size).num_parameters
    tokens = config.train_steps * config.tokens_per_step
    line = (
        f"training {parameters:,} parameters for {config.train_steps:,} steps of {config.tokens_per_step:,} tokens: "
        f"{tokens:,} tokens, "
    )
    each = [train_tokens] if isinstance(train_tokens, int) else train_tokens
    if len(each) > 1:
        return line + "mixed of " + "; ".join(_mixed_passes(config, each)), _mixed_warning(config, each)
    passes = tokens / max(1, each[0])
    line += f"{passes:,.2f} passes over the {each[0]:,} of {config.mixture.folders[0]}"
    if passes <= USEFUL_PASSES:
        return line, None
    return line, (
        f"the text is read {passes:,.0f} times; beyond some {USEFUL_PASSES} passes a network learns next to nothing "
        "new from it: give more text, or fewer --train_steps"
    )


def _data_rows(config: PretrainConfig, train_tokens: int | Sequence[int] | None, data_error: str) -> Rows:
    if not train_tokens:
        return [("data", f"passes are not counted: {data_error}")]
    each = [train_tokens] if isinstance(train_tokens, int) else train_tokens
    if len(each) == 1:
        return [("data", _passes(config, each[0]))]
    warning = _mixed_warning(config, each)
    sentences = [*_mixed_passes(config, each), *([warning] if warning else [])]
    return [("" if number else "data", sentence) for number, sentence in enumerate(sentences)]


def _mixed_passes(config: PretrainConfig, train_tokens: Sequence[int]) -> list[str]:
    """A phrase for each folder: its share of the run's tokens, and how often it is read."""
    mixture = config.mixture
    shares, passes = mixture.shares(config.train_steps), _passes_of_each(config, train_tokens)
    return [
        f"{folder} with {share:.4g} of the tokens, {count:,.2f} passes over its {tokens:,}"
        for folder, share, count, tokens in zip(mixture.folders, shares, passes, train_tokens, strict=True)
    ]


def _mixed_warning(config: PretrainConfig, train_tokens: Sequence[int]) -> str | None:
    often = [
        f"{folder} {count:,.0f} times"
        for folder, count in zip(config.mixture.folders, _passes_of_each(config, train_tokens), strict=True)
        if count > USEFUL_PASSES
    ]
    if not often:
        return None
    return (
        f"the mixture reads {' and '.join(often)}; beyond some {USEFUL_PASSES} passes a network learns next to nothing "
        "new from a text: give these folders lower weights, or more text"
    )


def _passes_of_each(config: PretrainConfig, train_tokens: Sequence[int]) -> list[float]:
    windows = config.train_steps * config.windows_per_step
    shares = config.mixture.shares(config.train_steps)
    each = (tokens // (config.context_length + 1) for tokens in train_tokens)
    return [share * windows / max(1, own) for share, own in zip(shares, each, strict=True)]


def _passes(config: PretrainConfig, train_tokens: int) -> str:
    windows = train_tokens // (config.context_length + 1)
    if not windows:
        return f"{train_tokens:,} tokens, fewer than one window of {config.context_length:,}"
    passes = config.train_steps * config.windows_per_step / windows
    return f"{passes:,.2f} passes over the {train_tokens:,} tokens of {config.mixture.folders[0]}"


def _time_and_cost(config: PretrainConfig, *, tokens: int, flops_per_token: int) -> Rows:
    speed, note = config.tokens_per_second, "as given"
    if speed is None and config.device != "cpu":
        speed = H100_FLOPS_PER_SECOND / flops_per_token
        note = "an unmeasured estimate for one H100; --tokens_per_second takes a measured figure"
    if speed is None:
        unknown = "unknown: there is no estimate for a CPU; --tokens_per_second takes a measured figure of one worker"
        return [("time", unknown), ("cost", "unknown, as the time is")]
    hours = tokens / speed / 3600
    on_workers = ", ".join(
        f"{hours / count:,.2f} hours on {count} worker{'s' if count > 1 else ''}"
        for count in sorted(set(worker_range(config.num_workers)))
    )
    price = config.price_per_hour
    cost = "unknown: no price was given; --price_per_hour takes the dollars of one worker (a GPU or a CPU) per hour"
    if price is not None:
        cost = f"${hours * price:,.2f} for {hours:,.2f} worker hours at ${price:,.2f}"
    return [
        ("speed", f"{speed:,.0f} tokens/s per worker, {note}"),
        ("time", f"{on_workers}, without evaluations, checkpoints and starts"),
        ("cost", cost),
    ]
