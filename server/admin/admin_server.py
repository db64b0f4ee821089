"""Serves the operator's interface beside the API."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
from collections.abc import AsyncIterator

from server.admin.admin_app import create_admin_app
from server.admin.operated_server import OperatedServer
from server.api_process import http_server
from server.config import ServerConfig
from server.listening import url_of

_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def administered(
    config: ServerConfig, operated: OperatedServer, listener: socket.socket
) -> AsyncIterator[None]:
    """Serves the operator's interface on a socket as long as the block runs."""
    if config.admin_uds is not None:
        config = dataclasses.replace(config, ssl_certfile=None, ssl_keyfile=None)
    server = http_server(config, create_admin_app(operated, config.admin_keys))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    _log.info("admin on %s", config.admin_uds or url_of(config, listener))
    try:
        yield
    finally:
        server.end(at_once=True)
        await serving
