"""The engine's Python face: typed wrappers over the C core, and the only place that sees a negative errno.

Python names layers, blocks and staging offsets; C owns tags, masks, slots and bytes (DESIGN 4). All calls
belong to the event loop's thread, but for those that say otherwise."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tierblk.core._core import ffi, lib
from tierblk.core.calls import check, counters
from tierblk.core.doors import FOR_EVER_MS, Door, LocalDoor, UblkDoor, local_door
from tierblk.core.traces import Trace, Traced, ticks_now

__all__ = [
    "Door",
    "Engine",
    "Layer",
    "LocalDoor",
    "Record",
    "Sealed",
    "Trace",
    "Traced",
    "UblkDoor",
    "check",
    "local_door",
    "ticks_now",
]

PAGE_BYTES: int = lib.TB_PAGE_BYTES
BLOCK_BYTES: int = lib.TB_BLOCK_BYTES
PAGES_PER_BLOCK: int = lib.TB_BLOCK_PAGES
ENTRIES_PER_ROW: int = lib.TB_ROW_ENTRIES
ROW_BYTES: int = lib.TB_ROW_BYTES
MAP_HEADER_BYTES: int = lib.TB_MAP_HEADER_BYTES
ROW_GONE: int = lib.TB_ROW_GONE
RECORD_ENTRY_BYTES: int = lib.TB_RECORD_ENTRY
MAX_LAYERS: int = lib.TB_MAX_LAYERS
MAX_TAGS: int = lib.TB_MAX_TAGS

MISS: int = lib.TB_EV_MISS
FILLED: int = lib.TB_EV_FILLED
NEED_SPACE: int = lib.TB_EV_NEED_SPACE
EVICTED: int = lib.TB_EV_EVICTED
WAITED: int = lib.TB_EV_WAITED
READ_ON: int = lib.TB_EV_READ_ON
LEFT: int = lib.TB_EV_LEFT
FLUSH: int = lib.TB_EV_FLUSH
FILL: int = lib.TB_CMD_FILL
FAIL: int = lib.TB_CMD_FAIL
EVICT: int = lib.TB_CMD_EVICT
PREFETCH: int = lib.TB_CMD_PREFETCH
GIVE_UP: int = lib.TB_CMD_GIVE_UP

FILL_PART: int = lib.TB_FILL_PART
FILL_WHOLE: int = lib.TB_FILL_WHOLE
FILL_WHOLE_MORE: int = lib.TB_FILL_WHOLE_MORE

_RECORD = struct.Struct("<HHIQQiI")
_SEALED = struct.Struct("<QIHH")
_POLL_BATCH = 256


class Record(NamedTuple):
    """One event or command of the rings (cdef.h, tb_record); which fields count depends on `kind`."""

    kind: int
    layer: int = 0
    token: int = 0
    block: int = 0
    value: int = 0
    result: int = 0
    pages: int = 0


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-32C of `data`, continued from `crc`."""
    return int(lib.tb_crc32c(ffi.from_buffer(data), len(data), crc))


def page_sums(block: memoryview, pages: int) -> bytes:
    """The crc32c, u32 each, of the pages of a block in memory that the mask names; zeros in the places of the
    others. From any thread."""
    assert block.nbytes == BLOCK_BYTES
    sums = bytearray(PAGES_PER_BLOCK * 4)
    lib.tb_crc32c_pages(ffi.from_buffer("uint8_t[]", block), pages, ffi.from_buffer("uint32_t[]", sums))
    return bytes(sums)


