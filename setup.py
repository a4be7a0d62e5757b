"""Only the C core needs more than pyproject.toml can say."""

from setuptools import setup

setup(cffi_modules=["tierblk/core/build.py:ffibuilder"])
