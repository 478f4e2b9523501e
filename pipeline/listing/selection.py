"""Which files of a tree a source reads, and as what: one rule for a disk, a bucket, the hub and the web.

It looks at names alone, so every place that holds the same tree gives the same files. A file that a pattern names and
that is not read is counted under a reason, with an example, and nothing is passed over without that.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.listing.globs import Pattern, is_hidden

SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
KNOWN = (
    ".parquet, .arrow, .feather, .csv, .tsv, .jsonl, .ndjson, .json or .txt "
    "(all but the first three also .gz, .zst, .bz2 or .xz)"
)

HIDDEN = "hidden (. or _ at the start of a name)"
MADE_BY_JOBS = "written by jobs of this project"
ABOUT_DATA = "about the data"
TEXT_BESIDE_TABLES = "text beside tables"
OTHER_FORMAT = "of a format that is not read"
NO_FILE = "no regular file"
LEADS_NOWHERE = "a link that leads nowhere"
READ_ALREADY = "a link to a folder that is read already"

_TABLES = {"parquet", "arrow", "csv", "tsv"}
_COMPRESSED = {"csv", "tsv", "jsonl", "txt"}  # kinds that are also read in a compressed form
_OUTPUT_MARKS = ("items/run.json", "mlflow_run.json")  # every job writes the second one first
_STORE_MARK, _STORE_FILES = "mlflow.db", "mlartifacts"
_OWN_FILES = re.compile(
    r"(items|checkpoints|profile)/.*|(manifest|summary|mlflow_run|tokenizer|best|samples|tracking_sent)\.json|tracking\.jsonl"
)
_ABOUT = re.compile(  # what data sets have beside their data; the first four are those of the datasets library
    r"(dataset_infos?|dataset_dict|state)\.json|cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow"
    r"|(license|licence|copying|notice|readme|changelog|citation|requirements|urls|checksums|(md5|sha\d+)sums?)"
    r"([._-][\w-]+)?\.txt",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """Files that are not read, for one reason."""

    reason: str
    files: int
    """Number of files; a hidden folder, and one that a job wrote, count as one."""
    example: str

    def __str__(self) -> str:
        return f"{self.files:,} {self.reason} (such as {self.example})"

    def to_dict(self) -> dict[str, str | int]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The files of a source."""

    kinds: dict[str, str]
    """Name of every file that is read -> its kind, in the order of reading: that of the names."""
    ignored: tuple[Ignored, ...]
    """By reason, in the order of the reasons."""


def kind_of(name: str) -> str | None:
    """parquet, arrow, csv, tsv, jsonl or txt by the suffix of the name, in any case; None: it is not read."""
    path = PurePosixPath(name.lower())
    if path.suffix not in COMPRESSIONS:
        return SUFFIXES.get(path.suffix)
    kind = SUFFIXES.get(PurePosixPath(path.stem).suffix)
    return kind if kind in _COMPRESSED else None


def compression_of(name: str) -> str | None:
    """gzip, zstd, bz2 or xz by the last suffix of the name, in any case; None for a plain file."""
    return COMPRESSIONS.get(PurePosixPath(name.lower()).suffix)


def hidden_part(name: str, pattern: Pattern) -> str | None:
    """The topmost hidden folder (with a slash at its end) or file in a name; None where the pattern spells it."""
    parts = name.split("/")
    hidden = next((number for number, part in enumerate(parts, 1) if is_hidden(part)), None)
    if hidden is None or pattern.matches(name, also_hidden=False):
        return None
    return "/".join(parts[:hidden]) + ("/" if hidden < len(parts) else "")


