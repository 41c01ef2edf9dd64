# FieldViT. `make` lists the targets; `make quickstart` and `make test` do all the set-up they need.
# Written for GNU make 3.81 (macOS) and later.

.DEFAULT_GOAL := help
SHELL := /bin/sh
.PHONY: help env device-env peers onnx2tf-env legacy-env quickstart test test-slow test-legacy lint format bench screenshots clean

# PYTHON       interpreter for the environments; empty: python3.11, else python3 if it is 3.11
# TORCH_INDEX  a further package index that offers PyTorch's CPU build, for example PyTorch's own; empty: none.
#              On Linux x86-64 the usual index holds the CUDA build, several GB more; it works, but is not needed.
# PIP_ARGS     further pip options, for example "--no-index --find-links /media/usb/wheels"
# ARGS         passed on by quickstart, test, test-slow and bench
PYTHON ?=
TORCH_INDEX ?=
PIP_ARGS ?=
ARGS ?=
export PYTHON TORCH_INDEX PIP_ARGS

VENV := .venv
DEVICE_VENV := .venv-device
PEERS_VENV := .venv-peers
ONNX2TF_VENV := .venv-onnx2tf
LEGACY_VENV := .venv-legacy
LEGACY_TEST_VENV := .venv-legacy-test
BIN := $(VENV)/bin
# A process per core; more than 4 would need more than 16 GB.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Names of scripts in bench/ that take a minute or two on a laptop.
QUICK_BENCHES := device_latency install_sizes

help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z0-9%-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=, TORCH_INDEX= (PyTorch's CPU build), PIP_ARGS=, ARGS=; the Makefile says what each does"

env: $(VENV)/.stamp ## Make .venv: host, converters and the tools for development

device-env: $(DEVICE_VENV)/.stamp ## Make .venv-device: only what a board installs

peers: $(PEERS_VENV)/.stamp ## Make .venv-peers: the libraries that benchmarks compare with

onnx2tf-env: $(ONNX2TF_VENV)/.stamp ## Make .venv-onnx2tf: the second route to TFLite, with TensorFlow

legacy-env: $(LEGACY_VENV)/.stamp ## Make .venv-legacy: tflite-runtime, for boards without a LiteRT wheel

quickstart: env device-env ## Run the whole loop on real data, ending in an HTML report
	@$(BIN)/fieldvit quickstart --device-python $(DEVICE_VENV)/bin/python $(ARGS)

test: env device-env ## Run the tests that take minutes at most
	@$(PYTEST) $(ARGS)

test-slow: env device-env ## Run the long tests, too long for every change
	@$(PYTEST) -m slow $(ARGS) || test $$? -eq 5  # 5: there is none

test-legacy: env legacy-env $(LEGACY_TEST_VENV)/.stamp ## Run the device's tests under tflite-runtime
	@$(BIN)/python -m bench.legacy_runtime --no-record $(ARGS)

lint: env ## Check style and types (ruff, mypy)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: env ## Put the code into the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: env ## Run the quick benchmarks; long ones one by one: make evidence-NAME
	@test -n "$(QUICK_BENCHES)" || echo "no quick benchmark yet; make evidence-NAME runs bench/NAME.py"
	@for name in $(QUICK_BENCHES); do $(BIN)/python -m bench.$$name $(ARGS) || exit 1; done

evidence-%: env ## Run bench/NAME.py, which writes bench/results/NAME.json and NAME.md
	@$(BIN)/python -m bench.$* $(ARGS)

screenshots: env device-env ## Take the pictures in docs/ from a real quickstart (needs chromium)
	@$(BIN)/python -m bench.screenshots

clean: ## Remove the environments and caches; results in bench/results and runs/ stay
	rm -rf $(VENV) $(DEVICE_VENV) $(PEERS_VENV) $(ONNX2TF_VENV) $(LEGACY_VENV) $(LEGACY_TEST_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp: constraints/host.txt pyproject.toml .ci/make-venv
	@.ci/make-venv $(VENV) constraints/host.txt -e '.[host,dev]'

$(DEVICE_VENV)/.stamp: constraints/device.txt pyproject.toml .ci/make-venv
	@.ci/make-venv $(DEVICE_VENV) constraints/device.txt -e '.[device]'

$(PEERS_VENV)/.stamp: constraints/peers.txt constraints/host.txt pyproject.toml .ci/make-venv
	@.ci/make-venv $(PEERS_VENV) constraints/peers.txt -e '.[host]' avalanche-lib torch-pruning

$(ONNX2TF_VENV)/.stamp: constraints/onnx2tf.txt .ci/make-venv
	@.ci/make-venv $(ONNX2TF_VENV) constraints/onnx2tf.txt onnx2tf tensorflow

$(LEGACY_VENV)/.stamp: constraints/device-legacy.txt pyproject.toml .ci/make-venv
	@.ci/make-venv $(LEGACY_VENV) constraints/device-legacy.txt -e '.[device-legacy]'

$(LEGACY_TEST_VENV)/.stamp: constraints/legacy-test.txt constraints/device-legacy.txt pyproject.toml .ci/make-venv
	@.ci/make-venv $(LEGACY_TEST_VENV) constraints/legacy-test.txt -e '.[device-legacy]' amqtt cryptography hypothesis jinja2 pillow pytest pytest-xdist rich typer
