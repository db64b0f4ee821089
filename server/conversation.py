"""A chat in OpenAI's form, put together from what another API calls its turns, blocks or items."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from server.field_errors import invalid_field
from server.fields import check_fields
from server.protocol import ChatCompletionRequest


class Conversation:
    """Chat messages as ``/v1/chat/completions`` takes them, added to one piece at a time.

    What an assistant thinks, says and calls in a row is one message: templates know it so.

    Attributes:
        messages: plain JSON values.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def say(self, role: str, text: str, *, joins: bool = False) -> None:
        """Adds a text, with ``joins`` on a line of its own in the last message if it has the same role."""
        joins = joins or role == "assistant"
        last = self.messages[-1] if self.messages else None
        if joins and last is not None and last["role"] == role:
            last["content"] = text if last["content"] is None else f"{last['content']}\n{text}"
        else:
            self.messages.append({"role": role, "content": text})

    def think(self, text: str) -> None:
        """Adds what the assistant thought before it answered."""
        last = self._assistant()
        last["reasoning_content"] = last.get("reasoning_content", "") + text

    def call_tool(self, call_id: str, name: str, arguments: str) -> None:
        """Adds a call by the assistant; ``arguments`` is JSON text."""
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._assistant().setdefault("tool_calls", []).append(call)

    def answer_tool(self, call_id: str, text: str) -> None:
        """Adds what a call of the assistant resulted in."""
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _assistant(self) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
        return self.messages[-1]


def chat_request(fields: dict[str, Any]) -> ChatCompletionRequest:
    """The chat that ``fields`` ask for; those that are None are left out.

    Raises:
        InvalidRequestError: it is no valid chat, or asks for something this server does not do.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        chat = ChatCompletionRequest.model_validate(given)
    except ValidationError as error:
        raise invalid_field(error) from None
    check_fields(chat, lambda path: None)
    return chat
