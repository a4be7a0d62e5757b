"""What the sections of the benchmark make of what they are told: fio's jobs, a kernel, a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import memory, queues
from bench.fio import BenchError, parse
from bench.server import MADE_UP_BYTES, MadeUp, Stored


def test_fios_jobs_are_told_apart() -> None:
    job = '{"jobname": "%s", "read": {"total_ios": %d, "iops": 1, "bw_bytes": 1}}'
    jobs = parse('{"jobs": [' + job % ("hits", 7) + "," + job % ("misses", 9) + "]}")
    assert {name: read.requests for name, read in jobs.items()} == {"hits": 7, "misses": 9}


def test_a_job_that_failed_is_an_error_though_others_did_not() -> None:
    job = '{"jobname": "%s", "error": %d, "read": {"total_ios": 1, "iops": 1, "bw_bytes": 1}}'
    with pytest.raises(BenchError, match="error 5"):
        parse('{"jobs": [' + job % ("hits", 0) + "," + job % ("misses", 5) + "]}")


def test_each_job_gets_a_processor_of_another_queue() -> None:
    assert queues.one_of_each(["0, 1\n", "2, 3\n"], {0, 1, 2, 3}) == [0, 2]
    assert queues.one_of_each(["0, 2\n", "1, 3\n"], {2, 3}) == [2, 3]
    assert queues.one_of_each(["0, 1\n", "2\n", "\n"], {0, 1}) == [0]


def test_memory_that_counts() -> None:
    status = "Name:\tpython3\nVmRSS:\t  900 kB\nRssAnon:\t  300 kB\nRssFile:\t 500 kB\nRssShmem:\t 100 kB\n"
    assert memory.resident(status) == memory.Resident(300 * 1024, 100 * 1024)
    assert memory.resident(status).total == 400 * 1024


def test_a_made_up_image_has_no_zero_page_and_repeats() -> None:
    image = MadeUp(3 * MADE_UP_BYTES)
    assert image.size_bytes == 3 * MADE_UP_BYTES
    assert all(any(image.piece(page, 4096)) for page in range(0, MADE_UP_BYTES, 4096))
    assert image.piece(MADE_UP_BYTES + 5000, 100) == image.piece(5000, 100)
    assert len(image.piece(MADE_UP_BYTES - 10, 100)) == 10  # the rest is asked for next


def test_a_made_up_image_may_begin_with_zeros() -> None:
    image = MadeUp(3 * MADE_UP_BYTES, zero_bytes=8192)
    assert bytes(image.piece(4000, 9000)) == bytes(4192)
    assert bytes(image.piece(0, 100)) == bytes(100)
    assert image.piece(8192, 4096) == MadeUp(MADE_UP_BYTES).piece(8192, 4096)


def test_a_stored_image(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(range(100)))
    image = Stored(str(tmp_path / "image"))
    assert image.size_bytes == 100
    assert bytes(image.piece(90, 20)) == bytes(range(90, 100))
