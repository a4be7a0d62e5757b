"""A request that was made before, for another range: only its Range differs, so its bytes are made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from yarl import URL

from tierblk.remote.answer import Pin, Want


@dataclass(frozen=True, slots=True)
class Template:
    """url: who was asked. pin: the version that was asked for. head: all but the Range and the blank line."""

    url: URL
    pin: Pin | None
    head: bytes

    @classmethod
    def of(cls, url: URL, pin: Pin | None, headers: Mapping[str, str]) -> Template:
        """headers: of a GET that was sent, as they were sent."""
        lines = [f"GET {url.raw_path_qs} HTTP/1.1"]
        lines += [f"{name}: {text}" for name, text in headers.items() if name.lower() != "range"]
        return cls(url, pin, "".join(f"{line}\r\n" for line in lines).encode())

    def fits(self, url: URL, want: Want) -> bool:
        """Whether it is what would be sent to url for want, but for the range."""
        return self.pin is want.pin and (self.url is url or self.url == url)

    def request(self, want: Want) -> bytes:
        """What goes to the server."""
        return b"%sRange: bytes=%d-%d\r\n\r\n" % (self.head, want.offset_bytes, want.last_byte)
