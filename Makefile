# Everything a newcomer needs: Python 3.11 or newer, make and git. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# Tests start hundreds of interpreters: each of them would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all chaos lint bench docs imports hooks changelog build release-check workflows clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

# One environment for all targets; made again when the pinned versions or the metadata change.
$(VENV)/.installed: pyproject.toml demo/pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Phonon needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' --editable demo
	@touch $@

demo: $(VENV)/.installed ## run the main job on real data with an embedded server
	$(BIN)/phonon demo $(ARGS)

# Tests wait more than they compute: four workers use two cores, and each has servers of its own.
test: $(VENV)/.installed ## run the tests, but for the slow exhaustive ones
	$(BIN)/python -m pytest -n 4 --dist worksteal -m "not slow and not chaos" $(ARGS)

test-all: $(VENV)/.installed ## run all tests, as CI does
	PHONON_TEST_EXAMPLES=1 $(BIN)/python -m pytest -n 3 --dist worksteal --maxfail 10 $(ARGS)

chaos: $(VENV)/.installed ## kill workers by the hundred, and check that nothing is lost
	$(BIN)/python -m pytest -m chaos -rP $(ARGS) tests/chaos

lint: $(VENV)/.installed ## check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The peers are needed for nothing else, so they are not among what all targets need.
$(VENV)/.peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]' --editable demo
	@touch $@

bench: $(VENV)/.peers ## measure against bare Redis and peers
	$(BIN)/python benchmarks/compare.py --json docs/benchmarks.json --chart docs/benchmarks.svg $(ARGS)
	$(BIN)/python benchmarks/round_trips.py
	$(BIN)/python benchmarks/references.py
	$(BIN)/python benchmarks/takeover.py
	$(BIN)/python benchmarks/locks.py
	$(BIN)/python benchmarks/aio.py
	$(BIN)/python benchmarks/paths.py
	$(BIN)/python benchmarks/footprint.py
	$(BIN)/python benchmarks/scale.py --keys 100000 --messages 1000000
	$(BIN)/python benchmarks/backpressure.py --seconds 12

# The site's builder is needed for nothing else, and nor is pyright.
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]' --editable demo
	@touch $@

docs: $(VENV)/.docs ## run the examples in README.md and docs/, check types in examples/, build the site into build/site
	PHONON_TEST_SITE=1 $(BIN)/python -m pytest tests/docs tests/integration/contrib/test_lines.py
	$(BIN)/pyright --pythonpath $(BIN)/python examples
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

release-check: ## build what is published, install it clean, audit it, and list its parts
	.ci/release

imports: ## draw the tree of imports; ARGS=--write puts it into docs/architecture.md
	PYTHONPATH=tests python3 -m support.imports $(ARGS)

# What releases are made with is needed for nothing else.
$(VENV)/.release: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[release]' --editable demo
	@touch $@

hooks: $(VENV)/.release ## have git check style and types with each commit
	$(BIN)/pre-commit install

changelog: $(VENV)/.release ## move the fragments of changelog.d into CHANGELOG.md; ARGS="--version 4.0.0"
	$(BIN)/towncrier build --yes $(ARGS)

# The library's wheel stays small: people install it into every worker.
build: $(VENV)/.release ## build the distributions of phonon and phonon-demo into dist/
	rm -rf dist build demo/build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist demo
	rm -rf build demo/build
	@ls -l dist
	@test $$(wc -c < $$(ls dist/phonon-[0-9]*.whl)) -lt 204800 || echo "the wheel of phonon has more than 200 KB"

workflows: ## check .github/workflows, if actionlint is installed
	actionlint

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist demo/build demo/dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info demo/src/*.egg-info
