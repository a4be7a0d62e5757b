"""Signatures, against those that botocore makes of the same requests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import botocore.auth
import botocore.credentials
import pytest
from botocore.awsrequest import AWSRequest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierblk.remote.sigv4 import EMPTY_SHA256, Credentials, encoded_path, encoded_query, signed_headers

NOW = datetime(2026, 11, 26, 9, 30, 15, tzinfo=UTC)
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["Cs"]), min_size=1)


def by_botocore(
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    url: str,
    headers: dict[str, str],
    payload_sha256: str,
    credentials: Credentials,
    region: str,
) -> str:
    monkeypatch.setattr(
        botocore.auth, "get_current_datetime", lambda remove_tzinfo=True: NOW.replace(tzinfo=None)
    )
    request = AWSRequest(method, url, headers={**headers, "x-amz-content-sha256": payload_sha256})
    request.context["payload_signing_enabled"] = True
    request.context["client_config"] = None
    request.data = b""
    keys = botocore.credentials.Credentials(credentials.access_key, credentials.secret_key, credentials.token)
    signer = botocore.auth.S3SigV4Auth(keys, "s3", region)
    monkeypatch.setattr(signer, "payload", lambda request: payload_sha256)
    signer.add_auth(request)
    return str(request.headers["Authorization"])


@pytest.mark.parametrize("token", [None, "a/token+with=signs"])
@pytest.mark.parametrize(
    ("method", "path", "query", "headers"),
    [
        ("GET", "/bucket/volumes/web-1/volume.json", [], {}),
        ("PUT", "/bucket/volumes/a b/epoch/1", [], {"if-none-match": "*"}),
        ("GET", "/bucket/x", [], {"range": "bytes=5-12"}),
        ("GET", "/bucket", [("list-type", "2"), ("prefix", "volumes/ü+/"), ("start-after", "a&b=c")], {}),
        ("DELETE", "/", [], {}),
    ],
)
def test_the_same_signature_as_botocore(
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    query: list[tuple[str, str]],
    headers: dict[str, str],
    token: str | None,
) -> None:
    credentials = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", token)
    place, asked = encoded_path(path), encoded_query(query)
    wanted = by_botocore(
        monkeypatch,
        method,
        f"http://127.0.0.1:8333{place}{'?' if asked else ''}{asked}",
        headers,
        EMPTY_SHA256,
        credentials,
        "eu-central-1",
    )
    sent = signed_headers(
        method, "127.0.0.1:8333", place, asked, headers, EMPTY_SHA256, credentials, "eu-central-1", NOW
    )
    assert sent["authorization"] == wanted
    assert sent["x-amz-date"] == "20261126T093015Z"
    assert sent.get("x-amz-security-token") == token


def test_the_time_is_the_same_instant_in_every_zone() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=-8)))
    made = [
        signed_headers("GET", "h", "/", "", {}, EMPTY_SHA256, Credentials("a", "b"), "r", now)
        for now in (NOW, there)
    ]
    assert made[0] == made[1]


def test_what_is_secret_is_not_shown() -> None:
    shown = repr(Credentials("AKID", "the secret", "the token"))
    assert "AKID" in shown
    assert "secret'" not in shown
    assert "the token" not in shown


@given(st.lists(st.tuples(TEXT, TEXT), max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_query_has_no_letter_that_means_something(pairs: list[tuple[str, str]]) -> None:
    encoded = encoded_query(pairs)
    assert all(letter.isascii() and (letter.isalnum() or letter in "-_.~%=&") for letter in encoded)
    assert encoded.count("=") == len(pairs)
