"""The likeliest next token without reading the whole output matrix: its bytes are 31 % of what a step of 124M reads.

Approximate logits come from a copy of the matrix in int8. A bound that always holds says how far each may be from its
exact value; the ids that could be the likeliest, some ten of 50,257, are computed exactly, and the best of them is the
best of all. Where the bound leaves too many, or two are equal up to rounding, there is no answer, and the caller
multiplies by the whole matrix.

Shapes: B texts, C candidates, D model, V vocab.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import vector_norm

MOST_CANDIDATES = 1 / 8
"""Of the vocabulary: computing more than these one by one takes as long as computing all."""

FEW = 64
"""Candidates that are not worth a second look at their bounds."""

ROUNDINGS = 16
"""Units of float32's rounding that a sum of products may be off by, times the norms of its two vectors.

Adding D terms in some order, vectors of 16 at a time, is off by far less: 0.85 was the most seen for D = 768.
"""


class GreedySearch:
    """Finds argmax(x W^T), the lowest id among equals, for W (V, D) as it is given: its dtype is that of the logits.

    q = round(w / s), s a scale for each row, h = round(x / c), c a scale for each text, both in -127 .. 127. Then the
    exact logit w.x / c differs from s q.h by (w - s q).x / c + s q.(x / c - h), which by Cauchy and Schwarz is at most
    |w - s q| |x / c| + |s q| |x / c - h|. What is below the largest lower bound even with its own bound added can not
    be the likeliest. Sums of the integers are exact.
    """

    def __init__(self, weight: Tensor) -> None:
        exact = weight.float()
        self._weight = weight
        self._scales = exact.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (exact / self._scales[:, None]).round().to(torch.int8)  # (V, D)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        approximate = rounded * self._scales[:, None]
        self._norms = approximate.norm(dim=1) * 1.0001  # (V,), rounded upwards
        self._slack = ROUNDINGS * torch.finfo(torch.float32).eps * exact.norm(dim=1)  # (V,), times |x|
        # Both the approximate and the exact logit are rounded.
        self._errors = (exact - approximate).norm(dim=1) * 1.0001 + 2 * self._slack
        self._largest_norm, self._largest_error = self._norms.max().item(), self._errors.max().item()
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._step = 0.0 if weight.dtype == torch.float32 else torch.finfo(weight.dtype).eps

    @staticmethod
    def is_available() -> bool:
        """Whether this processor adds products of int8 exactly and fast: without VNNI, pairs stop at 16 bits."""
        if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
            return False
        packed = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
        largest = _product(torch.full((1, 64), 127.0), packed, torch.ones(16), torch.zeros(16, dtype=torch.int32))
        return bool((largest == 64 * 127 * 127).all())

    def __call__(self, x: Tensor) -> Tensor | None:
        """x (B, D) in the dtype of the weight -> ids (B,) int64; None: the bound does not decide."""
        exact_x = x.float()
        scaled = exact_x * (127 / vector_norm(exact_x, torch.inf, dim=1, keepdim=True))  # (B, D)
        rounded = scaled.round()
        sizes = vector_norm(scaled, dim=1, keepdim=True)  # (B, 1)
        part = (vector_norm(scaled - rounded, dim=1, keepdim=True) / sizes).max().item()
        approximate = _product(rounded, self._packed, self._scales, self._zeros)  # (B, V)
        # First with the largest bound of all rows, which takes fewer looks at the logits; then each row with its own.
        bound = sizes * (self._largest_error + part * self._largest_norm)  # (B, 1)
        least = self._rounded_down(approximate.amax(dim=1, keepdim=True) - bound)
        candidates = ((approximate - (least - bound)).amax(dim=0) >= 0).nonzero()[:, 0]
        if len(candidates) > FEW:
            approximate = approximate[:, candidates]
            bounds = sizes * (self._errors[candidates] + part * self._norms[candidates])
            least = self._rounded_down((approximate - bounds).amax(dim=1, keepdim=True))
            candidates = candidates[(approximate + bounds >= least).any(dim=0)]
        if not 0 < len(candidates) <= MOST_CANDIDATES * len(self._weight):  # none is left by NaN
            return None
        if len(candidates) == 1:
            return candidates.expand(len(x))
        logits = exact_x @ self._weight[candidates].float().T  # (B, C)
        slack = torch.outer(vector_norm(exact_x, dim=1), self._slack[candidates])
        return self._decide(logits, slack, candidates)

    def _rounded_down(self, logits: Tensor) -> Tensor:
        """Logits above the result may be rounded to the same number as those that are given."""
        return logits - self._step * logits.abs()

    def _decide(self, logits: Tensor, slack: Tensor, candidates: Tensor) -> Tensor | None:
        """The candidates' logits (B, C), float32, each right up to its slack -> ids (B,), where they decide."""
        dtype = self._weight.dtype
        low, high = (logits - slack).to(dtype), (logits + slack).to(dtype)
        winners = [_winner(*pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]
        return None if None in winners else candidates[winners]


def _product(h: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """(B, D) whole numbers in -127 .. 127 -> (B, V) float32: s q.h; the product takes uint8 with 128 for 0."""
    unsigned = (h + 128).to(torch.uint8)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def _winner(low: list[float], high: list[float]) -> int | None:
    """The index that is certainly that of the largest of values between low and high, the first among equals.

    In plain Python: of a handful, torch takes longer for the dozen operations.
    """
    if not math.isfinite(sum(low) + sum(high)):
        return None
    winner = low.index(max(low))
    others = high[:winner] + high[winner + 1 :]
    rival = max(others)
    is_first = low[winner] > rival or (low[winner] == rival and winner <= others.index(rival))
    return winner if is_first else None
