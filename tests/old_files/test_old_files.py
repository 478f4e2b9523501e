"""What commit e56b0f4 left on disk is read, and goes on to what that commit made of it (tests/old_files/e56b0f4).

Shards, tokenizer, data order and every tensor that is read must be the same bits on any machine. Losses of steps done
here are the same bits where processor and torch are those of the record; elsewhere float32 sums in another order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline.preprocessing import resume_state
from pipeline.tracking import report
from pipeline.preprocessing import tokenization
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.checkpoints.writer import training_state
from pipeline.config.training import PretrainConfig
from pipeline.config.data import TokenizeConfig, TrainTokenizerConfig
from pipeline.config.inference import ExportConfig
from pipeline.pretrained.export_job import export
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_run import open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.distributed.process_group import ProcessGroup
from pipeline.pretrained.resolve import resolve_checkpoint
from pipeline.training.run_folder import finished_summary, read_best
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.verification import verify
from pipeline.storage.folders import open_folder
from pipeline.tracking.run_history import RunHistory
from pipeline.preprocessing.train_tokenizer_job import train_into
from pipeline.tracking.tracker import Tracker, Trackers
from tests.support.memory_tracker import MemoryTracker
from pipeline.training.trainer import Trainer
from tests.support.fixtures import contents

OLD = Path(__file__).resolve().parents[1] / "old_files/e56b0f4"
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
CONFIGS = EXPECTED["configs"]
MADE_IN = "/srv/gpt-2.5"
CHANGED_AT = 1_790_000_000_000_000_000  # time of change in the plans, nanoseconds since 1970
ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))
STEPS = range(20, 30)  # between the checkpoint of unfinished_run and the end

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old files as if they had been made in this folder, which is the current one."""
    home = tmp_path / "home"
    shutil.copytree(OLD, home)
    for path in (home / "corpus").iterdir():
        os.utime(path, ns=(CHANGED_AT, CHANGED_AT))
    for plan in home.glob("*/items/plan.jsonl"):
        plan.write_text(plan.read_text(encoding="utf-8").replace(MADE_IN, str(home)), encoding="utf-8")
    monkeypatch.chdir(home)
    return home


def is_the_same_arithmetic() -> bool:
    """Whether this processor and this torch are those that the expected losses were computed with."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    processor = " ".join(values.get(name, "") for name in ("vendor_id", "cpu family", "model"))
    return {"torch": torch.__version__, "processor": processor} == EXPECTED["made_by"]


def make_trainer(home: Path, output: str, tracker: Tracker | None = None, **changes: Any) -> Trainer:
    config = PretrainConfig(**(CONFIGS["run"] | {"output": output} | changes))
    folder = open_folder(home / output)
    return Trainer(config, data=home / "shards", output=folder, workers=ALONE, tracker=tracker or MemoryTracker())


def hashes(trainer: Trainer) -> dict[str, str]:
    """sha256 of every tensor's bytes."""
    state = training_state(trainer.model, trainer.optimizer)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()}


def exact(hexadecimal: dict[str, str]) -> dict[int, float]:
    return {int(step): float.fromhex(value) for step, value in hexadecimal.items()}


# ---- tokenizer and shards --------------------------------------------------------------------------------------------


def test_the_old_files_are_as_they_were_made() -> None:
    for name in ("tokenizer", "shards"):
        assert contents(OLD / name) == EXPECTED[name]


def test_a_tokenizer_is_read_and_would_be_made_again(home: Path) -> None:
    file = home / "tokenizer/tokenizer.json"
    Tokenizer.from_file(file).save(home / "saved.json")
    assert (home / "saved.json").read_bytes() == file.read_bytes()
    train_into(TrainTokenizerConfig(**CONFIGS["tokenizer"]), open_folder(home / "again"))
    made = contents(home / "again")
    assert {name: made[name] for name in ("tokenizer.json", "items/run.json")} == {
        name: EXPECTED["tokenizer"][name] for name in ("tokenizer.json", "items/run.json")
    }


def test_finished_shards_are_done_and_would_be_made_again(home: Path) -> None:
    config, folder = TokenizeConfig(**CONFIGS["shards"]), open_folder(home / "shards")
    assert tokenization.finished(config, folder) == Manifest.load(home / "shards")
    assert verify(home / "shards") == []
    made = tokenization.tokenize(config, open_folder(home / "again"))
    assert made.num_items_done == EXPECTED["items"]["all"]
    assert contents(home / "again") == contents(home / "shards")


