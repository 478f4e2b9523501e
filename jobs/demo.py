"""Everything on this machine (``make demo``): stories, tokenizer, shards, training, evaluation, a sample, a summary.

What is done already is skipped, so the second time takes seconds. The stories are made by rules (pipeline/demo/), so
the summary can say how near the model came to the best possible. With --chat (``make chat-demo``) that model learns to
tell them when it is asked.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from typing import NoReturn

from jobs._run import Rows, guarded, print_table
from pipeline.config.command_line import resolve
from pipeline.config.data import DemoConfig, TokenizeConfig
from pipeline.config.finetuning import FinetuneConfig
from pipeline.config.inference import EvaluateConfig, GenerateConfig
from pipeline.config.training import PretrainConfig
from pipeline.console import format_rate, python_command
from pipeline.errors import UserError


class Parser(argparse.ArgumentParser):
    """A wrong flag is answered like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main() -> None:
    parser = Parser(
        prog="python jobs/demo.py",
        description=__doc__,
        epilog="examples:\n  make demo\n  python jobs/demo.py --config configs/demo.yaml\n  python jobs/demo.py --chat",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    group = parser.add_argument_group("settings")
    group.add_argument("-h", "--help", action="help", help="Print this page, then stop.")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="YAML preset with the sections tokenize, pretrain and evaluate, or with --chat demo, finetune, generate."
        " If not given, configs/demo.yaml, or with --chat configs/chat-demo.yaml.",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="After the demo: fine-tune its model on conversations, then chat with it once.",
    )
    given = parser.parse_args()
    preset = "chat-demo.yaml" if given.chat else "demo.yaml"
    flags = ["--config", given.config or os.path.join(sys.path[0], "configs", preset)]
    if given.chat:
        chat_demo(flags)
    else:
        demo(flags)


def demo(flags: list[str]) -> None:
    """All steps from stories to a trained model."""
    settings = resolve(DemoConfig, "demo", flags, program="jobs/demo.py")
    tokenize = resolve(TokenizeConfig, "tokenize", flags, program="jobs/demo.py")
    pretrain = resolve(PretrainConfig, "pretrain", flags, program="jobs/demo.py")
    evaluate = resolve(EvaluateConfig, "evaluate", flags, program="jobs/demo.py")

    from pipeline.demo import stories
    from pipeline.paths import resolve_path

    if settings.stories:
        _say("1/4 stories", settings.stories)
        stories.write_stories(resolve_path(settings.stories), num_bytes=settings.story_bytes, seed=settings.story_seed)
    _say("2/4 text to shards", tokenize.output)
    from pipeline.evaluation import evaluate_job  # with torch, which takes a second or two
    from pipeline.preprocessing import tokenize_job
    from pipeline.training import launch

    data, data_run, _ = tokenize_job.tokenize(tokenize)
    _say("3/4 training", pretrain.output)
    training, training_run = launch.pretrain(pretrain)
    _say("4/4 evaluation on the whole val set", evaluate.checkpoint)
    result = evaluate_job.evaluate(evaluate, reuse=True)
    best = stories.best_val_loss(settings, tokenize.output) if settings.stories else None
    print_table(
        "demo: done",
        [
            ("documents", f"{data.documents:,} ({data.text_megabytes:,.1f} MB of text)"),
            ("tokens", f"{data.train_tokens:,} train, {data.val_tokens:,} val, {data.bytes_per_token:.2f} bytes each"),
            ("tokenization", f"{format_rate(data.megabytes_per_second * 1e6)} of text, from source to shards"),
            ("parameters", f"{training.parameters:,}"),
            (
                "steps",
                f"{training.steps:,} ({training.tokens_seen:,} tokens, {training.tokens_per_second:,.0f} a second)",
            ),
            ("train loss", f"{training.first_loss:.3f} -> {training.last_loss:.3f} nats per token"),
            ("val loss", f"{result.val_loss:.3f}, perplexity {result.perplexity:.1f}, on {result.val_tokens:,} tokens"),
            *_limits(result.val_loss, result.unigram_entropy, best),
            ("MLflow", f"{training_run.location}; data: run {data_run.run_id}"),
            ("next", f"{python_command()} jobs/generate.py --config {flags[1]}"),
        ],
    )
    print(f"\nsample\n  {training.sample}".replace("\n\n", "\n  "))


def chat_demo(flags: list[str]) -> None:
    """From the demo's model to one that tells its stories when it is asked for one, and one answer of it."""
    settings = resolve(DemoConfig, "demo", flags, program="jobs/demo.py")
    finetune = resolve(FinetuneConfig, "finetune", flags, program="jobs/demo.py")
    generate = resolve(GenerateConfig, "generate", [*flags, "--chat"], program="jobs/demo.py")

    from pipeline.demo.conversations import write_conversations
    from pipeline.paths import resolve_path

    if settings.conversations:
        _say("1/3 conversations", settings.conversations)
        path = resolve_path(settings.conversations)
        write_conversations(path, count=settings.num_conversations, seed=settings.story_seed)
    _say("2/3 training", finetune.output)
    from pipeline.conversations import finetune_job  # with torch
    from pipeline.generation.generate_job import Generator

    done = finetune_job.finetune(finetune)
    _say("3/3 a chat", generate.checkpoint)
    asked = {"role": "user", "content": generate.prompt}
    answer = "".join(chunk.text for chunk in Generator(generate).answer([asked], seed=generate.seed))
    summary = done.training
    print_table(
        "chat demo: done",
        [
            ("conversations", f"{done.data.conversations:,} in {done.data.train_windows:,} windows to train on"),
            ("learned", f"{done.data.learned_tokens:,} tokens, {done.data.learned_share:.1%} of those in the windows"),
            ("steps", f"{summary.steps:,} ({summary.tokens_seen:,} tokens, {summary.tokens_per_second:,.0f} a second)"),
            ("train loss", f"{summary.first_loss:.3f} -> {summary.last_loss:.3f} nats per token of the answers"),
            (
                "val loss",
                f"{summary.val_loss:.3f} on {summary.val_tokens:,} such tokens, {summary.val_accuracy:.1%} right",
            ),
            ("MLflow", done.run.location),
            ("next", f"{python_command()} jobs/generate.py --config {flags[1]} --chat"),
            ("in a browser", f"{python_command()} jobs/serve.py {generate.checkpoint}"),
        ],
    )
    print(f"\nuser\n  {generate.prompt}\nassistant\n  {answer.strip()}".replace("\n\n", "\n  "))


def _limits(loss: float | None, unigram_entropy: float | None, best: float | None) -> Rows:
    """What the val loss is to be compared with."""
    if loss is None or unigram_entropy is None:
        return []
    rows = [("", f"{unigram_entropy - loss:.3f} below a model that ignores the context ({unigram_entropy:.3f})")]
    if best is not None:
        rows.append(
            ("", f"{loss - best:.3f} above the best possible ({best:.3f}), which knows the rules of the stories")
        )
    return rows


def _say(stage: str, folder: str) -> None:
    print(f"[{stage}: {folder}]", flush=True)


if __name__ == "__main__":
    guarded(main, resume="goes on with what is not done yet")
