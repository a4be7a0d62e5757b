"""Layers as a running daemon has them. A base: its block map, and the image behind it, which is its truth. A
volume: its block map, which is the truth itself (DESIGN 2)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tierblk.core import Layer
from tierblk.errors import TierblkError
from tierblk.remote import FetchCounters, Fetcher, Health, Identity, RawImage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Volume:
    """What was written to a device. mode: "scratch", "local", or "write-back"; far: of the last, what fills
    it."""

    name: str
    mode: str
    layer: Layer
    far: Filled | None = None


@dataclass(frozen=True)
class Stack:
    """What a device shows: a volume over a base, or one of them alone."""

    base: Base | None
    volume: Volume | None
    size_bytes: int

    @property
    def identity(self) -> Identity | None:
        """Of the image."""
        return self.base.image.identity if self.base else None

    @property
    def counters(self) -> FetchCounters:
        """What was fetched, of all layers."""
        total = FetchCounters()
        for layer in self.filled:
            total += layer.fetcher.counters
        return total

    @property
    def filled(self) -> list[Filled]:
        """Its layers that are fetched."""
        far = self.volume.far if self.volume else None
        return [layer for layer in (self.base, far) if layer is not None]

    def health(self) -> Health:
        """How its remotes do, the one that does worse first; without one all is well."""
        healths = [layer.health() for layer in self.filled]
        healths.sort(key=lambda health: health["state"] == "ok")
        if healths:
            return healths[0]
        return {"state": "ok", "since": None, "reason": None, "next_try_s": None, "waiting": 0}

    @property
    def shown(self) -> str:
        """For people."""
        parts = [self.base.image.identity.shown] if self.base else []
        parts += [f"{self.volume.mode} volume"] if self.volume else []
        return ", ".join(parts)


class Filled:
    """A layer whose blocks are fetched, and who waits for them."""

    def __init__(self, layer: Layer, fetcher: Fetcher) -> None:
        self.layer = layer
        self.fetcher = fetcher
        self.patiences: dict[str, float] = {}
        """Who uses it, by name of device, and how long its reads may wait for the remote, in seconds."""
        self.trouble: TierblkError | None = None
        """Why the last fetch failed, when the last one did."""

    @property
    def size_bytes(self) -> int:
        return self.layer.size_bytes

    @property
    def remote(self) -> str:
        """Where it is fetched from, without what is secret in that."""
        return self.fetcher.source.identity.shown

    @property
    def patience_s(self) -> float:
        """The longest of its devices: a fetch is worth trying for so long. inf: for ever; 0: for as long as
        remote.retries says."""
        return max(self.patiences.values(), default=0.0)

    def failed(self, error: TierblkError) -> None:
        """A fetch was given up, or goes on though its retries are used up. Said once per trouble, not once
        per block."""
        if self.trouble is None:
            log.warning("%s; reads of what is not cached wait or fail until it is back", error)
        self.trouble = error

    def worked(self) -> None:
        """A fetch brought its bytes."""
        if self.trouble is not None:
            log.warning("%s answers again", self.remote)
        self.trouble = None

    def health(self) -> Health:
        """How its remote does. "degraded": it does not answer; "refused": it gave a final answer, such as
        another version of the image. What is cached stays readable."""
        return self.fetcher.health()


class Base(Filled):
    """An open base layer. All devices that show the same image share one, and so fetch and store it once."""

    def __init__(self, layer: Layer, image: RawImage, fetcher: Fetcher) -> None:
        super().__init__(layer, fetcher)
        self.image = image

    async def aclose(self) -> None:
        await self.image.source.aclose()
