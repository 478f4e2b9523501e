"""An elastic run: it starts with the nodes there are, grows when one comes, goes on when one dies. One curve."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from pipeline.config.training import PretrainConfig
from tests.support.factories import tiny_config
from tests.support.training_job import NODE, TrainingJob, running_cluster

STEPS = 120


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> PretrainConfig:
    """Steps of about half a second, so that nodes come and go between them."""
    return tiny_config(
        data=str(tiny_data),
        output="fixed",
        tokens_per_step=32 * 1024,
        batch_size=8,
        train_steps=STEPS,
        lr=1e-3,
        val_every=60,
        sample_every=60,
        checkpoint_every=5,
        keep_checkpoints=100,
        num_workers=2,
        resize_seconds=5,
        tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_nodes_come_and_go(config: PretrainConfig, tmp_path: Path) -> None:
    with running_cluster(1) as cluster:
        first = cluster.add_node(num_cpus=2, **NODE)
        job = TrainingJob(cluster, dataclasses.replace(config, output="elastic", num_workers="2:4"), tmp_path)
        try:
            job.wait_for(lambda: job.step() >= 12, "twelve steps on three workers")
            cluster.add_node(num_cpus=1, **NODE)
            job.wait_for(lambda: len(job.starts()) == 2, "a larger group")
            before = job.step()
            job.wait_for(lambda: job.step() >= before + 12, "twelve steps on four workers")
            cluster.remove_node(first, allow_graceful=False)  # SIGKILL: two of four workers are gone
            job.wait_for(lambda: len(job.starts()) == 3, "a smaller group")
            before = job.step()
            job.wait_for(lambda: job.step() >= before + 12, "twelve steps on two workers")
            job.finish()
        finally:
            job.stop()
        sizes = [int(size) for size in re.findall(r"train tokens, (\d+) workers on cpu", job.log())]
        assert sizes == [3, 4, 2], job.log()[-5000:]
        assert [step for step, _ in job.history("train/loss")] == list(range(1, STEPS + 1))

        fixed = TrainingJob(cluster, config, tmp_path)
        try:
            fixed.finish()
        finally:
            fixed.stop()
    # The same windows: only sums of float32 are in another order (2e-7 was seen).
    for metric in ("train/loss", "val/loss"):
        assert [value for _, value in job.history(metric)] == pytest.approx(
            [value for _, value in fixed.history(metric)], rel=1e-5
        )
