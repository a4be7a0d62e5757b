"""A server that is away when its image is opened: the version known from last time is pinned again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.servers import Nginx, remote_settings
from tierblk.errors import RemoteRefused, RemoteUnavailable
from tierblk.remote import Identity, open_source

SETTINGS = remote_settings(retries=0, connect_timeout="2s", read_timeout="2s")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "srv"
    root.mkdir()
    (tmp_path / "nginx").mkdir()
    (root / "image").write_bytes(os.urandom(8192))
    return root


async def _identity(url: str) -> Identity:
    source = await open_source(url, SETTINGS)
    await source.aclose()
    return source.identity


async def test_the_known_version_is_pinned_and_reads_say_that_nobody_answers(
    tmp_path: Path, root: Path
) -> None:
    with Nginx(tmp_path / "nginx", root) as server:
        known = await _identity(server.url("image"))
    source = await open_source(known.url, SETTINGS, known)
    assert source.identity == known
    with pytest.raises(RemoteUnavailable):
        await source.read_into(0, memoryview(bytearray(512)), lambda count: None)
    await source.aclose()


async def test_unknown_images_are_not_invented(tmp_path: Path, root: Path) -> None:
    with Nginx(tmp_path / "nginx", root) as server:
        url = server.url("image")
    with pytest.raises(RemoteUnavailable):
        await open_source(url, SETTINGS)


async def test_a_server_that_answers_decides_which_version_it_is(tmp_path: Path, root: Path) -> None:
    with Nginx(tmp_path / "nginx", root) as server:
        old = Identity(server.url("image"), 8192, 'etag:"old"')
        source = await open_source(old.url, SETTINGS, old)
        assert source.identity != old
        await source.aclose()


async def test_another_version_is_refused_once_the_server_is_back(tmp_path: Path, root: Path) -> None:
    """Opened while it was away, by the way of a source that trusts what it is told."""
    with Nginx(tmp_path / "nginx", root) as server:
        from tierblk.remote.http import HttpSource

        source = await open_source(server.url("image"), SETTINGS)
        assert isinstance(source, HttpSource)
        source.trust(Identity(source.identity.url, 8192, 'etag:"old"'))
        with pytest.raises(RemoteRefused, match="old"):
            await source.read_into(0, memoryview(bytearray(512)), lambda count: None)
        await source.aclose()


async def test_a_pinned_version_is_served_with_nobody_asked(tmp_path: Path, root: Path) -> None:
    """A daemon that takes over a device shows what the device showed, whatever the server has now."""
    with Nginx(tmp_path / "nginx", root) as server:
        pin = await _identity(server.url("image"))
        asked = len(server.log())
        source = await open_source(pin.url, SETTINGS, pin=pin)
        assert source.identity == pin
        assert len(server.log()) == asked
        buffer = bytearray(8192)
        await source.read_into(0, memoryview(buffer), lambda count: None)
        assert buffer == (root / "image").read_bytes()
        (root / "image").write_bytes(os.urandom(16384))
        with pytest.raises(
            RemoteRefused, match=r"8192 bytes, and the server now has .* 16384 bytes"
        ) as caught:
            await source.read_into(0, memoryview(buffer), lambda count: None)
        assert "tierblk repin" in (caught.value.hint or "")
        await source.aclose()
    source = await open_source(pin.url, SETTINGS, pin=pin)
    with pytest.raises(RemoteUnavailable):
        await source.read_into(0, memoryview(bytearray(512)), lambda count: None)
    await source.aclose()


async def test_a_pinned_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(8192))
    url, buffer = path.as_uri(), memoryview(bytearray(8192))
    pin = await _identity(url)
    moved = path.rename(tmp_path / "moved")
    source = await open_source(url, SETTINGS, pin=pin)
    assert source.identity == pin
    with pytest.raises(RemoteUnavailable, match="there is no file"):
        await source.read_into(0, buffer, lambda count: None)
    path.write_bytes(bytes(8192))
    with pytest.raises(RemoteRefused, match="has changed") as caught:
        await source.read_into(0, buffer, lambda count: None)
    assert "tierblk repin" in (caught.value.hint or "")
    moved.rename(path)
    await source.read_into(0, buffer, lambda count: None)
    assert buffer == path.read_bytes()
    await source.aclose()
    with pytest.raises(RemoteRefused, match="closed"):
        await source.read_into(0, buffer, lambda count: None)
