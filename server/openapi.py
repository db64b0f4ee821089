"""The OpenAPI document (version 3.1) of what is served.

Bodies come from the models that check them. What those cannot say (limits that depend on the model, fields
that exclude each other) is answered by an error in the form that is documented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.anthropic_protocol import CountTokensRequest, MessagesRequest
from server.embeddings import EmbeddingsRequest
from server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from server.responses_protocol import ResponsesRequest

ErrorForm = Literal["openai", "anthropic", "tgi"]
_JSON = "application/json"
_EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of a path.

    Attributes:
        bodies: models of the request's body, any of which it may be.
        answers: media types of success.
        errors: the form of errors.
    """

    method: str
    path: str
    summary: str
    bodies: tuple[type[BaseModel], ...] = ()
    answers: tuple[str, ...] = (_JSON,)
    errors: ErrorForm = "openai"


_BOTH = (_JSON, _EVENTS)
OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a conversation", (ChatCompletionRequest,), _BOTH),
    Operation("post", "/v1/completions", "Continue prompts", (CompletionRequest,), _BOTH),
    Operation("post", "/v1/responses", "Answer, and keep the answer", (ResponsesRequest,), _BOTH),
    Operation("post", "/v1/responses/input_tokens", "Count the tokens of a request", (ResponsesRequest,)),
    Operation("get", "/v1/responses/{response_id}", "A kept answer"),
    Operation("get", "/v1/responses/{response_id}/input_items", "What a kept answer answered"),
    Operation("post", "/v1/responses/{response_id}/cancel", "Stop an answer that runs"),
    Operation("delete", "/v1/responses/{response_id}", "Forget an answer"),
    Operation(
        "post", "/v1/messages", "Answer in Anthropic's form", (MessagesRequest,), _BOTH, errors="anthropic"
    ),
    Operation(
        "post", "/v1/messages/count_tokens", "Count tokens of such a request", (CountTokensRequest,),
        errors="anthropic",
    ),
    Operation("post", "/v1/embeddings", "Embeddings of texts", (EmbeddingsRequest,)),
    Operation("get", "/v1/models", "The model that is served, by its names"),
    Operation("get", "/v1/models/{model_id}", "One name"),
    Operation(
        "post", "/tokenize", "Text or messages to tokens", (TokenizeCompletionRequest, TokenizeChatRequest)
    ),
    Operation("post", "/detokenize", "Tokens to text", (DetokenizeRequest,)),
    Operation("post", "/generate", "Text Generation Inference's answer", (GenerateRequest,), errors="tgi"),
    Operation(
        "post", "/generate_stream", "The same as a stream", (GenerateRequest,), (_EVENTS,), errors="tgi"
    ),
    Operation("post", "/", "Either, by the field stream", (GenerateRequest,), _BOTH, errors="tgi"),
    Operation("get", "/", "The chat page", answers=("text/html",)),
    Operation("get", "/info", "About the model, for TGI's clients", errors="tgi"),
    Operation("get", "/health/live", "Whether the process lives"),
    Operation("get", "/health/ready", "Whether the engine takes requests"),
    Operation("get", "/health", "The same"),
    Operation("get", "/version", "The version of the server"),
    Operation("get", "/metrics", "Metrics in Prometheus' text format", answers=("text/plain",)),
    Operation("get", "/openapi.json", "This document"),
)  # fmt: skip

_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERRORS: dict[ErrorForm, dict[str, Any]] = {
    "openai": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL,
                },
            }
        },
    },
    "anthropic": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": _TEXT, "message": _TEXT},
            },
        },
    },
    "tgi": {
        "type": "object",
        "required": ["error", "error_type"],
        "properties": {"error": _TEXT, "error_type": _TEXT},
    },
}  # fmt: skip


def document(version: str) -> dict[str, Any]:
    """The whole document."""
    models = {model for operation in OPERATIONS for model in operation.bodies}
    references, definitions = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    schemas = dict(definitions.get("$defs", {}))
    schemas |= {f"{form}_error": schema for form, schema in _ERRORS.items()}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        bodies = [references[model, "validation"] for model in operation.bodies]
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, bodies)
    return {
        "openapi": "3.1.0",
        "info": {"title": "inflightd", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # Where keys are set, one of them; otherwise none.
        "security": [{}, {"key": []}, {"x-api-key": []}],
    }


def _answer(media: str, operation: Operation) -> dict[str, Any]:
    if media == _JSON:
        return {"type": "array" if (operation.method, operation.path) == ("post", "/") else "object"}
    return {} if media == _EVENTS else _TEXT  # of each event


def _operation(operation: Operation, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    error = {"$ref": f"#/components/schemas/{operation.errors}_error"}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {
                "description": "Done.",
                "content": {media: {"schema": _answer(media, operation)} for media in operation.answers},
            },
            "default": {"description": "Why not.", "content": {_JSON: {"schema": error}}},
        },
    }
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if bodies:
        schema = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
        described["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    return described
