# `make run` and `make test` set up what is missing; every step is skipped when it is done already.
# Root is needed: packages are installed, and dynos are made of namespaces, mounts and cgroups.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
APP     ?=
STATE   ?= $(or $(SANDBOX_STATE_DIR),/var/lib/sandbox)
export SANDBOX_STATE_DIR := $(STATE)
# Byte code is written at set-up; a start that compiles takes three times as long.
unexport PYTHONDONTWRITEBYTECODE

HOST_PROGRAMS := runc conmon mksquashfs mmdebstrap mkfs.ext4 setpriv prlimit nsenter nft dnsmasq apparmor_parser
HOST_PACKAGES := runc conmon squashfs-tools mmdebstrap e2fsprogs util-linux ca-certificates nftables dnsmasq-base apparmor
TEST_PROGRAMS := dockerd docker gcc ip ss iptables conntrack sysctl pgrep chromium chromedriver
# Since Debian 13 the client is a package of its own.
TEST_PACKAGES := docker.io chromium chromium-driver gcc libc6-dev iproute2 iptables conntrack procps $$(apt-cache show docker-cli >/dev/null 2>&1 && echo docker-cli)

.PHONY: run setup setup-test host stack venv test test-vm vm-shell vm-host parity check unit root security bench clean install help

help:
	@sed -n 's/^## //p' Makefile

## make run              set up what is missing, run examples/python-web, show it answering, stop it
## make run APP=./app    the same set-up, then your app in the foreground
run: setup
ifeq ($(APP),)
	$(BIN)/sandbox run --get / examples/python-web
else
	$(BIN)/sandbox run $(APP)
endif

## make setup            host packages, Python packages, stack image
setup: host venv stack

host:
	@PATH=$$PATH:/usr/sbin:/sbin; missing=; for p in $(HOST_PROGRAMS); do command -v $$p >/dev/null || missing=1; done; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing=1; \
	if [ -n "$$missing" ]; then echo "-----> installing host packages"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	  $(HOST_PACKAGES) python3 python3-venv >/dev/null; fi

venv: $(VENV)/.run
	@$(BIN)/python -m compileall -q sandbox
$(VENV)/.run: requirements/run.txt pyproject.toml
	@echo "-----> installing Python packages"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements/run.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.run
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements/dev.txt
	@touch $@

stack: venv
	@$(BIN)/sandbox stack build

setup-test: setup $(VENV)/.dev
	@PATH=$$PATH:/usr/sbin:/sbin; missing=; for p in $(TEST_PROGRAMS); do command -v $$p >/dev/null || missing=1; done; \
	if [ -n "$$missing" ]; then echo "-----> installing packages for the tests"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	  $(TEST_PACKAGES) >/dev/null; fi

## make test             set up what is missing, then every test tier that this machine can run
test: setup-test check
	$(BIN)/python -m pytest tests/root tests/security

## make test-vm          boot Debian 13 and Debian 12 under QEMU and prove the same there; 37 minutes where processors are emulated (not part of `make test` yet)
test-vm: setup-test vm-host
	$(BIN)/python -m pytest -s tests/vm/test_guests.py

## make vm-shell         a login in the same guest (GUEST=debian-12 for the other)
vm-shell: setup-test vm-host
	$(BIN)/python -m tests.vm shell $(or $(GUEST),debian-13)

## make parity           write docs/PARITY.md from the last run of make test-vm
parity: setup-test
	$(BIN)/python -m tests.vm parity

vm-host:
	@images/vm/install-qemu

## make check            format, lint, types, import contracts, unit tests; no root
check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/unit

unit: $(VENV)/.dev
	$(BIN)/python -m pytest tests/unit

root security: setup-test
	$(BIN)/python -m pytest tests/$@

## make bench            measure against docker run; writes docs/PERFORMANCE.md
bench: setup-test
	$(BIN)/python -m tests.bench

## make install          put sandbox on the PATH
install: setup
	ln -sf $(abspath $(BIN)/sandbox) /usr/local/bin/sandbox

clean:
	rm -rf $(VENV) build dist *.egg-info
