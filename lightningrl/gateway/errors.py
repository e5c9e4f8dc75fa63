"""Errors as the OpenAI protocol shapes them, so that clients raise the exceptions their users expect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lightningrl.errors import UserError

Model = TypeVar("Model", bound=BaseModel)

# JSON writes a surrogate as an escape or, against its rules, in UTF-8 or as one of the encodings that have zero bytes.
_MAY_HOLD_A_SURROGATE = re.compile(rb"\\u[dD]|\xed|\x00")


class GatewayError(UserError):
    """The gateway cannot be started or used as asked; the message is one sentence for a person."""


class ApiError(Exception):
    """A request that is answered with an error: HTTP status, sentence, OpenAI error type and code, offending parameter."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode()


def parse_body(body: bytes, model: type[Model]) -> tuple[Model, dict[str, Any]]:
    """The request as a model and as the client sent it; raises `ApiError` 400 that names the offending field."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request body is not JSON: {error}.", code="invalid_json") from None
    if _MAY_HOLD_A_SURROGATE.search(body) and not is_unicode(raw):
        message = "The request body holds half of a surrogate pair, which is no character."
        raise ApiError(400, message, code="invalid_json")
    if not isinstance(raw, dict):
        raise ApiError(400, f"The request body is a JSON {type(raw).__name__}; it must be an object.", code="invalid_json")
    try:
        return model.model_validate(raw), raw
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        # Where a field may be of several types each has a say; the one that got furthest is what the client meant.
        same_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
        worst = max(same_field, key=lambda problem: len(problem["loc"]))
        field = _path(worst["loc"])
        raise ApiError(400, f"Invalid value for '{field}': {worst['msg']}.", code="invalid_value", param=field) from None


def is_unicode(value: Any) -> bool:
    """Whether all text in a JSON value is made of characters: an escape such as `\\ud800` alone is none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _path(location: Sequence[int | str]) -> str:
    # Names of union members ("str", "list[Part]", "NamedTool") are pydantic's, not fields of the request.
    members = {"str", "int", "float", "bool", "dict", "list"}

    def is_field(part: int | str) -> bool:
        return isinstance(part, int) or (part.isidentifier() and part.islower() and part not in members)

    return ".".join(str(part) for part in location if is_field(part)) or "body"
