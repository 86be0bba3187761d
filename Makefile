# Set-up, the main job, tests and lint. `make` alone lists the targets.
# Every target sets up .venv when needed; the stamp .venv/.ready makes the next start cost nothing.

PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
UV          ?= $(shell command -v uv 2>/dev/null)
ARGS        ?=
WORKERS     ?= 2

VENV_PYTHON := .venv/bin/python
READY       := .venv/.ready
UNFINISHED  := .venv/.unfinished
PYTEST      := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist worksteal --durations=10
NOTEBOOKS    = $(wildcard notebooks/*.ipynb)
STRIP       := $(VENV_PYTHON) -m nbstripout --keep-id --drop-tagged-cells injected-parameters \
               --extra-keys "metadata.papermill cell.metadata.papermill metadata.language_info.version"

# uv reads neither pip's variables nor its separator: links are parted by spaces there, by commas here.
EMPTY   :=
SPACE   := $(EMPTY) $(EMPTY)
COMMA   := ,
UV_LINKS = $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(subst $(SPACE),$(COMMA),$(strip $(PIP_FIND_LINKS)))")
INSTALL  = -e ".[test]" $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

# The stamp holds the folder it was made in: a copied .venv would run the other folder's setlib.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

.DEFAULT_GOAL := help
.PHONY: help workbook test coverage test-reliability test-browser screenshots lab lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile
	@echo 'Variables: PYTHON=python3.12 (3.10 to 3.13), ARGS="--seed 1" for workbook and lab,'
	@echo '           WORKERS=4 processes for tests (2 unless said), UV= to do without uv,'
	@echo '           CONSTRAINTS= to keep a torch build of your own in .venv'

workbook: $(READY)  ## the five notebooks in the quick profile; ARGS goes to `python -m setlib run`
	$(VENV_PYTHON) -m setlib run --profile quick $(ARGS)

test: lint  ## lint, types and all tests, the notebooks in the smoke profile among them
	$(PYTEST)

coverage: $(READY)  ## all tests, more slowly, with the lines of setlib that they run
	$(PYTEST) --cov=setlib --cov-report=term

test-reliability: $(READY)  ## kills, full disks, bad networks and strange files at length: 5 minutes on two cores
	$(PYTEST) -m "" tests/reliability

test-browser: $(READY)  ## the explorer in a real JupyterLab in a headless Chromium, if one is installed
	$(VENV_PYTHON) -m pip install --quiet -e ".[browser]" $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -rs -m browser

screenshots: $(READY)  ## the pictures of the README, from the trained run runs/quick, by the browser check
	SETLIB_RUN=runs/quick SETLIB_SCREENSHOTS=data/screenshots $(VENV_PYTHON) -m pytest -rs -m browser tests/explorer/test_browser.py

lab: $(READY)  ## JupyterLab on the notebooks and their explorers, this machine only, with a token
	$(VENV_PYTHON) -m jupyterlab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" \
	  --LabApp.default_url=/lab/tree/notebooks/02_frequency.ipynb --LabApp.news_url=None \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(ARGS)

lint: $(READY)  ## check format, style, types of the hall and notebooks; changes nothing
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m mypy
	$(if $(NOTEBOOKS),$(STRIP) --verify $(NOTEBOOKS))

format: $(READY)  ## format code and notebooks, mend what can be mended, strip outputs
	$(VENV_PYTHON) -m ruff format .
	$(VENV_PYTHON) -m ruff check --fix .
	$(if $(NOTEBOOKS),$(STRIP) $(NOTEBOOKS))

clean:  ## remove .venv and caches; never runs/ or data/
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage build dist setlib.egg-info
	find setlib tests notebooks -name __pycache__ -o -name .ipynb_checkpoints 2>/dev/null | xargs rm -rf

# A set-up that was cut short leaves .venv/.unfinished and is begun anew; an environment of the
# user's own is kept and only added to; the stamp is written last.
$(READY): pyproject.toml constraints.txt
	@rm -f $(READY); \
	if [ -e $(UNFINISHED) ] || ! $(VENV_PYTHON) -c "" 2>/dev/null; then \
	  $(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null || { \
	    echo "setlib needs Python 3.10 to 3.13, but PYTHON=$(PYTHON) is `$(PYTHON) --version 2>/dev/null || echo not there`:" \
	      "name another, for example make PYTHON=python3.12"; exit 1; }; \
	  echo "Setting up .venv: 1 to 3 minutes and 2 GB of disk"; \
	  base=`$(PYTHON) -c "import sys; print(getattr(sys, '_base_executable', sys.executable))"`; \
	  rm -rf .venv && mkdir .venv && touch $(UNFINISHED) || exit 1; \
	  if [ -n "$(UV)" ]; then "$(UV)" venv --quiet --seed --allow-existing --python "$$base" .venv; \
	  else "$$base" -m venv .venv; fi || exit 1; \
	fi; \
	touch $(UNFINISHED) || exit 1; \
	if [ -n "$(UV)" ]; then $(UV_LINKS) "$(UV)" pip install --python $(VENV_PYTHON) $(INSTALL); \
	else $(VENV_PYTHON) -m pip install $(INSTALL); fi || exit 1; \
	$(VENV_PYTHON) -m jupyter labextension disable --level=sys_prefix "@jupyterlab/apputils-extension:announcements" \
	  >/dev/null 2>&1 || exit 1; \
	rm -f $(UNFINISHED) && echo "$(CURDIR)" > $(READY)
