"""Shared by all tests: quiet settings, hypothesis profiles, folders beside the repository."""

from __future__ import annotations

import importlib
import os
import secrets
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import settings

from tests.support.fixtures import corpus, documents, local_ray, mlflow_server
from tests.support.s3_server import s3, s3_endpoint

__all__ = ["corpus", "documents", "local_ray", "mlflow_server", "s3", "s3_endpoint"]  # fixtures of other files

ROOT = Path(__file__).resolve().parent.parent

# No deadline, as the machine is shared, and the same draws in every run; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray listens on 127.0.0.1 only
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two threads on tensors of these sizes spend their time waiting for each other, minutes on a busy machine."""
    torch.set_num_threads(1)


def shared_folder(name: str) -> Path:
    """A folder of test material beside the repository; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"needs {name}, which lies beside the repository on the project's own machines only")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as jobs/tokenize.py leaves it: two shards per split of source text, a tokenizer of 512 ids."""
    from pipeline.dataset.manifest import Manifest, ShardEntry
    from pipeline.dataset.shards import shard_parts
    from pipeline.storage.folders import write_atomically
    from pipeline.tokenizer.training import count_pretokens, train_bpe

    folder = tmp_path_factory.mktemp("tiny_data")
    modules = [
        "argparse",
        "ast",
        "calendar",
        "datetime",
        "fractions",
        "inspect",
        "pathlib",
        "shutil",
        "tarfile",
        "typing",
    ]
    texts = [Path(importlib.import_module(name).__file__ or "").read_text(encoding="utf-8") for name in modules]
    tokenizer = train_bpe(count_pretokens(pa.array(texts)), 512)
    tokenizer.save(folder / "tokenizer.json")
    shards = []
    for index, (split, chosen) in enumerate((("train", texts[:4]), ("train", texts[4:8]), ("val", texts[8:]))):
        ids = [np.array([tokenizer.eot_id, *tokenizer.encode(text)], dtype=np.uint16) for text in chosen]
        tokens = np.concatenate(ids)[: 40_000 if split == "train" else 1_500]
        name = f"{split}_{index:06d}.bin"
        digest = write_atomically(folder / name, shard_parts(tokens, vocab_size=tokenizer.vocab_size))
        size = sum(len(text.encode()) for text in chosen)
        shards.append(
            ShardEntry(
                name=name,
                split=split,
                tokens=len(tokens),
                documents=len(chosen),
                text_bytes=size,
                sha256=digest,
                source="stdlib",
            )
        )
    Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        settings={},
        inputs=(),
        shards=tuple(shards),
        skipped={},
    ).save(folder)
    return folder
