"""From a source of raw text to shards and their manifest, on a Ray that the caller has initialised.

The steps: the output folder is claimed, the plan is made or found, the tokenizer is found or trained, copies are found
(``dedup``), the remaining items are encoded and written, and the manifest is made from the records of all items.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.data import ReadingConfig, TokenizeConfig, TrainTokenizerConfig
from pipeline.dataset.dataset import TOKENIZER_NAME, load_tokenizer, load_tokenizer_of, save_tokenizer
from pipeline.dataset.manifest import MANIFEST_NAME, Manifest
from pipeline.decontamination import documents as decontamination
from pipeline.decontamination.evaluation_sets import EvaluationSets
from pipeline.errors import UserError
from pipeline.preprocessing import duplicates, ray_dataflow, resume_state, stages
from pipeline.preprocessing.encode_documents import add_counts
from pipeline.preprocessing.planning import advise, document_rules, filter_rules, what_to_skip
from pipeline.preprocessing.progress import read_layouts
from pipeline.preprocessing.resume_state import ItemRecord, RunRecord
from pipeline.preprocessing.stages import EncodeJob
from pipeline.preprocessing.tokenizer_training import learn
from pipeline.sources.plan import make_plan, with_address
from pipeline.sources.sources import Source
from pipeline.sources.work_items import Damage, WorkItem
from pipeline.storage.folders import Folder
from pipeline.tokenizer import bpe

_PARTS_PER_ITEM = 2  # an item larger than this many times its planned size continues in another shard

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """A finished data set in figures (summary.json), and the run that finished it."""

    documents: int
    text_megabytes: float
    """UTF-8 bytes of the documents / 10^6."""
    train_tokens: int
    val_tokens: int
    vocab_size: int
    skipped: dict[str, int]
    """Reason -> documents left out."""
    megabytes_per_second: float
    """Text read, encoded and written per second over all workers, in the run that finished the data."""
    seconds: float
    """Duration of that run, including the training of a tokenizer."""
    first_skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Reason -> the first record that was left out because it holds no text."""
    ignored: Sequence[dict[str, Any]] = ()
    """Files that lay in the source and were not read: reason, number of files, an example."""
    damaged: int = 0
    """Inputs that could not be read whole (--skip_bad_files); the manifest lists them."""
    num_items: int = 0
    """Work items of the source."""
    num_items_done: int = 0
    """Work items that the run did; the rest had been done before."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents that the run encoded."""
    tokens: int = 0
    """Tokens that the run wrote."""
    encode_seconds: float = 0.0
    """Reading, encoding and writing, including the seconds that Ray takes to start the first tasks."""

    @property
    def bytes_per_token(self) -> float:
        return self.text_megabytes * 1e6 / (self.train_tokens + self.val_tokens)


def given_tokenizer(config: TokenizeConfig) -> bpe.Tokenizer | None:
    """The tokenizer that the settings name; None where one is trained.

    Raises UserError where it has no token to put between documents.
    """
    return _with_end_of_text(config, bpe.Tokenizer.from_file(config.tokenizer)) if config.tokenizer else None


def _with_end_of_text(config: TokenizeConfig, tokenizer: bpe.Tokenizer) -> bpe.Tokenizer:
    if config.end_of_text_token:
        tokenizer = tokenizer.with_end_of_text(config.end_of_text_token)
    return tokenizer.with_eot_id(tokenizer.eot_id)  # raises where there is none, before any work


def finished(config: TokenizeConfig, output: Folder, given: bpe.Tokenizer | None = None) -> Manifest | None:
    """The manifest, if ``output`` holds all shards of this config already; needs no Ray.

    ``given``: ``given_tokenizer(config)``, so that its file is read once; it is read here if it is left out.

    Raises UserError where the folder was begun with other settings or other input.
    """
    if resume_state.read_run(output) is None:
        return None
    given = given or given_tokenizer(config)
    sets = evaluation_sets(config)
    settings = _settings(config, given, sets)
    names = (MANIFEST_NAME, TOKENIZER_NAME, *((decontamination.LIST_NAME,) if sets else ()))
    is_complete = resume_state.is_complete(output, config.source, settings, names=names)
    manifest = resume_state.find_shards(output) if is_complete else None
    return manifest if manifest and _has_its_tokenizer(output, manifest) else None


