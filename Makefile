# Everything works on a fresh machine with CPython 3.11, make and g++. No GPU, no system packages.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
UV := uv==0.13.9
STAMP := $(VENV)/.ready
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: setup quickstart test test-slow lint bench lock clean

setup: $(STAMP)

# PyTorch comes first and alone: only its CPU build needs the extra index. uv installs the rest in seconds; where it
# cannot (it does not read pip's configuration), pip does in minutes. DeepSpeed comes last, because its source package
# is built with the PyTorch that is there; nothing is compiled.
$(STAMP): $(LOCK) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --retries 1 \
		--extra-index-url $(TORCH_INDEX) "$$(grep '^torch==' $(LOCK))"
	$(BIN)/pip install --quiet --disable-pip-version-check $(UV)
	grep -v '^deepspeed==' $(LOCK) > $(VENV)/wheels.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps -r $(VENV)/wheels.txt || \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $(VENV)/wheels.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		"$$(grep '^deepspeed==' $(LOCK))"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(STAMP)

quickstart: setup
	$(BIN)/python examples/quickstart.py

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "not gpu"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/sft_throughput.py
	$(BIN)/python benchmarks/serve_overhead.py

# Compiles the lock from pyproject.toml. Needs uv; UV_FIND_LINKS names a folder with the CPU build of PyTorch, if any.
lock:
	uv pip compile pyproject.toml --extra cpu --extra dev --group quickstart --python-version 3.11 --no-header --no-annotate \
		--output-file $(LOCK)

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
