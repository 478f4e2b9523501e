"""The token between documents goes with the model: data, checkpoint, export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.config.inference import ExportConfig
from pipeline.dataset.manifest import Manifest
from pipeline.pretrained.export_job import export
from pipeline.pretrained.resolve import read_tokenizer
from pipeline.training.trainer import Trainer
from tests.support.factories import tiny_config
from tests.support.memory_tracker import MemoryTracker
from tests.support.models import ALONE


def test_another_token_between_documents_goes_with_the_model(tiny_data: Path, tmp_path: Path) -> None:
    choices: list[tuple[str, dict[str, Any]]] = [("usual", {}), ("other", {"eot_id": 97})]
    for name, changes in choices:
        data = tmp_path / f"{name} data"
        shutil.copytree(tiny_data, data)
        manifest = Manifest.load(data)
        dataclasses.replace(manifest, **changes).save(data)
        config = tiny_config(train_steps=1)
        Trainer(config, data=data, output=tmp_path / name, workers=ALONE, tracker=MemoryTracker()).run()
        checkpoint = tmp_path / name / "checkpoints/step-000001"
        described = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
        assert described.get("eot_id") == changes.get("eot_id") and ("eot_id" in described) == bool(changes)
        expected = changes.get("eot_id", manifest.eot_id)
        assert read_tokenizer(checkpoint).eot_id == expected
        export(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / f"{name} export")))
        exported = tmp_path / f"{name} export"
        assert read_tokenizer(exported).eot_id == expected
        assert json.loads((exported / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == expected
        words = json.loads((exported / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert words["eos_token"] == ("a" if changes else "<|endoftext|>")
