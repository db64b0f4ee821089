"""The limits that scheduling keeps to."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.messages import Request


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the device (see ``ExecutorSpec``). ``cache_seed`` names the model in the prefix cache.

    Raises ValueError unless all numbers are positive (the last two may be 0).
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    cache_seed: str = ""
    attention_parity: int = 0
    saturating_num_tokens: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 0 if name in ("attention_parity", "saturating_num_tokens") else 1
            if name != "cache_seed" and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def max_num_tokens(self) -> int:
        """Tokens of one sequence at most. The last one needs no slot in the pool: it is never computed."""
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)

    def reason_to_refuse(self, request: Request) -> str | None:
        """Why this request can never run, for the client; None if it can."""
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            return "the prompt is empty"
        if params.max_tokens < 1:
            return f"max_tokens must be at least 1, not {params.max_tokens}"
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            return f"the prompt has token ids outside the vocabulary of {self.vocab_size}"
        if any(not 0 <= token_id < self.vocab_size for token_id, _ in params.logit_bias):
            return f"logit_bias has token ids outside the vocabulary of {self.vocab_size}"
        if len(prompt) + 1 > self.max_model_len:
            return (
                f"the prompt has {len(prompt)} tokens: with one generated token that is more than the "
                f"{self.max_model_len} of the model's context"
            )
        if len(prompt) + 1 > self.max_num_tokens:
            return (
                f"the prompt has {len(prompt)} tokens and does not fit in the {self.num_blocks} KV blocks "
                f"of {self.block_size} tokens"
            )
        return None
