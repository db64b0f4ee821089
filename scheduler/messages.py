"""Everything that crosses a boundary: front end <-> engine process, and scheduler <-> executor.

All records are frozen dataclasses of plain Python values, so that they can be compared in tests, sent
through msgpack unchanged, and never carry an array, a device pointer or a piece of text-processing state.

Times are seconds of ``time.monotonic()``, which on Linux is one clock for all processes of a machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class FinishReason(StrEnum):
    """Why a request ended, in the words of OpenAI's API plus the two that only an engine knows."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of one sequence is chosen, and what is told beside it. Already validated; no text.

    Attributes:
        temperature: 0 selects the most likely token (greedy).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this.
        min_p: drop tokens less likely than ``min_p`` times the most likely one.
        seed: 64-bit. The random number of a token depends only on (seed, position), never on the batch.
        presence_penalty, frequency_penalty: over the generated tokens, as OpenAI defines them.
        repetition_penalty: over prompt and generated tokens (CTRL, arXiv:1909.05858).
        logit_bias: (token id, value added to its logit) pairs.
        logprobs: number of most likely alternatives reported with each token; None reports nothing.
        prompt_logprobs: the same for the tokens of the prompt; such a request takes no prefix-cache hits.
        pooling: the mean of the final hidden states of the prompt's tokens, or the last of them, is told with
            the first token. ``mean`` takes no prefix-cache hits.
        max_tokens: generated tokens at most.
        min_tokens: no stop token is sampled before this many tokens.
        stop_token_ids: generation ends *with* one of these. Holds the model's end-of-sequence ids as well,
            unless the client asked for ``ignore_eos``.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    pooling: Literal["mean", "last"] | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether every token of the prompt has to be computed, even if its keys and values are known."""
        return self.prompt_logprobs is not None or self.pooling == "mean"


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for, as token ids.

    Attributes:
        prompt_token_ids: at least one token.
        arrival_time: ``time.monotonic()`` when the front end accepted it.
        priority: lower runs first; equal priorities run in order of arrival.
        cache_salt: requests share prefix-cache blocks only with requests of the same salt.
        cache_owner: whose room in the prefix cache the request takes.
        generated_token_ids: what an engine generated before it died; generation goes on after these tokens,
            and they are not reported again.
        grammar: what the answer must follow, as the engine's ``Grammars`` read it; None allows everything.
            It has been compiled once before and was found good.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    arrival_time: float = 0.0
    priority: int = 0
    cache_salt: str | None = None
    generated_token_ids: tuple[int, ...] = ()
    grammar: str | None = None
    cache_owner: str | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What grammars have to know of the tokenizer.

    Attributes:
        tokenizer: in the JSON format of the ``tokenizers`` library.
        eos_token_ids: any of them ends a text.
    """

    tokenizer: str
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """How a grammar goes on behind a token.

    Attributes:
        forced_token_ids: tokens that must come next, so that nobody need ask the model.
        has_ended: the text is complete with the last of these tokens, which is no part of it.
        error: the grammar cannot go on.
    """

    forced_token_ids: tuple[int, ...] = ()
    has_ended: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens may be sampled next.

    Attributes:
        request_ids: one a row.
        bits: rows of equal length, at least ceil(vocab_size / 32) little-endian 32-bit words, least
            significant bit first. A set bit allows a token.
    """

    request_ids: tuple[str, ...]
    bits: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token and how likely it was: natural logarithms of the model's own distribution (temperature 1).

    Attributes:
        rank: 1 for the most likely token of the vocabulary.
        top: the most likely tokens as (token id, logprob), best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one step produced for one request.

    Attributes:
        token_ids: newly generated tokens, a final stop token included. May be empty (abort, error).
        logprobs: one record for each of ``token_ids`` if the request asked for them.
        prompt_logprobs: sent once, with the first tokens: one record for each prompt token but the first.
        finish_reason: set on the last output of the request, and only there.
        num_cached_tokens: prompt tokens that were found in the prefix cache.
        first_scheduled_time: when the request left the queue for the first time.
        error: what went wrong, for the log, if ``finish_reason`` is ERROR.
        embedding: sent once, with the first token, if the request asked for ``pooling``.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    first_scheduled_time: float = 0.0
    error: str | None = None
    embedding: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """State of the engine after a step. Fields named ``*_total`` only ever grow.

    Attributes:
        scheduled_tokens_total: tokens handed to the executor; grows by the tokens of one step at a time.
        recomputed_tokens_total: those of them that had been computed before a preemption.
        schedule_seconds_total, execute_seconds_total, update_seconds_total: how long the step loop decided,
            waited for the executor, and took in results.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    scheduled_tokens_total: int = 0
    recomputed_tokens_total: int = 0
    schedule_seconds_total: float = 0.0
    execute_seconds_total: float = 0.0
    update_seconds_total: float = 0.0


