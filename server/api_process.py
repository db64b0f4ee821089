"""What an API process is made of, be it the only one or a worker."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.config import ServerConfig
from server.engine_protocol import EngineClient
from server.http_protocol import HttpProtocol
from server.http_server import HttpServer
from server.listening import LaunchError
from server.response_database import ResponseDatabaseError
from server.service import VERSION, Service
from server.tokenizer import Tokenizer, load_tokenizer
from server.tokenizer_spec import TokenizerError

if TYPE_CHECKING:
    from server.tracing import Traces

_log = logging.getLogger(__name__)


def traces_of(config: ServerConfig) -> Traces | None:
    """Where spans of requests go, if they are wanted. Whoever asks closes it."""
    if config.otlp_traces_endpoint is None:
        return None
    from server.tracing import OtlpTraces

    return OtlpTraces(config.otlp_traces_endpoint, VERSION)


async def load_application(
    config: ServerConfig, model_path: Path, engine: EngineClient, traces: Traces | None
) -> tuple[FastAPI, Tokenizer]:
    """The application of one API process, and its tokenizer.

    Raises:
        LaunchError: the tokenizer or the database of responses cannot be used.
    """
    try:
        tokenizer = await asyncio.get_running_loop().run_in_executor(None, load_tokenizer, model_path)
    except TokenizerError as error:
        raise LaunchError(str(error)) from None
    try:
        app = create_app(config, engine, tokenizer, traces)
    except ResponseDatabaseError as error:
        raise LaunchError(f"--responses-db: {error}") from None
    # What was loaded stays: the collector need not walk it again while tokens wait.
    gc.collect()
    gc.freeze()
    return app, tokenizer


def http_server(config: ServerConfig, app: FastAPI) -> HttpServer:
    """The server of an application, with the settings that its routes count on."""
    return HttpServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            http=functools.partial(HttpProtocol, doorman=getattr(app.state, "doorman", None)),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            server_header=False,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            timeout_graceful_shutdown=config.shutdown_timeout,
        )
    )


class Ending:
    """What signals do: the first lets requests finish, the second ends them."""

    def __init__(self, server: HttpServer, service: Service, config: ServerConfig) -> None:
        self._server = server
        self._service = service
        self._config = config

    def signal(self, number: int) -> None:
        if self._service.is_draining:
            self._server.end(at_once=True)
            return
        self._service.is_draining = True
        # ^C is no load balancer's.
        window = self._config.pre_stop_seconds if number == signal.SIGTERM else 0
        _log.info(
            "shutting down: requests have %d s to finish; a second signal ends them now",
            window + self._config.shutdown_timeout,
        )
        asyncio.get_running_loop().call_later(window, self._server.end)
