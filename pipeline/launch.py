"""Workers on a cluster: Ray Train starts them, restarts them when one is lost, and brings back what they computed.

Checkpoints are the trainer's own (checkpoint.py), on a folder that every worker sees: a restarted group of workers
finds the newest there, and so does the same command given again after the whole job died.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from pipeline import cluster
from pipeline.config import PretrainConfig
from pipeline.errors import UserError
from pipeline.pretrained import resolve_checkpoint
from pipeline.runs import RunSummary, finished_summary
from pipeline.storage import open_folder
from pipeline.tracking import MemoryTracker, MLflowRun, MLflowTracker, open_run
from pipeline.trainer import Trainer

logger = logging.getLogger(__name__)

_START_TIMEOUT_SECONDS = 600  # of the worker group: torch's import is slow on a busy machine, a cloud node slower

Settings = dict[str, Any]


def pretrain(config: PretrainConfig) -> tuple[RunSummary, MLflowRun]:
    """Train as ``config`` says, on the cluster; at once if this run is done already.

    Raises:
        UserError: what the user can mend, from the driver or from any worker.
    """
    data, output = cluster.resolve_output(config.data), cluster.resolve_path(config.output)
    summary = finished_summary(config, data=data, output=output)
    cluster.make_output(output)
    run = open_run(
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
        folder=open_folder(output),
        working_folder=cluster.working_folder(),
        job="pretrain",
        reopen=summary is None,
    )
    if summary is not None:
        return summary, run
    if config.checkpoint:  # found here: workers run in other folders
        config = replace(config, checkpoint=str(resolve_checkpoint(config.checkpoint)))
    settings = {"config": asdict(config), "data": str(data), "output": str(output), "run": asdict(run)}
    result = run_workers(
        pretrain_worker, settings, config, storage=output / "ray_train", max_failures=config.max_failures
    )
    return RunSummary(**result), run


class WorkersConfig(Protocol):
    """Settings of any job that runs workers."""

    @property
    def num_workers(self) -> int: ...

    @property
    def device(self) -> str: ...


def run_workers(
    worker: Callable[[Settings], Settings],
    settings: Settings,
    config: WorkersConfig,
    *,
    storage: Path,
    max_failures: int,
) -> Settings:
    """Run ``worker(settings)`` on config.num_workers workers of one process group; rank 0's result.

    Raises:
        UserError: from a worker, or because the cluster cannot hold the workers.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_SECONDS))
    cluster.connect(num_cpus=max(config.num_workers, os.cpu_count() or 1))
    use_gpu = choose_gpu(config)
    cluster.require(num_workers=config.num_workers, gpus=use_gpu)
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.parallel import backend_name

    error_note = storage / f"error-{uuid.uuid4().hex}"
    trainer = TorchTrainer(
        worker,  # type: ignore[arg-type]  # Ray's type does not know results
        train_loop_config={**settings, "error_note": str(error_note)},
        torch_config=TorchConfig(backend=backend_name(use_gpu)),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=worker.__name__,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # Ray Train v2
        ),
    )
    try:
        return _unwrap(trainer.fit().return_value)  # type: ignore[attr-defined]  # Ray Train v2
    except TrainingFailedError as error:
        logger.warning("the last failure:", exc_info=error)
        raise UserError(
            f"the workers failed more often than max_failures {max_failures} allows; what stopped them stands above, "
            "and the same command goes on from the newest checkpoint"
        ) from error
    finally:
        error_note.unlink(missing_ok=True)


def pretrain_worker(settings: Settings) -> Settings:
    """One training worker: the trainer with this rank's place."""
    return returning_errors(_pretrain, settings)


def _pretrain(settings: Settings) -> Settings:
    from pipeline.parallel import join_workers

    config = PretrainConfig(**settings["config"])
    workers = join_workers(config.device)
    show_progress(workers.is_first)
    tracker = MLflowTracker(MLflowRun(**settings["run"])) if workers.is_first else MemoryTracker()
    data, output = open_folder(settings["data"]), Path(settings["output"])
    trainer = Trainer(config, data=data, output=output, workers=workers, tracker=tracker)
    return asdict(trainer.run())


def returning_errors(action: Callable[[Settings], Settings], settings: Settings) -> Settings:
    """A UserError becomes the result of every worker: Ray Train would restart them, which mends nothing.

    The worker that has it notes it and leaves the process group; the others' collectives then fail, and they find the
    note. Without a note a failed collective means a lost worker, which a restart does mend.
    """
    import torch.distributed as dist

    note = Path(settings["error_note"])
    try:
        return {"result": action(settings)}
    except UserError as error:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(error), encoding="utf-8")
        if dist.is_initialized():
            dist.destroy_process_group()
        return {"error": str(error)}
    except RuntimeError:
        if note.is_file():
            return {"error": note.read_text(encoding="utf-8")}
        raise


def _unwrap(outcome: Settings) -> Settings:
    if "error" in outcome:
        raise UserError(outcome["error"])
    return dict(outcome["result"])


def choose_gpu(config: WorkersConfig) -> bool:
    """Whether the workers get a GPU each. Needs a joined cluster.

    Raises:
        UserError: --device cuda and no GPU in the cluster.
    """
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cuda" and gpus == 0 and not cluster.autoscales():
        raise UserError(
            "--device cuda was asked for, but the cluster has no GPU; use --device cpu or auto, or add GPU nodes"
        )
    return config.device == "cuda" or (config.device == "auto" and gpus >= config.num_workers)


def show_progress(is_first: bool) -> None:
    """Rank 0's progress lines go to the driver's terminal; other ranks are heard only when something is wrong."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO if is_first else logging.WARNING)
