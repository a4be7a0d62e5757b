"""fio: runs a job file of this folder and reads what it says."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIMIT_S = 120.0


class BenchError(Exception):
    """Something needed could not be run or was not as it must be; the message is a sentence for a person."""


@dataclass(frozen=True)
class FioRead:
    """What one job read. Latencies in us, from submission to completion; 0 in jobs that do not take the
    time."""

    requests: int
    iops: float
    bytes_per_s: float
    mean_us: float
    p99_us: float


def parse(output: str) -> FioRead:
    """fio's JSON, with whatever it printed before it. Raises BenchError when there is none, or the job
    failed."""
    start = output.find("{")
    try:
        document: Any = json.loads(output[start:]) if start >= 0 else None
        job = document["jobs"][0]
        read = job["read"]
        latency = read.get("lat_ns", {})
        percentiles = latency.get("percentile", {})
        parsed = FioRead(
            requests=int(read["total_ios"]),
            iops=float(read["iops"]),
            bytes_per_s=float(read["bw_bytes"]),
            mean_us=float(latency.get("mean", 0)) / 1000,
            p99_us=float(percentiles.get("99.000000", 0)) / 1000,
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BenchError(f"fio gave no result that can be read ({error}): {output[:300]!r}") from None
    if job.get("error", 0):
        raise BenchError(f"fio's job ended with error {job['error']}")
    return parsed


def run(job: str, **settings: str | int) -> FioRead:
    """Runs JOB.fio; `settings` are the variables that the file names. Raises BenchError."""
    environment = {**os.environ, **{name.upper(): str(value) for name, value in settings.items()}}
    command = ["fio", "--readonly", "--output-format=json", str(HERE / f"{job}.fio")]
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
