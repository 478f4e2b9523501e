"""What the settings say of documents, and what is worth a word before the work on a plan begins."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from pipeline.config.data import ReadingConfig, TokenizeConfig
from pipeline.errors import UserError
from pipeline.filters.rules import Rules
from pipeline.preprocessing.stages import Skip
from pipeline.sources.compressions import unpacked
from pipeline.sources.documents import USUAL
from pipeline.sources.readers import read_item
from pipeline.sources.work_items import DocumentRules, FileSlice, WorkItem, open_slice, reading

_SAMPLED_ITEMS = 64
_LOOKED_AT_FILES, _LOOKED_AT_BYTES = 4, 1 << 20  # for a separator between documents

logger = logging.getLogger(__name__)


def document_rules(config: ReadingConfig) -> DocumentRules:
    """What makes documents, by the settings; \\n, \\r and \\t in separators stand for these characters."""
    separator = config.document_separator
    return DocumentRules(
        column_separator=_unescaped(config.column_separator),
        document_separator=None if separator is None else _unescaped(separator),
        max_document_bytes=config.max_document_bytes,
    )


def filter_rules(config: TokenizeConfig) -> Rules:
    """The rules that documents must keep to, by the settings; UserError where one of them names nothing."""
    return Rules(
        groups=config.filters,
        bounds=config.filter_bounds,
        own=config.own_rules,
        mask_personal_data=config.mask_personal_data,
        languages=config.languages,
        language_score=config.language_score,
    )


def _unescaped(text: str) -> str:
    signs = {"\\n": "\n", "\\r": "\r", "\\t": "\t", "\\\\": "\\"}
    return re.sub(r"\\[nrt\\]", lambda found: signs[found[0]], text)


def what_to_skip(config: ReadingConfig) -> Skip:
    """What is left out where it cannot be read."""
    if config.skip_bad_files:
        return {"files", "records"}
    return {"records"} if config.skip_bad_records else ()


def sample_documents(items: Sequence[WorkItem], num_bytes: int) -> Iterator[str]:
    """Documents of at most 64 work items at even distances, from the beginning of each, about ``num_bytes`` together.

    A function of the plan and of the source alone. What cannot be read is left out.
    """
    count = min(_SAMPLED_ITEMS, len(items))
    for number in range(count):
        left = num_bytes // count
        for array in read_item(items[number * len(items) // count], Counter(), None, [], {}):
            for text in array.to_pylist():
                yield text
                left -= len(text.encode())
                if left <= 0:
                    break
            if left <= 0:
                break


# ---- what is worth a word before the work begins ---------------------------------------------------------------------


def advise(config: TokenizeConfig, items: Sequence[WorkItem]) -> None:
    """Warn where text files hold a separator that is not looked for, and where there is too little to hold out of."""
    slices = [file_slice for item in items for file_slice in item.slices]
    texts = [file_slice for file_slice in slices if file_slice.kind == "txt"]
    is_near = len(texts) == 1 or (bool(texts) and texts[0].file is None)
    for file_slice in texts[:_LOOKED_AT_FILES] if is_near else []:
        if found := _usual_separator(file_slice):
            logger.warning(
                "%s holds the separator %s, but every text file is taken as one document; --document_separator '%s' "
                "divides it",
                *(file_slice.name, found, found),
            )
            break
    documents = len(texts) if len(texts) == len(slices) else _count_of_one(items)
    if config.val_split == "tail" or config.val_fraction == 0 or documents is None:
        return
    if documents * config.val_fraction < 1:
        logger.warning(
            "the source has %s, too few for --val_fraction %g to hold out one for sure: --val_split tail holds out the "
            "end of each, --document_separator divides a text file; with nothing held out jobs/pretrain.py needs "
            "--val_every 0",
            "one document" if documents == 1 else f"{documents:,} documents",
            config.val_fraction,
        )


def _usual_separator(file_slice: FileSlice) -> str | None:
    """The separator that other people's files have, if the beginning of this file has it."""
    try:
        with reading(file_slice.where), open_slice(file_slice) as file:
            head = unpacked(file, file_slice.name).read(_LOOKED_AT_BYTES)
    except UserError:  # said when the file is read
        return None
    return next((text for text in USUAL if text.encode() in head), None)


def _count_of_one(items: Sequence[WorkItem]) -> int | None:
    """1 where the source is one local file with one document in it, else None."""
    if len(items) != 1 or len(items[0].slices) != 1 or items[0].slices[0].file is not None:
        return None
    arrays = read_item(items[0], Counter(), None, [], {})
    found = itertools.islice((text for array in arrays for text in array), 2)
    return 1 if len(list(found)) == 1 else None
