"""Every flag of every job has a help text of whole sentences, and --help shows it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

import pytest

from pipeline.config.command_line import SECTIONS, resolve
from pipeline.config.data import DemoConfig, ImportShardsConfig, TokenizeConfig, TrainTokenizerConfig
from pipeline.config.inference import EvaluateConfig, ExportConfig, GenerateConfig, ServeConfig
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import PretrainConfig

CONFIGS: dict[str, type[Any]] = {
    "tokenize": TokenizeConfig,
    "train_tokenizer": TrainTokenizerConfig,
    "import_shards": ImportShardsConfig,
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
    "sweep": SweepConfig,
    "demo": DemoConfig,
}
FLAGS = [
    pytest.param(section, field.name, id=f"{section}-{field.name}")
    for section, config_class in CONFIGS.items()
    for field in dataclasses.fields(config_class)
]
SHORTEST = 20


def words_of(text: str) -> str:
    """The words alone, without line breaks and the frame that --help draws."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def help_texts(config_class: type[Any]) -> dict[str, str]:
    """The string below each field, of the class itself or of the one that it inherits the field from."""
    texts: dict[str, str] = {}
    for each in reversed([base for base in config_class.__mro__ if dataclasses.is_dataclass(base)]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(field.target)] = words_of(ast.literal_eval(below.value))
    return texts


def test_all_jobs_are_here() -> None:
    assert tuple(CONFIGS) == SECTIONS


@pytest.mark.parametrize(("section", "name"), FLAGS)
def test_a_help_text_is_whole_sentences(section: str, name: str) -> None:
    text = help_texts(CONFIGS[section]).get(name, "")
    assert len(text) >= SHORTEST, text
    assert text.endswith(".") and not text.startswith("Of "), text
    assert text[0].isupper(), text


@pytest.mark.parametrize("section", CONFIGS)
def test_the_help_shows_every_text(
    section: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        resolve(CONFIGS[section], section, ["--help"], program="job")
    assert ended.value.code == 0
    shown = words_of(capsys.readouterr().out)
    missing = {name for name, text in help_texts(CONFIGS[section]).items() if text not in shown}
    assert not missing
