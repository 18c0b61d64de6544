"""What goes wrong for a client, in the words of its API."""

from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """A request that cannot be answered: HTTP `status`, a `message` that says what to do, the field `param` that is at
    fault, a machine-readable `code`, and seconds after which to try again."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after


_OPENAI = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error",
}
_ANTHROPIC = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}


def openai_error(error: ApiError) -> dict[str, Any]:
    kind = _OPENAI.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    kind = _ANTHROPIC.get(error.status, "invalid_request_error")
    message = f"{error.param}: {error.message}" if error.param else error.message
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_response(path: str, error: ApiError) -> JSONResponse:
    """In the form of the API that the path belongs to."""
    form = anthropic_error if path.startswith("/v1/messages") else openai_error
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    return JSONResponse(form(error), error.status, headers)
