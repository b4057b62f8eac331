# Two commands matter: `make train` and `make test`. Each sets up what it needs, once, from a fresh clone with nothing but
# Python 3.11 or newer: everything is installed into .venv, a stamp file there remembers it, and a second run installs
# nothing. Editing pyproject.toml or constraints.txt installs again. All paths are relative, so that the folder may have
# spaces in its name. On Windows: python -m venv .venv, then .venv\Scripts\python -m pip install -e . -c constraints.txt

PYTHON ?= python3
# options for the command at hand:  make train ARGS="--steps 100"
ARGS ?=
# another build of torch:  make train TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= $(shell cat .venv/torch 2>/dev/null)

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: help train serve test lessons notebooks book bench lint clean force
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

train: .venv/installed  ## train on the embedded corpus for about a minute and a half and print samples
	$(PY) nanogptx/train.py $(ARGS)

serve: .venv/installed-serve  ## serve a trained model and a page to play with; ARGS="out/mine --port 9000"
	$(PY) nanogptx/serve.py $(or $(ARGS),out/tales)

test: lint  ## ruff, every test, then every lesson
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)
	$(PY) -m pytest --nbval lessons -n 2 --dist loadfile

lessons: .venv/installed-test  ## make components and notebooks from lessons/src, or ARGS="build 02", ARGS=check
	$(PY) lessons/build.py $(or $(ARGS),build)

notebooks: .venv/installed  ## work through the lessons in JupyterLab
	cd lessons && ../$(PY) -m jupyter lab $(ARGS)

book: .venv/installed-book build/mathjax/tex-svg.js  ## the lessons as pages that need no network: build/book/index.html
	$(PY) -m sphinx -q -W --keep-going -c lessons/book lessons build/book

bench: .venv/installed-test  ## measurements, in ratios to a peer on the same work
	@set -e; for file in tests/bench/*.py; do echo "== $$file"; $(PY) "$$file" $(ARGS); done

lint: .venv/installed-test  ## ruff: mistakes, and the form of the code
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:  ## remove the environment and all caches; runs in out/ and corpora in data/ stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The build asked for with TORCH is remembered, so that asking for another one, and only that, installs again.
ifneq ($(strip $(TORCH)),$(strip $(shell cat .venv/torch 2>/dev/null)))
.venv/installed: force
endif
export TORCH

# With TORCH the constraints leave torch out: another version may be wanted than the one the tests ran with.
.venv/installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "nanogptx needs Python 3.11 or newer and %s is %d.%d: name another one, say make train PYTHON=python3.12" % ((sys.executable,) + v))'
	"$(PYTHON)" -m venv .venv
ifeq ($(strip $(TORCH)),)
	cp constraints.txt .venv/constraints.txt
else
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(PIP) install $$TORCH
	@printf '%s\n' "$$TORCH" > .venv/torch
endif
	$(PIP) install -e . -c .venv/constraints.txt
	@touch $@

.venv/installed-serve: .venv/installed
	$(PIP) install -e '.[serve]' -c .venv/constraints.txt
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) install -e '.[serve,test]' -c .venv/constraints.txt
	@touch $@

.venv/installed-book: .venv/installed
	$(PIP) install -e '.[book]' -c .venv/constraints.txt
	@touch $@

# The formulas' script: npm checks what it fetches against the registry's checksum.
build/mathjax/tex-svg.js:
	mkdir -p build/mathjax
	cd build/mathjax && npm pack --silent mathjax@3.2.2 && tar -xzf mathjax-3.2.2.tgz --strip-components=2 package/es5/tex-svg.js
	rm build/mathjax/mathjax-3.2.2.tgz
	@touch $@
