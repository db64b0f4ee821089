"""Writes a conversation out as the text that the model was trained on, by the model's own Jinja template.

Templates are written for the way in which ``transformers`` renders them (``apply_chat_template``); the
environment here gives them the same names, filters and white-space rules. They come with the model, not
from clients, and run in Jinja's immutable sandbox: no access to Python's internals and no changes to what
they are given. The sandbox bounds neither their time nor the size of what they write; both are bounded here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.time_limit import TimeLimit, TimeLimitError

MAX_RENDERED_CHARS = 64 * 2**20
MAX_TEMPLATE_CHARS = 2**20
_MAX_RENDER_S = 5.0
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_PROBE = "inflightd-probe"
# Private-use letters, so that no template trims them off.
_END_OF_FINAL = "\U000f1f1dend\U000f1f1d"


class ChatTemplateError(Exception):
    """The template cannot write these messages out; the message is meant for the client."""


class _TemplateRefusal(TemplateError):
    """Raised by the template itself, through ``raise_exception``."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's own words, for training: here, just
    a scope.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


class _Namespace(jinja2.utils.Namespace):
    """A namespace without underscore names, through which templates could reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name a variable "self"
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter would escape <, > and & for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_make_dict
    )
    return environment


class ChatTemplate:
    """The chat template of a model.

    Attributes:
        source: Jinja source of the template that is used without tools.
        source_with_tools: the one that is used with tools; maybe the same.
        variables: names that the template reads besides what every template is given, such as
            ``enable_thinking``.
    """

    def __init__(
        self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            sources: the template, or several by name: ``tool_use`` is taken if there are tools, else
                ``default``.
            special_tokens: names that templates use, such as ``{"bos_token": "<s>"}``.

        Raises:
            ChatTemplateError: a template is too long or is no Jinja template.
        """
        if isinstance(sources, str):
            sources = {"default": sources}
        if "default" not in sources:
            raise ChatTemplateError(
                f"The model has several chat templates ({', '.join(sorted(sources))}) but no 'default'."
            )
        environment = _environment()
        self.source = sources["default"]
        self.source_with_tools = sources.get("tool_use", self.source)
        self._special_tokens = dict(special_tokens or {})
        self._templates: dict[str, jinja2.Template] = {}
        names: set[str] = set()
        for name, source in sources.items():
            if len(source) > MAX_TEMPLATE_CHARS:
                raise ChatTemplateError(f"The chat template is too long ({len(source)} characters).")
            try:
                names |= jinja2.meta.find_undeclared_variables(environment.parse(source))
                self._templates[name] = environment.from_string(source)
            except TemplateSyntaxError as error:
                raise ChatTemplateError(
                    f"The model's chat template is not valid Jinja (line {error.lineno}: {error.message})."
                ) from None
            except (RecursionError, MemoryError, SyntaxError, OverflowError):
                raise ChatTemplateError("The model's chat template is too deeply nested.") from None
        given = {"messages", "tools", "documents", "add_generation_prompt", *environment.globals}
        self.variables = frozenset(names - given - self._special_tokens.keys())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continues_final: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        Messages are as in OpenAI's API and are adapted to what templates expect: fields that are None are
        left out (content is then empty, if the template needs some), a tool call's arguments become an
        object, and content in text parts becomes one string (parts joined by line breaks), unless the
        template reads parts itself.

        Args:
            messages: plain JSON values; content is a string, a list of ``{"type": "text", "text": ...}``,
                or None.
            add_generation_prompt: end with the opening of the assistant's answer.
            continues_final: end where the text of the last message ends, so that an answer goes on with it.
            variables: see ``variables``.

        Raises:
            ChatTemplateError: no messages, the template refuses them (roles that do not alternate, say), or
                fails.
        """
        if not messages:
            raise ChatTemplateError("'messages' is empty: send at least one message.")
        if continues_final:
            *before, last = messages
            if not isinstance(last.get("content"), str):
                raise ChatTemplateError("The last message has no text that an answer could go on with.")
            marked = [*before, {**last, "content": last["content"] + _END_OF_FINAL}]
            text, found, _ = self.render(
                marked, tools=tools, add_generation_prompt=False, **variables
            ).rpartition(_END_OF_FINAL)
            if not found:
                raise ChatTemplateError("The model's chat template leaves out the text of the last message.")
            return text
        reads_strings, reads_parts = self._content_forms
        adapted = [_adapted(message, reads_strings, reads_parts) for message in messages]
        try:
            return self._render(adapted, tools, add_generation_prompt, variables)
        except ChatTemplateError:
            if all("content" in message for message in adapted):
                raise
            # A template that does not know of tool calls, say, wants content in every message.
            filled = [{"content": "", **message} for message in adapted]
            return self._render(filled, tools, add_generation_prompt, variables)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        names: dict[str, Any] = {"documents": None, **self._special_tokens, **variables}
        names.update(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
        pieces, length = [], 0
        try:
            with TimeLimit(_MAX_RENDER_S):
                for piece in self._templates[name].generate(names):
                    length += len(piece)
                    if length > MAX_RENDERED_CHARS:
                        raise ChatTemplateError("The conversation is too long.")
                    pieces.append(piece)
        except TimeLimitError:
            raise ChatTemplateError(
                f"The model's chat template takes longer than {_MAX_RENDER_S:.0f} s for these messages."
            ) from None
        except _TemplateRefusal as error:
            raise ChatTemplateError(f"The model's chat template refuses these messages: {error}") from None
        except UndefinedError as error:
            raise ChatTemplateError(
                f"The model's chat template needs something that these messages lack: {error}"
            ) from None
        except ChatTemplateError:
            raise
        except RecursionError:
            raise ChatTemplateError("The messages or tools are nested too deeply.") from None
        except Exception as error:  # a template can raise whatever Python can
            raise ChatTemplateError(
                f"The model's chat template fails on these messages ({type(error).__name__}: {error})."
            ) from None
        return "".join(pieces)

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template tells the model of the tools that it is given."""
        function = {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]
        try:
            return _PROBE in self.render([{"role": "user", "content": "Hi"}], tools=tools)
        except ChatTemplateError:
            return False

    @cached_property
    def takes_system_messages(self) -> bool:
        """Whether the template writes out what the system says."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hi"}]
        try:
            return _PROBE in self.render(messages)
        except ChatTemplateError:
            return False

    @cached_property
    def _content_forms(self) -> tuple[bool, bool]:
        """Whether the template writes out content that is a string, and content that is a list of text
        parts.
        """

        def writes(content: Any) -> bool:
            try:
                text = self._render([{"role": "user", "content": content}], None, False, {})
            except ChatTemplateError:
                return False
            # A template that knows only strings may print the list itself.
            return _PROBE in text and "'type'" not in text and '"type"' not in text

        reads_parts = writes([{"type": "text", "text": _PROBE}])
        return writes(_PROBE) or not reads_parts, reads_parts


def _adapted(message: Mapping[str, Any], reads_strings: bool, reads_parts: bool) -> dict[str, Any]:
    """A message in the form that the template reads."""
    adapted = {name: value for name, value in message.items() if value is not None}
    reasoning = next((adapted[name] for name in _REASONING_NAMES if name in adapted), None)
    if reasoning is not None:
        adapted = {"thinking": reasoning, **adapted, "reasoning_content": reasoning}
    content = adapted.get("content")
    if isinstance(content, list) and not reads_parts:
        adapted["content"] = "\n".join(
            part["text"]
            for part in content
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        )
    elif isinstance(content, str) and not reads_strings:
        adapted["content"] = [{"type": "text", "text": content}]
    return with_parsed_calls(adapted)


def with_parsed_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message in which the arguments of tool calls are objects, not JSON text."""
    parsed = dict(message)
    if isinstance(calls := parsed.get("tool_calls"), list):
        parsed["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return parsed


def _with_parsed_arguments(call: Any) -> Any:
    """OpenAI sends a call's arguments as JSON text; templates expect the object."""
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call
