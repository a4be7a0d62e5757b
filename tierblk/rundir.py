"""Where running daemons are found: RUN/<uuid of the cache>/control.sock, with daemon.json beside it.

RUN is /run/tierblk, or what the environment variable TIERBLK_RUN_DIR says. It has to be on a tmpfs: what is
in it must not outlive the machine's uptime (R1).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN_DIR_VARIABLE = "TIERBLK_RUN_DIR"
SOCKET_NAME = "control.sock"
INFO_NAME = "daemon.json"
END_NAME = "end.json"
"""What went wrong with the end of a daemon that was stopped: as an error of the control interface. Gone when
the next one starts."""
STOPPED_NAME = "stopped"
"""Its time says when somebody asked for no daemon at all; for keepers between two daemons (cli/kept.py)."""


def run_root() -> Path:
    """RUN, absolute; it need not exist."""
    return Path(os.path.abspath(os.environ.get(RUN_DIR_VARIABLE) or "/run/tierblk"))


@contextmanager
def socket_address(directory: Path) -> Iterator[str]:
    """An address to bind or connect to for directory/control.sock, valid inside the context; OSError.

    The address of a Unix socket has room for 107 bytes only; going through a file descriptor, any path fits.
    """
    directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory_fd}/{SOCKET_NAME}"
    finally:
        os.close(directory_fd)
