"""fio: runs a job file of this folder and reads what it says."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIMIT_S = 600.0
"""Of a run; an emulated kernel is slow."""


class BenchError(Exception):
    """Something needed could not be run or was not as it must be; the message is a sentence for a person."""


@dataclass(frozen=True)
class FioJob:
    """What one job read or wrote; none here does both. Latencies in us, from submission to completion; 0 in
    jobs that do not take the time."""

    requests: int
    iops: float
    bytes_per_s: float
    mean_us: float
    p99_us: float


def parse(output: str) -> dict[str, FioJob]:
    """fio's JSON, with whatever it printed before it: its jobs by name. Raises BenchError when there is none,
    or one failed."""
    start = output.find("{")
    try:
        document: Any = json.loads(output[start:]) if start >= 0 else None
        jobs = {str(job["jobname"]): _job(job) for job in document["jobs"]}
        failed = [job["error"] for job in document["jobs"] if job.get("error", 0)]
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"fio gave no result that can be read ({error}): {output[:300]!r}") from None
    if not jobs:
        raise BenchError("fio gave no result that can be read: there was no job")
    if failed:
        raise BenchError(f"fio's job ended with error {failed[0]}")
    return jobs


def _job(job: Any) -> FioJob:
    side = job["read"]
    if job.get("write", {}).get("total_ios"):
        side = job["write"]
    latency = side.get("lat_ns", {})
    percentiles = latency.get("percentile", {})
    return FioJob(
        requests=int(side["total_ios"]),
        iops=float(side["iops"]),
        bytes_per_s=float(side["bw_bytes"]),
        mean_us=float(latency.get("mean", 0)) / 1000,
        p99_us=float(percentiles.get("99.000000", 0)) / 1000,
    )


def run(job: str, *, writes: bool = False, **settings: str | int) -> FioJob:
    """Runs JOB.fio, which has one job; `settings` are the variables that the file names. Only with `writes`
    may it write. Raises BenchError."""
    (found,) = run_jobs(job, writes=writes, **settings).values()
    return found


def run_jobs(job: str, *, writes: bool = False, **settings: str | int) -> dict[str, FioJob]:
    """The same for a file with several jobs: each by its name. Raises BenchError."""
    environment = {**os.environ, **{name.upper(): str(value) for name, value in settings.items()}}
    command = ["fio", "--output-format=json", str(HERE / f"{job}.fio")]
    if not writes:
        command.insert(1, "--readonly")
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"fio did not end within {LIMIT_S:.0f} s: {settings}") from None
    if done.returncode:
        raise BenchError(
            f"fio ended with status {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}"
        )
    return parse(done.stdout)
