"""Settings: frozen models out of a TOML file, with every error of the file reported at once.

Once loaded, sizes are bytes (int) and durations are seconds (float); the file writes them with their units.
A setting has one name everywhere: `remote.read_timeout` is the key, the attribute and the word in messages.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from tierblk import address
from tierblk.errors import ConfigError
from tierblk.extent import BLOCK_BYTES
from tierblk.units import GIB, KIB, MIB, TIB, format_duration, format_exact_size, parse_duration, parse_size

FILE_BYTES_MAX = 1 * MIB
NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,31}"

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


def _range(value: Any, least: Any, most: Any, show: Callable[[Any], str]) -> None:
    if value < least:
        raise ValueError(f"must be at least {show(least)}, is {show(value)}")
    if value > most:
        raise ValueError(f"must be at most {show(most)}, is {show(value)}")


def _shown(value: object) -> str:
    """A TOML value as an error shows it: what it is and of what type, short."""
    kinds = {
        bool: "a boolean",
        int: "an integer",
        float: "a float",
        str: "a string",
        list: "an array",
        dict: "a table",
    }
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    return kind if isinstance(value, list | dict) else f"{_quoted(value)} ({kind})"


def _quoted(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # JSON's escapes keep a message on one line, whatever the value holds.
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _size(least: int, most: int, multiple: int = 1) -> BeforeValidator:
    def check(value: object) -> int:
        size_bytes = parse_size(value)  # type: ignore[arg-type]  # says itself what is no size
        _range(size_bytes, least, most, format_exact_size)
        if size_bytes % multiple:
            raise ValueError(
                f"must be a multiple of {format_exact_size(multiple)}, is {format_exact_size(size_bytes)}"
            )
        return size_bytes

    return BeforeValidator(check)


def _duration(least: float, most: float) -> BeforeValidator:
    def check(value: object) -> float:
        seconds = parse_duration(value)  # type: ignore[arg-type]  # says itself what is no duration
        _range(seconds, least, most, format_duration)
        return seconds

    return BeforeValidator(check)


def _patience(value: object) -> float:
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
    raise ValueError(f'must be "wait", "wait" and a duration ("wait 30s") or "fail", is {_shown(value)}')


def show_patience(patience_s: float) -> str:
    """A patience as the config file writes it."""
    if math.isinf(patience_s):
        return "wait"
    return f"wait {patience_s!r}s" if patience_s else "fail"


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, is {_shown(value)}")
    return value


def _integer(least: int, most: int) -> BeforeValidator:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be an integer, is {_shown(value)}")
        _range(value, least, most, str)
        return value

    return BeforeValidator(check)


@BeforeValidator
def _queues(value: object) -> int | str:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'must be "auto" or an integer, is {_shown(value)}')
    _range(value, 1, 64, str)
    return value


def _percent(least: float, most: float) -> BeforeValidator:
    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be a number, is {_shown(value)}")
        if not least <= value <= most:  # also catches nan
            raise ValueError(f"must be from {least:g} to {most:g} percent, is {value:g}")
        return float(value)

    return BeforeValidator(check)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, is {_shown(value)}")
    return value


def _name(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(NAME_PATTERN, text):
        raise ValueError(
            "must be 1 to 32 of a-z, 0-9, dot, underscore and dash, beginning with a letter or a digit, "
            f"is {_quoted(text)}"
        )
    return text


def _absolute_path(value: object) -> Path:
    text = _text(value)
    if not text.startswith("/") or "\0" in text:
        raise ValueError(f"must be an absolute path, is {_quoted(text)}")
    return Path(text)


def _url(value: object) -> str:
    text = _text(value)
    shown = _quoted(address.shown(text))
    if re.search(r"[\x00-\x20\x7f]", text):
        raise ValueError(f"must have no spaces or control characters (write %20 for a space), is {shown}")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL ({error}): {shown}") from None
    if parts.scheme not in ("http", "https", "file"):
        raise ValueError(f"must begin with http://, https:// or file://, is {shown}")
    if parts.fragment:
        raise ValueError(f"must not have a fragment (#{parts.fragment[:20]})")
    if parts.scheme == "file":
        if host not in (None, "localhost") or port is not None or not parts.path.startswith("/"):
            raise ValueError(f"must be file:// and an absolute path (file:///srv/disk.raw), is {shown}")
        return text
    if not host:
        raise ValueError(f"must name a host, is {shown}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "must not hold a user or password, which status and logs would show; "
            "put an Authorization line into [remote.headers]"
        )
    return text


def _headers(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"must be a table of strings, is {_shown(value)}")
    for name, text in value.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ValueError(f"{_quoted(name)} is not the name of an HTTP header")
        if name.lower() in OWN_HEADERS:
            raise ValueError(f"{name} is set by tierblk itself")
        # The text may be a secret, so the message does not repeat it.
        if not isinstance(text, str) or not re.fullmatch(r"[\t\x20-\x7e]*", text):
            raise ValueError(f"the text of {name} must be a string of printable ASCII")
    return dict(value)


# repr of a float is exact, so that the daemon reads back what the command line read.
Seconds = Annotated[float, PlainSerializer(lambda seconds: f"{seconds!r}s")]
Patience = Annotated[float, BeforeValidator(_patience), PlainSerializer(show_patience)]


class Settings(BaseModel):
    """Base of all tables: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DeviceSettings(Settings):
    """[device]: one block device."""

    name: Annotated[str, BeforeValidator(_name)]
    plane: Literal["auto", "copy", "zero-copy"] = "auto"
    queues: Annotated[int | Literal["auto"], _queues] = "auto"
    queue_depth: Annotated[int, _integer(1, 1024)] = 64
    hot_memory: Annotated[int, _size(0, 64 * GIB, 8 * BLOCK_BYTES)] = 0
    on_outage: Patience = math.inf
    recovery: Annotated[bool, BeforeValidator(_boolean)] = True


