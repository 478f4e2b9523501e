"""The numba loops that merge the bytes of a long pretoken: merge_short.py, with the ranks in a tree.

Every node of the tree is the least of the 16 below, so that a run of n letters takes n log n steps and not n squared.
"""

# ruff: noqa: PLR0917  numba calls by position

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.cache import helper
from pipeline.tokenizer.kernels.memory import (
    ALL_ONES,
    ONE,
    get_32,
    leading_zeros,
    least,
    low_bits,
    put_32,
    trailing_zeros,
)
from pipeline.tokenizer.kernels.merge_short import NO_RANK, NOTHING, Merges, begin, merged_id, rank_of

MAX_TREE_LEVELS = 16


@helper
def merge_long(address: int, length: int, merges: Merges, ids: int) -> int:
    """Write the ids of a pretoken of any length to ids, uint32 of length; returns how many.

    Takes O(n log n) steps and 4.4 bytes of memory for each byte.
    """
    levels = np.empty(MAX_TREE_LEVELS, np.int64)
    num_levels = tree_levels(length, levels)
    tree = np.full(levels[num_levels], np.uint32(NO_RANK), np.uint32)
    starts = np.zeros((length >> 6) + 1, np.uint64)
    # numba frees an array after its last use by name: addresses are taken in a function whose caller still holds it.
    return merge_in_tree(address, length, merges, ids, tree, Tree(levels, num_levels), starts)


@helper
def merge_in_tree(
    address: int,
    length: int,
    merges: Merges,
    ids: int,
    ranks: npt.NDArray[np.uint32],
    shape: Tree,
    starts: npt.NDArray[np.uint64],
) -> int:
    """The work of merge_long, in arrays that merge_long allocates."""
    tree = ranks.ctypes.data
    begin(address, length, merges, ids, tree)
    build_tree(tree, shape)
    for place in range(length):
        starts[place >> 6] |= ONE << np.uint64(place & 63)
    while True:
        rank, place = least_of_tree(tree, shape)
        if rank == NO_RANK:
            break
        token = merged_id(merges, rank)
        put_32(ids, place, token)
        gone = start_behind(starts, place)
        starts[gone >> 6] ^= ONE << np.uint64(gone & 63)
        set_rank(tree, shape, gone, NO_RANK)
        right, left = start_behind(starts, place), start_before(starts, place)
        set_rank(tree, shape, place, rank_of(merges, token, get_32(ids, right)) if right >= 0 else NO_RANK)
        if left >= 0:
            set_rank(tree, shape, left, rank_of(merges, get_32(ids, left), token))
    count = 0
    place = 0
    while place >= 0:
        put_32(ids, count, get_32(ids, place))
        count += 1
        place = start_behind(starts, place)
    return count


@helper
def start_behind(starts: npt.NDArray[np.uint64], place: int) -> int:
    """The next place where a token starts, -1 if there is none."""
    word = (place + 1) >> 6
    bits = starts[word] & (ALL_ONES << np.uint64((place + 1) & 63)) if word < starts.size else NOTHING
    while bits == NOTHING:
        word += 1
        if word >= starts.size:
            return -1
        bits = starts[word]
    return word << 6 | trailing_zeros(bits)


@helper
def start_before(starts: npt.NDArray[np.uint64], place: int) -> int:
    """The place before where a token starts, -1 if there is none."""
    word = place >> 6
    bits = starts[word] & low_bits(place & 63)
    while bits == NOTHING:
        word -= 1
        if word < 0:
            return -1
        bits = starts[word]
    return word << 6 | 63 - leading_zeros(bits)


# --- the tree: level 0 has a rank for every place, every further one the least of 16 neighbours below -----------------


class Tree(NamedTuple):
    """Where the levels of a tree are."""

    levels: npt.NDArray[np.int64]  # index of the first rank of each level, then the number of ranks
    num_levels: int


@helper
def tree_levels(length: int, levels: npt.NDArray[np.int64]) -> int:
    """Write Tree.levels; returns Tree.num_levels. Levels consist of whole blocks of 16, the last of one."""
    size = (length + 15) >> 4 << 4
    levels[0] = 0
    levels[1] = size
    num_levels = 1
    while size > 16:
        size = ((size >> 4) + 15) >> 4 << 4
        num_levels += 1
        levels[num_levels] = levels[num_levels - 1] + size
    return num_levels


@helper
def build_tree(tree: int, shape: Tree) -> None:
    """Fill the upper levels."""
    for level in range(1, shape.num_levels):
        below, here = shape.levels[level - 1], shape.levels[level]
        for block in range((here - below) >> 4):
            rank, _ = least(tree + 4 * (below + 16 * block))
            put_32(tree, here + block, rank)


@helper
def least_of_tree(tree: int, shape: Tree) -> tuple[int, int]:
    """The least rank and the first place that has it."""
    place = 0
    rank = NO_RANK
    for level in range(shape.num_levels - 1, -1, -1):
        rank, child = least(tree + 4 * (shape.levels[level] + 16 * place))
        place = 16 * place + child
    return rank, place


@helper
def set_rank(tree: int, shape: Tree, place: int, rank: int) -> None:
    """Change the rank of a place, and the levels above where they depend on it."""
    put_32(tree, place, rank)
    for level in range(1, shape.num_levels):
        rank, _ = least(tree + 4 * (shape.levels[level - 1] + (place >> 4 << 4)))
        place >>= 4
        if get_32(tree, shape.levels[level] + place) & NO_RANK == rank:
            return
        put_32(tree, shape.levels[level] + place, rank)
