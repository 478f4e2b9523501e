"""Learning a vocabulary: count the pretokens of a text, then merge the most frequent pair of tokens again and again.

Counting is separate from merging, so that many tasks can count parts of a corpus and their counts are added up: the sum
is the same for any number of parts in any order. Of the pairs with the highest count the one with the lexicographically
greatest (left bytes, right bytes) is merged, so that the result is a function of the counts alone.

Ids: 0 to 255 are the bytes by value, then come the merges in the order in which they were learned, then the special
tokens in the order given; ``<|endoftext|>`` as the only one is the last id, as in GPT-2. Text is not searched for
special tokens: it is counted as it stands.

Memory for a million distinct pretokens of 8 bytes each, as English has them (0.7 million in 1 GB). Counting: 32 bytes a
slot of a table that is a quarter to half full, and the table before it while it grows: 64 to 192 MB a thread. The
Arrow table of counts: 16 bytes and the pretoken, 24 MB, twice while it is sorted; adding tables up: 75 bytes a row.
Learning: 42 bytes for a byte of the pretokens, 340 MB, and a tenth more for 200,000 ids. Measured as growth of the
resident set at its peak: 250 MB of English with 0.37 million distinct pretokens, 51 MB for counting, 116 to 128 MB for
learning 32,000 or 50,257 ids; 1.43 million made-up pretokens of 9.7 bytes, 583 MB for learning.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.tokenizer import bpe
from pipeline.tokenizer.bpe import END_OF_TEXT, PATTERN_NUMBERS, Tokenizer
from pipeline.tokenizer.kernels import count as count_kernels
from pipeline.tokenizer.kernels import encode as encode_kernels
from pipeline.tokenizer.kernels import train as kernels
from pipeline.tokenizer.kernels.hash_table import BATCH_WORDS, ENTRIES
from pipeline.tokenizer.patterns import PATTERNS, Pattern
from pipeline.tokenizer.text_buffers import TextBuffer, Texts, require_texts, shares, text_buffers
from pipeline.tokenizer.workspace import PretokenTable, new_scanner

NUM_BYTES = 256
PROGRESS_STEPS = 100  # calls of progress
FIRST_SLOTS = 1 << 18
FIRST_KEPT_BYTES = 1 << 20
FIRST_PAIRS = 1 << 18  # at least the 65,536 pairs of bytes
MAX_NODES = 2**31 - 1  # nodes are int32
MAX_TEXT_BYTES = 2**40 - 1  # counts have 40 bits
COLUMNS: dict[str, Any] = {"pretoken": pa.large_binary(), "count": pa.int64()}
COUNTS_SCHEMA = pa.schema(COLUMNS)

Progress = Callable[[int, int], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretokenCounts:
    """How often each distinct pretoken of a text occurs."""

    table: pa.Table
    """Columns pretoken (large_binary) and count (int64, positive), sorted by the bytes, each pretoken once."""
    pattern: Pattern = "gpt2"
    """Pattern that split the text."""

    def __post_init__(self) -> None:
        _require_known(self.pattern)
        if not self.table.schema.equals(COUNTS_SCHEMA):
            raise UserError(f"pretoken counts have the schema {self.table.schema}; they need {COUNTS_SCHEMA}")


def count_pretokens(texts: Texts, *, pattern: Pattern = "gpt2", num_threads: int = 1) -> PretokenCounts:
    """Count the pretokens of texts: a list of str or an Arrow array, as for Tokenizer.encode_batch.

    Each thread counts documents of about as many bytes in a table of its own; the result does not depend on
    num_threads. A single document is counted by one thread.
    """
    return PretokenCounts(table=_sorted(_count(texts, pattern, num_threads)), pattern=pattern)


def merge_counts(parts: Iterable[PretokenCounts]) -> PretokenCounts:
    """Add up counts of parts of a text: equal to counting the whole, whatever the parts and their order.

    UserError if the parts were split by different patterns.
    """
    parts = list(parts)
    if not parts:
        return PretokenCounts(table=COUNTS_SCHEMA.empty_table())
    patterns = sorted({part.pattern for part in parts})
    if len(patterns) > 1:
        raise UserError(f"counts of the patterns {' and '.join(patterns)} cannot be added up; count with one pattern")
    return PretokenCounts(table=_sorted(_sum([part.table for part in parts])), pattern=parts[0].pattern)


def train_bpe(
    texts_or_counts: Texts | PretokenCounts,
    vocab_size: int,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    progress: Progress | None = None,
    *,
    min_frequency: int = 1,
    pattern: Pattern | None = None,
) -> Tokenizer:
    """Learn a tokenizer of vocab_size ids, the 256 bytes and the special tokens included.

    progress(done, wanted) is called about a hundred times with the number of merges. A pair is merged only while it
    occurs at least min_frequency times, as in Hugging Face's BpeTrainer (`tokenizers`, models/bpe/trainer.rs stops at
    the first pair below). If that, set above 1, leaves fewer merges, the vocabulary is smaller and a warning says so:
    the ids have no gap, the special tokens are the last. pattern: how texts are split, gpt2 if not given; counts have
    their own, which must agree with a given one.

    UserError if the text has too few different pretokens for so many merges, or if a special token is an ordinary one
    too.
    """
    num_merges = vocab_size - NUM_BYTES - len(special_tokens)
    if num_merges < 0:
        raise UserError(
            f"vocab_size is {vocab_size}, but the 256 bytes and {len(special_tokens)} special tokens need "
            f"{NUM_BYTES + len(special_tokens)}"
        )
    if min_frequency < 1:
        raise UserError(f"min_frequency is {min_frequency}; it must be at least 1")
    table, pattern = _table_and_pattern(texts_or_counts, pattern)
    merges = _learn(table, num_merges, min_frequency, progress)
    if len(merges) < num_merges:
        _report_shortage(vocab_size, num_merges, len(merges), min_frequency)
    tokens = [bytes([byte]) for byte in range(NUM_BYTES)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    special_ids = {name: len(tokens) + index for index, name in enumerate(special_tokens)}
    try:
        return Tokenizer(tokens + [name.encode() for name in special_tokens], merges, special_ids, pattern=pattern)
    except ValueError as error:
        raise UserError(f"the vocabulary {error}; choose other special_tokens than {list(special_tokens)}") from error


def warm_up() -> None:
    """Compile the kernels of counting, learning and encoding unless they are cached."""
    bpe.warm_up()
    train_bpe(["aa ab " + 20 * "c"] * 2, NUM_BYTES + 4)


def _require_known(pattern: str) -> None:
    if pattern not in PATTERNS:
        raise UserError(f"pattern is {pattern!r}; it must be one of {', '.join(PATTERNS)}")


# ---- counting --------------------------------------------------------------------------------------------------------


def _count(texts: Texts, pattern: Pattern, num_threads: int) -> pa.Table:
    """Counts of the pretokens of texts, in no particular order."""
    _require_known(pattern)
    if num_threads < 1:
        raise UserError(f"num_threads is {num_threads}; it must be positive")
    require_texts(texts)
    if num_threads == 1:
        return _count_share(pattern, text_buffers(texts))
    parts = shares(text_buffers(texts), num_threads)
    with ThreadPoolExecutor(num_threads) as pool:
        return _sum(list(pool.map(functools.partial(_count_share, pattern), parts)))


def _count_share(pattern: Pattern, buffers: Iterable[TextBuffer]) -> pa.Table:
    """Counts of one thread's documents, in no particular order; the hash table is freed when it returns."""
    scanner, _scanner_arrays = new_scanner(encode_kernels.MAX_PRETOKENS)
    batch = np.empty(BATCH_WORDS, np.uint64)
    pretokens = PretokenTable(FIRST_SLOTS, load=0.5, kept_room=FIRST_KEPT_BYTES, spilled_room=0)
    for buffer in buffers:
        cursor = np.array([0, -1], np.int64)
        while True:
            counter = count_kernels.Counter(PATTERN_NUMBERS[pattern], scanner, pretokens.view, batch.ctypes.data)
            missing = count_kernels.count_documents(buffer.address, buffer.starts, buffer.stops, counter, cursor)
            if not missing:
                break
            while pretokens.used[ENTRIES] + encode_kernels.MOST_PRETOKENS > pretokens.view.most_entries:
                pretokens.grow(2)
            pretokens.keep_room(missing)
    num_pretokens = int(pretokens.used[ENTRIES])
    content = np.empty(count_kernels.content_bytes(pretokens.view), np.uint8)
    offsets, counts = np.zeros(num_pretokens + 1, np.int64), np.empty(num_pretokens, np.int64)
    count_kernels.list_pretokens(pretokens.view, content, offsets, counts)
    arrow_buffers = [None, pa.py_buffer(offsets.data), pa.py_buffer(content.data)]
    array = pa.Array.from_buffers(pa.large_binary(), num_pretokens, arrow_buffers)
    return pa.table([array, pa.array(counts)], schema=COUNTS_SCHEMA)


