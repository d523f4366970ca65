"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}. None repeats what the client sent."""

import json
import logging
import traceback
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

log = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "deadline_exceeded",
    409: "conflict",
    413: "request_too_large",
    422: "invalid_request",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
}


class ApiError(Exception):
    """What a client is told. message: one true sentence that names the mend."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status, "error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        text = json.dumps(self.body())  # ASCII: a message may name a field that is no whole Unicode text
        return Response(text, status_code=self.status, headers=self.headers, media_type="application/json")


def as_api_error(error: BaseException) -> ApiError:
    """ValueError is the client's mistake, everything else ours: logged by its type and place, without its text, which
    may hold a prompt."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    log.error("request failed", extra={"error": type(error).__name__, "frames": frames[-12:]})
    return ApiError(500, f"the server failed at this request ({type(error).__name__}); its log says where")


def install(app: FastAPI) -> None:
    """Give every error this shape."""

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = str(first["msg"]).removeprefix("Value error, ")
        return ApiError(400, f"{where}: {message}" if where else message, param=where or None).response()

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    async def other(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ApiError, other)
    app.add_exception_handler(ValueError, other)
    app.add_exception_handler(Exception, other)
