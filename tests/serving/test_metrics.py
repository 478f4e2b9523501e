"""/health and /metrics: who may read them, and figures that are those of the answers, by Prometheus' own parser."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.serving.metrics import PROGRESS, Progress, ServerMetrics
from tests.support.models import train
from tests.support.web_server import WebServer, running

JSON = {"Content-Type": "application/json"}
LONG = json.dumps({"prompt": "x", "max_tokens": 1_000_000}).encode()


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("run"))


@pytest.fixture(name="server")
def _server(checkpoint: Path) -> Iterator[WebServer]:
    with running(checkpoint, endless=True, max_waiting=7, request_seconds=3600, max_tokens=1_000_000) as found:
        yield found


def parsed(page: bytes) -> dict[str, float]:
    """name{labels' values} -> value."""
    samples = [sample for family in text_string_to_metric_families(page.decode()) for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def figures(server: WebServer) -> dict[str, float]:
    status, headers, page = server.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=")
    return parsed(page)


def wait_for(server: WebServer, name: str, value: float) -> dict[str, float]:
    """The figures once one of them has a value: an answer is counted just after its last byte has been sent."""
    end = time.monotonic() + 300
    while (found := figures(server)).get(name) != value:
        assert time.monotonic() < end, (name, value, found)
        time.sleep(0.02)
    return found


def test_the_figures_are_those_of_the_answers(server: WebServer) -> None:
    whole = server.complete(prompt=["import os", "x"], n=2, max_tokens=90, seed=1)["usage"]
    body = {"prompt": "class A:", "max_tokens": 70, "stream": True, "stream_options": {"include_usage": True}}
    status, _, events = server.ask("POST", "/v1/completions", json.dumps(body).encode(), JSON)
    assert status == 200
    streamed = json.loads(events.decode().split("data: ")[-2])["usage"]
    server.complete(400, prompt="x", max_tokens=0)
    server.ask("GET", "/v1/models")
    found = wait_for(server, "gpt25_requests_in_progress", 0)
    for kind in ("prompt_tokens", "completion_tokens"):
        assert found[f"gpt25_{kind}_total"] == whole[kind] + streamed[kind], kind
    assert found["gpt25_requests_total completions 200"] == 2
    assert found["gpt25_requests_total completions 400"] == 1
    assert found["gpt25_requests_total models 200"] == 1
    assert found["gpt25_requests_limit"] == 7 and found["gpt25_requests_waiting"] == 0
    assert found["gpt25_request_seconds_count"] == 3
    assert found["gpt25_first_token_seconds_count"] == 2
    assert 0 < found["gpt25_first_token_seconds_sum"] <= found["gpt25_request_seconds_sum"]


def test_requests_that_are_at_work_and_those_that_are_refused(server: WebServer) -> None:
    with contextlib.ExitStack() as clients:
        for _ in range(7):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(LONG)}\r\n\r\n"
            client.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + LONG)
        wait_for(server, "gpt25_requests_in_progress", 7)
        assert server.ask("POST", "/v1/completions", LONG, JSON)[0] == 429
        wait_for(server, "gpt25_requests_total completions 429", 1)
        assert wait_for(server, "gpt25_first_token_seconds_count", 7)["gpt25_requests_waiting"] == 0
    found = wait_for(server, "gpt25_requests_in_progress", 0)
    assert found["gpt25_completion_tokens_total"] >= 7, "tokens count though their clients left"


def test_what_a_stranger_asks_for_makes_no_new_series(server: WebServer) -> None:
    for number in range(5):
        assert server.ask("GET", f"/nothing/{number}")[0] == 404
    server.ask("GET", "/v1/models/nothing")
    found = wait_for(server, "gpt25_requests_total models 404", 1)
    assert found["gpt25_requests_total other 404"] == 5
    assert server.ask("POST", "/metrics")[0] == 404 and server.ask("GET", "/metrics", b"x")[0] == 413


def test_the_figures_want_the_token_and_health_does_not(checkpoint: Path) -> None:
    with running(checkpoint, token_sha256=hashlib.sha256(b"secret").hexdigest()) as server:
        assert server.ask("GET", "/metrics")[0] == 401
        assert server.ask("GET", "/metrics", headers={"Authorization": "Bearer secret"})[0] == 200
        for path in ("/health", "/healthz"):
            status, _, body = server.ask("GET", path)
            assert status == 200 and json.loads(body) == {"status": "ok", "model": "tiny", "texts": 0}
        assert server.ask("GET", "/metrics", headers={"Host": "evil.example"})[0] == 403


def test_health_is_503_when_no_text_can_be_made(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "_failure", RuntimeError("out of memory"))
    status, _, body = server.ask("GET", "/health")
    assert status == 503 and "out of memory" in json.loads(body)["error"]["message"]


def test_the_first_token_is_told_at_once_and_others_in_larger_numbers() -> None:
    told: list[dict[str, Any]] = []
    progress = Progress(told.append)
    progress.add_prompt(5)
    progress.add(0)
    assert not told
    for _ in range(100):
        progress.add(1)
    assert [message["completion_tokens"] for message in told] == [1, 64]
    assert [message["prompt_tokens"] for message in told] == [5, 0]
    assert ["first_token_seconds" in message for message in told] == [True, False]
    progress.tell()
    progress.tell()
    assert [message["completion_tokens"] for message in told] == [1, 64, 35]
    assert {message["type"] for message in told} == {PROGRESS}


def test_a_completion_waits_until_its_first_token() -> None:
    metrics = ServerMetrics(most_requests=3)
    states = []

    def note() -> None:
        found = parsed(bytes(metrics.response().body))
        states.append((found["gpt25_requests_in_progress"], found["gpt25_requests_waiting"]))

    with metrics.completion() as first:
        note()
        with metrics.completion():
            note()
            first.take({"prompt_tokens": 1, "completion_tokens": 1, "first_token_seconds": 0.1})
            note()
        note()
    note()
    assert states == [(1, 1), (2, 2), (2, 1), (1, 0), (0, 0)]
