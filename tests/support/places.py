"""Remote places on this machine, one interface over them: the fake hub, a plain HTTP server, moto's S3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.remote import files as remote_files
from pipeline.remote.remote_file import RemoteFile
from tests.support import s3_server
from tests.support.fake_hub import NAME, FakeHub, running_hub
from tests.support.file_server import FileServer, Traffic, running_files
from tests.support.s3_server import S3


@dataclass(frozen=True, kw_only=True)
class Place:
    """Somewhere to put files and to make trouble."""

    kind: str
    server: Any
    files: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str, content: bytes) -> RemoteFile:
        """A file as a listing shows it."""
        self.files[name] = content
        if isinstance(self.server, S3):
            self.server.put(name, content)
            source = f"{self.server.url}/{name}"
        elif isinstance(self.server, FakeHub):
            self.server.push(self.server.branch, self.files)
            source = f"hf://datasets/{NAME}/{name}"
        else:
            self.server.files = self.files
            source = f"{self.server.url}/{name}"
        _, (file,) = remote_files.list_files(source)
        self.forget()
        return file

    @property
    def traffic(self) -> Traffic:
        """Of hub and HTTP server."""
        traffic: Traffic = self.server.traffic
        return traffic

    def fail(self, *, times: int = 1, **values: Any) -> None:
        """``status`` with ``headers``, or ``cut_after`` bytes of the body; HTTP and hub take all of Fault's fields."""
        if not isinstance(self.server, S3):
            return self.traffic.fail(times=times, **values)
        if "status" in values:
            headers = tuple(values.get("headers", {}).items())
            return self.server.fail(s3_server.Fault(status=values["status"], headers=headers), times=times)
        fault = s3_server.Fault(method="GET", forward=True, cut_after=values["cut_after"])
        return self.server.fail(fault, times=times)

    def forget(self) -> None:
        """No faults, no requests seen."""
        if isinstance(self.server, S3):
            self.server.proxy.forget()
        else:
            self.traffic.forget()


@contextlib.contextmanager
def hub_place() -> Iterator[Place]:
    with running_hub({}) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        yield Place(kind="hub", server=hub)


@contextlib.contextmanager
def http_place() -> Iterator[Place]:
    server: FileServer
    with running_files({}) as server:
        yield Place(kind="http", server=server)


@contextlib.contextmanager
def make_place(kind: str, request: pytest.FixtureRequest) -> Iterator[Place]:
    """The place of a kind: hub, http or s3."""
    if kind == "s3":
        yield Place(kind="s3", server=request.getfixturevalue("s3"))
        return
    with hub_place() if kind == "hub" else http_place() as place:
        yield place
