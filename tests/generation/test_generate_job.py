"""Prompts in, texts out: in order, however many are decoded at a time; files of prompts; mistakes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.inference import ExportConfig, GenerateConfig
from pipeline.errors import UserError
from pipeline.generation.generate_job import generate_texts, read_prompts, write_texts
from pipeline.pretrained.export_job import export
from tests.support.models import train

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["import os", "", "class A:\n    def __init__(self, name: str) -> None:", "x"]


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "id": 1}) for prompt in PROMPTS) + "\n\n")
    return path


def texts(config: GenerateConfig) -> list[str]:
    groups = itertools.groupby(generate_texts(config), key=lambda chunk: chunk.text_number)
    found = [(number, "".join(chunk.text for chunk in chunks)) for number, chunks in groups]
    assert [number for number, _ in found] == list(range(len(found))), "one text after another"
    return [text for _, text in found]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_what_each_gives_alone(checkpoint: Path, prompts_file: Path, temperature: float) -> None:
    settings = {"checkpoint": str(checkpoint), "device": "cpu", "max_new_tokens": 40, "temperature": temperature}
    settings |= {"num_samples": 2, "seed": 5}
    together = texts(GenerateConfig(**settings, prompts=str(prompts_file), batch_size=5))  # type: ignore[arg-type]
    alone = [texts(GenerateConfig(**settings, prompt=prompt, batch_size=1)) for prompt in PROMPTS]  # type: ignore[arg-type]
    assert together == list(itertools.chain(*alone))
    assert temperature == 0.0 or alone[0][0] != alone[0][1], "samples differ"


def test_every_way_to_name_the_model_gives_the_same(checkpoint: Path, tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "folder")))
    names = (checkpoint, checkpoint.parents[1], tmp_path / "folder")
    found = {texts(GenerateConfig(checkpoint=str(name), device="cpu", max_new_tokens=20))[0] for name in names}
    assert len(found) == 1


def test_the_command(checkpoint: Path, prompts_file: Path, tmp_path: Path) -> None:
    def run(*flags: str) -> str:
        command = [sys.executable, str(ROOT / "jobs/generate.py"), "--checkpoint", str(checkpoint), "--device", "cpu"]
        environment = {name: value for name, value in os.environ.items() if name != "GPT25_HOME"}
        result = subprocess.run(
            [*command, "--max_new_tokens", "10", *flags],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    shown = run("--prompts", str(prompts_file), "--num_samples", "2")
    assert shown.count("--- prompt") == 8 and "--- prompt 3, sample 2 of 2" in shown
    assert "generate: 4 texts" in run("--prompts", str(prompts_file), "--output", "out/texts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out/texts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert all(line["tokens"] == 10 or line["finish_reason"] == "stop" for line in lines)
    assert f"--- prompt 1, sample 1 of 2\n{lines[0]['prompt']}{lines[0]['text']}" in shown


def test_files_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT25_HOME", str(tmp_path))
    (tmp_path / "lines.txt").write_text("one\n\n  two\nthree")
    assert read_prompts("lines.txt") == ["one", "  two", "three"]
    odd = "The old\u2028man\u0085and\u2029the\x0csea"
    (tmp_path / "odd.jsonl").write_text(
        f"\ufeff{json.dumps({'prompt': odd}, ensure_ascii=False)}\r\n", encoding="utf-8"
    )
    assert read_prompts("odd.jsonl") == [odd]
    (tmp_path / "odd.txt").write_text(f"\ufeff{odd}\r\nnext\r\n", encoding="utf-8", newline="")
    assert read_prompts("odd.txt") == [odd, "next"]
    for content, words in (
        ('{"prompt": "x"}\n{"text": "y"}', 'line 2 has no text under "prompt"'),
        ('{"prompt": 5}', "line 1 has no text"),
        ("{", "line 1 is not valid JSON"),
        ("", "has no prompt"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match=words):
            read_prompts("bad.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts("absent.txt")


def test_lines_of_texts_are_lines_for_every_reader(checkpoint: Path, tmp_path: Path) -> None:
    prompt = "a\u2028b\u2029c\u0085d\x1ce\ud800"
    config = GenerateConfig(
        checkpoint=str(checkpoint), prompt=prompt, output=str(tmp_path / "out.jsonl"), max_new_tokens=2, num_samples=2
    )
    write_texts(config)
    content = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert len(content.splitlines()) == 2
    assert [json.loads(line)["prompt"] for line in content.splitlines()] == [prompt.replace("\ud800", "?")] * 2


@pytest.mark.parametrize("name", ["folder", "folder/", "new/", "folder/.."])
def test_an_output_that_is_a_folder_is_found_before_any_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    config = GenerateConfig(checkpoint=str(tmp_path / "absent"), output=f"{tmp_path}/{name}")
    with pytest.raises(UserError, match="is a folder; give the name of a file, such as"):
        write_texts(config)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_prompt_longer_than_the_context(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="the model sees 128; shorten it"):
        texts(GenerateConfig(checkpoint=str(checkpoint), prompt="x = 1\n" * 99))
