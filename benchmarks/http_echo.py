"""The yardstick of `bench http`: bare uvicorn and Starlette, answering with as many bytes.

python -m kvcm_ray.benchmarks.http_echo PORT RESPONSE_BYTES
"""

from __future__ import annotations

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def main(port: str, response_bytes: str) -> None:
    answer = b"x" * int(response_bytes)

    async def echo(request: Request) -> Response:
        await request.body()
        return Response(answer, media_type="application/json")

    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
