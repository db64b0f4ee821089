"""What the server writes to its log: lines for people or for machines, one a request among them.

Prompts and answers are never logged. What comes from a client is escaped, so that a line stays one line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType

from server.log_writer import LogWriter

# The x-request-id of the request that the current task works for.
http_request_id: ContextVar[str | None] = ContextVar("http_request_id", default=None)

# Ids of the trace that the current task works for: each of its lines carries them.
trace_fields: ContextVar[Mapping[str, str]] = ContextVar("trace_fields", default=MappingProxyType({}))

_request_log = logging.getLogger("server.request")


def log_request(**fields: str | float | None) -> None:
    """Says how a request went, at level info."""
    if _request_log.isEnabledFor(logging.INFO):
        _request_log.info(
            "request ended", extra={"fields": {"x_request_id": http_request_id.get(), **fields}}
        )


class JsonFormatter(logging.Formatter):
    """A JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, fields of the record,
    ``trace_id`` and ``span_id`` if the request is traced."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
            **trace_fields.get(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """``time level logger: message name=value ...``; a traceback may follow in lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = {**getattr(record, "fields", {}), **trace_fields.get()}
        shown = [f"{name}={value}" for name, value in fields.items() if value is not None]
        return _on_one_line(" ".join([super().formatMessage(record), *shown]))


def configure_logging(level: str, form: str) -> None:
    """Logs to standard error, in the form ``text`` or ``json``."""
    handler = LogWriter(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler])
    set_log_level(level)


def set_log_level(level: str) -> None:
    """``debug``, ``info``, ``warning`` or ``error``, of this process."""
    logging.getLogger().setLevel(level.upper())
    # At level info it says what lines of ours say.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING if level == "info" else logging.NOTSET)


def log_level() -> str:
    """The level of this process."""
    return logging.getLevelName(logging.getLogger().level).lower()


def _on_one_line(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
