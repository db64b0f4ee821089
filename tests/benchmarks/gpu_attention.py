"""Times the GPU's attention: microseconds a layer, median, in a CUDA graph.

    python -m tests.benchmarks.gpu_attention [--kv-dtype fp8] [--no-torch]

Heads of Llama 3.1 8B (32 query heads, 8 KV heads of 128), bfloat16. Decoding: one token a sequence, the
time of the layer's ``decode`` alone; its plan and ``write_rope`` have rows of their own. The floor reads
keys and values once at 4.3 TB/s. A graph holds one layer for each of some caches, which together exceed
the second-level cache several times. Prefill: of the products with keys and values of the same chunk half
count, as half are masked. Needs torch, which fills the caches and answers for comparison, where nothing is
cached: scaled_dot_product_attention of contiguous tensors, with FlashAttention and with cuDNN. A launch that
starts early in a step (see ``PagedAttention``) does so in a graph.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from engine_runtime.cuda import CudaDevice, Event, Stream, checked
from engine_runtime.kernels.attention_layout import BLOCK_SIZE, KvDType
from engine_runtime.kernels.gpu_attention import AttentionShape, DecodeBatch, GpuKvLayer, PagedAttention
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.kernels.widened_cache import Widening

BANDWIDTH = 4.3e12
CACHE_BYTES = 60e6
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DECODES = [(batch, context) for batch in (1, 16, 64, 256) for context in (512, 2048, 8192, 32768)]
PREFILLS = [
    (1, 1024, 0), (16, 1024, 0), (1, 4096, 0), (4, 4096, 0), (1, 16384, 0), (8, 256, 2048), (1, 512, 8192),
    (16, 128, 1024),
]  # fmt: skip
"""Sequences, tokens of each, and tokens cached before them."""
POOL_BYTES = 36_000_000_000
PIECE_BYTES = 64_000_000


def time_graph(stream: Stream, enqueue: Callable[[], None], repeats: int = 11) -> float:
    """Microseconds of one replay of what ``enqueue`` enqueues."""
    torch.cuda.synchronize()
    enqueue()
    stream.synchronize()
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    checked(driver.cuStreamBeginCapture(stream.handle, mode))
    enqueue()
    graph = checked(driver.cuStreamEndCapture(stream.handle))
    executable = checked(driver.cuGraphInstantiate(graph, 0))
    start, stop = Event(times=True), Event(times=True)
    times = []
    for _ in range(repeats + 2):
        start.record(stream)
        checked(driver.cuGraphLaunch(executable, stream.handle))
        stop.record(stream)
        stop.synchronize()
        times.append(stop.milliseconds_since(start) * 1e3)
    checked(driver.cuGraphExecDestroy(executable))
    checked(driver.cuGraphDestroy(graph))
    return statistics.median(times[2:])


class Bench:
    """The kernels, and arrays for them."""

    def __init__(self, device: CudaDevice, kv_dtype: KvDType) -> None:
        self.stream = Stream()
        self.shape = AttentionShape(HEADS, KV_HEADS, HEAD_DIM, "bf16", kv_dtype, HEAD_DIM**-0.5)
        self.attention = PagedAttention(
            KernelLibrary(device),
            self.shape,
            max_sequences=256,
            num_multiprocessors=device.properties.num_multiprocessors,
            num_widened_blocks=20480 // BLOCK_SIZE,
        )
        self.workspace = torch.empty(self.attention.workspace_bytes, dtype=torch.uint8, device="cuda")
        self.attention.use_workspace(self.workspace.data_ptr(), self.stream)

        # Random numbers, repeated.
        piece = torch.randn(PIECE_BYTES // 2, dtype=torch.bfloat16, device="cuda")
        if kv_dtype == "fp8":
            piece = torch.cat([piece.to(torch.float8_e4m3fn), piece.to(torch.float8_e4m3fn)])
        room = min(POOL_BYTES, torch.cuda.mem_get_info()[0] // 2) // PIECE_BYTES
        self.pool = piece.view(torch.uint8).repeat(room)

    def layers(self, num_blocks: int) -> list[GpuKvLayer]:
        """Caches, as many as exceed the second-level cache."""
        num_bytes = num_blocks * self.shape.kv_block_bytes
        count = max(2, min(48, int(4 * CACHE_BYTES // num_bytes)))
        room = len(self.pool) // num_bytes
        starts = [self.pool.data_ptr() + i % room * num_bytes for i in range(count)]
        return [self.attention.kv_layer(start, num_blocks) for start in starts]

    def tables(self, batch: int, context: int) -> torch.Tensor:
        blocks = -(-context // BLOCK_SIZE)
        return torch.randperm(batch * blocks, device="cuda").to(torch.int32).view(batch, blocks)

    def decode(self, batch: int, context: int) -> float:
        tables = self.tables(batch, context)
        layers = self.layers(tables.numel())
        qkv = torch.randn(batch, self.shape.qkv_size, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(batch, HEADS * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        starts, contexts = _int32(range(batch + 1)), _int32([context] * batch)
        arrays = (starts.data_ptr(), contexts.data_ptr(), tables.data_ptr())
        decodes = DecodeBatch(batch, *arrays, tables.shape[1])
        torch.cuda.synchronize()
        self.attention.plan_decode(self.stream, decodes)

        def enqueue() -> None:
            for layer in layers:
                self.attention.decode(self.stream, qkv.data_ptr(), out.data_ptr(), layer, decodes)

        return time_graph(self.stream, enqueue) / len(layers)

    def plan(self, batch: int) -> float:
        starts, contexts = _int32(range(batch + 1)), _int32([2048] * batch)
        decodes = DecodeBatch(batch, starts.data_ptr(), contexts.data_ptr(), 0, 0)

        def enqueue() -> None:
            for _ in range(10):
                self.attention.plan_decode(self.stream, decodes)

        return time_graph(self.stream, enqueue) / 10

    def rope(self, num_tokens: int) -> float:
        count = max(2, min(48, int(4 * CACHE_BYTES // (num_tokens * self.shape.qkv_size * 4))))
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        layers = self.layers(num_blocks)
        size = (count, num_tokens, self.shape.qkv_size)
        qkv = torch.randn(size, dtype=torch.bfloat16, device="cuda")
        slots = _int32(range(num_tokens))
        tables = torch.ones(2, num_tokens, HEAD_DIM // 2, device="cuda")

        def enqueue() -> None:
            for i in range(count):
                self.attention.write_rope(
                    self.stream, qkv[i].data_ptr(), num_tokens, layers[i % len(layers)], slots.data_ptr(),
                    slots.data_ptr(), tables[0].data_ptr(), tables[1].data_ptr(),
                )  # fmt: skip

        return time_graph(self.stream, enqueue) / count

    def prefill(self, batch: int, length: int, cached: int) -> float:
        tables = self.tables(batch, length + cached)
        layers = self.layers(tables.numel())
        num_tokens = batch * length
        qkv = torch.randn(num_tokens, self.shape.qkv_size, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(num_tokens, HEADS * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        starts = np.arange(batch + 1, dtype=np.int32) * length
        contexts = np.full(batch, length + cached, np.int32)
        host_tiles = self.attention.prefill_tiles(starts, contexts)
        tiles = torch.from_numpy(host_tiles).cuda()
        widened_starts = self.attention.widened_starts(starts, contexts)
        arrays = [torch.from_numpy(array).cuda() for array in (widened_starts, starts, contexts)]
        addresses = [array.data_ptr() for array in arrays]
        widening = Widening(0, batch, tables.shape[1], *addresses) if len(widened_starts) else None

        def enqueue() -> None:
            for layer in layers:
                self.attention.prefill(
                    self.stream, qkv.data_ptr(), out.data_ptr(), layer, tiles.data_ptr(), len(host_tiles),
                    tables.data_ptr(), tables.shape[1], widening=widening,
                )  # fmt: skip

        return time_graph(self.stream, enqueue) / len(layers)


def time_sdpa(batch: int, length: int, backend: Any) -> float:
    """Microseconds of torch's own, keys and values already repeated for each query head."""
    size = (batch, HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    times = []
    with sdpa_kernel(backend):
        for _ in range(8):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(4):
                scaled_dot_product_attention(q, k, v, is_causal=True)
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) * 1e3 / 4)
    return statistics.median(times[2:])


