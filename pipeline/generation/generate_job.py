"""Generate text for prompts: what jobs/generate.py calls. Several sequences are decoded at a time.

The same model, prompt, settings and seed give the same text, alone or in a batch (model/batching.py).
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
from pipeline.conversations.templates import Message
from pipeline.distributed.hardware import compute_dtype
from pipeline.distributed.process_group import init_distributed
from pipeline.errors import UserError
from pipeline.generation.sampling import Detokenizer, encode_prompt
from pipeline.paths import resolve_output_file, resolve_path
from pipeline.pretrained.chat import read_chat
from pipeline.pretrained.resolve import open_model, resolve_checkpoint
from pipeline.tokenizer.bpe import Tokenizer

_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Characters that JSON has as they are and that some readers of lines, such as str.splitlines, take for their end."""


@dataclass(frozen=True, kw_only=True)
class TextChunk:
    """The next part of one text."""

    text_number: int
    """Counted from 0: the samples of the first prompt, then those of the second."""
    prompt: str
    text: str
    finish_reason: Reason | None
    """Set on the last chunk of a text."""
    num_tokens: int
    """Number of new tokens of the text so far."""


def write_texts(config: GenerateConfig) -> tuple[int, str]:
    """Write prompts and texts as JSON lines to ``config.output``; returns the number of texts and the file's address.

    The file is complete or absent.

    Raises:
        UserError: as generate_texts, and where the file cannot be written.
    """
    folder, name = resolve_output_file(config.output or "")
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for _, group in itertools.groupby(generate_texts(config), key=lambda chunk: chunk.text_number):
            chunks = list(group)
            line = {
                "prompt": chunks[0].prompt,
                "text": "".join(chunk.text for chunk in chunks),
                "tokens": chunks[-1].num_tokens,
                "finish_reason": chunks[-1].finish_reason,
            }
            count += 1
            text = json.dumps(line, ensure_ascii=False).translate(_LINE_ENDS)
            yield text.encode("utf-8", "replace") + b"\n"

    folder.write(name, lines())
    return count, f"{folder}/{name}"


def generate_texts(config: GenerateConfig) -> Iterator[TextChunk]:
    """The texts that ``config`` describes, one after another, chunk by chunk; batch_size of them are decoded at a time.

    Raises:
        UserError: no such model or file of prompts, a prompt longer than the context.
    """
    prompts = [config.prompt] if config.prompts is None else read_prompts(config.prompts)
    yield from Generator(config).texts(prompts, seed=config.seed)


class Generator:
    """A model that is loaded once for any number of prompts.

    Raises:
        UserError: no such model.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self._config = config
        path = resolve_checkpoint(config.checkpoint)
        self._device = init_distributed(config.device).device
        self._pretrained = open_model(path, self._device)
        self._chat = read_chat(path, self._pretrained.tokenizer) if config.chat else None
        if config.chat and self._chat is None:
            raise UserError(f"{path} has no chat template; fine-tune it first: jobs/finetune.py --checkpoint {path}")

    def answer(self, messages: Sequence[Message], *, seed: int) -> Iterator[TextChunk]:
        """The answer to a conversation that ends with the user's message, chunk by chunk.

        Of a conversation that leaves no room for an answer of a quarter of the context, the oldest turns are left out.

        Raises:
            UserError: the last message alone leaves no room.
        """
        config, pretrained, chat = self._config, self._pretrained, self._chat
        assert chat is not None
        most = pretrained.config.context_length * 3 // 4
        left = list(messages)
        while len(ids := chat.render(left, add_generation_prompt=True)) > most:
            if len(left) < 2:
                raise UserError(f"the message has {len(ids):,} tokens, and there is room for {most:,}; shorten it")
            del left[:2]
        decoder = Decoder(pretrained.model, dtype=compute_dtype(config.dtype, self._device), texts=1)
        batch = Batch(decoder, max_texts=1)
        request = Request(
            tokens=ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=seed,
            stop_id=chat.end_id,
        )
        batch.add(0, request)
        yield from _in_order(batch, pretrained.tokenizer, [""])

    def texts(self, prompts: Sequence[str], *, seed: int) -> Iterator[TextChunk]:
        """num_samples texts for each prompt, one after another, chunk by chunk; UserError for one that is too long.

        Args:
            seed: of the first sample of each prompt; each further one takes the next number.
        """
        config, pretrained = self._config, self._pretrained
        wanted = list(itertools.product(prompts, range(config.num_samples)))
        length = pretrained.config.context_length
        encoded = {prompt: encode_prompt(pretrained.tokenizer, prompt, length) for prompt in prompts}
        texts = min(config.batch_size, len(wanted))
        decoder = Decoder(pretrained.model, dtype=compute_dtype(config.dtype, self._device), texts=texts)
        batch = Batch(decoder, max_texts=texts)
        for number, (prompt, sample) in enumerate(wanted):
            request = Request(
                tokens=encoded[prompt],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=seed + sample,
                stop_id=pretrained.tokenizer.eot_id,
            )
            batch.add(number, request)
        yield from _in_order(batch, pretrained.tokenizer, [prompt for prompt, _ in wanted])


def _in_order(batch: Batch, tokenizer: Tokenizer, prompts: Sequence[str]) -> Iterator[TextChunk]:
    """Run the batch; chunks of a text wait until the texts before it are finished."""
    detokenizers = [Detokenizer(tokenizer) for _ in prompts]
    counts = [0] * len(prompts)
    waiting: list[list[TextChunk]] = [[] for _ in prompts]
    turn = 0
    while len(batch):
        for step in batch.step():
            number: Any = step.key
            counts[number] += step.token is not None
            text = "" if step.token is None else detokenizers[number].add(step.token)
            if step.finished:
                text += detokenizers[number].end()
            chunk = TextChunk(
                text_number=number,
                prompt=prompts[number],
                text=text,
                finish_reason=step.finished,
                num_tokens=counts[number],
            )
            waiting[number].append(chunk)
        while turn < len(prompts) and waiting[turn]:
            chunks, waiting[turn] = waiting[turn], []
            yield from chunks
            if not chunks[-1].finish_reason:
                break
            turn += 1


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: .jsonl with the key prompt, or text with one in each line that is not empty.

    Raises:
        UserError: no such file, no prompt in it, or a line that is no prompt.
    """
    file = resolve_path(path)
    try:
        lines = [line.removesuffix("\r") for line in file.read_text(encoding="utf-8-sig").split("\n")]
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, line {number} is not valid JSON ({error}); mend the line") from error
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{file}, line {number} has no text under "prompt"; mend the line')
    return str(values["prompt"])
