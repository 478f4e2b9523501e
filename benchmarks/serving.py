"""The time of one short request to jobs/serve.py alone and beside clients that take all they can get.

The target is 3 times the time alone, at most. ``python benchmarks/serving.py CHECKPOINT [--rounds N] [--repeats N]``
starts the server on that model, on loopback. Each kind of bad client comes and goes ``--rounds`` times; each time some
short requests are timed without them and then beside them, so that whatever else the machine does slows both. It prints
the medians of all, the median of the rounds' ratios of medians, the longest request beside them, and what the server
holds when they have gone for good: texts, connections, and more threads, files and memory than after the first round.
``--without_ray`` takes web server, gate and engine in one process, without Ray Serve between them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import http.client
import itertools
import json
import re
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SHORT_TOKENS = 16
START_SECONDS = 600


@contextlib.contextmanager
def server(checkpoint: str, *, with_ray: bool) -> Iterator[tuple[int, psutil.Process]]:
    """The port and the process of a server."""
    command = [sys.executable, str(ROOT / "jobs/serve.py"), checkpoint, "--port=0", "--device=cpu"]
    if not with_ray:
        command = [sys.executable, __file__, checkpoint, "--serve"]
    environment = {name: value for name, value in os.environ.items() if name != "GPT25_SERVE_TOKEN"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield port_of(process.stdout), psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def serve_without_ray(checkpoint: str) -> None:
    from pipeline.config.inference import ServeConfig
    from pipeline.serving import serve_job
    from pipeline.serving.gate import Gate
    from pipeline.serving.web_server import WebServer

    config = ServeConfig(checkpoint=checkpoint, model_name="model", port=0, device="cpu")
    listening = WebServer(config)
    listening.start(Gate(serve_job.build_app(config), config, token_sha256=None))
    print(f"page http://127.0.0.1:{listening.port}/", flush=True)
    serve_job.wait()
    listening.stop()


def port_of(output: IO[str]) -> int:
    for line in output:
        if match := re.search(r"page\s+http://127.0.0.1:(\d+)/", line):
            return int(match[1])
    sys.exit("error: the server did not start")


def ask(port: int, method: str, path: str, body: bytes | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return content
    finally:
        connection.close()


def short_seconds(port: int, repeats: int) -> list[float]:
    """Seconds of each of some short requests, one after the other."""
    found = []
    for seed in range(repeats):
        body = json.dumps({"prompt": "The", "max_tokens": SHORT_TOKENS, "seed": seed}).encode()
        start = time.perf_counter()
        ask(port, "POST", "/v1/completions", body)
        found.append(time.perf_counter() - start)
    return found


def request(**values: object) -> bytes:
    body = json.dumps({"prompt": "The"} | values).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def idle(client: socket.socket, ended: threading.Event) -> None:
    ended.wait()


def slow_head(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(b"GET / HTTP/1.1\r\nX: ")
    while not ended.wait(1):
        client.sendall(b"x")


def big_head(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(b"GET / HTTP/1.1\r\nX: ")
    for _ in range(640):  # 40 MB
        client.sendall(b"x" * 65536)


def half_a_body(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(HEAD + b"Content-Length: 900000\r\n\r\n" + b"x" * 400_000)
    ended.wait()


def unread_stream(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(request(max_tokens=1024, stream=True))
    ended.wait()


def greedy(client: socket.socket, ended: threading.Event) -> None:
    client.sendall(request(max_tokens=1024, n=16))
    client.settimeout(1)
    while not ended.is_set():
        with contextlib.suppress(TimeoutError):
            if not client.recv(65536):
                return


BEHAVIOURS: list[tuple[str, int, Callable[[socket.socket, threading.Event], None]]] = [
    ("idle connections", 300, idle),
    ("slow heads", 300, slow_head),
    ("big heads", 20, big_head),
    ("half-sent bodies", 300, half_a_body),
    ("unread streams", 20, unread_stream),
    ("n=16 x 1,024 tokens", 20, greedy),
]


@contextlib.contextmanager
def bad_clients(port: int, count: int, behave: Callable[[socket.socket, threading.Event], None]) -> Iterator[None]:
    """Clients that come again as soon as they lose their connection."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60) as client:
                behave(client, ended)
            ended.wait(0.1)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(5)
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(90)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the process that listens and its replica hold."""

    threads: int
    files: int
    megabytes: float

    @classmethod
    def by(cls, process: psutil.Process) -> Held:
        """As it is now."""
        both = [process]
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                both += [child] if "ServeReplica" in " ".join(child.cmdline()) else []
        return cls(
            threads=sum(it.num_threads() for it in both),
            files=sum(it.num_fds() for it in both),
            megabytes=sum(it.memory_info().rss for it in both) / 1e6,
        )


def wait_until_free(port: int, process: psutil.Process) -> str:
    """What texts and connections the server still has when none is left, or after a minute."""
    for _ in range(120):
        texts = json.loads(ask(port, "GET", "/healthz"))["texts"]
        connections = sum(it.laddr.port == port and it.status == "ESTABLISHED" for it in process.net_connections("tcp"))
        if not texts and not connections:
            break
        time.sleep(0.5)
    return f"{texts} texts, {connections} connections"


def measure(
    port: int,
    process: psutil.Process,
    behaviour: tuple[str, int, Callable[[socket.socket, threading.Event], None]],
    arguments: argparse.Namespace,
) -> str:
    """The line of one kind of bad client."""
    name, count, behave = behaviour
    alone, beside, ratios, left, first = [], [], [], "", None
    for _ in range(arguments.rounds):
        alone.append(short_seconds(port, arguments.repeats))
        with bad_clients(port, count, behave):
            beside.append(short_seconds(port, arguments.repeats))
        ratios.append(statistics.median(beside[-1]) / statistics.median(alone[-1]))
        left = wait_until_free(port, process)
        first = first or Held.by(process)
    assert first is not None
    last = Held.by(process)
    before, after = (statistics.median(itertools.chain(*times)) for times in (alone, beside))
    return (
        f"{count:3} {name:20}{before:9.3f}{after:9.3f}{statistics.median(ratios):8.2f}{max(map(max, beside)):9.3f}   "
        f"{left}, {last.threads - first.threads:+} threads, {last.files - first.files:+} files, "
        f"{last.megabytes - first.megabytes:+.1f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="a part of the name of the kinds to measure")
    parser.add_argument("--without_ray", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_without_ray(arguments.checkpoint)
        return
    with server(arguments.checkpoint, with_ray=not arguments.without_ray) as (port, process):
        short_seconds(port, 3)
        print(f"{'seconds':24}{'alone':>9}{'beside':>9}{'ratio':>8}{'longest':>9}   left")
        for behaviour in BEHAVIOURS:
            if arguments.only in behaviour[0]:
                print(measure(port, process, behaviour, arguments), flush=True)


if __name__ == "__main__":
    main()
