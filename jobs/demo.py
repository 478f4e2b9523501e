"""Everything on this machine (``make demo``): stories, tokenizer, shards, training, evaluation, a sample, a summary.

What is done already is skipped, so the second time takes seconds. The stories are made by rules (pipeline/demo/), so
the summary can say how near the model came to the best possible.
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
from pipeline.config.inference import EvaluateConfig
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
        epilog="examples:\n  make demo\n  python jobs/demo.py --config configs/demo.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    group = parser.add_argument_group("settings")
    group.add_argument("-h", "--help", action="help", help="Print this page, then stop.")
    group.add_argument(
        "--config",
        metavar="FILE",
        default=os.path.join(sys.path[0], "configs", "demo.yaml"),
        help="YAML preset with the sections tokenize, pretrain and evaluate. If not given, configs/demo.yaml.",
    )
    flags = ["--config", parser.parse_args().config]
    demo = resolve(DemoConfig, "demo", flags, program="jobs/demo.py")
    tokenize = resolve(TokenizeConfig, "tokenize", flags, program="jobs/demo.py")
    pretrain = resolve(PretrainConfig, "pretrain", flags, program="jobs/demo.py")
    evaluate = resolve(EvaluateConfig, "evaluate", flags, program="jobs/demo.py")

    from pipeline.demo import stories
    from pipeline.evaluation import evaluate_job
    from pipeline.paths import resolve_path
    from pipeline.preprocessing import tokenize_job
    from pipeline.training import launch

    if demo.stories:
        _say("1/4 stories", demo.stories)
        stories.write_stories(resolve_path(demo.stories), num_bytes=demo.story_bytes, seed=demo.story_seed)
    _say("2/4 text to shards", tokenize.output)
    data, data_run, _ = tokenize_job.tokenize(tokenize)
    _say("3/4 training", pretrain.output)
    training, training_run = launch.pretrain(pretrain)
    _say("4/4 evaluation on the whole val set", evaluate.checkpoint)
    result = evaluate_job.evaluate(evaluate, reuse=True)
    best = stories.best_val_loss(demo, tokenize.output) if demo.stories else None
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
