"""One of the answers of a call while it comes in."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from scheduler.messages import EngineOutput, FinishReason, Request, TokenLogprobs
from server.detokenizer import IncrementalDetokenizer
from server.errors import InternalError
from server.metrics import RequestTimer
from server.parsing.deltas import ContentDelta, Delta
from server.parsing.output_parser import OutputParser
from server.resume import cannot_go_on

_log = logging.getLogger(__name__)


class Choice:
    """Collects the tokens of one sequence as text.

    Attributes:
        index: as the client counts the choices of its call.
        num_tokens: generated tokens that count for usage: up to the end of a stop string; with a stop token.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        logprobs: of the tokens since the last ``take_logprobs``.
        prompt_logprobs: of the prompt's tokens but the first, once they have come.
        embedding: the pooled hidden states of the prompt, once they have come; empty if nobody asked.
        num_reasoning_tokens: generated tokens with which the model thought, the borders included.
        finish_reason: ``stop``, ``length`` or, if it stopped and called tools, ``tool_calls`` once the answer
            is complete, else None.
    """

    __slots__ = (
        "_deltas", "_detokenizer", "_keeps_token_ids", "_parser", "_request", "_timer", "_token_ids",
        "embedding", "finish_reason", "index", "logprobs", "num_cached_tokens", "num_reasoning_tokens",
        "num_tokens", "prompt_logprobs",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        request: Request,
        detokenizer: IncrementalDetokenizer,
        timer: RequestTimer,
        parser: OutputParser | None = None,
        *,
        keeps_token_ids: bool = False,
    ) -> None:
        """
        Args:
            parser: takes the text apart, for ``take_deltas``; None leaves it as it is.
            keeps_token_ids: for ``take_token_ids``.
        """
        self._keeps_token_ids = keeps_token_ids
        self._token_ids: list[int] = []
        self.index = index
        self._parser = parser
        self._deltas: list[Delta] = []
        self.num_reasoning_tokens = 0
        self._request = request
        self._detokenizer = detokenizer
        self._timer = timer
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.embedding: tuple[float, ...] = ()
        self.finish_reason: str | None = None

    def push(self, output: EngineOutput, now: float) -> str:
        """Takes what a step produced and returns the text that may be sent for it, maybe none.

        Raises:
            InternalError: the engine gave up on this request.
            InvalidRequestError: it did because the tokens to go on from break the grammar.
        """
        self._timer.observe(output, now)
        token_ids, reason = output.token_ids, output.finish_reason
        detokenizer = self._detokenizer
        if reason is FinishReason.STOP:
            # The stop token ends the answer and is no part of it.
            text = self._push(token_ids[:-1])
            if detokenizer.stopped_by is None:
                text += self._rest()
        else:
            text = self._push(token_ids)
        num_taken = len(token_ids)
        if detokenizer.stopped_by is not None:
            self.finish_reason = "stop"
            num_taken = detokenizer.num_tokens - self.num_tokens
            self._timer.finish(FinishReason.STOP, now)
        elif reason is not None:
            self._timer.finish(reason, now)
            if reason in (FinishReason.ERROR, FinishReason.ABORT):
                _log.error("request %s: %s: %s", self._request.request_id, reason.value, output.error)
                known = self._request.generated_token_ids
                if self._request.grammar is not None and known and self.num_tokens == len(known):
                    raise cannot_go_on()
                raise InternalError
            if reason is FinishReason.LENGTH:
                text += self._rest()
            self.finish_reason = reason.value if detokenizer.stopped_by is None else "stop"
        if self._parser is not None and self.finish_reason is not None:
            self._deltas += self._parser.finish()
            if self._parser.num_calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        self.num_tokens += num_taken
        if self._keeps_token_ids:
            self._token_ids += token_ids[:num_taken]
        if not self._request.generated_token_ids:
            self.num_cached_tokens = output.num_cached_tokens or self.num_cached_tokens
        if output.logprobs is not None:
            self.logprobs += output.logprobs[:num_taken]
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.embedding is not None:
            self.embedding = output.embedding
        return text

    def replay(self, num_cached_tokens: int) -> str:
        """Takes the tokens that the request begins with, and returns their text, which the client has.

        Raises:
            InvalidRequestError: the answer ends with them.
        """
        token_ids = self._request.generated_token_ids
        text = self._push(token_ids)
        if self._detokenizer.stopped_by is not None:
            raise cannot_go_on()
        self.num_tokens = len(token_ids)
        if self._keeps_token_ids:
            self._token_ids += token_ids
        self.num_cached_tokens = num_cached_tokens
        return text

    def _push(self, token_ids: Sequence[int]) -> str:
        detokenizer, parser = self._detokenizer, self._parser
        if parser is None:
            return detokenizer.push(token_ids)
        pieces = []
        for token_id in token_ids:  # one by one, since each counts as reasoning or not
            pieces.append(piece := detokenizer.push((token_id,)))
            was_reasoning = parser.is_reasoning
            self._deltas += parser.push(piece)
            self.num_reasoning_tokens += was_reasoning or parser.is_reasoning
            if detokenizer.stopped_by is not None:
                break
        return "".join(pieces)

    def _rest(self) -> str:
        rest = self._detokenizer.finish()
        if self._parser is not None:
            self._deltas += self._parser.push(rest)
        return rest

    def take_deltas(self) -> list[Delta]:
        """What the parser found since the last call."""
        taken, self._deltas = self._deltas, []
        return taken

    def take_whole(self) -> list[Delta]:
        """The whole answer: what the parser found or, without one, all text. Nothing was taken before."""
        if self._parser is not None:
            return self.take_deltas()
        return [ContentDelta(self.text)] if self.text else []

    def take_piece(self, text: str) -> list[Delta]:
        """What the parser found since the last call or, without one, the text that came since."""
        return [ContentDelta(text)] if self._parser is None else self.take_deltas()

    def take_token_ids(self) -> list[int]:
        """The tokens since the last call, if they are kept."""
        taken, self._token_ids = self._token_ids, []
        return taken

    def take_logprobs(self) -> list[TokenLogprobs]:
        """The logprobs of the tokens since the last call."""
        taken, self.logprobs = self.logprobs, []
        return taken

    def forget_generated(self) -> None:
        """Drops what was generated: only the prompt was wanted."""
        self.logprobs.clear()
        self._token_ids.clear()
        self.num_tokens = 0

    @property
    def logprob(self) -> float:
        """Of all tokens of the answer together, if they have come with theirs and were not taken."""
        return sum(record.logprob for record in self.logprobs)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._detokenizer.stopped_by

    @property
    def text(self) -> str:
        """All text of the answer so far."""
        return self._detokenizer.text

    def abandon(self, reason: FinishReason, now: float) -> None:
        """Counts the end of an answer that goes no further; if it is complete, nothing happens."""
        self._timer.finish(reason, now)
