"""Everything on this machine (``make demo``): text, tokenizer, shards, training, evaluation, a sample, a summary.

What is done already is skipped, so the second time takes seconds.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from typing import NoReturn

from jobs._run import guarded, print_table
from pipeline.config.command_line import resolve
from pipeline.config.data import TokenizeConfig
from pipeline.config.inference import EvaluateConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError


class Parser(argparse.ArgumentParser):
    """A wrong flag is answered like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default=os.path.join(sys.path[0], "configs", "demo.yaml"), help="YAML preset")
    flags = ["--config", parser.parse_args().config]
    tokenize = resolve(TokenizeConfig, "tokenize", flags, program="jobs/demo.py")
    pretrain = resolve(PretrainConfig, "pretrain", flags, program="jobs/demo.py")
    evaluate = resolve(EvaluateConfig, "evaluate", flags, program="jobs/demo.py")

    from pipeline.evaluation import evaluate_job
    from pipeline.preprocessing import tokenize_job
    from pipeline.training import launch

    _say("1/3 text to shards", tokenize.output)
    data, data_run, _ = tokenize_job.tokenize(tokenize)
    _say("2/3 training", pretrain.output)
    training, training_run = launch.pretrain(pretrain)
    _say("3/3 evaluation on the whole val set", evaluate.checkpoint)
    result = evaluate_job.evaluate(evaluate, reuse=True)
    print_table(
        "demo: done",
        [
            ("documents", f"{data.documents:,} ({data.text_megabytes:,.1f} MB of text)"),
            ("tokens", f"{data.train_tokens:,} train, {data.val_tokens:,} val, {data.bytes_per_token:.2f} bytes each"),
            ("tokenization", f"{data.megabytes_per_second:,.1f} MB/s of text, from source to shards"),
            ("parameters", f"{training.parameters:,}"),
            (
                "steps",
                f"{training.steps:,} ({training.tokens_seen:,} tokens, {training.tokens_per_second:,.0f} a second)",
            ),
            ("train loss", f"{training.first_loss:.3f} -> {training.last_loss:.3f} nats per token"),
            ("val loss", f"{result.val_loss:.3f}, perplexity {result.perplexity:.1f}, on {result.val_tokens:,} tokens"),
            (
                "learned",
                f"{result.learned:.3f} nats below the unigram entropy of these tokens, {result.unigram_entropy:.3f}",
            ),
            ("sample", repr(training.sample)),
            ("MLflow", f"{training_run.location}; data: run {data_run.run_id}"),
            ("next", f"python jobs/generate.py --checkpoint {pretrain.output} --prompt '...'"),
        ],
    )


def _say(stage: str, folder: str) -> None:
    print(f"[{stage}: {folder}]", flush=True)


if __name__ == "__main__":
    guarded(main, resume="goes on with what is not done yet")
