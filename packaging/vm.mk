# Everything that runs a VM. Included by the top Makefile, which gives VENV, BUILD and the target `setup`.
#   make demo        boots a real Debian from a tierblk device, cold and warm (RTT_MS=20 MBIT=100 shapes the link)
#   make demo-install   the same Debian on a volume: dpkg installs, the power is cut, it boots again
#   make test-vm     the tests on the oldest and the newest supported kernel
#   make vm-host     the Debian packages that this needs;  make vm-kernels, make vm-root: what is built once
#   make vm-clean    removes what was built for VMs

VM_PYTHON := $(VENV)/bin/python

.PHONY: demo demo-install test-vm vm-host vm-kernels vm-root vm-clean

vm-host: setup
	$(VM_PYTHON) packaging/vm/build.py host

vm-kernels: setup
	$(VM_PYTHON) packaging/vm/build.py kernels

vm-root: setup
	$(VM_PYTHON) packaging/vm/build.py root

test-vm: setup
	@echo "== tests on real kernels, in VMs"
	$(VM_PYTHON) packaging/vm/build.py host kernels root
	$(VM_PYTHON) -m pytest tests/vm

demo: setup
	$(VM_PYTHON) packaging/demo/demo.py

demo-install: setup
	$(VM_PYTHON) packaging/demo/install.py

vm-clean:
	$(VM_PYTHON) packaging/vm/build.py clean
