"""The pipe to whoever started a daemon: one line of JSON says that it serves, or why it does not."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tierblk.errors import TierblkError


class Ready:
    """The daemon's end of the pipe. Only the first line counts; with it, or with `close`, the pipe ends."""

    def __init__(self, fd: int | None) -> None:
        """fd: is this object's from here on; None: nobody waits."""
        self._fd = fd
        if fd is not None:
            os.set_inheritable(fd, False)

    def serves(self, socket_path: Path) -> None:
        """The daemon can be asked."""
        self._tell({"ok": True, "socket": str(socket_path)})

    def failed(self, error: TierblkError) -> None:
        """It does not serve."""
        self._tell({"error": error.to_dict()})

    def close(self) -> None:
        """Whoever waits sees that no line will come."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _tell(self, line: dict[str, Any]) -> None:
        # Whoever waited may have given up: that is no reason to stop serving.
        with suppress(OSError):
            if self._fd is not None:
                os.write(self._fd, (json.dumps(line) + "\n").encode())
        self.close()
