"""From pydantic's account of what is wrong with a body to OpenAI's error, in OpenAI's words and codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from server.errors import InvalidRequestError, excerpt
from server.fields import field_path

_TYPE_NAMES = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}
_BOUNDS = {
    "greater_than_equal": ("below_min_value", "at least", "ge"),
    "greater_than": ("below_min_value", "more than", "gt"),
    "less_than_equal": ("above_max_value", "at most", "le"),
}
_LENGTHS = {
    "too_short": ("array_below_min_length", "an array with {min_length} or more elements"),
    "too_long": ("array_above_max_length", "an array with {max_length} elements at most"),
    "string_too_short": ("string_below_min_length", "a string of {min_length} or more characters"),
    "string_too_long": ("string_above_max_length", "a string of {max_length} characters at most"),
}
_MAX_PARAM_CHARS = 128


def invalid_field(error: ValidationError) -> InvalidRequestError:
    """The first problem, naming its field in ``param``. Only short, plain values of the client are shown."""
    return _invalid(error.errors(include_url=False)[0])


def _invalid(detail: ErrorDetails) -> InvalidRequestError:
    kind, value = detail["type"], detail["input"]
    context: dict[str, Any] = detail.get("ctx", {})
    param = _param(detail["loc"])
    if kind == "missing":
        return InvalidRequestError(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    if kind in _TYPE_NAMES or kind == "wrong_type":
        expected = detail["msg"].removeprefix("expected ") if kind == "wrong_type" else _TYPE_NAMES[kind]
        return InvalidRequestError(
            f"Invalid type for '{param}': expected {expected}, but got {_kind_of(value)} instead.",
            param=param,
            code="invalid_type",
        )
    if kind in _BOUNDS:
        suffix, words, name = _BOUNDS[kind]
        bound = context[name]
        # Fields that take decimals have decimal bounds, whatever was sent.
        number = "integer" if isinstance(bound, int) else "decimal"
        shown = str(bound).removesuffix(".0")
        return InvalidRequestError(
            f"Invalid '{param}': expected a number of {words} {shown}, but got {_number(value)}.",
            param=param,
            code=f"{number}_{suffix}",
        )
    if kind in _LENGTHS:
        code, expected = _LENGTHS[kind]
        return InvalidRequestError(
            f"Invalid '{param}': expected {expected.format(**context)}.", param=param, code=code
        )
    if kind == "finite_number":
        return InvalidRequestError(
            f"Invalid '{param}': expected a finite number.", param=param, code="invalid_value"
        )
    if kind == "literal_error":
        shown = excerpt(value) if isinstance(value, str) else _kind_of(value)
        return InvalidRequestError(
            f"Invalid value for '{param}': {shown}. Supported values are: {context['expected']}.",
            param=param,
            code="invalid_value",
        )
    # The validators of ``protocol`` name their own codes.
    code = kind if kind == "unsupported_content_type" else "invalid_value"
    return InvalidRequestError(f"Invalid '{param}': {detail['msg']}.", param=param, code=code)


def _param(location: Sequence[str | int]) -> str:
    path = [part for part in location if isinstance(part, int) or not part.startswith("<")]
    param = field_path(path)
    # Keys of ``logit_bias`` are the client's own text.
    is_plain = param.isascii() and param.isprintable() and len(param) <= _MAX_PARAM_CHARS
    return param if is_plain else field_path(path[:1])


def _kind_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _number(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a much larger one" if value > 0 else "a much smaller one"
    if isinstance(value, float) and not math.isfinite(value):
        return "no finite number"
    return repr(value)
