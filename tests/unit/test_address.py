"""What of an address is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.address import shown


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("https://h:1/a/b.raw", "https://h:1/a/b.raw"),
        ("https://h/a?sig=x&y=z", "https://h/a?…"),
        ("https://h/a?", "https://h/a"),
        ("https://h/a?x#y?z", "https://h/a?…"),
        ("https://h/a#y?z", "https://h/a"),
        ("https://me:p%40ss@h/a@b", "https://h/a@b"),
        ("https://me:p@ss@h", "https://h"),
        ("https://h?sig=x/y@z", "https://h?…"),
        ("file:///srv/a%3Fb%23.raw", "file:///srv/a%3Fb%23.raw"),
        ("a.raw?sig=x", "a.raw?…"),
        ("/a?next=http://h/", "/a?…"),
        ("", ""),
    ],
)
def test_no_user_no_fragment_and_of_a_query_that_there_is_one(url: str, wanted: str) -> None:
    assert shown(url) == wanted


@given(st.text(), st.text(min_size=1))
def test_any_text_will_do(before: str, secret: str) -> None:
    assert shown(f"{before}?{secret}") in (shown(f"{before}?x"), shown(f"{before}?"))
