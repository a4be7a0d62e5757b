# Included by the top Makefile, which gives VENV and the target `setup`.
#   make bench       hits, latency, misses, writes, memory beside null, loop, nbdkit, QEMU and curl, as ratios
#                    (docs/benchmarks.md); TIERBLK_BENCH_QUICK=1: only see that it runs
#   make bench-cold  only the cold reads over a slow link, beside curl, nbdkit and QEMU
#   make bench-instructions  instructions a hit, counted in an emulated VM: TREE=DIR of another checkout's tierblk,
#                    TRACE=1 also while `tierblk trace` looks
#   make picture     draws docs/top.svg anew

.PHONY: bench bench-cold bench-instructions picture

bench: setup
	$(VENV)/bin/python -m bench

bench-cold: setup
	$(VENV)/bin/python -m bench cold

bench-instructions: setup
	$(VENV)/bin/python -m bench instructions $(if $(TREE),--tree $(TREE)) $(if $(TRACE),--trace)

picture: setup
	$(VENV)/bin/python -m bench.top picture docs/top.svg
