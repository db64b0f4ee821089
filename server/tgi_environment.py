"""The environment variables of Hugging Face TGI, and what each becomes here.

They count only if ``MODEL_ID`` is set: names such as ``PORT`` and ``API_KEY`` are many programs' own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping

_IS_TGI = "MODEL_ID"


def _same(text: str) -> str:
    return text


def _bytes(text: str) -> str:
    return f"{text}B"


def _address(text: str) -> str | None:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None  # containers and shells put the machine's name here


def _quantization(text: str) -> str:
    if text != "fp8":
        raise ValueError(f"{text!r} is not supported; fp8 is, on a GPU, and a CPU computes in int8 by itself")
    return text


def _kv_cache_dtype(text: str) -> str:
    if text not in ("fp8", "fp8_e4m3fn"):
        raise ValueError(f"{text!r} is not supported; fp8_e4m3fn is")
    return "fp8"


def _dtype(text: str) -> str:
    if text not in ("float16", "bfloat16"):
        raise ValueError(f"{text!r} is not one of float16, bfloat16")
    return "auto"


def _revision(text: str) -> str | None:
    if text != "main":
        raise ValueError("only the revision 'main' is fetched; download another and give its folder")
    return None


# Variable: the setting that it becomes and how its text is written there; None becomes nothing.
_SETTINGS: Mapping[str, tuple[str, Callable[[str], str | None]]] = {
    "MODEL_ID": ("model", _same),
    "SERVED_MODEL_NAME": ("served_model_name", _same),
    "REVISION": ("model", _revision),
    "PORT": ("port", _same),
    "HOSTNAME": ("host", _address),
    "MAX_TOTAL_TOKENS": ("max_model_len", _same),
    "MAX_BATCH_PREFILL_TOKENS": ("max_num_batched_tokens", _same),
    "MAX_BATCH_SIZE": ("max_num_seqs", _same),
    "QUANTIZE": ("quantization", _quantization),
    "DTYPE": ("dtype", _dtype),
    "KV_CACHE_DTYPE": ("kv_cache_dtype", _kv_cache_dtype),
    "CUDA_MEMORY_FRACTION": ("gpu_memory_utilization", _same),
    "API_KEY": ("api_key", _same),
    "CORS_ALLOW_ORIGIN": ("allowed_origins", _same),
    "PAYLOAD_LIMIT": ("max_body_bytes", _bytes),
}
_NOT_NEEDED = "it needs no setting here"
_NOTHING: Mapping[str, str] = {
    "HOSTNAME": "it is no IP address; --host 0.0.0.0 listens on all of them",
    "REVISION": "it is the only one",
    "MAX_INPUT_TOKENS": "prompts may take all of --max-model-len but one token",
    "MAX_INPUT_LENGTH": "prompts may take all of --max-model-len but one token",
    "MAX_CONCURRENT_REQUESTS": "requests beyond --max-num-seqs wait",
    "MAX_BATCH_TOTAL_TOKENS": "the KV cache takes the free memory; --kv-cache-bytes bounds it",
    "MAX_BEST_OF": "best_of is not supported",
    "MAX_STOP_SEQUENCES": "up to 16 are taken",
    "MAX_TOP_N_TOKENS": "up to 20 are taken",
    "MAX_CLIENT_BATCH_SIZE": "a request has one prompt",
    "NUM_SHARD": "the model runs on one device",
    "SHARDED": "the model runs on one device",
    "LORA_ADAPTERS": "adapters are not supported",
    "SPECULATE": "it is not supported",
    "ROPE_SCALING": "the model's config.json says it",
    "ROPE_FACTOR": "the model's config.json says it",
    "TRUST_REMOTE_CODE": "code that comes with a model is never run",
    "TOKENIZER_CONFIG_PATH": "the tokenizer of the model is used",
    "JSON_OUTPUT": "--log-format json",
    "OTLP_ENDPOINT": "TGI's is for gRPC; --otlp-traces-endpoint takes the collector's HTTP address",
    "HUGGINGFACE_HUB_CACHE": "set HF_HOME or HF_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN": "set HF_TOKEN",
    **dict.fromkeys(
        (
            "ATTENTION", "CUDA_GRAPHS", "DISABLE_CUSTOM_KERNELS", "ENABLE_CUDA_GRAPHS", "MASTER_ADDR",
            "MASTER_PORT", "MAX_WAITING_TOKENS", "PREFILL_CHUNKING", "PREFIX_CACHING", "SHARD_UDS_PATH",
            "USAGE_STATS", "VALIDATION_WORKERS", "WAITING_SERVED_RATIO", "WEIGHTS_CACHE_OVERRIDE",
        ),
        _NOT_NEEDED,
    ),
}  # fmt: skip


def tgi_settings(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Names of settings: the variable that sets each, and the text that a flag would have.

    Raises:
        ValueError: a variable asks for something this server does not do; the message names it.
    """
    if not environment.get(_IS_TGI):
        return {}
    settings: dict[str, tuple[str, str]] = {}
    for variable, (setting, translate) in _SETTINGS.items():
        text = environment.get(variable)
        if not text:
            continue
        try:
            became = translate(text)
        except ValueError as error:
            raise ValueError(f"{variable}: {error}") from None
        if became is not None:
            settings[setting] = (variable, became)
    return settings


def explain_tgi(environment: Mapping[str, str], overridden: frozenset[str]) -> list[str]:
    """One line for each of TGI's variables that is set.

    Args:
        environment: for which ``tgi_settings`` raises nothing.
        overridden: settings that a flag or a variable of this server's own gives.
    """
    if not environment.get(_IS_TGI):
        return []
    sources = {variable: (setting, text) for setting, (variable, text) in tgi_settings(environment).items()}
    lines = []
    for variable in dict.fromkeys((*_SETTINGS, *_NOTHING)):
        text = environment.get(variable)
        if not text:
            continue
        shown = variable if variable == "API_KEY" else f"{variable}={text}"
        if variable not in sources:
            lines.append(f"{shown} becomes nothing: {_NOTHING[variable]}")
            continue
        setting, became = sources[variable]
        flag = "MODEL" if setting == "model" else "--" + setting.replace("_", "-")
        if setting in overridden:
            lines.append(f"{shown} becomes nothing: {flag} is given")
        else:
            lines.append(f"{shown} becomes {flag}" + ("" if variable == "API_KEY" else f" {became}"))
    return lines
