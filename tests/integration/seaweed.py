"""A SeaweedFS server on loopback with a bucket: a real S3 server, which checks signatures."""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from tierblk.config import RemoteSettings
from tierblk.remote.client import new_session
from tierblk.remote.s3 import S3Settings, S3Store
from tierblk.remote.sigv4 import EMPTY_SHA256, Credentials, signed_headers
from tierblk.remote.wallet import FixedWallet

BUCKET = "tierblk-test"
CREDENTIALS = Credentials("TIERBLKACCESSKEY", "the secret of the tests")
START_S = 40.0
STOP_S = 20.0
GRPC_OFFSET = 10000
# Without a word it takes fixed ports for each of these, and for all but the last two one of gRPC behind it.
SERVICES = ("master.port", "volume.port", "filer.port", "s3.port", "s3.port.iceberg", "s3.port.lance")


class SeaweedServer:
    """In a process of its own, its data below `home`; a context manager."""

    def __init__(self, home: Path, *, volumes: int = 20) -> None:
        """volumes: how often it may take another 64 MiB."""
        self._home = home
        self._volumes = volumes
        self.port = 0

    def __enter__(self) -> Self:
        (self._home / "data").mkdir(parents=True)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": CREDENTIALS.access_key, "secretKey": CREDENTIALS.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self._home / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = _free_ports(len(SERVICES))
        self.port = ports[SERVICES.index("s3.port")]
        self._output = (self._home / "output").open("wb")
        self._process = subprocess.Popen(
            [
                Path(sys.executable).parent / "weed", "server", f"-dir={self._home / 'data'}",
                "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                "-filer", "-s3", f"-s3.config={self._home / 's3.json'}",
                f"-volume.max={self._volumes}", "-master.volumeSizeLimitMB=64",
                *(f"-{name}={port}" for name, port in zip(SERVICES, ports, strict=True)),
            ],
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output, cwd=self._home,
        )  # fmt: skip
        try:
            self._make_bucket()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def settings(self) -> S3Settings:
        """How it is reached."""
        return S3Settings(endpoint=f"http://127.0.0.1:{self.port}")

    def url(self, prefix: str) -> str:
        """The address of a prefix in its bucket."""
        return f"s3://{BUCKET}/{prefix}"

    async def store(
        self, url: str, *, endpoint: str | None = None, remote: RemoteSettings | None = None
    ) -> S3Store:
        """Opened. endpoint: of who stands between."""
        settings = S3Settings(endpoint=endpoint or self.settings.endpoint)
        return S3Store(url, settings, FixedWallet(CREDENTIALS), await new_session(remote or RemoteSettings()))

    def _stop(self) -> None:
        self._process.kill()  # asked to end, it would take its time; what it has is thrown away
        self._process.wait(STOP_S)
        self._output.close()

    def _make_bucket(self) -> None:
        deadline_s = time.monotonic() + START_S
        said = ""
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                break
            try:
                status = self._put_bucket()
            except OSError as error:
                said = str(error)
            else:
                if status in (200, 409):
                    return
                said = f"status {status}"
            threading.Event().wait(0.1)  # there is no event: it only answers, or not
        log = (self._home / "output").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"SeaweedFS did not come up ({said}):\n{log}")

    def _put_bucket(self) -> int:
        path, host = f"/{BUCKET}", f"127.0.0.1:{self.port}"
        headers = signed_headers(
            "PUT", host, path, "", {}, EMPTY_SHA256, CREDENTIALS, "us-east-1", datetime.now(UTC)
        )
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("PUT", path, headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()


def _free_ports(count: int) -> list[int]:
    """Of which the one GRPC_OFFSET above is free as well."""
    chance, found = random.Random(), list[int]()
    for _ in range(1000):
        port = chance.randrange(12000, 30000)
        if len(found) < count and port not in found and _is_free(port) and _is_free(port + GRPC_OFFSET):
            found.append(port)
    if len(found) < count:
        raise RuntimeError("no ports are free on loopback")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
