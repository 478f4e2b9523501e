"""Every job under SIGINT and SIGTERM at ten moments: a closing line, the exit code, and the same command goes on."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.checkpoints.reader import list_checkpoints
from tests.support.killed_job import Ended, KillableJob
from tests.support.models import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CLOSING = r"(interrupted; the same command .+|interrupted before anything began|.*stopped .*; the same command .+)"
LIMIT_SECONDS = 10.0
"""Within which a job of this size ends on a machine that is not overloaded; a longer end is logged, not a failure."""
SHAPE: dict[str, Any] = {
    **{"num_layers": 1, "num_heads": 2, "d_model": 32, "d_ff": 64, "context_length": 32, "tokens_per_step": 256},
    **{"batch_size": 8, "lr": 1e-3, "num_workers": 1, "device": "cpu", "log_every": 1, "val_every": 10},
    **{"val_tokens": 256, "sample_every": 1000, "sample_tokens": 4, "checkpoint_every": 10},
}
OF_RAY = re.compile(r"\((TrainController|PlacementGroupCleaner|\w*Actor|raylet|autoscaler)\b[^)]*\)")
"""Lines of Ray's own processes, which warn where the machine is busy."""
SIGNALS = [(signal.SIGINT, False), (signal.SIGTERM, True)]
"""Ctrl-C for the process, SIGTERM for its group as `timeout` and batch systems send it."""

logger = logging.getLogger(__name__)


def flags_of(**settings: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def check(ended: Ended, number: signal.Signals, where: str) -> None:
    """The closing line is the last that the job itself prints; Ray may tell of its workers meanwhile."""
    lines = [line for line in ended.output.splitlines() if line.strip() and not line.startswith("\x1b")]
    assert ended.code == 128 + number, f"{where}: {ended.code}\n{ended.output[-5000:]}"
    assert re.fullmatch(CLOSING, lines[-1]), f"{where}: {lines[-1]}\n{ended.output[-5000:]}"
    own = [line for line in lines if not OF_RAY.search(line)]
    assert not any("Traceback" in line for line in own), f"{where}\n{ended.output[-5000:]}"
    if ended.seconds > LIMIT_SECONDS:
        logger.warning("%s: %.1f s from the signal to the end", where, ended.seconds)


def killed_everywhere(job: KillableJob, *printed: str, child: str = "") -> None:
    """Kill the job at ten moments, twice each, and let it finish in the end.

    Args:
        printed: lines that are such moments.
        child: the beginning of a process that is one.
    """
    seconds = []
    others = [{"child": child}] * bool(child) + [{"printed": name} for name in printed]
    moments = [{"moment": name} for name in job.moments(10 - len(others))] + others
    shutil.rmtree(job.output, ignore_errors=True)
    for moment in moments:
        for number, group in SIGNALS:
            where = f"{job.name}, {moment}, {number.name}"
            ended = job.run(number, **moment, group=group)
            if ended.code == 0 and not ended.was_told:  # what was done before has not to be done again
                shutil.rmtree(job.output, ignore_errors=True)
                ended = job.run(number, **moment, group=group)
            if ended.code == 0 and ended.was_told:
                continue  # it was about to end, all done
            assert ended.was_told, f"{where}: it ended by itself with {ended.code}\n{ended.output[-3000:]}"
            check(ended, number, where)
            seconds.append(ended.seconds)
    ended = job.run()
    assert ended.code == 0, ended.output[-5000:]
    assert not left_over(job.output), left_over(job.output)
    logger.warning("%s: %d kills, the slowest end took %.1f s", job.name, len(seconds), max(seconds))


def left_over(output: Path) -> list[Path]:
    """Temporary files and locks of the job, at and beside its output."""
    found = [path for path in output.parent.glob(".*") if output.name in path.name]
    return found + [path for path in output.rglob("*") if ".tmp-" in path.name or path.name.endswith(".incomplete")]


@pytest.fixture
def source(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents * 5))
    return path


