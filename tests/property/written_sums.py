"""Which pages of a volume have sums, and whether these are of what is in the slots (R9)."""

from __future__ import annotations

from tests.property.host import Host
from tierblk.cache.pagecheck import bad_pages
from tierblk.cache.rows import Entry, entries_of
from tierblk.cache.summed import mask_of, room_for
from tierblk.core import BLOCK_BYTES, ENTRIES_PER_ROW, Engine, Layer


def entries(engine: Engine, volume: Layer) -> list[tuple[int, Entry]]:
    """(block, entry) of all with a slot, and with what the core says of the sums of dirty pages; while no
    call is under way."""
    masks, found = room_for(engine.slot_count), []
    volume.save_summed(masks)
    for row in range(volume.rows):
        for block, entry in enumerate(entries_of(volume.peek_row(row)), row * ENTRIES_PER_ROW):
            if entry.slot:
                found.append((block, entry._replace(summed=mask_of(masks, entry.slot))))
    return found


def that_do_not_fit(engine: Engine, volume: Layer, disk: Host) -> list[str]:
    """Of clean pages, and of dirty ones that have any."""
    slots, sums = (disk.content(name) for name in ("slots", "sums"))
    found = []
    for block, entry in entries(engine, volume):
        data = memoryview(slots)[entry.slot * BLOCK_BYTES : (entry.slot + 1) * BLOCK_BYTES]
        pages = entry.checkable if volume.kind == "write-back" else entry.summed
        if bad := bad_pages(data, sums[entry.slot * 64 : (entry.slot + 1) * 64], pages):
            found.append(f"R9: sums of pages {bad:#x} of block {block} of layer {volume.layer_id}")
    return found
