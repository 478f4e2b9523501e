"""The numba loops that join pairs to components: union by the smaller number, with path halving.

After all unions the root of a component is its smallest number, whatever the order of the pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.cache import helper, kernel


@helper
def root_of(parents: npt.NDArray[np.int64], node: int) -> int:
    """The root of a node; the way to it becomes shorter."""
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@kernel
def join_pairs(parents: npt.NDArray[np.int64], firsts: npt.NDArray[np.int64], seconds: npt.NDArray[np.int64]) -> None:
    """Join the components of firsts[i] and seconds[i], for every i, in ``parents`` (at first parents[n] is n)."""
    for index in range(firsts.size):
        first, second = root_of(parents, firsts[index]), root_of(parents, seconds[index])
        if first < second:
            parents[second] = first
        else:
            parents[first] = second


@kernel
def find_roots(parents: npt.NDArray[np.int64], roots: npt.NDArray[np.int64]) -> None:
    """The root of every node."""
    for node in range(parents.size):
        roots[node] = root_of(parents, node)
