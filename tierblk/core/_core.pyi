"""What mypy may know of the compiled module: cffi makes it from cdef.h, and only this package uses it."""

from typing import Any

from cffi import FFI

ffi: FFI
lib: Any
