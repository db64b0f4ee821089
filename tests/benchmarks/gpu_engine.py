"""The whole engine on a GPU, without HTTP: ``python -m tests.benchmarks.gpu_engine [--shape 128/128 ...]
[--quantization fp8] [--kv-cache-dtype fp8]``.

Llama-3.1-8B's shape with random weights, greedy, random prompts, so that no prefix is reused. A closed loop
keeps so many sequences running; each finished one is replaced at once. Reported are output tokens a second
between the first and the last token of the run, and beside them

- floor: the same tokens at the rate at which weights and the mean KV of decode steps could be read, plus the
  arithmetic of the prompts;
- busy: device time from the first to the last operation of each step, by CUDA events, over wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine_runtime.cuda import CudaDevice, Event
from engine_runtime.executors.memory_plan import MemoryPlan
from engine_runtime.executors.tensorrt.batch import StepShape
from engine_runtime.executors.tensorrt.executor import TensorRTExecutor
from engine_runtime.executors.tensorrt.factory import create_gpu_executor
from engine_runtime.model_config import LayerConfig, ModelConfig
from engine_runtime.rope import RopeConfig
from engine_runtime.runtime_config import RuntimeConfig
from scheduler.engine_core import EngineCore
from scheduler.messages import Request, SamplingParams

_BANDWIDTH = 4.3e12
_FLOPS = 790e12
# Output tokens a second of vLLM 0.26 on one H200, as measured for the issue that asked for this.
_VLLM = {
    "none": {
        "128/128": {1: 203, 16: 2937, 64: 8700, 256: 15373},
        "1024/128": {1: 196, 16: 1907, 64: 3298, 256: 3908},
        "128/1024": {1: 204, 16: 2991, 64: 9230, 256: 17021},
    },
    "fp8": {
        "128/128": {1: 290, 16: 4210, 64: 12079, 256: 21440},
        "1024/128": {1: 280, 16: 2775, 64: 4877, 256: 5816},
        "128/1024": {1: 291, 16: 4214, 64: 12142, 256: 21174},
        "1000/1000": {1: 287, 16: 3637, 64: 8408, 256: 11791},
    },
}

LLAMA_8B = ModelConfig(
    architecture="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    attention_scale=128**-0.5,
    layers=(LayerConfig(RopeConfig(500000.0)),) * 32,
)


class BusyTime:
    """Device time of the runs of steps.

    Attributes:
        pairs: events around each run since the last ``take``, and its shape.
        by_shape: milliseconds of the runs before the last ``take``, by tokens, decodes and tiles (by 64).
    """

    def __init__(self, executor: TensorRTExecutor) -> None:
        self.pairs: list[tuple[Event, Event, StepShape]] = []
        self.by_shape: dict[tuple[int, int, int], list[float]] = {}
        decoder: Any = executor._decoder
        stream = executor._stream
        run = decoder.run

        def timed(shape: StepShape, path: Any) -> None:
            start, end = Event(times=True), Event(times=True)
            start.record(stream)
            run(shape, path)
            end.record(stream)
            self.pairs.append((start, end, shape))

        decoder.run = timed

    def take(self) -> float:
        """Seconds since the last call."""
        seconds = 0.0
        self.by_shape.clear()
        for start, end, shape in self.pairs:
            milliseconds = end.milliseconds_since(start)
            seconds += milliseconds / 1e3
            key = shape.num_tokens, shape.num_decodes, -(-shape.num_tiles // 64) * 64
            self.by_shape.setdefault(key, []).append(milliseconds)
            start.close()
            end.close()
        self.pairs.clear()
        return seconds


def closed_loop(
    core: EngineCore,
    num_prompt: int,
    num_output: int,
    concurrency: int,
    num_requests: int,
    seed: int,
) -> tuple[int, float, list[float]]:
    """Runs the requests; returns output tokens, seconds and the time to the first token of each."""
    rng = np.random.default_rng([seed, num_prompt, num_output, concurrency])
    params = SamplingParams(temperature=0.0, max_tokens=num_output)
    started: dict[str, float] = {}
    first_token: list[float] = []
    waiting = [
        Request(f"{concurrency}-{seed}-{i}", tuple(rng.integers(1000, 100000, num_prompt).tolist()), params)
        for i in range(num_requests)
    ]
    waiting.reverse()
    num_tokens = 0
    begin = time.perf_counter()

    def add() -> None:
        if waiting:
            request = waiting.pop()
            started[request.request_id] = time.perf_counter()
            core.add_request(request)

    for _ in range(concurrency):
        add()
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            num_tokens += len(output.token_ids)
            since = started.pop(output.request_id, None)
            if since is not None:
                first_token.append(time.perf_counter() - since)
            if output.finish_reason is not None:
                add()
    return num_tokens, time.perf_counter() - begin, first_token


def floor_seconds(
    config: ModelConfig, plan: MemoryPlan, num_prompt: int, num_output: int, concurrency: int, requests: int
) -> float:
    kv_token = plan.block_bytes / plan.block_size
    table = 2 * config.vocab_size * config.hidden_size
    read = plan.weight_bytes - table  # a step looks up some rows of the embeddings
    layers = read - table
    context = num_prompt + num_output / 2
    decode_steps = requests * (num_output - 1) / concurrency
    decode = decode_steps * (read + concurrency * context * kv_token) / _BANDWIDTH
    # Two operations a weight, which has two bytes; or one byte, at twice the rate.
    prefill = requests * num_prompt * layers / _FLOPS
    return decode + max(prefill, requests * read / _BANDWIDTH if concurrency == 1 else 0.0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="*", default=["128/128", "1024/128"], help="tokens in/out")
    parser.add_argument("--concurrency", nargs="*", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--layers", type=int, default=LLAMA_8B.num_hidden_layers)
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none", help="of the weights")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--max-num-batched-tokens", type=int, help="of a step")
    parser.add_argument("--rounds", type=float, default=3.0, help="requests a running sequence")
    parser.add_argument("--steps", action="store_true", help="print the device time of each kind of step")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the last measurement")
    options = parser.parse_args(arguments)
    config = replace(LLAMA_8B, num_hidden_layers=options.layers, layers=LLAMA_8B.layers[:1] * options.layers)
    begin = time.perf_counter()
    device = CudaDevice()
    executor, plan = create_gpu_executor(
        RuntimeConfig(
            Path("random"), device="cuda", max_model_len=8192,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=max(256, *options.concurrency),
            quantization=options.quantization, kv_cache_dtype=options.kv_cache_dtype,
        ),
        device, config, None, lambda what, done, total: None,
    )  # fmt: skip
    print(
        f"{executor.spec.device}; ready in {time.perf_counter() - begin:.1f} s\n{plan.table()}\n",
        flush=True,
    )
    print("| in/out | sequences | tokens/s | vLLM 0.26 | ratio | of floor | busy | TTFT p50 ms | ms a step |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    busy_time = BusyTime(executor)
    core = EngineCore(executor)
    for shape in options.shape:
        num_prompt, num_output = map(int, shape.split("/"))
        for concurrency in options.concurrency:
            requests = max(2, int(options.rounds * concurrency))
            closed_loop(core, num_prompt, min(num_output, 8), concurrency, concurrency, 1)  # warms up
            busy_time.take()
            tokens, seconds, ttft = closed_loop(core, num_prompt, num_output, concurrency, requests, 2)
            num_steps = len(busy_time.pairs)
            busy = busy_time.take() / seconds
            rate = tokens / seconds
            floor = floor_seconds(config, plan, num_prompt, num_output, concurrency, requests)
            peer = _VLLM[options.quantization].get(shape, {}).get(concurrency)
            print(
                f"| {shape} | {concurrency} | {rate:,.0f} | {peer or '-'} "
                f"| {f'{rate / peer:.2f}' if peer else '-'} | {floor / seconds:.0%} | {busy:.0%} "
                f"| {1e3 * float(np.median(ttft)):.0f} | {1e3 * seconds / num_steps:.2f} |",
                flush=True,
            )
            if options.steps:
                for (num_tokens, decodes, tiles), times in sorted(busy_time.by_shape.items()):
                    print(
                        f"    {num_tokens} tokens, {decodes} decodes, <= {tiles} tiles: {len(times)} x "
                        f"{np.median(times):.2f} ms = {sum(times) / 1e3:.2f} s",
                        flush=True,
                    )
    executor.shutdown()


if __name__ == "__main__":
    main()
