"""Training on several folders of shards: the same windows on any workers, bitwise on resume, losses by source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoints.reader import read_description
from pipeline.config.inference import EvaluateConfig, ExportConfig
from pipeline.config.training import PretrainConfig
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluation import evaluate_job
from pipeline.pretrained.export_job import export
from pipeline.storage.folders import open_folder
from pipeline.tracking.mlflow_run import open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.training.run_folder import finished_summary
from pipeline.training.trainer import Trainer
from tests.support.memory_tracker import MemoryTracker
from tests.support.models import ALONE
from tests.support.sources import make_source
from tests.training.test_trainer import CONFIG, STEPS, Run, checkpoint_tensors, read_shard, run

__all__ = ["run"]  # a fixture

LENGTH, WINDOWS = CONFIG.context_length + 1, CONFIG.windows_per_step


@pytest.fixture(scope="module")
def sources(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sources")
    return {
        "web": make_source(home / "web", tiny_data, "zipfile", train_tokens=12_000),
        "books": make_source(home / "books", tiny_data, "textwrap", train_tokens=1_000, val_tokens=700),
        "late": make_source(home / "late", tiny_data, "queue", train_tokens=900),
    }


def mixed(sources: dict[str, Path], data: str, phase: str = "", **changes: object) -> PretrainConfig:
    """CONFIG with the mixture, whose folders are named by the keys of ``sources``."""

    def full(text: str) -> tuple[str, ...]:
        parts = (part.partition(":") for part in text.split())
        return tuple(
            f"{sources[name]}:{weight}" if weight else str(sources.get(name, name)) for name, _, weight in parts
        )

    names = full(data)
    return dataclasses.replace(CONFIG, data=names if len(names) > 1 else names[0], phase=full(phase), **changes)  # type: ignore[arg-type]


def folders(config: PretrainConfig) -> list[Path]:
    return [Path(folder) for folder in config.mixture.folders]


def trainer_of(config: PretrainConfig, output: Path, tracker: MemoryTracker | None = None) -> Trainer:
    return Trainer(config, data=folders(config), output=output, workers=ALONE, tracker=tracker or MemoryTracker())


def test_four_two_three_workers_over_a_phase_read_the_windows_of_the_weights_and_resume_bit_for_bit(
    run: Run, sources: dict[str, Path], tmp_path: Path
) -> None:
    """A step has 12 windows, 9 of web and 3 of books; from step 7 on, in the middle of a resume, 2, 4 and 6."""
    config = mixed(sources, "web:3 books:1", "7 web:1 books:2 late:3")
    given = {"settings_of": config, "data": folders(config)}
    four = run(4, "changing", stop_after=5, **given)
    two = run(2, "changing", stop_after=10, **given)
    three = run(3, "changing", **given)
    assert [part["start_step"] for part in (four, two, three)] == [0, 5, 10]
    windows = four["windows"] + two["windows"] + three["windows"]
    assert len(windows) == STEPS * WINDOWS

    own = [[*map(tuple, cut(sources[name]))] for name in ("web", "books", "late")]
    for step in range(STEPS):
        of_step = [tuple(window) for window in windows[step * WINDOWS : (step + 1) * WINDOWS]]
        counts = [sum(window in each for window in of_step) for each in own]
        assert counts == ([9, 3, 0] if step < 7 else [2, 4, 6]), f"step {step}"
    for each in own:
        read = [tuple(window) for window in windows if tuple(window) in each]
        whole = len(read) // len(each) * len(each)
        for start in range(0, whole, len(each)):
            assert sorted(read[start : start + len(each)]) == sorted(each), "an epoch has every window once"
        assert len({*read[whole:]}) == len(read) - whole
    assert len(own[1]) < 3 * 7 + 4 * 5, "books begins a second epoch"

    clean = run(2, "clean", **given)
    assert clean["windows"] == windows
    run(2, "broken", stop_after=9, **given)
    resumed = run(2, "broken", **given)
    assert resumed["start_step"] == 5
    assert resumed["losses"] == {step: loss for step, loss in clean["losses"].items() if step > 5}
    expected, found = checkpoint_tensors(tmp_path / "clean"), checkpoint_tensors(tmp_path / "broken")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 7, 8, 9])
def test_killed_around_a_phase_change(run: Run, sources: dict[str, Path], tmp_path: Path, step: int) -> None:
    """Every rank by SIGKILL, whatever of the checkpoint of step 5 is written; the phase begins with step 7."""
    config = mixed(sources, "web:3 books:1", "7 web:1 books:2 late:3")
    given = {"settings_of": config, "data": folders(config)}
    clean = run(2, "clean", **given)
    assert run(2, "killed", kill_after=step, **given) == {}
    resumed = run(2, "killed", **given)
    start = resumed["start_step"]
    assert start in {0, 5}
    assert resumed["windows"] == clean["windows"][start * WINDOWS :]
    assert resumed["losses"] == {done: loss for done, loss in clean["losses"].items() if done > start}
    expected, found = checkpoint_tensors(tmp_path / "clean"), checkpoint_tensors(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def cut(folder: Path) -> list[list[int]]:
    """The windows of a source, read without the pipeline; all differ."""
    tokens = read_shard(folder / "train_000000.bin")
    windows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    assert len(np.unique(windows, axis=0)) == len(windows)
    return [[int(token) for token in window] for window in windows]


def test_a_run_of_one_folder_goes_on_as_a_mixture_and_no_step_done_may_change(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    plateau: dict[str, Any] = {"schedule": "wsd", "decay_fraction": 0.0, "warmup_fraction": None, "warmup_steps": 0}
    trainer_of(mixed(sources, "web", train_steps=5, **plateau), tmp_path).run()
    more = plateau | {"train_steps": 9}
    annealed = mixed(sources, "web", "5 web:1 late:1", **more)
    clean = MemoryTracker()
    trainer_of(annealed, tmp_path / "clean", clean).run()
    resumed = MemoryTracker()
    trainer_of(annealed, tmp_path, resumed).run()
    assert resumed.metrics["train/loss"] == clean.metrics["train/loss"][5:]
    refused = {
        ("web", "7 web:1 late:1"): "that was .*web:1, from step 5 .*late:0.5, and is .*from step 7 ",
        (
            "web",
            "",
        ): "that was .*web:1, from step 5 .*, and is .*web:1 now; what is to change must begin with a --phase",
        ("late:1 web:1", "5 web:1 late:1"): "that was .*web:1, from step 5",
        ("web", "5 web:2 late:1"): "that was .*web:0.5 .*late:0.5, and is .*web:0.6667 .*late:0.3333 now",
        ("books", "5 web:1 late:1"): "that was .*, and is .*books:1, from step 5",
    }
    for (data, phase), sentence in refused.items():
        config = mixed(sources, data, phase, **more)
        with pytest.raises(UserError, match=f"other windows than --data and --phase give to its 9 steps: {sentence}"):
            finished_summary(config, data=folders(config), output=tmp_path)
    later = mixed(sources, "web", "5 web:1 late:1 9 books:1", **(more | {"train_steps": 11}))
    assert finished_summary(later, data=folders(later), output=tmp_path) is None, "9 steps are done: step 9 is free"


def test_shards_that_became_others_are_named(sources: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    own = {**sources, "books": make_source(tmp_path / "books", tiny_data, "textwrap", train_tokens=1_000)}
    config = mixed(own, "web:1 books:1", train_steps=1)
    trainer_of(config, tmp_path / "run").run()
    own["books"].rename(tmp_path / "old")
    make_source(tmp_path / "books", tiny_data, "textwrap", train_tokens=1_100)
    with pytest.raises(UserError, match=r"the shards of \S+/books are others now; what is to change must begin"):
        finished_summary(config, data=folders(config), output=tmp_path / "run")


def test_val_loss_by_source_and_weighted_lineage_evaluation_and_export(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = mixed(sources, "web:3 books:1", "6 web:1 late:3", val_tokens=100_000)
    tracker, output = MemoryTracker(), tmp_path / "run"
    summary = trainer_of(config, output, tracker).run()
    losses = {name: dict(tracker.metrics[f"val/loss_{name}"]) for name in sources}
    whole = dict(tracker.metrics["val/loss"])
    assert whole.keys() == {6, 12}
    for step, loss in whole.items():
        assert loss == pytest.approx(0.75 * losses["web"][step] + 0.25 * losses["books"][step], rel=1e-12)
        assert len({losses[name][step] for name in sources}) == 3
    assert summary.val_loss == whole[12] and summary.val_tokens == 299 + 699 + 299

    manifests = {name: Manifest.load(folder) for name, folder in sources.items()}
    found = [(item.name, item.context, item.fingerprint, item.weight) for item in tracker.inputs]
    assert found[:-1] == [
        (f"{name}-{split}", context, manifests[name].fingerprint, weight)
        for name, weight in (("web", 0.75), ("books", 0.25), ("late", 0.0))
        for split, context in (("train", "training"), ("val", "validation"))
    ]
    info = read_description(open_folder(summary.checkpoint)).info
    assert [source.manifest_fingerprint for source in info.sources] == [each.fingerprint for each in manifests.values()]
    assert info.phases == ((0, (3, 1, 0)), (6, (1, 0, 3)))

    scores = evaluate_job.evaluate(EvaluateConfig(checkpoint=summary.checkpoint, device="cpu", batch_size=2))
    assert scores.val_losses == pytest.approx({name: losses[name][12] for name in sources}, rel=1e-6)
    assert scores.val_loss == pytest.approx(whole[12], rel=1e-6) and scores.val_tokens == 1297
    bits = dict(tracker.metrics["val/bits_per_byte"])[12]
    assert scores.bits_per_byte == pytest.approx(bits, rel=1e-6)
    again = EvaluateConfig(checkpoint=summary.checkpoint, device="cpu", batch_size=2)
    assert evaluate_job.evaluate(again, reuse=True) == scores
    one = EvaluateConfig(checkpoint=summary.checkpoint, data=str(sources["late"]), device="cpu", batch_size=2)
    alone = evaluate_job.evaluate(one)
    assert alone.val_losses is None and alone.val_loss == pytest.approx(losses["late"][12], rel=1e-6)

    export(ExportConfig(checkpoint=summary.checkpoint, output="export"))
    card = Path("export/README.md").read_text()
    assert "web:0.75 books:0.25, from step 6 web:0.25 late:0.75" in card and str(tmp_path) not in card


def test_every_source_is_an_input_of_mlflows_run(sources: dict[str, Path], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri, output = f"sqlite:///{tmp_path}/mlflow.db", open_folder(tmp_path / "run")
    run = open_run(tracking_uri=uri, experiment="exp", folder=output, working_folder=tmp_path, job="pretrain")
    config = mixed(sources, "web:3 books:1", train_steps=2)
    Trainer(config, data=folders(config), output=output, workers=ALONE, tracker=MLflowTracker(run, output)).run()
    known = MlflowClient(uri).get_run(run.run_id)
    assert known.inputs is not None
    weights = {
        each.dataset.name: {tag.key: tag.value for tag in each.tags}.get("weight")
        for each in known.inputs.dataset_inputs
    }
    assert weights == {
        "web-train": "0.75", "web-val": "0.75", "books-train": "0.25", "books-val": "0.25", "tokenizer": None
    }  # fmt: skip
    fingerprint = known.data.tags["training_fingerprint"]
    assert fingerprint not in {Manifest.load(folder).fingerprint for folder in sources.values()}
    assert {"val/loss", "val/loss_web", "val/loss_books"} <= known.data.metrics.keys()


def test_folders_that_cannot_be_mixed_are_one_sentence(
    sources: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    other = make_source(tmp_path / "other", tiny_data, "textwrap", train_tokens=1_000)
    text = (other / "tokenizer.json").read_text()
    settings = json.loads(text)
    settings["model"]["merges"].pop()
    last = max(settings["model"]["vocab"], key=lambda token: settings["model"]["vocab"][token])
    assert last  # the vocabulary stays; only the merges differ
    (other / "tokenizer.json").write_text(json.dumps(settings))
    from pipeline.dataset.dataset import load_tokenizer

    fingerprint = load_tokenizer(open_folder(other)).fingerprint
    dataclasses.replace(Manifest.load(other), tokenizer_fingerprint=fingerprint).save(other)
    same = make_source(tmp_path / "same", tiny_data, "queue", train_tokens=900)
    mute = make_source(tmp_path / "mute", tiny_data, "textwrap", train_tokens=1_000, val_tokens=1)
    named = {**sources, "other": other, "same": same, "mute": mute}
    wrong = {
        "web:1 other:1": r"data folders \S+/web and \S+/other have different tokenizers \(fingerprint",
        "late:1 same:1": r"data folders \S+/late and \S+/same hold the same shards; give one of them",
        "web:1 mute:1": r"data folder \S+/mute has nothing to validate on",
    }
    for data, sentence in wrong.items():
        config = mixed(named, data)
        with pytest.raises(UserError, match=sentence):
            finished_summary(config, data=folders(config), output=tmp_path / "run")
