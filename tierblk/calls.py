"""One request to the control interface: checked before anything is done, and its error made an answer."""

from __future__ import annotations

import logging
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from aiohttp import web
from pydantic import ValidationError

from tierblk import messages, openapi, values
from tierblk.errors import (
    ConfigError,
    DaemonError,
    DeviceError,
    RemoteRefused,
    RemoteUnavailable,
    TierblkError,
    TooMuch,
    UnknownDevice,
)
from tierblk.openapi import Operation

log = logging.getLogger(__name__)

_FAULTS_SAID = 8
"""Of a body; what is wrong with a config in it is all said."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _NotHttp(logging.Filter):
    """The server logs a request that is not HTTP with a traceback, and with what is in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and (error := record.exc_info[1]) is not None:
            record.msg, record.args = "a client sent what is not HTTP: %s", (type(error).__name__,)
            record.exc_info = record.exc_text = None
        return True


http_log = logging.getLogger("tierblk.control.http")
"""For the server below. What an operation raises does not come here, see errors_as_json."""
http_log.addFilter(_NotHttp())


class Call(NamedTuple):
    """What a client asked for, checked. name: of the device, where the path has one; body: of the operation's
    model; query: its parameters, as text."""

    request: web.Request
    name: str
    body: Any
    query: Mapping[str, str]

    def number(self, key: str, default: int, most: int) -> int:
        """A parameter of the query, from 0 on. BadRequest."""
        text = self.query.get(key, str(default))
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= most):
            raise BadRequest(f"{key} must be a number from 0 to {most}")
        return int(text)


class BadRequest(DaemonError):
    """Nothing was done. status: of HTTP."""

    def __init__(self, message: str, hint: str | None = None, status: int = 400) -> None:
        super().__init__(message, hint)
        self.status = status


def peer(request: web.Request) -> str:
    """Who is at the other end of the socket; an id of a process may be another's by now."""
    connection = request.transport.get_extra_info("socket") if request.transport else None
    if connection is None:
        return "a client that has hung up"
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("iII", credentials)
    return f"uid {uid}, pid {pid}"


async def checked(operation: Operation, request: web.Request) -> Call:
    """UnknownDevice, BadRequest."""
    name = request.match_info.get("name", "")
    if "name" in request.match_info and not re.fullmatch(values.NAME_PATTERN, name):
        raise UnknownDevice(f"no device can be called {values.quoted(name)}")
    query = request.query
    if unknown := sorted(set(query) - set(operation.query)):
        known = f"known here: {', '.join(sorted(operation.query))}" if operation.query else "there are none"
        raise BadRequest(f"unknown parameter {values.quoted(unknown[0])} in the query ({known})")
    if len(set(query)) != len(query):
        raise BadRequest("a parameter of the query is there twice")
    body = await _body(operation.body, request) if operation.body is not None else None
    return Call(request, name, body, query)


async def _body(model: type[messages.Body], request: web.Request) -> messages.Body:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise BadRequest("the body of the request must not have a Content-Encoding", status=415)
    try:
        data = await request.read()
    except (web.RequestPayloadError, ConnectionError):
        raise BadRequest("the body of the request ends too early") from None
    if data and request.content_type != openapi.JSON:
        hint = f"send it with: Content-Type: {openapi.JSON}"
        raise BadRequest(f"the body of the request must be {openapi.JSON}", hint, 415)
    try:
        return model.model_validate_json(data or b"{}")
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        said = [_fault(fault) for fault in faults[:_FAULTS_SAID]]
        said += [f"and {more} more"] if (more := len(faults) - len(said)) else []
        known = f"known here: {', '.join(sorted(model.model_fields)) or 'no key'}"
        raise BadRequest(f"the body of the request {'; '.join(said)}", known) from None


def _fault(fault: Mapping[str, Any]) -> str:
    """Without the value, which may be a secret."""
    key = values.quoted(".".join(map(str, fault["loc"])))
    match fault["type"]:
        case "json_invalid" | "model_type":
            return "is not a JSON object"
        case "missing":
            return f"must have {key}"
        case "extra_forbidden":
            return f"must not have {key}"
    return f"has a wrong {key}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _status(error: TierblkError) -> int:
    """HTTP's word for who is to blame; clients go by kind and exit code."""
    match error:
        case BadRequest():
            return error.status
        case UnknownDevice():
            return 404
        case ConfigError():
            return 400
        case DeviceError() | DaemonError() | TooMuch():
            return 409
        case RemoteUnavailable() | RemoteRefused():
            return 502
    return 500


def _error_response(
    error: TierblkError, status: int, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.json_response({"error": error.to_dict()}, status=status, headers=headers)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    what = f"{request.method} {request.rel_url.raw_path:.200}"  # as it came: no line ends in the log
    try:
        return await handler(request)
    except TierblkError as error:
        log.info("%s: %s", what, error)
        return _error_response(error, _status(error))
    except web.HTTPException as error:
        allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        hint = "GET /v1/openapi.json says what can be asked" if error.status in (404, 405) else None
        return _error_response(DaemonError(f"{what}: {error.reason.lower()}", hint), error.status, allowed)
    except Exception as error:
        log.exception("%s failed", what)
        # Not what the exception says: nobody knows what is in it.
        internal = TierblkError(
            f"internal error in the daemon: {type(error).__name__}", "its log has the details"
        )
        return _error_response(internal, 500)
