"""What the cold benchmark and the replay of a boot make of logs and traces; the server that they measure
against."""

from __future__ import annotations

import math
import sys
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import policy
from bench.asked import PAGE_BYTES, Asked, Get, pages_of, since, summary
from bench.bare import complete
from bench.cold import Run, forward, scattered, side_by_side, strided
from bench.fio import BenchError
from bench.readers import Done, Piece, Readers, compiled
from bench.server import Link, answer, parse_range
from bench.shaped import parse, shaped
from tests.conftest import ROOT
from tests.engine_rig import Rig
from tierblk.readahead import Streams

sys.path.insert(0, str(ROOT / "packaging" / "demo"))

from tierdemo import trace

LINES = """\
# tracer: nop
#
         mount-151     [001] .....    12.100000: block_rq_issue: 259,0 RA 65536 () 2048 + 128 none,0,0 [mount]
         mount-151     [001] .....    12.100100: block_rq_issue: 259,0 R 4096 () 4096 + 8 none,0,0 [mount]
         mount-151     [001] .....    12.100200: block_rq_issue: 254,0 R 4096 () 4096 + 8 none,0,0 [mount]
  kworker/0:1H-99      [000] d.h..    12.120000: block_rq_complete: 259,0 R () 4096 + 8 none,0,0 [0]
  kworker/0:1H-99      [000] d.h..    12.130000: block_rq_complete: 259,0 RA () 2048 + 128 none,0,0 [0]
  kworker/0:1H-99      [000] d.h..    12.140000: block_rq_issue: 259,0 FF 0 () 0 + 0 none,0,0 [kworker/0:1H]
 (sd-worker)-16        [000] .....    12.150000: block_rq_issue: 259,0 R 1024 () 4098 + 2 none,0,0 [systemd]
""".splitlines()


def test_a_trace_is_read() -> None:
    first, second, third = trace.requests(LINES, "259:0")
    assert first == trace.Request(12.1, 12.13, 1 << 20, 65536, True, "mount")
    assert (second.offset_bytes, second.ahead, second.done_s) == (2 << 20, False, 12.12)
    assert (third.length_bytes, third.process, third.done_s) == (1024, "(sd-worker)", None)


def test_what_is_read_twice_is_read_once_for_the_first_time() -> None:
    reads = trace.requests(LINES, "259:0")
    assert trace.first_read_bytes(reads) == 65536 + 4096
    assert trace.first_read_bytes([]) == 0


def test_a_trace_survives_its_file() -> None:
    reads = trace.requests(LINES, "259:0")
    again = trace.from_csv(trace.to_csv(reads))
    assert [(r.offset_bytes, r.length_bytes, r.ahead, r.process) for r in again] == [
        (r.offset_bytes, r.length_bytes, r.ahead, r.process) for r in reads
    ]
    assert again[0].done_s == pytest.approx(0.03)
    assert again[2].done_s is None


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trace of a boot"):
        trace.from_csv("a,b\n1,2\n")
    with pytest.raises(BenchError, match="No such file"):
        policy.load(tmp_path / "none")


def test_pages_that_are_sent_twice_are_counted() -> None:
    gets = [Get(0, 1, 0.1), Get(0, 8192, 0.2), Get(4096, 100, 0.3), Get(65536, 0, 0.4)]
    assert summary(gets) == Asked(gets=4, sent_bytes=8293, repeated_pages=1)
    assert since(gets, 0.3) == gets[2:]


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_a_piece_touches_the_pages_of_its_bytes(offset: int, length: int) -> None:
    pages = pages_of(offset, length)
    assert pages.start * PAGE_BYTES <= offset < (pages.start + 1) * PAGE_BYTES
    assert (pages.stop - 1) * PAGE_BYTES < offset + length <= pages.stop * PAGE_BYTES
    assert len(pages_of(offset, 0)) == 0


def test_patterns_read_what_they_should() -> None:
    assert forward(8192, 4096, 100) == [Piece(100, 4096), Piece(4196, 4096)]
    assert strided(8192, 512, 4096) == [Piece(0, 512), Piece(4096, 512)]
    assert side_by_side(2, 8192, 1 << 20, 4096) == [[Piece(0, 4096)], [Piece(1 << 19, 4096)]]
    scatter = scattered(64 * PAGE_BYTES, 1)
    assert sorted(piece.offset_bytes for piece in scatter) == list(range(0, 64 * PAGE_BYTES, PAGE_BYTES))
    assert scatter != sorted(scatter, key=lambda piece: piece.offset_bytes)


def test_a_run_lasts_from_its_first_question_to_its_last_answer() -> None:
    run = Run([Done(Piece(0, 512), 5.0, 1.0), Done(Piece(512, 512), 4.0, 0.5)], 0.1)
    assert (run.began_s, run.took_s, run.read_bytes, run.bytes_after(0.5)) == (4.0, 2.0, 1024, 512)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET / HTTP/1.1\r\nRange: bytes=5-8\r\nHost: x", (5, 4, True)),
        (b"GET / HTTP/1.1\r\nHost: x\r\nrange: bytes=90-", (90, 10, True)),
        (b"GET / HTTP/1.1\r\nRange: bytes=95-400", (95, 5, True)),
        (b"GET / HTTP/1.1\r\nRange: bytes=400-500", (100, 0, True)),
        (b"GET / HTTP/1.1\r\nHost: x", (0, 100, False)),
    ],
)
def test_the_server_understands_a_range(head: bytes, expected: tuple[int, int, bool]) -> None:
    assert parse_range(head, 100) == expected


