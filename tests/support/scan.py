"""What answers at an address: ``python scan.py ADDRESS... [--ports=22,80]`` prints {address: {port: answer}} as JSON.

Every TCP port is tried, or those given. One that takes connections is asked over HTTP, then over gRPC, by calls of
Ray's services that change nothing; no token is sent.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys

import grpc

CALLS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.LogService/ListLogs",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.RayletDriver/ClusterInfo",
)


def takes_connections(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(3)
        return probe.connect_ex((address, port)) == 0


def ask(address: str, port: int) -> str:
    """What came back without a token."""
    try:
        connection = http.client.HTTPConnection(address, port, timeout=5)
        connection.request("GET", "/metrics" if port not in (5000, 8265) else "/")
        answer = connection.getresponse()
        return f"http {answer.status} {answer.read(60)!r}"
    except (OSError, http.client.HTTPException) as error:
        said = repr(error)
        if "SSH" in said:
            return "ssh"
    codes = [grpc_code(address, port, call) for call in CALLS]
    return "grpc " + " ".join(
        f"{call.rpartition('.')[2]}={code}" for call, code in zip(CALLS, codes, strict=True) if code != "UNIMPLEMENTED"
    )


def grpc_code(address: str, port: int, call: str) -> str:
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        try:
            answer = channel.unary_unary(call)(b"", timeout=5)
            return f"OK({len(answer)} bytes)"
        except grpc.RpcError as error:
            return str(error.code().name)


def main() -> None:
    named = [word for word in sys.argv[1:] if word.startswith("--ports=")]
    tried = [int(port) for word in named for port in word.removeprefix("--ports=").split(",")] or range(1, 65536)
    addresses = [word for word in sys.argv[1:] if not word.startswith("--")]
    found = {
        address: {port: ask(address, port) for port in tried if takes_connections(address, port)}
        for address in addresses
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
