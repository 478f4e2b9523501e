"""Throw bytes at the tokenizer for a while: ``python tools/fuzz_bpe.py SECONDS [--seed N] [--cases N] [--first CASE]``.

A case is a buffer of documents: random bytes, real text with random damage, traps, characters of any plane, cut into
documents anywhere, also within characters. The buffer lies between two pages of memory that must not be touched, ending
just before the one or beginning just behind the other, so that a read outside of it ends the process: the parent then
says by which signal and in which case. For both patterns it is checked that

- decoding gives the bytes back, and encoding one by one, with a small cache, or in two threads gives the same ids;
- pretokens, counts and ids are those of a plain-Python splitter and tiktoken's merging (all but the largest cases).

Every case follows from the seed and its number alone: ``--first`` begins with it. Exit code 0: no difference, else 1.
"""

# ruff: noqa: E402, T201  sys.path is set before the imports; a tool speaks to its user

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib
import itertools
import mmap
import multiprocessing
import random
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa

from pipeline.tokenizer import bpe
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tokenizer.training import count_pretokens, train_bpe, warm_up
from tests.support.bpe_references import BAD_BYTES, BOTH, NASTY, as_tiktoken, pretokens

VOCAB_SIZE = 2000
SMALL_CACHE_SLOTS = 4096
LARGEST_CASE = 16 * mmap.PAGESIZE
COMPARED_BYTES = 5000  # a larger case is compared with the references one time in ten
DIFFERENCE = 2  # exit code of the child
LONG_RUNS = [1, 1, 1, 1, 2, 3, 15, 16, 17, 62, 63, 64, 65, 127, 128, 129, 256, 300]
MODULES = ["argparse", "calendar", "datetime", "difflib", "encodings.aliases", "inspect", "tarfile", "typing"]


class Case(NamedTuple):
    """Documents: data[bounds[i]:bounds[i + 1]]; what lies before the first and behind the last belongs to none."""

    data: bytes
    bounds: list[int]
    at_end: bool  # whether the data end at the guard page behind, or begin at the one before
    is_large: bool  # large_string or string
    is_compared: bool  # with the references, which are slow

    @property
    def documents(self) -> list[bytes]:
        return [self.data[start:stop] for start, stop in itertools.pairwise(self.bounds)]


class GuardedMemory:
    """Pages of memory between two that must be neither read nor written."""

    def __init__(self) -> None:
        size = LARGEST_CASE + 2 * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        mprotect = ctypes.CDLL(None, use_errno=True).mprotect
        for page in (self._address, self._address + size - mmap.PAGESIZE):
            if mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0):
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def texts(self, case: Case) -> pa.Array:
        """The documents of a case as an Arrow array whose data lie here."""
        size = len(case.data)
        offset = mmap.PAGESIZE + (LARGEST_CASE - size if case.at_end else 0)
        self._memory[offset : offset + size] = case.data
        buffer = pa.foreign_buffer(self._address + offset, size)
        kind, width = (pa.large_string(), np.int64) if case.is_large else (pa.string(), np.int32)
        offsets = pa.py_buffer(np.array(case.bounds, width).data)
        return pa.Array.from_buffers(kind, len(case.bounds) - 1, [None, offsets, buffer])


