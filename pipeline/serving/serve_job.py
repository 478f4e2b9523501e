"""Serve a model over HTTP: a web server of our own in front, Ray Serve behind it, which runs replicas of the network.

Ray Serve's own web server bounds neither size nor time of a request's head, so it is not started: this process
listens, and hands complete, permitted requests to the replicas. With the default address, loopback, only this machine
can connect. Any other address needs an access token, which is read from GPT25_SERVE_TOKEN and stays in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import exit_signals
from pipeline.cluster import ray_cluster
from pipeline.config.inference import ServeConfig
from pipeline.errors import UserError
from pipeline.pretrained import weights
from pipeline.pretrained.chat import known_chat
from pipeline.pretrained.resolve import read_tokenizer, resolve_checkpoint

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "GPT25_SERVE_TOKEN"
_APPLICATION = "gpt-2.5"
_ROUTING = {
    # All requests pass this process, which so knows the replicas' queues. A busy replica is late with an answer about
    # its own, and Ray Serve would ask again and again, every 10 seconds and within 0.1 seconds at first.
    "RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": "1e9",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
}


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens."""

    url: str
    model_name: str
    has_token: bool
    has_chat: bool
    """Whether the model has a chat template."""


@contextlib.contextmanager
def serving(config: ServeConfig) -> Iterator[Address]:
    """A server that answers as long as the block runs; Ray ends with it where it was started here.

    Raises:
        UserError: no such model, weights that are not finite, a port that is taken, an open address without a token,
            a token that is too short, too few CPUs or GPUs.
    """
    from pipeline.serving.gate import Gate
    from pipeline.serving.web_server import WebServer

    token_sha256 = _take_token(config)
    path = resolve_checkpoint(config.checkpoint)
    chat = known_chat(path, read_tokenizer(path))  # what is broken is reported here and not by a replica
    _require_finite(path)
    name = config.model_name or Path(config.checkpoint.rstrip("/")).name or "model"
    with contextlib.ExitStack() as running:
        server = WebServer(config)  # a port that is taken is reported before anything starts
        running.callback(server.stop)
        ray_cluster.connect(num_cpus=max(config.num_replicas, os.cpu_count() or 1))
        running.callback(_shut_down)
        replicas = _start_replicas(replace(config, checkpoint=str(path), model_name=name))
        server.start(Gate(replicas, config, token_sha256=token_sha256))
        running.callback(server.stop)  # before the replicas go
        shown_host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{shown_host}:{server.port}"
        yield Address(url=url, model_name=name, has_token=token_sha256 is not None, has_chat=chat is not None)


def wait() -> None:
    """Wait until this process gets SIGINT or SIGTERM; a second one, a second later or more, ends it at once."""
    ended = threading.Event()
    since = 0.0

    def end(number: int, _: FrameType | None) -> None:
        nonlocal since
        if ended.is_set() and time.monotonic() - since > exit_signals.SAME_SECONDS:
            exit_signals.end(number, "ended at once")
        since = since or time.monotonic()
        ended.set()

    exit_signals.hand_over()
    for number in exit_signals.NUMBERS:
        signal.signal(number, end)
    ended.wait()


def _take_token(config: ServeConfig) -> str | None:
    """The hash of the access token, which is taken out of the environment that replicas would inherit."""
    from pipeline.serving.gate import token_hash

    token = os.environ.pop(TOKEN_VARIABLE, "")
    if token:
        return token_hash(token, TOKEN_VARIABLE)
    if not config.is_local:
        raise UserError(
            f"host {config.host} lets other machines in; set {TOKEN_VARIABLE} to a token that they have to send, or "
            "leave --host out"
        )
    return None


def _require_finite(path: Path) -> None:
    """UserError that names a tensor of the model that has a NaN or an infinity. One tensor is in memory at a time."""
    for name, tensor in weights.read_weights(path, weights.read_model_config(path)):
        if not tensor.isfinite().all():
            raise UserError(f"{path}: the weights in {name} are not all finite numbers; serve an earlier checkpoint")


def _start_replicas(config: ServeConfig) -> Replicas:
    os.environ.update({name: value for name, value in _ROUTING.items() if name not in os.environ})
    import ray
    from ray import serve  # reads the variables as it is imported

    use_gpu = config.device != "cpu" and int(ray.cluster_resources().get("GPU", 0)) >= config.num_replicas
    if config.device == "cuda" and not use_gpu:
        raise UserError("--device cuda was asked for, but the cluster has too few GPUs; use --device cpu or auto")
    ray_cluster.require(num_workers=config.num_replicas, gpus=use_gpu)
    deployment = serve.deployment(
        name="completions",
        num_replicas=config.num_replicas,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": int(use_gpu),
            # As urgent as the process that listens: Ray's niceness of 15 leaves it 1/29 of a CPU that others want.
            "runtime_env": {"env_vars": {"RAY_worker_niceness": "0"}},
        },
        # The gate says when all is full; here there is room for what it lets pass, and for other pages.
        max_ongoing_requests=config.max_waiting * config.num_replicas + 64,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(Replica)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # hides its progress messages in this process
    serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})
    return Replicas(serve.run(deployment.bind(config), name=_APPLICATION, route_prefix=None))


