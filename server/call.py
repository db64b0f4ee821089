"""What a valid API call asks for: the border between checking a request and answering it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scheduler.messages import Request
from server.parsing.output_parser import OutputSyntax


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one prompt of a call says; ``text`` is known only where the answer repeats it."""

    token_ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A valid API call.

    Attributes:
        id, created, model: as every object of the answer carries them.
        requests: ``best_of`` a prompt, in the order of the prompts.
        prompts: ``n`` consecutive choices answer each of them.
        best_of: answers that are generated for a prompt; the best ``n`` of them are shown.
        length_penalty: of the beam search, ``best_of`` wide, that finds the answers; None samples them.
        stop: strings that end an answer.
        num_logprobs: alternatives shown with each token; None shows nothing.
        continues_prompt: whether the text goes on where the prompt ends, rather than begins anew.
        echo: whether the answer begins with its prompt.
        has_running_usage: whether each chunk of a stream tells the usage so far.
        num_prompt_logprobs: alternatives shown with each token of the prompt; None shows nothing.
        shows_token_ids: whether the ids of the tokens, of prompt and answer, are part of the response.
        names_tokens_by_id: whether logprobs call tokens ``token_id:123``.
        syntax: how the answers of a chat are taken apart into content, reasoning and calls of tools; None
            leaves them whole.
        is_scoring: whether only the prompt is wanted; the one token that the engine must generate is dropped.
        is_resumable: whether the stream has marks from which it can go on at another server.
        num_cached_tokens: of the prompt, where the answer began; 0 unless it goes on from another server's.
    """

    id: str
    created: int
    model: str
    requests: tuple[Request, ...]
    prompts: tuple[Prompt, ...]
    n: int
    best_of: int
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    is_stream: bool
    include_usage: bool
    num_logprobs: int | None
    length_penalty: float | None = None
    continues_prompt: bool = False
    echo: bool = False
    has_running_usage: bool = False
    num_prompt_logprobs: int | None = None
    shows_token_ids: bool = False
    names_tokens_by_id: bool = False
    is_scoring: bool = False
    is_resumable: bool = False
    num_cached_tokens: int = 0
    syntax: OutputSyntax | None = None

    @property
    def num_choices(self) -> int:
        """Answers that are shown."""
        return self.n * len(self.prompts)

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that a choice answers."""
        return self.prompts[index // self.n]

    def scoped(self, scope: str | None) -> Call:
        """The same call, sharing prefix-cache blocks and room within ``scope`` only. None is everybody's.

        A scope has no colon, so that no ``cache_salt`` of one scope can equal one of another.
        """
        if scope is None:
            return self
        return replace(
            self,
            requests=tuple(
                replace(request, cache_salt=f"{scope}:{request.cache_salt or ''}", cache_owner=scope)
                for request in self.requests
            ),
        )
