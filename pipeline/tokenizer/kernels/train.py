"""The numba loops of learning: which pairs of tokens to merge, given the distinct pretokens and their counts.

There is no hash table. Distinct pretokens are stored one after another, a node per byte, linked within a pretoken;
every node holds the pair that starts at it. A pair with the new token c can only appear in the step that makes c, as no
later merge makes c again. So its list of places is complete after that step (one contiguous run, in ascending order),
its count can only fall from then on (the heap may hold an old count, never one that is too low), and the pairs of one
step are found in two arrays, by left and by right neighbour. A listed place is valid if its node still holds the pair.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.tokenizer.kernels.cache import helper, inlined, kernel
from pipeline.tokenizer.kernels.memory import (
    get_32,
    get_64,
    load_byte,
    load_word,
    prefetch,
    put_32,
    put_64,
    signed,
    store_word,
)

NONE = -1
NUM_TOKENS, NUM_PAIRS, NUM_PLACES, HEAP_SIZE = 0, 1, 2, 3  # indices of Learner.used
PREFIX_BYTES = 8
PREFIX_BITS = np.uint64(24)  # of a key in the heap; counts have the other 40
PREFETCHED_PLACES = 8

# Fields of a node, stored together: a step visits nodes all over memory, and each visit costs a cache line or two.
TOKEN = 0  # int32: token that starts at the node
FOLLOWING = 1  # int32: next node of the pretoken, NONE at its end
PRECEDING = 2  # int32: the node before, NONE at its start
PAIR = 3  # int32: pair that starts at the node, NONE where none does
WEIGHT = 2  # int64: how often the node's pretoken occurs
NODE_BYTES = 24


class Learner(NamedTuple):
    """State of learning, as addresses; the comments give type, size and meaning of each array.

    N nodes: 256 for the single bytes, then one per byte of the distinct pretokens. V tokens.
    """

    content: int  # uint8, N: the bytes
    nodes: int  # NODE_BYTES, N: fields of the nodes, TOKEN to WEIGHT
    places: int  # int32, 3 N: nodes, one run per pair; a merge lists 2 places and removes a node
    touched: int  # int32, N: nodes whose pair changed in this step
    token_start: int  # int32, V: a node where the token's bytes can be read
    token_length: int  # int32, V: 0 while the token does not exist
    prefixes: int  # uint64, V: the token's first 8 bytes, big-endian, padded with zeros
    by_left: int  # int32, V: pair (new token, v) of this step; NONE between steps
    by_right: int  # int32, V: pair (v, new token) of this step; NONE between steps
    used: int  # int64, 4: tokens, pairs, places, heap entries in use
    min_frequency: int  # no address: a pair that occurs less often is not merged; at least 1


class Pairs(NamedTuple):
    """Pairs of tokens and the heap over them, as addresses; the owner replaces the arrays by larger ones when full."""

    left: int  # int32
    right: int  # int32
    total: int  # int64: present number of occurrences
    start: int  # int64: of the pair's run in Learner.places
    length: int  # int32: of that run
    heap_key: int  # uint64: what decides most comparisons, see heap_key(); its count is never too low
    heap_pair: int  # int32
    room: int  # number of pairs that fit


@inlined
def field(learner: Learner, node: int, which: int) -> int:
    """TOKEN, FOLLOWING, PRECEDING or PAIR of a node."""
    return get_32(learner.nodes + NODE_BYTES * node, which)


@inlined
def set_field(learner: Learner, node: int, which: int, value: int) -> None:
    """Change one of them."""
    put_32(learner.nodes + NODE_BYTES * node, which, value)


@inlined
def weight(learner: Learner, node: int) -> int:
    """How often the node's pretoken occurs."""
    return get_64(learner.nodes + NODE_BYTES * node, WEIGHT)


@helper
def in_use(learner: Learner, which: int) -> int:
    """Tokens, pairs, places or heap entries in use."""
    return get_64(learner.used, which)


