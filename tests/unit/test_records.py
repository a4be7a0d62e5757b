"""Device records: whole or not there, and refused when they are not ours."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tierblk import records
from tierblk.records import DeviceRecord

RECORD = DeviceRecord(
    dev_id=3,
    name="disk",
    config_path="/etc/disk.toml",
    config={"device": {"name": "disk"}},
    url="http://h/x",
    size_bytes=1 << 20,
    validator='etag:"1"',
    stamp=5,
    flags=0x18,
    attached=12.5,
)


def test_what_is_written_is_read_by_attachment(tmp_path: Path) -> None:
    later = replace(RECORD, dev_id=0, attached=99.0)
    for record in (later, RECORD):
        records.write(tmp_path, record)
    assert records.read_all(tmp_path) == ([RECORD, later], {})
    records.remove(tmp_path, 3)
    records.remove(tmp_path, 3)
    assert records.read_all(tmp_path) == ([later], {})


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    """The config in it may hold an Authorization line."""
    records.write(tmp_path, RECORD)
    folder = tmp_path / records.FOLDER
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert os.stat(folder / "3.json").st_mode & 0o777 == 0o600


def test_nothing_was_ever_attached(tmp_path: Path) -> None:
    assert records.read_all(tmp_path / "none") == ([], {})


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"dev_id": 4},
        {"name": None},
        {"config": []},
        {"size_bytes": "1"},
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    records.write(tmp_path, RECORD)
    path = tmp_path / records.FOLDER / "3.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found, bad = records.read_all(tmp_path)
    assert found == []
    assert str(path) in bad[3]


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_what_is_no_record_at_all(tmp_path: Path, text: str) -> None:
    records.write(tmp_path, RECORD)
    (tmp_path / records.FOLDER / "3.json").write_bytes(text.encode("latin-1"))
    (tmp_path / records.FOLDER / "notes.json").touch()
    found, bad = records.read_all(tmp_path)
    assert (found, list(bad)) == ([], [3])
