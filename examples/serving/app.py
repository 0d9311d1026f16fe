"""The addresses of the server, as one of its processes answers them."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Job, unless_gone
from .errors import ApiError, api_error, http_error, unexpected
from .replies import Reply, event, usage
from .requests import ChatRequest, CompletionRequest, Sampling, parse
from .service import Prepared, Service
from .settings import Settings

PAGE = Path(__file__).parent / "page"
Body = TypeVar("Body", bound=Sampling)
GONE = 499
"""Status of a request whose client went away; nobody reads it."""


def create() -> Starlette:
    """Return the application of a process, which loads the model when it starts."""
    return Starlette(
        routes=[
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/v1/chat/completions", _chat, methods=["POST"]),
            Route("/v1/completions", _complete, methods=["POST"]),
            Route("/v1/{rest:path}", _unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
            Route("/health", _health),
            Route("/status", _status),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[Middleware(Headers)],
        exception_handlers={ApiError: api_error, HTTPException: http_error, Exception: unexpected},
        lifespan=_lifespan,
    )


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    service = await asyncio.to_thread(Service, Settings.load())
    app.state.service = service
    try:
        yield
    finally:
        await asyncio.to_thread(service.close)


def _end_with_parent() -> None:
    """End this process in order when the one that started it is gone: nothing else would end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": _service(request).models()})


async def _model(request: Request) -> Response:
    _service(request).check_model(request.path_params["name"])
    return JSONResponse(_service(request).models()[0])


async def _unknown(request: Request) -> Response:
    raise HTTPException(404)


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _status(request: Request) -> Response:
    return JSONResponse(await asyncio.to_thread(_service(request).status))


async def _chat(request: Request) -> Response:
    return await _respond(request, ChatRequest, _service(request).chat, chat=True)


async def _complete(request: Request) -> Response:
    return await _respond(request, CompletionRequest, _service(request).complete, chat=False)


async def _respond(request: Request, kind: type[Body], prepare: Callable[[Body], Prepared], *, chat: bool) -> Response:
    service = _service(request)
    body = parse(kind, await _read(request, service.settings.max_body))
    reply = Reply(chat, service.settings.name)
    # In a thread: the tokens of a long prompt take tens of milliseconds.
    job = service.begin(await asyncio.to_thread(prepare, body), reply.id)
    if body.stream:
        return Events(job, reply, bool(body.stream_options and body.stream_options.include_usage))
    text = await unless_gone(request.receive, _collect(job))
    if text is None:
        return Response(status_code=GONE)
    return JSONResponse(reply.whole(*text, _usage(job)))


async def _collect(job: Job) -> tuple[str, str]:
    """Return the whole text of an answer, and why it ended."""
    text, finish = "", "stop"
    async with contextlib.aclosing(job.pieces()) as pieces:
        async for piece in pieces:
            text, finish = text + piece.text, piece.finish or finish
    return text, finish


class Events(Response):
    """An answer as server-sent events. What fails after the first one is an event, too.

    Args:
        job: the answer.
        reply: its form.
        with_usage: end with the counts of tokens.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, reply: Reply, with_usage: bool) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._job = job
        self._reply = reply
        self._with_usage = with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them until the answer or the client is gone."""
        await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events():
                await send({"type": "http.response.body", "body": event(data), "more_body": True})
        except Exception:
            error = ApiError(500, "the answer failed; the server's log says why", code="internal_error")
            await send({"type": "http.response.body", "body": event(error.body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[dict[str, Any] | str]:
        opening = self._reply.opening()
        if opening is not None:
            yield opening
        async with contextlib.aclosing(self._job.pieces()) as pieces:
            async for piece in pieces:
                if piece.text or piece.finish:
                    yield self._reply.chunk(piece)
        if self._with_usage:
            yield self._reply.closing(_usage(self._job))
        yield "[DONE]"


def _usage(job: Job) -> dict[str, Any]:
    return usage(job.record.prompt, job.answer.reused or 0, len(job.answer.tokens))


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


async def _read(request: Request, most: int) -> bytes:
    """Return a request's body.

    Raises:
        ApiError: it is not said to be JSON, which keeps other sites' forms out; or it is too long.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "send JSON, with content-type: application/json", code="invalid_content_type")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise ApiError(413, f"the request has more than {most} bytes", code="request_too_large")
    return bytes(data)


class Headers:
    """Adds what all answers have: the process that gave it, and what a page may load."""

    FIXED = (
        (b"x-worker", str(os.getpid()).encode()),
        (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
         b"connect-src 'self'"),
        (b"x-content-type-options", b"nosniff"),
    )  # fmt: skip

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with them."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.FIXED]
            await send(message)

        await self._app(scope, receive, sending)