def _shut_down() -> None:
    """End the replicas, and Ray where it was started here."""
    from ray import serve
    from ray._private import worker

    # Calls to the controller that Serve ends are failures to Ray, which prints them to every driver.
    worker.print_to_stdstream = lambda *_, **__: None
    serve.shutdown()
    ray_cluster.shut_down()


class Replicas:
    """The replicas of a Ray Serve deployment as one ASGI application; Ray Serve chooses who answers."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle.options(stream=True)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from pipeline.serving.metrics import PROGRESS
        from pipeline.serving.openai_protocol import RequestError, error_response

        body = (await receive())["body"]
        names = ("type", "asgi", "http_version", "method", "path", "raw_path", "query_string", "root_path")
        headers = [(name, value) for name, value in scope["headers"] if name == b"content-type"]
        answers = self._handle.answer.remote({name: scope[name] for name in names} | {"headers": headers}, body)
        leaving = asyncio.create_task(_call_when_gone(receive, answers.cancel))
        has_begun = is_complete = False
        try:
            async for messages in answers:
                for message in messages:
                    if message["type"] == PROGRESS:
                        await send(message)
                        continue
                    has_begun = True
                    is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
                    if is_complete:
                        leaving.cancel()
                    await send(message)
        except (RayError, RayServeException) as error:
            if leaving.done():
                return  # the client is gone, and its request was cancelled
            logger.warning("a replica did not answer: %s", type(error).__name__)
            if not has_begun:
                gone = RequestError("the replica ended that was at work; send the request again", status=503)
                await error_response(gone)(scope, receive, send)
        finally:
            leaving.cancel()
            if not is_complete:
                answers.cancel()


async def _call_when_gone(receive: Any, cancel: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    cancel()


class Replica:
    """The class that Ray Serve starts: the web application in a process of its own, with its network."""

    def __init__(self, config: ServeConfig) -> None:
        _keep_port_to_node()
        self._app = build_app(config)

    def check_health(self) -> None:
        """Ray Serve replaces the replica where this raises."""
        self._app.state.engine.check()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[dict[str, Any]]]:
        """The application's messages to the web server, as many at a time as there are."""
        from pipeline.serving.metrics import Progress

        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        request: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not request:
                await asyncio.Event().wait()  # for ever: a client that leaves cancels this whole call
            return request.pop()

        async def run() -> None:
            progress = Progress(messages.put_nowait)
            try:
                await self._app({**scope, "progress": progress}, receive, messages.put)
            finally:
                progress.tell()
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            is_done = False
            while not is_done:
                together = [await messages.get()]
                while not messages.empty():
                    together.append(messages.get_nowait())
                is_done = together[-1] is None
                if known := [message for message in together if message is not None]:
                    yield known
            await task  # raises what the application raised
        finally:
            task.cancel()


def _keep_port_to_node() -> None:
    """Let the gRPC port that Ray Serve opens for this replica, after it was made, be at this node's address.

    Ray Serve 2.60 opens it at all addresses and has no setting for it; a local Ray's node is 127.0.0.1.
    """
    import ray
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    address = ray.util.get_node_ip_address()
    host = f"[{address}]" if ":" in address else address
    replica.add_port_to_grpc_server = lambda server, _: add_port(server, f"{host}:0")


def build_app(config: ServeConfig) -> Any:
    """The ASGI application of one replica, with its network loaded and its engine running.

    The checkpoint of ``config`` is the folder of the model, resolved.
    """
    import torch

    from model.batching import Batch
    from model.decoding import Decoder
    from pipeline.distributed.hardware import compute_dtype
    from pipeline.distributed.process_group import init_distributed
    from pipeline.pretrained.resolve import open_model
    from pipeline.serving.engine import Engine
    from pipeline.serving.http_app import WebApp
    from pipeline.serving.openai_protocol import Limits
    from pipeline.tokenizer import bpe

    bpe.warm_up()  # with the first prompt it would keep the replica from answering Ray Serve's health checks
    # oneDNN keeps code for the last 1,024 shapes of a product, up to 0.7 MB each; every length of a prompt is one.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    device = init_distributed(config.device).device
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.num_replicas))
    pretrained = open_model(Path(config.checkpoint), device)
    length = pretrained.config.context_length
    batch = Batch(Decoder(pretrained.model, dtype=compute_dtype(config.dtype, device)), max_texts=config.max_batch_size)
    engine = Engine(batch, pretrained.tokenizer)
    limits = Limits(
        model_name=str(config.model_name),
        vocab_size=pretrained.tokenizer.vocab_size,
        context_length=length,
        max_prompt_tokens=min(config.max_prompt_tokens or length, length),
        max_tokens=config.max_tokens,
        max_texts=config.max_texts,
    )
    chat = known_chat(Path(config.checkpoint), pretrained.tokenizer)
    app = WebApp(engine, pretrained.tokenizer, chat, limits, config).app
    app.state.engine = engine
    return app
