"""Commits to a SQLite database without pause and says so: a line for each transaction that is durable.

Usage: sqlite_writer.py FILE FIRST MODE KEYS. Transaction n sets key n modulo KEYS to n; MODE: of its journal.
"""

from __future__ import annotations

import itertools
import sqlite3
import sys


def main() -> None:
    """Until it is killed."""
    file, first, mode, keys = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    database = sqlite3.connect(file, isolation_level=None, timeout=60)
    database.execute(f"PRAGMA journal_mode = {mode}")
    # FULL is enough for a write-ahead log. A rollback journal commits by being unlinked; then FULL does
    # not sync the folder: the last transaction may come back undone. EXTRA does.
    database.execute(f"PRAGMA synchronous = {'FULL' if mode == 'WAL' else 'EXTRA'}")
    for n in itertools.count(first):
        database.execute("BEGIN IMMEDIATE")
        database.execute("REPLACE INTO t VALUES (?, ?, ?)", (n % keys, n, str(n) * (n % 97)))
        database.execute("COMMIT")
        print(n, flush=True)


if __name__ == "__main__":
    main()
