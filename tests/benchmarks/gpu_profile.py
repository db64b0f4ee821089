"""Where the device time of steps goes, kernel by kernel: ``python -m tests.benchmarks.gpu_profile``.

Llama-3.1-8B's shape with random weights. ``--decodes`` sequences of ``--context`` tokens run; profiled are
the steps in which ``--prompts`` new ones of ``--prompt-tokens`` arrive, or steps of decoding alone if there
are none. Needs torch, whose profiler (CUPTI) sees all kernels of the process; nothing else of it is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine_runtime.cuda import CudaDevice
from engine_runtime.executors.tensorrt.factory import create_gpu_executor
from engine_runtime.runtime_config import RuntimeConfig
from scheduler.engine_core import EngineCore
from scheduler.messages import Request, SamplingParams
from tests.benchmarks.gpu_engine import LLAMA_8B


def _add(core: EngineCore, rng: np.random.Generator, name: str, number: int, num_tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=512)
    for i in range(number):
        core.add_request(
            Request(f"{name}{i}", tuple(rng.integers(1000, 100000, num_tokens).tolist()), params)
        )


def _decode_all(core: EngineCore, number: int) -> None:
    """Steps until every sequence has given a token, and some more, so that graphs are recorded."""
    begun: set[str] = set()
    while len(begun) < number:
        begun |= {output.request_id for output in core.step().outputs if output.token_ids}
    for _ in range(6):
        core.step()


def main(arguments: Sequence[str] | None = None) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decodes", nargs="*", type=int, default=[0, 8, 64])
    parser.add_argument("--context", type=int, default=1088)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none")
    parser.add_argument("--rows", type=int, default=16, help="of each table")
    options = parser.parse_args(arguments)
    torch.cuda.init()
    device = CudaDevice()
    executor, _ = create_gpu_executor(
        RuntimeConfig(Path("random"), device="cuda", max_model_len=8192, quantization=options.quantization),
        device, LLAMA_8B, None, lambda what, done, total: None,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    for decodes in options.decodes:
        core = EngineCore(executor)
        _add(core, rng, f"d{decodes}-", decodes, options.context)
        _decode_all(core, decodes)
        shapes: list[Any] = []
        decoder: Any = executor._decoder
        run = decoder.run

        def noted(shape: Any, path: Any, run: Any = run, shapes: list[Any] = shapes) -> None:
            shapes.append(shape)
            run(shape, path)

        decoder.run = noted
        _add(core, rng, f"p{decodes}-", options.prompts, options.prompt_tokens)
        executor._stream.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(options.steps):
                core.step()
            executor._stream.synchronize()
        decoder.run = run
        print(f"\n## {decodes} decodes\n\n" + "\n".join(map(str, shapes)) + "\n")
        kernels = [event for event in profiler.events() if event.device_type.name == "CUDA"]
        total = sum(event.device_time for event in kernels)
        span = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
        times: dict[str, list[float]] = {}
        for event in kernels:
            times.setdefault(event.name, []).append(event.device_time)
        print(f"{len(kernels)} kernels, {total / 1e3:.2f} ms of {span / 1e3:.2f} ms\n")
        print("| kernel | launches | ms | share | median µs |\n|---|---|---|---|---|")
        for name, all_times in sorted(times.items(), key=lambda item: -sum(item[1]))[: options.rows]:
            print(
                f"| {name[:70]} | {len(all_times)} | {sum(all_times) / 1e3:.2f} "
                f"| {sum(all_times) / total:.1%} | {np.median(all_times):.1f} |"
            )
        for name in [f"d{decodes}-{i}" for i in range(decodes)]:
            core.abort(name)
        for name in [f"p{decodes}-{i}" for i in range(options.prompts)]:
            core.abort(name)
        while core.has_work:
            core.step()
        _add(core, rng, "last-", 1, 2)  # its step tells the executor what was released
        core.step()
        core.abort("last-0")
        while core.has_work:
            core.step()
    executor.shutdown()


if __name__ == "__main__":
    main()
