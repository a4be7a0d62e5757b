"""Devices whose daemon has ended: found by their records, taken away with the cache directory's lock held, so
that no daemon can begin to serve one meanwhile (a stop of a served device waits for its requests)."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tierblk import records
from tierblk.cli.client import DeadSocket, candidates
from tierblk.errors import DaemonError, DeviceError, TierblkError
from tierblk.records import DeviceRecord
from tierblk.rundir import INFO_NAME, run_root

LOCK_WAIT_S = 6.0
POLL_S = 0.05


def run_dirs() -> list[Path]:
    """Of all caches that had a daemon since the machine was started. DaemonError without permission."""
    root = run_root()
    try:
        return sorted(path for path in root.iterdir() if (path / records.FOLDER).is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError:
        raise DaemonError(f"no permission to look for devices in {root}", "run the command as root") from None


def living(timeout_s: float) -> set[Path]:
    """Run directories at whose socket somebody listens, whether or not it answers."""
    found = set()
    for daemon in candidates(timeout_s):
        try:
            os.close(daemon.process())
        except DeadSocket:
            continue
        except TierblkError:
            pass
        found.add(daemon.run_dir)
    return found


def waiting(timeout_s: float, cache_dir: str | None = None) -> list[tuple[Path, DeviceRecord]]:
    """(run directory, record) of every device that waits for a daemon."""
    from tierblk.cli.client import same_directory

    alive = living(timeout_s)
    found = []
    for run_dir in run_dirs():
        if run_dir in alive:
            continue
        for record in records.read_all(run_dir)[0]:
            if not os.path.exists(f"/dev/ublkc{record.dev_id}"):
                continue
            if cache_dir is None or same_directory(cache_of(run_dir, record) or "", cache_dir):
                found.append((run_dir, record))
    return found


def shown(record: DeviceRecord) -> dict[str, Any]:
    """Such a device as `list` and `status` show it."""
    from tierblk.records import waiting_device

    reason = f"its daemon has ended; to go on: tierblk attach {record.config_path}"
    return waiting_device(record, "no daemon", reason)


def cache_of(run_dir: Path, record: DeviceRecord | None) -> str | None:
    """The cache directory of a run directory, if it can be known."""
    if record is not None:
        return str(record.config.get("cache", {}).get("dir") or "") or None
    try:
        return str(json.loads((run_dir / INFO_NAME).read_text())["cache_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def no_daemon(cache_dir: str | None) -> Iterator[None]:
    """While this lasts no daemon of the cache directory runs. DaemonError when one does, or begins."""
    try:
        slots_fd = os.open(Path(cache_dir or "/nonexistent") / "slots", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield  # without its directory no daemon can start
        return
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(slots_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DaemonError(
                        f"a daemon of {cache_dir} is starting or ending, or does not answer",
                        f"see `tierblk status`, or find it: fuser -v {cache_dir}/slots",
                    ) from None
            time.sleep(POLL_S)
        yield
    finally:
        os.close(slots_fd)


def take_away(run_dir: Path, record: DeviceRecord) -> None:
    """Stop and delete a device that waits for a daemon; who waits for it gets EIO. TierblkError."""
    from tierblk import driver

    with no_daemon(cache_of(run_dir, record)):
        try:
            info = driver.info_of(record.dev_id)
            if info is not None and info.stamp == record.stamp:
                driver.take_away(record.dev_id)
        except OSError as error:
            raise driver.driver_error(error) from None
        records.remove(run_dir, record.dev_id)


def find(name: str, cache_dir: str | None, timeout_s: float) -> tuple[Path, DeviceRecord] | None:
    """The waiting device of a name. DeviceError when there are several."""
    found = [(run_dir, record) for run_dir, record in waiting(timeout_s, cache_dir) if record.name == name]
    if len(found) > 1:
        raise DeviceError(
            f'{len(found)} devices called "{name}" wait for a daemon', "say which: --cache-dir DIR"
        )
    return found[0] if found else None