@dataclass(frozen=True, slots=True)
class ProfileSteps:
    """Asks for the phases of the next steps; zero steps end a profile with what there is.

    Attributes:
        profile_id: chosen by whoever asks, repeated by the answer.
    """

    profile_id: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class StepPhase:
    """One phase of one step: ``schedule``, ``execute`` (waiting for its result) or ``update``.

    Attributes:
        start: ``time.perf_counter()``.
        num_tokens, num_sequences: of the step.
    """

    step_id: int
    phase: str
    start: float
    seconds: float
    num_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True)
class StepProfile:
    """The phases of some consecutive steps, in order."""

    profile_id: int
    phases: tuple[StepPhase, ...]


@dataclass(frozen=True, slots=True)
class EngineOutputs:
    """One message from the engine process to the front end.

    Attributes:
        profile: a profile that has just become complete.
    """

    outputs: tuple[EngineOutput, ...]
    stats: EngineStats
    profile: StepProfile | None = None


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the executor has not seen, or has forgotten since it was preempted.

    Attributes:
        token_ids: the prompt, followed by what was generated before a preemption.
        num_prompt_tokens: how many of ``token_ids`` are the prompt (penalties and logprobs need it).
        num_computed_tokens: leading tokens whose keys and values are in the cache already (prefix hits).
        block_ids: blocks that hold those computed tokens. Blocks for the tokens of this step come with
            ``ScheduledSequence.new_block_ids``.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The share of one sequence in a step: tokens [start, start + num_tokens) are computed.

    Attributes:
        new_block_ids: appended to the block table of the sequence before the step runs.
        samples: whether the tokens reach the end of what is known, so that one new token is sampled.
    """

    request_id: str
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step for the executor: forget ``released``, learn ``new`` and ``forced``, compute ``scheduled``.

    Attributes:
        forced: (request id, tokens) that follow the last token of a known sequence without being sampled.
        masks: of the sequences that sample under a grammar. They already respect ``min_tokens``.
    """

    step_id: int
    new: tuple[NewSequence, ...]
    scheduled: tuple[ScheduledSequence, ...]
    released: tuple[str, ...]
    forced: tuple[tuple[str, tuple[int, ...]], ...] = ()
    masks: TokenMasks | None = None

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token that a ``ScheduledSequence`` with ``samples`` got.

    Attributes:
        logprobs: if the request asked for them.
        is_valid: False if the logits were not finite; the request is then failed alone.
        embedding: with the first token, if the request asked for ``pooling``.
    """

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None
    is_valid: bool = True
    embedding: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """The result of one step.

    Attributes:
        sampled: one record for each scheduled sequence with ``samples``, in the order of the step.
        prompt_logprobs: (request id, records) of sequences that asked for them, for the prompt tokens whose
            predecessor was computed in this step; in order, without gaps, over the steps.
    """

    step_id: int
    sampled: tuple[SampledToken, ...]
    prompt_logprobs: tuple[tuple[str, tuple[TokenLogprobs, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class ExecutorSpec:
    """What an executor offers. Fixed once it is built.

    Attributes:
        model_id: identifies the weights; salts the hashes of the prefix cache.
        block_size: tokens in a KV block.
        num_blocks: KV blocks in the pool; ids are 0 .. num_blocks - 1.
        max_model_len: prompt and generated tokens of one sequence at most.
        max_num_seqs: sequences in one step at most.
        max_num_batched_tokens: tokens in one step at most.
        device: one line for humans, such as ``cpu (2 threads, int8)``.
        embedding_size: numbers in the vector that ``pooling`` gives; 0 if this executor does not do it.
        attention_parity: tokens of context to which attending takes as long as all else that is done for a
            token of a prompt: deep in a long prompt, steps get fewer tokens so that they take no longer. 0 if
            that is not known.
        saturating_num_tokens: tokens of a step from which larger ones compute hardly more a second. 0 if that
            is not known.
    """

    model_id: str
    vocab_size: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    device: str
    embedding_size: int = 0
    attention_parity: int = 0
    saturating_num_tokens: int = 0
