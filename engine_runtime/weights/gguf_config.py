"""From the metadata of a GGUF file to a ``ModelConfig``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from engine_runtime.model_config import ConfigError, LayerConfig, ModelConfig, check_num_layers
from engine_runtime.models.architectures import require_architecture
from engine_runtime.rope import FrequencyFactors, LinearScaling, RopeConfig, RopeScaling, YarnScaling
from engine_runtime.weights.config_fields import ConfigFields

_GEMMA3_SLIDING_WINDOW_PATTERN = 6
_GEMMA3_LOCAL_THETA = 10_000.0
# The one size whose queries are not scaled by the root of the head's size; the file does not say so.
_GEMMA3_27B_LAYERS = 62


def read_gguf_config(
    metadata: Mapping[str, object],
    tensor_names: Collection[str],
    vocab_size: int,
    rope_factors: tuple[float, ...] | None,
) -> ModelConfig:
    """Parses the metadata.

    Args:
        metadata: as ``GgufFile`` has it.
        tensor_names: as in the file; tell about biases and tied embeddings.
        vocab_size: rows of the embedding table.
        rope_factors: the tensor ``rope_freqs.weight``, in which llama3 scaling is stored, if there is one.

    Raises:
        ConfigError: an unsupported architecture or option, a missing field, or one of the wrong type.
    """
    top = ConfigFields(metadata)
    name = require_architecture(top.text("general.architecture"))
    fields = ConfigFields(metadata, f"{name}.")
    if fields.integer("expert_count", 0):
        raise ConfigError("mixtures of experts are not supported")
    # Mistral is stored as llama; only a sliding window makes a difference.
    has_window = name == "llama" and fields.integer("attention.sliding_window", 0) > 0
    architecture = "mistral" if has_window else name

    hidden_size = fields.size("embedding_length")
    num_heads = fields.size("attention.head_count")
    num_layers = check_num_layers(fields.integer("block_count"))
    head_dim = _head_dim(fields, hidden_size, num_heads)
    is_gemma3 = architecture == "gemma3"
    bos = top.token_ids("tokenizer.ggml.bos_token_id")
    end_ids = [top.token_ids(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=fields.integer("context_length"),
        rms_norm_eps=fields.positive("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in tensor_names,
        attention_scale=(
            (hidden_size / num_heads) ** -0.5
            if is_gemma3 and num_layers == _GEMMA3_27B_LAYERS
            else head_dim**-0.5
        ),
        embedding_scale=math.sqrt(hidden_size) if is_gemma3 else 1.0,
        attention_logit_softcap=fields.optional_positive("attn_logit_softcapping"),
        final_logit_softcap=fields.optional_positive("final_logit_softcapping"),
        has_qkv_bias="blk.0.attn_q.bias" in tensor_names,
        has_o_bias="blk.0.attn_output.bias" in tensor_names,
        has_mlp_bias="blk.0.ffn_up.bias" in tensor_names,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(token_id for ids in end_ids for token_id in ids)),
        layers=_layers(fields, architecture, num_layers, rope_factors),
    )


def _head_dim(fields: ConfigFields, hidden_size: int, num_heads: int) -> int:
    head_dim = fields.size("attention.key_length", hidden_size // num_heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise ConfigError("keys and values of different sizes are not supported")
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise ConfigError("heads that are rotated in part are not supported")
    return head_dim


def _layers(
    fields: ConfigFields, architecture: str, num_layers: int, rope_factors: tuple[float, ...] | None
) -> tuple[LayerConfig, ...]:
    default_theta = 1_000_000.0 if architecture == "gemma3" else 10_000.0
    rope = RopeConfig(fields.positive("rope.freq_base", default_theta), _rope_scaling(fields, rope_factors))
    if architecture == "gemma3":
        local_rope = RopeConfig(fields.positive("rope.freq_base_swa", _GEMMA3_LOCAL_THETA))
        local = LayerConfig(local_rope, _sliding_window(fields))
        pattern = fields.integer("attention.sliding_window_pattern", _GEMMA3_SLIDING_WINDOW_PATTERN)
        if pattern < 1:
            raise ConfigError(f"attention.sliding_window_pattern is {pattern}; expected at least 1")
        return tuple(local if (i + 1) % pattern else LayerConfig(rope) for i in range(num_layers))
    window = _sliding_window(fields) if architecture == "mistral" else None
    return (LayerConfig(rope, window),) * num_layers


def _sliding_window(fields: ConfigFields) -> int:
    window = fields.integer("attention.sliding_window")
    if window < 1:
        raise ConfigError(f"attention.sliding_window is {window}; expected at least 1")
    return window


def _rope_scaling(fields: ConfigFields, rope_factors: tuple[float, ...] | None) -> RopeScaling | None:
    if rope_factors is not None:
        return FrequencyFactors(rope_factors)
    kind = fields.text("rope.scaling.type", "linear" if fields.has("rope.scale_linear") else "none")
    if kind == "none":
        return None
    factor = fields.positive("rope.scaling.factor", fields.positive("rope.scale_linear", 1.0))
    if kind == "linear":
        return None if factor == 1.0 else LinearScaling(factor)
    if kind == "yarn":
        original_length = fields.integer("rope.scaling.original_context_length")
        if original_length < 1:
            raise ConfigError(f"rope.scaling.original_context_length is {original_length}")
        amplitude = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=original_length,
            beta_fast=fields.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.positive("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=amplitude * fields.positive("rope.scaling.attn_factor", 1.0),
        )
    raise ConfigError(f"rope scaling {kind!r} is not supported; supported are none, linear, yarn")
