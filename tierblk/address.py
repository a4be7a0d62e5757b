"""Addresses as people and logs may see them. Pure."""

from __future__ import annotations


def shown(url: str) -> str:
    """The address without user, password and fragment, and of a query, which may be a signature, only that
    there is one. Any text will do: it may come from a server."""
    url = url.partition("#")[0]
    url, _, query = url.partition("?")
    scheme, slashes, rest = url.partition("://")
    if slashes:
        authority, slash, path = rest.partition("/")
        rest = authority.rpartition("@")[2] + slash + path
    else:
        scheme, rest = "", url
    return f"{scheme}{slashes}{rest}{'?…' if query else ''}"
