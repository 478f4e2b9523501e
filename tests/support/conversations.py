"""Conversations for tests, and windows of them made by the pipeline's stages without Ray."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.data import TokenizeConfig
from pipeline.conversations import packed_data, stages
from pipeline.conversations.packed_data import Recipe
from pipeline.conversations.templates import with_chat_tokens
from pipeline.dataset.dataset import save_tokenizer
from pipeline.dataset.manifest import Manifest
from pipeline.preprocessing import ray_dataflow, resume_state, tokenization
from pipeline.preprocessing.rows import ItemRow
from pipeline.preprocessing.stages import write
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.bpe import Tokenizer

Messages = list[dict[str, str]]

WORDS = [
    *("the", "a", "fox", "said", "to", "see", "and", "then", "there", "was", "no", "more", "for", "it", "of", "under"),
    *("7", "42", "Żółw", "日本", "🙂", "it's", "def(x):", "return"),
]
TRAPS = [
    "<|im_end|>",
    "<|endoftext|> no",
    "<|im_start|>user\nhi",
    "<|assistant|>\nme",
    " \n spaces around\n\n",
    "\t*\n\n-",
]


def conversations(count: int, *, seed: int = 3, words: int = 12) -> list[Messages]:
    """Conversations of one to three turns, a third with a system message; some contents are traps."""
    choose = random.Random(seed)

    def content() -> str:
        text = " ".join(choose.choices(WORDS, k=choose.randrange(1, words)))
        return text + choose.choice(TRAPS) if choose.random() < 0.2 else text

    found = []
    for _ in range(count):
        messages = [{"role": "system", "content": content()}] if choose.random() < 0.3 else []
        for _ in range(choose.randrange(1, 4)):
            messages += [{"role": role, "content": content()} for role in ("user", "assistant")]
        found.append(messages)
    return found


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """JSON lines of {"messages": record}."""
    path.write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))
    return path


def recipe_of(source: Path | str, base: Tokenizer, **changes: Any) -> Recipe:
    """How the conversations of a source are packed; ``changes`` are fields of Recipe, or else of its config."""
    values: dict[str, Any] = {"chat_template": "chatml", "context_length": 64}
    values |= {name: changes.pop(name) for name in [*changes] if name in values}
    settings: dict[str, Any] = {"source": str(source), "text_column": "messages[]", "val_fraction": 0.2}
    config = TokenizeConfig(**(settings | changes))
    tokenizer = with_chat_tokens(base, values["chat_template"])
    return Recipe(config=config, tokenizer=tokenizer, base_fingerprint=base.fingerprint, **values)


def pack_here(recipe: Recipe, folder: Path) -> Manifest:
    """What packed_data.make does, in this process."""
    output = open_folder(folder)
    source, run = resume_state.begin(output, recipe.config.source, recipe.settings)
    items = tokenization.plan_items(recipe.config, source, output)
    save_tokenizer(output, recipe.tokenizer)
    packed_data.save_template(recipe, output)
    job = packed_data.pack_job(recipe, output, recipe.tokenizer, num_items=len(items))
    steps: ray_dataflow.Stages = [(stages.encode_conversations, {"job": job}), (write, {"job": job})]
    for item in items:
        for table in ray_dataflow.in_turn(ItemRow.of(item).to_table(), steps):
            ItemRow.from_table(table).raise_error()
    return tokenization.finish(run, recipe.tokenizer, [job.key(item) for item in items], output)
