"""A driver in a process of its own, to be killed: its tasks take random times (test_tokenization_chaos.py)."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cluster import ray_cluster
from pipeline.config.data import TokenizeConfig
from pipeline.preprocessing import stages, tokenization
from pipeline.storage.folders import open_folder


def slowly(name: str, seconds: float, until: str) -> Callable[..., Any]:
    """The stage ``name`` with random pauses around its steps, until there is a file ``until``."""

    def pause() -> None:
        if not until or not os.path.exists(until):  # noqa: PTH110  pickled by value, the fewer names the better
            time.sleep(random.uniform(0, seconds))

    def slow_stage(table: Any, **arguments: Any) -> Any:
        from pipeline.preprocessing import (
            resume_state,
            stages,  # the worker's
        )

        if not hasattr(os, "is_slow"):
            sync, write_item = os.fsync, resume_state.write_item

            def slow_sync(fd: Any) -> None:  # a temporary file is there, its name not yet
                pause()
                sync(fd)

            def slow_write_item(*values: Any) -> None:  # shards are there, their record is not
                pause()
                write_item(*values)

            patches: list[tuple[Any, str, Any]] = [
                (os, "fsync", slow_sync),
                (resume_state, "write_item", slow_write_item),
            ]
            for owner, what, function in [*patches, (os, "is_slow", True)]:
                setattr(owner, what, function)
        for result in getattr(stages, name)(table, **arguments):
            pause()
            yield result

    return slow_stage


def slow_down(seconds: float, until: str) -> None:
    """All stages of a run."""
    for name in ("encode", "write"):
        setattr(stages, name, slowly(name, seconds, until))


def main(config: str, seconds: str, until: str) -> None:
    """``seconds``: the longest pause."""
    ray_cluster.connect(num_cpus=1)
    slow_down(float(seconds), until)
    settings = TokenizeConfig(**json.loads(config))
    summary = tokenization.tokenize(settings, open_folder(Path(settings.output)))
    print(f"items done by this driver: {summary.num_items_done}")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
