"""The store by which the workers of a group find each other, on one address of rank 0's node.

torch's own TCPStore server listens on every network of its machine and asks nobody who they are. This one listens on
the address that Ray uses: 127.0.0.1 for a local run, the private address of the node on a cluster.
"""

from __future__ import annotations

import os
import socket

import psutil
import torch.distributed as dist

_HELD: list[dist.TCPStore] = []  # the server ends with the last reference to its store


def serve(address: str) -> int:
    """Start the store's server in this process, rank 0; returns its port.

    Args:
        address: an IP address of this machine, the only one that the server listens on.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )
    _HELD[:] = [store]
    return port


def set_environment(address: str, port: int) -> None:
    """Let ``init_process_group("env://")`` of this process connect to the store, and gloo to the same network."""
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # a server runs already: rank 0 is to start none
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if name := _loopback_interface(address):
        os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def _loopback_interface(address: str) -> str:
    """Name of the network interface with this address if it is the loopback one, else an empty string."""
    if address not in ("127.0.0.1", "::1"):
        return ""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if any(entry.address == address for entry in entries)), "")
