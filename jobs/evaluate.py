"""Val loss, perplexity, bits per byte, and scores on tasks, of a model: ``python jobs/evaluate.py runs/demo``.

The model is a checkpoint, a run, an exported folder, hf://OWNER/NAME or models:/... of MLflow; see --help.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import print_table, run
from pipeline.config.inference import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    import dataclasses

    from pipeline.evaluation import evaluate_job
    from pipeline.evaluation.validation import perplexity_text
    from pipeline.tracking.report import MASKED, task_rows

    result = evaluate_job.evaluate(config)
    seen = f", {result.tokens_seen:,} tokens seen" if result.tokens_seen is not None else ""
    alone = MASKED if result.document_mask else ""
    rows = [("model", f"{result.checkpoint}{seen}")]
    if result.val_loss is not None:
        rows += [
            ("val loss", f"{result.val_loss:.4f} nats per token, on {result.val_tokens:,} tokens{alone}"),
            *((f"val loss, {name}", f"{loss:.4f}") for name, loss in (result.val_losses or {}).items()),
            ("perplexity", perplexity_text(result.val_loss)),
        ]
        if result.val_accuracy is not None:
            rows.append(
                ("accuracy", f"{result.val_accuracy:.1%} of these tokens, those of the answers, are the likeliest")
            )
        else:
            rows += [
                ("bits per byte", f"{result.bits_per_byte:.4f}"),
                (
                    "learned",
                    f"{result.learned:.4f} below the unigram entropy of these tokens, {result.unigram_entropy:.4f}",
                ),
            ]
    if result.hellaswag_acc_norm is not None:
        rows += [
            (
                "HellaSwag",
                f"{result.hellaswag_acc_norm:.4f} acc_norm, {result.hellaswag_acc:.4f} acc, on "
                f"{result.hellaswag_questions:,} questions; guessing gives 0.25",
            )
        ]
    rows += task_rows(dataclasses.asdict(result))
    print_table("evaluate: done", rows)


if __name__ == "__main__":
    run(EvaluateConfig, main, section="evaluate", resume="begins again")
