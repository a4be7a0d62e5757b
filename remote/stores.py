"""Opens the store at an address. What speaks HTTP is imported when it is needed: aiohttp and the libraries of
credentials cost more start-up time than all the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tierblk import address
from tierblk.errors import ConfigError, RemoteRefused
from tierblk.remote.store import Store

if TYPE_CHECKING:
    from tierblk.config import RemoteSettings, StoreSettings
    from tierblk.remote.client import Session

_PATH_STYLE = {"auto": None, "path": True, "virtual": False}


async def open_store(url: str, settings: StoreSettings, remote: RemoteSettings) -> Store:
    """The store at s3://, gs://, az:// or file://. Nobody is asked yet, neither for objects nor for
    credentials.

    settings: [store] of the config, of which each store takes what it knows. remote: [remote], whose
    time-outs and ca_file count here too. ConfigError for an address, endpoint, ca_file or variable of
    credentials that cannot be used; RemoteRefused for an address that is no store's.
    """
    match urlsplit(url).scheme.lower():
        case "file":
            from tierblk.remote.directory import DirectoryStore

            return DirectoryStore(url)
        case "s3":
            return await _with_session(_s3(url, settings), remote)
        case "gs":
            return await _with_session(_gs(url, settings), remote)
        case "az":
            return await _with_session(_az(url, settings), remote)
    raise RemoteRefused(
        f"{address.shown(url)!r:.200} is no address of a store",
        "use s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://ACCOUNT/CONTAINER/PREFIX or file:///PATH",
    )


async def _with_session(make: Callable[[Session], Store], remote: RemoteSettings) -> Store:
    from tierblk.remote.client import new_session

    session = await new_session(remote)
    try:
        return make(session)
    except ConfigError:
        await session.close()
        raise


def _s3(url: str, settings: StoreSettings) -> Callable[[Session], Store]:
    from tierblk.remote.credentials import ChainWallet
    from tierblk.remote.s3 import S3Settings, S3Store

    path_style = _PATH_STYLE[settings.addressing]
    own = S3Settings(settings.region, settings.endpoint, path_style)
    return lambda session: S3Store(url, own, ChainWallet(settings.profile), session)


def _gs(url: str, settings: StoreSettings) -> Callable[[Session], Store]:
    from tierblk.remote import google
    from tierblk.remote.gs import GsSettings, GsStore
    from tierblk.remote.wallet import RenewingWallet

    own = GsSettings(settings.endpoint) if settings.endpoint else GsSettings()
    return lambda session: GsStore(url, own, RenewingWallet(google.from_places), session)


def _az(url: str, settings: StoreSettings) -> Callable[[Session], Store]:
    from tierblk.remote import azure
    from tierblk.remote.az import AzSettings, AzStore, az_parts

    access = azure.found(az_parts(url)[0])
    own = AzSettings(settings.endpoint or access.endpoint)
    return lambda session: AzStore(url, own, access.wallet, session)
