"""The loop on one and on several ranks: one curve, exact resume, any number of workers, an outside reference."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.optimizer import warmup_cosine
from model.transformer import Transformer, init_weights
from pipeline.config.training import PretrainConfig
from pipeline.dataset.batches import BatchOrder, permute
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split
from pipeline.distributed.process_group import ProcessGroup, init_distributed
from pipeline.errors import UserError
from pipeline.training.optimizer import build_optimizer
from pipeline.training.run_folder import RunSummary, finished_summary
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.llama_twin import llama_twin
from tests.support.memory_tracker import MemoryTracker
from tests.support.ranks import run_ranks

STEPS = 12
CONFIG = tiny_config(
    d_ff=96,
    tokens_per_step=32 * 12,
    train_steps=STEPS,
    lr=1e-2,
    val_every=6,
    sample_every=6,
    checkpoint_every=5,
)
ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))

Run = Callable[..., dict[str, Any]]


def train_here(config: PretrainConfig, data: Path, output: Path) -> tuple[RunSummary, MemoryTracker]:
    tracker = MemoryTracker()
    trainer = Trainer(config, data=data, output=output, workers=ALONE, tracker=tracker)
    return trainer.run(), tracker


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path) -> Run:
    """Runs trainer_process.py on several ranks; returns start step and losses as exact numbers."""

    def start(
        world_size: int,
        output: str,
        *,
        stop_after: int | None = None,
        kill_after: int | None = None,
        settings_of: PretrainConfig = CONFIG,
        data: Sequence[Path] = (tiny_data,),
    ) -> dict[str, Any]:
        config = dataclasses.asdict(dataclasses.replace(settings_of, output=str(tmp_path / output)))
        history, settings = tmp_path / "history.json", tmp_path / "settings.json"
        ends = {"stop_after": stop_after or kill_after, "is_killed": kill_after is not None}
        settings.write_text(json.dumps({"config": config, "data": [*map(str, data)], "history": str(history), **ends}))
        result = run_ranks("trainer_process.py", settings, world_size=world_size)
        if kill_after is not None:
            assert result.returncode == -signal.SIGKILL, result.stderr
            return {}
        assert result.returncode == 0, result.stderr
        found = json.loads(history.read_text())
        found["windows"] = windows_fed(history, world_size)
        found["losses"] = {int(step): float.fromhex(loss) for step, loss in found["losses"].items()}
        return found

    return start


def windows_fed(history: Path, world_size: int) -> list[list[int]]:
    """What all ranks together were fed, in training order: step by step, rank by rank."""
    by_step: dict[int, list[list[int]]] = {}
    for rank in range(world_size):
        for step, windows in json.loads(Path(f"{history}.{rank}").read_text()):
            by_step.setdefault(step, []).extend(windows)
    return [window for step in sorted(by_step) for window in by_step[step]]


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard file, read without the pipeline."""
    return np.fromfile(path, dtype="<u2", offset=1024)


