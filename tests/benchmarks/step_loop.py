"""What the step loop itself costs, with an executor that answers at once.

    python tests/benchmarks/step_loop.py [--sequences 256] [--steps 1000]

Counted is everything ``EngineCore.step`` does except the executor's own work: scheduling, making the step,
taking its result, making the outputs and the statistics.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from concurrent.futures import Future

from scheduler.engine_core import EngineCore
from scheduler.messages import (
    ExecutorSpec,
    ModelRunnerOutput,
    Request,
    SampledToken,
    SamplingParams,
    SchedulerOutput,
)

BLOCK_SIZE = 16


class InstantExecutor:
    """Samples token 7 for everybody. ``seconds`` adds up its own work."""

    def __init__(self, spec: ExecutorSpec, max_in_flight: int) -> None:
        self.spec = spec
        self.max_in_flight = max_in_flight
        self.seconds = 0.0

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        start = time.perf_counter()
        sampled = tuple(SampledToken(share.request_id, 7) for share in step.scheduled if share.samples)
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(ModelRunnerOutput(step.step_id, sampled))
        self.seconds += time.perf_counter() - start
        return future

    def shutdown(self) -> None:
        pass


def measure(
    num_sequences: int = 256, num_steps: int = 1000, prompt_len: int = 512, max_in_flight: int = 1
) -> dict[str, float]:
    """Milliseconds a step while ``num_sequences`` decode, and milliseconds to admit their prompts.

    The prompts have different lengths, so that each step completes the blocks of some sequences.
    """
    max_model_len = prompt_len + BLOCK_SIZE + num_steps + 64
    spec = ExecutorSpec(
        model_id="benchmark",
        vocab_size=32000,
        block_size=BLOCK_SIZE,
        num_blocks=num_sequences * (max_model_len // BLOCK_SIZE + 1),
        max_model_len=max_model_len,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=8192,
        device="none",
    )
    executor = InstantExecutor(spec, max_in_flight)
    engine = EngineCore(executor)
    for number in range(num_sequences):
        length = prompt_len + number % BLOCK_SIZE
        prompt = tuple((number * 7919 + position) % spec.vocab_size for position in range(length))
        engine.add_request(Request(str(number), prompt, SamplingParams(max_tokens=max_model_len)))

    def step() -> float:
        executor.seconds = 0.0
        start = time.perf_counter()
        engine.step()
        return (time.perf_counter() - start - executor.seconds) * 1e3

    admission = 0.0
    while engine.stats.num_waiting:
        admission += step()
    for _ in range(20):
        step()
    gc.collect()
    times = sorted(step() for _ in range(num_steps))
    assert engine.stats.num_running == num_sequences
    return {
        "num_sequences": num_sequences,
        "max_in_flight": max_in_flight,
        "median_ms": statistics.median(times),
        "mean_ms": statistics.fmean(times),
        "p99_ms": times[int(len(times) * 0.99)],
        "admission_ms_per_request": admission / num_sequences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    for max_in_flight in (1, 2):
        result = measure(arguments.sequences, arguments.steps, max_in_flight=max_in_flight)
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
