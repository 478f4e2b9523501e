"""mlflow.pyfunc.load_model and mlflow models serve give our text; nothing in the model is pickled."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pandas  # type: ignore[import-untyped]
import pytest
import torch

from model.generation import generate
from pipeline.config.inference import ExportConfig
from pipeline.errors import UserError
from pipeline.pretrained import pyfunc, resolve
from pipeline.pretrained.export_job import export
from pipeline.storage.folders import open_folder
from pipeline.tracking.mlflow_run import open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from tests.support.models import train

BIN = Path(sys.executable).parent  # MLflow starts uvicorn by its name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, home: Path) -> Path:
    return train(tiny_data, home / "run")


@pytest.fixture(scope="module")
def model_folder(checkpoint: Path, home: Path) -> Path:
    export(ExportConfig(checkpoint=str(checkpoint), output=str(home / "export")))
    mlflow.pyfunc.save_model(path=str(home / "mlflow_model"), **pyfunc.model_contents(home / "export"))
    return home / "mlflow_model"


def expected(checkpoint: Path, prompt: str, count: int, seed: int) -> str:
    found = resolve.open_model(checkpoint, torch.device("cpu"))
    ids = torch.tensor([found.tokenizer.encode(prompt)])
    new = generate(found.model, ids, max_new_tokens=count, seed=seed, stop_id=found.tokenizer.eot_id)
    return prompt + found.tokenizer.decode(new[0])


def test_load_model_gives_our_text(model_folder: Path, checkpoint: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(model_folder))
    prompts = ["import os", "class A"]
    wanted = [expected(checkpoint, prompt, 15, seed=3) for prompt in prompts]
    parameters = {"max_new_tokens": 15, "seed": 3}
    assert loaded.predict(pandas.DataFrame({"prompt": prompts}), params=parameters) == wanted
    assert loaded.predict(pandas.DataFrame({"prompt": prompts[:1]}), params=parameters) == wanted[:1]
    with pytest.raises(UserError, match="shorten it"):
        loaded.predict(pandas.DataFrame({"prompt": ["x " * 500]}))


def test_nothing_is_pickled(model_folder: Path) -> None:
    # Loading, in the test before, leaves Python's own bytecode there.
    files = [path for path in model_folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    assert {path.suffix for path in files} <= {
        "",
        ".json",
        ".py",
        ".yaml",
        ".txt",
        ".md",
        ".safetensors",
        ".html",
        ".png",
    }
    assert "model_code_path" in (model_folder / "MLmodel").read_text()


def test_logged_to_the_run_and_found_again(checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT25_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = open_folder(checkpoint.parents[1])
    run = open_run(tracking_uri=None, experiment="e", folder=folder, working_folder=home, job="pretrain")
    tracker = MLflowTracker(run, registered_model="family")
    tracker.log_checkpoint(40, checkpoint, {"val_loss": 1.0}, best=True)
    tracker.finish("FINISHED")
    report = export(ExportConfig(checkpoint=str(checkpoint), output="logged", mlflow=True))
    assert report.mlflow_model is not None and report.mlflow_model.startswith("models:/m-")
    found = resolve.resolve_checkpoint(report.mlflow_model)
    assert (found / "model.safetensors").read_bytes() == (home / "logged" / "model.safetensors").read_bytes()
    client = mlflow.MlflowClient(run.tracking_uri)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    (named,) = [m for m in client.search_logged_models([run.experiment_id]) if "checkpoint" in m.tags]
    assert resolve.resolve_checkpoint(f"models:/{named.model_id}") == checkpoint
    assert resolve.resolve_checkpoint("models:/family@best") == checkpoint
    assert resolve.resolve_checkpoint("models:/family/1") == checkpoint
    with pytest.raises(UserError, match="MLflow has no model models:/family@worst"):
        resolve.resolve_checkpoint("models:/family@worst")
    with pytest.raises(UserError, match="MLflow has no model models:/m-0"):
        resolve.resolve_checkpoint("models:/m-0")


@pytest.mark.slow
def test_mlflow_models_serve(model_folder: Path, checkpoint: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model_folder), "--env-manager", "local"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        env=os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///unused.db", "PATH": f"{BIN}:{os.environ['PATH']}"},
        cwd=model_folder.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        body: dict[str, object] = {"dataframe_split": {"columns": ["prompt"], "data": [["import os"]]}}
        body["params"] = {"max_new_tokens": 15, "seed": 3}
        answer = ask(f"http://127.0.0.1:{port}/invocations", body, process)
        assert answer["predictions"] == [expected(checkpoint, "import os", 15, seed=3)]
    finally:
        process.terminate()
        process.wait(timeout=1200)


def ask(url: str, body: dict[str, object], process: subprocess.Popen[bytes]) -> dict[str, list[str]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(120):
        assert process.poll() is None, "mlflow models serve ended by itself"
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return dict(json.loads(response.read()))
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(1)
    raise AssertionError("mlflow models serve did not start")
