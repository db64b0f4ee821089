"""Times answers to one prompt, and steps of a beam search: ``python -m tests.benchmarks.shared_prompt``.

The engine without a server, on a CPU with the default model. Choices: they arrive together, each with a seed
of its own. The fastest time to first token that any way of sharing could give all of them is that of one
choice alone. Beams: one step of so many requests of one token behind a prompt, of which all but the last
block is in the prefix cache, beside a decode step of as many sequences.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

from engine_runtime.factory import RuntimeConfig, create_executor
from scheduler.engine_core import EngineCore
from scheduler.messages import Request, SamplingParams
from server.model_source import fetch_default_model

_PROMPT = 500
_NUM_TOKENS = 8


def _prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(1000, 40_000), k=length))


def _choices(core: EngineCore, count: int, seed: int) -> tuple[float, float, int, int]:
    """Seconds to the first token of the first and of the last choice; blocks held; tokens computed."""
    prompt, computed = _prompt(seed, _PROMPT), core.stats.scheduled_tokens_total
    waiting = {f"{seed}-{i}" for i in range(count)}
    start, times, used = time.perf_counter(), [], 0.0
    for name in sorted(waiting):
        core.add_request(Request(name, prompt, SamplingParams(seed=len(times), max_tokens=_NUM_TOKENS)))
    while core.has_work:
        for output in core.step().outputs:
            if output.request_id in waiting and output.token_ids:
                waiting.discard(output.request_id)
                times.append(time.perf_counter() - start)
        used = max(used, core.stats.kv_cache_usage)
    return times[0], times[-1], round(used * 10_000), core.stats.scheduled_tokens_total - computed


def _beam_step(core: EngineCore, width: int, seed: int) -> float:
    """Seconds of one step of a beam search in which half a block has to be computed again."""
    prompt = _prompt(seed, _PROMPT - _PROMPT % 16)
    for name, text in [("first", prompt)] + [
        (f"{seed}-{i}", (*prompt, *_prompt(i, 8))) for i in range(width)
    ]:
        core.add_request(
            Request(name, text, SamplingParams(temperature=0.0, logprobs=2 * width, max_tokens=1))
        )
        if name == "first":
            while core.has_work:
                core.step()
            start = time.perf_counter()
    while core.has_work:
        core.step()
    return time.perf_counter() - start


def _decode_step(core: EngineCore, count: int, seed: int) -> float:
    prompt = _prompt(seed, 16)
    for i in range(count):
        core.add_request(Request(f"{seed}-{i}", prompt, SamplingParams(seed=i, max_tokens=20, logprobs=8)))
    while core.stats.num_running < count:
        core.step()
    times = []
    while core.has_work:
        start = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="the fastest of so many is shown")
    options = parser.parse_args()
    executor, _ = create_executor(
        RuntimeConfig(
            options.model or fetch_default_model(), max_model_len=2048, kv_cache_bytes=1 << 28,
            num_threads=options.threads,
        )
    )  # fmt: skip
    core, spec = EngineCore(executor), executor.spec
    print(f"{spec.device}; {spec.max_num_batched_tokens} tokens a step, blocks of {spec.block_size}\n")
    seeds = iter(range(1_000_000))
    _choices(core, 8, next(seeds))
    print(
        f"| choices of a prompt of {_PROMPT} | first token, ms | of the last choice, ms | blocks | computed |"
    )
    print("|---|---|---|---|---|")
    for count in (1, 4, 8):
        rows = [_choices(core, count, next(seeds)) for _ in range(options.rounds)]
        first, last = (min(row[i] for row in rows) * 1e3 for i in (0, 1))
        blocks = round(rows[-1][2] * spec.num_blocks / 10_000)
        print(f"| {count} | {first:.0f} | {last:.0f} | {blocks} | {rows[-1][3]} |")
    print("\n| beams | step of a search, ms | decode step, ms |")
    print("|---|---|---|")
    for width in (1, 4, 10):
        step = min(_beam_step(core, width, next(seeds)) for _ in range(options.rounds))
        decode = statistics.median(_decode_step(core, width, next(seeds)) for _ in range(3))
        print(f"| {width} | {step * 1e3:.1f} | {decode * 1e3:.1f} |")
    core.shutdown()


if __name__ == "__main__":
    main()
