# Everything that a person or CI runs. `make demo` and `make test` work from an empty checkout with Python >= 3.11 and Node alone.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
# The platform's binary: node_modules/.bin/forge is a wrapper that exits 0 whatever happens.
FORGE = $$($(RUN) -c 'from deploy.devnet import foundry_binary as f; print(f("forge"))')

# $(call PROTOC,FOLDER): the generated half of the ring's wire format.
PROTOC = mkdir -p $(1) && $(RUN) -m grpc_tools.protoc -I. --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) worker/ring.proto

.PHONY: help setup demo test faults nightly prove slither check format test-system vectors snapshots proto bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .stamps/python .stamps/node ## Python environment and contract toolchain, each only if its list changed

.stamps/python: pyproject.toml
	@mkdir -p .stamps
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

.stamps/node: package.json
	@mkdir -p .stamps
	npm install --no-package-lock --no-audit --no-fund --ignore-scripts --loglevel=error
	@touch $@

demo: setup ## the whole protocol on this machine
	$(BIN)/plumb demo

test: setup ## every test that needs Python and Node alone
	@status=0; \
	FORGE_SNAPSHOT_CHECK=true "$(FORGE)" test || status=1; \
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile || status=1; \
	exit $$status

faults: setup ## takes each rule out of the contracts and sees the test that docs/laws.md names for it fail
	$(RUN) -m tests.contracts.try_faults

nightly: setup ## the contracts' tests with 10,000 fuzz runs and long campaigns; hours
	FOUNDRY_PROFILE=nightly "$(FORGE)" test

# Tools that pin other versions of what the project uses, each in a venv of its own. They look for `forge` on the path.
# $(call TOOL,NAME,PACKAGE): installs it once.
TOOL = test -x build/tools/$(1)/bin/$(1) || { $(PYTHON) -m venv build/tools/$(1); build/tools/$(1)/bin/pip install --quiet --disable-pip-version-check '$(2)'; }

prove: setup ## halmos proves the arithmetic and the trees for every input (tests/contracts/proofs); minutes
	$(call TOOL,halmos,halmos==0.3.3)
	export PATH="$$(dirname "$(FORGE)"):$$PATH" FOUNDRY_PROFILE=proofs; \
	build/tools/halmos/bin/halmos --root . --forge-build-out build/proofs/out --loop 256 --solver-timeout-assertion 300000

slither: setup ## static analysis of the contracts; docs/threats.md answers its findings
	$(call TOOL,slither,slither-analyzer==0.11.6)
	export PATH="$$(dirname "$(FORGE)"):$$PATH" FOUNDRY_OUT=build/slither/out FOUNDRY_CACHE_PATH=build/slither/cache; \
	forge build --build-info --force contracts/src; \
	build/tools/slither/bin/slither . --ignore-compile --foundry-out-directory build/slither/out --exclude-dependencies \
		--filter-paths node_modules --fail-none

check: setup ## style, types, and that what is generated is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	"$(FORGE)" fmt --check
	$(RUN) -m contracts.build --check
	$(call PROTOC,build/protoc)
	for file in ring_pb2.py ring_pb2.pyi ring_pb2_grpc.py; do diff -u worker/$$file build/protoc/worker/$$file; done

format: setup ## what `check` demands of style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	"$(FORGE)" fmt

test-system: setup ## tests of the whole system with outside servers: needs PostgreSQL (Debian: apt-get install postgresql)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,fleet]'
	$(RUN) -m pytest --override-ini addopts='--import-mode=importlib --strict-markers' tests/system

vectors: setup ## refill the shared vectors of the two referees
	$(RUN) tests/twin/fill.py

snapshots: setup ## refill the committed ABIs, storage layouts and gas
	$(RUN) -m contracts.build
	"$(FORGE)" test --match-path '*Gas*'

proto: setup ## regenerate worker/ring_pb2* from worker/ring.proto
	$(call PROTOC,.)

bench: setup ## list the benchmarks; `make bench NAME=x` runs one
	$(BIN)/plumb bench $(NAME) $(if $(NAME),--report build/bench/$(NAME).json)

clean: ## forget what was built; keeps .venv and node_modules
	rm -rf build .solcx .pytest_cache .mypy_cache .ruff_cache
