"""Settings: frozen models out of a TOML file, with every error of the file reported at once.

Once loaded, sizes are bytes (int) and durations are seconds (float); the file writes them with their units.
A setting has one name everywhere: `remote.read_timeout` is the key, the attribute and the word in messages.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from tierblk import address, values
from tierblk.errors import ConfigError
from tierblk.extent import BLOCK_BYTES
from tierblk.units import (
    GIB,
    KIB,
    MIB,
    PIB,
    TIB,
    format_duration,
    format_exact_size,
)

FILE_BYTES_MAX = 1 * MIB
WRITE_BACK = "write-back"
WRITE_BACK_KEYS = (
    "url",
    "epoch_interval",
    "epoch_size",
    "max_dirty",
    "durability",
    "upload_requests",
    "upload_bandwidth",
    "compression",
)
# repr of a float is exact, so that the daemon reads back what the command line read.
Seconds = Annotated[float, PlainSerializer(lambda seconds: f"{seconds!r}s")]
Patience = Annotated[float, values.PATIENCE, PlainSerializer(values.show_patience)]


class Settings(BaseModel):
    """Base of all tables: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DeviceSettings(Settings):
    """[device]: one block device."""

    name: Annotated[str, values.NAME]
    plane: Literal["auto", "copy", "zero-copy"] = "auto"
    queues: Annotated[int | Literal["auto"], values.QUEUES] = "auto"
    queue_depth: Annotated[int, values.integer(1, 1024)] = 64
    hot_memory: Annotated[int, values.size(0, 64 * GIB, 8 * BLOCK_BYTES)] = 0
    on_outage: Patience = math.inf
    recovery: Annotated[bool, values.BOOLEAN] = True


class BaseSettings(Settings):
    """[base]: where the image is."""

    url: Annotated[str, values.IMAGE_URL]
    format: Literal["raw"] = "raw"


class VolumeSettings(Settings):
    """[volume]: what is written to the device, over the image or over nothing.

    The keys behind `size` are those of mode "write-back", and mean nothing in the others; `url` is not None
    in that one.
    """

    mode: Literal["scratch", "local", "write-back"]
    size: Annotated[int | None, values.size(1 * MIB, 8 * PIB, 512)] = None
    url: Annotated[str | None, values.STORE_URL] = None
    epoch_interval: Annotated[Seconds, values.duration(0.1, 3600)] = 5.0
    epoch_size: Annotated[int, values.size(1 * MIB, 1 * GIB)] = 64 * MIB
    max_dirty: Annotated[int | None, values.size(1 * MIB, 128 * TIB)] = None
    durability: Literal["local", "remote"] = "local"
    upload_requests: Annotated[int, values.integer(1, 64)] = 4
    upload_bandwidth: Annotated[int | None, values.size(64 * KIB, 1 * TIB)] = None
    compression: Literal["none", "zstd"] = "none"

    @field_validator(*WRITE_BACK_KEYS, mode="before")
    @classmethod
    def _only_of_write_back(cls, value: object, info: ValidationInfo) -> object:
        if info.data.get("mode", WRITE_BACK) != WRITE_BACK:  # a mode that is none has an error of its own
            raise ValueError(f'is a key of mode = "{WRITE_BACK}" only, and this is "{info.data["mode"]}"')
        return value

    @model_serializer(mode="wrap")
    def _without_others_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that what is read back is right too."""
        hidden = () if self.mode == WRITE_BACK else WRITE_BACK_KEYS
        return {key: value for key, value in serialize(self).items() if key not in hidden}


class StoreSettings(Settings):
    """[store]: how the store of a volume is reached. Of file:// nothing has to be known; region, addressing
    and profile are of s3:// only."""

    region: Annotated[str, values.WORD] = "us-east-1"
    endpoint: Annotated[str | None, values.ENDPOINT] = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    profile: Annotated[str | None, values.WORD] = None


class CacheSettings(Settings):
    """[cache]: the local tier. Belongs to the directory: all configs that name it must agree."""

    dir: Annotated[Path, values.ABSOLUTE_PATH]
    size: Annotated[int, values.size(16 * MIB, 128 * TIB)]
    free_low_percent: Annotated[float, values.percent(0.1, 50)] = 2.0
    free_high_percent: Annotated[float, values.percent(0.1, 50)] = Field(default=4.0, validate_default=True)
    commit_interval: Annotated[Seconds, values.duration(0.1, 600)] = 5.0
    checksum_after: Annotated[Seconds, values.duration(0.1, 3600)] = 30.0

    @field_validator("free_high_percent")
    @classmethod
    def _above_low(cls, high: float, info: ValidationInfo) -> float:
        low = info.data.get("free_low_percent", 0.0)
        if high < low:
            raise ValueError(f"must not be below free_low_percent ({low:g}), is {high:g}")
        return high


