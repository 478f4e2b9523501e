"""A sample of a source, read and run through the stages of jobs/tokenize.py on one core; nothing is written.

Seconds are those of this thread on the processor, so that neither other processes nor a slow network change them.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from pipeline.config.data import TokenizeConfig
from pipeline.decontamination.documents import REASON, Origins, without_questions
from pipeline.decontamination.evaluation_sets import EvaluationSets
from pipeline.deduplication import exact, minhash, near
from pipeline.errors import UserError
from pipeline.estimation.parts import Part
from pipeline.filters.rules import filtered
from pipeline.preprocessing.encode_documents import encode_parts, text_bytes
from pipeline.preprocessing.planning import filter_rules, what_to_skip
from pipeline.remote import files as remote_files
from pipeline.remote.range_reader import RangeFile
from pipeline.remote.remote_file import RemoteFile
from pipeline.sources.compressions import unpacked
from pipeline.sources.readers import read_item
from pipeline.sources.work_items import Damage, FileSlice, open_slice, reading, stored_bytes
from pipeline.tokenizer import bpe
from pipeline.tokenizer import training as bpe_training

SAMPLE_BYTES = 8_000_000
"""Bytes of the source that are sampled, as the plan counts them."""
SAMPLE_SECONDS = 10.0
"""Seconds after which reading begins no further array, and as many after which the other work begins none."""
READING, RULES, COPIES, QUESTIONS, ENCODING = "reading", "rules", "copies", "questions", "encoding"

_REQUEST_BYTES = 1 << 20  # of a remote file
_ALL_BYTES = 1 << 62  # an item is encoded as one part


@dataclass
class Timing:
    """What a stage took."""

    seconds: float = 0.0
    """Seconds of one core."""
    text_bytes: int = 0
    """Bytes of UTF-8 of the documents that were read for it, whether rules leave them out before or not."""


@dataclass(kw_only=True)
class SourceSample:
    """What a sample of a source holds, and the seconds that each stage took."""

    planned_bytes: float = 0.0
    """Bytes that the plan counts for what was read."""
    text_bytes: int = 0
    """Bytes of UTF-8 of the documents that were read."""
    documents: int = 0
    """Documents that were read."""
    unread: Counter[str] = field(default_factory=Counter)
    """Reason -> records that hold no document."""
    damaged: Damage = field(default_factory=list)
    """What cannot be read whole, where the settings leave it out."""
    problems: list[str] = field(default_factory=list)
    """Sentences on what cannot be read and would end the job."""
    worked_documents: int = 0
    """Documents that went through the other stages: all that were read, unless time was short."""
    worked_bytes: int = 0
    """Their bytes of UTF-8."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> those that rules and questions leave out."""
    kept_documents: int = 0
    kept_bytes: int = 0
    """Bytes of UTF-8 of those that are left, masked and cut as the rules leave them."""
    tokens: int = 0
    timings: dict[str, Timing] = field(default_factory=dict)
    """Stage -> what it took."""
    download_bytes: int = 0
    download_seconds: float = 0.0
    """Seconds by the clock, one request at a time."""
    is_trained: bool = False
    """Whether the tokenizer was trained on this sample, because none is given."""

    @property
    def records(self) -> int:
        """Records that were read, with those that hold no document."""
        return self.documents + self.unread.total()

    def add_time(self, stage: str, seconds: float, num_bytes: int = 0) -> None:
        """Count seconds of a stage, and the bytes of text that they were for."""
        timing = self.timings.setdefault(stage, Timing())
        timing.seconds += seconds
        timing.text_bytes += num_bytes


def take_sample(
    parts: Sequence[Part],
    config: TokenizeConfig,
    *,
    tokenizer: bpe.Tokenizer | None,
    sets: EvaluationSets | None = None,
    seconds: float = SAMPLE_SECONDS,
) -> SourceSample:
    """Read the parts, and run what they hold through rules, the search for copies, questions, and the encoding.

    Args:
        parts: what is read.
        config: settings of the job.
        tokenizer: what is encoded with; None: one that is trained on the sample.
        sets: the questions that no document may hold.
        seconds: as SAMPLE_SECONDS.
    """
    with contextlib.suppress(UserError):  # said when it is read again
        next(_texts(parts[0], config, SourceSample(), _Opener(SourceSample())), None)  # Arrow loads its functions
    sample = SourceSample()
    arrays = _read(parts, config, sample, time.monotonic() + seconds)
    if not arrays:
        return sample
    if tokenizer is None:
        sample.is_trained = True
        tokenizer = bpe_training.train_bpe(pa.chunked_array(arrays, pa.large_string()), config.vocab_size)
    _warm_up(arrays[0][:1], config, sets)
    end = time.monotonic() + seconds
    for number, array in enumerate(arrays):
        kept = list(_worked_on(array, config, sets, sample))
        begin = time.thread_time()
        _encode(kept, config, tokenizer, sample)
        taken, is_over = time.thread_time() - begin, time.monotonic() > end
        if number >= len(arrays) // 2 or is_over:  # the first half fills the tokenizer's cache, as a worker does once
            sample.add_time(ENCODING, taken, text_bytes(array))
        if is_over:
            break
    return sample


