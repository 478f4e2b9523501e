"""Shards read once more beside the training and compared with their manifest: size when a run starts, sha256 behind it.

Every node reads its own view of the files, its ranks a share each; a run of 20 GB has seen all of them after seconds,
one of terabytes after hours. A file that fails ends the run at the end of a step.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pipeline.dataset.shards import ShardFiles
from pipeline.errors import UserError


class ShardCheck:
    """Reads every shard in a thread and compares its sha256.

    Args:
        files: shards to read.
        share, num_shares: this process reads shard number ``share`` and every num_shares-th behind it.
    """

    def __init__(self, files: Sequence[ShardFiles], *, share: int, num_shares: int) -> None:
        self.files, self.share, self.num_shares = files, share, num_shares
        self.num_checked = 0
        self.error: UserError | None = None
        """What was found."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._check, name="shard-check", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End at the next piece of a file."""
        self._over.set()
        self._thread.join()

    def _check(self) -> None:
        shards = [(files, index) for files in self.files for index in range(len(files))]
        try:
            for files, index in shards[self.share :: self.num_shares]:
                if not files.verify(index, self._over.is_set):
                    return
                self.num_checked += 1
        except UserError as error:
            self.error = error
