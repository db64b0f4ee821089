"""Rotary position embeddings: the angles of each position, with the scalings that extend the context.

Half-rotation ("NeoX") convention, as Hugging Face checkpoints store q and k: element i of a head turns with
element i + head_dim / 2.

Sources: RoFormer, arXiv:2104.09864; linear scaling, arXiv:2306.15595; YaRN, arXiv:2309.00071; "llama3"
scaling, the reference code of Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies are divided by ``factor``, high ones kept, those between blended smoothly."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Slow dimensions are divided by ``factor``, fast ones kept, with a linear ramp between.

    Attributes:
        beta_fast, beta_slow: turns over the original context where the ramp starts and ends.
        attention_factor: multiplies cosines and sines, and so sharpens the attention.
        truncate: whether the ends of the ramp are rounded outwards to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class FrequencyFactors:
    """A divisor for each of the head_dim / 2 frequencies: how a GGUF file stores any scaling."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """The rotary embedding of a layer. Hashable, so that layers that share one can share its tables."""

    theta: float
    scaling: RopeScaling | None = None


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float64]:
    """Radians by which each pair turns from one position to the next.

    Args:
        head_dim: even.

    Returns:
        [head_dim / 2], fastest first.

    Raises:
        ValueError: ``FrequencyFactors`` of another length.
    """
    frequencies: NDArray[np.float64] = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling():
            return _scale_llama3(frequencies, rope.scaling)
        case YarnScaling():
            return _scale_yarn(frequencies, rope.scaling, rope.theta)
        case FrequencyFactors(factors):
            if len(factors) != len(frequencies):
                raise ValueError(f"{len(factors)} rope frequency factors for a head of {head_dim}")
            return frequencies / np.asarray(factors, dtype=np.float64)


def rope_tables(
    rope: RopeConfig, head_dim: int, max_len: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines for positions 0 .. max_len - 1.

    Angles are computed in float64: at position 100,000 float32 would be off by 0.004 radians.

    Returns:
        (cos, sin), each [max_len, head_dim / 2] float32, C-contiguous.
    """
    angles = np.outer(np.arange(max_len, dtype=np.float64), inverse_frequencies(rope, head_dim))
    amplitude = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    return (np.cos(angles) * amplitude).astype(np.float32), (np.sin(angles) * amplitude).astype(np.float32)


def _scale_llama3(frequencies: NDArray[np.float64], scaling: Llama3Scaling) -> NDArray[np.float64]:
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def _scale_yarn(frequencies: NDArray[np.float64], scaling: YarnScaling, theta: float) -> NDArray[np.float64]:
    head_dim = 2 * len(frequencies)

    def dimension_with(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    start, end = dimension_with(scaling.beta_fast), dimension_with(scaling.beta_slow)
    if scaling.truncate:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, head_dim - 1)
    ramp = (np.arange(len(frequencies)) - start) / max(end - start, 0.001)
    slowed = np.clip(ramp, 0.0, 1.0)
    scaled: NDArray[np.float64] = frequencies * ((1.0 - slowed) + slowed / scaling.factor)
    return scaled
