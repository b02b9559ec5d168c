PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The CPython 2.7 for `make conformance`; searched for when empty. The Autobahn test suite is Python 2 code.
PYTHON27 ?=
VENV27 := .venv27

# How long to run each fuzz target, in seconds.
FUZZ_SECONDS ?= 600
# How long to simulate, in minutes, and the first seed.
SIMULATE_MINUTES ?= 10
SEED ?= 1

.PHONY: help setup test lint unit integration proxies servers chaos simulate hostile fuzz conformance bench docs demo tap.cfg \
	changelog clean

define HELP
Start
  make demo         start a node and three clients, and call one (DEMO_ONCE=1: exit after the call)
  make setup        create .venv with all that the other targets need
  make clean        remove the virtual environments, build output and caches

Test
  make test         run all that must pass: lint, unit, integration, docs
  make lint         check format, style, types and news fragments
  make unit         run the unit tests under trial
  make integration  run the integration tests, with real processes and sockets, under pytest
  make proxies      run the integration tests with real proxies alone: haproxy, nginx, Apache
  make servers      check that the servers the tests start are installed; as root, install them
  make conformance  run the Autobahn test suite; needs CPython 2.7 (PYTHON27=/path/to/python2.7)

Faults
  make chaos        inject faults into a fleet under load, seven minutes (SCENARIO=kill-node: only that one)
  make simulate     simulate whole fleets with faults, ten minutes, on all cores (SIMULATE_MINUTES=60: longer)
  make hostile      attack a node, ten minutes (ATTACKS=ping-flood: only that one)
  make fuzz         fuzz frames, JSON-RPC and the opening handshake, ten minutes each (FUZZ_SECONDS=60: shorter);
                    needs CPython 3.11 to 3.13

Measure
  make bench        run the benchmarks, ten minutes; writes benchmarks/results.txt and benchmarks/results.png

Docs
  make docs         build the documentation as HTML in docs/_build
  make tap.cfg      write tap.cfg from the settings

Release
  make changelog    print a draft of the next release's section of CHANGELOG.rst

CONTRIBUTING.rst describes how to run a single test, fault or benchmark.
endef

help:
	@: $(info $(HELP))

setup: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml tools/make_venv.sh
	sh tools/make_venv.sh $(PYTHON) $(VENV)
	touch $@

test: lint unit integration docs

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@# Fails if the name of a news fragment is invalid.
	$(BIN)/towncrier build --draft >/dev/null

unit: setup servers
	$(BIN)/python -m twisted.trial --jobs=2 --reporter=text --temp-directory=_trial_temp tests

# Also part of `make integration`.
proxies: setup servers
	$(BIN)/python -m pytest tests/integration/test_haproxy.py tests/integration/test_pooling_proxy.py \
	    tests/integration/test_client_ids.py

integration: setup servers
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

# The tests start servers of their own: check that they are installed.
servers:
	@sh tools/need_servers.sh

chaos: setup servers
	$(BIN)/python -m tests.chaos $(SCENARIO)

simulate: setup
	$(BIN)/python -m tests.simulation --soak $(SIMULATE_MINUTES) --seed $(SEED)

hostile: setup
	$(BIN)/python -m tests.hostile $(ATTACKS)

fuzz: setup $(VENV)/fuzzer
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

$(VENV)/fuzzer: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	touch $@

conformance: setup $(VENV27)/installed
	$(BIN)/python -m tests.conformance.run $(VENV27)/bin/wstest build/conformance

$(VENV27)/installed: tools/make_venv27.sh | setup
	sh tools/make_venv27.sh $(BIN)/python $(VENV27) $(PYTHON27)
	touch $@

bench: setup $(VENV)/peers
	$(BIN)/python -m benchmarks.all

$(VENV)/peers: $(VENV)/installed benchmarks/install.py
	$(BIN)/python -m benchmarks.install
	touch $@

docs: setup
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build

demo: setup
	@$(BIN)/python -m gateway.demo

tap.cfg: setup
	$(BIN)/python tools/make_tap_cfg.py > tap.cfg.new
	mv tap.cfg.new tap.cfg

changelog: setup
	@$(BIN)/towncrier build --draft

clean:
	rm -rf $(VENV) $(VENV27) _trial_temp* docs/_build build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
