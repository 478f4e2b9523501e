"""A run that goes back to an earlier step with other settings, a branch, a copy: curves are those of what was trained.

The trainer here is a chain of hashes, so that a step's loss depends on all settings of the steps before it, as a real
one does; journal and MLflow's sqlite store are real.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.pretrained.mlflow_registry import find_model
from pipeline.storage.folders import open_folder
from pipeline.tracking import mlflow_tracker
from pipeline.tracking.journal import count_waiting, read_journal
from pipeline.tracking.lineage import Parent, read_parent, write_parent
from pipeline.tracking.mlflow_run import MLflowRun, current_run, find_run, open_run, recorded_run_id
from pipeline.tracking.mlflow_tracker import MLflowTracker, send_waiting
from pipeline.tracking.run_history import RunHistory
from pipeline.tracking.tracker import RunInput

EVERY = 3  # steps between checkpoints
START = "beginning"


@pytest.fixture(scope="module", autouse=True)
def impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_tracker, "_PERIOD_SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of MLflow without any run; to make one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@dataclass
class Run:
    """A run folder as a user sees it, and the truth about what was trained in it."""

    folder: Path
    lr: float = 0.1
    clip: float = 1.0
    curve: dict[int, float] = field(default_factory=dict)
    """Step -> loss of the steps that count."""
    given_up: list[dict[int, float]] = field(default_factory=list)
    """The curves that were given up, oldest first, each with the steps that it shares."""
    states: dict[int, str] = field(default_factory=lambda: {0: START})
    """Step of each checkpoint -> what is in it; step 0 needs none."""
    best: int | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    def loss(self, state: str) -> float:
        return int(hashlib.sha256(state.encode()).hexdigest()[:8], 16) / 1e9

    def steps(self, first: int, last: int) -> Iterator[tuple[int, str]]:
        """Steps after ``first`` and the state after each, if they were trained now."""
        state = self.states[first]
        for step in range(first + 1, last + 1):
            state = hashlib.sha256(f"{state} {step} {self.lr} {self.clip}".encode()).hexdigest()
            yield step, state


def open_(run: Run, home: Path) -> MLflowRun:
    return open_run(
        tracking_uri=f"sqlite:///{home}/mlflow.db",
        experiment="exp",
        folder=open_folder(run.folder),
        working_folder=home,
        job="pretrain",
    )


def train(run: Run, home: Path, num_steps: int, *, killed: bool) -> None:
    """A process that goes on from the newest checkpoint, as the trainer logs it, and ends well or is killed."""
    first = max(run.states)
    redone = dict(run.steps(first, max(run.curve, default=0)))
    if any(run.loss(state) != run.curve[step] for step, state in redone.items()):
        run.given_up.append(run.curve)
        run.curve = {step: loss for step, loss in run.curve.items() if step <= first}
    tracker = MLflowTracker(open_(run, home), open_folder(run.folder))
    chosen = {"grad_clip": run.clip}
    tracker.log_start(first, chosen, lambda step: run.lr)
    tracker.log_params({"lr": run.lr, **chosen})
    tracker.log_inputs([RunInput(name="d", fingerprint="a" * 64, source="d", context="training")])
    for step, state in run.steps(first, first + num_steps):
        tracker.log_metrics({"train/loss": run.loss(state), "train/lr": run.lr}, step)
        tracker.log_metrics({"system/memory": 1.0}, 100 + step)
        run.curve[step] = run.loss(state)
        if step % EVERY == 0:
            run.states[step] = state
            tracker.log_metrics({"val/loss": run.loss(state)}, step)
            losses = {each: run.loss(kept) for each, kept in run.states.items() if each}
            run.best = min(losses, key=lambda each: losses[each])
            path, found = run.folder / f"checkpoints/step-{step:06d}", {"val_loss": run.loss(state)}
            tracker.log_checkpoint(step, path, found, best=run.best == step)
    if killed:
        tracker.uploader.stop()
        tracker.uploader._thread.join(60)
        tracker.journal.close()
    else:
        tracker.finish("KILLED")


def points(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """Every point that MLflow has, doubled ones too."""
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))


def check(run: Run, home: Path) -> None:
    """MLflow, once it has everything, and the journal tell what was trained, branch by branch."""
    folder = open_folder(run.folder)
    send_waiting(open_(run, home), folder)
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    record = open_(run, home)
    assert count_waiting(folder, record.run_id) == 0
    assert points(client, record.run_id, "train/loss") == sorted(run.curve.items())
    validated = sorted((step, loss) for step, loss in run.curve.items() if step % EVERY == 0)
    assert points(client, record.run_id, "val/loss") == validated
    history = RunHistory.from_journal(read_journal(folder))
    assert history.metrics["train/loss"] == run.curve
    run_id = record.run_id
    for curve in reversed(run.given_up):
        tags = client.get_run(run_id).data.tags
        before, step = tags["branched_from"], int(tags["branched_at_step"])
        assert client.get_run(before).data.tags["continued_as"] == run_id
        assert client.get_run(before).data.tags["abandoned_after_step"] == str(step)
        assert client.get_run(before).info.status in ("KILLED", "FINISHED")
        assert points(client, before, "train/loss") == sorted(curve.items())
        run_id = before
    parent = read_parent(folder)
    assert client.get_run(run_id).data.tags.get("branched_from_folder") == (parent and parent.folder)


KINDS = ("train", "kill", "back", "rate", "clip", "branch", "copy", "delete best")
ACTIONS = st.tuples(st.sampled_from(KINDS), st.integers(0, 3))


def act(runs: list[Run], home: Path, kind: str, number: int) -> None:
    """One thing that a user may do, with the newest run."""
    run = runs[-1]
    steps = sorted(run.states)[1:]
    if kind in ("train", "kill"):
        train(run, home, 2 + 2 * number, killed=kind == "kill")
    elif kind == "back":
        for step in steps[len(steps) - number :] if number else []:
            del run.states[step]
    elif kind == "rate":
        run.lr = (0.1, 0.2, 0.3, 0.1)[number]
    elif kind == "clip":
        run.clip = (1.0, 2.0, 1.0, 0.5)[number]
    elif kind == "delete best" and run.best in run.states:
        del run.states[run.best]
    elif kind == "branch" and steps:
        step = steps[number % len(steps)]
        branch = Run(home / f"run{len(runs)}", lr=run.lr, clip=run.clip, states={step: run.states[step]})
        branch.folder.mkdir()
        origin = current_run(open_folder(run.folder), open_(run, home))
        write_parent(open_folder(branch.folder), Parent(folder=str(run.folder), step=step, run_id=origin.run_id))
        runs.append(branch)
    elif kind == "copy" and (run.folder / "mlflow_run.json").exists():
        folder = home / f"run{len(runs)}"
        shutil.copytree(run.folder, folder)
        runs.append(replace(run, folder=folder, curve=dict(run.curve), given_up=[], states=dict(run.states)))


@settings(max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, min_size=3, max_size=9))
def test_the_curves_are_those_of_what_was_trained_whatever_is_done(
    empty_store: Path, actions: list[tuple[str, int]]
) -> None:
    memory = Path("/dev/shm")  # sqlite waits for the disk at every entry
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        home = Path(temporary)
        shutil.copyfile(empty_store, home / "mlflow.db")
        runs = [Run(home / "run0")]
        runs[0].folder.mkdir()
        train(runs[0], home, 5, killed=False)
        for kind, number in actions:
            act(runs, home, kind, number)
        for run in runs:
            if run.curve:
                check(run, home)


def test_a_copy_that_was_not_trained_yet_has_no_run(empty_store: Path, tmp_path: Path) -> None:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    run = Run(tmp_path / "run0")
    run.folder.mkdir()
    record = open_(run, tmp_path)
    shutil.copytree(run.folder, tmp_path / "copy")
    copy = open_folder(tmp_path / "copy")
    place: dict[str, Any] = {"tracking_uri": record.tracking_uri, "working_folder": tmp_path}
    assert find_run(folder=copy, **place) is None and recorded_run_id(copy) is None
    assert find_run(folder=open_folder(run.folder), **place) == record
    (tmp_path / "link").symlink_to(run.folder)
    assert find_run(folder=open_folder(tmp_path / "link"), **place) == record, "the same folder under another name"


def test_a_version_of_steps_that_were_given_up_is_not_taken(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = Run(tmp_path / "run0")
    run.folder.mkdir()
    checkpoint = run.folder / "checkpoints/step-000003"
    for clip in (1.0, 2.0):
        tracker = MLflowTracker(open_(run, tmp_path), open_folder(run.folder), registered_model="gpt")
        tracker.log_start(0, {"grad_clip": clip}, lambda step: run.lr)
        tracker.log_params({"grad_clip": clip})
        tracker.log_metrics({"train/loss": clip, "train/lr": run.lr}, 3)
        if clip == 1.0:
            tracker.log_checkpoint(3, checkpoint, {"val_loss": 1.0}, best=True)
        tracker.finish("KILLED")
        if clip == 1.0:
            assert find_model("models:/gpt@best", tmp_path) == find_model("models:/gpt/1", tmp_path) == str(checkpoint)
    with pytest.raises(UserError, match="is a checkpoint that is gone: its run went back to step 0"):
        find_model("models:/gpt/1", tmp_path)
    with pytest.raises(UserError, match="MLflow has no model models:/gpt@best"):
        find_model("models:/gpt@best", tmp_path)
    params = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(open_(run, tmp_path).run_id).data.params
    assert params == {"grad_clip": "2.0"}, "from step 0 on it is another run"
