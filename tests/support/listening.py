"""Which addresses the processes of a job listen on."""

from __future__ import annotations

import contextlib
from ipaddress import IPv6Address, ip_address

import psutil


def listening(pid: int) -> dict[str, list[str]]:
    """Address -> the commands that listen there for TCP connections: the process and all its descendants."""
    found: dict[str, list[str]] = {}
    parent = psutil.Process(pid)
    for process in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())[:200]
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(connection.laddr.ip, []).append(f"{connection.laddr.port} {command}")
    return found


def is_loopback(address: str) -> bool:
    """Whether only this machine can connect to the address; an IPv4 one may be written as an IPv6 one."""
    ip = ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return (mapped or ip).is_loopback


def beyond_loopback(pid: int) -> dict[str, list[str]]:
    """What others than this machine can connect to; empty if nothing."""
    return {address: commands for address, commands in listening(pid).items() if not is_loopback(address)}
