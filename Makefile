PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin

.PHONY: help setup test lint unit integration docs demo tap.cfg clean

help:
	@echo "make demo         a node, three clients and a first call (DEMO_ONCE=1: end after it)"
	@echo "make test         everything that must pass: lint, unit, integration, docs"
	@echo "make lint         ruff and mypy"
	@echo "make unit         the trial suite"
	@echo "make integration  real processes and sockets, under pytest"
	@echo "make docs         the documentation, as HTML in docs/_build"
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

unit: setup
	$(BIN)/python -m twisted.trial --reporter=summary --temp-directory=_trial_temp tests

integration: setup
	$(BIN)/python -m pytest

docs: setup
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build

demo: setup
	@$(BIN)/python -m gateway.demo

tap.cfg: setup
	$(BIN)/python tools/make_tap_cfg.py > tap.cfg.new
	mv tap.cfg.new tap.cfg

clean:
	rm -rf $(VENV) _trial_temp* docs/_build build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
