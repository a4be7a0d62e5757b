"""What every tier of tests shares."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


# A shell that runs the tests in the background has them ignore Ctrl-C, and so would every command that they
# start.
signal.signal(signal.SIGINT, signal.default_int_handler)
