"""How calls are written in a format: for prompts, and for grammars that answers must follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ArgumentWriting:
    """The fixed text around the name and the value of an argument whose strings have no quotes."""

    before_name: str
    before_value: str
    after_value: str


@dataclass(frozen=True)
class CallWriting:
    """The fixed text around names and arguments.

    Attributes:
        begin, end: around all calls of an answer.
        before_name, before_arguments, after_arguments: of each call.
        between: two calls; None if an answer has one at most.
        is_plain_alone: a single call has neither ``begin`` nor ``end``.
        has_keywords: arguments are ``name=value, ...`` rather than a JSON object.
        argument: arguments are written one after the other in this way.
    """

    before_name: str
    before_arguments: str
    after_arguments: str
    begin: str = ""
    end: str = ""
    between: str | None = ""
    is_plain_alone: bool = False
    has_keywords: bool = False
    argument: ArgumentWriting | None = None

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls, as (name, arguments) pairs whose arguments are in the format's own form."""
        texts = [
            f"{self.before_name}{name}{self.before_arguments}{arguments}{self.after_arguments}"
            for name, arguments in calls
        ]
        if len(texts) == 1 and self.is_plain_alone:
            return texts[0]
        return f"{self.begin}{(self.between or '').join(texts)}{self.end}"
