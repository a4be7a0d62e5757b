# Included by the top Makefile, which gives VENV, PIP and the target `setup`.
#   make bench       hits, latency, misses, memory beside null, loop, nbdkit, QEMU and curl, as ratios
#                    (docs/benchmarks.md); TIERBLK_BENCH_QUICK=1: only see that it runs
#   make bench-cold  only the cold reads over a slow link, beside curl, nbdkit and QEMU
#   make bench-instructions  instructions a hit, counted in an emulated VM: TREE=DIR of another checkout's tierblk

.PHONY: bench bench-cold bench-instructions

bench: setup $(VENV)/.plotting
	$(VENV)/bin/python -m bench

bench-cold: setup
	$(VENV)/bin/python -m bench cold

bench-instructions: setup
	$(VENV)/bin/python -m bench instructions $(if $(TREE),--tree $(TREE))

# A picture is no reason to fail: without matplotlib the bench says so.
$(VENV)/.plotting: $(VENV)/.dependencies
	@echo "== matplotlib, for the picture"
	@.ci/tick $(PIP) install --progress-bar off -c constraints.txt matplotlib && touch $@ || true
