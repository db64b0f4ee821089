"""Times whole steps of the CPU executor: ``python -m tests.benchmarks.cpu_executor [MODEL] [--dtype float32]
...``.

Steps are made by hand, without a scheduler or a server: decode steps of so many sequences at a context of
about 160 tokens, and one prefill of 16 prompts of 126 tokens. Embedding, all layers, logits and greedy
sampling are included.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from engine_runtime.factory import RuntimeConfig, create_executor
from scheduler.executor import Executor
from scheduler.messages import NewSequence, SamplingParams, ScheduledSequence, SchedulerOutput
from server.model_source import fetch_default_model

_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_PROMPT = 126
_PREFILLS = 16
_GREEDY = SamplingParams(temperature=0.0)


class Sequences:
    """A group of sequences that run in step."""

    def __init__(self, executor: Executor, count: int) -> None:
        self._executor = executor
        self._count = count
        self._length = 0
        self._blocks = -(-2 * _PROMPT // executor.spec.block_size)

    def prefill(self) -> float:
        """Computes all prompts, 16 in a step; returns the seconds it took."""
        rng = np.random.default_rng(self._count)
        names = [str(i) for i in range(self._count)]
        new = tuple(
            NewSequence(name, tuple(rng.integers(3, 40000, _PROMPT).tolist()), _PROMPT, 0, (), _GREEDY)
            for name in names
        )
        scheduled = [
            ScheduledSequence(name, 0, _PROMPT, self._blocks_of(i), True) for i, name in enumerate(names)
        ]
        self._length = _PROMPT
        seconds = self._run(SchedulerOutput(0, new, tuple(scheduled[:_PREFILLS]), tuple(names)))
        for first in range(_PREFILLS, self._count, _PREFILLS):
            part = tuple(scheduled[first : first + _PREFILLS])
            seconds += self._run(SchedulerOutput(0, (), part, ()))
        return seconds

    def decode(self) -> float:
        """Computes one more token of each; returns the seconds it took."""
        scheduled = tuple(ScheduledSequence(str(i), self._length, 1, (), True) for i in range(self._count))
        self._length += 1
        return self._run(SchedulerOutput(0, (), scheduled, ()))

    def _blocks_of(self, sequence: int) -> tuple[int, ...]:
        return tuple(range(sequence * self._blocks, (sequence + 1) * self._blocks))

    def _run(self, step: SchedulerOutput) -> float:
        start = time.perf_counter()
        self._executor.execute(step).result()
        return time.perf_counter() - start


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags]
    return f"{names[0] if names else platform.processor()} ({', '.join(known)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--dtype", default="int8", choices=("int8", "float32"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    start = time.perf_counter()
    executor, _ = create_executor(
        RuntimeConfig(
            options.model or fetch_default_model(),
            dtype=options.dtype,
            max_model_len=2048,
            max_num_batched_tokens=_PREFILLS * _PROMPT,
            kv_cache_bytes=1 << 30,
            num_threads=options.threads,
        )
    )
    loaded = time.perf_counter() - start
    print(f"{_processor()}, {executor.spec.device}, load {os.getloadavg()[0]:.1f}")
    print(f"loaded in {loaded:.2f} s\n")
    print("| sequences | decode step, median ms | fastest ms | tokens/s |")
    print("|---|---|---|---|")
    for count in _BATCHES:
        sequences = Sequences(executor, count)
        sequences.prefill()
        times = [sequences.decode() for _ in range(options.steps)]
        median, fastest = statistics.median(times), min(times)
        print(f"| {count} | {median * 1e3:.2f} | {fastest * 1e3:.2f} | {count / median:,.0f} |")
    sequences = Sequences(executor, 16)
    times = [sequences.prefill() for _ in range(6)]
    median, fastest = statistics.median(times), min(times)
    tokens = 16 * _PROMPT
    print(
        f"\nprefill of 16 x {_PROMPT} tokens: median {median * 1e3:.0f} ms = {tokens / median:,.0f} tokens/s,"
    )
    print(f"fastest {fastest * 1e3:.0f} ms = {tokens / fastest:,.0f} tokens/s")
    executor.shutdown()


if __name__ == "__main__":
    main()
