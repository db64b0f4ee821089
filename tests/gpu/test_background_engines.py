"""A model that TensorRT must compute is served while its engines are still being built."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine_runtime.runtime_config import RuntimeConfig
from tests.engine_runtime.executors.generation import generate, tokens
from tests.engine_runtime.tiny_configs import tiny_config
from tests.gpu.gpu_found import skip_without_gpu

pytestmark = skip_without_gpu


def test_steps_run_while_engines_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    from engine_runtime.cuda import CudaDevice
    from engine_runtime.executors.tensorrt.factory import create_gpu_executor

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 512}
    model = tiny_config("llama", has_mlp_bias=True, max_position_embeddings=128, **sizes)
    config = RuntimeConfig(Path("random"), device="cuda", max_num_seqs=8, max_num_batched_tokens=64)
    prompts = [[(7 * i + j) % 512 for j in range(5 + 3 * i)] for i in range(6)]
    found = []
    seconds = []
    for _ in range(2):
        begin = time.monotonic()
        executor, _ = create_gpu_executor(config, CudaDevice(), model, None, lambda what, done, size: None)
        started = time.monotonic() - begin
        found.append(tokens(generate(executor, prompts, 12)[0]))
        served = time.monotonic() - begin
        executor._builds.wait()
        seconds.append(time.monotonic() - begin)
        print(f"\nseconds to start {started:.1f}, to answer {served:.1f}, to be complete {seconds[-1]:.1f}")
        found.append(tokens(generate(executor, prompts, 12)[0]))
        assert executor._batch._token_buckets.missing == executor._batch._decode_buckets.missing == []
        executor.shutdown()
    first = [[text[0] for text in texts] for texts in found]
    assert sum(a == b for texts in first for a, b in zip(texts, first[0], strict=True)) >= 20  # of 24
    assert seconds[1] < seconds[0]
