"""The fields with which clients constrain an answer, in the spellings of OpenAI, vLLM and TGI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.wire_model import WireModel, expected

MAX_CHOICES_OF_ANSWER = 4096
MAX_TAGS = 128


class TextFormat(WireModel):
    type: Literal["text"]


class NamedSchema(WireModel):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(WireModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class TagStructure(WireModel):
    begin: Annotated[str, Field(min_length=1)]
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    end: str


class StructuralTag(WireModel):
    """Free text in which each trigger begins one of the structures."""

    type: Literal["structural_tag"]
    structures: Annotated[list[TagStructure], Field(min_length=1, max_length=MAX_TAGS, fail_fast=True)]
    triggers: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_TAGS, fail_fast=True)
    ]


def _tag_of_schema(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<object>" if isinstance(value, dict | bool) else None


Schema = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[dict[str, Any] | bool, Tag("<object>")],
    Discriminator(_tag_of_schema, **expected("a JSON schema, as an object or as text")),
]


class JsonObjectFormat(WireModel):
    """TGI, and so Hugging Face's client, gives a schema as ``value``, llama.cpp as ``schema``."""

    type: Literal["json_object", "json"]
    value: Schema | None = None
    schema_: Schema | None = Field(None, alias="schema")


class RegexFormat(WireModel):
    """TGI's."""

    type: Literal["regex"]
    value: str


_FORMATS = ("text", "json_object", "regex", "json_schema", "structural_tag")


def _tag_of_format(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    kind = "json_object" if kind == "json" else kind
    return f"<{kind}>" if kind in _FORMATS else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[RegexFormat, Tag("<regex>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")]
    | Annotated[StructuralTag, Tag("<structural_tag>")],
    Discriminator(
        _tag_of_format,
        **expected("an object whose 'type' is 'text', 'json_object', 'json_schema' or 'structural_tag'"),
    ),
]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES_OF_ANSWER, fail_fast=True)]


class StructuredOutputs(WireModel):
    """vLLM's ``structured_outputs``."""

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class TgiGrammar(WireModel):
    """TGI's ``parameters.grammar``."""

    type: Literal["json", "regex", "json_schema"]
    value: Any
