"""Text from a model: ``python jobs/generate.py --checkpoint runs/demo --prompt "..."``; --help lists the flags.

The model is a checkpoint, a run, an exported folder, hf://OWNER/NAME or models:/... of MLflow. Text appears as it is
drawn; with --output it goes into a file of JSON lines.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import itertools
import json
from collections.abc import Iterator
from typing import Any

from jobs._run import run
from pipeline.config.inference import GenerateConfig


def main(config: GenerateConfig) -> None:
    from pipeline.generation import generate_job
    from pipeline.paths import make_output, resolve_path

    texts = itertools.groupby(generate_job.generate_texts(config), key=lambda piece: piece.text_number)
    if config.output is None:
        for number, pieces in texts:
            show(number, pieces, config.num_samples, has_prompts=config.prompts is not None)
        return
    output = resolve_path(config.output)
    make_output(output.parent)
    count = 0
    partial = output.with_name(f".{output.name}.incomplete")
    with partial.open("w", encoding="utf-8") as file:
        for _, pieces in texts:
            count += 1
            parts = list(pieces)
            line = {
                "prompt": parts[0].prompt,
                "text": "".join(part.piece for part in parts),
                "tokens": parts[-1].num_tokens,
                "finish_reason": parts[-1].finished,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.replace(output)
    print(f"generate: {count} texts in {output}")


def show(number: int, pieces: Iterator[Any], num_samples: int, *, has_prompts: bool) -> None:
    """One text on the terminal, as it comes."""
    first = next(pieces)
    prompt, sample = divmod(number, num_samples)
    heads = [f"prompt {prompt + 1}"] if has_prompts else []
    heads += [f"sample {sample + 1} of {num_samples}"] if num_samples > 1 else []
    if heads:
        print(f"--- {', '.join(heads)}")
    print(first.prompt, end="")
    for part in itertools.chain([first], pieces):
        print(part.piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    run(GenerateConfig, main, section="generate", resume="begins again")
