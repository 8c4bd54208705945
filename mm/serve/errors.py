"""What a client is told of a refusal: a fixed code with its sentence, and the request's id, under which the log says
more."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from mm.serve.limits import CODES, Refused

RETRY_AFTER = {"too_many_requests": 1, "server_busy": 2, "decoder_busy": 5, "shutting_down": 10}  # seconds
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(refused: Refused, request_id: str) -> dict[str, Any]:
    """In OpenAI's form, whose clients raise an error of their own for each status."""
    default = "invalid_request_error" if refused.status < 500 else "server_error"
    return {
        "error": {
            "message": CODES[refused.code][1],
            "type": _TYPES.get(refused.status, default),
            "param": refused.param,
            "code": refused.code,
            "request_id": request_id,
        }
    }


def error_response(refused: Refused, request_id: str) -> JSONResponse:
    response = JSONResponse(error_body(refused, request_id), refused.status)
    if refused.code in RETRY_AFTER:
        response.headers["Retry-After"] = str(RETRY_AFTER[refused.code])
    return response
