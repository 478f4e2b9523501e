"""The Ray Data graph: stages over work items, fused into one task or handed over in blocks of an item.

Local sources: encode -> write in one task; no text travels through the object store. Remote sources have a download
stage in front, with a concurrency of its own, which hands over the bytes that an item needs (compressed column chunks)
through the object store, so that network and processors work at the same time, on whatever node has room. Ray must be
initialised by the caller.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from pipeline.cluster import ray_cluster
from pipeline.config.data import ReadingConfig
from pipeline.preprocessing import stages
from pipeline.preprocessing.progress import ItemProgress
from pipeline.preprocessing.rows import ItemRow
from pipeline.sources.plan import fetch_units
from pipeline.sources.work_items import WorkItem

if TYPE_CHECKING:
    import ray

Stages: TypeAlias = list[tuple[Callable[..., Any], dict[str, Any]]]

_BLOCK_BYTES = 64_000_000  # least text of one task, because Ray takes some 15 ms to start one
_BLOCK_BYTES_PER_SLOT = 3_000_000  # at 60 MB/s per core, a thousand cores then need 20 tasks per second
_BLOCKS_PER_SLOT = 8  # least number, so that no worker waits long for the last one


def run_items(items: Sequence[WorkItem], steps: Stages, config: ReadingConfig, *, title: str) -> Iterator[ItemRow]:
    """The rows of the last stage, as they arrive; raises the first error of a stage.

    The figures of a row: text_bytes, tokens, and whether it is the item's last.
    """
    if not items:
        return
    with contextlib.closing(ItemProgress(title, items)) as progress:
        for row in _run(items, steps, config):
            row.raise_error()
            figures = row.figures
            progress.add(row.work_item.index, figures["text_bytes"], figures["tokens"], is_last=figures["is_last"])
            yield row


def run_rows(rows: Sequence[str], stage: Callable[..., Any], arguments: dict[str, Any], config: ReadingConfig) -> None:
    """Run one stage over rows that are named by strings; raises the first error."""
    for row in _execute([[ItemRow(item=row)] for row in rows], [(stage, arguments)], _num_workers(config)):
        row.raise_error()


def _run(items: Sequence[WorkItem], steps: Stages, config: ReadingConfig) -> Iterator[ItemRow]:
    slots = _num_workers(config)
    if not any(file_slice.file for item in items for file_slice in item.slices):
        rows = [ItemRow.of(item) for item in items]
        size = _items_per_block(items, slots)
        blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
        return _execute(blocks, steps, slots)
    return _execute([[ItemRow.of(*unit)] for unit in fetch_units(items)], steps, slots, download=config)


def _num_workers(config: ReadingConfig) -> int:
    return config.num_workers or ray_cluster.cpus()


def _items_per_block(items: Sequence[WorkItem], slots: int) -> int:
    """Items per task: enough to make its start cheap, few enough that all workers have tasks."""
    mean_bytes = max(1, sum(item.size_bytes for item in items) // len(items))
    wanted = max(_BLOCK_BYTES, slots * _BLOCK_BYTES_PER_SLOT) // mean_bytes
    return max(1, min(wanted, len(items) // (slots * _BLOCKS_PER_SLOT)))


def _execute(
    blocks: Sequence[Sequence[ItemRow]], steps: Stages, num_workers: int, download: ReadingConfig | None = None
) -> Iterator[ItemRow]:
    import ray

    _quiet_ray_data()
    dataset: ray.data.Dataset = ray.data.from_arrow(
        [pa.concat_tables([row.to_table() for row in rows]) for rows in blocks]
    )
    options: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    if download is not None:
        dataset = dataset.map_batches(
            stages.download,
            fn_kwargs={"cache_bytes": download.cache_bytes},
            compute=ray.data.TaskPoolStrategy(
                size=min(len(blocks), download.download_workers or max(2, num_workers // 2))
            ),
            num_cpus=0,  # waits for the network
            **options,
        )
    strategy = ray.data.TaskPoolStrategy(
        size=num_workers if download is not None else _tasks_at_once(dataset, num_workers, len(blocks))
    )
    work: Callable[..., Any] = in_turn
    dataset = dataset.map_batches(work, fn_kwargs={"steps": steps}, compute=strategy, **options)
    table: Any
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for index in range(table.num_rows):
            yield ItemRow.from_table(table.slice(index, 1))


def _tasks_at_once(dataset: ray.data.Dataset, num_workers: int, num_blocks: int) -> int:
    """Twice as many tasks as workers if these are all that the cluster can run at a time, so that half of them wait.

    Ray Data polls for finished tasks every 100 ms, twice for each, while a task that waits in the cluster starts within
    15 ms after the one before. Ray Data's own reservation of CPUs is switched off: it lets no task wait, sees no CPU in
    the first second, and the cluster keeps count of them anyway.
    """
    dataset.context.op_resource_reservation_enabled = False
    waiting = num_workers if num_workers >= ray_cluster.cpus() else 0
    return min(num_workers + waiting, num_blocks)  # more than there are blocks: a warning


def in_turn(table: pa.Table, steps: Stages) -> Iterator[pa.Table]:
    """Run all stages of one item, row by row, before the next item begins.

    As stages of their own, fused by Ray, each would go on until Ray's buffer behind it holds 128 MB: a worker that is
    killed would take many encoded items with it, and all of them would count as attempted.
    """
    stages.use_system_memory()
    function, arguments = steps[0]
    for result in function(table, **arguments):
        if len(steps) > 1:
            yield from in_turn(result, steps[1:])
        else:
            yield result


def _quiet_ray_data() -> None:
    """Silence Ray Data, whose full log is in its session folder: this project has a bar and log lines of its own."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        is_rays = type(handler).__module__.startswith("ray.")  # others may have added handlers to all loggers
        if is_rays and isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
