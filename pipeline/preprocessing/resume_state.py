"""State of a tokenization that can be resumed: the files in ``items/`` beside the shards.

``items/run.json`` names the input and the settings, and is written first; ``items/plan.jsonl`` holds the work items;
``items/000000.json`` is the record of work item 0, and is written after its shards. So a run that stopped anywhere
continues with the items that have no valid record, and a folder never mixes settings, or inputs that changed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import FailFast

from pipeline.config.data import ReadingConfig, TokenizeConfig
from pipeline.dataset.dataset import TOKENIZER_NAME
from pipeline.dataset.manifest import MANIFEST_NAME, SPLIT_HASH, Manifest, ShardEntry
from pipeline.dataset.shards import file_bytes
from pipeline.decontamination.documents import LIST_NAME as CONTAMINATED
from pipeline.errors import DamagedInputError, UserError
from pipeline.listing.selection import Ignored, describe, kind_of, select
from pipeline.remote.remote_file import stored_url
from pipeline.run_files import SUMMARY_FILE
from pipeline.sources import plan as plan_module
from pipeline.sources.sources import Input, Source, find
from pipeline.sources.work_items import Damage, WorkItem
from pipeline.storage.folders import TEMPORARY_PREFIX, Folder, in_threads
from pipeline.storage.json_files import DamagedFileError, read_json

MAX_ATTEMPTS = 3
_ITEMS = "items"
_RUN = f"{_ITEMS}/run.json"
_PLAN = f"{_ITEMS}/plan.jsonl"
_DAMAGE = f"{_ITEMS}/damaged.json"
_IGNORED = f"{_ITEMS}/ignored.json"
_MOST_BYTES_OF_INPUTS = 256 << 20  # some 200 a file of the source
_LATER_SETTINGS = {
    *("column_separator", "document_separator", "max_document_bytes", "val_split", "end_of_text_token"),
    *("filters", "filter_bounds", "own_rules", "mask_personal_data", "languages", "language_score"),
    *("dedup_words", "dedup_bands", "dedup_rows", "dedup_threshold"),
    "evaluation_sets",
}
_SHARD = re.compile(r"(train|val)(_flags)?_\d{6,}(-\d{3,})?\.bin")
_REQUESTS = 32  # at a time, because a bucket takes some 30 ms to answer one

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ItemRecord:
    """The shards of a work item, or of one part of an item far larger than the others."""

    key: str
    """Hash of what was read, of the settings and of the tokenizer."""
    is_last: bool
    """Whether the item ends with this part."""
    shards: Annotated[tuple[ShardEntry, ...], FailFast()]
    skipped: dict[str, int]
    """Reason -> documents that were left out."""
    damaged: tuple[dict[str, str], ...]
    """Name and reason of inputs that could not be read whole (--skip_bad_files)."""
    lengths: tuple[int, ...]
    """Number of documents of 2**i to 2**(i + 1) - 1 bytes, for every i."""
    first_skipped: dict[str, str] = field(default_factory=dict)
    """Reason -> a sentence about the first record that was left out because it holds no text (--skip_bad_records)."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The input and the settings that an output folder was begun with."""

    source: str
    """The source as it was given."""
    pinned: str | None
    """The source at a fixed revision of the hub; None where there is no such thing."""
    settings: dict[str, Any]
    inputs: Annotated[tuple[Input, ...], FailFast()]


def settings_of(config: TokenizeConfig, tokenizer_fingerprint: str | None) -> dict[str, Any]:
    """The settings that shards depend on. ``tokenizer_fingerprint``: of the given tokenizer; None if it is trained."""
    trained = {"sample_bytes": config.sample_bytes, "vocab_size": config.vocab_size}
    names = ("item_bytes", "text_column", "val_fraction", "limit_documents", "limit_bytes", "dedup")
    values = {name: getattr(config, name) for name in names} | later_settings(config)
    return values | {"split_hash": SPLIT_HASH, "tokenizer": tokenizer_fingerprint or trained}