def map_bytes(size_bytes: int) -> int:
    """Length of the map file of a layer of `size_bytes`: a header page, then 32 bytes a block, in whole
    pages."""
    entries = -(-size_bytes // BLOCK_BYTES) * 32
    return MAP_HEADER_BYTES + -(-entries // PAGE_BYTES) * PAGE_BYTES


class Engine:
    """Slots, staging memory and the filler thread of one cache directory.

    `slots_fd` holds `slot_count` slots of 64 KiB (slot 0 is the superblock), `sums_fd` 64 bytes a slot; both
    stay the caller's to close, after `close`. `dio_align_bytes` is what O_DIRECT on `slots_fd` asks of
    offsets and lengths. Order of use: the constructor, `open_layer` and `Layer.load_row` or `warm_start` for
    every layer, `quarantine`, `finish_load`, which starts the filler. Raises OSError."""

    def __init__(
        self, *, slots_fd: int, slot_count: int, sums_fd: int, staging_bytes: int, dio_align_bytes: int = 512
    ) -> None:
        out = ffi.new("tb_engine **")
        rc = lib.tb_engine_new(slots_fd, slot_count, sums_fd, staging_bytes, dio_align_bytes, out)
        check(rc, "cannot make the engine (io_uring, memory)")
        self._engine = out[0]
        self._events = ffi.new("tb_record[]", _POLL_BATCH)
        self._events_view = memoryview(ffi.buffer(self._events))
        self.slot_count = slot_count
        self.staging = memoryview(ffi.buffer(lib.tb_engine_staging(self._engine), staging_bytes))
        self.event_fd: int = lib.tb_engine_event_fd(self._engine)
        self.layers: dict[int, Layer] = {}

    @property
    def handle(self) -> Any:
        """The C engine, for the doors."""
        if self._engine is None:
            raise ValueError("the engine is closed")
        return self._engine

    def open_layer(self, layer_id: int, map_fd: int, size_bytes: int, *, kind: str = "base") -> Layer:
        """Maps a layer's block map; `map_fd` has to stay open until the engine is closed. kind: "base",
        "local", "scratch" or "write-back". Raises OSError."""
        out = ffi.new("tb_layer **")
        rc = lib.tb_layer_open(self.handle, layer_id, map_fd, size_bytes, _KINDS[kind], out)
        check(rc, f"cannot map layer {layer_id}")
        layer = Layer(layer_id, out[0], size_bytes, kind)
        self.layers[layer_id] = layer
        return layer

    def quarantine(self, slot: int) -> None:
        """Keeps a slot that only the index names from use until the next commit; before `finish_load`
        (R8)."""
        check(lib.tb_slots_quarantine(self.handle, slot), f"cannot quarantine slot {slot}")

    def finish_load(self) -> None:
        """Every layer is loaded: slots that nobody names are free (R8), and the filler starts."""
        check(lib.tb_slots_finish_load(self.handle), "cannot build the free list")
        check(lib.tb_engine_start(self.handle), "cannot start the filler thread")

    def set_low(self, free_slots: int) -> None:
        """NEED_SPACE is said when fewer slots are free."""
        lib.tb_engine_set_low(self.handle, free_slots)

    def poll(self) -> list[Record]:
        """All events that wait, oldest first, when `event_fd` is readable. A list, and no generator: one that
        a caller's exception ends half-way would leave events without another wake-up."""
        events: list[Record] = []
        count = _POLL_BATCH
        while count == _POLL_BATCH:
            count = lib.tb_engine_poll(self.handle, self._events, _POLL_BATCH)
            events += map(Record._make, _RECORD.iter_unpack(self._events_view[: count * _RECORD.size]))
        return events

    def push(self, commands: Iterable[Record]) -> None:
        """Hands a batch of commands over. Raises OSError EAGAIN if they do not fit, which a caller that sends
        at most one FILL per page of staging memory cannot meet."""
        packed = b"".join(_RECORD.pack(*command) for command in commands)
        if packed:
            records = ffi.from_buffer("tb_record[]", packed)
            check(
                lib.tb_engine_push(self.handle, records, len(packed) // _RECORD.size), "command ring is full"
            )

    def commit_begin(self) -> None:
        """R6, step 1, before the rows are taken: slots freed from now on wait for the next commit."""
        lib.tb_slots_commit_begin(self.handle)

    def commit_taken(self) -> int:
        """R6, step 1 is over, every row is taken: the number of the last record of the journal that says
        nothing which the copies do not."""
        return int(lib.tb_commit_taken(self.handle))

    def open_journal(self, fd: int, offset_bytes: int, ring_bytes: int, session: int) -> None:
        """FLUSHes go to the ring in that file from now on, and wait for no commit while there is room. Before
        the first door; `fd`, opened as the slots file is, stays open until `close`. OSError."""
        rc = lib.tb_journal_open(self.handle, fd, offset_bytes, ring_bytes, session)
        check(rc, "cannot use the journal")

    def commit_end(self, ok: bool) -> None:
        """R6, step 4: slots freed before `commit_begin` are free now, or go on waiting when not `ok` (R7)."""
        lib.tb_slots_commit_end(self.handle, ok)

    def take_flushes(self) -> Flushes:
        """The FLUSHes and FUA writes that wait for a commit, at FLUSH. The next whole cycle that begins after
        this call is for them; it is to be told with `end_flushes`, whatever came of it."""
        return Flushes(lib.tb_flush_take(self.handle))

    def end_flushes(self, flushes: Flushes, *, error: int = 0) -> None:
        """They are durable, or end in that errno."""
        lib.tb_flush_done(flushes.handle, -error)

    def fail_flushes(self) -> None:
        """A sync has failed: every FLUSH and FUA ends in EIO from now on, until the next start (R7)."""
        lib.tb_flush_fail(self.handle)

    def flushes_failed(self) -> bool:
        """A sync has failed, here or in C."""
        return bool(lib.tb_flush_failed(self.handle))

    def no_space(self, error: int) -> None:
        """Writes that wait for a slot end in that errno: none can be freed for them. 0: they look again."""
        lib.tb_no_space(self.handle, -error)

    def set_reserve(self, slots: int) -> None:
        """So many free slots are only for moves of sealed blocks (R14)."""
        lib.tb_engine_set_reserve(self.handle, slots)

    def set_pace(self, blocks_per_s: float | None) -> None:
        """From now on writes take so many new slots a second at most; None: as many as they like."""
        lib.tb_engine_set_pace(self.handle, round(1e9 / blocks_per_s) if blocks_per_s else 0)

    def stats(self) -> dict[str, int]:
        """Counters and levels of tb_cache_stats, in slots, blocks and writes."""
        out = ffi.new("tb_cache_stats *")
        lib.tb_engine_stats(self.handle, out)
        return counters(out)

    def trim_staging(self) -> None:
        """Gives the memory behind `staging` back to the system, while none of it is lent."""
        lib.tb_engine_trim_staging(self.handle)

    def set_watchdog(self, limit_s: float) -> None:
        """Without a `beat` for this long while requests wait, the process is ended by SIGABRT; 0: never."""
        lib.tb_engine_set_watchdog(self.handle, min(round(limit_s * 1000), FOR_EVER_MS - 1))

    def beat(self) -> None:
        """The event loop lives; to be called about once a second."""
        lib.tb_engine_beat(self.handle)

    def tick_s(self) -> float:
        """How long a tick of `Door.latencies` is, seconds."""
        return float(lib.tb_engine_tick_ns(self.handle)) / 1e9

    def free_slots(self) -> int:
        return self.stats()["free"]

    def quarantined_slots(self) -> int:
        return self.stats()["quarantined"]

    def close(self) -> None:
        """Waits for slot writes in flight, ends the filler, unmaps the layers. Raises OSError EBUSY with an
        open door."""
        if self._engine is None:
            return
        check(lib.tb_engine_free(self._engine), "a door is still open")
        self._engine = None
        self.layers.clear()


class Flushes(NamedTuple):
    """FLUSHes that were taken together, of C."""

    handle: Any


class Sealed(NamedTuple):
    """A block as it was at the seal: pages that were dirty (page 0 lowest), those of them that are zeros, and
    the slot that has the others, 0 for none."""

    block: int
    slot: int
    dirty: int
    zero: int


class Layer:
    """The block map of one layer; made by `Engine.open_layer`, valid until the engine is closed."""

    def __init__(self, layer_id: int, handle: Any, size_bytes: int, kind: str) -> None:
        self.layer_id = layer_id
        self.kind = kind
        self.handle = handle
        self.size_bytes = size_bytes
        self.blocks = -(-size_bytes // BLOCK_BYTES)
        self.rows = -(-self.blocks // ENTRIES_PER_ROW)

    def load_row(self, row: int, packed: bytes, *, drop_clean: bool = False) -> None:
        """Takes a row of the index whole, or nothing of it: ValueError for a bad checksum or length, masks
        that cannot be, a slot out of range or already owned (R2, I3, I4, R9). OSError ENOSPC when the map's
        tmpfs is full. drop_clean: only its dirty pages, of a volume after an unclean start (DESIGN 5)."""
        rc = lib.tb_layer_load_row(self.handle, row, packed, len(packed), drop_clean)
        if rc in (-_EBADMSG, -_EINVAL):
            why = "bad checksum or length" if rc == -_EBADMSG else "masks or slots that cannot be"
            raise ValueError(f"row {row} of layer {self.layer_id}: {why}")
        check(rc, f"row {row} of layer {self.layer_id}")

    def seal(self) -> None:
        """What the volume is now can be collected until `end_epoch` (R10). OSError EBUSY: one is sealed."""
        check(lib.tb_epoch_seal(self.handle), f"layer {self.layer_id}")

    def collect(self, map_pages: int) -> bool | None:
        """Goes on with finding what is sealed. True: all is found; False: not yet; None: not before a write
        that is under way has ended."""
        rc = lib.tb_epoch_collect(self.handle, map_pages)
        if rc == -_EAGAIN:
            return None
        check(rc, f"layer {self.layer_id}")
        return bool(rc == 0)

    def sealed(self, most: int) -> list[Sealed]:
        """Some of what was found, each block once; [] when there is no more. Not before `collect` has said
        True."""
        out = ffi.new("tb_sealed[]", most)
        count = lib.tb_epoch_take(self.handle, out, most)
        packed = ffi.buffer(out, count * _SEALED.size)
        return list(map(Sealed._make, _SEALED.iter_unpack(packed)))

    def read_sealed(self, blocks: Sequence[Sealed], buffer: memoryview) -> tuple[int, bytes]:
        """The dirty pages of these blocks that are no zeros, one behind the other, into the buffer, whose
        memory is page-aligned. (How many pages, their crc32c as u32 each). From any thread; it blocks.
        OSError: the SSD's, or ENOBUFS."""
        sums = ffi.new("uint32_t[]", len(blocks) * PAGES_PER_BLOCK)
        memory = ffi.from_buffer("uint8_t[]", buffer, require_writable=True)
        pages = lib.tb_epoch_read(self.handle, _items(blocks), len(blocks), memory, buffer.nbytes, sums)
        check(pages, f"sealed blocks of layer {self.layer_id}")
        return pages, bytes(ffi.buffer(sums, pages * 4))

    def unfit(self, blocks: Sequence[Sealed], sums: bytes) -> list[tuple[int, int]]:
        """(block, mask) of pages that had sums and are not what was written. sums: as `read_sealed` gave them
        for the same blocks. From any thread; it blocks."""
        bad, made = ffi.new("uint16_t[]", len(blocks)), ffi.from_buffer("uint32_t[]", sums)
        lib.tb_epoch_check(self.handle, _items(blocks), len(blocks), made, bad)
        return [(block.block, int(bad[i])) for i, block in enumerate(blocks) if bad[i]]

    def clean(self, blocks: Sequence[Sealed], sums: bytes | None = None) -> None:
        """They are in the store: what was not changed since is not dirty any more (I8, R13). sums: as
        `read_sealed` gave them for the same blocks; kept for what stays cached."""
        kept = ffi.NULL if sums is None else ffi.from_buffer("uint32_t[]", sums)
        lib.tb_epoch_clean(self.handle, _items(blocks), len(blocks), kept)

    def end_epoch(self) -> None:
        """With its record or without. Slots that only it had wait for a commit."""
        lib.tb_epoch_end(self.handle)

    def become(self, kind: str) -> None:
        """An empty volume that no door shows begins another life, as "local" or "scratch". OSError EBUSY."""
        check(lib.tb_layer_set_kind(self.handle, _KINDS[kind]), f"layer {self.layer_id}")
        self.kind = kind

    def lose_row(self, row: int) -> None:
        """A volume's row that cannot be believed: its pages are errors until each is written anew (R9).
        OSError ENOSPC."""
        check(lib.tb_layer_bad_row(self.handle, row), f"row {row} of layer {self.layer_id}")

    def clear(self, first_block: int, map_pages: int) -> int | None:
        """Takes everything from a volume that no door shows, so many pages of the map at once; the block to
        go on from, None when all is gone. The slots wait for a commit. OSError EBUSY."""
        block = ffi.new("uint64_t *", first_block)
        left = check(lib.tb_layer_clear(self.handle, block, map_pages), f"layer {self.layer_id}")
        return int(block[0]) if left else None

    def warm_start(self) -> int:
        """R1: the map file is the truth. Returns how many entries hold something; ValueError when a dirty
        page's entry cannot be right."""
        kept = int(lib.tb_layer_warm_start(self.handle))
        if kept == -_EILSEQ:
            raise ValueError(f"the map of layer {self.layer_id} is damaged where pages are dirty")
        return check(kept, f"map of layer {self.layer_id}")

    def take_changed(self, max_rows: int) -> list[tuple[int, bytes]]:
        """R6, step 1: (row, packed copy) of up to `max_rows` changed rows, no longer counted as changed; b""
        for a row that holds nothing. Fewer than `max_rows`: none is left."""
        rows = ffi.new("uint64_t[]", max_rows)
        packed = ffi.new("uint8_t[]", max_rows * ROW_BYTES)
        count = lib.tb_layer_take_changed(self.handle, rows, packed, max_rows)
        view = ffi.buffer(packed)
        taken = []
        for i in range(count):
            row = int(rows[i])
            gone = bool(row & ROW_GONE)
            taken.append((row & ~ROW_GONE, b"" if gone else view[i * ROW_BYTES : (i + 1) * ROW_BYTES]))
        return taken

    def put_back(self, rows: Iterable[int]) -> None:
        """R7: these rows, taken for a cycle that failed, are changed again."""
        for row in rows:
            check(lib.tb_layer_put_back(self.handle, row), f"row {row}")

    def changed(self) -> bool:
        return bool(lib.tb_layer_changed(self.handle))

    def peek_row(self, row: int) -> bytes:
        """The row as it is now, packed; b"" when it holds nothing."""
        packed = ffi.new("uint8_t[]", ROW_BYTES)
        return (
            bytes(ffi.buffer(packed))
            if check(lib.tb_layer_peek_row(self.handle, row, packed), "row")
            else b""
        )

    def page_sums(self, block: int) -> tuple[int, tuple[int, ...]]:
        """(cached mask, 16 kept checksums) of a block; a sum counts only where the mask has its page."""
        sums = ffi.new("uint32_t[]", PAGES_PER_BLOCK)
        mask = check(lib.tb_layer_page_sums(self.handle, block, sums), "block")
        return mask, tuple(int(value) for value in sums)

    def find_unsummed(self, first_block: int, map_pages: int, most: int) -> tuple[list[int], int | None]:
        """Goes over so many pages of the map and meets the blocks whose dirty pages have no sums: ([those
        that nobody has written to since they were met the last time, at most `most`], the block to go on
        from, None at the end)."""
        at, out = ffi.new("uint64_t *", first_block), ffi.new("uint64_t[]", most)
        count = lib.tb_sums_find(self.handle, at, map_pages, out, most)
        left = int(at[0])
        return [int(out[i]) for i in range(count)], left if left < self.blocks else None

    def make_sums(self, block: int, memory: memoryview) -> bool:
        """Reads the dirty pages of a block that was found and keeps their sums; False: somebody is at it.
        memory: one block, page-aligned. From any thread, it blocks; not beside `clear`. OSError: the disk's.
        """
        buffer = ffi.from_buffer("uint8_t[]", memory, require_writable=True)
        return bool(check(lib.tb_sums_make(self.handle, block, buffer), f"block {block}"))

    def save_summed(self, masks: bytearray) -> None:
        """Of each of a volume's slots the mask of its dirty pages that have sums, a u16 at the slot's place;
        masks has room for all slots. While no call is under way."""
        lib.tb_sums_save(self.handle, ffi.from_buffer("uint16_t[]", masks, require_writable=True))

    def load_summed(self, masks: bytes) -> None:
        """The same again behind a clean end, before a door is opened."""
        lib.tb_sums_load(self.handle, ffi.from_buffer("uint16_t[]", masks), len(masks) // 2)

    def unsummed_blocks(self) -> int:
        """How many blocks have dirty pages without sums."""
        return int(lib.tb_sums_lacking(self.handle))

    def drop(self, block: int, pages: int = 0xFFFF) -> int | None:
        """Those pages of a block that are cached, clean, and somebody else's too are not cached any more: how
        many they were, or None when the block is in use at the moment. Their slots wait for a commit."""
        count = int(lib.tb_layer_drop(self.handle, block, pages))
        return None if count == -_EBUSY else check(count, f"block {block} of layer {self.layer_id}")

    def pin(self, block: int, pinned: bool) -> None:
        """Eviction passes it by, cached or not yet, as long as the engine runs. OSError ENOSPC."""
        check(lib.tb_layer_pin(self.handle, block, pinned), f"block {block} of layer {self.layer_id}")

    def cached_pages(self) -> int:
        return int(lib.tb_layer_cached_pages(self.handle))

    def dirty_pages(self) -> int:
        """Of a volume: pages that are nowhere else."""
        return int(lib.tb_layer_dirty_pages(self.handle))

    def learn(self, blocks: Sequence[Sealed]) -> None:
        """The store has these pages (`dirty`, `zero`; `slot` does not count): what is cached of them and
        clean is older and goes, what is dirty stays. OSError ENOSPC: the map's tmpfs is full."""
        check(lib.tb_layer_learn(self.handle, _items(blocks), len(blocks)), f"layer {self.layer_id}")

    def mark_all(self) -> None:
        """The next commit writes every row, so that the index is exact."""
        lib.tb_layer_mark_all(self.handle)

    def refuse(self, error: int) -> None:
        """From now on no write, discard, FLUSH or FUA of it is acknowledged, but ends in that errno (R19);
        0: they are again."""
        lib.tb_layer_refuse(self.handle, error)

    def flush_far(self, far: bool) -> None:
        """Whether a FLUSH waits for the store: FLUSH with this layer is said then, see `far_count`."""
        lib.tb_layer_flush_far(self.handle, far)

    def far_count(self) -> int:
        """At FLUSH with this layer: an epoch that is sealed from now on covers so many of its FLUSHes."""
        return int(lib.tb_far_count(self.handle))

    def far_done(self, upto: int, *, error: int = 0) -> None:
        """The FLUSHes up to that count are in the store, or end in that errno."""
        lib.tb_far_done(self.handle, upto, -error)


def _items(blocks: Sequence[Sealed]) -> Any:
    """tb_sealed[], in one copy."""
    return ffi.from_buffer("tb_sealed[]", b"".join(_SEALED.pack(*block) for block in blocks))


_EAGAIN, _EBUSY, _EINVAL, _EBADMSG, _EILSEQ = 11, 16, 22, 74, 84
_KINDS: dict[str, int] = {
    "base": lib.TB_LAYER_BASE,
    "local": lib.TB_LAYER_LOCAL,
    "scratch": lib.TB_LAYER_SCRATCH,
    "write-back": lib.TB_LAYER_WRITE_BACK,
}
