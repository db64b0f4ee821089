"""Executors that many tests share: loading a model costs seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_runtime.factory import RuntimeConfig, create_executor
from scheduler.executor import Executor


def _executor(path: Path, dtype: str) -> Iterator[Executor]:
    executor, _ = create_executor(
        RuntimeConfig(
            path,
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=2048,
            kv_cache_bytes=600 << 20,
            max_num_seqs=16,
            max_num_batched_tokens=1024,
        )
    )
    yield executor
    executor.shutdown()


@pytest.fixture(scope="session")
def smollm2_float32(smollm2_path: Path) -> Iterator[Executor]:
    yield from _executor(smollm2_path, "float32")


@pytest.fixture(scope="session")
def smollm2_int8(smollm2_path: Path) -> Iterator[Executor]:
    yield from _executor(smollm2_path, "int8")
