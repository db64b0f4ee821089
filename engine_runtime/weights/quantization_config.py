"""Which quantized checkpoints can be read: what their configuration says about it.

- compressed-tensors (vLLM's llm-compressor): ``config_groups``, a scheme each, and ``format``.
- ModelOpt (NVIDIA): ``quant_algo``; older ones say it in a file of their own, hf_quant_config.json.
- ``fp8`` (AutoFP8, vLLM): weights with a factor for the whole tensor.

The tensors are alike: ``X.weight`` in E4M3 and ``X.weight_scale``. What else there is (``input_scale``,
``k_scale``) is not needed: activations get a factor for each token when they are computed.
"""

from __future__ import annotations

from engine_runtime.model_config import ConfigError
from engine_runtime.weights.config_fields import ConfigFields

_SUPPORTED = (
    "supported are FP8 weights with one factor for each row or tensor (compressed-tensors float-quantized, "
    "ModelOpt FP8, fp8), float16, bfloat16 and float32 checkpoints, and .gguf files"
)
_COMPRESSED_FORMATS = ("float-quantized", "naive-quantized")
_MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


def check_quantization(fields: ConfigFields) -> None:
    """Checks the ``quantization_config`` of a config.json.

    Raises:
        ConfigError: the weights are stored in a form that is not read.
    """
    method = fields.text("quant_method", "modelopt" if fields.has("quant_algo") else "an unnamed method")
    if method == "compressed-tensors":
        _check_compressed_tensors(fields)
    elif method == "modelopt":
        check_modelopt(fields.text("quant_algo", "an unnamed algorithm"))
    elif method != "fp8":
        raise _unsupported(method)
    elif fields.has("weight_block_size"):
        raise _unsupported("fp8, a factor for each block of the weights")


def check_modelopt(algorithm: str) -> None:
    """Checks ModelOpt's ``quant_algo``.

    Raises:
        ConfigError: as of ``check_quantization``.
    """
    if algorithm not in _MODELOPT_ALGORITHMS:
        raise _unsupported(f"modelopt, {algorithm}")


def _check_compressed_tensors(fields: ConfigFields) -> None:
    stored = fields.text("format", "an unnamed format")
    if stored not in _COMPRESSED_FORMATS:
        raise _unsupported(f"compressed-tensors, {stored}")
    if fields.has("sparsity_config"):
        sparsity = fields.mapping("sparsity_config").text("format", "dense")
        if sparsity != "dense":
            raise _unsupported(f"compressed-tensors, sparse in the format {sparsity}")
    groups = fields.mapping("config_groups")
    for name in groups.names():
        scheme = groups.mapping(name)
        if not scheme.has("weights"):
            continue
        weights = scheme.mapping("weights")
        kind, bits = weights.text("type", "int"), weights.integer("num_bits", 8)
        if (kind, bits) != ("float", 8):
            raise _unsupported(f"compressed-tensors, weights of type {kind} with {bits} bits")
        strategy = weights.text("strategy", "tensor")
        if strategy not in ("tensor", "channel"):
            raise _unsupported(f"compressed-tensors, weights with a factor for each {strategy}")


def _unsupported(what: str) -> ConfigError:
    return ConfigError(f"the checkpoint is quantized with {what}, which is not supported; {_SUPPORTED}")
