"""Times the CPU sampler: microseconds a row, median and best of some rounds.

    python -m tests.benchmarks.cpu_sampling [--rounds 20]

The logits are normal with a standard deviation of 3, and 50 tokens 12 above the rest, as a confident model's.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from engine_runtime.sampling import Sampler, SamplingRow
from scheduler.messages import SamplingParams

CASES: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "top_k 40": SamplingParams(temperature=0.8, top_k=40),
    "top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "top_p 0.99, temperature 3": SamplingParams(temperature=3.0, top_p=0.99),
    "min_p 0.01, top_k 50, top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9, top_k=50, min_p=0.01),
    "greedy, 5 logprobs": SamplingParams(temperature=0.0, logprobs=5),
    "greedy, penalties": SamplingParams(temperature=0.0, repetition_penalty=1.1, presence_penalty=0.3),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)
    print("| case | rows x vocabulary | median | best |")
    print("|---|---|---|---|")
    for shape in ((1, 49_152), (32, 49_152), (4, 151_936)):
        source = (rng.standard_normal(shape) * 3).astype(np.float32)
        source[:, :50] += 12
        logits = np.empty_like(source)
        sampler = Sampler(shape[1])
        for name, params in CASES.items():
            rows = [SamplingRow(str(i), params, np.arange(200, dtype=np.int32), 126) for i in range(shape[0])]
            times = []
            for _ in range(rounds + 1):
                logits[:] = source
                start = time.perf_counter()
                sampler.sample(logits, rows)
                times.append((time.perf_counter() - start) / shape[0] * 1e6)
            median, best = np.median(times[1:]), min(times[1:])
            print(f"| {name} | {shape[0]} x {shape[1]} | {median:.0f} | {best:.0f} |", flush=True)


if __name__ == "__main__":
    main()
