"""How a volume's upload gets on: what is dirty, what is being sent, how fast, and how long that will take.
Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tierblk.cli.top_counters import Since, number, opt_number, text

WINDOW_S = 30.0
"""Objects of 16 MiB arrive whole: the speed is taken over as much time of uploading."""


@dataclass(frozen=True, slots=True)
class Upload:
    """Of one volume. state: "clean", "waits" (for its epoch to begin), "sending", "stuck" or "fenced".
    sealed_bytes: of the epoch under way, sent_bytes of them are in the store. bytes_per_s: of pages, before
    compression, while it was uploading lately. drained_in_s: at that speed."""

    url: str
    state: str
    epoch: int
    dirty_bytes: int
    dirty_s: float | None
    fullness: float | None
    sealed_bytes: int
    sent_bytes: int
    sending_requests: int
    bytes_per_s: float | None
    put_bytes_per_s: float | None
    drained_in_s: float | None
    trouble: str | None
    trouble_s: float | None
    next_try_s: float | None
    durability: str | None


class UploadMeter:
    """Of one volume, from sample to sample."""

    def __init__(self) -> None:
        self._sent: deque[tuple[float, float]] = deque()  # (seconds of uploading, bytes)

    def measure(self, since: Since, unix_s: float) -> Upload:
        """since: the volume's documents. unix_s: when the later one was made."""
        now = since.now
        dirty_bytes, sealed, sent = (
            int(number(now, key)) for key in ("dirty_bytes", "sealed_bytes", "sent_bytes")
        )
        speed = self._speed(since)
        left_bytes = max(0, dirty_bytes - sent)
        dirty_since, trouble_since = opt_number(now, "dirty_since"), opt_number(now, "trouble_since")
        trouble, fenced = text(now, "trouble"), text(now, "fenced")
        if fenced:
            state = "fenced"
        elif trouble:
            state = "stuck"
        elif now.get("uploading"):
            state = "sending"
        else:
            state = "waits" if dirty_bytes else "clean"
        moves = bool(speed) and state in ("sending", "waits")
        return Upload(
            url=text(now, "url") or "?",
            state=state,
            epoch=int(number(now, "epoch")),
            dirty_bytes=dirty_bytes,
            dirty_s=max(0.0, unix_s - dirty_since) if dirty_bytes and dirty_since is not None else None,
            fullness=opt_number(now, "fullness"),
            sealed_bytes=sealed,
            sent_bytes=min(sent, sealed),
            sending_requests=int(number(now, "sending")),
            bytes_per_s=speed,
            put_bytes_per_s=since.rate("put_bytes"),
            drained_in_s=left_bytes / speed if moves and speed else None,
            trouble=fenced or trouble,
            trouble_s=None if trouble_since is None else max(0.0, unix_s - trouble_since),
            next_try_s=opt_number(now, "next_try_s"),
            durability=text(now, "durability"),
        )

    def _speed(self, since: Since) -> float | None:
        """None: nothing is being uploaded, or nothing has arrived yet."""
        grown = since.grown("uploaded_bytes")
        if grown is None:
            self._sent.clear()
            return None
        assert since.before is not None
        if not (grown or since.now.get("uploading") or since.before.get("uploading")):
            return None
        self._sent.append((since.elapsed_s, grown))
        while len(self._sent) > 1 and sum(s for s, _ in self._sent) - self._sent[0][0] >= WINDOW_S:
            self._sent.popleft()
        total_s, total_bytes = (sum(column) for column in zip(*self._sent, strict=True))
        return total_bytes / total_s if total_bytes else None
