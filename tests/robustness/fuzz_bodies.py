"""Mutated bodies for every route: whatever comes in, the answer is an answer or the client's error, and soon.

    python -m tests.robustness.fuzz_bodies --count 200000 [--seed 0] [--grammars 0.02]

The application runs in this process, without sockets, over an engine that answers three tokens; everything
else is real. Exit status 1 if there was a 5xx, an exception, an answer of another form or a hang of over 5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI

from scheduler.hashing_executor import describe
from scheduler.messages import EngineOutput, FinishReason, Request
from server.app import create_app
from server.config import ServerConfig
from server.model_source import fetch_default_model
from server.tokenizer import Tokenizer, load_tokenizer
from tests.robustness.corpus import BODIES, GRAMMAR_BODIES
from tests.robustness.json_mutations import mutated
from tests.server.in_process_engine import SPEC, ScriptedEngine

_HANG_S = 5.0


def answer_anything(request: Request) -> Iterator[EngineOutput]:
    """Three tokens at most, with all that a request can ask for beside them."""
    params = request.params
    prompt = request.prompt_token_ids
    described = None
    if params.prompt_logprobs is not None:
        described = tuple(describe(1, token, params.prompt_logprobs, 49_152) for token in prompt[1:])
    count = min(params.max_tokens, 3)
    for number in range(count):
        is_last = number == count - 1
        token = 28 + number
        yield EngineOutput(
            request.request_id,
            (token,),
            logprobs=None if params.logprobs is None else (describe(2, token, params.logprobs, 49_152),),
            prompt_logprobs=described if number == 0 else None,
            embedding=(1.0, 2.0, 2.0) if params.pooling else None,
            finish_reason=FinishReason.LENGTH if is_last else None,
            first_scheduled_time=request.arrival_time,
        )


class AnsweringEngine(ScriptedEngine):
    """Answers anything, and keeps no books."""

    def __init__(self) -> None:
        super().__init__(answer_anything, replace(SPEC, embedding_size=3))

    def abort(self, request_id: str) -> None:
        self.requests.clear()


@dataclass
class BodyFuzz:
    """One run over an application.

    Attributes:
        statuses: how often each was seen.
        findings: what must not be, with the body.
        slowest: seconds of the slowest answer, and its body.
    """

    app: FastAPI
    statuses: Counter[int] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    async def post(self, path: str, body: bytes) -> None:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(_HANG_S):
                status, answer = await _exchange(self.app, path, body)
        except TimeoutError:
            self._find(f"no answer within {_HANG_S:.0f} s", path, body)
            return
        except Exception as error:
            self._find(repr(error), path, body)
            return
        self.slowest = max(self.slowest, (time.perf_counter() - began, f"{path} {body[:200]!r}"))
        self.statuses[status] += 1
        if status >= 500 or b'"server_error"' in answer or b"Traceback" in answer:
            self._find(f"status {status}: {answer[:300]!r}", path, body)
        elif status >= 400 and not _is_error(answer):
            self._find(f"an error of another form, {status}: {answer[:300]!r}", path, body)

    def _find(self, what: str, path: str, body: bytes) -> None:
        self.findings.append(f"{what} <- {path} {body[:4000]!r}")


def _is_error(answer: bytes) -> bool:
    try:
        error = json.loads(answer.decode())["error"]
    except (ValueError, KeyError, TypeError):
        return False
    message = error["message"] if isinstance(error, dict) else error  # TGI's is a text
    return isinstance(message, str) and 0 < len(message) < 1000


async def _exchange(app: FastAPI, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to a POST; raises what the application raises."""
    sent = False
    status = 0
    answer: list[bytes] = []
    is_whole = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:  # the client stays until it has its answer
            await is_whole.wait()
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            answer.append(message.get("body", b""))
            if not message.get("more_body", False):
                is_whole.set()

    headers = [
        (b"host", b"x"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await app(scope, receive, send)
    if not is_whole.is_set():
        raise RuntimeError("the answer is not whole")
    return status, b"".join(answer)


async def fuzz(tokenizer: Tokenizer, count: int, seed: str, grammars: float) -> BodyFuzz:
    """Posts ``count`` mutated bodies, one after the other."""
    app = create_app(ServerConfig(), AnsweringEngine(), tokenizer)
    run = BodyFuzz(app)
    try:
        for path, body in BODIES + (GRAMMAR_BODIES if grammars else []):
            await run.post(path, json.dumps(body).encode())
        if run.statuses.keys() != {200}:
            run.findings.append(f"the corpus itself is refused: {run.statuses}")
        for number in range(count):
            chance = random.Random(f"{seed} {number}")
            path, body = chance.choice(GRAMMAR_BODIES if chance.random() < grammars else BODIES)
            await run.post(path, mutated(body, chance))
            if number % 10_000 == 9_999:
                print(f"{number + 1}: {dict(run.statuses)}, {len(run.findings)} findings", flush=True)
    finally:
        await app.state.service.close()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--grammars", type=float, default=0.02, help="share of bodies with a grammar")
    parsed = parser.parse_args()
    logging.disable(logging.CRITICAL)
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = asyncio.run(fuzz(load_tokenizer(fetch_default_model()), parsed.count, parsed.seed, parsed.grammars))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for finding in run.findings[:20]:
        print(finding)
    seconds, statuses = time.monotonic() - began, dict(sorted(run.statuses.items()))
    print(f"{parsed.count} bodies of seed {parsed.seed} in {seconds:.0f} s: {statuses}")
    print(
        f"slowest {run.slowest[0] * 1e3:.0f} ms: {run.slowest[1][:200]}; peak memory + {grown / 1024:.0f} MiB"
    )
    print(f"{len(run.findings)} findings")
    return 1 if run.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
