"""What ``ray up`` of cluster.onprem.yaml made of a head and two workers of hosts.py, and a bucket beside it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.tokenizer.kernels.cache import cache_root
from tests.support.hosts import LAPTOP, ROOT, Hosts, wait_until

BIN = ROOT / ".venv" / "bin"
S3_PORT = 5555
TUNNEL_PORT = 18265
MLFLOW_PORT = 15000
HEAD, WORKERS = "head", ("one", "two")
# Made anew each time: --working-dir takes this file along, and it must not be what is found.
SECRETS = {
    name: f"planted{secrets.token_hex(12)}"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
}


class Rented:
    """The laptop's view: files, commands, the tunnel."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.home = hosts.base / "laptop"
        (self.home / "tmp").mkdir(parents=True)
        kept = {name: os.environ[name] for name in ("LANG", "TERM", "SHELL") if name in os.environ}
        self.environment = {
            **kept,
            "HOME": str(self.home),
            "TMPDIR": str(self.home / "tmp"),
            "RAY_TMPDIR": str(self.home / "tmp"),
            "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{TUNNEL_PORT}",
        }
        self.file = self.home / "cluster.onprem.yaml"
        self.bucket: Any = None  # boto3's client
        self._tunnel: subprocess.Popen[bytes] | None = None
        self._prepare()

    def _prepare(self) -> None:
        self.command("make", "cluster-files", f"VENV={ROOT / '.venv'}")
        settings = {
            **SECRETS,
            "GPT25_HOME": "s3://gpt25/home",
            "AWS_ENDPOINT_URL": f"http://{LAPTOP}:{S3_PORT}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_USERNAME": "somebody",
            "GPT25_KERNEL_CACHE": str(cache_root()),  # kernels that this machine has compiled before
        }
        lines = "".join(f"{name}={value}\n" for name, value in settings.items())
        (self.home / ".gpt-2.5.env").write_text(lines)
        config = filled_in(self.hosts)
        config["file_mounts"]["~/gpt-2.5-node/cluster.yaml"] = str(self.file)
        self.file.write_text(yaml.safe_dump(config))

    @property
    def token(self) -> str:
        return (self.home / ".ray/auth_token").read_text().strip()

    def command(self, *words: str, seconds: float = 600, check: bool = True) -> str:
        """Output of a command on the laptop, run in the project."""
        result = subprocess.run(
            words,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert result.returncode == 0 or not check, f"{words}: {result.returncode}\n{result.stdout[-6000:]}"
        return result.stdout

    def up(self) -> str:
        return self.command("ray", "up", "-y", "--no-config-cache", str(self.file))

    def open_tunnel(self) -> None:
        """What ``ray dashboard`` does for a user."""
        self.close_tunnel()
        self._tunnel = subprocess.Popen(
            ["ray", "dashboard", f"--port={TUNNEL_PORT}", str(self.file)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda: self.nodes() is not None, 90, "the tunnel does not lead to the dashboard")

    @contextlib.contextmanager
    def mlflow(self) -> Iterator[str]:
        """The address of the head's MLflow on the laptop, as ``ray attach -p 5000`` leads there."""
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes"]
        forward = f"{MLFLOW_PORT}:localhost:5000"
        target = f"root@{self.hosts[HEAD].address}"
        words = ["ssh", "-N", "-i", str(self.hosts.key), *options, "-L", forward, target]
        tunnel = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: listens("127.0.0.1", MLFLOW_PORT), 30, "no tunnel to MLflow")
            yield f"http://localhost:{MLFLOW_PORT}"
        finally:
            tunnel.kill()
            tunnel.wait(30)

    def close_tunnel(self) -> None:
        if self._tunnel is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._tunnel.pid, signal.SIGTERM)
            self._tunnel.wait(30)
            self._tunnel = None

    def page(self, path: str) -> bytes:
        """What the dashboard's API says to whoever has the token."""
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"http://127.0.0.1:{TUNNEL_PORT}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            return error.read()

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """Rows of Ray's state API: nodes, tasks, actors."""
        answer = json.loads(self.page(f"/api/v0/{kind}?limit=10000&detail=1"))
        return list(answer["data"]["result"]["result"])

    def nodes(self) -> dict[str, str] | None:
        """Node id -> address of the nodes that are alive; None where nothing answers."""
        try:
            rows = self.listed("nodes")
        except (OSError, ValueError):
            return None
        return {row["node_id"]: row["node_ip"] for row in rows if row["state"] == "ALIVE"}

    def await_nodes(self, count: int, seconds: float = 300) -> float:
        return wait_until(lambda: len(self.nodes() or ()) == count, seconds, f"not {count} nodes: {self.nodes()}")

    def addresses(self, kind: str, name: str) -> set[str]:
        """Where tasks or actors whose name holds ``name`` ran."""
        names = {row["node_id"]: row["node_ip"] for row in self.listed("nodes")}
        return {
            names[row["node_id"]]
            for row in self.listed(kind)
            if name in f"{row.get('name')} {row.get('class_name')}" and row.get("node_id")
        }

    def start(self, job: str, *flags: str, preset: str) -> subprocess.Popen[str]:
        """The README's command, under way."""
        words = ["ray", "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", "--config", preset]
        return subprocess.Popen(
            [*words, *flags],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def submit(self, job: str, *flags: str, preset: str) -> str:
        return finish(self.start(job, *flags, preset=preset))


def finish(job: subprocess.Popen[str], seconds: float = 900) -> str:
    """The log of a job that must go well."""
    try:
        log, _ = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        log, _ = job.communicate()
        raise AssertionError(f"not done after {seconds} s\n{log[-6000:]}") from None
    assert job.returncode == 0, log[-8000:]
    return log


def filled_in(hosts: Hosts) -> dict[str, Any]:
    """cluster.onprem.yaml with the test's addresses. What installs packages gives way to what is installed already."""
    config = yaml.safe_load((ROOT / "cluster.onprem.yaml").read_text())
    config["cluster_name"] = hosts.bridge
    config["provider"]["head_ip"] = hosts[HEAD].address
    config["provider"]["worker_ips"] = [hosts[name].address for name in WORKERS]
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    installs = [command for command in config["setup_commands"] if "apt-get" in command or "venv/" in command]
    assert len(installs) == 3, installs
    kept = [command for command in config["setup_commands"] if command not in installs]
    config["setup_commands"] = [f"ln -sfn {ROOT / '.venv'} ~/gpt-2.5-node/venv", *kept]
    return dict(config)


def listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(3)
        return probe.connect_ex((address, port)) == 0


@contextlib.contextmanager
def bucket() -> Iterator[Any]:
    """moto's S3 on the bridge, with the bucket gpt25; yields boto3's client."""
    import boto3

    code = f"from moto.server import main; main(['-H', '{LAPTOP}', '-p', '{S3_PORT}'])"
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{LAPTOP}:{S3_PORT}",
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    try:
        wait_until(lambda: listens(LAPTOP, S3_PORT), 60, "moto did not start")
        client.create_bucket(Bucket="gpt25")
        yield client
    finally:
        client.close()
        server.kill()
        server.wait(30)
