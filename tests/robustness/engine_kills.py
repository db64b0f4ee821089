"""The engine is killed at random moments, and no stream may be lost or end otherwise than in quiet.

    python -m tests.robustness.engine_kills --kills 200 [--streams 16] [--seed 0]

A round starts its streams, kills the engine (SIGKILL) somewhere between the first request and the last token,
and waits until all streams have ended: the ledger compares every token. One engine in eight is killed again
while it starts. How long the server is not ready is measured from outside. The server differs from the one
that is served in one number: it starts engines again as often as it takes, where ``inflightd serve`` gives up
after three in two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field

from tests.end_to_end.server_process import ServerProcess
from tests.robustness.cases import Case, answered, make_cases
from tests.robustness.soak import Soak, left_behind

_WITHOUT_LIMIT = (
    "import sys, server.cli, server.engine_client as client; client._MAX_RESTARTS = 10**6; "
    "sys.exit(server.cli.main(sys.argv[1:]))"
)


@dataclass
class Rounds:
    """Engines that were killed: seconds to readiness, of those that were killed once and twice."""

    once: list[float] = field(default_factory=list)
    twice: list[float] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        return len(self.once) + 2 * len(self.twice)


async def _round(soak: Soak, chance: random.Random, longest: float, rounds: Rounds) -> None:
    streams = [
        asyncio.create_task(soak.stream(chance.choice(soak.cases), random.Random(f"{soak.seed} {number}")))
        for number in range(soak.num_streams)
    ]
    await asyncio.sleep(chance.uniform(0, longest))
    num_done = sum(stream.done() for stream in streams)
    again_after = chance.uniform(1.0, 2.5) if chance.random() < 1 / 8 else None
    num_killed, *_ = await asyncio.gather(soak.kill(again_after), *streams)
    (rounds.once if num_killed == 1 else rounds.twice).append(soak.restarts[-1])
    print(f"{rounds.num_kills}: {num_done} had ended, ready in {soak.restarts[-1]:.2f} s", flush=True)


async def _quiet_round(soak: Soak) -> float:
    """Seconds that the streams take when nobody kills the engine."""
    began = time.monotonic()
    chance = random.Random(0)
    await asyncio.gather(
        *(soak.stream(chance.choice(soak.cases), random.Random(number)) for number in range(soak.num_streams))
    )
    return time.monotonic() - began


async def run(soak: Soak, num_kills: int, end: float) -> Rounds:
    """Rounds until engines were killed ``num_kills`` times, or the clock says ``end``."""
    longest = await _quiet_round(soak)
    rounds = Rounds()
    while rounds.num_kills < num_kills and time.monotonic() < end:
        chance = random.Random(f"{soak.seed} round {rounds.num_kills}")
        await _round(soak, chance, longest, rounds)
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0, help="no more rounds after that")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seed", default="0")
    parsed = parser.parse_args()
    cases: list[Case] = make_cases(16, (16, 64), parsed.seed)
    with ServerProcess("--log-level", "error", program=("-c", _WITHOUT_LIMIT)) as server:
        cases = [answered(case, server.url) for case in cases]
        soak = Soak(
            server.url,
            cases,
            parsed.seed,
            num_streams=parsed.streams,
            cancelled=0.0,
            engine_pid=lambda: server.engine_pid,
        )
        rounds = asyncio.run(run(soak, parsed.kills, time.monotonic() + 60 * parsed.minutes))
        soak.faults += left_behind(server.metric)
        soak.ledger.balance()
        restarts = int(server.metric("engine_restarts_total"))
    if restarts != rounds.num_kills:
        soak.faults.append(f"{rounds.num_kills} kills, but {restarts} restarts")
    ready = sorted(rounds.once)
    report = {
        "kills": rounds.num_kills,
        "of engines that were starting": len(rounds.twice),
        "streams": dict(soak.ledger.ends),
        "tokens": soak.ledger.num_tokens,
        "seconds to ready": {
            "median": round(statistics.median(ready), 2),
            "p90": round(ready[int(0.9 * (len(ready) - 1))], 2),
            "most": round(ready[-1], 2),
        },
        "violations": soak.violations[:50],
        "exit status of the server": server.process.returncode,
    }
    print(json.dumps(report, indent=1))
    return 1 if soak.violations or server.process.returncode else 0


if __name__ == "__main__":
    raise SystemExit(main())
