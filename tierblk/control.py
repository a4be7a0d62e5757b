"""The control interface: HTTP/JSON over a Unix socket for the daemon's user and, if the config names one, a
group.

What can be asked is the table of operations below, which also makes the routes and the description of them
(openapi.py, docs/openapi.json). Another one is a method of ControlServer that begins with @_operation.

Whoever hangs up gives up an attach or a reading that runs; everything else goes on without a client.

An error is {"error": {"kind", "message", "hint", "exit_code"}} with a status of 400 or above.
"""

from __future__ import annotations

import asyncio
import grp
import json
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from aiohttp import web

from tierblk import config, messages, openapi, tracing
from tierblk.calls import Call, Handler, checked, errors_as_json, http_log, peer
from tierblk.care import Care
from tierblk.claim import Wishes
from tierblk.errors import ConfigError, DaemonError, TierblkError
from tierblk.extent import Extent
from tierblk.openapi import Operation
from tierblk.rundir import END_NAME, INFO_NAME, SOCKET_NAME, socket_address
from tierblk.scrape import Scraper
from tierblk.snapshot import Snapshot
from tierblk.tracing import Reader, Wanted

log = logging.getLogger(__name__)

REQUEST_BYTES_MAX = 4 * config.FILE_BYTES_MAX
CONTENT_BYTES_MAX = 8 << 20
OFFSET_MAX = (1 << 63) - 1

_SHUTDOWN_S = 0.5

Device = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])

OPERATIONS: list[Operation] = []
"""All that can be asked, in the order of the description."""

_DEVICE = messages.Device | messages.WaitingDevice

_TOP = {
    "type": "object",
    "description": "Counters only grow while a daemon lives, stamped with its own monotonic clock.",
    "required": ["unix_s", "monotonic_s", "daemon", "cache", "devices", "remotes"],
    "properties": {
        "unix_s": {"type": "number"},
        "monotonic_s": {"type": "number"},
        "daemon": {"type": "object"},
        "cache": {"type": "object"},
        "devices": {"type": "array", "items": {"type": "object"}},
        "remotes": {"type": "array", "items": {"type": "object"}},
    },
}


def _operation(method: str, path: str, summary: str, answer: Any, **more: Any) -> Callable[[F], F]:
    """Makes a method of ControlServer an operation; more: further fields of Operation. The method gets a
    Call, and returns a document, or a whole response."""

    def enlist(function: F) -> F:
        name = function.__name__.removeprefix("_")
        OPERATIONS.append(Operation(method, path, name, summary, answer, **more))
        return function

    return enlist


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

    @property
    def care(self) -> Care:
        """For what is cached."""
        ...

    def trace(self, name: str, wanted: Wanted) -> Reader:
        """What requests of a device do from now on, to be closed. DeviceError as `device`."""
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

    def top(self) -> dict[str, Any]:
        """All counters and levels at this moment: "unix_s", "monotonic_s", "daemon" (as `info`), "cache",
        "devices" with their latency counts, "remotes"; see tierblk/sample.py."""

    async def snapshot(self) -> Snapshot:
        """What monitoring shows, taken a device at a time."""
        ...

    def request_stop(self) -> None:
        """Begin an orderly stop that takes the devices away, and return at once."""
        ...


