"""Harmony, the format of gpt-oss: messages with headers that say which channel and whom they are for."""

from __future__ import annotations

import re
from collections.abc import Callable

from server.parsing.emitter import Emitter
from server.parsing.formats import HARMONY
from server.parsing.text_input import Markers, Step, TextInput

_MARKERS = Markers(*HARMONY.markers)
_RECIPIENT = re.compile(r"\bto=([^\s\x00]+)")
_CHANNEL = re.compile(r"\x00\s*(\w+)")
_FUNCTIONS = "functions."


class HarmonyParser:
    """Reads one answer: ``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final...``.

    Channel ``analysis`` is reasoning; messages to ``functions.NAME`` are calls; everything else is content.
    Headers are never shown: one that the text ends in is left out.
    """

    def __init__(self, *, has_tools: bool) -> None:
        self._has_tools = has_tools

    def parse(self, text: TextInput, out: Emitter) -> Step[None]:
        header: list[str] = []
        is_call = False
        sink: Callable[[str], None] = out.content
        # The prompt has begun the first header, which may go on with the recipient.
        if (yield from text.takes(" to=")):
            header.append(" to=")
            sink = header.append
        while True:
            marker = yield from text.until(_MARKERS, sink)
            if marker in ("<|constrain|>", "<|channel|>") and sink == header.append:
                header.append("\x00" if marker == "<|channel|>" else " ")
                continue
            if is_call:
                out.end_call()
            elif marker is not None and out.is_reasoning:
                out.end_reasoning()
            is_call = False
            if marker is None:
                return
            if marker == "<|message|>":
                written = "".join(header)
                header.clear()
                recipient = _RECIPIENT.search(written)
                channel = _CHANNEL.search(written)
                sink = out.content
                if recipient is not None and recipient[1].startswith(_FUNCTIONS) and self._has_tools:
                    out.begin_call(recipient[1].removeprefix(_FUNCTIONS))
                    is_call, sink = True, out.arguments
                elif channel is not None and channel[1] == "analysis":
                    out.begin_reasoning()
                    sink = out.reasoning
            else:
                header.clear()
                sink = out.content
                if marker in ("<|start|>", "<|channel|>"):
                    sink = header.append
                if marker == "<|channel|>":
                    header.append("\x00")
