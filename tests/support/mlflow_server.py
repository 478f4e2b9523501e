"""A real MLflow server on loopback, for the tests that need one."""

from __future__ import annotations

import base64
import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve(store: str, artifacts: Path, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of a server on ``store`` (a sqlite URI), stopped at the end."""
    url = f"http://127.0.0.1:{port or free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", url.rsplit(":", 1)[1]]
    command += ["--workers", "1", "--backend-store-uri", store]
    command += ["--artifacts-destination", str(artifacts)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until_healthy(url, process)
        yield url, process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server ended by itself"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start")


@contextlib.contextmanager
def behind_proxy(server: str, prefix: str, user: str, password: str) -> Iterator[str]:
    """Address of a proxy that passes ``prefix``/... on to ``server`` for whoever gives the password."""
    expected = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != expected:
                self.answer(401, b"who are you?", {"WWW-Authenticate": "Basic"})
            elif not self.path.startswith(f"{prefix}/"):
                self.answer(404, b"<html>nothing here</html>", {})
            else:
                self.answer(*self.passed_on(body))

        def do_POST(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def do_PATCH(self) -> None:
            self.do_GET()

        def do_DELETE(self) -> None:
            self.do_GET()

        def passed_on(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
            kept = {name: value for name, value in self.headers.items() if name in ("Content-Type", "Accept")}
            address = server + self.path.removeprefix(prefix)
            request = urllib.request.Request(address, data=body or None, headers=kept, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    return response.status, response.read(), {"Content-Type": response.headers.get("Content-Type", "")}
            except urllib.error.HTTPError as error:
                return error.code, error.read(), {"Content-Type": error.headers.get("Content-Type", "")}

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *values: object) -> None:
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()
