"""volume.json: one spelling, and whatever a store sends instead is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.errors import RemoteRefused
from tierblk.remote.birth import BIRTH_BYTES_MAX, Base, Birth, Parent, decode, encode

TEXTS = st.text(min_size=1, max_size=100).filter(str.isprintable)
BASES = st.builds(Base, TEXTS, st.integers(1, 2**60), TEXTS)
PARENTS = st.builds(Parent, st.uuids(), TEXTS, st.integers(1, 2**64 - 1))
BIRTHS = st.builds(
    Birth,
    st.uuids(),
    st.integers(1, 2**51).map(lambda sectors: sectors * 512),
    st.none() | BASES,
    st.none() | PARENTS,
    st.integers(0, 253_402_300_799),
)
BIRTH = Birth(
    UUID(int=1),
    1 << 30,
    Base("https://example.org/é.img", 4096, 'etag:"x"'),
    Parent(UUID(int=2), "s3://bucket/parent", 7),
    1_795_000_000,
)
DOCUMENT: dict[str, Any] = json.loads(encode(BIRTH))


@given(BIRTHS)
def test_what_is_written_is_read(birth: Birth) -> None:
    encoded = encode(birth)
    assert decode(encoded) == birth
    assert encode(decode(encoded)) == encoded


def test_the_bytes_are_those_of_the_documentation() -> None:
    assert encode(replace(BIRTH, parent=None)).decode() == (
        '{"format":1,"uuid":"00000000-0000-0000-0000-000000000001","size_bytes":1073741824,'
        '"base":{"url":"https://example.org/é.img","size_bytes":4096,"validator":"etag:\\"x\\""},'
        '"parent":null,"created_unix_s":1795000000}\n'
    )


def test_other_spaces_and_another_order_are_read() -> None:
    assert decode(json.dumps(dict(reversed(DOCUMENT.items())), indent=4).encode()) == BIRTH


WRONG: list[tuple[str, Any, str]] = [
    ("format", 0, "format is no whole number from 1 to 1"),
    ("format", True, "format is no whole number"),
    ("format", "2", "format is no whole number"),
    ("uuid", None, "uuid is no UUID"),
    ("uuid", "00000000-0000-0000-0000-00000000000g", "uuid is no UUID"),
    ("uuid", "{0000000-0000-0000-0000-00000000000}", "uuid is no UUID"),
    ("uuid", "AAAAAAAA-0000-0000-0000-000000000001", "uuid is no UUID"),
    ("size_bytes", 0, "size_bytes is no whole number from 512"),
    ("size_bytes", -512, "size_bytes is no whole number"),
    ("size_bytes", 513, "size_bytes is no multiple of 512"),
    ("size_bytes", 2**60 + 512, "size_bytes is no whole number"),
    ("size_bytes", 10**4000, "size_bytes is no whole number"),
    ("size_bytes", 512.0, "is no whole number"),
    ("size_bytes", "512", "size_bytes is no whole number"),
    ("size_bytes", True, "size_bytes is no whole number"),
    ("created_unix_s", -1, "created_unix_s is no whole number"),
    ("created_unix_s", 253_402_300_800, "created_unix_s is no whole number"),
    ("base", [], "base is not an object"),
    ("base", {}, "base has no size_bytes"),
    ("base", {"url": "x", "size_bytes": 1, "validator": "x", "more": 1}, "base has an unknown key 'more'"),
    ("base", {"url": "", "size_bytes": 1, "validator": "x"}, "the base's url is no printable text"),
    ("base", {"url": "a\nb", "size_bytes": 1, "validator": "x"}, "the base's url is no printable text"),
    ("base", {"url": "\ud800", "size_bytes": 1, "validator": "x"}, "the base's url is no printable text"),
    ("base", {"url": "é" * 2049, "size_bytes": 1, "validator": "x"}, "url is longer than 4096 bytes"),
    ("base", {"url": "x", "size_bytes": 1, "validator": "x" * 2049}, "validator is longer than 2048"),
    ("base", {"url": "x", "size_bytes": 0, "validator": "x"}, "the base's size_bytes is no whole number"),
    ("base", {"url": 1, "size_bytes": 1, "validator": "x"}, "the base's url is no printable text"),
    ("parent", {"uuid": str(UUID(int=1)), "url": "x", "epoch": 0}, "the parent's epoch is no whole number"),
    ("parent", {"uuid": str(UUID(int=1)), "url": "x", "epoch": 2**64}, "the parent's epoch"),
    ("parent", {"uuid": 1, "url": "x", "epoch": 1}, "the parent's uuid is no UUID"),
    ("parent", 1, "parent is not an object"),
    ("extra", 1, "it has an unknown key 'extra'"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG)
def test_a_wrong_value(key: str, value: Any, said: str) -> None:
    with pytest.raises(RemoteRefused) as caught:
        decode(json.dumps({**DOCUMENT, key: value}).encode(), "s3://b/volume.json")
    assert caught.value.message.startswith("s3://b/volume.json is no volume.json: ")
    assert said in caught.value.message


@pytest.mark.parametrize("key", DOCUMENT)
def test_a_missing_key(key: str) -> None:
    with pytest.raises(RemoteRefused, match=rf"^volume.json is no volume.json: it has no {key}$"):
        decode(json.dumps({k: v for k, v in DOCUMENT.items() if k != key}).encode())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "it is not an object"),
        (b"null", "it is not an object"),
        (b"\xff\xfe{\0}\0", "it is not UTF-8"),
        (b'\xef\xbb\xbf{"format":1}', "BOM"),
        (b"[" * 60_000, "it is nested too deeply"),
        (b'{"a":' * 10_000, "it is nested too deeply"),
        (b'{"size_bytes":' + b"9" * 5000 + b"}", "integer string conversion"),
        (b'{"format":NaN}', "NaN is no number of JSON"),
        (b'{"format":-Infinity}', "-Infinity is no number of JSON"),
        (b'{"format":1e999}', "1e999 is no whole number"),
        (b'{"format":1,"format":1}', "a key is there twice"),
        (encode(BIRTH) + encode(BIRTH), "Extra data"),
    ],
)
def test_no_document_at_all(data: bytes, said: str) -> None:
    with pytest.raises(RemoteRefused) as caught:
        decode(data)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_a_long_one_is_not_even_parsed() -> None:
    with pytest.raises(RemoteRefused, match=r"^volume.json has 65537 bytes, and no volume.json has more"):
        decode(encode(BIRTH).ljust(BIRTH_BYTES_MAX + 1))
    assert decode(encode(BIRTH).ljust(BIRTH_BYTES_MAX)) == BIRTH


@pytest.mark.parametrize("version", [2, 10**4000])
def test_a_newer_format_says_so(version: int) -> None:
    with pytest.raises(
        RemoteRefused, match=r"made by a newer tierblk: its format is [0-9]{1,20}, this version"
    ):
        decode(json.dumps({"format": version, "unheard": "of"}).encode())


@given(st.integers(0, 1000), st.binary(max_size=3))
def test_damage_is_refused_or_another_birth(at: int, put: bytes) -> None:
    encoded = encode(BIRTH)
    at %= len(encoded)
    try:
        birth = decode(encoded[:at] + put + encoded[at + 1 :])
    except RemoteRefused:
        return
    assert decode(encode(birth)) == birth


@pytest.mark.parametrize(
    "wrong",
    [
        {"size_bytes": 513},
        {"created_unix_s": -1},
        {"base": Base("", 1, "x")},
        {"parent": Parent(UUID(int=2), "x", 0)},
    ],
)
def test_what_could_not_be_read_is_not_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is no"):
        encode(replace(BIRTH, **wrong))