def evaluation_sets(config: TokenizeConfig) -> EvaluationSets | None:
    """The questions that no document may hold; None where none are looked for."""
    return EvaluationSets.read(config.decontaminate) if config.decontaminate else None


def _settings(config: TokenizeConfig, given: bpe.Tokenizer | None, sets: EvaluationSets | None) -> dict[str, Any]:
    """The settings that shards depend on, with the questions' hashes where there are any."""
    settings = resume_state.settings_of(config, given.fingerprint if given else None)
    return settings | ({"evaluation_sets": list(sets.fingerprints)} if sets else {})


def _has_its_tokenizer(output: Folder, manifest: Manifest) -> bool:
    """Whether tokenizer.json is the one that made the shards; another one is deleted, so that it is made again."""
    try:
        load_tokenizer_of(output, manifest)
    except UserError as error:
        logger.warning("%s; it is made again now", error)
        output.delete(TOKENIZER_NAME)
        return False
    return True


def tokenize(config: TokenizeConfig, output: Folder, given: bpe.Tokenizer | None = None) -> DataReport:
    """Write the shards of ``config.source`` to ``output``, or what is left of them, and the manifest.

    ``given``: as of ``finished``. Raises UserError for what the user can mend, from any worker; the same call then
    resumes.
    """
    import ray

    start = time.perf_counter()
    given = given or given_tokenizer(config)
    rules = filter_rules(config)
    rules.require_usable()
    sets = evaluation_sets(config)
    settings = _settings(config, given, sets)
    source, run = resume_state.begin(output, config.source, settings)
    items = plan_items(config, source, output)
    advise(config, items)
    if sets:
        logger.info(
            "documents that share 13 words with one of %s questions are left out; %s of them have fewer words and "
            "cannot be found",
            *(f"{len(sets.questions):,}", f"{sets.num_short:,}"),
        )
    tokenizer = _prepare_tokenizer(config, given, source, output)
    job = EncodeJob(
        output=str(output),
        tokenizer=ray.put(tokenizer),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        settings=json.dumps(settings, sort_keys=True),
        val_fraction=config.val_fraction,
        val_split=config.val_split,
        part_bytes=_PARTS_PER_ITEM * config.item_bytes,
        skip=what_to_skip(config),
        num_items=len(items),
        partitions=duplicates.find(config, items, output),
        rules=rules,
        copies=duplicates.REASONS[config.dedup],
        evaluation_sets=ray.put(sets) if sets else None,
    )
    keys = [job.key(item) for item in items]
    records = resume_state.read_all_records(output, keys, tokenizer.vocab_size)
    left = [item for item, record in zip(items, records, strict=True) if record is None]
    del records
    encode_start = time.perf_counter()
    text_bytes = tokens = 0
    steps: ray_dataflow.Stages = [(stages.encode, {"job": job}), (stages.write, {"job": job})]
    for row in ray_dataflow.run_items(left, steps, config, title="tokenize"):
        text_bytes += row.figures["text_bytes"]
        tokens += row.figures["tokens"]
    encode_seconds = time.perf_counter() - encode_start
    manifest = finish(run, tokenizer, keys, output)
    return DataReport(
        documents=manifest.documents("train") + manifest.documents("val"),
        text_megabytes=(manifest.text_bytes("train") + manifest.text_bytes("val")) / 1e6,
        train_tokens=manifest.tokens("train"),
        val_tokens=manifest.tokens("val"),
        vocab_size=manifest.vocab_size,
        skipped=manifest.skipped,
        first_skipped=manifest.first_skipped,
        megabytes_per_second=text_bytes / 1e6 / encode_seconds if encode_seconds else 0.0,
        seconds=time.perf_counter() - start,
        ignored=manifest.ignored,
        damaged=len(manifest.damaged),
        num_items=len(items),
        num_items_done=len(left),
        text_bytes=text_bytes,
        tokens=tokens,
        encode_seconds=encode_seconds,
    )


