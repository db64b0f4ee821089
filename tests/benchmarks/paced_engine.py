"""An engine process whose steps compute nothing: a millisecond each, and a given number a second.

``python -m tests.benchmarks.paced_engine ADDRESS PARENT_ID``. The scheduler, the step loop and the line to
the API process are the real ones. What it does stands in an environment variable, as a ``Pace``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass

from scheduler.engine_core import EngineCore
from scheduler.messages import ExecutorSpec, ModelRunnerOutput, SampledToken, SchedulerOutput
from server.launch import follow_parent
from server.transport import EngineEnd, Kind, Ready

STEP_SECONDS = 0.001
_VARIABLE = "PACED_ENGINE"


@dataclass(frozen=True)
class Pace:
    """What the engine does.

    Attributes:
        token_ids: every answer is these, over and over.
        steps_per_second: at most; a running sequence gets a token in each.
        max_num_seqs: that run at a time.
        max_model_len: in tokens; there are blocks for four of this length beside short ones.
    """

    token_ids: tuple[int, ...]
    steps_per_second: float
    max_num_seqs: int
    max_model_len: int = 2**19

    def to_environment(self) -> None:
        """For the engines of all processes that this one starts."""
        os.environ[_VARIABLE] = json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_environment() -> Pace:
        fields = json.loads(os.environ[_VARIABLE])
        return Pace(**fields | {"token_ids": tuple(fields["token_ids"])})


class PacedExecutor:
    """Samples the n-th of the pace's tokens as the n-th token of every answer."""

    max_in_flight = 1

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._num_prompt_tokens: dict[str, int] = {}
        self._due = 0.0
        self.spec = ExecutorSpec(
            model_id="paced",
            vocab_size=49_152,
            block_size=16,
            num_blocks=4 * pace.max_model_len // 16 + 256 * pace.max_num_seqs,
            max_model_len=pace.max_model_len,
            max_num_seqs=pace.max_num_seqs,
            max_num_batched_tokens=8192,
            device="none (paced)",
        )

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        now = time.perf_counter()
        end = max(now + STEP_SECONDS, self._due)
        # An engine that fell behind does not hurry afterwards.
        self._due = end + 1 / self._pace.steps_per_second
        for request_id in step.released:
            del self._num_prompt_tokens[request_id]
        for new in step.new:
            self._num_prompt_tokens[new.request_id] = new.num_prompt_tokens
        token_ids = self._pace.token_ids
        sampled = []
        for share in step.scheduled:
            if share.samples:
                number = share.start + share.num_tokens - self._num_prompt_tokens[share.request_id]
                sampled.append(SampledToken(share.request_id, token_ids[number % len(token_ids)]))
        time.sleep(max(0.0, end - time.perf_counter()))
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(ModelRunnerOutput(step.step_id, tuple(sampled)))
        return future

    def shutdown(self) -> None:
        pass


def run(address: str, parent_id: int) -> int:
    follow_parent(parent_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = EngineEnd(address)
    try:
        end.receive()
        executor = PacedExecutor(Pace.from_environment())
        core = EngineCore(executor)
        gc.freeze()
        end.send(Kind.READY, Ready(executor.spec, "none", 0.0))
        end.run(core)
    finally:
        end.close()
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], int(sys.argv[2])))
