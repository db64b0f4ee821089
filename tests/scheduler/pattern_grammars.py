"""A grammar of the simplest kind, for the tests: a pattern with one letter a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduler.hashing_executor import EMPTY_PREFIX, extend_hash, sample_allowed
from scheduler.messages import Accepted, FinishReason, Request, ScheduledSequence, TokenMasks

VOCAB_SIZE = 4
END = 3
_ANY = (0, 1, 2)


class PatternGrammars:
    """``"01."`` is token 0, token 1, any of the tokens 0 to 2, then the end of the text, token 3.

    With ``forces``, letters without choice come unsampled. A pattern with other letters is wrong.

    Args:
        vocab_size: columns of the logits; a larger one makes the masks longer.

    Attributes:
        is_slow: grammars are compiled only when ``finish`` is called.
    """

    def __init__(self, *, forces: bool, is_slow: bool = False, vocab_size: int = VOCAB_SIZE) -> None:
        self._forces = forces
        self._mask_bytes = -(-vocab_size // 32) * 4
        self.is_slow = is_slow
        self._preparing: list[Request] = []
        self._prepared: list[Request] = []
        self.followed: dict[str, tuple[str, list[int]]] = {}

    def prepare(self, request: Request) -> None:
        self._preparing.append(request)
        if not self.is_slow:
            self.finish()

    def finish(self) -> None:
        self._prepared += self._preparing
        self._preparing = []

    @property
    def has_prepared(self) -> bool:
        return bool(self._prepared)

    def take_prepared(self) -> Sequence[tuple[Request, str | None]]:
        taken: list[tuple[Request, str | None]] = []
        for request in self._prepared:
            pattern = request.grammar or ""
            if set(pattern) <= set("012."):
                self.followed[request.request_id] = pattern, list(request.generated_token_ids)
                taken.append((request, None))
            else:
                taken.append((request, f"wrong pattern {pattern!r}"))
        self._prepared = []
        return taken

    def masks(self, shares: Iterable[ScheduledSequence]) -> TokenMasks | None:
        names = [s.request_id for s in shares if s.samples and s.request_id in self.followed]
        rows = [sum(1 << token_id for token_id in allowed(*self.followed[name])) for name in names]
        return (
            TokenMasks(tuple(names), b"".join(row.to_bytes(self._mask_bytes, "little") for row in rows))
            if names
            else None
        )

    def accept(self, request_id: str, token_id: int) -> Accepted:
        pattern, taken = self.followed[request_id]
        if token_id not in allowed(pattern, taken):
            return Accepted(error=f"{token_id} does not follow {taken} in {pattern!r}")
        taken.append(token_id)
        if token_id == END:
            return Accepted(has_ended=True)
        forced: list[int] = []
        while self._forces and len(choice := allowed(pattern, taken)) == 1:
            forced += choice
            taken += choice
            if choice == [END]:
                return Accepted(tuple(forced), has_ended=True)
        return Accepted(tuple(forced))

    def forget(self, request_id: str) -> bool:
        self.followed.pop(request_id, None)
        waiting = [r for r in self._preparing + self._prepared if r.request_id != request_id]
        is_preparing = len(waiting) < len(self._preparing) + len(self._prepared)
        self._preparing = [r for r in self._preparing if r in waiting]
        self._prepared = [r for r in self._prepared if r in waiting]
        return is_preparing

    def shutdown(self) -> None:
        pass


def allowed(pattern: str, taken: Sequence[int]) -> list[int]:
    """What may follow the tokens taken."""
    if len(taken) >= len(pattern):
        return [END]
    letter = pattern[len(taken)]
    return list(_ANY) if letter == "." else [int(letter)]


def follow_alone(request: Request, max_model_len: int) -> tuple[list[int], FinishReason]:
    """What a request with a pattern must generate, worked out token by token."""
    params, prefix_hash = request.params, EMPTY_PREFIX
    for token_id in request.prompt_token_ids:
        prefix_hash = extend_hash(prefix_hash, token_id)
    generated: list[int] = []
    while len(generated) < min(params.max_tokens, max_model_len - len(request.prompt_token_ids)):
        choice = allowed(request.grammar or "", generated)
        generated.append(sample_allowed(prefix_hash, params, choice))
        prefix_hash = extend_hash(prefix_hash, generated[-1])
        if generated[-1] == END:
            return generated, FinishReason.STOP
    return generated, FinishReason.LENGTH
