"""A decoder in a few lines: the segments in ONNX Runtime, attention in plain numpy over whole sequences.

No paging, no batching, no cache: it shows that graphs, weights and rotary tables are right, whatever the
executors make of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engine_runtime.model_config import LayerConfig, ModelConfig
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import SegmentKind
from engine_runtime.rope import rope_tables
from engine_runtime.weights.checkpoint import Checkpoint

Array = NDArray[np.float32]


class DenseDecoder:
    """Computes in float32 from any checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._embeddings = checkpoint.read("model.embed_tokens.weight")
        self._sessions = {kind: _Session(self._config, kind) for kind in ("first", "middle", "last")}
        self._weights: dict[tuple[str, int], dict[str, Array]] = {}

    def logits(self, token_ids: Sequence[int], num_rows: int) -> Array:
        """Logits [num_rows, vocab_size] after each of the last ``num_rows`` tokens."""
        config, last_layer = self._config, self._config.num_hidden_layers - 1
        hidden = self._embeddings[list(token_ids)].astype(np.float32) * np.float32(config.embedding_scale)
        residual, qkv = self._run("first", 0, hidden=hidden)
        for i in range(last_layer):
            attention = dense_attention(qkv, config, config.layers[i])
            residual, qkv = self._run("middle", i, attention=attention, residual=residual)
        attention = dense_attention(qkv, config, config.layers[last_layer])
        rows = slice(len(token_ids) - num_rows, None)
        (logits,) = self._run("last", last_layer, attention=attention[rows], residual=residual[rows])
        return logits

    def _run(self, kind: SegmentKind, layer: int, **inputs: Array) -> list[Array]:
        """Runs the segment that ``layer``'s attention comes before (``first``) or after."""
        key = (kind, layer)
        if key not in self._weights:
            next_layer = 0 if kind == "first" else layer + 1
            self._weights[key] = {
                weight.name: np.asarray(
                    self._checkpoint.read_weight(weight, layer=layer, next_layer=next_layer), np.float32
                )
                for weight in self._sessions[kind].segment.weights
            }
        return self._sessions[kind].session.run(None, inputs | self._weights[key])


class _Session:
    def __init__(self, config: ModelConfig, kind: SegmentKind) -> None:
        self.segment = build_segment(config, kind)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # while numpy attends
        self.session = onnxruntime.InferenceSession(
            self.segment.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def dense_attention(qkv: Array, config: ModelConfig, layer: LayerConfig) -> Array:
    """Causal grouped-query attention of one sequence: [T, q + 2 kv] -> [T, q]."""
    length = len(qkv)
    heads = qkv.reshape(length, -1, config.head_dim).transpose(1, 0, 2)
    num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
    query, key, value = np.split(heads, [num_q, num_q + num_kv])
    cos, sin = rope_tables(layer.rope, config.head_dim, length)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    group = num_q // num_kv
    key, value = key.repeat(group, axis=0), value.repeat(group, axis=0)

    scores = query @ key.transpose(0, 2, 1) * np.float32(config.attention_scale)
    if config.attention_logit_softcap is not None:
        cap = np.float32(config.attention_logit_softcap)
        scores = np.tanh(scores / cap) * cap
    distance = np.arange(length)[:, None] - np.arange(length)
    is_visible = distance >= 0
    if layer.sliding_window is not None:
        is_visible &= distance < layer.sliding_window
    scores = np.where(is_visible, scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    return (weights @ value).transpose(1, 0, 2).reshape(length, -1)


def _rotate(heads: Array, cos: Array, sin: Array) -> Array:
    low, high = np.split(heads, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
