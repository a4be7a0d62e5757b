"""Tests against real servers, files and processes of this machine."""
