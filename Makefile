# What a person does with kvmmap. A target creates the environment that it runs in (release/environment.py).
PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
ENVIRONMENT := $(PYTHON) release/environment.py

.PHONY: help demo test test-pythons test-model test-bridges test-vllm test-transformers soak fuzz sanitize lint format bench \
	bench-llama-cpp figures picture docs wheels check-wheels clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo:  ## a real model: save its prompt, reopen it in another process, continue from it
	@$(ENVIRONMENT) demo
	.venv-demo/bin/python demo/demo.py

test:  ## the tests, on every core (JOBS=)
	@$(ENVIRONMENT) test --venv $(VENV)
	$(VENV)/bin/pytest -n $(JOBS) --maxprocesses 8 --dist loadgroup

test-pythons:  ## the tests on each supported Python that is on PATH
	for version in $$($(PYTHON) release/pythons.py); do \
		$(MAKE) test PYTHON=python$$version VENV=.venv-$$version || exit 1; done

test-model:  ## the transformers integration with the weights of a small model
	@$(ENVIRONMENT) test-model
	.venv-model/bin/pytest tests/test_smollm2.py

test-bridges:  ## llama.cpp, vLLM, mlx-lm and transformers continue one another's caches; llama.cpp is compiled for it
	@$(ENVIRONMENT) bridges
	@$(ENVIRONMENT) vllm
	KVMMAP_VLLM_PYTHON=.venv-vllm/bin/python \
		.venv-bridges/bin/pytest -s tests/test_bridges.py tests/test_llama_cpp.py tests/test_mlx.py

test-vllm:  ## vLLM with kvmmap's connector, on the CPU (3.4 GB of packages)
	@$(ENVIRONMENT) vllm
	.venv-vllm/bin/pytest -s tests/test_vllm.py

test-transformers:  ## the transformers integration on the oldest supported and the newest release of transformers
	$(PYTHON) release/integrations.py

soak:  ## 200,000 simulated power losses, 1,000 writers and users of a library killed, 10,000 opens (IMAGES=, KILLS=)
	@$(ENVIRONMENT) test --venv $(VENV)
	KVMMAP_HISTORIES=$$(($(or $(IMAGES),200000) / 20)) $(VENV)/bin/pytest -s tests/test_crash.py  # some 23 images each
	KVMMAP_OPENS=10000 $(VENV)/bin/pytest tests/test_handles.py -k nothing_behind
	KVMMAP_EVERY_BIT=1 $(VENV)/bin/pytest tests/test_damage.py -k every_byte
	PYTHONPATH=tests $(VENV)/bin/python -m soak.kills --kills $(or $(KILLS),1000)
	PYTHONPATH=tests $(VENV)/bin/python -m soak.kills --inherited 300 --kills $(or $(KILLS),1000)
	PYTHONPATH=tests $(VENV)/bin/python -m soak.states --kills $(or $(KILLS),1000)
	PYTHONPATH=tests $(VENV)/bin/python -m soak.library --kills $(or $(KILLS),1000)
	KVMMAP_LIBRARY_EXAMPLES=200 $(VENV)/bin/pytest tests/test_library_stateful.py

fuzz:  ## a million hostile files, and hostile Zarr groups: only typed errors may result (EXECUTIONS=)
	@$(ENVIRONMENT) test --venv $(VENV)
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.run --executions $(or $(EXECUTIONS),1000000)
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.run --groups --executions $$(($(or $(EXECUTIONS),1000000) / 50))
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.run --tensors --executions $$(($(or $(EXECUTIONS),1000000) / 20))
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.run --states --executions $$(($(or $(EXECUTIONS),1000000) / 20))
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.run --children --executions $$(($(or $(EXECUTIONS),1000000) / 20))
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.urls --keys $(or $(EXECUTIONS),1000000)
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.commands --count $$(($(or $(EXECUTIONS),1000000) / 50))

sanitize:  ## the compiled core under the address, undefined-behaviour and thread sanitizers
	@$(ENVIRONMENT) sanitize
	tests/native/sanitize.sh .venv-sanitized/bin/python

lint:  ## ruff, formatting, mypy --strict
	@$(ENVIRONMENT) test --venv $(VENV)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

format:  ## format, and fix what ruff can fix
	@$(ENVIRONMENT) test --venv $(VENV)
	$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .

bench:  ## the benchmarks with their baselines, as tables and as JSON in bench-out/
	@$(ENVIRONMENT) bench
	.venv-bench/bin/python benchmarks/run.py

bench-llama-cpp:  ## the same beside llama.cpp, which is compiled for it
	@$(ENVIRONMENT) llama-cpp
	.venv-llama/bin/python benchmarks/run.py llama_cpp llama_cpp_cache

figures:  ## the charts and tables of the pages, from bench-out/ (CONDITIONS="an idle machine")
	$(PYTHON) docs/tools/figures.py collect bench-out '$(or $(CONDITIONS),conditions unknown)'
	$(PYTHON) docs/tools/figures.py draw

picture:  ## README's picture, from a cache of the demo
	@$(ENVIRONMENT) demo
	[ -f demo-out/manual.kvm ] || $(MAKE) demo
	cd demo-out && ../.venv-demo/bin/python ../demo/picture.py ../docs/inspect.svg kvmmap inspect manual.kvm

docs:  ## the site, in site/: every warning is an error, links and anchors must exist, the API must be complete
	@$(ENVIRONMENT) docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	.venv-docs/bin/python docs/tools/check.py site

wheels:  ## sdist and wheels, in dist/
	@$(ENVIRONMENT) release
	.venv-release/bin/python release/build.py

check-wheels: wheels  ## install them in fresh environments, with each extra, on an old processor, under type checkers
	.venv-release/bin/python release/check.py

clean:  ## remove everything that make has created
	rm -rf $(VENV) .venv .venv-* build dist demo-out bench-out site
