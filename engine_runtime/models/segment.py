"""The stretch of a decoder between two attentions, as an ONNX graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx

SegmentKind = Literal["first", "middle", "last"]
"""``first``: before attention 0. ``middle``: between attentions i and i + 1. ``last``: after the last one."""

DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class WeightInput:
    """A graph input that is filled from the checkpoint.

    Attributes:
        name: of the graph input, such as ``layer.self_attn.o_proj.weight``.
        shape: [out, in] of a projection, [size] of a norm or a bias.
        sources: checkpoint names, to be concatenated on axis 0. ``{layer}`` stands for
            the layer whose attention comes in, ``{next_layer}`` for the one whose queries, keys and values
            go out.
        dtype: of the graph input. Differs from the segment's where precision needs it.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    dtype: DType

    def source_names(self, *, layer: int | None = None, next_layer: int | None = None) -> tuple[str, ...]:
        """The checkpoint names for one place in the decoder. Layers that no source mentions may be None."""
        return tuple(source.format(layer=layer, next_layer=next_layer) for source in self.sources)


@dataclass(frozen=True, slots=True)
class Segment:
    """One graph, the same for every layer; only the weights differ.

    With T tokens (R rows that sample, for ``last``), hidden size H, vocabulary V, and q, kv the widths of all
    query and all key heads, the graph maps, in the segment's dtype unless said otherwise:

    - ``first``: ``hidden`` [T, H], the scaled embeddings -> ``residual_out`` [T, H], ``qkv`` [T, q + 2 kv]
    - ``middle``: ``attention`` [T, q], ``residual`` [T, H] -> ``residual_out`` [T, H], ``qkv`` [T, q + 2 kv]
    - ``last``: ``attention`` [R, q], ``residual`` [R, H] -> ``logits`` [R, V] float32

    ``qkv`` includes biases and the norms of queries and keys, but not the rotary embedding.

    Attributes:
        model: opset 24; weights are inputs, after those named above.
        num_tokens: T, or None if the graph takes any number.
    """

    kind: SegmentKind
    dtype: DType
    num_tokens: int | None
    model: onnx.ModelProto
    weights: tuple[WeightInput, ...]
