"""Every error has one exit code, one errno and one shape as JSON."""

from __future__ import annotations

import errno
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk import errors

EXIT_CODES = {
    "TierblkError": (1, errno.EIO),
    "ConfigError": (3, errno.EINVAL),
    "RemoteUnavailable": (4, errno.EIO),
    "RemoteRefused": (5, errno.EIO),
    "CacheError": (6, errno.EIO),
    "DeviceError": (7, errno.ENODEV),
    "DaemonError": (8, errno.EIO),
}


def test_the_exit_codes_are_the_documented_ones() -> None:
    assert {name: (kind.exit_code, kind.errno) for name, kind in errors.KINDS.items()} == EXIT_CODES


def test_every_kind_is_listed() -> None:
    assert set(errors.KINDS.values()) == {errors.TierblkError, *errors.TierblkError.__subclasses__()}


@pytest.mark.parametrize("kind", errors.KINDS.values())
def test_an_error_survives_json(kind: type[errors.TierblkError]) -> None:
    back = errors.from_dict(json.loads(json.dumps(kind("it broke", hint="mend it").to_dict())))
    assert type(back) is kind
    assert (back.message, back.hint, str(back)) == ("it broke", "mend it", "it broke")


def test_no_hint_stays_no_hint() -> None:
    assert errors.from_dict(errors.CacheError("full").to_dict()).hint is None


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["kind", "message", "hint"]), inner),
    )
)
def test_any_json_becomes_an_error(fields: object) -> None:
    assert isinstance(errors.from_dict(fields), errors.TierblkError)
