"""What a load sends: prompts, answers' lengths, and when."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.bench.random_prompts import WORDS, distinct_prompts

Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class WorkloadError(Exception):
    """A load that cannot be made; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Workload:
    """
    Attributes:
        num_prompt_words, num_output_tokens: of each request. A word is about a token.
        num_prefix_words: that all prompts begin with, on top.
        prompts: taken in turn instead of random ones.
        ignores_eos: answers have their full length. Needs a server that knows ``ignore_eos``.
    """

    endpoint: Endpoint
    model: str
    num_prompt_words: int = 128
    num_output_tokens: int = 128
    num_prefix_words: int = 0
    prompts: tuple[str, ...] = ()
    ignores_eos: bool = True
    temperature: float = 0.0

    def bodies(self, count: int, seed: str) -> list[dict[str, object]]:
        """``count`` requests; the same for the same ``seed``.

        Raises:
            WorkloadError: so many prompts cannot be told apart.
        """
        if self.prompts:
            prompts = list(itertools.islice(itertools.cycle(self.prompts), count))
        else:
            if self.num_prompt_words < 2 or count > len(WORDS) ** 2:
                raise WorkloadError(
                    f"random prompts have at least 2 words, and there are at most {len(WORDS) ** 2} of them"
                )
            prefix = " ".join(random.Random(f"{seed} prefix").choices(WORDS, k=self.num_prefix_words))
            prompts = [
                f"{prefix} {prompt}".lstrip()
                for prompt in distinct_prompts(count, self.num_prompt_words, seed)
            ]
        return [self._body(prompt) for prompt in prompts]

    def _body(self, prompt: str) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "max_tokens": self.num_output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignores_eos:
            body["ignore_eos"] = True
        if self.endpoint == "chat":
            return {**body, "messages": [{"role": "user", "content": prompt}]}
        return {**body, "prompt": prompt}


def read_prompts(path: Path) -> tuple[str, ...]:
    """From a file with a prompt a line, or an object with ``prompt`` a line (JSON Lines).

    Raises:
        WorkloadError: it cannot be read, or a line is wrong.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: {error}") from None
    if not lines:
        raise WorkloadError(f"{path} holds no prompts")
    if not path.name.endswith(".jsonl"):
        return tuple(lines)
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise WorkloadError(f'{path} line {number}: it must be an object with a text "prompt"')
        prompts.append(prompt)
    return tuple(prompts)


def poisson_starts(count: int, rate: float, seed: str) -> Sequence[float]:
    """When each of ``count`` requests is due, in seconds, at ``rate`` a second with exponential gaps."""
    generator = random.Random(f"{seed} starts")
    return list(itertools.accumulate(generator.expovariate(rate) for _ in range(count)))