@kernel
def prepare(learner: Learner, pairs: Pairs, offsets: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
    """Fill the state from learner.content, the pretokens' offsets in it (the first is 256) and their counts."""
    for byte in range(256):
        set_token(learner, byte, byte, 1)
        set_field(learner, byte, PAIR, NONE)
    put_64(learner.used, NUM_TOKENS, 256)
    pair_of = np.full(1 << 16, NONE, np.int64)
    num_touched = 0
    for pretoken in range(counts.size):
        start, stop = offsets[pretoken], offsets[pretoken + 1]
        for node in range(start, stop):
            left = load_byte(learner.content + node)
            set_field(learner, node, TOKEN, left)
            put_64(learner.nodes + NODE_BYTES * node, WEIGHT, counts[pretoken])
            set_field(learner, node, PRECEDING, node - 1 if node > start else NONE)
            set_field(learner, node, FOLLOWING, node + 1 if node + 1 < stop else NONE)
            set_field(learner, node, PAIR, NONE)
            if node + 1 < stop:
                right = load_byte(learner.content + node + 1)
                if pair_of[left << 8 | right] == NONE:
                    pair_of[left << 8 | right] = new_pair(learner, pairs, left, right)
                touch(learner, pairs, node, pair_of[left << 8 | right], num_touched)
                num_touched += 1
    list_places(learner, pairs, 0, num_touched)


@helper
def set_token(learner: Learner, token: int, start: int, length: int) -> None:
    """Note where the bytes of a token are."""
    put_32(learner.token_start, token, start)
    put_32(learner.token_length, token, length)
    prefix = np.uint64(0)
    for index in range(min(length, PREFIX_BYTES)):
        prefix |= np.uint64(load_byte(learner.content + start + index)) << np.uint64(56 - 8 * index)
    store_word(learner.prefixes + 8 * token, prefix)


@helper
def new_pair(learner: Learner, pairs: Pairs, left: int, right: int) -> int:
    """Number of a pair that has not been there before."""
    pair = in_use(learner, NUM_PAIRS)
    put_64(learner.used, NUM_PAIRS, pair + 1)
    put_32(pairs.left, pair, left)
    put_32(pairs.right, pair, right)
    put_64(pairs.total, pair, 0)
    return pair


@helper
def touch(learner: Learner, pairs: Pairs, node: int, pair: int, num_touched: int) -> None:
    """The pair now starts at the node."""
    set_field(learner, node, PAIR, pair)
    put_32(learner.touched, num_touched, node)
    put_64(pairs.total, pair, get_64(pairs.total, pair) + weight(learner, node))


@helper
def list_places(learner: Learner, pairs: Pairs, first_pair: int, num_touched: int) -> None:
    """Turn the touched nodes, which are in ascending order, into one run of places per pair from first_pair on, and put
    these pairs into the heap, unless they are too rare: their counts cannot rise. A node whose pair changed twice in
    the step appears twice in the run of the later one: harmless, as its second visit finds the pair gone."""
    num_pairs = in_use(learner, NUM_PAIRS)
    for pair in range(first_pair, num_pairs):
        put_32(pairs.length, pair, 0)
    for index in range(num_touched):
        pair = field(learner, get_32(learner.touched, index), PAIR)
        put_32(pairs.length, pair, get_32(pairs.length, pair) + 1)
    end = in_use(learner, NUM_PLACES)
    for pair in range(first_pair, num_pairs):
        put_64(pairs.start, pair, end)
        end += get_32(pairs.length, pair)
        put_32(pairs.length, pair, 0)
    put_64(learner.used, NUM_PLACES, end)
    for index in range(num_touched):
        node = get_32(learner.touched, index)
        pair = field(learner, node, PAIR)
        length = get_32(pairs.length, pair)
        put_32(learner.places, get_64(pairs.start, pair) + length, node)
        put_32(pairs.length, pair, length + 1)
    for pair in range(first_pair, num_pairs):
        if get_64(pairs.total, pair) >= learner.min_frequency:
            push(learner, pairs, pair)


@kernel
def learn(learner: Learner, pairs: Pairs, merged: npt.NDArray[np.int32], num_merged: int, limit: int) -> int:
    """Write merges (left, right) to the rows num_merged:limit of merged; returns how many rows are filled then.

    Fewer than limit: no pair occurs often enough (the heap is empty), or the pairs need more room than there is.
    """
    while num_merged < limit and in_use(learner, HEAP_SIZE) > 0:
        pair = get_32(pairs.heap_pair, 0)
        if signed(load_word(pairs.heap_key) >> PREFIX_BITS) != get_64(pairs.total, pair):
            pop(learner, pairs)
            if get_64(pairs.total, pair) >= learner.min_frequency:
                push(learner, pairs, pair)
            continue
        most_new = 2 * min(get_32(pairs.length, pair), in_use(learner, NUM_TOKENS) + 1)
        if in_use(learner, NUM_PAIRS) + most_new > pairs.room:
            break
        pop(learner, pairs)
        merged[num_merged, 0] = get_32(pairs.left, pair)
        merged[num_merged, 1] = get_32(pairs.right, pair)
        num_merged += 1
        merge_pair(learner, pairs, pair)
    return num_merged


@helper
def merge_pair(learner: Learner, pairs: Pairs, pair: int) -> None:
    """One step: a new token wherever the pair stands."""
    token = in_use(learner, NUM_TOKENS)
    put_64(learner.used, NUM_TOKENS, token + 1)
    first_pair = in_use(learner, NUM_PAIRS)
    length = get_32(learner.token_length, get_32(pairs.left, pair))
    length += get_32(learner.token_length, get_32(pairs.right, pair))
    num_touched = 0
    start = get_64(pairs.start, pair)
    stop = start + get_32(pairs.length, pair)
    for place in range(start, min(start + PREFETCHED_PLACES, stop)):
        prefetch(learner.nodes + NODE_BYTES * get_32(learner.places, place))
    for place in range(start, stop):
        prefetch(learner.nodes + NODE_BYTES * get_32(learner.places, min(place + PREFETCHED_PLACES, stop - 1)))
        node = get_32(learner.places, place)
        if field(learner, node, PAIR) == pair:
            if get_32(learner.token_length, token) == 0:
                set_token(learner, token, node, length)
            num_touched = merge_at(learner, pairs, node, token, num_touched)
    put_64(pairs.total, pair, 0)
    for created in range(first_pair, in_use(learner, NUM_PAIRS)):
        put_32(learner.by_left, get_32(pairs.right, created), NONE)
        put_32(learner.by_right, get_32(pairs.left, created), NONE)
    list_places(learner, pairs, first_pair, num_touched)


@helper
def merge_at(learner: Learner, pairs: Pairs, node: int, token: int, num_touched: int) -> int:
    """Merge the node with the one that follows, and give both neighbours their new pair; returns the nodes touched."""
    gone = field(learner, node, FOLLOWING)
    before, after = field(learner, node, PRECEDING), field(learner, gone, FOLLOWING)
    set_field(learner, node, TOKEN, token)
    set_field(learner, node, FOLLOWING, after)
    set_field(learner, node, PAIR, NONE)
    if before != NONE:
        lose(learner, pairs, before)
        neighbour = field(learner, before, TOKEN)
        found_in = learner.by_left if neighbour == token else learner.by_right  # (token, token) stands in one of them
        found = get_32(found_in, neighbour)
        if found == NONE:
            found = new_pair(learner, pairs, neighbour, token)
            put_32(found_in, neighbour, found)
        touch(learner, pairs, before, found, num_touched)
        num_touched += 1
    if after != NONE:
        set_field(learner, after, PRECEDING, node)
        lose(learner, pairs, gone)
        neighbour = field(learner, after, TOKEN)
        found = get_32(learner.by_left, neighbour)
        if found == NONE:
            found = new_pair(learner, pairs, token, neighbour)
            put_32(learner.by_left, neighbour, found)
        touch(learner, pairs, node, found, num_touched)
        num_touched += 1
    set_field(learner, gone, PAIR, NONE)
    return num_touched


@helper
def lose(learner: Learner, pairs: Pairs, node: int) -> None:
    """The pair at the node occurs there no longer."""
    pair = field(learner, node, PAIR)
    put_64(pairs.total, pair, get_64(pairs.total, pair) - weight(learner, node))


@helper
def compare_tokens(learner: Learner, one: int, other: int) -> int:
    """1, 0 or -1 as the bytes of one token are above, equal to or below the other's."""
    if one == other:
        return 0
    one_prefix, other_prefix = load_word(learner.prefixes + 8 * one), load_word(learner.prefixes + 8 * other)
    if one_prefix != other_prefix:
        return 1 if one_prefix > other_prefix else -1
    one_length, other_length = get_32(learner.token_length, one), get_32(learner.token_length, other)
    one_start = learner.content + get_32(learner.token_start, one)
    other_start = learner.content + get_32(learner.token_start, other)
    for index in range(min(one_length, other_length)):
        difference = load_byte(one_start + index) - load_byte(other_start + index)
        if difference != 0:
            return 1 if difference > 0 else -1
    return 1 if one_length > other_length else -1


@helper
def heap_key(learner: Learner, pairs: Pairs, pair: int) -> np.uint64:
    """The present count of a pair, and below it the first three bytes of its left token: rare pairs have many equals,
    and looking at their bytes would mean going all over memory."""
    prefix = load_word(learner.prefixes + 8 * get_32(pairs.left, pair)) >> (np.uint64(64) - PREFIX_BITS)
    return np.uint64(get_64(pairs.total, pair)) << PREFIX_BITS | prefix


@helper
def goes_first(learner: Learner, pairs: Pairs, key: np.uint64, pair: int, other: int) -> bool:
    """Whether a pair with its key is merged before the one in heap entry other."""
    other_key = load_word(pairs.heap_key + 8 * other)
    if key != other_key:
        return key > other_key
    other_pair = get_32(pairs.heap_pair, other)
    order = compare_tokens(learner, get_32(pairs.left, pair), get_32(pairs.left, other_pair))
    if order == 0:
        order = compare_tokens(learner, get_32(pairs.right, pair), get_32(pairs.right, other_pair))
    return order > 0


@helper
def move(pairs: Pairs, source: int, target: int) -> None:
    """Copy a heap entry."""
    store_word(pairs.heap_key + 8 * target, load_word(pairs.heap_key + 8 * source))
    put_32(pairs.heap_pair, target, get_32(pairs.heap_pair, source))


@helper
def push(learner: Learner, pairs: Pairs, pair: int) -> None:
    """Put a pair into the heap under its present count."""
    key = heap_key(learner, pairs, pair)
    hole = in_use(learner, HEAP_SIZE)
    put_64(learner.used, HEAP_SIZE, hole + 1)
    while hole > 0 and goes_first(learner, pairs, key, pair, (hole - 1) >> 1):
        move(pairs, (hole - 1) >> 1, hole)
        hole = (hole - 1) >> 1
    store_word(pairs.heap_key + 8 * hole, key)
    put_32(pairs.heap_pair, hole, pair)


@helper
def pop(learner: Learner, pairs: Pairs) -> None:
    """Remove the top of the heap."""
    size = in_use(learner, HEAP_SIZE) - 1
    put_64(learner.used, HEAP_SIZE, size)
    key, pair = load_word(pairs.heap_key + 8 * size), get_32(pairs.heap_pair, size)
    hole = 0
    while 2 * hole + 1 < size:
        child = 2 * hole + 1
        if child + 1 < size:
            right_key, right_pair = load_word(pairs.heap_key + 8 * (child + 1)), get_32(pairs.heap_pair, child + 1)
            if goes_first(learner, pairs, right_key, right_pair, child):
                child += 1
        if goes_first(learner, pairs, key, pair, child):
            break
        move(pairs, child, hole)
        hole = child
    store_word(pairs.heap_key + 8 * hole, key)
    put_32(pairs.heap_pair, hole, pair)
