"""Attention on a GPU against float64, over the shapes of the interpreter's tests and larger ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine_runtime.kernels.attention_layout import HEAD_DIMS, SOFTCAP_HEAD_DIMS
from engine_runtime.kernels.gpu_attention import AttentionShape
from tests.engine_runtime.kernels.attention_cases import (
    AttentionCase,
    Sequence,
    make_attention,
    random_case,
)
from tests.gpu.gpu_found import skip_without_gpu

pytestmark = skip_without_gpu

from engine_runtime.cuda import CudaDevice, DeviceBuffer, Stream  # noqa: E402
from engine_runtime.kernels.kernel_library import KernelLibrary  # noqa: E402

Array = npt.NDArray[Any]


class DeviceMemory:
    """``Memory`` on the device."""

    def __init__(self) -> None:
        self.stream = Stream()
        self._buffers: list[DeviceBuffer] = []

    def put(self, array: Array) -> int:
        self._buffers.append(DeviceBuffer.of(np.ascontiguousarray(array).view(np.uint8)))
        return self._buffers[-1].address

    def get(self, address: int, like: Array) -> Array:
        self.stream.synchronize()
        result = np.empty(like.nbytes, np.uint8)
        buffer = next(buffer for buffer in self._buffers if buffer.address == address)
        buffer.read(result)
        return result.view(like.dtype).reshape(like.shape)

    def free(self) -> None:
        self.stream.synchronize()
        for buffer in self._buffers:
            buffer.free()
        self.stream.close()


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture(scope="module")
def library(device: CudaDevice) -> KernelLibrary:
    return KernelLibrary(device)


@pytest.fixture
def memory(device: CudaDevice) -> Iterator[DeviceMemory]:
    memory = DeviceMemory()
    yield memory
    memory.free()


@pytest.fixture
def check(
    library: KernelLibrary, device: CudaDevice, memory: DeviceMemory
) -> Callable[[AttentionCase], None]:
    def check(case: AttentionCase) -> None:
        attention = make_attention(library, case, device.properties.num_multiprocessors)
        case.check(attention, memory, num_plans=3)
        if case.shape.kv_dtype == "fp8" and case.num_decode < len(case.sequences):
            check_widened(case)

    def check_widened(case: AttentionCase) -> None:
        attention = make_attention(library, case, device.properties.num_multiprocessors, case.num_blocks)
        case.check(attention, memory, num_plans=3)
        has_reader = device.properties.compute_capability == (9, 0) and case.shape.head_dim <= 128
        has_context = case.context_len[case.num_decode :].any()
        assert case.is_widened == bool(has_reader and has_context)

    return check


@pytest.mark.parametrize("kv_dtype", ["same", "fp8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_form(head_dim: int, dtype: str, kv_dtype: str, check: Callable[[AttentionCase], None]) -> None:
    fixed = {"head_dim": head_dim, "dtype": dtype, "kv_dtype": kv_dtype}
    for softcap in (None, 2.0) if head_dim in SOFTCAP_HEAD_DIMS else (None,):
        for window in (None, 100):
            cases = [
                random_case(seed + 10 * head_dim, **fixed, softcap=softcap, window=window)
                for seed in range(3)
            ]
            assert any(case.num_decode for case in cases)
            assert any(case.num_decode < len(case.sequences) for case in cases)
            for case in cases:
                check(case)


@pytest.mark.parametrize("seed", range(30))
def test_random_steps(seed: int, check: Callable[[AttentionCase], None]) -> None:
    check(random_case(1000 + seed, longest=4000))


def llama_case(sequences: list[Sequence], num_decode: int, **changes: Any) -> AttentionCase:
    shape = AttentionShape(32, 8, 128, "bf16", changes.pop("kv_dtype", "same"), 128**-0.5)
    return AttentionCase(shape, sequences, num_decode, **changes)


@pytest.mark.parametrize("window", [None, 64, 1000])
def test_one_long_sequence_is_split_over_all_multiprocessors(
    window: int | None, check: Callable[[AttentionCase], None]
) -> None:
    check(llama_case([Sequence(1, 20_000)], 1, window=window))


def test_many_sequences_of_unequal_length(check: Callable[[AttentionCase], None]) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 250).tolist()
    sequences = [Sequence(1, int(n)) for n in lengths] + [Sequence(1, 9000), Sequence(0, 0)]
    check(llama_case(sequences, len(sequences)))


def test_a_long_prefill(check: Callable[[AttentionCase], None]) -> None:
    check(llama_case([Sequence(700, 6000), Sequence(1500, 1500)], 0))


@pytest.mark.parametrize("kv_dtype", ["same", "fp8"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_that_see_nothing_of_the_first_block(
    head_dim: int, kv_dtype: str, check: Callable[[AttentionCase], None]
) -> None:
    """A fused multiply-add of the logit of an invisible key once made an infinite weight, for some scales."""
    for scale in (1.0, 0.06375, head_dim**-0.5):
        shape = AttentionShape(16, 2, head_dim, "fp16", kv_dtype, scale)  # type: ignore[arg-type]
        factor = 0.03 if kv_dtype == "fp8" else 1.0
        sequences = [Sequence(2, 300), Sequence(100, 240), Sequence(64, 64)]
        check(AttentionCase(shape, sequences, 1, window=64, k_scale=factor, v_scale=factor))


def test_a_captured_decode_follows_the_lengths(
    library: KernelLibrary, device: CudaDevice, memory: DeviceMemory
) -> None:
    from cuda.bindings import driver

    from engine_runtime.cuda import checked
    from engine_runtime.kernels.gpu_attention import DecodeBatch

    cases = [
        llama_case([Sequence(1, n) for n in lengths], 4, seed=7)
        for lengths in ([5, 70, 3000, 64], [3000, 1, 9, 2000], [1, 1, 1, 1])
    ]
    num_blocks = max(case.num_blocks for case in cases)
    width = max(case.block_tables.shape[1] for case in cases)
    attention = make_attention(library, cases[0], device.properties.num_multiprocessors)
    stream = memory.stream
    attention.use_workspace(memory.put(np.full(attention.workspace_bytes, 0xFF, np.uint8)), stream)
    first = cases[0]
    buffers = {
        "cache": DeviceBuffer(num_blocks * first.shape.kv_block_bytes),
        "tables": DeviceBuffer(4 * width * 4),
        "qkv": DeviceBuffer(first.qkv.nbytes),
        "query_start": DeviceBuffer.of(first.query_start),
        "context_len": DeviceBuffer(16),
        "out": DeviceBuffer(first.expected.size * 2),
        "positions": DeviceBuffer(16),
        "slots": DeviceBuffer(16),
        "cos": DeviceBuffer(4096 * 64 * 4),
        "sin": DeviceBuffer(4096 * 64 * 4),
    }
    layer = attention.kv_layer(buffers["cache"].address, num_blocks)
    batch = DecodeBatch(
        4, buffers["query_start"].address, buffers["context_len"].address, buffers["tables"].address, width
    )
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    checked(driver.cuStreamBeginCapture(stream.handle, mode))
    attention.plan_decode(stream, batch)
    attention.write_rope(
        stream, buffers["qkv"].address, 4, layer, buffers["positions"].address, buffers["slots"].address,
        buffers["cos"].address, buffers["sin"].address,
    )  # fmt: skip
    attention.decode(stream, buffers["qkv"].address, buffers["out"].address, layer, batch)
    graph = checked(driver.cuStreamEndCapture(stream.handle))
    executable = checked(driver.cuGraphInstantiate(graph, 0))
    for case in cases:
        tables = np.zeros((4, width), np.int32)
        tables[:, : case.block_tables.shape[1]] = np.minimum(case.block_tables, case.num_blocks - 1)
        arrays = {
            "cache": case.cache, "tables": tables, "qkv": case.qkv, "context_len": case.context_len,
            "positions": case.positions, "slots": case.slots, "cos": case.cos, "sin": case.sin,
        }  # fmt: skip
        for name, array in arrays.items():
            buffers[name].write(array.view(np.uint8) if name in ("cache", "qkv") else array)
        buffers["out"].fill(0xFF)
        checked(driver.cuGraphLaunch(executable, stream.handle))
        stream.synchronize()
        result = np.empty(case.expected.shape, case.qkv.dtype)
        buffers["out"].read(result.view(np.uint8))
        error = np.linalg.norm(result.astype(np.float64) - case.expected)
        assert error < 1e-2 * np.linalg.norm(case.expected)
    checked(driver.cuGraphExecDestroy(executable))
    checked(driver.cuGraphDestroy(graph))
    for buffer in buffers.values():
        buffer.free()
