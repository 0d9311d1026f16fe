"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse


class ApiError(Exception):
    """A request that can't be answered.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        code: OpenAI's name for it, for programs.
        param: the part of the request that is at fault.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer that says so."""
        headers = {"retry-after": "1"} if self.status == 429 else None
        return JSONResponse(self.body, self.status, headers)


async def api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with an `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with what Starlette raises: no such address, or another method."""
    assert isinstance(error, HTTPException)
    code = "unknown_url" if error.status_code == 404 else None
    message = f"{error.detail}: {request.method} {request.url.path}"
    return ApiError(error.status_code, message, code=code).response()


async def unexpected(request: Request, error: Exception) -> JSONResponse:
    """Answer where the server is at fault. What happened goes to the log, not to the client."""
    return ApiError(500, "the server failed; its log says why", code="internal_error").response()
