"""jobs/serve.py as users start it: Ray Serve, the openai package, the page in a real browser, a crowd, a storm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch

from model.generation import generate
from pipeline.pretrained import resolve
from pipeline.pretrained.chat import read_chat
from tests.support.listening import beyond_loopback, listening
from tests.support.models import train, train_chat

ROOT = Path(__file__).resolve().parents[2]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS = ["import os", "class A:\n    def ", "x = ", "# The", "\n\n", "for name in names:", "return ", "żółw"]
FOR_EVER = 1_000_000
"""Tokens that no test waits for."""
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]

    def memory(self) -> int:
        """Resident bytes of the process that listens and of the replica."""
        found: int = psutil.Process(self.process.pid).memory_info().rss
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ServeReplica" in " ".join(process.cmdline()):
                    found += process.memory_info().rss
        return found


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that chats; for completions it is one as any other."""
    return train_chat(train(tiny_data, tmp_path_factory.mktemp("run")), tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(checkpoint, tmp_path_factory) as found:
        yield found


@contextlib.contextmanager
def running(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, **variables: str) -> Iterator[Server]:
    """jobs/serve.py with further environment variables; it must end well, and nothing but its own lines be printed."""
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), str(checkpoint), "--port", "0", "--device", "cpu"]
    command += ["--model_name", "tiny", "--max_waiting", "300"]
    command += ["--max_tokens", str(FOR_EVER), "--request_seconds", "36000"]  # so that nothing ends by itself
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "GPT25_SERVE_TOKEN")}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    log = (tmp_path_factory.mktemp("serve") / "log").open("w+")
    process = subprocess.Popen(
        command, cwd=tmp_path_factory.mktemp("home"), env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        yield Server(url=wait_for_address(process, log), process=process)
    except BaseException:
        process.kill()
        raise
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=1200) == 0
    assert process.stdout is not None
    printed = process.stdout.read()
    assert printed.splitlines()[-1] == "serve: ended" and "raylet" not in printed and "\x1b" not in printed, printed
    log.seek(0)
    said = log.read()
    assert "Traceback" not in said, said[said.index("Traceback") - 1000 :][:6000]


def wait_for_address(process: subprocess.Popen[str], log: Any) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"page\s+(http://\S+)/", line):
            return match[1]  # the few lines that follow fit into the pipe
    log.seek(0)
    raise AssertionError(f"the server did not start: {log.read()[-3000:]}")


def expected(checkpoint: Path, prompt: str, count: int, seed: int, *, path: str = COMPLETIONS) -> str:
    found = resolve.open_model(checkpoint, torch.device("cpu"))
    prompt_ids, stop_id = found.tokenizer.encode(prompt), found.tokenizer.eot_id
    if path == CHAT:
        chat = read_chat(checkpoint, found.tokenizer)
        assert chat is not None
        prompt_ids, stop_id = chat.render([user(prompt)], add_generation_prompt=True), chat.end_id
    ids = torch.tensor([prompt_ids])
    new = generate(found.model, ids, max_new_tokens=count, temperature=1.0, top_p=None, seed=seed, stop_id=stop_id)
    return found.tokenizer.decode(new[0])


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_all_ports_are_on_loopback_and_the_replica_s_own_wants_the_token(server: Server) -> None:
    """Ray Serve itself opens a port of each replica on all addresses, whatever Ray's address is (docs/security.md)."""
    assert beyond_loopback(server.process.pid) == {}
    lines = [line.split(maxsplit=1) for lines in listening(server.process.pid).values() for line in lines]
    codes = {}
    for port in [int(port) for port, program in lines if program.startswith("ray::ServeReplica")]:
        known = [("authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")]
        if (code := code_of_replica(port, known)) not in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE):
            codes[port] = code_of_replica(port, []), code
    ((without, with_token),) = codes.values()  # other ports of the process are Ray's, and know no such service
    assert without == grpc.StatusCode.UNAUTHENTICATED
    assert with_token != grpc.StatusCode.UNAUTHENTICATED, "it was the token that was missing"


def test_the_replica_is_as_urgent_as_the_process_that_listens(server: Server) -> None:
    """Ray gives its workers a niceness of 15: beside anything busy on the machine the network would stand still."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    (replica,) = [process for process in family if "ServeReplica" in " ".join(process.cmdline())]
    assert replica.nice() == psutil.Process(server.process.pid).nice()


def code_of_replica(port: int, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    """How an empty call of Ray Serve's own service fails at a port."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=60, metadata=metadata)
        found: grpc.StatusCode = refused.value.code()
        return found


