"""The job of jobs/import_shards.py: token files that others made become a folder of data as jobs/tokenize.py makes.

Files stay as they are. A local one is linked into the folder, a remote one is fetched into it, so no disk holds a file
twice. Each is read once, for its sha256, its documents, its bytes of text, and ids that the tokenizer does not have;
its record in ``items/`` is written behind it, and a killed download goes on from what is there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config.data import GPT2_TOKENIZER, ImportShardsConfig
from pipeline.console import CountProgress
from pipeline.dataset.dataset import TOKENIZER_NAME, load_tokenizer_of, save_tokenizer
from pipeline.dataset.manifest import IMPORTED, MANIFEST_NAME, SPLITS, Manifest, ShardEntry
from pipeline.dataset.shards import HEADER_BYTES, has_header, parse_header
from pipeline.dataset.token_counts import Counts, byte_lengths, count_file, require_width
from pipeline.errors import UserError
from pipeline.paths import in_bucket, resolve_path
from pipeline.preprocessing import resume_state
from pipeline.preprocessing.data_job import log_data, log_figures, report_json, run_job
from pipeline.preprocessing.resume_state import RunRecord
from pipeline.remote.download_cache import Cache
from pipeline.remote.hub_client import fetch_file
from pipeline.remote.remote_file import RemoteFile
from pipeline.run_files import SUMMARY_FILE
from pipeline.sources.sources import Input
from pipeline.sources.token_files import TokenFile, find_token_files
from pipeline.storage.folders import (
    TEMPORARY_PREFIX,
    Folder,
    LocalFolder,
    in_threads,
    node_cache,
    sync_folder,
    write_atomically,
    write_error,
)
from pipeline.storage.json_files import DamagedFileError, read_json
from pipeline.tokenizer.bpe import END_OF_TEXT, Tokenizer
from pipeline.tracking.mlflow_run import MLflowRun
from pipeline.tracking.tracker import Tracker

_DOWNLOADS = "items/downloads"
_FILES_AT_ONCE = 4
_HEADS_AT_ONCE = 16
_BLOCK_BYTES = 16 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """Figures of an import (summary.json)."""

    files: int
    train_tokens: int
    val_tokens: int
    documents: int
    """Of both splits, counted by the token between them."""
    text_megabytes: float
    """UTF-8 of both splits, from the lengths of the tokens."""
    vocab_size: int
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        return self.text_megabytes * 1e6 / (self.train_tokens + self.val_tokens)


class ShardImport:
    """One import: which files, made by which tokenizer.

    Raises:
        UserError: the tokenizer cannot be had, or has no token between documents.
    """

    def __init__(self, config: ImportShardsConfig) -> None:
        named = {split: getattr(config, split) for split in SPLITS}
        self.sources = {split: in_bucket(source) or str(resolve_path(source)) for split, source in named.items()}
        self.headerless = config.headerless
        self.tokenizer = read_tokenizer(config.tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self.eot_id = _eot_id(self.tokenizer, config)
        self.settings = {
            IMPORTED: True,
            "headerless": config.headerless,
            "eot_id": self.eot_id,
            "tokenizer": self.tokenizer.fingerprint,
        }

    @property
    def source(self) -> str:
        """Both sources, a line each."""
        return "\n".join(self.sources.values())

    def finished(self, output: Folder) -> Manifest | None:
        """The manifest, if all has been imported already; UserError where the folder holds something else."""
        names = (MANIFEST_NAME, TOKENIZER_NAME, SUMMARY_FILE)

        def inputs_now() -> list[Input]:
            return [file.input for file in _list(self.sources)[1]]

        if not resume_state.is_complete(output, self.source, self.settings, names=names, inputs_now=inputs_now):
            return None
        manifest = resume_state.find_shards(output, again="imported")
        try:
            if manifest:
                load_tokenizer_of(output, manifest)
        except UserError as error:
            logger.warning("%s; it is written anew", error)
            return None
        return manifest

    def run(self, output: Folder) -> Manifest:
        """Import every file that is not imported yet, and write the manifest behind them.

        Raises:
            UserError: nothing matches, a file is not what it should be, a place cannot be reached, another input.
        """
        record = resume_state.read_run(output)
        sources = dict(self.sources)
        if record is not None and record.pinned and record.source == resume_state.stored_source(self.source):
            at_commits = zip(SPLITS, record.pinned.split("\n"), strict=True)
            sources |= {split: place for split, place in at_commits if place.startswith("hf://")}
        pinned, files = _list(sources)
        in_threads(self._check_head, files, _HEADS_AT_ONCE)
        inputs = tuple(file.input for file in files)
        resume_state.claim(output, RunRecord(source=self.source, pinned=pinned, settings=self.settings, inputs=inputs))
        save_tokenizer(output, self.tokenizer)
        shards = self._import_all(output, files)
        resume_state.remove_others(output, {entry.name for entry in shards})
        manifest = Manifest(
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.vocab_size,
            eot_id=self.eot_id,
            settings=self.settings,
            inputs=tuple(entry.manifest_entry() for entry in inputs),
            shards=tuple(shards),
            skipped={},
        )
        manifest.save(output)
        return manifest

    def _check_head(self, file: TokenFile) -> None:
        """Raise UserError for what can be known of a file before all of it is read or fetched."""
        if file.size_bytes == 0:
            raise UserError(f"{file.where} is empty; fetch or write it again")
        head = file.head(HEADER_BYTES)
        if self.headerless:
            if has_header(head):
                raise UserError(f"{file.where} has the header of a shard; leave --headerless out")
            if file.size_bytes % 2:
                raise UserError(
                    f"{file.where} has {file.size_bytes:,} bytes, an odd number, so it was cut or does not hold bare "
                    "uint16 tokens; fetch it again"
                )
            require_width(file.where, 2, self.vocab_size)
            return
        if not has_header(head):
            numbers = ", ".join(map(str, np.frombuffer(head[: len(head) // 4 * 4][:8], dtype="<i4").tolist()))
            raise UserError(
                f"{file.where} has no header of a shard: it begins with the numbers {numbers} in place of 20240520, 1 "
                "or 20240801, 7; give --headerless if it holds bare uint16 tokens"
            )
        dtype, _ = parse_header(file.where, np.frombuffer(head, dtype="u1"), file.size_bytes)
        require_width(file.where, dtype.itemsize, self.vocab_size)

    def _import_all(self, output: Folder, files: Sequence[TokenFile]) -> list[ShardEntry]:
        """The entries of all files, in order."""
        named = []
        for split in SPLITS:
            of_split = [file for file in files if file.input.name.startswith(f"{split}: ")]
            named += [(f"{split}_{index:06d}", file) for index, file in enumerate(of_split)]
        lengths = byte_lengths(self.tokenizer)
        lengths[self.eot_id] = 0
        total_bytes = sum(file.size_bytes for file in files)
        downloads = output.path / _DOWNLOADS if isinstance(output, LocalFolder) else node_cache("import")
        lock, done_bytes = threading.Lock(), 0
        with CountProgress("import_shards", "MB") as bar:

            def progress(num_bytes: int) -> None:
                nonlocal done_bytes
                with lock:
                    done_bytes += num_bytes
                    bar.update_to(done_bytes // 1_000_000, total_bytes // 1_000_000)

            one = _FileImport(
                output=output, job=self, lengths=lengths, cache=Cache(downloads, total_bytes), progress=progress
            )
            entries = in_threads(lambda item: one.read_record(*item) or one.run(*item), named, _FILES_AT_ONCE)
        if isinstance(output, LocalFolder):
            shutil.rmtree(downloads, ignore_errors=True)
        return entries


@dataclass(frozen=True, kw_only=True)
class _FileImport:
    """How one file becomes a shard of the folder."""

    output: Folder
    job: ShardImport
    lengths: Counts
    """(V,) Bytes of text of every token."""
    cache: Cache
    progress: Callable[[int], None]

    def run(self, name: str, file: TokenFile) -> ShardEntry:
        """Fetch the file if need be, read it, put it into the folder as ``name``.bin, and record it."""
        if isinstance(file.place, RemoteFile):
            with self.cache.file(file.place, self.progress) as path:
                entry = self._take(name, file, path, None)
        else:
            entry = self._take(name, file, file.place, self.progress)
        record = {"input": dataclasses.asdict(file.input), "entry": entry.to_dict()}
        self.output.write(f"items/{name}.json", [json.dumps(record, indent=1).encode()])
        return entry

    def read_record(self, name: str, file: TokenFile) -> ShardEntry | None:
        """The entry of a file that was imported before and is still there."""
        try:
            record = read_json(self.output, f"items/{name}.json", _ImportRecord, mend="it is imported again")
        except DamagedFileError as error:
            logger.warning("%s", error)
            return None
        if record is None or record.input != file.input:
            return None
        entry = record.entry
        if not resume_state.is_whole(self.output, entry, len(self.lengths)):
            return None
        self.progress(file.size_bytes)
        return entry

    def _take(self, name: str, file: TokenFile, path: Path, progress: Callable[[int], None] | None) -> ShardEntry:
        """Read a whole file that is on this machine, and put it into the folder."""
        found = count_file(
            path, file.where, vocab_size=len(self.lengths), headerless=self.job.headerless, progress=progress
        )
        shard_name = f"{name}.bin"
        if isinstance(self.output, LocalFolder):
            _link(path, self.output.path / shard_name)
        else:
            self.output.write(shard_name, _blocks(path))
        return ShardEntry(
            name=shard_name,
            split=name.partition("_")[0],
            tokens=found.tokens,
            documents=int(found.counts[self.job.eot_id]),
            text_bytes=int(found.counts @ self.lengths),
            sha256=found.sha256,
            source=file.input.name.partition(": ")[2],
            headerless=self.job.headerless,
        )


@dataclass(frozen=True, kw_only=True)
class _ImportRecord:
    """The content of items/NAME.json: an imported file and what became of it."""

    input: Input
    entry: ShardEntry


def import_shards(config: ImportShardsConfig) -> tuple[ImportReport, MLflowRun, bool]:
    """Make the folder of data unless it exists; returns figures, MLflow run, and whether it existed already."""
    work = ShardImport(config)

    def make(output: Folder) -> ImportReport:
        began = time.perf_counter()
        manifest = work.run(output)
        report = ImportReport(
            files=len(manifest.shards),
            train_tokens=manifest.tokens("train"),
            val_tokens=manifest.tokens("val"),
            documents=sum(map(manifest.documents, SPLITS)),
            text_megabytes=sum(map(manifest.text_bytes, SPLITS)) / 1e6,
            vocab_size=manifest.vocab_size,
            seconds=time.perf_counter() - began,
        )
        output.write(SUMMARY_FILE, [report_json(report)])
        return report

    return run_job(
        config,
        "import_shards",
        ImportReport,
        is_done=lambda output: work.finished(output) is not None,
        make=make,
        track=_track,
    )


def read_tokenizer(address: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a model of the hub."""
    if not address.startswith("hf://"):
        return Tokenizer.from_file(resolve_path(address))
    try:
        path = fetch_file(f"{address.rstrip('/')}/{TOKENIZER_NAME}")
    except UserError as error:
        if address != GPT2_TOKENIZER:
            raise
        raise UserError(
            f"GPT-2's tokenizer is needed and cannot be fetched ({error}); or give --tokenizer FILE"
        ) from error
    return Tokenizer.from_json(path.read_bytes(), f"{address}/{TOKENIZER_NAME}")