def select(names: Iterable[str], pattern: str, found: Mapping[str, Iterable[str]] | None = None) -> Selection:
    """The files that are read of a tree with these names, below a folder or as a glob names them.

    Args:
        names: of all files that the pattern matches, and of those that mark a folder as the output of a job
            (``is_mark``); more do no harm.
        pattern: of globs.py, relative to the tree; empty for all of it.
        found: reason -> names that the listing itself passed over.
    """
    wanted = Pattern.of(pattern)
    all_names = sorted(names)
    outputs = _outputs(all_names)
    passed: dict[str, set[str]] = {reason: set(some) for reason, some in (found or {}).items()}
    kinds: dict[str, str] = {}
    for name in filter(wanted.matches, all_names):
        kind, reason, what = _judge(name, wanted, outputs)
        if kind is None:
            passed.setdefault(reason, set()).add(what)
        else:
            kinds[name] = kind
    for name, reason in _beside_data(kinds).items():
        del kinds[name]
        passed.setdefault(reason, set()).add(name)
    order = (HIDDEN, MADE_BY_JOBS, ABOUT_DATA, TEXT_BESIDE_TABLES, OTHER_FORMAT, NO_FILE, LEADS_NOWHERE, READ_ALREADY)
    ignored = [Ignored(reason=r, files=len(passed[r]), example=min(passed[r])) for r in order if passed.get(r)]
    return Selection(kinds=kinds, ignored=tuple(ignored))


def is_mark(name: str) -> bool:
    """Whether a file tells that its folder, or the one above, was written by a job."""
    return f"/{name}".endswith(tuple(f"/{mark}" for mark in (*_OUTPUT_MARKS, _STORE_MARK)))


def mixture(kinds: Mapping[str, str]) -> str | None:
    """A sentence on a source of files of several kinds, where every text file becomes a document; None for others."""
    texts = [name for name, kind in kinds.items() if kind == "txt"]
    if not texts or len(texts) == len(kinds):
        return None
    return (
        f"the source mixes kinds of files: {len(texts):,} text files (such as {texts[0]}), each of them one document, "
        f"among {len(kinds) - len(texts):,} files of records; name the files wanted by a glob if that is not meant"
    )


def describe(ignored: Iterable[Ignored]) -> str:
    """One line on the files that are not read; empty where there are none."""
    return ", ".join(map(str, ignored))


def _judge(name: str, pattern: Pattern, outputs: set[str]) -> tuple[str | None, str, str]:
    """Kind; or else None, the reason, and what is counted."""
    folders = itertools.accumulate(name.split("/")[:-1], lambda above, part: f"{above}/{part}") if outputs else ()
    for folder in folders:
        if folder in outputs:
            return None, MADE_BY_JOBS, f"{folder}/"
    if "" in outputs and _OWN_FILES.fullmatch(name):
        return None, MADE_BY_JOBS, name
    if part := hidden_part(name, pattern):
        return None, HIDDEN, part
    kind = kind_of(name)
    return kind, OTHER_FORMAT, name


def _outputs(names: Iterable[str]) -> set[str]:
    """Folders that jobs wrote, and the one where MLflow keeps files for them; "" is the source itself."""
    found = set()
    for name in filter(is_mark, names):
        folder = next(
            f"/{name}".removesuffix(f"/{mark}")
            for mark in (*_OUTPUT_MARKS, _STORE_MARK)
            if f"/{name}".endswith(f"/{mark}")
        )
        is_store = name.endswith(_STORE_MARK)
        found.add((f"{folder}/{_STORE_FILES}" if is_store else folder).removeprefix("/"))
    return found


def _beside_data(kinds: Mapping[str, str]) -> dict[str, str]:
    """Files that accompany others -> the reason why they are not read.

    What a name tells to be about data is left out beside and above files of records. Text files and .json files beside
    and above tables are left out too, unless the source has JSON lines, which makes it a mixture.
    """
    records = _folders_with(name for name, kind in kinds.items() if kind != "txt" and not _is_about(name))
    tables = _folders_with(name for name, kind in kinds.items() if kind in _TABLES and not _is_about(name))
    is_mixed = any(kind == "jsonl" and not _is_json(name) for name, kind in kinds.items())
    found = {}
    for name, kind in kinds.items():
        folder = name.rpartition("/")[0]
        if _is_about(name) and folder in records:
            found[name] = ABOUT_DATA
        elif (kind == "txt" or _is_json(name)) and folder in tables and not is_mixed:
            found[name] = TEXT_BESIDE_TABLES
    return found


def _is_about(name: str) -> bool:
    return _ABOUT.fullmatch(name.rpartition("/")[2]) is not None


def _is_json(name: str) -> bool:
    return re.search(r"\.json(\.\w+)?$", name, re.IGNORECASE) is not None


def _folders_with(names: Iterable[str]) -> set[str]:
    """The folders of the files, and all folders above; "" is the source itself."""
    found = {""} if (some := list(names)) else set()
    for name in some:
        folder = name.rpartition("/")[0]
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found
