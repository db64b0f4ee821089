"""Requests whose answers are the same every time, and those answers, asked for in quiet."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx

from server.bench.random_prompts import WORDS, distinct_prompts
from tests.robustness.ledger import Expected

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Case:
    """A request, greedy or seeded, and its answer once it is known."""

    name: str
    path: str
    body: Mapping[str, Any]
    expected: Expected | None = None

    @property
    def stream(self) -> dict[str, Any]:
        """The body that asks for a stream with all that the ledger wants to see."""
        return {**self.body, "stream": True, "stream_options": {"include_usage": True}}


def make_cases(count: int, max_tokens: tuple[int, int], seed: str) -> list[Case]:
    """Chats and completions of 8 to 200 words, a third with a common beginning, of different lengths."""
    chance = random.Random(f"{seed} cases")
    prefix = " ".join(chance.choices(WORDS, k=64))
    cases = []
    for number, prompt in enumerate(distinct_prompts(count, 8, seed)):
        text = f"{prompt} {' '.join(chance.choices(WORDS, k=chance.choice((0, 30, 120))))}".strip()
        if number % 3 == 0:
            text = f"{prefix} {text}"
        body: dict[str, Any] = {
            "max_tokens": chance.randint(*max_tokens),
            "ignore_eos": chance.random() < 0.7,
            "return_token_ids": True,
        }
        if number % 2:
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": number}
        else:
            body["temperature"] = 0.0
        kind = "seeded" if number % 2 else "greedy"
        if number % 4 < 2:
            cases.append(Case(f"{kind} completion {number}", COMPLETIONS, {**body, "prompt": text}))
        else:
            messages = [{"role": "user", "content": text}]
            cases.append(Case(f"{kind} chat {number}", CHAT, {**body, "messages": messages}))
    return cases


def answered(case: Case, url: str, *, is_exact: bool = True) -> Case:
    """The case with the server's answer, asked for in one piece: nothing of a stream is taken for granted."""
    response = httpx.post(url + case.path, json=dict(case.body), timeout=120.0)
    return replace(case, expected=replace(whole_answer(response.text), is_exact=is_exact))


def whole_answer(body: str) -> Expected:
    """What a response that is no stream says."""
    [choice] = json.loads(body)["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Expected(tuple(choice["token_ids"]), text or "", choice["finish_reason"])
