"""The task of the Ray Data graph that makes windows of conversations; those before and behind it are tokenization's.

What it writes is a function of its work item, the tokenizer and the settings, as of documents.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.conversations.messages import TOO_LONG, is_held_out
from pipeline.conversations.packing import fill
from pipeline.conversations.reading import Conversation, read_conversations
from pipeline.conversations.templates import Chat, EncodedConversation, chat_of
from pipeline.dataset.manifest import FLAGS, SPLITS
from pipeline.dataset.packed import num_learned
from pipeline.dataset.shards import token_dtype
from pipeline.errors import DamagedInputError
from pipeline.preprocessing import resume_state
from pipeline.preprocessing.rows import ItemRow, stage_of
from pipeline.preprocessing.stages import EncodeJob, begin_attempt, fetched_table, get_tokenizer, sum_up
from pipeline.sources.work_items import Damage, LeftOut, RecordError
from pipeline.storage.folders import open_folder

_ENCODED_TOGETHER = 512  # conversations


@dataclass(frozen=True, kw_only=True)
class PackJob(EncodeJob):
    """The settings of every task that packs conversations."""

    chat_template: str
    """Name of the template."""
    context_length: int
    """T; a window has one token more."""

    @property
    def capacity(self) -> int:
        """Tokens of a window."""
        return self.context_length + 1


@dataclass(kw_only=True)
class _Part:
    """Conversations of a work item that become the windows of a shard per split."""

    encoded: dict[str, list[EncodedConversation]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def is_large(self, part_bytes: int) -> bool:
        return sum(self.text_bytes.values()) >= part_bytes


def _columns(arguments: dict[str, Any]) -> dict[str, pa.DataType]:
    dtype = pa.from_numpy_dtype(token_dtype(arguments["job"].vocab_size))
    return {f"{split}_ids": dtype for split in (*SPLITS, *FLAGS.values())}


@stage_of(_columns)
def encode_conversations(row: ItemRow, job: PackJob) -> Iterator[ItemRow]:
    """Conversations -> ids and flags of windows, a row per part; only figures for an item that was done before."""
    item, folder = row.work_item, open_folder(job.output)
    records = resume_state.read_item_records(folder, item.index, job.key(item), job.vocab_size)
    if records is not None:
        yield ItemRow(item=row.item, figures=sum_up(records))
        return
    left_out = LeftOut(counts=Counter(), first={})
    damaged: Damage = []
    number, part = 0, _Part()
    try:
        row.raise_error()
        begin_attempt(folder, "encode", item)
        chat = chat_of(job.chat_template, get_tokenizer(job.tokenizer))
        found = read_conversations(item, left_out, fetched_table(row), damaged if "files" in job.skip else None)
        while group := list(itertools.islice(found, _ENCODED_TOGETHER)):
            if part.is_large(job.part_bytes):
                yield _row(row, job, number, part)
                number, part = number + 1, _Part()
            _add(part, group, chat, job, left_out)
    except DamagedInputError as error:
        if "files" not in job.skip:
            raise
        damaged.append({"name": item.label, "reason": str(error)})
    last = _row(row, job, number, part)
    known = {"skipped": +left_out.counts, "damaged": damaged, "first_skipped": left_out.first}
    last.figures |= known | {"is_last": True}
    yield last


def _add(part: _Part, group: Sequence[Conversation], chat: Chat, job: PackJob, left_out: LeftOut) -> None:
    """Encode conversations into a part; those that do not fit into a window are left out."""
    for conversation, encoded in zip(group, chat.encode([each.messages for each in group]), strict=True):
        if len(encoded.ids) > job.capacity:
            what = f"has {len(encoded.ids):,} tokens, more than a window of {job.context_length:,} + 1 holds"
            left_out.add_bad(RecordError(what, TOO_LONG), conversation.place, conversation.file_slice)
            continue
        split = SPLITS[is_held_out(conversation.messages, job.val_fraction)]
        part.encoded[split].append(encoded)
        part.text_bytes[split] += conversation.num_bytes


def _row(row: ItemRow, job: PackJob, number: int, part: _Part) -> ItemRow:
    """The windows of a part, and its figures; what was left out is known when the last part is made."""
    chat_tokenizer = get_tokenizer(job.tokenizer)
    arrays: dict[str, pa.Array] = {}
    learned: dict[str, int] = {}
    for split in SPLITS:
        ids, flags = fill(
            part.encoded[split],
            capacity=job.capacity,
            filling_id=chat_tokenizer.eot_id,
            dtype=token_dtype(job.vocab_size),
        )
        arrays |= {f"{split}_ids": pa.array(ids), f"{FLAGS[split]}_ids": pa.array(flags)}
        learned[split] = num_learned(flags)
    none = dict.fromkeys(FLAGS.values(), 0)
    figures = {
        "part": number,
        "is_last": False,
        "documents": {split: len(part.encoded[split]) for split in SPLITS} | none,
        "text_bytes": part.text_bytes | none,
        "learned_tokens": learned,
        "lengths": [],
        "skipped": {},
        "damaged": [],
        "first_skipped": {},
    }
    return ItemRow(item=row.item, figures=figures, arrays=arrays)
