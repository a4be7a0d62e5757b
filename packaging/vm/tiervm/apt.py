"""Debian packages of other suites than the machine's own, without touching the machine's apt.

The configuration is derived from the machine's sources: the same mirror and keyring, another suite, own
folders. So
whoever installed this machine has said where packages come from, and no address is written down here.
"""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from tiervm.paths import build_dir, key_of
from tiervm.say import Failed, Step, output

ETC = Path("/etc/apt")
RESOLVED_AGE_MAX_S = 20 * 3600


@dataclass(frozen=True)
class Origin:
    """A place that carries Debian: its base address, and the keyring that vouches for it ("" = apt's own)."""

    uri: str
    signed_by: str

    def line(self, suite: str) -> str:
        """A whole one-line source of this place for another suite, as apt and mmdebstrap take it."""
        options = f"[signed-by={self.signed_by}] " if self.signed_by else ""
        return f"deb {options}{self.uri} {suite} main"


def codename() -> str:
    """The machine's suite, e.g. "bookworm"."""
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip('"')
    raise Failed("/etc/os-release names no Debian release; this needs a Debian machine.")


def origin() -> Origin:
    """Where the machine gets Debian's main archive from. Raises Failed when its apt sources do not say."""
    suite = codename()
    for path in sorted((ETC / "sources.list.d").glob("*.sources")):
        found = _from_deb822(path.read_text(), suite)
        if found:
            return found
    for path in [ETC / "sources.list", *sorted((ETC / "sources.list.d").glob("*.list"))]:
        found = _from_lines(path.read_text(), suite) if path.exists() else None
        if found:
            return found
    raise Failed(
        f"no apt source of this machine carries the suite {suite}; add one to /etc/apt/sources.list."
    )


def _from_deb822(text: str, suite: str) -> Origin | None:
    for stanza in re.split(r"\n\s*\n", text):
        lines = [line for line in stanza.splitlines() if not line.startswith("#")]
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        wanted = "deb" in fields.get("types", "").split() and suite in fields.get("suites", "").split()
        if wanted and fields.get("enabled", "yes") != "no" and "main" in fields.get("components", "").split():
            key = fields.get("signed-by", "")
            return Origin(fields["uris"].split()[0], key if key.startswith("/") else "")
    return None


def _from_lines(text: str, suite: str) -> Origin | None:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+(.*)", line)
        if match and match[3] == suite and "main" in match[4].split():
            options = dict(word.partition("=")[::2] for word in (match[1] or "").split())
            return Origin(match[2], options.get("signed-by", ""))
    return None


def inherited_options() -> list[str]:
    """Settings of the machine's apt that a foreign apt needs too: proxies, certificates, validity checks."""
    kept = re.compile(r'^(Acquire::(?:https?::[^ ]+|Check-Valid-Until|Check-Date)) "(.+)";$')
    matches = (kept.match(line) for line in output(["apt-config", "dump"]).splitlines())
    return ['Acquire::Retries "3";', *(f'{match[1]} "{match[2]}";' for match in matches if match)]


class Apt:
    """An apt of our own for some suites: resolves and downloads, installs nothing."""

    def __init__(self, suites: list[str]) -> None:
        lines = [origin().line(suite) for suite in suites]
        self._dir = build_dir() / "apt" / key_of(*lines)
        for name in ("lists/partial", "cache/archives/partial"):
            (self._dir / name).mkdir(parents=True, exist_ok=True)
        (self._dir / "status").touch()
        (self._dir / "sources.list").write_text("".join(f"{line}\n" for line in lines))
        settings = {
            "Dir::Etc::sourcelist": self._dir / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": self._dir / "lists",
            "Dir::State::status": self._dir / "status",
            "Dir::Cache": self._dir / "cache",
            "Acquire::Retries": "3",
            # The packages are public and go to a folder of root: apt's own user could not write there.
            "APT::Sandbox::User": "root",
        }
        self._options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    @property
    def has_lists(self) -> bool:
        """Whether an earlier update left package lists to resolve from."""
        return any((self._dir / "lists").glob("*_Packages*"))

    def update(self, step: Step) -> None:
        """Fetches the package lists and forgets what was resolved from the former ones."""
        step.run(["apt-get", *self._options, "update"])
        self.forget()

    def memo(self, name: str) -> Path:
        """A file to keep something resolved from the lists in; gone when it is older than most of a day."""
        path = self._dir / "resolved" / name
        path.parent.mkdir(exist_ok=True)
        if path.exists() and time.time() - path.stat().st_mtime > RESOLVED_AGE_MAX_S:
            path.unlink()
        return path

    def forget(self) -> None:
        """Resolve anew next time: a package that the lists name may have left the archive since."""
        for path in (self._dir / "resolved").glob("*"):
            path.unlink(missing_ok=True)

    def show(self, package: str) -> list[dict[str, str]]:
        """Every known version of a package, each as the fields of its stanza; none: an empty list."""
        try:
            text = output(["apt-cache", *self._options, "show", package])
        except Failed:
            return []
        stanzas = [
            dict(line.partition(": ")[::2] for line in part.splitlines()) for part in text.split("\n\n")
        ]
        return [stanza for stanza in stanzas if stanza.get("Package") == package]

    def download(self, step: Step, packages: list[str], folder: Path) -> list[Path]:
        """Downloads packages ("name=version") into a folder; returns the files."""
        folder.mkdir(parents=True, exist_ok=True)
        step.run(["apt-get", *self._options, "download", *packages], cwd=folder)
        return sorted(folder.glob("*.deb"))


def quoted(words: list[str]) -> str:
    """Words as one shell line."""
    return " ".join(shlex.quote(word) for word in words)
