"""How often sequences are preempted when memory is short, and how many run: the step loop without a model.

    python -m tests.benchmarks.preemptions [--answers 300] [--runs 6]

273 blocks of 16, prompts of 27 to 80 tokens, always 16 more that wait, from an empty start. An answer ends by
itself far below its ``max_tokens``, or (known) cannot stop and has as many. No clock and no device: the same
code gives the same figures on any machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
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

_STOP, _OTHER = 1, 7
_NUM_AHEAD = 16
_SPEC = ExecutorSpec(
    model_id="preemptions",
    vocab_size=1000,
    block_size=16,
    num_blocks=273,
    max_model_len=2048,
    max_num_seqs=64,
    max_num_batched_tokens=256,
    device="none",
)
# How long the next answer gets, by its number.
_Lengths = Callable[[random.Random, int], int]
_MIXES: dict[str, _Lengths] = {
    "32 to 96": lambda dice, number: dice.randint(32, 96),
    "100 to 200": lambda dice, number: dice.randint(100, 200),
    "200 to 400": lambda dice, number: dice.randint(200, 400),
    "16 or 400": lambda dice, number: dice.choice((16, 400)),
    "log-normal": lambda dice, number: max(1, min(1900, int(dice.lognormvariate(5, 1)))),
    "200 of 32 to 96, then 200 to 400": lambda dice, number: (
        dice.randint(32, 96) if number < 200 else dice.randint(200, 400)
    ),
}


class EndingExecutor:
    """Samples a stop token where an answer is to end."""

    spec = _SPEC
    max_in_flight = 1

    def __init__(self) -> None:
        self.lengths: dict[str, int] = {}
        self._num_generated: dict[str, int] = {}

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        for request_id in step.released:
            del self._num_generated[request_id]
        for new in step.new:
            self._num_generated[new.request_id] = len(new.token_ids) - new.num_prompt_tokens
        sampled = []
        for share in step.scheduled:
            if share.samples:
                name = share.request_id
                self._num_generated[name] += 1
                is_last = self._num_generated[name] == self.lengths[name]
                sampled.append(SampledToken(name, _STOP if is_last else _OTHER))
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(ModelRunnerOutput(step.step_id, tuple(sampled)))
        return future

    def shutdown(self) -> None:
        pass


def measure(lengths: _Lengths, num_answers: int, seed: int, *, is_known: bool) -> dict[str, float]:
    """One run, until so many answers have ended."""
    dice = random.Random(seed)
    executor = EndingExecutor()
    core = EngineCore(executor)
    num_sent = num_ended = num_steps = num_running = 0
    while num_ended < num_answers:
        while num_sent - num_ended < _SPEC.max_num_seqs + _NUM_AHEAD:
            length = lengths(dice, num_sent)
            prompt = tuple(dice.randrange(2, _SPEC.vocab_size) for _ in range(dice.randint(27, 80)))
            params = SamplingParams(
                max_tokens=length if is_known else _SPEC.max_model_len,
                stop_token_ids=() if is_known else (_STOP,),
            )
            executor.lengths[f"r{num_sent}"] = length
            core.add_request(Request(f"r{num_sent}", prompt, params))
            num_sent += 1
        num_ended += sum(output.finish_reason is not None for output in core.step().outputs)
        num_steps += 1
        num_running += core.stats.num_running
    stats = core.stats
    return {
        "preemptions": stats.preemptions_total / num_ended,
        "again": 100 * stats.recomputed_tokens_total / stats.scheduled_tokens_total,
        "running": num_running / num_steps,
        "steps": num_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--answers", type=int, default=300)
    parser.add_argument("--runs", type=int, default=6)
    arguments = parser.parse_args()
    print("| answers | end | preemptions a request | computed again | running | steps |")
    print("|:--|:--|--:|--:|--:|--:|")
    for name, lengths in _MIXES.items():
        for is_known in (False, True):
            runs = [
                measure(lengths, arguments.answers, seed, is_known=is_known)
                for seed in range(1, arguments.runs + 1)
            ]
            mean = {figure: statistics.fmean(run[figure] for run in runs) for figure in runs[0]}
            print(
                f"| {name} | {'known' if is_known else 'by itself'} | {mean['preemptions']:.3f} "
                f"| {mean['again']:.2f} % | {mean['running']:.1f} | {mean['steps']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