class RemoteSettings(Settings):
    """[remote]: how the image is fetched."""

    max_requests: Annotated[int, values.integer(1, 256)] = 32
    max_window: Annotated[int, values.size(64 * KIB, 8 * MIB, BLOCK_BYTES)] = 8 * MIB
    staging: Annotated[int, values.size(1 * MIB, 4 * GIB, BLOCK_BYTES)] = Field(
        default=32 * MIB, validate_default=True
    )
    connect_timeout: Annotated[Seconds, values.duration(0.1, 600)] = 10.0
    read_timeout: Annotated[Seconds, values.duration(0.1, 3600)] = 30.0
    retries: Annotated[int, values.integer(0, 100)] = 3
    retry_delay: Annotated[Seconds, values.duration(0.001, 60)] = 0.2
    readahead: Annotated[bool, values.BOOLEAN] = True
    hedge_percent: Annotated[float, values.percent(0, 10)] = 2.0
    max_bandwidth: Annotated[int | None, values.size(64 * KIB, 1 * TIB)] = None
    max_request_rate: Annotated[int | None, values.integer(1, 1_000_000)] = None
    ca_file: Annotated[Path | None, values.ABSOLUTE_PATH] = None
    headers: Annotated[dict[str, str], values.HEADERS] = Field(default_factory=dict)

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

    watchdog: Annotated[Seconds, values.duration(0, 3600)] = 60.0
    group: Annotated[str | None, values.GROUP] = None
    metrics: Annotated[str | None, values.LOOPBACK] = None


class Config(Settings):
    """One config file: one device, its image, its cache and how it is fetched."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["base"]}, {"required": ["volume"]}]})

    device: DeviceSettings
    base: BaseSettings | None = None
    volume: VolumeSettings | None = None
    cache: CacheSettings
    remote: RemoteSettings = Field(default_factory=RemoteSettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    daemon: DaemonSettings = Field(default_factory=DaemonSettings)

    _path: Path = PrivateAttr(default=Path("/"))

    @property
    def url(self) -> str:
        """Where the image is; empty without one."""
        return self.base.url if self.base else ""

    @property
    def shown_base(self) -> str:
        """The same for people, without what is secret in it."""
        return address.shown(self.base.url) if self.base else "nothing"

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
    faults = {*_nothing_to_show(document), *_nowhere_to_write(document)}
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        faults.update(_faults(error))
    else:
        faults.update(_too_much_dirty(config))
    if len(faults) == 1:
        raise ConfigError(f"{path}: {faults.pop()}")
    if faults:
        lines = "".join(f"\n  {fault}" for fault in sorted(faults))
        raise ConfigError(f"{path} has {len(faults)} errors:{lines}")
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
    if key in ("commit_interval", "checksum_after") and isinstance(value, float):
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
                yield f"{key}: must be a table ([{key}]), is {values.kind(value)}"
            case "literal_error":
                yield f"{key}: must be {_one_of(fault['loc'])}, is {values.quoted(value)}"
            case "value_error":
                yield f"{key}: {fault['ctx']['error']}"
            case _:
                yield f"{key}: {_lower_first(fault['msg'])}"


def _key(loc: Iterable[int | str]) -> str:
    """A key as TOML would write it."""
    parts = (str(part) for part in loc)
    return ".".join(
        part if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", part) else values.quoted(part) for part in parts
    )


def _nothing_to_show(document: Mapping[str, Any]) -> Iterable[str]:
    """A device has an image, or a volume whose size is known without one."""
    volume = document.get("volume")
    if document.get("base") is not None:  # JSON, unlike TOML, can say that it is null
        return
    if volume is None:
        yield "base.url: is required"
    # What is in the store already has a size.
    elif isinstance(volume, dict) and "size" not in volume and volume.get("mode") != WRITE_BACK:
        yield "volume.size: is required, since there is no [base] whose size it could be"


def _nowhere_to_write(document: Mapping[str, Any]) -> Iterable[str]:
    volume = document.get("volume")
    if isinstance(volume, dict) and volume.get("mode") == WRITE_BACK and "url" not in volume:
        yield f'volume.url: is required with mode = "{WRITE_BACK}"'


def _too_much_dirty(config: Config) -> Iterable[str]:
    most = config.volume.max_dirty if config.volume else None
    if most is not None and most > config.cache.size:
        sizes = [format_exact_size(size) for size in (config.cache.size, most)]
        yield f"volume.max_dirty: must not be above cache.size ({sizes[0]}), is {sizes[1]}"


def _model(loc: Iterable[int | str]) -> type[BaseModel]:
    """The table that a key is in."""
    model: type[BaseModel] = Config
    for part in loc:
        kind: Any = model.model_fields[str(part)].annotation
        model = next((one for one in get_args(kind) if one is not type(None)), kind)  # of "table or none"
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
