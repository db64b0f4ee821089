"""From the config.json of a Hugging Face folder to a ``ModelConfig``.

Configurations written by transformers 5 spell the rotary embedding ``rope_parameters`` and the kinds of
layers ``layer_types``; older ones ``rope_theta``, ``rope_scaling``, ``sliding_window_pattern`` and so on.
Fields that a configuration leaves out have the defaults of transformers' configuration classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from engine_runtime.model_config import ConfigError, LayerConfig, ModelConfig, check_num_layers
from engine_runtime.models.architectures import require_architecture
from engine_runtime.rope import LinearScaling, Llama3Scaling, RopeConfig, RopeScaling, YarnScaling
from engine_runtime.weights.config_fields import REQUIRED, ConfigFields
from engine_runtime.weights.quantization_config import check_quantization

_ARCHITECTURE_OF_MODEL_TYPE = {"gemma3_text": "gemma3"}

_SLIDING = "sliding_attention"
_FULL = "full_attention"


def read_hf_config(
    config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
) -> ModelConfig:
    """Parses a config.json.

    Args:
        generation_config: the parsed generation_config.json; its end-of-sequence ids count as well.

    Raises:
        ConfigError: an unsupported architecture, a field that is missing or of the wrong type, custom code, a
            checkpoint quantized in a way that is not read, or an option that the graphs do not implement.
    """
    top = ConfigFields(config)
    _refuse_what_is_not_weights(top)
    # A multimodal checkpoint describes its language model in a nested object.
    values = config["text_config"] if top.has("text_config") else config
    if not isinstance(values, dict):
        raise ConfigError("text_config is no object")
    fields = ConfigFields(values)
    model_type = fields.text("model_type", top.text("model_type"))
    architecture = require_architecture(_ARCHITECTURE_OF_MODEL_TYPE.get(model_type, model_type))

    is_gemma3 = architecture == "gemma3"
    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads", 8 if is_gemma3 else REQUIRED)
    head_dim = _head_dim(fields, architecture, hidden_size, num_heads)
    num_layers = check_num_layers(fields.integer("num_hidden_layers"))
    _check_activation(fields, architecture)
    if fields.boolean("use_bidirectional_attention", False):
        raise ConfigError("use_bidirectional_attention is set: this is an encoder, not a generator of text")

    attention_bias = fields.boolean("attention_bias", False)
    eos_token_ids = fields.token_ids("eos_token_id") or top.token_ids("eos_token_id")
    eos_token_ids += ConfigFields(generation_config or {}).token_ids("eos_token_id")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer("num_key_value_heads", 4 if is_gemma3 else num_heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", 262_208 if is_gemma3 else REQUIRED),
        max_position_embeddings=fields.integer("max_position_embeddings", 131_072 if is_gemma3 else REQUIRED),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.boolean(
            "tie_word_embeddings", top.boolean("tie_word_embeddings", is_gemma3)
        ),
        attention_scale=(
            fields.positive("query_pre_attn_scalar", 256.0) ** -0.5 if is_gemma3 else head_dim**-0.5
        ),
        embedding_scale=math.sqrt(hidden_size) if is_gemma3 else 1.0,
        attention_logit_softcap=fields.optional_positive("attn_logit_softcapping") if is_gemma3 else None,
        final_logit_softcap=fields.optional_positive("final_logit_softcapping") if is_gemma3 else None,
        has_qkv_bias=attention_bias or architecture == "qwen2",
        has_o_bias=attention_bias and architecture != "qwen2",
        has_mlp_bias=fields.boolean("mlp_bias", False) if architecture == "llama" else False,
        bos_token_id=next(iter(fields.token_ids("bos_token_id") or top.token_ids("bos_token_id")), None),
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        layers=_layers(fields, architecture, num_layers),
    )


def _refuse_what_is_not_weights(top: ConfigFields) -> None:
    if top.has("auto_map"):
        raise ConfigError(
            "the checkpoint brings its own Python code (auto_map in config.json), which is never run. "
            "Use a checkpoint of a supported architecture without custom code"
        )
    if top.has("quantization_config"):
        check_quantization(top.mapping("quantization_config"))


def _head_dim(fields: ConfigFields, architecture: str, hidden_size: int, num_heads: int) -> int:
    if fields.has("head_dim"):
        return fields.size("head_dim")
    if architecture == "gemma3":
        return 256
    if architecture == "qwen3":
        return 128
    if hidden_size % num_heads:
        raise ConfigError(f"hidden_size ({hidden_size}) is no multiple of num_attention_heads ({num_heads})")
    return hidden_size // num_heads


def _check_activation(fields: ConfigFields, architecture: str) -> None:
    if architecture == "gemma3":
        name, expected = "hidden_activation", "gelu_pytorch_tanh"
    else:
        name, expected = "hidden_act", "silu"
    activation = fields.text(name, expected)
    if activation != expected:
        raise ConfigError(f"{name} is {activation!r}; {architecture} is supported with {expected!r} only")


def _layers(fields: ConfigFields, architecture: str, num_layers: int) -> tuple[LayerConfig, ...]:
    kinds = _layer_kinds(fields, architecture, num_layers)
    window = fields.integer("sliding_window", 4096) if _SLIDING in kinds else None
    if window is not None and window < 1:
        raise ConfigError(f"sliding_window is {window}; expected at least 1")
    ropes = {kind: _rope(fields, architecture, kind) for kind in dict.fromkeys(kinds)}
    return tuple(LayerConfig(ropes[kind], window if kind == _SLIDING else None) for kind in kinds)


def _layer_kinds(fields: ConfigFields, architecture: str, num_layers: int) -> tuple[str, ...]:
    if architecture == "llama":
        return (_FULL,) * num_layers
    if architecture == "mistral":
        # transformers ignores layer_types here. An explicit null means no window; so does leaving it out.
        return ((_SLIDING if fields.has("sliding_window") else _FULL),) * num_layers
    if fields.has("layer_types"):
        kinds = fields.texts("layer_types")
        if len(kinds) != num_layers or not set(kinds) <= {_SLIDING, _FULL}:
            raise ConfigError(f"layer_types must name {_FULL} or {_SLIDING} for each of {num_layers} layers")
        return kinds
    if architecture == "gemma3":
        pattern = fields.integer("sliding_window_pattern", 6)
        if pattern < 1:
            raise ConfigError(f"sliding_window_pattern is {pattern}; expected at least 1")
        return tuple(_SLIDING if (i + 1) % pattern else _FULL for i in range(num_layers))
    if not (fields.boolean("use_sliding_window", False) and fields.has("sliding_window")):
        return (_FULL,) * num_layers
    first_sliding = fields.integer("max_window_layers", 28)
    return tuple(_SLIDING if i >= first_sliding else _FULL for i in range(num_layers))


def _rope(fields: ConfigFields, architecture: str, kind: str) -> RopeConfig:
    if architecture == "gemma3":
        theta_field, default_theta = (
            ("rope_theta", 1_000_000.0) if kind == _FULL else ("rope_local_base_freq", 10_000.0)
        )
    else:
        theta_field, default_theta = "rope_theta", 10_000.0
    theta = fields.positive(theta_field, default_theta)
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is set: heads that are rotated in part are not supported")

    if fields.has("rope_parameters"):
        parameters = fields.mapping("rope_parameters")
        if parameters.has(kind):
            parameters = parameters.mapping(kind)
    elif fields.has("rope_scaling") and (architecture != "gemma3" or kind == _FULL):
        parameters = fields.mapping("rope_scaling")
    else:
        return RopeConfig(theta)
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is set: heads that are rotated in part are not supported")
    scaling = _rope_scaling(parameters, fields)
    return RopeConfig(parameters.positive("rope_theta", theta), scaling)


def _rope_scaling(parameters: ConfigFields, fields: ConfigFields) -> RopeScaling | None:
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(parameters.positive("factor"))
    original_length = parameters.integer(
        "original_max_position_embeddings", fields.integer("max_position_embeddings")
    )
    if original_length < 1:
        raise ConfigError(f"original_max_position_embeddings is {original_length}; expected at least 1")
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=parameters.positive("factor"),
            low_freq_factor=parameters.positive("low_freq_factor"),
            high_freq_factor=parameters.positive("high_freq_factor"),
            original_max_position_embeddings=original_length,
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ConfigError("rope scaling llama3: high_freq_factor must be above low_freq_factor")
        return scaling
    if kind == "yarn":
        factor = parameters.positive("factor")
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=original_length,
            beta_fast=parameters.positive("beta_fast", 32.0),
            beta_slow=parameters.positive("beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(parameters, factor),
            truncate=parameters.boolean("truncate", True),
        )
    raise ConfigError(f"rope type {kind!r} is not supported; supported are default, linear, llama3, yarn")


def _yarn_attention_factor(parameters: ConfigFields, factor: float) -> float:
    if parameters.has("attention_factor"):
        return parameters.positive("attention_factor")

    def amplitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.has("mscale") and parameters.has("mscale_all_dim"):
        return amplitude(parameters.positive("mscale")) / amplitude(parameters.positive("mscale_all_dim"))
    return amplitude(1.0)