def test_an_unfinished_tokenization_goes_on_to_the_same_files(home: Path) -> None:
    config, folder = TokenizeConfig(**CONFIGS["shards"]), open_folder(home / "unfinished_shards")
    assert tokenization.finished(config, folder) is None and resume_state.read_run(folder) is not None
    assert (home / "unfinished_shards/train_000003.bin").exists()
    summary = tokenization.tokenize(config, folder)
    assert (summary.num_items, summary.num_items_done) == (7, 7 - EXPECTED["items"]["done"])
    assert contents(home / "unfinished_shards") == contents(home / "shards")


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_bit_by_bit_and_the_data_order_goes_on(home: Path) -> None:
    trainer = make_trainer(home, "unfinished_run")
    assert trainer.start_step == STEPS[0]
    assert hashes(trainer) == EXPECTED["state"]["20"]
    for step in STEPS:
        assert trainer.loader.order.step_windows(step).tolist() == EXPECTED["windows"][str(step)]
        digest = hashlib.sha256()
        for batch in trainer.loader.step(step):
            digest.update(batch.inputs.numpy().astype("<i8").tobytes() + batch.targets.numpy().astype("<i8").tobytes())
        assert digest.hexdigest() == EXPECTED["batches"][str(step)]
    assert make_trainer(home, "finished_run").start_step == 30
    assert hashes(make_trainer(home, "finished_run")) == EXPECTED["state"]["30"]


def test_an_unfinished_run_goes_on_to_the_same_end(home: Path) -> None:
    shutil.copytree(home / "unfinished_run", home / "interrupted")
    memory = MemoryTracker()
    straight = make_trainer(home, "unfinished_run", memory)
    summary = straight.run()
    broken, step = make_trainer(home, "interrupted", checkpoint_every=5), STEPS[0]
    while step < 25:
        step = broken.advance(step)
    broken.writer.wait()
    broken = make_trainer(home, "interrupted", checkpoint_every=5)
    assert broken.start_step == 25
    broken.run()
    assert hashes(broken) == hashes(straight)

    losses = {step: loss for step, loss in exact(EXPECTED["losses"]).items() if step > STEPS[0]}
    assert dict(memory.metrics["train/loss"]) == pytest.approx(losses, rel=1e-4)  # sums in another order
    expected = EXPECTED["summary"]
    assert (summary.first_loss, summary.best_step) == (expected["first_loss"], expected["best_step"])
    if is_the_same_arithmetic():
        assert dict(memory.metrics["train/loss"]) == losses
        assert dict(memory.metrics["val/loss"]) == exact(EXPECTED["val_losses"])
        assert hashes(straight) == EXPECTED["state"]["30"]


def test_the_journal_of_an_unfinished_run_goes_on(home: Path) -> None:
    folder, store = open_folder(home / "unfinished_run"), f"sqlite:///{home / 'mlflow.db'}"
    (best,) = json.loads((OLD / "unfinished_run/best.json").read_text()).items() - {("step", 20)}
    told = {entry["step"]: entry["values"] for entry in old_entries("unfinished_run") if "train/loss" in str(entry)}
    run = open_run(tracking_uri=store, experiment="e", folder=folder, working_folder=home, job="pretrain")
    memory = MemoryTracker()
    trainer = make_trainer(home, "unfinished_run", Trackers(MLflowTracker(run, folder), memory))
    assert trainer.evaluation.best is not None and trainer.evaluation.best.val_loss == best[1]
    trainer.run()

    losses = {step: told[step]["train/loss"] for step in range(1, 25)} | dict(memory.metrics["train/loss"][4:])
    assert list(losses) == list(range(1, 31))
    points = MlflowClient(store).get_metric_history(run.run_id, "train/loss")  # a new store gets the old lines too
    assert [(point.step, point.value) for point in points] == list(losses.items())
    assert len(RunHistory.from_journal(entry for entry, _ in Journal(folder).read(0)).periods) == 2


def old_entries(name: str) -> list[dict[str, Any]]:
    """The lines of an old journal, read without the pipeline."""
    lines = (OLD / name / "tracking.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "metrics"]


def test_a_finished_run_is_done_and_its_report_is_made_again(home: Path) -> None:
    folder = open_folder(home / "finished_run")
    config = PretrainConfig(**(CONFIGS["run"] | {"output": "finished_run"}))
    summary = finished_summary(config, data=home / "shards", output=folder)
    assert summary is not None and asdict(summary) == EXPECTED["summary"] | {"task_scores": None, "val_accuracy": None}
    best = read_best(folder)
    assert best is not None and (best.step, best.val_loss) == (30, exact(EXPECTED["val_losses"])[30])
    entries = [entry for entry, _ in Journal(folder).read(0)]
    history = RunHistory.from_journal(entries)
    early = {entry["step"]: entry["values"] for entry in old_entries("unfinished_run") if "train/loss" in str(entry)}
    expected = {step: early[step]["train/loss"] for step in range(1, 21)} | exact(EXPECTED["losses"])
    assert history.metrics["train/loss"] == expected
    assert len(history.periods) == 2 and [step for step, *_ in history.samples] == [10, 20, 30]
    assert report.write_pages(folder, entries) == ["curves.png", "report.html"]
    page = (home / "finished_run/report.html").read_text(encoding="utf-8")
    for words in ("5.7825 → 5.4746", "5.4894 on 500 tokens", "e56b0f42d7684de5380163afdf48c397b6c8056f"):
        assert words in page, words


def test_a_checkpoint_is_exported_to_the_same_weights(home: Path) -> None:
    assert resolve_checkpoint("finished_run") == home / "finished_run/checkpoints/step-000030"
    export(ExportConfig(checkpoint="unfinished_run", output="export"))
    written = contents(home / "export")
    same = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    assert {name: written[name] for name in same} == {name: EXPECTED["export"][name] for name in same}
