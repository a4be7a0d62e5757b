"""The index: what the cache knows durably, in LMDB. The only file that imports lmdb, the only one that sees
lmdb.Error.

    meta     format u32, uuid 16 bytes, session u64, clean u8, journal u64        (little endian)
    layers   layer id u32 big endian -> JSON of a LayerRecord
    rows     layer id u32, row u64, both big endian -> 772 bytes, see rows.py

One environment object per process, and nobody but py-lmdb may open it: a second copy of the library on the
same files corrupts readers. The lock of the cache directory guarantees the one; that C has its own table, the
other.

liblmdb trusts its file: what a damaged page says can end the process. So the file is first walked through by
py-lmdb's verifier, which only reads bytes, and is opened only when every page that can be reached is sound.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from uuid import UUID

import lmdb
from lmdb import verify

from tierblk import address
from tierblk.cache.filesystem import free_bytes, is_no_space
from tierblk.cache.superblock import FORMAT_VERSION
from tierblk.errors import CacheError
from tierblk.units import format_size

DATA_FILE = "data.mdb"
LAYER_ID_MAX = 4095

_U8, _U32, _U64 = struct.Struct("<B"), struct.Struct("<I"), struct.Struct("<Q")
_ID = struct.Struct(">I")
_ROW_KEY = struct.Struct(">IQ")
_BEGIN_ANEW = "remove the cache directory to begin with an empty one"

# The map is address space, not memory or disk: a page per slot, and more as soon as the tree needs it.
_MAP_BYTES_LEAST = 1 << 30
_MAP_BYTES_PER_SLOT = 4096
# The file grows by fallocate before a transaction, so that a full disk is met here and not in the middle of a
# commit: to what the transaction may need at most and a reserve, in whole steps. What it did not need is
# given back afterwards.
_GROW_BYTES = 1 << 20
_RESERVE_BYTES = 512 << 10
_OTHER_PAGES = 16

_log = logging.getLogger(__name__)

Rows = Mapping[int, Iterable[tuple[int, bytes]]]


@dataclass(frozen=True, slots=True)
class Meta:
    """What the index says of itself: whose it is, its last session, and whether that ended in order.

    journaled: the last record of that session's journal that it knows more than; None: there was no journal.
    """

    uuid: UUID
    session: int
    clean: bool
    journaled: int | None = None


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer as the index knows it.

    A base's identity is url, size and validator: another image is another layer. A volume, kind "local" or
    "scratch", goes by its name; url, base_size_bytes and validator are those of the base that it lies over,
    empty without one.
    """

    layer_id: int
    kind: str
    url: str
    size_bytes: int
    validator: str
    used_unix_s: int
    name: str = ""
    base_size_bytes: int = 0

    @property
    def is_volume(self) -> bool:
        return self.kind != "base"

    @property
    def shown(self) -> str:
        """For people, without what is secret in an address."""
        return f"the volume {self.name}" if self.is_volume else address.shown(self.url)

    @property
    def shown_base(self) -> str:
        """What a volume lies over, for people."""
        return address.shown(self.url) if self.url else "no base"

    @property
    def base(self) -> tuple[str, int, str] | None:
        """(url, size_bytes, validator) of the base under a volume."""
        return (self.url, self.base_size_bytes, self.validator) if self.is_volume and self.url else None

    def has_identity(self, url: str, size_bytes: int, validator: str) -> bool:
        """Whether it is the base layer of that image."""
        return self.kind == "base" and (self.url, self.size_bytes, self.validator) == (
            url,
            size_bytes,
            validator,
        )


def map_size_bytes(slot_count: int) -> int:
    """Address space for the index of a cache of that many slots."""
    return max(_MAP_BYTES_LEAST, slot_count * _MAP_BYTES_PER_SLOT)


def create_index(path: Path, uuid: UUID, slot_count: int) -> None:
    """Makes the index of a new cache directory in the new folder `path`. OSError or CacheError."""
    path.mkdir(mode=0o700)
    index = Index(path, slot_count)
    try:
        with index.changing(rows=0) as txn:
            txn.put(b"uuid", uuid.bytes, db=index.meta_db)
            index.put_session(txn, session=0, clean=True)
    finally:
        index.close()


