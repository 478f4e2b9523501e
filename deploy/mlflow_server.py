"""The MLflow server of a cluster's head: ``python mlflow_server.py start``, and ``watch``, which start leaves behind.

It listens on the head's address in the cluster and, for tunnels, on loopback; it answers to these names only. It ends a
minute after Ray's GCS has ended, so that ``ray down`` leaves nothing and a second ``ray up``, which restarts Ray, does
not disturb it.

Runs are kept in sqlite below ~/gpt-2.5-mlflow, or in the database that MLFLOW_BACKEND_STORE_URI names. Where GPT25_HOME
is a bucket, artifacts lie there, and so does a copy of the sqlite file, at most two minutes old: a new head goes on
with it. The file needs nothing of the project, only the packages of requirements.lock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PORT = 5000
GCS_PORT = 6379
START_SECONDS = 180
GRACE_SECONDS = 60
COPY_EVERY_SECONDS = 120
FOLDER = Path.home() / "gpt-2.5-mlflow"
DATABASE = FOLDER / "mlflow.db"
COPY_NAME = "mlflow/mlflow.db"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["start", "watch"])
    parser.add_argument("--host", default=os.environ.get("RAY_HEAD_IP"), help="the head's address in the cluster")
    arguments = parser.parse_args()
    if os.environ.get("GPT25_OWN_MLFLOW"):
        print("MLFLOW_TRACKING_URI is set in ~/.gpt-2.5.env: no MLflow server is started here")
        return
    if not arguments.host:
        sys.exit("error: no --host and no RAY_HEAD_IP; source network.sh first")
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    (start if arguments.action == "start" else watch)(arguments.host)


def start(host: str) -> None:
    """Leave a watcher behind, unless one is there, and wait until the server answers."""
    if not answers(host):
        with (FOLDER / "server.log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, __file__, "watch", f"--host={host}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the shell of `ray up` ends, this goes on
            )
    deadline = time.monotonic() + START_SECONDS
    while not answers(host):
        if time.monotonic() > deadline:
            sys.exit(f"error: MLflow does not answer on {host}:{PORT}; read {FOLDER / 'server.log'}")
        time.sleep(1)
    print(f"MLflow answers on http://{host}:{PORT}")


def watch(host: str) -> None:
    """Run the server as long as Ray's GCS runs on this node; started again where it dies."""
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another watcher is at work
        restore()
        threading.Thread(target=lambda: asyncio.run(forward(host)), daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        server = serve(host)
        try:
            last_seen = last_copy = time.monotonic()
            while time.monotonic() - last_seen < GRACE_SECONDS:
                time.sleep(2)
                if listens(host, GCS_PORT):
                    last_seen = time.monotonic()
                if server.poll() is not None:
                    print(f"MLflow ended with {server.returncode}; starting it again", flush=True)
                    server = serve(host)
                if time.monotonic() - last_copy > COPY_EVERY_SECONDS:
                    last_copy = time.monotonic()
                    copy()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
            copy()


def serve(host: str) -> subprocess.Popen[bytes]:
    """The server process. The database's address may hold a password: it goes by environment, not by argument."""
    bucket = bucket_url()
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": os.environ.get("MLFLOW_BACKEND_STORE_URI") or f"sqlite:///{DATABASE}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes fewer
    }
    environment.pop("MLFLOW_TRACKING_URI", None)  # the server would ask itself
    command = [
        str(Path(sys.executable).with_name("mlflow")),
        "server",
        f"--host={host}",
        f"--port={PORT}",
        "--workers=1",
        f"--artifacts-destination={f'{bucket}/mlflow/artifacts' if bucket else FOLDER / 'artifacts'}",
        # whoever comes through a tunnel says localhost; any other name is a page in a browser that pretends
        f"--allowed-hosts={host},{host}:{PORT},localhost:*,127.0.0.1:*",
        f"--cors-allowed-origins=http://localhost:{PORT}",
    ]
    return subprocess.Popen(command, env=environment, cwd=FOLDER, start_new_session=True)


async def forward(host: str) -> None:
    """``ray attach -p 5000`` leads to the head's loopback: pass on from there."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(host, PORT)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, server_writer), pump(server_reader, writer))

    async with await asyncio.start_server(connect, "127.0.0.1", PORT) as server:
        await server.serve_forever()


def answers(host: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{host}:{PORT}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((host, port)) == 0


def bucket_url() -> str | None:
    """GPT25_HOME, where it is a bucket."""
    home = os.environ.get("GPT25_HOME", "").rstrip("/")
    return home if "://" in home else None


def kept_here() -> bool:
    return not os.environ.get("MLFLOW_BACKEND_STORE_URI")


def restore() -> None:
    """On a new head: the bucket's copy of the database."""
    bucket = bucket_url()
    if bucket is None or not kept_here() or DATABASE.exists():
        return
    import obstore
    from obstore.store import from_url

    with contextlib.suppress(FileNotFoundError):
        content = obstore.get(from_url(bucket, **options()), COPY_NAME).bytes().to_bytes()
        partial = DATABASE.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(DATABASE)
        print(f"went on with {bucket}/{COPY_NAME}", flush=True)


def copy() -> None:
    """A consistent copy of the database into the bucket, where it has changed since the last one."""
    bucket = bucket_url()
    if bucket is None or not kept_here() or not DATABASE.exists():
        return
    import obstore
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    snapshot = FOLDER / "snapshot.db"
    snapshot.unlink(missing_ok=True)
    source, target = sqlite3.connect(DATABASE), sqlite3.connect(snapshot)
    with contextlib.closing(source), contextlib.closing(target):
        source.backup(target)
    content, last = snapshot.read_bytes(), FOLDER / "copied.db"
    if last.exists() and last.read_bytes() == content:
        return
    try:
        obstore.put(from_url(bucket, **options()), COPY_NAME, content)
    except BaseError as error:
        print(f"the copy of the database did not reach {bucket}: {error}", flush=True)
        return
    snapshot.replace(last)


def options() -> dict[str, Any]:
    """http:// is allowed where the environment names a store of that kind."""
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return {"client_options": {"allow_http": plain}}


if __name__ == "__main__":
    main()
