"""Which part of a tokenization is done: the files in ``items/`` beside the shards.

``items/run.json`` says what the folder is made from, and is written first; ``items/000000.json`` says what work item 0
became, and is written after its shards. So a run that stopped anywhere goes on with the items that have no valid
record, and a folder is never made with two settings. If the input changed before the end, the items concerned are made
again; afterwards it is an error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import TokenizeConfig
from pipeline.errors import UserError
from pipeline.shards import (
    MANIFEST_NAME,
    SPLITS,
    TEMPORARY_PREFIX,
    Manifest,
    ShardEntry,
    open_shard,
    open_split,
    write_atomically,
    write_error,
)
from pipeline.sources import Input, Source, find

TOKENIZER_NAME = "tokenizer.json"
_ITEMS = "items"
_RUN = "run.json"
MAX_ATTEMPTS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ItemRecord:
    """What a work item became."""

    key: str
    """Hash of what was read, of the settings and of the tokenizer."""
    shards: tuple[ShardEntry, ...]
    skipped: dict[str, int]
    """Reason -> documents that were left out."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What an output folder is made from."""

    source: str
    """As it was given."""
    pinned: str | None
    """The same, with what may move (a branch on the hub) fixed; None where nothing fixes it."""
    settings: dict[str, Any]
    inputs: tuple[Input, ...]


def settings_of(config: TokenizeConfig, tokenizer_fingerprint: str | None) -> dict[str, Any]:
    """What shards depend on besides the input; ``tokenizer_fingerprint`` is of the given one, None if it is trained."""
    trained = {"sample_bytes": config.sample_bytes, "vocab_size": config.vocab_size}
    return {
        "item_bytes": config.item_bytes,
        "text_column": config.text_column,
        "val_fraction": config.val_fraction,
        "tokenizer": tokenizer_fingerprint or trained,
    }


def find_source(source: str, output: Path) -> Source:
    """The source, at the revision that this output folder was begun with."""
    record = read_run(output)
    if record is not None and record.pinned and record.source == source:
        return find(record.pinned)
    return find(source)


