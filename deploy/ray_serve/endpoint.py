"""The one endpoint in front of all replicas."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from ray.exceptions import RayActorError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.ray_serve.messages import ProxiedRequest, ReplicaLost, ResponseHead, end_to_end
from deploy.ray_serve.prefix_routing import prefix_of
from deploy.ray_serve.relay import Answer, Relay
from server.error_forms import in_form_of
from server.errors import ApiError, BodyTooLargeError, EngineDeadError
from server.guard import new_request_id, send_error

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator


class Endpoint:
    """Serve's ingress. ``PrefixRouter`` chooses the replica of a request; all paths are the daemon's."""

    def __init__(self, replicas: DeploymentHandle[Any], prefix_chars: int, max_body_bytes: int) -> None:
        self._replicas = replicas.options(stream=True)
        self._prefix_chars = prefix_chars
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        path: str = request.scope["path"]
        try:
            body = await self._body_of(request)
        except ApiError as error:
            return _Refusal(in_form_of(path, error, new_request_id()))
        query: bytes = request.scope.get("query_string", b"")
        proxied = ProxiedRequest(
            method=request.method,
            target=request.scope["raw_path"] + (b"?" + query if query else b""),
            headers=end_to_end(tuple(request.headers.raw)),
            body=body,
            prefix=prefix_of(body, self._prefix_chars) if body else None,
        )
        return _Passed(Relay(self._ask, proxied, path).items())

    async def _ask(self, request: ProxiedRequest) -> Answer:
        """What a replica answers. Closing it ends the request there."""
        items = cast("DeploymentResponseGenerator[Any]", self._replicas.answer.remote(request))
        is_complete = False
        try:
            async for item in items:
                yield item
            is_complete = True
        except RayActorError:  # the whole replica went, with its daemon
            is_complete = True
            yield ReplicaLost("")
        finally:
            if not is_complete:
                items.cancel()

    async def _body_of(self, request: Request) -> bytes:
        chunks: list[bytes] = []
        num_bytes = 0
        async for chunk in request.stream():
            chunks.append(chunk)
            num_bytes += len(chunk)
            if num_bytes > self._max_body_bytes:
                raise BodyTooLargeError(f"The request body is larger than {self._max_body_bytes} bytes.")
        return b"".join(chunks)


class _Passed(Response):
    """Sends what the generator yields, and closes it in any case."""

    def __init__(self, items: AsyncGenerator[ResponseHead | bytes, None]) -> None:
        super().__init__()
        self._items = items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False
        async with aclosing(self._items) as items:
            try:
                async for item in items:
                    if isinstance(item, ResponseHead):
                        has_begun = True
                        # Serve's proxy sends the request's id, which it has told the daemon.
                        headers = [pair for pair in item.headers if pair[0] != b"x-request-id"]
                        await send({"type": "http.response.start", "status": item.status, "headers": headers})
                    elif item:
                        await send({"type": "http.response.body", "body": item, "more_body": True})
            except EngineDeadError as error:
                if has_begun:
                    raise
                await send_error(in_form_of(scope["path"], error, new_request_id()), send)
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Refusal(Response):
    def __init__(self, error: ApiError) -> None:
        super().__init__()
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_error(self._error, send)
