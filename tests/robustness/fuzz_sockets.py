"""Mutated HTTP over real sockets: no 5xx, no hang, no connection that stays.

    python -m tests.robustness.fuzz_sockets --count 50000 [--seed 0] [--at-once 64]

The server's own protocol, guard and routes, over an engine that answers three tokens. A client sends its
bytes in pieces, reads until the server is silent, ends its side, and then the server has 5 s to end the
connection.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import re
import resource
import time
from collections import Counter
from dataclasses import dataclass, field

import uvloop

from server.app import create_app
from server.config import ServerConfig
from server.listening import listen
from server.model_source import fetch_default_model
from server.tokenizer import Tokenizer, load_tokenizer
from tests.robustness.fuzz_bodies import AnsweringEngine
from tests.robustness.http_mutations import mutated_request
from tests.server.http_client import serving_at

_HANG_S = 5.0
_FIRST_S = 0.4
_SILENCE_S = 0.03
# The longest that the server may keep what nobody ended: the head's time.
_LEFT_OPEN_S = 15.0
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@dataclass
class SocketFuzz:
    """One run against a port.

    Attributes:
        statuses: of all responses; ``0`` counts connections that were ended without one.
        findings: what must not be, with the bytes that were sent.
    """

    port: int
    statuses: Counter[int] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    async def send(self, data: bytes, chance: random.Random) -> None:
        answer = b""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError as error:
            self._find(f"no connection: {error}", data)
            return
        try:
            cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 0, 1, 3))))
            for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                writer.write(data[start:end])
                await asyncio.sleep(0)
            patience = _FIRST_S
            while True:
                try:
                    async with asyncio.timeout(patience):
                        piece = await reader.read(65536)
                except TimeoutError:
                    break
                if not piece:
                    break
                answer += piece
                patience = _SILENCE_S
            if chance.random() < 0.9:
                writer.write_eof()
                async with asyncio.timeout(_HANG_S):
                    answer += await reader.read()
        except TimeoutError:
            self._find(f"still open {_HANG_S:.0f} s after its client ended", data)
        except OSError:
            pass  # reset by the server: it had refused what was still being sent
        finally:
            writer.transport.abort()
        statuses = [int(status) for status in _STATUS.findall(answer)]
        self.statuses.update(statuses or [0])
        if any(status >= 500 for status in statuses) or b"Traceback" in answer:
            self._find(f"answered {answer[:500]!r}", data)

    def _find(self, what: str, data: bytes) -> None:
        self.findings.append(f"{what} <- {data[:4000]!r}")


async def fuzz(tokenizer: Tokenizer, count: int, seed: str, at_once: int) -> SocketFuzz:
    """Sends ``count`` mutated requests, each on a connection of its own."""
    app = create_app(ServerConfig(max_queued_requests=10_000), AnsweringEngine(), tokenizer)
    with listen(ServerConfig(port=0)) as listener:
        async with serving_at(listener, app) as server:
            run = SocketFuzz(listener.getsockname()[1])
            numbers = iter(range(count))

            async def work() -> None:
                for number in numbers:
                    chance = random.Random(f"{seed} {number}")
                    await run.send(mutated_request(chance), chance)
                    if number % 5000 == 4999:
                        print(f"{number + 1}: {dict(run.statuses)}, {len(run.findings)} findings", flush=True)

            await asyncio.gather(*(work() for _ in range(at_once)))
            deadline = time.monotonic() + _LEFT_OPEN_S
            while server.server_state.connections and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            if server.server_state.connections:
                run.findings.append(f"{len(server.server_state.connections)} connections are still open")
            probe = random.Random(0)
            await run.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", probe)
    await app.state.service.close()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--at-once", type=int, default=64)
    parsed = parser.parse_args()
    logging.disable(logging.CRITICAL)
    began = time.monotonic()
    run = uvloop.run(fuzz(load_tokenizer(fetch_default_model()), parsed.count, parsed.seed, parsed.at_once))
    for finding in run.findings[:20]:
        print(finding)
    seconds, statuses = time.monotonic() - began, dict(sorted(run.statuses.items()))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{parsed.count} requests of seed {parsed.seed} in {seconds:.0f} s: {statuses}")
    print(f"peak memory {memory:.0f} MiB; {len(run.findings)} findings")
    return 1 if run.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
