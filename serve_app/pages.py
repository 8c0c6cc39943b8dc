"""The console: static files that ask the API like any other client, so they hold nothing to protect.

    GET /               goes on to /console
    GET /console        the page
    GET /console/<file> its style and scripts

No build step and nothing from elsewhere: the content policy allows this origin only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response

FOLDER = Path(__file__).resolve().parent / "console"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_pages(app: FastAPI) -> None:
    """Serve the console from `app`."""
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in KINDS:
            route = "/console" if path.name == "index.html" else f"/console/{path.name}"
            answer = _page(path.read_bytes(), KINDS[path.suffix])
            app.add_api_route(route, answer, methods=["GET"], include_in_schema=False)
    app.add_api_route("/", _home, methods=["GET"], include_in_schema=False)


def _page(body: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'
    headers = {
        "etag": tag,
        "cache-control": "no-cache",  # ask each time, get the body only if it is another
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    async def page(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=f"{kind}; charset=utf-8", headers=headers)

    return page


async def _home(request: Request) -> Response:
    root = str(request.scope.get("root_path", ""))
    return Response(status_code=307, headers={"location": f"{root}/console"})