def later_settings(config: ReadingConfig) -> dict[str, Any]:
    """The settings that came later and are noted only where they are not the default, so that old folders go on."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(config) if entry.name in _LATER_SETTINGS}
    values = {name: getattr(config, name) for name in sorted(defaults)}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()
    }  # as JSON has it


def begin(folder: Folder, source: str, settings: dict[str, Any]) -> tuple[Source, RunRecord]:
    """Claim the folder for a source, which is listed at the revision that the folder was begun with."""
    record = read_run(folder)
    found = find(record.pinned if record is not None and record.pinned and record.source == source else source)
    if found.ignored:
        logger.warning("not read: %s", describe(found.ignored))
    if found.mixed:
        logger.warning("%s", found.mixed)
    run = RunRecord(source=source, pinned=found.pinned, settings=settings, inputs=tuple(found.inputs))
    claim(folder, run)
    return found, run


def stored_source(source: str) -> str:
    """A source, or several, a line each, without what may be a secret: as it stands in the records of a folder."""
    return "\n".join(map(stored_url, source.split("\n")))


def find_shards(folder: Folder, *, again: str = "made") -> Manifest | None:
    """The manifest, if all its shards have their size; ``again``: what is done where one has not, for a warning."""
    manifest = Manifest.load(folder)
    found = in_threads(lambda entry: is_whole(folder, entry, manifest.vocab_size), manifest.shards, _REQUESTS)
    lost = [entry.name for entry, is_there in zip(manifest.shards, found, strict=True) if not is_there]
    if lost:
        logger.warning("%s of %s is missing or damaged; it is %s again", lost[0], folder, again)
    return None if lost else manifest


def is_complete(
    folder: Folder,
    source: str,
    settings: dict[str, Any],
    *,
    names: tuple[str, ...],
    inputs_now: Callable[[], list[Input]] | None = None,
) -> bool:
    """Whether a job has written the files ``names`` to its folder, with these settings and from this source.

    inputs_now: lists the inputs of the source as they are now; by default ``source`` is listed as a source of text.
    Raises UserError where the folder was begun with other settings, or from other input.
    """
    record = read_run(folder)
    if record is None:
        return False
    _require_same_settings(folder, record, settings)
    if any(folder.size(name) is None for name in names):
        return False
    if record.pinned is None or record.source != source:
        _require_same_inputs(folder, record, inputs_now() if inputs_now else find(source).inputs)
    return True


def claim(folder: Folder, run: RunRecord) -> None:
    """Prepare a folder for work: check or record its input and settings, and remove leftovers of killed runs."""
    record = read_run(folder)
    if record is None:
        if any(name.endswith(".bin") for name in folder.names()):
            raise UserError(f"output folder {folder} holds shards of unknown origin; choose another --output")
        for name in (MANIFEST_NAME, TOKENIZER_NAME, SUMMARY_FILE, CONTAMINATED):
            if folder.size(name) is not None:
                raise UserError(
                    f"output folder {folder} holds a {name} of unknown origin, which the job would replace; choose "
                    "another --output"
                )
        folder.make()
        pinned = None if run.pinned is None else stored_source(run.pinned)
        folder.write(_RUN, [_to_json(dataclasses.replace(run, source=stored_source(run.source), pinned=pinned))])
    else:
        _require_same_settings(folder, record, run.settings)
        _require_same_inputs(folder, record, list(run.inputs))
    folder.remove_leftovers()  # a task of the previous run may still be running
    folder.delete(MANIFEST_NAME)  # a folder with a manifest would count as complete


def read_run(folder: Folder) -> RunRecord | None:
    """The input and the settings of a folder; None where nothing was begun in it."""
    return read_json(
        folder, _RUN, RunRecord, mend=f"delete {folder} and run the job again", most_bytes=_MOST_BYTES_OF_INPUTS
    )


def read_plan(folder: Folder) -> list[WorkItem] | None:
    """The work items that a folder was begun with; None where there is no plan yet."""
    try:
        return plan_module.load_plan(folder.read(_PLAN))
    except FileNotFoundError:
        return None


def read_plan_damage(folder: Folder) -> Damage:
    """Files that are not in the plan because they cannot be read."""
    return read_json(folder, _DAMAGE, list[dict[str, str]], mend=f"delete {folder} and run the job again") or []


def read_ignored(folder: Folder) -> tuple[dict[str, Any], ...]:
    """What lay in the source and is not read, by reason, as it was when the plan was made."""
    mend = f"delete {folder} and run the job again"
    return tuple(read_json(folder, _IGNORED, list[dict[str, Any]], mend=mend) or ())


def write_plan(folder: Folder, items: Sequence[WorkItem], damage: Damage, ignored: Sequence[Ignored]) -> None:
    """Write the work items, the files that could not be read for the plan, and those that are no part of it."""
    if damage:
        folder.write(_DAMAGE, [json.dumps(damage).encode()])
    if ignored:
        folder.write(_IGNORED, [json.dumps([entry.to_dict() for entry in ignored]).encode()])
    folder.write(_PLAN, [plan_module.save_plan(plan_module.without_queries(items))])


# ---- work items ------------------------------------------------------------------------------------------------------


def begin_attempt(
    folder: Folder, name: str, *, label: str, job: str, node: str, alive_nodes: Callable[[], set[str]]
) -> None:
    """Note that the task ``name``, which reads ``label``, starts.

    Raises DamagedInputError if it was killed ``MAX_ATTEMPTS`` times before. Ray would start a killed task again without
    end, so an item that is too large for the memory would never end. Attempts of other jobs, and on nodes that died, do
    not count.
    """
    path = _attempts_name(name)
    try:
        attempts = read_json(folder, path, list[tuple[str, str]], mend="it is begun anew") or []
    except DamagedFileError:  # half-written
        attempts = []
    if attempts:
        alive = alive_nodes()
        attempts = [(job_before, node_before) for job_before, node_before in attempts if job_before == job]
        if sum(node_before in alive for _, node_before in attempts) >= MAX_ATTEMPTS:
            raise DamagedInputError(
                f"{label} is given up: its worker was killed {MAX_ATTEMPTS} times, most likely for want of memory; "
                "lower --item_bytes or --num_workers, or leave it out with --skip_bad_files"
            )
    folder.write(path, [json.dumps([*attempts, (job, node)]).encode()], flush="nothing")


def end_attempt(folder: Folder, name: str) -> None:
    """Note that the task ``name`` has ended."""
    folder.delete(_attempts_name(name))


def write_item(folder: Folder, index: int, part: int, record: ItemRecord) -> None:
    """Record that a part of an item is done; its shards must be written."""
    folder.write(_item_name(index, part), [_to_json(record)], flush="nothing")  # a half-written record is no valid one


def read_item_records(folder: Folder, index: int, key: str, vocab_size: int) -> list[ItemRecord] | None:
    """The records of an item that was done with this ``key``, if all its shards have their size; otherwise None."""
    records: list[ItemRecord] = []
    while not records or not records[-1].is_last:
        try:
            record = read_json(folder, _item_name(index, len(records)), ItemRecord, mend="it is done again")
        except DamagedFileError:  # half-written
            return None
        if (
            record is None
            or record.key != key
            or not all(is_whole(folder, entry, vocab_size) for entry in record.shards)
        ):
            return None
        records.append(record)
    return records


def read_all_records(folder: Folder, keys: Sequence[str], vocab_size: int) -> list[list[ItemRecord] | None]:
    """The result of ``read_item_records`` for every item, with many requests at a time."""
    numbers = range(len(keys))
    return in_threads(lambda index: read_item_records(folder, index, keys[index], vocab_size), numbers, _REQUESTS)


def shard_name(split: str, index: int, part: int) -> str:
    """Name of a shard: train_000012.bin, or train_000012-001.bin for the second part of a very large item."""
    return f"{split}_{_numbered(index, part)}.bin"


def remove_others(folder: Folder, names: set[str]) -> None:
    """Remove shards that are not among ``names``."""
    for name in folder.names():
        if _SHARD.fullmatch(name) and name not in names:
            folder.delete(name)


def is_whole(folder: Folder, entry: ShardEntry, vocab_size: int) -> bool:
    """Whether the file of a manifest's entry is there and has its size."""
    return folder.size(entry.name) == file_bytes(entry, vocab_size)


