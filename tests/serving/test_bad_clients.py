"""Clients that take more than their share: big and slow heads, half-sent bodies, unread answers, too many connections.

Each holds what it can without an end; the request of one more client is answered all the same, and nothing stays held.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.inference import ExportConfig, ServeConfig
from pipeline.errors import UserError
from pipeline.pretrained.export_job import export
from pipeline.serving import serve_job
from pipeline.serving.gate import token_hash
from tests.support.models import train
from tests.support.web_server import WebServer, running

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
FOR_EVER = 1_000_000
"""Tokens that no test waits for."""


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def patient(checkpoint: Path) -> Iterator[WebServer]:
    """A server that gives its clients an hour for everything, so that no clock helps it; 60 connections."""
    with running(
        checkpoint, endless=True, head_seconds=3600, request_seconds=36000, max_tokens=FOR_EVER, max_connections=60
    ) as it:
        yield it


@contextlib.contextmanager
def clients(server: WebServer, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections that have sent the given bytes."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=1200))
            client.sendall(sent)
            found.append(client)
        yield found


def completion(**values: Any) -> bytes:
    body = json.dumps({"prompt": "x"} | values).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def is_over(client: socket.socket) -> bool:
    """Wait until the server has ended a connection."""
    with contextlib.suppress(ConnectionError):
        while client.recv(65536):
            pass
    return True


@pytest.mark.parametrize("megabytes", [1, 40])
def test_a_head_that_is_too_big_ends_its_connection(patient: WebServer, megabytes: int) -> None:
    """No end of it comes, so only a bound in bytes can end it; the last bytes find nobody."""
    with clients(patient, 1, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ") as (client,):
        with pytest.raises(ConnectionError):
            for _ in range(megabytes * 16):
                client.sendall(b"x" * 65536)
            assert is_over(client)
            client.sendall(b"x")
            client.sendall(b"x")
        assert patient.complete(max_tokens=2, prompt="x")["choices"]


def test_many_small_fields_are_too_much_as_well(patient: WebServer) -> None:
    with clients(patient, 1, b"GET / HTTP/1.1\r\nHost: localhost\r\n") as (client,):
        with contextlib.suppress(ConnectionError):
            client.sendall(b"a: b\r\n" * 100_000)
        assert is_over(client)


def test_a_head_that_comes_slowly_ends_its_connection(checkpoint: Path) -> None:
    """The first one of a connection, and one after an answer."""
    with running(checkpoint, head_seconds=1) as server, clients(server, 2, b"GET /healthz HTTP/1.1\r\nHo") as slow:
        slow[1].sendall(b"st: localhost\r\n\r\nGET /hea")
        assert b"200 OK" in slow[1].recv(1000)
        assert is_over(slow[0]) and is_over(slow[1])


def test_a_token_is_asked_for_before_a_body_is_read(checkpoint: Path) -> None:
    sent = HEAD + b"Content-Length: 1000\r\n\r\n"
    with running(checkpoint, token_sha256="0" * 64, request_seconds=36000) as server, clients(server, 1, sent) as (it,):
        assert b" 401 " in it.recv(1000)


def test_only_completions_have_a_body(patient: WebServer) -> None:
    with clients(patient, 1, b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n") as (client,):
        assert b" 413 " in client.recv(1000)


HALF_SENT = HEAD + b"Content-Length: 1000\r\n\r\n{"
HALF_A_CHUNK = HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"


@pytest.mark.parametrize("sent", [b"", b"GET / HT", HALF_SENT, HALF_A_CHUNK])
def test_three_hundred_that_never_finish_keep_nobody_out(patient: WebServer, sent: bytes) -> None:
    with clients(patient, 300, sent) as held:
        assert patient.complete(max_tokens=2, prompt="x")["choices"]
        assert all(is_over(client) for client in held[:200])  # 60 connections are all that there are


def test_half_sent_bodies_that_fill_the_memory_for_them_give_way(checkpoint: Path) -> None:
    """Together they would hold more than the server takes; no clock helps it, and a later one is received whole."""
    body = json.dumps({"prompt": "x", "max_tokens": 2}).encode().ljust(950)
    half = HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 900
    with running(checkpoint, max_body_bytes=1000, request_seconds=36000) as server, clients(server, 300, half) as held:
        for _ in range(5):
            status, _, answer = server.ask("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            assert status == 200, answer
        assert all(b" 429 " in client.recv(1000) for client in held[:200])  # 71 are all that there is room for


def test_an_answer_that_nobody_reads_ends_its_connection(checkpoint: Path) -> None:
    """Its texts leave the batch, though the client stays and the texts have an hour."""
    with running(checkpoint, endless=True, head_seconds=1, request_seconds=3600, max_tokens=FOR_EVER) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with client:
            client.connect(("127.0.0.1", server.port))
            client.sendall(completion(max_tokens=FOR_EVER, n=16, stream=True))
            server.wait_for_texts(16)
            server.wait_until_idle()


def test_twenty_greedy_clients_do_not_starve_a_short_request(patient: WebServer) -> None:
    """None of their texts ever ends, and they hold all places: a place must be taken from them."""
    with clients(patient, 20, completion(max_tokens=FOR_EVER, n=16)):
        while patient.engine.num_texts < 100:  # of 16 places
            time.sleep(0.05)
        for seed in range(5):
            assert patient.complete(max_tokens=9, prompt="x", seed=seed)["usage"]["completion_tokens"] <= 9
    patient.wait_until_idle()


# ---- what the server refuses at its start ----------------------------------------------------------------------------


def test_the_access_token_has_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, words in (
        ("short", "has 5 characters"),
        ("with white space inside", "white space"),
        ("a line, as of a file\n" * 2, "white space"),
        ("żółw" * 5, "ASCII"),
    ):
        with pytest.raises(UserError, match=words):
            token_hash(wrong, "NAME")
    monkeypatch.setenv(serve_job.TOKEN_VARIABLE, "0123456789abcdef")
    assert len(serve_job._take_token(ServeConfig(host="0.0.0.0")) or "") == 64
    assert serve_job.TOKEN_VARIABLE not in os.environ  # what replicas would inherit
    with pytest.raises(UserError, match="lets other machines in"):
        serve_job._take_token(ServeConfig(host="0.0.0.0"))


def test_weights_that_are_not_finite_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export(ExportConfig(checkpoint=str(checkpoint), output=str(folder)))
    serve_job._require_finite(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "down" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the weights in blocks\.0\.\S+ are not all finite"):
        serve_job._require_finite(folder)
