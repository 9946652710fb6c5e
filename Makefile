PYTHON ?= python3
NPROC ?= 1
.DEFAULT_GOAL := help
.PHONY: help install toy demo test bench faults claims lint clean

help:      ## this list
	@grep -hE '^[a-z]+: .*##' Makefile | sed 's/:.*##/ \t/' | expand -t 12

install: .venv/installed  ## make .venv and install the six packages of requirements.txt into it

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

toy: install  ## write the small toy datasets to data/toy (a minute or two)
	.venv/bin/python tests/toy.py --out data/toy

test: install  ## every test, within 15 minutes on two cores
	OMP_NUM_THREADS=$(NPROC) .venv/bin/python tests/halves.py

demo: install  ## all four papers on drawn videos, ten minutes on two cores (ARGS=--help)
	.venv/bin/python tests/study.py demo $(ARGS)

bench: install  ## speed and memory beside the alternatives, twenty minutes on two cores (ARGS=--help)
	.venv/bin/python tests/bench.py $(ARGS)

faults: install  ## promises broken on purpose, more of them than in make test, twenty minutes (ARGS=--help)
	.venv/bin/python tests/faults.py $(ARGS)

claims: install  ## each paper's comparisons at toy size, 3 seeds, an hour on two cores (ARGS=--help)
	.venv/bin/python tests/study.py claims $(ARGS)

lint: install  ## style check; installs ruff into .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check ruff
	.venv/bin/python -m ruff check --line-length 100 --select E,F,W,B,I --ignore B905 --exclude tests/parity .

clean:     ## remove .venv, caches and the toy datasets; runs/ and other data stay
	rm -rf .venv .pytest_cache .ruff_cache data/toy __pycache__ tests/__pycache__ tests/parity/__pycache__
