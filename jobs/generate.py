"""Text from a model: ``python jobs/generate.py --checkpoint runs/demo --prompt "..."``; --help lists the flags.

The model is a checkpoint, a run, an exported folder, hf://OWNER/NAME or models:/... of MLflow. Text appears as it is
generated; with --output it is written to a file of JSON lines.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import itertools
from collections.abc import Iterator
from typing import Any

from jobs._run import run
from pipeline.config.inference import GenerateConfig


def main(config: GenerateConfig) -> None:
    from pipeline.generation import generate_job

    if config.output is not None:
        count, output = generate_job.write_texts(config)
        print(f"generate: {count} texts in {output}")
        return
    texts = itertools.groupby(generate_job.generate_texts(config), key=lambda chunk: chunk.text_number)
    for number, chunks in texts:
        show(number, chunks, config.num_samples, has_prompts=config.prompts is not None)


def show(number: int, chunks: Iterator[Any], num_samples: int, *, has_prompts: bool) -> None:
    """Print one text chunk by chunk."""
    first = next(chunks)
    prompt, sample = divmod(number, num_samples)
    heads = [f"prompt {prompt + 1}"] if has_prompts else []
    heads += [f"sample {sample + 1} of {num_samples}"] if num_samples > 1 else []
    if heads:
        print(f"--- {', '.join(heads)}")
    print(first.prompt, end="")
    for chunk in itertools.chain([first], chunks):
        print(chunk.text, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    run(GenerateConfig, main, section="generate", resume="begins again")
