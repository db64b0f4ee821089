"""OpenAI's own client of a server whose engine says what a test has written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from openai import AsyncOpenAI

from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import serving
from tests.server.in_process_engine import ScriptedEngine

TEXT = "Paris is 🙂 the capital."


@asynccontextmanager
async def responses_client(
    engine: ScriptedEngine, tokenizer: Tokenizer, config: ServerConfig | None = None, key: str = "none"
) -> AsyncIterator[AsyncOpenAI]:
    async with (
        serving(create_app(config or ServerConfig(), engine, tokenizer)) as port,
        AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0) as client,
    ):
        yield client
