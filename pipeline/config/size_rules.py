"""The size rules: what --depth fills in where nothing is given, from a reference point; and what holds without it.

The rules are those of nanochat (karpathy/nanochat, scripts/base_train.py at commit 00255c19), where N counts the
matrices of the blocks and the output projection, D tokens of the run, B tokens of a step:

    width    64 x depth, up to a multiple of 128; heads 128 wide; SwiGLU 8/3 of the width, up to a multiple of 64
    tokens   D = tokens_per_parameter x N
    batch    B = B0 x (D / D0)^0.383 ("Power Lines", arXiv 2505.13738), the nearest power of two
    rates    each learning rate x sqrt(B / B0); one that is not given and follows lr is scaled with it
    decay    x sqrt(B / B0) x D0 / D, so that B / (rate x decay x D) stays the same (arXiv 2405.13698)

The reference point is depth 12 with the same tokens_per_parameter and the same vocabulary, so D / D0 = N / N0. There
B0 = 524,288 tokens, which nanochat measured to be best at that depth and which the recipe has; the recipe's learning
rate of 18e-4 and weight decay of 0.1 (docs/design.md, section 5) go with it. Published runs of this network have that
rate and that batch for 5 billion tokens (modded-nanogpt, June 2024) and for 42 (GPT-2.5), so neither depends on
tokens_per_parameter. For Muon the rules are an assumption, in nanochat too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from model.config import ModelConfig
from pipeline.config.settings import require
from pipeline.errors import UserError

RECIPE_VOCABULARY = 50_257
"""Ids of the recipe's tokenizer, which are counted where --vocab_size is not given."""
SHAPE = {"num_layers": 12, "num_heads": 12, "d_model": 768, "d_ff": 2048}
"""The recipe's network, without --depth."""
RUN = {"train_steps": 80_000, "tokens_per_step": 524_288, "batch_size": 32}
"""The recipe's run, without --depth; with it, its tokens_per_step and batch_size belong to the reference point."""
RATES = {"lr": 18e-4}
"""Learning rates of the reference point. All are scaled by the same rule."""
WEIGHT_DECAY = 0.1
"""Weight decay of the reference point."""

_REFERENCE_DEPTH = 12
_WIDTH_PER_LAYER = 64
_HEAD_WIDTH = 128
_FEED_FORWARD_MULTIPLE = 64
_BATCH_EXPONENT = 0.383
_REFERENCE_ACTIVATIONS = RUN["batch_size"] * 1024 * SHAPE["num_layers"] * SHAPE["d_model"]


def fill_in(given: Mapping[str, Any], *, num_workers: int) -> dict[str, Any]:
    """The settings in ``given`` that are None and that have a rule, with their values.

    Args:
        given: the fields of PretrainConfig; those that are not None stay as they are, and the others follow from them.
        num_workers: the largest number of workers.

    Raises:
        UserError: depth contradicts num_layers, or the shape is impossible.
    """
    if given["depth"] is None:
        defaults = {**SHAPE, **RUN, **RATES, "weight_decay": WEIGHT_DECAY}
        return {name: value for name, value in defaults.items() if given[name] is None}
    settings = dict(given)

    def fill(name: str, value: Any) -> Any:
        if settings[name] is None:
            settings[name] = value
        return settings[name]

    fill("vocab_size", RECIPE_VOCABULARY)
    _fill_shape(settings, fill)
    size = _matrix_parameters(settings) / _reference_parameters(settings)
    tokens_per_step = fill("tokens_per_step", _tokens_per_step(size, settings["context_length"], num_workers))
    fill("train_steps", max(1, int(settings["tokens_per_parameter"] * _matrix_parameters(settings)) // tokens_per_step))
    fill("batch_size", _micro_batch(settings, num_workers))
    rate_scale = math.sqrt(tokens_per_step / RUN["tokens_per_step"])
    for name, rate in RATES.items():
        fill(name, rate * rate_scale)
    fill("weight_decay", WEIGHT_DECAY * rate_scale / size)
    return {name: value for name, value in settings.items() if value != given[name]}


def _fill_shape(settings: Mapping[str, Any], fill: Callable[[str, Any], Any]) -> None:
    depth, given = settings["depth"], settings["num_layers"]
    require(
        given in (None, depth),
        f"depth {depth} and num_layers {given} contradict each other; leave num_layers out (--num_layers None takes "
        "back what a preset gives, as it does for every other setting that depth is to fill in)",
    )
    fill("num_layers", depth)
    width = fill("d_model", width_of_depth(depth))
    fill("num_heads", heads_of_width(width))
    fill("d_ff", math.ceil(8 * width / 3 / _FEED_FORWARD_MULTIPLE) * _FEED_FORWARD_MULTIPLE)


def width_of_depth(depth: int) -> int:
    """Width of the residual stream: 64 x depth, up to the next multiple of 128, so that heads of 128 divide it.

    An odd depth is therefore as wide as the even one above it.
    """
    return math.ceil(_WIDTH_PER_LAYER * depth / _HEAD_WIDTH) * _HEAD_WIDTH


def heads_of_width(width: int) -> int:
    """Heads of 128; where they do not divide ``width``, the widest narrower heads that do, of an even width.

    A width without such heads gets the number that 128 asks for, which ModelConfig then refuses with its own sentence.
    """
    most = max(1, math.ceil(width / _HEAD_WIDTH))
    return next((heads for heads in range(most, width // 2 + 1) if width % (2 * heads) == 0), most)


def _matrix_parameters(settings: Mapping[str, Any]) -> int:
    """N of the network: the parameters of its matrix products, with the output projection and without the embedding."""
    names = ("vocab_size", "context_length", "num_layers", "num_heads", "d_model", "d_ff")
    try:
        return ModelConfig(**{name: settings[name] for name in names}).num_matrix_parameters
    except ValueError as error:
        raise UserError(str(error)) from error


def _reference_parameters(settings: Mapping[str, Any]) -> int:
    """N of depth 12 with the same vocabulary: N0."""
    return _matrix_parameters({**SHAPE, "vocab_size": settings["vocab_size"], "context_length": 1024})


def _tokens_per_step(size: float, context_length: int, num_workers: int) -> int:
    """The nearest power of two, in whole windows, and no fewer windows than there are workers."""
    ideal = RUN["tokens_per_step"] * size**_BATCH_EXPONENT
    tokens: int = 2 ** round(math.log2(ideal))
    return max(round(tokens / context_length), num_workers) * context_length


def _micro_batch(settings: Mapping[str, Any], num_workers: int) -> int:
    """Windows of a micro-batch: those that make grad_accum_steps; without it, those with the memory of the recipe's.

    Activations grow with context_length x layers x width: the largest power of two that has no more of them than 32
    windows of the recipe, at most 32 windows and at most those that a worker has.
    """
    windows = math.ceil(settings["tokens_per_step"] / settings["context_length"] / num_workers)
    if settings["grad_accum_steps"]:
        return math.ceil(windows / settings["grad_accum_steps"])
    per_window = settings["context_length"] * settings["num_layers"] * settings["d_model"]
    fitting = max(1, min(RUN["batch_size"], _REFERENCE_ACTIVATIONS // per_window))
    return min(windows, 2 ** int(math.log2(fitting)))
