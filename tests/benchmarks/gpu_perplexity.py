"""How much worse a model predicts text on a GPU in FP8 than in bfloat16: ``python -m
tests.benchmarks.gpu_perplexity [MODEL] [--quantization none fp8 everywhere] [--kv-cache-dtype auto fp8]``.

The text and its windows are those of ``perplexity``. Log-probabilities are those that the executor reports of
prompts, so that everything which serves takes part; the first row is bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt

from engine_runtime.executors.tensorrt import model_segments
from engine_runtime.factory import RuntimeConfig, create_executor
from scheduler.engine_core import EngineCore
from scheduler.executor import Executor
from scheduler.messages import Request, SamplingParams
from server.model_source import fetch_default_model
from tests.benchmarks.perplexity_table import PerplexityTable
from tests.benchmarks.perplexity_text import WINDOW, text_windows


def negative_log_likelihoods(executor: Executor, windows: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Nats of each token but the first of each window, given those before it in the window."""
    core = EngineCore(executor)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    for i, window in enumerate(windows):
        core.add_request(Request(str(i), tuple(window), params))
    losses: dict[int, list[float]] = {}
    while core.has_work:
        for output in core.step().outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.prompt_logprobs:
                losses[int(output.request_id)] = [-entry.logprob for entry in output.prompt_logprobs]
    for i, window in enumerate(windows):
        if len(losses[i]) != len(window) - 1:
            raise RuntimeError(f"window {i}: {len(losses[i])} log-probabilities of {len(window)} tokens")
    return np.concatenate([losses[i] for i in range(len(windows))])


def everywhere() -> contextlib.AbstractContextManager[object]:
    """No layer keeps its 16 bits."""
    return mock.patch.object(model_segments, "kept_segments", return_value=frozenset())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument(
        "--quantization",
        nargs="*",
        choices=("none", "fp8", "everywhere"),
        default=["none", "fp8", "everywhere"],
        help="everywhere: FP8 also in the layers that a narrow model keeps in bfloat16",
    )
    parser.add_argument("--kv-cache-dtype", nargs="*", choices=("auto", "fp8"), default=["auto", "fp8"])
    options = parser.parse_args()
    path = options.model or fetch_default_model()
    windows = text_windows(path)
    rows = PerplexityTable(windows, "executor", "bfloat16")
    wanted = itertools.product(options.quantization, options.kv_cache_dtype)
    for quantization, kv_cache_dtype in dict.fromkeys([("none", "auto"), *wanted]):
        config = RuntimeConfig(
            path, device="cuda", quantization="none" if quantization == "none" else "fp8",
            kv_cache_dtype=kv_cache_dtype, max_model_len=WINDOW + 2, max_num_batched_tokens=2048,
            kv_cache_bytes=1 << 30,
        )  # fmt: skip
        with everywhere() if quantization == "everywhere" else contextlib.nullcontext():
            executor, _ = create_executor(config)
        start = time.perf_counter()
        losses = negative_log_likelihoods(executor, windows)
        seconds = time.perf_counter() - start
        executor.shutdown()
        rows.add(executor.spec.device.partition("(")[2][:-1], losses, seconds)


if __name__ == "__main__":
    main()
