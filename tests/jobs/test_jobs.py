"""The commands as a user gives them: help from anywhere, mistakes in one sentence, text from a checkpoint."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import yaml

from pipeline.dataset.dataset import open_data
from pipeline.dataset.shards import open_split
from pipeline.distributed.process_group import ProcessGroup
from pipeline.storage.folders import as_folder
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.memory_tracker import MemoryTracker

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("[a-z]*.py"))


def job(name: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("GPT25_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    command = [sys.executable, str(ROOT / "jobs" / name), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200, check=False)


def error_of(name: str, *flags: str, cwd: Path) -> str:
    """The one sentence that a mistake is answered with."""
    result = job(name, *flags, cwd=cwd)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    *before, line = result.stderr.strip().splitlines()
    assert before in ([], [f"{name.removesuffix('.py')}: starting"])  # settings alone are checked before that line
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def run_folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, on one rank and without Ray."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(tokens_per_step=256, batch_size=8, train_steps=3, val_tokens=100, sample_tokens=4)
    workers = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))
    Trainer(config, data=tiny_data, output=folder, workers=workers, tracker=MemoryTracker()).run()
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_help_from_another_folder(name: str, tmp_path: Path) -> None:
    result = job(name, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


@pytest.mark.parametrize("name", ["tokenize.py", "train_tokenizer.py", "pretrain.py", "evaluate.py", "generate.py"])
def test_dry_run_prints_the_resolved_settings(name: str, tmp_path: Path) -> None:
    section = name.removesuffix(".py")
    result = job(name, "--config", str(ROOT / "configs/demo.yaml"), "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    resolved = yaml.safe_load(result.stdout)[section]
    preset = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())[section]
    assert preset.items() <= resolved.items()
    assert not any(tmp_path.iterdir()), "a dry run leaves nothing behind"


def test_dry_run_of_training_counts_the_data_and_is_a_preset(tiny_data: Path, tmp_path: Path) -> None:
    flags = [
        "--depth",
        "1",
        "--vocab_size",
        str(open_data(as_folder(tiny_data))[1].vocab_size),
        "--data",
        str(tiny_data),
    ]
    first = job("pretrain.py", *flags, "--dry_run", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert f" passes over the {open_data(as_folder(tiny_data))[1].tokens('train'):,} tokens of " in first.stdout
    (tmp_path / "preset.yaml").write_text(first.stdout)
    second = job("pretrain.py", "--config", "preset.yaml", cwd=tmp_path)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["preset.yaml"]


def test_depth_counts_on_the_ids_of_the_data(tiny_data: Path, tmp_path: Path) -> None:
    ids = open_data(as_folder(tiny_data))[1].vocab_size
    for more in ([], ["--dry_run"]):
        sentence = error_of("pretrain.py", "--depth", "1", "--data", str(tiny_data), *more, cwd=tmp_path)
        assert f"the data have {ids:,} token ids, but the settings count on 50257; give --vocab_size {ids}" in sentence


@pytest.mark.parametrize("preset", ["gpt2.5", "gpt2.5-2026-03", "fast", "fastest"])
def test_the_presets_of_124m_pass_a_dry_run(preset: str, tmp_path: Path) -> None:
    path = ROOT / f"configs/{preset}.yaml"
    result = job("pretrain.py", "--config", str(path), "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(path.read_text())["pretrain"].items() <= yaml.safe_load(result.stdout)["pretrain"].items()


@pytest.mark.parametrize("name", ["tokenize.py", "train_tokenizer.py", "pretrain.py", "evaluate.py", "generate.py"])
def test_an_unknown_flag_names_the_nearest(name: str, tmp_path: Path) -> None:
    assert "did you mean 'dry_run'?" in error_of(name, "--dry_rum", cwd=tmp_path)


def test_training_on_nothing(tmp_path: Path) -> None:
    assert "does not exist" in error_of("pretrain.py", "--data", "nowhere", cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no manifest.json" in error_of("pretrain.py", "--data", "empty", cwd=tmp_path)


def test_a_cluster_that_does_not_answer(tiny_data: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9", "GPT25_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), "--data", str(tiny_data), "--output", "run"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 1
    assert "error: no Ray cluster at RAY_ADDRESS 127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.stderr


def test_contradicting_batch_flags(tmp_path: Path) -> None:
    assert "tokens_per_step is 524,288" in error_of("pretrain.py", "--grad_accum_steps", "2", cwd=tmp_path)


def test_text_that_is_not_there(tmp_path: Path) -> None:
    assert "absent.parquet" in error_of("tokenize.py", "--source", "absent.parquet", "--output", "out", cwd=tmp_path)
    table = pa.table({"body": ["text"], "id": [1]})
    pq.write_table(table, tmp_path / "other.parquet")
    sentence = error_of("tokenize.py", "--source", "other.parquet", "--output", "out", cwd=tmp_path)
    assert "text" in sentence and "body" in sentence and "id" in sentence
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_wrong_key_of_json_lines_is_found_before_ray_starts(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"text": "a text"}\n')
    flags = ["--source", "lines.jsonl", "--output", "out", "--text_column", "txt"]
    sentence = error_of("tokenize.py", *flags, cwd=tmp_path)  # one line, so Ray has not begun
    assert f"{tmp_path}/lines.jsonl" in sentence and "txt" in sentence
    told = job("tokenize.py", *flags, "--dry_run", cwd=tmp_path)
    assert told.returncode == 0 and f"# would fail  {sentence.removeprefix('error: ')}" in told.stdout, told.stderr


def test_a_dry_run_of_training_names_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told = job(
        "pretrain.py", "--device", "cuda", "--hellaswag", "absent.jsonl", "--depth", "1", "--dry_run", cwd=tmp_path
    )
    assert told.returncode == 0, told.stderr
    device, questions = [line for line in told.stdout.splitlines() if line.startswith("# would fail")]
    assert "--device cuda was asked for, but torch sees no GPU on this machine" in device
    assert f"there are no HellaSwag questions at {tmp_path}/absent.jsonl" in questions
    sentence = error_of("pretrain.py", "--device", "cuda", cwd=tmp_path)
    assert "torch sees no GPU on this machine" in sentence, "one line, so Ray has not begun"


@pytest.mark.parametrize("name", ["tokenize.py", "train_tokenizer.py", "pretrain.py"])
def test_output_that_is_a_file(name: str, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "source.txt").write_text("a text")
    flags = ["--data", str(tiny_data)] if name == "pretrain.py" else ["--source", "source.txt"]
    sentence = error_of(name, *flags, "--output", "file", cwd=tmp_path)
    assert f"output folder {tmp_path}/file cannot be made: there is a file of that name; choose another" in sentence
    sentence = error_of(name, *flags, "--output", "file/folder", cwd=tmp_path)
    assert f"output folder {tmp_path}/file/folder cannot be made: Not a directory; choose another --output" in sentence
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"file", "source.txt"} and (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "function", "what_next"),
    [
        ("tokenize.py", "preprocessing.tokenize_job.tokenize", "goes on with the work items that are not finished"),
        ("train_tokenizer.py", "preprocessing.train_tokenizer_job.train_tokenizer", "counts the text again"),
        ("pretrain.py", "training.launch.pretrain", "goes on from the newest checkpoint, if there is one"),
        ("evaluate.py", "evaluation.evaluate_job.evaluate", "begins again"),
        ("generate.py", "generation.generate_job.generate_texts", "begins again"),
        ("demo.py", "preprocessing.tokenize_job.tokenize", "goes on with what is not done yet"),
    ],
)
def test_interruption(  # noqa: PLR0917  # fixtures, and what parametrize gives
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    function: str,
    what_next: str,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pipeline.{function}", interrupted)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.chdir(tmp_path)  # the demo writes its stories before
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "jobs" / name), run_name="__main__")
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; the same command {what_next}"


def test_import_shards(tiny_data: Path, tmp_path: Path) -> None:
    assert "--train is missing; name the files of tokens" in error_of("import_shards.py", cwd=tmp_path)
    flags = ["--train", str(tiny_data / "train_*.bin"), "--val", str(tiny_data / "val_*.bin"), "--output", "out"]
    assert "did you mean 'headerless'?" in error_of("import_shards.py", *flags, "--header_less", cwd=tmp_path)
    assert "no .bin file matches --val" in error_of(
        "import_shards.py", *flags, "--val", "none*.bin", "--tokenizer", str(tiny_data / "tokenizer.json"), cwd=tmp_path
    )
    flags += ["--tokenizer", str(tiny_data / "tokenizer.json")]
    first = job("import_shards.py", *flags, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "import_shards: done\n" in first.stdout and "80,000 train, 1,500 val" in first.stdout
    again = job("import_shards.py", *flags, cwd=tmp_path)
    assert again.stdout == first.stdout.replace("import_shards: done", "import_shards: done before"), again.stderr
    (tmp_path / "out/val_000000.bin").unlink()
    third = job("import_shards.py", *flags, cwd=tmp_path)
    assert "import_shards: done\n" in third.stdout and "it is imported again" in third.stderr


def test_train_tokenizer(tmp_path: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "pipeline").glob("[a-z]*.py"))]
    pq.write_table(pa.table({"text": texts}), tmp_path / "code.parquet")
    flags = ["--source", "code.parquet", "--output", "out", "--vocab-size", "400", "--num_workers", "1"]
    first = job("train_tokenizer.py", *flags, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "train_tokenizer: done\n" in first.stdout and f"{len(texts)} (" in first.stdout
    assert "400 ids: 256 bytes, 143 merges, <|endoftext|>" in first.stdout
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.get_vocab_size() == 400 and theirs.token_to_id("<|endoftext|>") == 399
    assert theirs.decode(theirs.encode(texts[0]).ids) == texts[0]
    again = job("train_tokenizer.py", *flags, cwd=tmp_path)
    assert again.stdout == first.stdout.replace("train_tokenizer: done", "train_tokenizer: done before"), again.stderr


def test_generate(run_folder: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint", str(run_folder), "--prompt", "import os", "--max_new_tokens", "8", "--device", "cpu"]
    first, again = job("generate.py", *flags, cwd=tmp_path), job("generate.py", *flags, cwd=tmp_path)
    other = job("generate.py", *flags, "--seed", "2", "--num_samples", "2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("import os") and len(first.stdout) > len("import os\n")
    assert first.stdout == again.stdout
    assert other.stdout.count("import os") == 2 and other.stdout.count("--- sample") == 2


def test_generate_from_nothing_or_too_long_a_prompt(run_folder: Path, tmp_path: Path) -> None:
    assert "neither a checkpoint nor a run folder" in error_of("generate.py", "--checkpoint", "nowhere", cwd=tmp_path)
    sentence = error_of("generate.py", "--checkpoint", str(run_folder), "--prompt", "x = 1\n" * 99, cwd=tmp_path)
    assert "the model sees 32" in sentence


def test_evaluate(run_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = job("evaluate.py", "--checkpoint", str(run_folder), "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"on {len(open_split(tiny_data, 'val')) - 1:,} tokens" in result.stdout
    assert "perplexity" in result.stdout


def test_a_checkpoint_whose_file_is_cut(run_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (run_folder / "checkpoints" / "step-000003").iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-7] if file.suffix == ".safetensors" else content)
    assert "has another size than was written" in error_of("generate.py", "--checkpoint", str(broken), cwd=tmp_path)
