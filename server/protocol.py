"""The bodies of OpenAI's requests, with vLLM's additions, as clients write them.

The models check types and the ranges that do not depend on the served model, and coerce nothing: ``"1"`` and
``true`` are no numbers. ``null`` means the default. ``validation`` turns them into what the engine takes.

Fields that are not listed here end up in ``model_extra``; ``fields`` tells known ones from unknown ones.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError, PydanticKnownError

from server.constraint_fields import Choices, ResponseFormat, Schema, StructuredOutputs, TgiGrammar
from server.wire_model import WireModel as WireModel
from server.wire_model import expected as expected

MAX_CHOICES = 128
MAX_PROMPTS = 1024
# Answers of which the best are shown, if they are more than those.
MAX_BEST_OF = 20
# Twice as many tokens are looked at behind each beam, and the device reports that many.
MAX_BEAM_WIDTH = 10
MAX_LENGTH_PENALTY = 10.0
MAX_PROMPT_TOKENS = 2**20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKENS = 256
MAX_BAD_WORDS = 64
MAX_MESSAGES = 16_384
MAX_TEMPLATE_CHARS = 64 * 1024
MAX_TOOLS = 128
MAX_TOOL_NAME_CHARS = 64

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1


def _not_negative_zero(value: float) -> float:
    if value == 0.0 and math.copysign(1.0, value) < 0.0:
        raise PydanticCustomError("negative_zero", "must not be negative zero; send 0")
    return value


def _few_biases(value: Any) -> Any:
    # Before the entries are looked at: each bad one of a million would become an error object.
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticKnownError(
            "too_long",
            {"field_type": "Dictionary", "max_length": MAX_LOGIT_BIAS, "actual_length": len(value)},
        )
    return value


def _text_type(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        raise PydanticCustomError(
            "unsupported_content_type", "is not supported: this model takes content parts of type 'text' only"
        )
    return value


def tag_of_text(value: Any) -> str | None:
    if isinstance(value, str):
        return "<one>"
    return "<many>" if isinstance(value, list) else None


def _tag_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    if isinstance(first, list):
        return "<many ids>"
    return "<ids>" if isinstance(first, int) else "<texts>"


# Tags of alternatives stand in angle brackets, so that ``field_errors`` can leave them out of a path.
Number = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_not_negative_zero)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
_BadWord = Annotated[str, Field(min_length=1, max_length=64)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class TextPart(WireModel):
    type: Annotated[Literal["text"], BeforeValidator(_text_type)]
    text: str


class RefusalPart(WireModel):
    """What a model said instead of an answer; OpenAI's tell the two apart."""

    type: Literal["refusal"]
    refusal: str


def tag_of_part(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "<refusal>" if kind == "refusal" else "<text>"


_Content = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<many>")],
    Discriminator(tag_of_text, **expected("a string or an array of text parts")),
]

_Said = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[
        list[
            Annotated[
                Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
                Discriminator(tag_of_part),
            ]
        ],
        Field(min_length=1, fail_fast=True),
        Tag("<many>"),
    ],
    Discriminator(tag_of_text, **expected("a string or an array of text parts")),
]


class Message(WireModel):
    """What the system or the user says. Other roles have models of their own, below."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content
    name: str | None = None


class CalledFunction(WireModel):
    name: Annotated[str, Field(min_length=1, max_length=MAX_TOOL_NAME_CHARS)]
    arguments: str


class ToolCallParam(WireModel):
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(WireModel):
    role: Literal["assistant"]
    content: _Said | None = None
    refusal: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCallParam], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None


class ToolMessage(WireModel):
    """What a call resulted in."""

    role: Literal["tool"]
    content: _Content
    tool_call_id: Annotated[str, Field(max_length=256)]
    name: str | None = None


def _tag_of_message(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"<{role}>" if role in ("assistant", "tool") else "<other>"


_Messages = Annotated[
    list[
        Annotated[
            Annotated[Message, Tag("<other>")]
            | Annotated[AssistantMessage, Tag("<assistant>")]
            | Annotated[ToolMessage, Tag("<tool>")],
            Discriminator(_tag_of_message),
        ]
    ],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
]


class FunctionTool(WireModel):
    name: Annotated[str, Field(max_length=MAX_TOOL_NAME_CHARS, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(WireModel):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(WireModel):
    name: str


class NamedToolChoice(WireModel):
    type: Literal["function"]
    function: NamedFunction


def _tag_of_choice(value: Any) -> str | None:
    if isinstance(value, str):
        return "<mode>"
    return "<named>" if isinstance(value, dict | NamedToolChoice) else None


class StreamOptions(WireModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ModelFields(WireModel):
    """A body that may name the model it is for."""

    model: str | None = None


class ChatPromptFields(ModelFields):
    """What becomes the prompt of a chat."""

    messages: _Messages
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
            | Annotated[NamedToolChoice, Tag("<named>")],
            Discriminator(_tag_of_choice, **expected("a string or an object")),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool | None = None


class Resume(WireModel):
    """What a stream told of itself in its marks (see ``resume``), put together."""

    id: Annotated[str, Field(max_length=160, pattern=r"^[A-Za-z0-9_.:-]+$")]
    created: Annotated[int, Field(ge=0, le=INT64_MAX)]
    seed: Annotated[int, Field(ge=0, le=INT64_MAX)]
    cached_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    token_ids: TokenIds


class SamplingFields(ModelFields):
    """What chat and text completions have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[Number, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)] | None = None
    temperature: Annotated[Number, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[Number, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0.0, le=10.0)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[Number, Field(ge=-100.0, le=100.0)]],
            BeforeValidator(_few_biases),
        ]
        | None
    ) = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("<one>")]
            | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("<many>")],
            Discriminator(tag_of_text, **expected("a string or an array of strings")),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    bad_words: Annotated[list[_BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LOGIT_BIAS, fail_fast=True)] | None
    ) = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")] | None = None
    priority: Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    response_format: ResponseFormat | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    structured_outputs: StructuredOutputs | None = None
    resume: Resume | None = None
    user: str | None = None


class ChatCompletionRequest(ChatPromptFields, SamplingFields):
    max_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    echo: bool | None = None


PromptInput = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("<many ids>")],
    Discriminator(
        _tag_of_prompt, **expected("a string, an array of strings, or an array (of arrays) of token ids")
    ),
]


class CompletionRequest(SamplingFields):
    prompt: PromptInput
    # 0 is for scoring a prompt with ``echo``.
    max_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeCompletionRequest(ModelFields):
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatPromptFields):
    return_token_strs: bool | None = None


class DetokenizeRequest(ModelFields):
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]


class GenerateParameters(WireModel):
    """What TGI calls ``parameters``."""

    max_new_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    temperature: Annotated[Number, Field(gt=0.0, le=2.0)] | None = None
    top_k: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0.0, le=10.0)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2.0, le=2.0)] | None = None
    seed: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = None
    do_sample: bool | None = None
    stop: Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    truncate: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    grammar: TgiGrammar | None = None


class GenerateRequest(ModelFields):
    """The body of TGI's ``/generate`` and its kin."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: GenerateParameters | None = None
    stream: bool | None = None
