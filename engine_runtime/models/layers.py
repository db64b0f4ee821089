"""The layers that the architectures share. Shapes: T tokens, H hidden size, d head size."""

from __future__ import annotations

from collections.abc import Sequence

from engine_runtime.model_config import ModelConfig
from engine_runtime.models.segment_builder import SegmentBuilder, Value


def linear(
    b: SegmentBuilder,
    path: str,
    x: Value,
    in_size: int,
    out_size: int,
    *,
    parts: Sequence[str] = (),
    bias: bool = False,
) -> Value:
    """x W^T + bias with W [out, in]: [T, in] -> [T, out].

    The transposition is a node of its own: TensorRT makes it a flag of the multiplication, ONNX Runtime
    folds it once the weight is an initializer.

    Args:
        parts: paths of the projections merged into this one, first rows first.
    """
    weight = b.weight(f"{path}.weight", (out_size, in_size), [f"{part}.weight" for part in parts])
    y = b.op("MatMul", path, x, b.op("Transpose", path, weight, perm=[1, 0]))
    if not bias:
        return y
    return b.op("Add", path, y, b.weight(f"{path}.bias", (out_size,), [f"{part}.bias" for part in parts]))


def rms_norm(b: SegmentBuilder, path: str, x: Value, size: int, epsilon: float) -> Value:
    """RMSNorm over the last axis (arXiv:1910.07467), normalized in float32, then scaled in the own dtype."""
    weight = b.weight(f"{path}.weight", (size,))
    return b.op("RMSNormalization", path, x, weight, axis=-1, epsilon=epsilon)


def rms_norm_float32(b: SegmentBuilder, path: str, x: Value, size: int, epsilon: float) -> Value:
    """RMSNorm over the last axis, also scaled in float32 by a float32 weight."""
    weight = b.weight(f"{path}.weight", (size,), dtype="float32")
    if b.dtype == "float32":
        return b.op("RMSNormalization", path, x, weight, axis=-1, epsilon=epsilon)
    x = b.cast(f"{path}.input", x, "float32")
    y = b.op("RMSNormalization", path, x, weight, axis=-1, epsilon=epsilon)
    return b.cast(path, y, b.dtype)


def qkv_projection(b: SegmentBuilder, config: ModelConfig, attention: str, hidden: Value) -> Value:
    """Queries, keys and values of all heads by one multiplication: [T, H] -> [T, q + 2 kv]."""
    return linear(
        b,
        f"{attention}.qkv_proj",
        hidden,
        config.hidden_size,
        config.qkv_size,
        parts=[f"{attention}.{name}_proj" for name in "qkv"],
        bias=config.has_qkv_bias,
    )


def norm_query_key_heads(
    b: SegmentBuilder, config: ModelConfig, attention: str, qkv: Value, *, in_float32: bool = False
) -> Value:
    """RMSNorm of each query head and each key head: [T, q + 2 kv] -> the same."""
    norm = rms_norm_float32 if in_float32 else rms_norm
    num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
    path = f"{attention}.qkv_heads"
    heads = b.op("Reshape", path, qkv, b.constant(f"{path}/shape", [0, num_q + 2 * num_kv, config.head_dim]))
    query, key, value = b.split(path, heads, 3, sizes=[num_q, num_kv, num_kv], axis=1)
    query = norm(b, f"{attention}.q_norm", query, config.head_dim, config.rms_norm_eps)
    key = norm(b, f"{attention}.k_norm", key, config.head_dim, config.rms_norm_eps)
    heads = b.op("Concat", path, query, key, value, axis=1)
    path = f"{attention}.qkv_normed"
    return b.op("Reshape", path, heads, b.constant(f"{path}/shape", [0, config.qkv_size]))


def output_projection(b: SegmentBuilder, config: ModelConfig, layer: str, attention: Value) -> Value:
    """[T, q] -> [T, H]."""
    path = f"{layer}.self_attn.o_proj"
    return linear(b, path, attention, config.q_size, config.hidden_size, bias=config.has_o_bias)


def silu(b: SegmentBuilder, path: str, x: Value) -> Value:
    """x sigmoid(x)."""
    return b.op("Mul", path, x, b.op("Sigmoid", path, x))


def gelu_tanh(b: SegmentBuilder, path: str, x: Value) -> Value:
    """GELU by its tanh approximation (arXiv:1606.08415)."""
    return b.op("Gelu", path, x, approximate="tanh")


def gated_mlp(
    b: SegmentBuilder, config: ModelConfig, layer: str, hidden: Value, activation: str = "silu"
) -> Value:
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202): [T, H] -> [T, H].

    Gate and up are one multiplication.
    """
    activate = {"silu": silu, "gelu_tanh": gelu_tanh}[activation]
    mlp = f"{layer}.mlp"
    gate_up = linear(
        b,
        f"{mlp}.gate_up_proj",
        hidden,
        config.hidden_size,
        2 * config.intermediate_size,
        parts=[f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        bias=config.has_mlp_bias,
    )
    gate, up = b.split(mlp, gate_up, 2)
    gated = b.op("Mul", mlp, activate(b, f"{mlp}.act_fn", gate), up)
    return linear(
        b,
        f"{mlp}.down_proj",
        gated,
        config.intermediate_size,
        config.hidden_size,
        bias=config.has_mlp_bias,
    )


def add(b: SegmentBuilder, path: str, residual: Value, x: Value) -> Value:
    """The residual connection."""
    return b.op("Add", f"{path}.residual", residual, x)


def output_logits(b: SegmentBuilder, config: ModelConfig, hidden: Value) -> Value:
    """[R, H] -> [R, V] float32, capped if the model says so (arXiv:2408.00118)."""
    logits = linear(b, "lm_head", hidden, config.hidden_size, config.vocab_size)
    if b.dtype != "float32":
        logits = b.cast("lm_head", logits, "float32")
    cap = config.final_logit_softcap
    if cap is None:
        return logits
    path = "lm_head.softcap"
    bound = b.constant(f"{path}/bound", cap, "float32")
    return b.op("Mul", path, b.op("Tanh", path, b.op("Div", path, logits, bound)), bound)