class BaseSettings(Settings):
    """[base]: where the image is."""

    url: Annotated[str, BeforeValidator(_url)]
    format: Literal["raw"] = "raw"


class CacheSettings(Settings):
    """[cache]: the local tier. Belongs to the directory: all configs that name it must agree."""

    dir: Annotated[Path, BeforeValidator(_absolute_path)]
    size: Annotated[int, _size(16 * MIB, 128 * TIB)]
    free_low_percent: Annotated[float, _percent(0.1, 50)] = 2.0
    free_high_percent: Annotated[float, _percent(0.1, 50)] = Field(default=4.0, validate_default=True)
    commit_interval: Annotated[Seconds, _duration(0.1, 600)] = 5.0

    @field_validator("free_high_percent")
    @classmethod
    def _above_low(cls, high: float, info: ValidationInfo) -> float:
        low = info.data.get("free_low_percent", 0.0)
        if high < low:
            raise ValueError(f"must not be below free_low_percent ({low:g}), is {high:g}")
        return high


class RemoteSettings(Settings):
    """[remote]: how the image is fetched."""

    max_requests: Annotated[int, _integer(1, 256)] = 32
    max_window: Annotated[int, _size(64 * KIB, 8 * MIB, BLOCK_BYTES)] = 8 * MIB
    staging: Annotated[int, _size(1 * MIB, 4 * GIB, BLOCK_BYTES)] = Field(
        default=32 * MIB, validate_default=True
    )
    connect_timeout: Annotated[Seconds, _duration(0.1, 600)] = 10.0
    read_timeout: Annotated[Seconds, _duration(0.1, 3600)] = 30.0
    retries: Annotated[int, _integer(0, 100)] = 3
    retry_delay: Annotated[Seconds, _duration(0.001, 60)] = 0.2
    readahead: Annotated[bool, BeforeValidator(_boolean)] = True
    hedge_percent: Annotated[float, _percent(0, 10)] = 2.0
    max_bandwidth: Annotated[int | None, _size(64 * KIB, 1 * TIB)] = None
    max_request_rate: Annotated[int | None, _integer(1, 1_000_000)] = None
    ca_file: Annotated[Path | None, BeforeValidator(_absolute_path)] = None
    headers: Annotated[dict[str, str], BeforeValidator(_headers)] = Field(default_factory=dict)

    @field_validator("staging")
    @classmethod
    def _holds_a_window(cls, staging: int, info: ValidationInfo) -> int:
        window = info.data.get("max_window", 0)
        if staging < window:
            raise ValueError(
                f"must not be below max_window ({format_exact_size(window)}), is {format_exact_size(staging)}"
            )
        return staging


class DaemonSettings(Settings):
    """[daemon]: the process that serves a cache directory; the file that it was started with counts."""

    watchdog: Annotated[Seconds, _duration(0, 3600)] = 60.0