def open_index(path: Path, uuid: UUID, slot_count: int, *, read_only: bool = False) -> Index:
    """The index of a cache directory, whose lock the caller has. CacheError when it is missing, damaged or of
    another cache. read_only: not a file of it is touched, and nothing can be changed."""
    data = path / DATA_FILE
    if not data.is_file():
        raise CacheError(f"the cache's index is missing: there is no {data}", _BEGIN_ANEW)
    try:
        faults = list(map(str, verify.verify(str(data))))  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        faults = [str(error)]
    except OSError as error:  # the disk's fault: nothing is known of the bytes
        raise CacheError(f"the cache's index {data} cannot be read: {error.strerror}") from None
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise CacheError(f"the cache's index {data} is damaged: {faults[0]}{more}", _BEGIN_ANEW)
    index = Index(path, slot_count, read_only=read_only)
    try:
        found = index.meta().uuid
        if found != uuid:
            raise CacheError(
                f"the index in {path} belongs to another cache ({found}, not {uuid})", _BEGIN_ANEW
            )
    except BaseException:
        index.close()
        raise
    return index


class Index:
    """An open index. Methods block. Changes may come from any thread; reading belongs to the opening."""

    def __init__(self, path: Path, slot_count: int, *, read_only: bool = False) -> None:
        self.path = path
        self._writing = Lock()  # also: the map grows only while no transaction runs
        self.broken: str | None = None  # why no change is accepted any more
        self._map_full = False
        with self._translated("opened"):
            self._env = lmdb.open(
                str(path),
                map_size=map_size_bytes(slot_count),
                max_dbs=8,
                mode=0o600,
                sync=True,
                metasync=True,
                readonly=read_only,
                lock=not read_only,
            )
        try:
            with self._translated("opened"):
                if not read_only:
                    self._env.reader_check()  # readers that were killed would hold old pages for ever
                self.meta_db = self._env.open_db(b"meta")
                self._layers_db = self._env.open_db(b"layers")
                self._rows_db = self._env.open_db(b"rows")
        except CacheError:
            self._env.close()
            raise

    def close(self) -> None:
        """No method may be called afterwards."""
        self._env.close()

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """lmdb.Error -> CacheError, here and nowhere else."""
        try:
            yield
        except lmdb.MapFullError:
            self._map_full = True
            raise CacheError(f"the cache's index {self.path} is full") from None
        except lmdb.ReadonlyError:
            raise CacheError(
                f"the cache's index {self.path} cannot be written: the filesystem or the file is read-only"
            ) from None
        except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.PanicError) as error:
            raise CacheError(f"the cache's index {self.path} is damaged: {error}", _BEGIN_ANEW) from None
        except lmdb.VersionMismatchError:
            raise CacheError(
                f"the cache's index {self.path} was made by another version of LMDB", _BEGIN_ANEW
            ) from None
        except lmdb.Error as error:
            raise CacheError(f"the cache's index {self.path} could not be {what}: {error}") from None

    @contextmanager
    def changing(self, rows: int) -> Iterator[lmdb.Transaction[bytes]]:
        """One synced transaction with room for that many rows: all of it or nothing.

        What fails before the commit itself leaves the index usable. A commit that fails may have lost bytes
        that a later sync would not report again, so from then on every change is refused (R7).
        """
        with self._writing:
            if self.broken is not None:
                raise CacheError(self.broken)
            self._grow(rows)
            with self._translated("changed"):
                txn = self._env.begin(write=True)
            try:
                with self._translated("changed"):
                    yield txn
            except BaseException:
                txn.abort()
                raise
            self._commit(txn)
            self._give_back()

    def _commit(self, txn: lmdb.Transaction[bytes]) -> None:
        try:
            txn.commit()
        except lmdb.MapFullError:  # found before anything is written
            self._map_full = True
            raise CacheError(f"the cache's index {self.path} is full") from None
        except lmdb.Error as error:
            self.broken = (
                f"the cache's index {self.path} could not be written ({error}); "
                "nothing more is recorded until the daemon is restarted"
            )
            raise CacheError(self.broken) from None

    def _room(self, rows: int) -> tuple[int, int]:
        """(bytes in use, bytes that a transaction which writes or deletes that many rows adds at most)."""
        with self._translated("read"), self._env.begin() as txn:
            tree, used = txn.stat(self._rows_db), self._env.info()["last_pgno"] + 1
        # It copies the pages that it changes, each row's path from the root and a neighbour that is merged
        # with, at most all; a leaf has two new rows at least; the rest is for the other trees and the list of
        # free pages.
        pages = tree["branch_pages"] + tree["leaf_pages"]
        more = min((tree["depth"] + 1) * rows, pages) + rows // 2
        more += (more + pages) // 128 + _OTHER_PAGES
        return used * tree["psize"], more * tree["psize"]

    def _grow(self, rows: int) -> None:
        """Room in the file, and in the map, for a transaction that writes or deletes that many rows."""
        needed_bytes = sum(self._room(rows))
        map_bytes = self._env.info()["map_size"]
        if self._map_full or needed_bytes > map_bytes:
            with self._translated("given more room"):
                self._env.set_mapsize(2 * max(needed_bytes, map_bytes))
            self._map_full = False
        path = self.path / DATA_FILE
        try:
            size_bytes = path.stat().st_size
            if size_bytes < needed_bytes + _RESERVE_BYTES:
                _allocate(path, _whole_steps(needed_bytes + _RESERVE_BYTES))
        except OSError as error:
            if is_no_space(error) and size_bytes >= needed_bytes:
                return  # what the reserve is for: to forget blocks needs no room on a full disk
            reason = error.strerror
            if is_no_space(error):
                reason = f"its disk is full, {format_size(free_bytes(self.path))} are free"
            raise CacheError(f"the cache's index {path} cannot grow: {reason}") from None

    def _give_back(self) -> None:
        """Cuts what a large transaction was given and did not need; the reserve stays. Never a page that was
        ever used: readers may have it mapped.
        """
        used_bytes, _ = self._room(rows=0)
        path = self.path / DATA_FILE
        keep_bytes = _whole_steps(used_bytes + _RESERVE_BYTES) + _GROW_BYTES
        try:
            if path.stat().st_size > keep_bytes:
                os.truncate(path, keep_bytes)
        except OSError as error:
            _log.warning("%s could not be cut: %s", path, error.strerror)

    def put_session(self, txn: lmdb.Transaction[bytes], session: int, clean: bool) -> None:
        """Part of a transaction: the session, of which no record is journaled, and whether it has ended in
        order.
        """
        txn.put(b"format", _U32.pack(FORMAT_VERSION), db=self.meta_db)
        txn.put(b"journal", _U64.pack(0), db=self.meta_db)
        txn.put(b"session", _U64.pack(session), db=self.meta_db)
        txn.put(b"clean", _U8.pack(clean), db=self.meta_db)

    def meta(self) -> Meta:
        """CacheError when the format is newer, or when what must be there is not."""
        with self._translated("read"), self._env.begin(db=self.meta_db) as txn:
            found = {key: txn.get(key, b"") for key in (b"format", b"uuid", b"session", b"clean")}
            journal = txn.get(b"journal")
        try:
            (version,) = _U32.unpack(found[b"format"])
            if version > FORMAT_VERSION:
                raise CacheError(
                    f"the index in {self.path} was made by a newer tierblk: its format is {version}, "
                    f"this version knows {FORMAT_VERSION}"
                )
            (session,), (clean,) = _U64.unpack(found[b"session"]), _U8.unpack(found[b"clean"])
            journaled = None if journal is None else int(_U64.unpack(journal)[0])
            return Meta(UUID(bytes=found[b"uuid"]), session, bool(clean), journaled)
        except (struct.error, ValueError):
            raise CacheError(
                f"the cache's index {self.path} is damaged: it has no header", _BEGIN_ANEW
            ) from None

    def layers(self) -> list[LayerRecord]:
        """Every layer, by id. CacheError when a record cannot be read: it could be a volume's."""
        with self._translated("read"), self._env.begin(db=self._layers_db) as txn:
            items = list(txn.cursor())
        try:
            return [_layer_record(key, value) for key, value in items]
        except (struct.error, ValueError, KeyError, TypeError):
            raise CacheError(
                f"the cache's index {self.path} is damaged: the record of a layer cannot be read", _BEGIN_ANEW
            ) from None

    def rows(self, layer_id: int, first: int = 0) -> Iterator[tuple[int, bytes]]:
        """(row, packed) of a layer from row `first` on, ascending, as one snapshot; packed is as stored, good
        or not. Nothing may be changed before the iterator is exhausted or closed.
        """
        prefix = _ID.pack(layer_id)
        with self._translated("read"), self._env.begin(db=self._rows_db) as txn, txn.cursor() as cursor:
            if not cursor.set_range(_ROW_KEY.pack(layer_id, first)):
                return
            for key, value in cursor.iternext():
                if not key.startswith(prefix):
                    return
                if len(key) == _ROW_KEY.size:
                    yield _ROW_KEY.unpack(key)[1], value

    def put_layer(self, record: LayerRecord) -> None:
        """A new layer, or a new record of one; durable when it returns."""
        fields = asdict(record)
        del fields["layer_id"]
        with self.changing(rows=1) as txn:
            txn.put(_ID.pack(record.layer_id), json.dumps(fields).encode(), db=self._layers_db)

    def delete_layer(self, layer_id: int) -> None:
        """The record of a layer, and whatever rows it has; durable when it returns."""
        rows = [row for row, _ in self.rows(layer_id)]
        with self.changing(rows=1 + len(rows)) as txn:
            txn.delete(_ID.pack(layer_id), db=self._layers_db)
            for row in rows:
                txn.delete(_ROW_KEY.pack(layer_id, row), db=self._rows_db)

    def begin_session(
        self,
        session: int,
        *,
        discard: bool = False,
        forget_layers: Iterable[int] = (),
        drop_rows: Collection[tuple[int, int]] = (),
    ) -> None:
        """The session number and the unclean mark, with what the opening found that must go, in one
        transaction.

        discard: every layer and row; forget_layers: layers without rows; drop_rows: (layer id, row).
        """
        with self.changing(rows=len(drop_rows)) as txn:
            if discard:
                txn.drop(self._rows_db, delete=False)
                txn.drop(self._layers_db, delete=False)
            for layer_id in forget_layers:
                txn.delete(_ID.pack(layer_id), db=self._layers_db)
            for key in drop_rows:
                txn.delete(_ROW_KEY.pack(*key), db=self._rows_db)
            self.put_session(txn, session, clean=False)

    def write_rows(self, rows: Rows, journaled: int | None = None) -> tuple[int, int]:
        """Step 3 of a commit (R6): exactly these copies of rows, by layer id; b"" deletes a row. journaled:
        with them it knows more than the journal's records up to this one.

        Returns how many were written and how many deleted, durable. CacheError: none of them is.
        """
        written = {
            _ROW_KEY.pack(layer_id, row): packed
            for layer_id, copies in rows.items()
            for row, packed in copies
        }
        deleted = [key for key, packed in written.items() if not packed]
        for key in deleted:
            del written[key]
        with self.changing(rows=len(written) + len(deleted)) as txn:
            with txn.cursor(db=self._rows_db) as cursor:
                cursor.putmulti(sorted(written.items()))
            for key in deleted:
                txn.delete(key, db=self._rows_db)
            if journaled is not None:
                txn.put(b"journal", _U64.pack(journaled), db=self.meta_db)
        return len(written), len(deleted)

    def mark_clean(self, session: int) -> None:
        """The session ended in order: the index is exact."""
        with self.changing(rows=0) as txn:
            self.put_session(txn, session, clean=True)


def _whole_steps(size_bytes: int) -> int:
    return -(-size_bytes // _GROW_BYTES) * _GROW_BYTES


def _allocate(path: Path, size_bytes: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    finally:
        os.close(descriptor)


def _layer_record(key: bytes, value: bytes) -> LayerRecord:
    fields = json.loads(value)
    (layer_id,) = _ID.unpack(key)
    record = LayerRecord(layer_id, **fields)
    for name, kind in (
        ("kind", str),
        ("url", str),
        ("validator", str),
        ("size_bytes", int),
        ("used_unix_s", int),
        ("name", str),
        ("base_size_bytes", int),
    ):
        if not isinstance(getattr(record, name), kind):
            raise ValueError(f"{name} has the wrong type")
    if not 0 < layer_id <= LAYER_ID_MAX or record.size_bytes <= 0:
        raise ValueError("a number is out of range")
    return record
