"""From the messages and tools of a chat to the prompt, and how what the model answers is to be read."""

from __future__ import annotations

import hashlib
import string
from dataclasses import dataclass
from typing import Any

from server.errors import InvalidRequestError, UnsupportedParameterError
from server.model_formats import ModelFormats
from server.parsing.formats import MISTRAL
from server.parsing.output_parser import OutputSyntax
from server.protocol import AssistantMessage, ChatPromptFields, Message, TextPart, ToolMessage
from server.tokenization import Tokenization
from server.tool_choice import ToolChoice, tool_choice
from server.tool_prompt import with_tools_told

# The opening of an answer, with its role and maybe a marker, is shorter than this.
_TAIL_TOKENS = 16
# What the server itself gives to templates, or other servers to the functions that render them.
_NOT_FOR_CLIENTS = frozenset(
    {
        "messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message",
        "continues_final", "chat_template", "tokenize", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
_SHORT_ID_CHARS = 9
_SHORT_ID_LETTERS = string.digits + string.ascii_letters


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as the model reads it.

    Attributes:
        choice: the tools that may be called.
        syntax: None if the whole answer is content.
        continues_message: the answer goes on with the last message rather than begins a new one.
    """

    token_ids: tuple[int, ...]
    choice: ToolChoice
    syntax: OutputSyntax | None
    continues_message: bool


class ChatPrompts:
    """Writes chats out for one model.

    Attributes:
        formats: how the model writes calls and reasoning.
    """

    def __init__(
        self, tokenization: Tokenization, formats: ModelFormats, *, trusts_templates: bool = False
    ) -> None:
        """``trusts_templates``: those that come with requests are used."""
        self._trusts_templates = trusts_templates
        self._tokenization = tokenization
        self.formats = formats

    async def prompt_of(self, wire: ChatPromptFields, limit: int) -> ChatPrompt:
        """The prompt of a chat, maybe a few tokens longer than ``limit``.

        Raises:
            InvalidRequestError: messages, tools or template arguments that do not fit together.
            ChatTemplateError, InvalidTextError, TextTooLongError: as ``Tokenization.encode_chat``.
        """
        if wire.chat_template is not None and not self._trusts_templates:
            raise UnsupportedParameterError(
                "'chat_template' is not supported by this server, unless it is started with "
                "--trust-request-chat-template. Leave it out.",
                param="chat_template",
            )
        continues_message = bool(wire.continue_final_message)
        if continues_message and wire.add_generation_prompt:
            raise InvalidRequestError(
                "'continue_final_message' and 'add_generation_prompt' cannot both be true.",
                param="continue_final_message",
                code="invalid_value",
            )
        formats, choice = self.formats, tool_choice(wire)
        if choice.tools and formats.tools is None and choice.is_required:
            raise UnsupportedParameterError(
                "'tool_choice' cannot be honoured: this server was started with --tool-call-parser none.",
                param="tool_choice",
            )
        messages = [self._message(message, index) for index, message in enumerate(wire.messages)]
        tools = [dict(tool) for tool in choice.tools] or None
        if not formats.template_takes_tools:
            template = self._tokenization.tokenizer.chat_template
            has_system_role = template is None or template.takes_system_messages
            messages, tools = with_tools_told(messages, choice, has_system_role=has_system_role), None
        token_ids = await self._tokenization.encode_chat(
            messages,
            limit,
            tools=tools,
            add_generation_prompt=wire.add_generation_prompt is not False and not continues_message,
            continues_final=continues_message,
            variables=self._variables(wire),
            template=wire.chat_template,
        )
        return ChatPrompt(tuple(token_ids), choice, self._syntax(wire, choice, token_ids), continues_message)

    def _message(self, message: Message | AssistantMessage | ToolMessage, index: int) -> dict[str, Any]:
        """A message as chat templates expect it. Text parts are put on lines of their own, as vLLM does."""
        # Templates know no developers; OpenAI's new word for the same thing.
        fields: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        fields["content"] = _text(message)
        if message.name is not None:
            fields["name"] = message.name
        if isinstance(message, ToolMessage):
            fields["tool_call_id"] = self._call_id(message.tool_call_id)
        if not isinstance(message, AssistantMessage):
            return fields
        reasoning = message.reasoning_content or message.reasoning
        if reasoning:
            fields["reasoning_content"] = reasoning
        if message.tool_calls:
            fields["tool_calls"] = [
                {
                    "id": self._call_id(call.id),
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in message.tool_calls
            ]
        elif fields["content"] is None and reasoning is None:
            raise InvalidRequestError(
                f"'messages[{index}]' says nothing: it needs 'content' or 'tool_calls'.",
                param=f"messages[{index}].content",
                code="missing_required_parameter",
            )
        elif fields["content"] is None:
            fields["content"] = ""
        return fields

    def _call_id(self, call_id: str) -> str:
        """An id that the template takes: Mistral's only take nine letters and digits."""
        if (
            self.formats.tools is None
            or self.formats.tools.name != MISTRAL.name
            or (len(call_id) == _SHORT_ID_CHARS and call_id.isascii() and call_id.isalnum())
        ):
            return call_id
        digest = hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest()
        return "".join(_SHORT_ID_LETTERS[byte % len(_SHORT_ID_LETTERS)] for byte in digest[:_SHORT_ID_CHARS])

    def _variables(self, wire: ChatPromptFields) -> dict[str, Any]:
        """What the client gives to the template, as far as the template reads it."""
        template = self._tokenization.tokenizer.chat_template
        names = frozenset[str]() if template is None else template.variables
        given: dict[str, Any] = dict(wire.chat_template_kwargs or {})
        for name in sorted(given.keys() & _NOT_FOR_CLIENTS):
            raise UnsupportedParameterError(
                f"'chat_template_kwargs' may not set '{name}'.", param="chat_template_kwargs"
            )
        effort = wire.reasoning_effort
        if wire.chat_template is not None:  # which reads what it likes
            if effort is not None:
                given = {"reasoning_effort": effort, "enable_thinking": effort != "none", **given}
            return given
        if effort is not None:
            if "reasoning_effort" in names:
                given.setdefault("reasoning_effort", effort)
            elif "enable_thinking" in names:
                given.setdefault("enable_thinking", effort != "none")
            elif effort != "none":
                raise UnsupportedParameterError(
                    "'reasoning_effort' is not supported: this model's chat template does not read it. Leave "
                    "it out.",
                    param="reasoning_effort",
                )
        return {name: value for name, value in given.items() if name in names}

    def _syntax(
        self, wire: ChatPromptFields, choice: ToolChoice, token_ids: list[int]
    ) -> OutputSyntax | None:
        formats = self.formats
        tools = formats.tools if choice.tools else None
        reasoning = formats.reasoning
        if tools is None and reasoning is None:
            return None
        is_reasoning = False
        if reasoning is not None:
            text = _text(wire.messages[-1]) or ""
            if not wire.continue_final_message:
                tail = token_ids[-_TAIL_TOKENS:]
                text = self._tokenization.tokenizer.decode(tail, skip_special_tokens=False).rstrip()
                text = text if text.endswith(reasoning.begin) else ""
            is_reasoning = text.rfind(reasoning.begin) > text.rfind(reasoning.end)
        return OutputSyntax(
            tools,
            reasoning,
            choice.names,
            choice.max_calls,
            is_reasoning,
            keeps_reasoning=wire.include_reasoning is not False,
            argument_types=choice.argument_types if tools is not None and tools.writing.argument else {},
        )


def echoed_text(wire: ChatPromptFields) -> str:
    """What an answer with ``echo`` begins with: the last message, if the answer is of the same role."""
    last = wire.messages[-1]
    if wire.add_generation_prompt is not False and last.role != "assistant":
        return ""
    return _text(last) or ""


def _text(message: Message | AssistantMessage | ToolMessage) -> str | None:
    """What a message says. A refusal is an answer like any other to a template."""
    content = message.content
    if content is None:
        return message.refusal if isinstance(message, AssistantMessage) else None
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
