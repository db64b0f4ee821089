"""LiteLLM against a real server process with the real default model.

Not part of ``make test``: LiteLLM pins versions of openai and huggingface_hub that are older than those the
other tests use. Install it in an environment of its own, next to this package, pytest and its plugins of
the extra ``dev``, and run this file. It passed on 2026-11-21 with LiteLLM 1.106.2, which has openai 2.54.0
and huggingface_hub 1.33.0.
"""

from __future__ import annotations

import pytest

from tests.end_to_end.server_process import ServerProcess

litellm = pytest.importorskip(
    "litellm",
    reason="litellm needs older versions of other clients; passed with 1.106.2, see the file",
    exc_type=ImportError,
)
MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "Name the capital of France."}]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_completions(server: ServerProcess, provider: str) -> None:
    base = server.url if provider == "anthropic" else f"{server.url}/v1"
    ask = {
        "model": f"{provider}/{MODEL}",
        "api_base": base,
        "api_key": "none",
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 30,
    }
    whole = litellm.completion(**ask)
    text = whole.choices[0].message.content
    assert "Paris" in text
    chunks = list(litellm.completion(**ask, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert whole.usage.completion_tokens > 3


@pytest.mark.filterwarnings("default")
def test_embeddings(server: ServerProcess) -> None:
    common = {"model": f"openai/{MODEL}", "api_base": f"{server.url}/v1", "api_key": "none"}
    vectors = litellm.embedding(**common, input=["A cat sleeps."], encoding_format="float").data
    assert sum(x * x for x in vectors[0]["embedding"]) == pytest.approx(1.0)
