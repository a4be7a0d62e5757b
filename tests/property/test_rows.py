"""Rows of the index, as damage or another program could have left them: the engine takes a row exactly when
the runnable invariants find nothing wrong with it beside those that it has taken before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from hypothesis import example, given
from hypothesis import strategies as st

from tests.property.effort import effort
from tierblk.cache.invariants import LayerRows, check
from tierblk.cache.rows import NO_ENTRY, Entry, pack_row
from tierblk.core import BLOCK_BYTES, ENTRIES_PER_ROW, Engine, Layer, map_bytes

SLOTS = 6
# Two rows and a bit of a third, which ends within a block; and a layer of one row.
SIZES = {1: 129 * BLOCK_BYTES + 5 * 512, 2: 3 * BLOCK_BYTES}

_masks = st.sampled_from([0, 0, 0, 1, 2, 3, 0x8000, 0xFFFF])
_entries = st.builds(
    Entry, slot=st.integers(0, SLOTS), present=_masks, cached=_masks, zero=_masks, dirty=_masks
)
_likely = st.tuples(st.integers(1, SLOTS - 1), st.sampled_from([1, 3, 0xFFFF])).map(
    lambda drawn: Entry(drawn[0], present=drawn[1], cached=drawn[1])
)
_rows = st.tuples(
    st.sampled_from(sorted(SIZES)),
    st.integers(0, 3),
    st.dictionaries(st.sampled_from([0, 1, 2, 3, 63]), st.one_of(_likely, _entries), max_size=3),
    st.one_of(st.none(), st.none(), st.integers(0, 771)),  # a byte that was changed
)
Written = tuple[int, int, dict[int, Entry], int | None]


@contextmanager
def empty_engine() -> Iterator[tuple[Engine, dict[int, Layer]]]:
    """An engine with the layers of SIZES, before its first row."""
    with ExitStack() as stack:
        files = []
        for size in (SLOTS * BLOCK_BYTES, SLOTS * 64, *map(map_bytes, SIZES.values())):
            files.append(stack.enter_context(tempfile.TemporaryFile()))
            os.truncate(files[-1].fileno(), size)
        slots_fd, sums_fd, *map_fds = (file.fileno() for file in files)
        engine = Engine(slots_fd=slots_fd, slot_count=SLOTS, sums_fd=sums_fd, staging_bytes=BLOCK_BYTES)
        stack.callback(engine.close)
        opened = zip(SIZES, map_fds, strict=True)
        yield (
            engine,
            {
                layer_id: engine.open_layer(layer_id, fd, SIZES[layer_id], kind="local")
                for layer_id, fd in opened
            },
        )


def taken_from(rows: dict[tuple[int, int], bytes]) -> list[LayerRows]:
    return [
        LayerRows(
            layer_id, "volume", size, {row: packed for (of, row), packed in rows.items() if of == layer_id}
        )
        for layer_id, size in SIZES.items()
    ]


@effort(examples=80, steps=1)
@given(st.lists(_rows, min_size=1, max_size=4))
@example([(1, 0, {0: Entry(1, 1, 1)}, None), (1, 1, {0: Entry(1, 1, 1)}, None)])  # I4: across rows
@example([(1, 0, {3: Entry(2, 3, 3)}, None), (2, 0, {1: Entry(2, 1, 1)}, None)])  # I4: across layers
@example([(1, 0, {0: Entry(1, 1, 1, 1)}, None)])  # R2
@example([(1, 0, {0: Entry(1, 1)}, None)])  # R2
@example([(1, 0, {0: Entry(1, 0, 1, 0, 1)}, None)])  # I3
@example([(1, 0, {0: Entry(1, 0, 1)}, None)])  # I3
@example([(1, 0, {0: Entry(1, 1, 1)}, 700)])  # R9
def test_the_engine_takes_what_the_invariants_allow(written: list[Written]) -> None:
    with empty_engine() as (engine, layers):
        taken: dict[tuple[int, int], bytes] = {}
        for layer_id, row, entries, damage in written:
            if (layer_id, row) in taken:
                continue
            packed = pack_row([entries.get(i, NO_ENTRY) for i in range(ENTRIES_PER_ROW)])
            if damage is not None:
                packed = packed[:damage] + bytes([packed[damage] ^ 1]) + packed[damage + 1 :]
            allowed = row < layers[layer_id].rows and not check(
                taken_from({**taken, (layer_id, row): packed}), SLOTS
            )
            try:
                layers[layer_id].load_row(row, packed)
            except ValueError:
                assert not allowed, f"row {row} of layer {layer_id} was refused: {entries}"
            else:
                assert allowed, f"row {row} of layer {layer_id} was taken: {entries}, damage {damage}"
                taken[layer_id, row] = packed
        engine.finish_load()
        held = {entry.slot for *_, entries, _ in written for entry in entries.values() if entry.slot}
        assert engine.free_slots() >= SLOTS - 1 - len(held)
        for layer_id, layer in layers.items():
            for row in range(layer.rows):
                kept = taken.get((layer_id, row), b"")
                assert (
                    layer.peek_row(row) in (kept, b"") if not any(kept[:768]) else layer.peek_row(row) == kept
                )
