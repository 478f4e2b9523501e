"""The web server in front: uvicorn in a thread, whose connections are bounded in size, time and number.

A client that sends its request slowly, or does not read its answer, loses its connection. Where there are too many
connections, the oldest that has not sent its whole request gives way to a new one, so that nobody is kept out by them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import threading
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.config.inference import ServeConfig
from pipeline.errors import UserError

_HEAD_BYTES = 32 * 1024
_SPARE_SECONDS = 5.0  # from the deadline of a request, which is answered with a sentence, to the end of its connection
_END_SECONDS = 5
_BACKLOG = 128
_SEND_BYTES = 64 * 1024


class WebServer:
    """Serves an ASGI application from ``start`` to ``stop``, at an address that is taken at once.

    Raises:
        UserError: the address cannot be listened on.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._socket = _bound_socket(config.host, config.port)
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, app: Any) -> None:
        """Answer from now on; UserError where another program took the port meanwhile."""
        settings = uvicorn.Config(
            app,
            http=functools.partial(BoundedProtocol, limits=self._config),  # type: ignore[arg-type]  # a class, to uvicorn
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            timeout_graceful_shutdown=_END_SECONDS,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a warning for each faulty request
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="web-server", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise UserError(f"cannot listen on {self._config.host} port {self.port}; choose another --port")
            time.sleep(0.01)

    def stop(self) -> None:
        """End after the requests that are being answered, or after some seconds."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(2 * _END_SECONDS)
        self._socket.close()


class BoundedProtocol(H11Protocol):
    """uvicorn's connection, which ends where its client takes too long.

    uvicorn itself bounds the bytes of a request's head and the time between two requests, and no more.
    """

    def __init__(self, *values: Any, limits: ServeConfig, **settings: Any) -> None:
        super().__init__(*values, **settings)
        self._limits = limits
        self._end: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._timed: Any = None  # the request that has a deadline
        self.since = self.loop.time()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._end_after(self._limits.head_seconds)
        connections: list[Any] = [other for other in self.connections if not other.transport.is_closing()]
        if len(connections) > self._limits.max_connections:
            min(
                (other for other in connections if other.is_unfinished), key=lambda other: other.since
            ).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._end, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    @property
    def is_unfinished(self) -> bool:
        """Whether no request is being answered that has arrived as a whole."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and self.cycle is not self._timed and not self.cycle.response_complete:
            self._timed = self.cycle
            self._end_after(self._limits.request_seconds + _SPARE_SECONDS)

    def on_response_complete(self) -> None:
        self._end_after(self._limits.head_seconds)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.head_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def _end_after(self, seconds: float) -> None:
        if self._end is not None:
            self._end.cancel()
        self._end = self.loop.call_later(seconds, self.transport.abort)


def _bound_socket(host: str, port: int) -> socket.socket:
    """A socket at the address, a free port for 0, that does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections get it, too: else the kernel keeps up to 4 MB for each client that does not read.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from error
    return found
