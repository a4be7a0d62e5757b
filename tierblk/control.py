"""The control interface: HTTP/JSON over a Unix socket that only the daemon's user may open.

    GET    /v1/daemon          what `DaemonApi.info` says
    GET    /v1/devices         {"devices": [device, ...]}
    GET    /v1/devices/NAME    device
    POST   /v1/devices         {"config_path": str, "config": document, "take_over": bool,
                               "discard_local": bool, "clone_local": bool} -> device
    DELETE /v1/devices/NAME    {"force": bool} -> {"detached": NAME, "warning": str or null}
    POST   /v1/devices/NAME/repin  device
    POST   /v1/devices/NAME/sync   {"wait": bool} -> device
    GET    /v1/devices/NAME/content?offset=BYTES&length=BYTES   the bytes that it shows there
    POST   /v1/stop            {"if_idle": bool} -> {"stopping": bool}; the process ends when all has stopped

Whoever hangs up gives up an attach or a reading that runs; everything else goes on without a client.

An error is {"error": {"kind", "message", "hint", "exit_code"}} with a status of 400 or above.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from tierblk import config
from tierblk.claim import Wishes
from tierblk.errors import CacheError, ConfigError, DaemonError, DeviceError, TierblkError
from tierblk.rundir import END_NAME, INFO_NAME, SOCKET_NAME, socket_address

log = logging.getLogger(__name__)

REQUEST_BYTES_MAX = 4 * config.FILE_BYTES_MAX
CONTENT_BYTES_MAX = 8 << 20

_SHUTDOWN_S = 0.5

Device = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class DaemonApi(Protocol):
    """What the control interface can ask of a daemon. Every method may raise a TierblkError."""

    async def attach(self, config: config.Config, wishes: Wishes) -> Device:
        """Make the device of a config; returns when it can be opened. "warnings" in it are for the user. One
        that an earlier daemon made by this config, and this one took over, is as good. Cancelled, it leaves
        nothing, or has made the device."""
        ...

    async def sync(self, name: str, *, wait: bool) -> Device:
        """What was written to a device before the call goes to object storage, and is there when it returns
        if it is to wait; for one whose volume is not kept there nothing is to be done. A TierblkError when it
        never will be there."""
        ...

    async def detach(self, name: str, *, force: bool = False) -> str | None:
        """Stop and delete a device; returns when it is gone. DeviceError if there is none of this name, or,
        without force, when it is in use and the kernel can say so."""
        ...

    async def content(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        """What a device shows there; at most CONTENT_BYTES_MAX. DeviceError: it is not there, or has not so
        many bytes; RemoteUnavailable: what is not cached cannot be fetched at the moment. Cancelled, it
        ends."""
        ...

    async def repin(self, name: str) -> Device:
        """Make the device show the version of its image that the server has now (R22). DeviceError when it is
        in use; RemoteUnavailable when nobody answers. The device goes on as before then."""
        ...

    def devices(self) -> list[Device]:
        """All devices, in the order of their attachment."""
        ...

    def device(self, name: str) -> Device:
        """One device. DeviceError if there is none of this name."""
        ...

    def info(self) -> dict[str, Any]:
        """At least pid, cache_dir, config_path and started (seconds since 1970)."""
        ...

    def request_stop(self) -> None:
        """Begin an orderly stop that takes the devices away, and return at once."""
        ...


class ControlServer:
    """Serves a DaemonApi at run_dir/control.sock from `start` to `close`.

    Whoever calls `start` holds the cache directory's lock (R8), so a socket that is already there is dead.
    """

    def __init__(self, api: DaemonApi, run_dir: Path) -> None:
        self.api = api
        self.run_dir = run_dir
        self._runner: web.AppRunner | None = None
        self._attaching: set[asyncio.Transport] = set()
        self._running: set[asyncio.Task[web.StreamResponse]] = set()

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return self.run_dir / SOCKET_NAME

    async def start(self) -> None:
        """Listen; connections are accepted from here on. DaemonError: the run directory does not allow it."""
        middlewares = [self._outlasts_its_client, _errors_as_json]
        app = web.Application(middlewares=middlewares, client_max_size=REQUEST_BYTES_MAX)
        app.add_routes(
            [
                web.get("/v1/daemon", self._info),
                web.get("/v1/devices", self._devices),
                web.post("/v1/devices", self._attach),
                web.get("/v1/devices/{name}", self._device),
                web.delete("/v1/devices/{name}", self._detach),
                web.get("/v1/devices/{name}/content", self._content),
                web.post("/v1/devices/{name}/repin", self._repin),
                web.post("/v1/devices/{name}/sync", self._sync),
                web.post("/v1/stop", self._stop),
            ]
        )
        # Who closes it has ended the attaches that run; a detach that runs is ended by the stop that follows.
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=_SHUTDOWN_S,
            handler_cancellation=True,
        )
        try:
            self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.run_dir / END_NAME).unlink(missing_ok=True)
            self._write_info()
            listener = self._bind()
        except OSError as error:
            raise DaemonError(
                f"cannot make the control socket {self.socket_path}: {error.strerror}"
            ) from None
        await runner.setup()
        self._runner = runner
        await web.SockSite(runner, listener).start()

    def withdraw(self) -> None:
        """Take the socket's name away, so that nobody finds a daemon that is about to end."""
        for name in (SOCKET_NAME, INFO_NAME):
            with suppress(OSError):
                (self.run_dir / name).unlink()

    async def close(self) -> None:
        """Take the socket away and end; calls that run get a moment. Can be called twice."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        self.withdraw()
        await runner.cleanup()

    def _write_info(self) -> None:
        info = self.api.info()
        known = {key: info.get(key) for key in ("pid", "cache_dir", "config_path", "started")}
        new = self.run_dir / f"{INFO_NAME}.new"
        new.write_text(json.dumps(known) + "\n")
        new.replace(self.run_dir / INFO_NAME)

    def _bind(self) -> socket.socket:
        with suppress(FileNotFoundError):
            self.socket_path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_address(self.run_dir) as address:
                listener.bind(address)
            # Nobody can connect before listen(), so there is no moment at which others could.
            os.chmod(self.socket_path, 0o600)
        except BaseException:
            listener.close()
            raise
        return listener

    @web.middleware
    async def _outlasts_its_client(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The server cancels what a client asked for that hung up. Right for an attach, whose client is gone
        with Ctrl-C, or after its time-out, or for a reading; a detach that was begun must come to its end."""
        if request.match_info.handler in (self._attach, self._content):
            return await handler(request)
        running = asyncio.ensure_future(handler(request))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.shield(running)

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(self.api.info())

    async def _devices(self, request: web.Request) -> web.Response:
        return web.json_response({"devices": self.api.devices()})

    async def _device(self, request: web.Request) -> web.Response:
        return web.json_response(self.api.device(request.match_info["name"]))

    async def _attach(self, request: web.Request) -> web.Response:
        body = await _json_object(request)
        path, document = body.get("config_path"), body.get("config")
        if not isinstance(path, str) or not isinstance(document, dict):
            raise DaemonError('the body must be {"config_path": a string, "config": an object}')
        if (client := request.transport) is None:
            raise DaemonError("the client has hung up")
        self._attaching.add(client)
        try:
            asked = (body.get(key) is True for key in ("take_over", "discard_local", "clone_local"))
            wishes = Wishes(*asked)
            device = await self.api.attach(config.parse(document, Path(path)), wishes)
        finally:
            self._attaching.discard(client)
        return web.json_response(device, status=201)

    async def _detach(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        body = await _json_object(request) if request.can_read_body else {}
        warning = await self.api.detach(name, force=body.get("force") is True)
        return web.json_response({"detached": name, "warning": warning})

    async def _content(self, request: web.Request) -> web.Response:
        offset_bytes, length_bytes = (_number(request, key) for key in ("offset", "length"))
        if length_bytes > CONTENT_BYTES_MAX:
            raise DaemonError(f"at most {CONTENT_BYTES_MAX} bytes are read at once")
        content = await self.api.content(request.match_info["name"], offset_bytes, length_bytes)
        return web.Response(body=content, content_type="application/octet-stream")

    async def _repin(self, request: web.Request) -> web.Response:
        return web.json_response(await self.api.repin(request.match_info["name"]))

    async def _sync(self, request: web.Request) -> web.Response:
        body = await _json_object(request) if request.can_read_body else {}
        device = await self.api.sync(request.match_info["name"], wait=body.get("wait") is True)
        return web.json_response(device)

    async def _stop(self, request: web.Request) -> web.Response:
        body = await _json_object(request) if request.can_read_body else {}
        # Who started a daemon for an attach that failed takes it away again, unless others came meanwhile.
        attaching = not all(client.is_closing() for client in self._attaching)  # else it was given up
        if body.get("if_idle") and (attaching or self.api.devices()):
            return web.json_response({"stopping": False})
        self.api.request_stop()
        return web.json_response({"stopping": True})


async def _json_object(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise DaemonError("the body of the request is not a JSON object")
    return body


def _number(request: web.Request, key: str) -> int:
    text = request.query.get(key, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise DaemonError(f"{key} must be a number of bytes")
    return int(text)


def _status(error: TierblkError) -> int:
    """HTTP's word for who is to blame; clients go by kind and exit code."""
    if isinstance(error, ConfigError):
        return 400
    if isinstance(error, DeviceError | DaemonError):
        return 409
    return 500 if isinstance(error, CacheError) else 502


def _error_response(error: TierblkError, status: int) -> web.Response:
    return web.json_response({"error": error.to_dict()}, status=status)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    what = f"{request.method} {request.path}"
    try:
        return await handler(request)
    except TierblkError as error:
        log.info("%s: %s", what, error)
        return _error_response(error, _status(error))
    except web.HTTPException as error:
        return _error_response(DaemonError(f"{what}: {error.reason.lower()}"), error.status)
    except Exception as error:
        log.exception("%s failed", what)
        internal = TierblkError(f"internal error in the daemon: {error!r:.200}", "its log has the details")
        return _error_response(internal, 500)


def report_end(run_dir: Path, error: TierblkError) -> None:
    """Leave word of what went wrong with the end, for whoever asked for it: the socket is closed by then."""
    with suppress(OSError):
        (run_dir / END_NAME).write_text(json.dumps(error.to_dict()) + "\n")
