"""The checks of an answer's head, against anything that a server could send."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote.answer import Pin, Want, check_partial, is_exact_length

PIN = Pin(1 << 20, '"one"', None)
WANT = Want("http://host/image", 4096, 65536, PIN)
RIGHT = {"Content-Range": "bytes 4096-69631/1048576", "Content-Length": "65536", "ETag": '"one"'}

NAMES = st.sampled_from(
    [
        "Content-Range",
        "Content-Length",
        "ETag",
        "Last-Modified",
        "Content-Encoding",
        "Content-Type",
        "Transfer-Encoding",
    ]
)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [*RIGHT.values(), "identity", "gzip", "multipart/byteranges", "bytes 0-0/1", "bytes */*"]
    ),
    st.from_regex(r"bytes [0-9]{1,25}-[0-9]{1,25}/([0-9]{1,25}|\*)", fullmatch=True),
)


def test_the_right_answer() -> None:
    assert check_partial(206, RIGHT, WANT) == PIN
    assert is_exact_length(RIGHT, WANT)
    assert not is_exact_length({**RIGHT, "Transfer-Encoding": "chunked"}, WANT)
    assert not is_exact_length({}, WANT)


def test_the_request() -> None:
    assert WANT.headers() == {
        "Range": "bytes=4096-69631",
        "Accept-Encoding": "identity",
        "If-Match": '"one"',
    }


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # the machine may be busy
@given(st.integers(100, 999), st.dictionaries(NAMES, TEXTS))
def test_any_answer_is_right_or_one_of_two_errors(status: int, headers: dict[str, str]) -> None:
    """No head raises anything else, and one that passes is the one that was asked for (I6, I12)."""
    message = ""
    try:
        now = check_partial(status, headers, WANT)
    except (RemoteUnavailable, RemoteRefused) as error:
        message = str(error)
    if message:
        assert "http://host/image" in message
        assert "\n" not in message
        return
    assert status == 206
    assert headers["Content-Range"].split() == ["bytes", "4096-69631/1048576"]
    assert now.etag == '"one"'


@given(st.dictionaries(NAMES, TEXTS))
def test_one_header_more_or_less(changes: dict[str, str]) -> None:
    try:
        now = check_partial(206, {**RIGHT, **changes}, WANT)
    except TierblkError:
        return
    assert now.size_bytes == PIN.size_bytes
    assert changes.get("Content-Length", "65536").strip() == "65536"


@pytest.mark.parametrize(
    ("etag", "strong"),
    [
        ('"one"', True),
        ('""', True),
        ('W/"one"', False),
        ("one", False),
        ("*", False),
        ('"on"e"', False),
        (None, False),
    ],
)
def test_what_is_a_strong_etag(etag: str | None, strong: bool) -> None:
    pin = Pin(512, etag, None)
    assert (pin.strong_etag is not None) is strong
    assert ("If-Match" in pin.conditions) is strong


def test_an_etag_that_is_no_text_is_never_sent_back() -> None:
    """I12: it would go into the head of our next request."""
    first = Want("http://host/image", 0, 1)
    for etag in ('"é"', '"a\tb"', '"' + "x" * 2000 + '"'):
        pin = check_partial(206, {"Content-Range": "bytes 0-0/512", "ETag": etag}, first)
        assert pin == Pin(512, None, None)


def test_an_etag_that_was_weak_only_while_the_file_was_fresh() -> None:
    assert Pin(512, 'W/"one"', None).same_version(Pin(512, '"one"', None))
    assert not Pin(512, '"one"', None).same_version(Pin(512, 'W/"one"', None))


@pytest.mark.parametrize(
    ("status", "headers"), [(416, {"Content-Range": "bytes */0"}), (200, {"Content-Length": "0"})]
)
def test_an_empty_object(status: int, headers: dict[str, str]) -> None:
    with pytest.raises(RemoteRefused, match="is empty"):
        check_partial(status, headers, Want("http://host/image", 0, 1))


@pytest.mark.parametrize(
    ("text", "least_s", "most_s"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("9" * 40, 1e8, 1e9),
        ("Mon, 01 Jun 2020 00:00:00 GMT", 0, 0),
        ("Tue, 01 Jan 2999 00:00:00 GMT", 1e9, 1e12),
        ("Tue, 01 Jan 2999 00:00:00 -0000", 1e9, 1e12),
    ],
)
def test_retry_after(text: str, least_s: float, most_s: float) -> None:
    with pytest.raises(RemoteUnavailable) as caught:
        check_partial(429, {"Retry-After": text}, WANT)
    assert caught.value.retry_after_s is not None
    assert least_s <= caught.value.retry_after_s <= most_s


@given(st.text(max_size=40) | st.from_regex(r"[A-Z][a-z]{2}, \d{1,3} \w{3} \d{1,9} .{0,20}", fullmatch=True))
def test_any_retry_after_is_understood_or_ignored(text: str) -> None:
    with pytest.raises(RemoteUnavailable) as caught:
        check_partial(503, {"Retry-After": text}, WANT)
    assert caught.value.retry_after_s is None or caught.value.retry_after_s >= 0


def test_what_a_changed_version_says() -> None:
    for headers, status in (
        ({**RIGHT, "ETag": '"two"'}, 206),
        ({"Content-Range": "bytes */512", "ETag": '"two"'}, 416),
    ):
        with pytest.raises(
            RemoteRefused, match=r'as ETag "one", 1048576 bytes.*now has ETag "two"'
        ) as caught:
            check_partial(status, headers, WANT)
        assert "tierblk repin" in (caught.value.hint or "")
