# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# cpu or cuda: which wheels `make setup` installs.
DEVICE ?= cpu
ifeq ($(filter $(DEVICE),cpu cuda),)
$(error DEVICE is $(DEVICE), expected cpu or cuda)
endif

MODEL_DIR ?=
CHECKPOINT_DIR ?= work/checkpoint
ENGINE_DIR ?= work/engine
QUANT ?= FP8
TP ?= 1
DECODER ?= auto
VISION ?= auto
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
TRITON_FLAGS ?=
# More flags of serve.py, as SERVE_FLAGS="--host 0.0.0.0 --api_key_file keys".
SERVE_FLAGS ?=
# More flags of build_engine.py, as BUILD_FLAGS="--max_batch_size 16 --optimize_for latency".
BUILD_FLAGS ?=

MINUTES ?= 10

DEMO := work/demo
# `make serve` without ENGINE_DIR serves the small trained model.
SERVES_DEMO := $(filter file,$(origin ENGINE_DIR))

.DEFAULT_GOAL := help
.PHONY: help setup setup-test setup-serving setup-triton setup-clients demo engine doctor serve triton check test test-all durations \
	lint benchmark soak fuzz clean

help:
	@echo "make demo        set up, convert, build, and read pictures with the small trained model on the CPU"
	@echo "make check       lint, types and the tests that need a moment: under a minute"
	@echo "make test        set up and run the tests that need no GPU"
	@echo "make engine MODEL_DIR=... [CHECKPOINT_DIR=... ENGINE_DIR=... TP=1 QUANT=FP8|none"
	@echo "            DECODER=... VISION=... BUILD_FLAGS=...]"
	@echo "make serve [ENGINE_DIR=... HTTP_PORT=8000 SERVE_FLAGS=...]   OpenAI's API; the small model by default"
	@echo "make triton ENGINE_DIR=... [HTTP_PORT=8000 GRPC_PORT=8001 METRICS_PORT=8002 TRITON_FLAGS=...]"
	@echo "make doctor      what can be built and run here, and what is missing for the rest"
	@echo "make setup [DEVICE=cuda]   the environment: for any CPU, or for a GPU without NVIDIA's container"
	@echo "make soak [MINUTES=10]   load and deaths on real servers"
	@echo "make fuzz [MINUTES=10]   damaged files and requests of every kind, counted"
	@echo "make test-all | durations | lint | benchmark | clean"

# A stamp per requirements file: installing again is a no-op until the file changes.
# SYSTEM_PYTHON=1 takes $(PYTHON) as it is, in a container that has everything (docker/Dockerfile).
ifdef SYSTEM_PYTHON
RUN := $(PYTHON)
setup:
else
RUN := $(BIN)/python
setup: $(VENV)/.$(DEVICE)
endif
setup-test: $(VENV)/.test $(VENV)/.tensorrt-rtx
setup-serving: $(VENV)/.serving
setup-triton: $(VENV)/.triton
# Other people's clients, which slow tests of serve.py start: 5 GB.
setup-clients: $(VENV)/clients/.aiperf $(VENV)/clients/.guidellm $(VENV)/clients/.lmms-eval

# One environment holds the wheels of one of the two.
$(VENV)/.cpu $(VENV)/.cuda: $(VENV)/.%: requirements/%.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
		echo "error: $(PYTHON) is not Python 3.11 or 3.12; use make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "installing into $(VENV), which takes a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r $<
	@rm -f $(VENV)/.cpu $(VENV)/.cuda
	@touch $@

$(VENV)/.triton: requirements/triton.txt $(VENV)/.$(DEVICE)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/triton.txt
	@touch $@

$(VENV)/.serving: requirements/serving.txt $(VENV)/.$(DEVICE)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/serving.txt
	@touch $@

$(VENV)/.test: requirements/test.txt requirements/serving.txt requirements/triton.txt requirements/mpi.txt \
		requirements/evaluation.txt requirements/pictures.txt $(VENV)/.cpu
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/test.txt
	@touch $@