def finished(config: TokenizeConfig, output: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest, where everything has been done already; None where work is left.

    Raises UserError where the folder holds shards of other settings or of other input.
    """
    if not is_complete(output, config.source, settings, names=(MANIFEST_NAME,)):
        return None
    if not (output / TOKENIZER_NAME).exists():
        return None
    try:
        for split in SPLITS:
            open_split(output, split)
    except UserError as error:
        logger.warning("%s; it is made again", error)
        return None
    return Manifest.load(output)


def is_complete(output: Path, source: str, settings: dict[str, Any], *, names: tuple[str, ...]) -> bool:
    """Whether a job has written the files ``names`` to its folder, with these settings and from this source.

    Raises UserError where the folder was begun with other settings, or finished from other input.
    """
    record = read_run(output)
    if record is None:
        return False
    _require_same_settings(output, record, settings)
    if not all((output / name).exists() for name in names):
        return False
    if record.pinned is None or record.source != source:
        _require_same_inputs(output, record, find(source).inputs())
    return True


def claim(output: Path, run: RunRecord) -> None:
    """Make the folder ready for work: checked or recorded what it is made from, leftovers of killed runs removed."""
    record = read_run(output)
    if record is None:
        _begin(output, run)
    else:
        _require_same_settings(output, record, run.settings)
        if (output / MANIFEST_NAME).exists():
            _require_same_inputs(output, record, list(run.inputs))
        elif record.inputs != run.inputs:
            logger.warning("the source has changed since %s was begun; what it concerns is made again", output)
            write_atomically(output / _ITEMS / _RUN, [_to_json(run)])
    remove_leftovers(output)
    (output / MANIFEST_NAME).unlink(missing_ok=True)  # the folder is not complete while work goes on in it


def read_run(output: Path) -> RunRecord | None:
    """What the folder is made from, or None where nothing was begun in it."""
    path = output / _ITEMS / _RUN
    try:
        values = json.loads(path.read_bytes())
        return RunRecord(**{**values, "inputs": tuple(Input(**entry) for entry in values["inputs"])})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete {output} and run the job again") from error


def _begin(output: Path, run: RunRecord) -> None:
    if any(output.glob("*.bin")):
        raise UserError(f"output folder {output} holds shards of unknown origin; choose another --output")
    try:
        (output / _ITEMS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output folder {output} cannot be made: {error.strerror}") from error
    write_atomically(output / _ITEMS / _RUN, [_to_json(run)])


def begin_attempt(output: Path, name: str) -> None:
    """Count that a task starts; raises UserError where ``MAX_ATTEMPTS`` of it were killed before.

    Ray starts a task again for ever when its process was killed, so an item too large for the memory would never end.
    """
    path = _attempts_path(output, name)
    try:
        with path.open("ab") as file:
            file.write(b".")
            num_attempts = file.tell()
    except OSError as error:
        raise write_error(path, error) from error
    if num_attempts > MAX_ATTEMPTS:
        raise UserError(
            f"the task {name} was killed {MAX_ATTEMPTS} times, most likely for want of memory; "
            "lower --item_bytes or --num_workers"
        )


def end_attempt(output: Path, name: str) -> None:
    """The task got through."""
    _attempts_path(output, name).unlink(missing_ok=True)


def write_item(output: Path, index: int, record: ItemRecord) -> None:
    """Record that an item is done; its shards must be written."""
    write_atomically(_item_path(output, index), [_to_json(record)])


def read_item_record(output: Path, index: int, key: str) -> ItemRecord | None:
    """The record of an item that is done with this ``key`` and whose shards are there in full length, else None."""
    try:
        values = json.loads(_item_path(output, index).read_bytes())
        shards = tuple(ShardEntry(**entry) for entry in values["shards"])
        record = ItemRecord(key=values["key"], shards=shards, skipped=values["skipped"])
        whole = all(len(open_shard(output / entry.name)) == entry.tokens for entry in shards)
    except (FileNotFoundError, ValueError, KeyError, TypeError, UserError):
        return None
    return record if record.key == key and whole else None


def remove_others(output: Path, names: set[str]) -> None:
    """Remove shards of an earlier state of the input that are not among ``names``."""
    for split in SPLITS:
        for path in output.glob(f"{split}_*.bin"):
            if path.name not in names:
                path.unlink()


def remove_leftovers(output: Path) -> None:
    """Remove half-written files of tasks that were killed; a task of the run before may end only while this one works."""
    for leftover in [*output.glob(f"{TEMPORARY_PREFIX}*"), *(output / _ITEMS).glob(f"{TEMPORARY_PREFIX}*")]:
        leftover.unlink(missing_ok=True)


def total_skipped(records: Iterable[ItemRecord]) -> dict[str, int]:
    """Reason -> documents, over all items."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.skipped)
    return dict(sorted(total.items()))


def _item_path(output: Path, index: int) -> Path:
    return output / _ITEMS / f"{index:06d}.json"


def _attempts_path(output: Path, name: str) -> Path:
    return output / _ITEMS / f"{TEMPORARY_PREFIX}attempts-{name}"


def _to_json(record: RunRecord | ItemRecord) -> bytes:
    return (json.dumps(dataclasses.asdict(record), indent=1, sort_keys=True) + "\n").encode()


def _require_same_settings(output: Path, record: RunRecord, settings: dict[str, Any]) -> None:
    if settings.keys() != record.settings.keys():
        raise UserError(
            f"output folder {output} was begun by another job, or by another version of this one; "
            "choose another --output"
        )
    for name in sorted(settings.keys() | record.settings.keys()):
        old, new = record.settings.get(name), settings.get(name)
        if old != new:
            raise UserError(
                f"output folder {output} was begun with {name} {_show(old)}, not {_show(new)}; "
                "delete it or choose another --output"
            )


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "trained with " + " and ".join(f"{name} {number:,}" for name, number in value.items())
    return f"of fingerprint {value[:16]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _require_same_inputs(output: Path, record: RunRecord, inputs: list[Input]) -> None:
    old, new = {entry.name: entry for entry in record.inputs}, {entry.name: entry for entry in inputs}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            change = "is new in" if name not in old else "is missing from" if name not in new else "has changed in"
            raise UserError(
                f"{name} {change} the source since output folder {output} was begun; "
                "delete it or choose another --output"
            )