def _timed(sample: SourceSample, stage: str, arrays: Iterator[pa.Array]) -> Iterator[pa.Array]:
    """The arrays; the seconds that they take to come are added to the stage's."""
    while True:
        begin = time.thread_time()
        try:
            array = next(arrays, None)
        finally:
            sample.add_time(stage, time.thread_time() - begin)
        if array is None:
            return
        yield array


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Opener:
    """Opens the files of one part; knows how far they were read, and how fast remote ones came."""

    def __init__(self, sample: SourceSample) -> None:
        self._sample = sample
        self._opened: list[tuple[FileSlice, BinaryIO]] = []

    def open(self, file_slice: FileSlice) -> BinaryIO:
        file = open_slice(file_slice) if file_slice.file is None else self._open_remote(file_slice.file)
        self._opened.append((file_slice, file))
        return file

    def is_at_end(self) -> bool:
        """Whether the last file was read whole, and closed."""
        return bool(self._opened) and self._opened[-1][1].closed

    def bytes_passed(self) -> float:
        """Planned bytes of the slices that were opened, of the last one, if it is still open, as far as it was read."""
        if not self._opened:
            return 0.0
        *before, (last, file) = self._opened
        begin, end = (last.start, last.stop) if last.is_range else (0, stored_bytes(last))
        share = 1.0 if file.closed else (file.tell() - begin) / max(1, end - begin)
        return sum(each.size_bytes for each, _ in before) + last.size_bytes * min(1.0, max(0.0, share))

    def _open_remote(self, file: RemoteFile) -> BinaryIO:
        """As ``remote.files.open_file``, but nothing is fetched ahead."""

        def fetch(start: int, stop: int) -> bytes:
            begin = time.perf_counter()
            content = remote_files.read_ranges(file, [(start, stop)])[0]
            self._sample.download_seconds += time.perf_counter() - begin
            self._sample.download_bytes += len(content)
            return content

        def stream(start: int) -> Generator[bytes, None, None]:
            for begin in range(start, file.size_bytes, _REQUEST_BYTES):
                yield fetch(begin, min(begin + _REQUEST_BYTES, file.size_bytes))

        return cast(BinaryIO, RangeFile(file.size_bytes, fetch, stream))


def _read(parts: Sequence[Part], config: TokenizeConfig, sample: SourceSample, end: float) -> list[pa.Array]:
    """The documents of the parts, as far as they come before the time ``end``; those of one part in any case."""
    arrays: list[pa.Array] = []
    for part in parts:
        arrays += _read_part(part, config, sample, end)
        if arrays and time.monotonic() > end:
            break
    return arrays


def _read_part(part: Part, config: TokenizeConfig, sample: SourceSample, end: float) -> list[pa.Array]:
    arrays: list[pa.Array] = []
    opener, before = _Opener(sample), sample.records
    is_whole, passed = True, [(0, 0.0)]
    try:
        for array in _timed(sample, READING, _texts(part, config, sample, opener)):
            arrays.append(array)
            passed.append((passed[-1][0] + text_bytes(array), opener.bytes_passed()))
            sample.documents += len(array)
            is_enough = passed[-1][0] >= part.wanted_bytes < part.planned_bytes and len(arrays) > 1
            if (is_enough or time.monotonic() > end) and not opener.is_at_end():
                is_whole = False
                break
    except UserError as error:
        sample.problems.append(str(error))
        is_whole = False
    sample.text_bytes += passed[-1][0]
    sample.add_time(READING, 0.0, passed[-1][0])
    sample.planned_bytes += _covered(part, is_whole, passed, sample.records - before)
    return arrays