@pytest.fixture
def model(tiny_data: Path, tmp_path: Path) -> Path:
    train(tiny_data, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Ray's processes end with the job that started them."""
    yield
    marks = [
        process for process in psutil.process_iter(["environ"]) if (process.info["environ"] or {}).get("KILLED_JOBS")
    ]
    _, alive = psutil.wait_procs(marks, timeout=60)
    assert not alive, [process.cmdline() for process in alive]


@pytest.mark.parametrize("workers", [1, 2])
def test_pretrain(tiny_data: Path, tmp_path: Path, workers: int) -> None:
    settings = {**SHAPE, "data": tiny_data, "output": "out", "train_steps": 400, "num_workers": workers}
    job = KillableJob(name="pretrain.py", flags=flags_of(**settings), home=tmp_path, output=tmp_path / "out")
    words = (r"starting at step|resuming at step", r"step +\d+/400  loss", r"step \d+: val loss")
    killed_everywhere(job, *words, child="RayTrainWorker" if workers > 1 else "")
    assert list_checkpoints(tmp_path / "out" / "checkpoints")[-1][0] == 400


def test_tokenize(source: Path, tmp_path: Path) -> None:
    flags = flags_of(source=source, output="out", vocab_size=300, item_bytes=20_000, num_workers=2)
    killed_everywhere(KillableJob(name="tokenize.py", flags=flags, home=tmp_path, output=tmp_path / "out"))
    verified = KillableJob(name="tokenize.py", flags=[*flags, "--verify"], home=tmp_path, output=tmp_path / "out").run()
    assert verified.code == 0 and "nothing is wrong" in verified.output


def test_train_tokenizer(source: Path, tmp_path: Path) -> None:
    flags = flags_of(source=source, output="out", vocab_size=300, item_bytes=20_000, num_workers=2)
    killed_everywhere(KillableJob(name="train_tokenizer.py", flags=flags, home=tmp_path, output=tmp_path / "out"))


def test_import_shards(tiny_data: Path, tmp_path: Path) -> None:
    splits = {"train": tiny_data / "train_*.bin", "val": tiny_data / "val_*.bin"}
    flags = flags_of(**splits, output="out", tokenizer=tiny_data / "tokenizer.json")
    killed_everywhere(KillableJob(name="import_shards.py", flags=flags, home=tmp_path, output=tmp_path / "out"))


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluate(model: Path, tmp_path: Path, workers: int) -> None:
    flags = flags_of(checkpoint=model, output="out/scores.json", num_workers=workers, device="cpu")
    killed_everywhere(KillableJob(name="evaluate.py", flags=flags, home=tmp_path, output=tmp_path / "out"))


def test_generate(model: Path, tmp_path: Path) -> None:
    flags = flags_of(checkpoint=model, output="out/texts.jsonl", num_samples=20, max_new_tokens=100, device="cpu")
    killed_everywhere(KillableJob(name="generate.py", flags=flags, home=tmp_path, output=tmp_path / "out"))


def test_export(model: Path, tmp_path: Path) -> None:
    flags = flags_of(checkpoint=model, output="out")
    killed_everywhere(KillableJob(name="export.py", flags=flags, home=tmp_path, output=tmp_path / "out"))


def test_sweep(tiny_data: Path, tmp_path: Path) -> None:
    flags = flags_of(**SHAPE, data=tiny_data, output="out", train_steps=60, vary="lr=1e-3,3e-3")
    job = KillableJob(name="sweep.py", flags=flags, home=tmp_path, output=tmp_path / "out")
    killed_everywhere(job, r"trials to train")


def test_demo(source: Path, tmp_path: Path) -> None:
    preset = tmp_path / "demo.yaml"
    shape = "".join(f"  {name}: {value}\n" for name, value in SHAPE.items())
    preset.write_text(
        f"tokenize:\n  source: {source}\n  output: out/data\n  vocab_size: 300\n  val_fraction: 0.05\n"
        f"pretrain:\n  data: out/data\n  output: out/run\n  train_steps: 100\n{shape}"
        "evaluate:\n  checkpoint: out/run\n  device: cpu\n"
    )
    job = KillableJob(name="demo.py", flags=[f"--config={preset}"], home=tmp_path, output=tmp_path / "out")
    killed_everywhere(job, r"\[3/4 training", r"step +\d+/100  loss", r"\[4/4 evaluation")


def test_serve_while_it_starts(model: Path, tmp_path: Path) -> None:
    """A server that is ready ends by these signals, as it should: with exit code 0."""
    job = KillableJob(
        name="serve.py", flags=flags_of(checkpoint=model, port=0, device="cpu"), home=tmp_path, output=tmp_path / "out"
    )
    ended = job.run(signal.SIGTERM, printed="serve: ready")
    assert ended.code == 0 and "Traceback" not in ended.output, ended.output[-3000:]
    found = [name for name in job.noted() if not name.startswith("*")]
    before_it_was_ready = found[: found.index(next(name for name in found if name.startswith("process"))) + 3]
    for position in range(10):
        moment = before_it_was_ready[position * (len(before_it_was_ready) - 1) // 9]
        for number, group in SIGNALS:
            check(job.run(number, moment=moment, group=group), number, f"serve.py, {moment}")
