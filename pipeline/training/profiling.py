"""Some steps of a run under torch's profiler: the time of every operation, as a trace and as a table.

Only rank 0 is profiled. <run>/profile/ then holds trace-steps-20-25.json.gz, which chrome://tracing and
ui.perfetto.dev open, and operations-steps-20-25.txt, the operations that took the most time. Profiled steps are slower
than others, with the same results.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.training import PretrainConfig, step_range
from pipeline.distributed.process_group import ProcessGroup
from pipeline.run_files import PROFILE_FOLDER
from pipeline.storage.folders import Folder
from pipeline.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

_MOST_ROWS = 40


class StepProfiler:
    """Profiles the steps of --profile_steps; a context, at whose end an incomplete profile is dropped.

    Both files go to the run folder ``output`` and to ``tracker``.
    """

    def __init__(self, config: PretrainConfig, *, output: Folder, workers: ProcessGroup, tracker: Tracker) -> None:
        self.output, self.workers, self.tracker = output, workers, tracker
        asked = config.profile_steps if workers.is_rank_zero else None
        self.first, self.last = (0, 0) if asked is None else step_range(asked)
        self._profile: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context for step ``number``, counted from 1. A run that resumes within the range profiles the rest."""
        if not self.first <= number <= self.last:
            yield
            return
        if self._profile is None:
            self.first = number  # later than asked for after a resume
            self._profile = self._start()
        yield
        if number == self.last:
            self._finish(self._profile)

    def _start(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self.workers.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()  # earlier work does not belong to these steps
        started = profile(activities=activities, record_shapes=True)
        started.start()
        return started

    def _finish(self, done: profile) -> None:
        on_gpu = self.workers.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        done.stop()
        self._profile = None
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = done.key_averages().table(sort_by=order, row_limit=_MOST_ROWS)
        steps = f"steps-{self.first}-{self.last}"
        with tempfile.TemporaryDirectory(prefix="gpt25-") as folder:
            path = Path(folder) / f"trace-{steps}.json.gz"
            done.export_chrome_trace(str(path))
            contents = {path.name: path.read_bytes(), f"operations-{steps}.txt": table.encode()}
        for name, content in contents.items():
            self.output.write(f"{PROFILE_FOLDER}/{name}", [content])
            self.tracker.log_page(f"{PROFILE_FOLDER}/{name}")
        logger.info("steps %d to %d are profiled: %s/%s", self.first, self.last, self.output, PROFILE_FOLDER)