def checkpoint_tensors(run_folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of every rank's file."""
    folder = run_folder / "checkpoints" / f"step-{step:06d}"
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_the_curve_is_that_of_transformers_llama_with_torch_adamw(tiny_data: Path, tmp_path: Path) -> None:
    _, tracker = train_here(CONFIG, tiny_data, tmp_path)
    ours = [loss for _, loss in tracker.metrics["train/loss"]]

    model_config = CONFIG.model_config(Manifest.load(tiny_data).vocab_size)
    twin = Transformer(model_config)
    init_weights(twin, CONFIG.seed)
    llama = llama_twin(twin)
    matrices = [p for p in llama.parameters() if p.ndim == 2]
    vectors = [p for p in llama.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.lr, betas=(0.9, 0.95), eps=1e-8)
    stream = open_split(tiny_data, "train")
    order = BatchOrder(num_windows=len(stream) // 33, windows_per_step=12, batch_size=12, seed=CONFIG.seed)
    theirs = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(
                step, max_lr=CONFIG.lr, min_lr=CONFIG.lr / 10, warmup_steps=round(STEPS * 0.05), total_steps=STEPS
            )
        windows = np.stack([stream.read(int(w) * 33, 33) for w in order.step_windows(step)]).astype(np.int64)
        tokens = torch.from_numpy(windows)
        loss = llama(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), CONFIG.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    # float32 sums in another order; Adam divides by small second moments in the first steps and so magnifies rounding
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert theirs[-1] < theirs[0] - 0.5, "the run is long enough to tell a wrong update from a right one"


def test_four_ranks_give_the_curve_of_one_and_resume_bit_for_bit(run: Run, tiny_data: Path, tmp_path: Path) -> None:
    _, tracker = train_here(CONFIG, tiny_data, tmp_path / "one")
    clean = run(4, "clean")
    assert list(clean["losses"].values()) == pytest.approx(
        [loss for _, loss in tracker.metrics["train/loss"]], rel=1e-4
    )

    assert run(4, "broken", stop_after=7)["start_step"] == 0
    resumed = run(4, "broken")
    assert resumed["start_step"] == 5
    assert resumed["losses"] == {step: loss for step, loss in clean["losses"].items() if step > 5}
    expected, found = checkpoint_tensors(tmp_path / "clean"), checkpoint_tensors(tmp_path / "broken")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


FASTEST = dataclasses.replace(
    CONFIG,
    qk_norm=True,
    tie_embeddings=False,
    init_std="fan_in",
    embedding_init_std=1.0,
    zero_init_projections=True,
    zero_init_output=True,
    optimizer="muon",
    muon_iterations=12,
    muon_coefficients=(2.0, -1.5, 0.5),
    embedding_lr=0.3,
    output_lr=4e-3,
    vector_lr=2e-2,
    embedding_weight_decay=0.001,
)
"""The settings of configs/fastest.yaml for this small network."""


def test_the_fastest_recipe_on_two_ranks_resumes_bit_for_bit(run: Run, tiny_data: Path, tmp_path: Path) -> None:
    clean = run(2, "clean", settings_of=FASTEST)
    guessing = math.log(Manifest.load(tiny_data).vocab_size)
    assert clean["losses"][1] == pytest.approx(guessing, rel=1e-6), "an output of zeros guesses all ids alike"
    assert clean["losses"][STEPS] < guessing - 0.2
    run(2, "broken", stop_after=7, settings_of=FASTEST)
    resumed = run(2, "broken", settings_of=FASTEST)
    assert resumed["start_step"] == 5
    assert resumed["losses"] == {step: loss for step, loss in clean["losses"].items() if step > 5}
    expected, found = checkpoint_tensors(tmp_path / "clean"), checkpoint_tensors(tmp_path / "broken")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_rates_by_kind() -> None:
    """Every parameter has the rate and the decay of its kind; without such settings, those that all have."""
    config = dataclasses.replace(FASTEST, lr=0.02, weight_decay=0.2)
    model = Transformer(config.model_config(300))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in ("adamw", "muon"):
        groups = build_optimizer(model, dataclasses.replace(config, optimizer=optimizer), ALONE).param_groups
        found = {
            names[id(parameter)]: (0.02 * group["lr_ratio"], group["weight_decay"])
            for group in groups
            for parameter in group["params"]
        }
        assert found.keys() == set(names.values())
        for name, (lr, decay) in found.items():
            expected = {"embedding.weight": (0.3, 0.001), "output.weight": (4e-3, 0.001)}.get(name, (0.02, 0.2))
            if "norm" in name:
                expected = (2e-2, 0.0)
            assert (lr, decay) == pytest.approx(expected), name
    plain = build_optimizer(Transformer(CONFIG.model_config(300)), CONFIG, ALONE)
    assert {group["lr_ratio"] for group in plain.param_groups} == {1.0}


def test_four_then_two_then_three_workers_read_the_same_windows_and_have_the_same_curve(
    run: Run, tiny_data: Path, tmp_path: Path
) -> None:
    _, tracker = train_here(CONFIG, tiny_data, tmp_path / "one")
    four = run(4, "changing", stop_after=5)
    two = run(2, "changing", stop_after=10)
    three = run(3, "changing")  # 12 windows on 3 ranks in micro-batches of 2
    assert [part["start_step"] for part in (four, two, three)] == [0, 5, 10]
    losses = {**four["losses"], **two["losses"], **three["losses"]}
    assert losses == pytest.approx(dict(tracker.metrics["train/loss"]), rel=1e-4)

    stream = np.concatenate([read_shard(tiny_data / f"train_{index:06d}.bin") for index in range(2)])
    size = len(stream) // 33
    order = permute(np.arange(STEPS * 12), size=size, seed=CONFIG.seed, epoch=0)
    expected = [stream[window * 33 : (window + 1) * 33].tolist() for window in order]
    assert four["windows"] + two["windows"] + three["windows"] == expected


def test_everything_is_tracked(tiny_data: Path, tmp_path: Path) -> None:
    summary, tracker = train_here(CONFIG, tiny_data, tmp_path)
    assert [step for step, _ in tracker.metrics["train/loss"]] == list(range(1, STEPS + 1))
    contract = {"train/loss", "train/grad_norm", "train/lr", "val/loss", "val/perplexity", "perf/tokens_per_second"}
    contract |= {"perf/step_seconds", "perf/data_wait_seconds", "tokens_seen"}
    contract |= {"perf/checkpoint_stall_seconds", "val/bits_per_byte"}
    assert tracker.metrics.keys() == contract
    assert [step for step, _ in tracker.metrics["perf/step_seconds"]] == list(range(2, STEPS + 1)), "the first compiles"
    assert [step for step, _ in tracker.metrics["val/loss"]] == [6, 12]
    assert [step for step, _ in tracker.checkpoints] == [5, 10, 12]
    assert [sample[0] for sample in tracker.samples] == [6, 12]
    assert [item.context for item in tracker.inputs] == ["training", "validation", "tokenizer"]
    assert tracker.params["d_ff"] == 96 and tracker.status == "FINISHED"
    assert summary.last_loss < summary.first_loss
    assert summary.val_loss is not None
    assert summary.perplexity == pytest.approx(math.exp(summary.val_loss))
    assert summary.sample.startswith(CONFIG.sample_prompt)


def test_a_finished_run_says_so_and_more_steps_go_on(tiny_data: Path, tmp_path: Path) -> None:
    assert finished_summary(CONFIG, data=tiny_data, output=tmp_path) is None
    plateau = dataclasses.replace(CONFIG, schedule="wsd", decay_fraction=0.0)  # more steps would bend a cosine
    summary, _ = train_here(plateau, tiny_data, tmp_path)
    assert finished_summary(plateau, data=tiny_data, output=tmp_path) == summary
    longer = dataclasses.replace(plateau, train_steps=STEPS + 3)
    assert finished_summary(longer, data=tiny_data, output=tmp_path) is None
    _, tracker = train_here(longer, tiny_data, tmp_path)
    assert [step for step, _ in tracker.metrics["train/loss"]] == [13, 14, 15]


def test_training_starts_from_the_weights_of_another_run(tiny_data: Path, tmp_path: Path) -> None:
    first, _ = train_here(CONFIG, tiny_data, tmp_path / "a")
    second = dataclasses.replace(CONFIG, checkpoint=first.checkpoint, lr=1e-9)
    summary, _ = train_here(second, tiny_data, tmp_path / "b")
    assert summary.val_loss == pytest.approx(first.val_loss, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"d_ff": 64}, "d_ff 96, but this run asks for 64"),
        ({"seed": 2}, "seed 1337, now it is 2"),
        ({"tokens_per_step": 32 * 8}, "tokens_per_step 384, now it is 256"),
    ],
)
def test_a_resume_that_would_not_be_the_same_run_is_an_error(
    tiny_data: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    train_here(dataclasses.replace(CONFIG, train_steps=1), tiny_data, tmp_path)
    changed = dataclasses.replace(CONFIG, **change)
    with pytest.raises(UserError, match=sentence):
        finished_summary(changed, data=tiny_data, output=tmp_path)
    with pytest.raises(UserError, match=sentence):
        train_here(changed, tiny_data, tmp_path)


def test_shards_of_another_tokenizer_are_an_error(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in tiny_data.iterdir():
        if file.is_file():
            (data / file.name).write_bytes(file.read_bytes())
    manifest = dataclasses.replace(Manifest.load(tiny_data), tokenizer_fingerprint="0" * 64)
    manifest.save(data)
    with pytest.raises(UserError, match="made with another tokenizer"):
        finished_summary(CONFIG, data=data, output=tmp_path / "run")


def test_weights_that_are_spoilt_stop_the_run_and_keep_the_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, data=tiny_data, output=tmp_path, workers=ALONE, tracker=MemoryTracker())
    for step in range(5):
        trainer.advance(step)
    with torch.no_grad():
        trainer.model.norm.weight.fill_(math.nan)
    place = r"the loss of rank 0 on window \d+ \(train_00000\d\.bin, token [\d,]+: "
    with pytest.raises(UserError, match="the loss of step 6 is nan and its gradient norm nan") as caught:
        trainer.advance(5)
    assert len(re.findall(place, str(caught.value))) == 6, "every micro-batch"
    trainer.writer.wait()
    assert (tmp_path / "checkpoints" / "step-000005" / "checkpoint.json").is_file()


def test_a_gpu_that_is_not_there_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="torch sees no GPU"):
        init_distributed("cuda")