class Config(Settings):
    """One config file: one device, its image, its cache and how it is fetched."""

    device: DeviceSettings
    base: BaseSettings
    cache: CacheSettings
    remote: RemoteSettings = Field(default_factory=RemoteSettings)
    daemon: DaemonSettings = Field(default_factory=DaemonSettings)

    _path: Path = PrivateAttr(default=Path("/"))

    @property
    def path(self) -> Path:
        """The file that it came from."""
        return self._path

    def to_document(self) -> dict[str, Any]:
        """What `parse` turns back into an equal Config, made of what JSON has."""
        return self.model_dump(mode="json", exclude_none=True)


def load(path: str | os.PathLike[str]) -> Config:
    """The settings of a TOML file. ConfigError names every fault of the file at once."""
    path = Path(os.path.abspath(path))
    try:
        document = tomllib.loads(_read(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {_lower_first(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not a config file: its values are nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{path} is not a config file: {_lower_first(str(error))}") from None
    return parse(document, path)


def parse(document: Mapping[str, Any], path: Path) -> Config:
    """The settings of a TOML document that is already read; path is what messages call it. ConfigError."""
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        faults = sorted(set(_faults(error)))
        if len(faults) == 1:
            raise ConfigError(f"{path}: {faults[0]}") from None
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(f"{path} has {len(faults)} errors:{lines}") from None
    config._path = path
    return config


def cache_conflicts(ours: Config, theirs: Config) -> list[str]:
    """How two configs of one cache directory disagree about it: a sentence a key, naming both files.

    `dir` is not compared: two spellings can name one directory, and who calls this knows that they do.
    """
    found = []
    for key in sorted(CacheSettings.model_fields.keys() - {"dir"}):
        one, other = getattr(ours.cache, key), getattr(theirs.cache, key)
        if one != other:
            shown = [format_setting(key, value) for value in (one, other)]
            found.append(f"cache.{key} is {shown[0]} in {ours.path} and {shown[1]} in {theirs.path}")
    return found


def format_setting(key: str, value: object) -> str:
    """A value of a CacheSettings as its file would say it."""
    if key == "size" and isinstance(value, int):
        return format_exact_size(value)
    if key == "commit_interval" and isinstance(value, float):
        return format_duration(value)
    return str(value)


def _read(path: Path) -> str:
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for somebody to write into it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
                raise ConfigError(f"cannot read the config {path}: it is {what}")
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        reason = _lower_first(error.strerror or str(error))
        raise ConfigError(f"cannot read the config {path}: {reason}") from None
    except ValueError:
        raise ConfigError(f"cannot read the config {str(path)!r}: no file can have this name") from None
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(
            f"cannot read the config {path}: it is larger than {format_exact_size(FILE_BYTES_MAX)}, "
            "which no config file is"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"cannot read the config {path}: line {line} is not UTF-8 text") from None


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _faults(error: ValidationError) -> Iterable[str]:
    """One line `key: what is wrong` for each fault that pydantic found."""
    for fault in error.errors(include_url=False):
        key, value = _key(fault["loc"]), fault["input"]
        match fault["type"]:
            case "missing":
                yield from _missing(key)
            case "extra_forbidden":
                yield _unknown(key, fault["loc"])
            case "model_type" | "model_attributes_type":
                yield f"{key}: must be a table ([{key}]), is {_shown(value)}"
            case "literal_error":
                yield f"{key}: must be {_one_of(fault['loc'])}, is {_quoted(value)}"
            case "value_error":
                yield f"{key}: {fault['ctx']['error']}"
            case _:
                yield f"{key}: {_lower_first(fault['msg'])}"


def _key(loc: Iterable[int | str]) -> str:
    """A key as TOML would write it."""
    parts = (str(part) for part in loc)
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", part) else _quoted(part) for part in parts)


def _model(loc: Iterable[int | str]) -> type[BaseModel]:
    """The table that a key is in."""
    model: type[BaseModel] = Config
    for part in loc:
        model = model.model_fields[str(part)].annotation  # type: ignore[assignment]
    return model


def _missing(key: str) -> Iterable[str]:
    if "." in key:
        yield f"{key}: is required"
        return
    for name, field in _model([key]).model_fields.items():
        if field.is_required():
            yield f"{key}.{name}: is required"


def _unknown(key: str, loc: tuple[int | str, ...]) -> str:
    known = sorted(_model(loc[:-1]).model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, 1)
    guess = f"; did you mean {close[0]}?" if close else ""
    what = "table or key" if len(loc) == 1 else "key"
    return f"{key}: unknown {what} (known here: {', '.join(known)}){guess}"


def _one_of(loc: tuple[int | str, ...]) -> str:
    choices = get_args(_model(loc[:-1]).model_fields[str(loc[-1])].annotation)
    return " or ".join(f'"{choice}"' for choice in choices)
