"""``transformers chat``, the command-line tool, with ``transformers serve`` behind it, on an exported model that chats.

The server needs transformers[serving], above all accelerate, which nothing here needs: GPT25_TRANSFORMERS_PYTHON names
a Python that has them.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.inference import ExportConfig, GenerateConfig
from pipeline.generation.generate_job import Generator
from pipeline.pretrained.export_job import export
from tests.support.conversations import Messages
from tests.support.models import train, train_chat

TURNS = ["the fox", "and then", "what <|im_end|> said"]
COMMAND = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


@pytest.fixture
def folder(tiny_data: Path, tmp_path: Path) -> Path:
    (tmp_path / "chat").mkdir()
    checkpoint = train_chat(train(tiny_data, tmp_path / "base", train_steps=5, val_every=0), tmp_path / "chat")
    export(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "export")))
    return tmp_path / "export"


def transformers_command(*arguments: str) -> list[str]:
    return [os.environ.get("GPT25_TRANSFORMERS_PYTHON", sys.executable), "-c", COMMAND, *arguments]


@contextlib.contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of ``transformers serve``, which is ended behind the block."""
    command = transformers_command("serve", str(folder), "--port", "0", "--device", "cpu")
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=offline, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = ""
            for line in server.stderr:
                said += line
                if address := re.search(r"running on (http://localhost:\d+)", line):
                    yield f"{address[1]}/v1"
                    return
            raise AssertionError(said)
        finally:
            server.kill()


@pytest.mark.slow
def test_a_chat_has_our_answers(folder: Path, tmp_path: Path) -> None:
    python = transformers_command()[0]
    needed = "import accelerate, fastapi, rich, transformers, uvicorn"
    if subprocess.run([python, "-c", needed], capture_output=True, check=False).returncode:
        pytest.skip("needs transformers[serving]: name a Python that has it in GPT25_TRANSFORMERS_PYTHON")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "COLUMNS": "300", "NO_COLOR": "1"}
    with serving(folder, environment) as address:
        done = subprocess.run(
            transformers_command("chat", str(folder), address, "max_new_tokens=60", "do_sample=False"),
            input="".join(f"{turn}\n" for turn in [*TURNS, "!exit"]),
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=1500,
        )
    assert done.returncode == 0, done.stderr
    answers = re.findall(rf"<{re.escape(str(folder))}>:\n(.*?)\s*\n\d+ tokens in", done.stdout, re.DOTALL)
    config = GenerateConfig(checkpoint=str(folder), chat=True, max_new_tokens=60, temperature=0, device="cpu")
    generator, messages = Generator(config), Messages()
    for turn, answer in zip(TURNS, answers, strict=True):
        messages.append({"role": "user", "content": turn})
        chunks = list(generator.answer(messages, seed=1))
        assert chunks[-1].finish_reason == "stop" and answer == "".join(chunk.text for chunk in chunks)
        messages.append({"role": "assistant", "content": answer})
