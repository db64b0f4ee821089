"""The settings of ``inflightd serve``: one dataclass, of which flags, variables and help are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from server.api_keys import ApiKey, ApiKeys, parse_api_keys, read_api_keys
from server.cors import parse_origins
from server.otlp_settings import parse_endpoint
from server.parsing.formats import AUTO, REASONING_PARSERS, TOOL_PARSERS
from server.setting_values import integer, metric_prefix, names, one_of, share, size, switch

DEFAULT_MODEL = "smollm2-135m-instruct"


def _flag(
    default: Any, parse: Callable[[str], Any], help: str, *, group: str, metavar: str | None = None
) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help, "group": group, "metavar": metavar})


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of one server. ``None`` means: chosen from the model and the machine at start."""

    model: str = _flag(
        DEFAULT_MODEL,
        str,
        "a folder in Hugging Face format, a .gguf file, or a Hub id; without it the embedded default "
        f"({DEFAULT_MODEL}) is served",
        group="model",
    )
    served_model_name: tuple[str, ...] | None = _flag(
        None,
        names,
        "name or comma-separated names by which clients ask for the model",
        group="model",
        metavar="NAME[,NAME]",
    )
    device: Literal["auto", "cuda", "cpu"] = _flag(
        "auto",
        one_of("auto", "cuda", "cpu"),
        "where the model runs: auto takes an NVIDIA GPU if there is one, else the CPU",
        group="model",
        metavar="DEVICE",
    )
    dtype: Literal["auto", "float32", "int8", "bfloat16"] = _flag(
        "auto",
        one_of("auto", "float32", "int8", "bfloat16"),
        "arithmetic of the matrix products: auto (int8 on a CPU, bfloat16 on a GPU), float32 (CPU: exact, "
        "slower), int8 (CPU) or bfloat16 (GPU)",
        group="model",
        metavar="DTYPE",
    )
    quantization: Literal["auto", "none", "fp8"] = _flag(
        "auto",
        one_of("auto", "none", "fp8"),
        "weights of the layers on a GPU: auto (as the checkpoint holds them), none (16 bits) or fp8 (8 bits, "
        "rounded while loading; compute capability 9.0)",
        group="model",
        metavar="FORM",
    )
    pooling: Literal["mean", "last"] = _flag(
        "mean",
        one_of("mean", "last"),
        "how /v1/embeddings makes a vector of a text: mean of its tokens' hidden states, or the last of them",
        group="model",
        metavar="KIND",
    )
    max_model_len: int | None = _flag(
        None,
        integer(1),
        "longest prompt and answer together, in tokens (default: the model's own limit)",
        group="model",
        metavar="TOKENS",
    )
    tool_call_parser: str = _flag(
        AUTO,
        one_of(*TOOL_PARSERS),
        f"how the model writes calls of tools: {', '.join(TOOL_PARSERS)}; auto finds it in the chat "
        "template, none leaves calls in the text",
        group="model",
        metavar="NAME",
    )
    reasoning_parser: str = _flag(
        AUTO,
        one_of(*REASONING_PARSERS),
        f"how the model sets its reasoning off: {', '.join(REASONING_PARSERS)}; auto finds it in the chat "
        "template, none leaves it in the text",
        group="model",
        metavar="NAME",
    )

    host: str = _flag("127.0.0.1", str, "address to listen on", group="server")
    port: int = _flag(
        8000, integer(0, 65535), "port to listen on; 0 takes a free one", group="server", metavar="PORT"
    )
    uds: str | None = _flag(
        None,
        str,
        "unix socket to listen on instead, for this user and group only (mode 0660)",
        group="server",
        metavar="PATH",
    )
    ssl_certfile: str | None = _flag(
        None,
        str,
        "certificate chain in PEM form: serves HTTPS, and HTTPS only",
        group="server",
        metavar="FILE",
    )
    ssl_keyfile: str | None = _flag(
        None,
        str,
        "private key of the certificate, without a passphrase (default: in --ssl-certfile)",
        group="server",
        metavar="FILE",
    )
    api_workers: int = _flag(
        1,
        integer(1, 64),
        "API processes, all on one engine and one port: more where one cannot keep up with the engine",
        group="server",
        metavar="N",
    )
    api_key: tuple[ApiKey, ...] = _flag(
        (),
        parse_api_keys,
        "key or comma-separated keys, one of which clients must show on every path but /health/live. Other "
        "users of the machine see the command line: rather use the file or the variable (default: open)",
        group="server",
        metavar="KEY[,KEY]",
    )
    api_key_file: tuple[ApiKey, ...] = _flag(
        (),
        read_api_keys,
        "file with such keys, 'name:key' or 'key' a line, that others cannot read (default: none)",
        group="server",
        metavar="FILE",
    )
    allowed_origins: tuple[str, ...] = _flag(
        (),
        parse_origins,
        "origins whose web pages may call, such as https://chat.example, or * (default: none)",
        group="server",
        metavar="ORIGIN[,ORIGIN]",
    )
    chat_page: Literal["auto", "on", "off"] = _flag(
        "auto",
        one_of("auto", "on", "off"),
        "the chat page on /: on (for all, though what it calls may need a key), off, or auto (on, unless "
        "keys are set)",
        group="server",
        metavar="WHO",
    )
    responses_db: str | None = _flag(
        None,
        str,
        "SQLite file that keeps the answers of /v1/responses, up to 1 GiB (default: memory, up to 64 MiB)",
        group="server",
        metavar="FILE",
    )
    max_body_bytes: int = _flag(
        32 * 2**20, size, "largest request body (default: 32MiB)", group="server", metavar="SIZE"
    )
    strict_fields: bool = _flag(
        False,
        switch,
        "answer 400 to fields that no API of this server has; off (default) ignores and counts them",
        group="server",
        metavar="on|off",
    )
    trust_request_chat_template: bool = _flag(
        False,
        switch,
        "use the field chat_template of requests, bounded in time and memory; off (default) refuses it",
        group="server",
        metavar="on|off",
    )
    metrics_prefix: str = _flag(
        "inflightd",
        metric_prefix,
        "prefix of the Prometheus metrics; 'vllm' serves dashboards made for vLLM",
        group="server",
        metavar="PREFIX",
    )
    metrics_compat: str | None = _flag(
        None,
        one_of("tgi"),
        "names of another server that /metrics has as well: tgi (default: none)",
        group="server",
        metavar="SERVER",
    )
    admin_port: int | None = _flag(
        None,
        integer(0, 65535),
        "port of the operator's interface, which has its own keys (default: none)",
        group="admin",
        metavar="PORT",
    )
    admin_host: str = _flag("127.0.0.1", str, "address that it listens on", group="admin")
    admin_uds: str | None = _flag(
        None,
        str,
        "unix socket that it listens on instead, for this user only (mode 0600); keys are optional there",
        group="admin",
        metavar="PATH",
    )
    admin_key: tuple[ApiKey, ...] = _flag(
        (),
        parse_api_keys,
        "key or comma-separated keys of operators; rather use the file or the variable",
        group="admin",
        metavar="KEY[,KEY]",
    )
    admin_key_file: tuple[ApiKey, ...] = _flag(
        (), read_api_keys, "file with such keys, as --api-key-file", group="admin", metavar="FILE"
    )
    otlp_traces_endpoint: str | None = _flag(
        None,
        parse_endpoint,
        "where traces are sent by OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; needs the extra "
        "'otel' (default: none, or as OTEL_EXPORTER_OTLP_TRACES_ENDPOINT says)",
        group="server",
        metavar="URL",
    )
    log_format: Literal["text", "json"] = _flag(
        "text",
        one_of("text", "json"),
        "text, or json: an object a line. Prompts and answers are never logged",
        group="server",
        metavar="FORM",
    )
    pre_stop_seconds: int = _flag(
        0,
        integer(0),
        "seconds after SIGTERM in which requests are still taken, while /health/ready says 503 already, for "
        "load balancers to notice",
        group="server",
        metavar="SECONDS",
    )
    shutdown_timeout: int = _flag(
        30,
        integer(0),
        "seconds that running requests get to finish after SIGTERM",
        group="server",
        metavar="SECONDS",
    )
    debug_faults: bool = _flag(
        False,
        switch,
        "for tests: the variable INFLIGHTD_FAULTS may make steps of the engine fail (default: off)",
        group="server",
        metavar="on|off",
    )
    log_level: str = _flag(
        "info",
        one_of("debug", "info", "warning", "error"),
        "debug, info, warning or error",
        group="server",
        metavar="LEVEL",
    )

    kv_cache_bytes: int | None = _flag(
        None,
        size,
        "memory for keys and values, such as 512MiB (default: from the free memory)",
        group="scheduling",
        metavar="SIZE",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = _flag(
        "auto",
        one_of("auto", "fp8"),
        "keys and values on a GPU: auto (16 bits) or fp8 (twice as many tokens, less exact)",
        group="scheduling",
        metavar="DTYPE",
    )
    gpu_memory_utilization: float = _flag(
        0.92,
        share,
        "part of a GPU's memory that may be used in all: weights, activations and KV cache (default: 0.92)",
        group="scheduling",
        metavar="SHARE",
    )
    block_size: int | None = _flag(
        None,
        integer(1, 256),
        "tokens in one KV block of a CPU (default: 16); GPU kernels have blocks of 64",
        group="scheduling",
        metavar="TOKENS",
    )
    max_num_seqs: int | None = _flag(
        None,
        integer(1, 4096),
        "sequences in one step at most (default: 64 on a CPU, 256 on a GPU)",
        group="scheduling",
        metavar="N",
    )
    max_num_batched_tokens: int | None = _flag(
        None,
        integer(1, 2**20),
        "tokens in one step at most: longer prompts are computed in chunks (default: 256 on a CPU, 4096 on a "
        "GPU)",
        group="scheduling",
        metavar="TOKENS",
    )
    max_queued_requests: int | None = _flag(
        None,
        integer(1),
        "sequences that wait for the engine at most, others get 429 (default: 4 times --max-num-seqs)",
        group="scheduling",
        metavar="N",
    )
    max_queued_tokens: int | None = _flag(
        None,
        integer(1),
        "tokens of their prompts at most (default: 128 times --max-num-batched-tokens)",
        group="scheduling",
        metavar="TOKENS",
    )
    max_requests_per_key: int | None = _flag(
        None,
        integer(1),
        "requests of one key that run or wait at a time; without keys, of all (default: no limit)",
        group="scheduling",
        metavar="N",
    )
    queue_timeout: int = _flag(
        60,
        integer(0),
        "seconds that a request may wait for the engine; 0 is for ever",
        group="scheduling",
        metavar="SECONDS",
    )
    request_timeout: int = _flag(
        0,
        integer(0),
        "seconds that an answer may take in all (default: 0, no limit)",
        group="scheduling",
        metavar="SECONDS",
    )
    threads: int | None = _flag(
        None, integer(1), "CPU threads of the engine (default: the cores it may use)", group="scheduling",
        metavar="N",
    )  # fmt: skip

    @property
    def api_keys(self) -> ApiKeys:
        """The keys of both sources; without any, the server is open."""
        return ApiKeys((*self.api_key, *self.api_key_file))

    @property
    def admin_keys(self) -> ApiKeys:
        """The keys of operators, of both sources."""
        return ApiKeys((*self.admin_key, *self.admin_key_file))

    @property
    def served_model_names(self) -> tuple[str, ...]:
        """Names that clients may ask for, the first being the one that answers carry."""
        return self.served_model_name or (self.model,)
