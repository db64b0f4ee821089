"""Times the GPU sampler: microseconds a step, median, in a CUDA graph.

    python -m tests.benchmarks.gpu_sampling [--rows 1,16,64,256] [--vocabularies 49152,128256,262144]

A graph holds one step for each of some sets of logits, which together exceed the second-level cache several
times, unless one set takes less than a quarter of it: then there is one set, which stays in the cache, as the
output of the product before it does. The floor reads the logits once at 4.3 TB/s. Needs torch for the logits
and for the comparison: argmax of the rows, and top-p by sorting (softmax, sort, cumulative sum, multinomial).

"confident" logits are normal with a standard deviation of 1.5, and 50 tokens 12 above the rest; "flat" ones
are normal with a standard deviation of 1, where top-p keeps tens of thousands of tokens.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine_runtime.cuda import CudaDevice, DeviceBuffer, Event, PinnedBuffer, Stream, checked, driver
from engine_runtime.kernels.gpu_sampling import GpuSampler
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.kernels.sampling_rows import PackedRows
from scheduler.messages import SamplingParams

BANDWIDTH = 4.3e12
CACHE_BYTES = 60e6
PENALTIES = {"presence_penalty": 0.3, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
CASES: dict[str, tuple[bool, SamplingParams]] = {
    "greedy": (True, SamplingParams(temperature=0.0)),
    "temperature 0.8": (True, SamplingParams(temperature=0.8)),
    "top-k 50": (True, SamplingParams(temperature=0.8, top_k=50)),
    "top-p 0.9": (True, SamplingParams(temperature=0.8, top_p=0.9)),
    "top-k 50, top-p 0.9, min-p 0.02": (
        True,
        SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02),
    ),
    "top-k 50, flat": (False, SamplingParams(top_k=50)),
    "top-p 0.9, flat": (False, SamplingParams(top_p=0.9)),
    "penalties, temperature 0.8": (True, SamplingParams(temperature=0.8, **PENALTIES)),  # type: ignore[arg-type]
    "greedy, logprobs 5": (True, SamplingParams(temperature=0.0, logprobs=5)),
    "top-p 0.9, logprobs 5": (True, SamplingParams(temperature=0.8, top_p=0.9, logprobs=5)),
}


def make_logits(is_confident: bool, num_rows: int, vocab_size: int) -> list[torch.Tensor]:
    num_bytes = 4 * num_rows * vocab_size
    count = 1 if num_bytes < CACHE_BYTES / 4 else max(2, int(-(-4 * CACHE_BYTES // num_bytes)))
    sets = []
    for seed in range(count):
        generator = torch.Generator("cuda").manual_seed(seed)
        logits = torch.randn(num_rows, vocab_size, device="cuda", generator=generator)
        if is_confident:
            logits *= 1.5
            raised = torch.randint(0, vocab_size, (num_rows, 50), device="cuda", generator=generator)
            logits.scatter_add_(1, raised, torch.full(raised.shape, 12.0, device="cuda"))
        sets.append(logits)
    return sets


class Steps:
    """A sampler with its rows admitted and packed."""

    def __init__(self, library: KernelLibrary, num_rows: int, vocab_size: int) -> None:
        self.stream = Stream()
        self.num_rows = num_rows
        self.sampler = GpuSampler(library, vocab_size, num_rows, num_rows)
        self.inputs = DeviceBuffer(self.sampler.input_bytes)
        self.pinned = PinnedBuffer(self.sampler.input_bytes)

    def prepare(self, params: SamplingParams) -> PackedRows:
        tokens = list(range(100, 400))
        for slot in range(self.num_rows):
            self.sampler.admit(self.stream, slot, params, tokens, 200)
        slots = np.arange(self.num_rows)
        packed = self.sampler.pack(self.pinned.array, slots, np.full(self.num_rows, 300))
        self.stream.copy_to_device(self.inputs.address, self.pinned.address, self.sampler.input_bytes)
        self.stream.synchronize()
        return packed

    def time(self, params: SamplingParams, logits: list[torch.Tensor], repeats: int = 15) -> float:
        """Microseconds a step."""
        packed = self.prepare(params)
        handle = self.stream.handle
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        copies = max(1, 8 // len(logits))
        checked(driver.cuStreamBeginCapture(handle, mode))
        for values in logits * copies:
            self.sampler.enqueue(
                self.stream, packed.path, self.num_rows, values.data_ptr(), self.inputs.address
            )
        graph = checked(driver.cuStreamEndCapture(handle))
        executable = checked(driver.cuGraphInstantiate(graph, 0))
        start, stop = Event(times=True), Event(times=True)
        times = []
        for _ in range(repeats + 2):
            start.record(self.stream)
            checked(driver.cuGraphLaunch(executable, handle))
            stop.record(self.stream)
            stop.synchronize()
            times.append(stop.milliseconds_since(start) * 1e3 / (len(logits) * copies))
        checked(driver.cuGraphExecDestroy(executable))
        checked(driver.cuGraphDestroy(graph))
        return statistics.median(times[2:])

    def close(self) -> None:
        self.sampler.close()
        self.inputs.free()
        self.pinned.free()
        self.stream.close()


def time_torch(function: Callable[[torch.Tensor], Any], logits: list[torch.Tensor]) -> float:
    times = []
    for number in range(8):
        values = logits[number % len(logits)]
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function(values)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times[2:])


def sort_and_sample(logits: torch.Tensor) -> torch.Tensor:
    probabilities = torch.softmax(logits / 0.8, dim=-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered[before > 0.9] = 0.0
    return ids.gather(1, torch.multinomial(ordered, 1))


def time_host(library: KernelLibrary) -> None:
    """What the CPU does for a step of 256 rows."""
    steps = Steps(library, 256, 128256)
    slots, positions = np.arange(256), np.full(256, 300)
    request_ids = [str(i) for i in range(256)]
    logits = torch.zeros(256, 128256, device="cuda")

    def report(name: str, what: str, function: Callable[[], Any]) -> None:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e6)
            steps.stream.synchronize()
        print(f"host, 256 rows, {name}: {what} {statistics.median(times):.0f} us", flush=True)

    for name in ("temperature 0.8", "greedy, logprobs 5"):
        packed = steps.prepare(CASES[name][1])
        output = np.zeros(steps.sampler.output_bytes(packed.path) // 4, np.float32)
        output[:] = 1.0
        view = output.view(np.uint8)
        sampler = steps.sampler
        report(name, "pack", functools.partial(sampler.pack, steps.pinned.array, slots, positions))
        launch = functools.partial(sampler.enqueue, steps.stream, packed.path, 256, logits.data_ptr())
        report(name, "enqueue", functools.partial(launch, steps.inputs.address))
        report(name, "collect", functools.partial(sampler.collect, view, packed, request_ids))
    steps.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--vocabularies", default="49152,128256,262144")
    parser.add_argument("--no-torch", action="store_true", help="leave the comparison out")
    arguments = parser.parse_args()
    device = CudaDevice()
    torch.zeros(1, device="cuda")
    library = KernelLibrary(device)
    print(f"{device.properties.name}, driver {device.properties.driver_version}, torch {torch.__version__}\n")
    sizes = [
        (r, v)
        for v in map(int, arguments.vocabularies.split(","))
        for r in map(int, arguments.rows.split(","))
    ]
    table: dict[str, list[str]] = {
        name: [] for name in ("floor", *CASES, "torch argmax", "torch sort, top-p 0.9")
    }
    for num_rows, vocab_size in sizes:
        floor = 4e6 * num_rows * vocab_size / BANDWIDTH
        table["floor"].append(f"{floor:.1f}")
        logits = {
            is_confident: make_logits(is_confident, num_rows, vocab_size) for is_confident in (True, False)
        }
        steps = Steps(library, num_rows, vocab_size)
        for name, (is_confident, params) in CASES.items():
            table[name].append(f"{steps.time(params, logits[is_confident]):.1f}")
        steps.close()
        if not arguments.no_torch:
            table["torch argmax"].append(f"{time_torch(lambda x: x.argmax(-1), logits[True]):.0f}")
            table["torch sort, top-p 0.9"].append(f"{time_torch(sort_and_sample, logits[True]):.0f}")
        del logits
        torch.cuda.empty_cache()
    print("| case | " + " | ".join(f"{r} x {v}" for r, v in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for name, cells in table.items():
        if cells:
            print(f"| {name} | " + " | ".join(cells) + " |")
    print(flush=True)
    time_host(library)


if __name__ == "__main__":
    main()
