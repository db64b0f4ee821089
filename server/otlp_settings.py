"""Whether traces are wanted and where they go, from the flag or OpenTelemetry's own variables."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from urllib.parse import urlsplit

_log = logging.getLogger(__name__)

_TRACES_PATH = "/v1/traces"
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class TracesError(Exception):
    """Traces were asked for and cannot be sent; the message says what to change."""


def parse_endpoint(text: str) -> str:
    """An ``http`` or ``https`` URL; one without a path gets OTLP's. Raises ValueError."""
    try:
        url = urlsplit(text)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(f"{text!r} is not a URL such as http://127.0.0.1:4318/v1/traces")
    return url._replace(path=_TRACES_PATH).geturl() if url.path in ("", "/") else text


def traces_endpoint(flag: str | None, environment: Mapping[str, str]) -> str | None:
    """The URL that spans are sent to; None sends none.

    The variables are those that every program with OpenTelemetry reads. Set for another program of the
    machine, they must not keep this one from starting: what stands in the way is a warning for them, and an
    error for the flag.

    Raises:
        TracesError: the flag was given, and the optional packages are missing or gRPC is asked for.
    """
    endpoint, source = flag, "--otlp-traces-endpoint"
    if endpoint is None:
        if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
            return None
        source = next((name for name in _ENDPOINTS if environment.get(name)), "")
        if not source:
            return None
        endpoint = environment[source]
        if source == _ENDPOINTS[1]:  # the base of the paths of all signals
            endpoint = endpoint.rstrip("/") + _TRACES_PATH
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        _log.info("no traces are sent: OTEL_SDK_DISABLED is true")
        return None
    problem = _problem(endpoint, environment)
    if problem is None:
        return endpoint
    if flag is not None:
        raise TracesError(f"{source}: {problem}")
    _log.warning("no traces are sent, though %s is set: %s", source, problem)
    return None


def _problem(endpoint: str, environment: Mapping[str, str]) -> str | None:
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        return (
            f"spans are sent as http/protobuf, not as {protocol!r}; collectors take it on port 4318 (unset "
            f"{' and '.join(_PROTOCOLS)})"
        )
    try:
        parse_endpoint(endpoint)
    except ValueError as error:
        return str(error)
    if not _is_installed():
        return "the packages of the extra 'otel' are not installed: pip install 'inflightd[otel]'"
    return None


def _is_installed() -> bool:
    try:
        return bool(importlib.util.find_spec(_EXPORTER) and importlib.util.find_spec("opentelemetry.sdk"))
    except ModuleNotFoundError:  # of a package above it
        return False
