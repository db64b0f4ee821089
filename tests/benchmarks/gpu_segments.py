"""Microseconds of a segment between two attentions, beside torch.compile and the floor of the hardware.

    python -m tests.benchmarks.gpu_segments --shapes llama-8b --tokens 1,16,64 --torch

Each time is a replay of a CUDA graph that runs several layers in turn, so that weights come from memory and
not from the cache. ``--torch`` compiles the same layer with max-autotune (10 to 30 s a token count) and
replays it in the same way, in turns with ours: a GPU gets slower while it warms up to its power limit. The
floor is the larger of bytes / 4.3 TB/s and operations / 790 TFLOP/s, both measured on the H200 (--bandwidth,
--flops for other GPUs).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from cuda.bindings import driver

from engine_runtime.cuda import CudaDevice, DeviceBuffer, Event, Stream, checked
from engine_runtime.executors.tensorrt.engine_cache import EngineCache
from engine_runtime.executors.tensorrt.kernel_forms import Quantization
from engine_runtime.executors.tensorrt.library import tensorrt_version
from engine_runtime.executors.tensorrt.segment import BoundSegment
from engine_runtime.executors.tensorrt.tactics import SegmentFactory, Tactic
from engine_runtime.executors.tensorrt.weight_plan import WeightPlan
from engine_runtime.executors.tensorrt.weights import DeviceWeights
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.model_config import LayerConfig, ModelConfig
from engine_runtime.rope import RopeConfig

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_LEAST_WEIGHT_BYTES = 600 << 20
_MICROSECONDS = 60_000  # a measurement lasts at least about this long, and so does warming up
_TURNS = 3


def _config(hidden: int, gated: int, heads: int, kv_heads: int, layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        hidden_size=hidden,
        intermediate_size=gated,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=1024,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_scale=128**-0.5,
        layers=(LayerConfig(RopeConfig(10_000.0)),) * layers,
    )


SHAPES: dict[str, tuple[int, int, int, int]] = {
    "llama-8b": (4096, 14336, 32, 8),
    "llama-70b-tp4": (8192, 7168, 16, 2),
    "qwen3-0.6b": (1024, 3072, 16, 8),
}


@dataclass
class Row:
    """Microseconds, None where not measured."""

    num_tokens: int
    tactic: Tactic
    ours: float
    tensorrt: float | None
    torch: float | None
    floor: float
    share_of_bandwidth: float


def weight_bytes(config: ModelConfig, quantization: Quantization) -> int:
    """Of one segment between two attentions."""
    hidden, item = config.hidden_size, 1 if quantization == "fp8" else 2
    return item * hidden * (config.q_size + 3 * config.intermediate_size + config.qkv_size)


@dataclass(frozen=True)
class Replay:
    """A CUDA graph of several runs.

    Attributes:
        kept: what it reads and must not be freed before it.
    """

    launch: Callable[[], None]
    num_runs: int
    kept: object


def captured(runs: list[Callable[[], None]], stream: Stream) -> Replay:
    for run in runs:
        run()
    stream.synchronize()
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    checked(driver.cuStreamBeginCapture(stream.handle, mode))
    for run in runs:
        run()
    graph = checked(driver.cuStreamEndCapture(stream.handle))
    replay = checked(driver.cuGraphInstantiate(graph, 0))

    def launch() -> None:
        checked(driver.cuGraphLaunch(replay, stream.handle))

    return Replay(launch, len(runs), runs)


def time_in_turns(replays: Mapping[str, Replay], stream: Stream) -> dict[str, float]:
    """Microseconds of one run of each, the median of its turns."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(_TURNS):
        for name, replay in replays.items():
            times[name].append(replay_graph(replay.launch, stream) / replay.num_runs)
    return {name: statistics.median(found) for name, found in times.items()}


