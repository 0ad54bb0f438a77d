# Every target but help and clean sets up .venv first if it is missing or older than the pins.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The first interpreter that runs and is new enough; override with `make PYTHON=...`.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Processes of `make paper`: one a core.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# One thread a process: two processes share two cores, and spinning threads slow each other down.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# glibc would give the memory of each large tensor back to the system, and page it in again for the next.
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

.PHONY: help setup book check-site test lint unit chapters format lab figure paper bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

setup: $(READY)  ## create .venv with the pinned requirements and the package

$(READY): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

book: $(READY)  ## execute the chapters and build the site, warnings as errors, into _build/html
	$(BIN)/jupyter-book build -W -n --keep-going book

check-site: $(READY)  ## check the built site: links, anchors, alt text, no request to another host
	$(BIN)/python book/_ext/check_site.py _build/html

test: $(READY)  ## lint, unit tests with coverage, and every chapter through pytest --nbval
	$(MAKE) lint
	$(MAKE) unit
	$(MAKE) chapters

lint: $(READY)  ## ruff: lint and format check, code cells of the chapters included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python book/_ext/ruff_chapters.py

unit: $(READY)  ## the unit tests alone, with the coverage of wpo_notes
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing:skip-covered

chapters: $(READY)  ## the chapters alone, through pytest --nbval
	$(BIN)/python -m pytest --nbval -n 2 --dist loadfile book

format: $(READY)  ## rewrite Python files and code cells in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python book/_ext/ruff_chapters.py --fix

lab: $(READY)  ## open the chapters in JupyterLab (right-click a chapter: Open With, Notebook)
	$(BIN)/jupyter lab book

figure: $(READY)  ## draw the figure of the README again
	$(BIN)/python book/_ext/headline.py

paper: $(READY)  ## run the experiments at the paper's scale, one process a core; goes on after a kill
	$(BIN)/python -m wpo_notes list --scale paper | xargs -P $(JOBS) -L 1 $(BIN)/python -m wpo_notes

bench: $(READY)  ## time the mixture and a training step
	$(BIN)/python -m benchmarks

clean:  ## remove the built site and the environment
	rm -rf _build $(VENV)
