# Every target but help and clean sets up .venv first if it is missing or older than the pins.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The first interpreter that runs and is new enough; override with `make PYTHON=...`.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
CHAPTERS = $(BIN)/python -m pytest --nbval -n 2 --dist loadfile book
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Processes of `make paper`: one a core.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# One thread a process: two processes share two cores, and spinning threads slow each other down.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# glibc would give the memory of each large tensor back to the system, and page it in again for the next.
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

.PHONY: help setup book check-site test lint unit chapters browser format lab pdf figure paper bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

setup: $(READY)  ## create .venv with the pinned requirements and the package

# Python compiles what it imports; to compile all that is installed would take half of the set-up.
$(READY): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile --requirement requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

# pytest's status 5: no chapter is left to execute
book: $(READY)  ## execute the chapters and build the site, warnings as errors, into _build/html
	$(CHAPTERS) --unexecuted || [ $$? -eq 5 ]
	$(BIN)/jupyter-book build -W -n --keep-going book

check-site: $(READY)  ## check the built site: links, anchors, alt text, no request to another host
	$(BIN)/python book/_ext/check_site.py _build/html

test: $(READY)  ## lint, unit tests, every chapter through pytest --nbval, the site in a browser
	$(MAKE) lint
	$(MAKE) unit
	$(MAKE) chapters
	$(MAKE) book
	$(MAKE) check-site
	$(MAKE) browser

lint: $(READY)  ## ruff: lint and format, code cells of the chapters included; mypy: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python book/_ext/ruff_chapters.py
	$(BIN)/mypy

# With COVERAGE=1 they take a third longer; CI asks for it.
unit: $(READY)  ## the unit tests alone; with COVERAGE=1 also how much of wpo_notes they reach
	$(BIN)/python -m pytest -n 2 --doctest-modules --ignore=tests/browser tests wpo_notes $(if $(COVERAGE),--cov --cov-report=term-missing:skip-covered)

chapters: $(READY)  ## the chapters alone, through pytest --nbval
	$(CHAPTERS)

browser: $(READY)  ## the built site in headless Chromium, which is installed where that can be done
	$(BIN)/python tests/browser/chromium.py
	$(BIN)/python -m pytest -n 2 -rs tests/browser

format: $(READY)  ## rewrite Python files and code cells in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python book/_ext/ruff_chapters.py --fix

lab: $(READY)  ## open the chapters in JupyterLab; a double click opens one as a notebook
	$(BIN)/jupytext-config --settings-file $(VENV)/etc/jupyter/labconfig/default_setting_overrides.json set-default-viewer markdown myst
	$(BIN)/jupyter lab book

pdf: $(READY)  ## execute the chapters and make the PDF _build/latex/book.pdf; needs XeLaTeX
	@for tool in latexmk xelatex; do command -v $$tool >/dev/null || { echo "$$tool was not found. On Debian: apt-get install latexmk texlive-xetex texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended fonts-freefont-otf tex-gyre" >&2; exit 1; }; done
	$(CHAPTERS) --unexecuted || [ $$? -eq 5 ]
	$(BIN)/jupyter-book build -W -n --keep-going --builder pdflatex book

figure: $(READY)  ## draw the figure of the README again
	$(BIN)/python book/_ext/headline.py

paper: $(READY)  ## run the experiments at the paper's scale, one process a core; goes on after a kill
	$(BIN)/python -m wpo_notes list --scale paper | xargs -P $(JOBS) -L 1 $(BIN)/python -m wpo_notes

bench: $(READY)  ## time the mixture and a training step
	$(BIN)/python -m benchmarks

clean:  ## remove the built site and the environment
	rm -rf _build $(VENV)
