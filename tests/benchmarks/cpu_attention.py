"""Times attention of one layer on the CPU against the obvious ways to do without a kernel of our own.

    python -m tests.benchmarks.cpu_attention [--rounds 9] [--only decode]

Each contestant does the whole job of a layer: rotary embedding, writing keys and values, attention over the
blocks.

* ``float32``, ``float16``: engine_runtime.kernels.cpu on one thread, by the type of the cache.
* ``float16 x2``: its work halved between two Python threads. (The executor uses ONNX Runtime's threads.)
* ``gather+ORT``: ONNX Runtime's GroupQueryAttention (rotary inside) over keys and values gathered from the
  blocks, on two threads; ``gather+BLAS``: numpy, a matrix product a KV head.

Contestants take turns within a round; the table shows each one's median and best round in microseconds a
layer. Every call works on another layer's cache, as in a model, so that it does not stay in the processor's
caches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from engine_runtime.kernels.cpu import (
    NO_WINDOW,
    ROWS_PER_TILE,
    KvLayer,
    PagedAttention,
    StepLayout,
    allocate_kv_cache,
    padded_head_dim,
)
from engine_runtime.kernels.cpu_attention import SCORES_STRIDE, attend, write_kv
from engine_runtime.kernels.numpy_types import Float32Array

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # SmolLM2-135M
GROUP = HEADS // KV_HEADS
LAYERS = 8


@dataclass(frozen=True)
class Case:
    """``sequences`` sequences of ``context`` tokens, the last ``new`` of which are computed."""

    name: str
    sequences: int
    new: int
    context: int

    @property
    def flops(self) -> int:
        pairs = sum(range(self.context - self.new + 1, self.context + 1))
        return 4 * HEADS * HEAD_DIM * pairs * self.sequences


CASES = (
    Case("decode 1 x 150", 1, 1, 150),
    Case("decode 1 x 2048", 1, 1, 2048),
    Case("decode 1 x 8192", 1, 1, 8192),
    Case("decode 8 x 150", 8, 1, 150),
    Case("decode 32 x 150", 32, 1, 150),
    Case("decode 32 x 1024", 32, 1, 1024),
    Case("prefill 1 x 126", 1, 126, 126),
    Case("prefill 16 x 126", 16, 126, 126),
    Case("prefill 1 x 2048", 1, 2048, 2048),
    Case("prefill 512 of 8192", 1, 512, 8192),
)


class Contest:
    """The arrays of one case, and the contestants as functions of the layer."""

    def __init__(self, case: Case, block_size: int) -> None:
        rng = np.random.default_rng(0)
        self.case = case
        width = -(-case.context // block_size)
        tables = rng.permutation(case.sequences * width).astype(np.int32).reshape(case.sequences, width)
        tokens = case.sequences * case.new
        self.layout = StepLayout(
            np.arange(case.sequences + 1, dtype=np.int32) * case.new,
            np.full(case.sequences, case.context, np.int32),
            tables,
        )
        self.block_size = block_size
        sizes = (LAYERS, tables.size, block_size, KV_HEADS, HEAD_DIM)
        cache, half_cache = (allocate_kv_cache(*sizes, dtype) for dtype in (np.float32, np.float16))
        self.layers = [cache.layer(i) for i in range(LAYERS)]
        self.half_layers = [half_cache.layer(i) for i in range(LAYERS)]
        self.plain = []  # (keys, values) as [num_blocks, kv_heads, block_size, head_dim], for the others
        for layer, half_layer in zip(self.layers, self.half_layers, strict=True):
            layer.data[:] = rng.standard_normal(layer.data.shape, np.float32)
            half_layer.data[:] = layer.data.astype(np.float16).view(np.uint16)
            self.plain.append((layer.keys(), layer.values()))
        angle = rng.uniform(0, 6, (case.context, HEAD_DIM // 2))
        self.cos, self.sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        self.qkv = rng.standard_normal((tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM), np.float32)
        self.out = np.empty((tokens, HEADS * HEAD_DIM), np.float32)
        self.attention = PagedAttention()
        self.pool = ThreadPoolExecutor(1)
        self.scratch = [self._scratch() for _ in range(2)]
        self.session = self._session()

    def float32(self, layer: int) -> Float32Array:
        return self._one_thread(self.layers[layer])

    def float16(self, layer: int) -> Float32Array:
        return self._one_thread(self.half_layers[layer])

    def _one_thread(self, layer: KvLayer) -> Float32Array:
        self.attention(self.qkv, layer, self.layout, self.cos, self.sin, self.out, scale=HEAD_DIM**-0.5)
        return self.out

    def float16_on_two_threads(self, layer: int) -> Float32Array:
        sequences = self.case.sequences
        units = len(self.layout.tiles(GROUP)) * KV_HEADS
        for work, count in ((self._write, sequences), (self._attend, units)):
            if count > 1:
                half = self.pool.submit(work, layer, 1, count // 2, count)
                work(layer, 0, 0, count // 2)
                half.result()
            else:
                work(layer, 0, 0, count)
        return self.out

    def gather_and_ort(self, layer: int) -> Float32Array:
        case = self.case
        keys, values = self._past(layer)
        split = np.split(self.qkv, [HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM], axis=1)
        q, k, v = (np.ascontiguousarray(x).reshape(case.sequences, case.new, -1) for x in split)
        out, new_keys, new_values = self.session.run(
            None,
            {
                "q": q, "k": k, "v": v, "past_k": keys, "past_v": values,
                "last": np.full(case.sequences, case.context - 1, np.int32),
                "total": np.array(case.context, np.int32),
                "cos": self.cos, "sin": self.sin,
            },
        )  # fmt: skip
        self._keep(layer, new_keys[:, :, -case.new :], new_values[:, :, -case.new :])
        return np.asarray(out).reshape(self.out.shape)

    def gather_and_blas(self, layer: int) -> Float32Array:
        case = self.case
        heads = self.qkv.reshape(case.sequences, case.new, -1, HEAD_DIM).transpose(0, 2, 1, 3)
        positions = slice(case.context - case.new, case.context)
        cos, sin = self.cos[positions], self.sin[positions]
        x, y = np.split(heads[:, : HEADS + KV_HEADS], 2, axis=-1)
        rotated = np.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)
        self._keep(layer, rotated[:, HEADS:], heads[:, -KV_HEADS:])
        keys, values = self._gather(layer, case.context)
        hidden = np.arange(case.context) > np.arange(case.context - case.new, case.context)[:, None]
        out = np.empty((case.sequences, HEADS, case.new, HEAD_DIM), np.float32)
        for s in range(case.sequences):
            for kv_head in range(KV_HEADS):
                group = slice(kv_head * GROUP, (kv_head + 1) * GROUP)
                scores = rotated[s, group].reshape(-1, HEAD_DIM) @ keys[s, kv_head].T
                scores *= np.float32(HEAD_DIM**-0.5)
                scores = scores.reshape(GROUP, case.new, -1)
                scores[:, hidden] = -np.inf
                scores -= scores.max(axis=-1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(axis=-1, keepdims=True)
                out[s, group] = scores @ values[s, kv_head]
        return out.transpose(0, 2, 1, 3).reshape(self.out.shape)

    def _scratch(self) -> tuple[Float32Array, ...]:
        value_dim = padded_head_dim(HEAD_DIM)
        sizes = (ROWS_PER_TILE * value_dim, ROWS_PER_TILE * SCORES_STRIDE, ROWS_PER_TILE * value_dim)
        return tuple(np.empty(size, np.float32) for size in (*sizes, ROWS_PER_TILE, ROWS_PER_TILE))

    def _write(self, layer: int, thread: int, first: int, last: int) -> None:
        write_kv(
            self.qkv, self.half_layers[layer].data, self.layout.query_start, self.layout.context_len,
            self.layout.block_tables, self.cos, self.sin, HEADS, KV_HEADS, HEAD_DIM,
            padded_head_dim(HEAD_DIM), self.block_size, first, last,
        )  # fmt: skip

    def _attend(self, layer: int, thread: int, first: int, last: int) -> None:
        attend(
            self.qkv, self.half_layers[layer].data, self.layout.query_start, self.layout.context_len,
            self.layout.block_tables, self.cos, self.sin, HEADS, KV_HEADS, HEAD_DIM,
            padded_head_dim(HEAD_DIM), self.block_size, HEAD_DIM**-0.5, NO_WINDOW, 0.0,
            self.layout.tiles(GROUP), first, last,
            *self.scratch[thread], self.out,
        )  # fmt: skip

    def _gather(self, layer: int, length: int) -> tuple[Float32Array, Float32Array]:
        """[sequences, kv_heads, length, head_dim] of the first ``length`` tokens."""
        blocks = self.layout.block_tables[:, : -(-length // self.block_size)]
        shape = (self.case.sequences, KV_HEADS, -1, HEAD_DIM)
        keys, values = (part[blocks].transpose(0, 2, 1, 3, 4).reshape(shape) for part in self.plain[layer])
        return keys[:, :, :length], values[:, :, :length]

    def _past(self, layer: int) -> tuple[Float32Array, Float32Array]:
        keys, values = self._gather(layer, self.case.context - self.case.new)
        return np.ascontiguousarray(keys), np.ascontiguousarray(values)

    def _keep(self, layer: int, keys: Float32Array, values: Float32Array) -> None:
        positions = np.arange(self.case.context - self.case.new, self.case.context)
        blocks = self.layout.block_tables[:, positions // self.block_size]
        slots = positions % self.block_size
        plain_keys, plain_values = self.plain[layer]
        plain_keys[blocks, :, slots] = keys.transpose(0, 2, 1, 3)
        plain_values[blocks, :, slots] = values.transpose(0, 2, 1, 3)

    def _session(self) -> onnxruntime.InferenceSession:
        node = helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", "past_k", "past_v", "last", "total", "cos", "sin"],
            ["out", "new_k", "new_v"],
            domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1,
        )  # fmt: skip
        kinds = dict.fromkeys(("last", "total"), TensorProto.INT32)
        inputs = [
            helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None)
            for name in node.input
        ]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
        model = helper.make_model(
            helper.make_graph([node], "attention", inputs, outputs),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(case: Case, block_size: int, rounds: int) -> None:
    contest = Contest(case, block_size)
    contestants: dict[str, Callable[[int], Float32Array]] = {
        "float32": contest.float32,
        "float16": contest.float16,
        "float16 x2": contest.float16_on_two_threads,
        "gather+ORT": contest.gather_and_ort,
        "gather+BLAS": contest.gather_and_blas,
    }
    expected = contest.float32(0).copy()
    for name, contestant in contestants.items():
        difference = float(np.abs(contestant(0) - expected).max())
        if not difference < (1e-2 if "16" in name else 1e-4):
            raise AssertionError(f"{name} is off by {difference}")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            time.sleep(0.05)  # until the threads of the one before have stopped spinning
            for is_timed in (False, True):
                start = time.perf_counter()
                for layer in range(LAYERS):
                    contestant(layer)
                if is_timed:
                    times[name].append((time.perf_counter() - start) / LAYERS * 1e6)
    cells = [f"{np.median(t):.0f} / {min(t):.0f}" for t in times.values()]
    speed = case.flops / min(times["float32"]) / 1e3
    print(f"| {case.name} | " + " | ".join(cells) + f" | {speed:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    print("| case | float32 | float16 | float16 x2 | gather+ORT x2 | gather+BLAS | GFLOP/s (float32) |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if arguments.only in case.name:
            run(case, arguments.block_size, arguments.rounds)


if __name__ == "__main__":
    main()
