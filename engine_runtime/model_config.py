"""What a decoder looks like: the numbers that its graphs, its attention and its KV cache are built from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from engine_runtime.rope import FrequencyFactors, RopeConfig

# Far above any published model, low enough that no product of two overflows or asks for terabytes.
_MAX_DIMENSION = 1 << 22
_MAX_LAYERS = 1024


class ConfigError(ValueError):
    """The model's configuration is wrong or asks for something that is not supported."""


def check_num_layers(num_layers: int) -> int:
    """Returns the number if it is reasonable; to be called before anything is made for each layer.

    Raises:
        ConfigError: it is not.
    """
    if not 1 <= num_layers <= _MAX_LAYERS:
        raise ConfigError(f"the number of layers is {num_layers}; expected 1 to {_MAX_LAYERS}")
    return num_layers


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What differs between the layers of one model.

    Attributes:
        sliding_window: a token attends to itself and the ``sliding_window - 1`` tokens before it;
            None: to all.
    """

    rope: RopeConfig
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention and a gated MLP. Hashable.

    Attributes:
        architecture: one of ``engine_runtime.models.architectures.ARCHITECTURES``.
        head_dim: of query, key and value heads alike; need not be hidden_size / num_attention_heads.
        max_position_embeddings: the context length that the model claims.
        attention_scale: multiplies the dot products of queries and keys.
        embedding_scale: multiplies the rows of the embedding table.
        attention_logit_softcap, final_logit_softcap: c in ``c * tanh(x / c)``; None: not applied.
        has_qkv_bias, has_o_bias, has_mlp_bias: whether those projections add a bias.
        layers: one entry for each layer, first to last.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_scale: float
    layers: tuple[LayerConfig, ...]
    embedding_scale: float = 1.0
    attention_logit_softcap: float | None = None
    final_logit_softcap: float | None = None
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not 1 <= value <= _MAX_DIMENSION:
                raise ConfigError(f"{field.name} is {value}; expected 1 to {_MAX_DIMENSION}")
        check_num_layers(self.num_hidden_layers)
        if len(self.layers) != self.num_hidden_layers:
            raise ConfigError(f"{len(self.layers)} layer kinds for {self.num_hidden_layers} layers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) is no multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings need an even one")
        for rope in {layer.rope for layer in self.layers}:
            _check_rope(rope, self.head_dim)
        for name in ("bos_token_id", "eos_token_ids"):
            value = getattr(self, name)
            ids = value if isinstance(value, tuple) else () if value is None else (value,)
            if any(not 0 <= token_id < self.vocab_size for token_id in ids):
                raise ConfigError(f"{name} is {value}, outside the vocabulary of {self.vocab_size}")

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, which is also that of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of the merged projection: query heads, key heads, value heads."""
        return self.q_size + 2 * self.kv_size


def _check_rope(rope: RopeConfig, head_dim: int) -> None:
    if not rope.theta > 1:
        raise ConfigError(f"the theta of the rotary embedding is {rope.theta}; expected a number above 1")
    if isinstance(rope.scaling, FrequencyFactors):
        factors = rope.scaling.factors
        if len(factors) != head_dim // 2 or not all(0 < factor < math.inf for factor in factors):
            raise ConfigError(f"the rotary embedding needs {head_dim // 2} frequency factors above 0")