def _sum(tables: list[pa.Table]) -> pa.Table:
    """The sum of counts, in no particular order."""
    whole = pa.concat_tables([COUNTS_SCHEMA.empty_table(), *tables])
    pretokens: Any = _joined(whole["pretoken"]).dictionary_encode()  # faster than group_by, which hashes whole rows
    counts = np.zeros(len(pretokens.dictionary), np.int64)
    np.add.at(counts, pretokens.indices.to_numpy(), whole["count"].to_numpy())
    return pa.table([pretokens.dictionary, pa.array(counts)], schema=COUNTS_SCHEMA)


def _sorted(table: pa.Table) -> pa.Table:
    return table.take(pc.sort_indices(table["pretoken"])).combine_chunks()


def _joined(column: pa.ChunkedArray) -> pa.Array:
    array: Any = column.combine_chunks()
    return array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)


# ---- learning --------------------------------------------------------------------------------------------------------


def _table_and_pattern(texts_or_counts: Texts | PretokenCounts, pattern: Pattern | None) -> tuple[pa.Table, Pattern]:
    """Counts in any order, and the pattern that split the text."""
    if not isinstance(texts_or_counts, PretokenCounts):
        return _count(texts_or_counts, pattern or "gpt2", num_threads=1), pattern or "gpt2"
    if pattern not in (None, texts_or_counts.pattern):
        raise UserError(f"pattern is {pattern}, but the counts are of the pattern {texts_or_counts.pattern}")
    return texts_or_counts.table, texts_or_counts.pattern


