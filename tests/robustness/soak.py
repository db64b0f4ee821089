"""Load, cancelled requests, abuses and engines that are killed, for as long as you like, with books kept.

    python -m tests.robustness.soak --minutes 30 [--streams 32] [--cancelled 0.1] [--kill-every 120]

Starts a server of its own with the default model, asks it for the answers in quiet, and then compares every
token that a client sees with them (``ledger``). Prints JSON; exit status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.end_to_end.server_process import ServerProcess
from tests.robustness.abuses import ABUSES, AbuseError
from tests.robustness.cases import Case, answered, make_cases, whole_answer
from tests.robustness.ledger import Ledger
from tests.robustness.memory import MemoryLog, resident_bytes
from tests.robustness.sse_client import CutError, post, responding

_REQUEST_TIMEOUT_S = 240.0
_REFUSED_PAUSE_S = 0.3
_QUIET_S = 60.0


@dataclass
class Soak:
    """One run against a server.

    Attributes:
        kinds: names of the abuses, each of which has its turn.
        faults: what was wrong beside what the ledger holds.
        restarts: seconds from each kill of the engine to readiness.
    """

    url: str
    cases: Sequence[Case]
    seed: str
    num_streams: int = 32
    cancelled: float = 0.1
    abuse_every: float = 1.0
    canary_every: float = 5.0
    kill_every: float = 0.0
    engine_pid: Callable[[], int] | None = None
    kinds: Sequence[str] = tuple(sorted(ABUSES))
    ledger: Ledger = field(default_factory=Ledger)
    faults: list[str] = field(default_factory=list)
    abuses: Counter[str] = field(default_factory=Counter)
    restarts: list[float] = field(default_factory=list)
    num_canaries: int = 0
    is_restarting: bool = False

    async def run(self, seconds: float) -> None:
        """Runs for ``seconds``, then lets what is under way end, and balances the books."""
        end = time.monotonic() + seconds
        work = [self._stream_for_ever(end, number) for number in range(self.num_streams)]
        work += [self._at_intervals(end, self.canary_every, self._canary)]
        work += [self._at_intervals(end, self.abuse_every, self._abuse)]
        if self.kill_every:
            work.append(self._kill_for_ever(end))
        await asyncio.gather(*work)
        self.ledger.balance()

    @property
    def violations(self) -> list[str]:
        return self.ledger.violations + self.faults

    async def _stream_for_ever(self, end: float, number: int) -> None:
        chance = random.Random(f"{self.seed} stream {number}")
        while time.monotonic() < end:
            await self.stream(chance.choice(self.cases), chance)

    async def stream(self, case: Case, chance: random.Random) -> None:
        """One request, entered into the ledger; one in ten leaves before its end."""
        assert case.expected is not None
        num_tokens = len(case.expected.token_ids)
        leaves_at = chance.randrange(num_tokens) if chance.random() < self.cancelled else None
        entry = self.ledger.open(case.name, case.expected)
        was_restarting = self.is_restarting
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                async with responding(self.url, post(case.path, case.stream), _REQUEST_TIMEOUT_S) as response:
                    if response.status != 200:
                        entry.refuse(response.status)
                        if response.status != 503 or not (was_restarting or self.is_restarting):
                            self.faults.append(f"{entry.name}: refused with {response.status}")
                    else:
                        entry.accept()
                        async for data in response.events():
                            entry.event(data)
                            if leaves_at is not None and len(entry.token_ids) > leaves_at:
                                entry.cancel()
                                break
                        else:
                            entry.close(is_clean=True)
        except CutError:
            entry.close(is_clean=False)
        except TimeoutError:
            pass  # it never ended: the ledger will say so
        finally:
            self.ledger.settle(entry)
        if entry.end in ("refused", "cut", None):
            await asyncio.sleep(_REFUSED_PAUSE_S)

    async def _at_intervals(
        self, end: float, interval: float, action: Callable[[int], Awaitable[None]]
    ) -> None:
        """Starts ``action`` every so often, whether the ones before have ended or not; waits for them all."""
        tasks = []
        due = time.monotonic() + interval
        while due < end:
            await asyncio.sleep(due - time.monotonic())
            tasks.append(asyncio.ensure_future(action(len(tasks))))
            due += interval
        await asyncio.gather(*tasks)

    async def _abuse(self, number: int) -> None:
        chance = random.Random(f"{self.seed} abuse {number}")
        names = list(self.kinds)
        random.Random(f"{self.seed} round {number // len(names)}").shuffle(names)
        name = names[number % len(names)]
        self.abuses[name] += 1
        try:
            await ABUSES[name](self.url, chance)
        except (AbuseError, OSError) as error:
            self.faults.append(f"{name}: {error}")

    async def _canary(self, number: int) -> None:
        """The same few questions over and over, answered in one piece."""
        case = self.cases[number % 4]
        was_restarting = self.is_restarting
        try:
            async with responding(self.url, post(case.path, case.body), _REQUEST_TIMEOUT_S) as response:
                body = (await response.body()).decode()
        except (CutError, TimeoutError) as error:
            self.faults.append(f"canary {case.name}: {error!r}")
            return
        if response.status == 503 and (was_restarting or self.is_restarting):
            return
        self.num_canaries += 1
        if response.status != 200 or case.expected is None or not case.expected.is_met_by(whole_answer(body)):
            self.faults.append(f"canary {case.name}: status {response.status}, {body[:300]}")

    async def _kill_for_ever(self, end: float) -> None:
        # From when the last one was ready: a request that two engines die with is failed, and rightly.
        while time.monotonic() + self.kill_every < end:
            await asyncio.sleep(self.kill_every)
            await self.kill()

    async def kill(self, again_after: float | None = None) -> int:
        """Kills the engine and waits until there is another that is ready; returns how many were killed.

        Args:
            again_after: seconds after which the next engine is killed too, which is about to start by then.
        """
        self.is_restarting = True
        dead: set[int | None] = {None}
        began = time.monotonic()
        self._kill_other_than(dead)
        if again_after is not None:
            await asyncio.sleep(again_after)
            self._kill_other_than(dead)
        # The server says that it is ready until it has noticed.
        while self._engine_pid_now() in dead or not await self._is_ready():
            await asyncio.sleep(0.02)
            if time.monotonic() - began > _REQUEST_TIMEOUT_S:
                self.faults.append("the engine did not come back")
                break
        self.restarts.append(time.monotonic() - began)
        self.is_restarting = False
        return len(dead) - 1

    def _kill_other_than(self, dead: set[int | None]) -> None:
        pid = self._engine_pid_now()
        if pid is not None and pid not in dead:
            os.kill(pid, signal.SIGKILL)
            dead.add(pid)

    def _engine_pid_now(self) -> int | None:
        assert self.engine_pid is not None
        try:
            return self.engine_pid()
        except (OSError, RuntimeError):  # there is none at this moment
            return None

    async def _is_ready(self) -> bool:
        request = b"GET /health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        try:
            async with responding(self.url, request, 5.0) as response:
                return response.status == 200
        except (CutError, TimeoutError):
            return False


def left_behind(metric: Callable[[str], float], seconds: float = _QUIET_S) -> list[str]:
    """What the server still holds once nobody asks for anything: gauges that have not gone to 0."""
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    deadline = time.monotonic() + seconds
    while True:
        held = {name: value for name in gauges if (value := metric(name))}
        if not held:
            return []
        if time.monotonic() > deadline:
            return [f"{name} is {value} after {seconds:.0f} s of quiet" for name, value in held.items()]
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--cancelled", type=float, default=0.1, help="share of the requests")
    parser.add_argument("--abuse-every", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--kill-every", type=float, default=120.0, metavar="SECONDS", help="0: never")
    parser.add_argument("--settle", type=float, default=300.0, metavar="SECONDS",
                        help="of the beginning, in which memory may grow")  # fmt: skip
    parser.add_argument("--growth", type=float, default=0.02, help="of memory after that, at most")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parsed = parser.parse_args()
    cases = make_cases(parsed.cases, (8, 64), parsed.seed)
    with ServerProcess("--log-level", "warning") as server:
        cases = [answered(case, server.url) for case in cases]
        soak = Soak(
            server.url,
            cases,
            parsed.seed,
            num_streams=parsed.streams,
            cancelled=parsed.cancelled,
            abuse_every=parsed.abuse_every,
            kill_every=parsed.kill_every,
            engine_pid=lambda: server.engine_pid,
        )
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        memory = asyncio.run(_watched(soak, server, 60 * parsed.minutes))
        soak.faults += left_behind(server.metric)
        soak.faults += memory.growth_faults(parsed.settle, parsed.growth)
        report = {
            "began": began,
            "commit": _commit(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "arguments": " ".join(sys.argv[1:]),
            "requests": dict(soak.ledger.ends),
            "tokens": soak.ledger.num_tokens,
            "canaries": soak.num_canaries,
            "abuses": soak.abuses.total(),
            "kinds of abuse": len(soak.abuses),
            "kills": len(soak.restarts),
            "seconds to ready": [round(seconds, 2) for seconds in sorted(soak.restarts)],
            "memory": memory.summary(parsed.settle),
            "server log": [line for line in server.lines if "WARNING" in line or "ERROR" in line][-20:],
            "num_violations": len(soak.violations),
            "violations": soak.violations[:50],
        }
    report["exit status of the server"] = server.process.returncode
    text = json.dumps(report, indent=1)
    if parsed.json:
        parsed.json.write_text(text + "\n")
    print(text)
    return 1 if soak.violations or server.process.returncode else 0


async def _watched(soak: Soak, server: ServerProcess, seconds: float) -> MemoryLog:
    """Runs the soak while the memory of both processes is looked at every 5 s."""
    log = MemoryLog()

    async def look() -> None:
        began = time.monotonic()
        while True:
            with contextlib.suppress(OSError, RuntimeError):
                log.add(
                    time.monotonic() - began, "api", server.process.pid, resident_bytes(server.process.pid)
                )
                engine = server.engine_pid
                log.add(time.monotonic() - began, "engine", engine, resident_bytes(engine))
            await asyncio.sleep(5.0)

    looking = asyncio.create_task(look())
    try:
        await soak.run(seconds)
    finally:
        looking.cancel()
    return log


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
