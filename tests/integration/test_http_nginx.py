"""The HTTP source against a real nginx, plain and over TLS: right bytes, few connections, bodies in place."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import TCPConnector

from tests.integration.servers import Nginx, remote_settings
from tierblk.errors import ConfigError, RemoteRefused
from tierblk.remote import Fetcher, open_source
from tierblk.remote.http import HttpSource, open_http

MIB = 1 << 20
IMAGE = random.Random(2).randbytes(6 * MIB + 4096 + 512)


@dataclass(frozen=True)
class Site:
    """A running nginx and the folder that it serves."""

    nginx: Nginx
    root: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """nginx with image.raw, and an empty file."""
    home, root = tmp_path_factory.mktemp("nginx"), tmp_path_factory.mktemp("root")
    (root / "image.raw").write_bytes(IMAGE)
    (root / "empty.raw").touch()
    with Nginx(home, root) as nginx:
        yield Site(nginx, root)


@pytest.fixture(params=["http", "https"])
async def source(request: pytest.FixtureRequest, site: Site) -> AsyncIterator[HttpSource]:
    """The image, opened."""
    url = site.nginx.url("image.raw", tls=request.param == "https")
    source = await open_http(url, remote_settings(ca_file=str(site.nginx.ca_file)))
    yield source
    await source.aclose()


async def read(source: HttpSource, offset_bytes: int, length_bytes: int) -> bytes:
    """One read, whose progress must be as it is promised."""
    buffer, seen = bytearray(length_bytes), [0]

    def progress(count: int) -> None:
        assert count > seen[-1]
        assert buffer[:count] == IMAGE[offset_bytes : offset_bytes + count]
        seen.append(count)

    await source.read_into(offset_bytes, memoryview(buffer), progress)
    assert seen[-1] == length_bytes
    return bytes(buffer)


async def test_identity_is_what_the_server_says(source: HttpSource) -> None:
    identity = source.identity
    assert identity.size_bytes == len(IMAGE)
    assert identity.validator.startswith('etag:"')
    assert identity.url.endswith("/image.raw")


@pytest.mark.parametrize("direct", [True, False])
async def test_sixty_random_ranges(source: HttpSource, site: Site, direct: bool) -> None:
    if not direct:
        settings = remote_settings(ca_file=str(site.nginx.ca_file))
        await source.aclose()
        source = await open_http(source.identity.url, settings, may_go_direct=False)
    chance = random.Random(3)
    before = len(site.nginx.log())
    for _ in range(60):
        length_bytes = min(int(2 ** chance.uniform(0, 20.5)), len(IMAGE))
        offset_bytes = chance.randrange(len(IMAGE) - length_bytes + 1)
        assert (
            await read(source, offset_bytes, length_bytes)
            == IMAGE[offset_bytes : offset_bytes + length_bytes]
        )
    assert (source.direct_bodies, source.read_bodies) == ((60, 0) if direct else (0, 60))
    lines = site.nginx.log()[before:]
    assert len({line.connection for line in lines}) == 1, "a connection is used again"
    await source.aclose()


async def test_many_at_once(source: HttpSource, site: Site) -> None:
    before = len(site.nginx.log())
    fetcher = Fetcher(source, remote_settings(max_requests=4))
    buffer = bytearray(len(IMAGE))

    async def fetch(offset_bytes: int) -> None:
        view = memoryview(buffer)[offset_bytes : offset_bytes + 65536]
        await fetcher.fetch(offset_bytes, view, lambda count: None)

    offsets = list(range(0, len(IMAGE), 65536))
    random.Random(4).shuffle(offsets)
    await asyncio.gather(*map(fetch, offsets))
    assert buffer == IMAGE
    assert fetcher.counters.requests == len(offsets) == source.direct_bodies
    assert fetcher.counters.fetched_bytes == len(IMAGE)
    assert fetcher.counters.in_flight == 0
    assert len({line.connection for line in site.nginx.log()[before:]}) <= 4


async def test_redirect_is_resolved_once(site: Site) -> None:
    source = await open_http(site.nginx.url("moved/image.raw"), remote_settings())
    before = len(site.nginx.log())
    await read(source, 0, 4096)
    await read(source, 4096, 100_000)
    assert [line.uri for line in site.nginx.log()[before:]] == ["/image.raw"] * 2
    assert source.direct_bodies == 2
    assert source.identity.url == site.nginx.url("moved/image.raw")
    await source.aclose()


async def test_redirect_to_https(site: Site) -> None:
    settings = remote_settings(ca_file=str(site.nginx.ca_file))
    source = await open_http(site.nginx.url("secure/image.raw"), settings)
    await read(source, 1000, 50_000)
    await source.aclose()


@pytest.mark.parametrize(
    ("path", "tls", "message"),
    [
        ("missing.raw", False, "nothing at this address (404)"),
        ("empty.raw", False, "is empty (0 bytes)"),
        ("loop/image.raw", False, "was sent on more than 5 times"),
        ("insecure/image.raw", True, "leads from https to unencrypted http://"),
    ],
)
async def test_what_cannot_be_a_source(site: Site, path: str, tls: bool, message: str) -> None:
    settings = remote_settings(ca_file=str(site.nginx.ca_file))
    with pytest.raises(RemoteRefused) as caught:
        await open_source(site.nginx.url(path, tls=tls), settings)
    assert message in str(caught.value)
    assert site.nginx.url(path, tls=tls) in str(caught.value)


async def test_unknown_certificate(site: Site) -> None:
    settings = remote_settings(ca_file=str(site.nginx.stranger_ca_file))
    with pytest.raises(RemoteRefused, match=r"certificate is not trusted: .*issuer") as caught:
        await open_source(site.nginx.url("image.raw", tls=True), settings)
    assert "remote.ca_file" in (caught.value.hint or "")


async def test_plain_http_behind_https(site: Site) -> None:
    with pytest.raises(RemoteRefused, match="TLS failed"):
        await open_source(f"https://{site.nginx.plain}/image.raw", remote_settings())


@pytest.mark.parametrize("content", [None, b"no certificate"])
async def test_bad_ca_file(site: Site, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"remote\.ca_file .*/ca\.pem cannot be used"):
        await open_source(site.nginx.url("image.raw", tls=True), remote_settings(ca_file=str(path)))


async def test_a_changed_file_is_noticed(site: Site) -> None:
    path = site.root / "changing.raw"
    path.write_bytes(bytes(8192))
    source = await open_source(site.nginx.url("changing.raw"), remote_settings())
    path.write_bytes(bytes(16384))
    with pytest.raises(RemoteRefused, match=r"has changed.*, 8192 bytes.*, 16384 bytes"):
        await source.read_into(0, memoryview(bytearray(4096)), lambda count: None)
    await source.aclose()


def _gone(self: object) -> object:
    raise AttributeError("renamed")


@pytest.mark.parametrize(
    ("where", "what", "message"),
    [
        ("DirectHandler._reschedule_timeout", property(_gone), "cannot go straight into the buffer"),
        ("DirectConnector._factory", property(_gone), "cannot go straight into the buffer"),
        ("DirectConnector.__init__", TCPConnector.__init__, "do not go straight into the buffer"),
    ],
)
async def test_without_a_private_name_of_aiohttp(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    what: object,
    message: str,
) -> None:
    monkeypatch.setattr(f"tierblk.remote.direct.{where}", what, raising=False)
    source = await open_http(site.nginx.url("image.raw"), remote_settings())
    assert await read(source, 0, 100_000) == IMAGE[:100_000]
    assert await read(source, 5, 10_000) == IMAGE[5:10_005]
    assert (source.direct_bodies, source.read_bodies) == (0, 2)
    assert caplog.text.count(message) == 1
    await source.aclose()
