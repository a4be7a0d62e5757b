"""What SharedKey signs, against an example of Azure's reference and against a second way to write it down."""

from __future__ import annotations

import base64
import hashlib
import hmac
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.model_az import ACCOUNT, to_sign
from tests.integration.models import Asked
from tierblk.errors import ConfigError
from tierblk.remote.sharedkey import SharedKey, authorization, string_to_sign

TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=["Cs"]), min_size=1)
NAMES = st.sampled_from(["comp", "restype", "prefix", "marker", "timeout", "maxresults"])
HEADERS = st.sampled_from(["if-none-match", "range", "content-type", "x-ms-blob-type", "x-ms-date", "accept"])


def test_the_metadata_of_a_container_as_the_reference_signs_it() -> None:
    """Its section on signatures for the Blob service writes this string out."""
    text = string_to_sign(
        "GET",
        "myaccount",
        "/mycontainer",
        [("restype", "container"), ("comp", "metadata"), ("timeout", "20")],
        {"x-ms-version": "2015-02-21", "x-ms-date": "Fri, 26 Jun 2015 23:39:12 GMT"},
        0,
    )
    assert text == (
        "GET\n\n\n\n\n\n\n\n\n\n\n\n"
        "x-ms-date:Fri, 26 Jun 2015 23:39:12 GMT\nx-ms-version:2015-02-21\n"
        "/myaccount/mycontainer\ncomp:metadata\nrestype:container\ntimeout:20"
    )


def test_an_empty_body_has_a_length_of_nothing() -> None:
    for body_bytes, line in ((0, ""), (7, "7")):
        assert string_to_sign("PUT", "a", "/c/k", [], {}, body_bytes).split("\n")[3] == line


def test_the_signature_is_an_hmac_of_the_text_with_the_decoded_key() -> None:
    key = SharedKey.of_text("account", base64.b64encode(b"secret").decode())
    wanted = base64.b64encode(hmac.new(b"secret", "tëxt".encode(), hashlib.sha256).digest()).decode()
    assert authorization(key, "tëxt") == f"SharedKey account:{wanted}"


@given(
    st.sampled_from(["GET", "PUT", "DELETE"]),
    st.dictionaries(NAMES, TEXT, max_size=4),
    st.dictionaries(HEADERS, st.text("abc=-*, 0123456789", min_size=1).map(str.strip), max_size=4),
    TEXT.map(quote),
    st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_the_same_text_as_the_model_makes_of_what_arrives(
    method: str, query: dict[str, str], headers: dict[str, str], key: str, body_bytes: int
) -> None:
    path = f"/{ACCOUNT}/container/{key}"
    arrived = Asked(
        method, path, list(query.items()), {**headers, "content-length": str(body_bytes)}, bytes(body_bytes)
    )
    assert string_to_sign(method, ACCOUNT, path, query.items(), headers, body_bytes) == to_sign(arrived)


@pytest.mark.parametrize("text", ["", "no base64!", "abc", "schlüssel"])
def test_a_key_that_is_none_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="account1") as refused:
        SharedKey.of_text("account1", text)
    assert not text or text not in str(refused.value)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(SharedKey("account", b"secret"))
