"""What an opening does to a cache directory before it is served: records of the journal go into the index,
and a session begins (R8)."""

from __future__ import annotations

import logging
import os

from tierblk.cache import journal, start
from tierblk.cache.directory import Directory
from tierblk.cache.index import Index
from tierblk.cache.loading import Loaded
from tierblk.cache.maps import Maps
from tierblk.cache.start import StartMode
from tierblk.errors import CacheError

log = logging.getLogger(__name__)

_REPLAY_ROWS = 16


def replay_journal(directory: Directory, index: Index) -> None:
    """What FLUSHes made durable since the last commit goes into the index, before anybody believes that.

    After a kill too: a slot that only the journal names is then one that the index names (R8).
    """
    replay = journal.read(directory.journal_path, index, directory.superblock)
    if replay is not None:
        _write_replay(index, replay)
        log.info("%s: %d records of the journal are taken", directory.path, replay.count)


def _write_replay(index: Index, replay: journal.Replay) -> None:
    try:
        index.write_rows(replay.as_copies(), replay.seq)
    except CacheError:
        if index.broken:
            raise
        # In pieces, which a full disk still has room for. After each the index is right: all of the records
        # are taken again, until it says that it has them.
        for batch in replay.in_batches(_REPLAY_ROWS):
            index.write_rows(batch)
        index.write_rows({}, replay.seq)


def begin_session(directory: Directory, index: Index, maps: Maps, loaded: Loaded) -> int:
    """The five steps of start.py. Everything is loaded, and no slot has been written yet. Returns the open
    journal."""
    next_one = start.begun(directory.superblock)
    journal.prepare(directory.journal_path, next_one.uuid, next_one.session)
    directory.write_superblock(next_one)
    session = directory.superblock.session
    journal_fd = journal.begin(directory.journal_path, directory.superblock.uuid, session)
    try:
        _begin_index_and_maps(directory, index, maps, loaded)
    except BaseException:
        os.close(journal_fd)
        raise
    return journal_fd


def _begin_index_and_maps(directory: Directory, index: Index, maps: Maps, loaded: Loaded) -> None:
    session = directory.superblock.session
    index.begin_session(
        session,
        discard=loaded.mode is StartMode.DISCARDED,
        forget_layers=loaded.forgotten,
        drop_rows=loaded.dropped_rows,
        put_layers=loaded.damaged,
    )
    for layer_id in loaded.layers:
        maps.stamp(layer_id, session)
    maps.remove_others()
    directory.write_superblock(start.confirmed(directory.superblock))
