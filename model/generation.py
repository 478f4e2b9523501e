"""Text from the network: one token at a time, greedy or drawn, with keys and values cached.

Same model, tokens, settings and seed: same ids. Every call runs the same number of forward passes whatever is drawn, so
processes that share a sharded model and call alike stay in step with each other.

Shapes: B batch, T time, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.transformer import Transformer

FIRST_LOOK = 1024
"""Likeliest ids that are sorted before all are."""


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draws one id per row of logits (B, V) -> (B,) int64. Temperature 0 takes the likeliest.

    The filters apply in this order: logits / temperature; the top_k likeliest; of these, renormalised, the fewest
    likeliest that together reach top_p (arXiv 1904.09751), at least one. Among equals the lower id counts as likelier.
    The draw inverts the cumulative distribution, ids ascending, at a uniform number from the generator, a CPU one (not
    given: torch's global one), so that the device does not change what is drawn and nothing waits for it. Nearly equal
    logits that rounding puts into another order change nothing, unless a filter keeps one and not the other; then, and
    where rounding moves the border of top_p across an id, draws of other ids may change too.

    Args:
        generator: one for all rows, in order, or a sequence with one for each row.

    Raises:
        ValueError: temperature negative, top_k not positive, top_p outside (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    uniform = _uniform(logits.shape[0], generator).to(logits.device)
    logits = logits.float()
    # The largest logit is 0 then: a tiny temperature gives exp(-huge) = 0 instead of inf - inf.
    weights = ((logits - logits.amax(dim=-1, keepdim=True)).double() / temperature).exp()
    if top_k is None and top_p is None:
        return _draw(weights, uniform)
    vocab_size = logits.shape[1]
    if top_k is not None or logits.device.type != "cpu" or vocab_size <= FIRST_LOOK:
        ids = _likeliest(logits, min(top_k or vocab_size, vocab_size))
        return _draw_kept(weights, ids, None, top_p, uniform)[0]
    # Sorting 50,257 numbers takes longer than a layer of the network, and the likeliest few nearly always decide.
    mass = weights.sum(dim=-1, keepdim=True)
    drawn, is_whole = _draw_kept(weights, _likeliest(logits, FIRST_LOOK), mass, top_p, uniform)
    rows = (~is_whole).nonzero()[:, 0]
    if len(rows):
        drawn[rows] = _draw_kept(weights[rows], _likeliest(logits[rows], vocab_size), None, top_p, uniform[rows])[0]
    return drawn


def _draw_kept(
    weights: Tensor, ids: Tensor, mass: Tensor | None, top_p: float | None, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from the fewest of ``ids`` that reach top_p: ids (B,); and (B,) whether no others belong to them.

    Args:
        weights: (B, V) float64, as those of _draw.
        ids: (B, C), the likeliest first.
        mass: (B, 1), sum of the weights of all ids that count; None where those are ``ids``.
        uniform: (B, 1) float64.
    """
    chosen = weights.gather(1, ids)
    is_whole = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    if top_p is not None:
        cumulative = chosen.cumsum(dim=-1)
        is_kept = cumulative - chosen < top_p * (cumulative[:, -1:] if mass is None else mass)
        is_whole = ~is_kept[:, -1]  # what follows the first that is not kept is not kept either
        chosen = chosen.masked_fill(~is_kept, 0.0)
    ids, order = ids.sort(dim=-1)
    place = _draw(chosen.gather(1, order), uniform)
    return ids.gather(1, place[:, None])[:, 0], is_whole


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """(B, C) float64, what each column's probability is proportional to, and (B, 1) in [0, 1) -> columns (B,)."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    place = torch.searchsorted(cumulative, uniform * total, right=True)
    # Rounding may push the number up to the whole mass: then the last column that has some is meant, not one behind it.
    last = torch.searchsorted(cumulative, total).clamp(max=weights.shape[1] - 1)  # behind the end where it is NaN
    return torch.minimum(place, last)[:, 0]


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """Ids (B, count) of the largest of each row of float32 logits (B, V), largest first, equals by id."""
    if count == logits.shape[1]:
        return logits.argsort(dim=-1, descending=True, stable=True)
    # topk may order equals as it likes, so they are told apart: float bits that sort like integers, then the id.
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    bits = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    keys = (bits << 32) - torch.arange(logits.shape[1], device=logits.device)
    return keys.topk(count, dim=-1).indices


def _uniform(num_rows: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """(B, 1) float64 on the CPU."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(num_rows, 1, generator=generator, dtype=torch.float64)
    return torch.cat([torch.rand(1, 1, generator=each, dtype=torch.float64) for each in generator])


def generate_tokens(
    model: Transformer,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.9,
    seed: int,
) -> Iterator[Tensor]:
    """Yields the next ids, (B,) int64, max_new_tokens times: the streaming form of generate.

    A prompt longer than context_length is cut to its last context_length tokens. Whenever the window is full, its last
    half is read anew as a fresh prompt at position 0: the model never sees a position that it was not trained on, and a
    token costs on average two positions of computing instead of a whole window.

    Processes that share a sharded model must all take the same number of tokens from this iterator.

    Args:
        model: on the device of `tokens`; its mode (train, eval) makes no difference, there is no dropout.
        tokens: (B, T) int64, at least one token; prompts of one call have the same length.
        max_new_tokens: ids to yield per row.
        temperature, top_k, top_p: see sample_token.
        seed: of the draws; rows draw from the same stream, so equal prompts give different texts.

    Raises:
        ValueError: tokens empty or of another rank, or settings that sample_token rejects; at the first ids asked for.
    """
    check_sampling(temperature, top_k, top_p)
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; needed: (batch, time), at least one token")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    length = model.config.context_length
    cache = KVCache(model.config)
    window = unread = tokens[:, -length:]
    for _ in range(max_new_tokens):
        if cache.length + unread.shape[1] > length:
            cache.clear()
            window = unread = window[:, -max(1, length // 2) :]
        chosen = sample_token(_last_logits(model, unread, cache), temperature, top_k, top_p, generator)
        yield chosen
        unread = chosen[:, None]
        window = torch.cat((window, unread), dim=1)


def generate(
    model: Transformer,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.9,
    seed: int,
    stop_id: int | None = None,
) -> list[list[int]]:
    """The ids that follow each prompt, without the prompt: B lists of max_new_tokens, see generate_tokens.

    Args:
        stop_id: a row ends before its first stop_id. The forward passes run on to max_new_tokens nevertheless, so that
            no process leaves a sharded model while others wait in it; alone, break out of generate_tokens instead.
    """
    steps = list(
        generate_tokens(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
    )
    rows: list[list[int]] = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in tokens]
    return [row[: row.index(stop_id)] if stop_id in row else row for row in rows]


def _last_logits(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    # no_grad, not inference_mode: a sharded model keeps what it gathers here, and training must be able to reuse it.
    # Compiled parts run uncompiled: every length would be compiled anew.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(tokens, cache=cache)[:, -1]  # (B, T, V) -> (B, V)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError for settings that mean nothing."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; it must be finite and not negative")
    if top_k is not None and top_k <= 0:
        raise ValueError(f"top_k is {top_k}; it must be positive")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]")
