"""Text from a model: ``python jobs/generate.py --checkpoint runs/demo --prompt "..."``; --help lists the flags.

The model is a checkpoint, a run, an exported folder, hf://OWNER/NAME or models:/... of MLflow. Text appears as it is
generated; with --output it is written to a file of JSON lines; with --interactive prompts are asked for, one by one.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

from jobs._run import run
from pipeline import exit_signals
from pipeline.config.inference import GenerateConfig
from pipeline.console import plain
from pipeline.errors import UserError


def main(config: GenerateConfig) -> None:
    from pipeline.generation import generate_job

    if (config.chat or config.interactive) and config.prompt != GenerateConfig.prompt:
        print("generate: prompt is not used, as prompts are typed here", file=sys.stderr, flush=True)
    if config.chat:
        chat(generate_job.Generator(config), config)
        return
    if config.interactive:
        interact(generate_job.Generator(config), config)
        return
    if config.output is not None:
        count, output = generate_job.write_texts(config)
        print(f"generate: {count} texts in {output}")
        return
    show_all(generate_job.generate_texts(config), config.num_samples, has_prompts=config.prompts is not None)


def interact(generator: Any, config: GenerateConfig) -> None:
    """Ask for a prompt and print the text, until the end of the input; Ctrl-C stops one text."""

    def continue_(prompt: str, seed: int) -> None:
        show_all(generator.texts([prompt], seed=seed), config.num_samples, has_prompts=False)

    ask("Type a prompt (\\n stands for the end of a line); Ctrl-C stops a text, Ctrl-D ends.", continue_, config)


def chat(generator: Any, config: GenerateConfig) -> None:
    """Ask for a message and print the answer, until the end of the input; Ctrl-C stops one answer, which is kept."""
    messages: list[dict[str, str]] = []

    def answer(text: str, seed: int) -> None:
        if not text.strip():
            return
        said: list[str] = []
        asked = [*messages, {"role": "user", "content": text}]
        try:
            for chunk in generator.answer(asked, seed=seed):
                print(chunk.text, end="", flush=True)
                said.append(chunk.text)
        finally:
            if said:
                messages[:] = [*asked, {"role": "assistant", "content": "".join(said)}]
        print(flush=True)

    ask("Type a message (\\n stands for the end of a line); Ctrl-C stops an answer, Ctrl-D ends.", answer, config)


def ask(greeting: str, answer: Callable[[str, int], None], config: GenerateConfig) -> None:
    """Read a line and call ``answer`` with it and a seed, until the end of the input.

    Each line gets other seeds than those before it, so that the same one twice gives two texts.
    """
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets input() edit its line, and bring earlier ones back
        print(greeting)
    with exit_signals.suspended(), own_interrupts():
        for seed in itertools.count(config.seed, config.num_samples):
            try:
                answer(input("\n> " if sys.stdin.isatty() else "").replace("\\n", "\n"), seed)
            except EOFError:
                return
            except exit_signals.Interrupted:  # SIGTERM
                raise
            except KeyboardInterrupt:
                print(flush=True)
            except UserError as error:
                print(plain(str(error)), flush=True)


@contextlib.contextmanager
def own_interrupts() -> Iterator[None]:
    """A context in which Ctrl-C raises KeyboardInterrupt, every time, and ends nothing else."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show_all(chunks: Iterator[Any], num_samples: int, *, has_prompts: bool) -> None:
    """Print texts, one after another."""
    for number, text in itertools.groupby(chunks, key=lambda chunk: chunk.text_number):
        show(number, text, num_samples, has_prompts=has_prompts)


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
