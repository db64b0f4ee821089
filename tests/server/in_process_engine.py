"""Engines for the tests of the HTTP side, in this process: one that follows a script, one that is real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from scheduler.engine_core import EngineCore
from scheduler.hashing_executor import HashingExecutor
from scheduler.messages import EngineOutput, EngineStats, ExecutorSpec, FinishReason, Request
from server.errors import ApiError, EngineDeadError
from server.histogram import STEP_TOKENS_BUCKETS, Histogram
from server.tokenizer import Tokenizer

SPEC = ExecutorSpec(
    model_id="scripted",
    vocab_size=49_152,
    block_size=16,
    num_blocks=128,
    max_model_len=512,
    max_num_seqs=16,
    max_num_batched_tokens=256,
    device="none",
)

Script = Callable[[Request], Iterable[EngineOutput | Exception | asyncio.Event]]


class ScriptedEngine:
    """Answers each request with what ``script`` says: outputs, exceptions to raise, events to wait for."""

    def __init__(self, script: Script, spec: ExecutorSpec = SPEC) -> None:
        self.script = script
        self.spec = spec
        self.stats = EngineStats()
        self.step_tokens = Histogram(STEP_TOKENS_BUCKETS)
        self.is_ready = True
        self.num_restarts = 0
        self.requests: list[Request] = []
        self.aborted: list[str] = []

    async def generate(self, request: Request) -> AsyncGenerator[EngineOutput, None]:
        if not self.is_ready:
            raise EngineDeadError("not ready: /secret/path")
        self.requests.append(request)
        is_finished = False
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    is_finished = step.finish_reason is not None
                    yield step
        finally:
            if not is_finished:
                self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def fail(self, request_id: str, error: ApiError) -> None:
        raise AssertionError("a script fails by itself")


def tokens(
    *steps: Iterable[int], finish: FinishReason = FinishReason.LENGTH, cached: int = 0
) -> Callable[[Request], list[EngineOutput]]:
    """A script: one output for each list of token ids, the last with the finish reason."""

    def script(request: Request) -> list[EngineOutput]:
        return [
            EngineOutput(
                request.request_id,
                tuple(token_ids),
                finish_reason=finish if index == len(steps) - 1 else None,
                num_cached_tokens=cached,
                first_scheduled_time=request.arrival_time,
            )
            for index, token_ids in enumerate(steps)
        ]

    return script


class HashingEngine:
    """A real ``EngineCore`` over the hashing executor, stepped by a task of the event loop.

    Outputs are handed over a few at a time, so that they arrive together as they do over a socket.
    """

    def __init__(self, executor: HashingExecutor, steps_at_once: int = 1) -> None:
        self.core = EngineCore(executor)
        self.spec = executor.spec
        self.step_tokens = Histogram(STEP_TOKENS_BUCKETS)
        self.is_ready = True
        self.num_restarts = 0
        self._steps_at_once = steps_at_once
        self.pause = 0.0  # seconds between steps
        self._queues: dict[str, asyncio.Queue[EngineOutput | ApiError]] = {}
        self._stepping: asyncio.Task[None] | None = None

    @property
    def stats(self) -> EngineStats:
        return self.core.stats

    async def generate(self, request: Request) -> AsyncGenerator[EngineOutput, None]:
        queue = self._queues[request.request_id] = asyncio.Queue()
        self.core.add_request(request)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        is_finished = False
        try:
            while not is_finished:
                output = await queue.get()
                if isinstance(output, ApiError):
                    raise output
                is_finished = output.finish_reason is not None
                yield output
        finally:
            del self._queues[request.request_id]
            if not is_finished:
                self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        self.core.abort(request_id)

    def fail(self, request_id: str, error: ApiError) -> None:
        if request_id in self._queues:
            self._queues[request_id].put_nowait(error)

    async def _step(self) -> None:
        while self.core.has_work:
            for _ in range(self._steps_at_once):
                for output in self.core.step().outputs:
                    if output.request_id in self._queues:
                        self._queues[output.request_id].put_nowait(output)
            await asyncio.sleep(self.pause)


def scripted_text(tokenizer: Tokenizer, text: str, *, with_eos: bool = True) -> ScriptedEngine:
    """Generates ``text`` token by token; 16 tokens of the prompt were cached."""
    ids = [*tokenizer.encode(text), *([min(tokenizer.eos_token_ids)] if with_eos else [])]
    finish = FinishReason.STOP if with_eos else FinishReason.LENGTH
    return ScriptedEngine(tokens(*([i] for i in ids), finish=finish, cached=16))
