# Included by the top Makefile, which gives VENV and the target `setup`.
#   make bench       hits, latency and misses beside null, loop, nbdkit and curl, as ratios (docs/benchmarks.md);
#                    TIERBLK_BENCH_QUICK=1: only see that it runs

.PHONY: bench

bench: setup
	$(VENV)/bin/python -m bench
