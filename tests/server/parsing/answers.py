"""Answers as models of each family write them, whole and broken, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass

from server.parsing.deltas import ParsedAnswer, ToolCall
from server.parsing.formats import (
    DEEPSEEK,
    GLM45,
    HARMONY,
    HARMONY_REASONING,
    HERMES,
    JSON,
    LLAMA3_JSON,
    MINIMAX_M2,
    MISTRAL,
    MISTRAL_THINK,
    PYTHONIC,
    QWEN3_CODER,
    THINK,
)
from server.parsing.output_parser import OutputSyntax

NAMES = frozenset({"get_weather", "now"})


@dataclass(frozen=True)
class Answer:
    """A text, how it is to be read, and what it says. ``calls`` are (name, arguments) pairs."""

    name: str
    syntax: OutputSyntax
    text: str
    content: str | None = None
    reasoning: str | None = None
    calls: tuple[tuple[str, str], ...] = ()

    @property
    def parsed(self) -> ParsedAnswer:
        calls = tuple(ToolCall("", name, arguments) for name, arguments in self.calls)
        return ParsedAnswer(self.content, self.reasoning, calls)


def _syntax(tools: object = None, reasoning: object = None, **fields: object) -> OutputSyntax:
    return OutputSyntax(tools=tools, reasoning=reasoning, tool_names=NAMES, **fields)  # type: ignore[arg-type]


_HERMES = _syntax(HERMES, THINK)
_OPENED = _syntax(HERMES, THINK, is_reasoning=True)
_LLAMA = _syntax(LLAMA3_JSON)
_MISTRAL = _syntax(MISTRAL, MISTRAL_THINK)
_PYTHON = _syntax(PYTHONIC, THINK)
_DEEPSEEK = _syntax(DEEPSEEK, THINK)
# Of a function, as its schema tells; ``free`` and the arguments of others are unknown.
TYPES = {
    "get_weather": {
        "city": frozenset({"string"}),
        "days": frozenset({"integer"}),
        "ok": frozenset({"boolean"}),
        "at": frozenset({"object"}),
        "unit": frozenset({"string", "null"}),
        "share": frozenset({"number", "string"}),
    }
}
_QWEN = _syntax(QWEN3_CODER, THINK, argument_types=TYPES)
_GLM = _syntax(GLM45, THINK, argument_types=TYPES)
_MINIMAX = _syntax(MINIMAX_M2, THINK, argument_types=TYPES)
_JSON = _syntax(JSON)
_HARMONY = _syntax(HARMONY, HARMONY_REASONING)

PARIS = '{"city": "Paris"}'
_CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
_BEGIN, _END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"

ANSWERS = [
    # Hermes, Qwen
    Answer("plain", _HERMES, " Hello,\n\nworld < 3! \n", " Hello,\n\nworld < 3! \n"),
    Answer("empty", _HERMES, ""),
    Answer("spaces", _HERMES, " \n ", " \n "),
    Answer("one call", _HERMES, f"<tool_call>\n{_CALL}\n</tool_call>", calls=(("get_weather", PARIS),)),
    Answer(
        "content and two calls",
        _HERMES,
        f'Let me see.\n\n<tool_call>\n{_CALL}\n</tool_call>\n<tool_call>\n{{"name":"now","arguments":{{}}}}'
        "\n</tool_call>",
        "Let me see.",
        calls=(("get_weather", PARIS), ("now", "{}")),
    ),
    Answer(
        "thoughts, content, a call, content",
        _HERMES,
        f"<think>\nHm, <tool_call>?\n</think>\n\nI look.<tool_call>{_CALL}</tool_call>\n Done. ",
        "I look.Done. ",
        "Hm, <tool_call>?",
        (("get_weather", PARIS),),
    ),
    Answer("opened thoughts", _OPENED, "Hm.\n</think>\n\nYes.", "Yes.", "Hm."),
    Answer("thoughts opened twice", _OPENED, "<think>\nHm.</think>Yes.", "Yes.", "Hm."),
    Answer("no thoughts", _OPENED, "\n\n</think>\n\nYes.", "Yes."),
    Answer("unfinished thoughts", _OPENED, "Hm, </thi", None, "Hm, </thi"),
    Answer("closing what is not open", _HERMES, "Yes.</think> And.</tool_call>", "Yes. And."),
    Answer(
        "strings with everything",
        _HERMES,
        '<tool_call>{"name": "get_weather", "arguments": '
        '{"a": "\\"}</tool_call>\\\\", "b": [{"c": "]"}, null], "ü": "\\u00e9"}}</tool_call>',
        calls=(("get_weather", '{"a": "\\"}</tool_call>\\\\", "b": [{"c": "]"}, null], "ü": "\\u00e9"}'),),
    ),
    Answer(
        "arguments first",
        _HERMES,
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>',
        calls=(("get_weather", PARIS),),
    ),
    Answer(
        "arguments in a string",
        _HERMES,
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        calls=(("get_weather", PARIS),),
    ),
    Answer(
        "no arguments",
        _HERMES,
        '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "now", "arguments": null}</tool_call>',
        calls=(("now", "{}"), ("now", "{}")),
    ),
    Answer(
        "a function unheard of", _HERMES, '<tool_call>{"name": "fly"}</tool_call>', calls=(("fly", "{}"),)
    ),
    Answer(
        "a brace too few",
        _HERMES,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}\n</tool_call>Well.',
        "Well.",
        calls=(("get_weather", PARIS),),
    ),
    Answer(
        "two braces too few",
        _HERMES,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"</tool_call>Well.',
        "Well.",
        calls=(("get_weather", '{"city": "Paris"'),),
    ),
    Answer(
        "a brace too many",
        _HERMES,
        f"<tool_call>{_CALL}}}</tool_call>Well.",
        "Well.",
        calls=(("get_weather", PARIS),),
    ),
    Answer("an end in the name", _HERMES, 'So <tool_call>\n{"name": "get_w', 'So \n{"name": "get_w'),
    Answer(
        "an end in the arguments",
        _HERMES,
        '<tool_call>{"name": "now", "arguments": {"a": "\\',
        calls=(("now", '{"a": "\\'),),
    ),
    Answer("no object", _HERMES, "Write <tool_call>x</tool_call>, then {.", "Write x, then {."),
    Answer("a marker in what is no call", _HERMES, '<tool_call>{"a": "<tool_call>{"}', '{"a": "{"}'),
    Answer("half a marker", _HERMES, "a <tool_cal", "a <tool_cal"),
    Answer("half a pair", _HERMES, '<tool_call>{"name": "a\\ud800"}</tool_call>', calls=(("a?", "{}"),)),
    Answer(
        "OpenAI's form",
        _HERMES,
        '<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": {}}, "id": "x"}'
        "</tool_call>",
        calls=(("get_weather", "{}"),),
    ),
    Answer(
        "a list in one element",
        _HERMES,
        f"<tool_call>[{_CALL}, {_CALL}]</tool_call>",
        calls=(("get_weather", PARIS),) * 2,
    ),
    Answer("tools unknown", _syntax(None, THINK), f"<tool_call>{_CALL}", f"<tool_call>{_CALL}"),
    Answer(
        "one call at most",
        _syntax(HERMES, max_calls=1),
        f"<tool_call>{_CALL}</tool_call><tool_call>{_CALL}</tool_call>Bye",
        "Bye",
        calls=(("get_weather", PARIS),),
    ),
    # Llama 3
    Answer(
        "llama",
        _LLAMA,
        '\n{"name": "get_weather", "parameters": {"city": "Paris"}}',
        calls=(("get_weather", PARIS),),
    ),
    Answer(
        "llama with its tag",
        _LLAMA,
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "now", "parameters": {}}',
        calls=(("get_weather", PARIS), ("now", "{}")),
    ),
    Answer("llama answers", _LLAMA, "It is {4}.", "It is {4}."),
    Answer("llama answers in JSON", _LLAMA, ' {"name": "Ada", "age": 3} ', ' {"name": "Ada", "age": 3} '),
    Answer("llama answers other JSON", _LLAMA, '[{"a": {"name": "now"}}]', '[{"a": {"name": "now"}}]'),
    Answer("llama writes Python", _LLAMA, "<|python_tag|>print(1)", "print(1)"),
    # Mistral
    Answer(
        "mistral's list",
        _MISTRAL,
        f'[TOOL_CALLS] [{_CALL[:-1]}, "id": "abcdefghi"}}, {{"name": "now", "arguments": {{}}}}]',
        calls=(("get_weather", PARIS), ("now", "{}")),
    ),
    Answer(
        "mistral's names",
        _MISTRAL,
        f"[THINK]Hm [x][/THINK]See[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]now[CALL_ID]x12[ARGS]{{}}",
        "See",
        "Hm [x]",
        (("get_weather", PARIS), ("now", "{}")),
    ),
    Answer(
        "mistral's names without a marker",
        _MISTRAL,
        f"[TOOL_CALLS]get_weather{PARIS}",
        calls=(("get_weather", PARIS),),
    ),
    Answer("mistral's marker twice", _MISTRAL, "[TOOL_CALLS][TOOL_CALLS] [x]", " [x]"),
    Answer("mistral's brackets", _MISTRAL, "a[1] [TOOL_] b", "a[1] [TOOL_] b"),
    # Python
    Answer(
        "python",
        _PYTHON,
        '[get_weather(city="Paris", days=3, ok=True, no=None, x=-1.5e3), now()]',
        calls=(
            ("get_weather", '{"city": "Paris", "days": 3, "ok": true, "no": null, "x": -1.5e3}'),
            ("now", "{}"),
        ),
    ),
    Answer(
        "python's strings",
        _PYTHON,
        "[get_weather(a='it\\'s \"x\"', b=\"\\x41\\u00e9\\q\n\", c='')]",
        calls=(("get_weather", '{"a": "it\'s \\"x\\"", "b": "A\\u00e9\\\\q\\n", "c": ""}'),),
    ),
    Answer(
        "python's groups",
        _PYTHON,
        "[get_weather(a=[1, (2,), []], b={'k': {'l': 0x10}, 'm': Paris}, c=.5,)]",
        calls=(("get_weather", '{"a": [1, [2], []], "b": {"k": {"l": "0x10"}, "m": "Paris"}, "c": 0.5}'),),
    ),
    Answer(
        "python between markers",
        _PYTHON,
        '<think>Hm</think>See <|tool_call_start|>[fly(to="Rome")]<|tool_call_end|> then',
        "Seethen",
        "Hm",
        (("fly", '{"to": "Rome"}'),),
    ),
    Answer("python's list", _PYTHON, "[1] Paris, [fly()]", "[1] Paris, [fly()]"),
    Answer("python unheard of", _PYTHON, "[print(1)]", "[print(1)]"),
    Answer("python breaks off", _PYTHON, "[get_weather(city='Par", calls=(("get_weather", '{"city": "Par'),)),
    Answer("python without keywords", _PYTHON, "[now(3, [x], a=1)] or", "or", calls=(("now", '{"a": 1}'),)),
    # DeepSeek
    Answer(
        "deepseek",
        _DEEPSEEK,
        f"<think>Hm</think>See.<｜tool▁calls▁begin｜>{_BEGIN}get_weather{_SEPARATOR}{PARIS}{_END}"
        f"{_BEGIN}now{_SEPARATOR}{{}}{_END}<｜tool▁calls▁end｜>",
        "See.",
        "Hm",
        (("get_weather", PARIS), ("now", "{}")),
    ),
    Answer(
        "older deepseek",
        _DEEPSEEK,
        f"<｜tool▁calls▁begin｜>{_BEGIN}function{_SEPARATOR}get_weather\n```json\n{PARIS}\n```{_END}\n"
        f"{_BEGIN}function{_SEPARATOR}now\n```json\n{{}}\n```{_END}<｜tool▁calls▁end｜>\n",
        calls=(("get_weather", PARIS), ("now", "{}")),
    ),
    Answer(
        "deepseek breaks off",
        _DEEPSEEK,
        f'{_BEGIN}now{_SEPARATOR}{{"a": 1{_END}x',
        "x",
        calls=(("now", '{"a": 1'),),
    ),
    Answer("deepseek says nothing", _DEEPSEEK, f"a{_BEGIN}now", "anow"),
    # Qwen3-Coder
    Answer(
        "qwen",
        _QWEN,
        "<think>Hm</think>I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n"
        "</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "I look.",
        "Hm",
        (("get_weather", '{"city": "Paris", "days": 3}'), ("now", "{}")),
    ),
    Answer(
        "qwen's types",
        _QWEN,
        "<tool_call><function=get_weather><parameter=city>\n12\n</parameter><parameter=ok>True</parameter>"
        '<parameter=at>{"a": [1, "</x>"]}</parameter><parameter=unit>\nnull\n</parameter>'
        "<parameter=share>0.5</parameter><parameter=days>soon</parameter><parameter=free>[1]</parameter>"
        '<parameter=other>"a"</parameter></function></tool_call>',
        calls=(
            (
                "get_weather",
                '{"city": "12", "ok": true, "at": {"a": [1, "</x>"]}, "unit": null, "share": 0.5, '
                '"days": "soon", "free": [1], "other": "\\"a\\""}',
            ),
        ),
    ),
    Answer(
        "qwen writes code",
        _QWEN,
        '<tool_call>\n<function=get_weather>\n<parameter=city>\n\n if a < b:\n\t"<b>\\n</function>"\n\n'
        "</parameter>\n</function>\n</tool_call>Done.",
        "Done.",
        calls=(("get_weather", '{"city": "\\n if a < b:\\n\\t\\"<b>\\\\n</function>\\"\\n"}'),),
    ),
    Answer(
        "qwen leaves the first tag out",
        _QWEN,
        "See:\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        "See:",
        calls=(("get_weather", PARIS),),
    ),
    Answer(
        "qwen calls two in one",
        _QWEN,
        "<tool_call><function=now></function><function=now></function></tool_call> Well.",
        "Well.",
        calls=(("now", "{}"), ("now", "{}")),
    ),
    Answer(
        "qwen forgets to end",
        _QWEN,
        "<tool_call><function=get_weather><parameter=days>3</parameter><parameter=ok>true</tool_call>Well.",
        "Well.",
        calls=(("get_weather", '{"days": 3, "ok": true}'),),
    ),
    Answer(
        "qwen says it twice, and more",
        _QWEN,
        "<tool_call><function=get_weather>so<parameter=days>3</parameter>, <parameter=days>4</parameter>"
        "<parameter=x</function></tool_call>",
        calls=(("get_weather", '{"days": 3}'),),
    ),
    Answer(
        "qwen breaks off in a string",
        _QWEN,
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar\n",
        calls=(("get_weather", '{"city": "Par'),),
    ),
    Answer(
        "qwen breaks off in a number",
        _QWEN,
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n1",
        calls=(("get_weather", '{"city": "Paris"'),),
    ),
    Answer("qwen breaks off in the name", _QWEN, "a <tool_call>\n<function=get_w", "a \nget_w"),
    Answer("qwen calls nothing", _QWEN, "<tool_call>x</tool_call>, a <function= b", "x, a  b"),
    # GLM
    Answer(
        "glm",
        _GLM,
        "<think>Hm</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        None,
        "Hm",
        (("get_weather", '{"city": "Paris", "days": 3}'), ("now", "{}")),
    ),
    Answer(
        "glm on one line",
        _GLM,
        "See<tool_call>get_weather<arg_key>city</arg_key><arg_value>\n5 </arg_value><arg_key>ok</arg_key>"
        "<arg_value>false</arg_value></tool_call><tool_call>now</tool_call>",
        "See",
        calls=(("get_weather", '{"city": "\\n5 ", "ok": false}'), ("now", "{}")),
    ),
    Answer("glm calls nothing", _GLM, "<tool_call>hello you</tool_call> and", "hello you and"),
    Answer("glm breaks off in the name", _GLM, "<tool_call>get_wea", "get_wea"),
    Answer(
        "glm breaks off in a key",
        _GLM,
        "<tool_call>get_weather\n<arg_key>ci",
        calls=(("get_weather", "{}"),),
    ),
    Answer(
        "glm forgets a value",
        _GLM,
        "<tool_call>get_weather<arg_key>city</arg_key><arg_key>days</arg_key><arg_value>2</tool_call>",
        calls=(("get_weather", '{"days": 2}'),),
    ),
    # MiniMax
    Answer(
        "minimax",
        _MINIMAX,
        '<think>Hm</think>See.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">'
        'Paris</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n'
        "</minimax:tool_call>",
        "See.",
        "Hm",
        (("get_weather", '{"city": "Paris", "days": 3}'), ("now", "{}")),
    ),
    Answer("minimax calls nothing", _MINIMAX, "<minimax:tool_call>\n<b>x</b>", "\n<b>x</b>"),
    # JSON
    Answer("JSON", _JSON, f" {_CALL} ", calls=(("get_weather", PARIS),)),
    Answer(
        "JSON in a block",
        _JSON,
        f"```json\n[{_CALL},\n{_CALL}]\n```\nBye",
        "Bye",
        calls=(
            ("get_weather", PARIS),
            ("get_weather", PARIS),
        ),
    ),
    Answer("another block", _JSON, "```python\nx = {}\n```", "```python\nx = {}\n```"),
    Answer("JSON breaks off early", _JSON, '{"arguments": {"a": 1', '{"arguments": {"a": 1'),
    # Harmony
    Answer(
        "harmony",
        _HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>See."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json"
        f"<|message|>{PARIS}<|call|>",
        "See.",
        "Hm.",
        (("get_weather", PARIS),),
    ),
    Answer(
        "harmony's recipient first",
        _HARMONY,
        f" to=functions.get_weather<|channel|>commentary json<|message|>{PARIS}",
        calls=(("get_weather", PARIS),),
    ),
    Answer(
        "harmony answers",
        _HARMONY,
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Yes \n",
        "Yes \n",
        "Hm",
    ),
    Answer(
        "harmony breaks off", _HARMONY, "<|channel|>analysis<|message|>Hm<|end|><|start|>assis", None, "Hm"
    ),
    Answer("harmony without its markers", _HARMONY, " to him ", " to him "),
    Answer(
        "harmony without tools",
        _syntax(None, HARMONY_REASONING),
        f"<|channel|>commentary to=functions.now<|message|>{PARIS}",
        PARIS,
    ),
]
