"""The bodies of the operator's interface."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from server.errors import InvalidRequestError, UnknownParameterError, excerpt
from server.field_errors import invalid_field
from server.json_body import read_json_object

M = TypeVar("M", bound="AdminBody")


class AdminBody(BaseModel):
    """No fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class LogLevelBody(AdminBody):
    level: Literal["debug", "info", "warning", "error"]


class ProfileBody(AdminBody):
    num_steps: int = Field(100, ge=1, le=10_000)
    seconds: float = Field(10.0, gt=0.0, le=60.0, allow_inf_nan=False)


async def read_admin_body(request: Request, model: type[M]) -> M:
    """A JSON object with the fields of ``model`` and no others; a mistyped name must not go unnoticed.

    That it must be JSON keeps web pages out: a browser asks before it sends that to another origin.

    Raises:
        InvalidRequestError: naming the field.
    """
    body, _ = await read_json_object(request)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> InvalidRequestError:
    detail = error.errors(include_url=False)[0]
    if detail["type"] == "extra_forbidden":
        return UnknownParameterError(f"Unknown parameter: {excerpt(str(detail['loc'][0]))}.")
    return invalid_field(error)
