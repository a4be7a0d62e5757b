"""What has come to be in the store of test_writeback.py, read by an independent reader: each epoch's content,
held against what its cut has to have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.property.far_host import FarHost
from tests.property.far_model import VOLUME_BYTES, Cut
from tests.unit import volume_reader
from tierblk.core import PAGE_BYTES
from tierblk.remote import decode_record


class Objects(Mapping[str, bytes]):
    """A folder's, for the reader."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


class FarLog:
    """contents, writers, released, history: of each epoch. cuts: by attempt; None: a claim, which changes
    nothing."""

    def __init__(self, root: Path, birth: bytes) -> None:
        self._store = root
        self._objects: Any = Objects(root)
        self._names = set[str]()
        self.cuts: dict[bytes, Cut | None] = {}
        self.history: list[volume_reader.Volume] = []
        self.contents = [birth]
        self.writers, self.released = [b""], [True]

    def take_name(self, name: str) -> None:
        """An object was created."""
        assert name not in self._names, f"I15, R15: {name} was created twice"
        self._names.add(name)

    def read_log(self) -> None:
        """Epochs that came since are what their cuts say (I9)."""
        if not self.history:
            if not (self._store / "volume.json").exists():
                return
            self.history = [volume_reader.born(self._objects)]
        while (name := f"epoch/{len(self.history):016x}") in self._objects:
            data = self._objects[name]
            record = decode_record(data, name=name)
            before = self.history[-1]
            now = volume_reader.apply(data, self.history)
            self.history.append(now)
            changed = {
                page: place for page, place in now.pages.items() if place is None or place.epoch == now.epoch
            }
            delta = volume_reader.Volume(now.uuid, now.epoch, now.hash, now.size, pages=changed)
            bytes_of = volume_reader.content(delta, self._objects, {})
            content = bytearray(self.contents[-1])
            for page in changed:
                at, end = page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, VOLUME_BYTES)
                content[at:end] = bytes_of[at:end]
            assert before.size in (0, now.size)
            self.contents.append(bytes(content))
            self.writers.append(record.writer)
            self.released.append(record.released)
            cut = self.cuts[record.attempt]
            if cut is None:
                assert self.contents[-1] == self.contents[-2], "a claim changes something"
            else:
                cut.check(self.contents[-1], now.epoch)

    @property
    def head(self) -> int:
        return len(self.contents) - 1

    def is_head_of(self, host: FarHost) -> bool:
        return self.head > 0 and self.writers[-1] == host.writer
