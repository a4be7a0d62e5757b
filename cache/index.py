"""The index: what the cache knows durably, in LMDB. The only file that imports lmdb, the only one that sees
lmdb.Error.

    meta     format u32, uuid 16 bytes, session u64, clean u8, journal u64        (little endian)
    layers   layer id u32 big endian -> JSON of a LayerRecord
    rows     layer id u32, row u64, both big endian -> 772 bytes, see rows.py
    volumes  layer id u32 big endian -> where a volume in object storage stands
    extents  layer id u32 big endian, key -> where such a volume has its pages; not looked into here

One environment object per process, and nobody but py-lmdb may open it: a second copy of the library on the
same files corrupts readers. The lock of the cache directory guarantees the one; that C has its own table, the
other.

liblmdb trusts its file: what a damaged page says can end the process. So the file is first walked through by
py-lmdb's verifier, which only reads bytes, and is opened only when every page that can be reached is sound.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from uuid import UUID

import lmdb
from lmdb import verify

from tierblk.cache.filesystem import free_bytes, is_no_space
from tierblk.cache.layers import LayerRecord, VolumeChange, decode_layer, encode_layer
from tierblk.cache.room import (
    GROW_BYTES,
    RESERVE_BYTES,
    VolumesLoad,
    allocate,
    load_of,
    pages_added,
    whole_steps,
)
from tierblk.cache.superblock import FORMAT_VERSION
from tierblk.errors import CacheError
from tierblk.units import format_size

DATA_FILE = "data.mdb"
HEAD_KEY = b"h"
"""Of the extents of a volume, the one that says which they are of (docs/formats.md)."""

_U8, _U32, _U64 = struct.Struct("<B"), struct.Struct("<I"), struct.Struct("<Q")
_ID = struct.Struct(">I")
_ROW_KEY = struct.Struct(">IQ")
_BEGIN_ANEW = "remove the cache directory to begin with an empty one"

# The map is address space, not memory or disk: a page per slot, and more as soon as the tree needs it.
_MAP_BYTES_LEAST = 1 << 30
_MAP_BYTES_PER_SLOT = 4096

_log = logging.getLogger(__name__)

Rows = Mapping[int, Iterable[tuple[int, bytes]]]
NO_VOLUMES: Mapping[int, VolumeChange] = {}
_NO_LOAD = VolumesLoad()
_EMPTIED = VolumeChange(b"", anew=True)


@dataclass(frozen=True, slots=True)
class Meta:
    """What the index says of itself: whose it is, its last session, and whether that ended in order.

    journaled: the last record of that session's journal that it knows more than; None: there was no journal.
    """

    uuid: UUID
    session: int
    clean: bool
    journaled: int | None = None


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
        index.make_missing()
    finally:
        index.close()


def open_index(
    path: Path, uuid: UUID, slot_count: int, *, read_only: bool = False, beside: bool = False
) -> Index:
    """The index of a cache directory, whose lock the caller has. CacheError when it is missing, damaged or of
    another cache. read_only: not a file of it is touched, and nothing can be changed. beside: likewise, while
    a daemon has the lock, who has found it sound; each reading of it is to be short, since no page that it
    may look at is used anew meanwhile."""
    data = path / DATA_FILE
    if not data.is_file():
        raise CacheError(f"the cache's index is missing: there is no {data}", _BEGIN_ANEW)
    if not beside:
        _refuse_damaged(data)
    index = Index(path, slot_count, read_only=read_only or beside, lock=beside or not read_only)
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


def _refuse_damaged(data: Path) -> None:
    try:
        faults = list(map(str, verify.verify(str(data))))  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        faults = [str(error)]
    except OSError as error:  # the disk's fault: nothing is known of the bytes
        raise CacheError(f"the cache's index {data} cannot be read: {error.strerror}") from None
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise CacheError(f"the cache's index {data} is damaged: {faults[0]}{more}", _BEGIN_ANEW)


class Index:
    """An open index. Methods block. Changes may come from any thread, and so may `volume_state` and
    `extents`; all other reading belongs to the opening, when nothing is changed meanwhile."""

    def __init__(self, path: Path, slot_count: int, *, read_only: bool = False, lock: bool = True) -> None:
        """lock: whoever changes the file is told what is read."""
        self.path = path
        self._writing = Lock()  # also: the map grows only while no transaction runs
        # Whoever reads beside changes has it to the end of its transaction: growing unmaps what it looks at.
        self._reading = Lock()
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
                lock=lock,
            )
        try:
            with self._translated("opened"):
                if not read_only:
                    self._env.reader_check()  # readers that were killed would hold old pages for ever
                self.meta_db = self._env.open_db(b"meta")
                self._layers_db = self._env.open_db(b"layers")
                self._rows_db = self._env.open_db(b"rows")
                self._volumes_db = self._existing(b"volumes")
                self._extents_db = self._existing(b"extents")
        except CacheError:
            self._env.close()
            raise

    def _existing(self, name: bytes) -> lmdb._Database | None:
        """None: the index is of a version that had none, and of no session of this one."""
        try:
            return self._env.open_db(name, create=False)
        except lmdb.NotFoundError:
            return None

    def make_missing(self) -> None:
        """Makes the databases that older versions did not have. They are worth nothing to these, and no
        harm."""
        if self._volumes_db is None or self._extents_db is None:
            with self.changing(rows=0) as txn:
                made = [self._env.open_db(name, txn=txn) for name in (b"volumes", b"extents")]
            self._volumes_db, self._extents_db = made  # of a transaction that failed they would be nothing

    def close(self) -> None:
        """No change may be made afterwards, and reading is an error."""
        with self._reading:
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
    def changing(self, rows: int, load: VolumesLoad = _NO_LOAD) -> Iterator[lmdb.Transaction[bytes]]:
        """One synced transaction with room for that many rows and that load: all of it or nothing.

        What fails before the commit itself leaves the index usable. A commit that fails may have lost bytes
        that a later sync would not report again, so from then on every change is refused (R7).
        """
        with self._writing:
            if self.broken is not None:
                raise CacheError(self.broken)
            self._grow(rows, load)
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

    def _room(self, rows: int, load: VolumesLoad = _NO_LOAD) -> tuple[int, int]:
        """(bytes in use, bytes that a transaction which writes or deletes as much adds at most)."""
        with self._translated("read"), self._env.begin() as txn:
            tree, used = txn.stat(self._rows_db), self._env.info()["last_pgno"] + 1
            extents = txn.stat(self._extents_db) if self._extents_db is not None else None
        more = pages_added(tree, rows, extents, load)
        return used * tree["psize"], more * tree["psize"]

    def _grow(self, rows: int, load: VolumesLoad = _NO_LOAD) -> None:
        """Room in the file, and in the map, for a transaction that writes or deletes as much."""
        needed_bytes = sum(self._room(rows, load))
        map_bytes = self._env.info()["map_size"]
        if self._map_full or needed_bytes > map_bytes:
            with self._translated("given more room"), self._reading:
                self._env.set_mapsize(2 * max(needed_bytes, map_bytes))
            self._map_full = False
        path = self.path / DATA_FILE
        try:
            size_bytes = path.stat().st_size
            if size_bytes < needed_bytes + RESERVE_BYTES:
                allocate(path, whole_steps(needed_bytes + RESERVE_BYTES))
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
        keep_bytes = whole_steps(used_bytes + RESERVE_BYTES) + GROW_BYTES
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
            return [decode_layer(_ID.unpack(key)[0], value) for key, value in items]
        except (struct.error, ValueError, TypeError):
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
        with self.changing(rows=1) as txn:
            txn.put(_ID.pack(record.layer_id), encode_layer(record), db=self._layers_db)

    def delete_layer(self, layer_id: int) -> None:
        """The record of a layer, whatever rows it has, its state and its extents; durable when it returns."""
        with self._reading:
            rows = [row for row, _ in self.rows(layer_id)]
        with self.changing(1 + len(rows), self._load([_EMPTIED])) as txn:
            self._forget_layer(txn, layer_id)
            for row in rows:
                txn.delete(_ROW_KEY.pack(layer_id, row), db=self._rows_db)

    def _forget_layer(self, txn: lmdb.Transaction[bytes], layer_id: int) -> None:
        txn.delete(_ID.pack(layer_id), db=self._layers_db)
        if self._volumes_db is not None:
            txn.delete(_ID.pack(layer_id), db=self._volumes_db)
        self._delete_extents(txn, layer_id)

    def _delete_extents(self, txn: lmdb.Transaction[bytes], layer_id: int) -> None:
        if self._extents_db is None:
            return
        prefix = _ID.pack(layer_id)
        with txn.cursor(db=self._extents_db) as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key().startswith(prefix):
                found = cursor.delete()

    def volume_state(self, layer_id: int) -> bytes | None:
        """What was last written as the state of a volume; None: nothing was. From any thread."""
        with self._reading, self._translated("read"):
            if self._volumes_db is None:
                return None
            with self._env.begin(db=self._volumes_db) as txn:
                return txn.get(_ID.pack(layer_id))

    def extent(self, layer_id: int, key: bytes) -> bytes | None:
        """One of the extents of a volume, if it has it. From any thread."""
        with self._reading, self._translated("read"):
            if self._extents_db is None:
                return None
            with self._env.begin(db=self._extents_db) as txn:
                return txn.get(_ID.pack(layer_id) + key)

    def extents(self, layer_id: int) -> list[tuple[bytes, bytes]]:
        """(key, value) of all extents of a volume by key, as of one transaction. From any thread; commits
        beside it wait only if the map has to grow."""
        prefix, found = _ID.pack(layer_id), []
        with self._reading, self._translated("read"):
            if self._extents_db is None:
                return []
            with self._env.begin(db=self._extents_db) as txn, txn.cursor() as cursor:
                if cursor.set_range(prefix):
                    for key, value in cursor.iternext():
                        if not key.startswith(prefix):
                            break
                        found.append((key[len(prefix) :], value))
        return found

    def begin_session(
        self,
        session: int,
        *,
        discard: bool = False,
        forget_layers: Collection[int] = (),
        drop_rows: Collection[tuple[int, int]] = (),
        put_layers: Collection[LayerRecord] = (),
    ) -> None:
        """The session number and the unclean mark, with what the opening found that must go, in one
        transaction.

        discard: every layer with all that it has; forget_layers: layers without rows; drop_rows: (layer id,
        row); put_layers: new records of layers that stay.
        """
        self.make_missing()
        load = self._load([_EMPTIED] * (1 if discard else len(forget_layers)))
        with self.changing(len(drop_rows) + len(put_layers), load) as txn:
            if discard:
                for database in (self._rows_db, self._layers_db, self._volumes_db, self._extents_db):
                    assert database is not None
                    txn.drop(database, delete=False)
            for layer_id in forget_layers:
                self._forget_layer(txn, layer_id)
            for record in put_layers:
                txn.put(_ID.pack(record.layer_id), encode_layer(record), db=self._layers_db)
            for key in drop_rows:
                txn.delete(_ROW_KEY.pack(*key), db=self._rows_db)
            self.put_session(txn, session, clean=False)

    def write_rows(
        self, rows: Rows, journaled: int | None = None, volumes: Mapping[int, VolumeChange] = NO_VOLUMES
    ) -> tuple[int, int]:
        """Step 3 of a commit (R6): exactly these copies of rows, by layer id; b"" deletes a row. journaled:
        with them it knows more than the journal's records up to this one. volumes: what else is to be durable
        with them, by layer id (R13).

        Returns how many rows were written and how many deleted, durable. CacheError: nothing is.
        """
        written = {
            _ROW_KEY.pack(layer_id, row): packed
            for layer_id, copies in rows.items()
            for row, packed in copies
        }
        deleted = [key for key, packed in written.items() if not packed]
        for key in deleted:
            del written[key]
        with self.changing(len(written) + len(deleted), self._load(volumes.values())) as txn:
            with txn.cursor(db=self._rows_db) as cursor:
                cursor.putmulti(sorted(written.items()))
            for key in deleted:
                txn.delete(key, db=self._rows_db)
            if journaled is not None:
                txn.put(b"journal", _U64.pack(journaled), db=self.meta_db)
            for layer_id, change in volumes.items():
                self._write_volume(txn, layer_id, change)
        return len(written), len(deleted)

    def _write_volume(self, txn: lmdb.Transaction[bytes], layer_id: int, change: VolumeChange) -> None:
        assert self._volumes_db is not None, "a session has begun"
        txn.put(_ID.pack(layer_id), change.state, db=self._volumes_db)
        if change.anew:
            self._delete_extents(txn, layer_id)
        latest = {_ID.pack(layer_id) + key: value for key, value in change.extents}
        with txn.cursor(db=self._extents_db) as cursor:
            cursor.putmulti(sorted((key, value) for key, value in latest.items() if value))
        for key, value in latest.items():
            if not value:
                txn.delete(key, db=self._extents_db)

    def _load(self, volumes: Collection[VolumeChange]) -> VolumesLoad:
        """What these changes need room for. ValueError: a key or value is too long."""
        if not volumes:
            return _NO_LOAD
        with self._reading, self._translated("read"), self._env.begin() as txn:
            extents = txn.stat(self._extents_db) if self._extents_db is not None else None
        return load_of(volumes, extents)

    def mark_clean(self, session: int) -> None:
        """The session ended in order: the index is exact."""
        with self.changing(rows=0) as txn:
            self.put_session(txn, session, clean=True)
