"""Loss and perplexity over the whole val set: ``python jobs/evaluate.py --checkpoint runs/demo``; see --help."""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import print_table, run
from pipeline.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    from pipeline import launch

    result = launch.evaluate(config)
    print_table(
        "evaluate: done",
        [
            ("checkpoint", f"{result.checkpoint}, {result.tokens_seen:,} tokens seen"),
            ("val loss", f"{result.loss:.4f} nats per token, on {result.tokens:,} tokens"),
            ("perplexity", f"{result.perplexity:.2f}"),
            (
                "learned",
                f"{result.learned:.4f} below the unigram entropy of these tokens, {result.unigram_entropy:.4f}",
            ),
        ],
    )


if __name__ == "__main__":
    run(EvaluateConfig, main, section="evaluate", resume="begins again")