def test_the_server_says_what_it_sends() -> None:
    assert b"Content-Range: bytes 5-8/100\r\n" in answer(5, 4, True, 100)
    assert answer(0, 100, False, 100).startswith(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n")


def test_all_bodies_share_the_link() -> None:
    link = Link(1000.0)
    assert link.wait_s(100, 50.0) == pytest.approx(0.098)  # with what a late sleep may catch up
    assert link.wait_s(100, 50.0) == pytest.approx(0.198)
    assert link.wait_s(100, 60.0) == pytest.approx(0.098)
    assert Link(0).wait_s(1 << 30, 0.0) == 0


def test_a_page_is_complete_behind_its_head() -> None:
    assert not complete(b"HTTP/1.1 206\r\n")
    assert not complete(b"HTTP/1.1 206\r\n\r\n" + bytes(4095))
    assert complete(b"HTTP/1.1 206\r\n\r\n" + bytes(4096))


def test_the_server_serves_and_keeps_its_log(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 64)
    with shaped(tmp_path, image, latency_s=0.001, bytes_per_s=1e9) as server:
        request = urllib.request.Request(server.url, headers={"Range": "bytes=256-511"})
        with urllib.request.urlopen(request, timeout=10) as response:
            assert (response.status, response.read()) == (206, bytes(range(256)))
        server.forget()
        with urllib.request.urlopen(server.url, timeout=10) as response:
            assert len(response.read()) == 256 * 64
        (got,) = server.log()
    assert (got.offset_bytes, got.sent_bytes) == (0, 256 * 64)
    assert parse(["+", "+", "1 2 3.5"]) == [Get(1, 2, 3.5)]


def test_readers_in_c_read_every_piece_once_and_notice_wrong_bytes(tmp_path: Path) -> None:
    image = b"".join((place + 1).to_bytes(8, "little") + bytes(4088) for place in range(0, 1 << 18, 4096))
    rig = Rig(tmp_path, image, 64)
    try:
        rig.finish(rig.pool.submit(rig.door.read, 0, len(image)))
        library = compiled(tmp_path)
        readers = Readers(library, [forward(len(image), 4096), forward(8192, 4096)])
        assert readers.run(rig.door, 3) >= 0
        assert len(readers.done()) == 64 + 2
        stamps = Readers(library, [[Piece(512, 512)]])
        stamps.run(rig.door, 1)
        with pytest.raises(BenchError, match="wrong bytes at 512"):
            stamps.done()
        beyond = Readers(library, [[Piece(len(image), 4096)]])
        beyond.run(rig.door, 1)
        with pytest.raises(BenchError, match="failed"):
            beyond.done()
    finally:
        rig.close()


def _read(issued_s: float, done_s: float, offset: int, length: int) -> trace.Request:
    return trace.Request(issued_s, done_s, offset, length, False, "init")


def test_a_replay_keeps_pauses_and_adds_waits() -> None:
    reads = [_read(0.0, 0.001, 0, 4096), _read(0.011, 0.012, 4096, 4096), _read(0.112, 0.113, 1 << 20, 4096)]
    link = policy.Link(latency_s=0.5, bytes_per_s=math.inf)
    got = policy.replay(reads, policy.Fixed(16), 1 << 22, 8, link)
    assert (got.gets, got.waits, got.first_read_bytes, got.fetched_bytes) == (2, 2, 12288, 2 * 65536)
    assert got.took_s == pytest.approx(0.5 + 0.01 + 0.1 + 0.5)
    assert got.stalled_s == pytest.approx(1.0)
    exact = policy.replay(reads, policy.Fixed(1), 1 << 22, 8, link, think=0.0)
    assert (exact.ratio, exact.gets) == (1.0, 3)
    assert exact.took_s == pytest.approx(1.5)


def test_a_replayed_read_asks_again_for_what_lies_behind_a_cached_page() -> None:
    reads = [_read(0.0, 0.001, 4096, 4096), _read(0.002, 0.003, 0, 3 * 4096)]
    link = policy.Link(latency_s=0.5, bytes_per_s=math.inf)
    got = policy.replay(reads, policy.Fixed(1), 1 << 22, 8, link, think=0.0)
    assert (got.gets, got.ratio) == (3, 1.0)
    assert got.took_s == pytest.approx(1.5)


def test_the_boot_that_is_kept_is_fetched_at_most_1_4_times() -> None:
    reads = policy.load(policy.BOOT)
    blocks = 2048 * policy.MIB // 65536
    got = policy.replay(reads, Streams(blocks, 128), 2048 * policy.MIB, 128, policy.Link(), think=0.1)
    assert got.ratio <= 1.4
    assert "tierblk" in policy.table(reads[:20], 2048 * policy.MIB, policy.Link(), 0.1, 128)
