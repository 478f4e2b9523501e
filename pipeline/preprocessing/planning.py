"""The plan of a job: which work items its source consists of, made once and noted in the output folder."""

from __future__ import annotations

import logging

from pipeline.config.data import TokenizeConfig, TrainTokenizerConfig
from pipeline.console import CountProgress
from pipeline.preprocessing import resume_state
from pipeline.sources.plan import make_plan, sample_plan
from pipeline.sources.sources import Layout, Source
from pipeline.sources.work_items import Damage, WorkItem
from pipeline.storage.folders import Folder

logger = logging.getLogger(__name__)


def plan_all(config: TokenizeConfig, source: Source, output: Folder) -> list[WorkItem]:
    """The work items that the output folder was begun with, or else new ones, which are noted there."""
    items = resume_state.read_plan(output)
    if items is not None:
        logger.info("the plan of %s work items is there from an earlier run", f"{len(items):,}")
        return items
    damage: Damage | None = [] if config.skip_bad_files else None
    items = make_plan(
        _read_layouts(source, config.text_column, damage),
        text_column=config.text_column,
        item_bytes=config.item_bytes,
        limit_documents=config.limit_documents,
        limit_bytes=config.limit_bytes,
    )
    resume_state.write_plan(output, items, damage or [])
    return items


def plan_sample(config: TrainTokenizerConfig, source: Source) -> list[WorkItem]:
    """Work items that are spread over the source and hold ``config.sample_bytes`` of text at most."""
    return sample_plan(
        _read_layouts(source, config.text_column, [] if config.skip_bad_files else None),
        text_column=config.text_column,
        item_bytes=config.item_bytes,
        sample_bytes=config.sample_bytes,
    )


def _read_layouts(source: Source, text_column: str, damage: Damage | None) -> list[Layout]:
    """The layouts of all files, with a progress bar; footers of parquet files are read.

    damage: takes a note of every file that cannot be read; None: such a file is an error.
    """
    with CountProgress("plan", "files", len(source.inputs)) as progress:
        return list(source.layouts(text_column, progress.add, damage))
