"""Documents of a work item without those that hold a question, which are listed with it.

The list tells where a document stands: in which part of which file, and the how many-th of its texts it is. Rules and
copies leave documents out on the way, so ``Origins`` goes along: every step takes one array at a time and hands it on
before it takes the next, so that what ``Origins`` holds is always about the array at hand.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decontamination.evaluation_sets import EvaluationSets, Overlap
from pipeline.errors import UserError
from pipeline.sources.readers import read_item
from pipeline.sources.work_items import Damage, WorkItem
from pipeline.storage.folders import Folder

LISTS = "items/contaminated/"
LIST_NAME = "contaminated.jsonl"
"""The list of all work items, in the output folder."""
REASON = "contaminated"
"""Reason under which the manifest counts the documents."""


def list_name(index: int) -> str:
    """The list of one work item, in the output folder."""
    return f"{LISTS}{index:06d}.jsonl"


def join_lists(output: Folder, counts: Sequence[int]) -> None:
    """Write the list of all work items, in plan order. ``counts``: of each item the documents in its list.

    Raises:
        UserError: the list of an item is missing.
    """
    output.write(LIST_NAME, (_read_list(output, index) for index, count in enumerate(counts) if count))


def _read_list(output: Folder, index: int) -> bytes:
    try:
        return output.read(list_name(index))
    except FileNotFoundError:
        raise UserError(
            f"{output}/{list_name(index)}, which lists documents that were left out, is missing; delete "
            f"items/{index:06d}.json beside it and run the command again, which does that work item again"
        ) from None


@dataclasses.dataclass
class Origins:
    """Where the documents of the array at hand stand."""

    file: str = ""
    numbers: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """Of each document the number, from 1, among the texts of the file's part, nulls and blanks not counted."""

    def read(
        self,
        item: WorkItem,
        skipped: Counter[str],
        fetched: pa.Table | None,
        damaged: Damage | None,
        first_bad: dict[str, str] | None,
    ) -> Iterator[pa.Array]:
        """The texts of an item as ``read_item`` gives them, but none of two files in one array."""
        for number, file_slice in enumerate(item.slices):
            one = dataclasses.replace(item, slices=(file_slice,))
            own = None if fetched is None else _of_slice(fetched, number)
            count = 0
            for array in read_item(one, skipped, own, damaged, first_bad):
                self.file, self.numbers = file_slice.label, np.arange(count + 1, count + 1 + len(array))
                count += len(array)
                yield array

    def keep(self, is_kept: npt.NDArray[np.bool_]) -> None:
        """Note which documents of the array at hand are handed on."""
        self.numbers = self.numbers[is_kept]


def _of_slice(fetched: Any, number: int) -> pa.Table:
    """What was fetched for one slice, as for an item of this slice alone."""
    own = fetched.filter(pc.equal(fetched["slice"], number))
    return own.set_column(own.column_names.index("slice"), "slice", pa.array([0] * len(own), pa.int32()))


def without_questions(
    arrays: Iterable[pa.Array], sets: EvaluationSets, origins: Origins, lines: list[bytes]
) -> Iterator[pa.Array]:
    """The documents that share no 13 words with a question; of each of the others a line of JSON goes to ``lines``."""
    for array in arrays:
        found = sets.overlaps(array)
        if not found:
            yield array
            continue
        lines += [_line(origins, row, overlap) for row, overlap in sorted(found.items())]
        is_kept = np.ones(len(array), bool)
        is_kept[list(found)] = False
        origins.keep(is_kept)
        if is_kept.any():
            yield array.filter(pa.array(is_kept))


def _line(origins: Origins, row: int, overlap: Overlap) -> bytes:
    question = overlap.question
    values = {
        "file": origins.file,
        "document": int(origins.numbers[row]),
        "questions": question.set,
        "question": question.number,
        "question_id": question.id,
        "words": overlap.words,
    }
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"
