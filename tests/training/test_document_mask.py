"""--document_mask: a run in which no token sees another document, from its first loss to its evaluation.

On several ranks, killed and resumed: test_packing.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from model.transformer import Transformer, init_weights
from pipeline.checkpoints.reader import read_description
from pipeline.config.inference import EvaluateConfig
from pipeline.dataset.batches import BatchOrder
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_split
from pipeline.evaluation import evaluate_job
from pipeline.pretrained.weights import load_weights
from pipeline.storage.folders import open_folder
from pipeline.training.run_folder import changed_settings
from tests.support.llama_twin import llama_twin
from tests.support.sources import make_documents
from tests.training.test_trainer import CONFIG, train_here

MASKED = dataclasses.replace(CONFIG, document_mask=True, val_tokens=1000)
LENGTH = CONFIG.context_length


@pytest.fixture(scope="module")
def short_documents(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most documents are shorter than a window of 33 tokens."""
    lengths = np.random.default_rng(5).integers(2, 40, 500).tolist()
    shards = {"train_000000.bin": lengths[:200], "train_000001.bin": lengths[200:400], "val_000000.bin": lengths[400:]}
    return make_documents(tmp_path_factory.mktemp("short") / "data", tiny_data, shards)


def losses_alone(llama: LlamaForCausalLM | Qwen3ForCausalLM, windows: np.ndarray, eot_id: int) -> list[torch.Tensor]:
    """The loss of every target of windows (B, T + 1), each computed from its own document alone."""
    found: list[torch.Tensor] = []
    for window in torch.from_numpy(windows.astype(np.int64)):
        begins = [0, *(place for place in range(1, len(window) - 1) if window[place] == eot_id), len(window) - 1]
        for start, stop in itertools.pairwise(begins):
            with torch.no_grad():
                logits = llama(window[None, start:stop]).logits[0].double()
            found += F.cross_entropy(logits, window[start + 1 : stop + 1], reduction="none")
    return found


def test_the_first_loss_and_the_val_loss_are_those_of_each_document_alone(
    short_documents: Path, tmp_path: Path
) -> None:
    summary, tracker = train_here(MASKED, short_documents, tmp_path / "masked")
    _, plain = train_here(dataclasses.replace(MASKED, document_mask=False), short_documents, tmp_path / "plain")
    manifest = Manifest.load(short_documents)
    model = Transformer(MASKED.model_config(manifest.vocab_size))
    init_weights(model, MASKED.seed)
    stream = open_split(short_documents, "train")
    order = BatchOrder(num_windows=len(stream) // (LENGTH + 1), windows_per_step=12, batch_size=12, seed=MASKED.seed)
    windows = np.stack([stream.read(int(w) * (LENGTH + 1), LENGTH + 1) for w in order.step_windows(0)])
    assert (windows[:, 1:-1] == manifest.eot_id).any(axis=1).sum() >= 3, "documents begin inside windows"
    expected = torch.stack(losses_alone(llama_twin(model), windows, manifest.eot_id)).mean().item()
    first = [losses.metrics["train/loss"][0][1] for losses in (tracker, plain)]
    assert first[0] == pytest.approx(expected, rel=1e-6)
    assert abs(first[1] - first[0]) > 1e-5, "the test can tell"

    load_weights(Path(summary.checkpoint), model)
    val = open_split(short_documents, "val").read(0, 1001)
    rows = [val[start : start + LENGTH + 1] for start in range(0, 1000, LENGTH)]  # the last one is shorter
    llama = llama_twin(model)
    targets = [loss for row in rows for loss in losses_alone(llama, row[None], manifest.eot_id)]
    assert len(targets) == summary.val_tokens == 1000
    assert summary.val_loss == pytest.approx(torch.stack(targets).mean().item(), rel=1e-5)


def test_an_evaluation_masks_as_the_checkpoint_was_trained(short_documents: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(MASKED, data=str(short_documents))
    summary, _ = train_here(config, short_documents, tmp_path)
    wanted = EvaluateConfig(checkpoint=str(tmp_path), val_tokens=1000, batch_size=2, device="cpu")
    assert read_description(open_folder(summary.checkpoint)).info.config["document_mask"] is True
    found = evaluate_job.evaluate(wanted)
    assert found.document_mask is True
    assert found.val_loss == pytest.approx(summary.val_loss, rel=1e-6)
    assert evaluate_job.evaluate(wanted, reuse=True) == found
    without = evaluate_job.evaluate(dataclasses.replace(wanted, document_mask="off"), reuse=True)
    assert without.document_mask is None and without.val_loss is not None and found.val_loss is not None
    assert abs(without.val_loss - found.val_loss) > 1e-4
    assert evaluate_job.evaluate(wanted, reuse=True) == found, "the file has the other one"
    assert evaluate_job.evaluate(dataclasses.replace(wanted, document_mask="on")) == found


def test_another_value_at_a_resume_is_told(short_documents: Path, tmp_path: Path) -> None:
    train_here(dataclasses.replace(CONFIG, train_steps=2), short_documents, tmp_path)
    changed = dataclasses.replace(MASKED, train_steps=2, val_tokens=CONFIG.val_tokens)
    assert changed_settings(changed, open_folder(tmp_path)) == "document_mask True instead of False"
