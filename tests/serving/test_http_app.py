"""The server's answers: right ones, and a sentence with a 4xx for everything else. (Ray Serve: test_serve_job.py.)"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.generation import generate
from pipeline.generation.sampling import Detokenizer
from pipeline.pretrained import resolve
from tests.support.models import train
from tests.support.web_server import WebServer, running

ROOT = Path(__file__).resolve().parents[2]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> resolve.Pretrained:
    return resolve.open_model(checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[WebServer]:
    with running(checkpoint, max_waiting=100, max_batch_size=8, max_tokens=5000, request_seconds=20) as found:
        yield found


COMPILED = """
import sys
from pipeline.config.inference import ServeConfig
from pipeline.serving.serve_job import build_app
from pipeline.tokenizer.kernels import encode
build_app(ServeConfig(device="cpu", checkpoint=sys.argv[1], model_name="tiny"))
print(len(encode.encode_documents.signatures))
"""


def test_a_replica_that_is_ready_compiles_nothing_at_its_first_prompt(checkpoint: Path) -> None:
    """It could not answer Ray Serve's health checks meanwhile."""
    command = [sys.executable, "-c", COMPILED, str(checkpoint)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def expected_text(ours: resolve.Pretrained, prompt: str, count: int, **settings: Any) -> str:
    ids = torch.tensor([ours.tokenizer.encode(prompt)])
    values: dict[str, Any] = {"temperature": 1.0, "top_p": None} | settings
    new = generate(ours.model, ids, max_new_tokens=count, stop_id=ours.tokenizer.eot_id, **values)
    return ours.tokenizer.decode(new[0])


def events(body: bytes) -> list[Any]:
    """What a stream said, [DONE] left out; it must be there."""
    parts = body.decode().removesuffix("\n\n").split("\n\n")
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_a_completion_is_the_text_of_generate(server: WebServer, ours: resolve.Pretrained) -> None:
    answer = server.complete(model="tiny", prompt="import os", max_tokens=20, seed=7, temperature=0.7, top_p=0.9)
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["text"] == expected_text(ours, "import os", 20, seed=7, temperature=0.7, top_p=0.9)
    assert choice["finish_reason"] in ("length", "stop") and choice["index"] == 0
    count = len(ours.tokenizer.encode("import os"))
    assert answer["usage"] == {"prompt_tokens": count, "completion_tokens": 20, "total_tokens": count + 20}


def test_a_stream_says_the_same_chunk_by_chunk(server: WebServer) -> None:
    values: dict[str, Any] = {"prompt": ["def f(", "class A"], "n": 2, "max_tokens": 15, "seed": 3, "echo": True}
    whole = server.complete(**values)
    body = json.dumps(values | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    status, headers, content = server.ask("POST", "/v1/completions", body, JSON)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(content)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert texts[0].startswith("def f(") and texts[3].startswith("class A") and texts[0] != texts[1]
    assert last["choices"] == [] and last["usage"] == whole["usage"]


def test_stop_strings_end_a_text_before_them(server: WebServer, ours: resolve.Pretrained) -> None:
    text = expected_text(ours, "import os", 60, seed=1)
    stop = text[25:28]
    choice = server.complete(prompt="import os", max_tokens=60, seed=1, stop=["never there", stop])["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    server.wait_until_idle()


def test_many_at_once_get_what_each_gets_alone(server: WebServer) -> None:
    wanted: list[dict[str, Any]] = [
        {"prompt": "x = " * (1 + number % 9), "max_tokens": 5 + number % 7, "seed": number} for number in range(40)
    ]
    alone = [server.complete(**values)["choices"] for values in wanted[:10]]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        together = list(pool.map(lambda values: server.complete(**values)["choices"], wanted))
    assert together[:10] == alone
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        ({}, 400, "prompt is missing"),
        ({"prompt": 7}, 400, "prompt must be a text"),
        ({"prompt": []}, 400, "prompt must be a text"),
        ({"prompt": [["x"]]}, 400, "prompt must be a text"),
        ({"prompt": [1, 99999]}, 400, "the prompt has the id 99999"),
        ({"prompt": "x " * 500}, 400, "the model sees 128; shorten it"),
        ({"prompt": [1] * 129}, 400, "has 129 tokens"),
        ({"prompt": "x", "model": "gpt-4"}, 404, "model 'gpt-4' is not served here"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
        ({"prompt": "x", "max_tokens": 10**30}, 400, "must be a whole number from 1 to 5000"),
        ({"prompt": "x", "max_tokens": "5"}, 400, "max_tokens is '5'"),
        ({"prompt": "x", "max_tokens": True}, 400, "max_tokens is True"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature is -1"),
        ({"prompt": "x", "top_p": 0}, 400, "top_p is 0"),
        ({"prompt": "x", "n": 99}, 400, "n is 99"),
        ({"prompt": ["x"] * 9, "n": 2}, 400, "9 prompts times n 2"),
        ({"prompt": "x", "stop": [""]}, 400, "a text of stop must have 1 to 200"),
        ({"prompt": "x", "stop": ["a"] * 5}, 400, "at most 4 texts"),
        ({"prompt": "x", "logprobs": 3}, 400, "logprobs is not supported"),
        ({"prompt": "x", "logprobs": 0}, 400, "logprobs is not supported"),
        ({"prompt": "x", "logprobs": True}, 400, "logprobs is not supported"),
        ({"prompt": "x", "best_of": 4}, 400, "best_of is not supported"),
        ({"prompt": "x", "best_of": True}, 400, "best_of is not supported"),
        ({"prompt": "x", "presence_penalty": False}, 400, "presence_penalty is not supported"),
        ({"prompt": "x", "frequency_penalty": False}, 400, "frequency_penalty is not supported"),
        ({"prompt": "x", "suffix": 0}, 400, "suffix is not supported"),
        ({"prompt": "x", "logit_bias": []}, 400, "logit_bias is not supported"),
        ({"prompt": "x", "stream": "yes"}, 400, "stream is 'yes'"),
        ({"prompt": "x", "max_token": 5}, 400, "unknown field 'max_token', did you mean 'max_tokens'?"),
    ],
)
def test_wrong_requests_get_a_sentence(server: WebServer, values: dict[str, Any], status: int, words: str) -> None:
    error = server.complete(status, **values)["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is no JSON number"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_bodies_that_are_no_requests(server: WebServer, body: bytes, words: str) -> None:
    status, _, content = server.ask("POST", "/v1/completions", body, JSON)
    assert status == 400 and words in json.loads(content)["error"]["message"]


def test_neutral_fields_and_odd_texts_are_served(server: WebServer) -> None:
    server.complete(prompt="x", max_tokens=1, logprobs=None, best_of=1, presence_penalty=0, suffix=None, user="me")
    server.complete(prompt="x", max_tokens=1, logprobs=False, frequency_penalty=0.0, suffix="", logit_bias={})
    body = b'{"prompt": "half a pair: \\ud800", "echo": true, "max_tokens": 1}'
    status, _, content = server.ask("POST", "/v1/completions", body, JSON)
    assert status == 200 and json.loads(content)["choices"][0]["text"].startswith("half a pair: \ud800")
    assert server.complete(prompt="", max_tokens=2)["usage"]["prompt_tokens"] == 1


def test_what_is_not_a_completion(server: WebServer) -> None:
    for method, path, headers, status in (
        ("GET", "/nothing", {}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("GET", "/v1/models/other", {}, 404),
        ("POST", "/v1/completions", {"Content-Type": "text/plain"}, 415),
        ("GET", "/", {"Host": "evil.example"}, 403),
    ):
        found, _, content = server.ask(method, path, b"{}" if method == "POST" else None, headers)
        assert found == status and json.loads(content)["error"]["message"]
    assert json.loads(server.ask("GET", "/v1/models")[2])["data"][0]["id"] == "tiny"
    assert json.loads(server.ask("GET", "/v1/models/tiny")[2])["id"] == "tiny"
    assert json.loads(server.ask("GET", "/healthz")[2])["status"] == "ok"


def test_bodies_that_are_too_large_are_refused(checkpoint: Path) -> None:
    with running(checkpoint, max_body_bytes=1000, request_seconds=3600) as server:
        status, _, content = server.ask("POST", "/v1/completions", b'{"prompt": "' + b"x" * 2000 + b'"}', JSON)
        assert status == 413 and "more than 1,000 bytes" in json.loads(content)["error"]["message"]

        def endless() -> Iterator[bytes]:
            yield from (b"x" * 100 for _ in range(50))

        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/completions", endless(), JSON, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_bodies_that_are_too_slow_are_refused(checkpoint: Path) -> None:
    with running(checkpoint, request_seconds=2) as server, socket.socket() as slow:
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        slow.sendall(b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]


def send(client: socket.socket, body: bytes) -> None:
    """A whole request for a completion, whose answer nobody waits for."""
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + body)


LONG = json.dumps({"prompt": "x", "max_tokens": 1_000_000}).encode()
"""A request that is not done before its client leaves or its time is up."""


def test_a_text_that_takes_too_long_is_refused(checkpoint: Path) -> None:
    with running(checkpoint, endless=True, request_seconds=2, max_tokens=1_000_000) as server:
        assert server.ask("POST", "/v1/completions", LONG, JSON)[0] == 408
        server.wait_until_idle()


def test_too_much_at_once_is_refused(checkpoint: Path) -> None:
    """Two requests hold both places until their clients leave, so no clock decides who is refused."""
    with running(checkpoint, endless=True, max_waiting=2, request_seconds=3600, max_tokens=1_000_000) as server:
        with contextlib.ExitStack() as clients:
            for _ in range(2):
                client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                send(client, LONG)
            server.wait_for_texts(2)
            answers = [server.ask("POST", "/v1/completions", LONG, JSON) for _ in range(4)]
        assert [status for status, _, _ in answers] == [429] * 4
        assert all(headers["retry-after"] == "1" for _, headers, _ in answers)
        server.wait_until_idle()
        few = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        while (status := server.ask("POST", "/v1/completions", few, JSON)[0]) == 429:
            time.sleep(0.05)  # a text leaves the engine shortly before its request gives the place back
        assert status == 200, "the places are free again"


def test_clients_that_leave_give_their_place_back(checkpoint: Path) -> None:
    with running(checkpoint, endless=True, request_seconds=3600, max_tokens=1_000_000) as server:
        for stream in (True, False):
            body = json.dumps({"prompt": "x", "max_tokens": 1_000_000, "stream": stream}).encode()
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", server.port)) as client:
                    send(client, body)
                    server.wait_for_texts(1)
            server.wait_until_idle()


def test_the_token(checkpoint: Path) -> None:
    with running(checkpoint, token_sha256=hashlib.sha256(b"secret").hexdigest()) as server:
        body = b'{"prompt": "x", "max_tokens": 1}'
        for sent in (None, "Bearer wrong", "secret", "Basic secret"):
            headers = {} if sent is None else {"Authorization": sent}
            status, answer_headers, content = server.ask("POST", "/v1/completions", body, JSON | headers)
            assert status == 401 and answer_headers["www-authenticate"] == "Bearer"
            assert "secret" not in content.decode()
        assert server.ask("GET", "/v1/models")[0] == 401
        assert server.ask("GET", "/healthz")[0] == 200
        assert server.ask("POST", "/v1/completions", body, JSON | {"Authorization": "Bearer secret"})[0] == 200


def test_characters_come_whole_and_stop_strings_never(ours: resolve.Pretrained) -> None:
    text = "zażółć 日本 🙂 end STOP more"
    ids = ours.tokenizer.encode(text)
    detokenizer = Detokenizer(ours.tokenizer)
    parts = [detokenizer.add(token) for token in ids]
    assert "".join(parts) + detokenizer.end() == text and "�" not in "".join(parts)
    stopping = Detokenizer(ours.tokenizer, ["STOP", "x!"])
    shown = "".join(stopping.add(token) for token in ids) + stopping.end()
    assert shown == "zażółć 日本 🙂 end " and stopping.is_stopped
    unfinished = Detokenizer(ours.tokenizer)
    first = next(token for token in ours.tokenizer.encode("🙂"))
    assert unfinished.add(first) == "" and unfinished.end() == "�"
