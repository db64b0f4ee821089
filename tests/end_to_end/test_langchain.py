"""LangChain's OpenAI package against a real server process with the real default model."""

from __future__ import annotations

import httpx
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

from tests.end_to_end.server_process import ServerProcess

MODEL = "smollm2-135m-instruct"
QUESTION = "Name the capital of France."


def _chat(server: ServerProcess, **options: object) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{server.url}/v1",
        api_key="none",
        temperature=0,
        max_completion_tokens=60,
        stream_usage=True,
        **options,  # type: ignore[arg-type]
    )


def test_chats(server: ServerProcess) -> None:
    messages = [("system", "Be brief."), ("user", QUESTION)]
    answers = set()
    with httpx.Client() as http:  # its own are never closed
        for by_responses in (False, True):
            chat = _chat(server, use_responses_api=by_responses, http_client=http)
            whole = chat.invoke(messages)
            chunks = list(chat.stream(messages))
            assert "".join(chunk.text for chunk in chunks) == whole.text
            assert len(chunks) > 3
            assert whole.usage_metadata is not None
            usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata is not None]
            assert usages[-1]["output_tokens"] == whole.usage_metadata["output_tokens"]
            answers.add(whole.text)
    [answer] = answers
    assert "Paris" in answer


async def test_async_chats(server: ServerProcess) -> None:
    async with httpx.AsyncClient() as http:
        chat = _chat(server, http_async_client=http)
        pieces = [chunk.text async for chunk in chat.astream(QUESTION)]
    assert "Paris" in "".join(pieces)


class Trip(BaseModel):
    """A journey."""

    city: str = Field(max_length=30)
    days: int = Field(ge=1, le=9)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(server: ServerProcess, method: str) -> None:
    with httpx.Client() as http:
        chat = _chat(server, http_client=http)
        trip = chat.with_structured_output(Trip, method=method).invoke("A trip to Rome.")
    assert isinstance(trip, Trip)


@tool
def get_weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"It rains in {city}."


def test_tools(server: ServerProcess) -> None:
    question = HumanMessage("What is the weather in Paris?")
    with httpx.Client() as http:
        chat = _chat(server, http_client=http)
        bound = chat.bind_tools([get_weather], tool_choice="get_weather", strict=True)
        called = bound.invoke([question])
        [call] = called.tool_calls  # type: ignore[attr-defined]
        assert call["name"] == "get_weather"
        streamed = None
        for chunk in bound.stream([question]):
            streamed = chunk if streamed is None else streamed + chunk
        assert streamed is not None
        assert [each["args"] for each in streamed.tool_calls] == [call["args"]]  # type: ignore[attr-defined]
        result = get_weather.invoke(call)
        assert isinstance(result, ToolMessage)
        assert chat.invoke([question, called, result]).text


def test_embeddings(server: ServerProcess) -> None:
    with httpx.Client() as http:
        embeddings = OpenAIEmbeddings(
            model=MODEL,
            base_url=f"{server.url}/v1",
            api_key="none",
            http_client=http,
            check_embedding_ctx_length=False,  # or it fetches the tokenizer of OpenAI's models
        )
        vectors = embeddings.embed_documents(["A cat sleeps.", "Rain."])
        assert embeddings.embed_query("Rain.") == vectors[1]
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-5 for vector in vectors)