def plan_items(config: TokenizeConfig, source: Source, output: Folder) -> list[WorkItem]:
    """The work items that the output folder was begun with, or else new ones, which are noted there."""
    if (items := resume_state.read_plan(output)) is not None:
        logger.info("the plan of %s work items is there from an earlier run", f"{len(items):,}")
        return with_address(items, config.source)
    damage: Damage | None = [] if config.skip_bad_files else None
    try:
        items = make_plan(
            read_layouts(source, config, damage),
            text_column=config.text_column,
            item_bytes=config.item_bytes,
            limit_documents=config.limit_documents,
            limit_bytes=config.limit_bytes,
            rules=document_rules(config),
        )
    except UserError as error:
        if damage:
            first = damage[0]["reason"]
            raise UserError(f"{error}; {len(damage):,} files were left out, the first: {first}") from error
        raise
    resume_state.write_plan(output, items, damage or [], source.ignored)
    return items


def _prepare_tokenizer(
    config: TokenizeConfig, given: bpe.Tokenizer | None, source: Source, output: Folder
) -> bpe.Tokenizer:
    """The tokenizer of the run, in the output folder: given, made by an earlier run, or trained now."""
    tokenizer = given or _earlier_tokenizer(config, output)
    if tokenizer is None:
        shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(ReadingConfig)}
        names = (config.end_of_text_token or bpe.END_OF_TEXT,)
        tokenizer, _ = learn(TrainTokenizerConfig(**shared, special_tokens=names), source, output)
        tokenizer = _with_end_of_text(config, tokenizer)
        save_tokenizer(output, tokenizer)
    elif given:
        save_tokenizer(output, tokenizer)
    bpe.warm_up()  # compiled here once, not in every worker at the same time
    return tokenizer


def _earlier_tokenizer(config: TokenizeConfig, output: Folder) -> bpe.Tokenizer | None:
    """The tokenizer that an earlier run trained; None where there is none, or a damaged one."""
    if output.size(TOKENIZER_NAME) is None:
        return None
    try:
        tokenizer = _with_end_of_text(config, load_tokenizer(output))
    except UserError as error:
        logger.warning("%s; it is trained again", error)
        return None
    logger.info("tokenizer %s/%s is there from an earlier run", output, TOKENIZER_NAME)
    return tokenizer


def _first_skipped(records: Sequence[ItemRecord]) -> dict[str, str]:
    """Reason -> the sentence of the first record in reading order, sorted by reason."""
    first: dict[str, str] = {}
    for record in records:
        first = record.first_skipped | first
    return dict(sorted(first.items()))


def _num_contaminated(records: Sequence[ItemRecord] | None) -> int:
    return sum(record.skipped.get(decontamination.REASON, 0) for record in records or ())


def finish(run: RunRecord, tokenizer: bpe.Tokenizer, keys: list[str], output: Folder) -> Manifest:
    """Make the manifest from the records of all items, and write it."""
    parts = resume_state.read_all_records(output, keys, tokenizer.vocab_size)
    records = [record for item_parts in parts if item_parts is not None for record in item_parts]
    if None in parts:
        raise UserError(f"shards vanished from {output} while the job ran; run the same command again")
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record.skipped)
    manifest = Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        settings=run.settings,
        inputs=tuple(entry.manifest_entry() for entry in run.inputs),
        shards=tuple(entry for record in records for entry in record.shards),
        skipped=dict(sorted(skipped.items())),
        first_skipped=_first_skipped(records),
        damaged=(*resume_state.read_plan_damage(output), *(entry for record in records for entry in record.damaged)),
        ignored=resume_state.read_ignored(output),
        document_lengths=tuple(add_counts(record.lengths for record in records)),
    )
    if not manifest.shards:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in manifest.skipped.items()) or "none at all"
        source = resume_state.stored_source(run.source)
        first = "".join(f"; the first: {sentence}" for sentence in list(manifest.first_skipped.values())[:1])
        raise UserError(f"source {source} holds no document that could be used ({reasons}){first}")
    if "evaluation_sets" in run.settings:
        decontamination.join_lists(output, [_num_contaminated(records) for records in parts])
    resume_state.remove_others(output, {entry.name for entry in manifest.shards})
    duplicates.remove_files(output)
    output.remove_leftovers()
    manifest.save(output)
    return manifest
