"""The step loop."""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import Future
from dataclasses import replace

from scheduler.executor import Executor, ExecutorLostError
from scheduler.grammars import Grammars, NoGrammars
from scheduler.messages import (
    EngineOutputs,
    EngineStats,
    ModelRunnerOutput,
    ProfileSteps,
    Request,
    SchedulerOutput,
)
from scheduler.scheduler import Scheduler
from scheduler.scheduler_config import SchedulerConfig
from scheduler.step_clock import StepClock

_log = logging.getLogger(__name__)


class EngineCore:
    """A scheduler and an executor, run step by step in one thread.

    Callers add and abort requests and call ``step`` while ``has_work``. With an executor that allows two
    steps in flight, a step is scheduled and handed over while the device runs the one before it.

    A request with a grammar has work only once the grammar is compiled: whoever waits for work must be woken
    by ``grammars``.
    """

    def __init__(self, executor: Executor, grammars: Grammars | None = None) -> None:
        spec = executor.spec
        self._executor = executor
        self._grammars = grammars or NoGrammars()
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=spec.num_blocks,
                block_size=spec.block_size,
                max_num_seqs=spec.max_num_seqs,
                max_num_batched_tokens=spec.max_num_batched_tokens,
                max_model_len=spec.max_model_len,
                vocab_size=spec.vocab_size,
                cache_seed=spec.model_id,
                attention_parity=spec.attention_parity,
                saturating_num_tokens=spec.saturating_num_tokens,
            ),
            self._grammars,
        )
        self._in_flight: deque[tuple[SchedulerOutput, Future[ModelRunnerOutput]]] = deque()
        self._clock = StepClock()

    def step(self) -> EngineOutputs:
        """Schedules and hands over one step; waits for the oldest in flight if no more may be.

        Returns at once if there is no work. The sequences of a step that fails are tried again in smaller
        steps, until those at fault are alone and end with ERROR.

        Raises:
            ExecutorLostError: the device is lost, and with it all that runs.
        """
        self._clock.start()
        step = self._scheduler.schedule()
        self._clock.lap("schedule", step)
        if step is not None:
            self._in_flight.append((step, self._executor.execute(step)))
        if self._in_flight and (step is None or len(self._in_flight) >= self._executor.max_in_flight):
            self._complete(*self._in_flight.popleft())
        return EngineOutputs(self._scheduler.take_outputs(), self.stats, self._clock.take_profile())

    def _complete(self, step: SchedulerOutput, future: Future[ModelRunnerOutput]) -> None:
        try:
            result = future.result()
        except ExecutorLostError:
            raise
        except Exception as error:
            _log.exception("step %d of %d sequences failed", step.step_id, len(step.scheduled))
            self._scheduler.fail(step, error)
        else:
            self._clock.lap("execute", step)
            self._scheduler.update(step, result)
            self._clock.lap("update", step)

    def add_request(self, request: Request) -> None:
        """Queues a request. One that can never run ends with ERROR at the next ``step``.

        Raises ValueError if a request of this id is not finished yet.
        """
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Ends a request at once: its blocks are free, its last output (ABORT) comes with the next ``step``.

        Nothing happens if it is unknown or finished.
        """
        self._scheduler.abort(request_id)

    def flush_prefix_cache(self) -> int:
        """Forgets the contents of all blocks: no later request hits what could be hit before.

        Sequences that run keep their blocks. Returns the number of blocks whose contents were forgotten.
        """
        return self._scheduler.flush_prefix_cache()

    def profile(self, wanted: ProfileSteps) -> None:
        """Takes a profile of the next steps; it comes with the outputs of the last of them."""
        self._clock.profile(wanted)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to compute, to wait for or to return."""
        return self._scheduler.has_work or self._clock.has_profile

    @property
    def stats(self) -> EngineStats:
        seconds = self._clock.seconds
        return replace(
            self._scheduler.stats,
            schedule_seconds_total=seconds["schedule"],
            execute_seconds_total=seconds["execute"],
            update_seconds_total=seconds["update"],
        )

    def check_invariants(self) -> None:
        """Raises AssertionError if blocks, sequences or steps are lost or contradict each other."""
        self._scheduler.check_invariants()

    def shutdown(self) -> None:
        """Waits for the steps in flight, drops their results and frees the device."""
        for _, future in self._in_flight:
            future.exception()
        self._in_flight.clear()
        self._grammars.shutdown()
        self._executor.shutdown()
