"""Names of a volume's objects: one spelling each, and strangers are no error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.remote.names import (
    BirthName,
    CheckpointName,
    DataName,
    EpochName,
    GcName,
    Name,
    SnapshotName,
    parse,
)
from tierblk.remote.record import IN_RECORD, ObjectName

EPOCHS = st.integers(1, 2**64 - 1)
SNAPSHOTS = st.from_regex(r"[a-z0-9_-][a-z0-9._-]{0,63}", fullmatch=True)
NAMES: st.SearchStrategy[Name] = st.one_of(
    st.just(BirthName()),
    st.builds(DataName, EPOCHS, st.binary(min_size=16, max_size=16), st.integers(0, 0xFFFF)),
    st.builds(EpochName, EPOCHS),
    st.builds(CheckpointName, EPOCHS, st.binary(min_size=32, max_size=32)),
    st.builds(SnapshotName, SNAPSHOTS),
    st.builds(GcName, st.integers(0, 2**64 - 1)),
)
ATTEMPT = bytes(range(16))


@given(NAMES)
def test_what_is_made_is_understood(name: Name) -> None:
    assert parse(str(name)) == name
    assert type(parse(str(name))) is type(name)


def test_the_spellings() -> None:
    assert str(BirthName()) == "volume.json"
    assert str(DataName(300, ATTEMPT, 10)) == "data/000000000000012c.000102030405060708090a0b0c0d0e0f.000a"
    assert str(EpochName(1)) == "epoch/0000000000000001"
    assert str(CheckpointName(2**64 - 1, bytes(32))) == f"checkpoint/{'f' * 16}.{'0' * 64}"
    assert str(SnapshotName("before-upgrade_1.0")) == "snapshot/before-upgrade_1.0"
    assert str(GcName(0)) == "gc/0000000000000000"
    assert str(ObjectName(300, ATTEMPT, 10)) == str(DataName(300, ATTEMPT, 10))
    assert str(ObjectName(300, ATTEMPT, IN_RECORD)) == str(EpochName(300))


@given(EPOCHS, EPOCHS)
def test_a_listing_is_in_the_order_of_epochs(one: int, other: int) -> None:
    assert (str(EpochName(one)) < str(EpochName(other))) == (one < other)


@given(NAMES, st.data())
def test_one_more_or_other_character_is_another_name(name: Name, data: st.DataObject) -> None:
    text = str(name)
    at = data.draw(st.integers(0, len(text)))
    inserted = data.draw(st.sampled_from("0aAxg./ \n\0٣"))
    for changed in (text[:at] + inserted + text[at:], text[:at] + inserted + text[at + 1 :]):
        found = parse(changed)
        assert found is None or str(found) == changed  # never a second spelling


@pytest.mark.parametrize(
    "stranger",
    [
        "",
        "volume.json.bak",
        "volume.json\n",
        "epoch/0000000000000000",
        "epoch/1",
        "epoch/00000000000000AB",
        "epoch/0000000000000001/",
        "/epoch/0000000000000001",
        "epoch/0000000000000001\n",
        f"data/{'0' * 16}.{'0' * 32}.0000",
        f"data/{'1' * 16}.{'0' * 32}.00000",
        f"data/{'1' * 16}.{'0' * 31}.0000",
        f"checkpoint/{'0' * 16}.{'0' * 64}",
        f"checkpoint/{'1' * 16}.{'0' * 63}",
        "snapshot/",
        "snapshot/.hidden",
        "snapshot/UPPER",
        "snapshot/a/b",
        f"snapshot/{'a' * 65}",
        "gc/0",
        "lost+found/x",
    ],
)
def test_strangers(stranger: str) -> None:
    assert parse(stranger) is None


@pytest.mark.parametrize(
    "name",
    [
        EpochName(0),
        EpochName(2**64),
        DataName(0, ATTEMPT, 0),
        DataName(1, ATTEMPT[1:], 0),
        DataName(1, ATTEMPT, 0x10000),
        DataName(1, ATTEMPT, -1),
        CheckpointName(1, bytes(31)),
        CheckpointName(0, bytes(32)),
        SnapshotName(""),
        SnapshotName("."),
        SnapshotName("a" * 65),
        SnapshotName("a\n"),
        SnapshotName("../epoch"),
        GcName(-1),
    ],
    ids=repr,
)
def test_a_name_that_cannot_be_is_not_made(name: Name) -> None:
    with pytest.raises(ValueError, match=r"a number in|has (16|32) bytes, not|a snapshot's name"):
        str(name)
