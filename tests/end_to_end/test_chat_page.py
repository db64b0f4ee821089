"""The chat page in a real browser, against the real server."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.end_to_end.server_process import ServerProcess

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    _CHROMIUM is None, reason="no browser is installed (Debian: apt install chromium)"
)
# What it does not show by itself: pictures go where this says, to be looked at.
_SCREENSHOTS = os.environ.get("INFLIGHTD_SCREENSHOTS")
_ANSWER = "article.assistant"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    context = browser.new_context(base_url=server.url)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    outside: list[str] = []
    page.on(
        "request", lambda request: None if request.url.startswith(server.url) else outside.append(request.url)
    )
    page.goto("/")
    yield page
    context.close()
    assert outside == []
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []


def _set(page: Page, **settings: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for name, value in settings.items():
        page.locator(f"#{name}").fill(value)
        page.locator(f"#{name}").blur()
    page.get_by_role("button", name="Settings").click()


def _send(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def _shoot(page: Page, name: str) -> None:
    if _SCREENSHOTS:
        page.screenshot(path=Path(_SCREENSHOTS) / f"{name}.png")


def test_an_answer_streams_and_stays_after_a_reload(page: Page, server: ServerProcess) -> None:
    expect(page.locator("#model")).to_have_value("smollm2-135m-instruct")
    _set(page, temperature="0", max_tokens="24", system="Answer briefly.")
    _send(page, "Name the capital of France.")
    note = page.locator(f"{_ANSWER} .note")
    expect(note).to_contain_text("tokens/s", timeout=20_000)
    assert re.search(r"\d+ \+ \d+ tokens · first token \d+ ms · [\d.]+ tokens/s", note.inner_text())
    answer = page.locator(_ANSWER).inner_text()
    assert "Paris" in answer
    _shoot(page, "answer")
    page.reload()
    assert page.locator("article.user").inner_text() == "Name the capital of France."
    assert page.locator(_ANSWER).inner_text() == answer
    assert page.locator("#system").input_value() == "Answer briefly."
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)


def test_escape_stops_an_answer(page: Page, server: ServerProcess) -> None:
    _set(page, temperature="1", max_tokens="1500")
    _send(page, "Write a very long story about the sea.")
    expect(page.locator(_ANSWER)).not_to_be_empty(timeout=20_000)
    page.keyboard.press("Escape")
    expect(page.locator(f"{_ANSWER} .note")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    server.wait_until("num_requests_running", 0)


def test_errors_are_shown(page: Page) -> None:
    _set(page, temperature="3", max_tokens="8")
    _send(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("temperature")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    _send(page, "Hello again")
    expect(page.get_by_role("alert").last).to_contain_text("cannot be reached")
    expect(page.get_by_role("button", name="Try again")).to_have_count(1)  # of the last answer only
    page.unroute("**/v1/chat/completions")
    _set(page, temperature="0")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Try again").click()
    assert [message["content"] for message in asked.value.post_data_json["messages"]] == ["Hello again"]
    expect(page.locator(f"{_ANSWER} .note")).to_contain_text("tokens", timeout=20_000)
    expect(page.locator("article.user")).to_have_text(["Hello", "Hello again"])
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)


_MARKDOWN = """# Title
Some **bold**, *weak* and `code <b>`, [a link](https://example.org/x), [no link](javascript:alert(1)).

1. one
2. two

- a
- b
  1. deep
  2. deeper

  more of b

> quoted

| key | value |
|-----|------:|
| one | `1\\|2` |

***

```python
print("<script>alert(1)</script>")
```
<img src=x onerror="document.title='bad'">"""


def test_markdown_becomes_elements_and_html_stays_text(page: Page) -> None:
    import json

    def answer(route: Route) -> None:
        halves = [_MARKDOWN[:70], _MARKDOWN[70:]]
        events = [{"choices": [{"delta": {"content": half}, "finish_reason": None}]} for half in halves]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)
    _send(page, "Show all")
    shown = page.locator(_ANSWER)
    expect(shown.locator("h2")).to_have_text("Title")
    expect(shown.locator("strong")).to_have_text("bold")
    expect(shown.locator("em")).to_have_text("weak")
    expect(shown.locator("p code")).to_have_text("code <b>")
    expect(shown.locator("a")).to_have_attribute("href", "https://example.org/x")
    expect(shown.locator("a")).to_have_count(1)
    expect(shown.locator(":scope > ol > li")).to_have_text(["one", "two"])
    expect(shown.locator(":scope > ul > li")).to_have_text(["a", re.compile("bdeep.*more of b")])
    expect(shown.locator("ul ol li")).to_have_text(["deep", "deeper"])
    expect(shown.locator("th")).to_have_text(["key", "value"])
    expect(shown.locator("td")).to_have_text(["one", "1|2"])
    expect(shown.locator("hr")).to_have_count(1)
    expect(shown.locator("blockquote")).to_have_text("quoted")
    expect(shown.locator("pre code")).to_have_text('print("<script>alert(1)</script>")')
    expect(shown.locator("img")).to_have_count(0)
    assert page.title() == "inflightd"
    _shoot(page, "markdown")


def test_a_phone_in_the_dark(browser: Browser, server: ServerProcess) -> None:
    context = browser.new_context(
        base_url=server.url, viewport={"width": 360, "height": 700}, color_scheme="dark", has_touch=True
    )
    page = context.new_page()
    page.goto("/")
    _set(page, temperature="0", max_tokens="40")
    _send(page, "List three colours.")
    expect(page.locator(f"{_ANSWER} .note")).to_contain_text("tokens/s", timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    _shoot(page, "phone")
    page.get_by_role("button", name="Settings").click()
    _shoot(page, "phone-settings")
    context.close()
