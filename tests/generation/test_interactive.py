"""jobs/generate.py --interactive: a terminal's prompts and keys, prompts through a pipe, mistakes that end nothing."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jobs.generate
from pipeline.config.command_line import resolve
from pipeline.config.inference import GenerateConfig
from pipeline.errors import UserError
from pipeline.generation.generate_job import Generator, generate_texts
from tests.support.models import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("run"))


def config_of(checkpoint: Path, **settings: Any) -> GenerateConfig:
    return GenerateConfig(checkpoint=str(checkpoint), device="cpu", max_new_tokens=20, **settings)


def text_of(config: GenerateConfig) -> str:
    """Prompt and text, as the job prints them for one prompt."""
    return config.prompt + "".join(chunk.text for chunk in generate_texts(config))


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, str(ROOT / "jobs/generate.py"), *flags]
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background of a script ignores it
            os.execv(command[0], command)

    def exit_code(self) -> int:
        """Wait for the end."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def read_until(self, words: str) -> str:
        """What was written since the last call, up to and with these words."""
        said, end = b"", time.monotonic() + 300
        while words.encode() not in said.replace(b"\r\n", b"\n"):
            assert select.select([self._end], [], [], end - time.monotonic())[0], said
            try:
                said += os.read(self._end, 1)  # no more than that: the rest is for the next call
            except OSError:  # the other side is closed
                raise AssertionError(f"it ended before {words!r}: {said!r}") from None
        return said.decode(errors="replace").replace("\r\n", "\n")


def test_keys_of_a_terminal(checkpoint: Path) -> None:
    """Ctrl-C stops a text that would go on, the next prompt is answered as if nothing had been; Ctrl-D ends with 0."""
    terminal = Terminal(
        *("--interactive", "--checkpoint", str(checkpoint), "--device", "cpu"),
        *("--max_new_tokens", "1000000", "--temperature", "0"),
    )
    try:
        assert "Ctrl-D ends" in terminal.read_until("> ")
        terminal.send("import os\n")
        terminal.read_until("import os\n")  # the echo
        terminal.read_until("import os")  # the prompt, in front of its text
        terminal.send("\x03")
        assert "Traceback" not in terminal.read_until("> ")
        terminal.send("\x03")
        assert "Traceback" not in terminal.read_until("> ")
        terminal.send("\x04")
        assert terminal.exit_code() == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise


def test_prompts_through_a_pipe(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text for each line, each with the seed after the one before; no question stands among them."""
    config = config_of(checkpoint, interactive=True, seed=5)
    monkeypatch.setattr("sys.stdin", io.StringIO("import os\nclass A:\\n    x\nimport os"))
    jobs.generate.interact(Generator(config), config)
    prompts = ["import os", "class A:\n    x", "import os"]
    texts = [text_of(config_of(checkpoint, prompt=prompt, seed=5 + turn)) for turn, prompt in enumerate(prompts)]
    assert texts[0] != texts[2], "the same prompt gets another text"
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in texts)


def test_a_stopped_text_and_a_prompt_that_is_too_long_end_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Chunk:
        text_number, prompt, text = 0, "a", "b"

    class Scripted:
        def __init__(self) -> None:
            self.asked: list[tuple[str, int]] = []

        def texts(self, prompts: list[str], *, seed: int) -> Iterator[Any]:
            self.asked.append((prompts[0], seed))
            if prompts[0] == "long":
                raise UserError("the prompt has 9 tokens, the model sees 8; shorten it")
            yield Chunk()
            if prompts[0] == "stop":
                raise KeyboardInterrupt

    generator = Scripted()
    monkeypatch.setattr("sys.stdin", io.StringIO("stop\nlong\nrest\n"))
    jobs.generate.interact(generator, GenerateConfig(seed=7, interactive=True))
    assert generator.asked == [("stop", 7), ("long", 8), ("rest", 9)]
    assert capsys.readouterr().out == "ab\nthe prompt has 9 tokens, the model sees 8; shorten it\nab\n"


@pytest.mark.parametrize("flags", [["--output", "texts.jsonl"], ["--prompts", "prompts.txt"]])
def test_files_and_a_terminal_contradict_each_other(flags: list[str]) -> None:
    with pytest.raises(UserError, match="takes prompts from the terminal"):
        resolve(GenerateConfig, "generate", ["--interactive", *flags], program="job")
