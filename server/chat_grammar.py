"""What the answer to a chat must look like: its reasoning, its calls and its content, in one grammar."""

from __future__ import annotations

import json
from dataclasses import replace

from server.chat_prompt import ChatPrompt
from server.errors import UnsupportedParameterError
from server.parsing.formats import ReasoningFormat
from server.parsing.output_parser import OutputSyntax
from server.protocol import ChatCompletionRequest
from server.structured_output import Constraint, StructuredOutput
from server.tokenizer import Tokenizer
from server.tool_grammar import ANSWER, tool_grammar

_FREE = OutputSyntax()


class ChatGrammars:
    """Makes the grammars of the chats of one model."""

    def __init__(self, tokenizer: Tokenizer, structured_output: StructuredOutput) -> None:
        self._tokenizer = tokenizer
        self._structured_output = structured_output

    async def grammar_of(self, wire: ChatCompletionRequest, chat: ChatPrompt) -> str | None:
        """The grammar of the answer, checked; None if it is free.

        What ``response_format`` and its kin ask for holds for the content behind the reasoning; calls that
        are not required may come in its place. Where calls are required, there is no content.

        Raises:
            InvalidRequestError: a grammar that cannot be followed, or a thinking budget for a model that
                cannot keep to it.
        """
        syntax = chat.syntax or _FREE
        answer = self._structured_output.constraint_of(wire)
        if chat.choice.is_required:
            answer = None
        budget = wire.thinking_token_budget
        lark = tool_grammar(
            chat.choice, syntax, self._tokens(syntax, budget), budget, has_answer=answer is not None
        )
        if lark is None:
            return None if answer is None else await self._structured_output.checked(answer)
        text = lark
        if answer is None:
            constraint = Constraint(lambda: text, "tools", "invalid_json_schema")
        else:
            make = answer.make
            constraint = replace(answer, make=lambda: _joined(text, make()))
        return await self._structured_output.checked(constraint)

    def can_bound(self, reasoning: ReasoningFormat | None) -> bool:
        """Whether thoughts in this format can have a budget: one token must end them."""
        return reasoning is not None and reasoning.end in self._tokenizer.added_token_ids

    def _tokens(self, syntax: OutputSyntax, budget: int | None) -> dict[str, int]:
        tokens = self._tokenizer.added_token_ids
        known = {
            marker: tokens[marker]
            for marker in syntax.markers
            if marker in self._tokenizer.special_token_names
        }
        if budget is not None:
            end = None if syntax.reasoning is None else syntax.reasoning.end
            if end is None or not self.can_bound(syntax.reasoning):
                reason = "does not think aloud" if end is None else f"has no token for {end!r}"
                raise UnsupportedParameterError(
                    f"'thinking_token_budget' is not supported: this model {reason}. Leave it out.",
                    param="thinking_token_budget",
                )
            known[end] = tokens[end]
        return known


def _joined(lark: str, answer: str) -> str:
    """A grammar in Lark that refers to ``@answer``, and that one, in the form that the engine takes."""
    try:
        inner, *others = json.loads(answer)["grammars"]
    except ValueError:  # Lark too
        inner, others = {"lark_grammar": answer}, []
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**inner, "name": ANSWER}, *others]})
