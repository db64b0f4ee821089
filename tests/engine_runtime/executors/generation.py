"""Greedy generation through the step loop, for tests of executors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from scheduler.engine_core import EngineCore
from scheduler.executor import Executor
from scheduler.grammars import Grammars
from scheduler.messages import (
    EngineStats,
    ExecutorSpec,
    ModelRunnerOutput,
    Request,
    SamplingParams,
    SchedulerOutput,
    TokenLogprobs,
)


class Limited:
    """An executor that offers less than it has: small pools and small steps without loading a model again."""

    def __init__(self, executor: Executor, **limits: int) -> None:
        self._executor = executor
        self.spec: ExecutorSpec = replace(executor.spec, **limits)  # type: ignore[arg-type]
        self.max_in_flight = executor.max_in_flight
        self.steps: list[SchedulerOutput] = []

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        self.steps.append(step)
        return self._executor.execute(step)

    def shutdown(self) -> None:
        """The executor belongs to somebody else."""


@dataclass
class Generated:
    """What came of one prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    embedding: tuple[float, ...] | None = None
    num_cached_tokens: int = 0


def generate(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    params: SamplingParams | None = None,
    grammars: Grammars | None = None,
    patterns: Sequence[str | None] = (),
) -> tuple[list[Generated], EngineStats]:
    """Runs all prompts at once through an engine of its own, to ``max_tokens`` whatever the tokens are.

    Args:
        patterns: for ``grammars``, one a prompt.
    """
    params = replace(params or SamplingParams(temperature=0.0), max_tokens=max_tokens)
    requests = [
        Request(str(i), tuple(prompt), params, grammar=patterns[i] if patterns else None)
        for i, prompt in enumerate(prompts)
    ]
    return answer(executor, requests, grammars)


def answer(
    executor: Executor, requests: Sequence[Request], grammars: Grammars | None = None
) -> tuple[list[Generated], EngineStats]:
    """Runs all requests at once through an engine of its own; their ids are "0", "1", ..."""
    core = EngineCore(executor, grammars)
    results = [Generated() for _ in requests]
    for request in requests:
        core.add_request(request)
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            result = results[int(output.request_id)]
            result.token_ids += output.token_ids
            result.logprobs += output.logprobs or ()
            result.prompt_logprobs = output.prompt_logprobs or result.prompt_logprobs
            result.embedding = output.embedding or result.embedding
            result.num_cached_tokens = output.num_cached_tokens
    core.check_invariants()
    return results, core.stats


def tokens(results: Sequence[Generated]) -> list[list[int]]:
    return [result.token_ids for result in results]
