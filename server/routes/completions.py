"""POST /v1/completions"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.completion_form import CompletionForm
from server.service import service_of

router = APIRouter()


async def create_completion(request: Request) -> Response:
    service = service_of(request)
    return await service.answer(request, service.validator.completion, CompletionForm, can_be_resumed=True)


# Without FastAPI's part of a route, which keeps three stacks of exits for as long as an answer streams.
router.add_route("/v1/completions", create_completion, methods=["POST"])
