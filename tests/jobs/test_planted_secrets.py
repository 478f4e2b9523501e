"""Secrets in addresses, planted wherever a user may put one: nothing that a run writes or prints holds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from pipeline.tracking import mlflow_ui
from tests.support.mlflow_server import serve

ROOT = Path(__file__).resolve().parents[2]
PASSWORD, SIGNATURE, STORE = "planted4711password", "planted4711signature", "planted4711store"


class Site(BaseHTTPRequestHandler):
    """One file, for whoever knows the signature."""

    content = b"".join(
        json.dumps({"text": f"{number} is a number, and {number * 7} is another one. " * 20}).encode() + b"\n"
        for number in range(120)
    )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if parse_qs(urlsplit(self.path).query).get("X-Amz-Signature") != [SIGNATURE]:
            self.send_error(403)
            return
        start, stop = 0, len(self.content)
        if given := self.headers.get("Range"):
            first, _, last = given.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
        self.send_response(206 if given else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(stop - start))
        if given:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(self.content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content[start:stop])

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def source() -> Iterator[str]:
    """The address of the file, with user, password and signature."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://me:{PASSWORD}@127.0.0.1:{server.server_port}/texts.jsonl?X-Amz-Signature={SIGNATURE}"
        server.shutdown()


def job(name: str, home: Path, *flags: str) -> str:
    """What a job prints; all that it writes lies below ``home``, Ray's logs among it."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("GPT25_", "MLFLOW_", "RAY_ADDRESS"))},
        "HOME": str(home),
        "TMPDIR": str(home / "t"),
        "RAY_TMPDIR": str(home / "t"),
        "GPT25_KERNEL_CACHE": os.environ.get("GPT25_KERNEL_CACHE") or str(Path.home() / ".cache/gpt-2.5"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, str(ROOT / "jobs" / name), "--config", str(home / "preset.yaml"), *flags]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def holders(home: Path) -> list[str]:
    """The files below a folder, but for the preset, that hold a planted secret."""
    secrets = [secret.encode() for secret in (PASSWORD, SIGNATURE, STORE)]
    files = [path for path in home.rglob("*") if path.is_file() and path.name != "preset.yaml"]
    return [str(path) for path in files if any(secret in path.read_bytes() for secret in secrets)]


@pytest.mark.slow
def test_no_planted_secret_is_written_or_printed(source: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("h")  # short: Ray's sockets have long names
    (home / "t").mkdir()
    with serve(f"sqlite:///{home / 'server.db'}", home / "artifacts") as (address, _):
        store = address.replace("://", f"://me:{STORE}@")
        shared = {"tracking_uri": store, "experiment": "planted"}
        small = {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 32, "context_length": 16}
        steps = {"tokens_per_step": 64, "batch_size": 2, "train_steps": 4, "val_tokens": 50, "sample_tokens": 2}
        text = {"source": source, "output": "data", "vocab_size": 300, "num_workers": 1, "val_fraction": 0.1}
        run = {"data": "data", "output": "run", "num_workers": 2, "device": "cpu", **small, **steps}
        sections = {"tokenize": text | shared, "pretrain": run | shared}
        (home / "preset.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
        printed = job("tokenize.py", home) + job("pretrain.py", home, "--dry_run") + job("pretrain.py", home)
    assert (home / "data/manifest.json").exists() and (home / "run/summary.json").exists()
    assert (home / "server.db").stat().st_size > 100_000
    assert not [secret for secret in (PASSWORD, SIGNATURE, STORE) if secret in printed]
    assert holders(home) == []


def test_the_interface_gets_the_address_of_its_store_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(mlflow_ui.subprocess, "Popen", lambda command, *, env: started.append((command, env)))
    mlflow_ui._start_server(f"postgresql://me:{PASSWORD}@host/db")
    ((command, environment),) = started
    assert "ui" in command and PASSWORD not in str(command)
    assert PASSWORD in environment["MLFLOW_BACKEND_STORE_URI"]