# torchvision: only pictures of a trainer's need it, and PyPI's does not go with a torch for CPUs alone.
$(VENV)/clients/.%: requirements/clients/%.txt
	@mkdir -p $(VENV)/clients
	$(PYTHON) -m venv $(VENV)/clients/$*
	$(VENV)/clients/$*/bin/pip install --quiet --disable-pip-version-check -r $<
	@$(VENV)/clients/$*/bin/pip uninstall --quiet --yes torchvision 2>/dev/null || true
	@touch $@

# An environment of its own, which only pytest looks into (pythonpath in pyproject.toml).
$(VENV)/.tensorrt-rtx: requirements/tensorrt-rtx.txt $(VENV)/.cpu
	@rm -rf $(VENV)/tensorrt-rtx
	@$(BIN)/pip install --quiet --disable-pip-version-check --target $(VENV)/tensorrt-rtx \
		-r requirements/tensorrt-rtx.txt && touch $@ || \
		echo "warning: TensorRT-RTX cannot be installed here; the tests that build with it skip" >&2

demo: setup
	@$(RUN) -m tools.demo $(DEMO_FLAGS)

# Converts and builds what is not up to date with its input and arguments.
engine: setup
	@test -n "$(MODEL_DIR)" || { echo "error: make engine needs MODEL_DIR=<NVLM-D checkpoint>" >&2; exit 2; }
	@$(RUN) convert_checkpoint.py --model_dir "$(MODEL_DIR)" \
		--output_dir "$(CHECKPOINT_DIR)" --quant_algo $(QUANT) --tp_size $(TP) --if_stale
	@$(RUN) build_engine.py --checkpoint_dir "$(CHECKPOINT_DIR)" \
		--engine_dir "$(ENGINE_DIR)" --decoder $(DECODER) --vision $(VISION) \
		$(BUILD_FLAGS) --if_stale

doctor: setup
	@$(RUN) -m runtime.doctor

# OpenAI's API over HTTP until Control-C.
serve: $(if $(SYSTEM_PYTHON),,setup-serving)
	@$(if $(SERVES_DEMO),$(RUN) -m tools.demo --engine_only)
	@$(RUN) serve.py --engine_dir "$(if $(SERVES_DEMO),$(DEMO)/engine,$(ENGINE_DIR))" \
		--port $(HTTP_PORT) $(SERVE_FLAGS)

# Serves an engine until Control-C. In NVIDIA's container use its python: PYTHON and VENV as it has.
triton: $(if $(SYSTEM_PYTHON),,setup-triton)
	@$(RUN) -m frontends.triton.serve --engine_dir "$(ENGINE_DIR)" --http_port $(HTTP_PORT) \
		--grpc_port $(GRPC_PORT) --metrics_port $(METRICS_PORT) $(TRITON_FLAGS)

# Two workers, one thread each: the suite is sized for two cores.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile -q

# The inner loop. ruff and mypy read again only what changed; tests/README.md says what it leaves out.
check: lint
	$(PYTEST) -m check

test: setup-test
	$(PYTEST) -m "not slow"

test-all: setup-test
	$(PYTEST)

# What `make test` runs, timed: tests/durations.md.
durations: setup-test
	$(PYTEST) -m "not slow" --junitxml work/tests.xml
	$(BIN)/python -m tools.slowest_tests work/tests.xml --output tests/durations.md

# Minutes of load and deaths, on Triton and serve.py at the same time (docs/reliability.md);
# `make test` runs seconds of it.
soak: setup-test
	@$(RUN) -m tools.demo --engine_only
	$(BIN)/python -m tests.faults.both --engine_dir $(DEMO)/engine --minutes $(MINUTES)

# Damaged files and requests of every kind, for some minutes on two cores: docs/reliability.md.
fuzz: setup-test
	$(BIN)/python -m tests.fuzz.campaign --minutes $(MINUTES) --output work/fuzz.json

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --verbose > $(VENV)/.lint-imports.log || { cat $(VENV)/.lint-imports.log; exit 1; }

benchmark: setup
	@$(RUN) -m bench.cpu.path

clean:
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
