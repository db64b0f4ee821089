"""From a configuration to the graph of a segment."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from engine_runtime.model_config import ModelConfig
from engine_runtime.models.architectures import require_architecture
from engine_runtime.models.segment import DType, Segment, SegmentKind
from engine_runtime.models.segment_builder import SegmentBuilder, Value


class _Architecture(Protocol):
    """What the module of an architecture defines."""

    def before_attention(
        self, b: SegmentBuilder, config: ModelConfig, layer: str, residual: Value
    ) -> Value: ...

    def after_attention(
        self, b: SegmentBuilder, config: ModelConfig, layer: str, attention: Value, residual: Value
    ) -> Value: ...

    def logits(self, b: SegmentBuilder, config: ModelConfig, residual: Value) -> Value: ...


def build_segment(
    config: ModelConfig, kind: SegmentKind, dtype: DType = "float32", num_tokens: int | None = None
) -> Segment:
    """Writes the graph of a segment; ``Segment`` says what it maps to what.

    Args:
        num_tokens: tokens of a step (rows that sample, for ``last``); None leaves the number open.

    Raises:
        ConfigError: the architecture is not supported.
    """
    name = require_architecture(config.architecture)
    model = cast(_Architecture, importlib.import_module(f"engine_runtime.models.{name}"))
    b = SegmentBuilder(kind, dtype, num_tokens)
    if kind == "first":
        # The embeddings are the residual stream, unchanged; a graph output needs a node of its own.
        hidden = b.input("hidden", config.hidden_size)
        b.output("residual_out", b.op("Identity", "embed_tokens", hidden), config.hidden_size)
        b.output("qkv", model.before_attention(b, config, "next_layer", hidden), config.qkv_size)
        return b.build()
    attention = b.input("attention", config.q_size)
    residual = b.input("residual", config.hidden_size)
    residual = model.after_attention(b, config, "layer", attention, residual)
    if kind == "middle":
        qkv = model.before_attention(b, config, "next_layer", residual)
        b.output("residual_out", residual, config.hidden_size)
        b.output("qkv", qkv, config.qkv_size)
    else:
        b.output("logits", model.logits(b, config, residual), config.vocab_size, "float32")
    return b.build()