def _covered(part: Part, is_whole: bool, passed: list[tuple[int, float]], records: int) -> float:
    """Planned bytes of what was read of a part.

    passed: 0 and 0, and for each array that came the bytes of text up to it, and the position in the file, where
        readers are about an array ahead, because they put small ones together.
    """
    if is_whole and not _is_head(part):
        return part.planned_bytes
    if part.records and not _is_head(part):
        return part.planned_bytes * min(1.0, records / part.records)
    (first_text, first), (text, last) = passed[min(1, len(passed) - 1)], passed[-1]
    if text > first_text:
        return text * (last - first) / (text - first_text)
    return last if _is_head(part) else last / 2


def _is_head(part: Part) -> bool:
    """Whether only the beginning of a document is read: of a text file that is too large."""
    return part.item.slices[0].kind == "txt" and part.wanted_bytes < part.planned_bytes


def _texts(part: Part, config: TokenizeConfig, sample: SourceSample, opener: _Opener) -> Iterator[pa.Array]:
    if _is_head(part):
        return _head(part.item.slices[0], part.wanted_bytes, opener)
    skip = what_to_skip(config)
    damaged: Damage | None = sample.damaged if "files" in skip else None
    first: dict[str, str] | None = {} if "records" in skip else None
    return read_item(part.item, sample.unread, None, damaged, first, open_file=opener.open)


def _head(file_slice: FileSlice, num_bytes: int, opener: _Opener) -> Iterator[pa.Array]:
    """The beginning of a text file as one document."""
    with reading(file_slice.where), opener.open(file_slice) as file:
        content = bytes(unpacked(file, file_slice.name).read(num_bytes))
        text = content.decode("utf-8", "ignore")
        if text.strip():
            yield pa.array([text], pa.large_string())


# ---- work ------------------------------------------------------------------------------------------------------------


def _warm_up(array: pa.Array, config: TokenizeConfig, sets: EvaluationSets | None) -> None:
    """Compile what the stages need."""
    bpe.warm_up()
    list(filtered([array], filter_rules(config), Counter()))
    if config.dedup == "minhash":
        near.warm_up()
    if sets is not None:
        sets.overlaps(array)


def _worked_on(
    array: pa.Array, config: TokenizeConfig, sets: EvaluationSets | None, sample: SourceSample
) -> Iterator[pa.Array]:
    """The documents of an array that rules and questions leave, behind every stage but the encoding."""
    num_bytes = text_bytes(array)
    sample.worked_documents += len(array)
    sample.worked_bytes += num_bytes
    arrays: Iterator[pa.Array] = iter([array])
    if rules := filter_rules(config):
        arrays = iter(list(_timed(sample, RULES, filtered(arrays, rules, sample.dropped))))
        sample.add_time(RULES, 0.0, num_bytes)
    if config.dedup != "off":
        arrays = iter(list(_timed(sample, COPIES, _searched_for_copies(arrays, config))))
        sample.add_time(COPIES, 0.0, num_bytes)
    if sets is not None:
        arrays = iter(list(_timed(sample, QUESTIONS, _without_questions(arrays, sets, sample.dropped))))
        sample.add_time(QUESTIONS, 0.0, num_bytes)
    return arrays


def _encode(arrays: list[pa.Array], config: TokenizeConfig, tokenizer: bpe.Tokenizer, sample: SourceSample) -> None:
    sample.kept_documents += sum(map(len, arrays))
    sample.kept_bytes += sum(map(text_bytes, arrays))
    shares: Any = {"val_fraction": config.val_fraction, "val_split": config.val_split}
    for part in encode_parts(arrays, tokenizer, part_bytes=_ALL_BYTES, **shares):
        sample.tokens += sum(len(ids) for ids in part.ids.values())


def _searched_for_copies(arrays: Iterator[pa.Array], config: TokenizeConfig) -> Iterator[pa.Array]:
    """The same arrays, hashed or signed as the search for copies does it: which are copies no sample can tell."""
    for array in arrays:
        if config.dedup == "exact":
            exact.hash_documents(array)
        else:
            scheme = minhash.Scheme(words=config.dedup_words, bands=config.dedup_bands, rows=config.dedup_rows)
            minhash.sign(array, scheme)
        yield array


def _without_questions(arrays: Iterator[pa.Array], sets: EvaluationSets, dropped: Counter[str]) -> Iterator[pa.Array]:
    for array in arrays:
        lines: list[bytes] = []
        yield from without_questions([array], sets, Origins(numbers=np.arange(len(array))), lines)
        if lines:
            dropped[REASON] += len(lines)