def test_the_openai_package(server: Server, checkpoint: Path) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai package: pip install openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    text = expected(checkpoint, "import os", 30, seed=5)
    settings = {"model": "tiny", "prompt": "import os", "max_tokens": 30, "seed": 5}
    whole = client.completions.create(**settings)
    assert whole.choices[0].text == text and whole.usage.completion_tokens == 30
    chunks = list(client.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
    said = client.chat.completions.create(model="tiny", messages=[user("import os")], max_tokens=30, seed=5)
    assert said.choices[0].message.content == expected(checkpoint, "import os", 30, seed=5, path=CHAT)
    with pytest.raises(openai.BadRequestError, match="the model sees 128; shorten it"):
        client.completions.create(model="tiny", prompt="x " * 500)
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="other", prompt="x")


STOP_AT_FIRST_TEXT = """() => {
  const text = document.getElementById("new");
  const observer = new MutationObserver(() => {
    if (!text.textContent) return;
    observer.disconnect();
    document.getElementById("stop").click();
  });
  observer.observe(text, { childList: true });
}"""
"""The click comes from within the page: a text that ends by itself could be over before one from outside arrives."""


def test_the_metrics_have_what_a_replica_made(server: Server) -> None:
    """Counts come from the replica's process to the one that listens, with an answer in one piece and with a stream."""

    def figures() -> dict[str, float]:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = figures()
    for stream in (False, True):
        body = json.dumps({"prompt": "import os", "max_tokens": 150, "seed": 3, "stream": stream}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            content = answer.read()
        if not stream:
            made = json.loads(content)["usage"]["completion_tokens"]
    end = time.monotonic() + 60
    while (after := figures())["gpt25_requests_in_progress"]:
        assert time.monotonic() < end, after
    assert after["gpt25_completion_tokens_total"] - before["gpt25_completion_tokens_total"] == 2 * made
    assert after["gpt25_first_token_seconds_count"] - before["gpt25_first_token_seconds_count"] == 2
    assert after["gpt25_requests_waiting"] == 0
    with urllib.request.urlopen(f"{server.url}/health", timeout=60) as answer:
        assert json.loads(answer.read())["status"] == "ok"


def test_the_page_in_a_browser(server: Server, checkpoint: Path) -> None:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs Chromium (apt-get install chromium), or its path in CHROMIUM")
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *QUIET])
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(f"{server.url}/")
        page.get_by_role("tab", name="Completion").click()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("prompt").fill("import os")
        for name, value in (("max_tokens", "30"), ("temperature", "1"), ("top_p", "1"), ("seed", "5")):
            page.locator(f"#{name}").fill(value)
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#status")).to_have_text(re.compile("ended: (length|stop)"), timeout=30_000)
        assert page.locator("#new").text_content() == expected(checkpoint, "import os", 30, seed=5)
        assert problems == []
        page.locator("#max_tokens").fill("4000")
        page.evaluate(STOP_AT_FIRST_TEXT)
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#status")).to_have_text("stopped", timeout=30_000)
        expect(page.locator("#new")).not_to_have_text("")
        page.get_by_label("prompt").fill("x " * 500)
        page.get_by_role("button", name="Go on").click()
        expect(page.get_by_role("alert")).to_contain_text("shorten it")
        browser.close()


