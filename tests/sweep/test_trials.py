"""The plan of a sweep: which trials a command makes, the same ones every time, and one sentence for every mistake."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.config.command_line import resolve_with_rest
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from pipeline.sweep.trials import Trial, plan_trials

ROOT = Path(__file__).resolve().parents[2]
SHARED = ["--num_workers", "1", "--train_steps", "100"]


def plan(*flags: str) -> list[Trial]:
    """The trials of a command, as jobs/sweep.py plans them."""
    config, shared = resolve_with_rest(
        SweepConfig, "sweep", [*SHARED, *flags], rest=(PretrainConfig, "pretrain"), program="jobs/sweep.py"
    )
    return plan_trials(config, shared)


def test_a_grid_has_every_combination_in_the_order_of_the_flags() -> None:
    trials = plan("--vary", "lr=1e-3,2e-3", "d_model=384,768", "--output", "/sweeps/one")
    assert [(trial.config.lr, trial.config.d_model) for trial in trials] == [
        (1e-3, 384),
        (1e-3, 768),
        (2e-3, 384),
        (2e-3, 768),
    ]
    assert [trial.name for trial in trials] == ["trial-000", "trial-001", "trial-002", "trial-003"]
    assert trials[1].varied == {"lr": "1e-3", "d_model": "768"}
    assert trials[3].config.output == "/sweeps/one/trial-003"
    assert {trial.config.train_steps for trial in trials} == {100}
    assert {trial.config.registered_model for trial in trials} == {"none"}


def test_a_preset_gives_what_all_trials_share_but_not_the_folder(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("pretrain: {output: runs/x, d_model: 384, num_workers: 2}\nsweep: {vary: ['lr=1e-3']}\n")
    (trial,) = plan("--config", str(preset), "--output", "/sweeps/one", "--registered_model", "mine")
    assert trial.config.d_model == 384 and trial.config.output == "/sweeps/one/trial-000"
    assert trial.config.num_workers == 1, "a flag overrides the preset"
    assert trial.config.registered_model == "mine"


def test_values_of_every_kind() -> None:
    values = ["tie_embeddings=true,false", "optimizer=adamw,muon", "warmup_steps=None,10"]
    trials = plan("--vary", *values, "--train-steps=2e2")
    assert [trial.config.tie_embeddings for trial in trials] == [True] * 4 + [False] * 4
    assert [trial.config.optimizer for trial in trials] == ["adamw", "adamw", "muon", "muon"] * 2
    assert [trial.config.warmup_steps for trial in trials[:2]] == [None, 10]
    assert {trial.config.train_steps for trial in trials} == {200}


def test_a_random_search_is_a_function_of_its_seed() -> None:
    flags = ["--search", "random", "--num_trials", "40"]
    flags += ["--vary", "lr=1e-4..1e-2:log", "beta2=0.9..0.99", "num_layers=2..5", "grad_clip=0.5,1"]
    trials = plan(*flags)
    assert [trial.varied for trial in trials] == [trial.varied for trial in plan(*flags)]
    assert trials != plan(*flags, "--search_seed", "2")
    configs = [trial.config for trial in trials]
    assert all(1e-4 <= c.lr <= 1e-2 and 0.9 <= c.beta2 <= 0.99 for c in configs)
    assert {c.num_layers for c in configs} == {2, 3, 4, 5} and {c.grad_clip for c in configs} == {0.5, 1.0}
    # log-uniform: half below the geometric mean, where an even draw would have a tenth (4 of 40)
    assert 10 <= sum(math.log10(c.lr) < -3 for c in configs) <= 30
    assert [trial.varied for trial in plan(*flags, "--num_trials", "45")][:40] == [trial.varied for trial in trials]


def test_random_trials_differ() -> None:
    trials = plan("--search", "random", "--num_trials", "4", "--vary", "lr=1e-3,2e-3", "beta2=0.9,0.95")
    assert len({tuple(trial.varied.items()) for trial in trials}) == 4
    with pytest.raises(UserError, match="fewer than num_trials 5; lower it, or take --search grid"):
        plan("--search", "random", "--num_trials", "5", "--vary", "lr=1e-3,2e-3", "beta2=0.9,0.95")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "--vary is missing"),
        (["--vary", "lr"], "--vary lr has no values"),
        (["--vary", "rl=1,2"], "has no setting rl"),
        (["--vary", "output=a,b"], "output is the same for all trials"),
        (["--vary", "lr=1,2", "lr=3"], "names lr twice"),
        (["--vary", "lr=1e-3,1e-3"], "names a value twice"),
        (["--vary", "lr=1e-4..1e-2"], "a grid has no ranges"),
        (["--vary", "lr=2..1", "--search", "random", "--num_trials", "2"], "the lower bound comes first"),
        (["--vary", "lr=0..1:log", "--search", "random", "--num_trials", "2"], "are positive"),
        (["--vary", "lr=1", "--search", "random"], "--num_trials is missing"),
        (["--vary", "lr=1,2", "--num_trials", "2"], "a grid has as many trials as"),
        (["--vary", "lr=1,fast"], r"trial-001 \(lr fast\): .*lr"),
        (["--vary", "d_model=768,770"], r"trial-001 \(d_model 770\): .*num_heads"),
        (["--vary", "lr=1", "--traim_steps", "2"], "did you mean 'train_steps'"),
        (["--vary", "lr=1", "--trials_at_onse", "2"], "did you mean 'trials_at_once'"),
        (["--vary", "lr=1", "--reduction_factor", "1"], "reduction_factor is 1; it must be greater than 1"),
    ],
)
def test_mistakes_are_one_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plan(*flags)
