"""The questions of evaluation sets, and the runs of 13 words by which documents that hold one are known.

A set is a file of JSON lines, parquet, or plain lines of text; a record is a question. Of a HellaSwag question the
context with each of its endings is looked for, of any other record all its texts, one behind the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.decontamination.kernels import search as kernels
from pipeline.decontamination.words import GRAM_WORDS, gram_hashes, plain_words
from pipeline.errors import UserError
from pipeline.paths import in_bucket, resolve_path
from pipeline.remote.files import is_remote, list_files, open_file
from pipeline.remote.hub_client import fetch_file
from pipeline.remote.remote_file import redact_url

_MOST_BYTES = 1 << 30  # of a file of questions
_LEAST_WORDS = 1 << 10  # of the table of bits
_MARKUP = re.compile(r"\[(?:header|title|step|substeps)\]")  # of WikiHow's part of HellaSwag; no page has it
_NAMES = ("id", "ind", "question_id", "source_id")
"""Keys of a record that name it."""

Record = dict[str, Any]


class Question(NamedTuple):
    """Where a question stands, and what is looked for."""

    set: str
    """Name of the file."""
    number: int
    """Number of the record in the file, from 1."""
    id: str
    """What the record calls itself; empty where it has no name."""
    texts: tuple[str, ...]


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
    """Name and sha256 of every file."""
    num_short: int
    """Questions of fewer than 13 words, which cannot be found."""

    @classmethod
    def read(cls, files: Sequence[str]) -> EvaluationSets:
        """The questions of files: local paths, s3://, gs://, https://, or hf://[datasets/]OWNER/NAME[@REVISION]/FILE.

        Raises:
            UserError: a file cannot be read, or has no question.
        """
        questions: list[Question] = []
        fingerprints = []
        for file in files:
            name, content = _content(file)
            fingerprints.append(f"{name} {hashlib.sha256(content).hexdigest()}")
            found = [_question(name, number, record) for number, record in _records(name, content)]
            if not any(question.texts for question in found):
                raise UserError(f"{redact_url(file)} has no question; give JSON lines or parquet, a question a record")
            questions += found
        return cls.of(questions, fingerprints)

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


# ---- files -----------------------------------------------------------------------------------------------------------


def _content(file: str) -> tuple[str, bytes]:
    """Name and content of a file of questions."""
    place = redact_url(file)
    try:
        if file.startswith("hf://"):
            path = fetch_file(file)
        elif (url := in_bucket(file)) is not None or is_remote(file):
            return _remote_content(url or file)
        else:
            path = resolve_path(file)
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{place} has more than {_MOST_BYTES:,} bytes; --decontaminate takes files of questions")
        return file.rpartition("/")[2], path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the questions {place} cannot be read ({error.strerror or error}); give another file, or "
            "--decontaminate none to look for none"
        ) from error


def _remote_content(url: str) -> tuple[str, bytes]:
    _, files = list_files(url)
    if len(files) != 1 or files[0].size_bytes > _MOST_BYTES:
        raise UserError(f"{redact_url(url)} is not one file of at most {_MOST_BYTES:,} bytes; name one")
    with open_file(files[0]) as opened:
        return Path(files[0].name).name, opened.read()


def _records(name: str, content: bytes) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of every record of a file."""
    try:
        if name.endswith(".parquet"):
            yield from enumerate(pq.read_table(pa.BufferReader(content)).to_pylist(), 1)
            return
        lines = content.decode("utf-8-sig").split("\n")
    except (ValueError, OSError) as error:  # pyarrow's and Unicode's errors are ValueErrors
        raise UserError(f"the questions {name} cannot be read ({error}); give JSON lines or parquet") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if name.endswith(".txt"):
            yield number, line
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{name}, line {number} is no JSON ({error}); give a question a line, as JSON or in a .txt file"
            ) from error


def _question(name: str, number: int, record: Any) -> Question:
    values: Record = record if isinstance(record, dict) else {}
    own = next((values[key] for key in _NAMES if isinstance(values.get(key), str | int)), "")
    return Question(name, number, str(own), tuple(text for text in _texts(record) if text.strip()))


def _texts(record: Any) -> list[str]:
    values: Record = record if isinstance(record, dict) else {}
    endings = values.get("endings")
    if isinstance(endings, list) and {"ctx_a", "ctx_b"} <= values.keys():
        context = values.get("ctx") or f"{values['ctx_a']} {values['ctx_b']}"
        return [_MARKUP.sub(" ", f"{context} {ending}") for ending in endings]
    return ["\n".join(_strings(record))]


def _strings(value: Any) -> Iterator[str]:
    """All texts in a record, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
