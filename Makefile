# make setup   what a fresh Debian needs, then .venv with tierblk in it; later runs only rebuild what changed
# make check   lint, types, import contracts
# make test    everything: check, unit and integration tests, then the tests on real kernels in VMs
# make test-native, make test-vm: its two halves
# make demo    a Debian booted from a device
# make bench   ratios beside the kernel's loop, a null device, nbdkit and curl
# make openapi   docs/openapi.json anew, after a change of the control interface

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PIP := $(BIN)/pip --disable-pip-version-check

# Debian packages that building and testing on this machine needs; asked of dpkg, so a re-run costs nothing.
NATIVE_PACKAGES := gcc libc6-dev liburing-dev pkg-config nginx-light openssl curl fdisk qemu-utils
CORE_SOURCES := $(wildcard tierblk/core/*.c tierblk/core/*.h tierblk/core/build.py)

# Debian's Prometheus, which the tests of metrics ask: unpacked only, since installing it starts a server and takes port 9090.
PROMETHEUS := $(or $(TIERBLK_BUILD_DIR),$(BUILD))/prometheus

.PHONY: help setup packages build check test test-native openapi clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

setup: build

packages:
	@missing=""; \
	for package in $(NATIVE_PACKAGES); do \
		[ "$$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null)" = installed ] || missing+=" $$package"; \
	done; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "tierblk needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing+=" python3-venv"; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| missing+=" python3-dev"; \
	if [ -n "$$missing" ]; then \
		echo "== installing Debian packages:$$missing"; \
		$(SUDO) apt-get update; \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$missing; \
	fi

$(VENV)/.dependencies: pyproject.toml constraints.txt | packages
	@echo "== python environment in $(VENV)"
	[ -x $(BIN)/python ] || .ci/tick $(PYTHON) -m venv $(VENV)
	.ci/tick $(PIP) install --progress-bar off -c constraints.txt setuptools cffi
	@touch $@

# Without isolation: the build uses the pinned setuptools and cffi, and a rebuild asks no package index.
$(VENV)/.built: $(VENV)/.dependencies setup.py $(CORE_SOURCES)
	@echo "== building tierblk and its C core"
	.ci/tick $(PIP) install --progress-bar off -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

build: packages $(VENV)/.built

$(PROMETHEUS)/usr/bin/promtool:
	@echo "== Debian's prometheus, unpacked in $(PROMETHEUS)"
	rm -rf $(PROMETHEUS).new && mkdir -p $(PROMETHEUS).new
	cd $(PROMETHEUS).new && { apt-get -q download prometheus || { $(SUDO) apt-get update; apt-get -q download prometheus; }; }
	dpkg-deb -x $(PROMETHEUS).new/prometheus_*.deb $(PROMETHEUS).new
	rm -rf $(PROMETHEUS).new/*.deb $(PROMETHEUS) && mv $(PROMETHEUS).new $(PROMETHEUS)
	@touch $@

check: build
	@echo "== lint, types, import contracts"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	.ci/tick $(BIN)/mypy
	$(BIN)/lint-imports

test-native: check $(PROMETHEUS)/usr/bin/promtool
	@echo "== unit and integration tests, by two processes, a file at a time"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: test-native
	$(MAKE) test-vm

openapi: build
	$(BIN)/python -c 'from tierblk import control, openapi; print(openapi.text(control.OPERATIONS), end="")' > docs/openapi.json

clean:
	rm -rf $(VENV) build/lib.* build/temp.* build/bdist.* *.egg-info tierblk/core/_core.c tierblk/core/*.so tierblk/core/*.o

-include packaging/vm.mk bench/bench.mk
