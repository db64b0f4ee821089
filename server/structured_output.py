"""What a request constrains its answer to: from the wire to a grammar that the engine can follow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from server.constraint_fields import (
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    Schema,
    StructuralTag,
    StructuredOutputs,
    TextFormat,
    TgiGrammar,
)
from server.errors import InvalidRequestError
from server.field_errors import invalid_field
from server.grammar_check import TOO_COMPLEX, GrammarCheck
from server.grammars import (
    GrammarSourceError,
    Tag,
    from_choices,
    from_grammar,
    from_json_schema,
    from_regex,
    from_tags,
    parse_schema,
)
from server.protocol import SamplingFields

_MAX_REASON_CHARS = 300
_ANY_OBJECT = {"type": "object"}
_REASONS = {
    "NoExtensionBias": "no text satisfies it",
    "NoExtension": "no text satisfies it",
    "ParserTooComplex": "it is too complex",
    "LexerTooComplex": "it is too complex",
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar that a field asks for, not yet checked.

    Attributes:
        make: the grammar in llguidance's form; may raise GrammarSourceError.
        param, code: of the error, if it is wrong.
    """

    make: Callable[[], str]
    param: str
    code: str


class StructuredOutput:
    """Finds the one constraint of a request and has it checked."""

    def __init__(self, check: GrammarCheck, special_tokens: frozenset[str]) -> None:
        """
        Args:
            special_tokens: names of the control tokens that a structural tag may begin with.
        """
        self._check = check
        self._special_tokens = special_tokens

    async def grammar_of(self, wire: SamplingFields) -> str | None:
        """The grammar that a request asks for, checked; None if the answer is free.

        Raises:
            InvalidRequestError: it asks for more than one, or for one that is wrong.
        """
        constraint = self.constraint_of(wire)
        return None if constraint is None else await self.checked(constraint)

    async def checked(self, constraint: Constraint) -> str:
        """The grammar of a constraint. Raises InvalidRequestError, naming the field."""
        try:
            grammar = await asyncio.to_thread(constraint.make)
            error = await self._check.error_in(grammar)
        except GrammarSourceError as failure:
            grammar, error = "", str(failure)
        if error is None:
            return grammar
        code = "grammar_too_complex" if error == TOO_COMPLEX else constraint.code
        raise _invalid(constraint.param, error, code)

    def constraint_of(self, wire: SamplingFields) -> Constraint | None:
        """What a request asks for, by whichever field.

        Raises:
            InvalidRequestError: there is more than one.
        """
        found = [
            constraint
            for constraint in (
                self._of_format(wire),
                _of_schema("guided_json", wire.guided_json, wire.guided_whitespace_pattern),
                _of_regex("guided_regex", wire.guided_regex),
                _of_choices("guided_choice", wire.guided_choice),
                _of_grammar("guided_grammar", wire.guided_grammar),
                *self._of_structured_outputs(wire.structured_outputs),
            )
            if constraint is not None
        ]
        if len(found) > 1:
            first, second = found[0].param.split(".")[0], found[1].param
            raise InvalidRequestError(
                f"'{second}' cannot be used together with '{first}': leave one of them out.",
                param=second,
                code="invalid_value",
            )
        return found[0] if found else None

    def _of_format(self, wire: SamplingFields) -> Constraint | None:
        match wire.response_format:
            case None | TextFormat():
                return None
            case JsonObjectFormat(value=None, schema_=None):
                return json_constraint(_ANY_OBJECT, "response_format")
            case JsonObjectFormat(value=None, schema_=schema_):
                return _of_schema("response_format.schema", schema_, None)
            case JsonObjectFormat(value=value):
                return _of_schema("response_format.value", value, None)
            case RegexFormat(value=regex):
                return _of_regex("response_format.value", regex)
            case JsonSchemaFormat() as given:
                named = given.json_schema
                schema = {} if named.schema_ is None else named.schema_
                param = "response_format.json_schema.schema"
                return json_constraint(schema, param, is_lenient=not named.strict)
            case StructuralTag() as tag:
                return self._of_tag("response_format", tag)

    def _of_structured_outputs(self, wire: StructuredOutputs | None) -> list[Constraint | None]:
        if wire is None:
            return []
        name = "structured_outputs"
        whitespace = "" if wire.disable_any_whitespace else wire.whitespace_pattern
        found = [
            _of_schema(f"{name}.json", wire.json_, whitespace),
            _of_regex(f"{name}.regex", wire.regex),
            _of_choices(f"{name}.choice", wire.choice),
            _of_grammar(f"{name}.grammar", wire.grammar),
            json_constraint(_ANY_OBJECT, f"{name}.json_object", whitespace=whitespace)
            if wire.json_object
            else None,
        ]
        if wire.structural_tag is not None:
            param = f"{name}.structural_tag"
            try:
                tag = StructuralTag.model_validate(parse_schema(wire.structural_tag))
            except GrammarSourceError as error:
                raise _invalid(param, str(error), "invalid_value") from None
            except ValidationError as error:
                raise _invalid(param, invalid_field(error).message, "invalid_value") from None
            found.append(self._of_tag(param, tag))
        return found

    def _of_tag(self, param: str, wire: StructuralTag) -> Constraint:
        tags = [
            Tag(tag.begin, {} if tag.schema_ is None else tag.schema_, tag.end) for tag in wire.structures
        ]
        return Constraint(
            lambda: from_tags(tags, wire.triggers, self._special_tokens), param, "invalid_structural_tag"
        )


