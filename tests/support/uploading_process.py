"""A process of checkpoints/test_bucket.py that saves to a bucket and is killed: ``uploading_process.py URL WHEN``.

It saves step 1 whole. In the save of step 2, WHEN "in a part" kills it while its tensors are on their way, and WHEN
"before the description" after all of them are there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from pipeline.checkpoints import writer as checkpoint_writer
from pipeline.checkpoints.writer import CheckpointWriter
from pipeline.storage.folders import open_folder
from tests.checkpoints.test_writer import WORKERS, info

STATE = {"weights": torch.arange(12_000_000, dtype=torch.float32)}  # 48 MB: three parts of an upload


def main() -> None:
    url, when = sys.argv[1:]
    writer = CheckpointWriter(open_folder(url), WORKERS, tokenizer_json="{}", keep=2)
    writer.save(STATE, info(1))
    writer.wait()
    if when == "in a part":
        mock.patch.object(checkpoint_writer, "_blocks", interrupted_blocks).start()
    else:
        mock.patch.object(CheckpointWriter, "_complete", lambda *_: die()).start()
    writer.save(STATE, info(2))
    writer.wait()


_blocks = checkpoint_writer._blocks


def interrupted_blocks(path: Path) -> Iterator[bytes]:
    for number, block in enumerate(_blocks(path)):
        if number == 2:
            die()
        yield block


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
