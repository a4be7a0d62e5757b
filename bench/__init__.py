"""Benchmarks: tierblk beside its peers, in one run, on one kernel, as ratios. See docs/benchmarks.md."""
