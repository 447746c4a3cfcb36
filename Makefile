# SPDX-License-Identifier: GPL-2.0-or-later
# Each target first sets up what is missing, from a clean clone on: see tools/setup.

BIN := .venv/bin
SCRIPTS := tools/setup .ci/run guest-images/build-root tests/live/libvirtd.sh tests/live/second_host.sh $(addprefix guest-images/tiny/,init canary verify-memory workload)
C_SOURCES := $(shell find qemu-plugin tests -name '*.[ch]')
# libvirt has a QEMU for alive until it is reaped. tini does so at once; the first process of a container
# may be a second late, for each guest.
PYTEST := tini -s -- $(BIN)/pytest --numprocesses auto --dist loadgroup --no-loadscope-reorder
FUZZ_SECONDS ?= 120
SOAK_SECONDS ?= 600
PIP_COMPILE := $(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes \
	--python-version 3.11 --constraints requirements/constraints.txt \
	--custom-compile-command 'make lock'

.PHONY: help setup guests qemu11 drgn lint check test nightly fuzz soak demo tamper bench features schema lock clean

help: ## this list
	@sed -n 's/^\([a-z0-9]*\):.*## /make \1\t/p' Makefile

setup: ## packages, virtual environment, plugin, guest image
	@tools/setup

guests: setup ## the guests that boot from a disk: Debian 12 and 13
	$(BIN)/python -m mktme.vm.images debian-12 debian-13

qemu11: setup ## QEMU 11 beside the machine's own, for --emulator qemu11
	@tools/setup qemu11

drgn: ## a guest's tasks out of its decrypted memory: 860 MB of debug symbols to download
	@tools/setup symbols
	$(BIN)/pytest -rP tests/live/test_forensics.py -k drgn

lint: setup ## formatters, linters, type checker and compilers' warnings
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)
	$(MAKE) -C qemu-plugin check BUILD=$(CURDIR)/build/check
	shellcheck --severity=warning $(SCRIPTS)

check: lint ## lint, and the tests that need no VM
	$(PYTEST) tests/unit tests/vectors

test: guests ## the tests, live VMs included
	$(PYTEST) -m 'not nightly' tests

nightly: guests ## the live tests again, in the configurations that `make test` leaves out
	$(PYTEST) -m nightly tests

fuzz: setup ## coverage-guided fuzzing of every decoder, two minutes
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

soak: setup ## ten minutes of a guest that checks its own memory, of which an eighth is plaintext
	$(BIN)/python -m tests.live.soak --seconds $(SOAK_SECONDS)

demo: setup ## two encrypted guests, and the proofs
	$(BIN)/mktme demo

tamper: setup ## attacks on the DRAM of live guests, without and with integrity
	$(BIN)/mktme tamper

features: guests ## what works in real guests, on both data paths; README's table is made of it
	$(BIN)/mktme features --readme README.md

bench: setup ## the cost of each configuration
	$(BIN)/mktme bench

schema: setup ## docs/schema from the types of the reports
	$(BIN)/python -m mktme.proof.schema docs/schema

lock: setup ## newest versions of the dependencies into requirements/*.lock
	$(BIN)/pip install --quiet uv
	$(PIP_COMPILE) --output-file requirements/build.lock requirements/build.in
	$(PIP_COMPILE) --output-file requirements/dev.lock --extra dev pyproject.toml

clean: ## remove what was built here; guest images stay in the cache
	rm -rf build .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache
