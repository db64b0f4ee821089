"""The variables of TGI: what each becomes, and that no other program's are taken for TGI's."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from server.config import ServerConfig
from server.config_sources import ConfigError, add_arguments, config_from, explained

MODEL = {"MODEL_ID": "org/model"}


def _configure(environment: dict[str, str], *flags: str) -> tuple[ServerConfig, list[str]]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args(flags)
    return config_from(parsed, environment), explained(parsed, environment)


@pytest.mark.parametrize(
    ("variable", "text", "setting", "value", "flag"),
    [
        ("MODEL_ID", "org/model", "model", "org/model", "MODEL org/model"),
        ("PORT", "80", "port", 80, "--port 80"),
        ("HOSTNAME", "0.0.0.0", "host", "0.0.0.0", "--host 0.0.0.0"),
        ("HOSTNAME", "::", "host", "::", "--host ::"),
        ("MAX_TOTAL_TOKENS", "4096", "max_model_len", 4096, "--max-model-len 4096"),
        ("MAX_BATCH_PREFILL_TOKENS", "2048", "max_num_batched_tokens", 2048, "--max-num-batched-tokens 2048"),
        ("MAX_BATCH_SIZE", "9", "max_num_seqs", 9, "--max-num-seqs 9"),
        ("QUANTIZE", "fp8", "quantization", "fp8", "--quantization fp8"),
        ("DTYPE", "float16", "dtype", "auto", "--dtype auto"),
        ("KV_CACHE_DTYPE", "fp8_e4m3fn", "kv_cache_dtype", "fp8", "--kv-cache-dtype fp8"),
        ("CUDA_MEMORY_FRACTION", "0.8", "gpu_memory_utilization", 0.8, "--gpu-memory-utilization 0.8"),
        (
            "CORS_ALLOW_ORIGIN",
            "https://a.b",
            "allowed_origins",
            ("https://a.b",),
            "--allowed-origins https://a.b",
        ),
        ("PAYLOAD_LIMIT", "2000000", "max_body_bytes", 2_000_000, "--max-body-bytes 2000000B"),
    ],
)
def test_what_becomes_a_setting(variable: str, text: str, setting: str, value: Any, flag: str) -> None:
    config, lines = _configure(MODEL | {variable: text})
    assert getattr(config, setting) == value
    assert f"{variable}={text} becomes {flag}" in lines


def test_a_key_is_not_told() -> None:
    config, lines = _configure(MODEL | {"API_KEY": "sk-secret"})
    assert config.api_keys.name_of({b"authorization": b"Bearer sk-secret"}) is not None
    assert "API_KEY becomes --api-key" in lines
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("HOSTNAME", "3f2a77", "becomes nothing: it is no IP address"),
        ("REVISION", "main", "becomes nothing"),
        ("MAX_INPUT_TOKENS", "1024", "becomes nothing: prompts may take"),
        ("MAX_CONCURRENT_REQUESTS", "128", "becomes nothing: requests beyond"),
        ("NUM_SHARD", "1", "becomes nothing: the model runs on one device"),
        ("VALIDATION_WORKERS", "2", "becomes nothing: it needs no setting"),
    ],
)
def test_what_becomes_nothing(variable: str, text: str, says: str) -> None:
    config, lines = _configure(MODEL | {variable: text})
    assert config == ServerConfig(model="org/model")
    assert any(line.startswith(f"{variable}={text} {says}") for line in lines)


def test_who_wins() -> None:
    environment = MODEL | {"PORT": "1", "MAX_TOTAL_TOKENS": "2", "MAX_BATCH_SIZE": "3"}
    config, lines = _configure(environment | {"INFLIGHTD_MAX_MODEL_LEN": "20"}, "--port", "10")
    assert (config.port, config.max_model_len, config.max_num_seqs) == (10, 20, 3)
    assert "PORT=1 becomes nothing: --port is given" in lines
    assert "MAX_TOTAL_TOKENS=2 becomes nothing: --max-model-len is given" in lines
    assert "MAX_BATCH_SIZE=3 becomes --max-num-seqs 3" in lines


def test_without_a_model_they_are_another_programs() -> None:
    for environment in ({"PORT": "1", "API_KEY": "k", "QUANTIZE": "awq"}, {"PORT": "1", "MODEL_ID": ""}):
        assert _configure(environment) == (ServerConfig(), [])


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PORT", "http"),
        ("QUANTIZE", "awq"),
        ("QUANTIZE", "bitsandbytes"),
        ("DTYPE", "int4"),
        ("KV_CACHE_DTYPE", "fp8_e5m2"),
        ("REVISION", "refs/pr/1"),
        ("MAX_TOTAL_TOKENS", "0"),
        ("PAYLOAD_LIMIT", "many"),
    ],
)
def test_a_wrong_value_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        _configure(MODEL | {variable: text})
    assert _configure(MODEL | {variable: ""})[0] == ServerConfig(model="org/model")
