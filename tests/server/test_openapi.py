"""The OpenAPI document against the application: every route, and what generated requests get."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from scheduler.messages import EngineOutput, Request
from server.app import create_app
from server.config import ServerConfig
from server.openapi import OPERATIONS, Operation, document
from server.tokenizer import Tokenizer
from tests.server.http_client import api
from tests.server.in_process_engine import SPEC, ScriptedEngine, tokens

# Requests generated for each operation; thousands in all with 200.
_CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
_EXAMPLES = int(os.environ.get("INFLIGHTD_OPENAPI_EXAMPLES", "6"))


def test_the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(document("0")).validate()


def test_every_route_is_documented(tokenizer: Tokenizer) -> None:
    app = create_app(ServerConfig(), ScriptedEngine(tokens([1])), tokenizer)
    routes = {
        (method.lower(), re.sub(r":\w+}", "}", str(route.path)))
        for route in iter_route_contexts(app.routes)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == {(operation.method, operation.path) for operation in OPERATIONS}


async def test_the_document_is_served(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        served = (await client.get("/openapi.json")).json()
    assert served["paths"].keys() == {operation.path for operation in OPERATIONS}
    body = served["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    assert {"model", "messages", "temperature"} <= served["components"]["schemas"][name]["properties"].keys()


@pytest.fixture(scope="module")
def app(tokenizer: Tokenizer) -> FastAPI:
    texts = tokens([101], [102])

    def script(request: Request) -> list[EngineOutput]:
        vector = (3.0, 4.0, 12.0) if request.params.pooling else None
        return [replace(output, embedding=vector) for output in texts(request)]

    engine = ScriptedEngine(script, replace(SPEC, embedding_size=3))
    return create_app(ServerConfig(served_model_name=("m",)), engine, tokenizer)


@pytest.fixture(scope="module")
def schema(app: FastAPI) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.fixture
async def existing(app: FastAPI) -> dict[str, str]:
    """Values of parameters in paths that lead to something."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        made = await client.post("/v1/responses", json={"input": "Hi"})
    return {"model_id": "m", "response_id": made.json()["id"]}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method} {o.path}")
def test_generated_requests_get_what_is_documented(
    operation: Operation, schema: Any, existing: dict[str, str]
) -> None:
    @given(case=schema[operation.path][operation.method].as_strategy())
    @settings(
        max_examples=_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and case.body.get("model") is not None:
            case.body["model"] = "m"  # otherwise all would end at the name of the model
        for name, value in (case.path_parameters or {}).items():
            if len(value) % 2:  # otherwise all would end at the name
                case.path_parameters[name] = existing[name]
        response = case.call()
        case.validate_response(response, checks=_CHECKS)
        assert response.headers["x-request-id"]

    check()
