"""Machines of our own making: network, pid, mount and uts namespaces with sshd in them, on a bridge of their own.

Each has an address, a home, /tmp and /dev/shm of its own, sees its own processes only, and can be switched off like a
machine: its namespaces go, and everything in them. The rest of the file system is this machine's, so an installed
Python is there already. Needs root, sshd, ssh, rsync and iproute2; names and addresses are removed by ``close``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
LAPTOP = f"{NETWORK}.254"  # this machine's own address on the bridge
PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter")

_START = """
set -e
mount --make-rprivate /
hostname {name}
mount --bind {base}/passwd /etc/passwd
mount --bind {base}/hosts /etc/hosts
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
mount -t tmpfs -o size=64m tmpfs /run
mkdir -p /run/sshd
mkdir -p {base}/tmp
chmod 1777 {base}/tmp
{keep_checkout}
touch {base}/up
/usr/sbin/sshd -D -e -f {base}/sshd_config &
mount --rbind {base}/tmp /tmp
while true; do wait -n || sleep 1; done
"""

_SSHD = """
Port 22
ListenAddress {address}
HostKey {base}/host_key
AuthorizedKeysFile {key}.pub
PidFile none
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
"""


def _keep_checkout(base: Path) -> str:
    """What lets a machine, whose /tmp is its own, see a checkout that lies in /tmp."""
    inside = f"{base}{ROOT}"
    return f"mkdir -p {inside} && mount --bind {ROOT} {inside}" if ROOT.is_relative_to("/tmp") else "true"


class Host:
    """One machine; running from the time it is made until ``switch_off``."""

    def __init__(self, name: str, address: str, base: Path, key: Path, bridge: str) -> None:
        self.name, self.address, self.base, self._bridge, self._key = name, address, base, bridge, key
        self.namespace = f"{bridge}-{name}"
        self.home = base / "home"
        self.is_on = True
        if not self.home.exists():
            self._write_files()
        (base / "up").unlink(missing_ok=True)
        self._join()
        command = ["ip", "netns", "exec", self.namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        start = _START.format(name=name, base=base, keep_checkout=_keep_checkout(base))
        with (base / "host.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--mount", "--uts", "--ipc", "bash", "-c", start],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until((base / "up").exists, 30, f"{name} did not start: {base / 'host.log'}")
        self._init = int(
            Path(f"/proc/{self._unshare_pid()}/task/{self._unshare_pid()}/children").read_text().split()[0]
        )

    def _unshare_pid(self) -> int:
        return self._process.pid  # `ip netns exec` becomes unshare, whose only child is the namespace's first process

    def _write_files(self) -> None:
        self.home.mkdir(parents=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.base / "host_key")])
        config = _SSHD.format(address=self.address, base=self.base, key=self._key)
        (self.base / "sshd_config").write_text(config)
        entries = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
        root = f"root:x:0:0:root:{self.home}:/bin/bash"
        (self.base / "passwd").write_text("\n".join([root, *entries]) + "\n")
        (self.base / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")  # as Debian writes it

    def _join(self) -> None:
        link = f"{self._bridge}-{self.address.rpartition('.')[2]}"
        run(["ip", "netns", "add", self.namespace])
        run(["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace])
        run(["ip", "link", "set", link, "master", self._bridge, "up"])
        run(["ip", "-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0"])
        run(["ip", "-n", self.namespace, "link", "set", "lo", "up"])
        run(["ip", "-n", self.namespace, "link", "set", "eth0", "up"])

    def run(self, command: str, *, check: bool = True, seconds: float = 120) -> str:
        """A login shell's output on this machine."""
        enter = ["nsenter", f"--target={self._init}", "--all", "env", "-i", f"HOME={self.home}", "TERM=dumb"]
        return run([*enter, "bash", "--login", "-i", "-c", command], check=check, seconds=seconds)

    def processes(self) -> list[str]:
        """Command lines of everything that runs here, but for the first process, sshd and this question itself."""
        lines = self.run("ps -eo args --no-headers").splitlines()
        own = ("bash ", "ps ", "sleep ", "/usr/sbin/sshd", "sshd:")
        return [line.strip() for line in lines if not line.strip().startswith(own)]

    def listening(self) -> dict[int, str]:
        """Port -> program and addresses of the TCP sockets that listen, sshd's left out."""
        found: dict[int, list[str]] = {}
        for line in sorted(self.run("ss -Hltnp").splitlines()):
            address, _, port = line.split()[3].rpartition(":")
            program = line.partition('(("')[2].partition('"')[0]
            if program != "sshd":
                found.setdefault(int(port), [program]).append(address)
        return {port: " ".join(words) for port, words in found.items()}

    def switch_off(self) -> None:
        """As if its power were cut: no process of it says goodbye, and nobody answers at its address."""
        self.is_on = False
        subprocess.run(["ip", "-n", self.namespace, "link", "set", "eth0", "down"], check=False, capture_output=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)  # the kernel kills all others of the pid namespace
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False, capture_output=True)


class Hosts:
    """The machines of one test, the bridge between them, and the laptop that steers them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="hosts-", dir="/var/tmp"))
        self.bridge = f"g{uuid.uuid4().hex[:5]}"
        self.key = self.base / "key"
        self.hosts: dict[str, Host] = {}
        try:
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)])
            run(["ip", "link", "add", self.bridge, "type", "bridge"])
            run(["ip", "addr", "add", f"{LAPTOP}/24", "dev", self.bridge])
            run(["ip", "link", "set", self.bridge, "up"])
            for number, name in enumerate(names, start=1):
                address = f"{NETWORK}.{number}"
                self.hosts[name] = Host(name, address, self.base / name, self.key, self.bridge)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def switch_on(self, name: str) -> None:
        """Power again for a machine that was switched off; its disk is as it was."""
        old = self.hosts[name]
        self.hosts[name] = Host(name, old.address, old.base, self.key, self.bridge)

    def close(self) -> None:
        for host in self.hosts.values():
            host.switch_off()
        for namespace in run(["ip", "netns", "list"]).split():
            if namespace.startswith(f"{self.bridge}-"):
                subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, capture_output=True)
        shutil.rmtree(self.base, ignore_errors=True)


@contextlib.contextmanager
def running_hosts(names: Sequence[str]) -> Iterator[Hosts]:
    hosts = Hosts(names)
    try:
        yield hosts
    finally:
        hosts.close()


def missing_programs() -> list[str]:
    """What a machine lacks for this."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def run(command: Sequence[str], *, check: bool = True, seconds: float = 120) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(command)}: {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result.stdout


def wait_until(condition: Callable[[], object], seconds: float, message: str) -> float:
    """Seconds until ``condition()`` held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, message
        time.sleep(0.5)
    return time.monotonic() - start
