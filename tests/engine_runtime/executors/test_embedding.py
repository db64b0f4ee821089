from __future__ import annotations

import numpy as np

from engine_runtime.executors.onnxruntime.embedding import EmbeddingTable

_TABLE = np.random.default_rng(0).standard_normal((10, 32)).astype(np.float32)
_IDS = np.array([3, 3, 9, 0], np.int32)


def test_float_table_gives_exact_scaled_rows() -> None:
    hidden = np.full((6, 32), 7.0, np.float32)
    EmbeddingTable(_TABLE, 2.5, is_quantized=False).look_up(_IDS, hidden)
    np.testing.assert_array_equal(hidden[:4], _TABLE[_IDS] * np.float32(2.5))
    assert (hidden[4:] == 7.0).all()


def test_quantized_table_is_off_by_half_a_step_at_most() -> None:
    hidden = np.empty((4, 32), np.float32)
    table = EmbeddingTable(_TABLE, 2.0, is_quantized=True)
    table.look_up(_IDS, hidden)
    step = 2.0 * np.abs(_TABLE[_IDS]).max(axis=1, keepdims=True) / 127
    assert (np.abs(hidden - 2.0 * _TABLE[_IDS]) <= 0.5001 * step).all()
    assert table.num_bytes == 10 * 32 + 10 * 4
