PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The Autobahn test suite is Python 2 code.
PYTHON27 ?=
VENV27 := .venv27

# How long each target of `make fuzz` is run, in seconds.
FUZZ_SECONDS ?= 600

.PHONY: help setup test lint unit integration servers chaos hostile fuzz conformance bench docs demo tap.cfg \
	changelog clean

help:
	@echo "make demo         a node, three clients and a first call (DEMO_ONCE=1: end after it)"
	@echo "make test         everything that must pass: lint, unit, integration, docs"
	@echo "make lint         ruff, mypy and the names of news fragments"
	@echo "make unit         the trial suite"
	@echo "make integration  real processes and sockets, under pytest"
	@echo "make chaos        faults in a fleet under load, in seven minutes (SCENARIO=kill-node: one of them)"
	@echo "make hostile      attacks on a node, and what becomes of a client that behaves, in ten minutes (ATTACKS=ping-flood: one)"
	@echo "make fuzz         atheris on frames, JSON-RPC and the opening, ten minutes each (FUZZ_SECONDS=60: shorter);"
	@echo "                  needs CPython 3.11 to 3.13"
	@echo "make conformance  the Autobahn test suite; needs a CPython 2.7 (PYTHON27=/path/to/python2.7)"
	@echo "make bench        the benchmarks, in ten minutes: benchmarks/results.txt and results.png"
	@echo "make docs         the documentation, as HTML in docs/_build"
	@echo "make changelog    a draft of the changelog of the next release"
	@echo "make tap.cfg      write tap.cfg anew from the settings"
	@echo "make clean        remove what these made"

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

integration: setup servers
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

# The tests start servers of their own.
servers:
	@sh tools/need_servers.sh

chaos: setup servers
	$(BIN)/python -m tests.chaos $(SCENARIO)

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
