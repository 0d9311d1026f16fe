# What a person does with kvmmap. `env-NAME` creates the environment that a target runs in (release/environment.py).
PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto

.PHONY: help demo test test-sweeps test-pythons test-model test-bridges test-vllm test-transformers soak fuzz check-aarch64 sanitize lint format \
	bench bench-llama-cpp figures picture docs wheels check-wheels clean env-test

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile
env-test:
	@$(PYTHON) release/environment.py test --venv $(VENV)
env-%:
	@$(PYTHON) release/environment.py $*

demo: env-demo  ## a real model: save its prompt, reopen it in another process, continue from it
	.venv-demo/bin/python demo/demo.py

test: env-test  ## the tests, on every core (JOBS=)
	$(VENV)/bin/pytest -n $(JOBS) --maxprocesses 8 --dist loadgroup -m "not sweep"
test-sweeps: env-test  ## more cases of the same tests, among them the kernels in C++ under sanitizers: minutes
	$(VENV)/bin/pytest -n $(JOBS) --maxprocesses 8 --dist loadgroup -m sweep
test-pythons:  ## the tests on each supported Python that is on PATH
	for version in $$($(PYTHON) release/pythons.py); do \
		$(MAKE) test PYTHON=python$$version VENV=.venv-$$version || exit 1; done
test-model: env-test-model  ## the transformers integration with the weights of a small model
	.venv-model/bin/pytest tests/test_smollm2.py tests/test_serving_smollm2.py
test-bridges: env-bridges env-vllm  ## llama.cpp, vLLM, mlx-lm and transformers continue one another's caches; llama.cpp is compiled for it
	KVMMAP_VLLM_PYTHON=.venv-vllm/bin/python \
		.venv-bridges/bin/pytest -s tests/test_bridges.py tests/test_llama_cpp.py tests/test_mlx.py tests/test_mlx_server.py
test-vllm: env-vllm  ## vLLM with kvmmap's connector, on the CPU (3.4 GB of packages)
	.venv-vllm/bin/pytest -s tests/test_vllm.py
test-transformers:  ## the transformers integration on the oldest supported and the newest release of transformers
	$(PYTHON) release/integrations.py

soak: env-test  ## 200,000 simulated power losses, 1,000 writers and users of a library killed, 10,000 opens (IMAGES=, KILLS=)
	IMAGES=$(IMAGES) KILLS=$(KILLS) tests/soak/all.sh $(VENV)/bin/python
fuzz: env-test  ## a million hostile files, and hostile Zarr groups: only typed errors may result (EXECUTIONS=)
	EXECUTIONS=$(EXECUTIONS) tests/fuzz/all.sh $(VENV)/bin/python
check-aarch64:  ## the kernels of AArch64, compiled for it and run under an emulator, and how many instructions they take
	tests/native/run.sh build/native-aarch64 aarch64
sanitize: env-sanitize  ## the compiled core under the address, undefined-behaviour and thread sanitizers
	tests/native/sanitize.sh .venv-sanitized/bin/python

lint: env-test  ## ruff, formatting, mypy --strict
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
format: env-test  ## format, and fix what ruff can fix
	$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .

bench: env-bench  ## the benchmarks with their baselines, on one page: bench-out/page.md, and JSON (at most 20 minutes)
	.venv-bench/bin/python benchmarks/run.py
bench-llama-cpp: env-llama-cpp  ## the same beside llama.cpp, which is compiled for it
	.venv-llama/bin/python benchmarks/run.py llama_cpp llama_cpp_cache
figures: env-bench  ## the charts and tables of the pages, from bench-out/ (CONDITIONS="an idle machine")
	.venv-bench/bin/python docs/tools/figures.py collect bench-out '$(or $(CONDITIONS),conditions unknown)'
	.venv-bench/bin/python docs/tools/figures.py draw
picture: env-demo  ## README's picture, from a cache of the demo
	[ -f demo-out/manual.kvm ] || $(MAKE) demo
	cd demo-out && ../.venv-demo/bin/python ../demo/picture.py ../docs/inspect.svg kvmmap inspect manual.kvm
docs: env-docs  ## the site, in site/: every warning is an error, links and anchors must exist, the API must be complete
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	.venv-docs/bin/python docs/tools/check.py site

wheels: env-release  ## sdist and wheels, in dist/
	.venv-release/bin/python release/build.py
check-wheels: wheels  ## install them in fresh environments, with each extra, on an old processor, under type checkers
	.venv-release/bin/python release/check.py

clean:  ## remove everything that make has created
	rm -rf $(VENV) .venv .venv-* build dist demo-out bench-out site
