"""A replica: one daemon, and the way to it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence

import httpx
from ray import serve

from deploy.ray_serve.daemon import Daemon, DaemonLostError
from deploy.ray_serve.messages import ProxiedRequest, ReplicaLost, ResponseHead, end_to_end

_log = logging.getLogger("ray.serve")

# For what is on its way to the endpoint.
_LAST_WORDS_S = 0.5


class Replica:
    """Starts ``inflightd serve`` where Serve has put it, on the GPUs that Serve has given it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        start_timeout_s: float,
        stop_timeout_s: float,
    ) -> None:
        """Raises DaemonLostError: then Serve starts another replica, and logs why."""
        self._id = serve.get_replica_context().replica_id.unique_id
        self._stop_timeout_s = stop_timeout_s
        self._daemon = Daemon(arguments, environment)
        await self._daemon.start(start_timeout_s)
        self._watching = asyncio.create_task(self._end_with_daemon())

    async def answer(
        self, request: ProxiedRequest
    ) -> AsyncGenerator[ResponseHead | bytes | ReplicaLost, None]:
        """The daemon's response as it comes: its head, then its body. Closing it tells the daemon."""
        try:
            response = await self._daemon.client.send(self._daemon.request(request), stream=True)
            try:
                yield ResponseHead(response.status_code, end_to_end(tuple(response.headers.raw)), self._id)
                async for data in response.aiter_raw():
                    yield data
            finally:
                await response.aclose()
        except httpx.TransportError as error:
            _log.warning("the daemon of replica %s was lost: %r", self._id, error)
            yield ReplicaLost(self._id)

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises three times in a row.

        An engine that is being started again is not ready for a few seconds; its streams go on by themselves.
        """
        if not await self._daemon.is_ready():
            raise DaemonLostError(f"the daemon of replica {self._id} is not ready")

    async def __del__(self) -> None:
        """Called by Serve when no request is left, or its patience is at its end."""
        self._watching.cancel()
        await self._daemon.stop(self._stop_timeout_s)

    async def _end_with_daemon(self) -> None:
        """A replica without a daemon is better gone: routers forget it, Serve starts another at once."""
        status = await self._daemon.ended()
        _log.error("replica %s ends: its daemon ended with status %s", self._id, status)
        await asyncio.sleep(_LAST_WORDS_S)
        os._exit(1)
