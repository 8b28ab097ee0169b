# Everything here can be run again, and twice at once. State is in .state/, the Python environment in .venv/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup engine engine-stop demo run test lint format bench clean
.NOTPARALLEL:

# Recipes that use the engine get its address this way.
with_engine = eval "$$(.ci/engine env 2>/dev/null)"

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install uv and the locked dependencies into this checkout
	@.ci/setup

engine: ## Find a Docker engine, or as root install and start a private one
	@.ci/engine start

engine-stop: ## Stop the private engine, if this checkout started one
	@.ci/engine stop

demo: setup engine ## See it work: sandboxes, crashes and their history, in about a minute
	@$(with_engine); .venv/bin/sandledger demo

run: setup engine ## Serve the API on this machine
	@$(with_engine); .venv/bin/sandledger serve

test: setup ## Run every test (REQUIRE_ENGINE=1: fail instead of skip where no engine can run)
	@.ci/engine start || { [ -z "$${REQUIRE_ENGINE:-}" ] && echo "Tests that need an engine will be skipped."; }
	@$(with_engine); .venv/bin/python -m pytest

lint: setup ## Check style, format, types and import arrows
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright
	.venv/bin/python -m pytest -q tests/unit/test_arrows.py

format: setup ## Format the code and fix what can be fixed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup engine ## Measure, as ratios against raw engine calls and a minimal handler
	@$(with_engine); .venv/bin/python -m tests.bench

clean: engine-stop ## Stop the private engine and remove all that was installed and stored here
	rm -rf .state .venv .pytest_cache .ruff_cache .hypothesis dist
