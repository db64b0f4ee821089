"""Valid bodies of every route that takes one, with as many fields as go together: where mutations start."""

from __future__ import annotations

from typing import Any

_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "n": {"type": "integer", "minimum": 0}},
    "required": ["city"],
    "additionalProperties": False,
}
_TOOL: dict[str, Any] = {"name": "f", "description": "d", "parameters": _SCHEMA}
_SAMPLING: dict[str, Any] = {
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "n": 2,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "stop": ["x", "y"],
    "logit_bias": {"5": 1.5, "6": -100}, "stop_token_ids": [3], "ignore_eos": True, "min_tokens": 1,
    "include_stop_str_in_output": True, "skip_special_tokens": False, "bad_words": ["z"],
    "allowed_token_ids": [1, 2, 3], "truncate_prompt_tokens": 8, "return_token_ids": True,
    "request_id": "r-1", "priority": 1, "cache_salt": "s", "user": "u",
}  # fmt: skip
_CALL: dict[str, Any] = {
    "id": "c1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"city":"B"}'},
}

# The first tokens are what the engine of the fuzz answers.
_RESUME: dict[str, Any] = {"id": "x-1", "created": 1, "seed": 3, "cached_tokens": 0, "token_ids": [28, 29]}

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
    ("/v1/chat/completions", {
        "messages": [
            {"role": "system", "content": "S", "name": "n"},
            {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
            {"role": "assistant", "content": "C"},
            {"role": "user", "content": "D"},
        ],
        "logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False}, **_SAMPLING,
    }),
    ("/v1/chat/completions", {
        "messages": [
            {"role": "user", "content": "A"},
            {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning_content": "R"},
            {"role": "tool", "tool_call_id": "c1", "content": "D"},
        ],
        "tools": [{"type": "function", "function": _TOOL}], "tool_choice": "auto",
        "parallel_tool_calls": True, "max_completion_tokens": 3, "add_generation_prompt": True,
    }),
    ("/v1/completions", {
        "prompt": "Once", "echo": True, "logprobs": 2, "add_special_tokens": True, **_SAMPLING}),
    ("/v1/completions", {"prompt": [[1, 2, 3], [4]], "max_tokens": 2, "stream": True}),
    ("/v1/completions", {"prompt": ["A", "B"], "max_tokens": 2, "prompt_logprobs": 1}),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2, "stop": "q"}),
    ("/v1/completions", {"prompt": "A", "max_tokens": 9, "stream": True, "stop": ["q"], "resume": _RESUME}),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "A"}], "max_tokens": 9, "stream": True, "resume": _RESUME,
        "tools": [{"type": "function", "function": _TOOL}], "return_token_ids": True,
    }),
    ("/v1/responses", {
        "input": [
            {"role": "developer", "content": "S"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "A"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "T"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc_1"},
            {"type": "function_call_output", "call_id": "c1", "output": "D"},
        ],
        "instructions": "I", "max_output_tokens": 16, "temperature": 0.5, "top_p": 0.5,
        "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA, "strict": False}],
        "tool_choice": "auto", "text": {"format": {"type": "text"}}, "reasoning": {"effort": None},
        "metadata": {"a": "b"}, "include": ["reasoning.encrypted_content"], "store": True, "stream": False,
        "truncation": "disabled", "parallel_tool_calls": True, "user": "u",
    }),
    ("/v1/responses", {"input": "Hi", "stream": True, "store": False, "max_output_tokens": 16}),
    ("/v1/responses/input_tokens", {"input": "Hi", "instructions": "I"}),
    ("/v1/messages", {
        "max_tokens": 3,
        "system": [{"type": "text", "text": "S"}],
        "messages": [
            {"role": "user", "content": "A"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "T", "signature": "s"},
                {"type": "text", "text": "B"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"city": "C"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "D"}]},
            ]},
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": _SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "stop_sequences": ["x"], "temperature": 0.5,
        "top_p": 0.9, "top_k": 3, "stream": False, "metadata": {"user_id": "u"},
    }),
    ("/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": "A"}], "stream": True}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "A"}], "system": "S"}),
    ("/v1/embeddings", {"input": ["A", "B"], "encoding_format": "base64", "dimensions": 2, "user": "u"}),
    ("/v1/embeddings", {"input": [[1, 2], [3]], "encoding_format": "float"}),
    ("/tokenize", {"prompt": "Hi", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "A"}], "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/generate", {"inputs": "Hi", "parameters": {
        "max_new_tokens": 3, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1,
        "frequency_penalty": 0.1, "seed": 3, "do_sample": True, "stop": ["x"], "truncate": 4,
        "top_n_tokens": 2, "return_full_text": True, "details": True, "decoder_input_details": True,
    }}),
    ("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 3, "details": True}}),
    ("/", {"inputs": "Hi", "stream": True, "parameters": {"max_new_tokens": 3}}),
]  # fmt: skip

# Compiling a grammar takes a process of its own: a share of the mutations is enough.
GRAMMAR_BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "A"}], "max_tokens": 3,
        "response_format": {"type": "json_schema", "json_schema": {
            "name": "s", "strict": True, "schema": _SCHEMA}},
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "A"}], "max_tokens": 3, "tool_choice": "required",
        "tools": [{"type": "function", "function": {**_TOOL, "strict": True}}],
    }),
    ("/v1/completions", {"prompt": "A", "max_tokens": 3, "guided_regex": "[a-z]{2,4}(x|y)*"}),
    ("/v1/completions", {"prompt": "A", "max_tokens": 3, "guided_choice": ["yes", "no"]}),
    ("/v1/completions", {"prompt": "A", "max_tokens": 3, "guided_grammar": 'root ::= "a" | "b" root'}),
    ("/v1/completions", {"prompt": "A", "max_tokens": 3, "structured_outputs": {"json": _SCHEMA}}),
    ("/v1/responses", {"input": "A", "max_output_tokens": 16, "text": {"format": {
        "type": "json_schema", "name": "s", "strict": True, "schema": _SCHEMA}}}),
    ("/generate", {"inputs": "A", "parameters": {"max_new_tokens": 3, "grammar": {
        "type": "json", "value": _SCHEMA}}}),
]  # fmt: skip