def _numbered(index: int, part: int) -> str:
    return f"{index:06d}-{part:03d}" if part else f"{index:06d}"


def _item_name(index: int, part: int) -> str:
    return f"{_ITEMS}/{_numbered(index, part)}.json"


def _attempts_name(name: str) -> str:
    return f"{_ITEMS}/{TEMPORARY_PREFIX}attempts-{name}"


def _to_json(record: RunRecord | ItemRecord) -> bytes:
    values = dataclasses.asdict(record)
    if isinstance(record, ItemRecord):
        values["shards"] = [entry.to_dict() for entry in record.shards]
        values = {name: value for name, value in values.items() if name != "first_skipped" or value}
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def _require_same_settings(folder: Folder, record: RunRecord, settings: dict[str, Any]) -> None:
    if (settings.keys() ^ record.settings.keys()) - _LATER_SETTINGS:
        raise UserError(
            f"output folder {folder} was begun by another job, or by another version of this one; "
            "choose another --output"
        )
    for name in sorted(settings.keys() | record.settings.keys()):
        old, new = (values.get(name, "left out") for values in (record.settings, settings))
        if old != new and name == "evaluation_sets":
            cure = "give the same --decontaminate" if name in record.settings else "give --decontaminate none"
            raise UserError(
                f"output folder {folder} was begun with another choice of evaluation questions to leave out; {cure} to "
                "go on with it, or choose another --output"
            )
        if old != new:
            raise UserError(
                f"output folder {folder} was begun with {name} {_show(old)}, not {_show(new)}; "
                "delete it or choose another --output"
            )


def _show(value: Any) -> str:
    if isinstance(value, str) and not value.isprintable():
        return repr(value)
    if isinstance(value, dict):
        return "trained with " + " and ".join(f"{name} {number:,}" for name, number in value.items())
    return f"of fingerprint {value[:16]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _require_same_inputs(folder: Folder, record: RunRecord, inputs: list[Input]) -> None:
    old, new = {entry.name: entry for entry in record.inputs}, {entry.name: entry for entry in inputs}
    kinds = select(old.keys() | new.keys(), "").kinds
    no_longer_read = {name for name in old.keys() - new.keys() if kind_of(name) and name not in kinds}
    for name in sorted((old.keys() | new.keys()) - no_longer_read):  # by an earlier rule; the plan has them
        if old.get(name) != new.get(name):
            change = "is new in" if name not in old else "is missing from" if name not in new else "has changed in"
            raise UserError(
                f"{name} {change} the source since output folder {folder} was begun; "
                "delete it or choose another --output"
            )
