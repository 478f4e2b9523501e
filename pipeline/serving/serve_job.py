"""Serve a model over HTTP: Ray Serve runs replicas of the web application, each with its own network.

With the default address, loopback, only this machine can connect. Any other address needs an access token, which is
read from GPT25_SERVE_TOKEN and leaves this process as a hash only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cluster import ray_cluster
from pipeline.config.inference import ServeConfig
from pipeline.errors import UserError
from pipeline.pretrained.resolve import read_tokenizer, resolve_checkpoint

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "GPT25_SERVE_TOKEN"
_APPLICATION = "gpt-2.5"
_START_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens."""

    url: str
    model_name: str
    has_token: bool


def start(config: ServeConfig) -> Address:
    """Start the server and return when it answers; it runs until ``stop``.

    Raises:
        UserError: no such model, a port that is taken, an open address without a token, too few CPUs or GPUs.
    """
    path = resolve_checkpoint(config.checkpoint)
    read_tokenizer(path)  # a broken one is reported here and not by a replica
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not config.is_local and not token:
        raise UserError(
            f"host {config.host} lets other machines in; set {TOKEN_VARIABLE} to a token that they have to send, or "
            "leave --host out"
        )
    port = _free_port(config)
    name = config.model_name or Path(config.checkpoint.rstrip("/")).name or "model"
    token_sha256 = hashlib.sha256(token.encode()).hexdigest() if token else None
    ray_cluster.connect(num_cpus=max(config.num_replicas, os.cpu_count() or 1))
    _run(replace(config, checkpoint=str(path), model_name=name), token_sha256, port)
    shown_host = f"[{config.host}]" if ":" in config.host else config.host
    return Address(url=f"http://{shown_host}:{port}", model_name=name, has_token=bool(token))


def stop() -> None:
    """End the server, and Ray where it was started here."""
    from ray import serve

    serve.shutdown()
    ray_cluster.shut_down()


def wait() -> None:
    """Wait until this process gets SIGINT or SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


def _run(config: ServeConfig, token_sha256: str | None, port: int) -> None:
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    use_gpu = config.device != "cpu" and int(ray.cluster_resources().get("GPU", 0)) >= config.num_replicas
    if config.device == "cuda" and not use_gpu:
        raise UserError("--device cuda was asked for, but the cluster has too few GPUs; use --device cpu or auto")
    ray_cluster.require(num_workers=config.num_replicas, gpus=use_gpu)

    def build() -> Any:  # runs in the replica
        return _WithoutCancelledReads(build_app(config, token_sha256))

    deployment = serve.deployment(
        name="completions",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(use_gpu)},
        max_ongoing_requests=config.max_waiting + 64,  # so that the application itself says when it is full
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(serve.ingress(build)(Replica))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # hides its progress messages in this process
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=config.host, port=port),
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    serve.run(deployment.bind(), name=_APPLICATION, route_prefix="/")


class _WithoutCancelledReads:
    """Turns the error that Ray Serve raises for a client that leaves early into a disconnect, as ASGI has it."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.state = app.state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from ray.exceptions import TaskCancelledError

        async def read() -> Any:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, read if scope["type"] == "http" else receive, send)


class Replica:
    """The class that Ray Serve starts; the web application answers its requests."""

    def check_health(self) -> None:
        """Ray Serve replaces the replica where this raises."""
        self.app.state.engine.check()  # type: ignore[attr-defined]  # Ray Serve's wrapper has it


def build_app(config: ServeConfig, token_sha256: str | None) -> Any:
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

    device = init_distributed(config.device).device
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.num_replicas))
    pretrained = open_model(Path(config.checkpoint), device)
    length = pretrained.config.context_length
    batch = Batch(Decoder(pretrained.model, dtype=compute_dtype(config.dtype, device)), max_texts=config.max_batch_size)
    engine = Engine(batch, pretrained.tokenizer)
    limits = Limits(
        model_name=str(config.model_name),
        vocab_size=pretrained.tokenizer.vocab_size,
        max_prompt_tokens=min(config.max_prompt_tokens or length, length),
        max_tokens=config.max_tokens,
        max_texts=config.max_texts,
    )
    app = WebApp(engine, pretrained.tokenizer, limits, config, token_sha256=token_sha256).app
    app.state.engine = engine
    return app


def _free_port(config: ServeConfig) -> int:
    """The configured port, or a free one for 0; UserError where it is taken."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another --port"
            ) from error
        return int(probe.getsockname()[1])
