"""datatrove's tokenization of a folder of parquet; runs alone, in whatever environment has datatrove.

    python data_peer.py FOLDER OUTPUT TOKENIZER COLUMN WORKERS

Prints seconds of the whole executor, and the tokens that it wrote, end-of-text tokens included, as JSON.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path


def main(folder: str, output: str, tokenizer: str, column: str, workers: str) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    num_files = len(list(Path(folder).iterdir()))
    steps = [
        ParquetReader(folder, text_key=column, glob_pattern="*.parquet"),
        DocumentTokenizer(
            f"{output}/tokens",
            tokenizer_name_or_path=tokenizer,
            eos_token="<|endoftext|>",
            shuffle_documents=False,
        ),
    ]
    executor = LocalPipelineExecutor(
        steps, tasks=num_files, workers=int(workers), logging_dir=f"{output}/logs", skip_completed=False
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        executor.run()
    seconds = time.perf_counter() - start
    num_bytes = sum(path.stat().st_size for path in Path(output, "tokens").glob("*.ds"))
    print(json.dumps({"seconds": seconds, "tokens": num_bytes // 2, "cores": len(os.sched_getaffinity(0))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
