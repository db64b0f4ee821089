from __future__ import annotations

import time

import pytest

from server.errors import InvalidJsonError, InvalidRequestError, UnsupportedMediaTypeError
from server.json_body import check_content_type, parse_json_object


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"a":',
        b'{"a":1}x',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":"\x01"}',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":undefined}',
        b"[1]",
        b"1",
        b'"text"',
        b"null",
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":"\xff"}',
        b'{"a":"\xc0\xaf"}',  # overlong
        b'{"a":"\xed\xa0\x80"}',  # a surrogate in UTF-8
        b'\xef\xbb\xbf{"a":1}',  # byte order mark
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\\ud800"}',
        b'{"a":"\\udc00x"}',
        b'{"\\ud800":1}',
        b'{"a":' + b"9" * 5000 + b"}",
        b"[" * 1000 + b"]" * 1000,
        b"[" * 200_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"' + b"\xe2\x82" * 1000 + b'":1}',
    ],
    ids=lambda body: ascii(body[:20].decode("latin-1")),
)
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(InvalidJsonError) as caught:
        parse_json_object(body)
    assert caught.value.code == "invalid_json"
    assert caught.value.param is None
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 200


def test_the_message_says_where() -> None:
    with pytest.raises(InvalidJsonError, match="line 2 column 7"):
        parse_json_object(b'{"a": 1,\n "b": x}')
    with pytest.raises(InvalidJsonError, match="byte order mark"):
        parse_json_object(b'\xef\xbb\xbf{"a": 1}')


def test_a_name_that_comes_twice_is_not_shown() -> None:
    with pytest.raises(InvalidJsonError) as caught:
        parse_json_object(b'{"secret\\n at line 9":1,"secret\\n at line 9":2}')
    assert "secret" not in caught.value.message
    assert "same name twice" in caught.value.message


def test_ten_megabytes_of_the_same_name_are_refused_at_once() -> None:
    body = b"{" + b",".join([b'"a":1'] * 1_700_000) + b"}"
    began = time.perf_counter()
    with pytest.raises(InvalidJsonError):
        parse_json_object(body)
    assert time.perf_counter() - began < 0.05


def test_strings_keep_every_character() -> None:
    body = '{"a":"\\u0000\\ud83d\\ude00 \\u202e\\u001b[31m é"}'.encode()
    assert parse_json_object(body) == {"a": "\0😀 \u202e\x1b[31m é"}


@pytest.mark.parametrize(
    "header", ["application/json", "Application/JSON; charset=utf-8", 'application/json;charset="UTF-8"']
)
def test_content_types_of_json(header: str) -> None:
    check_content_type(header)


@pytest.mark.parametrize(
    "header",
    ["text/plain", "", "application/x-www-form-urlencoded", "application/json; charset=utf-16", "json"],
)
def test_other_content_types(header: str) -> None:
    with pytest.raises(UnsupportedMediaTypeError):
        check_content_type(header)


def test_no_content_type() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_content_type(None)
    assert caught.value.status == 400