class Generator:
    """Cases from a seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._traps = [*(each.encode() for each in NASTY), *BAD_BYTES]
        self.texts = [Path(importlib.import_module(name).__file__ or "").read_bytes() for name in MODULES]

    def case(self, number: int) -> Case:
        """The same for the same seed and number."""
        chance = random.Random(f"{self._seed}/{number}")
        size = chance.randint(0, chance.choice([3, 16, 70, 150, 150, 600, 3000, LARGEST_CASE]))
        makers = [self._random, self._damaged, self._spliced, self._characters]
        chosen = chance.choices(makers, k=chance.randint(1, 3))
        data = b"".join(make(chance, size // len(chosen)) for make in chosen)[:LARGEST_CASE]
        num_bounds = 2 + chance.choice([0, 0, 1, 2, 5, len(data) // 20])
        bounds = sorted(chance.choices(range(len(data) + 1), k=num_bounds))
        if chance.random() < 0.7:
            bounds[0], bounds[-1] = 0, len(data)
        is_compared = len(data) <= COMPARED_BYTES or chance.random() < 0.1
        return Case(data, bounds, chance.random() < 0.5, chance.random() < 0.5, is_compared)

    @staticmethod
    def _random(chance: random.Random, size: int) -> bytes:
        return chance.randbytes(size)

    def _damaged(self, chance: random.Random, size: int) -> bytes:
        """Real text with bytes changed, lost, or traps put in."""
        text = chance.choice(self.texts)
        start = chance.randrange(max(1, len(text) - size))
        data = bytearray(text[start : start + size])
        for _ in range(chance.randint(0, 1 + size // 20)):
            position = chance.randint(0, len(data))
            match chance.randrange(3):
                case 0:
                    data[position : position + 1] = chance.randbytes(1)
                case 1:
                    del data[position : position + chance.randint(1, 3)]
                case 2:
                    data[position:position] = chance.choice(self._traps)
        return bytes(data)

    def _spliced(self, chance: random.Random, size: int) -> bytes:
        data = bytearray()
        few = chance.choices(self._traps, k=chance.choice([1, 2, 3, 100]))
        while len(data) < size:
            data += chance.choice(few) * chance.choice(LONG_RUNS if size > 64 else [1, 2])
        return bytes(data)

    @staticmethod
    def _characters(chance: random.Random, size: int) -> bytes:
        limit = chance.choice([0x80, 0x800, 0x3000, 0x10000, 0x110000])
        codes = (chance.randrange(limit) for _ in range(size // 2))
        return "".join(map(chr, codes)).encode("utf-8", "surrogatepass")


class Subject:
    """A tokenizer, itself with a small cache, and its references."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = (tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size))
        self._tokenizer = tokenizer
        self._small = Tokenizer(
            list(vocabulary),
            tokenizer._vocabulary.merges,
            tokenizer.special_tokens,
            pattern=tokenizer.pattern,
            cache_slots=SMALL_CACHE_SLOTS,
        )
        self._tiktoken = as_tiktoken(tokenizer)

    def problem(self, case: Case, texts: pa.Array) -> str:
        """What is wrong with the ids of a case, or nothing."""
        ids, offsets = self._tokenizer.encode_batch(texts)
        split = [ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets.tolist())]
        for document, found in zip(case.documents, split, strict=True):
            if self._tokenizer.decode_bytes(found) != document:
                return f"decoding does not give back {document!r}"
            if self._tokenizer.encode_bytes(document) != found:
                return f"encoded by itself, other ids has {document!r}"
        for name, encode in (("a small cache", self._small.encode_batch), ("two threads", self._in_two_threads)):
            others = encode(texts)
            if not (np.array_equal(ids, others[0]) and np.array_equal(offsets, others[1])):
                return f"{name} gives other ids"
        return self._problem_of_pretokens(case, texts, split)

    def _in_two_threads(self, texts: pa.Array) -> tuple[Any, Any]:
        return self._tokenizer.encode_batch(texts, num_threads=2)

    def _problem_of_pretokens(self, case: Case, texts: pa.Array, split: list[list[int]]) -> str:
        pattern = self._tokenizer.pattern
        table = count_pretokens(texts, pattern=pattern).table
        counts = dict(zip(table["pretoken"].to_pylist(), table["count"].to_pylist(), strict=True))
        if sum(len(pretoken) * count for pretoken, count in counts.items()) != sum(map(len, case.documents)):
            return "the counted pretokens are not as many bytes as the documents"
        if not case.is_compared:
            return ""
        expected: Counter[bytes] = Counter()
        for document, ids in zip(case.documents, split, strict=True):
            parts = pretokens(document, pattern)
            if bpe.pretokenize(document, pattern) != parts:
                return f"other pretokens than the reference has {document!r}"
            if [each for part in parts for each in self._tiktoken._encode_single_piece(part)] != ids:
                return f"other ids than tiktoken's merging has {document!r}"
            expected.update(parts)
        return "" if counts == expected else "the counts differ from the reference"


class Limits(NamedTuple):
    """When to stop: at the first that is reached, after one case at least."""

    seconds: float
    cases: int


def fuzz(limits: Limits, seed: int, first: int, current: mmap.mmap) -> int:
    """Run cases up to the limits; the number of the current one goes to shared memory. Returns an exit code."""
    generator, memory = Generator(seed), GuardedMemory()
    texts = [text.decode() for text in generator.texts] + ["".join(NASTY)] * 5
    subjects = {pattern: Subject(train_bpe(texts, VOCAB_SIZE, pattern=pattern)) for pattern in BOTH}
    warm_up()
    started = time.monotonic()
    num_cases = num_bytes = 0
    while num_cases == 0 or (time.monotonic() - started < limits.seconds and num_cases < limits.cases):
        number = first + num_cases
        struct.pack_into("q", current, 0, number)
        case = generator.case(number)
        for pattern, subject in subjects.items():
            problem = subject.problem(case, memory.texts(case))
            if problem:
                print(f"case {number} of seed {seed}, pattern {pattern}: {problem[:4000]}\n{str(case)[:20000]}")
                print(_again(seed, number))
                return DIFFERENCE
        num_cases += 1
        num_bytes += len(case.data)
    passed = time.monotonic() - started
    print(f"{num_cases:,} cases, {num_bytes:,} bytes, both patterns, seed {seed}, {passed:.0f} s: no difference")
    return 0


def main() -> int:
    """Fuzz in a child process, so that its end by a signal can be told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=None, help="not given: another one every time")
    parser.add_argument("--cases", type=int, default=2**62, help="stop after so many, even if there is time left")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    current = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the child
    limits = Limits(arguments.seconds, arguments.cases)
    child = multiprocessing.get_context("fork").Process(target=_run, args=(limits, seed, arguments.first, current))
    child.start()
    child.join()
    if child.exitcode not in (0, DIFFERENCE):
        number = struct.unpack_from("q", current)[0]
        how = f"by signal {-child.exitcode}" if child.exitcode and child.exitcode < 0 else "by an exception"
        print(f"ended {how} in case {number} of seed {seed}\n{_again(seed, number)}")
    return 1 if child.exitcode else 0


def _run(limits: Limits, seed: int, first: int, current: mmap.mmap) -> None:
    faulthandler.enable()
    sys.exit(fuzz(limits, seed, first, current))


def _again(seed: int, number: int) -> str:
    return f"again: python tools/fuzz_bpe.py 0 --seed {seed} --first {number}"


if __name__ == "__main__":
    sys.exit(main())
