"""Beam search on a real server, against one that asks the same server token by token."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.end_to_end.server_process import ServerProcess

WIDTH, MAX_TOKENS, PENALTY = 3, 6, 1.3


@pytest.fixture
def client(server: ServerProcess) -> Any:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def _asked(client: httpx.Client, text: list[int]) -> dict[int, float]:
    """The likeliest tokens behind a text, by the API for clients."""
    body = {
        "prompt": text,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 2 * WIDTH,
        "return_token_ids": True,
    }
    choice = client.post("/v1/completions", json=body | {"return_tokens_as_token_ids": True}).json()[
        "choices"
    ][0]
    return {
        int(name.removeprefix("token_id:")): p for name, p in choice["logprobs"]["top_logprobs"][0].items()
    }


def test_the_best_texts_are_found(client: httpx.Client, server: ServerProcess) -> None:
    prompt = client.post("/tokenize", json={"prompt": "The capital of France is"}).json()["tokens"]
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(MAX_TOKENS):
        longer = [
            ([*text, token], logprob + more)
            for text, logprob in beams
            for token, more in _asked(client, prompt + text).items()
        ]
        beams = sorted(longer, key=lambda beam: beam[1])[: -WIDTH - 1 : -1]
    body = {
        "prompt": prompt, "use_beam_search": True, "best_of": WIDTH, "n": 2, "max_tokens": MAX_TOKENS,
        "length_penalty": PENALTY, "ignore_eos": True, "return_token_ids": True, "logprobs": 0,
    }  # fmt: skip
    answer = client.post("/v1/completions", json=body).json()
    for choice, (text, logprob) in zip(answer["choices"], beams[:2], strict=True):
        assert choice["token_ids"] == text
        assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(
            logprob, abs=1e-3 if server.is_exact else 0.05
        )
    assert answer["usage"]["completion_tokens"] == WIDTH * MAX_TOKENS
    server.wait_until("num_requests_running", 0)
