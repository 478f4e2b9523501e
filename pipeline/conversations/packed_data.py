"""From conversations to a data folder: windows of packed conversations, their manifest, the tokenizer, its template.

The folder is one of shards like any other (dataset/), with flags beside the tokens (dataset/packed.py); it is claimed,
planned, resumed and finished as tokenization does it. Ray must be initialised by the caller.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config.data import TokenizeConfig
from pipeline.config.finetuning import FinetuneConfig
from pipeline.conversations import stages
from pipeline.conversations.stages import PackJob
from pipeline.conversations.templates import TEMPLATE_FILE, TEMPLATES
from pipeline.dataset.dataset import TOKENIZER_NAME, save_tokenizer
from pipeline.dataset.manifest import BASE_TOKENIZER, CHAT_TEMPLATE, MANIFEST_NAME, Manifest
from pipeline.preprocessing import ray_dataflow, resume_state, tokenization
from pipeline.preprocessing.planning import what_to_skip
from pipeline.preprocessing.stages import write
from pipeline.sources.text_columns import LISTS
from pipeline.storage.folders import Folder
from pipeline.tokenizer import bpe

if TYPE_CHECKING:
    from ray import ObjectRef

_PARTS_PER_ITEM = 2


@dataclass(frozen=True, kw_only=True)
class ConversationReport:
    """Finished windows in figures (summary.json), and the run that finished them."""

    conversations: int
    text_megabytes: float
    """UTF-8 bytes of the messages / 10^6."""
    train_windows: int
    val_windows: int
    learned_tokens: int
    """Tokens to train on that the loss counts: those that the assistant says."""
    learned_share: float
    """Share of the tokens to train on that the loss counts."""
    vocab_size: int
    skipped: dict[str, int]
    """Reason -> conversations left out."""
    seconds: float
    """Duration of the run that finished the data."""
    first_skipped: dict[str, str] = field(default_factory=dict)
    """Reason -> the first conversation that was left out."""
    damaged: int = 0
    """Inputs that could not be read whole (--skip_bad_files); the manifest lists them."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the windows are made by, besides the source."""

    config: TokenizeConfig
    chat_template: str
    context_length: int
    tokenizer: bpe.Tokenizer
    """With the tokens of the template."""
    base_fingerprint: str
    """Of the tokenizer without those that it lacked."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the bytes of the windows depend on, as the manifest has it."""
        return resume_state.settings_of(self.config, self.tokenizer.fingerprint) | {
            CHAT_TEMPLATE: self.chat_template,
            "context_length": self.context_length,
            BASE_TOKENIZER: self.base_fingerprint,
        }


def reading_config(config: FinetuneConfig) -> TokenizeConfig:
    """The settings of fine-tuning that say what is read and where windows go, as those of tokenization."""
    return TokenizeConfig(
        source=config.source,
        output=config.data,
        text_column=f"{config.messages_key}{LISTS}",
        val_fraction=config.val_fraction,
        limit_documents=config.limit_conversations,
        skip_bad_files=config.skip_bad_files,
        skip_bad_records=True,  # conversations that are none are counted and named
        item_bytes=config.item_bytes,
        num_workers=config.data_workers,
        download_workers=config.download_workers,
        cache_bytes=config.cache_bytes,
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
    )


def finished(recipe: Recipe, output: Folder) -> Manifest | None:
    """The manifest, if ``output`` holds all windows of this recipe already; needs no Ray.

    Raises UserError where the folder was begun with other settings or other input.
    """
    names = (MANIFEST_NAME, TOKENIZER_NAME, TEMPLATE_FILE)
    is_complete = resume_state.is_complete(output, recipe.config.source, recipe.settings, names=names)
    return resume_state.find_shards(output) if is_complete else None


def make(recipe: Recipe, output: Folder) -> ConversationReport:
    """Write the windows of the source to ``output``, or what is left of them, and the manifest.

    Raises UserError for what the user can mend, from any worker; the same call then resumes.
    """
    import ray

    start = time.perf_counter()
    config, tokenizer = recipe.config, recipe.tokenizer
    source, run = resume_state.begin(output, config.source, recipe.settings)
    items = tokenization.plan_items(config, source, output)
    save_tokenizer(output, tokenizer)
    save_template(recipe, output)
    bpe.warm_up()  # compiled here once, not in every worker at the same time
    job = pack_job(recipe, output, ray.put(tokenizer), num_items=len(items))
    keys = [job.key(item) for item in items]
    records = resume_state.read_all_records(output, keys, tokenizer.vocab_size)
    left = [item for item, record in zip(items, records, strict=True) if record is None]
    steps: ray_dataflow.Stages = [(stages.encode_conversations, {"job": job}), (write, {"job": job})]
    for _ in ray_dataflow.run_items(left, steps, config, title="conversations"):
        pass
    manifest = tokenization.finish(run, tokenizer, keys, output)
    return _report(manifest, recipe, seconds=time.perf_counter() - start)


def save_template(recipe: Recipe, output: Folder) -> None:
    """Write the template beside the tokenizer, where transformers looks for it."""
    output.write(TEMPLATE_FILE, [TEMPLATES[recipe.chat_template].jinja.encode()])


def pack_job(
    recipe: Recipe, output: Folder, tokenizer: bpe.Tokenizer | ObjectRef[bpe.Tokenizer], *, num_items: int
) -> PackJob:
    """The settings of the tasks; ``tokenizer`` is that of the recipe, or its place in Ray's object store."""
    return PackJob(
        output=str(output),
        tokenizer=tokenizer,
        tokenizer_fingerprint=recipe.tokenizer.fingerprint,
        vocab_size=recipe.tokenizer.vocab_size,
        settings=json.dumps(recipe.settings, sort_keys=True),
        val_fraction=recipe.config.val_fraction,
        part_bytes=_PARTS_PER_ITEM * recipe.config.item_bytes,
        skip=what_to_skip(recipe.config),
        num_items=num_items,
        chat_template=recipe.chat_template,
        context_length=recipe.context_length,
    )


def _report(manifest: Manifest, recipe: Recipe, *, seconds: float) -> ConversationReport:
    length = recipe.context_length + 1
    return ConversationReport(
        conversations=manifest.documents("train") + manifest.documents("val"),
        text_megabytes=(manifest.text_bytes("train") + manifest.text_bytes("val")) / 1e6,
        train_windows=manifest.tokens("train") // length,
        val_windows=manifest.tokens("val") // length,
        learned_tokens=manifest.learned_tokens("train"),
        learned_share=manifest.learned_tokens("train") / max(1, manifest.tokens("train")),
        vocab_size=manifest.vocab_size,
        skipped=manifest.skipped,
        seconds=seconds,
        first_skipped=manifest.first_skipped,
        damaged=len(manifest.damaged),
    )
