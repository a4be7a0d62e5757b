"""How calls into the C core fail, and what they count."""

from __future__ import annotations

import os
from typing import Any

from tierblk.core._core import ffi


def check(rc: int, what: str) -> int:
    """`rc` itself, or OSError with what was tried when it is a negative errno."""
    if rc < 0:
        raise OSError(-rc, f"{what}: {os.strerror(-rc)}")
    return rc


def counters(c_struct: Any) -> dict[str, int]:
    """The fields of a struct of integers, by name."""
    return {name: int(getattr(c_struct, name)) for name, _ in ffi.typeof(c_struct).item.fields}
