"""Tools for models whose chat template knows nothing of them: told in the system message, in plain words.

The model answers in JSON (``parsing.formats.JSON``). Its earlier calls are written out in the same way, and
what they resulted in as messages of the user.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.tool_choice import ToolChoice

_PROMPT = """\
You can call functions. Each line describes one in JSON:
{tools}

To call a function, answer with nothing but JSON in this form:
{{"name": "function name", "arguments": {{"argument name": "value"}}}}
To call several functions, answer with a list of such objects. {otherwise}"""
_OTHERWISE = "If no function helps, answer in plain words."
_REQUIRED = "You must call a function."


def with_tools_told(
    messages: Sequence[Mapping[str, Any]], choice: ToolChoice, *, has_system_role: bool = True
) -> list[dict[str, Any]]:
    """The same conversation for a template that knows nothing of tools.

    Args:
        messages: as templates take them, content being text or None.
        has_system_role: whether the template takes system messages; else the first message tells of the
            tools.
    """
    plain = list(_without_calls(messages))
    if not choice.tools:
        return plain
    prompt = _PROMPT.format(
        tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in choice.tools),
        otherwise=_REQUIRED if choice.is_required else _OTHERWISE,
    )
    if plain[0]["role"] == "system" or not has_system_role:
        text = (
            f"{plain[0]['content']}\n\n{prompt}"
            if plain[0]["role"] == "system"
            else (f"{prompt}\n\n{plain[0]['content']}")
        )
        return [{**plain[0], "content": text}, *plain[1:]]
    return [{"role": "system", "content": prompt}, *plain]


def _without_calls(messages: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    names: dict[str, str] = {}
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            name = names.get(message["tool_call_id"], "the function")
            results.append(f"Result of {name}:\n{message['content']}")
            continue
        if results:
            yield {"role": "user", "content": "\n\n".join(results)}
            results = []
        plain = {name: value for name, value in message.items() if name != "tool_calls"}
        if calls := message.get("tool_calls"):
            written = [_written(call["function"]) for call in calls]
            names |= {call["id"]: call["function"]["name"] for call in calls}
            text = written[0] if len(written) == 1 else f"[{', '.join(written)}]"
            plain["content"] = f"{message['content']}\n{text}" if message["content"] else text
        yield plain
    if results:
        yield {"role": "user", "content": "\n\n".join(results)}


def _written(function: Mapping[str, Any]) -> str:
    return f'{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"] or "{}"}}}'