def _report_shortage(vocab_size: int, num_merges: int, num_found: int, min_frequency: int) -> None:
    """Raise a UserError, or warn where min_frequency above 1 explains the smaller vocabulary."""
    reached = vocab_size - num_merges + num_found
    if min_frequency > 1:
        logger.warning(
            "the vocabulary has %d ids, not %d: after %d merges no pair of tokens occurs %d times (min_frequency)",
            *(reached, vocab_size, num_found, min_frequency),
        )
        return
    raise UserError(
        f"the text supports a vocabulary of {reached} only, not {vocab_size}: after {num_found} merges every "
        "pretoken is one token; give more text or a smaller vocab_size"
    )


def _learn(table: pa.Table, num_merges: int, min_frequency: int, progress: Progress | None) -> list[tuple[int, int]]:
    """At most num_merges merges (left id, right id), where the new token's id is 256 + the index of the merge."""
    content, offsets = _content(table)
    weights = table["count"].to_numpy().astype(np.int64)
    learner, used, _arrays = _new_learner(content, NUM_BYTES + num_merges, min_frequency)
    pair_arrays = _new_pairs(FIRST_PAIRS)
    kernels.prepare(learner, _pairs(pair_arrays), offsets, weights)
    merged = np.empty((num_merges, 2), np.int32)
    done = 0
    while done < num_merges:
        limit = min(num_merges, done + -(-num_merges // PROGRESS_STEPS))
        reached = kernels.learn(learner, _pairs(pair_arrays), merged, done, limit)
        if progress is not None and reached > done:
            progress(reached, num_merges)
        done = reached
        if done < limit:
            if used[kernels.HEAP_SIZE] == 0:
                break
            for index, array in enumerate(pair_arrays):  # one by one: old and new arrays are never all in memory
                pair_arrays[index] = _larger(array, 2 * array.size)
    return list(zip(merged[:done, 0].tolist(), merged[:done, 1].tolist(), strict=True))


def _content(table: pa.Table) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The 256 bytes, then all pretokens, as (N,) uint8, and the offsets of the pretokens in it (pretokens + 1,)."""
    pretokens = _joined(table["pretoken"])
    _, offsets_buffer, data = pretokens.buffers()
    if offsets_buffer is None or data is None or len(pretokens) == 0:
        return np.arange(NUM_BYTES, dtype=np.uint8), np.full(1, NUM_BYTES, np.int64)
    window = slice(pretokens.offset, pretokens.offset + len(pretokens) + 1)
    offsets = np.frombuffer(memoryview(offsets_buffer), np.int64)[window]
    distinct = np.frombuffer(memoryview(data), np.uint8)[offsets[0] : offsets[-1]]
    if distinct.size + NUM_BYTES > MAX_NODES:
        raise UserError(
            f"the distinct pretokens have {distinct.size} bytes, more than 2 GiB; train on a sample of the text"
        )
    text_bytes = int((np.diff(offsets) * table["count"].to_numpy()).sum())
    if text_bytes > MAX_TEXT_BYTES:
        raise UserError(f"the counted text has {text_bytes:,} bytes, more than 1 TiB; train on a sample of it")
    return np.concatenate([np.arange(NUM_BYTES, dtype=np.uint8), distinct]), offsets - offsets[0] + NUM_BYTES


def _new_learner(
    content: npt.NDArray[np.uint8], num_tokens: int, min_frequency: int
) -> tuple[kernels.Learner, npt.NDArray[np.int64], list[npt.NDArray[Any]]]:
    """The state of learning, its counters, and all arrays that it points into."""
    num_nodes, used = content.size, np.zeros(4, np.int64)
    nodes = np.empty(num_nodes * kernels.NODE_BYTES, np.uint8)
    per_node: list[npt.NDArray[Any]] = [np.empty(num_nodes * times, np.int32) for times in (3, 1)]
    per_token: list[npt.NDArray[Any]] = [
        np.zeros(num_tokens, np.int32),
        np.zeros(num_tokens, np.int32),
        np.zeros(num_tokens, np.uint64),
    ]
    found: list[npt.NDArray[Any]] = [np.full(num_tokens, kernels.NONE, np.int32) for _ in range(2)]
    arrays: list[npt.NDArray[Any]] = [content, nodes, *per_node, *per_token, *found, used]
    addresses = [array.ctypes.data for array in arrays]
    return kernels.Learner(*[*addresses, min_frequency]), used, arrays


def _new_pairs(size: int) -> list[npt.NDArray[Any]]:
    """The arrays of kernels.Pairs, in its order."""
    types = (np.int32, np.int32, np.int64, np.int64, np.int32, np.uint64, np.int32)
    return [np.empty(size, dtype) for dtype in types]


def _pairs(arrays: list[npt.NDArray[Any]]) -> kernels.Pairs:
    addresses = [array.ctypes.data for array in arrays]
    return kernels.Pairs(*[*addresses, arrays[0].size])


def _larger(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """A copy with room at its end, which takes memory only when it is written."""
    larger = np.empty(size, array.dtype)
    larger[: array.size] = array
    return larger
