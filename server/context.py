"""What fits into the context of the model: prompts, and answers behind them."""

from __future__ import annotations

from scheduler.messages import ExecutorSpec
from server.errors import ContextLengthError
from server.protocol import MAX_PROMPT_TOKENS, SamplingFields
from server.tokenization import TextTooLongError


def max_context(spec: ExecutorSpec) -> int:
    """Prompt and generated tokens of one sequence at most: what the model allows and the KV pool holds."""
    return min(spec.max_model_len, spec.num_blocks * spec.block_size)


def prompt_limit(wire: SamplingFields, spec: ExecutorSpec) -> int:
    """Tokens from which on a prompt need not be tokenized to be refused."""
    return max_context(spec) if wire.truncate_prompt_tokens is None else MAX_PROMPT_TOKENS


def truncated(
    token_ids: tuple[int, ...], wire: SamplingFields, num_generated: int, spec: ExecutorSpec
) -> tuple[int, ...]:
    """The end of a prompt, if that is all that is wanted of it: as much as was asked for, or fits."""
    wanted = wire.truncate_prompt_tokens
    if wanted is None:
        return token_ids
    if wanted < 0:
        wanted = max(max_context(spec) - num_generated, 1)
    return token_ids[-wanted:]


def far_too_long(error: TextTooLongError, spec: ExecutorSpec, prompt_name: str) -> ContextLengthError:
    """What is said of a text that was not even tokenized."""
    return ContextLengthError(
        f"This model's context is {max_context(spec)} tokens long, but the {prompt_name} resulted in "
        f"at least {error.num_tokens} tokens. Shorten the {prompt_name}.",
        param=prompt_name,
    )


def max_tokens_of(
    prompt_length: int,
    asked: int | None,
    default: int | None,
    spec: ExecutorSpec,
    prompt_name: str,
    limit_name: str,
) -> int:
    """How many tokens may be generated. Raises ContextLengthError if prompt and answer do not fit."""
    context = max_context(spec)
    left = context - prompt_length
    if asked is None:
        wanted = max(left, 1) if default is None else max(min(default, left), 1)
    else:
        wanted = max(asked, 1)
    if wanted <= left:
        return wanted
    if left < 1:
        raise ContextLengthError(
            f"This model's context is {context} tokens long, but the {prompt_name} resulted in "
            f"{prompt_length} tokens, which leaves no room for an answer. Shorten the {prompt_name}.",
            param=prompt_name,
        )
    raise ContextLengthError(
        f"This model's context is {context} tokens long, but you asked for "
        f"{prompt_length + wanted}: {prompt_length} in the {prompt_name} and {wanted} as {limit_name}. "
        f"Shorten the {prompt_name} or set {limit_name} to at most {left}.",
        param=limit_name,
    )