class ControlServer:
    """Serves a DaemonApi at run_dir/control.sock from `start` to `close`.

    Whoever calls `start` holds the cache directory's lock (R8), so a socket that is already there is dead.
    """

    def __init__(self, api: DaemonApi, run_dir: Path, gid: int | None = None) -> None:
        """gid: of the group that may use it too."""
        self.api = api
        self.run_dir = run_dir
        self._gid = gid
        self.scraper = Scraper(api.snapshot)
        self._runner: web.AppRunner | None = None
        self._attaching: set[asyncio.Transport] = set()
        self._running: set[asyncio.Task[web.StreamResponse]] = set()
        self._abandoned: set[Handler] = set()

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return self.run_dir / SOCKET_NAME

    async def start(self) -> None:
        """Listen; connections are accepted from here on. DaemonError: the run directory does not allow it."""
        middlewares = [self._outlasts_its_client, errors_as_json]
        app = web.Application(middlewares=middlewares, client_max_size=REQUEST_BYTES_MAX)
        for operation in OPERATIONS:
            handler = self._handler(operation)
            app.router.add_route(operation.method, operation.path, handler)
            if operation.abandoned:
                self._abandoned.add(handler)
        # Who closes it has ended the attaches that run; a detach that runs is ended by the stop that follows.
        runner = web.AppRunner(
            app,
            access_log=None,
            logger=http_log,
            handle_signals=False,
            shutdown_timeout=_SHUTDOWN_S,
            handler_cancellation=True,
        )
        try:
            self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._permit(self.run_dir, 0o700, 0o750)  # whoever made it, and for whom
            (self.run_dir / END_NAME).unlink(missing_ok=True)
            self._write_info()
            listener = self._bind()
        except OSError as error:
            hint = None
            if self._gid is not None and isinstance(error, PermissionError):
                hint = "daemon.group: only root, or a member of the group, can give it a file"
            raise DaemonError(
                f"cannot make the control socket {self.socket_path}: {error.strerror}", hint
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
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(json.dumps(known) + "\n")
        self._permit(new, 0o600, 0o640)
        new.replace(self.run_dir / INFO_NAME)

    def _bind(self) -> socket.socket:
        with suppress(FileNotFoundError):
            self.socket_path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_address(self.run_dir) as address:
                listener.bind(address)
            # Nobody can connect before listen(), so there is no moment at which others could.
            self._permit(self.socket_path, 0o600, 0o660)
        except BaseException:
            listener.close()
            raise
        return listener

    def _permit(self, path: Path, alone: int, shared: int) -> None:
        """The mode with a group, and without. OSError."""
        if self._gid is not None:
            os.chown(path, -1, self._gid)  # the group first: the old one gets nothing
        path.chmod(alone if self._gid is None else shared)

    @web.middleware
    async def _outlasts_its_client(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The server cancels what a client asked for that hung up. Right for a reading, a trace, and an
        attach, whose client is gone with Ctrl-C, or after its time-out; a detach that was begun must come to
        its end."""
        if request.match_info.handler in self._abandoned:
            return await handler(request)
        running = asyncio.ensure_future(handler(request))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.shield(running)

    def _handler(self, operation: Operation) -> Handler:
        method = getattr(self, f"_{operation.name}")

        async def handle(request: web.Request) -> web.StreamResponse:
            call = await checked(operation, request)
            if operation.method != "GET":
                what = f"{operation.name} {call.name or getattr(call.body, 'config_path', '')}".rstrip()
                log.info("%s, asked for by %s", json.dumps(what)[1:-1], peer(request))  # on one line
            answer = await method(call)
            if isinstance(answer, web.StreamResponse):
                return answer
            return web.json_response(answer, status=operation.status)

        return handle

    @_operation("GET", "/v1/openapi.json", "This description", {"type": "object"})
    async def _describe(self, call: Call) -> Any:
        return openapi.document(OPERATIONS)

    @_operation("GET", "/v1/daemon", "The daemon and its cache", messages.DaemonInfo)
    async def _info(self, call: Call) -> Any:
        return self.api.info()

    @_operation("GET", "/metrics", "What there is to count, for Prometheus", None, media="text/plain")
    async def _metrics(self, call: Call) -> Any:
        return await self.scraper.answer(call.request)

    @_operation("GET", "/v1/top", "All counters at one moment, as `tierblk top` takes them", _TOP)
    async def _top(self, call: Call) -> Any:
        return self.api.top()

    @_operation("GET", "/v1/devices", "All devices", messages.Devices)
    async def _devices(self, call: Call) -> Any:
        return {"devices": self.api.devices()}

    @_operation(
        "POST",
        "/v1/devices",
        "Attach: make the device of a config; it can be opened when the answer comes",
        _DEVICE,
        body=messages.AttachBody,
        status=201,
        errors=(502,),
        abandoned=True,
    )
    async def _attach(self, call: Call) -> Any:
        body: messages.AttachBody = call.body
        if (client := call.request.transport) is None:
            raise DaemonError("the client has hung up")
        self._attaching.add(client)
        try:
            wishes = Wishes(body.take_over, body.discard_local, body.clone_local)
            return await self.api.attach(config.parse(body.config, Path(body.config_path)), wishes)
        finally:
            self._attaching.discard(client)

    @_operation("GET", "/v1/devices/{name}", "One device", _DEVICE)
    async def _device(self, call: Call) -> Any:
        return self.api.device(call.name)

    @_operation(
        "DELETE",
        "/v1/devices/{name}",
        "Detach: stop and delete the device; it is gone when the answer comes",
        messages.Detached,
        body=messages.DetachBody,
        errors=(502,),
    )
    async def _detach(self, call: Call) -> Any:
        warning = await self.api.detach(call.name, force=call.body.force)
        return {"detached": call.name, "warning": warning}

    @_operation(
        "GET",
        "/v1/devices/{name}/content",
        "The bytes that it shows somewhere; what is not cached is fetched",
        None,
        media="application/octet-stream",
        errors=(409, 502),
        query={
            "offset": {"type": "integer", "minimum": 0, "maximum": OFFSET_MAX, "default": 0},
            "length": {"type": "integer", "minimum": 0, "maximum": CONTENT_BYTES_MAX, "default": 4096},
        },
        abandoned=True,
    )
    async def _content(self, call: Call) -> Any:
        offset_bytes = call.number("offset", 0, OFFSET_MAX)
        length_bytes = call.number("length", 4096, CONTENT_BYTES_MAX)
        content = await self.api.content(call.name, offset_bytes, length_bytes)
        return web.Response(body=content, content_type="application/octet-stream")

    @_operation(
        "POST",
        "/v1/devices/{name}/repin",
        "Show the version of its image that the server has now",
        _DEVICE,
        body=messages.NoBody,
        errors=(502,),
    )
    async def _repin(self, call: Call) -> Any:
        return await self.api.repin(call.name)

    @_operation(
        "POST",
        "/v1/devices/{name}/sync",
        "Upload what was written to it before",
        _DEVICE,
        body=messages.SyncBody,
        errors=(502,),
    )
    async def _sync(self, call: Call) -> Any:
        return await self.api.sync(call.name, wait=call.body.wait)

    @_operation(
        "GET",
        "/v1/devices/{name}/trace",
        "What its requests do, a line of JSON for each, until the client hangs up",
        None,
        media="application/x-ndjson",
        errors=(409,),
        query=tracing.PARAMETERS,
        abandoned=True,
    )
    async def _trace(self, call: Call) -> Any:
        reader = self.api.trace(call.name, Wanted.parse(call.query))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        try:
            await response.prepare(call.request)
            async for lines in reader.chunks():
                await response.write(lines)  # waits for a slow client, and then nothing is read for it
            await response.write_eof()
        except ConnectionError:
            pass  # the client has hung up
        finally:
            reader.close()
        return response

    @_operation(
        "POST",
        "/v1/cache/evict",
        "Take blocks of a layer out of the cache",
        messages.EvictedBytes,
        body=messages.EvictBody,
    )
    async def _evict(self, call: Call) -> Any:
        return await self.api.care.evict(call.body.layer_id, _extents(call.body.ranges))

    @_operation(
        "POST",
        "/v1/cache/pin",
        "Keep blocks of a layer in the cache for good",
        messages.Pinned,
        body=messages.PinBody,
    )
    async def _pin(self, call: Call) -> Any:
        body: messages.PinBody = call.body
        return await self.api.care.pin(body.layer_id, _extents(body.ranges), pinned=body.pinned)

    @_operation(
        "POST",
        "/v1/cache/drop",
        "Take single pages out of the cache, which are bad",
        messages.Dropped,
        body=messages.DropBody,
    )
    async def _drop(self, call: Call) -> Any:
        pages = [(block, mask & 0xFFFF) for block, mask in call.body.pages]
        return self.api.care.drop(call.body.layer_id, pages)

    @_operation(
        "POST",
        "/v1/cache/gc",
        "Forget images that nobody uses",
        messages.Collected,
        body=messages.CollectBody,
    )
    async def _collect(self, call: Call) -> Any:
        return await self.api.care.collect(older_s=call.body.older_s, dry_run=call.body.dry_run)

    @_operation(
        "POST",
        "/v1/stop",
        "Take all devices away and end the daemon; the answer comes at once",
        messages.Stopping,
        body=messages.StopBody,
    )
    async def _stop(self, call: Call) -> Any:
        # Who started a daemon for an attach that failed takes it away again, unless others came meanwhile.
        attaching = not all(client.is_closing() for client in self._attaching)  # else it was given up
        if call.body.if_idle and (attaching or self.api.devices()):
            return {"stopping": False}
        self.api.request_stop()
        return {"stopping": True}


def group_id(name: str | None) -> int | None:
    """Of daemon.group. ConfigError: this machine has none of this name."""
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(
            f'daemon.group: this machine has no group "{name}"',
            f"make it (groupadd --system {name}), or leave daemon.group out",
        ) from None


def report_end(run_dir: Path, error: TierblkError) -> None:
    """Leave word of what went wrong with the end, for whoever asked for it: the socket is closed by then."""
    with suppress(OSError):
        (run_dir / END_NAME).write_text(json.dumps(error.to_dict()) + "\n")


def _extents(ranges: list[list[int]]) -> list[Extent]:
    return [Extent(offset, length) for offset, length in ranges]
