"""The commands of `tierblk cache` that change something, by the daemon of a real device: warm, pin, evict,
gc, verify --repair."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vm.guest.device_rig import MIB
from tests.vm.guest.helpers import Tierblk, WebServer, run, wait_until
from tests.vm.guest.test_device_writes import Direct

BLOCK = 65536


def said(tierblk: Tierblk, *words: str) -> Any:
    return json.loads(tierblk.run("cache", *words, "--json").stdout)


def cached_bytes(tierblk: Tierblk, name: str) -> int:
    return int(tierblk.status(name)["cached_bytes"])


def test_blocks_come_go_and_stay(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    image = make_image("tended.raw", 24 * MIB, seed=501)
    config = tierblk.config("tended", web.url_of(image), scratch / "c", "32MiB", remote__readahead=False)
    device = tierblk.attach(config)
    content = image.read_bytes()
    before = cached_bytes(tierblk, "tended")
    found = said(tierblk, "warm", "tended", "4MiB+6MiB")
    assert found["wanted_bytes"] == 6 * MIB
    assert 0 < found["fetched_bytes"] <= 6 * MIB
    assert cached_bytes(tierblk, "tended") >= before + found["fetched_bytes"]
    assert said(tierblk, "warm", "tended", "4MiB+6MiB")["fetched_bytes"] == 0
    said(tierblk, "pin", "tended", "5MiB+1MiB")
    tierblk.run("cache", "evict", "tended", "4MiB+1MiB")
    direct = Direct(device)
    for at in range(8 * MIB, 24 * MIB, MIB):  # more than stays free: eviction goes round
        assert direct.read(at, MIB) == content[at : at + MIB]
    for at in range(12 * MIB, 24 * MIB, MIB):
        assert direct.read(at, MIB) == content[at : at + MIB]
    blocks = said(tierblk, "blocks", "tended", "4MiB+2MiB")["layers"][0]["blocks"]
    there = {block["block"] for block in blocks if block["slot"]}
    assert set(range(5 * MIB // BLOCK, 6 * MIB // BLOCK)) <= there, "pinned ones stay"
    assert not there & set(range(4 * MIB // BLOCK, 5 * MIB // BLOCK)), "evicted ones are gone"
    direct.close()
    assert said(tierblk, "gc", "tended")["layers"] == [], "its image is used"
    tierblk.run("detach", "tended")


def test_flipped_bits_are_repaired_beside_the_daemon(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    image = make_image("flipped.raw", 16 * MIB, seed=502)
    config = tierblk.config("flipped", web.url_of(image), scratch / "c", "32MiB")
    device = tierblk.attach(config)
    direct = Direct(device)
    content = image.read_bytes()
    assert direct.read(0, 16 * MIB) == content
    blocks = said(tierblk, "blocks", "flipped", "all")["layers"][0]["blocks"]
    chance = random.Random(503)
    slots = {block["slot"] for block in chance.sample(blocks, 40)}
    descriptor = os.open(scratch / "c" / "slots", os.O_RDWR)
    for slot in slots:
        at = slot * BLOCK + chance.randrange(BLOCK)
        byte = os.pread(descriptor, 1, at)[0]
        os.pwrite(descriptor, bytes([byte ^ 1 << chance.randrange(8)]), at)
    os.fsync(descriptor)
    os.close(descriptor)
    failed = tierblk.run("cache", "verify", "flipped", "--json", check=False)
    assert failed.returncode == 6
    found = json.loads(failed.stdout)
    assert sum(layer["bad_pages"] for layer in found["layers"]) == len(slots)
    assert said(tierblk, "verify", "flipped", "--repair")["repaired"]["pages"] == len(slots)
    assert said(tierblk, "verify", "flipped")["ok"]
    assert direct.read(0, 16 * MIB) == content
    direct.close()
    tierblk.run("detach", "flipped")


def flip(slots: Path, places: list[int]) -> None:
    """A bit at each of these offsets."""
    descriptor = os.open(slots, os.O_RDWR)
    for at in places:
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ 16]), at)
    os.fsync(descriptor)
    os.close(descriptor)


def verified(tierblk: Tierblk, name: str) -> Any:
    done = tierblk.run("cache", "verify", name, "--json", check=False)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["ok"] else 6)
    return found


def unchecked(tierblk: Tierblk, name: str) -> int:
    found = verified(tierblk, name)
    assert found["ok"], found["violations"]
    return sum(layer["unchecked_blocks"] for layer in found["layers"])


def test_a_flipped_page_that_nobody_else_has_is_named(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Beside its daemon, and never a page that is only being written."""
    image, chance = make_image("alone.raw", 8 * MIB, seed=507), random.Random(508)
    keys: dict[str, Any] = {"volume__mode": "local", "cache__checksum_after": "300ms"}
    config = tierblk.config("alone", web.url_of(image), scratch / "c", "32MiB", **keys)
    device = tierblk.attach(config)
    direct = Direct(device)
    direct.write(0, chance.randbytes(2 * MIB))
    direct.write(5 * MIB, chance.randbytes(MIB))
    wait_until(lambda: unchecked(tierblk, "alone") == 0, 30, "no checksums are made")
    blocks = said(tierblk, "blocks", "alone", "all", "--layer", "volume")["layers"][0]["blocks"]
    chosen = chance.sample(blocks, 10)
    flip(scratch / "c" / "slots", [block["slot"] * BLOCK + 5 * 4096 + 7 for block in chosen])
    named = {(block["block"], f"page 5 in slot {block['slot']}") for block in chosen}
    for words in ((), ("--repair",)):
        done = tierblk.run("cache", "verify", "alone", "--json", *words, check=False)
        found = json.loads(done.stdout)
        assert done.returncode == 6
        texts = {(each["block"], each["text"].split(" is not")[0]) for each in found["violations"]}
        assert texts == named
        assert all("nobody else has it" in each["text"] for each in found["violations"])
    assert found["repaired"]["left_pages"] == 10
    for block in chosen:
        direct.write(block["block"] * BLOCK + 5 * 4096, chance.randbytes(4096))
    unchecked(tierblk, "alone")  # they are other pages now
    stopping = threading.Event()

    def writing() -> None:
        busy = random.Random(509)
        while not stopping.is_set():
            direct.write(busy.randrange(48) * BLOCK + busy.randrange(16) * 4096, busy.randbytes(4096))
            stopping.wait(0.002)

    writer = threading.Thread(target=writing)
    writer.start()
    try:
        for _ in range(5):
            unchecked(tierblk, "alone")
    finally:
        stopping.set()
        writer.join()
    wait_until(lambda: unchecked(tierblk, "alone") == 0, 30, "no checksums are made")
    direct.close()
    tierblk.run("detach", "alone")


def test_a_file_is_warmed_by_its_path(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    image = make_image("fs.raw", 48 * MIB, seed=504)
    data, tree = random.Random(505).randbytes(5 * MIB), scratch / "tree"
    tree.mkdir()
    (tree / "wanted").write_bytes(data)
    (tree / "other").write_bytes(random.Random(506).randbytes(5 * MIB))
    run("mkfs.ext4", "-q", "-F", "-d", tree, image)
    config = tierblk.config("files", web.url_of(image), scratch / "c", "64MiB", volume__mode="scratch")
    device = tierblk.attach(config)
    found = said(tierblk, "warm", "files", "--file", "/wanted")
    assert found["wanted_bytes"] == 5 * MIB
    assert found["fetched_bytes"] <= 5 * MIB + 4 * 4096  # whole pages
    requests = tierblk.status("files")["remote_requests"]
    direct = Direct(device)
    got = b"".join(direct.read(offset, length) for offset, length in found["ranges"])
    assert got == data
    assert tierblk.status("files")["remote_requests"] == requests, "all of it was there"
    direct.close()
    tierblk.run("detach", "files")
