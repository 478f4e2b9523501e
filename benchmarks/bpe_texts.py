"""Text that is not English prose, the same on every run: real where the machine has some, else made from a seed.

Python source is the standard library's and the installed packages'. Real Cyrillic and CJK are the translations that
the system's programs carry (gettext catalogues); made Cyrillic and CJK are words of random letters whose frequencies
fall as 1 / rank, as in a language. The rest is derived from the corpus or from random bytes.
"""

from __future__ import annotations

import base64
import gettext
import hashlib
import itertools
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

DOCUMENT_CHARS = 3000
LINE_BYTES = 48
NUM_WORDS = 40_000
CYRILLIC = "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфё"  # by their frequency in Russian
CYRILLIC_LOCALES = ("ru", "uk", "bg", "be", "sr", "mk")
CJK_LOCALES = ("zh_CN", "zh_TW", "zh_HK", "ja", "ko")
FOR_THE_RECORD = ("upper case", "NBSP for spaces", "base64")
CYRILLIC_RANGE = re.compile("[\u0400-\u04ff]")
CJK_RANGE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7ff]")


def other_texts(english: list[str], size_bytes: int, locale_folder: Path) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """(name, documents), size_bytes of each or what there is; english: at least as much, for what is derived."""
    makers: dict[str, Callable[[], Iterable[str]]] = {
        "Python source": python_source,
        "Cyrillic, catalogues": lambda: translations(locale_folder, CYRILLIC_LOCALES, CYRILLIC_RANGE),
        "Cyrillic, made": lambda: made_text(_cyrillic_words(), " ", [",", "."]),
        "CJK, catalogues": lambda: translations(locale_folder, CJK_LOCALES, CJK_RANGE),
        "CJK, made": lambda: made_text(_cjk_words(), "", ["，", "。", "、"]),
        "hex noise": lambda: noise(bytes.hex),
        "20-character documents": lambda: short_documents(english, 20),
        "upper case": lambda: map(str.upper, english),
        "NBSP for spaces": lambda: (text.replace(" ", "\u00a0") for text in english),
        "base64": lambda: noise(lambda data: base64.b64encode(data).decode()),
    }
    for name, make in makers.items():
        documents = _limited(make(), size_bytes)
        if documents:
            yield name, pa.chunked_array([pa.array(documents, pa.large_string())])


def _limited(documents: Iterable[str], size_bytes: int) -> list[str]:
    """The first documents, size_bytes of them together, those left out that are not UTF-8."""
    chosen: list[str] = []
    for document in documents:
        if size_bytes <= 0:
            break
        chosen.append(document)
        size_bytes -= len(document.encode())
    return chosen


def python_source() -> Iterator[str]:
    """The files of the standard library and of site-packages, in an order that mixes the packages."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path.relative_to(path.anchor)).encode()).digest()):
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # test data of Python itself
            continue


def translations(folder: Path, locales: Iterable[str], script: re.Pattern[str]) -> list[str]:
    """What the catalogues of these locales have in this script, in documents of DOCUMENT_CHARS, shuffled."""
    paths = [path for locale in locales for path in sorted(folder.glob(f"{locale}/LC_MESSAGES/*.mo"))]
    documents: list[str] = []
    for path in paths:
        lines: list[str] = []
        for line in _catalogue(path):
            if script.search(line):
                lines.append(line)
            if sum(map(len, lines)) > DOCUMENT_CHARS:
                documents.append("\n".join(lines))
                lines = []
        documents.append("\n".join(lines))
    documents = sorted({document for document in documents if document})
    random.Random(0).shuffle(documents)
    return documents


def _catalogue(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            messages: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    except (OSError, ValueError, LookupError):
        return []
    return [text for key, text in messages.items() if key]


def made_text(words: list[str], between: str, marks: list[str]) -> Iterator[str]:
    """Documents without end: words by the law of Zipf, a mark behind every tenth or so."""
    generator = np.random.default_rng(0)
    weights = np.cumsum(1 / (np.arange(len(words)) + 2.7))
    while True:
        chosen = np.searchsorted(weights, generator.random(400) * weights[-1])
        has_mark = generator.random(400) < 0.1
        which = generator.integers(0, len(marks), 400)
        yield between.join(
            words[word] + (marks[mark] if marked else "")
            for word, marked, mark in zip(chosen.tolist(), has_mark.tolist(), which.tolist(), strict=True)
        )


def _cyrillic_words() -> list[str]:
    generator = np.random.default_rng(1)
    lengths = np.clip(generator.poisson(np.linspace(3, 8, NUM_WORDS)), 1, 20)  # frequent words are short
    return _words(generator, list(CYRILLIC), lengths)


def _cjk_words() -> list[str]:
    generator = np.random.default_rng(2)
    characters = generator.permutation(np.arange(0x4E00, 0x9FA6))[:3500]
    return _words(generator, list(map(chr, characters.tolist())), generator.integers(1, 4, NUM_WORDS))


def _words(generator: np.random.Generator, letters: list[str], lengths: npt.NDArray[Any]) -> list[str]:
    weights = np.cumsum(1 / (np.arange(len(letters)) + 2.7))
    drawn = np.searchsorted(weights, generator.random(int(lengths.sum())) * weights[-1]).tolist()
    stops = np.cumsum(lengths).tolist()
    return ["".join(letters[i] for i in drawn[start:stop]) for start, stop in itertools.pairwise([0, *stops])]


def noise(spell: Callable[[bytes], str]) -> Iterator[str]:
    """Random bytes without end, spelled in lines."""
    generator = random.Random(0)
    while True:
        yield "\n".join(spell(generator.randbytes(LINE_BYTES)) for _ in range(DOCUMENT_CHARS // LINE_BYTES // 2))


def short_documents(texts: Iterable[str], num_chars: int) -> Iterator[str]:
    """Every text cut into pretokens."""
    for text in texts:
        yield from (text[start : start + num_chars] for start in range(0, len(text), num_chars))
