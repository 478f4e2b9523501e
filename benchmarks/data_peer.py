"""datatrove's tokenization of a folder of parquet; runs alone, in whatever environment has datatrove.

    python data_peer.py FOLDER OUTPUT TOKENIZER COLUMN WORKERS

Two things, one after the other: its DocumentTokenizer alone, documents left in their order, which is what our shards
hold; and its own recipe (its examples/tokenize_from_hf_to_s3.py), which is DocumentTokenizer with its defaults, so
documents shuffled within each file, and DocumentTokenizerMerger, which shuffles them into the final file. Prints, as
JSON, seconds of the executors, and the tokens that they wrote, end-of-text tokens included.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

BYTES_PER_TOKEN = 2


def main(folder: str, output: str, tokenizer: str, column: str, workers: str) -> None:
    seconds: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for name, options in (("in order", {"shuffle_documents": False}), ("recipe", {})):
        base = Path(output, name.replace(" ", "_"))
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            encode(folder, base, tokenizer=tokenizer, column=column, workers=int(workers), **options)
            if name == "recipe":
                merge(base)
        seconds[name] = time.perf_counter() - start
        written = (base / ("merged" if name == "recipe" else "tokens")).glob("*.ds")
        tokens[name] = sum(path.stat().st_size for path in written) // BYTES_PER_TOKEN
    print(json.dumps({"seconds": seconds, "tokens": tokens}))


def encode(folder: str, base: Path, *, tokenizer: str, column: str, workers: int, **options: Any) -> None:
    """A task for every file, as many at a time as there are workers."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.sources.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        ParquetReader(folder, text_key=column, glob_pattern="*.parquet"),
        DocumentTokenizer(str(base / "tokens"), tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", **options),
    ]
    num_files = len(list(Path(folder).iterdir()))
    logs = str(base / "logs")
    LocalPipelineExecutor(steps, tasks=num_files, workers=workers, logging_dir=logs, skip_completed=False).run()


def merge(base: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.tokens.merger import DocumentTokenizerMerger

    step = DocumentTokenizerMerger(str(base / "tokens"), str(base / "merged"), save_filename="merged", progress=False)
    LocalPipelineExecutor([step], tasks=1, logging_dir=str(base / "merge_logs"), skip_completed=False).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
