"""--data and --phase: what is written, what it means, and one sentence for what means nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.command_line import resolve, resolve_with_rest
from pipeline.config.mixtures import Mixture, read_mixture, with_folders
from pipeline.config.run_plan import describe_run, opening
from pipeline.config.settings import to_dict
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.sweep.trials import plan_trials

SMALL = ["--train_steps", "100", "--tokens_per_step", "1024", "--context_length", "128", "--num_workers", "1"]
TWO = Mixture(folders=("data/web", "data/books"), phases=((0, (7, 3)), (60, (1, 4))))  # type: ignore[arg-type]


def resolved(*flags: str) -> PretrainConfig:
    return resolve(PretrainConfig, "pretrain", [*SMALL, *flags], program="jobs/pretrain.py")


def preset(path: Path, **values: Any) -> list[str]:
    path.write_text(yaml.safe_dump({"pretrain": values}, sort_keys=False))
    return ["--config", str(path)]


@pytest.mark.parametrize("folder", ["data/one", "s3://bucket/one", "data/a:0.7", "a b", "hf:1"])
def test_one_folder_is_what_it_is(folder: str) -> None:
    config = resolved("--data", folder)
    assert config.data == folder and config.mixture.folders == (folder,) and config.mixture.phases == ((0, (1,)),)


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "data/web:0.7", "--data", "data/books:0.3", "--phase", "60", "data/web:0.2", "data/books:0.8"],
        ["--data=data/web:7", "--data=data/books:3", "--phase=60", "data/web:1", "data/books:4e0"],
        ["--data", "data/web/:.7", "./data/books:0.30", "--phase", "60", "data/books:40", "data/web:10.0"],
        ["--data", "data/none:1", "--num_workers", "1", "--data", "data/none:2"],
    ],
)
def test_flags(flags: list[str]) -> None:
    if "data/none:1" in flags:
        with pytest.raises(UserError, match="data names the folder data/none twice; give it once"):
            resolved(*flags)
    else:
        assert resolved(*flags).mixture == TWO


@pytest.mark.parametrize(
    "values",
    [
        {"data": {"data/web": 0.7, "data/books": 0.3}, "phase": {60: {"data/web": 0.2, "data/books": 0.8}}},
        {"data": ["data/web:0.7", "data/books:0.3"], "phase": [60, "data/web:0.2", "data/books:0.8"]},
        {"data": [{"data/web": 0.7}, {"data/books": 0.3}], "phase": [{60: ["data/web:0.2", "data/books:0.8"]}]},
    ],
)
def test_presets(tmp_path: Path, values: dict[str, Any]) -> None:
    flags = preset(tmp_path / "preset.yaml", **values)
    assert resolved(*flags).mixture == TWO
    assert resolved(*flags, "--data", "data/one", "--phase").mixture.folders == ("data/one",), "flags take its place"
    written = yaml.safe_load(yaml.safe_dump(to_dict(resolved(*flags))))  # what --dry_run prints
    assert resolved(*preset(tmp_path / "again.yaml", data=written["data"], phase=written["phase"])).mixture == TWO


def test_a_colon_divides_only_before_a_number_and_a_folder_may_come_later() -> None:
    config = resolved(
        "--data", "s3://b:9/web:2", "--data", "gs://x/y:z:1", "--phase", "50", "new:1", "--phase", "60", "x:1"
    )
    assert config.mixture.folders == ("s3://b:9/web", "gs://x/y:z", "new", "x")
    assert config.mixture.phases == ((0, (2, 1, 0, 0)), (50, (0, 0, 1, 0)), (60, (0, 0, 0, 1)))
    assert config.mixture.names == ("web", "y-z", "new", "x")
    assert config.mixture.shares(100) == pytest.approx((1 / 3, 1 / 6, 0.1, 0.4))
    alone = resolved("--data", "data/one", "--phase", "10", "data/one:1", "data/two:1").mixture
    assert alone.phases == ((0, (1, 0)), (10, (1, 1))) and alone.weights == (1.0, 0.0)
    assert resolved("--data", "data/one", "--phase", "10", "data/one:2").mixture == read_mixture("data/one", ())


WRONG = {
    "--data a:0.5 --data b": "data names 2 folders, and b has no weight; give each as FOLDER:WEIGHT",
    "--data a:0.5 --data b:0": "data gives b the weight 0; it must be positive",
    "--data a:0.5 --data b:-1": "data gives b the weight -1; it must be positive",
    "--data a:nan --data b:1": "data names 2 folders, and a:nan has no weight",
    "--data a:1 --data ./a/:2": "data names the folder a twice; give it once, with one weight",
    "--data": "data names no folder",
    "--data=": "data is empty; give a value, or leave it out",
    "--data= --data b:1": "data names the folder ''; give the name of one",
    "--data x/web:1 --data y/web:1": "data folders x/web and y/web would both be called web in the metrics",
    "--data a:0.123456 --data b:0.876544": "round them, for instance to a:0.1235 b:0.8765",
    "--data a:1 --phase b:1": "phase begins with b:1; first comes the number of steps after which it begins",
    "--data a:1 --phase 50": "phase 50 names no folder",
    "--data a:1 --phase 0 b:1": "phase 0 does not begin after the first step",
    "--data a:1 --phase 50 b:1 --phase 50 a:1": "phase 50 does not begin after phase 50",
    "--data a:1 --phase 50 a:1 b": "phase 50 names 2 folders, and b has no weight",
    "--data a:1 --phase 100 b:1": "phase 100 begins after the last step, train_steps 100",
}


@pytest.mark.parametrize("flags", WRONG)
def test_what_means_nothing_is_one_sentence(flags: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(*flags.split())
    assert WRONG[flags] in str(caught.value) and "\n" not in str(caught.value)


def test_rounded_weights_are_taken() -> None:
    with pytest.raises(UserError) as caught:
        read_mixture(("a:123457", "b:98765432", "c:1"), ())
    proposed = str(caught.value).split("for instance to ")[1].split()
    assert read_mixture(proposed, ()).folders == ("a", "b", "c")


def test_folders_are_changed_and_weights_kept() -> None:
    changed = with_folders(("a:0.7", "s3://b/c:3e-1"), ("60", "a:1", "d:2"), lambda folder: f"/home/{folder}")
    assert changed == (("/home/a:0.7", "/home/s3://b/c:3e-1"), ("60", "/home/a:1", "/home/d:2"))
    assert with_folders("a:0.7", (), str.upper) == ("A:0.7", ())


def test_a_sweep_gives_every_trial_the_mixture(tmp_path: Path) -> None:
    flags = preset(tmp_path / "preset.yaml", data="data/one", train_steps=100)
    arguments = [*flags, "--output", "s", "--vary", "seed=1,2", "--data", "data/web:0.7", "--data", "data/books:0.3"]
    arguments += ["--phase", "60", "data/web:1", "data/books:4"]
    config, rest = resolve_with_rest(
        SweepConfig, "sweep", arguments, rest=(PretrainConfig, "pretrain"), program="jobs/sweep.py"
    )
    assert [trial.config.mixture for trial in plan_trials(config, rest)] == [TWO, TWO]


def test_passes_are_counted_for_each_folder() -> None:
    """800 windows: web has 42 + 8 % of them, books 18 + 32 %; books holds 16 windows of 129 tokens."""
    flags = ["--data", "data/web:7", "--data", "data/books:3", "--phase", "60", "data/web:1", "data/books:4"]
    config = resolved(*flags)
    sizes = [129 * 1000, 129 * 16 + 5]
    web = "data/web with 0.5 of the tokens, 0.40 passes over its 129,000"
    books = "data/books with 0.5 of the tokens, 25.00 passes over its 2,069"
    line, warning = opening(config, vocab_size=300, train_tokens=sizes)
    assert line.endswith(f" 102,400 tokens, mixed of {web}; {books}")
    assert warning is not None and warning.startswith("the mixture reads data/books 25 times; beyond some 16 passes")
    rows = describe_run(config, vocab_size=300, train_tokens=sizes)
    first = [name for name, _ in rows].index("data")
    assert rows[first : first + 3] == [("data", web), ("", books), ("", warning)]
    assert opening(config, vocab_size=300, train_tokens=[129 * 1000, 129 * 1000])[1] is None
