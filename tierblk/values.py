"""Values of settings: what a TOML file may say, as pydantic's validators, and how an error shows it.

Sizes become bytes (int) and durations seconds (float). A validator raises ValueError, whose text follows the
key in the message. What it takes is said once more as a type, which the description of the control interface
shows (openapi.py).
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import BeforeValidator, Field

from tierblk import address
from tierblk.units import format_duration, format_exact_size, parse_duration, parse_size

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,31}"
GROUP_PATTERN = r"[A-Za-z_][A-Za-z0-9_.-]{0,31}"

# What every request carries by itself; a second one would break the checks that rest on it.
OWN_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "host",
        "if-match",
        "if-range",
        "if-unmodified-since",
        "range",
        "transfer-encoding",
    }
)


_SIZE = r"^[0-9]{1,20}(\.[0-9]{1,9})? ?(B|[KMGTP]iB|[kMGTP]B)?$"
_DURATION = r"^[0-9]{1,20}(\.[0-9]{1,9})? ?(ms|s|m|h)$"
_HEADER = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"


def text(pattern: str) -> Any:
    """The type of a string that a pattern describes."""
    return Annotated[str, Field(pattern=pattern)]


def _range(value: Any, least: Any, most: Any, show: Callable[[Any], str]) -> None:
    if value < least:
        raise ValueError(f"must be at least {show(least)}, is {show(value)}")
    if value > most:
        raise ValueError(f"must be at most {show(most)}, is {show(value)}")


def kind(value: object) -> str:
    """Of what type a TOML value is, for an error that does not show it."""
    kinds = {
        bool: "a boolean",
        int: "an integer",
        float: "a float",
        str: "a string",
        list: "an array",
        dict: "a table",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def shown(value: object) -> str:
    """A TOML value as an error shows it: what it is and of what type, short."""
    return kind(value) if isinstance(value, list | dict) else f"{quoted(value)} ({kind(value)})"


def quoted(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # JSON's escapes keep a message on one line, whatever the value holds.
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def size(least: int, most: int, multiple: int = 1) -> BeforeValidator:
    def check(value: object) -> int:
        size_bytes = parse_size(value)  # type: ignore[arg-type]  # says itself what is no size
        _range(size_bytes, least, most, format_exact_size)
        if size_bytes % multiple:
            raise ValueError(
                f"must be a multiple of {format_exact_size(multiple)}, is {format_exact_size(size_bytes)}"
            )
        return size_bytes

    number = Annotated[int, Field(ge=least, le=most, multiple_of=multiple)]
    return BeforeValidator(check, json_schema_input_type=number | text(_SIZE))


def duration(least: float, most: float) -> BeforeValidator:
    def check(value: object) -> float:
        seconds = parse_duration(value)  # type: ignore[arg-type]  # says itself what is no duration
        _range(seconds, least, most, format_duration)
        return seconds

    return BeforeValidator(check, json_schema_input_type=text(_DURATION))


def patience(value: object) -> float:
    """How long a read may wait for the remote, in seconds: "wait" is for ever, "fail" as long as the
    retries."""
    if isinstance(value, str):
        if value == "wait":
            return math.inf
        if value == "fail":
            return 0.0
        if value.startswith("wait "):
            seconds = parse_duration(value.removeprefix("wait ").strip())
            _range(seconds, 1.0, 86400.0, format_duration)
            return seconds
    raise ValueError(f'must be "wait", "wait" and a duration ("wait 30s") or "fail", is {shown(value)}')


def show_patience(patience_s: float) -> str:
    """A patience as the config file writes it."""
    if math.isinf(patience_s):
        return "wait"
    return f"wait {patience_s!r}s" if patience_s else "fail"


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, is {shown(value)}")
    return value


def integer(least: int, most: int) -> BeforeValidator:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be an integer, is {shown(value)}")
        _range(value, least, most, str)
        return value

    return BeforeValidator(check, json_schema_input_type=Annotated[int, Field(ge=least, le=most)])


def queues(value: object) -> int | str:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'must be "auto" or an integer, is {shown(value)}')
    _range(value, 1, 64, str)
    return value


def percent(least: float, most: float) -> BeforeValidator:
    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be a number, is {shown(value)}")
        if not least <= value <= most:  # also catches nan
            raise ValueError(f"must be from {least:g} to {most:g} percent, is {quoted(value)}")
        return float(value)

    return BeforeValidator(check, json_schema_input_type=Annotated[float, Field(ge=least, le=most)])


def string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, is {shown(value)}")
    return value


def name(value: object) -> str:
    text = string(value)
    if not re.fullmatch(NAME_PATTERN, text):
        raise ValueError(
            "must be 1 to 32 of a-z, 0-9, dot, underscore and dash, beginning with a letter or a digit, "
            f"is {quoted(text)}"
        )
    return text


def absolute_path(value: object) -> Path:
    text = string(value)
    if not text.startswith("/") or "\0" in text:
        raise ValueError(f"must be an absolute path, is {quoted(text)}")
    return Path(text)


def url(value: object) -> str:
    """Of an image."""
    text, shown, parts = _parts(value)
    if parts.scheme not in ("http", "https", "file"):
        raise ValueError(f"must begin with http://, https:// or file://, is {shown}")
    if parts.fragment:
        raise ValueError(f"must not have a fragment (#...), which no server sees: {shown}")
    if parts.scheme == "file":
        return _file(text, shown, parts, "file:///srv/disk.raw")
    if not parts.hostname:
        raise ValueError(f"must name a host, is {shown}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "must not hold a user or password, which status and logs would show; "
            "put an Authorization line into [remote.headers]"
        )
    return text


def store_url(value: object) -> str:
    """Of a volume in a store."""
    text, shown, parts = _parts(value)
    patterns = {"s3": "s3://BUCKET/PREFIX", "gs": "gs://BUCKET/PREFIX", "az": "az://ACCOUNT/CONTAINER/PREFIX"}
    if parts.scheme not in (*patterns, "file"):
        raise ValueError(f"must begin with s3://, gs://, az:// or file://, is {shown}")
    if parts.query or parts.fragment:
        raise ValueError(f"must have neither a query nor a fragment, is {shown}")
    if parts.scheme == "file":
        return _file(text, shown, parts, "file:///srv/volumes/web-1")
    if "@" in parts.netloc:
        raise ValueError(
            "must not hold a user or password: credentials come from where the vendor's own tools look"
        )
    if not parts.netloc or (parts.scheme == "az" and not parts.path.strip("/")):
        raise ValueError(f"must be {patterns[parts.scheme]}, is {shown}")
    return text


def endpoint(value: object) -> str:
    """Of a store's server."""
    text, shown, parts = _parts(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"must be http://HOST or https://HOST, with a port if it needs one, is {shown}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"must have no user, query or fragment, is {shown}")
    return text


def loopback(value: object) -> str:
    """Where metrics are served: an address that only this machine reaches, and a port."""
    text = string(value)
    try:
        address = ipaddress.ip_address(host_and_port(text)[0])
    except ValueError:
        raise ValueError(
            'must be a loopback address and a port, such as "127.0.0.1:9464" or "[::1]:9464", '
            f"is {quoted(text)}"
        ) from None
    if not address.is_loopback:
        raise ValueError(
            "must be a loopback address (127.0.0.1 or [::1]), since there is neither a password nor TLS, "
            f"is {quoted(text)}; what carries it further, such as a proxy, belongs in front of it"
        )
    return text


def host_and_port(text: str) -> tuple[str, int]:
    """(address, port) of "127.0.0.1:9464" or "[::1]:9464". ValueError: it is none of them."""
    found = re.fullmatch(r"(?:([0-9.]{7,15})|\[([0-9a-f:.]{2,45})\]):([0-9]{1,5})", text, re.ASCII | re.I)
    if found is None or not 1 <= int(found[3]) <= 65535:
        raise ValueError(f"{quoted(text)} is not an address and a port")
    return found[1] or found[2], int(found[3])


def word(value: object) -> str:
    """A name that others gave, in printable ASCII without spaces."""
    text = string(value)
    if not re.fullmatch(r"[\x21-\x7e]{1,200}", text):
        raise ValueError(f"must be 1 to 200 printable characters without spaces, is {quoted(text)}")
    return text


def group(value: object) -> str:
    """The name of a group of this machine."""
    text = string(value)
    if not re.fullmatch(GROUP_PATTERN, text):
        raise ValueError(f"must be the name of a group, is {quoted(text)}")
    return text


def _parts(value: object) -> tuple[str, str, SplitResult]:
    """(the address, the same for a message, its parts)."""
    text = string(value)
    shown = quoted(address.shown(text))
    if re.search(r"[\x00-\x20\x7f]", text):
        raise ValueError(f"must have no spaces or control characters (write %20 for a space), is {shown}")
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  # raises for a port that is none
    except ValueError:  # whose text may repeat a password
        raise ValueError("is not a URL: its host or its port cannot be one") from None
    return text, shown, parts


def _file(text: str, shown: str, parts: SplitResult, example: str) -> str:
    if parts.hostname not in (None, "localhost") or parts.port is not None or not parts.path.startswith("/"):
        raise ValueError(f"must be file:// and an absolute path ({example}), is {shown}")
    return text


def headers(value: object) -> dict[str, str]:
    # What is wrong may be a secret in the wrong place, so no message repeats it.
    if not isinstance(value, dict):
        raise ValueError('must be a table of strings ([remote.headers], then Name = "text")')
    for name, text in value.items():
        if not re.fullmatch(_HEADER, name):
            begin = re.match(f"(?:{_HEADER})?", name)
            raise ValueError(
                f"{quoted((begin[0][:40] if begin else '') + '…')} is not the name of an HTTP header"
            )
        if name.lower() in OWN_HEADERS:
            raise ValueError(f"{name} is set by tierblk itself")
        if not isinstance(text, str) or not re.fullmatch(r"[\t\x20-\x7e]*", text):
            raise ValueError(f"the text of {name} must be a string of printable ASCII")
    return dict(value)


def _validated(check: Callable[[object], Any], takes: Any) -> BeforeValidator:
    return BeforeValidator(check, json_schema_input_type=takes)


NAME = _validated(name, text(f"^{NAME_PATTERN}$"))
QUEUES = _validated(queues, Annotated[int, Field(ge=1, le=64)] | Literal["auto"])
PATIENCE = _validated(patience, text(r"^(wait|fail|wait [0-9]{1,20}(\.[0-9]{1,9})? ?(ms|s|m|h))$"))
BOOLEAN = _validated(boolean, bool)
ABSOLUTE_PATH = _validated(absolute_path, text(r"^/[^\x00]*$"))
IMAGE_URL = _validated(url, text("^(https?|file)://"))
STORE_URL = _validated(store_url, text("^(s3|gs|az|file)://"))
ENDPOINT = _validated(endpoint, text("^https?://"))
WORD = _validated(word, text(r"^[\x21-\x7e]{1,200}$"))
LOOPBACK = _validated(loopback, text(r"^[^\s]+:[0-9]{1,5}$"))
GROUP = _validated(group, text(f"^{GROUP_PATTERN}$"))
HEADERS = _validated(headers, dict[text(f"^{_HEADER}$"), text(r"^[\t\x20-\x7e]*$")])  # type: ignore[misc]
