"""Which segments keep their weights in 16 bits although FP8 was asked for.

E4M3 has three bits of fraction. SmolLM2-135M loses 2.7 % of perplexity with all layers in FP8, and no few
layers are to blame: but for the last one, all do about as much (tests/benchmarks/results/gpu_fp8.md).
"""

from __future__ import annotations

from engine_runtime.model_config import ModelConfig
from engine_runtime.weights.checkpoint import Checkpoint

_NARROW = 1024
"""Models of a smaller hidden size, of up to about half a billion weights, cannot stand FP8 everywhere."""


def kept_segments(model: ModelConfig, checkpoint: Checkpoint | None) -> frozenset[int]:
    """The segments that keep 16 bits, by the layer whose attention comes before; -1: the first one.

    Where the checkpoint holds some projections in FP8, those with others, since whoever made it has measured.
    Otherwise none, but of narrow models the ends and two of three between them.
    """
    last = model.num_hidden_layers - 1
    segments = range(-1, last + 1)
    if checkpoint is not None and checkpoint.holds_fp8:
        return frozenset(
            segment
            for segment in segments
            if not all(checkpoint.is_fp8(name) for name in _projections(segment, last))
        )
    if model.hidden_size >= _NARROW:
        return frozenset()
    return frozenset(segment for segment in segments if segment % 3 != 1 or segment == last)


def _projections(segment: int, last: int) -> list[str]:
    names = []
    if segment >= 0:
        path = f"model.layers.{segment}"
        names.append(f"{path}.self_attn.o_proj.weight")
        names += [f"{path}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    if segment < last:
        path = f"model.layers.{segment + 1}.self_attn"
        names += [f"{path}.{name}_proj.weight" for name in "qkv"]
    return names
