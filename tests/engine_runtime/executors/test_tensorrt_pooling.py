"""Pooling by the GPU executor, in Triton's interpreter; tests/gpu/test_embeddings.py runs it on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed: pip install -e '.[gpu]'")

from engine_runtime.factory import RuntimeConfig, create_executor
from engine_runtime.kernels.gpu_pooling import PIECE_ROWS, GpuPooling, most_pieces
from engine_runtime.weights.checkpoint import open_checkpoint
from scheduler.messages import Request, SamplingParams
from tests.engine_runtime.executors.generation import Limited, answer
from tests.engine_runtime.kernels.interpreter_process import (
    check_interpreted,
    in_the_interpreter,
    starts_the_interpreter,
)
from tests.reference.tiny_checkpoints import CONFIGS, write_tiny_checkpoint

_RNG = np.random.default_rng(5)


@starts_the_interpreter
def test_kernels_in_the_interpreter() -> None:
    check_interpreted(__file__)


@pytest.mark.parametrize("lengths", [[1], [PIECE_ROWS], [PIECE_ROWS + 1] * 3, [1, 4000, 2, 127, 129]])
def test_room_for_pieces(lengths: list[int]) -> None:
    assert sum(-(-length // PIECE_ROWS) for length in lengths) <= most_pieces(sum(lengths), len(lengths))


@in_the_interpreter
class TestInterpreted:
    @pytest.mark.parametrize(("hidden", "weight_type"), [(80, "fp32"), (1040, "bf16")])
    def test_sums_of_pieces(self, hidden: int, weight_type: Any) -> None:
        """Rows that belong to no piece are NaN, as is what lies behind the last one."""
        from engine_runtime.kernels.triton import pooling
        from tests.engine_runtime.kernels.interpreted_kernels import HostMemory, InterpretedLibrary

        pieces = np.array([[2, 1], [3, 4], [9, 7], [17, 128]], np.int32)
        residual = np.full((160, hidden), np.nan, ml_dtypes.bfloat16)
        for first, count in pieces:
            residual[first : first + count] = 3 * _RNG.standard_normal((count, hidden))
        weight = (1 + _RNG.standard_normal(hidden) / 4).astype(
            {"bf16": ml_dtypes.bfloat16, "fp32": np.float32}[weight_type]
        )
        memory = HostMemory()
        library: Any = InterpretedLibrary(pooling.SPECS)
        stream: Any = memory.stream
        sums = np.full((len(pieces) + 1, hidden), np.nan, np.float32)
        address = memory.put(sums)
        kernel = GpuPooling(library, "bf16", weight_type, memory.put(weight), hidden, 1e-5)
        kernel.enqueue(stream, memory.put(residual), memory.put(pieces), len(pieces), address)
        found = memory.get(address, sums)
        rows = residual.astype(np.float64)
        normed = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5) * weight.astype(np.float64)
        expected = [normed[first : first + count].sum(axis=0) for first, count in pieces]
        np.testing.assert_allclose(found[:-1], expected, rtol=1e-5, atol=1e-4)
        assert np.isnan(found[-1]).all()

    def test_the_whole_executor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Prompts of both kinds, one in two chunks, beside one that generates; two steps in flight."""
        from tests.engine_runtime.executors.interpreted_executor import interpreted_executor, use_host_memory

        use_host_memory(monkeypatch)
        # Sizes that the kernels take.
        changes = {"intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 64}
        monkeypatch.setitem(CONFIGS, "llama", CONFIGS["llama"] | changes)
        path = write_tiny_checkpoint("llama", tmp_path)
        executor = Limited(interpreted_executor(open_checkpoint(path)), max_num_batched_tokens=8)
        assert executor.max_in_flight == 2
        prompts = [_RNG.integers(3, 250, length).tolist() for length in (1, 9, 4, 2)]
        kinds: list[Literal["mean", "last"] | None] = ["mean", "mean", "last", None]
        requests = [
            Request(str(i), tuple(prompt), SamplingParams(temperature=0.0, max_tokens=1, pooling=kind))
            for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
        ]
        found, _ = answer(executor, requests)
        steps = [[share.request_id for share in step.scheduled] for step in executor.steps]
        assert sum("1" in step for step in steps) > 1
        assert max(map(len, steps)) > 2
        exact, _ = create_executor(
            RuntimeConfig(path, dtype="float32", kv_cache_bytes=4 << 20, num_threads=1)
        )
        expected, _ = answer(exact, requests)
        exact.shutdown()
        for one, other, kind in zip(found, expected, kinds, strict=True):
            assert one.token_ids == other.token_ids
            assert (one.embedding is None) == (kind is None)
            if one.embedding is not None:
                a, b = np.asarray(one.embedding), np.asarray(other.embedding)
                assert a.shape == (64,)
                assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999
                np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(b), rtol=0.02)
