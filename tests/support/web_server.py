"""The web application of jobs/serve.py in this process, without Ray: for tests of what it answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from model.batching import Request
from pipeline.config.inference import ServeConfig
from pipeline.serving import openai_protocol, web_server
from pipeline.serving.gate import Gate
from pipeline.serving.serve_job import build_app


class WebServer:
    """Where it listens, and its engine."""

    def __init__(self, port: int, app: Any) -> None:
        self.port = port
        self.engine = app.state.engine

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def complete(self, status: int = 200, **values: Any) -> Any:
        """The JSON that answers a completion request; the status must be the given one."""
        headers = {"Content-Type": "application/json"}
        found, _, body = self.ask("POST", "/v1/completions", json.dumps(values).encode(), headers)
        assert found == status, body
        return json.loads(body)

    def wait_until_idle(self, seconds: float = 300) -> None:
        """Wait until no sequence is decoded: those whose clients left must end too."""
        self.wait_for_texts(0, seconds)

    def wait_for_texts(self, count: int, seconds: float = 300) -> None:
        """Wait until exactly so many sequences are being decoded or waiting."""
        end = time.monotonic() + seconds
        while self.engine.num_texts != count:
            assert time.monotonic() < end, f"{self.engine.num_texts} sequences are decoded, not {count}"
            time.sleep(0.05)


def unending(**settings: Any) -> Request:
    return Request(**settings | {"stop_id": None})


@contextlib.contextmanager
def running(
    checkpoint: Path, *, token_sha256: str | None = None, endless: bool = False, **settings: Any
) -> Iterator[WebServer]:
    """A server that answers as long as the block runs.

    Args:
        endless: a text goes on to its max_tokens, also where the end of a text is drawn.
    """
    config = ServeConfig(device="cpu", checkpoint=str(checkpoint), model_name="tiny", port=0, **settings)
    app = build_app(config)
    server = web_server.WebServer(config)
    server.start(Gate(app, config, token_sha256=token_sha256))
    try:
        with patch.object(openai_protocol, "Request", unending) if endless else contextlib.nullcontext():
            yield WebServer(server.port, app)
    finally:
        server.stop()
        app.state.engine.close()
