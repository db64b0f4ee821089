"""The official OpenAI client against a real server process with the real default model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.end_to_end.server_process import ServerProcess

MODEL = "smollm2-135m-instruct"
# An answer of which this small model is sure: int8 and float32 agree, every token leads by over 1 in logits.
QUESTION = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_a_chat_makes_sense(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=30)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_equals_the_whole(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=30)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_repeated_prompt_hits_the_prefix_cache(client: OpenAI, server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "Tell me about the river Danube. " * 20}]
    first, second = (
        client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
        for _ in range(2)
    )
    assert second.choices[0].message.content == first.choices[0].message.content
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    block_size = 16 if server.is_exact else 64  # on a GPU
    assert second.usage.prompt_tokens - block_size <= cached < second.usage.prompt_tokens


def test_seeds(client: OpenAI) -> None:
    def sample(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=1.5, seed=seed, max_tokens=20
        )
        return answer.choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_several_choices(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, temperature=1.2, seed=5, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_stop_strings_never_appear(client: OpenAI) -> None:
    chunks = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=30, stop=["Paris"], stream=True
    )
    pieces, reasons = [], []
    for chunk in chunks:
        pieces.append(chunk.choices[0].delta.content or "")
        reasons.append(chunk.choices[0].finish_reason)
    text = "".join(pieces)
    assert text
    assert "Par" not in text
    assert reasons[-1] == "stop"


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token
        assert bytes(token.bytes or []).decode() == token.token
    text = "".join(token.token for token in logprobs.content)
    assert text == answer.choices[0].message.content


def test_logit_bias_forces_a_token(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The sky is", temperature=0, max_tokens=3, logit_bias={"28": 100}
    )
    assert answer.choices[0].text == ",,,"


def test_completions_echo(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="One two three", temperature=0, max_tokens=4, echo=True, logprobs=1
    )
    choice = answer.choices[0]
    assert choice.text.startswith("One two three")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:] if value is not None)


def test_embeddings(client: OpenAI) -> None:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))  # of length 1

    texts = ["A cat sits on the mat.", "A kitten is sitting on a rug.", "Interest rates rose in March."]
    answer = client.embeddings.create(model=MODEL, input=texts)  # the client asks for base64
    vectors = [item.embedding for item in answer.data]
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert cosine(vectors[0], vectors[0]) == pytest.approx(1.0, abs=1e-5)
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])
    plain = client.embeddings.create(model=MODEL, input=texts[1], encoding_format="float", dimensions=64)
    short = vectors[1][:64]
    scale = cosine(short, short) ** 0.5
    assert plain.data[0].embedding == pytest.approx([x / scale for x in short], abs=1e-6)
    assert 0 < plain.usage.total_tokens == plain.usage.prompt_tokens < answer.usage.prompt_tokens


def test_bad_requests_are_openai_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 5000, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="Hi")


async def test_async_streams_run_together(server: ServerProcess) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def ask(number: int) -> str:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Count to {number}."}],
                temperature=0,
                max_tokens=24,
                stream=True,
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return "".join(pieces)

        together = await asyncio.gather(*(ask(number) for number in range(3, 15)))
        alone = [await ask(number) for number in (3, 9, 14)]
    assert alone == [together[0], together[6], together[11]]