def _eot_id(tokenizer: Tokenizer, config: ImportShardsConfig) -> int:
    if config.eot_id is not None:
        if config.eot_id >= tokenizer.vocab_size:
            raise UserError(f"eot_id is {config.eot_id:,}, but the tokenizer has ids below {tokenizer.vocab_size:,}")
        return config.eot_id
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise UserError(
            f"the tokenizer {config.tokenizer} has no special token {END_OF_TEXT}; give the id of the token between "
            "documents with --eot_id"
        )
    return tokenizer.eot_id


# ---- the files -------------------------------------------------------------------------------------------------------


def _list(sources: dict[str, str]) -> tuple[str | None, list[TokenFile]]:
    """The sources pinned to commits of the hub (None where neither is on it), and the files of both splits in order."""
    pinned, files = zip(*(find_token_files(source, f"--{split}") for split, source in sources.items()), strict=True)
    train, val = files
    val_places = {file.identity for file in val}
    for file in train:
        if file.identity in val_places:
            raise UserError(f"{file.where} matches --train and --val; a file that is trained on measures nothing")
    both = [
        dataclasses.replace(file, input=dataclasses.replace(file.input, name=f"{split}: {file.input.name}"))
        for split, found in zip(sources, files, strict=True)
        for file in found  # both sources may have a file of one name
    ]
    if not any(pinned):
        return None, both
    return "\n".join(place or source for place, source in zip(pinned, sources.values(), strict=True)), both


def _link(source: Path, target: Path) -> None:
    """Give the file a name in the folder: a hard link, or a symbolic one where the disk has none; else a copy."""
    source = source.resolve()
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        if source.stat().st_dev != target.parent.stat().st_dev:
            write_atomically(target, _blocks(source))
            return
        try:
            temporary.symlink_to(source)
        except OSError as error:
            raise write_error(target, error) from error
    temporary.replace(target)
    temporary.unlink(missing_ok=True)  # to rename one link of a file to another does nothing
    sync_folder(target.parent)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _track(output: Folder, report: ImportReport, tracker: Tracker) -> None:
    manifest = Manifest.load(output)
    source = ", ".join(dict.fromkeys(entry.source for entry in manifest.shards[:1] + manifest.shards[-1:]))
    log_data(tracker, output, manifest, source)
    log_figures(tracker, report, bytes_per_token=report.bytes_per_token)
