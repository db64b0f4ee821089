"""Negative controls: whatever goes wrong with a stream, a block or memory, the soak must say so."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from functools import partial

import pytest

from scheduler.hashing_executor import HashingExecutor
from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.end_to_end.server_process import metric_at
from tests.robustness.cases import COMPLETIONS, Case, whole_answer
from tests.robustness.faulty_proxy import Fault, faulty_proxy
from tests.robustness.memory import MemoryLog, resident_bytes
from tests.robustness.soak import Soak, left_behind
from tests.robustness.sse_client import post, responding
from tests.server.http_client import serving
from tests.server.in_process_engine import HashingEngine, ScriptedEngine, tokens

_BODY = {"prompt": "Hi", "max_tokens": 8, "return_token_ids": True}


@pytest.fixture
async def url(tokenizer: Tokenizer) -> AsyncIterator[str]:
    """A server that answers eight different words, each in a chunk of its own."""
    script = tokens(*([i] for i in tokenizer.encode(" time year people way day man thing woman")))
    async with serving(create_app(ServerConfig(), ScriptedEngine(script), tokenizer)) as port:
        yield f"http://127.0.0.1:{port}"


async def _violations(url: str, fault: Fault, *, cancelled: float = 0.0) -> list[str]:
    """What the books of one stream through a proxy say."""
    async with responding(url, post(COMPLETIONS, _BODY)) as response:
        case = Case("a case", COMPLETIONS, _BODY, whole_answer((await response.body()).decode()))
    async with faulty_proxy(url, fault) as proxy:
        soak = Soak(proxy, [case], "seed", cancelled=cancelled)
        await soak.stream(case, random.Random(1))
    soak.ledger.balance()
    assert soak.ledger.ends.total() == 1
    return soak.violations


def _changed(data: str, **fields: object) -> str:
    body = json.loads(data)
    body["choices"][0] |= fields
    return json.dumps(body)


_FAULTS: dict[str, tuple[Fault, str]] = {
    "a dropped token": (lambda e: [*e[:3], *e[4:]], "token 3 of 8"),
    "the last token dropped": (lambda e: [*e[:7], *e[8:]], "7 tokens that are not the 8"),
    "a doubled token": (lambda e: [*e[:4], e[3], *e[4:]], "token 4 of 8"),
    "the last token doubled": (lambda e: [*e[:8], e[7], *e[8:]], "token 8 of 8 is .*, not none"),
    "two tokens in another order": (lambda e: [*e[:3], e[4], e[3], *e[5:]], "token 3 of 8"),
    "another token": (lambda e: [_changed(e[0], token_ids=[5]), *e[1:]], "token 0 of 8 is 5"),
    "another text": (lambda e: [_changed(e[0], text="x"), *e[1:]], "the text ends"),
    "no end": (lambda e: e[:-1], "ended without an end"),
    "two ends": (lambda e: [*e, e[-1]], "an event after its end"),
    "a token after the end": (lambda e: [*e, e[2]], "an event after its end"),
    "no finish reason": (lambda e: [*e[:8], *e[9:]], "finished by None, not length"),
    "two finish reasons": (lambda e: [*e[:9], *e[8:]], "finished twice"),
    "another finish reason": (lambda e: [*e[:8], _changed(e[8], finish_reason="stop"), *e[9:]], "by stop"),
    "no usage": (lambda e: [*e[:-2], e[-1]], "usage says None"),
    "two usages": (lambda e: [*e[:-1], *e[-2:]], "usage came twice"),
    "an error": (lambda e: [*e[:4], '{"error": {"code": "x"}}'], "ended with an error"),
    "an error after the end": (lambda e: [*e, '{"error": {"code": "x"}}'], "an event after its end"),
    "a cut": (lambda e: [*e[:4], None], "the connection was cut"),
}


@pytest.mark.parametrize("name", _FAULTS)
async def test_the_ledger_finds_what_is_planted_into_a_stream(url: str, name: str) -> None:
    fault, told = _FAULTS[name]
    violations = await _violations(url, fault)
    assert any(re.search(told, violation) for violation in violations), violations


async def test_the_ledger_finds_nothing_in_a_stream_that_is_left_alone(url: str) -> None:
    assert await _violations(url, lambda events: [*events]) == []
    assert await _violations(url, lambda events: [*events], cancelled=1.0) == []


async def test_what_a_client_saw_before_it_left_is_checked_too(url: str) -> None:
    violations = await _violations(url, lambda e: [_changed(e[0], token_ids=[5]), *e[1:]], cancelled=1.0)
    assert "token 0 of 8 is 5" in violations[0]


async def test_a_stream_that_stays_silent_has_not_ended(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.robustness.soak._REQUEST_TIMEOUT_S", 0.2)
    silent = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        await silent.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, responding(url, post(COMPLETIONS, _BODY)) as response:
        case = Case("a case", COMPLETIONS, _BODY, whole_answer((await response.body()).decode()))
        soak = Soak(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", [case], "seed")
        await soak.stream(case, random.Random(1))
        silent.set()
    assert soak.violations == ["request 1 (a case): never ended"]


class _LeakyEngine(HashingEngine):
    """Goes on with requests whose clients have left."""

    def abort(self, request_id: str) -> None:
        pass


@pytest.mark.parametrize("is_leaky", [False, True])
async def test_blocks_that_are_not_given_back_are_found(tokenizer: Tokenizer, is_leaky: bool) -> None:
    executor = HashingExecutor(num_blocks=256, block_size=4, max_model_len=512, vocab_size=49_152)
    engine = (_LeakyEngine if is_leaky else HashingEngine)(executor)
    engine.pause = 0.01
    async with serving(create_app(ServerConfig(), engine, tokenizer)) as port:
        url = f"http://127.0.0.1:{port}"
        body = {**_BODY, "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with responding(url, post(COMPLETIONS, body)):
            pass
        held = await asyncio.to_thread(left_behind, partial(metric_at, url), 0.3)
    assert [fault.split()[0] for fault in held] == (
        ["num_requests_running", "kv_cache_usage_perc"] if is_leaky else []
    )


@pytest.mark.parametrize(("megabytes", "grows"), [(0, False), (2, True)])
def test_a_process_that_grows_is_found(megabytes: int, grows: bool) -> None:
    script = (
        "import time; kept = [bytearray(b'x' * 2**25)]\nprint(flush=True)\n"
        f"while True: kept.append(bytearray(b'x' * {megabytes} * 2**20)); time.sleep(0.01)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        log = MemoryLog()
        began = time.monotonic()
        for _ in range(14):
            log.add(time.monotonic() - began, "api", process.pid, resident_bytes(process.pid))
            time.sleep(0.02)
        process.kill()
    assert bool(log.growth_faults(settle=0.0, most=0.02)) is grows


def test_growth_counts_from_when_things_have_settled() -> None:
    log = MemoryLog()
    for second in range(0, 1200, 5):
        log.add(second, "api", 1, 10**8 + (10**6 * second if second < 300 else 10**6 * 300))
        engine = 2 + second // 120  # a new process every two minutes, each of which grows at its beginning
        log.add(second, "engine", engine, 10**9 + 10**6 * min(second % 120, 40))
    assert log.growth_faults(settle=300.0, most=0.001) == []
    assert log.growth("api", settle=0.0) > 0.02
    for second in range(1200, 2400, 5):
        log.add(second, "engine", 2 + second // 120, 2 * 10**9)
    assert [fault.split()[3] for fault in log.growth_faults(settle=300.0, most=0.02)] == ["engine"]
