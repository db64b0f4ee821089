"""GET /: the chat page, one file without requests to anybody else"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.errors import UnknownUrlError
from server.service import service_of

router = APIRouter()


def _source(tag: str, page: str) -> str:
    """The text of an element as a source of a content security policy (CSP Level 3, section 6.7.3.3)."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


_PAGE = (resources.files("server") / "pages" / "chat.html").read_text("utf-8")
_HEADERS = {
    # Its own script and style run and nothing else does, whatever an answer of the model contains.
    "content-security-policy": f"default-src 'none'; script-src {_source('script', _PAGE)}; "
    f"style-src {_source('style', _PAGE)}; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    if service_of(request).config.chat_page == "off":
        raise UnknownUrlError("There is no chat page on this server (--chat-page).")
    return Response(_PAGE, headers=_HEADERS, media_type="text/html")