def replay_graph(launch: Callable[[], None], stream: Stream) -> float:
    """Microseconds of a launch; the clocks are given time to rise first."""
    marks = [Event(times=True) for _ in range(2)]

    def timed() -> float:
        marks[0].record(stream)
        launch()
        marks[1].record(stream)
        marks[1].synchronize()
        return marks[1].milliseconds_since(marks[0]) * 1e3

    once = timed()
    count = max(5, min(200, int(_MICROSECONDS / max(once, 1.0))))
    for _ in range(count):
        launch()
    stream.synchronize()
    times = [timed() for _ in range(count)]
    for mark in marks:
        mark.close()
    return statistics.median(times)


class Layers:
    """Several layers with random weights, enough to exceed the cache, and buffers for the most tokens."""

    def __init__(
        self, name: str, max_tokens: int, quantization: Quantization, library: KernelLibrary
    ) -> None:
        probe = _config(*SHAPES[name], layers=1)
        self.num_layers = max(3, -(-_LEAST_WEIGHT_BYTES // weight_bytes(probe, quantization)))
        self.config = _config(*SHAPES[name], layers=self.num_layers + 1)
        self._weights = DeviceWeights(WeightPlan(self.config, quantization=quantization))
        self._weights.fill_randomly(library=library)
        widths = {
            "attention": self.config.q_size,
            "residual": self.config.hidden_size,
            "residual_out": self.config.hidden_size,
            "qkv": self.config.qkv_size,
        }
        rng = np.random.default_rng(0)
        self.buffers = {}
        for buffer, width in widths.items():
            values = rng.standard_normal((max_tokens, width), dtype=np.float32)
            self.buffers[buffer] = DeviceBuffer.of(values.astype(ml_dtypes.bfloat16))
        largest = max_tokens * (4 * self.config.intermediate_size + 12 * self.config.hidden_size)
        self.workspace = DeviceBuffer(4 * largest + (512 << 20))
        self.workspace.fill(0)

    def addresses(self) -> list[dict[str, int]]:
        common = {name: buffer.address for name, buffer in self.buffers.items()}
        return [{**self._weights.addresses(layer), **common} for layer in range(self.num_layers)]

    def free(self) -> None:
        self._weights.free()
        self.workspace.free()
        for buffer in self.buffers.values():
            buffer.free()


def measure_shape(
    name: str, tokens: list[int], torch_tokens: list[int], arguments: argparse.Namespace
) -> list[Row]:
    device, stream = CudaDevice(), Stream()
    library = KernelLibrary(device)
    quantization: Quantization = arguments.quantization
    layers = Layers(name, max(tokens), quantization, library)
    config = layers.config
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = EngineCache(Path(folder))
        factory = SegmentFactory(config, device, cache, library, quantization=quantization)
        for num_tokens in tokens:
            workspace = layers.workspace.address, layers.workspace.num_bytes
            start = time.perf_counter()
            tactic = factory.tune(
                "middle", num_tokens, layers.addresses(), workspace, stream,
                with_tensorrt=not arguments.no_tensorrt,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            replays: dict[str, Replay] = {}
            for formulation in tactic.microseconds:
                segment = factory.make("middle", num_tokens, Tactic(formulation, tactic.kernels))
                segment.use_workspace(layers.workspace.address)
                runs = [_enqueue(segment.bind(at), stream) for at in layers.addresses()]
                replays[formulation] = captured(runs * max(1, 6 // len(runs)), stream)
            if num_tokens in torch_tokens:
                replays["torch"] = compiled_by_torch(config, num_tokens, layers.num_layers, stream)
            times = time_in_turns(replays, stream)
            torch_time = times.pop("torch", None)
            num_bytes = weight_bytes(config, quantization)
            operations = num_tokens * weight_bytes(config, "none")
            flops = arguments.flops * (2 if quantization == "fp8" else 1)
            floor = max(num_bytes / arguments.bandwidth, operations / flops) * 1e6
            ours = min(times.values())
            row = Row(
                num_tokens,
                tactic,
                ours,
                times.get("tensorrt"),
                torch_time,
                floor,
                num_bytes / arguments.bandwidth * 1e6 / ours,
            )
            rows.append(row)
            print(_line(row), f"| tuned in {seconds:.2f} s", flush=True)
            if arguments.verbose:
                print("   ", {key: round(value, 1) for key, value in times.items()}, tactic.kernels)
    layers.free()
    return rows


def _enqueue(bound: BoundSegment, stream: Stream) -> Callable[[], None]:
    return lambda: bound.enqueue(stream)


def compiled_by_torch(config: ModelConfig, num_tokens: int, num_layers: int, stream: Stream) -> Replay:
    """The same layer, compiled by torch with max-autotune."""
    import torch
    from torch.nn import functional

    torch._dynamo.reset()
    hidden, gated = config.hidden_size, config.intermediate_size

    def layer(
        attention: Any, residual: Any, o: Any, gate_up: Any, down: Any, qkv: Any, g1: Any, g2: Any
    ) -> Any:
        residual = residual + functional.linear(attention, o)
        x = functional.rms_norm(residual, (hidden,), g1, 1e-5)
        y = functional.linear(x, gate_up)
        y = functional.silu(y[:, :gated]) * y[:, gated:]
        residual = residual + functional.linear(y, down)
        x = functional.rms_norm(residual, (hidden,), g2, 1e-5)
        return residual, functional.linear(x, qkv)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    weights = [
        (
            random(hidden, config.q_size),
            random(2 * gated, hidden),
            random(hidden, gated),
            random(config.qkv_size, hidden),
            torch.ones(hidden, device="cuda", dtype=torch.bfloat16),
            torch.ones(hidden, device="cuda", dtype=torch.bfloat16),
        )
        for _ in range(num_layers)
    ]
    attention = torch.randn(num_tokens, config.q_size, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, mode="max-autotune-no-cudagraphs", dynamic=False)
    with torch.no_grad():
        for layer_weights in weights:
            compiled(attention, residual, *layer_weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        repeats = max(1, 6 // num_layers)
        with torch.cuda.graph(graph):
            for layer_weights in weights * repeats:
                compiled(attention, residual, *layer_weights)

    def launch() -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
            graph.replay()

    return Replay(launch, num_layers * repeats, (weights, attention, residual))


def _line(row: Row) -> str:
    torch_text = "-" if row.torch is None else f"{row.torch:.1f}"
    ratio = "-" if row.torch is None else f"{row.ours / row.torch:.2f}"
    tensorrt = "-" if row.tensorrt is None else f"{row.tensorrt:.1f}"
    return (
        f"| {row.num_tokens} | {row.ours:.1f} | {tensorrt} | {torch_text} | {ratio} | {row.floor:.1f} "
        f"| {row.share_of_bandwidth:.0%} | {row.tactic.formulation} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu_segments", description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--torch", action="store_true", help="compare with torch.compile, where installed")
    parser.add_argument("--torch-tokens", default="", help="only for these token counts")
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none")
    parser.add_argument("--no-tensorrt", action="store_true", help="our kernels only")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second")
    parser.add_argument("--flops", type=float, default=790e12, help="bfloat16 operations a second")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--verbose", action="store_true", help="also print what was chosen")
    arguments = parser.parse_args()
    device = CudaDevice()
    library = "" if arguments.no_tensorrt else f", {tensorrt_version()}"
    print(f"{device.properties.name}, driver {device.properties.driver_version}{library}")
    tokens = [int(count) for count in arguments.tokens.split(",")]
    torch_tokens = [int(count) for count in arguments.torch_tokens.split(",") if count] or tokens
    figures = {}
    for name in arguments.shapes.split(","):
        print(f"\n{name}\n")
        print("| tokens | ours | TensorRT | torch.compile | ours/torch | floor | of bandwidth | by |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        rows = measure_shape(name, tokens, torch_tokens if arguments.torch else [], arguments)
        figures[name] = [
            {
                "tokens": row.num_tokens,
                "ours": row.ours,
                "tensorrt": row.tensorrt,
                "torch": row.torch,
                "floor": row.floor,
                "kernels": dict(row.tactic.kernels),
            }
            for row in rows
        ]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
