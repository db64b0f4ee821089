"""TensorRT, by whichever of its two Python packages is installed.

``tensorrt`` (data centre) and ``tensorrt_rtx`` share one API and one ONNX parser.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from functools import cache
from typing import Any

_logger = logging.getLogger(__name__)


class TensorRTError(RuntimeError):
    """TensorRT is missing, or refused something. The message holds what it logged."""


@cache
def tensorrt() -> Any:
    """The module ``tensorrt`` or, if that is not installed, ``tensorrt_rtx``.

    Raises:
        TensorRTError: neither can be imported.
    """
    reasons = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise TensorRTError(f"TensorRT is not installed: pip install 'inflightd[gpu]' ({'; '.join(reasons)})")


def tensorrt_version() -> str:
    """Name and version, such as ``tensorrt_rtx 1.6.1.120``: engines of another one are not used."""
    return f"{tensorrt().__name__} {tensorrt().__version__}"


@cache
def tensorrt_log() -> TensorRTLog:
    """The log of this process: TensorRT takes one for all its objects."""
    return TensorRTLog()


class TensorRTLog:
    """Hands TensorRT's warnings and errors to ``logging`` and keeps the last errors for exceptions.

    Attributes:
        listener: the ``ILogger`` to give to TensorRT. It calls from its own threads too.
    """

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=8)
        self._lock = threading.Lock()
        self.listener = _listener_class()(self)

    def take_errors(self) -> str:
        """The errors since the last call, as one line."""
        with self._lock:
            text = "; ".join(self._errors)
            self._errors.clear()
        return text or "no reason given"

    def receive(self, level: int, message: str) -> None:
        _logger.log(level, "TensorRT: %s", message)
        if level >= logging.ERROR:
            with self._lock:
                self._errors.append(message.strip())


@cache
def _listener_class() -> type[Any]:
    trt = tensorrt()
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
    }

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self, log: TensorRTLog) -> None:
            super().__init__()
            self._log = log

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level is not None:
                self._log.receive(level, message)

    return Listener
