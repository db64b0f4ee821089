"""The HTTP application: routes behind the guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from server.admission import Admission
from server.config import ServerConfig
from server.cors import Cors
from server.doorman import Doorman
from server.engine_protocol import EngineClient
from server.error_handlers import add_error_handlers
from server.fields import refuse_unknown
from server.grammar_check import GrammarCheck
from server.guard import Guard
from server.idempotency import Idempotency
from server.metric_aliases import add_aliases
from server.metrics import Metrics
from server.model_formats import model_formats
from server.response_database import ResponseDatabase
from server.response_store import ResponseMemory
from server.routes import (
    anthropic,
    chat,
    completions,
    embeddings,
    health,
    models,
    openapi,
    page,
    responses,
    tgi,
    tokens,
)
from server.service import Service
from server.structured_output import StructuredOutput
from server.tokenization import Tokenization
from server.tokenizer import Tokenizer
from server.validation import Validator

if TYPE_CHECKING:
    from server.tracing import Traces


def create_app(
    config: ServerConfig, engine: EngineClient, tokenizer: Tokenizer, traces: Traces | None = None
) -> FastAPI:
    """The application of one API process. The engine may still be loading; until then calls get 503.

    Args:
        traces: where spans of requests go, if they are wanted.

    Raises:
        ResponseDatabaseError: the file of ``--responses-db`` cannot be used.
    """
    tokenization = Tokenization(tokenizer)
    admission = Admission(config, engine)
    metrics = Metrics(config.metrics_prefix, config.served_model_names[0], engine, admission)
    add_aliases(metrics, config.served_model_names[0], config.metrics_compat)
    formats = model_formats(tokenizer.chat_template, config.tool_call_parser, config.reasoning_parser)
    check = GrammarCheck(tokenizer, lambda: engine.spec.max_model_len)
    metrics.grammar_check = check
    validator = Validator(
        engine,
        tokenization,
        StructuredOutput(check, tokenizer.special_token_names),
        config.served_model_names,
        refuse_unknown if config.strict_fields else metrics.count_unknown_field,
        formats,
        trusts_templates=config.trust_request_chat_template,
    )
    # No documentation pages: they load scripts from elsewhere.
    app = FastAPI(title="inflightd", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    store = ResponseMemory() if config.responses_db is None else ResponseDatabase(config.responses_db)
    app.state.service = Service(config, engine, admission, tokenization, metrics, validator, store, check)
    for routes in (
        chat,
        completions,
        responses,
        embeddings,
        anthropic,
        models,
        health,
        tokens,
        tgi,
        page,
        openapi,
    ):
        app.include_router(routes.router)
    add_error_handlers(app)
    app.add_middleware(Idempotency, service=app.state.service)
    cors = Cors(config.allowed_origins)
    if traces is not None:
        from server.tracing import TraceRequests

        app.add_middleware(TraceRequests, traces=traces)
    app.state.doorman = Doorman(engine, admission, config.api_keys, cors)
    app.add_middleware(
        Guard,
        max_body_bytes=config.max_body_bytes,
        api_keys=config.api_keys,
        cors=cors,
        is_page_open=config.chat_page == "on",
    )
    return app
