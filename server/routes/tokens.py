"""POST /tokenize and /detokenize"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.json_body import read_json_object
from server.service import service_of
from server.tokenizing import Tokenizing

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    answer = await _tokenizing(request).tokenize(*await read_json_object(request))
    return Response(answer, media_type="application/json")


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    answer = await _tokenizing(request).detokenize(*await read_json_object(request))
    return Response(answer, media_type="application/json")


def _tokenizing(request: Request) -> Tokenizing:
    service = service_of(request)
    return Tokenizing(service.engine, service.tokenization, service.validator)
