"""The other end of a connection, as the server sees it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field

from tests.faults.shape import Link

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, no time


@dataclass
class Weather:
    """What all connections share. flowing: not set while the server is a black hole. released: set for those
    who stall. stirred: set whenever something happened."""

    link: Link = field(default_factory=Link)
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    stirred: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.flowing.set()

    def release(self) -> None:
        """Who stalls now goes on."""
        self.released.set()
        self.released = asyncio.Event()


class Peer:
    """One accepted connection; its methods raise OSError when the other end is gone."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, weather: Weather
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number
        self._weather = weather
        self.stalls = False
        # So that `send` returns when the kernel has it; with a high of 0 a TLS transport never resumes.
        writer.transport.set_write_buffer_limits(high=1, low=0)

    @property
    def link(self) -> Link:
        return self._weather.link

    async def send(self, data: bytes | memoryview) -> None:
        """Put bytes on the wire, whatever they are."""
        await self._weather.flowing.wait()
        if self.writer.transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self.writer.write(data)
        await self.writer.drain()

    async def silence(self, seconds: float | None) -> bool:
        """Say nothing for so long, or until the server releases those who stall; None: until then only.
        Whether it was released."""
        self.stalls = True
        self._weather.stirred.set()
        gone = asyncio.ensure_future(self.reader.read(1))
        released = asyncio.ensure_future(self._weather.released.wait())
        try:
            done, _ = await asyncio.wait(
                {gone, released}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self.stalls = False
            for each in (gone, released):
                each.cancel()
            await asyncio.gather(gone, released, return_exceptions=True)
        if gone in done:
            raise ConnectionResetError("the client has left")
        return released in done

    def reset(self) -> None:
        """RST, now."""
        raw = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            if raw is not None:  # else the connection is lost already
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.writer.transport.abort()


def reset_socket(connection: socket.socket) -> None:
    """The same for a socket that no loop has."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    connection.close()
