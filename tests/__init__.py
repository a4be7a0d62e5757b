"""Tests: unit and integration run natively, vm runs inside a virtual machine."""
