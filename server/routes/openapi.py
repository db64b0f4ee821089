"""GET /openapi.json"""

from __future__ import annotations

from functools import cache

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from server.openapi import document
from server.service import VERSION

router = APIRouter()


@cache
def _document() -> bytes:
    return msgspec.json.encode(document(VERSION))


@router.get("/openapi.json")
async def openapi() -> Response:
    return Response(_document(), media_type="application/json")
