"""Builds and runs small virtual machines whose kernel has ublk: Debian's own kernels and packages, QEMU,
nothing else.

Standard library only, so that it runs before anything is installed. `build.py` and `run.py` beside this
package are
its commands; `tests/vm` and `packaging/demo` use it as a library.
"""