def _int32(values: Any) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kv-dtype", choices=("same", "fp8"), default="same")
    parser.add_argument("--no-torch", action="store_true", help="without torch's own, for comparison")
    arguments = parser.parse_args()
    device = CudaDevice()
    bench = Bench(device, arguments.kv_dtype)
    print(f"{device.properties.name}, torch {torch.__version__}, cache {arguments.kv_dtype}\n")
    print("| sequences x context | decode, us | floor, us | share |\n|--:|--:|--:|--:|")
    token_bytes = bench.shape.kv_block_bytes // BLOCK_SIZE
    for batch, context in DECODES:
        num_bytes = batch * context * token_bytes
        if num_bytes > len(bench.pool):
            continue
        time, floor = bench.decode(batch, context), num_bytes / BANDWIDTH * 1e6
        print(f"| {batch} x {context} | {time:.1f} | {floor:.1f} | {floor / time:.0%} |", flush=True)
    for batch in (1, 256):
        print(f"\nplan of {batch} sequences: {bench.plan(batch):.1f} us")
    print("\n| tokens | write_rope, us | TB/s |\n|--:|--:|--:|")
    for num_tokens in (1, 64, 256, 8192):
        time = bench.rope(num_tokens)
        rate = num_tokens * bench.shape.qkv_size * 4 / time * 1e-6
        print(f"| {num_tokens} | {time:.1f} | {rate:.2f} |")
    print("\n| sequences x tokens after cached | us | TFLOP/s | FlashAttention | cuDNN |")
    print("|--:|--:|--:|--:|--:|")
    for batch, length, cached in PREFILLS:
        operations = 4 * batch * HEADS * HEAD_DIM * length * (cached + length / 2)
        times = [bench.prefill(batch, length, cached)]
        if cached == 0 and not arguments.no_torch:
            backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
            times += [time_sdpa(batch, length, backend) for backend in backends]
        cells = [f"{operations / time * 1e-6:.0f}" for time in times] + ["", ""]
        print(f"| {batch} x {length} after {cached} | {times[0]:.0f} | {' | '.join(cells[:3])} |", flush=True)


if __name__ == "__main__":
    main()
