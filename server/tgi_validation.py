"""From TGI's way to ask for a text to the call that a text completion would be."""

from __future__ import annotations

import time

from server.call import Call
from server.context import far_too_long, max_context
from server.engine_protocol import EngineClient
from server.errors import InvalidRequestError
from server.protocol import MAX_PROMPT_TOKENS, CompletionRequest, GenerateParameters, GenerateRequest
from server.structured_output import tgi_constraint
from server.tokenization import TextTooLongError, Tokenization
from server.tokenizer import InvalidTextError
from server.validation import Validator

_DEFAULT_MAX_NEW_TOKENS = 100


async def generate_call(
    wire: GenerateRequest,
    *,
    is_stream: bool,
    engine: EngineClient,
    tokenization: Tokenization,
    validator: Validator,
) -> Call:
    """The call that a request asks for. Raises ApiError."""
    arrival = time.monotonic()
    parameters = wire.parameters or GenerateParameters()
    with_prefill = bool(parameters.decoder_input_details)
    if with_prefill and is_stream:
        raise InvalidRequestError(
            "'parameters.decoder_input_details' cannot be streamed.",
            param="parameters.decoder_input_details",
            code="invalid_value",
        )
    spec = engine.spec
    limit = max_context(spec) if parameters.truncate is None else MAX_PROMPT_TOKENS
    try:
        [token_ids] = await tokenization.encode([wire.inputs], limit)
    except TextTooLongError as error:
        raise far_too_long(error, spec, "inputs") from None
    except InvalidTextError as error:
        raise InvalidRequestError(str(error), param="inputs", code="invalid_value") from None
    if parameters.truncate is not None:
        token_ids = token_ids[-parameters.truncate :]
    if not token_ids or len(token_ids) > MAX_PROMPT_TOKENS:
        raise InvalidRequestError(
            f"'inputs' has {len(token_ids)} tokens: expected 1 to {MAX_PROMPT_TOKENS}.",
            param="inputs",
            code="invalid_value",
        )
    grammar = None
    if parameters.grammar is not None:
        constraint = tgi_constraint(parameters.grammar, "parameters.grammar")
        grammar = await validator.structured_output.checked(constraint)
    completion = CompletionRequest(
        model=wire.model,
        prompt=token_ids,
        stream=is_stream,
        max_tokens=parameters.max_new_tokens,
        temperature=_temperature(parameters),
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        repetition_penalty=parameters.repetition_penalty,
        frequency_penalty=parameters.frequency_penalty,
        seed=parameters.seed,
        stop=parameters.stop,
        include_stop_str_in_output=True,
        logprobs=parameters.top_n_tokens or 0,
        echo=with_prefill,
    )
    return await validator.completion_of(
        completion,
        arrival,
        default_max_tokens=_DEFAULT_MAX_NEW_TOKENS,
        prompt_name="inputs",
        limit_name="max_new_tokens",
        grammar=grammar,
    )


def _temperature(parameters: GenerateParameters) -> float:
    """Greedy unless sampling is asked for, by ``do_sample`` or by any parameter that only it needs."""
    is_sampled = (
        bool(parameters.do_sample)
        or parameters.temperature not in (None, 1.0)
        or parameters.top_k is not None
        or parameters.top_p not in (None, 1.0)
    )
    if not is_sampled:
        return 0.0
    return 1.0 if parameters.temperature is None else parameters.temperature
