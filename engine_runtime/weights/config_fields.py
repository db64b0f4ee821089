"""Typed access to a parsed configuration that somebody else wrote."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from engine_runtime.model_config import ConfigError

_INT64_MAX = 2**63 - 1
_LARGEST = sys.float_info.max

REQUIRED = object()
"""Passed as a default: the field must be there."""


class ConfigFields:
    """Reads fields of a JSON object or of GGUF metadata, and names the field in every complaint.

    A field that is null counts as missing. Without a default, a missing field raises ``ConfigError``.
    """

    def __init__(self, values: Mapping[str, object], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def has(self, name: str) -> bool:
        return self._values.get(self._prefix + name) is not None

    def names(self) -> tuple[str, ...]:
        """Of all fields that are not null."""
        return tuple(name for name in self._values if self._values[name] is not None)

    def integer(self, name: str, default: int | object = REQUIRED) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _INT64_MAX:
            raise self._wrong(name, value, "an integer")
        return value

    def size(self, name: str, default: int | object = REQUIRED) -> int:
        value = self.integer(name, default)
        if value < 1:
            raise self._wrong(name, value, "an integer above 0")
        return value

    def number(self, name: str, default: float | object = REQUIRED) -> float:
        value = self._get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -_LARGEST <= value <= _LARGEST  # an integer may be larger than any float
        ):
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def positive(self, name: str, default: float | object = REQUIRED) -> float:
        value = self.number(name, default)
        if value <= 0:
            raise self._wrong(name, value, "a number above 0")
        return value

    def optional_positive(self, name: str) -> float | None:
        return self.positive(name) if self.has(name) else None

    def boolean(self, name: str, default: bool | object = REQUIRED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | object = REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._get(name, REQUIRED)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of strings")
        return tuple(value)

    def mapping(self, name: str) -> ConfigFields:
        value = self._get(name, REQUIRED)
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return ConfigFields(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self._get(name, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise self._wrong(name, value, "a token id or a list of them")
        return tuple(ids)

    def _get(self, name: str, default: object) -> object:
        value = self._values.get(self._prefix + name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ConfigError(f"the configuration has no field {self._prefix + name!r}")
        return default

    def _wrong(self, name: str, value: object, expected: str) -> ConfigError:
        shown = repr(value)
        if len(shown) > 60:
            shown = shown[:60] + "..."
        return ConfigError(f"{self._prefix + name} is {shown}; expected {expected}")
