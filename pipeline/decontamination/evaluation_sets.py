"""The runs of 13 words by which documents that hold a question of an evaluation set are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.decontamination.kernels import search as kernels
from pipeline.decontamination.questions import Question, read_questions
from pipeline.decontamination.words import GRAM_WORDS, gram_hashes, plain_words

_LEAST_WORDS = 1 << 10  # of the table of bits


class Overlap(NamedTuple):
    """A question that a document shares 13 words with."""

    question: Question
    words: str
    """The first run of common words, normalised; 13 of them or more."""


@dataclass(frozen=True, eq=False)
class EvaluationSets:
    """Questions, ready to be looked for; plain values, which can be sent to any worker.

    A question of HellaSwag has some 120 runs; each takes 20 bytes.
    """

    questions: tuple[Question, ...]
    hashes: npt.NDArray[np.uint64]
    """The hashes of all their runs of 13 words, ascending, none twice."""
    owners: npt.NDArray[np.int32]
    """The first question that each of them is in."""
    bits: npt.NDArray[np.uint64]
    """A bit for each of them (kernels/search.py)."""
    fingerprints: tuple[str, ...]
    """Name and sha256 of every file and task."""
    num_short: int
    """Questions of fewer than 13 words, which cannot be found."""

    @classmethod
    def read(cls, names: Sequence[str]) -> EvaluationSets:
        """The questions of files and tasks (questions.py); UserError where one cannot be read, or has no question."""
        return cls.of(*read_questions(names))

    @classmethod
    def of(cls, questions: Sequence[Question], fingerprints: Sequence[str] = ()) -> EvaluationSets:
        """Hash the questions."""
        texts = [text for question in questions for text in question.texts]
        owners = np.repeat(np.arange(len(questions)), [len(question.texts) for question in questions])
        grams = gram_hashes(pa.array(texts, pa.large_string()))
        counts = np.diff(grams.ends, prepend=0)
        hashes, firsts = np.unique(grams.hashes, return_index=True)
        of_gram = np.repeat(owners, counts).astype(np.int32)
        bits = np.zeros(max(_LEAST_WORDS, 1 << (len(hashes) - 1).bit_length()), np.uint64)  # 64 for each, or more
        kernels.set_bits(hashes, bits)
        return cls(
            questions=tuple(questions),
            hashes=hashes,
            owners=of_gram[firsts],
            bits=bits,
            fingerprints=tuple(fingerprints),
            num_short=len(questions) - len(np.unique(of_gram)),
        )

    def writable(self) -> EvaluationSets:
        """A copy for the kernels, which take writable arrays only; those of Ray's object store are not."""
        return dataclasses.replace(self, hashes=self.hashes.copy(), bits=self.bits.copy())

    def overlaps(self, texts: Any) -> dict[int, Overlap]:
        """Row -> the first overlap, for the documents that have one. ``texts``: an Arrow array of strings, no nulls."""
        grams = gram_hashes(texts)
        found = np.empty((len(grams.ends), 2), np.int64)
        kernels.find_first(grams.hashes, grams.ends, self.hashes, self.bits, found)
        rows = np.flatnonzero(found[:, 0] >= 0).tolist()
        return {
            row: Overlap(question, words)
            for row in rows
            for question in [self.questions[self.owners[found[row, 1]]]]
            if (words := _common_words(texts[row].as_py(), int(found[row, 0]), question))
        }


def _common_words(text: str, first: int, question: Question) -> str:
    """The words of a text from number ``first`` on that the question has, too; empty where a hash was wrong."""
    sets = [list(plain_words(each)) for each in question.texts]
    longest = max(map(len, sets))
    words = [word for number, word in zip(range(first + longest), plain_words(text), strict=False) if number >= first]
    common = 0
    for own in sets:
        for start in range(len(own)):
            length = 0
            while length < min(len(words), len(own) - start) and own[start + length] == words[length]:
                length += 1
            common = max(common, length)
    return " ".join(words[:common]) if common >= GRAM_WORDS else ""