def test_an_open_address_needs_a_token(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), str(checkpoint), "--host", "0.0.0.0", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "GPT25_SERVE_TOKEN"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 1 and "set GPT25_SERVE_TOKEN" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_token_stays_in_the_process_that_listens(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    token = secrets.token_hex(16)
    with running(checkpoint, tmp_path_factory, GPT25_SERVE_TOKEN=token) as server:
        few = {"prompt": "x", "max_tokens": 2}
        assert status_of(asyncio.run(exchange(server, request(few)))) == 401
        assert status_of(asyncio.run(exchange(server, request(few, f"Authorization: Bearer {token}\r\n")))) == 200
        environments = {}
        for process in psutil.Process(server.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                environments[" ".join(process.cmdline())[:100]] = str(process.environ())
        assert any("ServeReplica" in name for name in environments)
        assert not [name for name, values in environments.items() if token in values]


def test_a_client_that_leaves_frees_its_place_in_the_replica(server: Server) -> None:
    """Through Ray, whose requests are cancelled: streams, whole answers, and an answer that nobody reads."""
    for stream in (True, False):
        raw = request({"prompt": "x", "max_tokens": FOR_EVER, "n": 16, "stream": stream})
        asyncio.run(exchange(server, raw, leave_after=1))
        wait_until_idle(server)


async def exchange(server: Server, raw: bytes, *, leave_after: float | None = None) -> bytes:
    """What comes back for raw bytes; with leave_after, the client goes away then."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw)
        await writer.drain()
        if leave_after is not None:
            await asyncio.sleep(leave_after)
            return b""
        return await asyncio.wait_for(reader.read(), timeout=120)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(values: Any, headers: str = "", *, path: str = COMPLETIONS) -> bytes:
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n{headers}\r\n".encode() + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def choice_of(answer: bytes) -> Any:
    (choice,) = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_two_hundred_clients(server: Server, checkpoint: Path, path: str) -> None:
    """Every one of them gets the text that it would get alone."""
    wanted = {number: (f"{PROMPTS[number % len(PROMPTS)]}1", 3 + number % 20, number % 16) for number in range(200)}
    texts = {values: expected(checkpoint, *values, path=path) for values in set(wanted.values())}

    def asked(prompt: str, count: int, seed: int) -> bytes:
        what = {"messages": [user(prompt)]} if path == CHAT else {"prompt": prompt}
        return request(what | {"max_tokens": count, "seed": seed}, path=path)

    async def crowd() -> list[bytes]:
        return list(await asyncio.gather(*(exchange(server, asked(*values)) for values in wanted.values())))

    for answer, values in zip(asyncio.run(crowd()), wanted.values(), strict=True):
        assert status_of(answer) == 200, answer
        assert choice_of(answer) == texts[values]


@pytest.mark.slow
def test_a_minute_of_bad_manners(server: Server, checkpoint: Path) -> None:
    """Malformed, oversized, abandoned: each a 4xx or nothing, while others get right texts; afterwards all is free."""
    right = {prompt: expected(checkpoint, prompt, 12, seed=1) for prompt in PROMPTS}
    counts: dict[str, int] = {}
    choose = random.Random(0)

    async def malformed() -> None:
        whole = request({"prompt": "x", "max_tokens": 3})
        body = choose.choice([b"", b"{", b"null", b'{"prompt": 1}', b"\x00\xff" * 50, b"[" * 50_000, whole])
        answer = await exchange(server, request(body))
        assert 400 <= status_of(answer) < 500, answer
        broken = bytearray(whole)
        for _ in range(5):
            broken[choose.randrange(len(broken) - 40)] = choose.randrange(256)
        with contextlib.suppress(ConnectionError, TimeoutError):
            answer = await asyncio.wait_for(exchange(server, bytes(broken)), timeout=10)
            assert not answer or status_of(answer) < 500, (broken, answer)

    async def oversized() -> None:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            answer = await exchange(server, request({"prompt": "x" * 3_000_000}))
            assert not answer or status_of(answer) == 413, answer

    async def abandoned() -> None:
        values = {"prompt": choose.choice(PROMPTS), "max_tokens": FOR_EVER, "stream": choose.random() < 0.5}
        raw = request(values)
        await exchange(server, raw[: choose.randrange(1, len(raw))] if choose.random() < 0.3 else raw, leave_after=0.2)

    async def honest() -> None:
        prompt = choose.choice(PROMPTS)
        answer = await exchange(server, request({"prompt": prompt, "max_tokens": 12, "seed": 1}))
        assert status_of(answer) in (200, 429), answer
        if status_of(answer) == 200:
            assert choice_of(answer) == right[prompt]
            counts["right"] = counts.get("right", 0) + 1

    async def client(act: Any, end: float) -> None:
        while time.monotonic() < end:
            await act()
            counts[act.__name__] = counts.get(act.__name__, 0) + 1

    async def storm(seconds: float) -> None:
        end = time.monotonic() + seconds
        acts = [malformed] * 4 + [oversized] * 2 + [abandoned] * 4 + [honest] * 4
        await asyncio.gather(*(client(act, end) for act in acts))

    asyncio.run(storm(10))  # what is allocated once is allocated now
    before = server.memory()
    asyncio.run(storm(60))
    wait_until_idle(server)
    assert counts["right"] > 20 and min(counts.values()) > 10, counts
    assert server.memory() - before < 100e6, (before, server.memory(), counts)


def wait_until_idle(server: Server) -> None:
    """Wait until the replica decodes nothing: texts whose clients left have to leave, for none ends by itself."""
    host, port = server.url.removeprefix("http://").split(":")
    end = time.monotonic() + 300
    while True:
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert status_of(answer) == 200
        if json.loads(answer.partition(b"\r\n\r\n")[2])["texts"] == 0:
            return
        assert time.monotonic() < end, answer
        time.sleep(0.5)
