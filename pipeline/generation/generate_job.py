"""What jobs/generate.py calls: prompts in, texts out piece by piece, many of them growing at a time.

Same model, prompt, settings and seed: same text, alone or among others (model/batching.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.batching import Batch, Reason, Request
from model.decoding import Decoder
from pipeline.config.inference import GenerateConfig
from pipeline.distributed.fsdp import join_workers
from pipeline.errors import UserError
from pipeline.generation.sampling import TextPieces, decoder_dtype, encode_prompt
from pipeline.paths import resolve_path
from pipeline.pretrained.resolve import open_model, resolve_checkpoint
from pipeline.tokenizer.bpe import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of one text, in the order of the texts."""

    text_number: int
    """Counted from 0: the samples of the first prompt, then those of the second."""
    prompt: str
    piece: str
    finished: Reason | None
    """Set on the last piece of a text."""
    num_tokens: int
    """New ones so far."""


def generate_texts(config: GenerateConfig) -> Iterator[Piece]:
    """The texts that ``config`` asks for, piece by piece, one behind the other; batch_size of them grow at a time.

    Raises:
        UserError: no such model or file of prompts, a prompt longer than the context.
    """
    prompts = [config.prompt] if config.prompts is None else read_prompts(config.prompts)
    path = resolve_checkpoint(config.checkpoint)
    device = join_workers(config.device).device
    found = open_model(path, device)
    wanted = list(itertools.product(prompts, range(config.num_samples)))
    encoded = {prompt: encode_prompt(found.tokenizer, prompt, found.config.context_length) for prompt in prompts}
    texts = min(config.batch_size, len(wanted))
    decoder = Decoder(found.model, dtype=decoder_dtype(config.dtype, device), texts=texts)
    batch = Batch(decoder, max_texts=texts)
    for number, (prompt, sample) in enumerate(wanted):
        request = Request(
            tokens=encoded[prompt],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed + sample,
            stop_id=found.tokenizer.eot_id,
        )
        batch.add(number, request)
    yield from _in_order(batch, found.tokenizer, [prompt for prompt, _ in wanted])


def _in_order(batch: Batch, tokenizer: Tokenizer, prompts: Sequence[str]) -> Iterator[Piece]:
    """Runs the batch; a text's pieces wait until the texts before it are finished."""
    texts = [TextPieces(tokenizer) for _ in prompts]
    counts = [0] * len(prompts)
    waiting: list[list[Piece]] = [[] for _ in prompts]
    turn = 0
    while len(batch):
        for step in batch.step():
            number: Any = step.key
            counts[number] += step.token is not None
            piece = "" if step.token is None else texts[number].add(step.token)
            if step.finished:
                piece += texts[number].end()
            waiting[number].append(
                Piece(
                    text_number=number,
                    prompt=prompts[number],
                    piece=piece,
                    finished=step.finished,
                    num_tokens=counts[number],
                )
            )
        while turn < len(prompts) and waiting[turn]:
            pieces, waiting[turn] = waiting[turn], []
            yield from pieces
            if not pieces[-1].finished:
                break
            turn += 1


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: .jsonl with the key prompt, or text with one in each line that is not empty.

    Raises:
        UserError: no such file, no prompt in it, or a line that is no prompt.
    """
    file = resolve_path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {file} cannot be read ({error}); give a text file or .jsonl") from error
    if file.suffix == ".jsonl":
        prompts = [_prompt_of(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file} has no prompt; write one in each line")
    return prompts


def _prompt_of(file: Path, number: int, line: str) -> str:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {number} is not valid JSON ({error}); mend the line") from error
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{file}, line {number} has no text under "prompt"; mend the line')
    return str(values["prompt"])
