"""The operator's interface: an application of its own, on an address and with keys of its own."""

from __future__ import annotations

from fastapi import FastAPI

from server.admin import admin_routes
from server.admin.admin_log import AdminLog
from server.admin.operated_server import OperatedServer
from server.api_keys import ApiKeys
from server.cors import Cors
from server.error_handlers import add_error_handlers
from server.guard import Guard

_MAX_BODY_BYTES = 64 * 1024


def create_admin_app(operated: OperatedServer, keys: ApiKeys) -> FastAPI:
    """
    Args:
        keys: every path wants one of them; without any, who reaches the address is trusted (a unix socket).
    """
    app = FastAPI(title="inflightd", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.operated = operated
    app.include_router(admin_routes.router)
    add_error_handlers(app)
    app.add_middleware(
        Guard, max_body_bytes=_MAX_BODY_BYTES, api_keys=keys, cors=Cors(()), open_paths=frozenset()
    )
    app.add_middleware(AdminLog, keys=keys)
    return app
