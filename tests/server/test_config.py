from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from server.api_keys import api_key
from server.config import ServerConfig
from server.config_sources import ConfigError, add_arguments, config_from
from server.setting_values import parse_bytes


def configure(*flags: str, environment: dict[str, str] | None = None) -> ServerConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return config_from(parser.parse_args(flags), environment or {})


def test_a_flag_beats_its_variable_and_a_variable_beats_the_default() -> None:
    assert configure().port == 8000
    assert configure(environment={"INFLIGHTD_PORT": "9000"}).port == 9000
    assert configure("--port", "9001", environment={"INFLIGHTD_PORT": "9000"}).port == 9001
    assert configure(environment={"INFLIGHTD_MODEL": "m.gguf"}).model == "m.gguf"
    assert configure("n.gguf", environment={"INFLIGHTD_MODEL": "m.gguf"}).model == "n.gguf"
    assert [
        configure(*flags).strict_fields for flags in ((), ("--strict-fields",), ("--strict-fields", "off"))
    ] == [
        False,
        True,
        False,
    ]


def test_every_setting_has_a_flag_and_a_variable(tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("ann:k3\n")
    key_file.chmod(0o600)
    values = {
        "model": ("a.gguf", "a.gguf"),
        "served_model_name": ("x, y", ("x", "y")),
        "device": ("cpu", "cpu"),
        "dtype": ("float32", "float32"),
        "quantization": ("fp8", "fp8"),
        "kv_cache_dtype": ("fp8", "fp8"),
        "pooling": ("last", "last"),
        "max_model_len": ("77", 77),
        "tool_call_parser": ("hermes", "hermes"),
        "reasoning_parser": ("none", "none"),
        "host": ("::1", "::1"),
        "port": ("0", 0),
        "uds": ("/run/a.sock", "/run/a.sock"),
        "ssl_certfile": ("c.pem", "c.pem"),
        "ssl_keyfile": ("k.pem", "k.pem"),
        "api_key": ("k1, k2", (api_key("k1"), api_key("k2"))),
        "api_key_file": (str(key_file), (api_key("k3", "ann"),)),
        "allowed_origins": ("https://A.example, *", ("https://a.example", "*")),
        "responses_db": ("/data/responses.db", "/data/responses.db"),
        "max_body_bytes": ("1MiB", 2**20),
        "strict_fields": ("on", True),
        "trust_request_chat_template": ("on", True),
        "metrics_prefix": ("vllm:", "vllm"),
        "chat_page": ("off", "off"),
        "api_workers": ("3", 3),
        "metrics_compat": ("tgi", "tgi"),
        "admin_port": ("0", 0),
        "admin_host": ("::1", "::1"),
        "admin_uds": ("/run/admin.sock", "/run/admin.sock"),
        "admin_key": ("a1", (api_key("a1"),)),
        "admin_key_file": (str(key_file), (api_key("k3", "ann"),)),
        "otlp_traces_endpoint": ("http://otel:4318", "http://otel:4318/v1/traces"),
        "log_format": ("json", "json"),
        "pre_stop_seconds": ("2", 2),
        "shutdown_timeout": ("3", 3),
        "debug_faults": ("on", True),
        "log_level": ("debug", "debug"),
        "kv_cache_bytes": ("2G", 2 * 10**9),
        "gpu_memory_utilization": ("0.5", 0.5),
        "block_size": ("32", 32),
        "max_num_seqs": ("5", 5),
        "max_num_batched_tokens": ("6", 6),
        "max_queued_requests": ("7", 7),
        "max_queued_tokens": ("8", 8),
        "max_requests_per_key": ("9", 9),
        "queue_timeout": ("10", 10),
        "request_timeout": ("11", 11),
        "threads": ("1", 1),
    }
    assert set(values) == set(ServerConfig.__dataclass_fields__)
    environment = {f"INFLIGHTD_{name.upper()}": text for name, (text, _) in values.items()}
    from_environment = configure(environment=environment)
    flags = [text for name, (text, _) in values.items() if name == "model"]
    for name, (text, _) in values.items():
        if name != "model":
            flags += ["--" + name.replace("_", "-"), text]
    assert from_environment == configure(*flags)
    for name, (_, value) in values.items():
        assert getattr(from_environment, name) == value


@pytest.mark.parametrize(
    ("flag", "text", "says"),
    [
        ("--port", "65536", "--port: 65536 is out of range: it must be from 0 to 65535"),
        ("--port", "http", "--port: 'http' is not a whole number"),
        ("--dtype", "fp4", "--dtype: 'fp4' is not one of auto, float32, int8"),
        ("--quantization", "awq", "--quantization: 'awq' is not one of auto, none, fp8"),
        ("--kv-cache-dtype", "int4", "--kv-cache-dtype: 'int4' is not one of auto, fp8"),
        ("--kv-cache-bytes", "many", "--kv-cache-bytes: 'many' is not a size"),
        ("--kv-cache-bytes", "0", "--kv-cache-bytes: it must be at least one byte"),
        ("--max-num-seqs", "0", "--max-num-seqs: 0 is out of range"),
        ("--metrics-prefix", "a b", "--metrics-prefix: 'a b' is not a metric prefix"),
        ("--served-model-name", ",", "--served-model-name: it needs at least one name"),
    ],
)
def test_a_wrong_value_is_named(flag: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        configure(flag, text)
    variable = "INFLIGHTD_" + flag[2:].upper().replace("-", "_")
    with pytest.raises(ConfigError, match=variable):
        configure(environment={variable: text})


def test_a_key_needs_its_certificate() -> None:
    with pytest.raises(ConfigError, match="--ssl-keyfile needs --ssl-certfile"):
        configure("--ssl-keyfile", "k.pem")


def test_a_step_has_a_token_for_every_sequence() -> None:
    assert configure("--max-num-seqs", "512", "--max-num-batched-tokens", "512").max_num_seqs == 512
    with pytest.raises(
        ConfigError, match=r"--max-num-batched-tokens \(512\) must be at least --max-num-seqs"
    ):
        configure("--max-num-seqs", "513", "--max-num-batched-tokens", "512")


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("1k", 1000), ("1KiB", 1024), ("1.5 MiB", 3 * 2**19), ("2gb", 2 * 10**9), ("3Gi", 3 * 2**30)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1x", "MiB", "1e3", "NaN"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_an_admin_port_needs_a_key_and_a_key_a_port() -> None:
    with pytest.raises(ConfigError, match="--admin-port needs --admin-key-file"):
        configure("--admin-port", "9000")
    with pytest.raises(ConfigError, match="need --admin-port or --admin-uds"):
        configure("--admin-key", "k")
    assert configure("--admin-port", "9000", "--admin-key", "k").admin_keys
    assert not configure("--admin-uds", "/run/a.sock").admin_keys
