"""One ``inflightd serve`` beside a replica, on a unix socket that nobody else reaches."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence

import httpx

from deploy.ray_serve.messages import ProxiedRequest

# The daemon does not outlive this process, however that ends.
_PROGRAM = """\
import sys
from server.launch import follow_parent
from server.cli import main
follow_parent(int(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""
_POLL_S = 0.1
_PROBE_TIMEOUT_S = 5.0


class DaemonLostError(Exception):
    """The daemon has ended, or did not get ready."""


class Daemon:
    """Starts, watches and ends the process.

    Attributes:
        client: speaks HTTP with it, without time limits: these are the daemon's and the client's.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """
        Args:
            arguments: of ``inflightd serve``, without an address.
            environment: set for it beside this process's own variables.
        """
        self._arguments = tuple(arguments)
        self._environment = {**os.environ, **(environment or {})}
        self._folder = tempfile.TemporaryDirectory(prefix="inflightd-")
        self._socket = os.path.join(self._folder.name, "daemon.sock")
        self._process: asyncio.subprocess.Process | None = None
        # /health/ready wants a key where keys are set.
        key = self._environment.get("INFLIGHTD_PROBE_KEY")
        self._probe_headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=self._socket, limits=httpx.Limits(max_connections=None, max_keepalive_connections=64)
            ),
            base_url="http://daemon",
            timeout=None,
        )

    async def start(self, timeout_s: float) -> None:
        """Starts the process and waits until it takes requests. Raises DaemonLostError."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _PROGRAM, str(os.getpid()), "serve", *self._arguments,
                "--uds", self._socket, stdin=asyncio.subprocess.DEVNULL, env=self._environment,
            )  # fmt: skip
            await self._become_ready(timeout_s)
        except BaseException:
            await self.stop(grace_s=0.0)
            raise

    async def _become_ready(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.is_ready():  # noqa: ASYNC110 - a process has no event for it
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise DaemonLostError(f"inflightd serve was not ready within {timeout_s:g} s") from None

    async def is_ready(self) -> bool:
        """Whether it takes requests. Raises DaemonLostError if it has ended."""
        if self._process is None or self._process.returncode is not None:
            status = None if self._process is None else self._process.returncode
            raise DaemonLostError(f"inflightd serve has ended with status {status}; its log says why")
        try:
            response = await self.client.get(
                "/health/ready", headers=self._probe_headers, timeout=_PROBE_TIMEOUT_S
            )
        except httpx.TransportError:
            return False
        if response.status_code == 401:
            raise DaemonLostError("the daemon wants a key for /health/ready: set INFLIGHTD_PROBE_KEY to one")
        return response.status_code == 200

    def request(self, proxied: ProxiedRequest) -> httpx.Request:
        """What to send for a client: its target as it was written, whatever httpx would make of it."""
        return httpx.Request(
            proxied.method,
            self.client.base_url,
            # The body may be another than the client's; httpx writes its length.
            headers=[pair for pair in proxied.headers if pair[0] != b"content-length"],
            content=proxied.body,
            extensions={"target": proxied.target},
        )

    async def ended(self) -> int:
        """Waits for the end of the process, which has been started; returns its exit status."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """Ends the process: lets requests finish for so many seconds at most."""
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), grace_s)
            except TimeoutError:
                process.kill()
                await process.wait()
        await self.client.aclose()
        self._folder.cleanup()
