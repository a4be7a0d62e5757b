"""A base as a running daemon has it: its block map, and the image behind it. Its truth is the image (DESIGN
2)."""

from __future__ import annotations

import logging
import time

from tierblk.core import Layer
from tierblk.errors import RemoteRefused, TierblkError
from tierblk.remote import Fetcher, RawImage

log = logging.getLogger(__name__)


class Base:
    """An open base layer. All devices that show the same image share one, and so fetch and store it once."""

    def __init__(self, layer: Layer, image: RawImage, fetcher: Fetcher) -> None:
        self.layer = layer
        self.image = image
        self.fetcher = fetcher
        self.devices = 0
        self.trouble: TierblkError | None = None
        self.trouble_since: float | None = None

    def failed(self, error: TierblkError) -> None:
        """A fetch was given up. Said once per trouble, not once per block."""
        if self.trouble is None:
            log.warning("%s; reads of what is not cached fail until it is back", error)
            self.trouble_since = time.time()
        self.trouble = error

    def worked(self) -> None:
        """A fetch brought its bytes."""
        if self.trouble is not None:
            log.warning("%s answers again", self.image.identity.url)
        self.trouble = self.trouble_since = None

    def state(self) -> tuple[str, str | None]:
        """(state, reason) for people: "ok"; "degraded" while the remote does not answer; "refused" when it
        gave a final answer, such as another version of the image: what is cached stays readable."""
        if self.trouble is None:
            return "ok", None
        return ("refused" if isinstance(self.trouble, RemoteRefused) else "degraded"), str(self.trouble)

    async def aclose(self) -> None:
        await self.image.source.aclose()
