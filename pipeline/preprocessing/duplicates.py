"""Finding the documents that jobs/tokenize.py --dedup leaves out: exact copies, or near-duplicates by MinHash.

Each step of either method is a function of the step before and leaves files in ``items/``, so that a run that was
stopped goes on with what is not there; all of them are removed when the manifest is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pipeline.config.data import TokenizeConfig
from pipeline.deduplication import exact, minhash, near
from pipeline.deduplication.minhash import Scheme
from pipeline.filters.rules import Rules
from pipeline.preprocessing import ray_dataflow, resume_state, stages
from pipeline.preprocessing.encode_documents import text_bytes
from pipeline.preprocessing.planning import filter_rules, what_to_skip
from pipeline.preprocessing.rows import ItemRow, stage_of
from pipeline.preprocessing.stages import Skip
from pipeline.sources.work_items import WorkItem
from pipeline.storage.folders import Folder, open_folder

REASONS = {"off": "", "exact": "duplicate", "minhash": "near-duplicate"}
"""Reason under which the manifest counts what a method leaves out."""
_FOLDERS = (exact.HASHES, near.SIGNATURES, near.SHINGLES, near.PAIRS, exact.DUPLICATES)


def find(config: TokenizeConfig, items: Sequence[WorkItem], output: Folder) -> int:
    """Find the documents that are copies of earlier ones; returns the number of files that name them."""
    if config.dedup == "off":
        return 0
    return _find_exact(config, items, output) if config.dedup == "exact" else _find_near(config, items, output)


def remove_files(output: Folder) -> None:
    """Remove what the search has left in the output folder."""
    for folder in _FOLDERS:
        for name in output.names(folder):
            output.delete(name)


def _find_exact(config: TokenizeConfig, items: Sequence[WorkItem], output: Folder) -> int:
    left = [item for item in items if output.size(exact.hashes_name(item.index)) is None]
    arguments = {"output": str(output), "skip": what_to_skip(config), "rules": filter_rules(config)}
    for _ in ray_dataflow.run_items(left, [(stages.hash_documents, arguments)], config, title="find copies"):
        pass
    sizes = [output.size(exact.hashes_name(item.index)) or 0 for item in items]
    partitions = exact.num_partitions(sum(map(exact.num_documents, sizes)))
    search = {"output": str(output), "num_items": len(items), "partitions": partitions}
    ray_dataflow.run_rows([str(partition) for partition in range(partitions)], stages.search_duplicates, search, config)
    return partitions


def _find_near(config: TokenizeConfig, items: Sequence[WorkItem], output: Folder) -> int:
    scheme = Scheme(words=config.dedup_words, bands=config.dedup_bands, rows=config.dedup_rows)
    near.warm_up()  # compiled here once, not in every worker at the same time
    _sign(config, scheme, items, output)
    sizes = [output.size(near.signatures_name(item.index)) or 0 for item in items]
    partitions = near.num_partitions(sum(map(near.num_keys, sizes)))
    wanted = [number for number in range(partitions) if output.size(near.pairs_name(number)) is None]
    search = {"output": str(output), "num_items": len(items), "partitions": partitions}
    pairs = search | {"threshold": config.dedup_threshold}
    if wanted:
        ray_dataflow.run_rows([str(number) for number in wanted], pair_documents, pairs, config)
    ray_dataflow.run_rows(["all"], join_pairs, search, config)
    return 1


def _sign(config: TokenizeConfig, scheme: Scheme, items: Sequence[WorkItem], output: Folder) -> None:
    left = [item for item in items if output.size(near.signatures_name(item.index)) is None]
    arguments = {
        "output": str(output),
        "skip": what_to_skip(config),
        "rules": filter_rules(config),
        "scheme": scheme,
        "keep_shingles": config.dedup_threshold is not None,
    }
    for _ in ray_dataflow.run_items(left, [(sign_documents, arguments)], config, title="sign documents"):
        pass


# ---- stages ----------------------------------------------------------------------------------------------------------


@stage_of(lambda arguments: {})
def sign_documents(
    row: ItemRow, output: str, skip: Skip, rules: Rules, scheme: Scheme, *, keep_shingles: bool
) -> Iterator[ItemRow]:
    """Texts -> a file of their keys and, for an exact check, one of their shingles."""
    item, folder = row.work_item, open_folder(output)
    name = near.signatures_name(item.index)
    num_bytes = 0
    keys, sets = [np.zeros((0, scheme.bands), np.uint64)], []
    if folder.size(name) is None:
        for array in stages.documents_of(row, folder, "sign", skip, rules):
            num_bytes += text_bytes(array)
            found, shingles, ends = minhash.sign(array, scheme)
            keys.append(found)
            if keep_shingles:
                sets += near.shingle_sets(shingles, ends)
        if keep_shingles:
            folder.write(near.shingles_name(item.index), [near.shingles_to_bytes(sets)])
        folder.write(name, [near.keys_to_bytes(np.concatenate(keys))])
        resume_state.end_attempt(folder, f"sign-{item.index:06d}")
    yield ItemRow(item=row.item, figures={"text_bytes": num_bytes, "tokens": 0, "is_last": True})


@stage_of(lambda arguments: {})
def pair_documents(
    row: ItemRow, output: str, num_items: int, partitions: int, threshold: float | None
) -> Iterator[ItemRow]:
    """A partition of the keys -> a file of the pairs of documents in it that are alike."""
    folder, partition = open_folder(output), int(row.item)
    keys, positions = near.read_partition(_readers(folder, near.signatures_name, num_items), partition, partitions)
    check = None
    if threshold is not None:
        read = near.shingle_reader(_readers(folder, near.shingles_name, num_items))
        check = functools.partial(near.similar_pairs, read=read, threshold=threshold)
    pairs = near.find_pairs(keys, positions, check)
    folder.write(near.pairs_name(partition), [near.pairs_to_bytes(pairs)])
    yield ItemRow(item=row.item)


def _readers(folder: Folder, name_of: Callable[[int], str], num_items: int) -> list[near.ReadRange]:
    return [functools.partial(folder.read_range, name_of(index)) for index in range(num_items)]


@stage_of(lambda arguments: {})
def join_pairs(row: ItemRow, output: str, num_items: int, partitions: int) -> Iterator[ItemRow]:
    """The pairs of all partitions -> a file that names the documents which are left out."""
    folder = open_folder(output)
    names = [near.pairs_name(number) for number in range(partitions)]
    found = near.find_copies(lambda: (near.pairs_from_bytes(folder.read(name)) for name in names), num_items)
    folder.write(exact.duplicates_name(0), [found])
    yield ItemRow(item=row.item)
