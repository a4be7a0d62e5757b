"""What is wrong in a picture, in sentences for people, each said once. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import set_cell_size

from tierblk.cli.output import plain
from tierblk.cli.top_model import CacheView, Picture
from tierblk.cli.top_text import Line, size, span, wrapped


def trouble_lines(picture: Picture, width: int, *, each_one_line: str = "") -> list[Line]:
    """What is wrong, each in a sentence, wrapped. each_one_line: what stands at the end of what was cut off
    there instead."""
    lines = []
    for sentence, style in troubles(picture):
        wrap = wrapped(sentence, width - 1)
        if each_one_line and len(wrap) > 1:
            wrap = [set_cell_size(plain(sentence), width - 1 - len(each_one_line)) + each_one_line]
        lines += [Line.of(f" {line}", style) for line in wrap]
    return lines


def troubles(picture: Picture) -> list[tuple[str, str]]:
    """(sentence, style): what is wrong, said once each."""
    found: list[tuple[str, str]] = []
    said: list[str] = []
    for cache in picture.caches:
        found += _of_cache(cache)
    said += [cache.commit_failure for cache in picture.caches if cache.commit_failure]
    for remote in picture.remotes:
        if remote.reason and not remote.stale:
            said.append(remote.reason)
            since = f"{remote.state} for {span(remote.for_s)}" if remote.for_s is not None else remote.state
            found.append((f"{', '.join(remote.devices)}: {since}: {remote.reason}", "yellow"))
    for device in picture.devices:
        upload = device.upload
        if upload is not None and upload.trouble and not device.stale and not _is_said(upload.trouble, said):
            said.append(upload.trouble)
            found.append((f"{device.name}: nothing is uploaded: {upload.trouble}", "red"))
    slowed = {cache.run_dir for cache in picture.caches if cache.state == "slowed"}
    by_reason: dict[str, list[str]] = {}
    for device in picture.devices:
        if device.reason and not device.stale and not _is_said(device.reason, said):
            is_pace = device.run_dir in slowed and device.reason.startswith("volumes are written faster")
            if not is_pace:
                by_reason.setdefault(device.reason, []).append(device.name)
    found += [(f"{', '.join(names)}: {reason}", "red") for reason, names in by_reason.items()]
    return found


def _is_said(reason: str, said: Sequence[str]) -> bool:
    return any(each in reason for each in said)


def _of_cache(cache: CacheView) -> list[tuple[str, str]]:
    found = []
    if cache.stale:
        silent = f" for {span(cache.silent_s)}" if cache.silent_s is not None else ""
        found.append((f"{cache.cache_dir}: no numbers{silent}: {cache.error}", "red"))
        return found
    if cache.throttle_bytes_per_s is not None:
        pace = f"writes to new blocks are slowed to {size(cache.throttle_bytes_per_s)} a second"
        why = {
            "upload": "volumes are written faster than they are uploaded",
            "slots": "volumes are written faster than slots become free",
        }.get(cache.throttle_reason or "", cache.throttle_reason or "no reason was given")
        found.append((f"{cache.cache_dir}: {pace}: {why}", "yellow"))
    if cache.commit_failure:
        since = f" for {span(cache.commit_failed_s)}" if cache.commit_failed_s is not None else ""
        found.append(
            (f"{cache.cache_dir}: the index cannot be written{since}: {cache.commit_failure}", "red")
        )
    return found
