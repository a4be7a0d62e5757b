"""A config file is loaded whole, or every fault in it is named at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk import config
from tierblk.errors import ConfigError

SHORTEST = {
    "device": {"name": "debian"},
    "base": {"url": "http://images.example/debian.raw"},
    "cache": {"dir": "/var/cache/tierblk", "size": "4GiB"},
}
HERE = Path("/etc/tierblk/debian.toml")


def with_(table: str, **keys: object) -> dict[str, dict[str, object]]:
    """The shortest document with some keys of one table changed."""
    document: dict[str, dict[str, object]] = {name: dict(fields) for name, fields in SHORTEST.items()}
    document.setdefault(table, {}).update(keys)
    return document


def faults(document: object) -> list[str]:
    """The lines that name the faults of a document."""
    with pytest.raises(ConfigError) as caught:
        config.parse(document, HERE)  # type: ignore[arg-type]
    first, *rest = caught.value.message.splitlines()
    if not rest:
        return [first.removeprefix(f"{HERE}: ")]
    assert first == f"{HERE} has {len(rest)} errors:"
    return [line.removeprefix("  ") for line in rest]


def test_the_shortest_document() -> None:
    loaded = config.parse(SHORTEST, HERE)
    assert loaded.path == HERE
    assert loaded.device.name == "debian"
    assert loaded.cache.dir == Path("/var/cache/tierblk")
    assert loaded.cache.size == 4 * 2**30
    assert loaded.remote.max_window == 8 * 2**20
    assert loaded.remote.retry_delay == 0.2
    assert loaded.remote.ca_file is None


@pytest.mark.parametrize(
    ("written", "patience_s"),
    [
        ("wait", float("inf")),
        ("wait 30s", 30.0),
        ("wait 100h", None),
        ("fail", 0.0),
        ("30s", None),
        (3, None),
    ],
)
def test_patience(written: object, patience_s: float | None) -> None:
    document = with_("device", on_outage=written)
    if patience_s is None:
        assert "device.on_outage: must be" in faults(document)[0]
        return
    loaded = config.parse(document, HERE)
    assert loaded.device.on_outage == patience_s
    assert config.parse(loaded.to_document(), HERE).device.on_outage == patience_s


def test_a_device_shows_an_image_or_a_volume_or_both() -> None:
    both = config.parse(with_("volume", mode="local"), HERE)
    assert both.volume is not None
    assert (both.volume.mode, both.volume.size, both.url) == (
        "local",
        None,
        "http://images.example/debian.raw",
    )
    assert config.parse(both.to_document(), HERE) == both
    alone = {
        key: table for key, table in with_("volume", mode="scratch", size="1PiB").items() if key != "base"
    }
    loaded = config.parse(alone, HERE)
    assert (loaded.url, loaded.shown_base) == ("", "nothing")
    assert loaded.volume is not None
    assert loaded.volume.size == 2**50
    del alone["volume"]["size"]
    assert faults(alone) == ["volume.size: is required, since there is no [base] whose size it could be"]
    del alone["volume"]
    assert faults(alone) == ["base.url: is required"]
    assert faults(with_("volume", mode="write-through")) == [
        'volume.mode: must be "scratch" or "local" or "write-back", is "write-through"'
    ]


WRITE_BACK = {
    "url": "s3://bucket/web-1",
    "epoch_interval": "1s",
    "epoch_size": "1MiB",
    "max_dirty": "1GiB",
    "durability": "remote",
    "upload_requests": 64,
    "upload_bandwidth": "64KiB",
    "compression": "zstd",
}


def test_a_volume_in_a_store() -> None:
    document = with_("volume", mode="write-back", url="s3://bucket/web-1")
    del document["base"]
    loaded = config.parse(document, HERE)
    assert loaded.volume is not None
    assert loaded.volume.model_dump() == {
        "mode": "write-back",
        "url": "s3://bucket/web-1",
        "size": None,
        "epoch_interval": "5.0s",
        "epoch_size": 64 * 2**20,
        "max_dirty": None,
        "durability": "local",
        "upload_requests": 4,
        "upload_bandwidth": None,
        "compression": "none",
    }
    assert loaded.store == config.StoreSettings.model_validate({"region": "us-east-1", "addressing": "auto"})
    assert (loaded.store.endpoint, loaded.store.profile) == (None, None)
    full = with_("volume", mode="write-back", size="1PiB", **WRITE_BACK)
    full["store"] = {
        "region": "eu",
        "endpoint": "http://h:1/account",
        "addressing": "path",
        "profile": "me",
    }
    for each in (document, full):
        loaded = config.parse(each, HERE)
        assert config.parse(json.loads(json.dumps(loaded.to_document())), HERE) == loaded
    assert loaded.volume is not None
    assert (loaded.volume.epoch_interval, loaded.volume.max_dirty) == (1.0, 2**30)
    assert faults(with_("volume", mode="write-back")) == ['volume.url: is required with mode = "write-back"']
    assert faults(with_("volume", mode="write-back", url="file:///v", max_dirty="5GiB")) == [
        "volume.max_dirty: must not be above cache.size (4GiB), is 5GiB"
    ]


@pytest.mark.parametrize("mode", ["local", "scratch"])
@pytest.mark.parametrize("key", WRITE_BACK)
def test_what_only_a_volume_in_a_store_has(mode: str, key: str) -> None:
    assert set(WRITE_BACK) == set(config.WRITE_BACK_KEYS)
    for value in (WRITE_BACK[key], "nonsense"):
        assert faults(with_("volume", mode=mode, **{key: value})) == [
            f'volume.{key}: is a key of mode = "write-back" only, and this is "{mode}"'
        ]
    document = config.parse(with_("volume", mode=mode, size="1GiB"), HERE).to_document()
    assert document["volume"] == {"mode": mode, "size": 2**30}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("url", "http://a/x", "must begin with s3://, gs://, az:// or file://"),
        ("url", "s3:///x", "must be s3://BUCKET/PREFIX"),
        ("url", "az://account", "must be az://ACCOUNT/CONTAINER/PREFIX"),
        ("url", "s3://key:secret@b/x", "must not hold a user or password"),
        ("url", "gs://b/x?y", "must have neither a query nor a fragment"),
        ("url", "file://host/x", "must be file:// and an absolute path"),
        ("url", "s3://b/a b", "must have no spaces"),
        ("epoch_interval", "99ms", "must be at least 100ms"),
        ("epoch_interval", "2h", "must be at most 1h"),
        ("epoch_size", "512KiB", "must be at least 1MiB"),
        ("epoch_size", "2GiB", "must be at most 1GiB"),
        ("max_dirty", "1KiB", "must be at least 1MiB"),
        ("durability", "both", 'must be "local" or "remote"'),
        ("upload_requests", 65, "must be at most 64"),
        ("upload_requests", 0, "must be at least 1"),
        ("upload_bandwidth", 1, "must be at least 64KiB"),
        ("compression", "gzip", 'must be "none" or "zstd"'),
    ],
)
def test_faults_of_a_volume_in_a_store(key: str, value: object, sentence: str) -> None:
    (line,) = faults(with_("volume", **{"mode": "write-back", "url": "s3://b/x", key: value}))
    assert line.startswith(f"volume.{key}: ")
    assert sentence in line
    assert "secret" not in line


def test_it_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.parse(SHORTEST, HERE).cache.size = 5


def test_all_faults_at_once() -> None:
    document = {
        "device": {"name": "Debian X", "plane": "warp", "queue_dept": 5},
        "cache": {"size": "1MiB", "dir": "here", "free_low_percent": 5},
        "remote": 4,
        "devices": {},
    }
    assert faults(document) == [
        "base.url: is required",
        'cache.dir: must be an absolute path, is "here"',
        "cache.free_high_percent: must not be below free_low_percent (5), is 4",
        "cache.size: must be at least 16MiB, is 1MiB",
        "device.name: must be 1 to 32 of a-z, 0-9, dot, underscore and dash, beginning with a letter or a "
        'digit, is "Debian X"',
        'device.plane: must be "auto" or "copy" or "zero-copy", is "warp"',
        "device.queue_dept: unknown key "
        "(known here: hot_memory, name, on_outage, plane, queue_depth, queues, recovery); "
        "did you mean queue_depth?",
        "devices: unknown table or key (known here: base, cache, daemon, device, remote, store, volume); "
        "did you mean device?",
        "remote: must be a table ([remote]), is an integer",
    ]


def test_a_null_is_nothing() -> None:
    """JSON, which comes over the control socket, has it; TOML has not."""
    document = {"device": {"name": "a"}, "cache": {"dir": "/c", "size": "16MiB"}}
    assert faults({**document, "base": None, "volume": None}) == ["base.url: is required"]
    scratch = {"mode": "scratch", "size": "1MiB"}
    assert config.parse({**document, "base": None, "volume": scratch}, Path("/x")).base is None


def test_an_empty_document_names_all_that_is_required() -> None:
    assert faults({}) == [
        "base.url: is required",
        "cache.dir: is required",
        "cache.size: is required",
        "device.name: is required",
    ]


@pytest.mark.parametrize(
    ("table", "key", "value", "sentence"),
    [
        ("device", "name", "", "must be 1 to 32"),
        ("device", "name", "a" * 33, "must be 1 to 32"),
        ("device", "name", "../etc", "must be 1 to 32"),
        ("device", "name", "a\n", "must be 1 to 32"),
        ("device", "name", 5, "must be a string, is 5 (an integer)"),
        ("device", "queue_depth", 0, "must be at least 1, is 0"),
        ("device", "hot_memory", "65GiB", "must be at most 64GiB, is 65GiB"),
        ("device", "hot_memory", "100KiB", "must be a multiple of 512KiB, is 100KiB"),
        ("device", "queues", 0, "must be at least 1, is 0"),
        ("device", "queues", "two", 'must be "auto" or an integer, is "two" (a string)'),
        ("device", "queue_depth", 1025, "must be at most 1024, is 1025"),
        ("device", "queue_depth", "64", 'must be an integer, is "64" (a string)'),
        ("device", "queue_depth", True, "must be an integer, is true (a boolean)"),
        ("base", "url", "debian.raw", "must begin with http://"),
        ("base", "url", "s3://bucket/x", "must begin with http://"),
        ("base", "url", "http:///x", "must name a host"),
        ("base", "url", "http://a b/x", "must have no spaces"),
        ("base", "url", "http://a/x\r\nHost: b", "must have no spaces"),
        ("base", "url", "http://a:99999/x", "is not a URL"),
        ("base", "url", "http://[::1/x", "is not a URL"),
        ("base", "url", "http://a/x#part", "must not have a fragment"),
        ("base", "url", "http://user:secret@a/x", "must not hold a user or password"),
        ("base", "url", "file://host/x", "must be file:// and an absolute path"),
        ("base", "url", "file:x", "must be file:// and an absolute path"),
        ("base", "format", "qcow2", 'must be "raw", is "qcow2"'),
        ("cache", "dir", "cache", "must be an absolute path"),
        ("cache", "dir", "/a\0b", "must be an absolute path"),
        ("cache", "size", "4 gigs", "a size is a number of bytes"),
        ("cache", "size", -5, "a size is not negative"),
        ("cache", "size", True, "a size is a number of bytes"),
        ("cache", "size", "1PiB", "must be at most 128TiB, is 1PiB"),
        ("cache", "free_low_percent", float("nan"), "must be from 0.1 to 50 percent"),
        ("cache", "free_low_percent", 10**400, "must be from 0.1 to 50 percent, is 1000"),
        ("daemon", "group", "a b", 'must be the name of a group, is "a b"'),
        ("cache", "free_low_percent", "3%", "must be a number"),
        ("cache", "commit_interval", 5, "a duration is a number with a unit"),
        ("cache", "commit_interval", "1ms", "must be at least 100ms, is 1ms"),
        ("remote", "max_window", "100KiB", "must be a multiple of 64KiB, is 100KiB"),
        ("remote", "max_window", "16MiB", "must be at most 8MiB, is 16MiB"),
        ("store", "region", "eu west", "must be 1 to 200 printable characters without spaces"),
        ("store", "region", 5, "must be a string"),
        ("store", "profile", "", "must be 1 to 200 printable characters"),
        ("store", "endpoint", "s3.example", "must be http://HOST or https://HOST"),
        ("store", "endpoint", "http://", "must be http://HOST or https://HOST"),
        ("store", "endpoint", "http://a:99999", "is not a URL"),
        ("store", "endpoint", "https://user@host", "must have no user, query or fragment"),
        ("store", "addressing", "host", 'must be "auto" or "path" or "virtual", is "host"'),
        ("remote", "ca_file", "ca.pem", "must be an absolute path"),
        ("remote", "headers", "X: y", "must be a table of strings"),
        ("remote", "headers", {"Range": "bytes=0-1"}, "Range is set by tierblk itself"),
        ("remote", "headers", {"X Y": "z"}, '"X…" is not the name of an HTTP header'),
        ("remote", "headers", {"X": "a\r\nY: b"}, "the text of X must be a string of printable ASCII"),
        ("remote", "headers", {"X": 5}, "the text of X must be a string of printable ASCII"),
    ],
)
def test_one_fault_is_one_sentence(table: str, key: str, value: object, sentence: str) -> None:
    (line,) = faults(with_(table, **{key: value}))
    assert line.startswith(f"{table}.{key}: ")
    assert sentence in line


def test_an_unknown_key_stays_on_one_line() -> None:
    assert faults(with_("cache", **{"a\nb": 1})) == [
        r'cache."a\nb": unknown key '
        "(known here: checksum_after, commit_interval, dir, free_high_percent, free_low_percent, size)"
    ]


def test_a_secret_is_not_repeated() -> None:
    for document in (
        with_("base", url="http://user:secret@a/x"),
        with_("remote", headers={"Authorization": "Bearer secret\n"}),
    ):
        assert "secret" not in "".join(faults(document))


def test_a_window_fits_into_staging() -> None:
    (line,) = faults(with_("remote", max_window="4MiB", staging="2MiB"))
    assert line == "remote.staging: must not be below max_window (4MiB), is 2MiB"


@pytest.mark.parametrize(
    "url", ["https://a/x?sig=1%2F2", "http://[::1]:8080/x", "file:///srv/x", "file://localhost/x"]
)
def test_urls(url: str) -> None:
    assert config.parse(with_("base", url=url), HERE).url == url


@given(
    st.fixed_dictionaries(
        {
            "commit_interval": st.floats(0.1, 600).map(lambda seconds: f"{seconds:.6f}s"),
            "size": st.integers(2**24, 2**40),
        }
    ),
    st.dictionaries(st.sampled_from(["X-A", "Authorization"]), st.text("abc =", max_size=5)),
)
def test_the_daemon_gets_what_the_command_line_read(
    cache: dict[str, object], headers: dict[str, str]
) -> None:
    document = with_("cache", **cache)
    document["remote"] = {"headers": headers, "ca_file": "/etc/ca.pem", "retry_delay": "150ms"}
    loaded = config.parse(document, HERE)
    assert config.parse(json.loads(json.dumps(loaded.to_document())), HERE) == loaded


def test_configs_that_disagree_about_a_cache_name_both_files() -> None:
    ours = config.parse(SHORTEST, HERE)
    theirs = config.parse(
        with_("cache", size="8GiB", commit_interval="1m", dir="/other/name"), Path("/b.toml")
    )
    assert config.cache_conflicts(ours, theirs) == [
        "cache.commit_interval is 5s in /etc/tierblk/debian.toml and 1m in /b.toml",
        "cache.size is 4GiB in /etc/tierblk/debian.toml and 8GiB in /b.toml",
    ]
    assert config.cache_conflicts(ours, config.parse(with_("device", name="b"), HERE)) == []


class TestFiles:
    """What can be wrong before there is a document."""

    def failure(self, path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            config.load(path)
        assert caught.value.exit_code == 3
        assert str(path) in caught.value.message
        assert "\n" not in caught.value.message
        return caught.value.message

    def written(self, tmp_path: Path, data: bytes) -> Path:
        path = tmp_path / "a.toml"
        path.write_bytes(data)
        return path

    def test_missing(self, tmp_path: Path) -> None:
        assert "no such file or directory" in self.failure(tmp_path / "none.toml")

    def test_directory(self, tmp_path: Path) -> None:
        assert "is a directory" in self.failure(tmp_path)

    def test_fifo_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        assert "it is not a regular file" in self.failure(tmp_path / "fifo")

    def test_too_large(self, tmp_path: Path) -> None:
        assert "larger than 1MiB" in self.failure(self.written(tmp_path, b"#" * (2**20 + 1)))

    def test_not_text(self, tmp_path: Path) -> None:
        assert "line 2 is not UTF-8 text" in self.failure(self.written(tmp_path, b"a = 1\nb = '\xff'\n"))

    def test_syntax_says_where(self, tmp_path: Path) -> None:
        assert "(at line 2, column 5)" in self.failure(self.written(tmp_path, b"a = 1\nb = = 2\n"))

    @pytest.mark.parametrize("data", [b"a = " + b"[" * 100_000, b"a = " + b"9" * 5000])
    def test_hostile_documents(self, tmp_path: Path, data: bytes) -> None:
        assert "is not a config file" in self.failure(self.written(tmp_path, data))

    def test_a_relative_path_becomes_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written(tmp_path, b'device.name="a"\nbase.url="file:///x"\ncache={dir="/c",size="16MiB"}\n')
        monkeypatch.chdir(tmp_path)
        assert config.load("a.toml").path == tmp_path / "a.toml"
