"""How long a context is when attending to it takes as long as the rest of the model."""

from __future__ import annotations

from engine_runtime.model_config import ModelConfig


def attention_parity(model: ModelConfig, slowness: float) -> int:
    """Tokens of context to which attending takes as long as all else that is done for a token of a prompt.

    Layers with a sliding window do not count: what they attend to does not grow. 0 if all layers have one.

    Args:
        slowness: how much longer an operation of attention takes than one of a matrix product, measured.
    """
    num_full = sum(layer.sliding_window is None for layer in model.layers)
    if not num_full:
        return 0
    products = model.hidden_size * (model.qkv_size + model.q_size + 3 * model.intermediate_size)
    attention = 2 * model.q_size  # a dot product with a key, and a value added, for each token of context
    return max(1, int(model.num_hidden_layers * products / (num_full * attention * slowness)))
