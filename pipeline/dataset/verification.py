"""Shards read again and compared with their manifest: whole folders for --verify, and beside the training.

Beside the training every node reads its own view of the files, a share of them on each of its ranks; a run of 20 GB has
read all of them after seconds, one of terabytes after hours. A file that differs ends the run at the end of a step.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset.manifest import IMPORTED, Manifest, ShardEntry
from pipeline.dataset.shards import HEADER_BYTES, MEND, ShardFiles, file_bytes, other_sha256, parse_header, token_dtype
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, as_folder, in_threads

_READ_BYTES = 8 << 20  # at a time


class ShardCheck:
    """Reads every shard in a thread and compares its sha256.

    Args:
        files: shards to read.
        share, num_shares: this process reads shard number ``share`` and every num_shares-th behind it.
    """

    def __init__(self, files: Sequence[ShardFiles], *, share: int, num_shares: int) -> None:
        self.files, self.share, self.num_shares = files, share, num_shares
        self.num_checked = 0
        self.error: UserError | None = None
        """The first shard that differs; None so far."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._check, name="shard-check", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, also in the middle of a file."""
        self._over.set()
        self._thread.join()

    def _check(self) -> None:
        shards = [(files, index) for files in self.files for index in range(len(files))]
        try:
            for files, index in shards[self.share :: self.num_shares]:
                if not self._has_its_checksum(files, index):
                    return
                self.num_checked += 1
        except UserError as error:
            self.error = error

    def _has_its_checksum(self, files: ShardFiles, index: int) -> bool:
        """Read a whole file and raise UserError if it differs from the manifest; False if ``stop`` cut it short."""
        entry, digest = files.entries[index], hashlib.sha256()
        path = files.folder / entry.name
        try:
            with path.open("rb", buffering=0) as file:
                while part := file.read(_READ_BYTES):
                    digest.update(part)
                    if self._over.is_set():
                        return False
        except OSError as error:
            raise UserError(f"shard {path} cannot be read any more ({error.strerror}); {MEND}") from error
        if digest.hexdigest() != entry.sha256:
            raise UserError(f"shard {path} is damaged: {other_sha256(digest.hexdigest(), entry.sha256)}; {MEND}")
        return True


def verify(folder: Folder | Path, *, num_threads: int = 8, progress: Callable[[int], None] | None = None) -> list[str]:
    """Read every shard again; returns a sentence for every difference from the manifest.

    Checked are size, header, sha256, the range of the ids, and the number of documents. Memory: some 25 MB a thread.

    Args:
        progress: called with 1 after each shard, by one thread at a time.

    Raises:
        UserError: there is no manifest to compare with, or it is damaged.
    """
    folder = as_folder(folder)
    manifest = Manifest.load(folder)
    lock = threading.Lock()

    def check(entry: ShardEntry) -> list[str]:
        found = _problems(folder, entry, manifest)
        with lock:
            if progress is not None:
                progress(1)
        return found

    names = [entry.name for entry in manifest.shards]
    results = in_threads(check, manifest.shards, num_threads)
    problems = {name: sentences for name, sentences in zip(names, results, strict=True) if sentences}
    times = Counter(names)
    twice = [f"shard {folder}/{name} is {number} times in the manifest" for name, number in times.items() if number > 1]
    unknown = [name for name in folder.names() if name.endswith(".bin") and "/" not in name and name not in times]
    found = [sentence for name in times for sentence in problems.get(name, ())]
    return [*found, *twice, *(f"shard {folder}/{name} is not in the manifest" for name in unknown)]


def _problems(folder: Folder, entry: ShardEntry, manifest: Manifest) -> list[str]:
    where = f"{folder}/{entry.name}"
    expected_bytes = file_bytes(entry, manifest.vocab_size)
    try:
        size_bytes = folder.size(entry.name)
        if size_bytes is None:
            return [f"shard {where} is missing"]
        if size_bytes != expected_bytes:
            return [f"shard {where} has {size_bytes:,} bytes, but its {entry.tokens:,} tokens take {expected_bytes:,}"]
        return _problems_of_content(folder, entry, manifest)
    except FileNotFoundError:
        return [f"shard {where} is missing"]
    except UserError as error:
        return [str(error)]


def _problems_of_content(folder: Folder, entry: ShardEntry, manifest: Manifest) -> list[str]:
    where = f"{folder}/{entry.name}"
    dtype = token_dtype(manifest.vocab_size)
    header = b"" if entry.headerless else folder.read_range(entry.name, 0, HEADER_BYTES)
    digest = hashlib.sha256(header)
    largest, num_documents, first = 0, 0, None
    stop = file_bytes(entry, manifest.vocab_size)
    for start in range(len(header), stop, _READ_BYTES):
        content = folder.read_range(entry.name, start, min(start + _READ_BYTES, stop))
        if len(content) < min(_READ_BYTES, stop - start):
            return [f"shard {where} became shorter while it was read"]
        digest.update(content)
        ids = np.frombuffer(content, dtype=dtype.newbyteorder("<"))
        first = int(ids[0]) if first is None else first
        largest = max(largest, int(ids.max()))
        num_documents += int(np.count_nonzero(ids == manifest.eot_id))
    found = [] if entry.headerless else _problems_of_header(where, header, stop, dtype)
    if digest.hexdigest() != entry.sha256:
        found.append(f"shard {where} is damaged: {other_sha256(digest.hexdigest(), entry.sha256)}")
    if largest >= manifest.vocab_size:
        found.append(f"shard {where} holds the id {largest:,}, but ids are below {manifest.vocab_size:,}")
    if manifest.chat_template is not None:  # documents begin where the flags say
        return found
    if num_documents != entry.documents:
        found.append(f"shard {where} holds {num_documents:,} documents, but the manifest says {entry.documents:,}")
    if first != manifest.eot_id and not manifest.settings.get(IMPORTED):
        found.append(f"shard {where} begins with the id {first}, not with {manifest.eot_id}, as every document does")
    return found


def _problems_of_header(where: str, header: bytes, size_bytes: int, dtype: np.dtype[Any]) -> list[str]:
    try:
        found_dtype, _ = parse_header(where, np.frombuffer(header, dtype="u1"), size_bytes)
    except UserError as error:
        return [str(error)]
    if found_dtype != dtype:
        return [f"shard {where} has tokens of {found_dtype.itemsize} bytes, but the manifest says {dtype.itemsize}"]
    return []
