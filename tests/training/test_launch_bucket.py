"""A run whose folder is in a bucket, with two workers under a real Ray: trained, continued, branched, exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.checkpoints import directory as checkpoint_directory
from pipeline.cluster import ray_cluster
from pipeline.config.inference import ExportConfig
from pipeline.pretrained import export_job
from pipeline.storage.folders import open_folder
from pipeline.training import launch
from tests.support.factories import tiny_config
from tests.support.s3_server import S3


@pytest.mark.slow
def test_the_run_folder_may_be_in_a_bucket(
    s3: S3, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"GPT25_HOME": tmp_path, "GPT25_CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    config = tiny_config(
        data=str(tiny_data),
        output=f"{s3.url}/run",
        num_layers=1,
        tokens_per_step=32 * 8,
        train_steps=4,
        schedule="wsd",  # more steps would bend a cosine
        decay_fraction=0.0,
        val_every=4,
        sample_every=4,
        checkpoint_every=2,
        keep_checkpoints=1,
        keep_every=4,
        num_workers=2,
    )
    ray_cluster.connect(num_cpus=2)
    try:
        summary, run = launch.pretrain(config)
        assert summary.steps == 4 and summary.checkpoint == f"{s3.url}/run/checkpoints/step-000004"
        assert launch.pretrain(config) == (summary, run), "it is done"
        longer, same_run = launch.pretrain(dataclasses.replace(config, train_steps=6))
        assert longer.first_loss == summary.first_loss and same_run == run
        branching = dataclasses.replace(
            config, output=f"{s3.url}/branch", branch_from=f"{s3.url}/run", step=4, train_steps=6, lr=config.lr / 10
        )
        branch, run_of_branch = launch.pretrain(branching)
        assert branch.steps == 6 and branch.last_loss != longer.last_loss
        assert launch.pretrain(branching) == (branch, run_of_branch), "it is done"
    finally:
        ray_cluster.shut_down()
    steps = checkpoint_directory.list_steps(open_folder(f"{s3.url}/run/checkpoints"))
    assert steps == [4, 6], "the newest, and every fourth for good"
    assert {"run/summary.json", "run/best.json", "run/mlflow_run.json"} <= set(s3.keys())
    assert checkpoint_directory.list_steps(open_folder(f"{s3.url}/branch/checkpoints")) == [4, 6]
    tags = MlflowClient(run.tracking_uri).get_run(run_of_branch.run_id).data.tags
    assert (tags["branched_from"], tags["branched_at_step"]) == (run.run_id, "4")
    report = export_job.export(ExportConfig(checkpoint=f"{s3.url}/run", output="exported"))
    assert (Path(report.output) / "model.safetensors").is_file()
