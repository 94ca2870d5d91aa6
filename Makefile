# The front door. `make demo` and `make test` set up everything they need in .venv.
#
#   make demo            ES on a small language model, watched live; leaves runs/demo/ with report.html
#   make test            every test that needs no GPU
#   make build           the native libraries, in place
#   make wheel           dist/es_kernels-*.whl, one for every Python and torch
#   make bench           CPU microbenchmark, static analysis, learning, statistics of the noise -> bench/results/
#
# PYTHON=python3.12    the interpreter
# TORCH=system         use the torch that PYTHON already has, instead of the one of constraints.txt
# ES_KERNELS_CUDA=0    do not build the CUDA library (a minute)

PYTHON ?= python3
TORCH ?= constraints
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml constraints.txt
CONSTRAINTS := $(if $(filter system,$(TORCH)),,-c constraints.txt)
SITE := $(if $(filter system,$(TORCH)),--system-site-packages)

.PHONY: demo test build wheel bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m es_finetune train --output runs/demo --overwrite
	$(BIN)/python -m es_finetune replay runs/demo
	$(BIN)/python -m es_finetune report runs/demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

build:
	$(PYTHON) setup.py --quiet build_ext --inplace

wheel:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

bench: $(VENV)/test.stamp
	$(BIN)/python bench/cpu.py
	$(BIN)/python bench/static_analysis.py
	$(BIN)/python bench/learning.py
	$(BIN)/python bench/noise_stats.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(SITE) $(VENV) || { echo "cannot make a virtual environment: on Debian and Ubuntu install python3-venv"; exit 1; }

$(VENV)/demo.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[finetune]'
	touch $@

$(VENV)/test.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist es_kernels/*.so *.egg-info
