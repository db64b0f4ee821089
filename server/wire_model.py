"""What all wire models have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class WireModel(BaseModel):
    """Coerces nothing, and keeps fields that it does not list for ``fields`` to look at."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


def expected(what: str) -> dict[str, Any]:
    """The error of a ``Discriminator`` that finds no alternative."""
    return {"custom_error_type": "wrong_type", "custom_error_message": f"expected {what}"}
