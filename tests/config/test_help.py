"""--help of every job: groups, a placeholder and whole sentences for each flag, what stands for no value, examples."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections.abc import Callable
from typing import Any, Literal

import pytest

from pipeline.config.command_line import SECTIONS, resolve, resolve_with_rest
from pipeline.config.data import DemoConfig, ImportShardsConfig, TokenizeConfig, TrainTokenizerConfig
from pipeline.config.finetuning import FinetuneConfig
from pipeline.config.help import format_help, group_names, help_texts, placeholder
from pipeline.config.help_groups import EXAMPLES, POSITIONALS
from pipeline.config.inference import EvaluateConfig, ExportConfig, GenerateConfig, ServeConfig
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError

CONFIGS: dict[str, type[Any]] = {
    "tokenize": TokenizeConfig,
    "train_tokenizer": TrainTokenizerConfig,
    "import_shards": ImportShardsConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
    "sweep": SweepConfig,
    "demo": DemoConfig,
}
FLAGS = [
    pytest.param(section, field, id=f"{section}-{field.name}")
    for section, config_class in CONFIGS.items()
    for field in dataclasses.fields(config_class)
]
SHORTEST = 20
EXAMPLE_LINES = [(section, line) for section, lines in EXAMPLES.items() for line in lines]


def words_of(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(name="page")
def _page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What --help of a job prints on a terminal of so many columns."""

    def page(section: str, columns: int = 1000) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            resolve(CONFIGS[section], section, ["--help"], program=f"jobs/{section}.py")
        assert ended.value.code == 0
        return capsys.readouterr().out

    return page


def test_all_jobs_are_here() -> None:
    assert tuple(CONFIGS) == SECTIONS


@pytest.mark.parametrize(("section", "field"), FLAGS)
def test_a_help_text_is_whole_sentences(section: str, field: dataclasses.Field[Any]) -> None:
    text = help_texts(CONFIGS[section]).get(field.name, "")
    assert len(text) >= SHORTEST, text
    assert text.endswith(".") and not text.startswith("Of "), text
    assert text[0].isupper(), text


@pytest.mark.parametrize(("section", "field"), FLAGS)
def test_a_flag_without_a_value_says_what_holds_then(section: str, field: dataclasses.Field[Any]) -> None:
    if field.default in (None, (), ""):
        text = help_texts(CONFIGS[section])[field.name]
        assert re.search(r"not given|[Ii]f neither|must be given|Optional|in place of|has as many", text), text


@pytest.mark.parametrize("section", CONFIGS)
def test_the_page_has_every_text_default_and_group(section: str, page: Callable[..., str]) -> None:
    shown, texts = words_of(page(section)), help_texts(CONFIGS[section])
    for field in dataclasses.fields(CONFIGS[section]):
        assert texts[field.name] in shown, field.name
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"{texts[field.name]} (default: {field.default})" in shown
    names = [field.name for field in dataclasses.fields(CONFIGS[section])]
    groups = group_names(section, names)
    assert sorted(itertools.chain(*groups.values())) == sorted(names)
    assert "other" not in groups, f"help_groups.py has no group for {groups['other']}"
    for title in groups:
        assert f" {title}: --" in shown or f" {title}: -h" in shown


@pytest.mark.parametrize("section", CONFIGS)
def test_the_page_shows_preset_positional_and_examples(section: str, page: Callable[..., str]) -> None:
    shown = page(section)
    assert f"usage: python jobs/{section}.py" in shown
    assert "--config FILE" in shown and f"its section {section} is read" in shown
    assert "None" not in shown and "SUPPRESS" not in shown and "{}" not in shown
    if section in POSITIONALS:
        assert f"[{POSITIONALS[section].upper()}]" in shown
    end = shown[shown.index("\nexamples:\n") :]
    assert len(end.splitlines()) == 2 + len(EXAMPLES[section])


@pytest.mark.parametrize("columns", [60, 80, 130])
@pytest.mark.parametrize("section", CONFIGS)
def test_lines_break_at_the_edge_of_the_terminal_only(section: str, columns: int, page: Callable[..., str]) -> None:
    """No text has the line breaks of its source: each line but a paragraph's last could not have taken another word."""
    options = page(section, columns).partition("\n\n")[2].partition("examples:")[0]
    for line, following in itertools.pairwise(options.splitlines()):
        assert len(line) <= columns
        if re.match(r" {20,}\S", line) and re.match(r" {20,}\S", following):
            assert len(line) + 1 + len(following.split()[0]) > columns - 2, (line, following)


@pytest.mark.parametrize(("section", "line"), EXAMPLE_LINES)
def test_the_examples_are_taken_by_the_real_parser(section: str, line: str) -> None:
    if section == "sweep":
        resolve_with_rest(SweepConfig, section, shlex.split(line), rest=(PretrainConfig, "pretrain"), program="job")
    else:
        resolve(CONFIGS[section], section, shlex.split(line), program="job")


def test_what_may_come_first_is_its_flag() -> None:
    for section, name in POSITIONALS.items():
        config = resolve(CONFIGS[section], section, ["runs/mine", "--dry_run"], program="job")
        assert getattr(config, name) == "runs/mine" and config.dry_run
    with pytest.raises(UserError, match="unknown argument runs/mine"):
        resolve(PretrainConfig, "pretrain", ["runs/mine"], program="job")


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        (int | None, "INT"),
        (float, "FLOAT"),
        (str | None, "TEXT"),
        (Literal["a", "b"], "{a,b}"),
        (int | Literal["auto"] | None, "INT|auto"),
        (float | Literal["fan_in"], "FLOAT|fan_in"),
        (int | str, "INT|INT:INT"),
        (tuple[str, ...], "TEXT [TEXT ...]"),
        (tuple[float, float], "FLOAT FLOAT"),
    ],
)
def test_placeholders(hint: Any, shown: str) -> None:
    assert placeholder(hint) == shown


def test_a_new_field_is_shown_though_no_group_has_it() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(ServeConfig):
        """A job with one more setting."""

    assert group_names("serve", ["port", "brand_new"]) == {"server": ["port"], "other": ["brand_new"]}
    assert "--port INT" in format_help(ServeConfig, "serve", "jobs/serve.py")