def json_constraint(
    schema: dict[str, Any] | bool,
    param: str,
    *,
    is_lenient: bool = False,
    whitespace: str | None = None,
) -> Constraint:
    """JSON for a schema (see ``grammars.from_json_schema``), as the field ``param`` asks for."""
    return Constraint(
        lambda: from_json_schema(schema, is_lenient=is_lenient, whitespace=whitespace),
        param,
        "invalid_json_schema",
    )


def grammar_constraint(text: str, param: str) -> Constraint:
    """A grammar in Lark, llguidance's variant, as the field ``param`` asks for."""
    return Constraint(lambda: from_grammar(text), param, "invalid_grammar")


def tgi_constraint(wire: TgiGrammar, param: str) -> Constraint:
    """What TGI's ``grammar`` asks for. Raises InvalidRequestError."""
    value = wire.value
    if wire.type == "regex":
        if isinstance(value, str):
            return Constraint(lambda: from_regex(value), f"{param}.value", "invalid_regex")
        raise _invalid(f"{param}.value", "a regex is a string", "invalid_type")
    if wire.type == "json_schema" and isinstance(value, dict):
        value = value.get("schema", value)
    if isinstance(value, dict | bool | str):
        found = _of_schema(f"{param}.value", value, None)
        assert found is not None
        return found
    raise _invalid(f"{param}.value", "a JSON schema is an object", "invalid_type")


def _of_schema(param: str, schema: Schema | None, whitespace: str | None) -> Constraint | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        text = schema
        return Constraint(
            lambda: from_json_schema(parse_schema(text), whitespace=whitespace), param, "invalid_json_schema"
        )
    return json_constraint(schema, param, whitespace=whitespace)


def _of_regex(param: str, regex: str | None) -> Constraint | None:
    return None if regex is None else Constraint(lambda: from_regex(regex), param, "invalid_regex")


def _of_choices(param: str, choices: list[str] | None) -> Constraint | None:
    return None if choices is None else Constraint(lambda: from_choices(choices), param, "invalid_choice")


def _of_grammar(param: str, text: str | None) -> Constraint | None:
    return None if text is None else grammar_constraint(text, param)


def _invalid(param: str, reason: str, code: str) -> InvalidRequestError:
    reason = _REASONS.get(reason, reason)
    if reason.startswith("recursion limit exceeded"):
        reason = "it is nested too deeply"
    # It may quote the client's own text.
    shown = ascii(reason)[1:-1].replace("\\'", "'").replace("\\\\", "\\")[:_MAX_REASON_CHARS].rstrip(".")
    return InvalidRequestError(f"Invalid '{param}': {shown}.", param=param, code=code)
